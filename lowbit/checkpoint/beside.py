"""Tensors that a quantized source has beside codes and their scales, by name."""

from __future__ import annotations

import re

BESIDE_CODES = (
    "input_scale",
    "activation_scale",
    "input_scale_ub",
    "input_zero_point",
    "weight_shape",
    "weight_zero_point",
    "weight_scale",
    "weight_scale_2",
    "weight_global_scale",
    "input_scale_2",
    "input_global_scale",
    "weight_offset",
    "input_offset",
    "deq_scale",
    "quant_bias",
)
"""Tensors of a module that belong to its codes, also where they are not read: `activation_scale` is Mistral's,
`input_scale_ub` FBGEMM's, what ends in `_2` or has `global` in it NVFP4's, and msModelSlim may have scales for static
and for dynamic activations."""

_BELOW = r"[qkv]_proj\.(output_scale|kv_cache_(scale|offset))"
OF_ATTENTION = rf"\.(([qkv]|kv|prob|prob_output)_scale|[qkv]_zero_point|{_BELOW})$"
"""Ends of names: see `is_of_attention`."""
_OUTPUT_SCALE = re.compile(r"(.*\.)([qkv])_proj\.(?:output|kv_cache)_scale")


def zero_points_of(name: str) -> str:
    """Zero points in msModelSlim's KV cache → the scales that they belong to, as `name_of_attention` has them; "" of
    other tensors."""
    is_one = name.endswith("_proj.kv_cache_offset")
    return name_of_attention(name.removesuffix("offset") + "scale") if is_one else ""


def is_of_attention(name: str) -> bool:
    """Whether a tensor is a scale or zero point by which attention quantizes queries, or what it caches."""
    return re.search(OF_ATTENTION, name) is not None


def name_of_attention(name: str) -> str:
    """What most engines call such a tensor: AutoFP8 and Quark have `k_proj.output_scale` for `k_scale`, msModelSlim
    `k_proj.kv_cache_scale`."""
    return _OUTPUT_SCALE.sub(r"\1\2_scale", name)
