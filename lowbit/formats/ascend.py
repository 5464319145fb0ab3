"""Huawei's msModelSlim format (`--quantization ascend` in vLLM-Ascend): a file describes every tensor.

Source: msModelSlim's `ascend_v1` saver, and vLLM-Ascend's `quantization/modelslim_config.py` with the
methods that it registers. `quant_model_description.json` maps the name of each tensor to a type, and
config.json has no `quantization_config`. The engine takes every `*.safetensors` of the directory, so
shards have their usual names and transformers finds them too.

A checkpoint's description is read as its `quantization_config` (with a `quant_method` put in), which
is also how the engine takes one that stands in config.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from lowbit.dtypes import INT8
from lowbit.errors import InputError
from lowbit.formats.format import (
    Content,
    Info,
    Joined,
    Layout,
    Stored,
    StoredModule,
    check_scale,
    quantization_of,
)
from lowbit.formats.joined import EXPERT
from lowbit.granularity import PerChannel, PerGroup, scale_shape
from lowbit.scheme import Scheme, get_scheme

DESCRIPTION = "quant_model_description.json"
QUANT_METHOD = "ascend"

_WEIGHT_ONLY = get_scheme("int8-weight-only")
assert _WEIGHT_ONLY.weights is not None
# What a checkpoint's type is read as. That of W8A8 has an offset, which may be 0.
_SCHEMES = {
    "W8A16": replace(_WEIGHT_ONLY, weights=replace(_WEIGHT_ONLY.weights, granularity=PerChannel())),
    "W8A8_DYNAMIC": get_scheme("int8"),
    "W8A8": get_scheme("int8-static-asym"),
    "W8A8_MXFP8": get_scheme("mxfp8"),
}
# Static while decoding and dynamic before, so that it has the scales of both: read as dynamic.
_READ_AS = {"W8A8_MIX": "W8A8_DYNAMIC"}
_RANKS = list(_SCHEMES)
"""The type of a model of several types is that of the highest rank."""
_FLOAT = "FLOAT"

_SUFFIXES: dict[Content, str] = {
    "codes": ".weight",
    "scale": ".weight_scale",
    "offset": ".weight_offset",
    "input_scale": ".input_scale",
    "input_zero_point": ".input_offset",
    "deq_scale": ".deq_scale",
    "quant_bias": ".quant_bias",
}
_CONTENTS: dict[str, tuple[Content, ...]] = {
    "W8A16": ("codes", "scale", "offset"),
    "W8A8_DYNAMIC": ("codes", "scale", "offset"),
    "W8A8": ("codes", "quant_bias", "input_scale", "input_zero_point", "deq_scale"),
    "W8A8_MXFP8": ("codes", "scale"),
}
# A KV cache of INT8: scales and zero points [heads · D] of keys, after the rotary embedding, and values.
_KV_CACHE = "C8"
_OF_KV_CACHE = _KV_SCALE, _KV_OFFSET = "kv_cache_scale", "kv_cache_offset"
# Engines multiply these by hand, or keep them out of quantization by name.
_IN_FLOAT = re.compile(r"(^|.*\.)(kv_b_proj|indexer\.(wq_b|wk|weights_proj))$")
_FUSED_EXPERTS = re.compile(r"(.*\.experts)\.gate_up_proj$")
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.")


class Ascend:
    """INT8 with a scale per channel (dynamic, static or weight-only), and MXFP8."""

    name = "ascend"
    quant_method = QUANT_METHOD

    def holds(self, scheme: Scheme) -> bool:
        return _type_of(scheme) != "" or scheme == _WEIGHT_ONLY

    def instead(self, scheme: Scheme) -> str:
        if scheme.name == "int8-block":
            return "use int8, which has a scale per channel and runs on every Ascend"
        if scheme.weights is not None and scheme.weights.dtype.kind == "float":
            return "use int8, or mxfp8 on chips that multiply FP8"
        return ""

    def refuse(self, scheme: Scheme, shape: tuple[int, ...], joined: Joined) -> str:
        kind = _type_of(scheme)
        if not kind:
            if scheme.weights == _WEIGHT_ONLY.weights:
                return "vLLM-Ascend runs W8A16 with one scale per channel only"
            return f"the ascend format does not hold {scheme.name}"
        if joined == "experts" and kind in ("W8A8", "W8A16"):
            return f"vLLM-Ascend does not run experts as {kind}"
        if kind == "W8A8_MXFP8" and shape[-1] % 64:
            return (
                f"K = {shape[-1]} is not a multiple of 64: the engine takes scales of groups of 32 in pairs"
            )
        return ""

    def left_in_float(self, modules: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
        layers = (config.get("text_config") or config).get("num_hidden_layers")
        found = {}
        for module in modules:
            match = _LAYER.match(module)
            if _IN_FLOAT.match(module):
                found[module] = "vLLM-Ascend uses this weight in float"
            elif match and isinstance(layers, int) and int(match[1]) >= layers:
                found[module] = "multi-token prediction, which vLLM-Ascend runs in float"
        return found

    def tensors(
        self, scheme: Scheme, shape: tuple[int, int], float_dtype: str = "BF16"
    ) -> tuple[Stored, ...]:
        spec = scheme.weights
        assert spec is not None
        rows, scales = shape[0], scale_shape(shape, spec.granularity)
        layouts: dict[Content, tuple[str, tuple[int, ...]]] = {
            "codes": (spec.dtype.safetensors, shape),
            "scale": ("U8" if spec.scale == "e8m0" else "F32", scales),
            "offset": ("F32", scales),
            "input_scale": ("F32", (1,)),
            "input_zero_point": ("F32", (1,)),
            # The engine's product of FP16 models takes the bits of the float32 in an integer.
            "deq_scale": ("I64" if float_dtype == "F16" else "F32", (rows,)),
            "quant_bias": ("I32", (rows,)),
        }
        return tuple(
            Stored(suffix=_SUFFIXES[c], dtype=layouts[c][0], shape=layouts[c][1], content=c)
            for c in _CONTENTS[_type_of(scheme)]
        )

    def kv_cache_names(self, scale: str) -> tuple[str, str | None]:
        attention, _, leaf = scale.rpartition(".")
        below = f"{attention}.{leaf[0]}_proj"
        return f"{below}.{_KV_SCALE}", f"{below}.{_KV_OFFSET}"

    def config(self, layout: Layout) -> dict[str, Any] | None:
        cache = layout.kv_cache
        if cache is not None and (cache.dtype is not INT8 or cache.granularity != PerGroup(1)):
            raise InputError(
                "the ascend format: expected a KV cache of INT8 with a scale for each channel, found scales of another "
                "in the calibration; calibrate with --kv-cache int8-channel, or convert to compressed-tensors"
            )
        return None

    def files(self, layout: Layout) -> dict[str, dict[str, Any]]:
        types = {module: _type_of(scheme) for module, scheme in layout.modules.items()}
        body: dict[str, Any] = {}
        for name in layout.tensors:
            module, _, last = name.rpartition(".")
            kind = types.get(module, _FLOAT)
            mine = {_SUFFIXES[c] for c in _CONTENTS.get(kind, ())}
            body[name] = _KV_CACHE if last in _OF_KV_CACHE else kind if "." + last in mine else _FLOAT
        for module in layout.ignored:
            # A tied head is in no shard, and the engine looks for it.
            if module.endswith("lm_head"):
                body.setdefault(module + ".weight", _FLOAT)
        for module, kind in types.items():
            # The engine knows the experts' names for some architectures; for the others it looks for this one.
            if expert := EXPERT.match(module):
                body.setdefault(expert[1] + ".weight", kind)
        for name in layout.tensors:
            # Where they stay in float in one tensor, it looks for the names of the first expert all the same.
            if fused := _FUSED_EXPERTS.match(name):
                for asked in (".weight", *(f".0.{p}_proj.weight" for p in ("gate", "up", "down"))):
                    body.setdefault(fused[1] + asked, _FLOAT)
        ranked = max(types.values(), key=_RANKS.index)
        body |= {
            "version": "1.0.0",
            "model_quant_type": ranked,
            "metadata": {},
            "group_size": 32 if "W8A8_MXFP8" in types.values() else 0,
            "optional": {},
        }
        if _KV_CACHE in body.values():
            body["kv_cache_type"] = _KV_CACHE
        return {DESCRIPTION: body}

    def read(self, config: Mapping[str, Any], tensors: Mapping[str, Info]) -> dict[str, StoredModule]:
        found: dict[str, StoredModule] = {}
        others: list[str] = []
        for name, info in tensors.items():
            kind = config.get(name)
            if not isinstance(kind, str):
                raise InputError(
                    f"{DESCRIPTION}: expected a type for every tensor, found none for {name}; engines need one too: "
                    "fetch the file again"
                )
            module, _, last = name.rpartition(".")
            if last in _OF_KV_CACHE and config.get("kv_cache_type") == _KV_CACHE:
                continue  # whatever type it names
            if last != "weight" or kind == _FLOAT:
                others.append(name)
            elif (read_as := _READ_AS.get(kind, kind)) in _SCHEMES:
                found[module] = self._module(module, info, read_as, tensors)
            else:
                raise InputError(
                    f"{DESCRIPTION}: expected {', '.join((_FLOAT, *_SCHEMES, *_READ_AS))}, found {kind} for {name}; "
                    "start from the model in float"
                )
        for name in others:
            info, weight_kind = tensors[name], config.get(name.rpartition(".")[0] + ".weight")
            codes = info.dtype in ("I8", "F8_E4M3") and len(info.shape) >= 2
            if codes or config[name] not in (_FLOAT, weight_kind):
                raise InputError(
                    f"{DESCRIPTION}: says {config[name]} for {name}, found {info.dtype} {list(info.shape)} without a "
                    "weight of that type; start from the model in float"
                )
        return found

    def _module(self, module: str, info: Info, kind: str, tensors: Mapping[str, Info]) -> StoredModule:
        scheme = _SCHEMES[kind]
        assert scheme.weights is not None
        if info.dtype != scheme.weights.dtype.safetensors or len(info.shape) != 2:
            raise InputError(
                f"{module}.weight: expected {scheme.weights.dtype.safetensors} [N, K] for {kind}, found {info.dtype} "
                f"{list(info.shape)}; the description and the tensors do not belong together: fetch them again"
            )
        names: dict[Content, str] = {c: module + _SUFFIXES[c] for c in _CONTENTS[kind]}
        for content, name in names.items():
            if name not in tensors:
                raise InputError(
                    f"{module}.weight: expected {name} beside a weight of type {kind}, found none in any shard; "
                    "the checkpoint is incomplete: fetch it again"
                )
            found = tensors[name]
            if content in ("deq_scale", "quant_bias") and (
                tuple(found.shape) != info.shape[:1] or (content == "quant_bias" and found.dtype != "I32")
            ):
                raise InputError(
                    f"{name}: expected one number for each of {info.shape[0]} rows, found {found.dtype} "
                    f"{list(found.shape)}; the checkpoint is incomplete: fetch it again"
                )
            if content == "scale" and isinstance(scheme.weights.granularity, PerChannel | PerGroup):
                check_scale(module, name, tuple(found.shape), _matrix(info), scheme.weights)
        return StoredModule(shape=_matrix(info), scheme=scheme, names=names, format=self.name)


def _matrix(info: Info) -> tuple[int, int]:
    return info.shape[0], info.shape[1]


def _type_of(scheme: Scheme) -> str:
    """The type that the description gives a weight under `scheme`, "" where there is none."""
    specs = (scheme.weights, scheme.activations)
    for kind, other in (*_SCHEMES.items(), ("W8A8", get_scheme("int8-static"))):
        if specs == (other.weights, other.activations):
            return kind
    return ""


def ascend_kv_cache(config: Mapping[str, Any]) -> bool:
    """Whether a model's description asks for a KV cache of INT8 with a scale per channel."""
    found = quantization_of(config)
    return found.get("quant_method") == QUANT_METHOD and found.get("kv_cache_type") == _KV_CACHE


def undescribed(config: Mapping[str, Any], tensors: Mapping[str, Info]) -> list[str]:
    """Names that a description has, but no shard, except those that engines look for where there is no such tensor."""
    fused = tuple(f"{match[1]}.0." for n in tensors if (match := _FUSED_EXPERTS.match(n)))
    return sorted(
        n for n, kind in config.items()
        if isinstance(kind, str) and "." in n and n not in tensors
        and not n.endswith(("lm_head.weight", ".experts.weight")) and not n.startswith(fused)
    )  # fmt: skip
