"""Mixture-of-experts layers: stacked expert weights split into one linear layer per expert.

transformers keeps the experts of a layer in three-dimensional parameters and declares their layout in attributes of the
module (``use_experts_implementation``). Once split, every expert's matrices are linear layers with names of their own,
``...experts.3.gate_up_proj``, which plans, quantizers, calibration and reports treat like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lmms_plugin.quant_backends.layers.modalities import routed

UP_PROJECTIONS = ("gate_up_proj", "up_proj")
DOWN_PROJECTION = "down_proj"


class Fed(NamedTuple):
    """Rows routed to an expert.

    Attributes:
        rows: (fed,) int64, their indices among the rows of the mixture.
        total: Number of rows of the mixture.
    """

    rows: Tensor
    total: int


class Expert(nn.Module):
    """One expert: the projection up (with its gate, where there is one) and the projection down.

    Attributes:
        fed: Rows that the call in progress routes to it; None between calls.
    """

    fed: Fed | None = None

    def __init__(self, up: str, sizes: tuple[int, int, int, int], bias: bool, like: Tensor) -> None:
        super().__init__()
        self.up = up
        options: dict[str, Any] = {"bias": bias, "device": "meta", "dtype": like.dtype}
        self.add_module(up, nn.Linear(sizes[0], sizes[1], **options))
        self.add_module(DOWN_PROJECTION, nn.Linear(sizes[2], sizes[3], **options))

    def forward(self, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the expert's output for rows (rows, hidden), before weighting."""
        y: Tensor = self.get_submodule(DOWN_PROJECTION)(activation(self.get_submodule(self.up)(x)))
        return y


class SplitExperts(nn.Module):
    """Experts of one layer as separate linear layers: same inputs, same routing, same output as the fused module.

    Only experts that receive tokens are run. Each token's outputs are summed in the order in which the router names its
    experts, whatever else is in the batch.

    Args:
        fused: Fused module, which is left as it is.
    """

    fused: Any
    num_experts: int

    def __init__(self, fused: Any) -> None:
        super().__init__()
        # Not as a submodule: its stacks are released once the experts have their own weights.
        object.__setattr__(self, "fused", fused)
        self.num_experts = fused.num_experts
        self._transposed: bool = fused.is_transposed
        for name, child in fused.named_children():
            self.add_module(name, child)
        up, down = fused.get_parameter(up_projection(fused)), fused.get_parameter(DOWN_PROJECTION)
        sizes = (*self._sides(up), *self._sides(down))
        for index in range(self.num_experts):
            self.add_module(str(index), Expert(up_projection(fused), sizes, fused.has_bias, up))

    @property
    def experts(self) -> tuple[Expert, ...]:
        """Return all experts, by number."""
        return tuple(module for module in self.children() if isinstance(module, Expert))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the experts' outputs for each row.

        Args:
            hidden_states: (rows, hidden).
            top_k_index: (rows, k) int64, the experts of each row.
            top_k_weights: (rows, k).
        """
        rows, k = top_k_index.shape
        chosen = top_k_index.reshape(-1)
        order = torch.argsort(chosen, stable=True)
        counts = torch.bincount(chosen, minlength=self.num_experts).tolist()
        parts = [
            self._run(expert, hidden_states, places // k)
            for expert, places in zip(self.experts, order.split(counts), strict=True)
            if len(places)
        ]
        if not parts:
            return torch.zeros_like(hidden_states)
        outputs = torch.cat(parts)[torch.argsort(order)]
        weighed = outputs * top_k_weights.reshape(-1, 1)
        return weighed.view(rows, k, -1).sum(1).to(hidden_states.dtype)

    def take(self, stack: str, values: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Distribute one stack among the experts, as views of it.

        Args:
            stack: Name of the parameter of the fused module.
            values: Values of the parameter.

        Yields:
            Name of a linear layer below this module, and its weight, or its bias where `stack` is one of biases.
        """
        key = stack.removesuffix("_bias")
        wanted = getattr(self.fused, stack).shape
        if values.shape != wanted:
            raise ValueError(f"{stack}: expected weights of experts {tuple(wanted)}, got {tuple(values.shape)}")
        for index, expert in enumerate(self.experts):
            value = values[index]
            layer = expert.get_submodule(key)
            biases = stack.endswith("_bias")
            value = value.T if self._transposed and not biases else value
            parameter = nn.Parameter(value, requires_grad=False)
            # Otherwise transformers would draw new weights for a parameter that no file holds under its name.
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
            setattr(layer, "bias" if biases else "weight", parameter)
            yield f"{index}.{key}", value

    def expect_stacks(self) -> None:
        """Register the fused parameters too, empty, so that a checkpoint's stacks can be loaded into them."""
        for name, stack in self.fused.named_parameters(recurse=False):
            self.register_parameter(name, stack)

    def forget_stack(self, stack: str) -> None:
        """Unregister a fused parameter."""
        self._parameters.pop(stack, None)
        self.fused._parameters[stack] = nn.Parameter(
            torch.empty_like(getattr(self.fused, stack), device="meta"), requires_grad=False
        )

    def release(self) -> None:
        """Release all fused parameters: the experts have views of them, or will get weights of their own."""
        for stack, _ in list(self.fused.named_parameters(recurse=False)):
            self.forget_stack(stack)

    def _run(self, expert: Expert, hidden_states: Tensor, rows: Tensor) -> Tensor:
        expert.fed = Fed(rows, len(hidden_states))
        try:
            with routed(rows, len(hidden_states)):
                output: Tensor = expert(hidden_states[rows], self._activate)
        finally:
            expert.fed = None
        if self.fused.has_post_expert_norm:
            output = self.fused.post_expert_norm(output)
        return output

    def _activate(self, projected: Tensor) -> Tensor:
        activated: Tensor = (self.fused._apply_gate if self.fused.has_gate else self.fused.act_fn)(projected)
        return activated

    def _sides(self, stack: Tensor) -> tuple[int, int]:
        """Return columns and rows of each matrix of a stack, as a linear layer has them."""
        rows, columns = stack.shape[1:]
        return (rows, columns) if self._transposed else (columns, rows)


