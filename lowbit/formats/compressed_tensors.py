"""compressed-tensors (`quant_method: compressed-tensors`): the primary output.

Source: the compressed-tensors library, 0.20. Its config classes forbid unknown keys, so the
minimum is written: newer keys break older engines.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from lowbit.dtypes import E2M1, E4M3FN, INT4, INT8
from lowbit.errors import InputError
from lowbit.formats.asked import unnamed
from lowbit.formats.format import (
    ConfigOnly,
    Content,
    Info,
    Joined,
    Layout,
    Stored,
    StoredModule,
    check_scale,
    missing_scale,
    quantization_of,
)
from lowbit.formats.fp4 import MXFP4, NVFP4, read_fp4
from lowbit.formats.hf_fp8 import block_problem
from lowbit.formats.joined import first_experts, with_joined
from lowbit.formats.name_patterns import alike, name_patterns, wherever
from lowbit.granularity import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, PerToken, scale_shape
from lowbit.scheme import SCHEMES, Scheme, TensorSpec


class CompressedTensors(ConfigOnly):
    """Holds every scheme that is quantized at all."""

    name = quant_method = "compressed-tensors"

    def holds(self, scheme: Scheme) -> bool:
        return scheme.weights is not None and scheme.weights.dtype in (INT8, E4M3FN, INT4)

    def refuse(self, scheme: Scheme, shape: tuple[int, ...], joined: Joined) -> str:
        assert scheme.weights is not None
        granularity = scheme.weights.granularity
        if isinstance(granularity, PerGroup) and shape[-1] % granularity.size:
            return f"K = {shape[-1]} is not a multiple of {granularity.size}"
        if format_of(scheme) == "pack-quantized" and shape[-1] % _per_int32(scheme):
            return f"K = {shape[-1]} is not a multiple of {_per_int32(scheme)}, the codes in an int32"
        if joined == "experts" and scheme.weights.dtype is INT8 and scheme.needs_calibration:
            return "vLLM and SGLang run INT8 experts with dynamic activations only"
        return block_problem(scheme, shape, joined)

    def tensors(
        self, scheme: Scheme, shape: tuple[int, int], float_dtype: str = "BF16"
    ) -> tuple[Stored, ...]:
        spec = scheme.weights
        assert spec is not None
        scales = scale_shape(shape, spec.granularity)
        scale_dtype = "U8" if spec.scale == "e8m0" else "F32"
        scale = Stored(suffix=".weight_scale", dtype=scale_dtype, shape=scales, content="scale")
        if format_of(scheme) == "pack-quantized":
            packed = (shape[0], -(-shape[1] // _per_int32(scheme)))
            return (
                Stored(suffix=".weight_packed", dtype="I32", shape=packed, content="packed"),
                scale,
                Stored(suffix=".weight_shape", dtype="I64", shape=(2,), content="shape"),
            )
        found = [Stored(suffix=".weight", dtype=spec.dtype.safetensors, shape=shape, content="codes"), scale]
        if scheme.needs_calibration:
            found.append(Stored(suffix=".input_scale", dtype="F32", shape=(1,), content="input_scale"))
            if scheme.activations and not scheme.activations.symmetric:
                found.append(
                    Stored(suffix=".input_zero_point", dtype="I8", shape=(1,), content="input_zero_point")
                )
        return tuple(found)

    def config(self, layout: Layout) -> dict[str, Any]:
        named = partial(with_joined, config=layout.config)
        ignored, quantized = named(layout.ignored), named(alike(layout.modules))
        groups: dict[Scheme, list[str]] = {}
        for module, scheme in layout.modules.items():
            groups.setdefault(scheme, []).append(module)
        # Mostly the largest first; but SGLang looks for the size of blocks there alone.
        ranked = sorted(groups, key=lambda s: (not _in_blocks(s), -len(groups[s])))
        formats = list(dict.fromkeys(format_of(s) for s in ranked))
        body: dict[str, Any] = {}
        for i, scheme in enumerate(ranked):
            # The first group is the default; the others name their modules, and names win over classes.
            if i == 0:
                targets = ["Linear"]
            else:
                # What is ignored is so whatever else takes it in: a tower has layers of its own.
                outside = [m for m, other in layout.modules.items() if other != scheme]
                targets = name_patterns(named(groups[scheme]), named(outside))
            body[f"group_{i}"] = {
                "targets": targets,
                "format": format_of(scheme),
                "weights": _args(scheme.weights),
                "input_activations": _args(scheme.activations),
                "output_activations": None,
            }
        return {
            "quant_method": "compressed-tensors",
            "format": formats[0] if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": _kv_cache(layout),
            "ignore": [
                *ignored,
                *first_experts(ignored),
                *wherever(ignored, quantized),
                *(["re:^$"] if unnamed(ignored) else []),
            ],
            "config_groups": body,
        }

    def read(self, config: Mapping[str, Any], tensors: Mapping[str, Info]) -> dict[str, StoredModule]:
        sparsity = (config.get("sparsity_config") or {}).get("format")
        for found_format in (sparsity, config.get("format")):
            if str(found_format).startswith(("sparse", "marlin")):
                raise InputError(
                    f"quantization_config: expected weights with all of their columns, found {found_format}; "
                    "decompress the checkpoint with compressed-tensors first, or start from the model in float"
                )
        _require_plain_inputs(config)
        groups = [
            (g.get("targets") or [], _scheme_of(g)) for g in (config.get("config_groups") or {}).values()
        ]
        if not groups and not config.get("kv_cache_scheme"):  # which may be all that is quantized
            raise InputError(
                "quantization_config: expected config_groups, found none; the config is incomplete"
            )
        found: dict[str, StoredModule] = {}
        for name, info in tensors.items():
            module, _, kind = name.rpartition(".")
            if kind == "weight_packed" and info.dtype == "U8":
                found[module] = self._fp4(name, module, groups, tensors)
                continue
            if kind == "weight_packed":
                if info.dtype != "I32" or len(info.shape) != 2:
                    raise InputError(
                        f"{name}: expected packed codes as I32 [N, K / codes in an int32], found {info.dtype} "
                        f"{list(info.shape)}, which cannot be read; start from the model in float"
                    )
                contents: dict[Content, str] = {"packed": name, "shape": module + ".weight_shape"}
            elif kind == "weight" and info.dtype in ("I8", "F8_E4M3") and len(info.shape) == 2:
                contents = {"codes": name}
            else:
                continue
            scale = module + ".weight_scale"
            if scale not in tensors:
                raise missing_scale(name, scale, info.dtype)
            _require_symmetric(module, tensors)
            contents["scale"] = scale
            for extra in ("input_scale", "input_zero_point"):
                if f"{module}.{extra}" in tensors:
                    contents[extra] = f"{module}.{extra}"  # type: ignore[index]
            scheme = _group_for(module, groups)
            assert scheme.weights is not None
            if scheme.weights.dtype is INT4 and kind == "weight":
                raise InputError(f"{name}: expected INT4 codes as {module}.weight_packed, found {info.dtype}")
            if scheme.weights.dtype is E2M1:
                raise InputError(
                    f"{name}: expected FP4 codes as {module}.weight_packed in U8, as config.json says, found "
                    f"{info.dtype}; config.json and weights do not belong together"
                )
            if kind == "weight" and info.dtype != scheme.weights.dtype.safetensors:
                raise InputError(
                    f"{name}: expected {scheme.weights.dtype.safetensors} codes, as config.json says, found "
                    f"{info.dtype}; config.json and weights do not belong together"
                )
            shape = (info.shape[0], info.shape[1] * (_per_int32(scheme) if kind == "weight_packed" else 1))
            check_scale(module, scale, tuple(tensors[scale].shape), shape, scheme.weights)
            found[module] = StoredModule(shape=shape, scheme=scheme, names=contents, format=self.name)
        return found

    def _fp4(
        self, name: str, module: str, groups: list[tuple[list[str], Scheme]], tensors: Mapping[str, Info]
    ) -> StoredModule:
        scheme = _group_for(module, groups)
        assert scheme.weights is not None
        if scheme.weights.dtype is not E2M1:
            raise InputError(
                f"{name}: expected packed codes as I32 for {scheme.name}, as config.json says, found U8, which is FP4; "
                "config.json and weights do not belong together"
            )
        _require_symmetric(module, tensors)
        whole: dict[Content, str] = {"global_divisor": f"{module}.weight_global_scale"}
        return read_fp4(name, scheme, tensors, format=self.name, whole=whole)


def _require_plain_inputs(config: Mapping[str, Any]) -> None:
    """InputError where engines transform activations while running (QuIP, SpinQuant), for which the weights are."""
    for scheme in ((config.get("transform_config") or {}).get("config_groups") or {}).values():
        for apply in scheme.get("apply") or []:
            if apply.get("location") not in ("weight_input", "weight_output"):  # those are in the weights
                raise InputError(
                    "quantization_config: expected weights for inputs as they are, found a transform_config that "
                    f"transforms activations while running ({scheme.get('type')}, location={apply.get('location')}), "
                    "which nothing written here would; start from the model in float"
                )


def _require_symmetric(module: str, tensors: Mapping[str, Info]) -> None:
    """InputError where a weight has zero points, or its columns are not in their order."""
    for extra in ("weight_zero_point", "weight_g_idx"):
        if f"{module}.{extra}" in tensors:
            raise InputError(
                f"{module}.{extra}: expected symmetric weights in the order of their columns, found a zero "
                "point or a column order, which are not read; dequantize with compressed-tensors first"
            )


def _kv_cache(layout: Layout) -> dict[str, Any] | None:
    """Of a calibration, else of the source where its scales of keys and values are carried along."""
    found = kv_cache_scheme(layout.config)
    carried = any(name.endswith((".k_scale", ".v_scale")) for name in layout.tensors)
    if found and carried and layout.kv_cache is None:
        return found
    if layout.kv_cache is not None and isinstance(layout.kv_cache.granularity, PerGroup):
        raise InputError(
            "compressed-tensors: expected scales of keys and values for each layer or head, found those of channels in "
            "the calibration; calibrate with --kv-cache fp8, or convert with --format ascend"
        )
    args = _args(layout.kv_cache)
    if args is not None and args["strategy"] == "channel":
        args["strategy"] = "attn_head"
    return args


_STATIC_FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}


def kv_cache_scheme(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """All of the `kv_cache_scheme` of a model's config.json; None where it has none, or one of less than 8 bits.

    AutoFP8 says `static` and ModelOpt `FP8` or part of it, and mean FP8 per tensor; vLLM refuses one that does not say
    all.
    """
    found = _kv_cache_said(config)
    if isinstance(found, str) and found.lower() not in ("static", "fp8"):
        return None
    args = _STATIC_FP8 | (found if isinstance(found, dict) else {})
    return args if found and args["num_bits"] == 8 else None


def other_kv_cache(config: Mapping[str, Any]) -> bool:
    """Whether a model's config.json asks for a KV cache of less than 8 bits, whose scales mean nothing in one of 8."""
    return bool(_kv_cache_said(config)) and kv_cache_scheme(config) is None


