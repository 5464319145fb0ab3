"""Names that transformers has in memory for modules that have others on disk.

compressed-tensors asks for the scheme of a module by these. Where a config does not name them, what stays in float is
taken for codes, with scales that are made up, and a log is all that says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

Step = tuple[str, tuple[str, ...]]
"""A pattern, and what is in its place: for what is split while it is loaded, in each part."""


def _parts(joined: str, parent: str, *parts: str) -> Step:
    return rf"(?<=\.){joined}$", tuple(f"{parent}.{p}_proj" for p in parts)


_QKV = ("q", "k", "v")
_ENCODER: Step = (r"\bencoder\.(?=layers\.)", ("",))
_DINOV2 = (_parts(r"mlp\.weights_in", "mlp", "gate", "up"), (r"(?<=\.)mlp\.weights_out$", ("mlp.down_proj",)))
_STEPS_OF: dict[str, tuple[Step, ...]] = {
    "nomic_bert": (
        _ENCODER,
        _parts(r"attn\.Wqkv", "self_attn", *_QKV),
        (r"\battn\.out_proj$", ("self_attn.o_proj",)),
        (r"\bfc11$", ("up_proj",)),
        (r"\bfc12$", ("gate_proj",)),
        (r"\bfc2$", ("down_proj",)),
    ),
    "jina_embeddings_v3": (
        _ENCODER,
        _parts(r"mixer\.Wqkv", "self_attn", *_QKV),
        (r"\bmixer\.out_proj$", ("self_attn.o_proj",)),
    ),
    **dict.fromkeys(
        ("gte", "new"),
        (
            (r"^new\.", ("",)),
            (r"\bencoder\.layer(?=\.)", ("layers",)),
            _parts(r"attention\.qkv_proj", "self_attn", *_QKV),
            (r"\battention\.o_proj$", ("self_attn.o_proj",)),
            _parts(r"mlp\.up_gate_proj", "mlp", "up", "gate"),
        ),
    ),
    "molmo2": (
        (r"(?<=^model\.)transformer\.blocks(?=\.)", ("language_model.layers",)),
        _parts(r"self_attn\.att_proj", "self_attn", *_QKV),
        (r"\bself_attn\.attn_out$", ("self_attn.o_proj",)),
        _parts(r"mlp\.ff_proj", "mlp", "up", "gate"),
        (r"\bmlp\.ff_out$", ("mlp.down_proj",)),
        (r"(?<=^model\.)vision_backbone\.image_vit(?=\.)", ("vision_tower",)),
        (r"(?<=^model\.)vision_backbone(?=\.)", ("multi_modal_projector",)),
    ),
    "radio": (
        (r"^radio_model\.model\.patch_generator\.embedder$", ("embeddings.patch_projection",)),
        (r"^radio_model\.model\.blocks(?=\.)", ("encoder.layer",)),
        _parts(r"attn\.qkv", "attention", *_QKV),
        (r"\battn\.proj$", ("attention.o_proj",)),
    ),
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    "hrm_text": (
        _parts(r"attn\.gqkv_proj", "self_attn", "gate", *_QKV),
        (r"\battn\.o_proj$", ("self_attn.o_proj",)),
        _parts(r"mlp\.gate_up_proj", "mlp", "gate", "up"),
    ),
}
"""model_type → its steps, one after the other."""


def with_names_in_memory(modules: Iterable[str], config: Mapping[str, Any]) -> list[str]:
    """Module names, each followed by those that transformers has for it, where there are others, each once.

    `config`: the model's config.json.
    """
    steps = [(re.compile(p), others) for p, others in _STEPS_OF.get(str(config.get("model_type")), ())]
    found: dict[str, None] = {}
    for module in modules:
        names = [module]
        for pattern, others in steps:
            names = [pattern.sub(other, name) for name in names for other in others]
        found |= dict.fromkeys((module, *names))
    return list(found)
