"""Choice between packed and dense weights for a model that is about to answer.

Dense rows that are kept give the products of rows that are made each time, to the last bit, so that keeping them is a
matter of memory alone. A kernel rounds otherwise. Where one could be used beside dense rows the two are timed, once for
a kernel, shape and machine: the choice is kept on disk and taken again, so that a run's answers do not depend on
what else the machine was doing.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from loguru import logger
from torch import Tensor, nn

from lmms_plugin.quant_backends.layers.dense_products import DenseProducts
from lmms_plugin.quant_backends.layers.kernels import MOST_ROWS, Shape, linear
from lmms_plugin.quant_backends.layers.linear import PackedLinear, QuantizedLinear
from lmms_plugin.quant_backends.plans.storage_choice import LayerStorage, Storage
from lmms_plugin.utils import hashing, variables
from lmms_plugin.utils.processes.free_memory import free_host_bytes, total_host_bytes

RESERVED = 0.2
"""Of a device's memory that dense weights leave to activations, caches and everything else."""

CLEARLY = 0.8
"""A kernel is taken before dense weights if it takes at most so much of their time: where others use the machine, less
of a difference did not hold in the model."""

ROWS = (1, 8)
"""Numbers of rows of inputs at which a kernel is timed, besides the largest one that it is made for."""

_TIMED_BYTES = 1 << 28
"""Of dense weights of one shape that are timed together: more than caches hold, as while answering."""


class DenseBudget:
    """Memory of each device that dense weights may take.

    Args:
        processes: Number of processes that share the devices' host.
    """

    def __init__(self, processes: int = 1) -> None:
        self._processes = processes
        self._left: dict[torch.device, int] = {}

    def left(self, device: torch.device) -> int:
        """Return the bytes that are left on a device."""
        if device not in self._left:
            self._left[device] = self._free(device)
        return self._left[device]

    def take(self, device: torch.device, size: int) -> None:
        """Count bytes as taken."""
        self._left[device] = self.left(device) - size

    def _free(self, device: torch.device) -> int:
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            return int(free - RESERVED * total)
        return int(free_host_bytes() - RESERVED * total_host_bytes()) // self._processes


