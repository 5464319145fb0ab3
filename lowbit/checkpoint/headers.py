"""Read a checkpoint's headers: every tensor's name, dtype, shape and place, and no weight data.

The safetensors layout: 8 bytes little-endian header length, a JSON header
`{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {…}}`, then the data.
Everything here is treated as hostile: a header that lies is refused before anything is read
through it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lowbit.checkpoint.others import entries, is_adapter, others_below
from lowbit.errors import InputError
from lowbit.formats import DESCRIPTION, METHOD_OF_DESCRIPTION, MODELOPT, modelopt_config, quantization_of

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


def _shard_below(root: Path, name: Any, index: Path) -> Path:
    """The shard file that an index names; never a path that leaves the directory."""
    if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(
            f"{index}: expected file names inside {root}, found {name!r}; do not trust this index"
        )
    file = root / name
    try:
        found = file.is_file()
    except OSError:  # such as a name too long for the file system
        found = False
    if not found:
        raise InputError(
            f"{index}: names the file {name!r:.80}, which is missing; fetch the whole checkpoint again"
        )
    return file


def _read_shards(files: Iterable[Path], sizes: Mapping[Path, int]) -> dict[str, TensorRef]:
    tensors: dict[str, TensorRef] = {}
    for file in files:
        for name, ref in read_header(file, sizes.get(file))[0].items():
            if name in tensors:
                raise InputError(
                    f"two shards hold the tensor {name!r}: {tensors[name].file.name} and {file.name}; "
                    "expected each once: remove the file that does not belong"
                )
            tensors[name] = ref
    return tensors


def _read_indexed(
    root: Path, index: Path, sizes: Mapping[Path, int], notes: list[str]
) -> tuple[dict[str, TensorRef], list[Path]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: expected a weight_map of tensor names to files, found {weight_map!r:.80}")
    files: dict[str, Path] = {}
    for name in weight_map.values():
        if not isinstance(name, str) or name not in files:
            files[name] = _shard_below(root, name, index)
    tensors = _read_shards(sorted(files.values()), sizes)
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != files[file]:
            where = f"it lies in {tensors[name].file.name}" if name in tensors else "no shard holds it"
            raise InputError(
                f"{index}: says that {file!r} holds {name!r}, but {where}; fetch index and shards again"
            )
    if unlisted := [name for name in tensors if name not in weight_map]:
        notes.append(
            f"{len(unlisted)} tensors lie in shards but not in the index (first: {unlisted[0]}); they are taken along"
        )
    return tensors, sorted(files.values())


def _index_of(root: Path, indexes: list[Path], notes: list[str]) -> Path:
    """`INDEX` where there are several, as loaders do: Mistral ships its own format beside it."""
    first, *others = sorted(indexes, key=lambda file: file.name != INDEX)
    if others and first.name != INDEX:
        raise InputError(
            f"{root}: expected one index, found {', '.join(i.name for i in indexes)}; remove the one that is stale"
        )
    if others:
        notes.append(f"indexes beside {first.name} are left out: {', '.join(i.name for i in others)}")
    return first


def _shards_without_index(root: Path, found: list[Path], notes: list[str]) -> list[Path]:
    """`model.safetensors` alone where there is one, as loaders do; else all, if none is missing."""
    if root / "model.safetensors" in found:
        if extra := [f.name for f in found if f.name != "model.safetensors"]:
            notes.append(f"files beside model.safetensors are left out: {', '.join(extra)}")
        return [root / "model.safetensors"]
    numbered = [m for f in found if (m := re.search(r"-(\d+)-of-(\d+)\.safetensors$", f.name))]
    for total in {int(m[2]) for m in numbered}:
        have = {int(m[1]) for m in numbered if int(m[2]) == total}
        if missing := sorted(set(range(1, min(total, 100_000) + 1)) - have):
            raise InputError(
                f"{root}: expected {total} shards, found {len(have)} (number {missing[0]} is missing); "
                "fetch the whole checkpoint again"
            )
    return found


def _read_config(file: Path) -> dict[str, Any]:
    config = read_json(file)
    objects = dict.fromkeys(("text_config", "quantization_config", "compression_config"), dict)
    for key, kind in {**objects, "model_type": str, "architectures": list}.items():
        if not isinstance(config.get(key), kind | None):
            expected = {dict: "an object", str: "a text", list: "a list"}[kind]
            raise InputError(
                f"{file}: expected {expected} as {key}, found a {type(config[key]).__name__}; fetch it again"
            )
    return config


def _no_weights(root: Path) -> InputError:
    """What a directory without safetensors holds instead."""
    pickles = sorted(p.name for p in entries(root) if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        return InputError(
            f"{root}: expected *.safetensors, found {pickles[0]}; pickle files can run code and are never "
            "opened: save the model as safetensors first"
        )
    if any(is_adapter(file) for file in root.glob("*.safetensors")):
        return InputError(
            f"{root}: expected a model's weights, found low-rank adapters alone; merge them into their model first"
        )
    if snapshots := sorted(root.glob("snapshots/*")):
        return InputError(
            f"{root}: expected *.safetensors files, found a hub's cache; give the directory of a snapshot, such as "
            f"{snapshots[0]}"
        )
    if (root / PARTIAL).is_dir():
        return InputError(
            f"{root}: expected *.safetensors files, found an unfinished conversion; run `lowbit convert` again "
            "as it was to finish it"
        )
    return InputError(f"{root}: expected *.safetensors files, found none; check the path")


def open_checkpoint(path: str | Path, sizes: Mapping[Path, int] = MappingProxyType({})) -> Checkpoint:
    """Read the headers of a checkpoint directory.

    `sizes`: bytes of files whose data is not here, but elsewhere (see `hub`).

    Uses the index when there is one, else every `*.safetensors` in the directory. Raises
    InputError on anything that does not fit together; pickle files are refused.
    """
    root = Path(path)
    if not root.exists():
        advice = "check the path"
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)) and not root.parent.exists():
            advice += f", or download it first: hf download {path} --local-dir DIRECTORY"
        raise InputError(f"{root}: expected a checkpoint directory, found nothing there; {advice}")
    if not root.is_dir():
        raise InputError(f"{root}: expected a checkpoint directory, found a file; give its directory")

    notes: list[str] = []
    # macOS leaves a `._name` beside each file that it copies; no shard's name begins with a dot.
    found = sorted(f for f in root.glob("*.safetensors") if not f.name.startswith(".") and not is_adapter(f))
    indexes = sorted(root.glob("*.safetensors.index.json"))
    if indexes:
        tensors, shards = _read_indexed(root, _index_of(root, indexes, notes), sizes, notes)
        if extra := [f.name for f in found if f not in shards]:
            notes.append(f"files that the index does not name are left out: {', '.join(extra)}")
    elif found:
        shards = _shards_without_index(root, found, notes)
        tensors = _read_shards(shards, sizes)
    else:
        raise _no_weights(root)
    if not tensors:
        raise InputError(f"{root}: expected tensors, found {len(shards)} empty files")

    config_file = root / "config.json"
    config = _read_config(config_file) if config_file.is_file() else {}
    if not config:
        notes.append("no config.json: the architecture is unknown")
    own: dict[Path, Callable[[dict[str, Any]], dict[str, Any]]] = {
        root / DESCRIPTION: lambda file: {"quant_method": METHOD_OF_DESCRIPTION, **file},
        root / MODELOPT: modelopt_config,
    }
    for file, as_config in own.items():
        if file.is_file() and quantization_of(config):
            notes.append(f"{file.name} is left out: config.json has a quantization_config")
        elif file.is_file():
            config["quantization_config"] = as_config(read_json(file))
    skip = {*found, *shards, *indexes, config_file, root / MANIFEST, *own}
    others = others_below(root, skip, notes)
    return Checkpoint(root, tensors, tuple(shards), config, others, tuple(notes))
