"""Layers that hold `deq_scale` and `quant_bias` where others have a weight's scale and a bias (format `ascend`).

The engine computes y = (Σ_k xq · Wq + quant_bias) · deq_scale, xq = x / input_scale + offset. Since
quant_bias = round(bias / deq_scale) − offset · Σ_k Wq, and sums of codes are exact, that is

    y = Σ_k (xq − offset) · Wq · deq_scale + b,   b = (quant_bias + offset · Σ_k Wq) · deq_scale

which `ops.linear` computes with a zero point, up to the last rounding in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.quantize import scale_as_float


@dataclass(frozen=True, kw_only=True)
class Operands:
    """What `ops.linear` takes."""

    scale: Tensor
    """Of the weight, float32 [N, 1]."""
    bias: Tensor | None
    """float32 [N]."""
    zero_point: Tensor
    """int8 [1]."""
    weight_sum: Tensor | None = None
    """int32 [N], the sums of the weight's rows, which a GPU kernel would else compute at every call."""

    def of_expert(self, index: int) -> Operands:
        """Those of one expert, where all three have a dimension of experts before the others."""
        bias, weight_sum = (None if t is None else t[index] for t in (self.bias, self.weight_sum))
        return Operands(
            scale=self.scale[index], bias=bias, zero_point=self.zero_point[index], weight_sum=weight_sum
        )


class StaticOperands:
    """Computes them once for the buffers that a layer (or the experts of one) has at the time.

    Who changes those in place says so by `forget`. They are not kept alive: what is offloaded between calls is freed.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._made_from: tuple[ReferenceType[Tensor], ...] = ()
        self._operands: Operands | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"_made_from": (), "_operands": None}

    def of(self, content: Callable[[str], Tensor | None]) -> Operands:
        """Of the buffers that `content` gives for `codes`, `deq_scale`, `quant_bias`, …"""
        buffers = tuple(content(c) for c in _CONTENTS)
        assert all(b is not None for b in buffers)
        now: tuple[Tensor, ...] = buffers  # type: ignore[assignment]
        same = len(self._made_from) == len(now) and all(
            a() is b for a, b in zip(self._made_from, now, strict=True)
        )
        if self._operands is None or not same:
            self._operands, self._made_from = _kept(*now), tuple(ref(b) for b in now)
        return self._operands


_CONTENTS = ("codes", "deq_scale", "quant_bias", "input_scale", "input_zero_point")


@torch.no_grad()
def operands(
    codes: Tensor, deq_scale: Tensor, quant_bias: Tensor, input_scale: Tensor, offset: Tensor
) -> Operands:
    """int8 [N, K], float32 (or its bits as int64) [N], int32 [N], [1], [1] as stored → what `ops.linear` takes.

    All of them may have a dimension of experts before the others; so have the results then.
    """
    deq = scale_as_float(deq_scale)
    zero_point = offset.to(torch.int8)
    sums = codes.sum(-1, dtype=torch.int64)
    steps = quant_bias.to(torch.int64) + zero_point.to(torch.int64) * sums
    return Operands(
        scale=(deq / input_scale.to(torch.float32)).unsqueeze(-1),
        bias=(steps.to(torch.float64) * deq.to(torch.float64)).to(torch.float32),
        zero_point=zero_point,
        weight_sum=sums.to(torch.int32),
    )


def _kept(*buffers: Tensor) -> Operands:
    """`operands` for later calls too: what is made in inference mode cannot be saved for a gradient."""
    if torch.compiler.is_compiling():
        return operands(*buffers)
    with torch.inference_mode(False):
        return operands(*buffers)


def check_zeros(offset: Tensor | None, name: str) -> None:
    """InputError unless zero points of a weight, where there are any, are 0."""
    if offset is not None and not offset.is_meta and bool(offset.any()):
        raise InputError(
            f"{name}: expected symmetric weights, found zero points other than 0; dequantize the checkpoint with its "
            "own tools first"
        )
