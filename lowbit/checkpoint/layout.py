"""Lay output tensors out in safetensors shards: names, offsets and headers, before any data."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowbit.checkpoint.headers import ITEM_BYTES, TensorRef
from lowbit.errors import InputError


@dataclass(frozen=True)
class OutTensor:
    """One tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int = -1
    offset: int = -1
    """Absolute byte position in its shard."""

    @property
    def nbytes(self) -> int:
        size = ITEM_BYTES[self.dtype]
        for d in self.shape:
            size *= d
        return size


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One output file."""

    file: str
    header: bytes
    nbytes: int
    """Of the whole file."""
    names: tuple[str, ...]


_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


def parse_size(text: str | int) -> int:
    """`5GB`, `800MB`, `2GiB` or a number of bytes → bytes. Decimal units, as the hub's own tools use.

    InputError for a text without a unit: whoever writes `5` means GB, and would get a file per tensor.
    """
    if isinstance(text, int):
        text = f"{text}B"
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", str(text))
    if (
        not match
        or match[2].upper() not in _UNITS
        or (size := int(float(match[1]) * _UNITS[match[2].upper()])) < 1
    ):
        raise InputError(f"expected a size such as 5GB, 800MB or 2GiB, found {text!r}")
    return size


def assign(
    groups: Sequence[Sequence[OutTensor]], max_shard_bytes: int
) -> tuple[list[Shard], dict[str, OutTensor]]:
    """Put groups of tensors (what belongs to one module stays together) into shards, in order.

    A shard is closed when the next group, with its share of the header, would not fit; a single
    group may exceed the limit. Within a shard tensors that fill whole cache lines come first, then
    the others, both by falling item size: so large weights begin at a line where the file is
    mapped (one that does not is read slower, and torch's own products add in another order),
    and each tensor is aligned to its dtype. Raises InputError when two tensors have one name.
    """
    _refuse_duplicates(groups)
    bins: list[list[OutTensor]] = [[]]
    filled = _HEADER_BYTES
    for group in groups:
        size = sum(t.nbytes + _entry_bytes(t) for t in group)
        if bins[-1] and filled + size > max_shard_bytes:
            bins.append([])
            filled = _HEADER_BYTES
        bins[-1].extend(group)
        filled += size
    shards, placed = [], {}
    for number, tensors in enumerate(bins):
        name = (
            "model.safetensors"
            if len(bins) == 1
            else f"model-{number + 1:05d}-of-{len(bins):05d}.safetensors"
        )
        shard, refs = _lay_out(name, number, tensors)
        shards.append(shard)
        placed.update(refs)
    return shards, placed


_LINE = 64  # bytes of a cache line
# Length, metadata and padding of a header, and what two offsets take at most.
_HEADER_BYTES, _OFFSET_DIGITS = 128, 32


def _entry_bytes(t: OutTensor) -> int:
    """At most what a tensor takes in the header."""
    shape = ",".join(map(str, t.shape))
    text = f'{json.dumps(t.name)}:{{"dtype":"{t.dtype}","shape":[{shape}],"data_offsets":[,]}},'
    return len(text) + _OFFSET_DIGITS


def _refuse_duplicates(groups: Sequence[Sequence[OutTensor]]) -> None:
    seen: set[str] = set()
    for group in groups:
        for t in group:
            if t.name in seen:
                raise InputError(
                    f"{t.name}: expected a name that is free for the output, but the source already has a tensor "
                    "of that name; remove what is left of an earlier quantization from the source"
                )
            seen.add(t.name)


def _lay_out(file: str, number: int, tensors: list[OutTensor]) -> tuple[Shard, dict[str, OutTensor]]:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins: list[tuple[OutTensor, int]] = []
    position = 0
    for t in sorted(tensors, key=lambda t: (t.nbytes % _LINE != 0, -ITEM_BYTES[t.dtype])):
        entries[t.name] = {
            "dtype": t.dtype,
            "shape": list(t.shape),
            "data_offsets": [position, position + t.nbytes],
        }
        begins.append((t, position))
        position += t.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % _LINE)
    header = len(text).to_bytes(8, "little") + text
    placed = {t.name: OutTensor(t.name, t.dtype, t.shape, number, len(header) + at) for t, at in begins}
    names = tuple(t.name for t, _ in begins)
    return Shard(file=file, header=header, nbytes=len(header) + position, names=names), placed


def index_of(shards: Sequence[Shard]) -> dict[str, Any]:
    """`model.safetensors.index.json`: which file holds which tensor, and the bytes of all."""
    weight_map = {name: shard.file for shard in shards for name in shard.names}
    total = sum(shard.nbytes - len(shard.header) for shard in shards)
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def out_like(ref: TensorRef, dtype: str | None = None) -> OutTensor:
    """An output of a source tensor's name and shape."""
    return OutTensor(ref.name, dtype or ref.dtype, ref.shape)