def up_projection(fused: nn.Module) -> str:
    """Return the name of the stack of the experts' first projection."""
    return next(name for name in UP_PROJECTIONS if name in dict(fused.named_parameters(recurse=False)))


def is_fused(module: nn.Module) -> bool:
    """Return whether a module holds stacked experts in a declared layout, so that they can be split."""
    declared = ("num_experts", "has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_apply_gate")
    if isinstance(module, SplitExperts) or not all(hasattr(module, name) for name in declared):
        return False
    stacks = dict(module.named_parameters(recurse=False))
    ups = [name for name in UP_PROJECTIONS if name in stacks]
    known = {stack for name in (*ups, DOWN_PROJECTION) for stack in (name, f"{name}_bias")}
    return (
        len(ups) == 1
        and DOWN_PROJECTION in stacks
        and set(stacks) <= known
        and all(len(stack) == module.num_experts for stack in stacks.values())
        and all(stacks[name].dim() == 3 for name in (*ups, DOWN_PROJECTION))
    )


def split_experts(model: nn.Module, names: Collection[str] | None = None) -> dict[str, SplitExperts]:
    """Split fused experts, in place.

    Experts of a loaded model are views of their stacks: nothing is copied. On the meta device the stacks stay in place
    until a checkpoint brings them (`SplitExperts.take`).

    Args:
        model: Model, loaded or on the meta device.
        names: Names of the modules; None for all that hold fused experts.

    Returns:
        Module name -> replacement.
    """
    found = {name: module for name, module in model.named_modules() if is_fused(module)}
    split = {name: SplitExperts(module) for name, module in found.items() if names is None or name in names}
    for name, experts in split.items():
        model.set_submodule(name, experts)
        # Some models initialise stacks from the block that holds them, before their weights are there or are known.
        model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = True  # type: ignore[assignment]
        for stack, values in list(found[name].named_parameters(recurse=False)):
            if values.is_meta:
                experts.expect_stacks()
            else:
                for _ in experts.take(stack, values.detach()):
                    pass
    return split


def join_experts(model: nn.Module, split: dict[str, SplitExperts], names: Collection[str]) -> None:
    """Restore the fused modules, in place: those of `names`, which must not have changed since."""
    for name in names:
        model.set_submodule(name, split.pop(name).fused)


def own_weight(layer: nn.Linear) -> None:
    """Copy a layer's weight and bias if they are views of something larger."""
    for parameter in (layer.weight, layer.bias):
        if parameter is not None and not parameter.is_meta and _is_view(parameter.data):
            parameter.data = parameter.data.contiguous().clone()


def _is_view(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()


def expert_of(model: nn.Module, layer: str) -> Expert | None:
    """Return the expert that a linear layer belongs to, None if it belongs to none."""
    parent = model.get_submodule(layer.rpartition(".")[0])
    return parent if isinstance(parent, Expert) else None
