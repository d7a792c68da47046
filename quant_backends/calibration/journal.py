"""Checkpointing of calibration: finished blocks on disk, from which an interrupted calibration resumes.

The folder belongs to the user who runs the calibration, and only that user's processes read it: its files are trusted,
like Python's own caches of compiled code.
"""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from lmms_plugin import quant_backends
from lmms_plugin.quant_backends.calibration.notes import Notes
from lmms_plugin.quant_backends.layers.linear import QuantizedLinear
from lmms_plugin.utils import hashing, variables


class Solved(NamedTuple):
    """Quantized layer that is not in the model yet.

    Attributes:
        layer: Layer that replaces the dense one.
        output_error: ‖X(W − Ŵ)ᵀ‖ / ‖XWᵀ‖ over the calibration inputs X; None where none of them reached the layer.
        method: Method, as in `Solution`.
        plain_rows: Number of rows, as in `Solution`.
    """

    layer: QuantizedLinear
    output_error: float | None
    method: str | None
    plain_rows: int = 0


class Journal(Notes):
    """Finished blocks of one calibration.

    Args:
        folder: Folder of all calibrations; made when the first block is finished.
        key: JSON-ready values on which the result depends. A different key is a different calibration.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        super().__init__(folder / hashing.of_value(key)[:32])

    def save(self, block: str, solved: Mapping[str, Solved]) -> None:
        """Write a finished block atomically.

        Args:
            block: Name of the block.
            solved: Layer name -> solution.
        """
        skeletons: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for name, entry in solved.items():
            state = {key: value for key, value in entry.layer.state_dict(keep_vars=True).items() if key != "bias"}
            tensors |= {f"{name}/{key}": value.detach().cpu().clone() for key, value in state.items()}
            skeletons[name] = entry._replace(layer=_skeleton(entry.layer))
        self.write(self._file(block), pickle.dumps((skeletons, save_tensors(tensors))))

    def load(self, block: str, model: nn.Module) -> dict[str, Solved] | None:
        """Read a finished block.

        Args:
            block: Name of the block.
            model: Model whose dense layers give the biases, which are not stored, and the device.

        Returns:
            Layer name -> solution; None if the block was not finished.
        """
        try:
            content = self._file(block).read_bytes()
        except FileNotFoundError:
            return None
        skeletons, blob = pickle.loads(content)
        tensors = load_tensors(blob)
        solved = {}
        for name, entry in skeletons.items():
            dense = model.get_submodule(name)
            prefix = f"{name}/"
            state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            state = {key: value.to(dense.weight.device) for key, value in state.items()}
            if entry.layer.bias is not None:
                state["bias"] = dense.bias
            entry.layer.load_state_dict(state, assign=True)
            solved[name] = entry
        return solved

    def within(self, key: Mapping[str, Any]) -> Journal:
        """Return the journal of a part of this calibration, which is removed with this one."""
        return Journal(self.folder, key)

    def remove(self) -> None:
        """Delete all entries once the calibration is over."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, block: str) -> Path:
        return self.folder / f"{block or 'model'}.block"


def cache_folder() -> Path | None:
    """Return the folder of unfinished calibrations; see `variables.cache_folder`."""
    return variables.cache_folder("calibration")


def code_key() -> str:
    """Return the SHA-256 of this package's quantizers: a calibration begun by another version is not resumed."""
    return hashing.of_code(Path(quant_backends.__file__).parent)


def _skeleton(layer: QuantizedLinear) -> QuantizedLinear:
    """Return a copy of a layer without the contents of its tensors."""
    memo: dict[int, Any] = {
        id(tensor): tensor.detach().to("meta") for tensor in (*layer.parameters(), *layer.buffers())
    }
    memo |= {id(p): nn.Parameter(memo[id(p)], requires_grad=False) for p in layer.parameters()}
    return copy.deepcopy(layer, memo)
