"""Where the time of answering goes: vision tower, reading of prompts, and steps of decoding, by hooks on the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.reporting import Row

PHASES = ("vision", "prefix", "questions", "decoding")


class _Reading:
    """What hooks read when a phase begins and ends, and the sums of it."""

    def __init__(self, read: Callable[[], float]) -> None:
        self.read = read
        self.sums: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.calls: dict[str, int] = dict.fromkeys(PHASES, 0)
        self._begun: list[tuple[str, float]] = []

    def begin(self, phase: str) -> None:
        self._begun.append((phase, self.read()))

    def end(self) -> None:
        phase, since = self._begun.pop()
        took = self.read() - since
        self.calls[phase] += 1
        self.sums[phase] += took
        # A vision tower that runs within the reading of a prompt is no part of it.
        if self._begun:
            self.sums[self._begun[-1][0]] -= took


def _phase(inputs: dict[str, Any]) -> str:
    ids = inputs.get("input_ids")
    cache = inputs.get("cache") if inputs.get("cache") is not None else inputs.get("past_key_values")
    if cache is None or not cache.get_seq_length():
        return "prefix"
    return "decoding" if ids is not None and ids.shape[1] == 1 else "questions"


@contextmanager
def _watched(model: Any, read: Callable[[], float]) -> Iterator[_Reading]:
    reading = _Reading(read)
    vision: nn.Module = model.model.visual

    def before(_: nn.Module, __: Any, inputs: dict[str, Any]) -> None:
        reading.begin(_phase(inputs))

    handles = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(lambda *_: reading.end()),
        vision.register_forward_pre_hook(lambda *_: reading.begin("vision")),
        vision.register_forward_hook(lambda *_: reading.end()),
    ]
    try:
        yield reading
    finally:
        for handle in handles:
            handle.remove()


def phases(
    model: Any, answer: Callable[[], Any], expressions: int, clock: Callable[[], float], per_operation: float
) -> list[Row]:
    """Return one row per phase, and one for all else.

    Args:
        model: Model of ours, of the Qwen2-VL kind.
        answer: What answers all questions.
        expressions: Number per image, for the names of the rows.
        clock: Clock.
        per_operation: Least seconds of an operation.

    Returns:
        Rows of which `ratio` is the share of the phase's time that its arithmetic takes at least, and `share` its share
        of the whole time.
    """
    with _watched(model.model, clock) as seconds:
        start = clock()
        answer()
        whole = clock() - start
    with FlopCounterMode(display=False) as counter, _watched(model.model, counter.get_total_flops) as counted:
        answer()
    rows: list[Row] = [
        {
            "case": f"{phase}@{expressions}",
            "ratio": counted.sums[phase] * per_operation / seconds.sums[phase] if seconds.sums[phase] else None,
            "seconds": seconds.sums[phase],
            "share": seconds.sums[phase] / whole,
            "calls": seconds.calls[phase],
        }
        for phase in PHASES
    ]
    rest = whole - sum(seconds.sums.values())
    return [*rows, {"case": f"all_else@{expressions}", "ratio": None, "seconds": rest, "share": rest / whole}]
