# mypy: ignore-errors
# The bodies below are compiled by numba, whose intrinsics mypy cannot type.
"""The CPU kernels: two loops, compiled by numba per instruction set and cached on disk.

`prepare` turns rows of activations into the operand that a tile wants (int16, uint8 + 128,
float32 or bfloat16), quantizing on the way. `matmul` multiplies it with weights as stored,
[N, K], and applies scales, bias and the routed weight.

Both are C functions of one int64 parameter block, run by every thread of a parallel region
at once; work is handed out through an atomic counter in that block. So a call crosses from
Python once, without the GIL, and needs no numba dispatcher.

The on-disk cache of numba is keyed on processor and features, the function's bytecode and
its closure, but not on the files of what it calls: `stamp`, a digest of these sources, sits
in the closure so that an edit or an upgrade recompiles.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types

from lowbit.ops import cpu_emit
from lowbit.ops.cpu_emit import (
    SCALE_LANES,
    bf16_to_f32,
    bits_to_f32,
    e4m3_code,
    e4m3_to_f32,
    f16_to_f32,
    f32_to_bf16,
    f32_to_f16,
    fetch_add,
    hadamard8,
    magnitude_bits,
    pointer,
    round_code,
    round_e4m3,
    scale_row,
    tile,
    zero_if_nan,
)
from lowbit.ops.cpu_params import (
    A_BF16,
    A_E4M3_BYTES,
    A_F32,
    A_I8_BYTES,
    A_I16,
    A_U8,
    BF16,
    E4M3_CODES,
    F16,
    I8_CODES,
    MODE_E4M3,
    MODE_INT8,
    MODE_NONE,
    W_E4M3,
    W_I8,
    W_U8,
    M,
    P,
)

# Copied into plain module constants: numba freezes those, and cannot read attributes of classes.
P_NEXT, P_SLOT, P_ROWS, P_K, P_GROUP, P_GROUP_PADDED = P.NEXT, P.SLOT, P.ROWS, P.K, P.GROUP, P.GROUP_PADDED
P_X, P_X_ROW, P_X_DTYPE = P.X, P.X_ROW, P.X_DTYPE
P_A, P_A_ROW, P_A_KIND, P_MODE, P_STATIC, P_ZERO = P.A, P.A_ROW, P.A_KIND, P.MODE, P.STATIC, P.ZERO
P_SCALE, P_POWER_OF_2, P_SCRATCH, P_SLOT_BYTES, P_ONES = (
    P.SCALE,
    P.POWER_OF_2,
    P.SCRATCH,
    P.SLOT_BYTES,
    P.ONES,
)
P_ROWS_PER_TASK, P_ROWS_PADDED, P_SHIFT = P.ROWS_PER_TASK, P.ROWS_PADDED, P.SHIFT
P_LOWEST = P.LOWEST
M_NEXT, M_SLOT, M_A, M_A_ROW, M_ONES = M.NEXT, M.SLOT, M.A, M.A_ROW, M.ONES
M_W, M_W_ROW, M_W_EXPERT, M_W_END = M.W, M.W_ROW, M.W_EXPERT, M.W_END
M_OUT, M_OUT_ROW, M_OUT_DTYPE = M.OUT, M.OUT_ROW, M.OUT_DTYPE
M_A_SCALE, M_A_SCALE_ROW, M_A_SCALE_GROUP = M.A_SCALE, M.A_SCALE_ROW, M.A_SCALE_GROUP
M_W_SCALE, M_W_SCALE_EXPERT, M_W_SCALE_ROW = M.W_SCALE, M.W_SCALE_EXPERT, M.W_SCALE_ROW
M_W_SCALE_ROWS, M_W_SCALE_GROUP = M.W_SCALE_ROWS, M.W_SCALE_GROUP
M_BIAS, M_BIAS_EXPERT, M_ROUTED, M_BLOCKS, M_BLOCK_COUNT = (
    M.BIAS,
    M.BIAS_EXPERT,
    M.ROUTED,
    M.BLOCKS,
    M.BLOCK_COUNT,
)
M_N, M_K, M_GROUP, M_GROUP_PADDED, M_CHUNK = M.N, M.K, M.GROUP, M.GROUP_PADDED, M.CHUNK
M_PER_GROUP, M_ZERO, M_SCRATCH, M_SLOT_BYTES = M.PER_GROUP, M.ZERO, M.SCRATCH, M.SLOT_BYTES
M_BLOCK_ROWS, M_BLOCK_COLS = M.BLOCK_ROWS, M.BLOCK_COLS

SMALLEST_SCALE = np.float32(np.finfo(np.float32).tiny)
SIGNATURE = types.void(types.CPointer(types.int64))


@njit
def load_row(dtype, source, out, n):  # type: ignore[no-untyped-def]
    """n elements of any input type → float32, exactly."""
    if dtype == F16:
        half = carray(pointer(source), n, np.uint16)
        for i in range(n):
            out[i] = f16_to_f32(half[i])
    elif dtype == BF16:
        brain = carray(pointer(source), n, np.uint16)
        for i in range(n):
            out[i] = bf16_to_f32(brain[i])
    elif dtype == I8_CODES:
        codes = carray(pointer(source), n, np.int8)
        for i in range(n):
            out[i] = np.float32(codes[i])
    elif dtype == E4M3_CODES:
        raw = carray(pointer(source), n, np.uint8)
        for i in range(n):
            out[i] = e4m3_to_f32(raw[i])
    else:
        full = carray(pointer(source), n, np.float32)
        for i in range(n):
            out[i] = full[i]


@njit
def store_row(dtype, values, target, n):  # type: ignore[no-untyped-def]
    """float32 → n elements of float32, float16 or bfloat16, half to even."""
    if dtype == F16:
        half = carray(pointer(target), n, np.uint16)
        for i in range(n):
            half[i] = f32_to_f16(values[i])
    elif dtype == BF16:
        brain = carray(pointer(target), n, np.uint16)
        for i in range(n):
            brain[i] = f32_to_bf16(values[i])
    else:
        full = carray(pointer(target), n, np.float32)
        for i in range(n):
            full[i] = values[i]


@njit
def dynamic_scale(values, n, largest, power_of_2):  # type: ignore[no-untyped-def]
    """absmax / largest; 1 where that is below the smallest normal; NaN where a value is NaN."""
    top = np.int32(0)
    for i in range(n):
        top = max(top, magnitude_bits(values[i]))
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


@njit
def write_operand(kind, mode, values, scale, zero, shift_by, lowest, target, n, padded):  # type: ignore[no-untyped-def]
    """One scale group of one row → the operand at `target`, zeros from n up to `padded`."""
    if mode == MODE_INT8:
        shift, low = np.float32(shift_by), np.int32(lowest)
        if kind == A_I16:
            wide = carray(pointer(target), padded, np.int16)
            for i in range(n):
                wide[i] = np.int16(max(round_code(zero_if_nan(values[i] / scale) + shift), low) - zero)
            wide[n:padded] = 0
        elif kind == A_U8:
            unsigned = carray(pointer(target), padded, np.uint8)
            for i in range(n):
                unsigned[i] = np.uint8(max(round_code(zero_if_nan(values[i] / scale) + shift), low) + 128)
            unsigned[n:padded] = 0
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
        full[:n] = values[:n]
        full[n:padded] = 0
    elif kind == A_BF16:
        brain = carray(pointer(target), padded, np.uint16)
        for i in range(n):
            brain[i] = f32_to_bf16(values[i])
        brain[n:padded] = 0
    else:
        bytes_ = carray(pointer(target), padded, np.uint8)
        for i in range(n):
            bytes_[i] = e4m3_code(values[i])
        bytes_[n:padded] = 0


@cache
def stamp() -> str:
    """Digest of the sources that the compiled loops come from."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for name in ("cpu_emit.py", "cpu_kernels.py", "cpu_params.py"):
        digest.update((here / name).read_bytes())
    return digest.hexdigest()