def _kv_cache_said(config: Mapping[str, Any]) -> Any:
    said = quantization_of(config)
    return said.get("kv_cache_scheme") or said.get("kv_cache_quant_algo")


def format_of(scheme: Scheme) -> str:
    """The library's name of the compressor that holds a scheme."""
    spec = scheme.weights
    assert spec is not None
    if spec.scale == "e8m0":
        return "mxfp8-quantized"
    if spec.dtype.kind == "int":
        return "int-quantized" if scheme.activations else "pack-quantized"
    return "float-quantized"


def _per_int32(scheme: Scheme) -> int:
    """How many codes of a packed weight are in one int32."""
    assert scheme.weights is not None
    return 32 // scheme.weights.dtype.bits


_STRATEGIES = {
    PerTensor: "tensor",
    PerChannel: "channel",
    PerToken: "token",
    PerGroup: "group",
    PerBlock: "block",
}


def _in_blocks(scheme: Scheme) -> bool:
    return scheme.weights is not None and isinstance(scheme.weights.granularity, PerBlock)


def _args(spec: TensorSpec | None) -> dict[str, Any] | None:
    """`QuantizationArgs` with the keys that every version knows."""
    if spec is None:
        return None
    granularity = spec.granularity
    args: dict[str, Any] = {
        "num_bits": spec.dtype.bits,
        "type": spec.dtype.kind,
        "symmetric": spec.symmetric,
        "strategy": _STRATEGIES[type(granularity)],
        "group_size": granularity.size if isinstance(granularity, PerGroup) else None,
        "dynamic": spec.dynamic,
    }
    if isinstance(granularity, PerBlock):
        args["block_structure"] = [granularity.rows, granularity.cols]
    if spec.scale == "e8m0":
        args["scale_dtype"] = "torch.uint8"
    return args


