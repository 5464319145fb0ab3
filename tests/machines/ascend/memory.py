"""Global memory and a core's own, and the windows on them that are HIVM's memrefs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from torch import Tensor

from ..memory import Fault, Global
from .order import At, Order, Touched

# Unified buffer, L1 and L0C of a 910B.
SIZES = {"ub": 192 << 10, "cbuf": 512 << 10, "cc": 128 << 10}
NOBODY, SEVERAL = 0, 65_535


class Shared(Global):
    """Global memory, which all blocks share: they run in any order, and at once."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__(tensors)
        self.block = NOBODY
        """From 1 on. Ascend takes no more than 65,535."""
        self._writer = [np.zeros(size, np.uint16) for size in self._sizes]
        self._reader = [np.zeros(size, np.uint16) for size in self._sizes]
        self._touched = [Touched(size) for size in self._sizes]

    def begin(self, block: int) -> None:
        self.block = block
        self._touched = [Touched(size) for size in self._sizes]

    def read(self, addresses: np.ndarray, width: int, step: Step) -> np.ndarray:
        """uint8 [addresses, width]"""
        index, at = self.locate(addresses, width, "a load", 1)
        for one in np.unique(index):
            here = at[index == one]
            self._refuse(self._writer[one][here], "reads", "wrote")
            reader = self._reader[one][here]
            mine = (reader == NOBODY) | (reader == self.block)
            self._reader[one][here] = np.where(mine, self.block, SEVERAL)
            self._touched[one].read(here, step.agent, step.number, step.order)
        return self.load(addresses, width, "a load", 1)

    def write(self, addresses: np.ndarray, data: np.ndarray, step: Step) -> None:
        index, at = self.locate(addresses, data.shape[1], "a store", 1)
        for one in np.unique(index):
            here = at[index == one]
            self._refuse(self._writer[one][here], "writes", "wrote")
            self._refuse(self._reader[one][here], "writes", "reads")
            self._writer[one][here] = self.block
            # Both vector cores store what they both computed: it may come twice.
            if not np.array_equal(self.load(addresses, data.shape[1], "a store", 1), data):
                self._touched[one].write(here, step.agent, step.number, step.order)
        self.store(addresses, data, "a store", 1)

    def _refuse(self, touched: np.ndarray, does: str, did: str) -> None:
        if ((touched != NOBODY) & (touched != self.block)).any():
            raise Fault(f"a block {does} what another one {did}")


class Local:
    """A memory of one core; of what stands in it before it is written nothing is known."""

    def __init__(self, space: str) -> None:
        self._space = space
        self._data = np.full(SIZES[space], 0xA5, np.uint8)
        self._known = np.zeros(SIZES[space], bool)
        self._touched = Touched(SIZES[space])

    def read(self, addresses: np.ndarray, width: int, step: Step) -> np.ndarray:
        """uint8 [addresses, width]"""
        at = self._at(addresses, width)
        if not self._known[at].all():
            raise Fault(f"a read of what nothing wrote in {self._space}")
        self._touched.read(at, step.agent, step.number, step.order)
        return self._data[at].reshape(-1, width)

    def write(self, addresses: np.ndarray, data: np.ndarray, step: Step) -> None:
        at = self._at(addresses, data.shape[1])
        self._touched.write(at, step.agent, step.number, step.order)
        self._data[at], self._known[at] = data.reshape(self._data[at].shape), True

    def spoil(self, addresses: np.ndarray, width: int, step: Step) -> None:
        """Room for an instruction's own use: what it leaves there is not known."""
        at = self._at(addresses, width)
        self._touched.write(at, step.agent, step.number, step.order, room=True)
        self._known[at] = False

    def _at(self, addresses: np.ndarray, width: int) -> At:
        """Bytes one after the other as a slice, which is much faster."""
        first, last = (int(addresses.min()), int(addresses.max()) + width) if len(addresses) else (0, 0)
        if first < 0 or last > len(self._data):
            raise Fault(f"outside of {self._space} ({len(self._data)} bytes)")
        if last - first == len(addresses) * width and (np.diff(addresses.astype(np.int64)) == width).all():
            return slice(first, last)
        return addresses.astype(np.int64)[:, None] + np.arange(width)


@dataclass(frozen=True)
class Step:
    """An instruction: which pipe's, its number there, and what that pipe knows."""

    agent: int
    number: int
    order: Order


