"""Small seeded checkpoints in the shapes that real models have. Imported by tests, not collected."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from lowbit.quantize import choose_scale, quantize_with
from lowbit.scheme import TensorSpec

Tensors = dict[str, Tensor]
BLOCK = 128


def _maker(seed: int, dtype: torch.dtype) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        size = torch.exp(torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator)) * 0.05
        return (torch.randn(shape, generator=generator) * size).to(dtype)

    return make


def llama(
    *, dtype: torch.dtype = torch.bfloat16, hidden: int = 128, intermediate: int = 256, layers: int = 2,
    kv_heads: int = 4, vocab: int = 64, tied: bool = False, seed: int = 0,
) -> tuple[Tensors, dict[str, Any]]:  # fmt: skip
    """A Llama of 4 heads; with `kv_heads=2`, k_proj and v_proj have ragged 128-blocks."""
    make, kv = _maker(seed, dtype), hidden // 4 * kv_heads
    tensors = {"model.embed_tokens.weight": make(vocab, hidden)}
    for i in range(layers):
        at = f"model.layers.{i}"
        tensors |= {
            f"{at}.self_attn.q_proj.weight": make(hidden, hidden),
            f"{at}.self_attn.k_proj.weight": make(kv, hidden),
            f"{at}.self_attn.v_proj.weight": make(kv, hidden),
            f"{at}.self_attn.o_proj.weight": make(hidden, hidden),
            f"{at}.mlp.gate_proj.weight": make(intermediate, hidden),
            f"{at}.mlp.up_proj.weight": make(intermediate, hidden),
            f"{at}.mlp.down_proj.weight": make(hidden, intermediate),
            f"{at}.input_layernorm.weight": torch.ones(hidden, dtype=dtype),
            f"{at}.post_attention_layernorm.weight": torch.ones(hidden, dtype=dtype),
        }
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=dtype)
    if not tied:
        tensors["lm_head.weight"] = make(vocab, hidden)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": kv_heads, "vocab_size": vocab, "tie_word_embeddings": tied,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "torch_dtype": str(dtype).removeprefix("torch."), "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    return tensors, config


def qwen3_moe(*, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> tuple[Tensors, dict[str, Any]]:
    """Four routed experts, a router, q and k norms."""
    make, hidden, inner, experts = _maker(seed, dtype), 128, 128, 4
    tensors = {"model.embed_tokens.weight": make(64, hidden)}
    for i in range(2):
        at = f"model.layers.{i}"
        for name in ("q", "k", "v", "o"):
            tensors[f"{at}.self_attn.{name}_proj.weight"] = make(hidden, hidden)
        tensors[f"{at}.self_attn.q_norm.weight"] = torch.ones(32, dtype=dtype)
        tensors[f"{at}.self_attn.k_norm.weight"] = torch.ones(32, dtype=dtype)
        tensors[f"{at}.mlp.gate.weight"] = make(experts, hidden)
        for e in range(experts):
            tensors[f"{at}.mlp.experts.{e}.gate_proj.weight"] = make(inner, hidden)
            tensors[f"{at}.mlp.experts.{e}.up_proj.weight"] = make(inner, hidden)
            tensors[f"{at}.mlp.experts.{e}.down_proj.weight"] = make(hidden, inner)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{name}.weight"] = torch.ones(hidden, dtype=dtype)
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=dtype)
    tensors["lm_head.weight"] = make(64, hidden)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": hidden,
        "intermediate_size": 256, "moe_intermediate_size": inner, "num_experts": experts,
        "num_experts_per_tok": 2, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 64, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "norm_topk_prob": True, "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."), "max_position_embeddings": 64,
    }  # fmt: skip
    return tensors, config


def deepseek_v3(*, dtype: torch.dtype = torch.bfloat16, seed: int = 2) -> tuple[Tensors, dict[str, Any]]:
    """MLA (160 ragged rows in kv_a), a dense layer, a MoE layer, and the MTP layer beyond the last."""
    make, hidden, experts = _maker(seed, dtype), 128, 4
    tensors = {"model.embed_tokens.weight": make(64, hidden)}

    def attention(at: str) -> Tensors:
        return {
            f"{at}.self_attn.q_a_proj.weight": make(128, hidden),
            f"{at}.self_attn.q_a_layernorm.weight": torch.ones(128, dtype=dtype),
            f"{at}.self_attn.q_b_proj.weight": make(192, 128),
            f"{at}.self_attn.kv_a_proj_with_mqa.weight": make(160, hidden),
            f"{at}.self_attn.kv_a_layernorm.weight": torch.ones(128, dtype=dtype),
            f"{at}.self_attn.kv_b_proj.weight": make(256, 128),
            f"{at}.self_attn.o_proj.weight": make(hidden, 128),
            f"{at}.input_layernorm.weight": torch.ones(hidden, dtype=dtype),
            f"{at}.post_attention_layernorm.weight": torch.ones(hidden, dtype=dtype),
        }

    def mlp(at: str, inner: int) -> Tensors:
        return {
            f"{at}.gate_proj.weight": make(inner, hidden),
            f"{at}.up_proj.weight": make(inner, hidden),
            f"{at}.down_proj.weight": make(hidden, inner),
        }

    def moe(at: str) -> Tensors:
        found = {
            f"{at}.gate.weight": make(experts, hidden),
            f"{at}.gate.e_score_correction_bias": make(experts, dtype=torch.float32),
        }
        for e in range(experts):
            found |= mlp(f"{at}.experts.{e}", 128)
        return found | mlp(f"{at}.shared_experts", 128)

    tensors |= attention("model.layers.0") | mlp("model.layers.0.mlp", 256)
    tensors |= attention("model.layers.1") | moe("model.layers.1.mlp")
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=dtype)
    tensors["lm_head.weight"] = make(64, hidden)
    mtp = "model.layers.2"
    tensors |= attention(mtp) | moe(f"{mtp}.mlp")
    tensors |= {
        f"{mtp}.eh_proj.weight": make(hidden, 2 * hidden),
        f"{mtp}.enorm.weight": torch.ones(hidden, dtype=dtype),
        f"{mtp}.hnorm.weight": torch.ones(hidden, dtype=dtype),
        f"{mtp}.embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
        f"{mtp}.shared_head.norm.weight": torch.ones(hidden, dtype=dtype),
        f"{mtp}.shared_head.head.weight": make(64, hidden),
    }
    config = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": hidden,
        "intermediate_size": 256, "moe_intermediate_size": 128, "n_routed_experts": experts,
        "n_shared_experts": 1, "num_hidden_layers": 2, "num_nextn_predict_layers": 1,
        "num_attention_heads": 4, "vocab_size": 64, "q_lora_rank": 128, "kv_lora_rank": 128,
        "qk_rope_head_dim": 32, "torch_dtype": str(dtype).removeprefix("torch."),
        "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
    }  # fmt: skip
    return tensors, config


def vision_language(*, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensors, dict[str, Any]]:
    """A vision tower with linears and a convolution before a Llama whose config is nested."""
    make = _maker(3, dtype)
    text, text_config = llama(dtype=dtype)
    tensors = {
        "visual.patch_embed.proj.weight": make(64, 3, 2, 4, 4),
        "visual.blocks.0.attn.qkv.weight": make(192, 64),
        "visual.blocks.0.attn.qkv.bias": make(192),
        "visual.blocks.0.mlp.fc1.weight": make(128, 64),
        "visual.merger.mlp.0.weight": make(128, 64),
        **{k.replace("model.", "model.language_model.", 1): v for k, v in text.items()},
    }
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl",
        "text_config": text_config, "vision_config": {"depth": 1}, "torch_dtype": "bfloat16",
    }  # fmt: skip
    return tensors, config


# Where the experts of a layer lie, whether they are stored transposed, and the model_types, as published.
MIXTURES = {
    "qwen3.5": ("model.language_model.layers.{}.mlp.experts", False, "qwen3_5_moe"),
    "gemma4": ("model.language_model.layers.{}.experts", False, "gemma4"),
    "qwen3-vl": ("model.language_model.layers.{}.mlp.experts", True, "qwen3_vl_moe"),
    "llama4": ("language_model.model.layers.{}.feed_forward.experts", True, "llama4"),
    "granite": ("model.layers.{}.block_sparse_moe.experts", False, "granitemoe"),
    "step": ("model.layers.{}.moe.experts", False, "step3p5"),
}
_FUSED_NAMES = {
    "granite": ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
    "step": ("moe.gate_proj.weight", "moe.up_proj.weight", "moe.down_proj.weight"),
}


def fused_names(model: str, layer: int) -> tuple[str, ...]:
    """The 3-D tensors of a layer: gate and up (in one, or each in its own), and down."""
    at = MIXTURES[model][0].format(layer)
    if model not in _FUSED_NAMES:
        return f"{at}.gate_up_proj", f"{at}.down_proj"
    names = _FUSED_NAMES[model]
    within = at.removesuffix(names[0].partition(".")[0] + ".experts")
    return tuple(within + name for name in names)


def fused_mixture(
    model: str, *, dtype: torch.dtype = torch.bfloat16, hidden: int = 256, inner: int = 128, experts: int = 3,
    layers: int = 2, seed: int = 4,
) -> tuple[Tensors, Tensors, dict[str, Any]]:  # fmt: skip
    """(tensors with the experts of a layer in 3-D, the same with a matrix per expert, config)."""
    make, (where, transposed, model_type) = _maker(seed, dtype), MIXTURES[model]
    rest = {"model.language_model.embed_tokens.weight": make(64, hidden)}
    fused, apart = dict(rest), dict(rest)
    for i in range(layers):
        at = where.format(i)
        router = {f"{at.removesuffix('experts')}gate.weight": make(experts, hidden)}
        parts: dict[str, list[Tensor]] = {p: [] for p in ("gate_proj", "up_proj", "down_proj")}
        for e in range(experts):
            for name, found in parts.items():
                matrix = make(hidden, inner) if name == "down_proj" else make(inner, hidden)
                found.append(matrix)
                apart[f"{at}.{e}.{name}.weight"] = matrix
        both = [torch.cat(pair) for pair in zip(parts["gate_proj"], parts["up_proj"], strict=True)]
        names = fused_names(model, i)
        stacks = (both, parts["down_proj"]) if len(names) == 2 else parts.values()
        for name, found in zip(names, stacks, strict=True):
            stack = torch.stack(found)
            fused[name] = stack.transpose(1, 2).contiguous() if transposed else stack
        fused |= router
        apart |= router
    text = {"hidden_size": hidden, "num_hidden_layers": layers}
    config = {
        "architectures": ["X"], "model_type": model_type, "text_config": text, "vision_config": {"hidden_size": 32},
        "torch_dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    return fused, apart, config


def quantizable(name: str, tensor: Tensor) -> bool:
    """What DeepSeek stores in FP8: matrices but routers, embeddings, heads and eh_proj."""
    kept = ("embed_tokens", "lm_head", ".gate.weight", "eh_proj", "shared_head.head", "visual")
    return tensor.dim() == 2 and name.endswith(".weight") and not any(k in name for k in kept)


def block_fp8(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], *, suffix: str = ".weight_scale_inv",
    scale_dtype: torch.dtype = torch.float32, block: tuple[int, int] = (BLOCK, BLOCK),
) -> tuple[Tensors, dict[str, Any]]:  # fmt: skip
    """The same checkpoint as HF / DeepSeek block FP8: scales per tile, written without lowbit."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        if not quantizable(name, tensor):
            found[name] = tensor
            continue
        codes, scale = _to_blocks(tensor.float(), block, scale_dtype)
        found[name] = codes
        found[name.removesuffix(".weight") + suffix] = scale
    quantization: dict[str, Any] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block),
    }  # fmt: skip
    if scale_dtype == torch.float8_e8m0fnu:
        quantization["scale_fmt"] = "ue8m0"
    return found, {**config, "quantization_config": quantization}


