"""Logs of finished runs: read once, measured once, for every command, page and export."""
