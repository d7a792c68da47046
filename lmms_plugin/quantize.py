"""Quantization of a model and its report, without an evaluation: `lmms-plugin inspect` and `lmms-plugin quantize`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lmms_plugin.arguments import ModelArguments, expect_effect, expect_of_weights, read_arguments
from lmms_plugin.quant_backends import backend_class, backend_name, get, names, option_types
from lmms_plugin.quant_backends.checkpoints.forms import expect_form, expect_storable
from lmms_plugin.quant_backends.plans.plan import QuantPlan
from lmms_plugin.utils import checkpoints
from lmms_plugin.utils.outputs import expect_free

if TYPE_CHECKING:
    from lmms_plugin.quant_backends.backend import Backend
    from lmms_plugin.quant_backends.checkpoints.gguf.gguf_export import GgufModel
    from lmms_plugin.quant_backends.checkpoints.gguf.gguf_file import GgufFile
    from lmms_plugin.quant_backends.plans.quant_report import QuantReport
    from lmms_plugin.vlm.wrapper import QuantizedVLM


GGUF_SUFFIX = ".gguf"
_GGUF_TYPES: Mapping[str, Any] = dict.fromkeys(("type", "embedding_type", "output_type", "vision_type"), str | None)
"""Arguments of GGUF -> their types; what they mean is in `TypeChoice`."""


class Asked(NamedTuple):
    """A model and its quantization, validated before anything is loaded.

    Attributes:
        method: Name of the method, as after `--model quant_`.
        given: Arguments of the model as given.
        arguments: The same arguments, validated.
        backend: Method with its options.
        plan: Quantization plan.
    """

    method: str
    given: dict[str, Any]
    arguments: ModelArguments
    backend: Backend
    plan: QuantPlan

    @classmethod
    def parse(cls, text: str) -> Asked:
        """Parse a text as after `--model_args`, with `method=` in place of `--model quant_`.

        Raises:
            ValueError: An argument is unknown or impossible, or the checkpoint cannot be fetched.
            FileNotFoundError: The checkpoint folder does not exist.
        """
        method, given = _parse(text)
        ModelArguments.expect_possible(given)
        expect_of_weights(given)
        # Imports torch.
        arguments = ModelArguments.parse(given, option_types(method))
        backend = get(method, **arguments.options)
        expect_effect(given, backend)
        plan = arguments.quant_plan(backend.default_bits)
        backend.check(plan)
        arguments.calibration_spec()
        checkpoints.expect_there(arguments.find_checkpoint())
        return cls(method, given, arguments, backend, plan)

    @classmethod
    def to_write(cls, text: str, folder: Path, form: str, option: str) -> Asked:
        """Parse a text like `parse`, for a checkpoint that is to be written.

        Args:
            text: As for `parse`.
            folder: New or empty folder.
            form: Format, of `lmms_plugin.quant_backends.checkpoints.forms.FORMS`.
            option: Name of the user's option for the folder, for messages.

        Raises:
            ValueError: An argument is impossible, the folder is not empty, or the method cannot be written so.
            FileNotFoundError: The checkpoint folder does not exist.
        """
        expect_form(form)
        expect_free(folder, option)
        asked = cls.parse(text)
        expect_storable(asked.backend, form, asked.plan.specs)
        return asked

    def load(self) -> QuantizedVLM:
        """Load and quantize the model as an evaluation does; dense weights are not kept, since nothing is answered."""
        # Imported late: these modules take seconds to import.
        from lmms_plugin.vlm.wrapper import model_class

        vlm = model_class(self.method)(**self.given, storage="packed")
        # Writes what `report` and `save_quantized` ask for.
        return vlm.make_ready()


def inspect(asked: Asked, *, held_out: int) -> QuantReport:
    """Load and quantize a model as an evaluation does, and return its report.

    Args:
        asked: Model and quantization.
        held_out: Number of samples on which outputs are compared with those of the dense model, which is loaded beside
            the quantized one; 0 for none.
    """
    vlm = asked.load()
    report = vlm.report
    if held_out and report.quantized and not _is_checkpoint(asked.method):
        report = report.with_held_out_errors(_held_out(asked, vlm, held_out))
    return report


def inspect_file(file: Path) -> GgufFile:
    """Return what a GGUF file is, by the types of its tensors.

    Raises:
        ValueError: It is no such file, or damaged.
        ImportError: The extra `gguf` is not installed.
    """
    # Imports an optional package.
    from lmms_plugin.quant_backends.checkpoints.gguf.gguf_file import read

    return read(file.expanduser())


def write_gguf(text: str, folder: Path, *, converter: Path | None, option: str) -> GgufModel:
    """Write a checkpoint as GGUF; nothing is calibrated, and the weights are read one by one.

    Args:
        text: `pretrained=`, and `type=`, `embedding_type=`, `output_type=`, `vision_type=` (see `TypeChoice`).
        folder: New or empty folder.
        converter: llama.cpp's own converter, for families that are not written here.
        option: Name of the user's option for the folder, for messages.

    Raises:
        ValueError: An argument is unknown or has no effect, the family cannot be written, or a type does not fit.
        ImportError: The extra `gguf` is not installed.
    """
    given = read_arguments(text)
    method = str(given.pop("method", "none")).removeprefix("quant_")
    if method not in ("none", "gguf"):
        raise ValueError(
            f"method={method}: GGUF has types of its own, which are written from unquantized weights: leave method "
            "out, and choose with type= (Q8_0, Q4_0, ...)"
        )
    arguments = ModelArguments.parse(given, _GGUF_TYPES)
    useless = sorted(given.keys() - {"pretrained", *_GGUF_TYPES})
    if useless:
        raise ValueError(
            f"{useless[0]} has no effect on what is written as GGUF: leave it out (type= chooses the types)"
        )
    expect_free(folder, option)
    checkpoint = arguments.find_checkpoint()
    checkpoints.expect_there(checkpoint)
    # These import an optional package, and torch.
    from lmms_plugin.quant_backends.checkpoints.gguf.gguf_export import export
    from lmms_plugin.quant_backends.checkpoints.gguf.tensor_types import TypeChoice

    kinds = {name: value for name, value in arguments.options.items() if value is not None}
    choice = TypeChoice(
        kinds.get("type", TypeChoice.language),
        kinds.get("embedding_type"),
        kinds.get("output_type"),
        kinds.get("vision_type"),
    )
    return export(checkpoint, folder, choice, converter=converter, option=option)


def _parse(text: str) -> tuple[str, dict[str, Any]]:
    given = read_arguments(text)
    named = str(given.pop("method", ""))
    method = backend_name(named) or named
    if not method:
        files = "; type= alone is for --format gguf" if "type" in given else ""
        raise ValueError(f"method= is missing: one of {', '.join(names())}{files}")
    return method, given


def _is_checkpoint(method: str) -> bool:
    # Imports torch, which the check of arguments does without.
    from lmms_plugin.quant_backends.backend import CheckpointBackend

    return issubclass(backend_class(method), CheckpointBackend)


def _held_out(asked: Asked, vlm: QuantizedVLM, samples: int) -> dict[str, float | None]:
    # These import torch and transformers.
    from lmms_plugin.quant_backends.calibration.held_out import held_out_errors
    from lmms_plugin.quant_backends.checkpoints.loading import load_quantized
    from lmms_plugin.quant_backends.rotations.rotate import rotate

    arguments, seen = vlm.arguments, vlm.report.calibration
    dense = load_quantized(
        arguments.find_checkpoint(),
        backend=get("none"),
        plan=QuantPlan(),
        dtype=vlm.model.dtype,
        device=vlm.device,
        device_map=arguments.device_map,
        attn_implementation=arguments.attn_implementation,
        trust_remote_code=arguments.trust_remote_code,
        use_safetensors=arguments.use_safetensors,
        processor=vlm.chat.processor,
    )
    if asked.backend.rotates is not None:
        # Outputs of single layers are compared, and those that enter the residual stream are rotated.
        rotate(dense.model, asked.backend.rotates)
    return held_out_errors(
        dense.model,
        vlm.model,
        [module.name for module in vlm.report.quantized],
        processor=vlm.chat.processor,
        dialect=vlm.dialect,
        samples=samples,
        seed=(arguments.seed if seen is None else seen.seed) + 1,
    )
