"""Chat model that lmms-eval runs: any image-text-to-text checkpoint, quantized by any registered backend.

`--model quant_<backend>` finds its class here (`QuantAwq` for `quant_awq`, and `QuantAwqSimple` for lmms-eval's
`--force_simple`); every registered backend has both, so that a new one needs no line in this file.

The answer to a request does not depend on its batch, up to floating point: padding changes the order of a matrix
product's additions, so the last bits of a logit differ between batches. In float32 that decides nothing in practice; in
bfloat16 two nearly equal tokens can change places, and then batch_size=1,share_prefix=False is the reference.
"""

from __future__ import annotations

from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from accelerate import Accelerator
from loguru import logger

from lmms_plugin.arguments import ModelArguments, expect_effect
from lmms_plugin.protocol.dialects import Dialect
from lmms_plugin.quant_backends import class_name, get, names, option_types
from lmms_plugin.quant_backends.checkpoints.forms import expect_storable
from lmms_plugin.quant_backends.checkpoints.loading import hold_weights, prepare
from lmms_plugin.quant_backends.checkpoints.saving import save_quantized
from lmms_plugin.utils import files
from lmms_plugin.utils.checkpoints import config_of
from lmms_plugin.vlm.contracts.responding import Responder
from lmms_plugin.vlm.engine_facts import model_facts, prompting_facts
from lmms_plugin.vlm.generation.observer import Wanted
from lmms_plugin.vlm.harness_model import HarnessModel
from lmms_plugin.vlm.kv_cache.quantizer import CacheQuantizer, expect_plain_cache
from lmms_plugin.vlm.reference_loading import ReferencePreparation
from lmms_plugin.vlm.setting_up import chat_of, device_of, dtype_of, expect_uses, responder_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lmms_plugin.quant_backends.plans.quant_report import QuantReport

_PASSED_ON = (
    *("device_map", "attn_implementation", "trust_remote_code", "use_safetensors"),
    *("seed", "dialect", "resume", "resume_folder", "shared_folder"),
)
"""Model arguments that loading takes as they are."""


