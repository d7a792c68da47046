"""What calibrated backends are shown, kept for a look; and the same from plain forward passes."""

from dataclasses import dataclass

import torch

from lmms_plugin.quant_backends.backend import CalibratedBackend, Solution
from lmms_plugin.quant_backends.methods.rtn import nearest
from lmms_plugin.quant_backends.plans.plan import QuantSpec

SPEC = QuantSpec(4, 32)


@dataclass(frozen=True)
class Recorder(CalibratedBackend):
    """Rounds to nearest and keeps what it was shown; which model's inputs it saw is up to `sequential`."""

    name = "recorder"
    bits = frozenset(range(2, 9))

    def __post_init__(self):
        object.__setattr__(self, "seen", {})

    def solve(self, layers, specs, statistics):
        for name in statistics.names:
            assert name not in self.seen
            self.seen[name] = statistics
        return [Solution(nearest(layer, spec)) for layer, spec in zip(layers, specs, strict=True)]

    def without_inputs(self, layer, spec):
        return nearest(layer, spec)


@torch.no_grad()
def plain_sums(model, names, batches):
    """Return (XᵀX, Σ|x|, rows) of each layer's inputs over plain forward passes."""
    sums, handles = {}, []
    for name in names:

        def add(_, args, name=name):
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            gram, magnitude, rows = sums.get(name, (0, 0, 0))
            sums[name] = (gram + x.T @ x, magnitude + x.abs().sum(0), rows + len(x))

        handles.append(model.get_submodule(name).register_forward_pre_hook(add))
    for batch in batches:
        model(**batch)
    for handle in handles:
        handle.remove()
    return sums
