# mypy: ignore-errors
# The bodies below are compiled by numba, whose intrinsics mypy cannot type.
"""`matmul`: an operand made by `prepare` times weights as stored, [N, K]; then scales, bias and routed weight.

A task is a block of the output. A few rows are multiplied with weights as stored, decoded while they
are loaded; for more, the block's weights are decoded and transposed into a panel first.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import carray, cfunc, njit

from lowbit.compiling import CACHE
from lowbit.ops import cpu_step
from lowbit.ops.cpu_decode import decode
from lowbit.ops.cpu_emit import fetch_add, pointer
from lowbit.ops.cpu_epilogue import finish_block, locate_scales
from lowbit.ops.cpu_params import A_BF16, A_F32, A_I8_BYTES, A_I16, W_BF16, W_E4M3, W_I8, W_U8, M
from lowbit.ops.cpu_rows import SIGNATURE, stamp
from lowbit.ops.cpu_scale import add_scaled
from lowbit.ops.cpu_tiles import dot_tile, pack, packed_tile

# Copied into plain module constants: numba freezes those, and cannot read attributes of classes.
M_A, M_A_ROW, M_A_SCALE, M_A_SCALE_GROUP, M_A_SCALE_ROW = (
    M.A,
    M.A_ROW,
    M.A_SCALE,
    M.A_SCALE_GROUP,
    M.A_SCALE_ROW,
)
M_A_SUM, M_BLOCKS, M_BLOCK_COLS, M_BLOCK_COUNT, M_BLOCK_ROWS = (
    M.A_SUM, M.BLOCKS, M.BLOCK_COLS, M.BLOCK_COUNT, M.BLOCK_ROWS,
)  # fmt: skip
M_CHUNK, M_GROUP, M_GROUP_PADDED, M_K, M_N, M_NEXT = M.CHUNK, M.GROUP, M.GROUP_PADDED, M.K, M.N, M.NEXT
M_DOT_ROWS, M_PER_GROUP, M_SCRATCH, M_SLOT, M_SLOT_BYTES = (
    M.DOT_ROWS,
    M.PER_GROUP,
    M.SCRATCH,
    M.SLOT,
    M.SLOT_BYTES,
)
M_W, M_W_END, M_W_EXPERT, M_W_ROW, M_W_SCALE, M_W_SCALE_GROUP = (
    M.W, M.W_END, M.W_EXPERT, M.W_ROW, M.W_SCALE, M.W_SCALE_GROUP,
)  # fmt: skip

DOT_COLS, LINE = 4, 64
NEAR = 4096  # bytes that the first cache has room for beside what a tile works on


@njit(inline="always")
def dot_rows(kind, tall, lines, cache, size, a, lda, w, stride, c, ldc, rows, cols, k):  # type: ignore[no-untyped-def]
    """A few rows, `tall` (2 or 4) at a time; weights (of `size` bytes) are read once, and then stay in the first cache.

    The tiles of one set of columns share the next columns' weights between them and ask for
    them piece by piece, in the order of addresses where rows are whole: memory is then busy
    all the time, and not only while the first tile waits for it.
    """
    whole = cols // DOT_COLS * DOT_COLS
    tiles = (rows + tall - 1) // tall
    along, across, part = 256 // tiles, 256 * stride * DOT_COLS // lines, size * k // tiles
    if stride - size * k < LINE:
        along, across, part = DOT_COLS * along, LINE * 256 // tiles, DOT_COLS * part
    for j in range(0, whole, DOT_COLS):
        b, i = w + j * stride, 0
        ahead = b + DOT_COLS * stride
        while i < rows:
            at, c_at = a + i * lda, c + i * ldc + 4 * j
            if rows == 1:
                dot_tile(kind, 1, DOT_COLS, cache, at, lda, b, stride, ahead, along, across, c_at, ldc, k)
            elif rows - i > 2:
                dot_tile(kind, tall, DOT_COLS, cache, at, lda, b, stride, ahead, along, across, c_at, ldc, k)
            else:
                dot_tile(kind, 2, DOT_COLS, cache, at, lda, b, stride, ahead, along, across, c_at, ldc, k)
            i += tall
            ahead += part
    for j in range(whole, cols):
        b = w + j * stride
        for i in range(rows):
            dot_tile(kind, 1, 1, 1, a + i * lda, lda, b, stride, b, 0, 0, c + i * ldc + 4 * j, ldc, k)


@njit(inline="always")
def packed_rows(kind, tall, vectors, ldb, a, a_row, b, ahead, share, c, c_row, rows, units):  # type: ignore[no-untyped-def]
    """All rows of a block times one packed panel: tiles of `tall` rows, then 4, then 2.

    Meanwhile `share` bytes at `ahead` are asked for, of weights that are packed next.
    """
    i = 0
    along = share * 256 // (units * ((rows + tall - 1) // tall))
    while i < rows:
        left = rows - i
        at, c_at = a + i * a_row, c + i * c_row
        if left >= tall and left != 8:
            packed_tile(kind, tall, vectors, ldb, at, a_row, b, ahead, along, c_at, c_row, units)
            i += tall
        elif left > 2:
            packed_tile(kind, 4, vectors, ldb, at, a_row, b, ahead, along, c_at, c_row, units)
            i += 4
        else:
            packed_tile(kind, 2, vectors, ldb, at, a_row, b, ahead, along, c_at, c_row, units)
            i += 2
        ahead += along * units >> 8


@cache
def matmul(kind: str, storage: str, tile_rows: int, tile_vectors: int, byte_lookup: bool = False) -> Any:
    """Compile (or load) `matmul` for an instruction (see `cpu_step.Step`) and weight storage.

    `storage` is `i8`, `e4m3`, `u8` (int8 plus 128) or `bf16` (values, not codes). The integer
    instructions take `i8` only, and `bf16` goes with `fma`. `byte_lookup`: the CPU has AVX-512 VBMI.
    """
    source = stamp()
    unsigned = kind.startswith("dpbusd")
    integer = unsigned or kind.startswith("pmaddwd")
    step, lanes = cpu_step.operand_step(kind), cpu_step.lanes(kind)
    operand = A_F32 if kind.startswith("fma") else A_I16 if kind.startswith("pmaddwd") else A_BF16
    element = {A_I16: 2, A_F32: 4, A_BF16: 2}[operand] if not unsigned else 1
    # Weights as the tiles read them before packing: integers as stored, floats decoded.
    row_kind, row_element = (A_I8_BYTES, 1) if integer else (operand, element)
    stored = {"i8": W_I8, "e4m3": W_E4M3, "u8": W_U8, "bf16": W_BF16}[storage]
    plain = storage == "bf16"
    lookup = byte_lookup and operand == A_BF16
    w_size = 2 if plain else 1
    # A few rows are bound by memory: decode while loading instead of into memory.
    direct = kind.startswith("fma") or integer
    direct_kind = f"{kind}:{storage}" if direct and not integer else kind
    tile_cols = tile_vectors * lanes
    panel_row = 4 * tile_cols
    dot_lines = cpu_step.requests(direct_kind, DOT_COLS)
    dot_tall = 4 if lanes == 16 else 2  # 16 registers do not hold 4 × 4 accumulators and their operands

    @cfunc(SIGNATURE, cache=CACHE)
    def matmul_tiles(parameters):  # type: ignore[no-untyped-def]
        _ = source
        p = carray(parameters, 48)
        base = p.ctypes.data
        slot = fetch_add(base + 8 * M_SLOT, 1)
        n_all, k_all, group, group_padded = p[M_N], p[M_K], p[M_GROUP], p[M_GROUP_PADDED]
        groups = (k_all + group - 1) // group if k_all > 0 else 0
        block_rows, block_cols, chunk = p[M_BLOCK_ROWS], p[M_BLOCK_COLS], p[M_CHUNK]
        blocks = carray(pointer(p[M_BLOCKS]), (p[M_BLOCK_COUNT], 4), np.int64)
        tasks = p[M_BLOCK_COUNT] * ((n_all + block_cols - 1) // block_cols)
        a_row, w_row = p[M_A_ROW], p[M_W_ROW]
        per_group = p[M_PER_GROUP] != 0

        size = block_rows * block_cols
        memory = p[M_SCRATCH] + slot * p[M_SLOT_BYTES]
        accumulators = carray(pointer(memory), size, np.int32)
        totals = carray(pointer(memory + 4 * size), size, np.float32)
        w_scales_at = memory + 8 * size
        weights_scale = carray(pointer(w_scales_at), block_cols, np.float32)
        scale_at = carray(pointer(w_scales_at + 4 * block_cols), block_cols, np.int64)
        bias_at = w_scales_at + 12 * block_cols
        panel = bias_at + 4 * block_cols
        decoded = panel + block_cols * chunk * element
        scales = carray(pointer(p[M_A_SCALE]), 1 << 62, np.float32)
        code_sums = carray(pointer(p[M_A_SUM]), 1 << 62, np.int32)
        w_scale = carray(pointer(p[M_W_SCALE]), 1 << 62, np.float32)
        c_row = 4 * block_cols
        while True:
            task = fetch_add(base + 8 * M_NEXT, 1)
            if task >= tasks:
                break
            n0 = task // p[M_BLOCK_COUNT] * block_cols
            which = task % p[M_BLOCK_COUNT]
            expert, row0, rows = blocks[which, 0], blocks[which, 1], blocks[which, 2]
            cols = min(block_cols, n_all - n0)
            used = (rows + 1) // 2 * 2 * block_cols
            accumulators[:used] = 0
            if per_group:
                totals[:used] = 0
            w0 = p[M_W] + expert * p[M_W_EXPERT] + n0 * w_row
            locate_scales(p, expert, n0, cols, scale_at)
            a0 = p[M_A] + row0 * a_row
            # The next task's weights: asked for while this one multiplies the last rows.
            share, ahead = 0, w0
            following = w0 + block_cols * w_row
            if which == p[M_BLOCK_COUNT] - 1 and groups == 1 and following + block_cols * w_row <= p[M_W_END]:
                panels = (cols + tile_cols - 1) // tile_cols * ((k_all + chunk - 1) // chunk)
                share, ahead = block_cols * w_row // panels, following
            few = rows <= p[M_DOT_ROWS]
            no_panel = few and (integer or plain)
            for g in range(groups):
                in_group = min(group, k_all - g * group)
                # Where nothing goes through the panel, no panel limits how much of K a pass takes.
                end = w0 + (cols - 1) * w_row + w_size * (g * group + (in_group + step - 1) // step * step)
                at_once = in_group if no_panel and end <= p[M_W_END] else chunk
                for c0 in range(0, in_group, at_once):
                    depth = min(at_once, in_group - c0)
                    padded = (depth + step - 1) // step * step
                    w = w0 + w_size * (g * group + c0)
                    a = a0 + (g * group_padded + c0) * element
                    # Reading past a row is harmless for integers (the operand is 0 there); past
                    # the last row of the tensor it is not. Floats could meet a NaN code.
                    inside = w + (cols - 1) * w_row + w_size * padded <= p[M_W_END]
                    if few:
                        stride = w_row
                        as_stored = inside and (integer or (direct and padded == depth))
                        if not as_stored:
                            stride = padded * row_element
                            for j in range(cols):
                                decode(
                                    lookup, stored, w + j * w_row, row_kind, panel + j * stride, depth, padded
                                )
                            w = panel
                        if integer and DOT_COLS * w_row > NEAR:
                            dot_rows(
                                kind, dot_tall, dot_lines, 2, 1, a, a_row, w, stride, memory, c_row, rows, cols, padded
                            )  # fmt: skip
                        elif integer:
                            dot_rows(
                                kind, dot_tall, dot_lines, 1, 1, a, a_row, w, stride, memory, c_row, rows, cols, padded
                            )  # fmt: skip
                        elif as_stored:
                            dot_rows(
                                direct_kind, dot_tall, dot_lines, 1, w_size, a, a_row, w, stride, memory, c_row,
                                rows, cols, padded,
                            )  # fmt: skip
                        else:
                            dot_rows(
                                kind, dot_tall, 1, 1, element, a, a_row, w, stride, memory, c_row, rows, cols, padded
                            )  # fmt: skip
                        continue
                    units = padded * element // 4
                    for j in range(0, cols, lanes):
                        valid = min(lanes, cols - j)
                        rows_at, stride = w + j * w_row, w_row
                        if not (integer and inside):
                            rows_at, stride = decoded, padded * row_element
                            for i in range(valid):
                                at = w + (j + i) * w_row
                                decode(lookup, stored, at, row_kind, decoded + i * stride, depth, padded)
                        at = panel + j // tile_cols * tile_cols * 4 * units + j % tile_cols * 4
                        pack(kind, rows_at, stride, valid, at, panel_row, units)
                    for j in range(0, cols, tile_cols):
                        b = panel + 4 * units * j
                        full = cols - j > tile_cols - lanes
                        if full:
                            packed_rows(
                                kind, tile_rows, tile_vectors, panel_row, a, a_row, b, ahead, share,
                                memory + 4 * j, c_row, rows, units,
                            )  # fmt: skip
                        else:
                            for v in range(0, cols - j, lanes):
                                packed_rows(
                                    kind, tile_rows, 1, panel_row, a, a_row, b + 4 * v, ahead, 0,
                                    memory + 4 * (j + v), c_row, rows, units,
                                )  # fmt: skip
                        ahead += share
                if per_group:
                    for j in range(cols):
                        weights_scale[j] = w_scale[scale_at[j] + g * p[M_W_SCALE_GROUP]]
                    for i in range(rows):
                        a_scale = np.float32(1.0)
                        if p[M_A_SCALE] != 0:
                            a_scale = scales[(row0 + i) * p[M_A_SCALE_ROW] + g * p[M_A_SCALE_GROUP]]
                        offset = np.int32(0)
                        if unsigned:
                            offset = np.int32(code_sums[(row0 + i) * groups + g] * 128)
                        at = memory + i * c_row
                        add_scaled(integer, at, offset, a_scale, w_scales_at, at + 4 * size, cols)
            sums = memory + 4 * size if per_group else memory
            finish_block(
                integer, unsigned, p, expert, row0, rows, n0, scale_at[:cols], sums, c_row, memory + 4 * size,
                w_scales_at, bias_at,
            )  # fmt: skip

    return matmul_tiles
