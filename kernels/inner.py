"""The kernel behind block, weight-only and (decoded) mxfp8 products: scales inside the sum.

One kernel, because these differ only in constants: which operand has scales per group of K,
whether bytes are decoded first, and what is left for the epilogue.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import start
from .checks import check_dtype, check_refusal, dtype_name
from .launch import block_refusal
from .operands import flattens, operands
from .split import add_splits
from .targets import Target, core_count
from .tile import CAST, CUT, finish_tile, multiply_tile, tile_position
from .tuned_tables import LaunchParameters


@triton.jit
def scaled_tile(
    a_ptr, w_ptr, out_ptr, a_scale_ptr, w_scale_ptr, bias_ptr, routed_ptr,
    m0, m_end, n0, w_row, N, k_start, k_end,
    stride_am, stride_wn, stride_om, stride_asm, stride_ask, stride_wsn, stride_wsk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, INTEGER: tl.constexpr, PROMOTE_K: tl.constexpr,
    A_GROUPS: tl.constexpr, W_GROUPS: tl.constexpr, GROUP_N: tl.constexpr, GROUP_K: tl.constexpr,
    A_DECODE: tl.constexpr, W_DECODE: tl.constexpr, CONVERT: tl.constexpr, SPLIT_FP32: tl.constexpr,
    A_SCALE: tl.constexpr, W_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ROUTED: tl.constexpr,
    RAW: tl.constexpr, LOAD: tl.constexpr,
):  # fmt: skip
    """Rows m0 … m_end of one tile: product, epilogue, store. RAW stores the sum and nothing else.

    w_row: the weight's row, of what w_ptr points to, where column n0 comes from.
    """
    row_mask = tl.arange(0, BLOCK_M) < m_end - m0
    col_mask = tl.arange(0, BLOCK_N) < N - n0
    row = m0.to(tl.int64)
    col = n0.to(tl.int64)
    a_groups = a_scale_ptr
    if A_GROUPS:
        a_groups = a_scale_ptr + row * stride_asm
    w_groups = w_scale_ptr
    if W_GROUPS == 1:
        w_groups = w_scale_ptr + (n0 // GROUP_N) * stride_wsn
    elif W_GROUPS == 2:
        w_groups = w_scale_ptr + col * stride_wsn
    acc = multiply_tile(
        a_ptr, w_ptr, a_groups, w_groups, m0, w_row, row_mask, col_mask, k_start, k_end,
        stride_am, stride_wn, stride_asm, stride_ask, stride_wsn, stride_wsk,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, INTEGER, PROMOTE_K,
        A_GROUPS, W_GROUPS, GROUP_K, A_DECODE, W_DECODE, CONVERT, SPLIT_FP32, LOAD,
    )  # fmt: skip
    if RAW:
        value = acc
    else:
        value = finish_tile(
            acc,
            a_scale_ptr + row if A_SCALE == 2 else a_scale_ptr,
            w_scale_ptr + n0 if W_SCALE == 2 else w_scale_ptr,
            bias_ptr + n0 if HAS_BIAS else None,
            None, None, row_mask, col_mask, BLOCK_M, BLOCK_N, A_SCALE, W_SCALE, 0, HAS_BIAS,
        )  # fmt: skip
        if HAS_ROUTED:
            value = (
                value * tl.load(routed_ptr + row + tl.arange(0, BLOCK_M), mask=row_mask, other=0.0)[:, None]
            )
    offsets = tl.arange(0, BLOCK_M)[:, None] * stride_om + tl.arange(0, BLOCK_N)[None, :]
    tl.store(
        out_ptr + row * stride_om + n0 + offsets,
        value.to(out_ptr.dtype.element_ty),
        mask=row_mask[:, None] & col_mask[None, :],
    )


@triton.jit
def _one_tile(
    tile, a_ptr, w_ptr, out_ptr, a_scale_ptr, w_scale_ptr, bias_ptr, M, N, K, k_per_split,
    stride_am, stride_wn, stride_om, stride_asm, stride_ask, stride_wsn, stride_wsk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr, EVEN_K: tl.constexpr, INTEGER: tl.constexpr,
    A_GROUPS: tl.constexpr, W_GROUPS: tl.constexpr, GROUP_N: tl.constexpr, GROUP_K: tl.constexpr,
    A_DECODE: tl.constexpr, W_DECODE: tl.constexpr, CONVERT: tl.constexpr, SPLIT_FP32: tl.constexpr,
    W_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, LOAD: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    split = tile // tiles
    block_m, block_n = tile_position(tile % tiles, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    if FLATTEN:  # bounds that no tile changes are what lets the loops be one
        k_start, k_end = 0, K
    else:
        k_start = split * k_per_split
        k_end = tl.minimum(K, k_start + k_per_split)
    if SPLIT_K > 1:
        out_ptr += split.to(tl.int64) * M * N
    n0 = block_n * BLOCK_N
    scaled_tile(
        a_ptr, w_ptr, out_ptr, a_scale_ptr, w_scale_ptr, bias_ptr, None,
        block_m * BLOCK_M, M, n0, n0, N, k_start, k_end,
        stride_am, stride_wn, stride_om, stride_asm, stride_ask, stride_wsn, stride_wsk,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, INTEGER, 0, A_GROUPS, W_GROUPS, GROUP_N, GROUP_K,
        A_DECODE, W_DECODE, CONVERT, SPLIT_FP32, 0, W_SCALE, HAS_BIAS, False, SPLIT_K > 1, LOAD,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def inner_kernel(
    a_ptr, w_ptr, out_ptr, a_scale_ptr, w_scale_ptr, bias_ptr, M, N, K, k_per_split,
    stride_am, stride_wn, stride_om, stride_asm, stride_ask, stride_wsn, stride_wsk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr, EVEN_K: tl.constexpr, INTEGER: tl.constexpr,
    A_GROUPS: tl.constexpr, W_GROUPS: tl.constexpr, GROUP_N: tl.constexpr, GROUP_K: tl.constexpr,
    A_DECODE: tl.constexpr, W_DECODE: tl.constexpr, CONVERT: tl.constexpr, SPLIT_FP32: tl.constexpr,
    W_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, LOAD: tl.constexpr, PERSISTENT: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    """One program per tile and split of K, or, where PERSISTENT, one per core.

    FLATTEN makes the loops over tiles and over K one: the next tile is loaded while results are stored. What a loop
    runs over cannot be chosen by a condition in Triton, and Ascend's has no such loops: the call stands in each.
    """
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N) * SPLIT_K
    if FLATTEN:
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _one_tile(
                tile, a_ptr, w_ptr, out_ptr, a_scale_ptr, w_scale_ptr, bias_ptr, M, N, K, k_per_split,
                stride_am, stride_wn, stride_om, stride_asm, stride_ask, stride_wsn, stride_wsk,
                BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SPLIT_K, EVEN_K, INTEGER, A_GROUPS, W_GROUPS,
                GROUP_N, GROUP_K, A_DECODE, W_DECODE, CONVERT, SPLIT_FP32, W_SCALE, HAS_BIAS, LOAD, FLATTEN,
            )  # fmt: skip
    elif PERSISTENT:
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            _one_tile(
                tile, a_ptr, w_ptr, out_ptr, a_scale_ptr, w_scale_ptr, bias_ptr, M, N, K, k_per_split,
                stride_am, stride_wn, stride_om, stride_asm, stride_ask, stride_wsn, stride_wsk,
                BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SPLIT_K, EVEN_K, INTEGER, A_GROUPS, W_GROUPS,
                GROUP_N, GROUP_K, A_DECODE, W_DECODE, CONVERT, SPLIT_FP32, W_SCALE, HAS_BIAS, LOAD, FLATTEN,
            )  # fmt: skip
    else:
        _one_tile(
            tl.program_id(0), a_ptr, w_ptr, out_ptr, a_scale_ptr, w_scale_ptr, bias_ptr, M, N, K, k_per_split,
            stride_am, stride_wn, stride_om, stride_asm, stride_ask, stride_wsn, stride_wsk,
            BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SPLIT_K, EVEN_K, INTEGER, A_GROUPS, W_GROUPS,
            GROUP_N, GROUP_K, A_DECODE, W_DECODE, CONVERT, SPLIT_FP32, W_SCALE, HAS_BIAS, LOAD, FLATTEN,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class WeightScale:
    """Where a weight's scales belong: inside the sum, or in the epilogue."""

    groups: int
    """W_GROUPS of `multiply_tile`: 0 none inside, 1 per block, 2 per channel and group of K."""
    outer: int
    """W_SCALE of `finish_tile`: 0 none, 1 per tensor, 2 per channel."""
    group_n: int = 0
    """Channels and elements of K per scale inside the sum, as `choose_launch` takes them: 0 where one has its own."""
    group_k: int = 0


