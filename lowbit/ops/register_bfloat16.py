"""Registration of products with weights that stay in bfloat16 while everything else is wider."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.ops import cpu, eager, reference
from lowbit.ops.checks import check_bfloat16
from lowbit.ops.library import bias_gradient, define, differentiate, rows_of, shaped
from lowbit.ops.problem import Activations, Weights
from lowbit.ops.settings import fall_back, settings

_PLAIN = Activations(kind="none")
_ONE = torch.ones(1)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.is_cpu and settings.implementation is None:
        found = eager.linear(x, weight, _ONE, bias, None, "none", (0, 0), plain=True)
        if found is not None:
            return found
    check_bfloat16(x, weight, bias)
    if not x.is_cpu and settings.implementation is None:
        fall_back("linear_bfloat16", f"{x.device.type} multiplies bfloat16 as it is: give x in bfloat16")
        return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    flat = rows_of(x)
    weights = Weights(tensor=weight, scale=_ONE.to(x.device), block=(0, 0), k=x.shape[-1])
    run = reference.linear if settings.implementation == "reference" else cpu.linear
    return shaped(run(flat, weights, _PLAIN, bias, x.dtype), *x.shape[:-1], weight.shape[0])


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_bfloat16(x, weight, bias)
    return x.new_empty([*x.shape[:-1], weight.shape[0]])


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, weight, bias = inputs
    ctx.save_for_backward(weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple:
    (weight,) = ctx.saved_tensors
    to_x = grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None
    to_bias = None
    if ctx.needs_input_grad[2]:
        to_bias = bias_gradient(grad, ctx.bias_dtype)
    return to_x, None, to_bias


linear = define("linear_bfloat16(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _linear, _linear_fake)
differentiate("linear_bfloat16", _setup, _backward)
