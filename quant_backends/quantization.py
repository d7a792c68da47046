"""Quantization of one model: assignment of specs to layers, their replacement, and the account of every weight."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lmms_plugin.quant_backends.backend import Backend, CalibratedBackend, DataFreeBackend, WholeModelBackend
from lmms_plugin.quant_backends.calibration.journal import Journal, Solved
from lmms_plugin.quant_backends.calibration.kept_statistics import KeptStatistics
from lmms_plugin.quant_backends.calibration.memory import Residence, return_freed_memory
from lmms_plugin.quant_backends.calibration.routing import count_tokens
from lmms_plugin.quant_backends.calibration.sequential import UNCALIBRATED, SequentialQuantizer
from lmms_plugin.quant_backends.layers.codes import rows_per_block
from lmms_plugin.quant_backends.layers.linear import QuantizedLinear
from lmms_plugin.quant_backends.plans.expert_use import ExpertUse
from lmms_plugin.quant_backends.plans.plan import Assignment, QuantPlan, QuantSpec
from lmms_plugin.quant_backends.plans.quant_report import ModuleReport
from lmms_plugin.quant_backends.rotations.hadamard import input_rotation, rotate_inputs
from lmms_plugin.quant_backends.rotations.rotate import changed_layers, rotate
from lmms_plugin.quant_backends.structure.blocks import within
from lmms_plugin.quant_backends.structure.components import components, dense_linear, expect_finite, splitter
from lmms_plugin.quant_backends.structure.experts import join_experts, own_weight, split_experts
from lmms_plugin.quant_backends.structure.roles import find_mixtures, find_places
from lmms_plugin.quant_backends.structure.telling import expect_modalities, tell_modalities

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Quantization:
    """Quantization of one model, from the plan to the account of every weight.

    Args:
        model: Model of transformers, loaded or still on the meta device.
        backend: Backend that has accepted the plan (`Backend.check`).
        plan: Plan of what to quantize; empty for the untouched baseline.

    Raises:
        ValueError: The plan does not fit the model (see `QuantPlan.assign`), or two of its layers share one weight.
    """

    def __init__(self, model: PreTrainedModel, backend: Backend, plan: QuantPlan) -> None:
        self.model, self.backend, self.plan = model, backend, plan
        self.split = split_experts(model) if plan.specs else {}
        self.components = components(model)
        self.places = find_places(model, self.components)
        self.specs, self.reasons = self._assign()
        self._join_untouched()
        self.tied = {name for name in self.specs if _is_tied(model, name)}
        _expect_unshared(model, self.specs, self.components)
        # On the meta device while a checkpoint is read: a model that cannot be rotated fails before a byte is read.
        if plan.specs and backend.scales_by_modality:
            expect_modalities(model)
            tell_modalities(model)
        rotation = backend.rotates if plan.specs else None
        self.unrotated: frozenset[str] = frozenset() if rotation is None else changed_layers(model, rotation)
        self._done: dict[str, ModuleReport] = {}
        self._use: dict[str, tuple[int, ...]] = {}

    def _assign(self, use: Mapping[str, tuple[int, ...]] | None = None) -> Assignment:
        fixed = {name: reason for name in self.components if (reason := _untouchable(self.model.get_submodule(name)))}
        free = {name: part for name, part in self.components.items() if name not in fixed}
        if self.plan.counts_use:
            self._expect_countable()
        if self.plan.specs:
            specs, reasons = self.plan.assign(free, self.places, use)
        else:
            specs, reasons = {}, dict.fromkeys(free, "quantization was not asked for")
        return Assignment(specs, reasons | fixed)

    def _expect_countable(self) -> None:
        experts = {place.experts for place in self.places.values() if place.experts is not None}
        uncounted = sorted(experts - find_mixtures(self.model).keys())
        if uncounted:
            raise ValueError(
                f"the plan's bits depend on how often experts are used, which {uncounted[0]} does not tell: it is a "
                "list of modules that the model calls by itself"
            )

    def _join_untouched(self) -> None:
        """Rejoin experts of which nothing is quantized; release the stacks of all others."""
        inside = {name: [layer for layer in self.components if within(layer, name)] for name in self.split}
        untouched = [name for name, layers in inside.items() if self.specs.keys().isdisjoint(layers)]
        join_experts(self.model, self.split, untouched)
        for name in untouched:
            self.reasons[name] = self.reasons[inside[name][0]]
            for layer in inside[name]:
                del self.reasons[layer], self.components[layer]
        for name, experts in self.split.items():
            # In a model that is still to be read, the stacks stay until they arrive.
            if not any(stack.is_meta for stack in experts.fused.parameters(recurse=False)):
                experts.release()
            self._own_dense(name)

    def _own_dense(self, experts: str) -> None:
        """Copy the weights of experts that stay dense: views of a stack would keep all of it in memory."""
        for layer in self.components:
            if within(layer, experts) and layer not in self.specs:
                own_weight(dense_linear(self.model, layer))

    def take_stack(self, parameter: str, values: Tensor) -> list[str]:
        """Split a stack of experts that has been read from a checkpoint, and quantize what can be quantized at once.

        Args:
            parameter: Name of the fused parameter.
            values: Values of the parameter.

        Returns:
            Names of the parameters that it has become.
        """
        name, _, stack = parameter.rpartition(".")
        experts = self.split[name]
        arrived = list(experts.take(stack, values))
        experts.forget_stack(stack)
        if stack.endswith("_bias"):
            return [f"{name}.{layer}.bias" for layer, _ in arrived]
        for layer, weight in arrived:
            full = f"{name}.{layer}"
            if full not in self.specs:
                own_weight(dense_linear(self.model, full))
            elif isinstance(self.backend, DataFreeBackend):
                self.quantize(full, weight.contiguous())
        return [f"{name}.{layer}.weight" for layer, _ in arrived]

    def prepare(self) -> None:
        """Rotate the dense model, once, where the backend does so; its layers may be quantized from then on."""
        spec = self.backend.rotates
        if not self.unrotated or spec is None:
            return
        rotate(self.model, spec, self.specs.keys() if spec.online else ())
        # A head that shared the embedding's weight has its own now.
        for name in self.unrotated:
            untie(self.model, name)
        self.tied -= self.unrotated
        self.unrotated = frozenset()

    def pending(self) -> Iterator[str]:
        """Yield the layers of the plan that are still dense."""
        return (name for name in self.specs if name not in self._done)

    def quantize(self, name: str, weight: Tensor) -> None:
        """Quantize one layer with a data-free backend and put it into the model.

        Args:
            name: Full module name.
            weight: Dense weight; the module's own may still be on the meta device.
        """
        assert isinstance(self.backend, DataFreeBackend)
        linear = dense_linear(self.model, name)
        if weight.shape != linear.weight.shape:
            raise ValueError(f"{name}: expected a weight {tuple(linear.weight.shape)}, got {tuple(weight.shape)}")
        expect_finite(name, weight)
        spec = self.specs[name]
        self.replace(name, self.backend.for_spec(spec).quantize_linear(weight, linear.bias, spec), weight)

    def replace(
        self,
        name: str,
        layer: QuantizedLinear,
        weight: Tensor,
        *,
        output_error: float | None = None,
        method: str | None = None,
        plain_rows: int = 0,
    ) -> None:
        """Replace a dense layer by a quantized one and record its errors.

        Args:
            name: Full module name.
            layer: Quantized layer.
            weight: Dense weight.
            output_error: Relative output error over calibration inputs; None without calibration.
            method: Method that quantized the layer, where that differs from the backend's name.
            plain_rows: Number of rows, as in `lmms_plugin.quant_backends.backend.Solution`.

        Raises:
            ValueError: The quantized layer holds values that are not finite.
        """
        error = relative_error(weight, layer)
        if not math.isfinite(error):
            raise ValueError(f"{name}: quantized weights are not finite; scales in {weight.dtype} overflow")
        # Keeps transformers from initialising the layer as if its weights had been missing.
        layer._is_hf_initialized = True  # type: ignore[assignment]
        rotation = input_rotation(self.model.get_submodule(name))
        if rotation is not None:
            rotate_inputs(layer, rotation)
        self.model.set_submodule(name, layer)
        if weight.device.type == "cpu":
            return_freed_memory()
        tied = name in self.tied
        if tied:
            untie(self.model, name)
        size = 0 if tied else weight.numel() * weight.element_size()
        self._note(
            name,
            layer,
            method or self.backend.name,
            size,
            relative_error=error,
            output_error=output_error,
            plain_rows=plain_rows,
            outlier_score=find_outlier_score(weight),
        )

    def finish(
        self,
        batches: Sequence[Mapping[str, Any]] = (),
        *,
        processor: Any = None,
        residence: Residence | None = None,
        journal: Journal | None = None,
        kept: KeptStatistics | None = None,
    ) -> None:
        """Quantize every layer that is still dense.

        Args:
            batches: Calibration inputs, for a calibrated backend.
            processor: Processor of the model, for a backend that takes the whole model.
            residence: Offloading of its blocks; None leaves them where they are.
            journal: Store of finished blocks; None keeps nothing.
            kept: What other runs of the same dense model share with this one; None for nothing.
        """
        self.prepare()
        if isinstance(self.backend, CalibratedBackend | WholeModelBackend):
            self._count_use(batches, residence, journal, kept)
        remaining = {name: self.specs[name] for name in self.pending()}
        if isinstance(self.backend, CalibratedBackend) and remaining:
            self._calibrate(self.backend, remaining, batches, residence, journal, kept)
        elif isinstance(self.backend, WholeModelBackend) and remaining:
            self._hand_over(self.backend, processor, remaining, batches)
        elif remaining:
            for name in remaining:
                self.quantize(name, dense_linear(self.model, name).weight.detach())
        missed = list(self.pending())
        if missed:
            raise ValueError(f"{self.backend.name} left {len(missed)} layers of the plan dense, first {missed[0]}")

    def _count_use(
        self,
        batches: Sequence[Mapping[str, Any]],
        residence: Residence | None,
        journal: Journal | None,
        kept: KeptStatistics | None,
    ) -> None:
        """Count the calibration tokens sent to each expert, and settle the specs that depend on it."""
        known = None if journal is None else journal.noted("expert use")
        if known is None and kept is not None:
            known = kept.expert_use()
        if known is None:
            known = count_tokens(self.model, batches, residence or Residence())
            if journal is not None and known:
                journal.note("expert use", known)
            if kept is not None and known:
                kept.keep_expert_use(known)
        self._use = {name: tuple(tokens) for name, tokens in known.items()}
        if self.plan.counts_use:
            self.specs, reasons = self._assign(self._use)
            self.reasons |= reasons
            for name in self.split:
                self._own_dense(name)

    @property
    def expert_use(self) -> tuple[ExpertUse, ...]:
        """Return the use of each layer's experts over the calibration inputs; empty without such inputs or experts."""
        bare = {name for name, module in self._done.items() if (module.method or "").endswith(UNCALIBRATED)}
        without: dict[str, set[int]] = {}
        for name in bare & self.places.keys():
            place = self.places[name]
            if place.experts is not None and place.expert is not None:
                without.setdefault(place.experts, set()).add(place.expert)
        return tuple(
            ExpertUse(name, tokens, tuple(sorted(without.get(name, ())))) for name, tokens in self._use.items()
        )

    def _calibrate(
        self,
        backend: CalibratedBackend,
        specs: Mapping[str, QuantSpec],
        batches: Sequence[Mapping[str, Any]],
        residence: Residence | None,
        journal: Journal | None,
        kept: KeptStatistics | None,
    ) -> None:
        def put(name: str, solved: Solved) -> None:
            weight = dense_linear(self.model, name).weight.detach()
            layer, output_error, method, plain_rows = solved
            self.replace(name, layer, weight, output_error=output_error, method=method, plain_rows=plain_rows)

        of_sequence = frozenset(name for name, part in self.components.items() if part in ("language", "head"))
        SequentialQuantizer(
            *(self.model, backend, specs, put, of_sequence),
            residence=residence or Residence(),
            journal=journal,
            kept=kept,
        ).run(batches)

    def _hand_over(
        self,
        backend: WholeModelBackend,
        processor: Any,
        specs: Mapping[str, QuantSpec],
        batches: Sequence[Mapping[str, Any]],
    ) -> None:
        # The backend may change the weights in place, and the report compares with the original ones.
        weights = {name: dense_linear(self.model, name).weight.detach().clone() for name in specs}
        for name, weight in weights.items():
            expect_finite(name, weight)
        for name, layer in backend.quantize_model(self.model, processor, specs, batches):
            self.replace(name, layer, weights.pop(name))

    def adopt(self, label: str, dense: str) -> None:
        """Add every layer that was quantized before loading to the account.

        Its error is not known; the weight it replaces is counted in the dtype that the model computes in.

        Args:
            label: Quantization of these layers, as shown in the report.
            dense: Reason why the other linear layers are dense.
        """
        self.reasons = dict.fromkeys(self.components, dense)
        size = torch.finfo(self.model.dtype).bits // 8
        for name, layer in self.model.named_modules():
            if isinstance(layer, QuantizedLinear) and name in self.components:
                self._note(name, layer, label, layer.out_features * layer.in_features * size)

    def _note(
        self,
        name: str,
        layer: QuantizedLinear,
        method: str,
        bytes_before: int,
        *,
        relative_error: float | None = None,
        output_error: float | None = None,
        plain_rows: int = 0,
        outlier_score: float | None = None,
    ) -> None:
        self._done[name] = ModuleReport(
            name=name,
            component=self.components[name],
            role=self.places[name].role if name in self.places else None,
            shape=(layer.out_features, layer.in_features),
            method=method,
            bits=layer.bits,
            group_size=layer.group_size,
            padded_columns=layer.padded_columns,
            bytes_before=bytes_before,
            bytes_after=layer.weight_bytes,
            relative_error=relative_error,
            output_error=output_error,
            kernel=layer.kernel if input_rotation(layer) is None else f"{layer.kernel}, rotated inputs",
            reason=None,
            plain_rows=plain_rows,
            outlier_score=outlier_score,
        )

    def modules(self) -> tuple[ModuleReport, ...]:
        """Return the account of every weight with two or more dimensions, quantized or not."""
        part_of = splitter(self.model)
        reports = []
        seen: set[int] = set()
        for name, module in self.model.named_modules():
            if name in self._done:
                reports.append(self._done[name])
                continue
            for key, weight in module.named_parameters(recurse=False):
                if weight.dim() < 2:
                    continue
                full = f"{name}.{key}".lstrip(".")
                shown = name if key == "weight" else full
                reason = self.reasons.get(name) or f"{key} of {type(module).__name__} is not the weight of an nn.Linear"
                size = 0 if id(weight) in seen else weight.numel() * weight.element_size()
                seen.add(id(weight))
                reports.append(_left_alone(shown, part_of(full), tuple(weight.shape), size, reason))
        return tuple(reports)


