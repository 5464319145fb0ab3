"""Read a checkpoint's headers: every tensor's name, dtype, shape and place, and no weight data.

The safetensors layout: 8 bytes little-endian header length, a JSON header
`{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {…}}`, then the data.
Everything here is treated as hostile: a header that lies is refused before anything is read
through it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.errors import InputError

if TYPE_CHECKING:
    from lowbit.checkpoint.hub import Repository

# safetensors' own limit; a longer one is an attack or a broken file.
MAX_HEADER_BYTES = 100_000_000

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "C64": 8, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip

# A larger size in the shape of a tensor without elements, which takes no bytes in the file, is an attack: buffers for a
# row of it would take all memory.
_MOST_OF_NOTHING = 2**24

# safetensors knows these, several elements to a byte.
_NARROW = ("F4", "F6_E2M3", "F6_E3M2")

FLOATS = ("BF16", "F16", "F32")

INDEX = "model.safetensors.index.json"
# Written by a conversion, of that conversion: never carried into the next one.
MANIFEST = "lowbit_manifest.json"
# Where a conversion works until it is done.
PARTIAL = ".lowbit-partial"


@dataclass(frozen=True)
class TensorRef:
    """Where one tensor lies."""

    name: str
    dtype: str
    """As the safetensors header names it: BF16, F8_E4M3, …"""
    shape: tuple[int, ...]
    file: Path
    offset: int
    """Absolute byte position in `file` of the first element."""
    pitch: int = 0
    """0: row major. Else it lies transposed, a column of `shape` to each stored row, so many elements apart."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def below(self) -> TensorRef:
        """[E, N, …] as one matrix [E · N, …], each of its matrices below the one before, as they lie."""
        first, second, *rest = self.shape
        return replace(self, shape=(first * second, math.prod(rest)))

    def rows(self, first: int, count: int) -> TensorRef:
        """`count` rows of a matrix that lies row major, from row `first` on."""
        at = self.offset + first * self.shape[1] * ITEM_BYTES[self.dtype]
        return replace(self, shape=(count, self.shape[1]), offset=at)

    @property
    def nbytes(self) -> int:
        return self.elements * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Checkpoint:
    """A directory of safetensors, known from its headers."""

    root: Path
    tensors: dict[str, TensorRef] = field(repr=False)
    """In file order, shard after shard."""
    shards: tuple[Path, ...] = field(repr=False)
    config: dict[str, Any] = field(repr=False)
    """`config.json`; empty where there is none. Where a file of its own describes the quantization
    (msModelSlim's, ModelOpt's), that is its `quantization_config`."""
    others: tuple[Path, ...] = field(repr=False)
    """Every other file below `root`, relative to it: tokenizer, generation config, code, …"""
    notes: tuple[str, ...] = field(default=())
    """What is odd about it, in words."""
    repository: Repository | None = field(default=None, repr=False)
    """Where its weights are to be fetched from before they are read; None: they are here."""

    @property
    def name(self) -> str:
        """The directory, or the repository and its commit."""
        return str(self.repository or self.root)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def stamps(self) -> dict[Path, tuple[int, int]]:
        """Shard → bytes, and nanoseconds of its last modification, both as of now; of a repository, where nothing
        changes, a number that its contents give."""
        if self.repository is not None:
            return self.repository.stamps(self.shards)
        found = ((shard, shard.stat()) for shard in self.shards)
        return {shard: (stat.st_size, stat.st_mtime_ns) for shard, stat in found}

    def fingerprint(self) -> str:
        """xxh3-128 over names, dtypes, shapes, places, file sizes and times: the source's identity.

        Weight data is not read, so a change that keeps size and modification time is not seen.
        """
        import xxhash

        digest = xxhash.xxh3_128()

        def say(text: str) -> None:
            digest.update(text.encode(errors="surrogateescape"))  # names of files need not be UTF-8

        for shard, (size, time) in self.stamps().items():
            say(f"{shard.name}\0{size}\0{time}\n")
        for t in self.tensors.values():
            say(f"{t.name}\0{t.dtype}\0{t.shape}\0{t.file.name}\0{t.offset}\n")
        say(json.dumps(self.config, sort_keys=True))
        return digest.hexdigest()


