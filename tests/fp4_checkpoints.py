"""Small seeded checkpoints in FP4, by the real compressed-tensors library or by the documented layout of the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4 import unpack_fp4_from_uint8
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from sample_models import Tensors, fused_mixture, write
from torch import Tensor

Stored = dict[str, Tensor]
"""Suffix of a module → its tensor."""

FP4 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)


def library(preset: str, w: Tensor) -> tuple[Stored, Tensor]:
    """float32 [N, K] → (what compressed-tensors stores under `NVFP4` or `MXFP4`, what it means in float64)."""
    scheme = preset_name_to_scheme(preset, ["Linear"])
    args, name = scheme.weights, f"{preset.lower()}-pack-quantized"
    assert args is not None and args.group_size is not None
    groups = w.reshape(w.shape[0], -1, args.group_size)
    whole = generate_gparam(w.min(), w.max()) if preset == "NVFP4" else None
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args, whole)
    state = {"weight": w, "weight_scale": scale} | ({} if whole is None else {"weight_global_scale": whole})
    compressor = BaseCompressor.get_value_from_registry(name)
    stored = compressor.compress(state, scheme)
    codes = unpack_fp4_from_uint8(stored["weight_packed"], *w.shape, dtype=torch.float64)
    scales = compressor._decompress_scale(stored["weight_scale"], torch.float64)
    number = None if whole is None else whole.double()
    means = dequantize(codes, scales, args=args, dtype=torch.float64, global_scale=number)
    if whole is not None:
        stored["input_global_scale"] = torch.tensor([0.5])
    return stored, means


def by_hand(kind: str, w: Tensor) -> tuple[Stored, Tensor]:
    """float32 [N, K] → (what ModelOpt and Quark store as `nvfp4` or `mxfp4`, what it means in float64)."""
    group = 16 if kind == "nvfp4" else 32
    x = w.double().numpy().reshape(w.shape[0], -1, group)
    peak = np.abs(x).max(-1)
    if kind == "nvfp4":
        whole = np.float32(peak.max() / (6 * 448))
        scale = (peak / 6 / np.float64(whole)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        factor = E4M3[scale] * np.float64(whole)
    else:
        scale = (np.floor(np.log2(peak)) - 2 + 127).astype(np.uint8)
        factor = np.exp2(scale.astype(np.float64) - 127)
    codes = (x / factor[..., None]).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    # code · scale first, which is exact in float64, and then the number for all: one rounding in float32.
    exact = FP4[codes] * factor[..., None]
    halves = codes.reshape(*w.shape)
    stored: Stored = {"weight": torch.from_numpy(halves[:, ::2] | halves[:, 1::2] << 4)}
    if kind == "nvfp4":
        stored["weight_scale"] = torch.from_numpy(scale).view(torch.float8_e4m3fn)
        stored |= {"weight_scale_2": torch.tensor(whole), "input_scale": torch.tensor(0.25)}
    else:
        stored["weight_scale"] = torch.from_numpy(scale)
    return stored, torch.from_numpy(exact.reshape(*w.shape))


def config_of_library(*presets: str, **said: Any) -> dict[str, Any]:
    groups = {
        f"group_{i}": preset_name_to_scheme(p, ["Linear"]).model_dump(mode="json")
        for i, p in enumerate(presets)
    }
    name = f"{presets[0].lower()}-pack-quantized"
    return {
        "quant_method": "compressed-tensors", "format": name, "quantization_status": "compressed",
        "kv_cache_scheme": None, "global_compression_ratio": None, "ignore": ["lm_head"], "config_groups": groups,
        **said,
    }  # fmt: skip


_MXFP4 = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0", "ch_axis": -1}
_NVFP4 = [
    {"dtype": "fp4", "qscheme": "per_group", "group_size": 16, "ch_axis": -1},
    {"dtype": "fp8_e4m3", "qscheme": "per_tensor"},
]
_QUARK = {
    "quant_method": "quark", "exclude": ["lm_head"], "layer_quant_config": {}, "layer_type_quant_config": {},
    "export": {"kv_cache_group": [], "pack_method": "reorder", "weight_format": "real_quantized"},
}  # fmt: skip

KINDS: dict[str, tuple[Callable[[Tensor], tuple[Stored, Tensor]], dict[str, Any]]] = {
    "nvfp4 library": (lambda w: library("NVFP4", w), config_of_library("NVFP4")),
    "mxfp4 library": (lambda w: library("MXFP4", w), config_of_library("MXFP4")),
    "nvfp4 modelopt": (
        lambda w: by_hand("nvfp4", w),
        {
            "quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"], "producer": {"name": "modelopt"},
            "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}}},
        },
    ),
    "mxfp4 modelopt": (
        lambda w: by_hand("mxfp4", w), {"quant_method": "modelopt", "quant_algo": "W4A8_MXFP4_FP8", "group_size": 32},
    ),
    "nvfp4 quark": (
        lambda w: by_hand("nvfp4", w), {**_QUARK, "global_quant_config": {"weight": _NVFP4, "input_tensors": _NVFP4}},
    ),
    "mxfp4 quark": (
        lambda w: by_hand("mxfp4", w), {**_QUARK, "global_quant_config": {"weight": _MXFP4, "input_tensors": _MXFP4}},
    ),
}  # fmt: skip
"""How a weight is stored, and the `quantization_config`."""


def published(
    root: Path, kind: str, model: tuple[Tensors, dict[str, Any]], *, only: str = "", extra: Tensors | None = None,
    said: dict[str, Any] | None = None, files: dict[str, str] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """`model` with all that ends in `_proj`, and has `only` in its name, in FP4, written below `root` with `extra` in
    it; module → what it means, in float32, rounded once. `said`: in place of the kind's `quantization_config`."""
    store, quantization = KINDS[kind]
    tensors, config = dict(model[0]), model[1]
    meant: dict[str, Tensor] = {}
    for name in [n for n in tensors if n.endswith("_proj.weight") and only in n]:
        module = name.removesuffix(".weight")
        stored, means = store(tensors.pop(name).float())
        tensors |= {f"{module}.{suffix}": t for suffix, t in stored.items()}
        meant[module] = means.float()
    said = quantization if said is None else said
    write(
        root,
        tensors | (extra or {}),
        {**config, **({"quantization_config": said} if said else {})},
        files=files,
    )
    return meant


