"""What a call launched, kept to be launched again without the call.

What a call checks, chooses and hands to Triton, which looks at every argument to find the compiled kernel, is the same
whenever tensors of the same shapes, dtypes, strides and alignment come, and takes several times as long as the
launches themselves. `keep` writes down the compiled kernels and where each of their pointers came from; `Kept.run`
fills in new addresses. `lowbit.ops.again` decides when that is right.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .start import Launched, noting
from .targets import on_device

_aten = torch.ops.aten
_ALLOCATES = (_aten.empty.memory_format, _aten.empty_strided.default, _aten.new_empty.default)
_SLOT = 512
"""Bytes to which parts of the scratch are aligned: as torch's allocator for GPUs aligns its own."""


@dataclass
class _Address:
    """In a tensor descriptor, for its tensor."""

    value: int = 0

    def data_ptr(self) -> int:
        return self.value


@dataclass(frozen=True)
class _Hole:
    """A pointer that differs from call to call: `offset` bytes into tensor `base` (inputs, results, scratch)."""

    position: int
    base: int
    offset: int
    address: _Address | None = None
    """Where it is a tensor descriptor's."""


class Kept:
    """The launches of one call. One thread's: `run` fills them in where they lie."""

    def __init__(
        self, launches: list[tuple[Any, list[Any], list[_Hole]]], results: list[Tensor], scratch: int, single: bool
    ) -> None:  # fmt: skip
        self._launches, self._scratch, self._single = launches, scratch, single
        self._results = [(t.shape, t.dtype) for t in results]
        self._device = results[0].device

    def run(self, *inputs: Tensor) -> Any:
        """What the call gave, of other inputs that look alike."""
        device = self._device
        results = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self._results]
        addresses = [t.data_ptr() for t in inputs]
        addresses += [t.data_ptr() for t in results]
        if self._scratch:
            scratch = torch.empty(self._scratch, dtype=torch.uint8, device=device)
            addresses.append(scratch.data_ptr())
        stream = triton.runtime.driver.active.get_current_stream(device.index or 0)
        with on_device(device):
            for start, values, holes in self._launches:
                for hole in holes:
                    at = addresses[hole.base] + hole.offset
                    if hole.address is None:
                        values[hole.position] = at
                    else:
                        hole.address.value = at
                start(*values, stream=stream)
        return results[0] if self._single else tuple(results)


class _Watch(TorchDispatchMode):
    """What torch itself does within: memory that it gives, and whether it computed anything."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []
        self.computed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _ALLOCATES:
            self.made.append(out)
        elif not func.is_view and func is not _aten._unsafe_view.default:
            self.computed = True
        return out


def keep(
    call: Callable[[], Any], inputs: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[Any, Kept | None]:
    """(what `call` returns, its launches).

    inputs: the tensors it reads whose place changes from call to call. weights: those that stay where they are.
    None for launches where running them again would not be the call: it computed with torch's own operations,
    nothing was compiled (Triton's interpreter), pointers came from elsewhere, results are no tensors of their own.
    """
    with noting() as launches, _Watch() as watch:
        result = call()
    if watch.computed or not launches:
        return result, None
    results = [result] if isinstance(result, Tensor) else list(result)
    return result, _kept(launches, results, inputs, weights, watch.made, isinstance(result, Tensor))


def _kept(
    launches: list[Launched], results: list[Tensor], inputs: Sequence[Tensor],
    weights: Sequence[Tensor], made: list[Tensor], single: bool,
) -> Kept | None:  # fmt: skip
    own = [_storage(t) for t in results]
    temporary = [t for t in made if _storage(t) not in own]
    moving = [*(_storage(t) for t in inputs), *own, *(_storage(t) for t in temporary)]
    fixed = {_storage(t) for t in weights}
    plain = all(
        t.is_contiguous() and t.numel() * t.element_size() == t.untyped_storage().nbytes() for t in results
    )
    # In inference mode `to` and `contiguous` look like views also where they copy. What they return was not made here.
    foreign = {*own} - {_storage(t) for t in made}
    if not plain or foreign or 0 in moving or len({*moving}) < len(moving) or fixed & {*moving}:
        return None
    # Storage → (base, what of an address in it is to be taken off).
    bases = {_storage(t): (i, t.data_ptr()) for i, t in enumerate([*inputs, *results])}
    scratch, last = 0, len(bases)
    for t in temporary:
        bases[_storage(t)] = last, t.data_ptr() - scratch
        scratch += triton.cdiv(t.untyped_storage().nbytes(), _SLOT) * _SLOT
    kept = []
    for compiled, grid, values in launches:
        if compiled is None:
            return None
        holes = []
        for position, value in enumerate(values):
            described = hasattr(value, "block_shape")
            tensor = value.base if described else value
            if not isinstance(tensor, Tensor):
                continue
            place = _storage(tensor)
            if place not in bases and place not in fixed:
                return None
            address = None
            if described:
                values[position] = copy.copy(value)
                address = values[position].base = _Address(tensor.data_ptr())
            else:
                values[position] = tensor.data_ptr()
            if place in bases:
                base, start = bases[place]
                holes.append(_Hole(position, base, tensor.data_ptr() - start, address))
        kept.append((compiled[(*grid, 1, 1)[:3]], values, holes))
    return Kept(kept, results, scratch, single)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
