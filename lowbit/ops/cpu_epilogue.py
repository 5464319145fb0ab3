# mypy: ignore-errors
# The bodies below are compiled by numba, whose intrinsics mypy cannot type.
"""What stands at both ends of a block of a product: which scales its columns have, and sums → outputs."""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from lowbit.ops.cpu_emit import pointer
from lowbit.ops.cpu_params import BF16, F16, F32, SCALE_LANES, M
from lowbit.ops.cpu_rows import store_row
from lowbit.ops.cpu_scale import finish_row, finish_tile

# Copied into plain module constants: numba freezes those, and cannot read attributes of classes.
M_A_SCALE, M_A_SCALE_ROW, M_A_SUM, M_BIAS, M_BIAS_EXPERT = (
    M.A_SCALE,
    M.A_SCALE_ROW,
    M.A_SUM,
    M.BIAS,
    M.BIAS_EXPERT,
)
M_BLOCK_COLS, M_K, M_PER_GROUP, M_ROUTED = M.BLOCK_COLS, M.K, M.PER_GROUP, M.ROUTED
M_OUT, M_OUT_DTYPE, M_OUT_ROW = M.OUT, M.OUT_DTYPE, M.OUT_ROW
M_W_SCALE, M_W_SCALE_EXPERT, M_W_SCALE_ROW, M_W_SCALE_ROWS = (
    M.W_SCALE,
    M.W_SCALE_EXPERT,
    M.W_SCALE_ROW,
    M.W_SCALE_ROWS,
)


@njit(inline="always")
def locate_scales(p, expert, n0, cols, scale_at):  # type: ignore[no-untyped-def]
    """Where the scale of each column's first group stands."""
    for j in range(cols):
        scale_at[j] = expert * p[M_W_SCALE_EXPERT] + (n0 + j) // p[M_W_SCALE_ROWS] * p[M_W_SCALE_ROW]


@njit(inline="always")
def finish(integer, scales, dtype, sums, offset, a_scale, w_scale, bias, routed, out, spill, n):  # type: ignore[no-untyped-def]
    """`finish_row` for an output type known at run time, with the columns that fill no vector."""
    if dtype == F16:
        finish_row(integer, scales, F16, sums, offset, a_scale, w_scale, bias, routed, out, spill, n)
    elif dtype == BF16:
        finish_row(integer, scales, BF16, sums, offset, a_scale, w_scale, bias, routed, out, spill, n)
    else:
        finish_row(integer, scales, F32, sums, offset, a_scale, w_scale, bias, routed, out, spill, n)
    done = n // SCALE_LANES * SCALE_LANES
    if done < n:
        rest = carray(pointer(spill + 4 * done), n - done, np.float32)
        store_row(dtype, rest, out + done * (2 if dtype in (F16, BF16) else 4), n - done)


@njit(inline="always")
def load_columns(p, expert, n0, scale_at, w_scale, bias_at):  # type: ignore[no-untyped-def]
    """One scale per column (where there is no more than one) and the bias of a block's columns, as float32."""
    cols = len(scale_at)
    if p[M_PER_GROUP] == 0:
        stored = carray(pointer(p[M_W_SCALE]), 1 << 62, np.float32)
        scales = carray(pointer(w_scale), cols, np.float32)
        for j in range(cols):
            scales[j] = stored[scale_at[j]]
    # −0.0 leaves every value as it is, −0.0 too.
    bias = carray(pointer(bias_at), p[M_BLOCK_COLS], np.float32)
    bias[:] = np.float32(-0.0)
    if p[M_BIAS] != 0:
        given = carray(pointer(p[M_BIAS] + 4 * (expert * p[M_BIAS_EXPERT] + n0)), cols, np.float32)
        for j in range(cols):
            bias[j] = given[j]


