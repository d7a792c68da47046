"""Models behind an OpenAI-compatible server, evaluated as those that are loaded in this process."""
