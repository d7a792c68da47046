"""Data of the report: runs read, measured and summarised, and tables of them."""
