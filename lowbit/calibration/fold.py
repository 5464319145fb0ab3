"""Exact rewritings of a decoder layer: what one module multiplies by, the next divides by.

All work in place on a filled layer, in its own dtype, and change nothing but rounding: in
float64 the logits stay the same to 1e-9.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lowbit.calibration.graph import LayerGraph, Norm, Pair
from lowbit.calibration.rotation import Rotation, apply_hadamard, apply_online_hadamard
from lowbit.errors import InputError


def _weight(layer: nn.Module, name: str) -> nn.Parameter:
    weight = layer.get_submodule(name).weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _bias(layer: nn.Module, name: str) -> Tensor | None:
    return getattr(layer.get_submodule(name), "bias", None)


def as_stored(x: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`x` in the dtype that it will be written in. InputError where that does not reach: float16 ends at 65504."""
    stored = x.to(dtype)
    if bool((torch.isfinite(x) & ~torch.isfinite(stored)).any()):
        raise InputError(
            f"expected {name} to fit the source's {str(dtype).removeprefix('torch.')} when it is transformed, found "
            f"values up to {float(x.abs().nan_to_num(posinf=0).max()):.0f}; use a method without transforms (gptq), or "
            "convert the source to bf16 first"
        )
    return stored


def scaled_norm(
    layer: nn.Module, norm: Norm, scale: Tensor, stored: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(weight [K], applied [K]): a norm's weight when its output is divided by `applied`, which is near `scale`.

    With `stored`, the dtype that the norm will be written in, `applied` is the scale nearest to `scale` that
    leaves the weight representable there: a gain in BF16 is off by up to 0.2 %, which would be
    a good part of what 8-bit weights lose.
    """
    weight = _weight(layer, norm.name).detach()
    gain = weight + norm.offset
    new = gain / scale.to(weight) - norm.offset
    if stored is not None:
        new = new.to(stored).to(weight.dtype)
    applied = torch.where(new + norm.offset != 0, gain / (new + norm.offset), torch.ones_like(gain))
    return new, torch.where(applied > 0, applied, scale.to(weight))


@torch.no_grad()
def scale_norm(layer: nn.Module, norm: Norm, scale: Tensor, stored: torch.dtype | None = None) -> Tensor:
    """norm → readers: the norm's output is divided by `scale` [K], its readers multiplied.

    Returns the scale that was applied (see `scaled_norm`).
    """
    new, applied = scaled_norm(layer, norm, scale, stored)
    _weight(layer, norm.name).copy_(new)
    if (bias := _bias(layer, norm.name)) is not None:
        bias.div_(applied)
    for reader in norm.readers:
        _weight(layer, reader).mul_(applied)
    return applied


@torch.no_grad()
def fold_norm(layer: nn.Module, norm: Norm) -> None:
    """Move the norm's gain into its readers, so that the norm multiplies by 1."""
    gain = _weight(layer, norm.name).detach() + norm.offset
    for reader in norm.readers:
        _weight(layer, reader).mul_(gain)
    _weight(layer, norm.name).fill_(1.0 - norm.offset)


@torch.no_grad()
def scale_pair(layer: nn.Module, pair: Pair, scale: Tensor) -> None:
    """first → second: output channels of `first` are divided by `scale` [first.out], the second's multiplied.

    With grouped-query attention each value head feeds `repeat` query heads, in that order.
    """
    first = _weight(layer, pair.first)
    scale = scale.to(first)
    first.div_(scale[:, None])
    if (bias := _bias(layer, pair.first)) is not None:
        bias.div_(scale)
    _weight(layer, pair.second).mul_(repeat_heads(scale, pair))


def repeat_heads(scale: Tensor, pair: Pair) -> Tensor:
    """[first.out] → [second.in]: every value head repeated for the query heads that it feeds."""
    if pair.repeat == 1:
        return scale
    return scale.view(-1, pair.head_dim).repeat_interleave(pair.repeat, dim=0).reshape(-1)


@torch.no_grad()
def rotate_heads(layer: nn.Module, pair: Pair) -> None:
    """v → o: every head's values rotated by a Hadamard matrix of the head's width."""
    first, second = _weight(layer, pair.first), _weight(layer, pair.second)
    d = pair.head_dim
    heads = first.view(-1, d, first.shape[1]).transpose(1, 2)
    first.copy_(apply_hadamard(heads).transpose(1, 2).reshape(first.shape))
    if (bias := _bias(layer, pair.first)) is not None:
        bias.copy_(apply_hadamard(bias.view(-1, d)).reshape(-1))
    second.copy_(apply_hadamard(second.view(second.shape[0], -1, d)).reshape(second.shape))


@torch.no_grad()
def rotate_residual(layer: nn.Module, graph: LayerGraph, rotation: Rotation) -> None:
    """h → h·Q around a whole layer. Norm gains are folded first. Raises InputError where it is not exact."""
    if graph.rotation_refusal:
        raise InputError(
            f"expected a residual stream that can be rotated, found {graph.rotation_refusal}; "
            "use a method without rotation"
        )
    for norm in graph.norms:
        if _weight(layer, norm.name).shape[0] != rotation.size:
            continue  # a norm inside the attention (latent attention): its readers are not on the stream
        fold_norm(layer, norm)
        for reader in norm.readers:
            weight = _weight(layer, reader)
            weight.copy_(rotation.apply(weight))
    for writer in graph.writers:
        weight = _weight(layer, writer)
        weight.copy_(rotation.apply_output(weight))
        if (bias := _bias(layer, writer)) is not None:
            bias.copy_(rotation.apply(bias))


@torch.no_grad()
def rotate_input(layer: nn.Module, names: Iterable[str]) -> None:
    """W → W·H for modules whose input will be rotated by H online (see `rotation.apply_online_hadamard`)."""
    for name in names:
        weight = _weight(layer, name)
        weight.copy_(apply_online_hadamard(weight))


def relative_change(before: Tensor, after: Tensor, added_to: Tensor | None = None) -> float:
    """‖after − before‖ / ‖before‖; of what a layer adds to its input, against a thousandth of that at least.

    Layers that add nothing deepen a model or are what pruning leaves of one: there is only float rounding.
    """
    size = before.double().norm().clamp(min=1e-30)
    if added_to is not None:
        size = torch.maximum(size, added_to.double().norm() / 1000)
    return float((after.double() - before.double()).norm() / size)
