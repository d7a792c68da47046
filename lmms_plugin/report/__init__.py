"""The report: one self-contained page on a folder of results, with its figures and tables as files."""
