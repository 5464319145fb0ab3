"""What a kernel's memrefs are: windows on tensors, which programs share, and on its own buffers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from ..memory import Fault, Global

NOBODY, SEVERAL = 0, 65_535


class Watched(Global):
    """Global memory that knows which program touched a byte: programs run in any order, and at once."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__(tensors)
        self.program = NOBODY
        """From 1 on. Ascend takes no more than 65,535."""
        # Zeros take no memory until they are touched.
        self._writer = [np.zeros(size, np.uint16) for size in self._sizes]
        self._reader = [np.zeros(size, np.uint16) for size in self._sizes]

    def load(self, addresses: np.ndarray, width: int, what: str, alignment: int | None = None) -> np.ndarray:
        index, at = self.locate(addresses, width, what, alignment)
        for one in np.unique(index):
            here = at[index == one]
            self._refuse(self._writer[one][here], f"{what}: reads", "wrote")
            reader = self._reader[one][here]
            mine = (reader == NOBODY) | (reader == self.program)
            self._reader[one][here] = np.where(mine, self.program, SEVERAL)
        return super().load(addresses, width, what, alignment)

    def store(self, addresses: np.ndarray, data: np.ndarray, what: str, alignment: int | None = None) -> None:
        index, at = self.locate(addresses, data.shape[1], what, alignment)
        for one in np.unique(index):
            here = at[index == one]
            self._refuse(self._writer[one][here], f"{what}: writes", "wrote")
            self._refuse(self._reader[one][here], f"{what}: writes", "reads")
            self._writer[one][here] = self.program
        super().store(addresses, data, what, alignment)

    def _refuse(self, touched: np.ndarray, what: str, verb: str) -> None:
        other = (touched != NOBODY) & (touched != self.program)
        if other.any():
            raise Fault(f"{what} what another program {verb} (this is {self.program})")


def within_bounds(whole: tuple[int, ...], offsets: list[int], sizes: list[int], strides: list[int]) -> None:
    for offset, size, step, there in zip(offsets, sizes, strides, whole, strict=True):
        if offset < 0 or size < 0 or (size and offset + (size - 1) * step >= there):
            raise Fault(f"a window of {size} elements from {offset} on, in one of {there}")


@dataclass(frozen=True)
class Buffer:
    """Memory of one program, of which nothing is known before it is written."""

    data: np.ndarray
    """[elements]"""

    def load(self, at: np.ndarray, what: str) -> np.ndarray:
        return self.data[at]

    def store(self, at: np.ndarray, values: np.ndarray, what: str) -> None:
        self.data[at] = values


@dataclass(frozen=True)
class Pointer:
    """An argument of the kernel."""

    memory: Watched
    address: int
    dtype: type

    def load(self, at: np.ndarray, what: str) -> np.ndarray:
        width = np.dtype(self.dtype).itemsize
        data = self.memory.load(self._addresses(at, width), width, what)
        return np.ascontiguousarray(data).view(self.dtype).reshape(at.shape)

    def store(self, at: np.ndarray, values: np.ndarray, what: str) -> None:
        width = np.dtype(self.dtype).itemsize
        raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8).reshape(-1, width)
        self.memory.store(self._addresses(at, width), raw, what)

    def _addresses(self, at: np.ndarray, width: int) -> np.ndarray:
        return (self.address + at.reshape(-1) * width).astype(np.uint64)


@dataclass(frozen=True)
class MemRef:
    """A window: element [i, j] lies at offset + i · strides[0] + j · strides[1]."""

    base: Buffer | Pointer
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @staticmethod
    def new(shape: tuple[int, ...], dtype: type) -> MemRef:
        data = np.frombuffer(b"\xa5" * (int(np.prod(shape)) * np.dtype(dtype).itemsize), np.uint8).copy()
        strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
        return MemRef(Buffer(data.view(dtype)), 0, shape, strides)

    def window(self, offsets: list[int], sizes: list[int], strides: list[int]) -> MemRef:
        within_bounds(self.sizes, offsets, sizes, strides)
        return replace(
            self,
            offset=self.offset + sum(o * s for o, s in zip(offsets, self.strides, strict=True)),
            sizes=tuple(sizes),
            strides=tuple(a * b for a, b in zip(strides, self.strides, strict=True)),
        )

    def places(self) -> np.ndarray:
        at = np.array(self.offset)
        for size, stride in zip(self.sizes, self.strides, strict=True):
            at = at[..., None] + np.arange(size) * stride
        return at

    def load(self, what: str) -> np.ndarray:
        return self.base.load(self.places(), what)

    def store(self, values: np.ndarray, what: str) -> None:
        self.base.store(self.places(), np.broadcast_to(values, self.sizes), what)
