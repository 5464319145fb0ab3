"""OCP microscaling product: e4m3fn × e4m3fn with an E8M0 scale per 32 elements of K on both sides."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import start
from .checks import (
    FLOATS,
    check_device,
    check_dtype,
    check_matrices,
    check_shape,
    contiguous_rows,
    require,
    rows_aligned,
)
from .inner import WeightScale, launch_inner, weight_bytes
from .launch import choose_launch
from .targets import device_target
from .tile import finish_tile, tile_position
from .tuned_tables import LaunchParameters

GROUP = 32


@triton.jit(do_not_specialize=["M"])
def matmul_mxfp8_kernel(
    a_ptr, w_ptr, out_ptr, a_scale_ptr, w_scale_ptr, bias_ptr, M, N, K, groups,
    stride_am, stride_wn, stride_om,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """One program per tile; `tl.dot_scaled` takes the scales into the matrix instruction.

    Scales are uint8 [M, groups] and [N, groups], contiguous, groups = ⌈K/32⌉.
    """
    block_m, block_n = tile_position(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m0, n0 = block_m * BLOCK_M, block_n * BLOCK_N
    rows, cols, ks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    gs = tl.arange(0, BLOCK_K // 32)
    row_mask, col_mask = rows < M - m0, cols < N - n0
    a_ptr += m0.to(tl.int64) * stride_am
    w_ptr += n0.to(tl.int64) * stride_wn
    a_scale_ptr += m0.to(tl.int64) * groups
    w_scale_ptr += n0.to(tl.int64) * groups
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        a_mask, w_mask = row_mask[:, None], col_mask[None, :]
        as_mask, ws_mask = row_mask[:, None], col_mask[:, None]
        if not EVEN_K:
            a_mask = a_mask & (ks < K - k)[None, :]
            w_mask = w_mask & (ks < K - k)[:, None]
            as_mask = as_mask & (gs < groups - k // 32)[None, :]
            ws_mask = ws_mask & (gs < groups - k // 32)[None, :]
        a = tl.load(a_ptr + k + rows[:, None] * stride_am + ks[None, :], mask=a_mask, other=0.0)
        w = tl.load(w_ptr + k + cols[None, :] * stride_wn + ks[:, None], mask=w_mask, other=0.0)
        # Beyond the edges the scale is 1 (127): a garbage NaN would outlive the zeros.
        a_scale = tl.load(
            a_scale_ptr + k // 32 + rows[:, None] * groups + gs[None, :], mask=as_mask, other=127
        )
        w_scale = tl.load(
            w_scale_ptr + k // 32 + cols[:, None] * groups + gs[None, :], mask=ws_mask, other=127
        )
        acc = tl.dot_scaled(a, a_scale, "e4m3", w, w_scale, "e4m3", acc)
    value = finish_tile(
        acc, None, None, bias_ptr + n0 if HAS_BIAS else None, None, None,
        row_mask, col_mask, BLOCK_M, BLOCK_N, 0, 0, 0, HAS_BIAS,
    )  # fmt: skip
    out = out_ptr + m0.to(tl.int64) * stride_om + n0
    offsets = rows[:, None] * stride_om + cols[None, :]
    tl.store(out + offsets, value.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & col_mask[None, :])


def matmul_mxfp8(
    a: Tensor,
    w: Tensor,
    a_scale: Tensor,
    w_scale: Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    launch: LaunchParameters | None = None,
) -> Tensor:
    """[M, N] = Σ over groups of 32 of (a·wᵀ)·2^(a_scale−127)·2^(w_scale−127), + bias.

    a: float8_e4m3fn [M, K]. w: float8_e4m3fn [N, K], as stored. a_scale [M, ⌈K/32⌉], w_scale
    [N, ⌈K/32⌉]: E8M0 as uint8 or float8_e8m0fnu (255 is NaN and gives NaN). bias: float [N].
    out_dtype: float16, bfloat16 or float32.

    Where the target scales in its matrix unit (sm100, sm120, gfx950) that is used; elsewhere
    each group's product is scaled in float32, on fp8 units where there are such, else on fp16
    decoded from bytes. Deterministic. Raises ValueError as `matmul` does.
    """
    m, n, k = check_matrices(a, w)
    for name, codes in (("activations", a), ("the weight", w)):
        check_dtype(name, codes, (torch.float8_e4m3fn,))
    require(out_dtype in FLOATS, f"expected out_dtype float16, bfloat16 or float32, found {out_dtype}")
    check_device(a, a_scale=a_scale, w_scale=w_scale, bias=bias)
    for name, scale, rows in (("a_scale", a_scale, m), ("w_scale", w_scale, n)):
        check_dtype(name, scale, (torch.uint8, torch.float8_e8m0fnu))
        check_shape(name, scale, (rows, -(-k // GROUP)))
    a_scale, w_scale = a_scale.view(torch.uint8), w_scale.view(torch.uint8)
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
            "matmul_mxfp8", m=m, n=n, k=k, a_dtype="e4m3fn", w_dtype="e4m3fn", target=target,
            group_n=0, group_k=0 if target.scaled_dot else GROUP, aligned=rows_aligned(a, w, target=target),
        )  # fmt: skip
    if not target.scaled_dot:
        a, decode = weight_bytes(a, target)
        w, _ = weight_bytes(w, target)
        modes = WeightScale(groups=2, outer=0, group_k=GROUP)
        return launch_inner(
            a, w, a_scale, w_scale, bias, out, modes,
            a_decode=decode, w_decode=decode, convert=0, launch=launch, target=target,
        )  # fmt: skip
    grid = (triton.cdiv(m, launch.block_m) * triton.cdiv(n, launch.block_n),)
    start.launch(
        matmul_mxfp8_kernel, grid, a.device,
        a, w, out, a_scale.contiguous(), w_scale.contiguous(), bias, m, n, k, -(-k // GROUP),
        a.stride(0), w.stride(0), n,
        BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_K=launch.block_k, GROUP_M=launch.group_m,
        EVEN_K=k % launch.block_k == 0, HAS_BIAS=bias is not None, **launch.options(target),
    )  # fmt: skip
    return out
