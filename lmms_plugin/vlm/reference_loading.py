"""Loading of a reference checkpoint beside the model that is evaluated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lmms_plugin.arguments import ModelArguments
from lmms_plugin.quant_backends import get
from lmms_plugin.quant_backends.checkpoints.loading import Preparation, prepare
from lmms_plugin.quant_backends.layers.weight_storage import DenseBudget
from lmms_plugin.quant_backends.plans.plan import QuantPlan
from lmms_plugin.utils.processes.out_of_memory import OutOfMemory
from lmms_plugin.utils.reading.readable import readable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_REMEDY = (
    "run each model by itself with --log_samples, and compare their results by lmms-plugin distance A B, or spread "
    "both over several devices with device_map=auto"
)


@dataclass(frozen=True)
class ReferencePreparation:
    """Reference checkpoint, checked as far as can be told without weights.

    Attributes:
        preparation: Preparation of the checkpoint, without quantization.
    """

    preparation: Preparation

    @classmethod
    def of(
        cls, arguments: ModelArguments, processor: Any, dtype: torch.dtype, device: torch.device
    ) -> ReferencePreparation:
        """Check the reference that the arguments name.

        Args:
            arguments: Arguments of the model that is evaluated.
            processor: Processor of that model, which makes the prompts of both.
            dtype: Data type of both.
            device: Device of both.

        Raises:
            ValueError: It is quantized itself, or has another vocabulary.
            FileNotFoundError: It does not exist.
        """
        path = arguments.find_reference()
        if path != arguments.find_checkpoint():
            _expect_vocabulary(path, processor, arguments)
        try:
            return cls(
                prepare(
                    path,
                    backend=get("none"),
                    plan=QuantPlan(),
                    dtype=dtype,
                    device=device,
                    device_map=arguments.device_map,
                    attn_implementation=arguments.attn_implementation,
                    trust_remote_code=arguments.trust_remote_code,
                    use_safetensors=arguments.use_safetensors,
                    processor=processor,
                    dialect=arguments.dialect,
                    resume=False,
                )
            )
        except ValueError as error:
            raise ValueError(f"reference: {error}") from error

    def load(self, size: int, device: torch.device, processes: int = 1) -> PreTrainedModel:
        """Read the weights.

        Args:
            size: Bytes that they take.
            device: Device of the model, unless a device map spreads it.
            processes: Number of processes on this host, which share its memory.

        Raises:
            ValueError: The memory does not suffice for both models.
        """
        free = DenseBudget(processes).left(device)
        if not isinstance(self.preparation.options["device_map"], str) and size > free:
            raise ValueError(
                f"reference: both models do not fit in memory together: it takes {size / 1e9:.1f} GB, and "
                f"{max(free, 0) / 1e9:.1f} GB of {device} are left for it; {_REMEDY}"
            )
        try:
            return self.preparation.load().model
        except OutOfMemory as error:
            raise ValueError(f"reference: both models do not fit in memory together: {_REMEDY} ({error})") from error


def _expect_vocabulary(path: str, processor: Any, arguments: ModelArguments) -> None:
    from transformers import AutoTokenizer

    with readable(f"{path}: its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=arguments.trust_remote_code)
    if tokenizer.get_vocab() != processor.tokenizer.get_vocab():
        raise ValueError(
            f"reference: {arguments.reference} has another vocabulary than {arguments.pretrained}: name the checkpoint "
            "that this one was quantized from"
        )