def fused_block_fp8(fused: Tensors, config: Mapping[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """Fused experts as block FP8, each expert's scales beside it: `gate_up_proj_scale_inv` [E, ·/128, ·/128]."""
    found: Tensors = {}
    for name, tensor in fused.items():
        if tensor.dim() != 3:
            found[name] = tensor
            continue
        pairs = [_to_blocks(t.float(), (BLOCK, BLOCK), torch.float32) for t in tensor]
        found[name] = torch.stack([c for c, _ in pairs])
        found[name + "_scale_inv"] = torch.stack([s for _, s in pairs])
    return found, {
        **config,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]},
    }


def _to_blocks(x: Tensor, block: tuple[int, int], scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, cols = -(-x.shape[0] // block[0]), -(-x.shape[1] // block[1])
    scale = torch.empty(rows, cols)
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn)
    for r in range(rows):
        for c in range(cols):
            at = slice(r * block[0], (r + 1) * block[0]), slice(c * block[1], (c + 1) * block[1])
            peak = x[at].abs().max() / 448
            if scale_dtype == torch.float8_e8m0fnu:
                peak = torch.exp2(torch.ceil(torch.log2(peak)))
            scale[r, c] = peak.to(scale_dtype).float()
            codes[at] = (x[at] / scale[r, c]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, scale.to(scale_dtype)


def decode_block_fp8(codes: Tensor, scale: Tensor, block: tuple[int, int] = (BLOCK, BLOCK)) -> Tensor:
    """float32, one product per element: what everything that reads block FP8 must see."""
    wide = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return codes.float() * wide[: codes.shape[0], : codes.shape[1]]


def write(
    root: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None, *,
    place: Callable[[str], int] | None = None, files: Mapping[str, str | bytes] | None = None,
) -> Path:  # fmt: skip
    """A checkpoint directory; `place` gives the shard number of a name (default: one file)."""
    root.mkdir(parents=True, exist_ok=True)
    if place is None:
        save_file(dict(tensors), root / "model.safetensors", metadata={"format": "pt"})
    else:
        shards: dict[int, Tensors] = {}
        for name, tensor in tensors.items():
            shards.setdefault(place(name), {})[name] = tensor
        weight_map = {}
        for i, (_, part) in enumerate(sorted(shards.items())):
            file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            save_file(part, root / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (root / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (root / "config.json").write_text(json.dumps(config))
    for name, content in (files or {}).items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def load(root: Path) -> Tensors:
    """All tensors below a directory, read by safetensors itself."""
    from safetensors import safe_open

    found: Tensors = {}
    for file in sorted(root.glob("*.safetensors")):
        with safe_open(file, "pt") as stream:
            found |= {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    return found


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)
    )


def check_quantized(written: Mapping[str, Tensor], module: str, meant: Tensor, spec: TensorSpec) -> None:
    """A module's codes and scales, as compressed-tensors, are the oracle's of the float32 weight that is meant."""
    scale, _ = choose_scale(meant, spec)
    codes = quantize_with(meant, scale, spec)
    assert same_bits(written[f"{module}.weight_scale"], scale), module
    if (packed := written.get(f"{module}.weight_packed")) is not None:
        codes = (codes.to(torch.int16) + 128).to(torch.uint8)
        assert same_bits(packed.view(torch.uint8).reshape(meant.shape), codes), module
    else:
        assert same_bits(written[f"{module}.weight"], codes), module


def fp4(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float32 [N, K] → (int8 [N, K / 2], float8_e8m0fnu [N, K / 32], what they mean), with ml_dtypes' E2M1."""
    groups = w.reshape(w.shape[0], -1, 32)
    scale = torch.exp2(torch.floor(torch.log2(groups.abs().amax(-1))) - 2)
    codes = (groups / scale[..., None]).numpy().astype(ml_dtypes.float4_e2m1fn)
    halves = torch.from_numpy(codes.view(np.uint8)).reshape(w.shape)
    means = (torch.from_numpy(codes.astype(np.float32)) * scale[..., None]).reshape(w.shape)
    packed = (halves[:, ::2] | halves[:, 1::2] << 4).view(torch.int8)
    return packed.contiguous(), scale.to(torch.float8_e8m0fnu), means
