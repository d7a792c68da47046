"""Finished blocks of a calibration under way, on disk, so that an interrupted one goes on where it was.

The folder belongs to the user who runs the calibration and is read by nobody else's process: like Python's own caches
of compiled code, its files are trusted.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from loguru import logger
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from lmms_plugin import quant_backends
from lmms_plugin.quant_backends.layers.linear import QuantizedLinear
from lmms_plugin.utils import files, hashing, variables


class Solved(NamedTuple):
    """A quantized layer that is not in the model yet.

    Attributes:
        layer: It takes the place of the dense one.
        output_error: ‖X(W − Ŵ)ᵀ‖ / ‖XWᵀ‖ over the calibration inputs X; None where none of them reached the layer.
        method: As in `Solution`.
        plain_rows: As in `Solution`.
    """

    layer: QuantizedLinear
    output_error: float | None
    method: str | None
    plain_rows: int = 0


class Journal:
    """The finished blocks of one calibration.

    Args:
        folder: Of all calibrations; made when the first block is finished.
        key: What the result depends on, JSON-ready. Another key is another calibration.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self.folder = folder / hashing.of_value(key)[:32]

    def save(self, block: str, solved: Mapping[str, Solved]) -> None:
        """Write a finished block: all of it or nothing.

        Args:
            block: Its name.
            solved: Layer name -> solution.
        """
        skeletons: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for name, entry in solved.items():
            state = {key: value for key, value in entry.layer.state_dict(keep_vars=True).items() if key != "bias"}
            tensors |= {f"{name}/{key}": value.detach().cpu().clone() for key, value in state.items()}
            skeletons[name] = entry._replace(layer=_skeleton(entry.layer))
        self._write(self._file(block), pickle.dumps((skeletons, save_tensors(tensors))))

    def _write(self, target: Path, content: bytes) -> None:
        # Another process with the same calibration, in a parallel evaluation, may be done and remove the folder.
        for _ in range(3):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                return files.replace_bytes(target, content)
            except FileNotFoundError:
                continue
            except OSError as error:
                # A full disk here is no reason to give up hours of work.
                logger.warning(f"{target.stem} is not kept in {self.folder} ({error}): interrupted, it is done again")
                return None
        raise FileNotFoundError(f"{self.folder} is removed each time that it is made")

    def load(self, block: str, model: nn.Module) -> dict[str, Solved] | None:
        """Read a finished block.

        Args:
            block: Its name.
            model: Its dense layers give the biases, which are not stored, and say which device is meant.

        Returns:
            Layer name -> solution, None when the block was not finished.
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
        """Return the journal of a part of this calibration, which goes when this one is removed."""
        return Journal(self.folder, key)

    def note(self, name: str, value: Any) -> None:
        """Write down a JSON-ready value."""
        self._write(self.folder / f"{name}.json", json.dumps(value).encode())

    def noted(self, name: str) -> Any:
        """Return what `note` wrote down, None when there is nothing."""
        try:
            return json.loads((self.folder / f"{name}.json").read_bytes())
        except FileNotFoundError:
            return None

    def remove(self) -> None:
        """Forget everything: the calibration is over."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, block: str) -> Path:
        return self.folder / f"{block or 'model'}.block"


def cache_folder() -> Path | None:
    """Return the folder of unfinished calibrations: `$LMMS_PLUGIN_CACHE`, or one beside the Hugging Face cache.

    None when the variable is set to nothing.

    Raises:
        ValueError: The variable names the home folder of somebody who has none here.
    """
    named = variables.folder(variables.CACHE)
    if named is not None:
        return named / "calibration"
    if variables.CACHE in os.environ:
        return None
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "lmms_plugin" / "calibration"


def code_key() -> str:
    """Return the SHA-256 of this package's quantizers: what another version of them began is not gone on with."""
    return hashing.of_code(Path(quant_backends.__file__).parent)


def _skeleton(layer: QuantizedLinear) -> QuantizedLinear:
    """Return a copy of a layer without the contents of its tensors."""
    memo: dict[int, Any] = {
        id(tensor): tensor.detach().to("meta") for tensor in (*layer.parameters(), *layer.buffers())
    }
    memo |= {id(p): nn.Parameter(memo[id(p)], requires_grad=False) for p in layer.parameters()}
    return copy.deepcopy(layer, memo)
