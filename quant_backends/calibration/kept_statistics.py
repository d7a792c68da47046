"""Calibration that several runs of one model share, on disk: answers, gradients and statistics of the dense model.

What a calibrated method takes from the unquantized model depends neither on bits nor, for the most part, on the method.
So it is kept under a hash of all that it does depend on, and the next run with the same hash takes it, to the last bit,
in the place of the passes that it would make. Statistics of each group of layers are several files, by what depends on
what: the sums of all rows serve every method, those of single roles only methods that balance roles.

A file that is damaged, cut off or missing is computed again. Only quantized blocks before a layer, as sequential
methods have them, are never part of it.
"""

from __future__ import annotations

import fcntl
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from loguru import logger
from torch import Tensor

from lmms_plugin.quant_backends.backend import CalibratedBackend
from lmms_plugin.quant_backends.calibration.inputs import fingerprint
from lmms_plugin.quant_backends.calibration.notes import Notes
from lmms_plugin.quant_backends.plans.specs import MOST_SHARED_BYTES
from lmms_plugin.quant_backends.statistics import TOKEN_ROLES, WEIGHED, InputStatistics, RowSample, Sensitivity
from lmms_plugin.utils import hashing, tensor_files

_LAYERS = "layers"


class KeptCalibration(Notes):
    """What is kept for one model and one source of calibration.

    Args:
        folder: Folder of all that is kept.
        key: JSON-ready values on which all of it depends.

    Attributes:
        taken: What this run has taken from there -> how often.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        super().__init__(folder / hashing.of_value(key)[:32])
        self.root = folder
        self.taken: Counter[str] = Counter()

    @contextmanager
    def answering(self, count: int) -> Iterator[None]:
        """Write the answers that the model gives itself; others wait, since to write them takes as long as to wait.

        Args:
            count: Number of answers.
        """
        with nullcontext() if len(self._answers) >= count else self.alone("answers"):
            self.taken["answers"] = min(len(self._answers), count)
            yield

    @property
    def _answers(self) -> list[Any]:
        return self.noted("written") or []

    def of_inputs(self, batches: Sequence[Mapping[str, Any]]) -> KeptStatistics:
        """Return what depends on the model's inputs, too.

        Args:
            batches: Keyword arguments of one forward pass each, with `TOKEN_ROLES` or without.
        """
        roles = [{TOKEN_ROLES: batch[TOKEN_ROLES]} for batch in batches if TOKEN_ROLES in batch]
        inputs = [{name: value for name, value in batch.items() if name != TOKEN_ROLES} for batch in batches]
        return KeptStatistics(self, self.folder / fingerprint(inputs)[:16], fingerprint(roles)[:16] if roles else "")

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Hold a lock that other processes with the same calibration wait for; the system takes it from who ends."""
        with ExitStack() as stack:
            # Where a file system knows no locks, or nothing can be written, all compute the same.
            with suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                stream = stack.enter_context((self.folder / f"{name}.lock").open("w"))
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    logger.info(f"shared_folder: waiting for another process, which computes {name} of the same model")
                    fcntl.flock(stream, fcntl.LOCK_EX)
            yield


class WantedParts(NamedTuple):
    """Parts of statistics that a method takes.

    Attributes:
        parts: Names of the parts, in the order in which they are written.
        kept: What statistics keep besides the sums (see `InputStatistics.empty`).
    """

    parts: tuple[str, ...]
    kept: Mapping[str, bool]

    @classmethod
    def by(cls, backend: CalibratedBackend, *, roles: bool) -> WantedParts:
        """Return the parts that a method takes.

        Args:
            backend: Method.
            roles: Whether positions have roles.
        """
        weights = backend.weighs_tokens_by
        chosen = {
            "sums": True,
            "rows": backend.by_role or backend.keeps_rows,
            "modalities": roles,
            "roles": backend.by_role,
            "held_back": backend.holds_back,
            f"weighted by {weights}": weights is not None,
        }
        kept = {"by_role": backend.by_role, "holds_back": backend.holds_back, "weighted": weights is not None}
        return cls(tuple(name for name, wanted in chosen.items() if wanted), kept)


