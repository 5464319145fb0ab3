"""Open a checkpoint directory: which files belong to it, and whether they fit together."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lowbit.checkpoint.headers import INDEX, MANIFEST, PARTIAL, Checkpoint, TensorRef, read_header, read_json
from lowbit.checkpoint.others import entries, is_adapter, others_below
from lowbit.errors import InputError
from lowbit.formats import DESCRIPTION, METHOD_OF_DESCRIPTION, MODELOPT, modelopt_config, quantization_of


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


def repository_named(path: str | Path) -> tuple[str, str | None] | None:
    """(`org/name`, revision) where `path` names a repository and nothing here; None where it is a path."""
    text = str(path)
    explicit = re.match(r"hf:/{1,2}", text)  # pathlib makes one slash of two
    text = text[explicit.end() :] if explicit else text
    match = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w][\w./-]*))?", text)
    if match is None or (not explicit and (Path(path).exists() or Path(text.split("/")[0]).exists())):
        return None
    return match[1], match[2]


def open_checkpoint(path: str | Path, sizes: Mapping[Path, int] = MappingProxyType({})) -> Checkpoint:
    """Read the headers of a checkpoint directory.

    `sizes`: bytes of files whose data is not here, but elsewhere (see `hub`).

    Uses the index when there is one, else every `*.safetensors` in the directory. Raises
    InputError on anything that does not fit together; pickle files are refused.
    """
    root = Path(path)
    if not root.exists():
        advice = "check the path"
        if named := repository_named(path):
            advice += f", or download it first: hf download {named[0]} --local-dir DIRECTORY"
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