class QuantizedVLM(HarnessModel):
    """Quantized vision-language model as lmms-eval runs it.

    Weights are read at the first request, or when one looks at `model`, `report` or `cache_quantizer`.

    Attributes:
        method: Name of the quantization backend.
        arguments: Arguments as given.
        chat: Processor of the checkpoint.
        reader: Reader of lmms-eval's messages.
        reference: Model whose answers are forced through this one; None without one, and until weights are read.
    """

    method: ClassVar[str] = "none"
    reference: PreTrainedModel | None = None

    def __init__(self, **arguments: Any) -> None:
        """Check arguments and checkpoint, and read everything of it but its weights.

        Args:
            **arguments: Arguments, see `ModelArguments`.

        Raises:
            ValueError: An argument is unknown, its value impossible, or it does not fit the checkpoint, which may also
                be out of reach.
            FileNotFoundError: The checkpoint does not exist.
        """
        super().__init__()
        self.arguments = ModelArguments.parse(arguments, option_types(self.method))
        backend = get(self.method, **self.arguments.options)
        expect_effect(arguments, backend)
        plan = self._plan(backend)
        calibration = self.arguments.calibration_spec(backend.default_samples)
        self._wanted = Wanted.read(self.arguments, backend)
        self._path = self.arguments.find_checkpoint()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = device_of(self.arguments, self.accelerator)
        self._expect_plain_cache()
        self.chat, self.reader = chat_of(self._path, self.arguments)
        self._expect_second_turn()
        self._preparation = prepare(
            self._path,
            backend=backend,
            plan=plan,
            calibration=calibration,
            dtype=dtype_of(self.arguments.dtype, self.device),
            device=self.device,
            processor=self.chat.processor,
            **{name: getattr(self.arguments, name) for name in _PASSED_ON},
        )
        if self._preparation.writes_nothing:
            expect_uses(self.arguments, hidden_states=self._wanted is not None)
        self._reference = self._prepare_reference() if self.arguments.reference else None

    @cached_property
    def model(self) -> PreTrainedModel:
        """Return the Hugging Face model."""
        model, _, report = self._preparation.load()
        # Before dense weights take the memory that is left.
        if self._reference is not None:
            self.reference = self._reference.load(report.bytes_before, self.device, self.world_size)
        self.report = hold_weights(model, report, self.arguments.storage, processes=self.world_size)
        # Calibration samples may be photographs.
        del self._preparation
        return model

    @cached_property
    def report(self) -> QuantReport:
        """Return the account of what was quantized and what was not; it stays when the model is freed."""
        _ = self.model
        report: QuantReport = vars(self)["report"]
        return report

    @cached_property
    def cache_quantizer(self) -> CacheQuantizer | None:
        """Return the maker of quantized caches; None for caches as the model has them."""
        spec = self.arguments.cache_spec
        return None if spec is None else CacheQuantizer.of(self.model, spec)

    def make_responder(self) -> Responder:
        """Load and quantize the model, and write report and checkpoint where the user asks for them.

        Raises:
            ValueError: As `Preparation.load`, or the model cannot be asked as the arguments say.
        """
        responder = responder_of(
            self.model,
            self.chat,
            self.reader,
            arguments=self.arguments,
            wanted=self._wanted,
            cache_quantizer=self.cache_quantizer,
            rank=self.rank,
            processes=self.world_size,
            facts=self._facts(),
            reference=self.reference,
        )
        self._account()
        return responder

    def _prepare_reference(self) -> ReferencePreparation:
        if self.method == "prequantized" and str(self.arguments.reference).lower() == "none":
            raise ValueError(
                f"reference: {self.arguments.pretrained} is quantized itself; name the checkpoint that it was made of"
            )
        return ReferencePreparation.of(
            self.arguments,
            self.chat.processor,
            dtype_of(self.arguments.dtype, self.device),
            self.device,
        )

    def _expect_second_turn(self) -> None:
        if self.arguments.verbalised and (self.reader.raw or self.dialect.raw_prompt):
            raise ValueError(
                f"verbalised: {self.arguments.pretrained} is asked without chat template, and knows no second turn"
            )

    def _expect_plain_cache(self) -> None:
        if (spec := self.arguments.cache_spec) is not None:
            config = config_of(self._path, trust_remote_code=self.arguments.trust_remote_code)
            expect_plain_cache(config, spec, self.arguments.pretrained)

    def _plan(self, backend: Any) -> Any:
        """Return the plan of what to quantize, if the model can then be held and saved as asked."""
        if self.arguments.save_quantized:
            expect_storable(backend)
        plan = self.arguments.quant_plan(backend.default_bits)
        backend.check_storage(self.arguments.storage, plan)
        return plan

    def _facts(self) -> dict[str, str]:
        """Return the facts that decide the answers, for a comparison with another engine."""
        stored = self.method in ("none", "prequantized")
        bits = "" if stored else str(self.arguments.bits or get(self.method).default_bits)
        return prompting_facts(self.chat, self.arguments) | model_facts(
            checkpoint=str(self.arguments.pretrained),
            path=self._path,
            dtype=str(self.model.dtype),
            quantization=f"{self.method} {bits}".strip(),
            software=f"transformers {version('transformers')}",
        )

    def _account(self) -> None:
        """Log the quantization report, and write report and checkpoint where the user asks for them."""
        report = self.report
        if self.rank != 0:
            return
        logger.info("{}\n{}", self.arguments.pretrained, report.table())
        if self.arguments.report:
            account = Path(self.arguments.report).expanduser()
            account.parent.mkdir(parents=True, exist_ok=True)
            files.replace_text(account, report.to_json())
        if self.arguments.save_quantized:
            saved = save_quantized(self.model, self.chat.processor, report, self.arguments.save_quantized)
            logger.info("Saved to {}: {}", self.arguments.save_quantized, saved)

    @property
    def dialect(self) -> Dialect:
        """Return the dialect in which this model is asked for boxes."""
        return self.reader.dialect

    def figures(self) -> dict[str, Any]:
        """Return the size of the quantized model and of its largest cache, for the results file."""
        if self.cache_quantizer is None:
            return self.report.totals()
        if self.rank == 0 and (size := self.cache_quantizer.largest) is not None:
            logger.info(
                "KV cache ({}): {:.2f} bits per element; {:,.0f} bytes for the longest prompt ({} tokens), which takes "
                "{:,.0f} in 16 bits. The values are those of the format; this process keeps them unpacked",
                self.cache_quantizer.spec.name,
                size.bits_per_element,
                size.bytes,
                size.tokens,
                size.dense_bytes,
            )
        return {**self.report.totals(), **self.cache_quantizer.totals()}


@cache
def model_class(backend: str, *, simple: bool = False) -> type[QuantizedVLM]:
    """Return the class that runs a backend.

    Args:
        backend: Name of the backend.
        simple: Whether it is for lmms-eval's `--force_simple`, which multiple-choice tasks need.
    """
    name = class_name(backend) + ("Simple" if simple else "")
    body = {"method": backend, "is_simple": simple, "__module__": __name__, "__doc__": QuantizedVLM.__doc__}
    created: type[QuantizedVLM] = type(name, (QuantizedVLM,), body)
    return created


# lmms-eval looks classes up in this module, by the names in their manifests.
for _backend in names():
    for _class in (model_class(_backend), model_class(_backend, simple=True)):
        globals()[_class.__name__] = _class
