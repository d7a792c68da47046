"""The account of a quantized model without an evaluation: `lmms-plugin inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from lmms_plugin.arguments import ModelArguments, expect_effect, read_arguments
from lmms_plugin.quant_backends import backend_class, backend_name, get, names, option_types
from lmms_plugin.quant_backends.plans.plan import QuantPlan
from lmms_plugin.utils import checkpoints

if TYPE_CHECKING:
    from lmms_plugin.quant_backends.backend import Backend
    from lmms_plugin.quant_backends.plans.quant_report import QuantReport
    from lmms_plugin.vlm.wrapper import QuantizedVLM


class Asked(NamedTuple):
    """A model and what is to be done to it, checked before anything is loaded.

    Attributes:
        method: What would follow `--model quant_`.
        given: Arguments of the model.
        arguments: The same, read.
        backend: The method with its options.
        plan: What it is to quantize.
    """

    method: str
    given: dict[str, Any]
    arguments: ModelArguments
    backend: Backend
    plan: QuantPlan

    @classmethod
    def parse(cls, text: str) -> Asked:
        """Read a text as after `--model_args`, with `method=` for what would follow `--model quant_`.

        Raises:
            ValueError: An argument is unknown or impossible, or the checkpoint cannot be fetched.
            FileNotFoundError: There is no such folder.
        """
        method, given = _parse(text)
        arguments = ModelArguments.parse(given, option_types(method))
        backend = get(method, **arguments.options)
        expect_effect(given, backend)
        plan = arguments.quant_plan(backend.default_bits)
        backend.check(plan)
        arguments.calibration_spec()
        checkpoints.expect_there(arguments.find_checkpoint())
        return cls(method, given, arguments, backend, plan)

    def load(self) -> QuantizedVLM:
        """Load and quantize the model, as an evaluation would."""
        # Only now: what makes the model takes seconds to import.
        from lmms_plugin.vlm.wrapper import model_class

        return model_class(self.method)(**self.given)


def inspect(text: str, *, held_out: int) -> QuantReport:
    """Load and quantize a model as an evaluation would, and return its report.

    Args:
        text: As after `--model_args`, and `method=` for what would follow `--model quant_`.
        held_out: Samples on which outputs are compared with those of the dense model, which is loaded beside the
            quantized one; 0 leaves that out.

    Raises:
        ValueError: An argument is unknown or impossible.
    """
    asked = Asked.parse(text)
    vlm = asked.load()
    report = vlm.report
    if held_out and report.quantized and not _is_checkpoint(asked.method):
        report = report.with_held_out_errors(_held_out(vlm, held_out))
    return report


def _parse(text: str) -> tuple[str, dict[str, Any]]:
    given = read_arguments(text)
    named = str(given.pop("method", ""))
    method = backend_name(named) or named
    if not method:
        raise ValueError(f"method= is missing: one of {', '.join(names())}")
    return method, given


def _is_checkpoint(method: str) -> bool:
    # Imports torch, which arguments are checked without.
    from lmms_plugin.quant_backends.backend import CheckpointBackend

    return issubclass(backend_class(method), CheckpointBackend)


def _held_out(vlm: QuantizedVLM, samples: int) -> dict[str, float | None]:
    # Import torch and transformers.
    from lmms_plugin.quant_backends.calibration.held_out import held_out_errors
    from lmms_plugin.quant_backends.checkpoints.loading import load_quantized

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
    return held_out_errors(
        dense.model,
        vlm.model,
        [module.name for module in vlm.report.quantized],
        processor=vlm.chat.processor,
        dialect=vlm.dialect,
        samples=samples,
        seed=(arguments.seed if seen is None else seen.seed) + 1,
    )
