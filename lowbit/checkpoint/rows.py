"""Fused loops over rows of a weight: decode, find the scale, encode, in one pass through the cache.

numba, without torch: a conversion starts in a fraction of a second and each loop runs without
the GIL. Every loop equals `lowbit.quantize`, the torch oracle, bit for bit.

A tile (the elements that share a scale) is decoded to float32 into a small buffer, its
largest magnitude is found, and it is encoded from there, so each source byte is read once
from memory and each code written once. Integer arithmetic on the bits stands for casts
(LLVM vectorizes it; there is no instruction for fp8 here) and for finding NaN and Inf: as
unsigned integers, magnitudes order like the numbers, with Inf and NaN on top.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numba import njit

from lowbit.compiling import CACHE  # which says so when compiling takes long

# How the source is stored.
BF16, F16, F32, E4M3, INT8, INT8_PACKED, INT4_PACKED, E2M1_PACKED, E2M1 = range(9)
SOURCE_KINDS = {"BF16": BF16, "F16": F16, "F32": F32, "F8_E4M3": E4M3, "I8": INT8}
_SOURCE_BITS = {
    BF16: 16, F16: 16, F32: 32, E4M3: 8, INT8: 8, INT8_PACKED: 8, INT4_PACKED: 4, E2M1_PACKED: 4, E2M1: 8,
}  # fmt: skip

# What is written. TO_F32 is for verification.
TO_INT8, TO_INT8_PACKED, TO_E4M3, TO_BF16, TO_F16, TO_F32 = range(6)
OUTPUT_BYTES = {TO_INT8: 1, TO_INT8_PACKED: 1, TO_E4M3: 1, TO_BF16: 2, TO_F16: 2, TO_F32: 4}


def source_bytes(kind: int, count: int) -> int:
    """Bytes of `count` elements, an even number of them where two are in a byte."""
    return count * _SOURCE_BITS[kind] // 8


_INF_BITS = np.uint32(0x7F800000)
_SMALLEST_SCALE = np.float32(2.0**-126)
_loop = partial(njit, cache=CACHE, nogil=True, error_model="numpy", boundscheck=False)


@njit(inline="always")
def _halves(source, start, count, out):
    """4-bit codes from the `start`th on → uint32; the first of two is in the lower half of a byte."""
    first = start % 2
    if first:
        out[0] = np.uint32(source[start // 2] >> np.uint8(4))
    pairs = source[(start + first) // 2 : (start + count + 1) // 2]
    for i in range((count - first) // 2):
        out[first + 2 * i] = np.uint32(pairs[i] & np.uint8(15))
        out[first + 2 * i + 1] = np.uint32(pairs[i] >> np.uint8(4))
    if (count - first) % 2:
        out[count - 1] = np.uint32(pairs[pairs.size - 1] & np.uint8(15))


@_loop()
def _decode(source, kind, start, count, scale, scale_row, block_cols, first_col, multiplier, divisor, values):
    """`count` elements from element `start` on → float32 in `values`; True when all are finite.

    `scale` [*, *] multiplies, its row `scale_row`, one column per `block_cols` columns of the
    weight, the first element lying in column `first_col`; then `multiplier`, and `divisor` divides.
    """
    bits = values.view(np.uint32)
    worst = np.uint32(0)
    if kind == BF16:
        half = source.view(np.uint16)[start : start + count]
        for i in range(count):
            b = np.uint32(half[i]) << np.uint32(16)
            bits[i] = b
            worst = max(worst, b & np.uint32(0x7FFFFFFF))
    elif kind == F32:
        full = source.view(np.uint32)[start : start + count]
        for i in range(count):
            b = full[i]
            bits[i] = b
            worst = max(worst, b & np.uint32(0x7FFFFFFF))
    elif kind == F16:
        half = source.view(np.uint16)[start : start + count]
        for i in range(count):
            h = np.uint32(half[i])
            magnitude = h & np.uint32(0x7FFF)
            sign = (h & np.uint32(0x8000)) << np.uint32(16)
            if magnitude >= np.uint32(0x7C00):
                worst = _INF_BITS
            # Subnormal halves are multiples of 2⁻²⁴: exact as an integer.
            if magnitude < np.uint32(0x0400):
                values[i] = np.float32(magnitude) * np.float32(2.0**-24)
                bits[i] |= sign
            else:
                bits[i] = ((magnitude << np.uint32(13)) + np.uint32(112 << 23)) | sign
    elif kind == E4M3:
        codes = source[start : start + count]
        top = np.uint8(0)
        for i in range(count):
            top = max(top, codes[i] & np.uint8(0x7F))
        if top == np.uint8(0x7F):
            return False
        for i in range(count):
            magnitude = (np.uint32(codes[i]) & np.uint32(0x7F)) << np.uint32(20)
            # No float32 denormals on the way: a subnormal code gets the exponent of 2⁻⁶ here,
            # and below it loses that leading 1 again.
            subnormal = np.uint32(1 << 23) if magnitude < np.uint32(1 << 23) else np.uint32(0)
            bits[i] = magnitude + np.uint32(120 << 23) + subnormal
        for i in range(count):
            code = np.uint32(codes[i])
            values[i] -= np.float32(2.0**-6) if (code & np.uint32(0x78)) == 0 else np.float32(0.0)
            bits[i] |= (code & np.uint32(0x80)) << np.uint32(24)
    elif kind == INT8:
        signed = source.view(np.int8)[start : start + count]
        for i in range(count):
            values[i] = np.float32(signed[i])
    elif kind == INT4_PACKED:
        _halves(source, start, count, bits)
        for i in range(count):
            values[i] = np.float32(np.int32(bits[i]) - 8)
    elif kind in (E2M1_PACKED, E2M1):
        if kind == E2M1_PACKED:
            _halves(source, start, count, bits)
        else:
            codes = source[start : start + count]
            for i in range(count):
                bits[i] = np.uint32(codes[i])
        for i in range(count):
            # As above: 0 and ½ get the exponent of 1, and lose its leading 1 again.
            magnitude = (bits[i] & np.uint32(7)) << np.uint32(22)
            sign = (bits[i] & np.uint32(8)) << np.uint32(28)
            subnormal = magnitude < np.uint32(1 << 23)
            bits[i] = magnitude + np.uint32(126 << 23) + (np.uint32(1 << 23) if subnormal else np.uint32(0))
            values[i] -= np.float32(1.0) if subnormal else np.float32(0.0)
            bits[i] |= sign
    else:
        offset = source[start : start + count]
        for i in range(count):
            values[i] = np.float32(np.int32(offset[i]) - 128)
    if worst >= _INF_BITS:
        return False
    if scale.shape[0] > 0:
        row = scale[scale_row]
        col = first_col
        i = 0
        if block_cols == 1:
            factors = row[first_col : first_col + count]
            for i in range(count):
                values[i] *= factors[i]
            i = count
        while i < count:
            block = col // block_cols
            stop = min(count, i + (block + 1) * block_cols - col)
            factor = row[block]
            for j in range(i, stop):
                values[j] *= factor
            col += stop - i
            i = stop
    # After the scales, whose products with codes of 4 bits are exact: so there is one rounding.
    if multiplier != np.float32(1.0):
        for i in range(count):
            values[i] *= multiplier
    if divisor != np.float32(1.0):
        for i in range(count):
            values[i] /= divisor
    return True


@_loop()
def _absmax(values, count):
    """Largest magnitude of finite values; by bits, since integer maxima vectorize."""
    bits = values.view(np.uint32)
    worst = np.uint32(0)
    for i in range(count):
        worst = max(worst, bits[i] & np.uint32(0x7FFFFFFF))
    one = np.empty(1, np.uint32)
    one[0] = worst
    return one.view(np.float32)[0]


@_loop()
def _encode(values, count, scale, out_kind, out, start):
    """values / scale → codes at element `start` of `out`; rounds half to even, saturates."""
    bits = values.view(np.uint32)
    if out_kind in (TO_INT8, TO_INT8_PACKED):
        flip = np.int8(0) if out_kind == TO_INT8 else np.int8(-128)
        codes = out.view(np.int8)[start : start + count]
        for i in range(count):
            x = values[i] / scale
            x = min(max(x, np.float32(-127.0)), np.float32(127.0))
            codes[i] = np.int8(np.int32(np.rint(x))) ^ flip
    elif out_kind == TO_E4M3:
        raw = out[start : start + count]
        for i in range(count):
            values[i] = min(max(values[i] / scale, np.float32(-448.0)), np.float32(448.0))
        for i in range(count):
            b = bits[i]
            magnitude = b & np.uint32(0x7FFFFFFF)
            sign = (b >> np.uint32(24)) & np.uint32(0x80)
            # Normal codes: add half of the last kept bit, ties to even, and re-bias.
            rounded = magnitude + np.uint32(0x7FFFF) + ((magnitude >> np.uint32(20)) & np.uint32(1))
            normal = (rounded - np.uint32(120 << 23)) >> np.uint32(20)
            # Below 2⁻⁶ the grid is 2⁻⁹, a float's own spacing at 2¹⁴: let the adder round.
            values[i] = np.abs(values[i]) + np.float32(16384.0)
            small = bits[i] - np.uint32(0x46800000)
            code = small if magnitude < np.uint32(121 << 23) else normal
            raw[i] = np.uint8(code | sign)
    elif out_kind == TO_BF16:
        halves = out.view(np.uint16)[start : start + count]
        for i in range(count):
            b = bits[i]
            halves[i] = np.uint16(
                (b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            )
    elif out_kind == TO_F16:
        halves = out.view(np.uint16)[start : start + count]
        for i in range(count):
            b = bits[i]
            magnitude = b & np.uint32(0x7FFFFFFF)
            sign = (b >> np.uint32(16)) & np.uint32(0x8000)
            rounded = magnitude + np.uint32(0xFFF) + ((magnitude >> np.uint32(13)) & np.uint32(1))
            normal = (rounded - np.uint32(112 << 23)) >> np.uint32(13)
            # The grid below 2⁻¹⁴ is 2⁻²⁴, a float's own spacing at ½.
            values[i] = np.abs(values[i]) + np.float32(0.5)
            small = bits[i] - np.uint32(0x3F000000)
            code = small if magnitude < np.uint32(113 << 23) else normal
            halves[i] = np.uint16(min(code, np.uint32(0x7C00)) | sign)
    else:
        full = out.view(np.uint32)[start : start + count]
        for i in range(count):
            full[i] = bits[i]


@njit(inline="always")
def _scale_of(absmax, largest, power_of_2, one):
    """absmax / largest; 1 where that is below 2⁻¹²⁶; rounded up to a power of two if asked."""
    scale = np.float32(absmax / largest)
    if scale < _SMALLEST_SCALE:
        return np.float32(1.0)
    if power_of_2:
        one[0] = scale
        bits = one.view(np.uint32)
        exponent = bits[0] & _INF_BITS
        if bits[0] != exponent:
            exponent += np.uint32(1 << 23)
        bits[0] = exponent
        return one[0]
    return scale


@_loop()
def convert_rows(
    source, kind, rows, cols, source_scale, block_rows, block_cols, row0,
    out, out_kind, out_cols, scales, tile_rows, tile_cols, given, power_of_2, values,
    multiplier, divisor,
):  # fmt: skip
    """Convert `rows` rows that begin at row `row0` of the weight.

    source        uint8 [≥ rows · cols · item], the rows as stored, row major; of 4 bits: two to a byte
    source_scale  float32 [*, *] one scale per block_rows × block_cols tile; empty: none
    out           uint8 [≥ rows · out_cols · item]; rows are `out_cols` ≥ cols elements apart
    scales        float32 [⌈rows / tile_rows⌉, ⌈cols / tile_cols⌉]: written, or read if `given`
    values        float32 [≥ cols, or tile_rows · tile_cols if tile_rows > 1], scratch
    multiplier, divisor  float32, of every value after its scale: NVFP4's second one; 1 where there is none

    Returns −1, or the first row (relative) that holds NaN or Inf; what follows is not converted.
    """
    largest = np.float32(448.0) if out_kind == TO_E4M3 else np.float32(127.0)
    plain = out_kind >= TO_BF16
    one = np.empty(1, np.float32)
    # Tiles of one row share its decoding; taller tiles are decoded one by one, to stay in cache.
    strip = max(cols, 1) if tile_rows == 1 else tile_cols
    for top in range(0, rows, tile_rows):
        bottom = min(rows, top + tile_rows)
        for left in range(0, cols, strip):
            width = min(cols - left, strip)
            for r in range(top, bottom):
                part = values[(r - top) * width : (r - top + 1) * width]
                scale_row = (row0 + r) // block_rows
                if not _decode(
                    source, kind, r * cols + left, width, source_scale, scale_row, block_cols, left,
                    multiplier, divisor, part,
                ):  # fmt: skip
                    return r
            if plain:
                for r in range(top, bottom):
                    part = values[(r - top) * width : (r - top + 1) * width]
                    _encode(part, width, np.float32(1.0), out_kind, out, r * out_cols + left)
                continue
            for start in range(0, width, tile_cols):
                stop = min(width, start + tile_cols)
                column = (left + start) // tile_cols
                if not given:
                    peak = np.float32(0.0)
                    for r in range(bottom - top):
                        peak = max(peak, _absmax(values[r * width + start : r * width + stop], stop - start))
                    # Scales of the source can push a decoded value out of float32.
                    if not (peak < np.inf):
                        return top
                    scales[top // tile_rows, column] = _scale_of(peak, largest, power_of_2, one)
                scale = scales[top // tile_rows, column]
                for r in range(top, bottom):
                    part = values[(r - top) * width + start : (r - top) * width + stop]
                    _encode(part, stop - start, scale, out_kind, out, r * out_cols + left + start)
    return -1


@_loop()
def absmax_rows(
    source, kind, rows, cols, source_scale, block_rows, block_cols, row0, values, multiplier, divisor
):
    """(largest magnitude, −1), or (0, first row with NaN or Inf). Arguments as `convert_rows`;
    `values` holds one row. The first pass of a scale per tensor."""
    peak = np.float32(0.0)
    for r in range(rows):
        scale_row = (row0 + r) // block_rows
        if not _decode(
            source, kind, r * cols, cols, source_scale, scale_row, block_cols, 0, multiplier, divisor, values
        ):
            return np.float32(0.0), r
        peak = max(peak, _absmax(values, cols))
    return peak, -1


@_loop()
def unpair(source, cols, out):
    """Rows of `cols` bytes → twice as many of a 4-bit code to a byte: one of the lower halves, one of the upper."""
    for r in range(source.size // cols):
        row, low, high = source[r * cols :], out[2 * r * cols :], out[(2 * r + 1) * cols :]
        for c in range(cols):
            low[c] = row[c] & np.uint8(15)
            high[c] = row[c] >> np.uint8(4)


@_loop()
def turn(source, pitch, columns, out, first):
    """out[r, first + c] = source[c · pitch + r]: `columns` columns of a matrix from rows that lie `pitch` apart.

    Eight columns at a time: as many streams are read as a processor prefetches, and 16 bytes are written to a row.
    """
    rows, whole = out.shape[0], columns // 8 * 8
    for c in range(0, whole, 8):
        at, to = c * pitch, first + c
        for r in range(rows):
            row = out[r]
            row[to] = source[at + r]
            row[to + 1] = source[at + pitch + r]
            row[to + 2] = source[at + 2 * pitch + r]
            row[to + 3] = source[at + 3 * pitch + r]
            row[to + 4] = source[at + 4 * pitch + r]
            row[to + 5] = source[at + 5 * pitch + r]
            row[to + 6] = source[at + 6 * pitch + r]
            row[to + 7] = source[at + 7 * pitch + r]
    for c in range(whole, columns):
        for r in range(rows):
            out[r, first + c] = source[c * pitch + r]


@_loop()
def error_rows(x, y):
    """(Σ (x − y)², Σ x², max |x − y|) of two float32 vectors, in float64."""
    error, power, worst = 0.0, 0.0, 0.0
    for i in range(x.size):
        difference = np.float64(x[i]) - np.float64(y[i])
        error += difference * difference
        power += np.float64(x[i]) * np.float64(x[i])
        worst = max(worst, abs(difference))
    return error, power, worst
