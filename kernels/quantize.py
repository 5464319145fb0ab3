"""Activations → int8 or fp8 codes: per token, per group, or with a stored scale. One kernel.

The arithmetic is that of the torch oracle, bit for bit: scale = absmax / max (below 2⁻¹²⁶ it
becomes 1), codes = x / scale by a true division, rounded half to even. The kernel also takes
its values from a fused producer (see fused.py), so that they never go through memory.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import start
from .checks import (
    CODES,
    FLOATS,
    check_device,
    check_dtype,
    check_refusal,
    contiguous_rows,
    dtype_name,
    require,
)
from .launch import group_refusal
from .targets import Target, core_count, device_target
from .tile import decode_e8m0

# Where the values come from (SOURCE) and what shares a scale (MODE).
PLAIN, SILU_MUL, RMS_NORM = 0, 1, 2
STATIC, TOKEN, GROUPS = 0, 1, 2
FLOAT32, POWER_OF_2, E8M0 = 0, 1, 2

ScaleFormat = Literal["float32", "float32-power-of-2", "e8m0"]
_FORMATS: dict[str, int] = {"float32": FLOAT32, "float32-power-of-2": POWER_OF_2, "e8m0": E8M0}
_MAX = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 240.0}


@triton.jit
def encode_codes(value, LOW: tl.constexpr, HIGH: tl.constexpr, DTYPE: tl.constexpr, INTEGER: tl.constexpr):
    """Nearest codes of float32 values, ties to even, saturating. NaN → NaN, or 0 for int8."""
    clamped = tl.minimum(tl.maximum(value, LOW), HIGH)
    if INTEGER:
        # Adding and subtracting 1.5 · 2²³ rounds half to even; a cast alone would truncate.
        rounded = (clamped + 12582912.0) - 12582912.0
        return tl.where(value != value, 0.0, rounded).to(DTYPE)
    else:
        return tl.where(value != value, value, clamped).to(DTYPE)


@triton.jit
def scale_exponent(scale):
    """The E8M0 byte of the next power of two at or above a normal float32; NaN and Inf → 255."""
    bits = scale.to(tl.int32, bitcast=True)
    exponent = ((bits >> 23) & 255) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    return tl.minimum(exponent, 255)


@triton.jit
def scale_of(quotient, has_nan, FORMAT: tl.constexpr):
    """(scale as float32, scale as stored) of absmax / max; NaN anywhere in the tile gives NaN."""
    # The smallest normal float32: below it (all-zero rows too) the scale is 1, never 0/0.
    scale = tl.where(quotient < 1.1754943508222875e-38, 1.0, quotient)
    scale = tl.where(has_nan > 0, float("nan"), scale)
    stored = scale
    if FORMAT > 0:
        exponent = scale_exponent(scale)
        scale = decode_e8m0(exponent)
        stored = scale
        if FORMAT == 2:
            stored = exponent.to(tl.uint8)
    return scale, stored


@triton.jit
def divide(value, scale, FORMAT: tl.constexpr, FUSED: tl.constexpr):
    """value [G, B] / scale [G] of its largest magnitude, rounded as IEEE division is, bit for bit.

    Powers of two: a product with the reciprocal, which is exact. Otherwise, where FUSED: a product
    with the rounded reciprocal, and twice what is missing of the value, with one rounding each time
    (Markstein, 1990): a third of the instructions of a division. Small scales are lifted first, so
    that what is missing does not underflow.
    """
    if FORMAT > 0:
        # By its bits: Ascend's compiler dies on the division of a number that all groups share.
        # No scale is 2¹²⁷, whose inverse would be subnormal: the largest float32 over 127 is below 2¹²².
        bits = scale.to(tl.int32, bitcast=True)
        inverse = tl.where(scale != scale, bits, 0x7F000000 - bits)
        return value * inverse.to(tl.float32, bitcast=True)[:, None]
    elif FUSED:
        lift = tl.where(scale < 8.673617379884035e-19, 1.8446744073709552e19, 1.0)  # 2⁻⁶⁰, 2⁶⁴
        infinite = scale == float("inf")
        divisor = tl.where(infinite, 1.0, scale * lift)
        inverse = tl.where(infinite, 0.0, tl.div_rn(tl.zeros_like(scale) + 1.0, divisor))[:, None]
        divisor = tl.where(infinite, 0.0, divisor)[:, None]
        value = value * lift[:, None]
        quotient = value * inverse
        quotient = tl.fma(tl.fma(-quotient, divisor, value), inverse, quotient)
        return tl.fma(tl.fma(-quotient, divisor, value), inverse, quotient)
    else:
        return tl.div_rn(value, tl.zeros_like(value) + scale[:, None])


@triton.jit
def load_values(
    x_ptr, other_ptr, weight_ptr, ks, mask, inverse_rms, SOURCE: tl.constexpr, HAS_RESIDUAL: tl.constexpr
):  # fmt: skip
    """Values to quantize, float32, rounded to x's dtype wherever the unfused model would be."""
    x = tl.load(x_ptr + ks, mask=mask, other=0.0)
    dtype: tl.constexpr = x.dtype
    value = x.to(tl.float32)
    if SOURCE == 1:
        up = tl.load(other_ptr + ks, mask=mask, other=0.0).to(tl.float32)
        gate = (value / (1.0 + tl.exp(-value))).to(dtype).to(tl.float32)
        value = (gate * up).to(dtype).to(tl.float32)
    elif SOURCE == 2:
        if HAS_RESIDUAL:
            other = tl.load(other_ptr + ks, mask=mask, other=0.0).to(tl.float32)
            value = (value + other).to(dtype).to(tl.float32)
        weight = tl.load(weight_ptr + ks, mask=mask, other=0.0).to(tl.float32)
        value = (value * inverse_rms).to(dtype).to(tl.float32)
        value = (value * weight).to(dtype).to(tl.float32)
    return value


