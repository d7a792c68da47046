"""Optional libraries: imported when a backend is chosen; if missing, the error gives the install command."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, *, extra: str, user: str) -> ModuleType:
    """Import an optional library.

    Args:
        module: Name of the module to import.
        extra: Extra of this package that installs it.
        user: Feature that needs it, as shown to the user.

    Raises:
        ImportError: The library is missing (the message holds the install command), or its import fails.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        library = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != library:
            raise
        missing = "is not installed" if error.name == library else f"has no {error.name} in the installed version"
        command = f'pip install "lmms-plugin[{extra}]"'
        raise ImportError(f"{user} needs {library}, which {missing}: {command}", name=library) from error