@dataclass
class KeptStatistics:
    """What is kept for the same inputs of one model.

    Attributes:
        calibration: What does not depend on the inputs.
        folder: Folder of what does.
        roles: Beginning of the fingerprint of the roles of their positions; empty without roles.
        most_bytes: Bytes of statistics that the whole folder of all calibrations may hold; beyond it only answers and
            gradients are kept.
    """

    calibration: KeptCalibration
    folder: Path
    roles: str
    most_bytes: int = MOST_SHARED_BYTES
    _full: bool = field(default=False, init=False)

    @property
    def notes(self) -> Notes:
        """Return the store of small values that depend on inputs."""
        return Notes(self.folder)

    def sensitivities(self) -> dict[str, Sensitivity] | None:
        """Return layer -> sensitivity as kept; None if there are none."""
        known = self._taken_note(self._of_roles("sensitivities"), "sensitivities")
        return None if known is None else {layer: Sensitivity(*values) for layer, values in known.items()}

    def keep_sensitivities(self, found: Mapping[str, Sensitivity]) -> None:
        """Keep the sensitivities of layers."""
        self.notes.note(self._of_roles("sensitivities"), found)

    def token_weights(self) -> dict[str, list[Tensor]] | None:
        """Return layer -> weights of each sample's positions as kept; None if there are none."""
        tensors = tensor_files.read(self._weights_file)
        if tensors is None:
            return None
        self.calibration.taken["token weights"] += 1
        layers = dict.fromkeys(name.rpartition("/")[0] for name in tensors)
        count = len(tensors) // max(1, len(layers))
        return {layer: [tensors[f"{layer}/{sample}"] for sample in range(count)] for layer in layers}

    def keep_token_weights(self, found: Mapping[str, Sequence[Tensor]]) -> None:
        """Keep the weights of the positions of every sample, by layer."""
        tensors = {f"{layer}/{sample}": one for layer, each in found.items() for sample, one in enumerate(each)}
        tensor_files.write(self._weights_file, tensors)

    def expert_use(self) -> Any:
        """Return the tokens of each expert as kept; None if there are none."""
        return self._taken_note("expert use", "expert use")

    def keep_expert_use(self, found: Mapping[str, Any]) -> None:
        """Keep the tokens of each expert."""
        self.notes.note("expert use", found)

    def groups(self, block: str, wanted: WantedParts) -> list[tuple[str, ...]] | None:
        """Return the groups of layers of a block whose statistics are whole; None if those of one are not.

        Every byte is compared with its digest, so that nothing is found damaged once layers have been replaced.
        """
        listed = self.notes.noted(self._listed(block))
        if not isinstance(listed, list):
            return None
        groups = [tuple(group) for group in listed]
        whole = all(
            tensor_files.read(self._file(group[0], part)) is not None for group in groups for part in wanted.parts
        )
        return groups if whole else None

    def load(self, names: tuple[str, ...], wanted: WantedParts, device: torch.device) -> InputStatistics:
        """Read the statistics of a group of layers that `groups` has returned.

        Args:
            names: Names of the layers.
            wanted: Parts to read.
            device: Device of the sums.

        Raises:
            OSError: The files have gone or changed since.
        """
        tensors: dict[str, Tensor] = {}
        for part in wanted.parts:
            found = tensor_files.read(self._file(names[0], part), verify=False)
            if found is None:
                raise OSError(f"{self._file(names[0], part)} was removed or changed while it was used: run this again")
            tensors |= found
        self.calibration.taken["statistics"] += 1
        statistics = _assembled(names, tensors, device)
        statistics.by_role = wanted.kept["by_role"]
        return statistics

    def has_room(self, sizes: Mapping[str, int], wanted: WantedParts) -> bool:
        """Return whether the statistics of a run may be kept; said once if not.

        Args:
            sizes: First layer of each group -> bytes of its statistics, of all wanted parts together.
            wanted: Parts that the run takes.
        """
        mine = {self._file(leader, part) for leader in sizes for part in wanted.parts}
        room = tensor_files.room_in(self.calibration.root, self.most_bytes, but=mine)
        asked = sum(sizes.values())
        self._full = asked > room
        if self._full:
            logger.warning(
                f"shared_folder: {asked / 1e9:.1f} GB of statistics are not kept in {self.calibration.root}, which "
                f"has room for {room / 1e9:.1f}: answers and gradients are, statistics are gathered by each run; to "
                "make room, delete the folder when no run uses it"
            )
        return not self._full

    def keep(self, statistics: InputStatistics, wanted: WantedParts) -> None:
        """Keep the statistics of a group of layers, as far as they are not there."""
        if self._full:
            return
        tensors = _taken_apart(statistics)
        for part in wanted.parts:
            file = self._file(statistics.names[0], part)
            if tensor_files.read(file) is None:
                tensor_files.write(
                    file, {path: tensor for path, tensor in tensors.items() if _part(path) == part.split()[0]}
                )

    def keep_groups(self, block: str, groups: Sequence[tuple[str, ...]]) -> None:
        """Keep which groups of layers a block has, once the statistics of all of them are there."""
        if not self._full:
            self.notes.note(self._listed(block), groups)

    def _taken_note(self, name: str, told: str) -> Any:
        value = self.notes.noted(name)
        if value is not None:
            self.calibration.taken[told] += 1
        return value

    def _of_roles(self, name: str) -> str:
        return f"{name} {self.roles}".strip()

    @property
    def _weights_file(self) -> Path:
        return self.folder / f"{self._of_roles('token weights')}.safetensors"

    @staticmethod
    def _listed(block: str) -> str:
        return f"{block or 'model'} {_LAYERS}"

    def _file(self, leader: str, part: str) -> Path:
        apart = part if part in ("sums", "rows", "held_back") else self._of_roles(part)
        return self.folder / f"{leader} {apart}.safetensors"


