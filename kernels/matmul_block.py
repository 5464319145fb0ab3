"""int8 or fp8 product with activation scales per 1×128 group and weight scales per 128×128 block."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import (
    CODES,
    FLOATS,
    check_device,
    check_dtype,
    check_matrices,
    check_shape,
    contiguous_rows,
    dtype_name,
    require,
    rows_aligned,
)
from .inner import launch_inner, weight_scale_modes
from .launch import choose_launch
from .targets import device_target
from .tuned_tables import LaunchParameters


def matmul_block(
    a: Tensor,
    w: Tensor,
    a_scale: Tensor,
    w_scale: Tensor,
    *,
    bias: Tensor | None = None,
    block_shape: tuple[int, int] = (128, 128),
    out_dtype: torch.dtype = torch.bfloat16,
    launch: LaunchParameters | None = None,
) -> Tensor:
    """[M, N] = Σ over blocks of K of (a·wᵀ)·a_scale·w_scale, + bias, rounded to `out_dtype`.

    a: int8 or fp8 [M, K]. w: the same dtype [N, K], as stored. a_scale: float32 [M, ⌈K/c⌉] in
    any strides (column-major loads best: `quantize_per_group(…, column_major=True)`).
    w_scale: float32 or E8M0 as uint8 [⌈N/r⌉, ⌈K/c⌉], (r, c) = block_shape; N and K may be ragged. bias: float [N].
    block_shape: r a multiple of 16 (or 1: groups), c of 32.

    Each block's partial product (exact for int8) is scaled and added in float32 (the DeepSeek-V3
    recipe). Deterministic; M = 0 and K = 0 launch nothing. Raises ValueError as `matmul` does.
    """
    m, n, k = check_matrices(a, w)
    check_dtype("activations", a, CODES)
    require(a.dtype == w.dtype, f"expected one dtype, found {dtype_name(a.dtype)} × {dtype_name(w.dtype)}")
    require(out_dtype in FLOATS, f"expected out_dtype float16, bfloat16 or float32, found {out_dtype}")
    check_device(a, a_scale=a_scale, w_scale=w_scale, bias=bias)
    check_dtype("a_scale", a_scale, (torch.float32,))
    modes = weight_scale_modes(w_scale, n, k, block_shape)
    check_shape("a_scale", a_scale, (m, -(-k // block_shape[1])))
    if bias is not None:
        check_dtype("bias", bias, FLOATS)
        check_shape("bias", bias, (n,))
        bias = bias.contiguous()
    out = torch.empty((m, n), dtype=out_dtype, device=a.device)
    if m == 0 or n == 0:
        return out
    if k == 0:
        return out.zero_() if bias is None else out.copy_(bias)
    a, target = contiguous_rows(a), device_target(a.device)
    if launch is None:
        launch = choose_launch(
            "matmul_block", m=m, n=n, k=k, a_dtype=dtype_name(a.dtype), w_dtype=dtype_name(w.dtype),
            target=target, group_n=modes.group_n, group_k=modes.group_k,
            aligned=rows_aligned(a, w, target=target),
        )  # fmt: skip
    return launch_inner(
        a, w, a_scale, w_scale, bias, out, modes,
        a_decode=0, w_decode=0, convert=0, launch=launch, target=target,
    )  # fmt: skip