_EXPONENTS = ("torch.uint8", "torch.float8_e8m0fnu")


def _spec_of(args: Mapping[str, Any] | None) -> TensorSpec | None:
    if args is None:
        return None
    bits, kind = args.get("num_bits", 8), args.get("type", "int")
    dtype = {(8, "int"): INT8, (4, "int"): INT4, (8, "float"): E4M3FN}.get((bits, kind))
    if dtype is None:
        raise InputError(
            f"quantization_config: expected FP4, INT8, FP8 or INT4 codes, found type={kind}, num_bits={bits}; other "
            "compressed-tensors checkpoints cannot be read"
        )
    granularity: Granularity
    strategy = args.get("strategy") or ("group" if args.get("group_size") else "tensor")
    match strategy:
        case "tensor":
            granularity = PerTensor()
        case "channel":
            granularity = PerChannel()
        case "token":
            granularity = PerToken()
        case "group":
            size = args.get("group_size")
            granularity = PerGroup(size) if isinstance(size, int) and size > 0 else PerChannel()
        case "block":
            block = args.get("block_structure") or (128, 128)
            rows, cols = (
                block.split("x") if isinstance(block, str) else block
            )  # older versions wrote "128x128"
            granularity = PerBlock(int(rows), int(cols))
        case _:
            raise InputError(f"quantization_config: expected a known strategy, found {strategy!r}")
    return TensorSpec(
        dtype=dtype,
        granularity=granularity,
        symmetric=bool(args.get("symmetric", True)),
        dynamic=bool(args.get("dynamic", False)),
        scale="e8m0" if str(args.get("scale_dtype")) in _EXPONENTS else "float32",
    )


