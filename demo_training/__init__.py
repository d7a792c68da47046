"""How the embedded demo's data and checkpoint were made; run from the checkout, not part of what is installed."""

# Importing it puts the checkout behind the installed package.
import bench  # noqa: F401
