"""Loading of a checkpoint as a quantized model with its processor and its quantization report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Required, TypedDict, Unpack

import torch
from loguru import logger

from lmms_plugin.protocol.chat_templates import adopt
from lmms_plugin.protocol.dialects import Dialect, dialect_for
from lmms_plugin.quant_backends.backend import Backend, CalibratedBackend, CheckpointBackend, WholeModelBackend
from lmms_plugin.quant_backends.calibration.inputs import build_batches, fingerprint, fingerprint_of_samples
from lmms_plugin.quant_backends.calibration.journal import Journal, cache_folder, code_key
from lmms_plugin.quant_backends.calibration.kept_statistics import KeptCalibration
from lmms_plugin.quant_backends.calibration.memory import Residence, read_peak, reset_peak
from lmms_plugin.quant_backends.calibration.sources import CalibrationSample, CalibrationSpec
from lmms_plugin.quant_backends.checkpoints.compressors import quantization_of
from lmms_plugin.quant_backends.checkpoints.hf_quantizer import PackedConfig
from lmms_plugin.quant_backends.checkpoints.probe import expect_sound
from lmms_plugin.quant_backends.layers.weight_storage import DenseBudget, settle
from lmms_plugin.quant_backends.plans.plan import QuantPlan
from lmms_plugin.quant_backends.plans.quant_report import CalibrationReport, QuantReport
from lmms_plugin.quant_backends.plans.storage_choice import Storage
from lmms_plugin.quant_backends.quantization import Quantization, tensor_bytes
from lmms_plugin.quant_backends.structure.blocks import find_blocks
from lmms_plugin.quant_backends.structure.model_class import class_of, writes_nothing
from lmms_plugin.utils import hashing
from lmms_plugin.utils.arithmetic import arithmetic
from lmms_plugin.utils.checkpoints import config_of
from lmms_plugin.utils.end_tokens import keep_ends
from lmms_plugin.utils.model_identity import identity_of
from lmms_plugin.utils.processes.out_of_memory import while_loading
from lmms_plugin.utils.reading.readable import readable

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LoadedModel(NamedTuple):
    """Model ready to run.

    Attributes:
        model: Model in evaluation mode, on its device.
        processor: Processor of the same checkpoint.
        report: Account of what was quantized and what was not.
    """

    model: PreTrainedModel
    processor: Any
    report: QuantReport


@dataclass(frozen=True)
class Preparation:
    """Checkpoint and quantization that fit each other as far as can be told without weights.

    Attributes:
        path: Hub id or local folder.
        config: Configuration of the checkpoint.
        processor: Processor of the checkpoint.
        backend: Backend that quantizes.
        plan: Plan of what to quantize.
        calibration: Inputs for a calibrated method.
        samples: Samples of them.
        dialect: Dialect in which calibration questions are asked.
        residence: Device of the blocks of a calibrated method.
        options: Arguments of ``from_pretrained``.
        journal_folder: Folder for finished blocks of a calibration; None for keeping none.
        shared_folder: Folder of what runs of one dense model share in calibration; None for nothing.
        seconds: Time that the preparation took.
    """

    path: str
    config: Any
    processor: Any
    backend: Backend
    plan: QuantPlan
    calibration: CalibrationSpec
    samples: Sequence[CalibrationSample]
    dialect: Dialect
    residence: Residence
    options: Mapping[str, Any]
    journal_folder: Path | None
    shared_folder: Path | None
    seconds: float

    @property
    def writes_nothing(self) -> bool:
        """Return whether it is a retrieval checkpoint, which scores captions and generates no text."""
        return writes_nothing(self.config)

    def load(self) -> LoadedModel:
        """Read the weights and quantize them.

        Raises:
            ValueError: The method cannot carry out the plan, the plan does not fit the model, or weights are missing
                or not finite.
        """
        started = time.perf_counter()
        reset_peak()
        seen, calibrated = None, _is_calibrated(self.backend)
        with while_loading(self.backend.name, calibrated=calibrated):
            model, work = _load(self.path, self.config, self.backend, self.plan, dict(self.options))
            keep_ends(model, getattr(self.processor, "tokenizer", self.processor))
            if isinstance(self.backend, CheckpointBackend):
                expect_sound(model, self.processor)
            if calibrated:
                seen = self._calibrate(work)
        return LoadedModel(model, self.processor, _report(work, seen, self.seconds + time.perf_counter() - started))

    def _calibrate(self, work: Quantization) -> CalibrationReport:
        key = _dense_key(self.path, work, self.processor, self.calibration, self.residence)
        journal, kept = None, None
        if self.journal_folder is not None:
            journal = Journal(self.journal_folder, key | _method_key(work))
        if self.shared_folder is not None:
            kept = KeptCalibration(
                self.shared_folder / "calibration", key | _shared_key(work, self.dialect, self.samples)
            )
        return _calibrate(
            *(work, self.processor, self.calibration, list(self.samples), self.dialect, self.residence),
            journal=journal,
            kept=kept,
        )


def prepare(
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
    resume: bool = True,
    resume_folder: str | Path | None = None,
    shared_folder: str | Path | None = None,
) -> Preparation:
    """Check all that can be checked before any weight is read.

    Args:
        path: Hub id or local folder.
        backend: Backend from `lmms_plugin.quant_backends.get`.
        plan: Plan of what to quantize; an empty plan for ``none``.
        calibration: Inputs for a calibrated method. None means ``self``: the model answers questions about synthetic
            images, which needs no data.
        dtype: Dtype of the dense weights, scales and activations; "auto" for the checkpoint's own.
        device: Device of the whole model, unless `device_map` says otherwise.
        device_map: Device map, as in ``from_pretrained``.
        attn_implementation: Attention implementation, as in ``from_pretrained``.
        trust_remote_code: Whether to run code that comes with the checkpoint.
        seed: Seed of the default calibration.
        use_safetensors: Whether to refuse pickled weights.
        processor: Processor, if already built; None loads the checkpoint's own.
        dialect: Name of the grounding dialect in which calibration questions are asked; None for the one that the
            checkpoint declares, or else its family's.
        resume: Whether to keep finished blocks of a calibration on disk until it is over, so that the same call resumes
            an interrupted one (see `lmms_plugin.quant_backends.calibration.journal`).
        resume_folder: Folder for them; None for `lmms_plugin.quant_backends.calibration.journal.cache_folder`.
        shared_folder: Folder of what runs of one dense model share in calibration, whatever their method and bits
            (see `lmms_plugin.quant_backends.calibration.kept_statistics`); None to share nothing.

    Raises:
        ValueError: The method cannot carry out the plan, the checkpoint is quantized already or writes nothing to
            calibrate with, or calibration data is unusable.
    """
    started = time.perf_counter()
    backend.check(plan)
    spec, samples = _calibration(backend, calibration, seed)
    adopting = processor is None
    config, processor = _describe(path, trust_remote_code, processor)
    _expect_quantizable(path, config, backend)
    blockwise = isinstance(backend, CalibratedBackend)
    home = torch.device("cpu") if blockwise else torch.device(device)
    options = {
        "dtype": dtype,
        "device_map": dict(device_map) if isinstance(device_map, Mapping) else device_map or {"": home},
        "attn_implementation": attn_implementation,
        "trust_remote_code": trust_remote_code,
        "use_safetensors": use_safetensors,
    }
    asked = dialect_for(config.model_type, dialect or getattr(config, "grounding_dialect", None))
    if adopting:
        adopt(processor, asked, path)
    return Preparation(
        *(path, config, processor, backend, plan, spec, samples, asked),
        residence=Residence(torch.device(device) if blockwise and not device_map else None),
        options={key: value for key, value in options.items() if value is not None},
        journal_folder=_journal_folder(resume_folder) if resume else None,
        shared_folder=None if shared_folder is None else Path(shared_folder).expanduser(),
        seconds=time.perf_counter() - started,
    )


def _journal_folder(chosen: str | Path | None) -> Path | None:
    return Path(chosen).expanduser() if chosen else cache_folder()


def _is_calibrated(backend: Backend) -> bool:
    return isinstance(backend, CalibratedBackend | WholeModelBackend)


class PreparationOptions(TypedDict, total=False):
    """Arguments of `prepare`, which documents them."""

    backend: Required[Backend]
    plan: Required[QuantPlan]
    calibration: CalibrationSpec | None
    dtype: torch.dtype | str
    device: torch.device | str
    device_map: str | Mapping[str, Any] | None
    attn_implementation: str | None
    trust_remote_code: bool
    seed: int
    use_safetensors: bool
    processor: Any
    dialect: str | None
    resume: bool
    resume_folder: str | Path | None
    shared_folder: str | Path | None


def load_quantized(path: str, **options: Unpack[PreparationOptions]) -> LoadedModel:
    """Load an image-text-to-text checkpoint and quantize it.

    Arguments, plan and calibration data are checked before any weight is read. Weights are read shard by shard; a
    data-free method packs each layer as soon as its weight is on the device. For a calibrated method the dense model
    stays on disk, memory-mapped, and its blocks move to the device one by one, to be packed there; with a `device_map`
    they are where that puts them.

    Args:
        path: Hub id or local folder.
        **options: As `prepare` takes them; `backend` and `plan` are required.

    Raises:
        ValueError: The method cannot carry out the plan, the plan does not fit the model, weights are missing or not
            finite, or calibration data is unusable.
    """
    return prepare(path, **options).load()


def hold_weights(model: PreTrainedModel, report: QuantReport, storage: Storage, *, processes: int = 1) -> QuantReport:
    """Hold the weights of a model that is about to answer as asked, and return its report with that.

    Args:
        model: Quantized model on its devices.
        report: Report of its quantization.
        storage: How its weights are to be held.
        processes: Number of processes on this host, which share its memory.

    Raises:
        ValueError: Dense weights were asked for, and cannot be kept or do not fit in memory.
    """
    if not report.quantized:
        return report
    return report.with_storage(storage, settle(model, storage, budget=DenseBudget(processes)))


def _calibration(
    backend: Backend, spec: CalibrationSpec | None, seed: int
) -> tuple[CalibrationSpec, list[CalibrationSample]]:
    if not isinstance(backend, CalibratedBackend | WholeModelBackend):
        if spec is not None and spec.source != "none":
            raise ValueError(f"{backend.name} looks at weights alone and takes no calibration, got {spec}")
        return CalibrationSpec("none"), []
    spec = CalibrationSpec("self", samples=backend.default_samples, seed=seed) if spec is None else spec
    if spec.source == "noise" and isinstance(backend, CalibratedBackend) and backend.fits_correlations:
        logger.warning(
            f"{backend.name} makes up for errors by correlations among its inputs, and those of noise are not those of "
            "text and images: on real weights it came out worse than plain rounding; calibration=dataset:PATH or "
            "photographs gives it real ones"
        )
    return spec, spec.load_samples()


def _describe(path: str, trust_remote_code: bool, processor: Any) -> tuple[Any, Any]:
    from transformers import AutoProcessor

    config = config_of(path, trust_remote_code=trust_remote_code)
    if processor is None:
        with readable(f"{path}: its processor or tokenizer"):
            processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    return config, processor


def _expect_quantizable(path: str, config: Any, backend: Backend) -> None:
    if not isinstance(backend, CheckpointBackend):
        _expect_unquantized(path, config)
    if writes_nothing(config) and _is_calibrated(backend):
        raise ValueError(
            f"{path} is a retrieval checkpoint: {backend.name} is calibrated with answers, which it cannot write; "
            "methods that look at weights alone (rtn, hqq, ...) quantize it"
        )


def _expect_unquantized(path: str, config: Any) -> None:
    existing = quantization_of(config)
    if existing:
        raise ValueError(
            f"{path} is quantized already ({existing.get('quant_method')}); its weights cannot be quantized again, "
            "quant_prequantized takes them as they are"
        )
    here = {file.suffix for file in Path(path).glob("*")}
    if ".gguf" in here and not here & {".safetensors", ".bin"}:
        raise ValueError(f"pretrained: {path} holds GGUF files and no other weights: quant_gguf evaluates these")


def _load(
    path: str, config: Any, backend: Backend, plan: QuantPlan, options: dict[str, Any]
) -> tuple[PreTrainedModel, Quantization]:
    if isinstance(backend, CheckpointBackend):
        loaded = backend.load(path, config, options)
        _expect_complete(path, loaded.model, loaded.info)
        work = Quantization(loaded.model, backend, plan)
        work.adopt(loaded.label, loaded.dense)
        return loaded.model, work
    if plan.specs:
        options["quantization_config"] = PackedConfig(backend, plan)
    model, info = class_of(config).from_pretrained(path, config=config, output_loading_info=True, **options)
    _expect_complete(path, model, info)
    work = model.hf_quantizer.work if plan.specs else Quantization(model, backend, plan)
    return model, work


def _expect_complete(path: str, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"{path} lacks {len(missing)} weights of {type(model).__name__}, first {missing[0]}")


def _dense_key(
    path: str, work: Quantization, processor: Any, spec: CalibrationSpec, residence: Residence
) -> dict[str, Any]:
    """Return what the inputs of layers in the dense model depend on, but for the method's own changes to it."""
    return {
        **identity_of(path, work.model, processor),
        "device": residence.device.type if residence.device is not None else "as mapped",
        "calibration": [str(spec), spec.samples, spec.seed],
    }