def relative_error(weight: Tensor, layer: QuantizedLinear) -> float:
    """Return ‖W − Ŵ‖ / ‖W‖, a few rows at a time; ‖Ŵ‖ for a weight that is all zero."""
    size = rows_per_block(weight.shape[1])
    error = norm = 0.0
    for start in range(0, weight.shape[0], size):
        dense = weight[start : start + size].float()
        kept = layer.dense_rows(start, start + dense.shape[0])
        # Row by row in float32, which is three times as fast as all in float64 and off by less than a millionth.
        error += float((dense - kept.float()).square_().sum(1).sum(dtype=torch.float64))
        norm += float(dense.square().sum(1).sum(dtype=torch.float64))
    return math.sqrt(error / norm) if norm else math.sqrt(error)


def find_outlier_score(weight: Tensor) -> float:
    """Return max_j max|W_:j| / mean|W_:j| over the columns j of a weight that are not all zero (arXiv:2406.08155).

    It is 1 where all weights of a column are equal in magnitude, and large where an outlier takes its group's range.
    """
    largest = weight.new_zeros(weight.shape[1], dtype=torch.float32)
    total = weight.new_zeros(weight.shape[1], dtype=torch.float64)
    for block in weight.split(rows_per_block(weight.shape[1])):
        magnitude = block.float().abs()
        largest = torch.maximum(largest, magnitude.amax(0))
        total += magnitude.sum(0, dtype=torch.float64)
    scores = largest[total > 0].double() * len(weight) / total[total > 0]
    return float(scores.max()) if len(scores) else 1.0


