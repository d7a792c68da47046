"""What a task may ask of generation: lmms-eval's `generation_kwargs`, read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Sampling(NamedTuple):
    """How the next token is drawn when it is not simply the likeliest."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class GenerationSettings:
    """What a task asks of generation.

    Attributes:
        max_new_tokens: longest answer, the end-of-sequence token included.
        until: strings that end an answer and are cut off together with what follows.
        sampling: None for greedy decoding.
        num_beams: 1 for no beam search.
        repetition_penalty: 1 for none. Log-probabilities never include it.
    """

    max_new_tokens: int = 1024
    until: tuple[str, ...] = ()
    sampling: Sampling | None = None
    num_beams: int = 1
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.num_beams < 1:
            raise ValueError(f"num_beams must be at least 1, got {self.num_beams}")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")
        if self.num_beams > 1 and self.sampling:
            raise ValueError("num_beams > 1 cannot be combined with sampling")

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any]) -> GenerationSettings:
        """Read a task's `generation_kwargs`.

        As everywhere in lmms-eval, a temperature of 0 means greedy and one above 0 means sampling, unless `do_sample`
        says otherwise. Keys that are for other models are ignored.

        Raises:
            ValueError: a value is out of range, or a key asks for something that is not done here.
        """
        asked = {key: value for key, value in kwargs.items() if value is not None}
        unsupported = {"num_return_sequences", "n", "best_of"} & {key for key, value in asked.items() if value != 1}
        if unsupported:
            raise ValueError(f"generation_kwargs ask for {sorted(unsupported)}; one answer per request is all there is")
        until = asked.get("until", ())
        longest = asked.get("max_new_tokens", asked.get("max_gen_toks", cls.max_new_tokens))
        return cls(
            max_new_tokens=int(longest),
            until=tuple(dict.fromkeys(s for s in ([until] if isinstance(until, str) else until) if s)),
            sampling=_sampling(asked),
            num_beams=int(asked.get("num_beams", 1)),
            repetition_penalty=float(asked.get("repetition_penalty", 1.0)),
        )


def _sampling(asked: Mapping[str, Any]) -> Sampling | None:
    temperature = float(asked.get("temperature", 1.0 if asked.get("do_sample") else 0.0))
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    if not asked.get("do_sample", temperature > 0) or temperature == 0:
        return None
    top_p = float(asked.get("top_p", 1.0))
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    return Sampling(temperature, top_p, int(asked.get("top_k", 0)))
