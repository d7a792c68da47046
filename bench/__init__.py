"""Measurements of this package, each a module to run: `python -m bench.<name> [--json FILE]`."""

import sys
from pathlib import Path

# Python looks into the checkout first, where the package lies in parts; what is installed is to be measured.
_CHECKOUT = str(Path(__file__).resolve().parent.parent)
if _CHECKOUT in sys.path:
    sys.path.remove(_CHECKOUT)
    sys.path.append(_CHECKOUT)