@cache
def prepare() -> Any:
    """Compile (or load) `prepare`; a ctypes function of the parameter block's address."""
    source = stamp()

    @cfunc(SIGNATURE, cache=True)
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
        if slot == 0 and p[P_ONES] != 0:
            ones = carray(pointer(p[P_ONES]), groups * padded, np.uint8)
            for g in range(groups):
                n = min(group, k - g * group)
                ones[g * padded : g * padded + n] = 1
                ones[g * padded + n : (g + 1) * padded] = 0
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
                    load_row(x_dtype, p[P_X] + row * p[P_X_ROW] + g * group * x_element, values, n)
                    if mode != MODE_NONE and p[P_STATIC] == 0:
                        scale = dynamic_scale(values, n, largest, p[P_POWER_OF_2])
                    if p[P_SCALE] != 0:
                        scales = carray(pointer(p[P_SCALE]), rows * groups, np.float32)
                        scales[row * groups + g] = scale
                    target = p[P_A] + row * p[P_A_ROW] + g * padded * element
                    # A group of codes that leave the kernel is not padded at its end.
                    width = n if kind in (A_I8_BYTES, A_E4M3_BYTES) else padded
                    write_operand(kind, mode, values, scale, zero, p[P_SHIFT], p[P_LOWEST], target, n, width)

    return prepare_rows