def _scheme_of(group: Mapping[str, Any]) -> Scheme:
    args = group.get("weights") or {}
    if (args.get("num_bits"), args.get("type")) == (4, "float"):
        # The library takes them apart by this, too.
        by_group = {16: NVFP4, 32: MXFP4}
        if args.get("group_size") not in by_group:
            raise InputError(
                "quantization_config: expected FP4 in groups of 16 (NVFP4) or 32 (MXFP4), found type=float, "
                f"num_bits=4, group_size={args.get('group_size')}; such a checkpoint cannot be read"
            )
        return by_group[args["group_size"]]
    weights, activations = _spec_of(group.get("weights")), _spec_of(group.get("input_activations"))
    if weights is None:
        raise InputError("quantization_config: expected weights in every config group, found a group without")
    for preset in SCHEMES.values():
        if (preset.weights, preset.activations) == (weights, activations):
            return preset
    name = {INT8: "int8", INT4: "int4", E4M3FN: "fp8"}[weights.dtype]
    if activations is None:
        base = SCHEMES.get(f"{name}-weight-only") or Scheme(name=f"{name}-weight-only", weights=weights)
        return replace(base, weights=weights)
    if INT4 in (weights.dtype, activations.dtype):
        raise InputError(
            "quantization_config: expected INT4 weights with activations in float, found both quantized; such a "
            "checkpoint cannot be read"
        )
    if not activations.dynamic:
        name += "-static"
    return Scheme(name=name, weights=weights, activations=activations)


def _group_for(module: str, groups: list[tuple[list[str], Scheme]]) -> Scheme:
    """The library's order: exact names, then regular expressions, then class names."""
    for targets, scheme in groups:
        if module in targets:
            return scheme
    for targets, scheme in groups:
        if any(t.startswith("re:") and re.match(t[3:], module) for t in targets):
            return scheme
    for targets, scheme in groups:
        # Class names begin with a capital; `lm_head` has no dot either, and is a module.
        if any(t[:1].isupper() for t in targets):
            return scheme
    raise InputError(f"{module}: expected a config group that targets it, found none in quantization_config")
