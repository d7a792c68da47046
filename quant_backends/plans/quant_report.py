"""Quantization report: an account of every weight of a model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lmms_plugin.quant_backends.plans.expert_use import ExpertUse, summary
from lmms_plugin.quant_backends.plans.storage_choice import LayerStorage
from lmms_plugin.utils.messages import counted


@dataclass(frozen=True)
class ModuleReport:
    """Account of one weight of two or more dimensions: quantized, or left dense for a reason.

    Attributes:
        name: Module name; for a bare parameter the parameter's own name.
        component: Component: vision, connector, language or head.
        shape: Shape of the dense weight.
        method: Method; None when left dense.
        bits: Number of bits per code; None when left dense.
        group_size: Number of columns per scale (the width itself for one group per row); None when left dense.
        padded_columns: Number of columns added to make groups whole.
        bytes_before: Size of the dense weight, 0 when it shares its storage with another one.
        bytes_after: Size of codes, scales, zero points and input scale; that of the dense weight when left dense.
        relative_error: ‖W − Ŵ‖ / ‖W‖ in the dtype the layer computes in; None when left dense.
        output_error: ‖X(W − Ŵ)ᵀ‖ / ‖XWᵀ‖ over the calibration inputs; None without calibration.
        kernel: Kernel that the layer runs on; None when left dense.
        reason: Reason why the weight was left dense; None when quantized.
        held_out_error: ‖Y − Ŷ‖ / ‖Y‖ of the layer's outputs on inputs not used in calibration; None where that was not
            measured.
        plain_rows: Number of rows in which a calibrated method was no better than without calibration on its held-out
            inputs, and which therefore keep the calibration-free result.
        role: Role of a layer of the decoder (`lmms_plugin.quant_backends.plans.role_plan.ROLES`); None for others.
        outlier_score: Largest magnitude of a weight relative to the mean of its input column (arXiv:2406.08155), 1 or
            above; None when left dense, or quantized before it was loaded.
        resident_bytes: Bytes on the device where the layer computes while the model answers: those of codes that are
            there, and of dense weights that are kept; None where no answers were to be given.
    """

    name: str
    component: str
    shape: tuple[int, ...]
    method: str | None
    bits: int | None
    group_size: int | None
    padded_columns: int
    bytes_before: int
    bytes_after: int
    relative_error: float | None
    output_error: float | None
    kernel: str | None
    reason: str | None
    held_out_error: float | None = None
    plain_rows: int = 0
    role: str | None = None
    outlier_score: float | None = None
    resident_bytes: int | None = None

    @property
    def weights(self) -> int:
        """Return the number of weights."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class CalibrationReport:
    """Inputs of a calibrated method.

    Attributes:
        source: Source as given by the user, for instance ``self`` or ``dataset:PATH:split=train``.
        samples: Number of samples.
        tokens: Number of sequence positions in all samples together, image tokens included.
        seed: Seed of the drawing of samples.
        sha256: Fingerprint of all images, prompts and answers in order.
        forced: Whether samples come from an evaluation split because the user insisted.
        own_questions: Number of questions and expressions that the model wrote itself.
        own_answers: Number of answers that it wrote itself.
        degenerate: Kind (``empty``, ``blank``, ``looping``) -> number of these answers.
        unfinished: Number of these answers that were cut off at the longest length.
        taken: What other runs of the same model had computed and this one took (``answers``, ``sensitivities``,
            ``token weights``, ``expert use``, ``statistics`` of groups of layers) -> how many.
    """

    source: str
    samples: int
    tokens: int
    seed: int
    sha256: str
    forced: bool
    own_questions: int = 0
    own_answers: int = 0
    degenerate: Mapping[str, int] = field(default_factory=dict)
    unfinished: int = 0
    taken: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class QuantReport:
    """Account of one quantized model.

    Attributes:
        method: Name of the backend.
        modules: Entries, one per weight of two or more dimensions, in module order.
        bytes_before: Size of all parameters and buffers before quantization.
        bytes_after: Size of all parameters and buffers now: what the weights take on the device.
        seconds: Wall-clock time of loading, calibration and quantization together.
        peak_bytes: Highest memory use up to the end of quantization; None where it is not known.
        peak_source: What `peak_bytes` counts.
        calibration: Calibration inputs; None for methods without.
        plan: Plan as JSON-ready values.
        experts: Use of the experts of each layer; empty without experts, and for methods without calibration.
        storage: How quantized weights are held while the model answers; None where no answers were to be given.
    """

    method: str
    modules: tuple[ModuleReport, ...]
    bytes_before: int
    bytes_after: int
    seconds: float
    peak_bytes: int | None
    peak_source: str | None
    calibration: CalibrationReport | None
    plan: dict[str, Any]
    experts: tuple[ExpertUse, ...] = ()
    storage: str | None = None

    @property
    def quantized(self) -> tuple[ModuleReport, ...]:
        """Return the weights that were quantized."""
        return tuple(module for module in self.modules if module.reason is None)

    @property
    def skipped(self) -> tuple[ModuleReport, ...]:
        """Return the weights that were left dense, each with its reason."""
        return tuple(module for module in self.modules if module.reason is not None)

    @property
    def bits_per_weight(self) -> float:
        """Return bits per quantized weight, including scales and zero points; of all weights when none is quantized."""
        modules = self.quantized or tuple(module for module in self.modules if module.bytes_before)
        return 8 * sum(module.bytes_after for module in modules) / sum(module.weights for module in modules)

    @property
    def bits_per_model_weight(self) -> float:
        """Return bits per weight over the whole model, embeddings and untouched layers included."""
        stored_once = [module for module in self.modules if module.bytes_before]
        return 8 * sum(module.bytes_after for module in self.modules) / sum(module.weights for module in stored_once)

    @property
    def out_of_reach(self) -> dict[str, tuple[float, str]]:
        """Return, by quantized component, the share of its weights in no linear layer, and the name of the first one.

        Fused experts and convolutions are such weights; embeddings do not count. Components where this is less than a
        tenth are left out.
        """
        found = {}
        for component in dict.fromkeys(module.component for module in self.quantized):
            members = [module for module in self.modules if module.component == component]
            stacked = [module for module in members if module.reason is not None and len(module.shape) > 2]
            share = sum(module.weights for module in stacked) / sum(module.weights for module in members)
            if share >= 0.1:
                found[component] = share, stacked[0].name
        return found

    @property
    def kernels(self) -> dict[str, int]:
        """Return the number of layers per kernel."""
        return dict(Counter(module.kernel for module in self.quantized if module.kernel is not None))

    def with_storage(self, storage: str, layers: Mapping[str, LayerStorage]) -> QuantReport:
        """Return this report with how each layer is held while the model answers.

        Args:
            storage: Storage that was asked for.
            layers: Name → storage of each quantized layer.
        """
        modules = tuple(
            replace(module, kernel=layers[module.name].kernel, resident_bytes=layers[module.name].resident_bytes)
            if module.reason is None
            else module
            for module in self.modules
        )
        return replace(self, modules=modules, storage=storage)

    @property
    def resident_bytes(self) -> int | None:
        """Return the bytes on the devices while answering: parameters, buffers, and dense weights that are kept."""
        held = [(one.bytes_after, one.resident_bytes) for one in self.quantized if one.resident_bytes is not None]
        return None if self.storage is None else self.bytes_after + sum(there - packed for packed, there in held)

    def with_held_out_errors(self, errors: Mapping[str, float | None]) -> QuantReport:
        """Return this report with the held-out errors of modules, by name."""
        modules = (replace(module, held_out_error=errors.get(module.name)) for module in self.modules)
        return replace(self, modules=tuple(modules))

    def totals(self) -> dict[str, float | int]:
        """Return the numbers to log beside results."""
        totals: dict[str, float | int] = {
            "bits_per_weight": self.bits_per_weight,
            "bits_per_model_weight": self.bits_per_model_weight,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "quantized_layers": len(self.quantized),
            "skipped_layers": len(self.skipped),
            "seconds": self.seconds,
        }
        known = {"resident_bytes": self.resident_bytes, "peak_bytes": self.peak_bytes}
        return totals | {name: value for name, value in known.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values: totals, quantized and skipped counts, and all modules."""
        return {
            "method": self.method,
            "quantized": len(self.quantized),
            "skipped": len(self.skipped),
            **self.totals(),
            "kernels": self.kernels,
            "storage": self.storage,
            "peak_source": self.peak_source,
            "calibration": None if self.calibration is None else asdict(self.calibration),
            "plan": self.plan,
            "experts": [layer.to_dict() for layer in self.experts],
            "modules": [asdict(module) | {"shape": list(module.shape)} for module in self.modules],
        }

    def to_json(self) -> str:
        """Return `to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def total(self) -> str:
        """Return method, bits per weight, bytes and seconds in one line."""
        return (
            f"{self.method}: {self.bits_per_weight:.2f} bits per {'quantized ' if self.quantized else ''}weight, "
            f"{self.bytes_before / 1e6:.1f} -> {self.bytes_after / 1e6:.1f} MB, {self.seconds:.1f} s"
        )

    def table(self) -> str:
        """Return a few lines for the terminal: one per component and number of bits, then totals."""
        groups: dict[tuple[str, str, str], list[ModuleReport]] = {}
        for module in self.modules:
            key = (module.component, module.method or "-", str(module.bits or "-"))
            groups.setdefault(key, []).append(module)
        head = f"{'component':<10} {'method':<17} {'bits':>4} {'weights':>7} {'MB before':>10} {'MB after':>9}"
        lines = [f"{head}  error   outputs"]
        for (component, method, bits), members in groups.items():
            before, after = (sum(getattr(m, key) for m in members) / 1e6 for key in ("bytes_before", "bytes_after"))
            name = f"{component:<10} {method:<17} {bits:>4} {len(members):>7}"
            errors = f"{_mean_error(members, 'relative_error'):<6}  {_mean_error(members, 'held_out_error')}"
            lines.append(f"{name} {before:>10.2f} {after:>9.2f}  {errors}")
        lines.append(self.total())
        lines += [
            f"{share:.0%} of the weights of {component} are not quantized: they lie in no linear layer, but in stacks "
            f"such as {name}"
            for component, (share, name) in self.out_of_reach.items()
        ]
        if self.kernels:
            lines.append("runs on " + ", ".join(f"{kernel} ({count})" for kernel, count in self.kernels.items()))
            if self.resident_bytes is not None and self.storage != "packed":
                lines.append(f"storage={self.storage}: {self.resident_bytes / 1e6:.1f} MB while answering")
        if self.experts:
            lines.append(summary(self.experts))
        if padded := sum(bool(module.padded_columns) for module in self.modules):
            lines.append(f"{counted(padded, 'layer')} padded to whole groups")
        if plain := sum(module.plain_rows for module in self.quantized):
            rows = sum(module.shape[0] for module in self.quantized)
            lines.append(
                f"{plain} of {counted(rows, 'row')} kept as without calibration, which is as near on inputs held back"
            )
        if (seen := self.calibration) is not None and (seen.degenerate or seen.unfinished):
            useless = sum(seen.degenerate.values())
            lines.append(
                f"of {seen.own_answers} answers that the model wrote for calibration, {useless} say nothing and "
                f"{seen.unfinished} were cut off"
            )
        return "\n".join(lines)


def _mean_error(modules: Sequence[ModuleReport], field: str) -> str:
    errors = [error for module in modules if (error := getattr(module, field)) is not None]
    return f"{sum(errors) / len(errors):.4f}" if errors else "-"
