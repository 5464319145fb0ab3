"""Names that engines give to what they build of several modules.

vLLM looks for the members' names where a config has not the joined one, but up to 0.23, with vLLM-Ascend, only after
what the config's class names (`Linear`) say. SGLang looks for them only for some models; for the others, and for
experts that are called w1, w2 and w3, it takes what the class names say.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lowbit.formats.asked import as_asked
from lowbit.formats.in_memory import with_names_in_memory

# Latent attention's by vLLM, then by SGLang.
_LATENT = ("fused_qkv_a_proj", "fused_qkv_a_proj_with_mqa")
_JOINED = {
    "q_proj": ("qkv_proj",), "k_proj": ("qkv_proj",), "v_proj": ("qkv_proj",),
    "query": ("qkv_proj",), "key": ("qkv_proj",), "value": ("qkv_proj",),
    "q": ("qkv",), "k": ("qkv",), "v": ("qkv",),  # the tower of Qwen2.5-Omni
    "gate_proj": ("gate_up_proj",), "up_proj": ("gate_up_proj",),
    "w1": ("gate_up_proj",), "w3": ("gate_up_proj",), "w2": ("down_proj",),
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


def first_experts(modules: Iterable[str]) -> list[str]:
    """A pattern for each module of experts that are one tensor on disk: engines ask for the projections of the first.

    vLLM translates names as it does those of the tensors, and so makes something else of gpt-oss's; not so patterns.
    """
    found = (_EXPERTS.match(module) for module in modules)
    return [rf"re:.*\b{re.escape(match[1])}\.0\.(gate|up|down)_proj$" for match in found if match]


def with_joined(modules: Iterable[str], config: Mapping[str, Any]) -> list[str]:
    """Module names, then those that engines have for them or for the modules they join them into, each once; all
    `as_asked`, and as transformers has them in memory."""
    modules = list(modules)
    names = dict.fromkeys((*as_asked(modules, config), *with_names_in_memory(modules, config)))
    for module in list(names):
        parent, _, last = module.rpartition(".")
        renamed = _OF_EXPERTS if EXPERT.match(module) else _JOINED
        names |= {f"{parent}.{name}": None for name in renamed.get(last, ())}
        if _BESIDE.search(module):
            names[_BESIDE.sub(r"\1.moe.\2", module)] = None
    return list(names)


_MEMBERS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def with_members(modules: Iterable[str]) -> list[str]:
    """Module names, then those of the parts of what is joined on disk, each once: SGLang's block formats look for these
    alone."""
    names = dict.fromkeys(modules)
    for module in list(names):
        parent, _, last = module.rpartition(".")
        names |= {f"{parent}.{part}": None for part in _MEMBERS.get(last, ())}
    return list(names)
