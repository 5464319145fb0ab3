"""Copies into on-chip memory that end later than they begin, and what waits for them.

The device promises no more than that they have ended when a wait says so. So they happen either where they are begun or
where they are waited for, as the machine is told: a kernel is right if both give the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..memory import Fault, Global, Shared
from .matrix import swizzled
from .program import SHARED_BASE

Copy = Callable[[], None]


class Groups:
    """What is committed in groups, and waited for until so many are left: cp.async and wgmma."""

    def __init__(self, late: bool) -> None:
        self._late = late
        self._open: list[Copy] = []
        self._closed: list[list[Copy]] = []

    def add(self, do: Copy) -> None:
        if self._late:
            self._open.append(do)
        else:
            do()

    def commit(self) -> None:
        self._closed.append(self._open)
        self._open = []

    def wait(self, left: int) -> None:
        while len(self._closed) > left:
            for do in self._closed.pop(0):
                do()


@dataclass
class _Barrier:
    expected: int
    missing: int
    bytes_missing: int = 0
    phase: int = 0


class Barriers:
    """mbarriers, by their addresses, and the copies by TMA that they wait for."""

    def __init__(self, late: bool) -> None:
        self._late = late
        self._all: dict[int, _Barrier] = {}
        self._coming: dict[int, list[Copy]] = {}

    def init(self, address: int, count: int) -> None:
        self._all[address] = _Barrier(count, count)

    def invalidate(self, address: int) -> None:
        if self._coming.get(address):
            raise Fault("mbarrier.inval: copies that nothing waited for")
        del self._all[address]

    def arrive(self, address: int, nbytes: int = 0) -> None:
        """And expect so many bytes (arrive.expect_tx)."""
        barrier = self._at(address)
        if not barrier.missing:
            raise Fault("mbarrier: more arrivals than it expects")
        barrier.bytes_missing += nbytes
        barrier.missing -= 1
        self._turn(barrier)

    def coming(self, address: int, do: Copy) -> None:
        """What will end, and say so, when the barrier is waited for."""
        self._coming.setdefault(address, []).append(do)

    def copy(self, address: int, nbytes: int, do: Copy) -> None:
        def arrive() -> None:
            do()
            barrier = self._at(address)
            barrier.bytes_missing -= nbytes
            self._turn(barrier)

        if self._late:
            self.coming(address, arrive)
        else:
            arrive()

    def done(self, address: int, parity: int) -> bool:
        """try_wait.parity."""
        barrier = self._at(address)
        coming = self._coming.get(address, [])
        while coming and barrier.phase & 1 == parity:
            coming.pop(0)()
        return barrier.phase & 1 != parity

    def _at(self, address: int) -> _Barrier:
        if address not in self._all:
            raise Fault("an mbarrier that was not initialized")
        return self._all[address]

    def _turn(self, barrier: _Barrier) -> None:
        if barrier.missing == 0 and barrier.bytes_missing == 0:
            barrier.phase += 1
            barrier.missing = barrier.expected


@dataclass(frozen=True)
class TensorMap:
    """What cuTensorMapEncodeTiled makes of a matrix; the same limits."""

    base: int
    rows: int
    columns: int
    row_stride: int
    """In bytes."""
    item: int
    """Bytes of an element."""
    box: tuple[int, int]
    """Rows and columns of a tile."""
    row_bytes: int
    """Of the swizzle: 16 (none), 32, 64 or 128."""

    def __post_init__(self) -> None:
        wrong = [
            self.base % 16 and "an address that is no multiple of 16",
            self.row_stride % 16 and "rows that do not begin at multiples of 16 bytes",
            max(self.box) > 256 and "a box of more than 256",
            self.box[1] * self.item % 16 and "rows of a box of no multiple of 16 bytes",
            self.row_bytes > 16
            and self.box[1] * self.item > self.row_bytes
            and "a box wider than its swizzle",
            min(self.rows, self.columns) < 1 and "no elements",
        ]
        if any(wrong):
            raise Fault(f"a tensor map with {', '.join(str(w) for w in wrong if w)}: {self}")

    def copy(
        self, memory: Global, shared: Shared, destination: int, row: int, column: int, what: str
    ) -> Copy:
        """The tile whose first element is [row, column], zeros where it leaves the matrix."""
        if destination % (8 * self.row_bytes if self.row_bytes > 16 else 128):
            raise Fault(f"{what}: a tile at an address that its swizzle does not take")
        height, width = self.box
        rows = np.arange(row, row + height)
        columns = np.arange(column, column + width)
        inside_rows = (rows >= 0) & (rows < self.rows)
        inside_columns = (columns >= 0) & (columns < self.columns)
        line = width * self.item
        to = swizzled(
            destination + np.arange(height)[:, None] * line + np.arange(line)[None, :], self.row_bytes
        )
        if to.min() < SHARED_BASE or to.max() - SHARED_BASE >= len(shared.data):
            raise Fault(f"{what}: outside of on-chip memory")
        shared.require_fence(to - SHARED_BASE, what)

        def do() -> None:
            tile = np.zeros((height, width, self.item), np.uint8)
            if inside_rows.any() and inside_columns.any():
                first, last = columns[inside_columns][[0, -1]]
                length = (last - first + 1) * self.item
                starts = self.base + rows[inside_rows] * self.row_stride + first * self.item
                at = starts[:, None].astype(np.uint64) + np.arange(length, dtype=np.uint64)
                read = memory.load(at.reshape(-1), 1, what).reshape(len(starts), -1, self.item)
                tile[np.ix_(inside_rows, inside_columns)] = read
            shared.deliver(to - SHARED_BASE, tile.reshape(height, line))

        return do

    @property
    def nbytes(self) -> int:
        return self.box[0] * self.box[1] * self.item