def no_duplicates(pairs: Iterable[tuple[Any, Any]], what: str = "name") -> dict[Any, Any]:
    """What parsers make of a mapping, where they let the last of equal keys win: the others would be lost."""
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found:
            raise InputError(f"the {what} {key!r} stands twice")
        found[key] = value
    return found


def _encodable(name: str) -> bool:
    """JSON can escape half a surrogate pair, which is no text and cannot be written again."""
    return not any("\ud800" <= c <= "\udfff" for c in name)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_header(file: Path, nbytes: int | None = None) -> tuple[dict[str, TensorRef], dict[str, str]]:
    """(tensors in data order, `__metadata__`) of one safetensors file.

    `nbytes`: of the whole file, where its data is not here. Raises InputError when the file is
    truncated, the header is too long or not the JSON that the format asks for, or offsets overlap, leave holes or
    leave the file.
    """

    def refuse(problem: str) -> InputError:
        return InputError(f"{file}: {problem}; the file is damaged or not safetensors: fetch it again")

    try:
        size = file.stat().st_size if nbytes is None else nbytes
        with file.open("rb") as stream:
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise refuse(f"expected at least 8 bytes, found {size}")
            length = int.from_bytes(prefix, "little")
            if length > MAX_HEADER_BYTES:
                raise refuse(
                    f"expected a header of at most {MAX_HEADER_BYTES} bytes, found a length of {length}"
                )
            if length > size - 8:
                raise refuse(f"expected a header of {length} bytes, but the file ends after {size - 8}")
            text = stream.read(length)
    except OSError as error:
        raise _unreadable(file, error) from error

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=no_duplicates)
    except InputError as error:
        raise refuse(f"expected every name once, but {error}") from None
    except (ValueError, RecursionError) as error:
        raise refuse(f"expected a JSON header, found something else ({type(error).__name__})") from None
    if not isinstance(header, dict):
        raise refuse(f"expected a JSON object as header, found a {type(header).__name__}")

    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise refuse("expected __metadata__ to map names to strings")

    spans: list[tuple[int, int, TensorRef]] = []
    for name, entry in header.items():
        spans.append(_read_entry(name, entry, data_start=8 + length, refuse=refuse, file=file))
    spans.sort(key=lambda span: (span[0], span[1]))
    position = 0
    for begin, end, ref in spans:
        if begin != position:
            kind = "overlap" if begin < position else "leave a hole"
            raise refuse(f"data offsets {kind}: {ref.name!r} begins at {begin}, expected {position}")
        position = end
    if position != size - 8 - length:
        raise refuse(f"expected {position} bytes of data, found {size - 8 - length} (truncated or padded)")
    return {ref.name: ref for _, _, ref in spans}, metadata


def _unreadable(file: Path, error: OSError) -> InputError:
    return InputError(f"{file}: cannot be read ({error.strerror}); check the path and permissions")


def header_bytes(file: Path) -> int:
    """How many bytes come before the data of a safetensors file."""
    with file.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def _read_entry(name: str, entry: Any, *, data_start: int, refuse, file: Path) -> tuple[int, int, TensorRef]:
    if not isinstance(entry, dict):
        raise refuse(f"expected an object for tensor {name!r}, found a {type(entry).__name__}")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not _encodable(name):
        raise refuse(f"expected a name in UTF-8, found {name!r}")
    if dtype in _NARROW:
        raise InputError(
            f"{file}: found {dtype} in the tensor {name!r}, which cannot be read; start from the model in float"
        )
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise refuse(f"expected a known dtype for tensor {name!r}, found {dtype!r}")
    if not isinstance(shape, list) or not all(_is_count(d) for d in shape):
        raise refuse(f"expected a list of sizes as shape of {name!r}, found {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(o) for o in offsets):
        raise refuse(f"expected [begin, end] as data_offsets of {name!r}, found {offsets!r}")
    if 0 in shape and max(shape) > _MOST_OF_NOTHING:
        raise refuse(f"expected sizes of a weight as shape of {name!r}, found {shape!r}")
    begin, end = offsets
    ref = TensorRef(name, dtype, tuple(shape), file, data_start + begin)
    if end - begin != ref.nbytes:
        raise refuse(f"expected {ref.nbytes} bytes for {name!r} ({dtype} {shape}), found {end - begin}")
    return begin, end, ref


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a small file; InputError when it is not one."""
    try:
        value = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise _unreadable(file, error) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: expected a JSON object ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: expected a JSON object, found a {type(value).__name__}")
    return value
