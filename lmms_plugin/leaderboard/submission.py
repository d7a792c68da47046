"""A submission: one run with its logs, its records in Every Eval Ever, and a manifest of hashes, as a folder or zip.

What is in it:

- `manifest.json`: the hash of every file, who says so, and how intervals were made
- `results/<date>_results.json`: as lmms-eval wrote it
- `results/<date>_samples_<task>.jsonl`: the log of every task of this package
- `results/cell.json` and `results/quant_report.json`: where the run has them
- `data/<collection>/<organization>/<model>/<uuid>.json` and `<uuid>_samples.jsonl`: the records
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lmms_plugin import __version__
from lmms_plugin.analysis.measure import MeasurementSettings
from lmms_plugin.analysis.study_files import CELL
from lmms_plugin.export import every_eval_ever, facts
from lmms_plugin.export.every_eval_ever import EvaluationSource
from lmms_plugin.export.measured import VerifiedRun
from lmms_plugin.quant_backends.plans.report_schema import REPORT
from lmms_plugin.utils import hashing
from lmms_plugin.utils.files import expect_inside, json_object, new_folder, replace_text

MANIFEST = "manifest.json"
FORMAT, FORMAT_VERSION = "lmms-plugin submission", 1
RESULTS = "results"
MOST_BYTES = 20 * 2**30
"""Unpacked size from which a zip is refused."""
MOST_FILES, MOST_TIMES = 10_000, 200
"""Entries of a zip, and how many times its own size it may unpack to; logs do so about ten times."""
LONGEST_JSON, LONGEST_LINE = 64 * 2**20, 4 * 2**20
"""Bytes of a JSON file and of a line of a log: more would take too much memory to read."""
MOST_RESAMPLES = 10_000
"""From which on making a submission's intervals again would take whoever checks it too long."""
_BLOCK = 1 << 20
_CHOSEN = ("resamples", "seed", "level", "held_out", "calibrator")
"""What is told of how intervals were made; the confidence is always that of the kind of task."""


