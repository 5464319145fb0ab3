"""Names by which vLLM asks for the scheme of a module, where they are others than those on disk.

It translates names of a config as it does those of tensors, but gives some modules names that no tensor has, and does
not translate patterns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Match = re.Match[str]
Step = tuple[str, "str | Callable[[Match, Mapping[str, Any]], str]"]
"""A pattern, and what is in its place in the other name, also of the match and of config.json."""

_STEPS: tuple[Step, ...] = (
    (r"\.mamba\.", ".mixer."),  # Granite 4 and Bamba
    (r"\.conv\.(?=(in|out)_proj$)", ".short_conv."),  # LFM2
    (r"\.block_sparse_moe\.", ".mlp."),  # MiniMax-M2
    (r"\.attn\.qkv$", ".attn.qkv_proj"),  # in the towers of GLM-4.1V and 4.5V (SGLang in all towers)
    (r"\.attention\.self\.(?=(query|key|value)$)", ".attention.output."),  # BERT and its like
    (r"^fc$", "model.fc"),  # EAGLE
    (r"^roberta\.(?=encoder\.)", "bert."),
    # Of a model without a head, which it runs as one with a head.
    (r"^(?=layers\.\d+\.(self_attn|mlp)\.)", "model."),
)
_LAYER = r"(model\.)layers\.(\d+)\.(.+)"


# These two have one number for each attention and each Mamba layer: those of the Mambas follow on the others.
def _in_falcon_h1(found: Match, config: Mapping[str, Any]) -> str:
    before, layer, rest = found.groups()
    if not rest.startswith("mamba."):
        return found[0].replace(".self_attn.", ".")
    number = config.get("num_hidden_layers", 0) + int(layer)
    return f"{before}{number}." + rest.replace("mamba.", "mixer.")


def _in_zamba2(found: Match, config: Mapping[str, Any]) -> str:
    before, layer, rest = found.groups()
    if rest.startswith("shared_transformer."):
        rest = rest.removeprefix("shared_transformer.").removeprefix("self_attn.")
        return before + re.sub(r"(_adapter_list\.\d+)\.([01])$", lambda m: f"{m[1]}.{'AB'[int(m[2])]}", rest)
    number = len(config.get("hybrid_layer_ids", ())) + int(layer)
    return f"{number}." + rest.removeprefix("mamba_decoder.").replace("mamba.", "mixer.")


_IN_ROPE_BERT = {
    "attn.Wqkv": "attention.qkv_proj", "attn.out_proj": "attention.dense", "attention.o_proj": "attention.dense",
    "mlp.fc11": "mlp.gate_up_proj", "mlp.fc12": "mlp.gate_up_proj", "mlp.up_gate_proj": "mlp.gate_up_proj",
    "mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj",
}  # fmt: skip


def _in_rope_bert(found: Match, config: Mapping[str, Any]) -> str:
    layer, rest = found.groups()
    return f".encoder.layer.{layer}.{_IN_ROPE_BERT.get(rest, rest)}"


def _behind_the_last(found: Match, config: Mapping[str, Any]) -> str:
    return f"model.layers.{config.get('num_hidden_layers', 0) + int(found[1])}."


_ROPE_BERT: tuple[Step, ...] = ((r"^(?:.*\.)?encoder\.layers?\.(\d+)\.(.+)$", _in_rope_bert),)
_GPT_OSS: tuple[Step, ...] = ((r"\.self_attn\.", ".attn."),)
_STEPS_OF: dict[str, tuple[Step, ...]] = {
    "falcon_h1": ((rf"^{_LAYER}$", _in_falcon_h1),),
    "zamba2": ((rf"^{_LAYER}$", _in_zamba2),),
    # As transformers 5 saves it, by its classes' names; vLLM has the published one's own.
    "phimoe": ((r"\.block_sparse_moe\.gate$", ".mlp.router"), (r"\.block_sparse_moe\.", ".mlp.")),
    "gpt_oss": _GPT_OSS,
    "openai_privacy_filter": _GPT_OSS,
    "ernie4_5_moe": ((r"^model\.mtp_block\.(\d+)\.", _behind_the_last),),
    "bailing_hybrid": ((r"\.attention\.", ".self_attn."),),  # Ling 3; not 2.5
    "mimo": ((r"^model\.mtp_layers\.(\d+)\.", _behind_the_last),),
    "hrm_text": ((r"\.attn\.", ".self_attn."),),
    "beam": ((r"\.self_attn\.gate_proj$", ".self_attn.output_gate_proj"),),
    "blip-2": ((r"^vision_model(?=\.encoder\.)", ""),),  # what is in the tower, without the tower's name
    "exaone": (
        (r"^transformer\.(?=h\.)", "model."),
        (r"^model\.(h\.\d+)\.attn\.attention\.", r"transformer.\1.self_attn."),  # SGLang's
    ),
    "whisper": (
        (r"^model\.(encoder|decoder)\.layers\.(\d+)\.", r".\1.layers.\2.layers."),
        (r"(?<=\.)(?=fc\d$)", "mlp."),
        (r"\.encoder_attn\.[kv]_proj$", ".encoder_attn.kv_proj"),
    ),
    "gemma3_text": ((r"^(?=layers\.)", "."),),  # EmbeddingGemma
    "modernbert": (
        (r"^(?:model\.)?(?=layers\.)", ".encoder_layer."),
        (r"^(?=\.encoder_layer\.)", "modernbert"),
    ),
    **dict.fromkeys(("nomic_bert", "new", "gte"), _ROPE_BERT),
}
"""model_type → its own steps, in place of those for all others."""

_UNNAMED = re.compile(r"score\.\d+")


def unnamed(modules: Iterable[str]) -> list[str]:
    """Those that vLLM asks for without any name: both layers of the head of Qwen2.5's reward models."""
    return [m for m in modules if _UNNAMED.fullmatch(m)]


def as_asked(modules: Iterable[str], config: Mapping[str, Any]) -> list[str]:
    """Module names, each followed by those by which vLLM asks for its scheme, where there are others.

    `config`: the model's config.json.
    """
    found: dict[str, None] = {}
    # Compiled, since a trillion parameters have a hundred thousand modules.
    steps = [
        (re.compile(pattern), other if isinstance(other, str) else lambda match, to=other: to(match, config))
        for pattern, other in _STEPS_OF.get(config.get("model_type", ""), _STEPS)
    ]
    for module in modules:
        found[module], name = None, module
        for pattern, new in steps:
            name = pattern.sub(new, name)
            found[name] = None
    return list(found)