def settle(
    model: nn.Module, storage: Storage, *, budget: DenseBudget | None = None, folder: Path | None = None
) -> dict[str, LayerStorage]:
    """Hold the weights of a model's quantized layers as asked, and return how each is held.

    Args:
        model: Model on its devices, quantized, saved where that is wanted, and about to answer.
        storage: ``packed``, ``dense``, or ``auto`` for dense weights as far as memory lasts, and kernels for numbers
            of rows at which they are clearly faster.
        budget: Memory for dense weights; None for what is free now.
        folder: Folder of choices that timings decided; None for one below `variables.cache_folder`.

    Raises:
        ValueError: Dense weights were asked for, and a layer cannot be held so or memory does not suffice.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    budget = DenseBudget() if budget is None else budget
    if storage == "dense":
        _expect_possible(layers, budget)
    if storage != "packed":
        chosen = _kept(layers.values(), budget, everything=storage == "dense")
        for layer in chosen:
            if not isinstance(layer, PackedLinear):
                layer.keep()
        packed = [layer for layer in chosen if isinstance(layer, PackedLinear)]
        _keep_packed(packed, by_kernel=storage == "auto", folder=folder)
    return {name: _told(layer) for name, layer in layers.items()}


def _expect_possible(layers: Mapping[str, QuantizedLinear], budget: DenseBudget) -> None:
    needed: dict[torch.device, int] = {}
    for name, layer in layers.items():
        reason = layer.undense if isinstance(layer, DenseProducts) else "a library multiplies with codes of its own"
        if not isinstance(layer, DenseProducts) or reason is not None:
            raise ValueError(
                f"storage=dense: {name} ({layer.kernel}) cannot be kept dense: {reason}; leave storage out"
            )
        needed[layer.device] = needed.get(layer.device, 0) + layer.operand_bytes
    for device, size in needed.items():
        if size > budget.left(device):
            raise ValueError(
                f"storage=dense: the weights take {size / 1e9:.1f} GB on {device}, of which "
                f"{max(0, budget.left(device)) / 1e9:.1f} GB may be taken: storage=auto keeps dense what fits"
            )


def _kept(layers: Iterable[QuantizedLinear], budget: DenseBudget, *, everything: bool) -> list[DenseProducts]:
    """Return the layers whose dense weights are to be kept: in the order of the model, until memory is used up."""
    kept: list[DenseProducts] = []
    for layer in layers:
        if not isinstance(layer, DenseProducts) or layer.undense is not None:
            continue
        if everything or layer.operand_bytes <= budget.left(layer.device):
            budget.take(layer.device, layer.operand_bytes)
            kept.append(layer)
    return kept


def _keep_packed(layers: Sequence[PackedLinear], *, by_kernel: bool, folder: Path | None) -> None:
    by_shape: dict[tuple[str, Shape], list[PackedLinear]] = {}
    for layer in layers:
        layer.choose_kernel()
        by_shape.setdefault((layer.packed.name, layer.packed.shape), []).append(layer)
    for (name, shape), members in by_shape.items():
        timed = by_kernel and name in MOST_ROWS and members[0].packed.reproducible
        rows = _kernel_rows(name, shape, members, folder) if timed else 0
        for layer in members:
            layer.keep(rows)


def _kernel_rows(name: str, shape: Shape, members: Sequence[PackedLinear], folder: Path | None) -> int:
    """Return the number of rows up to which a kernel is clearly faster than dense rows: as found before, or timed."""
    folder = variables.cache_folder("kernels") if folder is None else folder
    key = {
        "kernel": name,
        "shape": [str(part) for part in shape],
        "machine": _machine(shape.device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads() if shape.device == "cpu" else None,
    }
    file = None if folder is None else folder / f"{hashing.of_value(key)[:32]}.json"
    found = _found(file)
    if found is not None:
        return found
    rows = timed_rows(name, members)
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("x", encoding="utf-8") as kept:
                kept.write(json.dumps(key | {"rows": rows}))
        except FileExistsError:
            # Another process of the same run was faster.
            return rows if (others := _found(file)) is None else others
        except OSError as error:
            logger.warning(f"The choice of kernels is not kept in {folder} ({error}): the next run times them again")
    return rows


def _found(file: Path | None) -> int | None:
    """Return the number of rows in a file; None where there is no such file, or it is damaged."""
    try:
        rows = None if file is None else json.loads(file.read_text(encoding="utf-8")).get("rows")
    except (OSError, ValueError, AttributeError):
        return None
    return rows if type(rows) is int and rows >= 0 else None


def timed_rows(name: str, members: Sequence[PackedLinear]) -> int:
    """Return the number of rows up to which a kernel is clearly faster, timed on layers of one shape together."""
    first = members[0]
    several = members[: max(1, _TIMED_BYTES // first.operand_bytes)]
    generator, found = torch.Generator().manual_seed(0), 0
    with torch.inference_mode():
        dense = [layer.operand(0, layer.out_features, layer.operand_dtype) for layer in several]
        for rows in sorted({*ROWS, MOST_ROWS[name]}):
            x = torch.randn(rows, first.in_features, generator=generator).to(first.device, first.dtype)
            if not rows <= MOST_ROWS[name] or not _kernel_is_faster(x, several, dense):
                break
            found = rows
    return found


def _kernel_is_faster(x: Tensor, layers: Sequence[PackedLinear], dense: Sequence[Tensor]) -> bool:
    def packed() -> None:
        for layer in layers:
            layer.packed.matmul(x)

    def kept() -> None:
        for weight in dense:
            linear(x, weight, None)

    best = _least_seconds([packed, kept], x.device)
    return best[0] <= CLEARLY * best[1]


def _least_seconds(calls: Sequence[Callable[[], None]], device: torch.device, repeats: int = 5) -> list[float]:
    """Return the least time of each call; they take turns, after one of each that does not count."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock, best = time.process_time if alone else time.perf_counter, [float("inf")] * len(calls)
    for repeat in range(repeats + 1):
        for number, call in enumerate(calls):
            start = clock()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat:
                best[number] = min(best[number], clock() - start)
    return best


def _machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _told(layer: QuantizedLinear) -> LayerStorage:
    if isinstance(layer, DenseProducts):
        return LayerStorage(layer.kernel, layer.resident_bytes, layer.keeps)
    return LayerStorage(layer.kernel, layer.weight_bytes, False)
