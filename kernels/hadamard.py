"""Online Walsh–Hadamard transform along the last dimension, in blocks of a power of two.

Rotating activations before a quantized down projection spreads their outliers (QuaRot,
arXiv 2404.00456); the weight is rotated offline by the same matrix.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import start
from .checks import FLOATS, check_dtype, check_refusal, contiguous_rows, require
from .targets import Target, device_target

# Of a tile; 256 rows are what checks.MAX_ROW_STRIDE allows for.
_ELEMENTS, _MAX_ROWS, _MAX_BLOCK = 2048, 256, 4096


@triton.jit(do_not_specialize=["rows"])
def hadamard_kernel(
    x_ptr, out_ptr, rows, blocks, factor, stride_xm, stride_om,
    ROWS: tl.constexpr, SIZE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Each program takes ROWS rows × one block of SIZE = 2^STAGES elements.

    Every stage is the same: neighbours become their sum and difference, sums to the first half
    and differences to the second. That moves each index bit one place to the right, so after
    STAGES stages every bit was transformed once and is back in its place.
    """
    tile = tl.program_id(0)
    row = tile // blocks * ROWS
    column = tile % blocks * SIZE
    offsets = tl.arange(0, ROWS)[:, None]
    mask = offsets < rows - row
    x = tl.load(
        x_ptr + tl.cast(row, tl.int64) * stride_xm + column + offsets * stride_xm + tl.arange(0, SIZE)[None, :],
        mask=mask, other=0.0,
    ).to(tl.float32)  # fmt: skip
    for _ in tl.static_range(STAGES):
        left, right = tl.split(tl.reshape(x, (ROWS, SIZE // 2, 2)))
        x = tl.reshape(tl.permute(tl.join(left + right, left - right), (0, 2, 1)), (ROWS, SIZE))
    out = out_ptr + tl.cast(row, tl.int64) * stride_om + column + offsets * stride_om
    tl.store(out + tl.arange(0, SIZE)[None, :], (x * factor).to(out_ptr.dtype.element_ty), mask=mask)


def refusal(block_size: int, target: Target) -> str | None:
    """Why `target` cannot transform blocks of so many elements; None where it can."""
    if target.backend == "npu":
        return (
            "expected an NVIDIA or AMD device: Ascend's compiler cannot place the transform's interleaved "
            "halves; multiply by the Hadamard matrix with torch.matmul there"
        )
    if block_size > _MAX_BLOCK:
        return f"expected a block size of at most {_MAX_BLOCK}, found {block_size}"
    return None


def hadamard(x: Tensor, block_size: int, *, factor: float | None = None) -> Tensor:
    """x · (I ⊗ H) · factor along the last dimension: a new tensor of x's shape and dtype.

    x: float16, bfloat16 or float32 [..., K]; K a multiple of block_size, a power of two from 2 to
    4096 (1536 = 3 · 512). H is Sylvester's matrix, H[i, j] = (−1)^popcount(i & j), in its natural
    order; it is symmetric, and with factor 1/√block_size (the default) its own inverse. Sums are
    float32, rounded once. Raises ValueError for other shapes and dtypes.
    """
    check_dtype("x", x, FLOATS)
    require(x.dim() >= 1, "expected at least one dimension, found a scalar")
    require(
        block_size >= 2 and block_size & (block_size - 1) == 0,
        f"expected a block size that is a power of two from 2 to {_MAX_BLOCK}, found {block_size}",
    )
    k = x.shape[-1]
    require(
        k % block_size == 0,
        f"expected a last dimension that is a multiple of the block size {block_size}, found {k}; "
        f"the largest power of two that divides it is {k & -k}",
    )
    flat = contiguous_rows(x.reshape(-1, k) if k else x.reshape(0, 0))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    check_refusal(refusal(block_size, device_target(x.device)))
    rows = max(1, min(_MAX_ROWS, _ELEMENTS // block_size))
    rows = min(rows, triton.next_power_of_2(flat.shape[0]))
    tiles = triton.cdiv(flat.shape[0], rows) * (k // block_size)
    start.launch(
        hadamard_kernel, (tiles,), x.device,
        flat, out, flat.shape[0], k // block_size,
        1.0 / math.sqrt(block_size) if factor is None else factor, flat.stride(0), k,
        ROWS=rows, SIZE=block_size, STAGES=block_size.bit_length() - 1, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out
