"""The CPU path in plain torch: exact, for processors without AVX2 or NEON and installations without numba."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lowbit.ops import reference
from lowbit.ops.problem import Activations, Weights
from lowbit.ops.settings import settings
from lowbit.quantize import scale_as_float

# |sum| of so many products of codes, and of distances to a zero point, stays below 2²⁴, where
# float32 still holds every integer: 1040 · 127², or 515 · 255 · 127 (· 128 for given codes).
_EXACT_K, _EXACT_K_WIDE = 1024, 512
_ROWS = 256  # weight rows decoded at a time


def linear(
    x: Tensor,
    weights: Weights,
    activations: Activations,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    *,
    offsets: list[int] | None = None,
    routed: Tensor | None = None,
) -> Tensor:
    """As `cpu.linear`, whose contract it shares."""
    codes = reference.unpack(weights)
    scale = scale_as_float(weights.scale)
    a_scale = activations.scale
    if x.dtype not in (torch.int8, torch.float8_e4m3fn) and activations.kind != "none":
        x, a_scale = reference.quantize(x, codes.dtype, activations)
    integer = codes.dtype == torch.int8 and activations.kind != "none"
    real = torch.float64 if settings.float64_sums and not integer else torch.float32
    a = x.to(real) - activations.zero_point
    if a_scale is not None:
        a_scale = (
            a_scale.float().reshape(-1, a_scale.shape[-1] if activations.group else 1).expand(len(x), -1)
        )
    exact = (
        0
        if not integer
        else _EXACT_K_WIDE
        if activations.zero is not None or x.dtype == torch.int8
        else _EXACT_K
    )
    out = torch.empty(x.shape[0], weights.n, dtype=torch.float32)
    if offsets is None:
        offsets, codes, scale = [0, x.shape[0]], codes.unsqueeze(0), scale.unsqueeze(0)
        bias = None if bias is None else bias.unsqueeze(0)
    for expert, (start, end) in enumerate(pairwise(offsets)):
        if start == end:
            continue
        for first in range(0, weights.n, _ROWS):
            columns = slice(first, min(first + _ROWS, weights.n))
            part = None if a_scale is None else a_scale[start:end]
            value = _product(
                a[start:end], codes[expert, columns], part, _row_scales(scale[expert], weights, columns),
                weights.group, activations.group, exact,
            )  # fmt: skip
            if bias is not None:
                value += bias[expert, columns].float()
            out[start:end, columns] = value
    if routed is not None:
        out *= routed.float().reshape(-1, 1)
    return out.to(out_dtype)


def _row_scales(scale: Tensor, weights: Weights, columns: slice) -> Tensor:
    """[rows of this part, groups]."""
    rows = weights.block[0]
    if not rows:
        return scale.reshape(1, 1)
    return scale[torch.arange(columns.start, columns.stop) // rows]


def _product(
    a: Tensor, codes: Tensor, a_scale: Tensor | None, scale: Tensor, w_group: int, a_group: int, exact: int
) -> Tensor:
    k = a.shape[1]
    w = codes.to(a.dtype)
    group = a_group or w_group or max(k, 1)
    total = torch.zeros(a.shape[0], codes.shape[0], dtype=torch.float32)
    for g in range(-(-k // group)):
        end = min((g + 1) * group, k)
        value = _exact_sum(a, w, g * group, end, exact)
        if a_scale is not None:
            value = value * a_scale[:, g if a_group else 0].unsqueeze(1)
        total += value * scale[:, g if w_group else 0].unsqueeze(0)
    return total


def _exact_sum(a: Tensor, w: Tensor, start: int, end: int, exact: int) -> Tensor:
    """Σ over start … end: exact for integers, where `exact` says how many fit float32; 0: floats, in their dtype."""
    if not exact:
        return (a[:, start:end] @ w[:, start:end].T).float()
    total = torch.zeros(a.shape[0], w.shape[0], dtype=torch.int32)
    for first in range(start, end, exact):
        part = slice(first, min(first + exact, end))
        total += (a[:, part] @ w[:, part].T).to(torch.int32)
    return total.to(torch.float32)


def hadamard(x: Tensor, length: int) -> Tensor:
    """As `cpu.hadamard`: log₂ butterflies over the whole tensor."""
    values, distance = x.float(), 1
    while distance < length:
        low, high = values.unflatten(-1, (-1, 2, distance)).unbind(-2)
        values = torch.stack([low + high, low - high], dim=-2).flatten(-3)
        distance *= 2
    return (values * length**-0.5).to(x.dtype)
