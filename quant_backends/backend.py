"""Interface of a quantization method: one file per method and one line in `lmms_plugin.quant_backends.BACKENDS`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from torch import Tensor, nn

from lmms_plugin.quant_backends.layers.codes import Codes
from lmms_plugin.quant_backends.layers.linear import PackedLinear, QuantizedLinear
from lmms_plugin.quant_backends.plans.plan import QuantPlan, QuantSpec
from lmms_plugin.quant_backends.plans.rotation_spec import RotationSpec
from lmms_plugin.quant_backends.plans.specs import DEFAULT_SAMPLES
from lmms_plugin.quant_backends.plans.storage_choice import Storage
from lmms_plugin.quant_backends.statistics import TOKEN_WEIGHTS, UNWEIGHTED, InputStatistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Backend(ABC):
    """Method of quantizing linear layers: a frozen dataclass whose fields are its options, all with defaults.

    Attributes:
        name: Registered name, as in ``quant_<name>``.
        bits: Supported numbers of bits per weight.
        default_bits: Number of bits per weight of the language model when the user gives none.
        default_samples: Number of calibration samples when the user gives none.
        unsaved: Reason why its layers cannot be saved; None if they can, or if only the layers themselves tell.
        takes_formats: Whether the specs of a plan may name formats.
        undense: Reason why dense weights of its layers cannot be kept; None if they can, or if only the layers tell.
    """

    name: ClassVar[str]
    bits: ClassVar[frozenset[int]]
    default_bits: ClassVar[int] = 4
    default_samples: ClassVar[int] = DEFAULT_SAMPLES
    unsaved: ClassVar[str | None] = None
    takes_formats: ClassVar[bool] = False
    undense: ClassVar[str | None] = None

    def check(self, plan: QuantPlan) -> None:
        """Refuse a plan that this backend cannot carry out, before any model is loaded.

        Raises:
            ValueError: A spec of the plan is unsupported; the message says what is supported.
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

    def check_storage(self, storage: Storage, plan: QuantPlan) -> None:
        """Refuse a storage of weights that its layers do not have, before any model is loaded.

        Raises:
            ValueError: Dense weights were asked for and cannot be kept.
        """
        if storage == "dense" and self.undense is not None:
            raise ValueError(f"storage=dense: {self.undense}; leave storage out")

    @property
    def uncompressed(self) -> str | None:
        """Return why compressed-tensors cannot store its layers, as far as known beforehand; None if it can."""
        return self.unsaved

    @property
    def settled(self) -> Mapping[str, str]:
        """Return the arguments about weights that its options decide, each with the reason: nobody may give them."""
        return {}

    @property
    def rotates(self) -> RotationSpec | None:
        """Return the rotation of the dense model before any layer is quantized; None for none."""
        return None

    def for_spec(self, spec: QuantSpec) -> Self:
        """Return the backend that quantizes layers with a spec: this one, with the formats that the spec names."""
        return self

    @property
    def scales_by_modality(self) -> bool:
        """Return whether inputs of image tokens and of text have static scales of their own."""
        return False

    def check_spec(self, spec: QuantSpec) -> None:
        """Refuse a single spec that this backend cannot carry out."""
        named = spec.format or spec.activation_format
        if named is not None and not self.takes_formats:
            raise ValueError(f"{self.name} takes no formats, but the plan asks for {named}; rtn, gptq and awq do")
        if spec.bits not in self.bits:
            able = ", ".join(str(bits) for bits in sorted(self.bits))
            raise ValueError(f"{self.name} cannot quantize to {spec.bits} bits (it can: {able})")


class DataFreeBackend(Backend):
    """Method that needs only the weight, so that it can run while a checkpoint is being read."""

    @abstractmethod
    def quantize_linear(self, weight: Tensor, bias: nn.Parameter | None, spec: QuantSpec) -> QuantizedLinear:
        """Quantize one layer.

        Args:
            weight: Weight (rows, columns), finite, in the float dtype that the layer computes in.
            bias: Bias (rows,), kept unchanged; it may still be on the meta device.
            spec: Bits, group size, symmetry.
        """


class CodesBackend(DataFreeBackend):
    """Data-free method whose result fits the common packed layer."""

    @abstractmethod
    def quantize(self, weight: Tensor, spec: QuantSpec) -> Codes:
        """Quantize one weight.

        Args:
            weight: Weight (rows, columns), finite, any float dtype.
            spec: Bits, group size, symmetry.

        Returns:
            Codes of shape (rows, groups, group_size), with scales in the dtype of `weight`.
        """

    def quantize_linear(self, weight: Tensor, bias: nn.Parameter | None, spec: QuantSpec) -> QuantizedLinear:
        """Quantize one layer into a packed layer."""
        return PackedLinear.from_codes(self.quantize(weight, spec), spec, weight.shape[1], bias=bias)