GPT_OSS = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 16,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip


def gpt_oss(root: Path, exponents: tuple[int, int] = (-10, -4), **sizes: Any) -> Tensors:
    """gpt-oss as published, written below `root`: every code, and scales of 2 to the power of `exponents`."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(**{**GPT_OSS, **sizes})
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in GptOssForCausalLM(config).state_dict().items()}
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, shape in shapes.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, cols, rows = shape
            groups = (experts, rows, cols // 32)
            tensors[f"{name}_blocks"] = torch.randint(
                256, (*groups, 16), generator=generator, dtype=torch.uint8
            )
            low, high = (127 + e for e in exponents)
            tensors[f"{name}_scales"] = torch.randint(
                low, high + 1, groups, generator=generator, dtype=torch.uint8
            )
        else:
            one = torch.ones(shape) if "norm" in name else torch.randn(shape, generator=generator) * 0.1
            tensors[name] = one.bfloat16()
    said = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }
    body = {**config.to_dict(), "architectures": ["GptOssForCausalLM"], "quantization_config": said}
    body.pop("dtype", None)  # as it is published
    write(root, tensors, body)
    return tensors


def fused_of_modelopt(kind: str, fused: Tensors) -> tuple[Tensors, Tensors]:
    """Experts in 3-D, transposed, as ModelOpt has them in `nvfp4` or `fp8`: (tensors, what they mean in float32)."""
    tensors: Tensors = {}
    meant: Tensors = {}
    for name, stack in fused.items():
        if stack.dim() != 3:
            tensors[name] = stack
            continue
        experts, cols, rows = stack.shape
        tensors[f"{name}_input_scale"] = torch.tensor(0.25)
        if kind == "fp8":
            scale = stack.float().abs().max() / 448
            tensors[name] = (stack.float() / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_weight_scale"] = scale
            meant[name] = tensors[name].float() * scale
            continue
        stored, means = by_hand("nvfp4", stack.transpose(1, 2).reshape(-1, cols).float())
        tensors[f"{name}_weight_scale_2"] = stored["weight_scale_2"]
        for suffix in ("weight", "weight_scale"):
            own = stored[suffix].reshape(experts, rows, -1).view(torch.uint8).transpose(1, 2).contiguous()
            tensors[name + f"_{suffix}".removesuffix("_weight")] = own.view(stored[suffix].dtype)
        meant[name] = means.float().reshape(experts, rows, cols).transpose(1, 2).contiguous()
    return tensors, meant


def llama4_of_modelopt(root: Path, kind: str) -> tuple[Tensors, Tensors]:
    """Llama 4 as ModelOpt exports it, written below `root`.

    → (what its experts mean in float32 [E, K, N], the same as a matrix for each expert and projection).
    """
    fused, apart, config = fused_mixture("llama4")
    tensors, meant = fused_of_modelopt(kind, fused)
    said = {"quant_method": "modelopt", "quant_algo": kind.upper(), "ignore": ["*router*"]}
    write(root, tensors, {**config, "quantization_config": said}, place=lambda n: len(n) % 2)
    single: Tensors = {}
    for name in apart:
        at, _, rest = name.partition(".experts.")
        if rest:
            expert, leaf, _ = rest.split(".")
            both = meant[f"{at}.experts.{'down_proj' if leaf == 'down_proj' else 'gate_up_proj'}"][
                int(expert)
            ].T
            half = both.shape[0] // 2
            single[name] = {"gate_proj": both[:half], "up_proj": both[half:], "down_proj": both}[
                leaf
            ].contiguous()
    return meant, single
