"""Every Eval Ever's own validator, which checks what was written where its package is installed.

It checks more than single records: that both files lie where they say, name each other and agree.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from lmms_plugin.export.record_types import VERSION

PACKAGE = "every_eval_ever"
HOW = "pip install 'lmms-plugin[export]', in Python 3.12 or newer"


def check(folder: Path, *files: Path) -> str:
    """Check records that were written.

    Args:
        folder: Where `data` is.
        files: Both, relative to the folder.

    Returns:
        Who checked them, in a line; with what the validator warns of, which is no error.

    Raises:
        ValueError: If the validator refuses one; says which and why.
    """
    own = f"records checked by lmms-plugin's own models of Every Eval Ever {VERSION}"
    if find_spec(PACKAGE) is None:
        return f"{own}; its own validator checks them, too, after {HOW}"
    from every_eval_ever.validate import get_schema_version, validate_file

    found = get_schema_version()
    if found != VERSION:
        return f"{own}; the validator that is installed is of {found} and was not asked: {HOW}"
    written = _Written(folder)
    warnings = []
    for file in map(Path.as_posix, files):
        about = {"repo_path": file, "available_files": written, "read_repo_file": written.text}
        report = validate_file(folder / file, run_semantic_checks=True, **about)
        if not report.valid:
            first = report.errors[0]
            raise ValueError(f"{file}: Every Eval Ever's validator refuses {first['loc']}: {first['msg']}")
        warnings += [f"{file}: {warning['msg']}" for warning in report.warnings]
    told = f", which warns: {'; '.join(warnings)}" if warnings else ", without a warning"
    return f"records checked by the validator of Every Eval Ever {VERSION}{told}"


class _Written:
    """The files of an export, as the validator asks for them: by their paths in it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __contains__(self, file: object) -> bool:
        return isinstance(file, str) and (self._folder / file).is_file()

    def text(self, file: str) -> str:
        return (self._folder / file).read_text(encoding="utf-8")
