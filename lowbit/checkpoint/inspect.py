"""What a checkpoint is, from its headers alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from lowbit.checkpoint.beside import BESIDE_CODES
from lowbit.checkpoint.fused_experts import SplitExperts, is_beside_fused, is_fused, split, why_fused
from lowbit.checkpoint.headers import ITEM_BYTES, Checkpoint
from lowbit.checkpoint.hub import open_source
from lowbit.checkpoint.planner import module_of
from lowbit.checkpoint.roles import role_of
from lowbit.errors import InputError
from lowbit.formats import StoredModule, quantization_of, read

_OF_CACHE = ("k_scale", "v_scale", "kv_cache_scale", "kv_cache_offset")
_NO_PARAMETERS = tuple(f".{name}" for name in (*BESIDE_CODES, *_OF_CACHE))


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The answer of `lowbit inspect`; `to_dict` is its `--json`."""

    path: str
    architecture: str
    model_type: str
    tensors: int
    parameters: int
    """Weights and the like, each counted once; scales and zero points are not parameters."""
    nbytes: int
    shards: int
    dtypes: Mapping[str, Mapping[str, int]]
    """dtype → {tensors, elements, bytes}."""
    roles: Mapping[str, Mapping[str, int]]
    """role → {modules, parameters}."""
    quantization: str
    """In words, "" for a checkpoint in float."""
    quantized_modules: int
    layers: int
    experts: int
    """Routed experts per layer, 0 for a dense model."""
    tied_embeddings: bool
    odd: tuple[str, ...]
    """What a careful reader would want to know."""
    other_files: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect_checkpoint(path: str | Path) -> Inspection:
    """Read the headers below `path` and say what is there. InputError when they do not fit together."""
    source = open_source(path)
    experts = split(source)
    stored, unread = _stored(experts.checkpoint)
    text = source.config.get("text_config") or {}
    scales = {n for m in stored.values() for c, n in m.names.items() if c not in ("codes", "packed")}

    dtypes: dict[str, Counter[str]] = {}
    roles: dict[str, Counter[str]] = {}
    parameters = 0
    for ref in source.tensors.values():
        dtypes.setdefault(ref.dtype, Counter()).update(tensors=1, elements=ref.elements, bytes=ref.nbytes)
    for ref in experts.checkpoint.tensors.values():
        if ref.name in scales or ref.name.endswith(_NO_PARAMETERS):
            continue
        module = module_of(ref, stored)
        shape = tuple(stored[module].shape) if module in stored else ref.shape
        count = prod(shape) if module in stored else ref.elements
        parameters += count
        role = role_of(module, shape, source.config)[0] if module is not None else "other"
        if module is None and ref.name.endswith(".bias"):
            role = "bias"
        roles.setdefault(role, Counter()).update(modules=1, parameters=count)

    numbers = [int(m[1]) for n in source.tensors if (m := re.search(r"\blayers?\.(\d+)\.", n))]
    indices = [int(m[1]) for n in source.tensors if (m := re.search(r"\.experts\.(\d+)\.", n))]
    return Inspection(
        path=source.name,
        architecture=", ".join(map(str, source.config.get("architectures") or [])) or "unknown",
        model_type=str(source.config.get("model_type", "unknown")),
        tensors=len(source.tensors),
        parameters=parameters,
        nbytes=source.nbytes,
        shards=len(source.shards),
        dtypes={k: dict(v) for k, v in sorted(dtypes.items())},
        roles={k: dict(v) for k, v in sorted(roles.items(), key=lambda kv: -kv[1]["parameters"])},
        quantization=_quantization(source, stored),
        quantized_modules=len(stored),
        layers=max(numbers) + 1 if numbers else 0,
        experts=max(indices) + 1 if indices else _fused_experts(source),
        tied_embeddings=bool(source.config.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        odd=(*source.notes, *unread, *_odd(source, experts, stored)),
        other_files=tuple(str(f) for f in source.others),
    )


def _stored(source: Checkpoint) -> tuple[dict[str, StoredModule], list[str]]:
    """The quantized modules; a quantization that cannot be converted is still worth describing."""
    try:
        return read(source.config, source.tensors), []
    except InputError as error:
        return {}, [f"cannot be converted: {error}"]


def _quantization(source: Checkpoint, stored: Mapping[str, StoredModule]) -> str:
    method = str(quantization_of(source.config).get("quant_method", "not declared in config.json"))
    if not stored:
        return method if quantization_of(source.config) else ""
    schemes = Counter(f"{m.scheme.name} ({m.spec})" for m in stored.values())
    return f"{method}: " + "; ".join(f"{count} × {name}" for name, count in schemes.most_common())


def _fused_experts(source: Checkpoint) -> int:
    return max((t.shape[0] for t in source.tensors.values() if is_fused(t) and len(t.shape) == 3), default=0)


def _odd(source: Checkpoint, experts: SplitExperts, stored: Mapping[str, StoredModule]) -> list[str]:
    """Things that go wrong in conversions elsewhere."""
    found = []
    tensors, split_up = source.tensors, experts.checkpoint.tensors
    apart = [m for m, s in stored.items() if split_up[s.weight].file != split_up[s.scale].file]
    if apart:
        found.append(f"{len(apart)} weights have their scale in another shard (first: {apart[0]})")
    scales = {n for s in stored.values() for n in s.names.values()}
    shapes = {m: s.shape for m, s in stored.items() if s.stacked}
    shapes |= {
        n: t.shape for n, t in tensors.items() if is_fused(t) and not (n in scales or is_beside_fused(n))
    }
    if fused := list(shapes):
        found.append(f"{len(fused)} tensors hold all experts of a layer, fused (first: {fused[0]})")
    if unknown := [n for n in fused if n in split_up or n in stored]:
        module = unknown[0].removesuffix(".weight")
        why = experts.whole.get(module) or why_fused(module, shapes[unknown[0]])
        what = "can only be dequantized" if module in stored else "cannot be quantized"
        found.append(f"{len(unknown)} of them {what} (first: {unknown[0]}: {why})")
    layers = source.config.get("num_hidden_layers")
    beyond = [
        n for n in tensors
        if (m := re.match(r"(?:model\.)?layers\.(\d+)\.", n)) and isinstance(layers, int) and int(m[1]) >= layers
    ]  # fmt: skip
    if beyond:
        found.append(
            f"{len(beyond)} tensors lie beyond layer {layers}: multi-token prediction (first: {beyond[0]})"
        )
    floats = Counter(t.dtype for t in tensors.values() if t.dtype in ("BF16", "F16", "F32", "F64"))
    wide = [n for n, t in split_up.items() if t.dtype in ("F32", "F64") and n not in scales]
    if wide and floats.most_common(1)[0][0] in ("BF16", "F16"):
        found.append(
            f"{len(wide)} tensors are wider than the rest of the model (first: {wide[0]}, {split_up[wide[0]].dtype})"
        )
    if empty := [n for n, t in tensors.items() if t.elements == 0]:
        found.append(f"{len(empty)} tensors are empty (first: {empty[0]})")
    if unaligned := [t.name for t in tensors.values() if t.offset % ITEM_BYTES[t.dtype]]:
        found.append(f"{len(unaligned)} tensors are not aligned to their dtype (first: {unaligned[0]})")
    return found
