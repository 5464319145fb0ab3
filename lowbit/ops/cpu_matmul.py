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
from numba import carray, cfunc

from lowbit.compiling import CACHE
from lowbit.ops import cpu_step
from lowbit.ops.cpu_block import DOT_COLS, dot_rows, packed_rows
from lowbit.ops.cpu_decode import column_at, fill_panel, packs_at_once
from lowbit.ops.cpu_emit import fetch_add, pointer
from lowbit.ops.cpu_epilogue import finish_block, locate_scales
from lowbit.ops.cpu_isa import Tile
from lowbit.ops.cpu_params import (
    A_BF16,
    A_F32,
    A_I8_BYTES,
    PAIRED_ROWS,
    W_BF16,
    W_E4M3,
    W_I8,
    W_U8,
    M,
)
from lowbit.ops.cpu_rows import SIGNATURE, stamp
from lowbit.ops.cpu_winograd import paired_columns

# Copied into plain module constants: numba freezes those, and cannot read attributes of classes.
M_A, M_A_ROW, M_A_SCALE, M_A_SCALE_GROUP, M_A_SCALE_ROW = (
    M.A,
    M.A_ROW,
    M.A_SCALE,
    M.A_SCALE_GROUP,
    M.A_SCALE_ROW,
)
M_A_PANELS, M_A_SUM, M_BLOCKS, M_BLOCK_COLS, M_BLOCK_COUNT, M_BLOCK_ROWS = (
    M.A_PANELS, M.A_SUM, M.BLOCKS, M.BLOCK_COLS, M.BLOCK_COUNT, M.BLOCK_ROWS,
)  # fmt: skip
M_CHUNK, M_GROUP, M_GROUP_PADDED, M_K, M_N, M_NEXT = M.CHUNK, M.GROUP, M.GROUP_PADDED, M.K, M.N, M.NEXT
M_DOT_ROWS, M_SCRATCH, M_SLOT, M_SLOT_BYTES = M.DOT_ROWS, M.SCRATCH, M.SLOT, M.SLOT_BYTES
M_W, M_W_END, M_W_EXPERT, M_W_ROW, M_W_SCALE, M_W_SCALE_GROUP = (
    M.W, M.W_END, M.W_EXPERT, M.W_ROW, M.W_SCALE, M.W_SCALE_GROUP,
)  # fmt: skip

LINE = 64
NEAR = 4096  # bytes that the first cache has room for beside what a tile works on


