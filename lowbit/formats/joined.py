"""Names that engines give to what they build of several modules.

vLLM looks for the members' names where a config has not the joined one, but up to 0.23, with vLLM-Ascend, only after
what the config's class names (`Linear`) say. SGLang looks for them only for some models; for the others, and for
experts that are called w1, w2 and w3, it takes what the class names say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

# Latent attention's by vLLM, then by SGLang.
_LATENT = ("fused_qkv_a_proj", "fused_qkv_a_proj_with_mqa")
_JOINED = {
    "q_proj": ("qkv_proj",), "k_proj": ("qkv_proj",), "v_proj": ("qkv_proj",),
    "query": ("qkv_proj",), "key": ("qkv_proj",), "value": ("qkv_proj",),
    "q": ("qkv",), "k": ("qkv",), "v": ("qkv",),  # the tower of Qwen2.5-Omni
    "gate_proj": ("gate_up_proj",), "up_proj": ("gate_up_proj",),
    "c_fc_0": ("gate_up_proj",), "c_fc_1": ("gate_up_proj",),
    "fc11": ("gate_up_proj",), "fc12": ("gate_up_proj",),
    "q_a_proj": _LATENT, "kv_a_proj_with_mqa": _LATENT,
    "in_proj_qkv": ("in_proj_qkvz",), "in_proj_z": ("in_proj_qkvz",),
    "in_proj_b": ("in_proj_ba",), "in_proj_a": ("in_proj_ba",),
}  # fmt: skip
EXPERT = re.compile(r"(.*\.experts)\.\d+\.")
"""The start of a name of one expert's; the group is the module of all."""
# From the layers on, since engines have other names before them.
_EXPERTS = re.compile(r"(?:.*\.(?=layers\.))?(.*\bexperts)$")
# Engines ask for experts by the names of their members, and SGLang always by these.
_OF_EXPERTS = {"w1": ("gate_proj",), "w3": ("up_proj",), "w2": ("down_proj",)}
# Gemma 4 has experts beside its MLP; engines put them below a module of their own.
_BESIDE = re.compile(r"(layers\.\d+)\.(experts(?:\.\d+\.|$))")


# What vLLM has in place of a part of a name when it asks for a scheme: in Granite 4 and Bamba; in LFM2; in MiniMax-M2;
# in the towers of GLM-4.1V and 4.5V (SGLang in all towers); in BERT and its like.
_ASKED = (
    (re.compile(r"\.mamba\."), ".mixer."),
    (re.compile(r"\.conv\.(?=(in|out)_proj$)"), ".short_conv."),
    (re.compile(r"\.block_sparse_moe\."), ".mlp."),
    (re.compile(r"\.attn\.qkv$"), ".attn.qkv_proj"),
    (re.compile(r"\.attention\.self\.(?=(query|key|value)$)"), ".attention.output."),
    (re.compile(r"^roberta\.(?=encoder\.)"), "bert."),
)
_LAYER = re.compile(r"(model\.)layers\.(\d+)\.(.+)")


# These two have one number for each attention and each Mamba layer: those of the Mambas follow on the others.
def _in_falcon_h1(found: re.Match[str], config: Mapping[str, Any]) -> str:
    before, layer, rest = found.groups()
    if not rest.startswith("mamba."):
        return found[0].replace(".self_attn.", ".")
    number = config.get("num_hidden_layers", 0) + int(layer)
    return f"{before}{number}." + rest.replace("mamba.", "mixer.")


def _in_zamba2(found: re.Match[str], config: Mapping[str, Any]) -> str:
    before, layer, rest = found.groups()
    if rest.startswith("shared_transformer."):
        rest = rest.removeprefix("shared_transformer.").removeprefix("self_attn.")
        return before + re.sub(r"(_adapter_list\.\d+)\.([01])$", lambda m: f"{m[1]}.{'AB'[int(m[2])]}", rest)
    number = len(config.get("hybrid_layer_ids", ())) + int(layer)
    return f"{number}." + rest.removeprefix("mamba_decoder.").replace("mamba.", "mixer.")


def _in_phimoe(found: re.Match[str], config: Mapping[str, Any]) -> str:
    # As transformers 5 saves it, by its classes' names; vLLM has the published one's own.
    return found[0].replace(".block_sparse_moe.gate", ".mlp.router").replace(".block_sparse_moe.", ".mlp.")


def _in_blip2(found: re.Match[str], config: Mapping[str, Any]) -> str:
    # vLLM gives what is in this tower names without the tower's.
    return found[1]


_IN_ROPE_BERT = {
    "attn.Wqkv": "attention.qkv_proj", "attn.out_proj": "attention.dense", "attention.o_proj": "attention.dense",
    "mlp.fc11": "mlp.gate_up_proj", "mlp.fc12": "mlp.gate_up_proj", "mlp.up_gate_proj": "mlp.gate_up_proj",
    "mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj",
}  # fmt: skip


def _in_rope_bert(found: re.Match[str], config: Mapping[str, Any]) -> str:
    layer, rest = found.groups()
    return f".encoder.layer.{layer}.{_IN_ROPE_BERT.get(rest, rest)}"


_ROPE_BERT = re.compile(r"(?:.*\.)?encoder\.layers?\.(\d+)\.(.+)")

_ASKED_OF: dict[str, tuple[re.Pattern[str], Callable[[re.Match[str], Mapping[str, Any]], str]]] = {
    "falcon_h1": (_LAYER, _in_falcon_h1),
    "zamba2": (_LAYER, _in_zamba2),
    "phimoe": (_LAYER, _in_phimoe),
    "blip-2": (re.compile(r"vision_model(\.encoder\..+)"), _in_blip2),
    **dict.fromkeys(("nomic_bert", "new", "gte"), (_ROPE_BERT, _in_rope_bert)),
}


def as_asked(modules: Iterable[str], config: Mapping[str, Any]) -> list[str]:
    """Module names, each followed by the others by which vLLM asks for its scheme, where there are some.

    `config`: the model's config.json.
    """
    found: dict[str, None] = {}
    own = _ASKED_OF.get(config.get("model_type", ""))
    for module in modules:
        found[module] = None
        if own is None:
            other = module
            for ours, theirs in _ASKED:
                other = ours.sub(theirs, other)
                found[other] = None
        elif match := own[0].fullmatch(module):
            found[own[1](match, config)] = None
    return list(found)


def first_experts(modules: Iterable[str]) -> list[str]:
    """A pattern for each module of experts that are one tensor on disk: engines ask for the projections of the first.

    vLLM translates names as it does those of the tensors, and so makes something else of gpt-oss's; not so patterns.
    """
    found = (_EXPERTS.match(module) for module in modules)
    return [rf"re:.*\b{re.escape(match[1])}\.0\.(gate|up|down)_proj$" for match in found if match]


def with_joined(modules: Iterable[str], config: Mapping[str, Any]) -> list[str]:
    """Module names, then those that engines have for them or for the modules they join them into, each once; all
    `as_asked`."""
    names = dict.fromkeys(as_asked(modules, config))
    for module in list(names):
        parent, _, last = module.rpartition(".")
        renamed = _OF_EXPERTS if EXPERT.match(module) else _JOINED
        names |= {f"{parent}.{name}": None for name in renamed.get(last, ())}
        if _BESIDE.search(module):
            names[_BESIDE.sub(r"\1.moe.\2", module)] = None
    return list(names)
