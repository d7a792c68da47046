"""Planning, running and recording of cells."""
