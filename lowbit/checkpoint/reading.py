"""Bytes from files: as they lie, their checksum, or the rows of a matrix that lies transposed.

Files are read into buffers that are used again and never mapped, since mapped pages count as
resident.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import xxhash

from lowbit.checkpoint import rows as loops
from lowbit.checkpoint.headers import ITEM_BYTES, TensorRef
from lowbit.errors import InputError

# So much is copied or checked at a time.
COPY_BYTES = 4 << 20
# Of a transposed matrix, so much is turned at a time. All of what is stored passes for each tile, so
# it is large: one expert of most models, a third of Llama 4's.
TILE_BYTES = 32 << 20
# Stored rows that are read and turned together: they stay in the second-level cache.
_STRIP_BYTES = 512 << 10
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
# Signed and unsigned integers as wide as a float dtype, and the bits of its smallest magnitude that is
# not finite: as integers, magnitudes order like the numbers, with Inf and NaN on top.
_TOPS = {
    "F64": (np.int64, np.uint64, 0x7FF0000000000000),
    "F32": (np.int32, np.uint32, 0x7F800000),
    "BF16": (np.int16, np.uint16, 0x7F80),
    "F16": (np.int16, np.uint16, 0x7C00),
    "F8_E4M3": (np.int8, np.uint8, 0x7F),
}


def read_exactly(fd: int, buffer: np.ndarray, offset: int, file: Path) -> None:
    """Fill a uint8 buffer from a file position; InputError when the file ends before."""
    view, done = buffer.data, 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            raise InputError(
                f"{file}: expected {len(view)} bytes at {offset}, the file ended; it changed while reading"
            )
        done += count


def read_bytes(ref: TensorRef) -> np.ndarray:
    """A whole (small) tensor as uint8, row major, such as a scale."""
    return read_rows(ref, 0, ref.shape[0] if len(ref.shape) == 2 else ref.elements)


def read_rows(ref: TensorRef, first: int, count: int) -> np.ndarray:
    """`count` rows of a matrix from row `first` on as uint8, row major; of a tensor that is none, so many elements."""
    row_bytes = (ref.shape[1] if len(ref.shape) == 2 else 1) * ITEM_BYTES[ref.dtype]
    buffer = np.empty(count * row_bytes, np.uint8)
    with ref.file.open("rb") as stream:
        if ref.pitch:
            _read_turned(stream.fileno(), ref, first, count, buffer)
        else:
            read_exactly(stream.fileno(), buffer, ref.offset + first * row_bytes, ref.file)
    return buffer


def file_checksum(file: Path, offset: int = 0, nbytes: int | None = None) -> str:
    """xxh3-128 of a file's bytes from `offset` on, all or so many, as hex; "" where they are not there."""
    digest = xxhash.xxh3_128()
    try:
        with file.open("rb") as stream:
            stream.seek(offset)
            left = file.stat().st_size - offset if nbytes is None else nbytes
            while left > 0:
                part = stream.read(min(left, COPY_BYTES))
                if not part:
                    return ""
                digest.update(part)
                left -= len(part)
    except FileNotFoundError:
        return ""
    return digest.hexdigest()


def finite(part: np.ndarray, dtype: str) -> bool:
    """Whether uint8 bytes of a dtype hold neither NaN nor Inf; True for one that has none.

    Of positive numbers the largest is the largest signed integer, of negative ones the largest unsigned.
    """
    if dtype == "F8_E8M0":
        return bool(part.max(initial=0) < 0xFF)
    if dtype not in _TOPS:
        return True
    signed, unsigned, top = _TOPS[dtype]
    sign = 1 << (8 * ITEM_BYTES[dtype] - 1)
    return bool(part.view(signed).max(initial=0) < top and part.view(unsigned).max(initial=0) < sign | top)


class TransposedRows:
    """Rows of matrices that lie transposed, through one tile that is kept between calls."""

    def __init__(self) -> None:
        self._ref: TensorRef | None = None
        self._first = self._stop = 0
        self._tile = np.empty(0, np.uint8)

    def read(self, fd: int, ref: TensorRef, start: int, count: int) -> np.ndarray:
        """`count` bytes from byte `start` on, as if the matrix lay row major; both are whole rows."""
        row_bytes = ref.shape[1] * ITEM_BYTES[ref.dtype]
        row, stop = start // row_bytes, (start + count) // row_bytes
        if ref != self._ref or row < self._first or stop > self._stop:
            if ref != self._ref:
                _announce(fd, ref)
            rows = min(max(TILE_BYTES // row_bytes, stop - row), ref.shape[0] - row)
            if self._tile.size < rows * row_bytes:
                self._tile = np.empty(rows * row_bytes, np.uint8)
            self._ref, self._first, self._stop = None, row, row + rows
            _read_turned(fd, ref, row, rows, self._tile[: rows * row_bytes])
            self._ref = ref
        at = (row - self._first) * row_bytes
        return self._tile[at : at + count]


def _announce(fd: int, ref: TensorRef) -> None:
    """Let the kernel fetch the whole matrix in large pieces: the runs alone look like random reads to it."""
    if hasattr(os, "posix_fadvise"):
        extent = ((ref.shape[1] - 1) * ref.pitch + ref.shape[0]) * ITEM_BYTES[ref.dtype]
        os.posix_fadvise(fd, ref.offset, extent, os.POSIX_FADV_WILLNEED)


def _read_turned(fd: int, ref: TensorRef, row: int, rows: int, out: np.ndarray) -> None:
    """Rows `row` … of a transposed matrix, each of them a column of what is stored → `out`, row major.

    Whole stored rows are read, what lies beside the matrix in them too: a call for each run of
    wanted columns takes longer than copying what is not wanted.
    """
    item, cols, pitch = ITEM_BYTES[ref.dtype], ref.shape[1], ref.pitch
    turned = out.view(_UNSIGNED[item]).reshape(rows, cols)
    step = min(max(_STRIP_BYTES // (pitch * item), 16), cols)
    strip = np.empty(step * pitch, turned.dtype)
    for first in range(0, cols, step):
        count = min(step, cols - first)
        # From the first wanted element to the last: nothing beyond the file's end is asked for.
        wanted = (count - 1) * pitch + rows
        at = ref.offset + (first * pitch + row) * item
        read_exactly(fd, strip[:wanted].view(np.uint8), at, ref.file)
        loops.turn(strip, pitch, count, turned, first)
