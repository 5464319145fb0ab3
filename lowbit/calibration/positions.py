"""How long a text a model can read: past that, rotations that it never saw make nonsense, and no error."""

from __future__ import annotations

from typing import Any

from torch import nn


def longest_text(base: nn.Module, config: Any) -> int | None:
    """The most tokens that a model was made for; None where its positions have no such end, or end in an error.

    Only rotary positions go on in silence. Learned ones are looked up in a table; Mamba has none, nor have Jamba and
    some of Granite's, although their config may name a largest one. A scaled rotary embedding reaches further:
    config.json may name the length before scaling, or that after.
    """
    named = getattr(config, "max_position_embeddings", None)
    if not isinstance(named, int) or not any("Rotary" in type(m).__name__ for m in base.modules()):
        return None
    found = getattr(config, "rope_parameters", None) or {}
    # One, or one per kind of layer.
    kinds = [found, *(value for value in found.values() if isinstance(value, dict))]
    scaled = ((k.get("original_max_position_embeddings") or named) * (k.get("factor") or 1) for k in kinds)
    return max(named, *map(int, scaled))
