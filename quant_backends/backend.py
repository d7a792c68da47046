"""The interface of a quantizer: a file of its own and a line in `lmms_plugin.quant_backends.BACKENDS`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor, nn

from lmms_plugin.quant_backends.layers.codes import Codes
from lmms_plugin.quant_backends.layers.linear import PackedLinear, QuantizedLinear
from lmms_plugin.quant_backends.plans.plan import QuantPlan, QuantSpec
from lmms_plugin.quant_backends.plans.specs import DEFAULT_SAMPLES
from lmms_plugin.quant_backends.statistics import InputStatistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Backend(ABC):
    """A way of quantizing linear layers: a frozen dataclass whose fields are its options, all with defaults.

    Attributes:
        name: The registered name, as in ``quant_<name>``.
        bits: The bits per weight that it can do.
        default_bits: The bits per weight of the language model when the user names none.
        default_samples: Calibration samples when the user names no number.
        unsaved: Why its layers cannot be written to disk at all; None if they can, or if only its layers tell.
    """

    name: ClassVar[str]
    bits: ClassVar[frozenset[int]]
    default_bits: ClassVar[int] = 4
    default_samples: ClassVar[int] = DEFAULT_SAMPLES
    unsaved: ClassVar[str | None] = None

    def check(self, plan: QuantPlan) -> None:
        """Refuse what this backend cannot do, before any model is loaded.

        Raises:
            ValueError: A spec of the plan is out of reach; the message says what is within.
        """
        if not plan.specs:
            raise ValueError(f"{self.name} was asked to quantize nothing: every component is at 16 bits")
        if plan.counts_use and isinstance(self, DataFreeBackend):
            raise ValueError(
                f"the plan's bits depend on how often experts are used, but {self.name} looks at no inputs that could "
                "be counted: name the report of a calibrated run under routed_experts: {use: FILE}"
            )
        for spec in plan.specs:
            self.check_spec(spec)

    @property
    def uncompressed(self) -> str | None:
        """Why compressed-tensors cannot hold its layers, as far as that is known before any is made; None if it can."""
        return self.unsaved

    def check_spec(self, spec: QuantSpec) -> None:
        """Refuse one spec, as `check` does for all of a plan."""
        if spec.bits not in self.bits:
            able = ", ".join(str(bits) for bits in sorted(self.bits))
            raise ValueError(f"{self.name} cannot quantize to {spec.bits} bits (it can: {able})")


class DataFreeBackend(Backend):
    """A quantizer that needs the weight alone, so that it can run while a checkpoint is being read."""

    @abstractmethod
    def quantize_linear(self, weight: Tensor, bias: nn.Parameter | None, spec: QuantSpec) -> QuantizedLinear:
        """Quantize one layer.

        Args:
            weight: (rows, columns), finite, any float dtype: the one that the layer computes in.
            bias: (rows,), taken over as it is; it may still lie on the meta device.
            spec: Bits, group size, symmetry.
        """


class CodesBackend(DataFreeBackend):
    """A data-free quantizer whose result the shared packed layer can hold."""

    @abstractmethod
    def quantize(self, weight: Tensor, spec: QuantSpec) -> Codes:
        """Quantize one weight.

        Args:
            weight: (rows, columns), finite, any float dtype.
            spec: Bits, group size, symmetry.

        Returns:
            Codes of shape (rows, groups, group_size), with scales in the dtype of `weight`.
        """

    def quantize_linear(self, weight: Tensor, bias: nn.Parameter | None, spec: QuantSpec) -> QuantizedLinear:
        """Quantize one layer into a packed one."""
        return PackedLinear.from_codes(self.quantize(weight, spec), spec, weight.shape[1], bias=bias)


class Solution(NamedTuple):
    """What a calibrated backend makes of one layer.

    Attributes:
        layer: It takes the place of the dense one.
        method: How it was quantized, where that differs from the backend's name.
        plain_rows: Rows that keep what needs no calibration, since the backend's own result does no better in them on
            the calibration inputs, those that were held back where some are.
    """

    layer: QuantizedLinear
    method: str | None = None
    plain_rows: int = 0


class CalibratedBackend(Backend):
    """A quantizer that looks at what flows through the unquantized model first.

    Attributes:
        by_role: Whether it needs the statistics of image, prompt and answer tokens apart.
        holds_back: Whether it judges what it makes of the inputs by some that it holds back.
        fits_correlations: Whether it fits correlations among inputs, which are others in noise than elsewhere.
        rows_per_column: Inputs that it takes for each column of a layer to be sure of its result; fewer are warned of.
        sequential: Whether a layer is to see what the quantized blocks before its own make of the samples, rather than
            the inputs that it has in the unquantized model.
    """

    by_role: ClassVar[bool] = False
    holds_back: ClassVar[bool] = False
    fits_correlations: ClassVar[bool] = False
    rows_per_column: ClassVar[int] = 0
    sequential: ClassVar[bool] = False

    @abstractmethod
    def solve(
        self, layers: Sequence[nn.Linear], specs: Sequence[QuantSpec], statistics: InputStatistics
    ) -> list[Solution]:
        """Quantize the layers that are fed one tensor, without changing them.

        Args:
            layers: Dense, on one device, all of the same width.
            specs: One per layer.
            statistics: Of the tensor that feeds them, over all calibration samples.

        Returns:
            One solution per layer.

        Raises:
            ValueError: The statistics are not finite.
        """

    @abstractmethod
    def without_inputs(self, layer: nn.Linear, spec: QuantSpec) -> QuantizedLinear:
        """Quantize a layer that no calibration input reached, as this method would if every input weighed the same."""


class LoadedCheckpoint(NamedTuple):
    """What a reader of quantized checkpoints makes of one.

    Attributes:
        model: Its quantized layers are `QuantizedLinear`.
        info: What ``from_pretrained`` says about missing and unexpected weights.
        label: How the checkpoint was quantized, as shown in the report.
        dense: Why its other linear layers are dense.
    """

    model: PreTrainedModel
    info: Mapping[str, Any]
    label: str
    dense: str


class CheckpointBackend(Backend):
    """A reader of checkpoints that were quantized before; there is no plan."""

    @abstractmethod
    def load(self, path: str, config: Any, options: Mapping[str, Any]) -> LoadedCheckpoint:
        """Load a quantized model.

        Args:
            path: Hub id or local folder.
            config: The checkpoint's, which may be changed.
            options: Keyword arguments of ``from_pretrained``.

        Raises:
            ValueError: The checkpoint is not quantized, or in a way that cannot be run faithfully.
            ImportError: The library that runs its format is missing.
        """


class WholeModelBackend(Backend):
    """A quantizer that must have the whole model and the calibration inputs to itself."""

    @abstractmethod
    def quantize_model(
        self,
        model: PreTrainedModel,
        processor: Any,
        specs: Mapping[str, QuantSpec],
        batches: Sequence[Mapping[str, Any]],
    ) -> Iterator[tuple[str, QuantizedLinear]]:
        """Quantize the named layers of a model.

        Args:
            model: Unquantized; its weights may be changed on the way, as each named layer is replaced in the end.
            processor: Of the model.
            specs: Module name -> spec.
            batches: Keyword arguments of one forward pass each.

        Yields:
            Module name and quantized layer, one for each of `specs`.
        """
