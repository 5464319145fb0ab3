# mypy: ignore-errors
# The bodies below are compiled by numba, whose intrinsics mypy cannot type.
"""`prepare`: rows of activations → the operand that a tile wants (int16, int8, float32 or bfloat16),
quantized on the way; or codes, for the quantize operations. And the Hadamard transform.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import carray, cfunc, njit

from lowbit.compiling import CACHE
from lowbit.ops.cpu_emit import (
    bits_to_f32,
    e4m3_code,
    fetch_add,
    hadamard8,
    lower_half,
    magnitude_bits,
    pointer,
    round_code,
    round_e4m3,
    upper_half,
    zero_if_nan,
)
from lowbit.ops.cpu_params import (
    A_BF16,
    A_E4M3_BYTES,
    A_F32,
    A_I8,
    A_I8_BYTES,
    A_I16,
    BF16,
    E4M3_CODES,
    F16,
    F32,
    I8_CODES,
    MODE_E4M3,
    MODE_INT8,
    MODE_NONE,
    P,
)
from lowbit.ops.cpu_quantize import AT_ONCE, load_absmax, quantize_values
from lowbit.ops.cpu_rows import SIGNATURE, load_row, stamp, store_row
from lowbit.ops.cpu_tiles import pack

# Copied into plain module constants: numba freezes those, and cannot read attributes of classes.
P_A, P_A_KIND, P_A_ROW, P_GROUP, P_GROUP_PADDED = P.A, P.A_KIND, P.A_ROW, P.GROUP, P.GROUP_PADDED
P_K, P_LOWEST, P_MODE, P_NEXT, P_POWER_OF_2 = P.K, P.LOWEST, P.MODE, P.NEXT, P.POWER_OF_2
P_PARTS, P_ROWS, P_ROWS_PADDED, P_ROWS_PER_TASK, P_SCALE = (
    P.PARTS,
    P.ROWS,
    P.ROWS_PADDED,
    P.ROWS_PER_TASK,
    P.SCALE,
)
P_SCRATCH, P_SHIFT, P_SLOT, P_SLOT_BYTES, P_STATIC = P.SCRATCH, P.SHIFT, P.SLOT, P.SLOT_BYTES, P.STATIC
P_SUMS, P_X, P_X_DTYPE, P_X_ROW, P_ZERO = P.SUMS, P.X, P.X_DTYPE, P.X_ROW, P.ZERO

INFINITE = np.int32(0x7F800000)  # bits of infinity
SMALLEST_SCALE = np.float32(np.finfo(np.float32).tiny)


@njit
def load_values(dtype, source, values, n):  # type: ignore[no-untyped-def]
    """n floats or codes → float32; returns the bits of the largest magnitude, which of codes nobody asks."""
    whole = n // AT_ONCE * AT_ONCE
    at, top = values.ctypes.data, np.int32(0)
    element = 4
    if dtype == BF16:
        element, top = 2, load_absmax(BF16, source, at, whole)
    elif dtype == F16:
        element, top = 2, load_absmax(F16, source, at, whole)
    elif dtype == F32:
        top = load_absmax(F32, source, at, whole)
    else:
        load_row(dtype, source, values, n)
        return top
    load_row(dtype, source + element * whole, values[whole:], n - whole)
    for i in range(whole, n):
        top = max(top, magnitude_bits(values[i]))
    return top


# As IEEE divides: numba's own check for a divisor of 0 would end a loop halfway, and nobody would hear of it.
_divides = njit(error_model="numpy")


@_divides
def dynamic_scale(top, largest, power_of_2):  # type: ignore[no-untyped-def]
    """absmax / largest; 1 where that is below the smallest normal; NaN where a value is NaN."""
    scale = bits_to_f32(top) / largest
    if scale < SMALLEST_SCALE:
        return np.float32(1.0)
    if power_of_2 != 0:
        bits = magnitude_bits(scale)
        if bits >= 0x7F800000:
            return np.float32(np.nan)
        exponent = (bits >> 23) + (1 if bits & 0x7FFFFF else 0)
        # The next power of two above 2¹²⁷ does not exist: saturate, as encode_e8m0 does.
        return bits_to_f32(np.int32(min(exponent, 254) << 23))
    return scale


@_divides
def write_codes(kind, bounded, values, scale, zero, shift_by, lowest, target, whole):  # type: ignore[no-untyped-def]
    """The first `whole` (a multiple of 16) values, quantized; returns the sum of int8 codes.

    `bounded`: the scale is that of these values, which are finite.
    """
    divisor, lift = scale, np.float32(1.0)
    if scale < np.float32(2.0**-60):
        lift = np.float32(2.0**64)
    elif scale > np.float32(2.0**60):
        lift = np.float32(2.0**-64)
    divisor *= lift
    inverse = np.float32(1.0) / divisor
    if divisor == np.float32(np.inf):
        inverse = divisor = np.float32(0.0)
    at, shift = values.ctypes.data, np.float32(shift_by)
    if bounded and lift == np.float32(1.0):
        if kind == A_I16:
            return quantize_values(
                A_I16, True, at, lift, inverse, divisor, shift, lowest, zero, target, whole
            )
        if kind in (A_I8, A_I8_BYTES):
            return quantize_values(A_I8, True, at, lift, inverse, divisor, shift, lowest, 0, target, whole)
    if kind == A_I16:
        return quantize_values(A_I16, False, at, lift, inverse, divisor, shift, lowest, zero, target, whole)
    if kind in (A_I8, A_I8_BYTES):
        return quantize_values(A_I8, False, at, lift, inverse, divisor, shift, lowest, 0, target, whole)
    if kind == A_F32:
        return quantize_values(A_F32, False, at, lift, inverse, divisor, shift, 0, 0, target, whole)
    if kind == A_BF16:
        return quantize_values(A_BF16, False, at, lift, inverse, divisor, shift, 0, 0, target, whole)
    return quantize_values(A_E4M3_BYTES, False, at, lift, inverse, divisor, shift, 0, 0, target, whole)


@_divides
def write_operand(kind, mode, values, scale, zero, shift_by, lowest, target, n, padded, parts, part):  # type: ignore[no-untyped-def]
    """One scale group of one row → the operand at `target`, zeros from n up to `padded`.

    bfloat16 takes `parts`, `part` bytes apart, that add up to the values, exactly: 8 bits each.
    """
    if mode == MODE_INT8:
        shift, low = np.float32(shift_by), np.int32(lowest)
        if kind == A_I16:
            wide = carray(pointer(target), padded, np.int16)
            for i in range(n):
                wide[i] = np.int16(max(round_code(zero_if_nan(values[i] / scale) + shift), low) - zero)
            wide[n:padded] = 0
        else:
            codes = carray(pointer(target), padded, np.int8)
            for i in range(n):
                codes[i] = np.int8(max(round_code(zero_if_nan(values[i] / scale) + shift), low))
            codes[n:padded] = 0
        return
    if mode == MODE_E4M3:
        for i in range(n):
            values[i] = round_e4m3(values[i] / scale)
    if kind == A_F32:
        full = carray(pointer(target), padded, np.float32)
        for i in range(n):
            full[i] = values[i]
        full[n:padded] = 0
    elif kind == A_BF16:
        for at in range(parts):
            brain = carray(pointer(target + at * part), padded, np.uint16)
            for i in range(n):
                brain[i] = upper_half(values[i])
            brain[n:padded] = 0
            if at + 1 < parts:
                for i in range(n):
                    values[i] = lower_half(values[i])
    else:
        bytes_ = carray(pointer(target), padded, np.uint8)
        for i in range(n):
            bytes_[i] = e4m3_code(values[i])
        bytes_[n:padded] = 0


@njit
def sum_codes(address, n):  # type: ignore[no-untyped-def]
    codes = carray(pointer(address), n, np.int8)
    total = np.int32(0)
    for i in range(n):
        total += np.int32(codes[i])
    return total


@cache
def prepare() -> Any:
    """Compile (or load) `prepare`; a ctypes function of the parameter block's address."""
    source = stamp()

    @cfunc(SIGNATURE, cache=CACHE)
    def prepare_rows(parameters):  # type: ignore[no-untyped-def]
        _ = source
        p = carray(parameters, 32)
        base = p.ctypes.data
        slot = fetch_add(base + 8 * P_SLOT, 1)
        rows, k, group, padded = p[P_ROWS], p[P_K], p[P_GROUP], p[P_GROUP_PADDED]
        groups = (k + group - 1) // group if k > 0 else 0
        values = carray(pointer(p[P_SCRATCH] + slot * p[P_SLOT_BYTES]), group, np.float32)
        kind, mode, zero = p[P_A_KIND], p[P_MODE], p[P_ZERO]
        element = 4 if kind == A_F32 else (2 if kind in (A_I16, A_BF16) else 1)
        x_dtype = p[P_X_DTYPE]
        x_element = 2 if x_dtype in (F16, BF16) else 1 if x_dtype in (I8_CODES, E4M3_CODES) else 4
        largest = np.float32(127.0) if mode == MODE_INT8 else np.float32(448.0)
        scale = np.float32(1.0)
        if p[P_STATIC] != 0:
            scale = carray(pointer(p[P_STATIC]), 1, np.float32)[0]
        if slot == 0:
            # Rows that only fill up the last tile: their results are dropped, but reading
            # whatever was in memory would make denormal or NaN arithmetic slow.
            tail = carray(
                pointer(p[P_A] + rows * p[P_A_ROW]), (p[P_ROWS_PADDED] - rows) * p[P_A_ROW], np.uint8
            )
            tail[:] = 0
        step = p[P_ROWS_PER_TASK]
        while True:
            first = fetch_add(base + 8 * P_NEXT, step)
            if first >= rows:
                break
            for row in range(first, min(first + step, rows)):
                for g in range(groups):
                    n = min(group, k - g * group)
                    top = load_values(x_dtype, p[P_X] + row * p[P_X_ROW] + g * group * x_element, values, n)
                    if mode != MODE_NONE and p[P_STATIC] == 0:
                        scale = dynamic_scale(top, largest, p[P_POWER_OF_2])
                    if p[P_SCALE] != 0:
                        scales = carray(pointer(p[P_SCALE]), rows * groups, np.float32)
                        scales[row * groups + g] = scale
                    target = p[P_A] + row * p[P_A_ROW] + g * padded * element
                    # A group of codes that leave the kernel is not padded at its end.
                    width = n if kind in (A_I8_BYTES, A_E4M3_BYTES) else padded
                    done, total = 0, np.int32(0)
                    if mode != MODE_NONE:
                        done = n // AT_ONCE * AT_ONCE
                        bounded = p[P_STATIC] == 0 and top < INFINITE
                        total = write_codes(
                            kind, bounded, values, scale, zero, p[P_SHIFT], p[P_LOWEST], target, done
                        )
                    if done < width:
                        rest = target + done * element
                        write_operand(
                            kind, mode, values[done:], scale, zero, p[P_SHIFT], p[P_LOWEST], rest, n - done,
                            width - done, p[P_PARTS], p[P_A_ROW] // max(p[P_PARTS], 1),
                        )  # fmt: skip
                    if p[P_SUMS] != 0:
                        sums = carray(pointer(p[P_SUMS]), rows * groups, np.int32)
                        sums[row * groups + g] = total + sum_codes(target + done, n - done)

    return prepare_rows


