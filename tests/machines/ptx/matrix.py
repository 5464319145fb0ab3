"""Fragments and products of matrices.

A lane is g = lane / 4 of 8 and t = lane % 4 of 4. Fragments are told in bytes, so that one layout holds for elements of
8 and 16 bits: rows of 32 bytes of K.
"""

from __future__ import annotations

import re
from functools import cache

import numpy as np

from ..memory import Fault
from ..numbers import Lanes, Unknown, e8m0, elements


def _bytes(registers: list[Lanes]) -> np.ndarray:
    """[warps, g, t, registers, 4]."""
    return np.stack(registers, 1).view(np.uint8).reshape(-1, 8, 4, len(registers), 4)


def rows_of_a(registers: list[Lanes]) -> np.ndarray:
    """Four registers → [warps, 16, 32 bytes]."""
    raw = _bytes(registers).reshape(-1, 8, 4, 2, 2, 4)  # warp, g, t, half of K, half of rows, byte
    return raw.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 32)


def rows_of_b(registers: list[Lanes]) -> np.ndarray:
    """Two registers → [warps, 8, 32 bytes]."""
    return _bytes(registers).transpose(0, 1, 3, 2, 4).reshape(-1, 8, 32)


def sums(registers: list[Lanes], columns: int) -> np.ndarray:
    """A register for each two columns' two elements of two rows → bits [warps, 16, columns]."""
    # warp, g, t, block, half of rows, element
    raw = np.stack(registers, 1).reshape(-1, 8, 4, columns // 8, 2, 2)
    return raw.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, columns)