@njit
def decode_row(storage, source, kind, target, n, padded):  # type: ignore[no-untyped-def]
    """n stored weights → float32, bfloat16 (both exact) or int8, zeros up to `padded`."""
    codes = carray(pointer(source), n, np.int8)
    raw = carray(pointer(source), n, np.uint8)
    if kind == A_F32:
        full = carray(pointer(target), padded, np.float32)
        if storage == W_E4M3:
            for i in range(n):
                full[i] = e4m3_to_f32(raw[i])
        elif storage == W_U8:
            for i in range(n):
                full[i] = np.float32(raw[i]) - np.float32(128.0)
        else:
            for i in range(n):
                full[i] = np.float32(codes[i])
        full[n:padded] = 0
    elif kind == A_BF16:
        brain = carray(pointer(target), padded, np.uint16)
        if storage == W_E4M3:
            for i in range(n):
                brain[i] = f32_to_bf16(e4m3_to_f32(raw[i]))
        elif storage == W_U8:
            for i in range(n):
                brain[i] = f32_to_bf16(np.float32(raw[i]) - np.float32(128.0))
        else:
            for i in range(n):
                brain[i] = f32_to_bf16(np.float32(codes[i]))
        brain[n:padded] = 0
    else:
        plain = carray(pointer(target), padded, np.int8)
        plain[:n] = codes
        plain[n:padded] = 0


