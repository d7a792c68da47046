"""`lmms-plugin doctor`: whether what a run needs is there and works, and the remedy for what does not.

Every check is a function without arguments that yields rows. It runs in a Python process of its own, so that a
library that cannot be imported, hangs or takes its process down is a row, too, and keeps no other check from running.
"""
