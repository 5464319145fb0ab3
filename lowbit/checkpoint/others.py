"""A checkpoint's other files (tokenizer, code, …): which are carried along, and which are copies of the weights."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from lowbit.errors import InputError

# Other copies of the weights (and pickles): not carried along.
WEIGHT_SUFFIXES = {
    ".bin", ".pt", ".pth", ".ckpt", ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".tflite",
}  # fmt: skip
# model.onnx_data, model.onnx_data_1, model.onnx.data
_BESIDE_ONNX = re.compile(r".*\.onnx[._]data(_\d+)?")


def others_below(root: Path, skip: Collection[Path], notes: list[str]) -> tuple[Path, ...]:
    """Files below `root` that are carried along, relative to it: all but those to `skip` and other weights, which
    `notes` are told of."""
    others: list[Path] = []
    modules = _sentence_modules(root)
    for file in _files_below(root, notes):
        if file in skip:
            continue
        other = file.relative_to(root)
        suffix = Path(file.name.removesuffix(".index.json")).suffix
        weights = suffix in WEIGHT_SUFFIXES or _BESIDE_ONNX.fullmatch(file.name)
        if weights and modules.isdisjoint(map(str, other.parents)) and not is_adapter(file):
            notes.append(f"other weights are left out: {other}")
        else:
            others.append(other)
    return tuple(others)


def _sentence_modules(root: Path) -> set[str]:
    """Folders with modules of a sentence-transformers model: their weights are no copies of those in `root`."""
    try:
        modules = json.loads((root / "modules.json").read_text("utf-8"))
        return {m["path"] for m in modules} - {"", "."}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return set()


def is_adapter(file: Path) -> bool:
    """Whether a file holds low-rank adapters as peft saves them, which are loaded beside the weights.

    Phi-4-multimodal and Granite Speech see and hear with theirs.
    """
    return file.name == "adapter_model.safetensors" and file.with_name("adapter_config.json").is_file()


def entries(directory: Path) -> list[Path]:
    """What is in a directory, sorted; InputError where it cannot be read."""
    try:
        return sorted(directory.iterdir())
    except OSError as error:
        raise InputError(
            f"{directory}: cannot be read ({error.strerror}); check the path and permissions"
        ) from error


def _files_below(root: Path, notes: list[str]) -> Iterable[Path]:
    """Files below `root`. Hidden directories (.git, .cache) and linked ones are not entered;
    linked files are followed, since a hub's cache is made of them."""
    for entry in entries(root):
        if entry.name.startswith(".") and entry.is_dir():
            continue
        if entry.is_file():
            yield entry
        elif entry.is_symlink():
            what = "a directory" if entry.is_dir() else "what is not there"
            notes.append(f"a link to {what} is left out: {entry}")
        elif entry.is_dir():
            yield from _files_below(entry, notes)
