"""Layers of transformers' dynamic cache that have room for an answer, and that quantize what they keep."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lmms_plugin.quant_backends.plans.specs import UNTOUCHED_BITS
from lmms_plugin.vlm.kv_cache.rounding import rounded
from lmms_plugin.vlm.kv_cache.timetable import DueTokens, Timetable


class RoomyLayer(DynamicLayer):
    """Cache layer with room for the answer: a new token is written after the others, which stay in place."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self._columns = columns

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new tokens, and return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            rows, heads, _, _ = key_states.shape
            self._keys = key_states.new_empty(rows, heads, self._columns, key_states.shape[3])
            self._values = value_states.new_empty(rows, heads, self._columns, value_states.shape[3])
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        if end > self._columns:
            grown: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return grown
        self._keys[:, :, start:end] = key_states
        self._values[:, :, start:end] = value_states
        self.keys, self.values = self._keys[:, :, :end], self._values[:, :, :end]
        return self.keys, self.values


class StoredBits:
    """Count of what one row of a layer takes as stored in its format.

    Attributes:
        bits: Bits of keys and values, scales and zero points included.
        elements: Number of their elements.
    """

    def __init__(self) -> None:
        self.bits = 0
        self.elements = 0


class _Quantizing(DynamicLayer):
    """Mixin of a cache layer that quantizes tokens when a timetable says so.

    Attributes:
        timetable: Timetable of the batch.
        stored: What the longest row takes when its answer begins; None before.
    """

    is_croppable = False
    timetable: Timetable
    stored: StoredBits | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in new tokens, and return all as the newest reads them: (rows, heads, columns, width) each."""
        before = self.get_seq_length()
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        now, start = self.get_seq_length(), self.timetable.read_first
        if now < start:
            return keys, values
        if before < start:
            # What is read now is read over what the model computed; what is kept is quantized.
            keys, values = keys.clone(), values.clone()
            self.stored = StoredBits()
            self._quantize(self.keys, self.values, before, now)
        else:
            # A window returns one token more than it keeps, of which the others are views.
            self._quantize(keys, values, before, now)
        return keys, values

    def _quantize(self, keys: Tensor, values: Tensor, before: int, now: int) -> None:
        spec = self.timetable.spec
        for name, states, by_channel in (("keys", keys, spec.keys_by_channel), ("values", values, False)):
            hidden = now - states.shape[2]
            group = spec.group_of(states.shape[3]) if spec.scaled else None
            dues: list[DueTokens] = []
            if spec.part in ("both", name):
                dues = self.timetable.due(before, now, group if by_channel else None, states.device)
            for due in dues:
                self._replace(states, due, hidden, by_channel)
            if before < self.timetable.read_first:
                self._count(states, dues, hidden, now, group, by_channel)

    def _replace(self, states: Tensor, due: DueTokens, hidden: int, by_channel: bool) -> None:
        columns = due.columns - hidden
        # A window has lost the first tokens of a sequence; a group of which it holds some is scaled by those.
        there = columns[:, -1] >= 0
        columns, rows = columns[there], due.rows[there]
        columns = torch.where(columns >= 0, columns, columns[:, -1:])
        picked = states[rows[:, None], :, columns]
        states[rows[:, None], :, columns] = rounded(picked, self.timetable.spec, due.bits, by_channel=by_channel)

    def _count(
        self, states: Tensor, dues: list[DueTokens], hidden: int, now: int, group: int | None, by_channel: bool
    ) -> None:
        assert self.stored is not None
        row, spec = self.timetable.longest, self.timetable.spec
        _, heads, _, width = states.shape
        tokens = self.timetable.tokens(row, now, hidden=hidden)
        exact, bits = tokens, 0
        for due in dues:
            mine = due.rows == row
            columns, sizes = due.columns[mine] - hidden, due.sizes[mine]
            own = torch.arange(columns.shape[1], device=columns.device) < sizes[:, None]
            held = int((own & (columns >= 0)).sum())
            groups = int((columns[:, -1] >= 0).sum())
            scales = groups * width if by_channel else held * (width // group if group else 0)
            exact -= held
            bits += heads * (held * width * due.bits + scales * spec.group_bits)
        self.stored.bits += bits + heads * exact * width * UNTOUCHED_BITS
        self.stored.elements += heads * tokens * width

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: what is quantized cannot be taken back."""
        if tokens_to_remove:
            raise RuntimeError("a quantized cache cannot go back to an earlier token")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self.timetable = self.timetable.repeated(repeats)


class QuantizingLayer(_Quantizing, DynamicLayer):
    """Cache layer of all tokens that quantizes them."""

    def __init__(self, timetable: Timetable) -> None:
        super().__init__()
        self.timetable = timetable


class QuantizingRoomyLayer(_Quantizing, RoomyLayer):
    """Cache layer with room for the answer that quantizes its tokens."""

    def __init__(self, timetable: Timetable, columns: int) -> None:
        super().__init__(columns)
        self.timetable = timetable


class QuantizingWindowLayer(_Quantizing, DynamicSlidingWindowLayer):
    """Cache layer of the last tokens that quantizes them."""

    def __init__(self, timetable: Timetable, sliding_window: int) -> None:
        super().__init__(sliding_window)
        self.timetable = timetable


def quantizing(layer: DynamicLayer, timetable: Timetable, columns: int | None = None) -> DynamicLayer:
    """Return an empty layer of the same kind that quantizes.

    Args:
        layer: Layer of a plain cache.
        timetable: Timetable of the batch.
        columns: Number of columns for which a layer of all tokens has room; None for one that grows.
    """
    if isinstance(layer, DynamicSlidingWindowLayer):
        return QuantizingWindowLayer(timetable, layer.sliding_window)
    return QuantizingLayer(timetable) if columns is None else QuantizingRoomyLayer(timetable, columns)
