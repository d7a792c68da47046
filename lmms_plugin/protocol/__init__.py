"""Protocol: prompts that a model is given and the reading of its answers; independent of tasks and models."""
