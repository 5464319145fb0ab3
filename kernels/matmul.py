"""int8 or fp8 product with a scale per token and per output channel: the primary path.

The scales stay outside the sum, so the inner loop is loads and matrix instructions only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import start
from .checks import (
    CODES,
    FLOATS,
    MAX_K_INT8_ZERO_POINT,
    check_device,
    check_dtype,
    check_matrices,
    check_shape,
    contiguous_rows,
    dtype_name,
    require,
    row_scale,
    rows_aligned,
)
from .launch import choose_launch
from .operands import flattens, operands
from .split import add_splits
from .targets import core_count, device_target
from .tile import finish_tile, multiply_tile, tile_position
from .tuned_tables import LaunchParameters


@triton.jit
def _one_tile(
    tile, a_ptr, w_ptr, out_ptr, a_scale_ptr, w_scale_ptr, bias_ptr, a_zero_ptr, w_sum_ptr,
    M, N, K, k_per_split, stride_am, stride_wn, stride_om,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr, EVEN_K: tl.constexpr, INTEGER: tl.constexpr, PROMOTE_K: tl.constexpr,
    A_SCALE: tl.constexpr, W_SCALE: tl.constexpr, A_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
    LOAD: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    split = tile // tiles
    block_m, block_n = tile_position(tile % tiles, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m0, n0 = block_m * BLOCK_M, block_n * BLOCK_N
    row_mask = tl.arange(0, BLOCK_M) < M - m0
    col_mask = tl.arange(0, BLOCK_N) < N - n0
    if FLATTEN:  # bounds that no tile changes are what lets the loops be one
        k_start, k_end = 0, K
    else:
        k_start = split * k_per_split
        k_end = tl.minimum(K, k_start + k_per_split)
    acc = multiply_tile(
        a_ptr, w_ptr, None, None, m0, n0, row_mask, col_mask, k_start, k_end,
        stride_am, stride_wn, 0, 0, 0, 0, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, INTEGER, PROMOTE_K,
        False, 0, 1, 0, 0, False, False, LOAD,
    )  # fmt: skip
    if SPLIT_K > 1:
        # The workspace [SPLIT_K, M, N] of raw sums; scales come after they are added.
        out_ptr += split.to(tl.int64) * M * N
        value = acc
    else:
        value = finish_tile(
            acc,
            a_scale_ptr + m0 if A_SCALE == 2 else a_scale_ptr,
            w_scale_ptr + n0 if W_SCALE == 2 else w_scale_ptr,
            bias_ptr + n0 if HAS_BIAS else None,
            a_zero_ptr + m0 if A_ZERO == 2 else a_zero_ptr,
            w_sum_ptr + n0 if A_ZERO > 0 else None,
            row_mask, col_mask, BLOCK_M, BLOCK_N, A_SCALE, W_SCALE, A_ZERO, HAS_BIAS,
        )  # fmt: skip
    out = out_ptr + m0.to(tl.int64) * stride_om + n0
    offsets = tl.arange(0, BLOCK_M)[:, None] * stride_om + tl.arange(0, BLOCK_N)[None, :]
    tl.store(out + offsets, value.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & col_mask[None, :])


@triton.jit(do_not_specialize=["M"])
def matmul_kernel(
    a_ptr, w_ptr, out_ptr, a_scale_ptr, w_scale_ptr, bias_ptr, a_zero_ptr, w_sum_ptr,
    M, N, K, k_per_split, stride_am, stride_wn, stride_om,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr, EVEN_K: tl.constexpr, INTEGER: tl.constexpr, PROMOTE_K: tl.constexpr,
    A_SCALE: tl.constexpr, W_SCALE: tl.constexpr, A_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
    LOAD: tl.constexpr, PERSISTENT: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """One program per tile and split of K, or, where PERSISTENT, one per core.

    FLATTEN makes the loops over tiles and over K one: the next tile is loaded while results are stored. What a loop
    runs over cannot be chosen by a condition in Triton, and Ascend's has no such loops: the call stands in each.
    """
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N) * SPLIT_K
    if FLATTEN:
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _one_tile(
                tile, a_ptr, w_ptr, out_ptr, a_scale_ptr, w_scale_ptr, bias_ptr, a_zero_ptr, w_sum_ptr,
                M, N, K, k_per_split, stride_am, stride_wn, stride_om, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
                SPLIT_K, EVEN_K, INTEGER, PROMOTE_K, A_SCALE, W_SCALE, A_ZERO, HAS_BIAS, LOAD, FLATTEN,
            )  # fmt: skip
    elif PERSISTENT:
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            _one_tile(
                tile, a_ptr, w_ptr, out_ptr, a_scale_ptr, w_scale_ptr, bias_ptr, a_zero_ptr, w_sum_ptr,
                M, N, K, k_per_split, stride_am, stride_wn, stride_om, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
                SPLIT_K, EVEN_K, INTEGER, PROMOTE_K, A_SCALE, W_SCALE, A_ZERO, HAS_BIAS, LOAD, FLATTEN,
            )  # fmt: skip
    else:
        _one_tile(
            tl.program_id(0), a_ptr, w_ptr, out_ptr, a_scale_ptr, w_scale_ptr, bias_ptr, a_zero_ptr, w_sum_ptr,
            M, N, K, k_per_split, stride_am, stride_wn, stride_om, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M,
            SPLIT_K, EVEN_K, INTEGER, PROMOTE_K, A_SCALE, W_SCALE, A_ZERO, HAS_BIAS, LOAD, FLATTEN,
        )  # fmt: skip


def matmul(
    a: Tensor,
    w: Tensor,
    a_scale: Tensor,
    w_scale: Tensor,
    *,
    bias: Tensor | None = None,
    a_zero_point: Tensor | None = None,
    w_sum: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    fast_accum: bool = False,
    launch: LaunchParameters | None = None,
) -> Tensor:
    """[M, N] = (a·wᵀ − a_zero_point · w_sum) · a_scale · w_scale + bias, rounded to `out_dtype`.

    a: int8 or fp8 [M, K], rows may be strided. w: the same dtype [N, K], as stored on disk.
    a_scale: float32 per token [M, 1] or per tensor [1] or []. w_scale: float32 per channel
    [N, 1] or per tensor [1]. bias: float [N].
    a_zero_point (int8 only): int8 or int32 per token [M, 1] or per tensor [1]; it needs `w_sum`,
    int32 [N], the sums of w's rows: `w.sum(1, dtype=torch.int32)`, computed once at load.
    out_dtype: float16, bfloat16 or float32. fast_accum: see below. `launch` overrides `choose_launch`.

    The sum is exact for int8 (int32; K up to 131,071, or 65,793 with a zero point) and float32
    for fp8: on sm90, whose matrix unit keeps about 14 bits of a sum of fp8 products, they are added to a
    float32 accumulator after every 128 of K, unless `fast_accum` is set, which is faster and less exact
    (torch._scaled_mm's `use_fast_accum`). The epilogue is float32, in the order written above, without
    fused multiply-adds. The result does not vary from run to run: split-K adds a workspace in a fixed
    order.
    M = 0 and K = 0 launch nothing (K = 0 gives the bias). Raises ValueError with what was
    expected for any other dtype, shape or device, and where the target has no such product.
    """
    m, n, k = check_matrices(a, w)
    check_dtype("activations", a, CODES)
    require(a.dtype == w.dtype, f"expected one dtype, found {dtype_name(a.dtype)} × {dtype_name(w.dtype)}")
    require(out_dtype in FLOATS, f"expected out_dtype float16, bfloat16 or float32, found {out_dtype}")
    check_device(a, a_scale=a_scale, w_scale=w_scale, bias=bias, a_zero_point=a_zero_point, w_sum=w_sum)
    a_scale, a_mode = row_scale("a_scale", a_scale, m)
    w_scale, w_mode = row_scale("w_scale", w_scale, n)
    zero_mode = 0
    if bias is not None:
        check_dtype("bias", bias, FLOATS)
        check_shape("bias", bias, (n,))
        bias = bias.contiguous()
    if a_zero_point is not None:
        require(a.dtype == torch.int8, f"expected int8 codes with a zero point, found {dtype_name(a.dtype)}")
        if w_sum is None:
            raise ValueError("expected w_sum with a zero point: w.sum(1, dtype=torch.int32)")
        require(
            k <= MAX_K_INT8_ZERO_POINT, f"expected K ≤ {MAX_K_INT8_ZERO_POINT} with a zero point, found {k}"
        )
        check_dtype("a_zero_point", a_zero_point, (torch.int8, torch.int32))
        check_dtype("w_sum", w_sum, (torch.int32,))
        check_shape("w_sum", w_sum, (n,))
        w_sum = w_sum.contiguous()
        zero_mode = 1 if a_zero_point.numel() == 1 else 2
        if zero_mode == 2:
            require(
                tuple(a_zero_point.shape) in ((m, 1), (m,)),
                f"expected a_zero_point of shape [{m}, 1] or [1], found {list(a_zero_point.shape)}",
            )
            a_zero_point = a_zero_point.contiguous()
    out = torch.empty((m, n), dtype=out_dtype, device=a.device)
    if m == 0 or n == 0:
        return out
    if k == 0:
        return out.zero_() if bias is None else out.copy_(bias)

    a = contiguous_rows(a)
    target = device_target(a.device)
    if launch is None:
        name = dtype_name(a.dtype)
        launch = choose_launch(
            "matmul", m=m, n=n, k=k, a_dtype=name, w_dtype=name, target=target,
            aligned=rows_aligned(a, w, target=target), fast_accum=fast_accum,
        )  # fmt: skip
    modes = {"A_SCALE": a_mode, "W_SCALE": w_mode, "A_ZERO": zero_mode, "HAS_BIAS": bias is not None}
    split = launch.split_k
    k_per_split = triton.cdiv(triton.cdiv(k, launch.block_k), split) * launch.block_k
    integer = a.dtype == torch.int8
    acc_dtype = torch.int32 if integer else torch.float32
    raw = out if split == 1 else torch.empty((split, m, n), dtype=acc_dtype, device=a.device)
    tiles = triton.cdiv(m, launch.block_m) * triton.cdiv(n, launch.block_n) * split
    grid = (min(tiles, core_count(a.device)) if launch.persistent else tiles,)
    a_rows, w_rows, load = operands(a, w, launch, target)
    start.launch(
        matmul_kernel, grid, a.device,
        a_rows, w_rows, raw, a_scale, w_scale, bias, a_zero_point, w_sum,
        m, n, k, k_per_split, a.stride(0), w.stride(0), n,
        BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_K=launch.block_k, GROUP_M=launch.group_m,
        SPLIT_K=split, EVEN_K=k % launch.block_k == 0, INTEGER=integer, PROMOTE_K=launch.promote_k,
        LOAD=load, PERSISTENT=launch.persistent, FLATTEN=flattens(launch, raw, target), **modes,
        **launch.options(target),
    )  # fmt: skip
    if split > 1:
        add_splits(raw, out, a_scale, w_scale, bias, a_zero_point, w_sum, target, modes)
    return out
