"""The parts that every matmul kernel is made of: where a tile lies, its inner loop, its epilogue.

Written in the subset of Triton that NVIDIA, AMD and Ascend all compile: plain pointers and
masks, no wrapping of rows, no inline assembly, `other=0.0` on every masked load. Tile starts
are int64 and everything inside a tile int32, so that tensors beyond 2³¹ elements work
without 64-bit index arithmetic in the loop.

Scale modes, the same numbers everywhere (constexpr, so that the unused code vanishes):
NONE = 0, PER_TENSOR = 1, PER_ROW = 2 (row of its operand: token or output channel).
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE = tl.constexpr(0)
PER_TENSOR = tl.constexpr(1)
PER_ROW = tl.constexpr(2)

# LOAD, how a weight's tile is loaded; `operands` chooses.
AS_STORED = tl.constexpr(0)
TURNED = tl.constexpr(1)
TMA = tl.constexpr(2)

# CONVERT, how a weight's codes become the activations' dtype; `conversion` chooses.
CAST = tl.constexpr(1)
CUT = tl.constexpr(2)


@triton.jit
def tile_position(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row block and column block of a tile, walking bands of GROUP_M row blocks.

    Neighbouring programs then share both their rows and their columns in the L2 cache.
    """
    blocks_m = tl.cdiv(M, BLOCK_M)
    band_tiles = GROUP_M * tl.cdiv(N, BLOCK_N)
    first = (tile // band_tiles) * GROUP_M
    height = tl.minimum(blocks_m - first, GROUP_M)
    within = tile % band_tiles
    return first + within % height, within // height


@triton.jit
def decode_e4m3fn(raw):
    """Bytes of e4m3fn, loaded as int8 → fp16, exactly, with integer operations only.

    e4m3fn's exponent and mantissa, moved to fp16's place, read as value · 2⁻⁸ (the biases are
    7 and 15), subnormals included. 0x7F and 0xFF are NaN; they would read as ±480.
    """
    bits = raw.to(tl.int16)
    half = ((bits & 128) << 8) | ((bits & 127) << 7)
    value = half.to(tl.float16, bitcast=True) * 256.0
    return tl.where(tl.abs(value) > 448.0, float("nan"), value)


@triton.jit
def decode_e4m3fn_wide(raw):
    """The same → float32, where the biases are 7 and 127: in float32's place it reads as value · 2⁻¹²⁰."""
    value = ((raw.to(tl.int32) << 20) & -0x78100000).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where(tl.abs(value) > 448.0, float("nan"), value)


@triton.jit
def cut_to_bf16(value):
    """float32 that needs no more than bfloat16's 8 bits (a code of 8 bits has no more) → bfloat16, exactly."""
    return (value.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def decode_e8m0(raw):
    """Bytes of E8M0, loaded as uint8 → float32: 2^(byte − 127), and NaN for 255."""
    exponent = raw.to(tl.int32)
    # 2⁻¹²⁷ is a subnormal float32; 255 shifted into place is Inf and must be NaN.
    bits = tl.where(exponent == 0, 0x00400000, exponent << 23)
    bits = tl.where(exponent == 255, 0x7FC00000, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def load_scale(pointers, mask):
    """Scales as float32, from float32 or from E8M0 bytes. Masked ones are of no importance."""
    if pointers.dtype.element_ty == tl.uint8:
        return decode_e8m0(tl.load(pointers, mask=mask))
    else:
        return tl.load(pointers, mask=mask)


@triton.jit
def decode(raw, DECODE: tl.constexpr):
    """A tile of codes as loaded → 8-bit as stored, or floats decoded from bytes.

    DECODE 0: as stored. 1 and 3: e4m3fn bytes viewed as int8, to fp16 and to float32. 2: bytes of
    q + 128 viewed as int8 (compressed-tensors' pack-quantized): flipping the top bit gives q.
    """
    if DECODE == 1:
        return decode_e4m3fn(raw)
    elif DECODE == 3:
        return decode_e4m3fn_wide(raw)
    elif DECODE == 2:
        return raw ^ -128
    else:
        return raw


@triton.jit
def multiply_tile(
    a_ptr, w_ptr, a_scale_ptr, w_scale_ptr,
    m0, n0, row_mask, col_mask, k_start, k_end,
    stride_am, stride_wn, stride_asm, stride_ask, stride_wsn, stride_wsk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, INTEGER: tl.constexpr, PROMOTE_K: tl.constexpr,
    A_GROUPS: tl.constexpr, W_GROUPS: tl.constexpr, GROUP_K: tl.constexpr,
    A_DECODE: tl.constexpr, W_DECODE: tl.constexpr, CONVERT: tl.constexpr, SPLIT_FP32: tl.constexpr,
    LOAD: tl.constexpr,
):  # fmt: skip
    """Σ over k of one tile: int32 where INTEGER and no scale lies inside the sum, else float32.

    a_ptr, w_ptr: scalar pointers to matrices whose rows are contiguous; m0, n0: the tile's first row
    in each. LOAD: a tile of the weight is loaded AS_STORED, [BLOCK_N, BLOCK_K], or TURNED; or it and
    the activations' come by TMA, a_ptr and w_ptr being tensor descriptors: no mask is needed then,
    since rows past the tile's end reach only masked results.
    A_GROUPS: activations have a scale per row and GROUP_K. W_GROUPS: weights have a scale per
    GROUP_K, and either one for the whole tile (PER_TENSOR: blocks) or one per column (PER_ROW:
    groups). `a_scale_ptr`, `w_scale_ptr` point to the tile's first scale. Each partial product
    of BLOCK_K ≤ GROUP_K is scaled and added in one float32 rounding: that is half the work that a
    multiplication and an addition leave to the units beside the matrix unit.
    CONVERT: weights become the activations' dtype (bfloat16 where SPLIT_FP32) before the product,
    which is exact: by CAST, or for bfloat16 by CUT.
    SPLIT_FP32: float32 activations become three bf16 summands, so that the product runs on
    matrix units and still has 24 bits.
    PROMOTE_K: on sm90, add fp8 products to a float32 accumulator after so many k.
    """
    rows, cols, ks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    if LOAD != TMA:
        a_ptr += m0.to(tl.int64) * stride_am
        w_ptr += n0.to(tl.int64) * stride_wn
        a_offsets = rows[:, None] * stride_am + ks[None, :]
        if LOAD == TURNED:
            w_offsets = cols[None, :] * stride_wn + ks[:, None]
        else:
            w_offsets = cols[:, None] * stride_wn + ks[None, :]
    PART: tl.constexpr = tl.int32 if INTEGER else tl.float32
    INSIDE: tl.constexpr = A_GROUPS + W_GROUPS > 0
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32 if INSIDE else PART)
    for k in range(k_start, k_end, BLOCK_K):
        if INSIDE:
            # Before the product: on sm90 and later it runs on while these arrive.
            group = k // GROUP_K
            if W_GROUPS == PER_ROW:
                scale = load_scale(w_scale_ptr + cols * stride_wsn + group * stride_wsk, col_mask)[None, :]
            else:
                scale = load_scale(w_scale_ptr + group * stride_wsk, None)
            if A_GROUPS:
                a_scale = load_scale(a_scale_ptr + rows * stride_asm + group * stride_ask, row_mask)
                scale = a_scale[:, None] * scale
        if LOAD == TMA:
            a, w = a_ptr.load([m0, k]), w_ptr.load([n0, k])
        else:
            a_mask = row_mask[:, None]
            w_mask = col_mask[None, :] if LOAD == TURNED else col_mask[:, None]
            if not EVEN_K:
                k_mask = ks < k_end - k
                a_mask = a_mask & k_mask[None, :]
                w_mask = w_mask & (k_mask[:, None] if LOAD == TURNED else k_mask[None, :])
            a = tl.load(a_ptr + k + a_offsets, mask=a_mask, other=0.0)
            w = tl.load(w_ptr + k + w_offsets, mask=w_mask, other=0.0)
        a, w = decode(a, A_DECODE), decode(w, W_DECODE)
        if CONVERT == CUT:
            w = cut_to_bf16(w.to(tl.float32))
        elif CONVERT == CAST:
            w = w.to(tl.bfloat16 if SPLIT_FP32 else a.dtype)
        if LOAD != TURNED:
            w = w.T
        if SPLIT_FP32:
            high = a.to(tl.bfloat16)
            rest = a - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            part = tl.dot(low, w, out_dtype=PART)
            part = tl.dot(middle, w, part, out_dtype=PART)
            part = tl.dot(high, w, part, out_dtype=PART)
            if not INSIDE:
                acc += part
        elif INSIDE:
            part = tl.dot(a, w, out_dtype=PART)
        elif PROMOTE_K > 0:
            acc = tl.dot(a, w, acc, max_num_imprecise_acc=PROMOTE_K, out_dtype=PART)
        else:
            acc = tl.dot(a, w, acc, out_dtype=PART)
        if INSIDE:
            acc = tl.fma(part.to(tl.float32), scale, acc)
    return acc


@triton.jit
def finish_tile(
    acc, a_scale_ptr, w_scale_ptr, bias_ptr, a_zero_ptr, w_sum_ptr, row_mask, col_mask,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    A_SCALE: tl.constexpr, W_SCALE: tl.constexpr, A_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """(acc − zero·w_sum) · a_scale · w_scale + bias, float32, in this order everywhere.

    Pointers are to the tile's first row or column (per tensor: to the one value). The zero
    point is subtracted in int32, where it is exact; the int32 sum becomes float32 before any
    scale touches it (int32 × fp16 would be infinite).
    """
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    if A_ZERO == PER_ROW:
        zero = tl.load(a_zero_ptr + rows, mask=row_mask, other=0).to(tl.int32)
        w_sum = tl.load(w_sum_ptr + cols, mask=col_mask, other=0)
        acc -= zero[:, None] * w_sum[None, :]
    elif A_ZERO == PER_TENSOR:
        w_sum = tl.load(w_sum_ptr + cols, mask=col_mask, other=0)
        acc -= (tl.load(a_zero_ptr).to(tl.int32) * w_sum)[None, :]
    value = acc.to(tl.float32)
    if A_SCALE == PER_ROW:
        value = value * tl.load(a_scale_ptr + rows, mask=row_mask, other=0.0)[:, None]
    elif A_SCALE == PER_TENSOR:
        value = value * tl.load(a_scale_ptr)
    if W_SCALE == PER_ROW:
        value = value * tl.load(w_scale_ptr + cols, mask=col_mask, other=0.0)[None, :]
    elif W_SCALE == PER_TENSOR:
        value = value * tl.load(w_scale_ptr)
    if HAS_BIAS:
        value = value + tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    return value
