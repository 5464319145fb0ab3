"""Linear layers that compute as an engine will: by our own kernels where integers are multiplied, else simulated."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit.calibration.simulate import ActivationQuantizer
from lowbit.granularity import PerToken
from lowbit.quantize import Quantized
from lowbit.scheme import Scheme


def rounded_module(linear: nn.Module, quantized: Quantized, scheme: Scheme) -> nn.Module:
    """A module in place of `linear` with the rounded weight, whose input is rounded as `scheme` says."""
    weight, bias = linear.weight, linear.bias
    assert isinstance(weight, Tensor)
    if multiplies_integers(scheme, weight):
        return _integer_module(weight, bias if isinstance(bias, Tensor) else None, quantized, scheme)
    out = nn.Linear(weight.shape[1], weight.shape[0], bias=isinstance(bias, Tensor), device="meta")
    out.weight = nn.Parameter(quantized.dequantize().to(weight), requires_grad=False)
    if isinstance(bias, Tensor):
        out.bias = nn.Parameter(bias, requires_grad=False)
    if scheme.activations is not None:
        quantizer = ActivationQuantizer(scheme.activations)
        out.register_forward_pre_hook(lambda _, args: (quantizer(args[0]),))
    return out


def multiplies_integers(scheme: Scheme, weight: Tensor) -> bool:
    """int8 by int8 per channel and token on the CPU, where those kernels are several times as fast as float32.

    Sums of integers are exact, so the result differs from a simulation in float32 only by that one's rounding.
    """
    weights, activations = scheme.weights, scheme.activations
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and activations is not None
        and activations.dynamic
        and activations.symmetric
        and isinstance(activations.granularity, PerToken)
        and activations.dtype.name == "int8"
        and weights is not None
        and weights.dtype.name == "int8"
    )


def _integer_module(weight: Tensor, bias: Tensor | None, quantized: Quantized, scheme: Scheme) -> nn.Module:
    from lowbit.nn.linear import QuantLinear

    module = QuantLinear(
        weight.shape[1], weight.shape[0], scheme=scheme, bias=bias is not None, dtype=weight.dtype
    )
    module.set_content("codes", quantized.codes)
    module.set_content("scale", quantized.scale)
    if bias is not None:
        module.bias = bias.detach()
    return _IntegerLinear(module, weight.dtype)


class _IntegerLinear(nn.Module):
    """A QuantLinear whose `weight` is in float, for layers that read it by themselves (Mamba's)."""

    def __init__(self, quantized: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.quantized, self.dtype = quantized, dtype

    @property
    def weight(self) -> Tensor:
        return self.quantized.dequantize(self.dtype)  # type: ignore[operator]

    @property
    def bias(self) -> Tensor | None:
        return self.quantized.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        return self.quantized(x)