def tensor_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, shared ones counted once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _left_alone(name: str, component: str, shape: tuple[int, ...], size: int, reason: str) -> ModuleReport:
    return ModuleReport(name, component, shape, None, None, None, 0, size, size, None, None, None, reason)


def _untouchable(module: nn.Module) -> str | None:
    if isinstance(module, QuantizedLinear):
        return "it is quantized already"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads this weight past the layer's forward"
    if type(module).forward is not nn.Linear.forward:
        return f"{type(module).__name__} does more than multiply by its weight"
    return None


def _is_tied(model: PreTrainedModel, name: str) -> bool:
    return f"{name}.weight" in getattr(model, "all_tied_weights_keys", {})


def _expect_unshared(model: PreTrainedModel, names: Collection[str], linear: Collection[str]) -> None:
    """Refuse to quantize a layer with a tied weight: transformers would look for the weight in vain."""
    for taker, source in getattr(model, "all_tied_weights_keys", {}).items():
        layer, other = source.removesuffix(".weight"), taker.removesuffix(".weight")
        if layer in names and other in linear:
            raise ValueError(
                f"{type(model).__name__}: {layer} and {other} share one weight, which quantized layers cannot; this "
                "family is supported by method none alone"
            )


def untie(model: PreTrainedModel, name: str) -> None:
    """Tell transformers that a layer is not, or no longer, tied to the input embedding, which stays as it is."""
    if not _is_tied(model, name):
        return
    model.all_tied_weights_keys.pop(f"{name}.weight")
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False


def quantize(
    model: PreTrainedModel, backend: Backend, plan: QuantPlan, batches: Sequence[Mapping[str, Any]] = ()
) -> Quantization:
    """Quantize a model that is already loaded, in place.

    Args:
        model: Model of transformers.
        backend: Backend from `lmms_plugin.quant_backends.get`.
        plan: Plan of what to quantize.
        batches: Calibration inputs, for a calibrated backend.

    Returns:
        Finished quantization, whose `modules()` accounts for every weight.
    """
    backend.check(plan)
    work = Quantization(model, backend, plan)
    work.finish(batches)
    return work
