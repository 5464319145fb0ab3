"""The same product as matmul.py for sm90 and later: persistent, tiles loaded by tensor descriptors.

A variant of its own because tensor descriptors and persistent scheduling are NVIDIA's alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .targets import Target, core_count
from .tile import finish_tile, tile_position
from .tuned_tables import LaunchParameters


@triton.jit
def matmul_tma_kernel(
    a_desc, w_desc, out_ptr, a_scale_ptr, w_scale_ptr, bias_ptr, a_zero_ptr, w_sum_ptr, M, N, K, stride_om,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    INTEGER: tl.constexpr, PROMOTE_K: tl.constexpr,
    A_SCALE: tl.constexpr, W_SCALE: tl.constexpr, A_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """One program per core walks over the tiles; the descriptors pad with zeros beyond the edges."""
    ACC: tl.constexpr = tl.int32 if INTEGER else tl.float32
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        block_m, block_n = tile_position(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        m0, n0 = block_m * BLOCK_M, block_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
        for k in range(0, K, BLOCK_K):
            a = a_desc.load([m0, k])
            w = w_desc.load([n0, k])
            if PROMOTE_K > 0:
                acc = tl.dot(a, w.T, acc, max_num_imprecise_acc=PROMOTE_K, out_dtype=ACC)
            else:
                acc = tl.dot(a, w.T, acc, out_dtype=ACC)
        row_mask = tl.arange(0, BLOCK_M) < M - m0
        col_mask = tl.arange(0, BLOCK_N) < N - n0
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
        tl.store(
            out + offsets, value.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & col_mask[None, :]
        )


def matmul_tma(
    a: Tensor,
    w: Tensor,
    out: Tensor,
    a_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    a_zero_point: Tensor | None,
    w_sum: Tensor | None,
    launch: LaunchParameters,
    target: Target,
    modes: dict[str, Any],
) -> Tensor:
    """Fill and return `out`; arguments as `matmul` has checked them; rows of a and w must be aligned."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    (m, k), n = a.shape, w.shape[0]
    tiles = triton.cdiv(m, launch.block_m) * triton.cdiv(n, launch.block_n)
    matmul_tma_kernel[(min(tiles, core_count(a.device)),)](
        TensorDescriptor.from_tensor(a, [launch.block_m, launch.block_k]),
        TensorDescriptor.from_tensor(w, [launch.block_n, launch.block_k]),
        out, a_scale, w_scale, bias, a_zero_point, w_sum, m, n, k, n,
        BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_K=launch.block_k, GROUP_M=launch.group_m,
        INTEGER=a.dtype == torch.int8, PROMOTE_K=launch.promote_k, **modes, **launch.options(target),
    )  # fmt: skip
    return out
