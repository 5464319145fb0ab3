# mypy: ignore-errors
# The bodies below are compiled by numba, whose intrinsics mypy cannot type.
"""A block of a product on the CPU, tile by tile: all of its rows times some columns of weights."""

from __future__ import annotations

from numba import njit

from lowbit.ops.cpu_tiles import dot_tile, packed_tile, scaled_dot_tile, scaled_tile

DOT_COLS, LINE = 4, 64


@njit(inline="always")
def _dot(
    kind, grouped, mr, nr, cache, a, lda, b, ldb, ahead, along, across, c, ldc, k, group, left, a_scale, a_scale_row,
    a_scale_group, a_sum, a_sum_row, w_scale, w_at, w_group,
):  # type: ignore[no-untyped-def]  # fmt: skip
    if grouped:
        scaled_dot_tile(
            kind, mr, nr, cache, a, lda, b, ldb, ahead, along, across, c, ldc, k, group, left, a_scale, a_scale_row,
            a_scale_group, a_sum, a_sum_row, w_scale, w_at, w_group,
        )  # fmt: skip
    else:
        dot_tile(kind, mr, nr, cache, a, lda, b, ldb, ahead, along, across, c, ldc, k)


@njit(inline="always")
def dot_rows(
    kind, grouped, tall, lines, cache, size, a, lda, w, stride, c, ldc, rows, cols, k, group, a_scale, a_scale_row,
    a_scale_group, a_sum, a_sum_row, w_scale, w_at, w_group,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """A few rows, `tall` (2 or 4) at a time; weights (of `size` bytes) are read once, and then stay in the first cache.

    The tiles of one set of columns share the next columns' weights between them and ask for
    them piece by piece, in the order of addresses where rows are whole: memory is then busy
    all the time, and not only while the first tile waits for it.

    If `grouped` (a compile-time constant) sums are scaled group by group as in `scaled_dot_tile`, of
    which the last parameters are.
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
            at, c_at, left = a + i * lda, c + i * ldc + 4 * j, rows - i
            of_rows, sums, of_cols = a_scale + i * a_scale_row, a_sum + i * a_sum_row, w_at + 8 * j
            if rows == 1:
                _dot(
                    kind, grouped, 1, DOT_COLS, cache, at, lda, b, stride, ahead, along, across, c_at, ldc, k, group,
                    left, of_rows, a_scale_row, a_scale_group, sums, a_sum_row, w_scale, of_cols, w_group,
                )  # fmt: skip
            elif left > 2:
                _dot(
                    kind, grouped, tall, DOT_COLS, cache, at, lda, b, stride, ahead, along, across, c_at, ldc, k,
                    group, left, of_rows, a_scale_row, a_scale_group, sums, a_sum_row, w_scale, of_cols, w_group,
                )  # fmt: skip
            else:
                _dot(
                    kind, grouped, 2, DOT_COLS, cache, at, lda, b, stride, ahead, along, across, c_at, ldc, k, group,
                    left, of_rows, a_scale_row, a_scale_group, sums, a_sum_row, w_scale, of_cols, w_group,
                )  # fmt: skip
            i += tall
            ahead += part
    for j in range(whole, cols):
        b = w + j * stride
        for i in range(rows):
            _dot(
                kind, grouped, 1, 1, 1, a + i * lda, lda, b, stride, b, 0, 0, c + i * ldc + 4 * j, ldc, k, group, 1,
                a_scale + i * a_scale_row, 0, a_scale_group, a_sum + i * a_sum_row, 0, w_scale, w_at + 8 * j, w_group,
            )  # fmt: skip


@njit(inline="always")
def _tile(
    kind, grouped, mr, vectors, ldb, a, a_row, b, ahead, along, c, c_row, units, w_sum, left, a_scale, a_scale_row,
    a_sum, a_sum_row, w_scale,
):  # type: ignore[no-untyped-def]  # fmt: skip
    if grouped:
        scaled_tile(
            kind, mr, vectors, ldb, a, a_row, b, ahead, along, c, c_row, units, w_sum, left, a_scale, a_scale_row,
            a_sum, a_sum_row, w_scale,
        )  # fmt: skip
    else:
        packed_tile(kind, mr, vectors, ldb, a, a_row, b, ahead, along, c, c_row, units, w_sum)


@njit(inline="always")
def packed_rows(
    kind, grouped, tall, vectors, ldb, a, a_row, a_group, b, ahead, share, c, c_row, rows, some, units, group_units,
    a_scale, a_scale_row, a_scale_group, a_sum, a_sum_row, w_scale, w_sum, w_group,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """All rows of a block times one packed panel: tiles of `tall` rows, then 4, then 2.

    The panel has `units` of `some` groups of K, `group_units` each (the last may have fewer). If `grouped`
    (a compile-time constant) each is scaled and added to c, with scales and sums of codes as in `scaled_tile`;
    else there is one group and no scale. What is called `…_group` leads from one group to the next. `w_sum` is that
    of `packed_tile`.
    Meanwhile `share` bytes at `ahead` are asked for, of weights that are packed next.
    """
    i = 0
    along = share * 256 // (units * ((rows + tall - 1) // tall))
    while i < rows:
        left = rows - i
        tallest = left >= tall and left != 8
        for g in range(some):
            at, b_at, c_at = a + i * a_row + g * a_group, b + ldb * g * group_units, c + i * c_row
            count = min(group_units, units - g * group_units)
            soon = ahead + (along * g * group_units >> 8)
            of_rows = a_scale + i * a_scale_row + g * a_scale_group
            sums, of_cols, own = a_sum + i * a_sum_row + 4 * g, w_scale + g * w_group, w_sum + g * w_group
            if tallest:
                _tile(
                    kind, grouped, tall, vectors, ldb, at, a_row, b_at, soon, along, c_at, c_row, count, own,
                    left, of_rows, a_scale_row, sums, a_sum_row, of_cols,
                )  # fmt: skip
            elif left > 2:
                _tile(
                    kind, grouped, 4, vectors, ldb, at, a_row, b_at, soon, along, c_at, c_row, count, own,
                    left, of_rows, a_scale_row, sums, a_sum_row, of_cols,
                )  # fmt: skip
            else:
                _tile(
                    kind, grouped, 2, vectors, ldb, at, a_row, b_at, soon, along, c_at, c_row, count, own,
                    left, of_rows, a_scale_row, sums, a_sum_row, of_cols,
                )  # fmt: skip
        i += tall if tallest else 4 if left > 2 else 2
        ahead += along * units >> 8