@cache
def matmul(kind: str, storage: str, tile_rows: int, tile_cols: int) -> Any:
    """Compile (or load) `matmul` for an instruction (see `cpu_emit._Step`) and weight storage.

    `storage` is `i8`, `e4m3` or `u8` (int8 plus 128); the integer instructions take `i8` only.
    """
    source = stamp()
    integer = kind.startswith(("pmaddwd", "dpbusd"))
    unsigned = kind.startswith("dpbusd")
    step = cpu_emit.operand_step(kind)
    operand = (
        A_I16
        if kind.startswith("pmaddwd")
        else A_U8
        if unsigned
        else A_F32
        if kind.startswith("fma")
        else A_BF16
    )
    element = {A_I16: 2, A_U8: 1, A_F32: 4, A_BF16: 2}[operand]
    decoded = 1 if integer else element  # bytes per weight in a panel
    panel_kind = A_I8_BYTES if integer else operand
    stored = {"i8": W_I8, "e4m3": W_E4M3, "u8": W_U8}[storage]
    # One row alone is bound by memory: decode while loading instead of through a panel.
    direct_kind = kind if integer else f"{kind}:{storage}"
    direct = kind.startswith("fma") or integer
    narrow_cols = 4

    @cfunc(SIGNATURE, cache=True)
    def matmul_tiles(parameters):  # type: ignore[no-untyped-def]
        _ = source
        p = carray(parameters, 48)
        base = p.ctypes.data
        slot = fetch_add(base + 8 * M_SLOT, 1)
        n_all, k_all, group, group_padded = p[M_N], p[M_K], p[M_GROUP], p[M_GROUP_PADDED]
        groups = (k_all + group - 1) // group if k_all > 0 else 0
        block_rows, block_cols, chunk = p[M_BLOCK_ROWS], p[M_BLOCK_COLS], p[M_CHUNK]
        blocks = carray(pointer(p[M_BLOCKS]), (p[M_BLOCK_COUNT], 3), np.int64)
        tasks = p[M_BLOCK_COUNT] * ((n_all + block_cols - 1) // block_cols)
        a_row, w_row, out_row = p[M_A_ROW], p[M_W_ROW], p[M_OUT_ROW]
        zero = np.int32(p[M_ZERO])
        per_group = p[M_PER_GROUP] != 0

        size = block_rows * block_cols
        memory = p[M_SCRATCH] + slot * p[M_SLOT_BYTES]
        accumulators = carray(pointer(memory), size, np.int32)
        totals = carray(pointer(memory + 4 * size), size, np.float32)
        sums = carray(pointer(memory + 8 * size), block_cols, np.int32)
        weights_scale = carray(pointer(memory + 8 * size + 4 * block_cols), block_cols, np.float32)
        sums_at, w_scales_at = memory + 8 * size, memory + 8 * size + 4 * block_cols
        scale_at = carray(pointer(memory + 8 * size + 8 * block_cols), block_cols, np.int64)
        panel = memory + 8 * size + 16 * block_cols
        scales = carray(pointer(p[M_A_SCALE]), 1 << 62, np.float32)

        w_scale = carray(pointer(p[M_W_SCALE]), 1 << 62, np.float32)
        while True:
            task = fetch_add(base + 8 * M_NEXT, 1)
            if task >= tasks:
                break
            n0 = task // p[M_BLOCK_COUNT] * block_cols
            which = task % p[M_BLOCK_COUNT]
            expert, row0, rows = blocks[which, 0], blocks[which, 1], blocks[which, 2]
            cols = min(block_cols, n_all - n0)
            padded_cols = (cols + SCALE_LANES - 1) // SCALE_LANES * SCALE_LANES
            used = (rows + tile_rows - 1) // tile_rows * tile_rows * block_cols
            accumulators[:used] = 0
            if per_group:
                totals[:used] = 0
            w0 = p[M_W] + expert * p[M_W_EXPERT] + n0 * w_row
            for j in range(cols):
                scale_at[j] = expert * p[M_W_SCALE_EXPERT] + (n0 + j) // p[M_W_SCALE_ROWS] * p[M_W_SCALE_ROW]
            a0 = p[M_A] + row0 * a_row
            for g in range(groups):
                in_group = min(group, k_all - g * group)
                sums[:] = 0
                for c0 in range(0, in_group, chunk):
                    depth = min(chunk, in_group - c0)
                    padded = (depth + step - 1) // step * step
                    w = w0 + g * group + c0
                    a = a0 + (g * group_padded + c0) * element
                    ones = p[M_ONES] + g * group_padded + c0
                    w_stride = w_row
                    inside = w + (cols - 1) * w_row + padded <= p[M_W_END]
                    # Reading past a row is harmless for integers (the operand is 0 there); past
                    # the last row of the tensor it is not. Floats could meet a NaN code.
                    direct_rows = integer or (direct and rows == 1 and padded == depth)
                    through_panel = not (inside and direct_rows)
                    if through_panel:
                        for j in range(cols):
                            decode_row(
                                stored, w + j * w_row, panel_kind, panel + j * padded * decoded, depth, padded
                            )
                        w = panel
                        w_stride = padded * decoded
                    c = memory
                    if rows == 1:
                        j = 0
                        while j < cols:
                            wide = j + narrow_cols <= cols
                            b = w + j * w_stride
                            if unsigned:
                                # The row and the ones together: one pass over the weights.
                                to_ones, to_sums = ones - a, 8 * size
                                if wide:
                                    tile(
                                        kind,
                                        2,
                                        narrow_cols,
                                        a,
                                        to_ones,
                                        b,
                                        w_stride,
                                        c + 4 * j,
                                        to_sums,
                                        padded,
                                    )
                                else:
                                    tile(kind, 2, 1, a, to_ones, b, w_stride, c + 4 * j, to_sums, padded)
                            elif through_panel or not direct:
                                if wide:
                                    tile(kind, 1, narrow_cols, a, 0, b, w_stride, c + 4 * j, 0, padded)
                                else:
                                    tile(kind, 1, 1, a, 0, b, w_stride, c + 4 * j, 0, padded)
                            elif wide:
                                tile(direct_kind, 1, narrow_cols, a, 0, b, w_stride, c + 4 * j, 0, padded)
                            else:
                                tile(direct_kind, 1, 1, a, 0, b, w_stride, c + 4 * j, 0, padded)
                            j += narrow_cols if wide else 1
                        continue
                    if unsigned:
                        for j in range(cols):
                            tile(
                                kind, 1, 1, ones, 0, w + j * w_stride, 0, memory + 8 * size + 4 * j, 0, padded
                            )
                    for i in range(0, rows, tile_rows):
                        a_tile, c_tile = a + i * a_row, c + 4 * i * block_cols
                        j = 0
                        while j + tile_cols <= cols:
                            b = w + j * w_stride
                            tile(
                                kind,
                                tile_rows,
                                tile_cols,
                                a_tile,
                                a_row,
                                b,
                                w_stride,
                                c_tile + 4 * j,
                                4 * block_cols,
                                padded,
                            )
                            j += tile_cols
                        while j < cols:
                            b = w + j * w_stride
                            tile(
                                kind,
                                tile_rows,
                                1,
                                a_tile,
                                a_row,
                                b,
                                w_stride,
                                c_tile + 4 * j,
                                4 * block_cols,
                                padded,
                            )
                            j += 1
                if per_group:
                    for j in range(cols):
                        weights_scale[j] = w_scale[scale_at[j] + g * p[M_W_SCALE_GROUP]]
                    for i in range(rows):
                        a_scale = np.float32(1.0)
                        if p[M_A_SCALE] != 0:
                            a_scale = scales[(row0 + i) * p[M_A_SCALE_ROW] + g * p[M_A_SCALE_GROUP]]
                        at = memory + 4 * i * block_cols
                        scale_row(
                            integer, True, at, zero, sums_at, a_scale, w_scales_at, at + 4 * size, padded_cols
                        )
            if not per_group:
                for j in range(cols):
                    weights_scale[j] = w_scale[scale_at[j]]
            out_element = 4 if p[M_OUT_DTYPE] != F16 and p[M_OUT_DTYPE] != BF16 else 2
            for i in range(rows):
                if per_group:
                    line = carray(pointer(memory + 4 * size + 4 * i * block_cols), block_cols, np.float32)
                else:
                    a_scale = np.float32(1.0)
                    if p[M_A_SCALE] != 0:
                        a_scale = scales[(row0 + i) * p[M_A_SCALE_ROW]]
                    at = memory + 4 * i * block_cols
                    scale_row(
                        integer, False, at, zero, sums_at, a_scale, w_scales_at, at + 4 * size, padded_cols
                    )
                    line = carray(pointer(at + 4 * size), block_cols, np.float32)
                if p[M_BIAS] != 0:
                    bias = carray(pointer(p[M_BIAS] + 4 * (expert * p[M_BIAS_EXPERT] + n0)), cols, np.float32)
                    for j in range(cols):
                        line[j] += bias[j]
                if p[M_ROUTED] != 0:
                    routed = carray(pointer(p[M_ROUTED]), row0 + rows, np.float32)[row0 + i]
                    for j in range(cols):
                        line[j] *= routed
                store_row(p[M_OUT_DTYPE], line, p[M_OUT] + (row0 + i) * out_row + n0 * out_element, cols)

    return matmul_tiles


@cache
def hadamard() -> Any:
    """Compile (or load) the blockwise Walsh–Hadamard transform; its block is that of `prepare`.

    GROUP is the transform's length (a power of two that divides K), SCALE the bits of 1/√length,
    A and A_ROW the output, of the input's type.
    """
    source = stamp()

    @cfunc(SIGNATURE, cache=True)
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