@triton.jit
def inside_row(k, K, BLOCK: tl.constexpr, GROUP: tl.constexpr, WINDOWS: tl.constexpr):
    """[BLOCK // GROUP, GROUP]: which elements of a block that begins at k lie in a row of K.

    WINDOWS: GROUP divides K, or BLOCK is one group. Ascend's compiler makes a window of a mask that
    compares each index with a number. Of any other it makes none: it loads the whole block, and stores
    it whole, with what it loaded where the mask says no, which by then may be another program's.
    """
    gs, within = tl.arange(0, BLOCK // GROUP), tl.arange(0, GROUP)
    if WINDOWS:
        return (gs < tl.cdiv(K - k, GROUP))[:, None] & (within < K - k)[None, :]
    else:
        return k + gs[:, None] * GROUP + within[None, :] < K


@triton.jit(do_not_specialize=["M"])
def quantize_rows_kernel(
    x_ptr, other_ptr, weight_ptr, sum_ptr, codes_ptr, scale_ptr, zero_ptr, M, K, eps,
    stride_xm, stride_om, stride_sm, stride_sg,
    SOURCE: tl.constexpr, MODE: tl.constexpr, FORMAT: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_ZERO: tl.constexpr, INTEGER: tl.constexpr, MAX: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, WINDOWS: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """Each program takes rows pid, pid + programs, …, BLOCK elements at a time.

    A block is seen as [BLOCK // GROUP, GROUP], also where groups share a scale (Ascend's
    buffers overflow for one long row). The passes of a row (sum of squares, maximum, codes)
    read it again from the cache: it is simpler than keeping it in registers, and rows of any
    length work.
    """
    DTYPE: tl.constexpr = codes_ptr.dtype.element_ty
    gs = tl.arange(0, BLOCK // GROUP)
    inside = gs[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    for row in range(tl.program_id(0), M, tl.num_programs(0)):
        x_row = x_ptr + tl.cast(row, tl.int64) * stride_xm
        other_row = other_ptr
        if SOURCE == 1 or HAS_RESIDUAL:
            other_row = other_ptr + tl.cast(row, tl.int64) * stride_om
        codes_row = codes_ptr + tl.cast(row, tl.int64) * K
        scale_row = scale_ptr
        if MODE > 0:
            scale_row = scale_ptr + tl.cast(row, tl.int64) * stride_sm
        inverse_rms = tl.zeros((BLOCK // GROUP, GROUP), dtype=tl.float32)
        if SOURCE == 2:
            squares = tl.zeros((BLOCK // GROUP, GROUP), dtype=tl.float32)
            for k in range(0, K, BLOCK):
                ks, mask = k + inside, inside_row(k, K, BLOCK, GROUP, WINDOWS)
                x = tl.load(x_row + ks, mask=mask, other=0.0)
                value = x.to(tl.float32)
                if HAS_RESIDUAL:
                    other = tl.load(other_row + ks, mask=mask, other=0.0)
                    total = (value + other.to(tl.float32)).to(x.dtype)
                    tl.store(sum_ptr + tl.cast(row, tl.int64) * K + ks, total, mask=mask)
                    value = total.to(tl.float32)
                squares += value * value
            inverse_rms += 1.0 / tl.sqrt(tl.sum(tl.sum(squares, axis=1), axis=0) / K + eps)
        if MODE == 1:
            largest = tl.zeros((BLOCK // GROUP, GROUP), dtype=tl.float32)
            nans = tl.zeros((BLOCK // GROUP, GROUP), dtype=tl.int32)
            for k in range(0, K, BLOCK):
                mask = inside_row(k, K, BLOCK, GROUP, WINDOWS)
                value = load_values(
                    x_row, other_row, weight_ptr, k + inside, mask, inverse_rms, SOURCE, HAS_RESIDUAL
                )
                # A maximum may drop NaN: it is looked for apart.
                nans = tl.maximum(nans, (value != value).to(tl.int32))
                largest = tl.maximum(largest, tl.where(value != value, 0.0, tl.abs(value)))
            # Divided before it is reduced, and then repeated for every group, because Ascend's
            # compiler dies on scalar divisions. Rounding is monotonic: the maximum is the same.
            quotient = tl.div_rn(largest, tl.zeros_like(largest) + MAX)
            row_quotient = tl.max(tl.max(quotient, axis=1), axis=0) + tl.zeros_like(gs).to(tl.float32)
            row_nans = tl.max(tl.max(nans, axis=1), axis=0) + tl.zeros_like(gs)
            scale, stored = scale_of(row_quotient, row_nans, FORMAT)
            tl.store(scale_row + gs, stored, mask=gs < 1)
        elif MODE == 0:
            scale = tl.zeros((BLOCK // GROUP,), dtype=tl.float32) + tl.load(scale_ptr)
        for k in range(0, K, BLOCK):
            ks, mask = k + inside, inside_row(k, K, BLOCK, GROUP, WINDOWS)
            value = load_values(x_row, other_row, weight_ptr, ks, mask, inverse_rms, SOURCE, HAS_RESIDUAL)
            if MODE == 2:
                nans = tl.max((value != value).to(tl.int32), axis=1)
                largest = tl.max(tl.where(value != value, 0.0, tl.abs(value)), axis=1)
                quotient = tl.div_rn(largest, tl.zeros_like(largest) + MAX)
                scale, stored = scale_of(quotient, nans, FORMAT)
                first = k // GROUP
                tl.store(scale_row + (first + gs) * stride_sg, stored, mask=gs < tl.cdiv(K, GROUP) - first)
            # A given scale may be so small that the quotient is infinite.
            scaled = divide(value, scale, FORMAT, FUSED and MODE > 0)
            if HAS_ZERO:
                scaled = tl.where(scaled != scaled, 0.0, scaled) + tl.load(zero_ptr).to(tl.float32)
                codes = encode_codes(scaled, -128.0, 127.0, DTYPE, INTEGER)
            else:
                codes = encode_codes(scaled, -MAX, MAX, DTYPE, INTEGER)
            tl.store(codes_row + ks, codes, mask=mask)


def refusal(dtype: torch.dtype, target: Target, group_size: int = 0) -> str | None:
    """Why `target` cannot convert to codes of `dtype`, a scale per `group_size` (0: per row); None where it can."""
    if dtype == torch.int8 or dtype_name(dtype) == target.fp8:
        return group_refusal(group_size, target) if group_size else None
    own = f" or {target.fp8}" if target.fp8 else ""
    return f"expected codes that {target.name} converts to (int8{own}), found {dtype_name(dtype)}"


def quantize_rows(
    x: Tensor,
    dtype: torch.dtype,
    *,
    source: int,
    mode: int,
    other: Tensor | None = None,
    weight: Tensor | None = None,
    total: Tensor | None = None,
    eps: float = 0.0,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    group_size: int = 0,
    column_major: bool = False,
    scale_format: ScaleFormat = "float32",
) -> tuple[Tensor, Tensor]:
    """Launch `quantize_rows_kernel`: what every function of this file and of fused.py comes down to."""
    require(
        x.dim() == 2, f"expected activations [M, K], found {list(x.shape)}; flatten the leading dimensions"
    )
    check_dtype("activations", x, FLOATS)
    require(dtype in CODES, f"expected codes of int8 or e4m3, found {dtype_name(dtype)}")
    require(scale_format in _FORMATS, f"expected one of {', '.join(_FORMATS)}, found {scale_format!r}")
    check_device(x, other=other, weight=weight, scale=scale, zero_point=zero_point)
    m, k = x.shape
    target = device_target(x.device)
    check_refusal(refusal(dtype, target, group_size))
    x = contiguous_rows(x)
    other = None if other is None else contiguous_rows(other)
    codes = torch.empty((m, k), dtype=dtype, device=x.device)
    if scale is None:
        groups = 1 if mode == TOKEN else -(-k // group_size)
        shape = (groups, m) if column_major else (m, groups)
        stored_dtype = torch.uint8 if scale_format == "e8m0" else torch.float32
        scale = torch.empty(shape, dtype=stored_dtype, device=x.device)
        scale = scale.t() if column_major else scale
    if m == 0:
        return codes, scale
    if k == 0:
        return codes, scale.fill_(127 if scale_format == "e8m0" else 1) if mode != STATIC else scale
    block, options = row_block(k, target)
    windows = target.backend == "npu"
    block, group = _windows(k, block, group_size) if windows else (block, group_size or min(block, 128))
    strides = scale.stride() if mode != STATIC else (0, 0)
    start.launch(
        quantize_rows_kernel, (min(m, 65_535 if target.backend != "npu" else core_count(x.device)),), x.device,
        x, other, weight, total, codes, scale, zero_point, m, k, eps,
        x.stride(0), 0 if other is None else other.stride(0), *strides,
        SOURCE=source, MODE=mode, FORMAT=_FORMATS[scale_format], HAS_RESIDUAL=total is not None,
        HAS_ZERO=zero_point is not None, INTEGER=dtype == torch.int8, MAX=_MAX[dtype],
        BLOCK=max(block, group), GROUP=group, WINDOWS=windows, FUSED=target.backend != "npu", **options,
    )  # fmt: skip
    return codes, scale


def _windows(k: int, block: int, group_size: int) -> tuple[int, int]:
    """(BLOCK, GROUP) for `inside_row` with WINDOWS: several groups in a block where they divide K."""
    group = group_size or min(k & -k, 128)
    if k % group == 0 and group >= 16:
        return block, group
    return (group_size,) * 2 if group_size else (min(block, 256),) * 2


def row_block(k: int, target: Target) -> tuple[int, dict[str, int]]:
    """(elements per step, launch options) for kernels that walk along a row of K elements."""
    block = min(triton.next_power_of_2(max(k, 32)), 2048)
    if target.backend == "npu":
        return block, {}
    return block, {"num_warps": max(1, min(8, block // (target.warp_size * 8))), "enable_fp_fusion": False}


def quantize_per_token(
    x: Tensor, dtype: torch.dtype = torch.int8, *, scale_format: ScaleFormat = "float32"
) -> tuple[Tensor, Tensor]:
    """(codes [M, K] of `dtype`, scale [M, 1]) of activations x, float16, bfloat16 or float32 [M, K].

    dtype: int8 (codes in ±127) or the target's fp8. scale = absmax / max, float32; `e8m0` stores
    its next power of two as uint8, `float32-power-of-2` as float32. A row with NaN has scale NaN,
    one with Inf scale Inf: NaN in the product tells of it. All-zero rows: scale 1, codes 0.
    Rows may be strided. Raises ValueError for other shapes, dtypes and devices.
    """
    return quantize_rows(x, dtype, source=PLAIN, mode=TOKEN, scale_format=scale_format)


def quantize_per_group(
    x: Tensor,
    dtype: torch.dtype = torch.int8,
    group_size: int = 128,
    *,
    column_major: bool = False,
    scale_format: ScaleFormat = "float32",
) -> tuple[Tensor, Tensor]:
    """(codes [M, K], scale [M, ⌈K/group_size⌉]); as `quantize_per_token`, for each group of K.

    group_size: a power of two from 16 to 2048. column_major: the same scale tensor with strides (1, M),
    which `matmul_block` loads best. mxfp8: group_size 32, scale_format "e8m0".
    """
    check_group(group_size)
    return quantize_rows(
        x, dtype, source=PLAIN, mode=GROUPS, group_size=group_size,
        column_major=column_major, scale_format=scale_format,
    )  # fmt: skip


def quantize_static(
    x: Tensor, scale: Tensor, dtype: torch.dtype = torch.int8, *, zero_point: Tensor | None = None
) -> Tensor:
    """Codes [M, K] under a stored scale: x / scale (+ zero_point), rounded half to even, saturated.

    scale: float32, one element. zero_point: int8 or int32, one element, int8 codes only; codes
    then use all of −128 … 127. NaN → NaN, or 0 for int8.
    """
    check_static(scale, zero_point, dtype)
    return quantize_rows(x, dtype, source=PLAIN, mode=STATIC, scale=scale, zero_point=zero_point)[0]


def check_group(group_size: int) -> None:
    check_refusal(group_refusal(group_size))


def check_static(scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> None:
    check_dtype("scale", scale, (torch.float32,))
    require(scale.numel() == 1, f"expected one scale, found {list(scale.shape)}")
    if zero_point is not None:
        check_dtype("zero_point", zero_point, (torch.int8, torch.int32))
        require(zero_point.numel() == 1, f"expected one zero point, found {list(zero_point.shape)}")
        require(dtype == torch.int8, f"expected int8 codes with a zero point, found {dtype_name(dtype)}")
