"""From a checkpoint on disk to a quantized model with its processor and its account."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lmms_plugin.dialects import Dialect, dialect_for
from lmms_plugin.quant_backends.backend import Backend, CalibratedBackend
from lmms_plugin.quant_backends.calibration import CalibrationSample, CalibrationSpec
from lmms_plugin.quant_backends.inputs import build_batches
from lmms_plugin.quant_backends.memory import explained_out_of_memory, read_peak, reset_peak
from lmms_plugin.quant_backends.plan import QuantPlan
from lmms_plugin.quant_backends.quantization import Quantization, tensor_bytes
from lmms_plugin.quant_backends.report import CalibrationReport, QuantReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LoadedModel(NamedTuple):
    """A model ready to run.

    Attributes:
        model: In evaluation mode, on its device.
        processor: Of the same checkpoint.
        report: What was quantized and what was not.
    """

    model: PreTrainedModel
    processor: Any
    report: QuantReport


def load_quantized(
    path: str,
    *,
    backend: Backend,
    plan: QuantPlan,
    calibration: CalibrationSpec | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    device_map: str | Mapping[str, Any] | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    use_safetensors: bool = True,
    processor: Any = None,
    dialect: str | None = None,
) -> LoadedModel:
    """Load an image-text-to-text checkpoint and quantize it.

    Arguments, plan and calibration data are checked before any weight is read. Weights come shard by
    shard; a data-free method packs each layer as soon as its weight is on the device. A calibrated
    method loads the dense model, looks at its activations, and then packs layer after layer.

    Args:
        path: Hub id or local folder.
        backend: From `lmms_plugin.quant_backends.get`.
        plan: What to quantize; an empty plan for ``none``.
        calibration: Inputs for a calibrated method. None means ``self``: the model answers questions about
            made-up images, which needs no data.
        dtype: Of the dense weights, scales and activations; "auto" for the checkpoint's own.
        device: Where everything goes, unless `device_map` says otherwise.
        device_map: As in ``from_pretrained``.
        attn_implementation: As in ``from_pretrained``.
        trust_remote_code: Run code that comes with the checkpoint.
        seed: Of the default calibration.
        use_safetensors: Refuse pickled weights.
        processor: One already built; None loads the checkpoint's own.
        dialect: Name of the grounding dialect in which calibration questions are asked; None for the one that
            the checkpoint declares, or else its family's.

    Raises:
        ValueError: The method cannot do the plan, the plan does not fit the model, weights are missing or not
            finite, or calibration data is unusable.
    """
    started = time.perf_counter()
    backend.check(plan)
    spec, samples = _calibration(backend, calibration, seed)
    reset_peak()
    config, processor = _describe(path, trust_remote_code, processor)
    options = {
        "dtype": dtype,
        "device_map": dict(device_map) if isinstance(device_map, Mapping) else device_map or {"": torch.device(device)},
        "attn_implementation": attn_implementation,
        "trust_remote_code": trust_remote_code,
        "use_safetensors": use_safetensors,
    }
    asked = dialect_for(config.model_type, dialect or getattr(config, "grounding_dialect", None))
    seen = None
    with explained_out_of_memory(backend.name):
        model, work = _load(
            path, config, backend, plan, {key: value for key, value in options.items() if value is not None}
        )
        if isinstance(backend, CalibratedBackend):
            seen = _calibrate(work, processor, spec, samples, asked)
    return LoadedModel(model, processor, _report(work, seen, time.perf_counter() - started))


def _calibration(
    backend: Backend, spec: CalibrationSpec | None, seed: int
) -> tuple[CalibrationSpec, list[CalibrationSample]]:
    if not isinstance(backend, CalibratedBackend):
        if spec is not None and spec.source != "none":
            raise ValueError(f"{backend.name} looks at weights alone and takes no calibration, got {spec}")
        return CalibrationSpec("none"), []
    spec = CalibrationSpec("self", seed=seed) if spec is None else spec
    return spec, spec.load_samples()


def _describe(path: str, trust_remote_code: bool, processor: Any) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoProcessor

    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    existing = getattr(config, "quantization_config", None)
    if existing is not None:
        raise ValueError(
            f"{path} is quantized already ({existing.get('quant_method')}); its weights cannot be quantized again"
        )
    if processor is None:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    return config, processor


def _load(
    path: str, config: Any, backend: Backend, plan: QuantPlan, options: dict[str, Any]
) -> tuple[PreTrainedModel, Quantization]:
    from transformers import AutoModelForImageTextToText

    if plan.specs:
        from lmms_plugin.quant_backends.hf_quantizer import PackedConfig

        options["quantization_config"] = PackedConfig(backend, plan)
    model, info = AutoModelForImageTextToText.from_pretrained(path, config=config, output_loading_info=True, **options)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"{path} lacks {len(missing)} weights of {type(model).__name__}, first {missing[0]}")
    work = model.hf_quantizer.work if plan.specs else Quantization(model, backend, plan)
    return model, work


@torch.no_grad()
def _calibrate(
    work: Quantization, processor: Any, spec: CalibrationSpec, samples: list[CalibrationSample], dialect: Dialect
) -> CalibrationReport:
    heads = {name for name, component in work.components.items() if component == "head"}
    keep_logits = bool(heads & set(work.specs))
    batches, report = build_batches(work.model, processor, spec, samples, dialect, keep_logits=keep_logits)
    work.finish(batches)
    return report


def _report(work: Quantization, calibration: CalibrationReport | None, seconds: float) -> QuantReport:
    modules = work.modules()
    after = tensor_bytes(work.model)
    saved = sum(module.bytes_before - module.bytes_after for module in modules)
    peak = read_peak()
    return QuantReport(
        method=work.backend.name,
        modules=modules,
        bytes_before=after + saved,
        bytes_after=after,
        seconds=seconds,
        peak_bytes=peak.bytes,
        peak_source=peak.source,
        calibration=calibration,
        plan=work.plan.to_dict(),
    )
