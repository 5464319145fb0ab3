# mypy: ignore-errors
# The bodies below are compiled by numba, whose intrinsics mypy cannot type.
"""`matmul` on AMX: weights [N, K] as stored (or decoded to bfloat16) times panels of activations.

A task is a block of the output, as in `cpu_matmul`, but held transposed, [cols, rows], until its end.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import carray, cfunc, njit

from lowbit.compiling import CACHE
from lowbit.ops.cpu_amx import ROWS, STEP, amx_begin, amx_end, amx_tile
from lowbit.ops.cpu_decode import decode
from lowbit.ops.cpu_emit import fetch_add, pointer
from lowbit.ops.cpu_epilogue import finish_across, locate_scales
from lowbit.ops.cpu_params import A_BF16, A_I8_BYTES, W_BF16, W_E4M3, W_I8, W_U8, M
from lowbit.ops.cpu_rows import SIGNATURE, stamp
from lowbit.ops.cpu_scale import add_scaled_across

# Copied into plain module constants: numba freezes those, and cannot read attributes of classes.
M_A_PANELS, M_A_ROW, M_A_SCALE, M_A_SCALE_GROUP, M_A_SCALE_ROW = (
    M.A_PANELS,
    M.A_ROW,
    M.A_SCALE,
    M.A_SCALE_GROUP,
    M.A_SCALE_ROW,
)
M_BLOCKS, M_BLOCK_COLS, M_BLOCK_COUNT, M_BLOCK_ROWS = M.BLOCKS, M.BLOCK_COLS, M.BLOCK_COUNT, M.BLOCK_ROWS
M_CHUNK, M_GROUP, M_GROUP_PADDED, M_K, M_N, M_NEXT = M.CHUNK, M.GROUP, M.GROUP_PADDED, M.K, M.N, M.NEXT
M_PER_GROUP, M_SCRATCH, M_SLOT, M_SLOT_BYTES = M.PER_GROUP, M.SCRATCH, M.SLOT, M.SLOT_BYTES
M_W, M_W_END, M_W_EXPERT, M_W_ROW = M.W, M.W_END, M.W_EXPERT, M.W_ROW
M_W_SCALE, M_W_SCALE_GROUP = M.W_SCALE, M.W_SCALE_GROUP

COLS = 64  # of a strip: four tiles of weights
TILE_ROW = 8 * ROWS  # bytes per row of the sums of one group: two tiles of int32 side by side
PAD = 64  # bytes after each row of decoded weights or sums: 16 rows should not fall on one set of the first cache


def slot_bytes(rows: int, cols: int, chunk: int, padded: int, groups: int, element: int) -> int:
    """Scratch of one thread: sums, a group's sums; scales, bias and routed weights; decoded weights."""
    per_pass = max(1, chunk // padded)
    scales = 16 * cols + 4 * COLS * per_pass + 4 * (max(groups, 1) + 1) * rows
    decoded = cols * (per_pass * min(chunk, padded) * element + PAD)
    return (4 * rows + PAD) * cols + COLS * TILE_ROW + scales + decoded


@njit(inline="always")
def strip(kind, parts, cols, add, w, w_row, ahead, a, panel, panels, c, c_row, steps):  # type: ignore[no-untyped-def]
    """Up to 64 rows of weights times all panels of a block; those after them are asked for meanwhile.

    `ahead`: bytes to the weights after the block's; 0 where nothing is to be asked for.
    """
    pairs = panels // 2 * 2
    lines = (64 + panels - 1) // panels if ahead != 0 else 0  # those of 32 rows, divided among the tiles
    for half in range(0, cols, 32):
        for i in range(0, pairs, 2):
            here, at = c + 64 * i + half * c_row, w + half * w_row
            soon = at + 32 * w_row + i // 2 * lines * STEP * steps
            amx_tile(kind, parts, 2, 2, add, at, w_row, soon, lines, a + i * panel, panel, here, c_row, steps)
    if pairs < panels:
        at, here = a + pairs * panel, c + 64 * pairs
        if ahead == 0:
            for half in range(0, cols, 32):
                rows = w + half * w_row
                amx_tile(
                    kind, parts, 2, 1, add, rows, w_row, 0, 0, at, panel, here + half * c_row, c_row, steps
                )
        elif cols > 32:
            amx_tile(kind, parts, 4, 1, add, w, w_row, ahead, 0, at, panel, here, c_row, steps)
        else:
            amx_tile(kind, parts, 2, 1, add, w, w_row, ahead, 0, at, panel, here, c_row, steps)


@njit(inline="always")
def group_strip(
    kind, parts, integer, some, w, w_row, w_group, soon, lines, a, panel, left, a_group, tile, sums, c_row, a_scale,
    a_scale_row, w_scale, steps,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """32 rows of weights times one or two (of `left`) panels, group by group, each scaled and added to the sums."""
    for g in range(some):
        at, here = w + g * w_group, a + g * a_group
        of_rows, of_cols = a_scale + g * a_scale_row, w_scale + 4 * COLS * g
        if left > 1:
            ahead = soon + g * lines * STEP * steps
            amx_tile(kind, parts, 2, 2, 0, at, w_row, ahead, lines, here, panel, tile, TILE_ROW, steps)
            add_scaled_across(integer, 2, tile, TILE_ROW, of_rows, of_cols, sums, c_row, 32)
        else:
            amx_tile(kind, parts, 2, 1, 0, at, w_row, 0, 0, here, panel, tile, TILE_ROW, steps)
            add_scaled_across(integer, 1, tile, TILE_ROW, of_rows, of_cols, sums, c_row, 32)


@cache
def matmul(kind: str, storage: str, parts: int = 1) -> Any:
    """Compile (or load) `matmul` for `tdpbssd512` (int8 × int8) or `tdpbf16512` and a weight storage.

    `storage` is `i8`, `e4m3`, `u8` (int8 plus 128) or `bf16` (values, not codes); `parts` as in `Tile`.
    """
    source = stamp()
    integer = kind == "tdpbssd512"
    element = 1 if integer else 2
    step = STEP // element
    stored = {"i8": W_I8, "e4m3": W_E4M3, "u8": W_U8, "bf16": W_BF16}[storage]
    plain = storage == "bf16"
    w_size = 2 if plain else 1
    row_kind, lookup = A_I8_BYTES if integer else A_BF16, not (integer or plain)

    @cfunc(SIGNATURE, cache=CACHE)
    def matmul_amx(parameters):  # type: ignore[no-untyped-def]
        _ = source
        p = carray(parameters, 48)
        base = p.ctypes.data
        slot = fetch_add(base + 8 * M_SLOT, 1)
        n_all, k_all, group, padded = p[M_N], p[M_K], p[M_GROUP], p[M_GROUP_PADDED]
        groups = (k_all + group - 1) // group if k_all > 0 else 0
        block_rows, block_cols, chunk = p[M_BLOCK_ROWS], p[M_BLOCK_COLS], p[M_CHUNK]
        blocks = carray(pointer(p[M_BLOCKS]), (p[M_BLOCK_COUNT], 4), np.int64)
        across = (n_all + block_cols - 1) // block_cols
        w_row, panel = p[M_W_ROW], ROWS * p[M_A_ROW]
        per_group = p[M_PER_GROUP] != 0
        per_pass, a_group = max(1, chunk // padded), ROWS * padded * element

        c_row = 4 * block_rows + PAD
        sums_at = p[M_SCRATCH] + slot * p[M_SLOT_BYTES]
        tile_at = sums_at + c_row * block_cols
        w_scales_at = tile_at + COLS * TILE_ROW
        bias_at = w_scales_at + 4 * block_cols
        scale_at = carray(pointer(bias_at + 4 * block_cols), block_cols, np.int64)
        strip_scales_at = bias_at + 12 * block_cols
        a_scales_at = strip_scales_at + 4 * COLS * per_pass
        routed_at = a_scales_at + 4 * max(groups, 1) * block_rows
        decoded = routed_at + 4 * block_rows
        decoded_row = per_pass * min(chunk, padded) * element + PAD
        sums = carray(pointer(sums_at), (block_cols, c_row // 4), np.int32)
        strip_scales = carray(pointer(strip_scales_at), (per_pass, COLS), np.float32)
        a_scales = carray(pointer(a_scales_at), (groups, block_rows), np.float32)
        given_scales = carray(pointer(p[M_A_SCALE]), 1 << 62, np.float32)
        w_scale = carray(pointer(p[M_W_SCALE]), 1 << 62, np.float32)
        a_scales[:] = np.float32(1.0)
        amx_begin()
        while True:
            task = fetch_add(base + 8 * M_NEXT, 1)
            if task >= p[M_BLOCK_COUNT] * across:
                break
            # All weights pass by one block of rows before the next: these then stay in the second cache.
            which, n0 = task // across, task % across * block_cols
            expert, row0, rows = blocks[which, 0], blocks[which, 1], blocks[which, 2]
            cols = min(block_cols, n_all - n0)
            panels = (rows + ROWS - 1) // ROWS
            strips = (cols + 31) // 32 * 32
            if per_group or k_all == 0:
                sums[:strips] = 0
            w0 = p[M_W] + expert * p[M_W_EXPERT] + n0 * w_row
            a0 = p[M_A_PANELS] + blocks[which, 3] * panel
            locate_scales(p, expert, n0, cols, scale_at)
            # Reading past a row is harmless for integers (the operand is 0 there), but floats could meet a
            # NaN; past the last row of the tensor it never is. Rows beyond `cols` give sums that nobody looks at.
            last = w0 + (strips - 1) * w_row + w_size * ((groups - 1) * group + padded)
            as_stored = (integer or (plain and k_all % step == 0)) and last <= p[M_W_END]
            ahead = block_cols * w_row if k_all <= chunk else 0
            if not per_group:
                for c0 in range(0, k_all, chunk):
                    depth = min(chunk, k_all - c0)
                    whole = (depth + step - 1) // step * step
                    w, stride = w0 + w_size * c0, w_row
                    if not as_stored:
                        w, stride, ahead = decoded, decoded_row, 0
                        for j in range(cols):
                            at, target = w0 + j * w_row + w_size * c0, decoded + j * decoded_row
                            decode(lookup, stored, at, row_kind, target, depth, whole)
                    a, steps = a0 + ROWS * c0 * element, whole // step
                    for j in range(0, cols, COLS):
                        here, at, left = sums_at + j * c_row, w + j * stride, min(COLS, cols - j)
                        strip(kind, parts, left, c0, at, stride, ahead, a, panel, panels, here, c_row, steps)
            else:
                if p[M_A_SCALE] != 0:
                    for i in range(rows):
                        at = (row0 + i) * p[M_A_SCALE_ROW]
                        for g in range(groups):
                            a_scales[g, i] = given_scales[at + g * p[M_A_SCALE_GROUP]]
                lines = (64 + panels - 1) // panels if as_stored and groups <= per_pass else 0
                for g0 in range(0, groups, per_pass):
                    some = min(per_pass, groups - g0)
                    w, stride, w_group = w0 + w_size * g0 * group, w_row, w_size * group
                    if not as_stored:
                        w, stride, w_group = decoded, decoded_row, padded * element
                        for j in range(cols):
                            for g in range(some):
                                first = (g0 + g) * group
                                depth = min(group, k_all - first)
                                target = decoded + j * decoded_row + g * w_group
                                at = w0 + j * w_row + w_size * first
                                decode(lookup, stored, at, row_kind, target, depth, padded)
                    for j in range(0, cols, 32):
                        for g in range(some):
                            for i in range(min(32, cols - j)):
                                strip_scales[g, i] = w_scale[scale_at[j + i] + (g0 + g) * p[M_W_SCALE_GROUP]]
                        for i in range(0, panels, 2):
                            a = a0 + i * panel + g0 * a_group
                            here = sums_at + j * c_row + 64 * i
                            of_rows = a_scales_at + 4 * (g0 * block_rows + ROWS * i)
                            steps = padded // step
                            soon = w + (j + 32) * stride + i // 2 * lines * STEP * steps * some
                            group_strip(
                                kind, parts, integer, some, w + j * stride, stride, w_group, soon, lines, a, panel,
                                panels - i, a_group, tile_at, here, c_row, of_rows, 4 * block_rows, strip_scales_at,
                                steps,
                            )  # fmt: skip
            finish_across(
                integer, p, expert, row0, rows, n0, scale_at[:cols], sums_at, c_row, tile_at, a_scales_at,
                routed_at, w_scales_at, bias_at,
            )  # fmt: skip
        amx_end()

    return matmul_amx
