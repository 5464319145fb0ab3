"""Registration of the products with quantized weights, and of what dequantizes these.

Each operation has one implementation for every device; it asks `dispatch.choose` which of
`triton`, `cpu` and `reference` runs (see `product`).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lowbit.ops import eager, reference
from lowbit.ops.checks import (
    ANY_FLOAT,
    CODES,
    FLOATS,
    check_bias,
    check_devices,
    check_linear,
    check_weight,
    check_weight_sum,
    check_zero_point,
    require,
)
from lowbit.ops.library import bias_gradient, define, differentiate, rows_of, shaped
from lowbit.ops.problem import Weights, quantized_as
from lowbit.ops.product import bounds_of, run
from lowbit.ops.settings import settings

INTEGERS = (torch.int32, torch.int64)


# ------------------------------------------------------------------------------------ linear


def _linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, input_scale: Tensor | None,
    input_zero_point: Tensor | None, weight_sum: Tensor | None, activations: str, block: list[int],
) -> Tensor:  # fmt: skip
    if x.is_cpu and input_zero_point is None and settings.implementation is None:
        found = eager.linear(x, weight, weight_scale, bias, input_scale, activations, tuple(block))
        if found is not None:
            return found
    check_linear(x, weight, weight_scale, bias, input_scale, input_zero_point, activations, block)
    check_weight_sum(weight_sum, weight)
    k = x.shape[-1]
    weights = Weights(tensor=weight, scale=weight_scale, block=(block[0], block[1]), k=k)
    how = quantized_as(activations, block, weights.k, input_scale, input_zero_point)
    flat = x if x.dim() == 2 else rows_of(x)
    out = run("linear", activations, flat, weights, how, bias, x.dtype, weight_sum=weight_sum)
    return out if x.dim() == 2 else shaped(out, *x.shape[:-1], weights.n)


def _linear_fake(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, input_scale: Tensor | None,
    input_zero_point: Tensor | None, weight_sum: Tensor | None, activations: str, block: list[int],
) -> Tensor:  # fmt: skip
    check_linear(x, weight, weight_scale, bias, input_scale, input_zero_point, activations, block)
    check_weight_sum(weight_sum, weight)
    return x.new_empty([*x.shape[:-1], weight.shape[0]])


linear = define(
    "linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? input_scale, "
    "Tensor? input_zero_point, Tensor? weight_sum, str activations, int[] block) -> Tensor",
    _linear,
    _linear_fake,
    moving=("x",),
)


def _linear_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, weight_scale, bias, _, _, _, _, block = inputs
    ctx.save_for_backward(weight, weight_scale)
    ctx.block, ctx.k = block, x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx: Any, grad: Tensor) -> tuple:
    """To x through the dequantized weight (activations' rounding counts as identity); to bias."""
    weight, weight_scale = ctx.saved_tensors
    to_x = to_bias = None
    if ctx.needs_input_grad[0]:
        w = torch.ops.lowbit.dequantize(weight, weight_scale, ctx.block, ctx.k, grad.dtype)
        to_x = grad @ w
    if ctx.needs_input_grad[3]:
        to_bias = bias_gradient(grad, ctx.bias_dtype)
    return to_x, None, None, to_bias, None, None, None, None, None


differentiate("linear", _linear_setup, _linear_backward)


# --------------------------------------------------------------------------------- dequantize


def _dequantize(weight: Tensor, weight_scale: Tensor, block: list[int], k: int, dtype: torch.dtype) -> Tensor:
    _check_dequantize(weight, weight_scale, block, k, dtype)
    weights = Weights(tensor=weight, scale=weight_scale, block=(block[0], block[1]), k=k)
    return reference.dequantize(weights).to(dtype)


def _check_dequantize(
    weight: Tensor, weight_scale: Tensor, block: list[int], k: int, dtype: torch.dtype
) -> None:
    check_devices(weight, weight_scale)
    check_weight(k, weight, weight_scale, block, experts=weight.dim() == 3)
    require(dtype.is_floating_point, lambda: f"expected a float dtype for the weight, found {dtype}")


def _dequantize_fake(
    weight: Tensor, weight_scale: Tensor, block: list[int], k: int, dtype: torch.dtype
) -> Tensor:
    _check_dequantize(weight, weight_scale, block, k, dtype)
    return weight.new_empty([*weight.shape[:-1], k], dtype=dtype)


define(
    "dequantize(Tensor weight, Tensor weight_scale, int[] block, SymInt k, ScalarType dtype) -> Tensor",
    _dequantize,
    _dequantize_fake,
)


# ----------------------------------------------------------------------------- linear_grouped


def _linear_grouped(
    x: Tensor, weight: Tensor, weight_scale: Tensor, offsets: Tensor, bias: Tensor | None,
    row_weight: Tensor | None, input_scale: Tensor | None, activations: str, block: list[int],
) -> Tensor:  # fmt: skip
    keeps = x.is_cpu and settings.implementation is None and row_weight is None and input_scale is None
    rises = offsets.dtype in INTEGERS and offsets.is_cpu and offsets.shape == (weight.shape[0] + 1,)
    if keeps and x.dim() == 2 and rises:
        bounds = bounds_of(offsets, x.shape[0])
        found = eager.linear(x, weight, weight_scale, bias, None, activations, tuple(block), bounds)
        if found is not None:
            return found
    _check_grouped(x, weight, weight_scale, offsets, bias, row_weight, input_scale, activations, block)
    weights = Weights(tensor=weight, scale=weight_scale, block=(block[0], block[1]), k=x.shape[-1])
    how = quantized_as(activations, block, weights.k, input_scale)
    return run(
        "linear_grouped", activations, x, weights, how, bias, x.dtype, offsets=offsets, routed=row_weight
    )


def _check_grouped(
    x: Tensor, weight: Tensor, weight_scale: Tensor, offsets: Tensor, bias: Tensor | None,
    row_weight: Tensor | None, input_scale: Tensor | None, activations: str, block: list[int],
) -> None:  # fmt: skip
    check_linear(x, weight, weight_scale, bias, input_scale, None, activations, block, experts=True)
    require(x.dim() == 2, lambda: f"expected x [T, K], its rows sorted by expert, found {list(x.shape)}")
    check_devices(x, offsets, row_weight)
    require(
        offsets.dim() == 1 and offsets.shape[0] == weight.shape[0] + 1 and offsets.dtype in INTEGERS,
        lambda: (
            f"expected integer offsets [{weight.shape[0] + 1}] (experts + 1), int32 or int64, "
            f"found {offsets.dtype} {list(offsets.shape)}"
        ),
    )
    if row_weight is not None:
        require(
            row_weight.numel() == x.shape[0] and row_weight.dtype in ANY_FLOAT,
            lambda: (
                f"expected row_weight of {x.shape[0]} floats, one per row of x, "
                f"found {row_weight.dtype} {list(row_weight.shape)}"
            ),
        )


def _linear_grouped_fake(
    x: Tensor, weight: Tensor, weight_scale: Tensor, offsets: Tensor, bias: Tensor | None,
    row_weight: Tensor | None, input_scale: Tensor | None, activations: str, block: list[int],
) -> Tensor:  # fmt: skip
    _check_grouped(x, weight, weight_scale, offsets, bias, row_weight, input_scale, activations, block)
    return x.new_empty([x.shape[0], weight.shape[1]])


linear_grouped = define(
    "linear_grouped(Tensor x, Tensor weight, Tensor weight_scale, Tensor offsets, Tensor? bias, "
    "Tensor? row_weight, Tensor? input_scale, str activations, int[] block) -> Tensor",
    _linear_grouped,
    _linear_grouped_fake,
    moving=("x", "offsets", "row_weight"),
)


def _linear_grouped_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, weight_scale, offsets, bias, row_weight, _, _, block = inputs
    ctx.save_for_backward(weight, weight_scale, offsets, row_weight)
    ctx.block, ctx.k = block, x.shape[-1]
    if (bias is not None and bias.requires_grad) or (row_weight is not None and row_weight.requires_grad):
        raise NotImplementedError(
            "lowbit::linear_grouped passes gradients to x only; detach bias and row_weight, and "
            "multiply by the routed weight outside if it is trained"
        )


def _linear_grouped_backward(ctx: Any, grad: Tensor) -> tuple:
    weight, weight_scale, offsets, row_weight = ctx.saved_tensors
    to_x = None
    if ctx.needs_input_grad[0]:
        if row_weight is not None:
            grad = grad * row_weight.to(grad.dtype).reshape(-1, 1)
        to_x = torch.ops.lowbit.grouped_input_gradient(grad, weight, weight_scale, offsets, ctx.block, ctx.k)
    return to_x, None, None, None, None, None, None, None, None


def _grouped_input_gradient(
    grad: Tensor, weight: Tensor, weight_scale: Tensor, offsets: Tensor, block: list[int], k: int
) -> Tensor:
    out = grad.new_zeros([grad.shape[0], k])
    bounds = bounds_of(offsets, grad.shape[0])
    for expert, (start, end) in enumerate(pairwise(bounds)):
        if end > start:  # one expert's weight at a time is dequantized
            w = _dequantize(weight[expert], weight_scale[expert], block, k, grad.dtype)
            out[start:end] = grad[start:end] @ w
    return out


def _grouped_input_gradient_fake(
    grad: Tensor, weight: Tensor, weight_scale: Tensor, offsets: Tensor, block: list[int], k: int
) -> Tensor:
    return grad.new_empty([grad.shape[0], k])


define(
    "grouped_input_gradient(Tensor grad, Tensor weight, Tensor weight_scale, Tensor offsets, int[] block, "
    "SymInt k) -> Tensor",
    _grouped_input_gradient,
    _grouped_input_gradient_fake,
)
differentiate("linear_grouped", _linear_grouped_setup, _linear_grouped_backward)


# ------------------------------------------------------------------------------------- matmul


def _matmul(
    a: Tensor, a_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None,
    a_zero_point: Tensor | None, weight_sum: Tensor | None, block: list[int], out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    kind = _check_matmul(a, a_scale, weight, weight_scale, bias, a_zero_point, weight_sum, block, out_dtype)
    k = a.shape[-1]
    weights = Weights(tensor=weight, scale=weight_scale, block=(block[0], block[1]), k=k)
    flat = a if a.dim() == 2 else rows_of(a)
    scale = a_scale.to(torch.float32)
    scale = scale if kind == "tensor" else scale.reshape(flat.shape[0], a_scale.shape[-1])
    how = quantized_as(kind, block, k, scale, a_zero_point)
    out = run("matmul", kind, flat, weights, how, bias, out_dtype, weight_sum=weight_sum)
    return out if a.dim() == 2 else shaped(out, *a.shape[:-1], weights.n)


def _check_matmul(
    a: Tensor, a_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None,
    a_zero_point: Tensor | None, weight_sum: Tensor | None, block: list[int], out_dtype: torch.dtype,
) -> str:  # fmt: skip
    require(
        a.dim() >= 1 and a.dtype in CODES and a.dtype == weight.dtype,
        lambda: (
            "expected codes […, K] of one dtype, int8 or float8_e4m3fn, "
            f"found {a.dtype} {list(a.shape)} × {weight.dtype}"
        ),
    )
    k = a.shape[-1]
    require(
        a_scale.dtype in FLOATS and out_dtype in FLOATS,
        lambda: (
            f"expected a_scale and out_dtype of float32, float16 or bfloat16, found {a_scale.dtype} and {out_dtype}"
        ),
    )
    check_devices(a, a_scale, weight, weight_scale, bias, a_zero_point, weight_sum)
    check_weight(k, weight, weight_scale, block, experts=False)
    groups = -(-k // block[1]) if block[1] else 1
    leading = list(a.shape[:-1])
    if list(a_scale.shape) == [1] and (leading != [] or a_zero_point is not None):
        kind = "tensor"
    elif list(a_scale.shape) == [*leading, 1] and groups == 1:
        kind = "token"
    elif list(a_scale.shape) == [*leading, groups]:
        kind = "group"
    elif list(a_scale.shape) == [1]:
        kind = "tensor"
    else:
        raise ValueError(
            f"expected a_scale of shape [1], {[*leading, 1]} or {[*leading, groups]} for codes {list(a.shape)}, "
            f"found {list(a_scale.shape)}"
        )
    if a_zero_point is not None:
        check_zero_point(a_zero_point, a.dtype, kind == "tensor", "a_zero_point")
    check_bias(bias, [weight.shape[0]])
    check_weight_sum(weight_sum, weight)
    return kind


def _matmul_fake(
    a: Tensor, a_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None,
    a_zero_point: Tensor | None, weight_sum: Tensor | None, block: list[int], out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    _check_matmul(a, a_scale, weight, weight_scale, bias, a_zero_point, weight_sum, block, out_dtype)
    return a.new_empty([*a.shape[:-1], weight.shape[0]], dtype=out_dtype)


matmul = define(
    "matmul(Tensor a, Tensor a_scale, Tensor weight, Tensor weight_scale, Tensor? bias, "
    "Tensor? a_zero_point, Tensor? weight_sum, int[] block, ScalarType out_dtype) -> Tensor",
    _matmul,
    _matmul_fake,
    moving=("a", "a_scale", "a_zero_point"),
)


def _matmul_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    bias = inputs[4]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _matmul_backward(ctx: Any, grad: Tensor) -> tuple:
    """To bias; to scales there is none, and codes have none."""
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
        raise NotImplementedError(
            "lowbit::matmul passes a gradient to its bias only; detach the scales, or give x itself to "
            "lowbit.ops.linear, which passes one to x"
        )
    return None, None, None, None, bias_gradient(grad, ctx.bias_dtype), None, None, None, None


differentiate("matmul", _matmul_setup, _matmul_backward)