@njit(inline="always")
def finish_block(integer, times, p, expert, row0, rows, n0, scale_at, sums, c_row, w_scale, bias_at):  # type: ignore[no-untyped-def]
    """Sums [rows, cols] of a block, rows `c_row` bytes apart → outputs; per group they are float32 and scaled.

    `integer` is a compile-time constant; `times` A_SUM is still to be taken off, where that is not 0. `w_scale` and
    `bias_at` are memory for what `finish` wants; the sums are overwritten.
    """
    cols = len(scale_at)
    load_columns(p, expert, n0, scale_at, w_scale, bias_at)
    out_element = 4 if p[M_OUT_DTYPE] != F16 and p[M_OUT_DTYPE] != BF16 else 2
    for i in range(rows):
        a_scale, routed, offset = np.float32(1.0), np.float32(1.0), np.int32(0)
        if p[M_ROUTED] != 0:
            routed = carray(pointer(p[M_ROUTED]), row0 + rows, np.float32)[row0 + i]
        out = p[M_OUT] + (row0 + i) * p[M_OUT_ROW] + n0 * out_element
        at = sums + i * c_row
        if p[M_PER_GROUP] != 0:
            finish(False, False, p[M_OUT_DTYPE], at, offset, a_scale, 0, bias_at, routed, out, at, cols)
            continue
        if p[M_A_SCALE] != 0:
            scales = carray(pointer(p[M_A_SCALE]), 1 << 62, np.float32)
            a_scale = scales[(row0 + i) * p[M_A_SCALE_ROW]]
        if times != 0 and p[M_K] > 0:
            offset = np.int32(carray(pointer(p[M_A_SUM]), 1 << 62, np.int32)[row0 + i] * times)
        finish(integer, True, p[M_OUT_DTYPE], at, offset, a_scale, w_scale, bias_at, routed, out, at, cols)


@njit(inline="always")
def finish_across(
    integer, p, expert, row0, rows, n0, scale_at, sums, c_row, spill, a_scale, routed_at, w_scale, bias_at
):  # type: ignore[no-untyped-def]
    """`finish_block` for sums [cols, rows], rows (of outputs) rounded up to 16 and columns readable so far.

    `spill` is memory for 16 × 16 float32, `a_scale` and `routed_at` for one float32 per row.
    """
    cols = len(scale_at)
    load_columns(p, expert, n0, scale_at, w_scale, bias_at)
    a_scales, routed = (
        carray(pointer(a_scale), rows, np.float32),
        carray(pointer(routed_at), rows, np.float32),
    )
    for i in range(rows):
        routed[i] = np.float32(1.0)
        if p[M_ROUTED] != 0:
            routed[i] = carray(pointer(p[M_ROUTED]), row0 + rows, np.float32)[row0 + i]
        if p[M_PER_GROUP] == 0:
            a_scales[i] = np.float32(1.0)
            if p[M_A_SCALE] != 0:
                a_scales[i] = carray(pointer(p[M_A_SCALE]), 1 << 62, np.float32)[
                    (row0 + i) * p[M_A_SCALE_ROW]
                ]
    out_element = 4 if p[M_OUT_DTYPE] != F16 and p[M_OUT_DTYPE] != BF16 else 2
    for i in range(0, rows, SCALE_LANES):
        left = min(SCALE_LANES, rows - i)
        for j in range(0, cols, SCALE_LANES):
            out = p[M_OUT] + (row0 + i) * p[M_OUT_ROW] + (n0 + j) * out_element
            ragged = cols - j < SCALE_LANES
            dtype = F32 if ragged else p[M_OUT_DTYPE]
            target, row = (spill, 4 * SCALE_LANES) if ragged else (out, p[M_OUT_ROW])
            at = sums + j * c_row + 4 * i
            here = a_scale + 4 * i, w_scale + 4 * j, bias_at + 4 * j, routed_at + 4 * i
            finish_square(integer, p[M_PER_GROUP] == 0, dtype, at, c_row, here, target, row, left)
            if ragged:
                for r in range(left):
                    rest = carray(pointer(spill + r * row), cols - j, np.float32)
                    store_row(p[M_OUT_DTYPE], rest, out + r * p[M_OUT_ROW], cols - j)


@njit(inline="always")
def finish_square(integer, scales, dtype, sums, c_row, here, out, out_row, rows):  # type: ignore[no-untyped-def]
    """`finish_tile` for what is known at run time only."""
    a_scale, w_scale, bias, routed = here
    if not scales:
        if dtype == F16:
            finish_tile(False, False, F16, sums, c_row, a_scale, w_scale, bias, routed, out, out_row, rows)
        elif dtype == BF16:
            finish_tile(False, False, BF16, sums, c_row, a_scale, w_scale, bias, routed, out, out_row, rows)
        else:
            finish_tile(False, False, F32, sums, c_row, a_scale, w_scale, bias, routed, out, out_row, rows)
    elif dtype == F16:
        finish_tile(integer, True, F16, sums, c_row, a_scale, w_scale, bias, routed, out, out_row, rows)
    elif dtype == BF16:
        finish_tile(integer, True, BF16, sums, c_row, a_scale, w_scale, bias, routed, out, out_row, rows)
    else:
        finish_tile(integer, True, F32, sums, c_row, a_scale, w_scale, bias, routed, out, out_row, rows)
