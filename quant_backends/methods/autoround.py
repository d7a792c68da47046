"""AutoRound: rounding learned by signed gradient descent with the auto-round library, stored in the packed layer."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lmms_plugin.quant_backends.backend import WholeModelBackend
from lmms_plugin.quant_backends.extras import require
from lmms_plugin.quant_backends.layers.codes import Codes, split_groups
from lmms_plugin.quant_backends.layers.linear import PackedLinear, QuantizedLinear
from lmms_plugin.quant_backends.plans.plan import QuantPlan, QuantSpec
from lmms_plugin.quant_backends.structure.components import components, dense_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAILURES = ("Calibration forward pass failed", "Insufficient number of samples")
"""What the library writes into its log where it goes on without some of the calibration data."""


@dataclass(frozen=True)
class AutoRoundBackend(WholeModelBackend):
    """AutoRound (Cheng et al., 2024), by Intel's library, for the blocks of decoder and vision tower.

    The library tunes rounding and clipping of a whole block against its output; its codes are stored in this package's
    packed layer, with scales in the model's dtype. It needs the dense model, a copy of the weights to be quantized (of
    all weights, on devices for which it chooses another dtype than the model's), and the gradients of one block.

    Attributes:
        iters: Number of steps of signed gradient descent per block; 0 for the library's rounding without tuning.
    """

    name = "autoround"
    bits = frozenset({2, 3, 4, 5, 6, 7, 8})

    iters: int = 200

    def __post_init__(self) -> None:
        if self.iters < 0:
            raise ValueError(f"iters must be 0 or above, got {self.iters}")

    def check(self, plan: QuantPlan) -> None:
        """Refuse a plan that the library cannot carry out, or a missing library."""
        super().check(plan)
        for component in ("connector", "head"):
            if getattr(plan, component) is not None:
                raise ValueError(f"autoround tunes blocks of decoder and vision tower; {component} lies outside them")
        require("auto_round", extra="autoround", user="quant_autoround")

    def check_spec(self, spec: QuantSpec) -> None:
        """Refuse 8 bits with zero points, which the library does not support."""
        super().check_spec(spec)
        if spec.bits == 8 and not spec.symmetric:
            raise ValueError("auto-round's 8-bit weights are symmetric; set symmetric=True")

    def quantize_model(
        self,
        model: PreTrainedModel,
        processor: Any,
        specs: Mapping[str, QuantSpec],
        batches: Sequence[Mapping[str, Any]],
    ) -> Iterator[tuple[str, QuantizedLinear]]:
        """Tune all layers, then yield them.

        Raises:
            ValueError: The library skipped a layer of the plan, rebuilt the model, or could not use a calibration
                sample.
        """
        from auto_round import AutoRound

        parts = components(model)
        kept = {"bits": 16, "act_bits": 16, "data_type": "float", "act_data_type": "float"}
        first = next(iter(specs.values()))
        dtypes = {name: dense_linear(model, name).weight.dtype for name in specs}
        others = {name: tensor.data for name, tensor in _others(model, specs)}
        # The library writes to the working directory even where nothing is to be saved.
        with tempfile.TemporaryDirectory() as folder, _no_sample_lost(), torch.enable_grad():
            tuner = AutoRound(
                model,
                tokenizer=getattr(processor, "tokenizer", processor),
                processor=processor,
                dataset=[dict(batch) for batch in batches],
                layer_config={name: _scheme(specs[name]) if name in specs else dict(kept) for name in parts},
                **_scheme(first),
                iters=self.iters,
                nsamples=len(batches),
                # Shorter samples would be dropped.
                seqlen=min(batch["input_ids"].shape[-1] for batch in batches),
                batch_size=1,
                device_map=str(model.device),
                quant_nontext_module=any(parts[name] == "vision" for name in specs),
                enable_torch_compile=False,
            )
            tuner.compress_context.output_dir = folder
            tuner.quantize()
        # The library casts the whole model to a dtype of its own choice.
        for name, tensor in _others(model, specs):
            if name not in others:
                raise ValueError(f"expected auto-round to leave the model's structure alone, got a new tensor {name}")
            tensor.data = others[name]
        for name, spec in specs.items():
            yield name, _packed(name, dense_linear(model, name), spec, dtypes[name])


def _others(model: nn.Module, specs: Mapping[str, QuantSpec]) -> Iterator[tuple[str, Tensor]]:
    """Return all tensors of a model except the weights that are quantized."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        owner, _, kind = name.rpartition(".")
        if owner not in specs or kind == "bias":
            yield name, tensor


def _scheme(spec: QuantSpec) -> dict[str, Any]:
    return {"bits": spec.bits, "group_size": spec.group_size or -1, "sym": spec.symmetric}


@contextmanager
def _no_sample_lost() -> Iterator[None]:
    """Raise errors where the library only logs, or exits the process."""
    lost: list[str] = []

    def note(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if message.startswith(FAILURES):
            lost.append(message)
        return True

    logger = logging.getLogger("autoround")
    logger.addFilter(note)
    try:
        yield
    except SystemExit as error:
        raise ValueError(f"auto-round gave up: {'; '.join(lost) or 'no calibration sample reached a block'}") from error
    finally:
        logger.removeFilter(note)
    if lost:
        raise ValueError(f"auto-round could not use all calibration samples: {'; '.join(lost)}")


@torch.no_grad()
def _packed(name: str, tuned: nn.Linear, spec: QuantSpec, dtype: torch.dtype) -> PackedLinear:
    """Pack a layer whose weight lies on the library's grid."""
    scale, zero = getattr(tuned, "scale", None), getattr(tuned, "zp", None)
    if not isinstance(scale, Tensor):
        raise ValueError(
            f"auto-round left {name} ({tuned.out_features} x {tuned.in_features}) dense: it takes layers of blocks "
            "whose sides are multiples of 32; skip it in the plan"
        )
    weight, middle = tuned.weight, 1 << (spec.bits - 1)
    groups = split_groups(weight.float(), spec.group_size)
    scale = scale.to(weight.device).reshape(groups.shape[:2])
    zeros = None if spec.symmetric else torch.as_tensor(zero, device=weight.device).reshape(groups.shape[:2])
    offset = middle if zeros is None else zeros.float().unsqueeze(-1)
    codes = (groups / scale.float().unsqueeze(-1) + offset).round_()
    if codes.min() < 0 or codes.max() >= 1 << spec.bits:
        raise ValueError(f"{name}: auto-round's weights do not lie on a grid of {spec.bits} bits")
    if zeros is not None:
        zeros = zeros.to(torch.uint8) if torch.equal(zeros, zeros.round()) else zeros.to(dtype)
    stored = Codes(codes.to(torch.uint8), scale.to(dtype), zeros)
    spec = QuantSpec(spec.bits, groups.shape[2], spec.symmetric)
    return PackedLinear.from_codes(stored, spec, tuned.in_features, bias=tuned.bias)
