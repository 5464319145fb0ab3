"""Tiny configs of the text-generation architectures that calibration is tried on. Imported by tests, not collected."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as t

TEXT = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MOE = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip
ROUTED = {**LATENT, "head_dim": 16, "num_key_value_heads": 2, "use_qk_norm": True}
LINEAR = {
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
SEES = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64,
    "deepstack_visual_indexes": [0], "fullatt_block_indexes": [0],
}  # fmt: skip
SIGLIP = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
PARTIAL = {"rope_parameters": MROPE["rope_parameters"] | {"partial_rotary_factor": 1.0}}
MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_d_conv": 4,
    "mamba_expand": 2, "mamba_chunk_size": 16,
}  # fmt: skip
GEMMA4 = {
    **TEXT, **SLIDING, "global_head_dim": 16, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 128,
}  # fmt: skip


def _of(config: str, model: str = "", **values: object) -> Callable[[], torch.nn.Module]:
    def make() -> torch.nn.Module:
        name = model or config.removesuffix("Config").removesuffix("Text") + "ForCausalLM"
        return getattr(t, name)(getattr(t, config)(**values))

    return make


def _seeing(name: str, text: dict, vision: dict, **more: object) -> Callable[[], torch.nn.Module]:
    return _of(
        f"{name}Config", f"{name}ForConditionalGeneration", text_config=text, vision_config=vision, **more
    )


NO_HEAD = {k: v for k, v in TEXT.items() if k != "head_dim"}
ARCHITECTURES: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": _of("LlamaConfig", **TEXT),
    "mistral": _of("MistralConfig", **TEXT, sliding_window=8),
    "ministral3": _of("Ministral3Config", **TEXT),
    "mistral3": _seeing("Mistral3", {**TEXT, "model_type": "mistral"}, {**SIGLIP, "model_type": "pixtral"}),
    "qwen2": _of("Qwen2Config", **NO_HEAD),
    "qwen2_moe": _of("Qwen2MoeConfig", **NO_HEAD, **MOE),
    "qwen3": _of("Qwen3Config", **TEXT),
    "qwen3_moe": _of("Qwen3MoeConfig", **TEXT, **MOE),
    "qwen3_next": _of("Qwen3NextConfig", **TEXT, **MOE, **LINEAR),
    "qwen3_5": _of("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", **TEXT, **LINEAR),
    "qwen3_5-sees": _seeing("Qwen3_5", {**TEXT, **LINEAR}, SEES),
    "qwen3_5_moe": _of("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", **TEXT, **MOE, **LINEAR),
    "qwen3_5_moe-sees": _seeing("Qwen3_5Moe", {**TEXT, **MOE, **LINEAR}, SEES),
    "qwen2_vl": _seeing("Qwen2VL", {**NO_HEAD, **MROPE}, SEES),
    "qwen2_5_vl": _seeing("Qwen2_5_VL", {**NO_HEAD, **MROPE}, SEES),
    "qwen3_vl": _seeing("Qwen3VL", {**TEXT, **MROPE}, SEES),
    "idefics3": _seeing("Idefics3", {**TEXT, "model_type": "llama"}, SIGLIP, scale_factor=2),
    "qwen3_vl_moe": _seeing("Qwen3VLMoe", {**TEXT, **MOE, **MROPE}, SEES),
    "mixtral": _of("MixtralConfig", **TEXT, **MOE),
    "deepseek_v2": _of("DeepseekV2Config", **NO_HEAD | LATENT | {"topk_method": "greedy"}),
    "deepseek_v3": _of("DeepseekV3Config", **NO_HEAD | LATENT),
    "deepseek_v32": _of("DeepseekV32Config", **NO_HEAD | LATENT, index_n_heads=2, index_head_dim=32, index_topk=8),
    "glm4": _of("Glm4Config", **TEXT),
    "glm4_moe": _of("Glm4MoeConfig", **TEXT | ROUTED),
    "glm4_moe_lite": _of("Glm4MoeLiteConfig", **NO_HEAD | LATENT),
    "glm4v": _seeing("Glm4v", {**TEXT, **MROPE}, SEES),
    "glm4v_moe": _seeing("Glm4vMoe", TEXT | ROUTED | PARTIAL, SEES),
    "gemma2": _of("Gemma2Config", **TEXT, **SLIDING, query_pre_attn_scalar=16),
    "gemma3": _of("Gemma3TextConfig", "Gemma3ForCausalLM", **TEXT, **SLIDING, query_pre_attn_scalar=16),
    "gemma3-sees": _seeing("Gemma3", {**TEXT, **SLIDING, "query_pre_attn_scalar": 16}, SIGLIP, mm_tokens_per_image=4),
    "gemma3n": _of("Gemma3nTextConfig", "Gemma3nForCausalLM", **TEXT | SLIDING | {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 128, "laurel_rank": 8,
        "activation_sparsity_pattern": [0.6, 0.0, 0.0, 0.0], "intermediate_size": [96] * 4,
    }),
    "gemma4": _of("Gemma4TextConfig", "Gemma4ForCausalLM", **GEMMA4 | {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }),
    "gemma4-moe": _of("Gemma4TextConfig", "Gemma4ForCausalLM", **GEMMA4 | MOE | {
        "top_k_experts": 2, "enable_moe_block": True, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
    }),
    "gemma4-sees": _seeing("Gemma4", {**GEMMA4, "num_kv_shared_layers": 0}, SIGLIP, audio_config=None),
    "llama4": _of("Llama4TextConfig", "Llama4ForCausalLM", **TEXT, **MOE, intermediate_size_mlp=96,
                  interleave_moe_layer_step=2, attention_chunk_size=8, no_rope_layers=[1, 0]),
    "llama4-sees": _seeing("Llama4", {
        **TEXT, **MOE, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 1, "attention_chunk_size": 8,
        "no_rope_layers": [1, 0],
    }, SIGLIP | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}),
    "gpt_oss": _of("GptOssConfig", **TEXT | SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "phi": _of("PhiConfig", **NO_HEAD),
    "phi3": _of("Phi3Config", **NO_HEAD),
    "phimoe": _of("PhimoeConfig", **NO_HEAD, **MOE),
    "granite": _of("GraniteConfig", **NO_HEAD, embedding_multiplier=2.0, residual_multiplier=0.5, logits_scaling=2.0),
    "granitemoe": _of("GraniteMoeConfig", **NO_HEAD, **MOE, residual_multiplier=0.5),
    "granitemoehybrid": _of("GraniteMoeHybridConfig", **NO_HEAD, **MOE, **MAMBA, layer_types=["mamba", "attention"],
                            shared_intermediate_size=32),
    "olmo": _of("OlmoConfig", **NO_HEAD),
    "nanochat": _of("NanoChatConfig", **NO_HEAD),
    "olmo2": _of("Olmo2Config", **NO_HEAD),
    "olmo3": _of("Olmo3Config", **NO_HEAD | SLIDING),
    "olmoe": _of("OlmoeConfig", **NO_HEAD, **MOE),
    "ernie4_5": _of("Ernie4_5Config", **TEXT),
    "ernie4_5_moe": _of("Ernie4_5_MoeConfig", **TEXT, moe_num_experts=4, moe_k=2, moe_intermediate_size=32,
                        moe_num_shared_experts=1, moe_layer_start_index=1),
    "hunyuan_v1_dense": _of("HunYuanDenseV1Config", **TEXT),
    "hunyuan_v1_moe": _of("HunYuanMoEV1Config", **TEXT, num_experts=4, moe_topk=2),
    "minimax": _of("MiniMaxConfig", **TEXT, **MOE, layer_types=["linear_attention", "full_attention"], block_size=16),
    "minimax_m2": _of("MiniMaxM2Config", **TEXT | MOE),
    "dots1": _of("Dots1Config", **TEXT | ROUTED),
    "seed_oss": _of("SeedOssConfig", **TEXT),
    "smollm3": _of("SmolLM3Config", **NO_HEAD),
    "nemotron": _of("NemotronConfig", **TEXT),
    "nemotron_h": _of("NemotronHConfig", **TEXT | {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "moe", "attention", "mlp"], "mamba_num_heads": 8,
        "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 16, "chunk_size": 16, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32,
    }),
    "starcoder2": _of("Starcoder2Config", **NO_HEAD),
    "stablelm": _of("StableLmConfig", **NO_HEAD),
    "cohere": _of("CohereConfig", **NO_HEAD),
    "cohere2": _of("Cohere2Config", **TEXT | SLIDING),
    "exaone4": _of("Exaone4Config", **TEXT | SLIDING),
    "arcee": _of("ArceeConfig", **TEXT),
    "apertus": _of("ApertusConfig", **NO_HEAD),
    "falcon_h1": _of("FalconH1Config", **TEXT, **MAMBA, mamba_d_ssm=128, ssm_multipliers=[0.5, 1.5, 0.7, 1.2, 0.9]),
    "jamba": _of("JambaConfig", **NO_HEAD, num_experts=4, num_experts_per_tok=2, attn_layer_period=2,
                 attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, use_mamba_kernels=False,
                 mamba_d_state=16, mamba_dt_rank=16),
    "bamba": _of("BambaConfig", **NO_HEAD, **MAMBA, attn_layer_indices=[1]),
    "mamba2": _of("Mamba2Config", vocab_size=128, hidden_size=64, num_hidden_layers=2, num_heads=8, head_dim=16,
                  state_size=16, n_groups=1, chunk_size=16),
    "zamba2": _of("Zamba2Config", **TEXT | {"num_mem_blocks": 1, "hybrid_layer_ids": [1], "n_mamba_heads": 8,
                  "mamba_d_state": 16, "mamba_ngroups": 1, "chunk_size": 16, "num_key_value_heads": 4,
                  "layers_block_type": ["mamba", "hybrid"], "use_mem_rope": True, "attention_hidden_size": 128,
                  "attention_head_dim": 32}),
    "lfm2": _of("Lfm2Config", **NO_HEAD, layer_types=["conv", "full_attention"]),
    "lfm2_moe": _of("Lfm2MoeConfig", **NO_HEAD, **MOE, layer_types=["conv", "full_attention"], num_dense_layers=1),
    "deepseek_v4": _of("DeepseekV4Config", **TEXT | MOE | {
        "num_hidden_layers": 3, "num_key_value_heads": 1, "q_lora_rank": 32, "o_lora_rank": 16, "o_groups": 2,
        "qk_rope_head_dim": 8, "n_routed_experts": 4, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 4,
        "layer_types": ["sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["hash_moe", "moe", "moe"], "sliding_window": 16,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
    }),
    "olmo_hybrid": _of("OlmoHybridConfig", **NO_HEAD | LINEAR),
    "kimi_linear": _of("KimiLinearConfig", **NO_HEAD | LATENT | {
        "q_lora_rank": None, "n_group": 1, "topk_group": 1, "num_local_experts": 4, "linear_head_dim": 16,
        "linear_num_heads": 4, "layer_types": LINEAR["layer_types"], "mlp_layer_types": ["dense", "sparse"],
    }),
    "bailing_hybrid": _of("BailingHybridConfig", **NO_HEAD | LATENT | {
        "head_dim": 16, "num_local_experts": 4, "layer_types": LINEAR["layer_types"], "num_mtp_layers": 0,
        "num_attention_heads": 16, "num_key_value_heads": 16,
        "mlp_layer_types": ["dense", "sparse"],
    }),
    "minimax_m3_vl": _of(
        "MiniMaxM3VLConfig", "MiniMaxM3SparseForConditionalGeneration", vision_config=SIGLIP | {"num_channels": 3},
        projector_hidden_size=64, text_config={
            **TEXT, **MOE, "intermediate_size": 32, "dense_intermediate_size": 96, "shared_intermediate_size": 32,
            "rotary_dim": 16, "mlp_layer_types": ["dense", "sparse"], "index_n_heads": 2, "index_head_dim": 16,
            "index_block_size": 8, "index_topk_blocks": 2,
        },
    ),
    "gpt_neox": _of("GPTNeoXConfig", **NO_HEAD),
    "opt": _of("OPTConfig", vocab_size=128, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
               max_position_embeddings=128, word_embed_proj_dim=64),
}  # fmt: skip


def build(name: str, seed: int = 0) -> torch.nn.Module:
    """A float32 model of trivial size whose norms, biases and channels are not trivial."""
    torch.manual_seed(seed)
    model = ARCHITECTURES[name]().float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if p.dim() > 1:
                p.mul_(3.0 * torch.exp(0.5 * torch.randn(p.shape[-1], generator=generator)))
            elif "norm" in parameter_name:
                p.add_(0.5 * torch.rand(p.shape, generator=generator) - 0.25)
            else:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model