@cache
def panels() -> Any:
    """Compile (or load) the rearranging of an operand into panels of 16 rows for AMX; its block is that of `prepare`.

    Unit (32 bits) u of row r of a panel comes to 64 · u + 4 · r. X, X_ROW and A are operand and
    output, ROWS the panels, STATIC the address of (first row, rows) of each, K the units of a row,
    GROUP those of a task, a multiple of 16.
    """
    source = stamp()

    @cfunc(SIGNATURE, cache=CACHE)
    def pack_panels(parameters):  # type: ignore[no-untyped-def]
        _ = source
        p = carray(parameters, 32)
        base = p.ctypes.data
        units, at_once, row = p[P_K], p[P_GROUP], p[P_X_ROW]
        parts = (units + at_once - 1) // at_once
        table = carray(pointer(p[P_STATIC]), (p[P_ROWS], 2), np.int64)
        while True:
            task = fetch_add(base + 8 * P_NEXT, 1)
            if task >= p[P_ROWS] * parts:
                break
            which, first = task // parts, task % parts * at_once
            target = p[P_A] + 64 * (which * units + first)
            at = p[P_X] + table[which, 0] * row + 4 * first
            pack("dpbf16512", at, row, table[which, 1], target, 64, min(at_once, units - first))

    return pack_panels


