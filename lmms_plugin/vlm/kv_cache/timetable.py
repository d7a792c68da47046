"""Timetable of a quantized cache: which tokens of which row are quantized when.

A token's place in its row counts; padding, other rows and the number of tokens read at once do not. Let a row hold `t`
tokens, of which the newest is being read. Then, of its tokens,

- the first `keep_first` and the last `keep_last` are as the model computed them,
- of the others, those that are quantized one by one are quantized,
- and so are those that are quantized in groups whose group is complete and wholly among the others.

Groups are cut within runs of tokens of one kind (image or text), from the beginning of the run; the last group of a run
that another run follows may be shorter. All new tokens are text and continue the last run if that is one of text.

While a prompt is being read nothing is quantized: it is read over the keys and values that the model computed. That
ends before its last token, so that all tokens of the answer, the first included, come from a quantized cache
(`read_first`).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lmms_plugin.quant_backends.plans.cache_spec import CacheSpec
from lmms_plugin.quant_backends.plans.specs import UNTOUCHED_BITS


class DueTokens(NamedTuple):
    """Groups of tokens to quantize with the same number of bits.

    Attributes:
        bits: Bits per element.
        rows: (groups,) row of each.
        columns: (groups, size) columns of its tokens, the last of which stands in for those that it lacks.
        sizes: (groups,) numbers of its tokens.
    """

    bits: int
    rows: Tensor
    columns: Tensor
    sizes: Tensor


class _Group(NamedTuple):
    bits: int
    start: int
    end: int


class _Row:
    """Tokens of one row.

    Attributes:
        columns: Columns of the prompt's tokens.
        size: Number of the prompt's tokens.
    """

    def __init__(self, columns: Sequence[int], is_image: Sequence[bool], spec: CacheSpec, width: int) -> None:
        self.columns = columns
        self.size = len(columns)
        self._spec = spec
        self._width = width
        self._is_image = is_image
        self._by_size: dict[int, list[_Group]] = {}
        ends = [0]
        for _, run in groupby(is_image):
            ends.append(ends[-1] + len(list(run)))
        # New tokens continue a last run of text.
        open_run = bool(is_image) and not is_image[-1]
        self._open = ends[-2] if open_run else ends[-1]
        self._closed = [*pairwise(ends)][: -1 if open_run else None]

    def column(self, place: int) -> int:
        """Return the column of the token at a place of the row."""
        return self.columns[place] if place < self.size else self._width + place - self.size

    def bits(self, place: int) -> int:
        """Return the bits of the token at a place of the row."""
        return self._spec.bits_of(is_image=place < self.size and self._is_image[place])

    def due(self, before: int | None, now: int, group: int | None) -> list[_Group]:
        """Return groups that become due while the row grows.

        Args:
            before: Number of its tokens before; None if nothing was quantized then.
            now: Number of its tokens now.
            group: Tokens per group; None for tokens one by one.
        """
        first, last = self._spec.keep_first, self._spec.keep_last
        low, high = first if before is None else max(first, before - last), now - last
        if group is None:
            singles = (_Group(self.bits(place), place, place + 1) for place in range(low, high))
            return [one for one in singles if one.bits < UNTOUCHED_BITS]
        return [
            one for one in self._groups(low if before is not None else -1, high, group) if one.bits < UNTOUCHED_BITS
        ]

    def _groups(self, low: int, high: int, size: int) -> list[_Group]:
        """Return groups that end above `low` and not above `high`."""
        found = []
        ends = self._closed_groups(size)
        begin, stop = (bisect_right([one.end for one in ends], limit) for limit in (low, high))
        found += ends[begin:stop]
        start = max(self._open, self._spec.keep_first)
        done = max(0, (low - start) // size)
        found += [
            _Group(self._spec.bits, start + k * size, start + (k + 1) * size)
            for k in range(done, max(done, (high - start) // size))
        ]
        return found

    def _closed_groups(self, size: int) -> list[_Group]:
        if size not in self._by_size:
            first = self._spec.keep_first
            self._by_size[size] = [
                _Group(self.bits(start), start, min(start + size, end))
                for begin, end in ((max(begin, first), end) for begin, end in self._closed)
                for start in range(begin, end, size)
            ]
        return self._by_size[size]


@dataclass
class Timetable:
    """Timetable of one batch.

    Attributes:
        spec: Storage.
        attention_mask: (rows, columns) 1 at the tokens of prompts, 0 at padding.
        is_image: (rows, columns) whether a token is one of an image.
        read_first: Number of columns that are read before anything is quantized.
    """

    spec: CacheSpec
    attention_mask: Tensor
    is_image: Tensor
    read_first: int
    _rows: list[_Row] = field(init=False, repr=False)
    _answers: dict[tuple[object, ...], list[DueTokens]] = field(default_factory=dict, init=False, repr=False)
    _by_repeats: dict[int, Timetable] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        places = self.attention_mask != 0
        width = places.shape[1]
        self._rows = [
            _Row(mask.nonzero().flatten().tolist(), image[mask].tolist(), self.spec, width)
            for mask, image in zip(places.cpu(), self.is_image.cpu(), strict=True)
        ]

    def repeated(self, repeats: int) -> Timetable:
        """Return the timetable of a batch with every row as often, one after the other."""
        if repeats not in self._by_repeats:
            mask, image = (one.repeat_interleave(repeats, dim=0) for one in (self.attention_mask, self.is_image))
            self._by_repeats[repeats] = Timetable(self.spec, mask, image, self.read_first)
        return self._by_repeats[repeats]

    @cached_property
    def longest(self) -> int:
        """Return the row with most tokens."""
        return max(range(len(self._rows)), key=lambda row: self._rows[row].size)

    def tokens(self, row: int, columns: int, *, hidden: int = 0) -> int:
        """Return the number of a row's tokens among its first columns, without the first `hidden` of them."""
        kept = self._rows[row].columns
        return bisect_left(kept, columns) - bisect_left(kept, hidden) + max(0, columns - self.attention_mask.shape[1])

    def due(self, before: int, now: int, group: int | None, device: torch.device) -> list[DueTokens]:
        """Return what becomes due while a cache grows.

        Args:
            before: Number of columns before.
            now: Number of columns now, at least `read_first`.
            group: Tokens per group; None for tokens one by one.
            device: Device of the returned tensors.
        """
        asked = (before, now, group, device)
        # All layers ask the same, one after the other; keys and values, and heads of another size, may differ.
        if self._answers and next(iter(self._answers))[:2] != asked[:2]:
            self._answers.clear()
        if asked not in self._answers:
            self._answers[asked] = self._gathered(before, now, group, device)
        return self._answers[asked]

    def _gathered(self, before: int, now: int, group: int | None, device: torch.device) -> list[DueTokens]:
        fresh = before < self.read_first
        by_bits: dict[int, list[tuple[int, _Group]]] = {}
        for index, row in enumerate(self._rows):
            past = None if fresh else self.tokens(index, before)
            for one in row.due(past, self.tokens(index, now), group):
                by_bits.setdefault(one.bits, []).append((index, one))
        found = []
        for bits, members in sorted(by_bits.items()):
            size = max(one.end - one.start for _, one in members)
            columns = [
                [self._rows[row].column(min(one.start + k, one.end - 1)) for k in range(size)] for row, one in members
            ]
            found.append(
                DueTokens(
                    bits,
                    torch.tensor([row for row, _ in members], device=device),
                    torch.tensor(columns, device=device),
                    torch.tensor([one.end - one.start for _, one in members], device=device),
                )
            )
        return found