def slot_bytes(tile: Tile, height: int, width: int, chunk: int, group_padded: int) -> int:
    """Scratch of one thread for blocks of height × width outputs: what `matmul` lays out, in this order."""
    step = cpu_step.Step(tile.kind)
    sums, scales = 4 * height * width, 4 * max(1, chunk // group_padded) * width
    panel = -(-width // tile.cols) * tile.cols * chunk * step.a_bytes
    decoded = step.lanes * chunk * step.b_bytes
    return sums + (2 if step.paired else 1) * scales + 12 * width + LINE + panel + decoded


@cache
def matmul(
    kind: str,
    storage: str,
    tile_rows: int,
    tile_vectors: int,
    *,
    grouped: bool = False,
    byte_lookup: bool = False,
) -> Any:
    """Compile (or load) `matmul` for an instruction (see `cpu_step.Step`) and weight storage.

    `storage` is `i8`, `e4m3`, `u8` (int8 plus 128) or `bf16` (values, not codes). The integer
    instructions take `i8` only, and `bf16` goes with `fma`. `grouped`: sums are scaled group by
    group along K. `byte_lookup`: the CPU has AVX-512 VBMI.
    """
    source = stamp()
    unsigned, paired = kind.startswith("dpbusd"), cpu_step.Step(kind).paired
    integer = kind.startswith(cpu_step.INTEGER)
    step, lanes = cpu_step.operand_step(kind), cpu_step.lanes(kind)
    # Weights as the tiles read them before packing: integers as stored, floats decoded.
    row_kind = A_I8_BYTES if integer else A_F32 if kind.startswith("fma") else A_BF16
    element, row_element = cpu_step.Step(kind).a_bytes, cpu_step.Step(kind).b_bytes
    stored = {"i8": W_I8, "e4m3": W_E4M3, "u8": W_U8, "bf16": W_BF16}[storage]
    plain = storage == "bf16"
    lookup = byte_lookup and row_kind == A_BF16
    w_size = 2 if plain else 1
    # A few rows are bound by memory: decode while loading instead of into memory.
    dot_kind = f"{kind}:{storage}" if kind.startswith("fma") or (lookup and storage == "e4m3") else kind
    dot_kind = dot_kind.replace("winograd", "pmaddwd")  # rows and weights apart, as they stand
    dot_step = cpu_step.step_elements(dot_kind)
    at_once = packs_at_once(kind, stored, lookup)
    tile_cols = tile_vectors * lanes
    panel_row = 4 * tile_cols
    dot_lines = cpu_step.requests(dot_kind, DOT_COLS)
    # The 16 registers of 256 bits do not hold 4 × 4 accumulators and their operands.
    dot_tall = 2 if lanes == 8 else 4

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
        a_row, a_group, w_row = p[M_A_ROW], group_padded * element, p[M_W_ROW]
        # What a pass through the panel takes of K: whole groups where each has scales.
        per_pass = chunk // group_padded if grouped else 1
        span = per_pass * group if grouped else chunk

        size = block_rows * block_cols
        memory = p[M_SCRATCH] + slot * p[M_SLOT_BYTES]
        sums = carray(pointer(memory), size, np.int32)
        w_scales_at = memory + 4 * size
        weights_scale = carray(pointer(w_scales_at), (per_pass, block_cols), np.float32)
        # Of Winograd's products the columns' own sums stand behind the scales.
        w_sums_at = w_scales_at + 4 * per_pass * block_cols
        bias_at = w_sums_at + (4 * per_pass * block_cols if paired else 0)
        scale_at = carray(pointer(bias_at + 4 * block_cols), block_cols, np.int64)
        one_at = bias_at + 12 * block_cols
        carray(pointer(one_at), 1, np.float32)[0] = 1.0
        panel = one_at + LINE
        # A few rows' blocks may be narrower than a tile of the panel.
        decoded = panel + (block_cols + tile_cols - 1) // tile_cols * tile_cols * chunk * element
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
            locate_scales(p, expert, n0, cols, scale_at)
            together = 1  # rows of a panel of activations
            w0, a0 = p[M_W] + expert * p[M_W_EXPERT] + n0 * w_row, p[M_A] + row0 * a_row
            a_scale_at, a_scale_row, a_scale_group = one_at, 0, 0
            if p[M_A_SCALE] != 0:
                a_scale_row, a_scale_group = 4 * p[M_A_SCALE_ROW], 4 * p[M_A_SCALE_GROUP]
                a_scale_at = p[M_A_SCALE] + row0 * a_scale_row
            a_sum_at, a_sum_row = p[M_A_SUM] + 4 * row0 * groups, 4 * groups
            sums[: (rows + 1) // 2 * 2 * block_cols] = 0
            # Reading past a row is harmless for integers (the operand is 0 there); past the last row of the
            # tensor it is not. Floats could meet a NaN code. And groups lie in the operand as they do here.
            even = (k_all + step - 1) // step * step
            inside = w0 + (cols - 1) * w_row + w_size * even <= p[M_W_END]
            inside = inside and (integer or k_all % dot_step == 0) and (not grouped or group % dot_step == 0)
            if rows <= p[M_DOT_ROWS] and inside:
                if DOT_COLS * w_row > NEAR:
                    dot_rows(
                        dot_kind, grouped, dot_tall, dot_lines, 2, w_size, a0, a_row, w0, w_row, memory, c_row, rows,
                        cols, even, group, a_scale_at, a_scale_row, a_scale_group, a_sum_at, a_sum_row,
                        p[M_W_SCALE], scale_at.ctypes.data, 4 * p[M_W_SCALE_GROUP],
                    )  # fmt: skip
                else:
                    dot_rows(
                        dot_kind, grouped, dot_tall, dot_lines, 1, w_size, a0, a_row, w0, w_row, memory, c_row, rows,
                        cols, even, group, a_scale_at, a_scale_row, a_scale_group, a_sum_at, a_sum_row,
                        p[M_W_SCALE], scale_at.ctypes.data, 4 * p[M_W_SCALE_GROUP],
                    )  # fmt: skip
            else:
                if paired:
                    together = PAIRED_ROWS
                    a0 = p[M_A_PANELS] + blocks[which, 3] * PAIRED_ROWS * a_row
                # The next task's weights: asked for while this one multiplies the last rows.
                share, ahead = 0, w0
                following = w0 + block_cols * w_row
                last = k_all > 0 and which == p[M_BLOCK_COUNT] - 1
                if last and following + block_cols * w_row <= p[M_W_END]:
                    panels = (cols + tile_cols - 1) // tile_cols * ((k_all + span - 1) // span)
                    share, ahead = block_cols * w_row // panels, following
                for k0 in range(0, k_all, span):
                    depth = min(span, k_all - k0)
                    g, some = (k0 // group, (depth + group - 1) // group) if grouped else (0, 1)
                    w, a = w0 + w_size * k0, a0 + together * (g * a_group if grouped else k0 * element)
                    # Groups that fill no whole steps are padded one by one.
                    piece = min(group, depth) if grouped and group != group_padded else depth
                    filled, rest = (piece + step - 1) // step * step, depth % piece
                    padded = depth // piece * filled + (rest + step - 1) // step * step
                    units = padded * element // 4
                    group_units = group_padded * element // 4 if grouped else units
                    inside = w + (cols - 1) * w_row + w_size * padded <= p[M_W_END]
                    fill_panel(
                        kind, stored, lookup, at_once, row_kind, w_size, row_element, step, lanes, w, w_row, cols,
                        depth, piece, padded, integer and inside and piece == depth, panel, panel_row, units, decoded,
                    )  # fmt: skip
                    if paired:
                        for j in range(0, cols, lanes):
                            at = column_at(panel, panel_row, units, j)
                            for each in range(some):
                                paired_columns(
                                    kind, at + panel_row * each * group_units, panel_row,
                                    min(group_units, units - each * group_units), w_sums_at + each * c_row + 4 * j,
                                )  # fmt: skip
                    if grouped:
                        for each in range(some):
                            for j in range(cols):
                                weights_scale[each, j] = w_scale[
                                    scale_at[j] + (g + each) * p[M_W_SCALE_GROUP]
                                ]
                    for j in range(0, cols, tile_cols):
                        if cols - j > tile_cols - lanes:
                            packed_rows(
                                kind, grouped, tile_rows, tile_vectors, panel_row, a, a_row, together * a_group,
                                panel + 4 * units * j, ahead, share, memory + 4 * j, c_row, rows, some, units,
                                group_units, a_scale_at + g * a_scale_group, a_scale_row, a_scale_group,
                                a_sum_at + 4 * g, a_sum_row, w_scales_at + 4 * j, w_sums_at + 4 * j, c_row,
                            )  # fmt: skip
                        else:
                            for v in range(0, cols - j, lanes):
                                packed_rows(
                                    kind, grouped, tile_rows, 1, panel_row, a, a_row, together * a_group,
                                    panel + 4 * units * j + 4 * v, ahead, 0, memory + 4 * (j + v), c_row, rows, some,
                                    units, group_units, a_scale_at + g * a_scale_group, a_scale_row, a_scale_group,
                                    a_sum_at + 4 * g, a_sum_row, w_scales_at + 4 * (j + v), w_sums_at + 4 * (j + v),
                                    c_row,
                                )  # fmt: skip
                        ahead += share
            times = 128 if unsigned else 1 if together > 1 else 0
            finish_block(
                integer, times, p, expert, row0, rows, n0, scale_at[:cols], memory, c_row, w_scales_at, bias_at
            )  # fmt: skip

    return matmul_tiles
