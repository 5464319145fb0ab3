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


def part_of(name: str, converters: Sequence[Any]) -> tuple[str, int, int] | None:
    """(the tensor that it is joined to, its place there, dim), where joining is all that transformers' tables do."""
    from transformers.core_model_loading import Concatenate

    for converter in converters:
        target, pattern = converter.rename_source_key(name)
        if pattern is not None:
            operations = converter.operations
            if len(operations) != 1 or not isinstance(operations[0], Concatenate):
                return None
            return target, converter.source_patterns.index(pattern), operations[0].dim
    return None


def part_name(tensor: str) -> str:
    """What a part is called within its `SplitLinear`: of `….mlp.gate_proj.weight`, `gate_proj`."""
    return tensor.split(".")[-2]
