"""Activations rounded as the engine will round them, in float: for statistics, for choosing, for evaluating."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lowbit.granularity import PerToken
from lowbit.quantize import choose_scale, dequantize, quantize_with
from lowbit.scheme import TensorSpec


@torch.no_grad()
def fake_quantize(
    x: Tensor, spec: TensorSpec, scale: Tensor | None = None, zero: Tensor | None = None
) -> Tensor:
    """x → its nearest representable values, in the dtype of x. Static specs need a scale.

    Equal to `dequantize(quantize(x))`; per-token int8, the common case, without temporaries
    for codes.
    """
    if (
        spec.dtype.kind == "int"
        and spec.symmetric
        and isinstance(spec.granularity, PerToken)
        and scale is None
    ):
        low, high = torch.aminmax(x, dim=-1, keepdim=True)
        step = torch.maximum(high, -low).float() / spec.dtype.max
        step = torch.where(step < torch.finfo(torch.float32).tiny, torch.ones_like(step), step)
        return (x.float() / step).round_().clamp_(-spec.dtype.max, spec.dtype.max).mul_(step).to(x.dtype)
    if scale is not None and scale.numel() == 1 and spec.dtype.kind == "int" and spec.symmetric:
        step = scale.float().reshape(())
        return (x.float() / step).round_().clamp_(-spec.dtype.max, spec.dtype.max).mul_(step).to(x.dtype)
    if scale is None:
        if not spec.dynamic:
            raise ValueError(f"expected a scale for static activations ({spec}), found none; calibrate first")
        scale, zero = choose_scale(x, spec)
    codes = quantize_with(x, scale, spec, zero)
    return dequantize(codes, scale, spec, zero).to(x.dtype)


class ActivationQuantizer:
    """Rounds the input of one or more Linear layers; those that read the same tensor share the work.

    `hadamard`: the input is rotated first, as an engine with the online transform would.
    """

    def __init__(
        self,
        spec: TensorSpec | None,
        scale: Tensor | None = None,
        zero: Tensor | None = None,
        *,
        hadamard: bool = False,
    ) -> None:
        self.spec, self.scale, self.zero, self.hadamard = spec, scale, zero, hadamard
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.spec is None and not self.hadamard:
            return x
        last = self._last
        if last is not None and last[0] is x:
            return last[1]
        y = x
        if self.hadamard:
            from lowbit.calibration.rotation import apply_online_hadamard

            y = apply_online_hadamard(y)
        if self.spec is not None:
            y = fake_quantize(y, self.spec, self.scale, self.zero)
        self._last = (x, y)
        return y

    def forget(self) -> None:
        self._last = None


def attach(layer: nn.Module, quantizers: dict[str, ActivationQuantizer]) -> Callable[[], None]:
    """Round the (first) inputs of the named modules of `layer`; returns what takes the hooks off again."""
    handles = []
    for name, quantizer in quantizers.items():
        module = layer.get_submodule(name)
        handles.append(module.register_forward_pre_hook(lambda _, args, q=quantizer: (q(args[0]), *args[1:])))

    def detach() -> None:
        for handle in handles:
            handle.remove()
        for quantizer in quantizers.values():
            quantizer.forget()

    return detach
