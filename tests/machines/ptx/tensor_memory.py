"""sm100's tensor memory, 128 lanes of 512 words, and the products (tcgen05.mma) that add to it.

A row of a result is a lane, its columns are words; of 64 rows, 16 lie in the first lanes of each warp's 32. Products
run on by themselves, one after the other, until a commit tells an mbarrier that those before it have ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..memory import Fault
from ..numbers import Unknown, e8m0, elements
from .matrix import accumulate, rows_along_k, swizzled
from .transfer import Barriers

LANES, WORDS = 128, 512
_SWIZZLES = {0: 16, 2: 128, 4: 64, 6: 32}
"""Code in a descriptor → bytes of a row."""


@dataclass(frozen=True)
class Described:
    """What the 32 bits of an instruction descriptor say of a product."""

    rows: int
    columns: int
    out: str
    a: str
    b: str
    scale_a: int = 0
    """Which byte of a word has the scale of this step."""
    scale_b: int = 0
    turned_a: bool = False
    """Its rows do not lie along K but across."""
    turned_b: bool = False


def described(opcode: str, bits: int) -> Described:
    """Of kind i8, f16, f8f6f4 or mxf8f6f4; this machine has no operands that are sparse or negated."""
    kind = opcode.split("kind::")[1].split(".")[0]
    turned = bool(bits >> 15 & 1), bool(bits >> 16 & 1)
    if bits >> 13 & 3 or bits >> 2 & 1 or (any(turned) and kind != "f16"):
        raise Unknown(f"{opcode} of operands that are sparse or negated, or of 8 bits and turned")
    columns, a, b = (bits >> 17 & 63) * 8, bits >> 7 & 7, bits >> 10 & 7
    if kind == "mxf8f6f4":
        if not bits >> 23 & 1 or (a, b) != (0, 0):
            raise Unknown(f"{opcode} of other dtypes than e4m3 with exponents")
        return Described(
            (bits >> 27 & 3) * 128, columns, "f32", "e4m3", "e4m3", bits >> 29 & 3, bits >> 4 & 3
        )
    names = {"i8": {1: "s8"}, "f8f6f4": {0: "e4m3"}, "f16": {0: "f16", 1: "bf16"}}[kind]
    out = {1: "f32", 2: "s32"}.get(bits >> 4 & 3)
    if a not in names or b not in names or out != ("s32" if kind == "i8" else "f32"):
        raise Unknown(f"{opcode} of other dtypes: {bits:#x}")
    return Described(
        (bits >> 24 & 31) * 16, columns, out, names[a], names[b], turned_a=turned[0], turned_b=turned[1]
    )  # fmt: skip


def rows_in_memory(descriptor: int, rows: int, turned: bool) -> np.ndarray:
    """Addresses [rows, 32 bytes of K] in on-chip memory of an operand.

    Its rows lie along K, 8 of them one after the other; or, turned, elements of 16 bits of all rows for one of K, in
    pieces as wide as the swizzle.
    """
    code = descriptor >> 61 & 7
    if code not in _SWIZZLES or code == 0 or descriptor >> 46 & 7 != 1 or descriptor >> 49 & 15:
        raise Unknown(f"tcgen05.mma from a layout without swizzle, or with an offset: {descriptor:#x}")
    row_bytes, row, byte = _SWIZZLES[code], np.arange(rows)[:, None], np.arange(32)[None, :]
    if not turned:
        return rows_along_k(descriptor, rows, row_bytes)
    start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    across, k, wide = (descriptor >> 16 & 0x3FFF) << 4, byte // 2, row_bytes // 2
    at = row // wide * across + row % wide * 2 + k // 8 * stride + k % 8 * row_bytes + byte % 2
    return swizzled(start + at, row_bytes)


def lanes_of(rows: int) -> np.ndarray:
    """Where the rows of a result, or of an operand, lie."""
    if rows not in (64, 128):
        raise Unknown(f"tcgen05.mma of {rows} rows")
    row = np.arange(rows)
    return row if rows == 128 else row // 16 * 32 + row % 16


class TensorMemory:
    def __init__(self, barriers: Barriers, late: bool) -> None:
        """late: products run when their mbarrier is waited for, not when they are issued."""
        self._words = np.full((LANES, WORDS), 0x7FC0_DEAD, np.uint32)
        self._barriers, self._late = barriers, late
        self._allocated: dict[int, int] = {}
        self._free = WORDS
        self._waiting: deque[Callable[[], None]] = deque()

    def allocate(self, words: int) -> int:
        """From the end: an address of 0 would be right by luck."""
        if words & (words - 1) or not 32 <= words <= self._free:
            raise Fault(f"tcgen05.alloc of {words} columns, with {self._free} free")
        self._free -= words
        self._allocated[self._free] = words
        return self._free

    def release(self, address: int, words: int) -> None:
        if self._allocated.pop(address, None) != words:
            raise Fault("tcgen05.dealloc of what was not allocated")

    def end(self) -> None:
        if self._allocated:
            raise Fault("tensor memory that was not given back")

    def words(self, lanes: np.ndarray, first: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices of `count` words from `first` on in each lane."""
        at = first[:, None] + np.arange(count)
        owned = [(at >= start) & (at < start + n) for start, n in self._allocated.items()]
        if not owned or not np.logical_or.reduce(owned).all():
            raise Fault("tensor memory that was not allocated")
        return np.broadcast_to(lanes[:, None], at.shape), at

    def load(self, lanes: np.ndarray, first: np.ndarray, count: int) -> np.ndarray:
        return self._words[self.words(lanes, first, count)]

    def store(self, lanes: np.ndarray, first: np.ndarray, values: np.ndarray) -> None:
        self._words[self.words(lanes, first, values.shape[1])] = values

    def operand(self, address: int, rows: int) -> np.ndarray:
        """uint8 [rows, 32] of activations that lie here, packed."""
        lanes = lanes_of(rows)
        return np.ascontiguousarray(self.load(lanes, np.full(rows, address & 0xFFFF), 8)).view(np.uint8)

    def scales(self, address: int, rows: int, byte: int) -> np.ndarray:
        """E8M0 [rows]: of row r in lane r % 32, word r / 32, the same for each warp's lanes."""
        row = np.arange(rows)
        words = self._words[self.words(row % 32, (address & 0xFFFF) + row // 32, 1)][:, 0]
        everywhere = self._words[np.arange(LANES) % 32][:, address & 0xFFFF]
        if (self._words[:, address & 0xFFFF] != everywhere).any():
            raise Fault("scales that differ from warp to warp")
        return e8m0(words >> np.uint32(8 * byte) & np.uint32(255))

    def multiply(
        self, address: int, a: Callable[[], np.ndarray], b: Callable[[], np.ndarray], what: Described, add: bool,
        scales: Sequence[int],
    ) -> None:  # fmt: skip
        """scales: where those of a and b lie, or none."""
        lanes, first = lanes_of(what.rows), np.full(what.rows, address & 0xFFFF)

        def do() -> None:
            product = elements(a(), what.a) @ elements(b(), what.b).T
            if scales:
                of_rows = self.scales(scales[0], what.rows, what.scale_a)
                of_columns = self.scales(scales[1], what.columns, what.scale_b)
                product = product * of_rows[:, None] * of_columns[None, :]
            before = self.load(lanes, first, what.columns) if add else None
            self.store(lanes, first, accumulate(before, product, what.out))

        if self._late:
            self._waiting.append(do)
        else:
            do()

    def commit(self, barrier: int) -> None:
        if not self._late:
            self._barriers.arrive(barrier)
            return
        ended = False

        def end() -> None:
            nonlocal ended
            ended = True
            self._barriers.arrive(barrier)

        self._waiting.append(end)

        def wait() -> None:
            while not ended:
                self._waiting.popleft()()

        self._barriers.coming(barrier, wait)
