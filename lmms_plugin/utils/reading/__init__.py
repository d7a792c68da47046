"""Validation of files and of user input: every error is one line that names the place."""
