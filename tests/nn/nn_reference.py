"""What lowbit's modules are compared with: the same checkpoint in float, by transformers alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowbit.checkpoint.opening import open_checkpoint
from lowbit.formats import quantization_of, read
from lowbit.granularity import PerTensor
from lowbit.quantize import choose_scale, dequantize, quantize_with
from lowbit.scheme import Scheme, TensorSpec

FUSED = {
    "qwen3-vl-moe": "rows", "llama4": "columns", "gemma4-moe": "rows", "granite-moe": "rows", "step": "apart",
    "hy-v4": "rows", "minimax-m3": "rows",
}  # fmt: skip
"""Architectures that transformers reads in 3-D only: [E, out, in] or [E, in, out], or gate and up apart too."""


def dequantized(out: Path, to: Path, fuse: str | None = None) -> Path:
    """A float32 checkpoint of a quantized one: code · scale written out, tensor by tensor.

    `fuse` (a value of `FUSED`): per-expert matrices are joined into 3-D tensors again.
    """
    source = open_checkpoint(out)
    assert quantization_of(source.config)
    tensors: dict[str, Tensor] = {}
    for shard in source.shards:
        tensors |= load_file(shard)
    for name, module in read(source.config, source.tensors).items():
        taken = {content: tensors.pop(tensor) for content, tensor in module.names.items()}
        if "packed" in taken:
            raw = taken["packed"].view(torch.uint8)[:, : module.shape[1]]
            codes = (raw.to(torch.int16) - 128).to(torch.int8)
        else:
            codes = taken["codes"]
        if "deq_scale" in taken:
            taken["scale"] = (taken["deq_scale"] / taken["input_scale"]).unsqueeze(1)
        tensors[name + ".weight"] = dequantize(codes, taken["scale"], module.spec)
    to.mkdir()
    tensors = fused(tensors, fuse) if fuse else tensors
    floats = {n: t.float().contiguous() if t.is_floating_point() else t for n, t in tensors.items()}
    save_file(floats, to / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config.pop("quantization_config", None)
    config.pop("dtype", None)
    (to / "config.json").write_text(json.dumps(config))
    return to


def fused(tensors: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """`….experts.{e}.gate_proj.weight` and its like → `gate_up_proj` and `down_proj` of all experts."""
    parents = {
        n.partition(".experts.")[0] + ".experts" for n in tensors if n.endswith(".experts.0.up_proj.weight")
    }
    whole = {n: t for n, t in tensors.items() if n.rpartition(".experts.")[0] + ".experts" not in parents}
    for parent in parents:
        count = sum(n.startswith(parent + ".") and n.endswith(".down_proj.weight") for n in tensors)
        gate, up, down = (
            torch.stack([tensors[f"{parent}.{e}.{p}_proj.weight"] for e in range(count)])
            for p in ("gate", "up", "down")
        )
        if layout == "apart":
            at = parent.removesuffix(".experts")
            whole |= {f"{at}.{p}_proj.weight": t for p, t in {"gate": gate, "up": up, "down": down}.items()}
            continue
        both = torch.cat([gate, up], dim=1)
        whole[f"{parent}.gate_up_proj"] = both if layout == "rows" else both.mT
        whole[f"{parent}.down_proj"] = down if layout == "rows" else down.mT
    return whole


@contextmanager
def activations_quantized(
    model: nn.Module, schemes: dict[str, Scheme], static: dict[str, Tensor] | None = None
) -> Iterator[None]:
    """Within the block every `F.linear` (`bmm`) with one of the weights named in `schemes` gets a quantized input.

    `static`: their scales, where these are not dynamic. Weights are known by their address, so an
    expert's slice of a fused parameter counts too.
    """
    specs: dict[int, tuple[TensorSpec, Tensor | None]] = {}
    for name, scheme in schemes.items():
        if scheme.activations is not None:
            specs[_address(model, name)] = (scheme.activations, (static or {}).get(name))
    plain, plain_bmm = nn.functional.linear, torch.bmm
    seen = set()

    def rounded(x: Tensor, weight: Tensor) -> Tensor:
        found = specs.get(weight.data_ptr())
        if found is None:
            return x
        seen.add(weight.data_ptr())
        spec, scale = found
        assert isinstance(spec.granularity, PerTensor) == (scale is not None)
        scale = choose_scale(x, spec)[0] if scale is None else scale
        return dequantize(quantize_with(x, scale, spec), scale, spec).to(x.dtype)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return plain(rounded(x, weight), weight, bias)

    def bmm(x: Tensor, weight: Tensor) -> Tensor:
        return plain_bmm(torch.stack([rounded(a, w) for a, w in zip(x, weight, strict=True)]), weight)

    nn.functional.linear, torch.bmm = linear, bmm
    try:
        yield
    finally:
        nn.functional.linear, torch.bmm = plain, plain_bmm
    assert seen, "no quantized weight was multiplied"


def _address(model: nn.Module, name: str) -> int:
    """Where the weight of module `name` (a fused expert's: `experts.3.up`) begins in memory."""
    if ".experts." in name and not isinstance(_get(model, name), nn.Linear):
        path, _, rest = name.partition(".experts.")
        experts = model.get_submodule(path + ".experts")
        index, projection = rest.split(".")
        if projection == "down":
            return experts.down_proj[int(index)].data_ptr()
        return experts.gate_up_proj[int(index)].data_ptr()
    return model.get_submodule(name).weight.data_ptr()


def _get(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


LAYERS = ["linear_attention", "full_attention"]


def tiny(kind: str) -> tuple[type, transformers.PretrainedConfig]:
    """(model class, small config) of an architecture."""
    t = transformers
    text: dict = dict(  # noqa: C408  (keyword arguments of a config)
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    match kind:
        case "llama":
            return t.LlamaForCausalLM, t.LlamaConfig(**text, tie_word_embeddings=True)
        case "qwen3":
            return t.Qwen3ForCausalLM, t.Qwen3Config(**text)
        case "qwen3-moe":
            config = t.Qwen3MoeConfig(
                **text, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=48, mlp_only_layers=[0]
            )
            return t.Qwen3MoeForCausalLM, config
        case "mixtral":
            return t.MixtralForCausalLM, t.MixtralConfig(**text, num_local_experts=4, num_experts_per_tok=2)
        case "deepseek-v3":
            config = t.DeepseekV3Config(
                **{k: v for k, v in text.items() if k not in ("head_dim", "num_key_value_heads")},
                num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16,
                v_head_dim=16, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, n_group=2, topk_group=1,
                moe_intermediate_size=32, first_k_dense_replace=1,
            )  # fmt: skip
            return t.DeepseekV3ForCausalLM, config
        case "gemma":
            return t.Gemma2ForCausalLM, t.Gemma2Config(**text, sliding_window=16)
        case "phi":
            drop = ("head_dim",)
            return t.PhiForCausalLM, t.PhiConfig(**{k: v for k, v in text.items() if k not in drop})
        case "gpt2":
            config = t.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64)
            return t.GPT2LMHeadModel, config
        case "bert":
            config = t.BertConfig(
                vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=64,
            )  # fmt: skip
            return t.BertModel, config
        case "qwen3.5-moe":
            config = t.Qwen3_5MoeTextConfig(
                **text, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=48, layer_types=LAYERS,
                shared_expert_intermediate_size=48, linear_key_head_dim=16, linear_value_head_dim=16,
                linear_num_key_heads=2, linear_num_value_heads=4,
            )  # fmt: skip
            return t.Qwen3_5MoeForCausalLM, config
        case "qwen3-vl-moe":
            vision = {
                "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64,
                "deepstack_visual_indexes": [0],
            }  # fmt: skip
            moe = {**text, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
            return t.Qwen3VLMoeForConditionalGeneration, t.Qwen3VLMoeConfig(
                text_config=moe, vision_config=vision
            )
        case "llama4":
            config = t.Llama4TextConfig(
                **{**text, "intermediate_size": 48}, intermediate_size_mlp=96, num_local_experts=4,
                num_experts_per_tok=1, interleave_moe_layer_step=2,
            )  # fmt: skip
            return t.Llama4ForCausalLM, config
        case "gemma4-moe":
            config = t.Gemma4TextConfig(
                **text, global_head_dim=16, num_experts=4, top_k_experts=2, moe_intermediate_size=48,
                enable_moe_block=True, hidden_size_per_layer_input=0,
                layer_types=["sliding_attention", "full_attention"],
            )  # fmt: skip
            return t.Gemma4ForCausalLM, config
        case "granite-moe":
            drop = ("head_dim", "intermediate_size")
            config = t.GraniteMoeConfig(
                **{k: v for k, v in text.items() if k not in drop}, intermediate_size=48, num_local_experts=4,
                num_experts_per_tok=2, residual_multiplier=0.5, logits_scaling=2.0,
            )  # fmt: skip
            return t.GraniteMoeForCausalLM, config
        case "step":
            text |= {
                "sliding_window": 16, "mlp_layer_types": ["dense", "sparse"], "moe_num_experts": 4, "moe_top_k": 2,
                "moe_intermediate_size": 48, "share_expert_dim": 48, "swiglu_limits": [0.0, 0.1],
            }  # fmt: skip
            vision = {
                "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                "image_size": 28, "patch_size": 14,
            }  # fmt: skip
            config = t.Step3p7Config(text_config=text, vision_config=vision, image_token_id=95)
            return t.Step3p7ForConditionalGeneration, config
        case (
            "hy-v4"
        ):  # its experts have a gate of their own and no act_fn, and other names on disk than in memory
            config = t.HYV4Config(
                **text | {"num_key_value_heads": 4}, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16,
                qk_nope_head_dim=16, v_head_dim=16, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
                index_topk=8, index_head_dim=32, index_n_heads=2, swiglu_limit=0.5, hc_mult=2,
                mlp_layer_types=["dense", "sparse"], layer_types=["indexed_attention"] * 2,
                indexer_types=["full", "shared"],
            )  # fmt: skip
            return t.HYV4ForCausalLM, config
        case "minimax-m3":
            config = t.MiniMaxM3VLTextConfig(
                **text | {"intermediate_size": 48},
                num_local_experts=4,
                num_experts_per_tok=2,
                swiglu_limit=0.5,
            )
            return t.MiniMaxM3VLForCausalLM, config
        case (
            "longcat"
        ):  # two of its experts return what they get; on disk its layers are half as many as in memory
            config = t.LongcatFlashConfig(
                **{k: v for k, v in text.items() if k not in ("intermediate_size", "num_key_value_heads")},
                num_layers=1, ffn_hidden_size=96, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16,
                qk_nope_head_dim=16, v_head_dim=16, moe_topk=3, n_routed_experts=4, zero_expert_num=2,
                expert_ffn_hidden_size=32,
            )  # fmt: skip
            return t.LongcatFlashForCausalLM, config
        case "qwen3-omni":  # transformers' code initializes its experts by their names in float
            audio = {
                "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64,
                "output_dim": 64, "num_mel_bins": 16, "max_source_positions": 64, "downsample_hidden_size": 16,
            }  # fmt: skip
            moe = text | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
            vision = {
                "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64,
                "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
            }  # fmt: skip
            return t.Qwen3OmniMoeThinkerForConditionalGeneration, t.Qwen3OmniMoeThinkerConfig(
                text_config=moe, vision_config=vision, audio_config=audio
            )
        case "vision-language":
            vision = t.CLIPVisionConfig(
                hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16,
                patch_size=8, projection_dim=32,
            )  # fmt: skip
            config = t.LlavaConfig(
                vision_config=vision,
                text_config=t.LlamaConfig(**text),
                image_token_index=95,
                vision_feature_layer=-1,
            )
            return t.LlavaForConditionalGeneration, config
    raise ValueError(kind)


SEEDS = {"llama4": 2, "hy-v4": 1}
"""Where with seed 0 float rounding tips a code over in the first attention, and everything after follows."""


def build(kind: str, seed: int | None = None) -> nn.Module:
    """A seeded float32 model of an architecture, its norms and biases away from 1 and 0."""
    cls, config = tiny(kind)
    seed = SEEDS.get(kind, 0) if seed is None else seed
    torch.manual_seed(seed)
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(kind: str, batch: int = 2, length: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 90, (batch, length), generator=generator)
    if kind != "vision-language":
        return {"input_ids": ids}
    ids[:, 1:5] = 95  # four patches of 8×8 in an image of 16×16
    return {"input_ids": ids, "pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    out = model(**batch)
    return out.last_hidden_state if hasattr(out, "last_hidden_state") else out.logits
