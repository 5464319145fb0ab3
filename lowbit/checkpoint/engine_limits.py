"""What engines do not load of some models, however it is written: a conversion says so before the work."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lowbit.scheme import Scheme

_MAMBA = (
    "vLLM builds Mamba's layers in float whatever config.json says, and refuses codes; serve the result with "
    "transformers, or run it with lowbit"
)
_OF_ANY = {
    "gpt_oss": "SGLang builds gpt-oss's attention in float whatever config.json says, and would take codes for "
    "weights; serve the result with vLLM or transformers",
    "mamba": _MAMBA,
    "falcon_mamba": _MAMBA,
}
_BLOCKS_OF = {
    "mistral3": "vLLM's Mistral 3 looks for other names of scales than this format has, and refuses blocks; "
    "leave --format fp8 out",
}
_GROUPS_OF = dict.fromkeys(
    ("bloom", "telechat"),
    "vLLM rearranges the rows of this model's attention while loading, and refuses weight-only codes; "
    "serve the result with transformers, or take int8",
)


def engine_limits(config: Mapping[str, Any], format: str, schemes: Collection[Scheme]) -> list[str]:
    """Warnings for what is to be quantized to `schemes` in a format, by the model's config.json; [] mostly."""
    if not schemes:
        return []
    kind = str(config.get("model_type"))
    found = [_OF_ANY.get(kind)]
    if format == "fp8":
        found.append(_BLOCKS_OF.get(kind))
    if any(s.activations is None for s in schemes) and format == "compressed-tensors":
        found.append(_GROUPS_OF.get(kind))
    return [warning for warning in found if warning]
