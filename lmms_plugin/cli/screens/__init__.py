"""What commands print unless all is asked for: one screen each, the answer first."""