def weight_scale_modes(scale: Tensor, n: int, k: int, block_shape: tuple[int, int] | None) -> WeightScale:
    """Check a weight's scale [..., N, K] against its block shape. Leading dimensions are the caller's.

    None: per channel [N, 1] or per tensor (one element). (1, g): per group [N, ⌈K/g⌉].
    (r, c): per block [⌈N/r⌉, ⌈K/c⌉]. float32, or per group and block also E8M0 as uint8. Raises ValueError
    where shape or dtype is another one.
    """
    check_dtype("w_scale", scale, (torch.float32,) if block_shape is None else (torch.float32, torch.uint8))
    if block_shape is None:
        if scale.shape[-2:] == (n, 1) or (scale.dim() == 1 and scale.shape == (n,)):
            return WeightScale(groups=0, outer=2)
        if scale.numel() == 1 or scale.shape[-2:] == (1, 1):
            return WeightScale(groups=0, outer=1)
        raise ValueError(
            f"expected w_scale of shape [{n}, 1] or [1], found {list(scale.shape)}; "
            "for groups or blocks give block_shape"
        )
    rows, cols = block_shape
    check_refusal(block_refusal(rows, cols))
    expected = (-(-n // rows), -(-k // cols))
    if tuple(scale.shape[-2:]) != expected:
        raise ValueError(
            f"expected w_scale of shape {list(expected)} for a weight [{n}, {k}] in blocks of "
            f"{rows}×{cols}, found {list(scale.shape)}"
        )
    return WeightScale(groups=2 if rows == 1 else 1, outer=0, group_n=rows if rows > 1 else 0, group_k=cols)


def weight_bytes(w: Tensor, target: Target) -> tuple[Tensor, int]:
    """(weight as the kernel reads it, W_DECODE): fp8 is viewed as bytes where the target has none of it."""
    if w.dtype == torch.uint8:
        return w.view(torch.int8), 2
    if w.dtype == torch.int8 or dtype_name(w.dtype) == target.fp8:
        return w, 0
    return w.view(torch.int8), 1


def conversion(w: Tensor, x: torch.dtype, target: Target) -> tuple[Tensor, int, int]:
    """(weight as the kernel reads it, W_DECODE, CONVERT) beside activations of dtype `x`."""
    codes, decode = weight_bytes(w, target)
    if x == torch.float16 or not target.cuts_bfloat16:
        return codes, decode, CAST.value
    return codes, 3 if decode == 1 else decode, CUT.value


def loadable(scale: Tensor, target: Target) -> Tensor:
    """Scales [rows, groups] as the target loads them: group-major on Ascend, else as they are.

    Reading a column of them with a long stride overflows Ascend's buffer. Stored so, nothing is copied.
    """
    if target.backend != "npu" or scale.stride(-2) == 1:
        return scale
    return scale.transpose(-1, -2).contiguous().transpose(-1, -2)


def launch_inner(
    a: Tensor,
    w: Tensor,
    a_scale: Tensor | None,
    w_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    modes: WeightScale,
    *,
    a_decode: int,
    w_decode: int,
    convert: int,
    launch: LaunchParameters,
    target: Target,
) -> Tensor:
    """Fill and return `out` [M, N]; arguments already checked, a_scale [M, groups] or None."""
    (m, k), n = a.shape, w.shape[0]
    split = launch.split_k
    k_per_split = triton.cdiv(triton.cdiv(k, launch.block_k), split) * launch.block_k
    integer = a.dtype == torch.int8 and a_decode == 0
    raw = out if split == 1 else torch.empty((split, m, n), dtype=torch.float32, device=a.device)
    tiles = triton.cdiv(m, launch.block_m) * triton.cdiv(n, launch.block_n) * split
    grid = (min(tiles, core_count(a.device)) if launch.persistent else tiles,)
    inside = modes.groups > 0
    if a_scale is not None:
        a_scale = loadable(a_scale, target)
    if modes.groups == 2:
        w_scale = loadable(w_scale, target)
    a_rows, w_rows, load = operands(a, w, launch, target)
    start.launch(
        inner_kernel, grid, a.device,
        a_rows, w_rows, raw, a_scale, w_scale, bias, m, n, k, k_per_split, a.stride(0), w.stride(0), n,
        *((0, 0) if a_scale is None else a_scale.stride()),
        *(w_scale.stride() if inside else (0, 0)),
        BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_K=launch.block_k, GROUP_M=launch.group_m,
        SPLIT_K=split, EVEN_K=k % launch.block_k == 0, INTEGER=integer,
        A_GROUPS=a_scale is not None, W_GROUPS=modes.groups,
        GROUP_N=max(modes.group_n, 1), GROUP_K=max(modes.group_k, 1),
        A_DECODE=a_decode, W_DECODE=w_decode, CONVERT=convert, SPLIT_FP32=a.dtype == torch.float32,
        W_SCALE=modes.outer, HAS_BIAS=bias is not None, LOAD=load, PERSISTENT=launch.persistent,
        FLATTEN=flattens(launch, raw, target), **launch.options(target),
    )  # fmt: skip
    if split > 1:
        outer = {"A_SCALE": 0, "W_SCALE": modes.outer, "A_ZERO": 0, "HAS_BIAS": bias is not None}
        add_splits(raw, out, None, w_scale, bias, None, None, target, outer)
    return out
