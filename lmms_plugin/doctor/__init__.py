"""`lmms-plugin doctor`: whether what a run needs is there and works, and the remedy for what does not.

Every check is a function without arguments that yields rows; what it raises is a row, too. Checks run in processes of
their own, so that a library that hangs or takes its process down keeps no others from running.
"""
