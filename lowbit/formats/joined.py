"""Names that engines give to what they build of several modules.

vLLM looks for the members' names where a config has not the joined one, but up to 0.23, with vLLM-Ascend, only after
what the config's class names (`Linear`) say. SGLang looks for them only for some models; for the others, and for
experts that are called w1, w2 and w3, it takes what the class names say.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Latent attention's by vLLM, then by SGLang.
_LATENT = ("fused_qkv_a_proj", "fused_qkv_a_proj_with_mqa")
_JOINED = {
    "q_proj": ("qkv_proj",), "k_proj": ("qkv_proj",), "v_proj": ("qkv_proj",),
    "gate_proj": ("gate_up_proj",), "up_proj": ("gate_up_proj",),
    "q_a_proj": _LATENT, "kv_a_proj_with_mqa": _LATENT,
    "in_proj_qkv": ("in_proj_qkvz",), "in_proj_z": ("in_proj_qkvz",),
    "in_proj_b": ("in_proj_ba",), "in_proj_a": ("in_proj_ba",),
}  # fmt: skip
EXPERT = re.compile(r"(.*\.experts)\.\d+\.")
"""The start of a name of one expert's; the group is the module of all."""
# Engines ask for experts by the names of their members, and SGLang always by these.
_OF_EXPERTS = {"w1": ("gate_proj",), "w3": ("up_proj",), "w2": ("down_proj",)}
# Gemma 4 has experts beside its MLP; engines put them below a module of their own.
_BESIDE = re.compile(r"(layers\.\d+)\.(experts\.\d+\.)")


# What vLLM has in place of a part of a name when it asks for a scheme: in Granite 4, Falcon-H1, Jamba and Zamba 2; and
# in MiniMax-M2.
_ASKED = {".mamba.": ".mixer.", ".block_sparse_moe.": ".mlp."}


def as_asked(modules: Iterable[str]) -> list[str]:
    """Module names, each followed by the other one by which vLLM asks for its scheme, where there is one."""
    found: dict[str, None] = {}
    for module in modules:
        other = module
        for ours, theirs in _ASKED.items():
            other = other.replace(ours, theirs)
        found |= {module: None, other: None}
    return list(found)


def with_joined(modules: Iterable[str]) -> list[str]:
    """Module names, then those that engines have for them or for the modules they join them into, each once; all
    `as_asked`."""
    names = dict.fromkeys(as_asked(modules))
    for module in list(names):
        parent, _, last = module.rpartition(".")
        renamed = _OF_EXPERTS if EXPERT.match(module) else _JOINED
        names |= {f"{parent}.{name}": None for name in renamed.get(last, ())}
        if _BESIDE.search(module):
            names[_BESIDE.sub(r"\1.moe.\2", module)] = None
    return list(names)
