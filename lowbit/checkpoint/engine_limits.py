"""What engines do not load of some models, however it is written: a conversion says so before the work."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from lowbit.checkpoint.jobs import Job
from lowbit.checkpoint.roles import role_of
from lowbit.granularity import PerBlock
from lowbit.scheme import Scheme

_MAMBA = (
    "vLLM builds Mamba's layers in float whatever config.json says, and refuses codes; serve the result with "
    "transformers, or run it with lowbit"
)
# Where SGLang takes codes for weights without a word.
_IN_SGLANG = (
    "SGLang builds {0} in float whatever config.json says, and would take codes for weights; serve the result with "
    "vLLM or transformers"
)
_OF_ANY = {
    "gpt_oss": _IN_SGLANG.format("gpt-oss's attention"),
    "whisper": _IN_SGLANG.format("Whisper's MLPs"),
    "muse_spark": (
        "vLLM's Muse Spark takes no codes but ModelOpt's NVFP4, on AMD Quark's; run the result with lowbit, or with "
        "transformers after lowbit.register()"
    ),
    "mamba": _MAMBA,
    "falcon_mamba": _MAMBA,
}
_LLAMA = (
    "SGLang's class for this model drops the scales of this format; leave --format out for it, or serve the result "
    "with vLLM or transformers"
)
_BLOCKS_OF = {
    **dict.fromkeys(("llama", "mistral", "ministral3", "phi3"), _LLAMA),
    "mistral3": "vLLM's and SGLang's Mistral 3 look for other names of scales than this format has; leave --format out",
}
_FP8_OF = {
    "minimax_m3_vl": "vLLM's MiniMax-M3 takes this format's scales for those of MXFP8, and drops them without a word; "
    "leave --format out",
}
_GROUPS_OF = dict.fromkeys(
    ("bloom", "telechat"),
    "vLLM rearranges the rows of this model's attention while loading, and refuses weight-only codes; "
    "serve the result with transformers, or take int8",
)
_DORY = (
    "vLLM's Dory wants as many rows of scales as the weight has, and refuses blocks and weight-only codes; "
    "take int8, fp8 or mxfp8"
)
# Whose `load_weights` vLLM-Ascend 0.23 patches.
_INT8_CACHE = ("qwen3", "glm4_moe", "minimax_m2")
_ONLY_INT8_CACHE = (
    "vLLM-Ascend loads scales of an INT8 KV cache of Qwen3, GLM-4.5 and MiniMax-M2 alone; other models it refuses, or "
    "runs with scales of 1 without a word (Qwen3-MoE): calibrate without --kv-cache, unless your engine loads them"
)


def _in_blocks(scheme: Scheme) -> bool:
    return scheme.weights is not None and isinstance(scheme.weights.granularity, PerBlock)


def experts_in_float(jobs: Collection[Job]) -> list[str]:
    """A warning of experts that the source has in FP4 and a checkpoint of 8 bits has in float; [] for none."""
    turned = [out for job in jobs if job.kind == "turn" for out in job.outputs.values()]
    if not turned:
        return []
    share = sum(t.nbytes for t in turned) / sum(t.nbytes for job in jobs for t in job.outputs.values())
    return [
        f"{len(turned)} tensors of experts (first: {turned[0].name}), {share:.0%} of what is written, become "
        f"{turned[0].dtype}: no engine reads their layout in 8 bits; where yours runs their FP4, serve the source"
    ]


def engine_limits(
    config: Mapping[str, Any],
    format: str,
    modules: Mapping[str, Scheme],
    shapes: Callable[[str], tuple[int, ...]],
    tensors: Collection[str] = (),
) -> list[str]:
    """Warnings for what is to be quantized in a format, by the model's config.json; [] mostly.

    `modules`: name → scheme; `shapes`: name → [N, K]; `tensors`: all that is written.
    """
    schemes = set(modules.values())
    if not schemes:
        return []
    kind = str(config.get("model_type"))
    found = [_OF_ANY.get(kind)]
    if kind not in _INT8_CACHE and any(name.endswith(".kv_cache_scale") for name in tensors):
        found.append(_ONLY_INT8_CACHE)
    if format in ("fp8", "sglang"):
        found.append(_BLOCKS_OF.get(kind))
    if format == "fp8":
        found.append(_FP8_OF.get(kind))
    if any(s.activations is None for s in schemes) and format == "compressed-tensors":
        found.append(_GROUPS_OF.get(kind))
    if kind == "dory" and any(s.activations is None or _in_blocks(s) for s in schemes):
        found.append(_DORY)
    ragged = [m for m in modules if shapes(m)[0] % 128] if format == "fp8" else []
    if ragged:
        # It takes rows over rows of scales for the size of a block: 960 over 8, 120.
        found.append(
            f"transformers without a GPU refuses or misreads {len(ragged)} weights whose rows end within a block "
            f"(first: {ragged[0]}, {shapes(ragged[0])[0]} rows); call lowbit.register() before it loads them there, "
            "or leave --format out"
        )
    routers = [m for m in modules if role_of(m, shapes(m), config)[0] == "router"]
    if routers:
        found.append(
            f"{len(routers)} routers are to be quantized (first: {routers[0]}), which most engines build in float and "
            "do not load so, nor lowbit and transformers where they are no Linear in the model's code; leave them out "
            "of the overrides, unless your engine is known to load them"
        )
    return [warning for warning in found if warning]