def sum_registers(values: np.ndarray) -> list[Lanes]:
    """The way back."""
    columns = values.shape[2]
    raw = values.reshape(-1, 2, 8, columns // 8, 4, 2).transpose(0, 2, 4, 3, 1, 5).reshape(-1, columns // 2)
    return [np.ascontiguousarray(raw[:, i]) for i in range(columns // 2)]


def accumulate(before: np.ndarray | None, product: np.ndarray, kind: str) -> np.ndarray:
    """Bits of before + product. Integers saturate: that is what `.satfinite` says."""
    if kind == "s32":
        total = product if before is None else product + before.view(np.int32)
        return np.clip(total, -(2.0**31), 2.0**31 - 1).astype(np.int64).astype(np.int32).view(np.uint32)
    total = product if before is None else product + before.view(np.float32)
    return total.astype(np.float32).view(np.uint32)


def mma(opcode: str, a: list[Lanes], b: list[Lanes], c: list[Lanes], scales: list[np.ndarray]) -> list[Lanes]:
    """mma.sync m16n8 over 32 bytes of K, one for each warp. scales: of rows [warps, 16] and columns [warps, 8]."""
    out, of = _mma_dtypes(opcode)
    left, right = elements(rows_of_a(a), of), elements(rows_of_b(b), of)
    product = left @ right.transpose(0, 2, 1)
    if scales:
        product = product * scales[0][:, :, None] * scales[1][:, None, :]
    return sum_registers(accumulate(sums(c, 8), product, out))


@cache
def _mma_dtypes(opcode: str) -> tuple[str, str]:
    """(of the sums, of both operands)."""
    found = re.search(r"\.m16n8k(\d+)\.row\.col\..*?(s32|f32)\.(\w+)\.(\w+)\.\2", opcode)
    if found is None or found[3] != found[4] or found[1] != _depth(found[3]):
        raise Unknown(opcode)
    return found[2], found[3]


def block_scales(registers: Lanes, rows: int, byte: int, thread: int) -> np.ndarray:
    """The scales of `mma … block_scale.scale_vec::1X`, E8M0 [warps, rows].

    Of each four lanes, one of a pair (16 rows: two lanes hold rows g and g + 8) or one alone (8 columns) holds them, in
    a byte of its register.
    """
    raw = registers.view(np.uint8).reshape(-1, 8, 4, 4)[..., byte]  # warp, g, t
    holders = [2 * thread, 2 * thread + 1] if rows == 16 else [thread]
    chosen = np.concatenate([raw[:, :, t] for t in holders], 1)
    return e8m0(chosen)


_SWIZZLES = {0: 16, 1: 128, 2: 64, 3: 32}
"""Code in a descriptor of wgmma → bytes of a row."""


def swizzled(addresses: np.ndarray, row_bytes: int) -> np.ndarray:
    """Where on-chip memory has a byte: bits 4 to 6 of an address, or fewer, exchanged by those from 7."""
    bits = {128: 0x70, 64: 0x30, 32: 0x10, 16: 0}[row_bytes]
    return addresses ^ ((addresses >> 3) & bits)


def described_rows(descriptor: int, rows: int) -> np.ndarray:
    """Addresses [rows, 32 bytes] of an operand of wgmma whose K lies in rows."""
    row_bytes = _SWIZZLES[descriptor >> 62 & 3]
    if row_bytes == 16:
        raise Unknown("wgmma from a layout without swizzle")
    if descriptor >> 49 & 7:
        raise Unknown("wgmma with an offset of the base")
    return rows_along_k(descriptor, rows, row_bytes)


def rows_along_k(descriptor: int, rows: int, row_bytes: int) -> np.ndarray:
    """The same of wgmma and tcgen05.mma: 8 rows one after the other, and a stride from 8 to 8."""
    start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    row = np.arange(rows)[:, None]
    return swizzled(start + row // 8 * stride + row % 8 * row_bytes + np.arange(32)[None, :], row_bytes)


def _depth(of: str) -> str:
    """How many elements of that dtype 32 bytes of K are."""
    return "16" if of in ("bf16", "f16") else "32"


def wgmma_shape(opcode: str) -> tuple[int, str, str]:
    """(columns, dtype of the sums, dtype of both operands)."""
    found = re.search(r"\.m64n(\d+)k(\d+)\.(\w+)\.(\w+)\.(\w+)$", opcode)
    if found is None or found[4] != found[5] or found[2] != _depth(found[4]):
        raise Unknown(opcode)
    return int(found[1]), found[3], found[4]


def wgmma(before: np.ndarray | None, a: np.ndarray, b: np.ndarray, out: str, of: str) -> np.ndarray:
    """One warpgroup's: a uint8 [64, 32], b uint8 [n, 32] → bits [4 warps, 16, n]."""
    product = (elements(a, of) @ elements(b, of).T).reshape(4, 16, -1)
    return accumulate(before, product, out)


def matrix_rows(opcode: str, addresses: Lanes) -> tuple[int, np.ndarray, np.ndarray]:
    """ldmatrix and stmatrix: (matrices, addresses [warps · matrices · 8] of rows, the lanes that gave them)."""
    count = int(re.search(r"\.x(\d)\.", opcode)[1])  # type: ignore[index]
    if not opcode.endswith("b16") or "m8n8" not in opcode:
        raise Unknown(opcode)
    lanes = np.arange(len(addresses)).reshape(-1, 32)[:, : 8 * count].reshape(-1)
    if (addresses[lanes] % 16).any():
        raise Fault(f"{opcode}: a row at an address that is no multiple of 16")
    return count, addresses[lanes], lanes


def from_rows(opcode: str, rows: np.ndarray, count: int) -> list[Lanes]:
    """uint8 [warps · matrices · 8, 16] → a register for each matrix."""
    elements = rows.view(np.uint16).reshape(-1, count, 8, 8)
    if ".trans" in opcode:
        elements = elements.transpose(0, 1, 3, 2)
    pairs = np.ascontiguousarray(elements).view(np.uint32).reshape(-1, count, 32)
    return [np.ascontiguousarray(pairs[:, i]).reshape(-1) for i in range(count)]


def to_rows(opcode: str, registers: list[Lanes]) -> np.ndarray:
    """The way back."""
    pairs = np.stack([r.reshape(-1, 32) for r in registers], 1)
    elements = np.ascontiguousarray(pairs).view(np.uint16).reshape(-1, len(registers), 8, 8)
    if ".trans" in opcode:
        elements = elements.transpose(0, 1, 3, 2)
    return np.ascontiguousarray(elements).view(np.uint8).reshape(-1, 16)
