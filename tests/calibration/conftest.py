"""Tiny seeded models of several architectures, written as checkpoints once per session."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    Gemma2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

# The test of several workers shares `worker`; pytest's importlib mode puts no test directory on the path.
sys.path.insert(0, str(Path(__file__).parent))

TEXT = "the quick brown fox jumps over the lazy dog and then some more words follow it home again " * 60
COMMON = {
    "vocab_size": 128, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 16,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
CONFIGS = {
    "llama": lambda: LlamaConfig(**COMMON, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**{k: v for k, v in COMMON.items() if k != "head_dim"}),
    "qwen3": lambda: Qwen3Config(**COMMON),
    "qwen3_moe": lambda: Qwen3MoeConfig(**COMMON, **MOE),
    "mixtral": lambda: MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
    "gemma2": lambda: Gemma2Config(**COMMON, query_pre_attn_scalar=16),
}


def build(name: str, seed: int = 0) -> torch.nn.Module:
    """A float32 model whose norms, biases and channel sizes are not trivial."""
    torch.manual_seed(seed)
    model = Auto.from_config(CONFIGS[name](), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if "norm" in parameter_name:
                p.copy_(torch.rand(p.shape, generator=generator) + (0.5 if "gemma" not in name else -0.5))
            elif p.dim() == 1:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
            else:
                p.mul_(3.0)
                p.mul_(torch.exp(0.5 * torch.randn(p.shape[-1], generator=generator)))
    return model


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    found = {}
    for name in CONFIGS:
        build(name).save_pretrained(root / name)
        found[name] = root / name
    return found


@pytest.fixture(scope="session")
def windows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return list(torch.randint(0, 128, (12, 48), generator=generator))


@pytest.fixture(scope="session")
def source(checkpoints, tmp_path_factory) -> Path:
    """The Llama with a tokenizer; `text.txt` lies beside it."""
    out = tmp_path_factory.mktemp("cli") / "model"
    shutil.copytree(checkpoints["llama"], out)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>"]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(out)
    (out.parent / "text.txt").write_text(TEXT)
    return out
