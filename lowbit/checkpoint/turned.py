"""All experts of a layer in one quantized tensor → the float parameter that it is, each expert's matrix transposed.

gpt-oss has [E, N, K] on disk, in groups along K, and [E, K, N] in memory. What is written first needs a piece of every
stored row, so a tile of columns is decoded over all rows of an expert, and turned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from lowbit.checkpoint import rows as loops
from lowbit.checkpoint.decode import Scales, overflowed, source_kind, unfit_value
from lowbit.checkpoint.headers import ITEM_BYTES, TensorRef
from lowbit.checkpoint.jobs import Source
from lowbit.checkpoint.reading import TILE_BYTES

# Rows that are decoded and turned together: they stay in the second-level cache.
_STRIP_BYTES = 512 << 10

Read = Callable[[TensorRef, int, int], np.ndarray]
"""(tensor, first byte, number of bytes) → uint8, valid until the next call."""


def turned(
    source: Source, shape: tuple[int, int, int], dtype: str, out_kind: int, read: Read
) -> Iterator[tuple[np.ndarray, int]]:
    """The bytes of [E, K, N] of `dtype` in their order, and how many of the source's were read for the first time.

    `source`: the matrix [E · N, K] of shape [E, N, K]. InputError for values that are not finite, or out of range.
    At most `TILE_BYTES`, or a group of columns, are in memory.
    """
    experts, rows, cols = shape
    kind, scales, item = source_kind(source), Scales(source), ITEM_BYTES[dtype]
    row_bytes = loops.source_bytes(kind, cols)
    step = max(1, min(rows, _STRIP_BYTES // max(cols * item, 1)))
    width = max(1, min(cols, TILE_BYTES // max(rows * item, 1)))
    codes, values = np.empty(step * cols * item, np.uint8), np.empty(max(cols, 1), np.float32)
    unsigned = np.uint16 if item == 2 else np.uint32
    tile = np.empty(width * rows, unsigned)
    one = np.ones((1, 1), np.float32)
    for expert in range(experts):
        for left in range(0, cols, width):
            count = min(width, cols - left)
            out = tile[: count * rows].reshape(count, rows)
            for row in range(0, rows, step):
                height, first = min(step, rows - row), expert * rows + row
                part = read(source.ref, first * row_bytes, height * row_bytes)
                decoded = codes[: height * cols * item]
                scale, row0 = scales.at(first, height)
                bad = loops.convert_rows(
                    part, kind, height, cols, scale, *source.block, row0, decoded, out_kind, cols, one, 1,
                    max(cols, 1), True, False, values, *scales.of_all,
                )  # fmt: skip
                if bad >= 0 or overflowed(decoded, dtype):
                    raise unfit_value(
                        source, shape, part, kind, first=first * cols, count=height * cols, scales=scales,
                        out_dtype=dtype,
                    )  # fmt: skip
                loops.turn(decoded.view(unsigned)[left:], cols, height, out, row)
            yield tile[: count * rows].view(np.uint8), rows * row_bytes if left == 0 else 0