@dataclass(frozen=True)
class Manifest:
    """What a submission says it holds.

    Attributes:
        lmms_plugin: Version that made it.
        source: Who says so.
        settings: Of the intervals.
        files: Path in the submission → SHA-256 of the file.
    """

    lmms_plugin: str
    source: EvaluationSource
    settings: MeasurementSettings
    files: Mapping[str, str]

    def to_json(self) -> str:
        """As it is written."""
        content = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "lmms_plugin": self.lmms_plugin,
            "source": asdict(self.source),
            "settings": {name: getattr(self.settings, name) for name in _CHOSEN},
            "files": dict(self.files),
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            ValueError: If there is none, or it is damaged or of another version.
        """
        file = folder / MANIFEST
        if not file.is_file():
            raise ValueError(f"expected {MANIFEST} in the submission, got none")
        try:
            content = json_object(file.read_bytes(), MANIFEST)
            found = (content.get("format"), content.get("version"))
            if found != (FORMAT, FORMAT_VERSION):
                raise ValueError(f"expected {FORMAT} {FORMAT_VERSION}, got {found[0]} {found[1]}")
            files = {str(name): str(digest) for name, digest in content["files"].items()}
            source, settings = EvaluationSource(**content["source"]), _settings(content["settings"])
            return cls(str(content["lmms_plugin"]), source, settings, files)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{MANIFEST} is damaged: {error}") from error


def build(measured: VerifiedRun, source: EvaluationSource, folder: Path) -> str:
    """Write a submission to a new folder.

    Returns:
        Who checked its records, in a line.

    Raises:
        ValueError: If the folder is there already, or a record is not valid; then nothing is left.
    """
    if folder.exists():
        raise ValueError(f"expected a new folder for the submission, {folder} is there already")
    with new_folder(folder) as unfinished:
        results = unfinished / RESULTS
        results.mkdir()
        run = measured.run
        for file in (run.file, *map(run.log, run.tasks)):
            shutil.copyfile(file, results / file.name)
        for name in (CELL, REPORT):
            if (beside := facts.beside(run.file, name)) is not None:
                shutil.copyfile(beside, results / name)
        checked = every_eval_ever.write(measured, source, unfinished).checked
        manifest = Manifest(__version__, source, measured.settings, digests(unfinished))
        replace_text(unfinished / MANIFEST, manifest.to_json())
    return checked


def pack(folder: Path) -> Path:
    """A submission's folder as a zip beside it; the same content gives the same file.

    Raises:
        ValueError: If there is such a file already.
    """
    target = folder.with_name(folder.name + ".zip")
    if target.exists():
        raise ValueError(f"expected a new file for the submission, {target} is there already")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(path.relative_to(folder).as_posix())
            entry.compress_type = zipfile.ZIP_DEFLATED
            with path.open("rb") as stream, archive.open(entry, "w", force_zip64=True) as packed:
                shutil.copyfileobj(stream, packed, _BLOCK)
    return target


@contextmanager
def opened(path: Path) -> Iterator[Path]:
    """The folder of a submission, for a zip a temporary one.

    Raises:
        ValueError: If it is neither a folder nor a zip, or the zip holds what does not belong in one.
    """
    if path.is_dir():
        yield path
        return
    if not path.is_file():
        raise ValueError(f"expected a submission as folder or zip, there is no {path}")
    if not zipfile.is_zipfile(path):
        raise ValueError("expected a folder or a zip")
    with TemporaryDirectory(prefix="lmms-plugin-") as unpacked:
        _unpack(path, Path(unpacked))
        yield Path(unpacked)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a submission but the manifest, by its path.

    Raises:
        ValueError: If there is something that is no plain file.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(f"expected plain files only, got {path.relative_to(folder)}")
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST:
            found[name] = hashing.of_file(path)
    return found


def expect_checkable(settings: MeasurementSettings) -> None:
    """Check that others can afford to make the intervals again.

    Raises:
        ValueError: If that would take too many resamples.
    """
    if not 1 <= settings.resamples <= MOST_RESAMPLES:
        raise ValueError(f"expected 1 to {MOST_RESAMPLES} resamples in a submission, got {settings.resamples}")


def results_file(folder: Path) -> Path:
    """The one results file of a submission.

    Raises:
        ValueError: If there is none or more than one.
    """
    files = sorted((folder / RESULTS).glob("*_results.json"))
    if len(files) != 1:
        raise ValueError(f"expected one results file in {RESULTS}/, got {len(files)}")
    return files[0]


def _settings(content: Mapping[str, Any]) -> MeasurementSettings:
    if content.keys() != {*_CHOSEN}:
        raise ValueError(f"expected the settings {', '.join(_CHOSEN)}, got {', '.join(content)}")
    settings = MeasurementSettings(**content)
    expect_checkable(settings)
    return settings


def _unpack(path: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            if len(set(names)) != len(names):
                raise ValueError("expected every file once in the zip")
            most = min(MOST_BYTES, MOST_TIMES * path.stat().st_size)
            if len(entries) > MOST_FILES or sum(entry.file_size for entry in entries) > most:
                raise ValueError(f"expected at most {MOST_FILES} files and {most} bytes unpacked")
            for name in names:
                expect_inside(name)
            archive.extractall(folder)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"expected a zip that can be read: {error}") from error


def expect_readable(folder: Path) -> None:
    """Check that nothing in a submission is too long to be read into memory, before anything is.

    Raises:
        ValueError: If a JSON file or a line of a log is.
    """
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".jsonl" and path.is_file():
            _expect_short_lines(path)
        elif path.is_file() and path.stat().st_size > LONGEST_JSON:
            raise ValueError(f"{path.name}: expected at most {LONGEST_JSON} bytes in a file, got more")


def _expect_short_lines(path: Path) -> None:
    with path.open("rb") as stream:
        while line := stream.readline(LONGEST_LINE + 1):
            if len(line) > LONGEST_LINE:
                raise ValueError(f"{path.name}: expected at most {LONGEST_LINE} bytes in a line, got more")
