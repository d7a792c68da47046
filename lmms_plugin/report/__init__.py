"""The report: one self-contained page on a folder of results, with figures and tables as files."""
