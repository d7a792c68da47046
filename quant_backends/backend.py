"""The interface of a quantizer: a file of its own and a line in `lmms_plugin.quant_backends.BACKENDS`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from lmms_plugin.quant_backends.linear import Codes, PackedLinear
from lmms_plugin.quant_backends.plan import QuantPlan, QuantSpec


class Backend(ABC):
    """A way of quantizing linear layers.

    Attributes:
        name: The registered name, as in ``quant_<name>``.
        bits: The bits per weight that it can do.
    """

    name: ClassVar[str]
    bits: ClassVar[frozenset[int]]

    def check(self, plan: QuantPlan) -> None:
        """Refuse what this backend cannot do, before any model is loaded.

        Raises:
            ValueError: A spec of the plan is out of reach; the message says what is within.
        """
        if not plan.specs:
            raise ValueError(f"{self.name} was asked to quantize nothing: every component is at 16 bits")
        for spec in plan.specs:
            self.check_spec(spec)

    def check_spec(self, spec: QuantSpec) -> None:
        """Refuse one spec, as `check` does for all of a plan."""
        if spec.bits not in self.bits:
            able = ", ".join(str(bits) for bits in sorted(self.bits))
            raise ValueError(f"{self.name} cannot quantize to {spec.bits} bits (it can: {able})")


class DataFreeBackend(Backend):
    """A quantizer that needs the weight alone, so that it can run while a checkpoint is being read."""

    @abstractmethod
    def quantize(self, weight: Tensor, spec: QuantSpec) -> Codes:
        """Quantize one weight.

        Args:
            weight: (rows, columns), finite, any float dtype.
            spec: Bits, group size, symmetry.

        Returns:
            Codes of shape (rows, groups, group_size), with scales in the dtype of `weight`.
        """


class CalibratedLinear(NamedTuple):
    """What a calibrated backend hands out for one layer.

    Attributes:
        name: Full module name.
        layer: The packed layer that takes its place.
        method: How it was quantized, which differs from the backend where calibration never reached it.
        output_error: ‖X(W − Ŵ)ᵀ‖ / ‖XWᵀ‖ over the calibration inputs X; None when there were none.
    """

    name: str
    layer: PackedLinear
    method: str
    output_error: float | None


class CalibratedBackend(Backend):
    """A quantizer that looks at what flows through the unquantized model first."""

    @abstractmethod
    def calibrate(
        self, model: nn.Module, specs: Mapping[str, QuantSpec], batches: Sequence[Mapping[str, Any]]
    ) -> Iterator[CalibratedLinear]:
        """Quantize the named layers of a model.

        Nothing in `model` changes before the first item is handed out; the caller puts each item into
        the model as it comes, so that the dense weight can go.

        Args:
            model: The unquantized model, in evaluation mode.
            specs: Module name -> spec.
            batches: Keyword arguments of one forward pass each, one calibration sample each.
        """
