"""A Llama's checkpoint as a GGUF file whose matrices are Q8_0, for llama.cpp to run beside lowbit.

For checkpoints without a tokenizer: its vocabulary holds names of tokens that mean nothing. Names, the order of rows of
q_proj and k_proj (pairs of the rotary embedding lie side by side) and keys are those of llama.cpp's own converter.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, TokenType
from safetensors import safe_open

_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip


def write_gguf(checkpoint: Path, file: Path) -> None:
    """`checkpoint`: a directory with one model.safetensors of a Llama in float."""
    config = json.loads((checkpoint / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    _add_vocabulary(writer, config["vocab_size"])
    with safe_open(checkpoint / "model.safetensors", "pt") as tensors:
        names = tensors.keys()
        for name in names:
            weight = tensors.get_tensor(name).to(torch.float32).numpy()
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight = _pairs(weight, heads if "q_proj" in name else kv_heads)
            if weight.ndim == 1:
                writer.add_tensor(_name(name), weight)
            else:
                codes = gguf.quants.quantize(weight, GGMLQuantizationType.Q8_0)
                writer.add_tensor(_name(name), codes, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """SentencePiece's three special tokens and its bytes, then names."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    tokens += [f"token{i}" for i in range(len(tokens), size)]
    types += [TokenType.NORMAL] * (size - len(types))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(size)])
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` → `blk.3.ffn_up.weight`."""
    module = name.removesuffix(".weight")
    if not module.startswith("model.layers."):
        return f"{_NAMES[module]}.weight"
    index, _, inner = module.removeprefix("model.layers.").partition(".")
    return f"blk.{index}.{_NAMES[inner]}.weight"


def _pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of the two halves of each head, in turn."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
