"""Folding of input scales into preceding layers, only where every output stays identical to the last bit.

A packed layer that multiplies its input by a vector s equals one that does not, after a layer that multiplies its
output by s. Two kinds of layers can take s over: a norm, into its weight, if all layers that it feeds multiply by the
same s; and a linear layer whose output is only multiplied elementwise on the way (the up projection of a gated MLP),
into the scales of its rows. With powers of two nothing is rounded; where rows share scales, or a scale of 8 bits cannot
hold the product, the layer keeps s.

These layers are found by observation, not by names: which layer receives which tensor in a forward pass, and whether
the module around them still gives the same output afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lmms_plugin.quant_backends.formats.codec import E8M0_NAN
from lmms_plugin.quant_backends.layers.codes import Codes
from lmms_plugin.quant_backends.layers.format_linear import FormatCodes, FormatLinear
from lmms_plugin.quant_backends.layers.linear import PackedLinear, QuantizedLinear
from lmms_plugin.quant_backends.layers.rounded_inputs import RoundedInputLinear

Undo = Callable[[], None]
ScaledLinear = PackedLinear | FormatLinear
"""Layers that may multiply their inputs by a vector."""


class ModuleCall(NamedTuple):
    """Recorded call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@torch.no_grad()
def fold(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[str, ...]:
    """Fold the input scales of packed layers into preceding layers, in place, where no bit of any output changes.

    Args:
        model: Model on its device.
        inputs: Keyword arguments of a forward pass through all of its layers.

    Returns:
        Names of the layers that keep their scale; all of them, and the model unchanged, if its logits would change.
    """
    scaled = {name: layer for name, layer in model.named_modules() if _is_scaled(layer)}
    if not scaled:
        return ()
    calls, before = _watched(model, inputs, scaled)
    undone: list[Undo] = []
    # MLPs are tested on recorded inputs, which changed norms would invalidate.
    for name in [name for name in scaled if not _fed_by_norm(name, calls, model)]:
        undone += _into_sibling(model, name, calls)
    for norm in [name for name, module in model.named_modules() if _is_norm(module) and name in calls]:
        undone += _into_norm(model, norm, calls)
    if not torch.equal(model(**inputs).logits, before):
        for undo in reversed(undone):
            undo()
    return tuple(name for name in scaled if _is_scaled(model.get_submodule(name)))


def _is_scaled(module: nn.Module) -> bool:
    return isinstance(module, ScaledLinear) and module.in_scale is not None


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 1 and not any(module.children())


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | QuantizedLinear)


def _watched(
    model: nn.Module, inputs: Mapping[str, Any], scaled: Mapping[str, nn.Module]
) -> tuple[dict[str, list[ModuleCall]], Tensor]:
    """Record every call of linear layers, norms and modules around scaled layers, and the logits."""
    parents = {name.rpartition(".")[0] for name in scaled}
    wanted = [n for n, m in model.named_modules() if n in parents or _is_linear(m) or _is_norm(m)]
    calls: dict[str, list[ModuleCall]] = {}
    with _hooks(model, wanted, calls):
        logits: Tensor = model(**inputs).logits
    return calls, logits


