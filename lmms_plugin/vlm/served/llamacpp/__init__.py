"""llama.cpp: its server started as a child process, and asked with prompts that are rendered here."""
