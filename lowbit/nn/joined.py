"""Weights that are one matrix on disk and several in transformers' modules, or the other way round.

Of what transformers joins while loading, the parts stay apart, since each is quantized under its own name:
`SplitLinear` takes the joined layer's place (MiniMax-M3's gate and up). Of what it splits, each module gets its
rows of the codes and scales (`lowbit.nn.row_conversions`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import InputError
from lowbit.granularity import Granularity, PerBlock
from lowbit.nn.stored import float_linear


class SplitLinear(nn.ModuleDict):
    """Linear layers of one input whose outputs lie side by side, in the order of the joined one's rows."""

    @classmethod
    def like(cls, joined: nn.Linear, rows: Mapping[str, int]) -> SplitLinear:
        """Empty float ones on the device of `joined`, without biases; `rows`: name → height."""
        device, dtype = joined.weight.device, joined.weight.dtype
        return cls(
            {
                n: nn.Linear(joined.in_features, r, bias=False, device=device, dtype=dtype)
                for n, r in rows.items()
            }
        )

    def to_linear(self) -> nn.Linear:
        """The joined layer, of parts in float."""
        weights: list[Any] = [part.weight for part in self.values()]
        joined = float_linear(torch.cat(weights).detach(), None)
        return joined.requires_grad_(weights[0].requires_grad).train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """[…, K] → […, N], N the sum of all rows."""
        return torch.cat([part(x) for part in self.values()], dim=-1)


def within_blocks(heights: Sequence[int], granularity: Granularity) -> str:
    """Why a weight cannot be divided after that many rows each, or "": no block's scale is of two parts."""
    ends = list(itertools.accumulate(heights))[:-1]
    if not isinstance(granularity, PerBlock) or not any(end % granularity.rows for end in ends):
        return ""
    return (
        f"transformers splits it after rows {', '.join(map(str, ends))}, within blocks of {granularity.rows}"
    )


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What transformers makes of a checkpoint's tensor while loading."""

    converter: Any
    target: str
    """Name of the first tensor that it becomes, or of the one that it becomes a part of."""
    pattern: str
    """By which of the converter's sources."""

    @property
    def targets(self) -> list[str]:
        """Names of all tensors that it becomes, in order; [] where that is not certain."""
        patterns = self.converter.target_patterns
        before, found, after = self.target.partition(patterns[0])
        return [before + p + after for p in patterns] if found else []

    @property
    def place(self) -> int:
        """Which of the tensors that are joined it is."""
        return self.converter.source_patterns.index(self.pattern)

    def joined(self, tensor: str) -> list[str]:
        """The checkpoint's names of all tensors that are joined, of which `tensor` is one; [] where they are not
        certain."""
        ends = [pattern.replace("\\", "") for pattern in self.converter.source_patterns]
        before = tensor.removesuffix(ends[self.place])
        return [] if before == tensor else [before + end for end in ends]


def absent_part(tensor: str, absent: Sequence[str]) -> InputError:
    """What is wrong where `tensor` is joined with others, of which some are absent."""
    return InputError(
        f"{tensor}: expected {', '.join(absent)} beside it, which transformers joins with it into one matrix, found "
        "no such weight; the checkpoint is incomplete: fetch or convert it again"
    )


def converted_by(name: str, converters: Sequence[Any]) -> Converted | None:
    """What the first of transformers' converters that takes a tensor makes of it; None where none does."""
    for converter in converters:
        target, pattern = converter.rename_source_key(name)
        if pattern is not None:
            return Converted(converter=converter, target=target, pattern=pattern)
    return None


def joined_along(converter: Any) -> int | None:
    """The dim along which a converter joins tensors, where that is all that it does."""
    from transformers.core_model_loading import Concatenate

    return _only(converter, Concatenate)


def split_along(converter: Any) -> int | None:
    """The dim along which a converter splits a tensor, where that is all that it does."""
    from transformers.core_model_loading import Chunk, Split

    return _only(converter, Chunk, Split)


def _only(converter: Any, *kinds: Any) -> int | None:
    operations = converter.operations
    return operations[0].dim if len(operations) == 1 and isinstance(operations[0], kinds) else None
