"""The `lmms-plugin` command: options, tables and displays. Only this package writes to a terminal."""
