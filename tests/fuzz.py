"""Fuzzing of everything that reads what others wrote: `make fuzz`, ten minutes unless FUZZ_MINUTES says otherwise.

Whatever is written there, either it is read or it is refused in words: no other exception than those that the command
makes a line of, each of one line. What a leaderboard is given is refused or verified, and nothing is raised at all.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from helpers import study_folders, submissions
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from lmms_plugin import demo
from lmms_plugin.analysis.logs import read
from lmms_plugin.analysis.measure import MeasurementSettings
from lmms_plugin.arguments import ModelArguments, read_arguments
from lmms_plugin.export.measured import measured
from lmms_plugin.leaderboard.verification import Refused, Verified
from lmms_plugin.protocol.dialects import DIALECTS
from lmms_plugin.protocol.response import Response
from lmms_plugin.protocol.verbalised import stated_confidence
from lmms_plugin.quant_backends.calibration.sources import CalibrationSpec
from lmms_plugin.quant_backends.plans.plan import QuantPlan, QuantSpec
from lmms_plugin.report.numbers import results_folder as report
from lmms_plugin.study.file import reading as study
from lmms_plugin.study.store.folder import StudyFolder
from lmms_plugin.utils.reading.problems import MOST_LINES, SeveralErrors

TOLD = (ValueError, OSError, RuntimeError, ImportError)
"""What `lmms-plugin` makes a line of; a recursion without end is a `RuntimeError` and none of them."""
LONGEST = 3000
SETTINGS = MeasurementSettings(resamples=5)
EXAMPLES = 30
"""Of each target, before it is the next one's turn."""

# --- What is written -------------------------------------------------------------------------------------------------

TEXTS = st.text(max_size=20) | st.sampled_from(
    [
        "",
        "\ud800",
        "\x00",
        "\u202e",
        "a" * 2000,
        "../../x",
        "/",
        "[/x]",
        "$",
        "NaN",
        "1e999",
        "four",
        "\u2028",
        "9" * 50,
    ]
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**400, -(10**400), 2**63, -(2**63) - 1, 10**20]),
    st.floats(),
    TEXTS,
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6
)
DROPPED = object()


def _places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield here
    named = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in named:
        yield from _places(inner, (*here, name))


def _put(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    if not place:
        return None if new is DROPPED else new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(place) == 1 and new is DROPPED:
        del copy[place[0]]
    else:
        copy[place[0]] = _put(value[place[0]], place[1:], new)
    return copy


@st.composite
def altered(draw: Any, value: Any) -> Any:
    """A JSON value with one to three of its parts replaced or left out."""
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(list(_places(value))))
        value = _put(value, place, draw(st.just(DROPPED) | VALUES))
    return value


