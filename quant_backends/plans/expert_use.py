"""Use of experts by calibration tokens: pure Python, so that plans can be read without a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmms_plugin.quant_backends.plans.report_schema import Quantized
from lmms_plugin.utils.messages import counted
from lmms_plugin.utils.reading import accounts


@dataclass(frozen=True)
class ExpertUse:
    """Distribution of the calibration tokens over the experts of one layer.

    Attributes:
        name: Name of the module that holds the layer's experts.
        tokens: Numbers of tokens sent to each expert; a token counts for each expert that it is sent to.
        uncalibrated: Numbers of the experts with too few tokens, which were quantized without inputs.
    """

    name: str
    tokens: tuple[int, ...]
    uncalibrated: tuple[int, ...] = ()

    @property
    def entropy(self) -> float:
        """Return the entropy of the tokens' distribution over experts / ln(experts): 1 is even, 0 is a single expert.

        NaN where there is no token or no second expert.
        """
        total = sum(self.tokens)
        if not total or len(self.tokens) < 2:
            return math.nan
        shares = [count / total for count in self.tokens if count]
        return -sum(share * math.log(share) for share in shares) / math.log(len(self.tokens))

    @property
    def imbalance(self) -> float:
        """Return tokens of the most used expert / mean tokens of an expert: 1 is even. NaN where there is no token."""
        total = sum(self.tokens)
        return max(self.tokens) * len(self.tokens) / total if total else math.nan

    @property
    def unused(self) -> int:
        """Return the number of experts without any token."""
        return sum(not count for count in self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values; None for NaN."""
        numbers = {"entropy": self.entropy, "imbalance": self.imbalance}
        return {
            "name": self.name,
            "tokens": list(self.tokens),
            **{key: None if math.isnan(value) else value for key, value in numbers.items()},
            "unused": self.unused,
            "uncalibrated": list(self.uncalibrated),
        }


def read_use(path: Path) -> dict[str, tuple[int, ...]]:
    """Return module name -> tokens of each expert, from a report (``quant_report.json``, ``report=FILE``).

    Raises:
        ValueError: The file is no report, one without counts, or damaged.
        FileNotFoundError: The file does not exist.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no report {str(path)!r}")
    layers = accounts.read(path, Quantized).get("experts")
    if not layers:
        raise ValueError(
            f"{path} counts no experts; expected the report of a calibrated method (awq, gptq, mbq, ...) on the same "
            "model"
        )
    return {layer["name"]: tuple(layer["tokens"]) for layer in layers}


def summary(layers: Sequence[ExpertUse]) -> str:
    """Return one line about all layers."""
    tokens = [count for layer in layers for count in layer.tokens]
    entropies = [layer.entropy for layer in layers if not math.isnan(layer.entropy)]
    line = f"experts of {counted(len(layers), 'layer')}: {min(tokens)} to {max(tokens)} calibration tokens each"
    if entropies:
        line += f", entropy {min(entropies):.2f} to {max(entropies):.2f} of an even spread"
    bare = sum(len(layer.uncalibrated) for layer in layers)
    return f"{line}; {bare} of {len(tokens)} had too few to be calibrated" if bare else line