@cache
def hadamard() -> Any:
    """Compile (or load) the blockwise Walsh–Hadamard transform; its block is that of `prepare`.

    GROUP is the transform's length (a power of two that divides K), SCALE the bits of 1/√length,
    A and A_ROW the output, of the input's type.
    """
    source = stamp()

    @cfunc(SIGNATURE, cache=CACHE)
    def hadamard_rows(parameters):  # type: ignore[no-untyped-def]
        _ = source
        p = carray(parameters, 32)
        base = p.ctypes.data
        slot = fetch_add(base + 8 * P_SLOT, 1)
        rows, length, step = p[P_ROWS], p[P_GROUP], p[P_ROWS_PER_TASK]
        blocks = p[P_K] // length
        memory = p[P_SCRATCH] + slot * p[P_SLOT_BYTES]
        values = carray(pointer(memory), length, np.float32)
        scale = bits_to_f32(np.int32(p[P_SCALE]))
        element = 2 if p[P_X_DTYPE] == F16 or p[P_X_DTYPE] == BF16 else 4
        while True:
            first = fetch_add(base + 8 * P_NEXT, step)
            if first >= rows * blocks:
                break
            for item in range(first, min(first + step, rows * blocks)):
                row, offset = item // blocks, item % blocks * length * element
                load_row(p[P_X_DTYPE], p[P_X] + row * p[P_X_ROW] + offset, values, length)
                distance = 1
                if length >= 8:
                    for i in range(0, length, 8):
                        hadamard8(memory + 4 * i)
                    distance = 8
                while distance < length:
                    for i in range(0, length, 2 * distance):
                        low, high = values[i : i + distance], values[i + distance : i + 2 * distance]
                        for j in range(distance):
                            a, b = low[j], high[j]
                            low[j], high[j] = a + b, a - b
                    distance *= 2
                for j in range(length):
                    values[j] *= scale
                store_row(p[P_X_DTYPE], values, p[P_A] + row * p[P_A_ROW] + offset, length)

    return hadamard_rows
