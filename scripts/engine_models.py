"""Small seeded checkpoints of the architectures that engines are checked with, in BF16 and as published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as t
from safetensors.torch import load_file, save_file

VOCABULARY = 512
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
VISION = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 256}


def _without(*names: str) -> dict[str, Any]:
    return {k: v for k, v in TEXT.items() if k not in names}


def _qwen3_5() -> dict[str, Any]:
    return {
        **TEXT, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
        "full_attention_interval": 2,  # Published, and read by SGLang.
    }  # fmt: skip


def architecture(kind: str) -> tuple[type, t.PretrainedConfig]:
    """(model class, small config)."""
    match kind:
        case "Llama":
            return t.LlamaForCausalLM, t.LlamaConfig(**TEXT)
        case "Qwen2":
            return t.Qwen2ForCausalLM, t.Qwen2Config(**_without("head_dim"))
        case "Qwen3":
            return t.Qwen3ForCausalLM, t.Qwen3Config(**TEXT)
        case "Gemma 2":
            config = t.Gemma2Config(
                **{**TEXT, "tie_word_embeddings": True}, sliding_window=64, query_pre_attn_scalar=64,
                hidden_act="gelu_pytorch_tanh",  # Published, and read by SGLang; transformers reads hidden_activation.
            )  # fmt: skip
            return t.Gemma2ForCausalLM, config
        case "Phi-3":
            return t.Phi3ForCausalLM, t.Phi3Config(**_without("head_dim"))
        case "Qwen3-MoE":
            config = t.Qwen3MoeConfig(
                **TEXT, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128, norm_topk_prob=True
            )
            return t.Qwen3MoeForCausalLM, config
        case "Qwen2-MoE":
            config = t.Qwen2MoeConfig(
                **_without("head_dim"), num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128,
                shared_expert_intermediate_size=256,
            )  # fmt: skip
            return t.Qwen2MoeForCausalLM, config
        case "Mixtral":
            return t.MixtralForCausalLM, t.MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2)
        case "GLM-4.5":
            config = t.Glm4MoeConfig(
                **TEXT, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1,
                moe_intermediate_size=128, first_k_dense_replace=1, use_qk_norm=True,
            )  # fmt: skip
            return t.Glm4MoeForCausalLM, config
        case "DeepSeek-V3":
            config = t.DeepseekV3Config(
                **_without("head_dim", "num_key_value_heads"), num_key_value_heads=4, q_lora_rank=128,
                kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, n_routed_experts=8,
                num_experts_per_tok=2, n_shared_experts=1, n_group=2, topk_group=1, moe_intermediate_size=128,
                first_k_dense_replace=1, topk_method="noaux_tc",
                scoring_func="sigmoid", moe_layer_freq=1,
            )  # fmt: skip
            return t.DeepseekV3ForCausalLM, config
        case "Qwen3.5-MoE":
            vision = {**VISION, "deepstack_visual_indexes": []}  # Published, and read by SGLang.
            config = t.Qwen3_5MoeConfig(
                text_config=_qwen3_5(), vision_config=vision, tie_word_embeddings=False
            )
            return t.Qwen3_5MoeForConditionalGeneration, config
        case "Qwen3-VL-MoE":
            text = {**TEXT, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
            text["norm_topk_prob"] = True
            vision = {**VISION, "deepstack_visual_indexes": [0]}
            config = t.Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
            return t.Qwen3VLMoeForConditionalGeneration, config
        case "Llama 4":
            config = t.Llama4TextConfig(
                **{**TEXT, "intermediate_size": 128}, intermediate_size_mlp=512, num_local_experts=4,
                num_experts_per_tok=1, interleave_moe_layer_step=2,
            )  # fmt: skip
            return t.Llama4ForCausalLM, config
        case "Gemma 4 MoE":
            config = t.Gemma4TextConfig(
                **{**TEXT, "tie_word_embeddings": True}, global_head_dim=64, num_experts=8, top_k_experts=2,
                moe_intermediate_size=128, enable_moe_block=True, hidden_size_per_layer_input=0,
                layer_types=["sliding_attention", "full_attention"],
            )  # fmt: skip
            return t.Gemma4ForCausalLM, config
        case "Granite MoE":
            config = t.GraniteMoeConfig(
                **{**_without("head_dim"), "intermediate_size": 128}, num_local_experts=8, num_experts_per_tok=2,
                residual_multiplier=0.5, embedding_multiplier=2.0, logits_scaling=2.0,
            )  # fmt: skip
            return t.GraniteMoeForCausalLM, config
        case "Granite 4 hybrid":
            config = t.GraniteMoeHybridConfig(
                **{**_without("head_dim"), "intermediate_size": 128}, num_local_experts=8, num_experts_per_tok=2,
                shared_intermediate_size=128, layer_types=["mamba", "attention"], mamba_n_heads=8, mamba_d_head=64,
                mamba_n_groups=1, mamba_d_state=32, mamba_d_conv=4, mamba_expand=2, mamba_chunk_size=16,
            )  # fmt: skip
            return t.GraniteMoeHybridForCausalLM, config
        case "OLMoE":
            return t.OlmoeForCausalLM, t.OlmoeConfig(
                **{**_without("head_dim"), "intermediate_size": 128}, num_experts=8, num_experts_per_tok=2
            )  # fmt: skip
        case "ERNIE 4.5 MoE":
            config = t.Ernie4_5_MoeConfig(
                **TEXT, moe_num_experts=8, moe_k=2, moe_intermediate_size=128, moe_num_shared_experts=1,
                moe_layer_start_index=1,
            )  # fmt: skip
            return t.Ernie4_5_MoeForCausalLM, config
        case "LFM2-MoE":
            config = t.Lfm2MoeConfig(
                **{**_without("head_dim"), "tie_word_embeddings": True}, num_experts=8, num_experts_per_tok=2,
                moe_intermediate_size=128, layer_types=["conv", "full_attention"], num_dense_layers=1,
            )  # fmt: skip
            return t.Lfm2MoeForCausalLM, config
        case "MiniMax-M2":
            config = t.MiniMaxM2Config(
                **{**TEXT, "intermediate_size": 128}, num_local_experts=8, num_experts_per_tok=2, rotary_dim=32,
                scoring_func="sigmoid", use_routing_bias=True,
            )  # fmt: skip
            return t.MiniMaxM2ForCausalLM, config
    raise ValueError(kind)


# How transformers reads the experts that lowbit writes apart: in 3-D, [E, out, in] or [E, in, out].
FUSED = {
    "Qwen3-VL-MoE": "rows", "Llama 4": "columns", "Gemma 4 MoE": "rows", "Granite MoE": "rows",
    "Granite 4 hybrid": "rows",
}  # fmt: skip


# Its experts are published [E, in, out], and so read by engines; transformers writes and reads them [E, out, in].
TURNED = "Qwen3-VL-MoE"


def write(kind: str, out: Path) -> Path:
    """The checkpoint of an architecture, unless it is there. Rows differ in size, so that a wrong scale shows."""
    if (out / "config.json").is_file():
        return out
    cls, config = architecture(kind)
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.dim() == 2 and "embed" not in name:
                rows = torch.exp(0.4 * torch.randn(parameter.shape[0], 1))
                parameter.copy_(torch.randn_like(parameter) * rows / parameter.shape[1] ** 0.5)
            elif parameter.dim() == 3 and "experts" in name:
                inputs = 1 if FUSED.get(kind) == "columns" else 2
                rows = torch.exp(0.4 * torch.randn(parameter.shape[0], *_ones(parameter, inputs)))
                parameter.copy_(torch.randn_like(parameter) * rows / parameter.shape[inputs] ** 0.5)
            else:
                parameter.copy_(torch.randn_like(parameter))
    model.to(torch.bfloat16).save_pretrained(out)
    if kind == TURNED:
        turn_experts(out / "model.safetensors")
    return out


def _ones(parameter: torch.Tensor, inputs: int) -> list[int]:
    return [1 if d == inputs else n for d, n in enumerate(parameter.shape) if d]


def turn_experts(file: Path) -> None:
    """Between the two layouts of TURNED, in place."""
    tensors = load_file(file)
    turned = {n: v.mT.contiguous() if v.dim() == 3 and ".experts." in n else v for n, v in tensors.items()}
    save_file(turned, file, {"format": "pt"})
