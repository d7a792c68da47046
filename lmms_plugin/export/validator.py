"""Every Eval Ever's own validator, which checks written records where its package is installed.

It checks more than single records: that both files are at their stated paths, name each other and agree.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from lmms_plugin.export.record_types import VERSION

PACKAGE = "every_eval_ever"
HOW = "pip install 'lmms-plugin[export]', in Python 3.12 or newer"


def check(folder: Path, *files: Path) -> str:
    """Check written records.

    Args:
        folder: Folder that contains `data`.
        files: Both files, relative to the folder.

    Returns:
        Name of the validator, in a line, with its warnings, which are not errors.

    Raises:
        ValueError: The validator refuses a file; names the file and the reason.
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
    """Files of an export, as the validator reads them: by their relative paths."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __contains__(self, file: object) -> bool:
        return isinstance(file, str) and (self._folder / file).is_file()

    def text(self, file: str) -> str:
        return (self._folder / file).read_text(encoding="utf-8")
