"""What an operation is given, in the terms that every implementation shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

ActivationKind = Literal["none", "token", "group", "tensor"]


def inner_block(block: tuple[int, int], k: int) -> tuple[int, int] | None:
    """The block whose scales a kernel applies within its sum; None for one per channel or tensor, which can wait.

    Also where all of K is in one block: its scale is shared by rows, and not one of each.
    """
    return block if block[1] and (block[0] > 1 or block[1] < k) else None


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A quantized weight as stored."""

    tensor: Tensor
    """int8 or float8_e4m3fn [(E,) N, K], or int32 [N, ⌈K/4⌉]: four int8 codes plus 128 each."""
    scale: Tensor
    """float32 (or E8M0 bytes as uint8), shaped as `lowbit.granularity.scale_shape` says."""
    block: tuple[int, int]
    """Rows and columns that share a scale; 0 stands for all of them."""
    k: int

    @property
    def n(self) -> int:
        return self.tensor.shape[-2]

    @property
    def group(self) -> int:
        """Elements along K per scale; 0: one scale for all of K."""
        return within(self.block[1], self.k)

    @property
    def inner_block(self) -> tuple[int, int] | None:
        """`inner_block` of this weight."""
        return inner_block(self.block, self.k)

    @property
    def exponents(self) -> bool:
        """Whether scales are E8M0: exponents of two."""
        return self.scale.dtype in (torch.uint8, torch.float8_e8m0fnu)

    def float_scale(self) -> Tensor:
        """float32, contiguous."""
        scale = self.scale
        if scale.dtype == torch.uint8:
            scale = scale.view(torch.float8_e8m0fnu)
        return scale.to(torch.float32).contiguous()

    def scale_strides(self, scale: Tensor) -> tuple[int, int, int]:
        """(per row of scales, per group along K, per expert), in elements of `scale`."""
        per_expert = scale.stride(0) if self.tensor.dim() == 3 else 0
        if not self.block[0]:
            return 0, 0, per_expert
        return scale.shape[-1], 1 if self.group else 0, per_expert


@dataclass(frozen=True, kw_only=True)
class Activations:
    """How activations are quantized on the way in."""

    kind: ActivationKind
    """`none`: not at all · `token`: dynamic, a scale per row · `group`: dynamic, a scale per
    row and `group` elements · `tensor`: static, one given scale."""
    group: int = 0
    """Elements per scale along K; 0: the whole row."""
    scale: Tensor | None = None
    """Static: float32 [1], or [E, 1] of experts. For inputs that are codes already: [M, groups] or [1]."""
    zero: Tensor | None = None
    """Static and asymmetric: int8 [1], x ≈ (code − zero) · scale."""
    power_of_2: bool = False
    """Dynamic scales are rounded up to a power of two (MX)."""

    @property
    def dynamic(self) -> bool:
        return self.kind in ("token", "group")

    @cached_property
    def zero_point(self) -> int:
        """The zero point as a number (reads it from the device)."""
        return 0 if self.zero is None else int(self.zero.reshape(-1)[0])

    def static_scale(self) -> Tensor:
        if self.scale is None:
            raise ValueError("expected input_scale [1] with static activations, found none")
        return self.scale.to(torch.float32).reshape(1)


def within(group: int, k: int) -> int:
    """Elements per scale along K; 0 where one scale spans all of it: a row's, which any length may have."""
    return group if group < k else 0


def quantized_as(
    kind: str, block: Sequence[int], k: int, scale: Tensor | None = None, zero: Tensor | None = None
) -> Activations:
    """The `activations` argument of an operation on [M, K], taken apart."""
    power_of_2 = kind == "group_pow2"
    plain: ActivationKind = "group" if power_of_2 else kind  # type: ignore[assignment]
    group = within(block[1], k) if plain == "group" else 0
    return Activations(kind=plain, group=group, scale=scale, zero=zero, power_of_2=power_of_2)
