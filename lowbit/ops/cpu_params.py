"""The parameter blocks of the CPU kernels: what stands at which index. All int64."""

from __future__ import annotations

import ctypes
from itertools import count

# Element types of activations and outputs; the codes are inputs only.
F32, F16, BF16, I8_CODES, E4M3_CODES = range(5)
# How weights are stored; U8 is int8 plus 128, as compressed-tensors packs it. BF16 are plain values.
W_I8, W_E4M3, W_U8, W_BF16 = range(4)
# What `prepare` writes: operands of the tiles, or codes as they leave a quantize operation.
A_I16, A_I8, A_F32, A_BF16, A_I8_BYTES, A_E4M3_BYTES = range(6)
# How `prepare` quantizes.
MODE_NONE, MODE_INT8, MODE_E4M3 = range(3)

# Columns per vector of the epilogue.
SCALE_LANES = 16
# Rows of activations that AMX multiplies at once, and those that lie together for `cpu_winograd`.
PANEL_ROWS, PAIRED_ROWS = 16, 4


class P:
    """`prepare`. Strides in bytes; addresses as integers, 0 for absent."""

    auto = count().__next__  # plain numbers, which every numba indexes arrays by

    NEXT = auto()  # atomic: next row
    SLOT = auto()  # atomic: next thread's slot of scratch
    ROWS = auto()
    K = auto()
    GROUP = auto()  # elements per scale along K
    GROUP_PADDED = auto()  # the same, rounded up to a whole step of the tile
    X = auto()
    X_ROW = auto()
    X_DTYPE = auto()
    A = auto()  # output
    A_ROW = auto()
    A_KIND = auto()
    MODE = auto()
    STATIC = auto()  # address of one float32 scale; 0: dynamic
    ZERO = auto()  # zero point
    SHIFT = auto()  # what is added before rounding: the zero point; 0 where X already holds codes
    LOWEST = auto()  # smallest int8 code
    SCALE = auto()  # output, float32 [rows, groups]
    POWER_OF_2 = auto()
    SCRATCH = auto()
    SLOT_BYTES = auto()
    SUMS = auto()  # output: int32 [rows, groups], the sums of codes; 0: not wanted
    ROWS_PER_TASK = auto()
    ROWS_PADDED = auto()  # rows of A to clear beyond ROWS
    PARTS = auto()  # bfloat16 values that add up to one of X: each has a part of a row of A
    COUNT = auto()


class M:
    """`matmul`. Strides of A, W and OUT in bytes, of scales and bias in elements."""

    auto = count().__next__  # plain numbers, which every numba indexes arrays by

    NEXT = auto()
    SLOT = auto()
    A = auto()
    A_ROW = auto()
    A_SUM = auto()  # int32 [rows, groups] to come off: 128 times (dpbusd), or as they are (winograd); 0: none
    A_PANELS = auto()  # A once more, as AMX (PANEL_ROWS) and winograd (PAIRED_ROWS) take it
    W = auto()
    W_ROW = auto()
    W_EXPERT = auto()
    W_END = auto()  # one past the last byte of the weights
    OUT = auto()
    OUT_ROW = auto()
    OUT_DTYPE = auto()
    A_SCALE = auto()  # 0: no scale
    A_SCALE_ROW = auto()
    A_SCALE_GROUP = auto()
    W_SCALE = auto()
    W_SCALE_EXPERT = auto()
    W_SCALE_ROW = auto()  # per row of scales
    W_SCALE_ROWS = auto()  # rows of W per row of scales
    W_SCALE_GROUP = auto()
    BIAS = auto()  # float32
    BIAS_EXPERT = auto()
    ROUTED = auto()  # float32 [rows]
    BLOCKS = auto()  # int64 [count, 4]: expert, first row, rows, first panel
    BLOCK_COUNT = auto()
    N = auto()
    K = auto()
    GROUP = auto()
    GROUP_PADDED = auto()
    CHUNK = auto()  # K elements per pass, a multiple of the tile's step
    PER_GROUP = auto()  # scale inside the K loop
    SCRATCH = auto()
    SLOT_BYTES = auto()
    BLOCK_ROWS = auto()
    BLOCK_COLS = auto()
    DOT_ROWS = auto()  # up to so many rows are multiplied with weights as stored, without a panel
    COUNT = auto()


PREPARE, MATMUL = ctypes.c_int64 * P.COUNT, ctypes.c_int64 * M.COUNT
