"""Which rows a task of a CPU product takes, and the operand in panels where a tile wants its rows side by side."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lowbit.ops import cpu_threads
from lowbit.ops.cpu_isa import Tile
from lowbit.ops.cpu_params import PAIRED_ROWS, PANEL_ROWS, PREPARE, P

_UNITS = 256  # 32-bit units of a row that one task of AMX's panels rearranges

Block = tuple[int, int, int, int]


def panel_rows(tile: Tile) -> int:
    """Rows of a panel."""
    return PAIRED_ROWS if tile.paired else PANEL_ROWS


def blocks_of(rows: int, height: int, offsets: list[int] | None, panel: int) -> list[Block]:
    """(expert, first row, rows, first panel of so many rows) of every block of at most `height` rows."""
    found, before = [], 0
    for expert, (start, end) in enumerate(pairwise([0, rows] if offsets is None else offsets)):
        if start == end:  # of many experts most are empty where few tokens come
            continue
        for first in range(start, end, height):
            count = min(height, end - first)
            found.append((expert, first, count, before))
            before += -(-count // panel)
    return found


def table(rows: list[Any]) -> ctypes.Array[ctypes.c_int64]:
    """Rows of equal length as the compiled loops read them."""
    flat = [value for row in rows for value in row]
    return (ctypes.c_int64 * max(len(flat), 1))(*flat)


@dataclass(kw_only=True, slots=True)
class Pack:
    """What makes panels of an operand, ready to run but for addresses."""

    function: Any
    block: ctypes.Array[ctypes.c_int64]
    rows: ctypes.Array[ctypes.c_int64]
    """(first row, rows) of every panel."""
    size: int
    """Bytes of all panels."""

    @classmethod
    def of(cls, tile: Tile, blocks: list[Block], row_bytes: int, group: int) -> Pack | None:
        """For rows of `row_bytes` with scale groups of `group` elements; None where the tile takes no panels."""
        if not (tile.matrix or tile.paired):
            return None
        from lowbit.ops import cpu_prepare, cpu_winograd

        count = panel_rows(tile)
        panels = [
            (row, min(count, first + rows - row))
            for _, first, rows, _ in blocks
            for row in range(first, first + rows, count)
        ]
        rows_table, block = table(panels), PREPARE()
        block[P.ROWS], block[P.STATIC] = len(panels), ctypes.addressof(rows_table)
        block[P.X_ROW], block[P.K], block[P.GROUP] = row_bytes, row_bytes // 4, _UNITS
        block[P.GROUP_PADDED] = group
        function = cpu_winograd.paired_rows(tile.kind) if tile.paired else cpu_prepare.panels()
        return cls(function=function, block=block, rows=rows_table, size=len(panels) * count * row_bytes)

    def place(self, operand: int, panels: int, sums: int) -> None:
        """Addresses of the operand, of its panels, and of sums that are made on the way (0: none are)."""
        self.block[P.X], self.block[P.A], self.block[P.SUMS] = operand, panels, sums

    def run(self, threads: int) -> None:
        self.block[P.NEXT] = 0
        cpu_threads.run(self.function, self.block, threads)
