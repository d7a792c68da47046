"""GGUF, the format of llama.cpp: reading what a file is, and writing it for the families that are known here."""
