"""Quantize and dequantize a whole weight a block of rows at a time, so that no float32 copy of it exists."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.granularity import PerBlock, PerTensor, scale_shape
from lowbit.ops.checks import ANY_FLOAT
from lowbit.quantize import SMALLEST_SCALE, check_finite, choose_scale, dequantize, quantize_with
from lowbit.scheme import TensorSpec

# A block of this many elements, in float32, stays in a core's cache with what is made of it.
_BLOCK_ELEMENTS = 1 << 18


def _blocks(n: int, k: int, spec: TensorSpec) -> range:
    multiple = spec.granularity.rows if isinstance(spec.granularity, PerBlock) else 1
    rows = max(_BLOCK_ELEMENTS // max(k, 1), 1)
    return range(0, n, -(-rows // multiple) * multiple)


def quantize_rows(weight: Tensor, spec: TensorSpec, *, name: str = "weight") -> tuple[Tensor, Tensor]:
    """[N, K] in any float dtype → (codes [N, K], scale): bit for bit what `lowbit.quantize.quantize` gives.

    InputError for codes, float8 ones too: without their scale they are no weights; and on meta.
    """
    if weight.dtype not in ANY_FLOAT:
        raise InputError(
            f"{name}: expected a weight in float, found {weight.dtype}, which is quantized already; start from the "
            "model in float, or from to_linear() or dequantize() of what is quantized"
        )
    if weight.is_meta:
        raise InputError(f"{name}: expected a weight with values, found it on meta; load the weights first")
    n, k = weight.shape
    codes = torch.empty(n, k, dtype=spec.dtype.torch_dtype, device=weight.device)
    blocks = _blocks(n, k, spec)
    if isinstance(spec.granularity, PerTensor):
        scale = _tensor_scale(weight, spec, blocks, name)
        for start in blocks:
            codes[start : start + blocks.step] = quantize_with(
                weight[start : start + blocks.step], scale, spec
            )
        return codes, scale
    scale_dtype = torch.uint8 if spec.scale == "e8m0" else torch.float32
    scales = torch.empty(scale_shape((n, k), spec.granularity), dtype=scale_dtype, device=weight.device)
    row = 0
    for start in blocks:
        part = weight[start : start + blocks.step].to(torch.float32)
        check_finite(part, f"{name}, rows from {start} on")
        scale, _ = choose_scale(part, spec)
        scales[row : row + scale.shape[0]] = scale
        row += scale.shape[0]
        codes[start : start + blocks.step] = quantize_with(part, scale, spec)
    return codes, scales


def _tensor_scale(weight: Tensor, spec: TensorSpec, blocks: range, name: str) -> Tensor:
    largest = torch.zeros(1, dtype=torch.float32, device=weight.device)
    for start in blocks:
        part = weight[start : start + blocks.step].to(torch.float32)
        check_finite(part, f"{name}, rows from {start} on")
        if part.numel():
            largest = torch.maximum(largest, part.abs().amax().reshape(1))
    scale = largest / spec.dtype.max
    return torch.where(scale < SMALLEST_SCALE, torch.ones_like(scale), scale)


def dequantize_rows(codes: Tensor, scale: Tensor, spec: TensorSpec, dtype: torch.dtype) -> Tensor:
    """code · scale in float32, rounded once to `dtype`: [N, K]."""
    if dtype == torch.float32 or codes.numel() <= _BLOCK_ELEMENTS or isinstance(spec.granularity, PerTensor):
        return dequantize(codes, scale, spec).to(dtype)
    n, k = codes.shape
    out = torch.empty(n, k, dtype=dtype, device=codes.device)
    blocks = _blocks(n, k, spec)
    per_row = spec.granularity.rows if isinstance(spec.granularity, PerBlock) else 1
    for start in blocks:
        end = min(start + blocks.step, n)
        part = scale[start // per_row : -(-end // per_row)]
        out[start:end] = dequantize(codes[start:end], part, spec)
    return out
