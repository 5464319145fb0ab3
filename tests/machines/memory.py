"""Global and on-chip memory, byte by byte, with the checks that show what a kernel does wrong."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable

import numpy as np
from torch import Tensor

Bytes = np.ndarray
"""uint8."""
NOBODY, SEVERAL = -1, -2


class Fault(Exception):
    """What a device would refuse, or what only luck makes right there."""


class Global:
    """The storages of a launch's tensors; all else is out of bounds."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        spans: dict[int, Bytes] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                memory = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
                spans[storage.data_ptr()] = np.ctypeslib.as_array(memory)
        self._spans = [spans[start] for start in sorted(spans)]
        self._starts = np.array(sorted(spans), np.uint64)
        self._sizes = np.array([len(span) for span in self._spans])
        self._log: list[tuple[int, np.ndarray, Bytes]] = []
        """Storage, offsets and what stood there, of every store."""

    def written(self) -> dict[int, tuple[np.ndarray, Bytes]]:
        """Storage → (offsets that were written since the last `undo`, in order; what stands there)."""
        found: dict[int, list[np.ndarray]] = {}
        for index, at, _ in self._log:
            found.setdefault(index, []).append(at.reshape(-1))
        unique = {index: np.unique(np.concatenate(each)) for index, each in found.items()}
        return {index: (at, self._spans[index][at]) for index, at in unique.items()}

    def undo(self) -> None:
        for index, at, before in reversed(self._log):
            self._spans[index][at] = before
        self._log.clear()

    def locate(
        self, addresses: np.ndarray, width: int, what: str, alignment: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(number of each address's storage, offsets [lanes, width] in it) of `width` bytes at each address.

        alignment: bytes; of all `width` where it is not given.
        """
        _require(addresses, width, alignment, what)
        index = np.searchsorted(self._starts, addresses, side="right") - 1
        offsets = (addresses - self._starts[index]).astype(np.int64)
        if (index < 0).any() or (offsets + width > self._sizes[index]).any():
            raise Fault(f"{what}: reads or writes outside of every tensor")
        return index, offsets[:, None] + np.arange(width)

    def load(self, addresses: np.ndarray, width: int, what: str, alignment: int | None = None) -> Bytes:
        """[lanes, width]; the lanes of one instruction may lie in several tensors."""
        index, at = self.locate(addresses, width, what, alignment)
        if len(index) and (index == index[0]).all():
            return self._spans[index[0]][at]
        out = np.empty(at.shape, np.uint8)
        for one in np.unique(index):
            out[index == one] = self._spans[one][at[index == one]]
        return out

    def store(self, addresses: np.ndarray, data: Bytes, what: str, alignment: int | None = None) -> None:
        index, at = self.locate(addresses, data.shape[1], what, alignment)
        if not (addresses[1:] > addresses[:-1]).all() and len(np.unique(addresses)) < len(addresses):
            order = np.argsort(addresses, kind="stable")
            same = addresses[order][1:] == addresses[order][:-1]
            if (data[order][1:][same] != data[order][:-1][same]).any():
                raise Fault(f"{what}: lanes write different values to one address")
        for one in np.unique(index):
            here, span = index == one, self._spans[one]
            self._log.append((one, at[here], span[at[here]]))
            span[at[here]] = data[here]


def _require(addresses: np.ndarray, width: int, alignment: int | None, what: str) -> None:
    if (addresses % (alignment or width)).any():
        raise Fault(f"{what}: {width} bytes at an address that is no multiple of {alignment or width}")


def run_twice(memory: Global, name: str, run: Callable[[bool], None]) -> None:
    """`run(False)`, then `run(True)` on what stood there before: what both write must agree."""
    run(False)
    first = memory.written()
    memory.undo()
    run(True)
    second = memory.written()
    same = first.keys() == second.keys() and all(
        np.array_equal(a, b) for i in first for a, b in zip(first[i], second[i], strict=True)
    )
    if not same:
        raise Fault(f"{name}: the result depends on when copies and products end")


class Shared:
    """On-chip memory of one CTA. Knows which warp touched a byte since the last barrier."""

    def __init__(self, size: int, warps: np.ndarray, base: int) -> None:
        """warps: [threads], the number of each thread's. base: the address where it begins."""
        self.data = np.full(size, 0xA5, np.uint8)  # what a kernel before left
        self._warps, self._base = warps, base
        self._known = np.zeros(size, bool)
        self._writer, self._reader = (np.full(size, NOBODY, np.int16) for _ in range(2))
        self._unfenced = np.zeros(size, bool)

    def barrier(self) -> None:
        self._writer.fill(NOBODY)
        self._reader.fill(NOBODY)

    def fence(self) -> None:
        """What was written is there for the asynchronous proxy: wgmma and TMA."""
        self._unfenced.fill(False)

    def offsets(
        self, addresses: np.ndarray, width: int, what: str, alignment: int | None = None
    ) -> np.ndarray:
        """[lanes, width] of `width` bytes at each address."""
        _require(addresses, width, alignment, what)
        at = addresses.astype(np.int64) - self._base
        if len(at) and (at.min() < 0 or at.max() + width > len(self.data)):
            raise Fault(f"{what}: outside of on-chip memory ({len(self.data)} bytes)")
        return at[:, None] + np.arange(width)

    def load(self, at: np.ndarray, lanes: np.ndarray, what: str) -> Bytes:
        """at: [lanes, bytes]."""
        warps = self._warps[lanes][:, None]
        writer = self._writer[at]
        if ((writer != NOBODY) & (writer != warps)).any():
            raise Fault(f"{what}: reads what another warp wrote, without a barrier")
        if not self._known[at].all():
            raise Fault(f"{what}: reads on-chip memory that nothing wrote")
        reader = self._reader[at]
        self._reader[at] = np.where((reader == NOBODY) | (reader == warps), warps, SEVERAL)
        return self.data[at]

    def store(self, at: np.ndarray, data: Bytes, lanes: np.ndarray, what: str) -> None:
        warps = np.broadcast_to(self._warps[lanes][:, None], at.shape)
        for touched, verb in ((self._writer[at], "wrote"), (self._reader[at], "reads")):
            if ((touched != NOBODY) & (touched != warps)).any():
                raise Fault(f"{what}: writes what another warp {verb}, without a barrier")
        self.data[at], self._writer[at], self._known[at], self._unfenced[at] = data, warps, True, True

    def require_fence(self, at: np.ndarray, what: str) -> None:
        if self._unfenced[at].any():
            raise Fault(f"{what}: touches what was stored, without fence.proxy.async")

    def deliver(self, at: np.ndarray, data: Bytes) -> None:
        """By TMA, which waits for no warp; who may read it learns so from an mbarrier."""
        self.data[at], self._known[at], self._writer[at], self._unfenced[at] = data, True, NOBODY, False

    def asynchronous(self, at: np.ndarray, what: str) -> Bytes:
        """What wgmma reads."""
        if at.min() < 0 or at.max() >= len(self.data):
            raise Fault(f"{what}: outside of on-chip memory ({len(self.data)} bytes)")
        if not self._known[at].all():
            raise Fault(f"{what}: reads on-chip memory that nothing wrote")
        self.require_fence(at, what)
        return self.data[at]
