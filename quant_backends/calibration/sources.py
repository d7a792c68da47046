"""Where calibration inputs come from: named on the command line, drawn and checked before a model is loaded."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from lmms_plugin.demo import DATA
from lmms_plugin.protocol.boxes import Box
from lmms_plugin.quant_backends.calibration import photographs
from lmms_plugin.quant_backends.calibration.synthetic import noise_image, scene, words
from lmms_plugin.quant_backends.plans.specs import DEFAULT_SAMPLES
from lmms_plugin.shifts.image.corruptions import SHIFTS, apply
from lmms_plugin.shifts.severities import checked, named
from lmms_plugin.utils import images, suggest
from lmms_plugin.utils.copies import expect_one_copy
from lmms_plugin.utils.messages import counted

SOURCES = ("none", "noise", "self", "demo", "photographs", "dataset")
REAL = ("demo", "photographs", "dataset")
"""Sources whose images show something, so that a shift of them means something."""
EVALUATION_SPLIT = re.compile(r"(^|[_.-])(val|dev|test)", re.IGNORECASE)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
COMMON_OPTIONS = {"n", "seed", "tokens"}
DATASET_OPTIONS = {"split", "image", "text", "prompt", "force"}
ALLOW, REFUSE = "allow", "refuse"
"""What may become of answers that a model wrote itself and that are mostly empty or loops."""
TEXT_COLUMNS = ("expression", "caption", "text", "sentence", "description")
DESCRIBE = "Describe this image."


class CalibrationSample(NamedTuple):
    """One image with a question and its answer, not yet in any model's own form.

    Attributes:
        image: RGB, original size.
        expression: To be located; the question is then put in the model's dialect. None: `prompt` is the question.
        prompt: The question as it is; None when `expression` is given.
        box: The answer to `expression`, xyxy in [0, 1] of the image; None when it is not known.
        answer: The answer as text; None when it is to be written from `box` or by the model itself.
        wanted: What the model is to write itself in place of the question: an ``expression`` or a ``question``; what it
            was drawn with stays where it cannot. None to take the question as it is.
    """

    image: Image.Image
    expression: str | None = None
    prompt: str | None = None
    box: Box | None = None
    answer: str | None = None
    wanted: str | None = None

    @property
    def unanswered(self) -> bool:
        """Whether it takes the model to answer."""
        return self.answer is None and self.box is None


@dataclass(frozen=True)
class CalibrationSpec:
    """Which inputs a calibrated quantizer sees.

    Attributes:
        source: One of `SOURCES`.
        samples: How many, at least 1.
        seed: Of every random choice.
        tokens: Take no more samples once they hold this many sequence positions; None for all of them.
        path: Hub id, folder of parquet files or parquet file; for ``dataset`` alone.
        split: Of that dataset.
        image: Its image column.
        text: Its text column; None to take RefCOCO+'s schema or the first usual name.
        prompt: Its column of questions, to which `text` holds the answers; None to ask for a description.
        force: Accept an evaluation split, which the report then says.
        shift: Corruption of the images, as ``gaussian_noise_3``: a name of
            `lmms_plugin.shifts.image.corruptions.SHIFTS` and a severity; for `REAL` sources alone. None to take them as
            they are.
        degenerate: `REFUSE` or `ALLOW` answers of which most are empty, blank or loops; for ``self`` alone.
    """

    source: str
    samples: int = DEFAULT_SAMPLES
    seed: int = 0
    path: str | None = None
    split: str = "train"
    image: str = "image"
    text: str | None = None
    prompt: str | None = None
    force: bool = False
    tokens: int | None = None
    shift: str | None = None
    degenerate: str = REFUSE

    @classmethod
    def parse(cls, text: str, *, samples: int = DEFAULT_SAMPLES, seed: int = 0) -> CalibrationSpec:
        """Read a calibration source from one word of the command line.

        ``none``, ``noise`` (noise images, random words), ``self`` (zero-shot: about images made up here the model
        writes expressions and questions, and answers them), ``demo`` (the embedded demo's validation scenes),
        ``photographs`` (captioned parts of the two that scikit-learn ships), or ``dataset:PATH``, a hub id, a folder of
        parquet files or one such file.

        Options follow behind further colons, because lmms-eval parts arguments at commas. For every source: ``n``
        (instead of `samples`), ``seed`` and ``tokens`` (stop at so many sequence positions). For ``self`` also
        ``degenerate=allow``, which takes the model's answers even if most are empty or loops. For real images also
        ``shift``, which corrupts them (``demo:shift=gaussian_noise_3``). For a dataset also
        ``split``, the columns ``image``, ``text`` and ``prompt``, and ``force``:
        ``dataset:my-org/my-set:split=train:image=image:text=caption:tokens=65536``. An evaluation split (val, dev or
        test in its name) needs ``:force=true``.

        Raises:
            ValueError: Unknown source or option, or a number of samples below 1.
        """
        source, *rest = text.split(":")
        if source not in SOURCES:
            raise suggest.unknown("calibration source", source, SOURCES)
        known: set[str] = set() if source == "none" else COMMON_OPTIONS | ({"shift"} if source in REAL else set())
        known |= {"degenerate"} if source == "self" else set()
        known |= DATASET_OPTIONS if source == "dataset" else set()
        given: dict[str, Any] = {}
        while rest and re.match(r"\w+=", rest[-1]):
            key, _, value = rest.pop().partition("=")
            if key not in known:
                raise suggest.unknown("calibration option", key, sorted(known), source)
            if key in given:
                raise ValueError(f"calibration option {key} is given twice in {text!r}")
            given[key] = _value(key, value)
        options = {"samples": given.pop("n", samples), "seed": seed} | given
        if rest and source != "dataset":
            raise ValueError(f"calibration source {source!r} takes no path, got {text!r}")
        spec = cls(source, path=":".join(rest) or None, **options)
        spec.validate()
        return spec

    def __str__(self) -> str:
        """Write the source as `parse` reads it, but for the number of samples and the seed."""
        named: dict[str, Any] = {}
        if self.source == "dataset":
            named = {"split": self.split, "image": self.image, "text": self.text, "prompt": self.prompt}
        named |= {"degenerate": None if self.degenerate == REFUSE else self.degenerate}
        named |= {"shift": self.shift, "tokens": self.tokens, "force": "true" if self.force else None}
        options = [f"{key}={value}" for key, value in named.items() if value is not None]
        return ":".join([self.source, *([self.path] if self.path else []), *options])

    def validate(self) -> None:
        """Check what can be checked without opening any data.

        Raises:
            ValueError: No samples asked for, no path, an evaluation split, or an unknown shift or severity.
            FileNotFoundError: The path can only be a local one, and it does not exist.
        """
        if self.source == "none":
            return
        if not isinstance(self.samples, int) or self.samples < 1:
            raise ValueError(f"calibration needs at least 1 sample, got {self.samples!r} (calibration_samples= or :n=)")
        if self.seed < 0:
            raise ValueError(f"the seed of a calibration must be 0 or above, got {self.seed}")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"calibration needs at least 1 token, got tokens={self.tokens!r}")
        if self.shift is not None:
            _shift(self.shift)
        if self.source != "dataset":
            return
        if not self.path:
            raise ValueError("calibration source 'dataset' needs a hub id or a path: dataset:PATH")
        local = Path(self.path).expanduser()
        if not local.exists() and not HUB_ID.fullmatch(self.path):
            raise FileNotFoundError(f"calibration data {self.path!r} is neither an existing path nor a hub id")
        split = local.stem if local.is_file() else self.split
        if EVALUATION_SPLIT.search(split) and not self.force:
            raise ValueError(
                f"calibrating on split {split!r} would fit the quantizer to evaluation data; "
                "choose another split, or add :force=true and say so with the results"
            )

    def load_samples(self) -> list[CalibrationSample]:
        """Draw the samples. The same spec always gives the same ones.

        Answers of source ``self`` are still missing: they take the model.

        Raises:
            ValueError: Too few samples, a column missing, a corrupt image (the row is named), or source ``none``.
            FileNotFoundError: Data that is not there.
        """
        self.validate()
        if self.source == "none":
            raise ValueError("this method is calibrated: calibration=none gives it nothing to look at (try self)")
        if self.source == "noise":
            return [_noise(self.seed, index) for index in range(self.samples)]
        if self.source == "self":
            return [_question(self.seed, index) for index in range(self.samples)]
        return self._shifted(self._real())

    def _real(self) -> list[CalibrationSample]:
        if self.source == "demo":
            return _demo(self)
        if self.source == "photographs":
            return _photographs(self)
        return _from_rows(self, self.path or "", self.split)

    def _shifted(self, samples: list[CalibrationSample]) -> list[CalibrationSample]:
        if self.shift is None:
            return samples
        name, severity = _shift(self.shift)
        return [
            sample._replace(image=apply(sample.image, name, severity, f"calibration/{self.seed}/{position}"))
            for position, sample in enumerate(samples)
        ]


def _shift(text: str) -> tuple[str, int]:
    name, _, severity = text.rpartition("_")
    if not severity.isdigit():
        raise ValueError(f"calibration option shift must be a corruption and its severity, as fog_3, got {text!r}")
    return named(name, SHIFTS).name, checked(int(severity), name)


def _value(key: str, text: str) -> Any:
    if key in COMMON_OPTIONS:
        if not re.fullmatch(r"-?\d+", text):
            raise ValueError(f"calibration option {key} must be a whole number, got {text!r}")
        return int(text)
    if key == "degenerate":
        if text not in (ALLOW, REFUSE):
            raise ValueError(f"calibration option degenerate must be {ALLOW} or {REFUSE}, got {text!r}")
        return text
    if key != "force":
        if not text:
            raise ValueError(f"calibration option {key} is empty")
        return text
    if text.lower() not in ("true", "false"):
        raise ValueError(f"calibration option force must be true or false, got {text!r}")
    return text.lower() == "true"


def _noise(seed: int, index: int) -> CalibrationSample:
    rng = random.Random(f"{seed}/{index}")
    image = noise_image(np.random.default_rng([seed, index]))
    return CalibrationSample(image, prompt=words(rng, 12), answer=words(rng, 6))


def _question(seed: int, index: int) -> CalibrationSample:
    """Ask about a made-up scene, and every other time about noise: shapes alone light up few channels."""
    rng = np.random.default_rng([seed, index])
    image, expression = scene(rng)
    wanted = "question" if index // 2 % 2 else "expression"
    return CalibrationSample(noise_image(rng) if index % 2 else image, expression=expression, wanted=wanted)


def _photographs(spec: CalibrationSpec) -> list[CalibrationSample]:
    loaded = photographs.load()
    crops = [photographs.crop(loaded, np.random.default_rng([spec.seed, index])) for index in range(spec.samples)]
    return [CalibrationSample(image, prompt=DESCRIBE, answer=caption) for image, caption in crops]


def _demo(spec: CalibrationSpec) -> list[CalibrationSample]:
    # The demo is evaluated on its other splits; this one is set apart for calibration.
    return _from_rows(spec, DATA, "val")


def _from_rows(spec: CalibrationSpec, path: str, split: str) -> list[CalibrationSample]:
    rows = _open_rows(spec, path, split)
    samples = [_sample(spec, row, position) for position, row in enumerate(rows)]
    if len(samples) < spec.samples:
        raise ValueError(
            f"calibration asks for {counted(spec.samples, 'sample')}, but {path!r} split {split!r} has {len(samples)}; "
            "lower calibration_samples"
        )
    return samples


def _open_rows(spec: CalibrationSpec, path: str, split: str) -> Any:
    import datasets
    from pyarrow import parquet

    local = Path(path).expanduser()
    if not local.exists():
        remote = _open_hub(path, split)
        _expect_column(spec.image, remote.column_names or [], path)
        return _undecoded(remote, spec.image).shuffle(seed=spec.seed, buffer_size=10 * spec.samples).take(spec.samples)
    files = [local] if local.is_file() else _split_files(local, split)
    if not files:
        raise FileNotFoundError(f"no parquet file for split {split!r} in {path!r}")
    if not sum(parquet.read_metadata(file).num_rows for file in files):
        raise ValueError(f"calibration data {path!r} split {split!r} holds no rows")
    table = datasets.Dataset.from_parquet([str(file) for file in files])
    _expect_column(spec.image, table.column_names, path)
    drawn = random.Random(spec.seed).sample(range(len(table)), min(spec.samples, len(table)))
    return _undecoded(table, spec.image).select(drawn)


def _split_files(folder: Path, split: str) -> list[Path]:
    """Return the parquet files with the split's name as a whole word in their path below the folder.

    Raises:
        ValueError: They hold the split twice.
    """
    word = re.compile(rf"(^|[^A-Za-z0-9]){re.escape(split)}([^A-Za-z0-9]|$)")
    files = sorted(file for file in folder.rglob("*.parquet") if word.search(str(file.relative_to(folder))))
    expect_one_copy(files)
    return files


def _open_hub(path: str, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(path, split=split, streaming=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot open calibration data {path!r} split {split!r}: {error}. "
            "A folder of parquet files works without a network: dataset:/path/to/folder"
        ) from error


def _sample(spec: CalibrationSpec, row: dict[str, Any], position: int) -> CalibrationSample:
    image = _decode(row[spec.image], position)
    if spec.text is None and spec.prompt is None and "answer" in row and "bbox" in row:
        return _referring_sample(image, row, random.Random(f"{spec.seed}/{position}"), position)
    column = spec.text or next((name for name in TEXT_COLUMNS if name in row), "text")
    prompt = DESCRIBE if spec.prompt is None else _text(spec, row, spec.prompt, position)
    return CalibrationSample(image, prompt=prompt, answer=_text(spec, row, column, position))


def _text(spec: CalibrationSpec, row: dict[str, Any], column: str, position: int) -> str:
    _expect_column(column, list(row), spec.path or spec.source)
    text = row[column]
    text = text[0] if isinstance(text, list) and text else text
    if not isinstance(text, str) or not text:
        raise ValueError(f"calibration row {position}: column {column!r} should hold text, got {text!r}")
    return text


def _referring_sample(image: Image.Image, row: dict[str, Any], rng: random.Random, position: int) -> CalibrationSample:
    """Read a row of RefCOCO+'s schema: several expressions for one box, x, y, width, height in pixels."""
    expressions = [row["answer"]] if isinstance(row["answer"], str) else row["answer"]
    if not expressions:
        raise ValueError(f"calibration row {position} has no expression")
    try:
        box = Box.from_xywh(row["bbox"], image.size)
    except (ValueError, TypeError) as error:
        raise ValueError(f"calibration row {position}: bbox: {error}") from error
    return CalibrationSample(image, expression=rng.choice(expressions), box=box)


def _decode(value: Any, position: int) -> Image.Image:
    try:
        if not isinstance(value, Image.Image | Mapping | str):
            raise images.ImageError(f"expected an image, got {type(value).__name__}")
        return images.opened(_fetched(value))
    except images.ImageError as error:
        raise ValueError(f"calibration row {position} holds no readable image: {error}") from error


def _fetched(value: Any) -> Any:
    """Fetch the bytes of what lies elsewhere: at any address that fsspec knows, as rows of the hub may name them."""
    import fsspec

    path = value.get("path") if isinstance(value, Mapping) else value
    if isinstance(value, Image.Image) or "://" not in str(path) or (isinstance(value, Mapping) and value.get("bytes")):
        return value
    try:
        with fsspec.open(str(path), "rb") as stream:
            return {"bytes": stream.read(), "path": str(path)}
    except (OSError, ValueError, ImportError) as error:
        raise images.ImageError(str(error) or type(error).__name__) from error


def _undecoded(rows: Any, column: str) -> Any:
    """The same rows, whose images are decoded by `_decode`, which names the row where that fails."""
    import datasets

    features = rows.features
    if features is None or not isinstance(features.get(column), datasets.Image):
        return rows
    return rows.cast_column(column, datasets.Image(decode=False))


def _expect_column(column: str, present: list[str], path: str) -> None:
    if column not in present:
        raise ValueError(f"calibration data {path!r} has no column {column!r} (it has: {', '.join(present)})")