@contextmanager
def _hooks(model: nn.Module, names: list[str], calls: dict[str, list[ModuleCall]]) -> Iterator[None]:
    def noting(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls.setdefault(name, []).append(ModuleCall(args, kwargs, output))

        return note

    handles = [model.get_submodule(name).register_forward_hook(noting(name), with_kwargs=True) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _same_tensor(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.data_ptr() == b.data_ptr() and a.shape == b.shape


def _fed(model: nn.Module, output: Tensor, calls: Mapping[str, list[ModuleCall]]) -> list[str]:
    """Return the linear layers whose input is this very tensor."""
    return [
        name
        for name, made in calls.items()
        if _is_linear(model.get_submodule(name)) and any(_same_tensor(_input(call), output) for call in made)
    ]


def _input(call: ModuleCall) -> Any:
    return call.args[0] if call.args else next(iter(call.kwargs.values()), None)


def _fed_by_norm(name: str, calls: Mapping[str, list[ModuleCall]], model: nn.Module) -> bool:
    x = _input(calls[name][0]) if name in calls else None
    norms = (made for other, made in calls.items() if _is_norm(model.get_submodule(other)))
    return any(_same_tensor(call.output, x) for made in norms for call in made)


def _into_norm(model: nn.Module, name: str, calls: Mapping[str, list[ModuleCall]]) -> list[Undo]:
    """Fold the common scale of all layers after a norm into it; do nothing if they differ or the norm would round."""
    norm, made = model.get_submodule(name), calls[name]
    fed = [model.get_submodule(fed) for fed in _fed(model, made[0].output, calls)]
    layers = [layer for layer in fed if isinstance(layer, ScaledLinear) and layer.in_scale is not None]
    if len(made) != 1 or not layers or len(layers) != len(fed):
        return []
    scale: Any = layers[0].in_scale
    if scale.shape != norm.weight.shape or not all(_same_scale(layer, scale) for layer in layers):
        return []
    parameters = {key: value for key, value in norm.named_parameters(recurse=False) if value.shape == scale.shape}
    kept = {key: value.detach().clone() for key, value in parameters.items()}

    def undo() -> None:
        for key, value in kept.items():
            parameters[key].data.copy_(value)
        for layer in layers:
            layer.in_scale = scale.clone()

    for value in parameters.values():
        value.data.mul_(scale)
    again = norm(*made[0].args, **made[0].kwargs)
    for layer in layers:
        layer.in_scale = None
    if torch.equal(again, made[0].output * scale):
        return [undo]
    undo()
    return []


def _same_scale(layer: ScaledLinear, scale: Tensor) -> bool:
    return layer.in_scale is not None and torch.equal(layer.in_scale, scale)


def _into_sibling(model: nn.Module, name: str, calls: Mapping[str, list[ModuleCall]]) -> list[Undo]:
    """Fold a layer's scale into the rows of a sibling layer, if the output of the module around them stays the same."""
    parent_name = name.rpartition(".")[0]
    layer: Any = model.get_submodule(name)
    parent, made = model.get_submodule(parent_name), calls.get(parent_name, [])
    if len(made) != 1:
        return []
    for other, sibling in list(parent.named_children()):
        if sibling is layer or not isinstance(sibling, ScaledLinear):
            continue
        for rows in _places(sibling, layer.in_features):
            undo = _scale_rows(parent, other, rows, layer)
            if undo is None:
                continue
            if _same_output(parent(*made[0].args, **made[0].kwargs), made[0].output):
                return [undo]
            undo()
    return []


def _places(sibling: ScaledLinear, width: int) -> list[slice]:
    """Return the row ranges that may scale an input of this width; a layer may hold gate and values in one."""
    if sibling.out_features == width:
        return [slice(0, width)]
    return [slice(width, None), slice(0, width)] if sibling.out_features == 2 * width else []


def _scale_rows(parent: nn.Module, name: str, rows: slice, behind: ScaledLinear) -> Undo | None:
    """Multiply rows of a layer by the scale of the one behind, which drops it; None where they cannot hold that."""
    former, scale = parent.get_submodule(name), behind.in_scale
    assert isinstance(former, ScaledLinear)
    assert scale is not None
    factor = torch.ones(former.out_features, dtype=scale.dtype, device=scale.device)
    factor[rows] = scale
    bias = None if former.bias is None else nn.Parameter(former.bias * factor.to(former.bias), requires_grad=False)
    changed: ScaledLinear | None
    if isinstance(former, PackedLinear):
        changed = _scaled_packed(former, factor, bias)
    else:
        changed = _scaled_format(former, factor, bias)
    if changed is None:
        return None
    setattr(parent, name, changed)
    behind.in_scale = None

    def undo() -> None:
        setattr(parent, name, former)
        behind.in_scale = scale

    return undo


def _scaled_packed(former: PackedLinear, factor: Tensor, bias: nn.Parameter | None) -> PackedLinear:
    codes = former.quantized
    changed = type(former).from_codes(
        Codes(codes.codes, codes.scale * factor.unsqueeze(1), codes.zero_point),
        former.spec,
        former.in_features,
        bias=bias,
        in_scale=former.in_scale,
    )
    if isinstance(former, RoundedInputLinear) and isinstance(changed, RoundedInputLinear):
        changed.rounding = former.rounding
        changed.set_static_scale(former.static_scale)
    return changed


def _scaled_format(former: FormatLinear, factor: Tensor, bias: nn.Parameter | None) -> FormatLinear | None:
    codes, form = former.quantized, former.format
    if form.block[0] != 1:
        return None
    scale, total, factors = codes.scale, codes.global_scale, factor.float().unsqueeze(1)
    if form.scale == "e8m0":
        exponents = scale.int() + factors.log2().int()
        scale = exponents.clamp(0, E8M0_NAN - 1).to(torch.uint8)
    elif form.global_scale and total is not None:
        # The largest scale is E4M3's largest number; the global scale, by which they were multiplied, makes room.
        widened, room = scale.float() * factors, torch.finfo(scale.dtype).max
        shift = (widened.max() / room).log2().ceil().exp2()
        scale, total = (widened / shift).to(scale.dtype), total / shift
    else:
        scale = scale * factors
    changed = FormatCodes(codes.codes, scale, total, form)
    exact = codes.dequantize(form.bits, torch.float32) * factors
    if not torch.equal(changed.dequantize(form.bits, torch.float32), exact):
        return None
    return FormatLinear.from_codes(
        changed,
        former.dtype,
        bias=bias,
        in_scale=former.in_scale,
        rounding=former.rounding,
        static_scale=former.static_scale,
    )


def _same_output(found: Any, expected: Any) -> bool:
    found, expected = (value[0] if isinstance(value, tuple) else value for value in (found, expected))
    return isinstance(found, Tensor) and torch.equal(found, expected)