def _method_key(work: Quantization) -> dict[str, Any]:
    """Return what a finished block depends on besides."""
    return {"method": repr(work.backend), "plan": work.plan.to_dict(), "code": code_key()}


def _shared_key(work: Quantization, dialect: Dialect, samples: Sequence[CalibrationSample]) -> dict[str, Any]:
    """Return what the last bit of statistics depends on besides.

    Blocks with layers to quantize are computed in wider products than others, and sums are taken in the order that
    processor and threads make.
    """
    return {
        "layers": sorted(work.specs),
        "rotation": repr(work.backend.rotates),
        "dialect": dialect.name,
        "samples": fingerprint_of_samples(samples),
        "map": str(getattr(work.model, "hf_device_map", None)),
        "arithmetic": arithmetic(),
        "code": hashing.of_package(),
    }


@torch.no_grad()
def _calibrate(
    work: Quantization,
    processor: Any,
    spec: CalibrationSpec,
    samples: list[CalibrationSample],
    dialect: Dialect,
    residence: Residence,
    *,
    journal: Journal | None,
    kept: KeptCalibration | None,
) -> CalibrationReport:
    model = work.model
    away = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if away is not None:
        raise ValueError(
            f"device_map leaves {away} on disk or in host memory, out of reach of {work.backend.name}; without "
            "device_map blocks come onto the device one by one"
        )
    residence.settle(model, find_blocks(model, tuple(work.specs)))
    keep_logits = any(work.components[name] == "head" for name in work.specs)
    by_role = isinstance(work.backend, CalibratedBackend) and work.backend.needs_roles
    unanswered = sum(sample.unanswered for sample in samples)
    with ExitStack() as stack:
        if unanswered:
            stack.enter_context(residence.whole())
        if kept is not None:
            stack.enter_context(kept.answering(unanswered))
        batches, report = build_batches(
            model, processor, spec, samples, dialect, keep_logits=keep_logits, by_role=by_role, journal=kept or journal
        )
    within = None if journal is None else journal.within({"inputs": fingerprint(batches)})
    shared = None if kept is None else kept.of_inputs(batches)
    work.finish(batches, processor=processor, residence=residence, journal=within, kept=shared)
    if journal is not None:
        journal.remove()
    return report if kept is None else replace(report, taken=dict(+kept.taken))


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
        experts=work.expert_use,
    )
