"""Producers fused with quantization: RMSNorm (+ residual) and SiLU·mul write codes, not floats.

Intermediate results are rounded to the dtype of x exactly where the unfused model rounds
them, so that fusing changes nothing but the speed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import FLOATS, check_dtype, check_shape, require
from .quantize import (
    GROUPS,
    RMS_NORM,
    SILU_MUL,
    STATIC,
    TOKEN,
    ScaleFormat,
    check_group,
    check_static,
    quantize_rows,
)


def rms_norm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype = torch.int8,
    *,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    group_size: int | None = None,
    column_major: bool = False,
    scale_format: ScaleFormat = "float32",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(codes [M, K], scale, h) of RMSNorm(h)·weight, where h = x + residual, or x without one.

    x: float16, bfloat16 or float32 [M, K]; weight [K]; residual [M, K], of x's dtype. h is in x's
    dtype, None without residual. RMSNorm: h / sqrt(mean(h²) + eps) in float32, rounded to x's
    dtype, then × weight, rounded again (as transformers' LlamaRMSNorm does).
    Scales: per token [M, 1]; per group of `group_size` along K [M, ⌈K/g⌉]; or the stored `scale`
    (one element, with `zero_point`), which is returned. dtype and formats as in quantize.py.
    """
    mode = _mode(scale, zero_point, group_size, dtype)
    check_dtype("weight", weight, FLOATS)
    check_shape("weight", weight, (x.shape[-1],))
    total = None
    if residual is not None:
        check_dtype("residual", residual, (x.dtype,))
        check_shape("residual", residual, tuple(x.shape))
        total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    codes, used = quantize_rows(
        x, dtype, source=RMS_NORM, mode=mode, other=residual, weight=weight.contiguous(), total=total,
        eps=eps, scale=scale, zero_point=zero_point, group_size=group_size or 0,
        column_major=column_major, scale_format=scale_format,
    )  # fmt: skip
    return codes, used, total


def silu_mul_quantize(
    gate: Tensor,
    up: Tensor,
    dtype: torch.dtype = torch.int8,
    *,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    group_size: int | None = None,
    column_major: bool = False,
    scale_format: ScaleFormat = "float32",
) -> tuple[Tensor, Tensor]:
    """(codes [M, K], scale) of silu(gate)·up; silu in float32, rounded to gate's dtype, so is the product.

    gate, up: one float dtype, [M, K]; rows may be strided, so the halves of one [M, 2K] tensor
    work: `silu_mul_quantize(*y.chunk(2, dim=-1))`. Scales as in `rms_norm_quantize`.
    """
    mode = _mode(scale, zero_point, group_size, dtype)
    check_dtype("up", up, (gate.dtype,))
    check_shape("up", up, tuple(gate.shape))
    return quantize_rows(
        gate, dtype, source=SILU_MUL, mode=mode, other=up, scale=scale, zero_point=zero_point,
        group_size=group_size or 0, column_major=column_major, scale_format=scale_format,
    )  # fmt: skip


def _mode(scale: Tensor | None, zero_point: Tensor | None, group_size: int | None, dtype: torch.dtype) -> int:
    if scale is not None:
        require(group_size is None, "expected a stored scale or a group size, found both")
        check_static(scale, zero_point, dtype)
        return STATIC
    require(zero_point is None, "expected a stored scale with a zero point, found none")
    if group_size is None:
        return TOKEN
    check_group(group_size)
    return GROUPS
