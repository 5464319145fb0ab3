"""The `reference` implementation: each operation written plainly in torch. The oracle.

Integer products are exact (float64 holds every sum that int32 does). Products of fp8 codes
and weight-only products are summed in float64 and rounded once to float32, so that a faster
implementation is compared with the exact value. The epilogue is the one order that all
implementations share: acc → × activation scale → × weight scale → + bias, in float32 → × routed
weight → cast. With scales along K, each group's sum is scaled, then groups add up in float32.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from lowbit.dtypes import E4M3FN, INT8, decode
from lowbit.granularity import PerGroup, PerTensor, PerToken
from lowbit.ops.problem import Activations, Weights
from lowbit.quantize import choose_scale, quantize_with, scale_as_float
from lowbit.scheme import TensorSpec


def unpack(weights: Weights) -> Tensor:
    """Codes as stored → int8 or float8_e4m3fn [(E,) N, K]."""
    tensor = weights.tensor
    if tensor.dtype != torch.int32:
        return tensor
    raw = tensor.contiguous().view(torch.uint8)[..., : weights.k]
    return (raw.to(torch.int16) - 128).to(torch.int8)


def dequantize(weights: Weights) -> Tensor:
    """code · scale in float32, [(E,) N, K]."""
    values = decode(unpack(weights))
    scale = scale_as_float(weights.scale)
    rows, cols = weights.block
    if not rows:
        # One scale per tensor: [1], or [E, 1] of experts.
        return values * (scale.reshape(-1, 1, 1) if values.dim() == 3 else scale.reshape(1, 1))
    if weights.group:
        scale = scale.repeat_interleave(cols, dim=-1)[..., : weights.k]
    if rows > 1:
        scale = scale.repeat_interleave(rows, dim=-2)[..., : weights.n, :]
    return values * scale


def spec_of(dtype: torch.dtype, activations: Activations) -> TensorSpec:
    """The TensorSpec of activations quantized to `dtype`."""
    granularity = (
        PerTensor()
        if activations.kind == "tensor"
        else PerGroup(activations.group)
        if activations.group
        else PerToken()
    )
    return TensorSpec(
        dtype=INT8 if dtype == torch.int8 else E4M3FN,
        granularity=granularity,
        symmetric=activations.zero is None,
        dynamic=activations.dynamic,
        scale="float32-power-of-2" if activations.power_of_2 else "float32",
    )


def quantize(x: Tensor, dtype: torch.dtype, activations: Activations) -> tuple[Tensor, Tensor]:
    """x [M, K] → codes [M, K] of `dtype`, float32 scales [M, groups] ([1] when static)."""
    spec = spec_of(dtype, activations)
    if activations.dynamic:
        if not x.numel():
            groups = -(-x.shape[1] // activations.group) if activations.group else 1
            return x.to(dtype), torch.ones(x.shape[0], groups, dtype=torch.float32, device=x.device)
        scale, _ = choose_scale(x, spec)
    else:
        scale = activations.static_scale()
    zero = None if activations.zero is None else activations.zero.reshape(1)
    return quantize_with(x, scale, spec, zero), scale


def quantize_by_expert(
    x: Tensor, dtype: torch.dtype, activations: Activations, offsets: Tensor
) -> tuple[Tensor, Activations]:
    """Rows x [T, K] sorted by expert and a static scale per expert [E, 1] → codes, and the scale of each row.

    Nothing waits for the device: `offsets` [E + 1] are read where they are.
    """
    scales = activations.scale
    assert scales is not None
    rows = torch.arange(x.shape[0], device=x.device)
    expert = torch.searchsorted(offsets[1:].to(rows.dtype).contiguous(), rows, right=True)
    scale = scales.to(torch.float32).reshape(-1, 1)[expert.clamp(max=scales.numel() - 1)]
    given = Activations(kind="token", scale=scale)
    return quantize_with(x, scale, spec_of(dtype, given)), given


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
    """x [M, K] (floats, or codes with `activations.scale`) → [M, N]; see `ops.linear`."""
    codes = unpack(weights)
    scale = scale_as_float(weights.scale)
    a_scale: Tensor | None = activations.scale if x.shape[1] else None
    if x.shape[1] and x.dtype not in (torch.int8, torch.float8_e4m3fn) and activations.kind != "none":
        x, a_scale = quantize(x, codes.dtype, activations)
    a = x.double() - activations.zero_point
    if a_scale is not None:
        a_scale = a_scale.to(torch.float32).reshape(-1, max(a_scale.shape[-1], 1) if activations.group else 1)
        a_scale = a_scale.expand(x.shape[0], -1)
    if offsets is None:
        out = _product(a, codes, a_scale, scale, weights, activations)
        if bias is not None:
            out = out + bias.to(torch.float32)
    else:
        out = torch.zeros(x.shape[0], weights.n, dtype=torch.float32, device=x.device)
        for expert, (start, end) in enumerate(pairwise(offsets)):
            rows = slice(start, end)
            part = None if a_scale is None else a_scale[rows]
            out[rows] = _product(a[rows], codes[expert], part, scale[expert], weights, activations)
            if bias is not None:
                out[rows] += bias[expert].to(torch.float32)
    if routed is not None:
        out = out * routed.to(torch.float32).reshape(-1, 1)
    return out.to(out_dtype)


def _product(
    a: Tensor,
    codes: Tensor,
    a_scale: Tensor | None,
    scale: Tensor,
    weights: Weights,
    activations: Activations,
) -> Tensor:
    """float32 [M, N]: the scaled sum over K, without bias."""
    n, k = codes.shape
    if not k:
        return torch.zeros(a.shape[0], n, dtype=torch.float32, device=a.device)
    rows = weights.block[0]
    columns = scale.reshape(1, 1) if not rows else scale
    if rows > 1:
        columns = columns.repeat_interleave(rows, dim=0)[:n]
    w = codes.double()
    group = activations.group or weights.group
    if not group:
        total = (a @ w.T).to(torch.float32)
        if a_scale is not None:
            total = total * a_scale
        return total * columns.T
    total = torch.zeros(a.shape[0], n, dtype=torch.float32, device=a.device)
    for g in range(-(-k // group)):
        part = slice(g * group, (g + 1) * group)
        value = (a[:, part] @ w[:, part].T).to(torch.float32)
        if a_scale is not None:
            value = value * a_scale[:, g if activations.group else 0].unsqueeze(1)
        total = total + value * columns[:, g if weights.group else 0].unsqueeze(0)
    return total


def hadamard(x: Tensor, block: int) -> Tensor:
    """x […, K] times the orthonormal Walsh–Hadamard matrix (Sylvester's order) in blocks, float64 inside."""
    values = x.double().unflatten(-1, (-1, block))
    matrix = torch.ones(1, 1, dtype=torch.float64, device=x.device)
    while matrix.shape[0] < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return (values @ matrix / math.sqrt(block)).flatten(-2).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """(RMSNorm(h) · weight, h) with h = x + residual, all in x.dtype.

    Rounded where transformers' LlamaRMSNorm rounds: h, the normalized value, the product.
    """
    total = x if residual is None else x + residual
    values = total.float()
    normalized = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    return normalized.to(x.dtype) * weight.to(x.dtype), total


def silu_mul(x: Tensor) -> Tensor:
    """[…, 2·I] (gate, up) → silu(gate) · up […, I] in x.dtype; silu in float32, then rounded."""
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate.float()).to(x.dtype) * up
