"""`lmms-plugin doctor`: checks of what a run needs, with a remedy for each failure.

Every check is a function without arguments that yields rows; an exception becomes a row, too. Checks run in separate
processes, so that a library that hangs or crashes does not stop the other checks.
"""
