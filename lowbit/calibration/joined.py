"""Tensors that a checkpoint has apart and transformers joins while loading, beside experts (see `experts`).

Convolutions of q, k and v (Kimi-Linear, OLMo hybrid, Ling 3) are joined here too. Linear layers (MiniMax-M3's
gate and up) stay apart, since each is quantized under its own name: `SplitLinear` takes the joined one's place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class SplitLinear(nn.ModuleDict):
    """Linear layers of one input whose outputs lie side by side, in the order of the joined one's rows."""

    def __init__(self, joined: nn.Linear, rows: Mapping[str, int]) -> None:
        """Empty ones on the device of `joined`, without biases; `rows`: name → height."""
        device, dtype = joined.weight.device, joined.weight.dtype
        super().__init__(
            {
                n: nn.Linear(joined.in_features, r, bias=False, device=device, dtype=dtype)
                for n, r in rows.items()
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """[…, K] → […, N], N the sum of all rows."""
        return torch.cat([part(x) for part in self.values()], dim=-1)


def converter_of(name: str, converters: Sequence[Any]) -> tuple[Any, str, str] | None:
    """(transformers' converter that takes a tensor, what it makes of it, the pattern by which); None for none."""
    for converter in converters:
        target, pattern = converter.rename_source_key(name)
        if pattern is not None:
            return converter, target, pattern
    return None


def joined_along(converter: Any) -> int | None:
    """The dim along which a converter joins tensors, where that is all that it does."""
    from transformers.core_model_loading import Concatenate

    operations = converter.operations
    return operations[0].dim if len(operations) == 1 and isinstance(operations[0], Concatenate) else None


def part_name(tensor: str) -> str:
    """What a part is called within its `SplitLinear`: of `….mlp.gate_proj.weight`, `gate_proj`."""
    return tensor.split(".")[-2]