@dataclass(frozen=True)
class MemRef:
    """Element [i, j] lies offset + i · strides[0] + j · strides[1] elements behind the address. Of i1, 8 are a byte."""

    memory: Shared | Local
    address: int
    dtype: type
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    def window(self, offsets: list[int], sizes: list[int], strides: list[int]) -> MemRef:
        for offset, size, step, whole in zip(offsets, sizes, strides, self.sizes, strict=True):
            if offset < 0 or size < 0 or (size and offset + (size - 1) * step >= whole):
                raise Fault(f"a window of {size} elements from {offset} on, in one of {whole}")
        return replace(
            self,
            offset=self.offset + sum(o * s for o, s in zip(offsets, self.strides, strict=True)),
            sizes=tuple(sizes),
            strides=tuple(a * b for a, b in zip(strides, self.strides, strict=True)),
        )

    def of_rank(self, rank: int) -> MemRef:
        """Without as many dimensions of one element."""
        kept = list(range(len(self.sizes)))
        for i in reversed(range(len(self.sizes))):
            if len(kept) > rank and self.sizes[i] == 1:
                kept.remove(i)
        assert len(kept) == rank, (self.sizes, rank)
        return replace(
            self, sizes=tuple(self.sizes[i] for i in kept), strides=tuple(self.strides[i] for i in kept)
        )

    def collapsed(self, groups: list[list[int]]) -> MemRef:
        sizes, strides = [], []
        for group in groups:
            long = [i for i in group if self.sizes[i] != 1] or group[-1:]
            for i, j in pairwise(long):
                if self.strides[i] != self.sizes[j] * self.strides[j]:
                    raise Fault(f"dimensions of {self.sizes} elements by {self.strides} as one")
            sizes.append(int(np.prod([self.sizes[i] for i in group])))
            strides.append(self.strides[long[-1]])
        return replace(self, sizes=tuple(sizes), strides=tuple(strides))

    def expanded(self, groups: list[list[int]], sizes: list[int]) -> MemRef:
        strides = [0] * len(sizes)
        for group, stride in zip(groups, self.strides, strict=True):
            for i in reversed(group):
                strides[i], stride = stride, stride * sizes[i]
        return replace(self, sizes=tuple(sizes), strides=tuple(strides))

    def load(self, step: Step) -> np.ndarray:
        at = self._places()
        if self.dtype is np.bool_:
            whole = self.memory.read(self.address + at.reshape(-1) // 8, 1, step)[:, 0]
            return ((whole >> (at.reshape(-1) % 8).astype(np.uint8)) & 1).astype(bool).reshape(at.shape)
        data = self.memory.read(self._addresses(at), self.width, step)
        return np.ascontiguousarray(data).view(self.dtype).reshape(at.shape)

    def store(self, values: np.ndarray, step: Step) -> None:
        at = self._places()
        values = np.ascontiguousarray(np.broadcast_to(values, self.sizes)).reshape(-1)
        if self.dtype is np.bool_:
            self.memory.write(*self._bytes(at.reshape(-1), values), step)
            return
        assert values.dtype == self.dtype, (values.dtype, self.dtype)
        self.memory.write(self._addresses(at), values.view(np.uint8).reshape(len(values), self.width), step)

    def spoil(self, step: Step) -> None:
        if isinstance(self.memory, Local) and self.dtype is not np.bool_:
            self.memory.spoil(self._addresses(self._places()), self.width, step)

    def _bytes(self, at: np.ndarray, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(addresses, [addresses, 1]) of bits: one after the other from a byte on, or each in a byte of its own."""
        if (at[:1] % 8).any():
            raise Fault("bits that do not begin at a byte")
        if np.array_equal(at, at[:1] + np.arange(len(at))):
            packed = np.packbits(bits, bitorder="little")
            return self.address + at[:1] // 8 + np.arange(len(packed)), packed[:, None]
        if (at % 8).any():
            raise Fault("bits that do not begin at a byte")
        return self.address + at // 8, bits.astype(np.uint8)[:, None]

    @property
    def width(self) -> int:
        return np.dtype(self.dtype).itemsize

    def _addresses(self, at: np.ndarray) -> np.ndarray:
        return (self.address + at.reshape(-1) * self.width).astype(np.uint64)

    def _places(self) -> np.ndarray:
        at = np.array(self.offset)
        for size, stride in zip(self.sizes, self.strides, strict=True):
            at = at[..., None] + np.arange(size) * stride
        return at
