"""What a learned confidence looks at, kept beside lmms-eval's logs: one folder of safetensors files per model.

lmms-eval carries nothing but strings from a model to a task. Vectors go into a folder instead, a file per process and
portion, each written under a temporary name first, so that a file with the final name is whole. They are on disk
before an answer is handed over: whatever a response cache holds has its features here.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lmms_plugin.utils.files import replacing

Read = TypeVar("Read")
METADATA = "features"
PORTION_BYTES = 2**26
LAST_LAYER = -1


class Features(NamedTuple):
    """What is known of n answers, in the model's own precision.

    Attributes:
        image: (n, width) largest value of every hidden unit over the positions of the image.
        question: (n, width) the same over the words of the question.
        first: (n, width) the hidden state from which the first token that the model wrote was predicted.
        logprob: (n,) natural log-probability of the whole answer, reasoning left out; NaN where that did not end.
    """

    image: Tensor
    question: Tensor
    first: Tensor
    logprob: Tensor

    def matrix(self) -> Tensor:
        """All of it side by side, (n, 3·width + 1), float32."""
        return torch.cat([*(part.float() for part in self[:3]), self.logprob.float()[:, None]], dim=1)

    def rows(self, index: Sequence[int]) -> "Features":
        """Some of the answers."""
        chosen = torch.tensor(index, dtype=torch.long)
        return Features(*(part[chosen] for part in self))

    @classmethod
    def joined(cls, parts: Sequence["Features"]) -> "Features":
        """Those of several batches, one after another."""
        return cls(*(torch.cat(column) for column in zip(*parts, strict=True)))


@dataclass(frozen=True)
class FeatureOrigin:
    """Where features come from; a learned confidence is good for one origin.

    Attributes:
        model: Fingerprint of the checkpoint's weights.
        quantization: Method, its options, plan and calibration, as JSON-ready values.
        layer: Which hidden states: -1 for those that logits are computed from (the last, after the final norm), k ≥ 0
            for those that go into layer k of the language model.
    """

    model: str
    quantization: Mapping[str, Any]
    layer: int = LAST_LAYER

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: If it is something else.
        """
        try:
            return cls(str(values["model"]), dict(values["quantization"]), int(values["layer"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"expected model, quantization and layer, got {values!r}") from error

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)

    def differences(self, other: "FeatureOrigin") -> list[str]:
        """Say what is not the same, one text per thing: first this one's, then the other's."""
        found = []
        if self.model != other.model:
            found.append(f"model {self.model[:12]}… and {other.model[:12]}…")
        for name in sorted({*self.quantization, *other.quantization}):
            ours, theirs = self.quantization.get(name), other.quantization.get(name)
            if ours != theirs:
                found.append(f"{name} {ours} and {theirs}")
        if self.layer != other.layer:
            found.append(f"feature layer {self.layer} and {other.layer}")
        return found


def key(task: str, document: int, repeat: int = 0) -> str:
    """Name of a request: its task and the number of its document there; `repeat` counts equal requests."""
    return f"{task}/{document}" + (f"/{repeat}" if repeat else "")


class Store(NamedTuple):
    """A folder of features.

    Attributes:
        origin: Of all of them.
        index: Key → row.
        features: Of n answers.
    """

    origin: FeatureOrigin
    index: Mapping[str, int]  # type: ignore[assignment]  # a method of tuples, which nobody calls here
    features: Features


@dataclass
class FeatureWriter:
    """Adds the features of one process to a folder.

    Attributes:
        folder: Made if missing.
        origin: Of all that is written.

    Raises:
        ValueError: On construction, if the folder holds features of another origin, or a damaged file.
    """

    folder: Path
    origin: FeatureOrigin
    _keys: list[str] = field(default_factory=list)
    _parts: list[Features] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in _files(self.folder):
            _expect_same(self.folder, _origin(file), self.origin)

    def add(self, keys: Sequence[str], features: Features) -> None:
        """Take the features of some answers; large portions are written at once."""
        self._keys += keys
        self._parts.append(features)
        if sum(part.nbytes for features in self._parts for part in features) > PORTION_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is not written yet."""
        if not self._keys:
            return
        about = {"origin": self.origin.to_dict(), "keys": self._keys}
        columns = {name: part.contiguous() for name, part in Features.joined(self._parts)._asdict().items()}
        # Names sort by time, so that of two features of one request the later is known.
        name = f"features-{time.time_ns():020d}-{os.getpid()}.safetensors"
        with replacing(self.folder / name) as unfinished:
            save_file(columns, unfinished, metadata={METADATA: json.dumps(about)})
        self._keys, self._parts = [], []


def read(folder: Path) -> Store:
    """Read all features of a folder; of several for one request, the one written last.

    Raises:
        ValueError: If there are none, they are of different origins, or a file is damaged.
    """
    files = _files(folder)
    if not files:
        raise ValueError(
            f"expected features (features-*.safetensors) in {folder}; they come from --model_args features="
        )
    first = _origin(files[0])
    index: dict[str, int] = {}
    parts: list[Features] = []
    rows = 0
    for file in files:
        origin, keys, features = _read_file(file)
        _expect_same(folder, first, origin)
        index |= {name: rows + row for row, name in enumerate(keys)}
        parts.append(features)
        rows += len(keys)
    names = list(index)
    return Store(first, {name: row for row, name in enumerate(names)}, _of(parts, [index[name] for name in names]))


def _of(parts: Iterable[Features], rows: Sequence[int]) -> Features:
    return Features.joined(list(parts)).rows(rows)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("features-*.safetensors"))


def _expect_same(folder: Path, there: FeatureOrigin, given: FeatureOrigin) -> None:
    if differences := there.differences(given):
        raise ValueError(
            f"expected features of one model in {folder}, got {'; '.join(differences)}: take another folder"
        )


def _about(file: Path, metadata: Mapping[str, str] | None) -> tuple[FeatureOrigin, list[str]]:
    if not metadata or METADATA not in metadata:
        raise ValueError(f"expected features in {file}, got another kind of file")
    about = json.loads(metadata[METADATA])
    return FeatureOrigin.parse(about["origin"]), about["keys"]


def _origin(file: Path) -> FeatureOrigin:
    return _opened(file, lambda opened: _about(file, opened.metadata())[0])


def _read_file(file: Path) -> tuple[FeatureOrigin, list[str], Features]:
    def contents(opened: Any) -> tuple[FeatureOrigin, list[str], Features]:
        return *_about(file, opened.metadata()), Features(*map(opened.get_tensor, Features._fields))

    return _opened(file, contents)


def _opened(file: Path, read: Callable[[Any], Read]) -> Read:
    try:
        with safe_open(file, framework="pt") as opened:
            return read(opened)
    except OSError:
        raise
    # Its metadata may say anything.
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