def _part(path: str) -> str:
    """Return the part of statistics that a tensor belongs to, by what it depends on."""
    first = path.partition("/")[0]
    if path == "sample/is_image" or first == "largest_of":
        return "modalities"
    return {"sample": "rows", "roles": "roles", "held_back": "held_back", "weighted": "weighted"}.get(first, "sums")


def _taken_apart(statistics: InputStatistics) -> dict[str, Tensor]:
    """Return path -> tensor of all that statistics hold, but what is measured apart."""
    found = {
        "gram": statistics.gram,
        "magnitude": statistics.magnitude,
        "rows": torch.tensor(statistics.rows),
        **{f"largest_of/{name}": tensor for name, tensor in statistics.largest_of.items()},
    }
    if statistics.largest is not None:
        found["largest"] = statistics.largest
    if statistics.sample is not None:
        found |= {"sample/rows": statistics.sample.rows, "sample/is_image": statistics.sample.is_image}
    inner = {f"roles/{name}": one for name, one in statistics.roles.items()}
    inner |= {name: one for name in ("held_back", "weighted") if (one := getattr(statistics, name)) is not None}
    for name, one in inner.items():
        found |= {f"{name}/{path}": tensor for path, tensor in _taken_apart(one).items()}
    return found


def _assembled(names: tuple[str, ...], tensors: Mapping[str, Tensor], device: torch.device) -> InputStatistics:
    """Return statistics from what `_taken_apart` returned; what it left out is missing."""

    def within(name: str) -> dict[str, Tensor]:
        return {path.removeprefix(f"{name}/"): one for path, one in tensors.items() if path.startswith(f"{name}/")}

    def inner(name: str) -> InputStatistics | None:
        return _assembled(names, within(name), device) if within(name) else None

    statistics = InputStatistics(names, tensors["gram"].to(device), tensors["magnitude"].to(device))
    statistics.rows = int(tensors["rows"])
    statistics.largest = tensors["largest"].to(device) if "largest" in tensors else None
    statistics.largest_of = {name: one.to(device) for name, one in within("largest_of").items()}
    if "sample/rows" in tensors:
        statistics.sample = RowSample(tensors["sample/rows"].to(device))
        statistics.sample.is_image = tensors.get("sample/is_image", statistics.sample.is_image)
    statistics.roles = {role: one for role in WEIGHED if (one := inner(f"roles/{role}")) is not None}
    statistics.held_back, statistics.weighted = inner("held_back"), inner("weighted")
    return statistics