@st.composite
def corrupted(draw: Any, content: bytes) -> bytes:
    """Bytes of which some are cut off, changed, repeated or put in."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(len(content), start + draw(st.sampled_from([0, 1, 8, 10_000])))))
        put = draw(
            st.binary(max_size=8)
            | st.sampled_from([b"", b"[" * 3000, b"{" * 3000, b"\xff\xfe", content[start:end] * 3])
        )
        content = content[:start] + put + content[end:]
    return content


def of_json(value: Any) -> st.SearchStrategy[bytes]:
    """A JSON file that was altered or corrupted."""
    plain = json.dumps(value).encode()
    return altered(value).map(lambda new: json.dumps(new).encode()) | corrupted(plain)


_WORDS = (
    *("models: [demo]", "tasks: [shapes_rec]", "methods: [rtn]", "bits: [4]", "bits: {vision: [4, 8]}", "name: x"),
    *(
        "grids:",
        "cells:",
        "  - method: rtn",
        "exclude:",
        "analysis:",
        "  kind: components",
        "seeds: [0, 1]",
        "limit: 5",
    ),
    *("resources: {gpus: 1, processes: 2, timeout: 9}", "calibration: [noise]", "components: [all, vision+language]"),
    *("components: {vision: 8}", "rules:", "  - {match: 'a', bits: 4}", "skip: ['x']", "roles: {attention: 8}"),
    *("batch_size: auto", "model_args: {dtype: float16}", "group_sizes: [-1, 64]", "metrics: [ece]"),
    *("a: &a", "<<: *a", "? *a", "[*a, *a]", "!!bool x", "!!int ''", "!!timestamp x", "!!python/name:os.system", "!x"),
    *("---", "...", "%YAML 1.1", "- ", "? ", ": ", "{", "}", "[", "]", "'", '"', "|", ">", "#", "\t", "\x85", "\ufeff"),
    *("null", "~", "yes", "0x", "1_000", ".inf", ".nan", "2024-99-99", "9" * 5000, "(a|aa)+$", "16", "-1", "1.5"),
)
YAML = st.one_of(
    st.lists(st.sampled_from(_WORDS), max_size=12).map(lambda words: "\n".join(words).encode()),
    st.lists(st.sampled_from(_WORDS), max_size=8).map(lambda words: " ".join(words).encode()),
    VALUES.map(lambda value: json.dumps(value).encode()),
    st.sampled_from(["utf-16", "utf-32", "latin-1"]).map(lambda encoding: "models: [dëmo]".encode(encoding)),
    st.just(b"models: [demo]\ntasks: [shapes_rec]\nmethods: [rtn]\nbits: [4, 3]\n").flatmap(corrupted),
)


# --- Who reads it ----------------------------------------------------------------------------------------------------


@cache
def scratch() -> Path:
    """A folder that is gone when the process is."""
    folder = tempfile.TemporaryDirectory(prefix="lmms-plugin-fuzz-")
    scratch.kept = folder  # type: ignore[attr-defined]
    return Path(folder.name)


@cache
def cell() -> Path:
    """A finished cell of a study."""
    axes = {"method": "rtn", "bits": 4, "seed": 0}
    return study_folders.write_cell(scratch() / "study", "rtn", axes, study_folders.outcomes(6, 4, 3, 2))


@cache
def submission() -> Path:
    """A submission that holds."""
    run = submissions.write_run(scratch() / "run", submissions.answered(12))
    return Path(submissions.submit(run, scratch() / "submission"))


@cache
def checkpoint() -> Path:
    """A checkpoint, its weights cut off behind their head."""
    return Path(shutil.copytree(demo.CHECKPOINT, scratch() / "checkpoint"))


def with_file(file: Path, content: bytes, read: Callable[[], object]) -> None:
    """Call something while a file has another content."""
    before = file.read_bytes() if file.exists() else None
    file.write_bytes(content)
    try:
        read()
    finally:
        file.unlink() if before is None else file.write_bytes(before)


def _read_run() -> None:
    file = next(cell().glob("*_results.json"))
    try:
        read(file)
    finally:
        report.read_run(file, cell().parent.parent, SETTINGS)


def _changed(pattern: str) -> st.SearchStrategy[bytes]:
    return of_json(json.loads(next(cell().glob(pattern)).read_text()))


def results_files(data: st.DataObject) -> None:
    """Tables of results."""
    with_file(next(cell().glob("*_results.json")), data.draw(_changed("*_results.json")), _read_run)


def logs(data: st.DataObject) -> None:
    """Logs of samples, of which any line may be another."""
    file = next(cell().glob("*_samples_rec.jsonl"))
    lines = file.read_bytes().splitlines()
    number = data.draw(st.integers(0, len(lines) - 1))
    lines[number] = data.draw(of_json(json.loads(lines[number])))
    with_file(file, b"\n".join(lines) + b"\n", _read_run)


def accounts(data: st.DataObject) -> None:
    """What a study writes of its cells."""
    study_of = StudyFolder(cell().parent.parent)
    told = {"seconds": 1.0, "files": {"cell.json": "0" * 64}, "finished": "2026"}
    name, value = data.draw(
        st.sampled_from(
            [
                ("cell.json", json.loads((cell() / "cell.json").read_text())),
                ("done.json", told),
                ("quant_report.json", {"bits_per_weight": 4.2, "modules": [{"name": "a", "relative_error": 0.1}]}),
            ]
        )
    )

    def read() -> None:
        study_of.finished()
        study_of.damaged()
        study_of.failure("rtn")
        _read_run()

    with_file(cell() / name, data.draw(of_json(value)), read)


def study_files(data: st.DataObject) -> None:
    """Study files."""
    file = scratch() / "study.yaml"
    with_file(file, data.draw(YAML), lambda: study.read(file))


def plans(data: st.DataObject) -> None:
    """Plan files."""
    file = scratch() / "plan.yaml"

    def read() -> None:
        QuantPlan.from_yaml(file, default=QuantSpec(4)).spec_for("model.layers.0.q_proj", "language")

    with_file(file, data.draw(YAML), read)


def dialects(data: st.DataObject) -> None:
    """Answers, in every dialect, and what models say of their confidence: nothing is raised at all."""
    pieces = st.sampled_from(
        [
            *"[](){}<>,.:;-+ \n%|0123456789",
            "<loc0001>",
            "<box>",
            "</box>",
            '"bbox_2d"',
            "nan",
            "1e999",
            "9" * 400,
            "²",
            "٣",
        ]
    )
    text = data.draw(st.lists(pieces | TEXTS, max_size=30).map("".join))
    for dialect in DIALECTS.values():
        found = dialect.parse(text, original_size=(64, 48), model_size=(56, 56))
        assert found.box is None or all(map(math.isfinite, found.box)), (dialect.name, found)
    stated = stated_confidence(text)
    assert math.isnan(stated) or 0.0 <= stated <= 1.0


def answers(data: st.DataObject) -> None:
    """Answers with their log-probabilities as logs hold them."""
    line = json.loads(next(cell().glob("*_samples_rec.jsonl")).read_text().splitlines()[0])
    whole = Response("[1,2]", (), (3, 4), None, "demo").encode() + json.dumps(line)
    Response.decode(data.draw(corrupted(whole.encode())).decode(errors="surrogateescape"))


def arguments(data: st.DataObject) -> None:
    """`--model_args` and sources of calibration."""
    names = st.sampled_from([*ModelArguments.__dataclass_fields__, "x", ""])
    pairs = data.draw(st.lists(st.tuples(names, TEXTS | SCALARS.map(str)), max_size=4))
    given_as = ",".join(f"{name}={value}" for name, value in pairs)
    for parse in (
        lambda: ModelArguments.parse(read_arguments(given_as), {}).quant_plan(4),
        lambda: CalibrationSpec.parse(data.draw(st.lists(TEXTS, max_size=4).map(":".join))),
    ):
        expect_told(parse)


def checkpoints(data: st.DataObject) -> None:
    """What a checkpoint says of itself."""
    name = data.draw(
        st.sampled_from(["config.json", "tokenizer_config.json", "x.safetensors.index.json", "x.safetensors"])
    )
    file = checkpoint() / name
    content = file.read_bytes() if file.exists() else json.dumps({"weight_map": {"a": "model.safetensors"}}).encode()
    with_file(file, data.draw(corrupted(content)), ModelArguments(pretrained=str(checkpoint())).find_checkpoint)


def submitted(data: st.DataObject) -> None:
    """Submissions: each is refused or verified."""
    folder = submission()
    file = data.draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())))
    manifest = (folder / "manifest.json").read_bytes()
    content = file.read_bytes()
    new = data.draw(of_json(json.loads(content)) if file.suffix == ".json" else corrupted(content))

    def read() -> None:
        if file.name != "manifest.json":
            submissions.seal(folder)
        found = submissions.verify(folder)
        assert isinstance(found, Verified | Refused)
        assert isinstance(found, Verified) or found.reason.isprintable()

    try:
        with_file(file, new, read)
    finally:
        (folder / "manifest.json").write_bytes(manifest)


def exported(data: st.DataObject) -> None:
    """A run of which some is other, on its way to a leaderboard."""
    file = next((scratch() / "run").glob("*_results.json"))
    content = data.draw(of_json(json.loads(file.read_text())))
    with_file(file, content, lambda: measured(read(file), SETTINGS))


TARGETS: tuple[Callable[[Any], None], ...] = (
    *(
        results_files,
        logs,
        accounts,
        study_files,
        plans,
        dialects,
        answers,
        arguments,
        checkpoints,
        submitted,
        exported,
    ),
)


# --- What must hold --------------------------------------------------------------------------------------------------


def expect_told(read: Callable[[], object]) -> None:
    """Whatever is raised is one of ours, in one line of bounded length, or in a bounded number of such lines."""
    told: Sequence[str] = ["nothing"]
    try:
        read()
    except RecursionError:
        raise
    except SeveralErrors as error:
        told = error.args
    except TOLD as error:
        told = [str(error) or f"{type(error).__name__} without a word\n"]
    assert len(told) <= MOST_LINES + 1
    for line in told:
        assert "\n" not in line, line
        assert len(line) <= LONGEST, f"{len(line)} characters: {line[:200]}"


def fuzz(target: Callable[[Any], None], number: int, examples: int = EXAMPLES) -> None:
    """Give a target some examples; the same number gives the same ones.

    Raises:
        BaseException: What a target raised that is none of ours, with the smallest example.
    """

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        print_blob=False,
    )
    @given(st.data())
    def once(data: st.DataObject) -> None:
        expect_told(lambda: target(data))

    submission()
    once()


def main() -> int:
    """Fuzz all targets in turn until the time is up; the exit status is 1 if one of them failed."""
    minutes = float(os.environ.get("FUZZ_MINUTES", "10"))
    began, rounds, failed = time.monotonic(), 0, set[str]()
    first = int(os.environ.get("FUZZ_SEED", time.time_ns() % 1_000_000))
    print(f"FUZZ_SEED={first}", flush=True)
    while time.monotonic() - began < 60 * minutes:
        for target in TARGETS:
            if target.__name__ in failed or time.monotonic() - began >= 60 * minutes:
                continue
            try:
                fuzz(target, first + rounds)
            except Exception:
                failed.add(target.__name__)
                print(f"FAILED {target.__name__}, FUZZ_SEED={first + rounds}", flush=True)
                traceback.print_exc(limit=-12)
        rounds += 1
    named = ", ".join(sorted(failed)) or "none"
    print(f"{rounds} rounds of {len(TARGETS)} targets, {EXAMPLES} examples each; failed: {named}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
