"""Memory during quantization: peak use, offloading of blocks and activations, release of freed memory."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class Peak(NamedTuple):
    """Highest memory use seen.

    Attributes:
        bytes: Number of bytes, summed over devices where there are several.
        source: What was counted.
    """

    bytes: int
    source: str


def reset_peak() -> None:
    """Reset the peak of CUDA devices; the peak of a process cannot be reset."""
    for index in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(index)


def read_peak() -> Peak:
    """Return the peak since `reset_peak` of the CUDA allocator, or without CUDA the peak of the process."""
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        return Peak(sum(torch.cuda.max_memory_allocated(index) for index in devices), "CUDA allocator, all devices")
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return Peak(peak, "resident memory of the process since its start")


def statistics_budget(device: torch.device) -> int:
    """Return the bytes that calibration statistics may take on a device: 4 GiB, or less where less is free."""
    largest = 4 << 30
    if device.type != "cuda":
        return largest
    free, _ = torch.cuda.mem_get_info(device)
    return min(largest, free // 2)


class Residence:
    """Offloading of a model's blocks to host memory, from which each one moves to the device for its turn.

    In host memory the weights of a safetensors checkpoint are memory-mapped pages of its files: the system reads them
    when needed and may drop them again.

    Args:
        device: Device where blocks take their turn. None leaves everything where it is: on one device, or spread over
            several.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        # "cuda" and "cuda:0" are one device, but do not compare equal.
        current = device is not None and device.type == "cuda" and device.index is None
        self.device = torch.device("cuda", torch.cuda.current_device()) if current else device
        self._model: nn.Module | None = None
        self._names: tuple[str, ...] = ()
        self._at_home: dict[str, list[tuple[Tensor, Tensor]]] = {}

    @property
    def blocks(self) -> tuple[str, ...]:
        """Return the names of the offloaded blocks."""
        return self._names

    def settle(self, model: nn.Module, names: Iterable[str]) -> None:
        """Move everything outside the named blocks to the device, where it stays.

        An embedding tied to the output projection counts as outside, since it is needed before any block.
        """
        self._model, self._names = model, tuple(names)
        inside = {id(module) for name in self._names for module in self._block(name).modules()}
        for module in model.modules():
            if id(module) not in inside:
                self._bring([*module.parameters(recurse=False), *module.buffers(recurse=False)])

    def enter(self, name: str) -> None:
        """Move a block to the device."""
        self._at_home.setdefault(name, []).extend(self._bring(_tensors(self._block(name))))

    def leave(self, name: str) -> None:
        """Undo `enter`; nothing is copied, since the host tensors were kept."""
        for tensor, original in self._at_home.pop(name, ()):
            tensor.data = original

    def stay(self, name: str) -> None:
        """Drop the host copy of a block, so that its dense weights can be freed."""
        self._at_home.pop(name, None)

    def enter_all(self) -> None:
        """Move all blocks to the device for good."""
        for name in self._names:
            self.enter(name)
            self.stay(name)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Keep the whole model on the device during a ``with`` block.

        Where it does not fit, each block is moved for its forward pass and back again, which is slow.
        """
        if self.fits():
            for name in self._names:
                self.enter(name)
            try:
                yield
            finally:
                for name in self._names:
                    self.leave(name)
            return
        handles = []
        for name in self._names:
            block = self._block(name)
            handles.append(block.register_forward_pre_hook(lambda *_, name=name: self.enter(name)))
            handles.append(block.register_forward_hook(lambda *_, name=name: self.leave(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def arrived(self, tensor: Tensor) -> Tensor | None:
        """Return a copy of a tensor on the device; None if it is there already."""
        return None if self.device is None or tensor.device == self.device else tensor.data.to(self.device)

    def _bring(self, tensors: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Move tensors in place; return those that moved, each with its former data."""
        moved = []
        for tensor in tensors:
            here = self.arrived(tensor)
            if here is not None:
                moved.append((tensor, tensor.data))
                tensor.data = here
        return moved

    def _block(self, name: str) -> nn.Module:
        # Looked up each time: a block that is itself a layer is a different object once it is quantized.
        if self._model is None:
            raise RuntimeError("no model has settled here")
        return self._model.get_submodule(name)

    def fits(self) -> bool:
        """Return whether all blocks fit on the device at once."""
        if self.device is None or self.device.type != "cuda":
            return True
        tensors = {id(tensor): tensor for name in self._names for tensor in _tensors(self._block(name))}
        needed = sum(t.numel() * t.element_size() for t in tensors.values() if t.device != self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        # A twentieth of the device is kept for activations and caches.
        return needed < free - total // 20


class Shelf:
    """Offloading of waiting activations to host memory when they take too much of a device.

    Args:
        budget: Number of bytes that may wait on the device. None for a quarter of what is free at the first use.
    """

    def __init__(self, budget: int | None = None) -> None:
        self.budget = budget
        self._away: dict[int, list[tuple[Tensor, torch.device]]] = {}
        self._here: dict[int, int] = {}

    def put(self, key: int, waiting: Any) -> None:
        """Let a sample's tensors wait.

        Args:
            key: Key of the sample.
            waiting: Any nesting of lists, tuples and dictionaries; parameters in it stay where they are.
        """
        leaves = (leaf for leaf in pytree.tree_leaves(waiting) if isinstance(leaf, Tensor))
        tensors = {id(leaf): leaf for leaf in leaves if self.waits_on_device(leaf)}
        if not tensors:
            return
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if self.budget is None:
            # Only CUDA devices report their free memory here.
            free, _ = torch.cuda.mem_get_info(next(iter(tensors.values())).device)
            self.budget = free // 4
        if sum(self._here.values()) + size <= self.budget:
            self._here[key] = size
            return
        self._away[key] = [(tensor, tensor.device) for tensor in tensors.values()]
        for tensor in tensors.values():
            # The frames of the suspended pass hold this very object, so its data must be moved, not the reference.
            tensor.data = self.sent_away(tensor.data)

    def take(self, key: int) -> None:
        """Move a sample's tensors back to where they were."""
        self._here.pop(key, None)
        for tensor, device in self._away.pop(key, ()):
            tensor.data = self.brought_back(tensor.data, device)

    def waits_on_device(self, tensor: Tensor) -> bool:
        """Return whether a tensor takes scarce device memory; parameters are offloaded by `Residence`."""
        return tensor.device.type == "cuda" and not isinstance(tensor, nn.Parameter)

    def sent_away(self, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor in host memory."""
        return tensor.cpu()

    def brought_back(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Return a copy of an offloaded tensor on the device."""
        return tensor.to(device)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def return_freed_memory() -> None:
    """Return freed heap memory to the system, where the C library is glibc.

    Packed layers and the short-lived dense ones alternate on the heap; glibc keeps the holes between them, which in the
    end would take as much as the dense model.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
