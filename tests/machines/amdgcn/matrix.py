"""v_mfma: products of matrices, one for each wave of 64 lanes.

Of A [rows, K] a lane holds consecutive elements of row `lane % rows`, of B [columns, K] likewise; lanes of one row
follow each other along K. Of the sums it holds, in one column, four rows after another.
"""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import torch

from ..numbers import Unknown, e8m0, elements

_KINDS = {"i8": "s8", "fp8_fp8": "e4m3", "f8f6f4": "e4m3", "bf16": "bf16", "f16": "f16"}


@cache
def shape(opcode: str) -> tuple[str, int, int, str]:
    """(dtype of the sums, rows = columns, K, dtype of the operands)."""
    found = re.fullmatch(r"v_mfma_(?:scale_)?(f32|i32)_(16|32)x\2x(\d+)_(\w+)", opcode)
    if found is None or found[4] not in _KINDS:
        raise Unknown(opcode)
    return found[1], int(found[2]), int(found[3]), _KINDS[found[4]]


def operand(registers: np.ndarray, rows: int, depth: int, kind: str, fp8: torch.dtype) -> np.ndarray:
    """Bits [registers, waves · 64] → float64 [waves, rows, K]."""
    raw = np.ascontiguousarray(registers.T).view(np.uint8)  # lanes, bytes
    raw = raw.reshape(-1, 64 // rows, rows, raw.shape[1])  # wave, part of K, row, bytes
    numbers = elements(raw, kind, fp8)
    parts, each = numbers.shape[1], numbers.shape[3]
    if parts * each != depth:
        raise Unknown(f"{each} elements of {kind} in a lane")
    # Of 32 codes a lane holds 16 in one half of K and 16 in the other.
    run = 16 if each == 32 else each
    numbers = numbers.reshape(-1, parts, rows, each // run, run)
    return numbers.transpose(0, 2, 3, 1, 4).reshape(-1, rows, depth)


def scales(bits: np.ndarray, rows: int, byte: int) -> np.ndarray:
    """A lane's byte, E8M0, is that of its row and of 32 elements along K → float64 [waves, rows, K]."""
    codes = np.ascontiguousarray(bits).view(np.uint8).reshape(-1, 64 // rows, rows, 4)[..., byte]
    return np.repeat(e8m0(codes).transpose(0, 2, 1), 32, axis=2)


def multiply(before: np.ndarray | None, a: np.ndarray, b: np.ndarray, kind: str) -> np.ndarray:
    """a, b: float64 [waves, 16 or 32, K]; before and result: bits [registers, waves · 64] of the sums."""
    size = a.shape[1]
    product = a @ b.transpose(0, 2, 1)  # wave, row, column
    # A register holds rows that are apart by 4 · (64 / size): row = block, lane / size, register in the block.
    blocks = product.reshape(-1, size * size // 256, 64 // size, 4, size).transpose(1, 3, 0, 2, 4)
    sums = blocks.reshape(size * size // 64, -1)
    if kind == "i32":
        total = sums.astype(np.int64) + (0 if before is None else before.view(np.int32))
        return total.astype(np.int32).view(np.uint32)  # wraps
    total = sums if before is None else sums + before.view(np.float32)
    return total.astype(np.float32).view(np.uint32)


def turned(rows: np.ndarray, bits: int) -> np.ndarray:
    """ds_read_b64_tr: uint8 [lanes, 8] as read → as delivered.

    The 8 bytes of 16 lanes are a matrix of 16 elements a row, and 64 / bits rows; a lane gets a column.
    """
    size = bits // 8
    elements = rows.reshape(-1, 8 // size, 16, size)  # 16 lanes: row, column
    return np.ascontiguousarray(elements.transpose(0, 2, 1, 3)).reshape(-1, 8)
