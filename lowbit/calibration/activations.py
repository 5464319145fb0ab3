"""Cached hidden states between two decoder layers: in host memory up to a limit, on disk past it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lowbit.errors import InputError


class ActivationCache:
    """A list of tensors whose items may lie in files, so that activations need not fit in memory.

    The first `limit_bytes` stay in host memory (a device has to hold a layer and one batch, no more); what
    comes after goes to memory-mapped files in `directory` (a temporary one when None), removed
    with the cache. Items are on the CPU. Replacing one of the same shape and dtype writes in place.
    """

    def __init__(self, limit_bytes: int, directory: str | Path | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.bytes_in_memory = 0
        self.bytes_spilled = 0
        self._files = 0
        if directory is not None and not Path(directory).is_dir():
            raise InputError(
                f"expected a directory for hidden states at {directory}, found none; make it first"
            )
        self._parent = directory
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._items: list[Tensor] = []

    def append(self, x: Tensor) -> None:
        self._items.append(self.hold(x))

    def hold(self, x: Tensor) -> Tensor:
        """`x` on the CPU, in memory or in a file as there is room, without making it an item."""
        size = x.numel() * x.element_size()
        if self.bytes_in_memory + size <= self.limit_bytes:
            self.bytes_in_memory += size
            # A copy where it is part of something larger, which would stay in memory with it.
            return x.cpu() if x.is_contiguous() else x.contiguous().cpu()
        if self._directory is None:
            self._directory = tempfile.TemporaryDirectory(prefix="lowbit-", dir=self._parent)
        file = Path(self._directory.name) / f"{self._files}.bin"
        self._files += 1
        mapped = torch.from_file(str(file), shared=True, size=x.numel(), dtype=x.dtype).view(x.shape)
        mapped.copy_(x)
        self.bytes_spilled += size
        return mapped

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Tensor:
        return self._items[index]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._items)

    def replace(self, index: int, x: Tensor) -> None:
        """Overwrite an item with a tensor of the same shape."""
        if x.shape != self._items[index].shape:
            raise ValueError(f"expected shape {list(self._items[index].shape)}, found {list(x.shape)}")
        self._items[index].copy_(x)

    def close(self) -> None:
        self._items.clear()
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None
