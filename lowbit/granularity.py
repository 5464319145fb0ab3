"""Which elements of a tensor share one scale.

A scale tensor has the rank of its tensor (PerTensor: shape [1]), so that it stands beside
the weight on disk exactly as it is used in memory. Edges may be ragged: the last group or
block is simply smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PerTensor:
    """One scale for all elements."""

    def __str__(self) -> str:
        return "per tensor"


@dataclass(frozen=True)
class PerChannel:
    """One scale per row of a weight [N, K], i.e. per output channel."""

    def __str__(self) -> str:
        return "per channel"


@dataclass(frozen=True)
class PerToken:
    """One scale per row of activations […, K], i.e. per token."""

    def __str__(self) -> str:
        return "per token"


@dataclass(frozen=True)
class PerGroup:
    """One scale per `size` consecutive elements along the last dimension."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"expected a group size of at least 1, found {self.size}")

    def __str__(self) -> str:
        return f"per group of {self.size}"


@dataclass(frozen=True)
class PerBlock:
    """One scale per `rows` × `cols` tile of the last two dimensions."""

    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise ValueError(f"expected a block of at least 1×1, found {self.rows}×{self.cols}")

    def __str__(self) -> str:
        return f"per {self.rows}×{self.cols} block"


Granularity: TypeAlias = PerTensor | PerChannel | PerToken | PerGroup | PerBlock


def block_shape(shape: tuple[int, ...], granularity: Granularity) -> tuple[int, int]:
    """(rows, cols) of one scale's tile over the last two dimensions of `shape`.

    Every granularity is a tile: PerChannel is 1×K, PerGroup(g) is 1×g, PerTensor is N×K.
    """
    rows, cols = (shape[-2] if len(shape) > 1 else 1), (shape[-1] if shape else 1)
    match granularity:
        case PerTensor():
            return max(rows, 1), max(cols, 1)
        case PerChannel() | PerToken():
            return 1, max(cols, 1)
        case PerGroup(size):
            return 1, size
        case PerBlock(block_rows, block_cols):
            return block_rows, block_cols
    raise TypeError(f"expected a granularity, found {granularity!r}")


def scale_shape(shape: tuple[int, ...], granularity: Granularity) -> tuple[int, ...]:
    """Shape of the scale tensor that belongs to a tensor of `shape`.

    [N, K] gives [1] per tensor, [N, 1] per channel or token, [N, ⌈K/g⌉] per group and
    [⌈N/r⌉, ⌈K/c⌉] per block; leading dimensions stay. PerBlock needs at least two dimensions.
    """
    if isinstance(granularity, PerTensor):
        return (1,)
    if not shape:
        raise ValueError(f"expected at least one dimension for a scale {granularity}, found a scalar")
    if isinstance(granularity, PerBlock):
        if len(shape) < 2:
            raise ValueError(
                f"expected at least two dimensions for a scale {granularity}, found {list(shape)}"
            )
        return (*shape[:-2], -(-shape[-2] // granularity.rows), -(-shape[-1] // granularity.cols))
    if isinstance(granularity, PerGroup):
        return (*shape[:-1], -(-shape[-1] // granularity.size))
    return (*shape[:-1], 1)


def expand_scale(scale: Tensor, shape: tuple[int, ...], granularity: Granularity) -> Tensor:
    """A scale of `scale_shape(shape, granularity)` → something that broadcasts against `shape`.

    Raises ValueError when the scale has another shape. Per tensor, channel and token it is a
    view; per group and block each scale is repeated over its tile, ragged edges cut off.
    """
    expected = scale_shape(shape, granularity)
    if tuple(scale.shape) != expected:
        raise ValueError(
            f"expected a scale of shape {list(expected)} for a tensor {list(shape)} {granularity}, "
            f"found {list(scale.shape)}"
        )
    if not shape:  # a scalar's result would have the scale's one dimension
        return scale.reshape(())
    if isinstance(granularity, PerGroup | PerBlock):
        rows, cols = block_shape(shape, granularity)
        scale = scale.repeat_interleave(cols, dim=-1)[..., : shape[-1]]
        if rows > 1:
            scale = scale.repeat_interleave(rows, dim=-2)[..., : shape[-2], :]
    return scale


def reduce_tiles(x: Tensor, granularity: Granularity, reduction: str) -> Tensor:
    """Reduce each tile to one value: `reduction` is `amax` or `amin`; result has `scale_shape`.

    NaN propagates. Ragged tiles reduce over the elements that they have. An empty tensor
    gives zeros.
    """
    import torch

    expected = scale_shape(tuple(x.shape), granularity)
    if x.numel() == 0:
        return torch.zeros(expected, dtype=x.dtype, device=x.device)
    reduce = torch.amax if reduction == "amax" else torch.amin
    if isinstance(granularity, PerTensor):
        return reduce(x).reshape(1)
    rows, cols = block_shape(tuple(x.shape), granularity)
    if pad := -x.shape[-1] % cols:
        # Repeating an element of the same tile changes neither its maximum nor its minimum.
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], pad)], dim=-1)
    x = reduce(x.unflatten(-1, (-1, cols)), dim=-1)
    if rows > 1:
        if pad := -x.shape[-2] % rows:
            x = torch.cat([x, x[..., -1:, :].expand(*x.shape[:-2], pad, x.shape[-1])], dim=-2)
        x = reduce(x.unflatten(-2, (-1, rows)), dim=-2)
    return x