class Solution(NamedTuple):
    """Quantized layer that a calibrated backend returns for a dense one.

    Attributes:
        layer: Layer that replaces the dense one.
        method: Method that quantized it, where that differs from the backend's name.
        plain_rows: Number of rows that keep the calibration-free result, because the backend's own result is no better
            in them on the calibration inputs (on the held-out ones, where there are some).
    """

    layer: QuantizedLinear
    method: str | None = None
    plain_rows: int = 0


class CalibratedBackend(Backend):
    """Method that needs statistics of the layer inputs in the unquantized model.

    Attributes:
        by_role: Whether it needs separate statistics of image, prompt and answer tokens.
        holds_back: Whether it validates its result on held-out inputs.
        fits_correlations: Whether it fits correlations among inputs, which differ between noise and natural images.
        rows_per_column: Number of input rows per column of a layer for a reliable result; fewer give a warning.
        sequential: Whether calibration is sequential: a layer sees the outputs of the quantized blocks before its own,
            rather than its inputs in the unquantized model.
        asymmetric: Whether a sequential method also sees each input as it is in the unquantized model.
        keeps_rows: Whether it needs a sample of the inputs themselves.
    """

    by_role: ClassVar[bool] = False
    holds_back: ClassVar[bool] = False
    fits_correlations: ClassVar[bool] = False
    rows_per_column: ClassVar[int] = 0
    sequential: ClassVar[bool] = False
    asymmetric: ClassVar[bool] = False
    keeps_rows: ClassVar[bool] = False

    @property
    def weighs_tokens_by(self) -> str | None:
        """Return what weights of single tokens come from (`TOKEN_WEIGHTS` in statistics.py); None for no weights."""
        return None

    def unweighted(self, statistics: InputStatistics) -> str | None:
        """Return what the report calls a layer without token weights, where the method weighs tokens; else None."""
        if self.weighs_tokens_by is None or statistics.by_importance is not statistics:
            return None
        return f"{self.name}, {UNWEIGHTED}"

    @property
    def needs_roles(self) -> bool:
        """Return whether calibration samples must tell image, prompt and answer apart."""
        return self.by_role or self.weighs_tokens_by is not None or self.scales_by_modality

    @abstractmethod
    def solve(
        self, layers: Sequence[nn.Linear], specs: Sequence[QuantSpec], statistics: InputStatistics
    ) -> list[Solution]:
        """Quantize the layers that share one input tensor, without changing them.

        Args:
            layers: Dense layers on one device, all of the same width.
            specs: Specs, one per layer.
            statistics: Statistics of the shared input tensor over all calibration samples.

        Returns:
            Solutions, one per layer.

        Raises:
            ValueError: The statistics are not finite.
        """

    @abstractmethod
    def without_inputs(self, layer: nn.Linear, spec: QuantSpec) -> QuantizedLinear:
        """Quantize a layer that no calibration input reached, as this method would with equally weighted inputs."""


def expect_token_weights(backend: str, source: str | None) -> None:
    """Refuse a source of token weights that there is not.

    Raises:
        ValueError: It is none of `TOKEN_WEIGHTS`.
    """
    if source is not None and source not in TOKEN_WEIGHTS:
        raise ValueError(f"{backend}: token_weights must be {' or '.join(TOKEN_WEIGHTS)}, got {source!r}")


class LoadedCheckpoint(NamedTuple):
    """Model loaded from a quantized checkpoint.

    Attributes:
        model: Model whose quantized layers are `QuantizedLinear`.
        info: Loading info of ``from_pretrained`` (missing and unexpected weights).
        label: Quantization of the checkpoint, as shown in the report.
        dense: Reason why its other linear layers are dense.
    """

    model: PreTrainedModel
    info: Mapping[str, Any]
    label: str
    dense: str


class CheckpointBackend(Backend):
    """Reader of checkpoints that are quantized already; it takes no plan."""

    @abstractmethod
    def load(self, path: str, config: Any, options: Mapping[str, Any]) -> LoadedCheckpoint:
        """Load a quantized model.

        Args:
            path: Hub id or local folder.
            config: Config of the checkpoint, which may be changed.
            options: Keyword arguments of ``from_pretrained``.

        Raises:
            ValueError: The checkpoint is not quantized, or in a way that cannot be run faithfully.
            ImportError: The library that runs its format is missing.
        """


class WholeModelBackend(Backend):
    """Method that processes the whole model and the calibration inputs by itself."""

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
            model: Unquantized model; its weights may change meanwhile, since each named layer is replaced in the end.
            processor: Processor of the model.
            specs: Module name -> spec.
            batches: Keyword arguments of one forward pass each.

        Yields:
            Module name and quantized layer, one for each of `specs`.
        """
