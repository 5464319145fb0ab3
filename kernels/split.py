"""The second half of split-K: add the partial sums in a fixed order, then the epilogue.

Atomics would be one kernel fewer, and another result in every run.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import start
from .targets import Target
from .tile import finish_tile

BLOCK_M, BLOCK_N = 16, 128


@triton.jit(do_not_specialize=["M"])
def add_splits_kernel(
    raw_ptr, out_ptr, a_scale_ptr, w_scale_ptr, bias_ptr, a_zero_ptr, w_sum_ptr, M, N,
    SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    A_SCALE: tl.constexpr, W_SCALE: tl.constexpr, A_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """raw [SPLIT_K, M, N] → out [M, N], both contiguous; one program per tile."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    m0 = (tl.program_id(0) // blocks_n) * BLOCK_M
    n0 = (tl.program_id(0) % blocks_n) * BLOCK_N
    row_mask = tl.arange(0, BLOCK_M) < M - m0
    col_mask = tl.arange(0, BLOCK_N) < N - n0
    mask = row_mask[:, None] & col_mask[None, :]
    start = m0.to(tl.int64) * N + n0
    offsets = tl.arange(0, BLOCK_M)[:, None] * N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.load(raw_ptr + start + offsets, mask=mask, other=0.0)
    for _ in range(1, SPLIT_K):
        start += M.to(tl.int64) * N
        acc += tl.load(raw_ptr + start + offsets, mask=mask, other=0.0)
    value = finish_tile(
        acc,
        a_scale_ptr + m0 if A_SCALE == 2 else a_scale_ptr,
        w_scale_ptr + n0 if W_SCALE == 2 else w_scale_ptr,
        bias_ptr + n0 if HAS_BIAS else None,
        a_zero_ptr + m0 if A_ZERO == 2 else a_zero_ptr,
        w_sum_ptr + n0 if A_ZERO > 0 else None,
        row_mask, col_mask, BLOCK_M, BLOCK_N, A_SCALE, W_SCALE, A_ZERO, HAS_BIAS,
    )  # fmt: skip
    tl.store(out_ptr + m0.to(tl.int64) * N + n0 + offsets, value.to(out_ptr.dtype.element_ty), mask=mask)


def add_splits(
    raw: Tensor,
    out: Tensor,
    a_scale: Tensor | None,
    w_scale: Tensor | None,
    bias: Tensor | None,
    a_zero_point: Tensor | None,
    w_sum: Tensor | None,
    target: Target,
    modes: dict[str, Any],
) -> None:
    """Fill `out` [M, N] from raw [splits, M, N] (int32 or float32), added in the order of the splits."""
    split, m, n = raw.shape
    options = {} if target.backend == "npu" else {"num_warps": 4, "enable_fp_fusion": False}
    grid = (triton.cdiv(m, BLOCK_M) * triton.cdiv(n, BLOCK_N),)
    start.launch(
        add_splits_kernel, grid, out.device,
        raw, out, a_scale, w_scale, bias, a_zero_point, w_sum, m, n,
        SPLIT_K=split, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, **modes, **options,
    )  # fmt: skip
