"""Mixture-of-experts product: tokens sorted by expert, every expert's tiles in one launch.

No schedule is computed before the launch and no token count comes to the host. Expert e's
tiles start at slot offsets[e] // BLOCK_M + e: a closed form that leaves room for every
expert's ⌈count / BLOCK_M⌉ tiles and wastes less than one slot per expert.
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
    FP8,
    check_device,
    check_dtype,
    check_shape,
    check_weight_rows,
    contiguous_rows,
    dtype_name,
    require,
    rows_aligned,
)
from .inner import conversion, loadable, scaled_tile, weight_scale_modes
from .launch import choose_launch
from .operands import operands
from .targets import core_count, device_target
from .tile import TMA
from .tuned_tables import LaunchParameters


@triton.jit
def _one_slot(
    tile, a_ptr, w_ptr, out_ptr, offsets_ptr, a_scale_ptr, w_scale_ptr, bias_ptr, routed_ptr, N, K, slots,
    stride_am, stride_we, stride_wn, stride_om, stride_asm, stride_ask, stride_wse, stride_wsn, stride_wsk,
    EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr, INTEGER: tl.constexpr, PROMOTE_K: tl.constexpr,
    A_GROUPS: tl.constexpr, W_GROUPS: tl.constexpr, GROUP_N: tl.constexpr, GROUP_K: tl.constexpr,
    W_DECODE: tl.constexpr, CONVERT: tl.constexpr, SPLIT_FP32: tl.constexpr,
    A_SCALE: tl.constexpr, W_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ROUTED: tl.constexpr,
    LOAD: tl.constexpr,
):  # fmt: skip
    # Bands of GROUP_M slots, as in tile_position: an expert's weights stay in the cache.
    band_tiles = GROUP_M * tl.cdiv(N, BLOCK_N)
    first = (tile // band_tiles) * GROUP_M
    height = tl.minimum(slots - first, GROUP_M)
    slot = first + tile % band_tiles % height
    n0 = (tile % band_tiles // height) * BLOCK_N

    experts = tl.arange(0, EXPERTS_PADDED)
    starts = tl.load(offsets_ptr + experts, mask=experts < EXPERTS, other=0) // BLOCK_M + experts
    expert = tl.sum(((starts <= slot) & (experts < EXPERTS)).to(tl.int32), axis=0) - 1
    begin = tl.load(offsets_ptr + expert).to(tl.int32)
    m_end = tl.load(offsets_ptr + expert + 1).to(tl.int32)
    m0 = begin + (slot - begin // BLOCK_M - expert) * BLOCK_M
    if m0 < m_end:
        scaled_tile(
            a_ptr, w_ptr if LOAD == TMA else w_ptr + expert.to(tl.int64) * stride_we, out_ptr,
            a_scale_ptr, w_scale_ptr + expert.to(tl.int64) * stride_wse,
            bias_ptr + expert * N if HAS_BIAS else None, routed_ptr,
            m0, m_end, n0, n0 + expert * N if LOAD == TMA else n0, N, 0, K,
            stride_am, stride_wn, stride_om, stride_asm, stride_ask, stride_wsn, stride_wsk,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, INTEGER, PROMOTE_K,
            A_GROUPS, W_GROUPS, GROUP_N, GROUP_K, 0, W_DECODE, CONVERT, SPLIT_FP32,
            A_SCALE, W_SCALE, HAS_BIAS, HAS_ROUTED, False, LOAD,
        )  # fmt: skip


@triton.jit(do_not_specialize=["slots"])
def matmul_grouped_kernel(
    a_ptr, w_ptr, out_ptr, offsets_ptr, a_scale_ptr, w_scale_ptr, bias_ptr, routed_ptr, N, K, slots,
    stride_am, stride_we, stride_wn, stride_om, stride_asm, stride_ask, stride_wse, stride_wsn, stride_wsk,
    EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr, INTEGER: tl.constexpr, PROMOTE_K: tl.constexpr,
    A_GROUPS: tl.constexpr, W_GROUPS: tl.constexpr, GROUP_N: tl.constexpr, GROUP_K: tl.constexpr,
    W_DECODE: tl.constexpr, CONVERT: tl.constexpr, SPLIT_FP32: tl.constexpr,
    A_SCALE: tl.constexpr, W_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ROUTED: tl.constexpr,
    LOAD: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """One program per slot and column block, or, where PERSISTENT, one per core."""
    if PERSISTENT:
        tiles = slots * tl.cdiv(N, BLOCK_N)
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            _one_slot(
                tile, a_ptr, w_ptr, out_ptr, offsets_ptr, a_scale_ptr, w_scale_ptr, bias_ptr, routed_ptr,
                N, K, slots, stride_am, stride_we, stride_wn, stride_om, stride_asm, stride_ask,
                stride_wse, stride_wsn, stride_wsk, EXPERTS, EXPERTS_PADDED, BLOCK_M, BLOCK_N, BLOCK_K,
                GROUP_M, EVEN_K, INTEGER, PROMOTE_K, A_GROUPS, W_GROUPS, GROUP_N, GROUP_K, W_DECODE,
                CONVERT, SPLIT_FP32, A_SCALE, W_SCALE, HAS_BIAS, HAS_ROUTED, LOAD,
            )  # fmt: skip
    else:
        _one_slot(
            tl.program_id(0), a_ptr, w_ptr, out_ptr, offsets_ptr, a_scale_ptr, w_scale_ptr, bias_ptr,
            routed_ptr, N, K, slots, stride_am, stride_we, stride_wn, stride_om, stride_asm, stride_ask,
            stride_wse, stride_wsn, stride_wsk, EXPERTS, EXPERTS_PADDED, BLOCK_M, BLOCK_N, BLOCK_K,
            GROUP_M, EVEN_K, INTEGER, PROMOTE_K, A_GROUPS, W_GROUPS, GROUP_N, GROUP_K, W_DECODE,
            CONVERT, SPLIT_FP32, A_SCALE, W_SCALE, HAS_BIAS, HAS_ROUTED, LOAD,
        )  # fmt: skip


def matmul_grouped(
    a: Tensor,
    w: Tensor,
    offsets: Tensor,
    a_scale: Tensor | None,
    w_scale: Tensor,
    *,
    block_shape: tuple[int, int] | None = None,
    bias: Tensor | None = None,
    routed_weight: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    fast_accum: bool = False,
    launch: LaunchParameters | None = None,
) -> Tensor:
    """[T, N]: rows offsets[e] … offsets[e+1] of `a` times expert e's weight, for all experts at once.

    a: [T, K], sorted by expert: int8 or fp8, or float16, bfloat16, float32 with a_scale None
    (weight-only). w: [E, N, K] int8 or fp8 as stored (for int8 and fp8 activations: their dtype), or for
    weight-only uint8 that holds q + 128.
    offsets: int32 [E + 1] from 0 to T, not decreasing, on the same device; experts may be empty.
    block_shape None: a_scale float32 [T, 1], w_scale float32 [E, N, 1]. (r, c): a_scale
    [T, ⌈K/c⌉] in any strides, w_scale [E, ⌈N/r⌉, ⌈K/c⌉]; (1, g): w_scale [E, N, ⌈K/g⌉]; these also E8M0 as uint8.
    bias: float [E, N]. routed_weight: float32 [T], multiplied last: (… + bias) · routed_weight.
    fast_accum: as in `matmul`; with blocks there is no need of it.

    The values of `offsets` are not checked (that would wait for the device): rows outside them
    are left unwritten. T < 2³¹. Deterministic. Raises ValueError as `matmul` does.
    """
    require(a.dim() == 2, f"expected activations [T, K], found {list(a.shape)}")
    require(
        w.dim() == 3 and w.shape[2] == a.shape[1],
        f"expected weights [E, N, {a.shape[1]}], found {list(w.shape)}",
    )
    (tokens, k), (experts, n, _) = a.shape, w.shape
    weight_only = a.dtype in FLOATS
    check_weight_rows(w)
    check_dtype("activations", a, (*CODES, *FLOATS))
    check_dtype("the weights", w, (torch.int8, torch.uint8, *FP8) if weight_only else (a.dtype,))
    require(out_dtype in FLOATS, f"expected out_dtype float16, bfloat16 or float32, found {out_dtype}")
    check_dtype("offsets", offsets, (torch.int32,))
    check_shape("offsets", offsets, (experts + 1,))
    check_device(
        a, w=w, offsets=offsets, a_scale=a_scale, w_scale=w_scale, bias=bias, routed_weight=routed_weight
    )
    require(
        w_scale.dim() == 3 and w_scale.shape[0] == experts,
        f"expected w_scale [{experts}, …, …], found {list(w_scale.shape)}",
    )
    modes = weight_scale_modes(w_scale, n, k, block_shape)
    if weight_only:
        require(a_scale is None, f"expected no a_scale with {dtype_name(a.dtype)} activations")
    else:
        if a_scale is None:
            raise ValueError(f"expected a_scale with {dtype_name(a.dtype)} activations")
        check_dtype("a_scale", a_scale, (torch.float32,))
        check_shape("a_scale", a_scale, (tokens, 1 if block_shape is None else -(-k // block_shape[1])))
        if block_shape is None:
            a_scale = a_scale.contiguous()
    if bias is not None:
        check_dtype("bias", bias, FLOATS)
        check_shape("bias", bias, (experts, n))
        bias = bias.contiguous()
    if routed_weight is not None:
        check_dtype("routed_weight", routed_weight, (torch.float32,))
        check_shape("routed_weight", routed_weight, (tokens,))
        routed_weight = routed_weight.contiguous()
    out = torch.empty((tokens, n), dtype=out_dtype, device=a.device)
    if tokens == 0 or n == 0 or experts == 0:
        return out
    a, offsets = contiguous_rows(a), offsets.contiguous()
    target = device_target(a.device)
    if launch is None:
        launch = choose_launch(
            "matmul_grouped", m=-(-tokens // experts), n=n, k=k, a_dtype=dtype_name(a.dtype),
            w_dtype=dtype_name(w.dtype), target=target,
            group_n=modes.group_n, group_k=modes.group_k, aligned=rows_aligned(a, w, target=target),
            fast_accum=fast_accum,
        )  # fmt: skip
    if modes.groups == 0:
        w_scale = w_scale.contiguous()
    elif modes.groups == 2:
        w_scale = loadable(w_scale, target)
    if modes.groups and a_scale is not None:
        a_scale = loadable(a_scale, target)
    codes, decode, convert = conversion(w, a.dtype, target) if weight_only else (w, 0, 0)
    slots = tokens // launch.block_m + experts
    tiles = slots * triton.cdiv(n, launch.block_n)
    grid = (min(tiles, core_count(a.device)) if launch.persistent else tiles,)
    inside = modes.groups > 0
    a_rows, w_rows, load = operands(a, codes, launch, target)
    start.launch(
        matmul_grouped_kernel, grid, a.device,
        a_rows, w_rows, out, offsets, a_scale, w_scale, bias, routed_weight, n, k, slots,
        a.stride(0), codes.stride(0), codes.stride(1), n,
        *(a_scale.stride() if inside and a_scale is not None else (0, 0)),
        *(w_scale.stride() if inside else (w_scale.shape[1], 0, 0)),
        EXPERTS=experts, EXPERTS_PADDED=triton.next_power_of_2(experts),
        BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_K=launch.block_k, GROUP_M=launch.group_m,
        EVEN_K=k % launch.block_k == 0, INTEGER=a.dtype == torch.int8, PROMOTE_K=launch.promote_k,
        A_GROUPS=inside and not weight_only, W_GROUPS=modes.groups,
        GROUP_N=max(modes.group_n, 1), GROUP_K=max(modes.group_k, 1),
        W_DECODE=decode, CONVERT=convert, SPLIT_FP32=a.dtype == torch.float32,
        A_SCALE=2 if a_scale is not None and not inside else 0, W_SCALE=modes.outer,
        HAS_BIAS=bias is not None, HAS_ROUTED=routed_weight is not None,
        LOAD=load, PERSISTENT=launch.persistent, **launch.options(target),
    )  # fmt: skip
    return out
