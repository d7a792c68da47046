"""The `lmms-plugin` command: options, tables and displays; the only place that writes to a terminal."""
