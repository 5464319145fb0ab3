"""Registration with torch.library: schemas, implementations, fake implementations, gradients.

Each operation has one implementation for every device; it asks `dispatch.choose` which of
`triton`, `cpu` and `reference` runs. Defined through `torch.library.Library` and not through
`custom_op`, whose wrapper costs more per call than a small product on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lowbit.ops import again, cpu, dispatch, eager, reference
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
from lowbit.ops.problem import Activations, Weights, quantized_as
from lowbit.ops.settings import fall_back, settings

INTEGERS = (torch.int32, torch.int64)

_library = torch.library.Library("lowbit", "DEF")


def _define(schema: str, implementation: Any, fake: Any, moving: Sequence[str] = ()) -> Any:
    """Register an operation and return its implementation.

    moving: the tensors, of an operation that launches kernels, that differ from call to call (see `again`).
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    if moving:
        arguments = [a.name for a in torch._C.parse_schema(schema).arguments]
        implementation = again.keeping(implementation, [arguments.index(m) for m in moving])
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lowbit::{name}", fake, lib=_library)
    return implementation


def _implementation(
    operation: str, problem: dispatch.Problem, device: torch.device
) -> tuple[str, dispatch.Decision | None]:
    """(`triton`, `cpu`, `reference`, or `dequantize` where no kernel takes the problem; what was decided)."""
    forced = settings.implementation
    if forced == "cpu" or forced == "reference":
        return forced, None
    if device.type == "cpu" and forced is None:
        chosen = dispatch.choose(problem, "cpu")
    else:
        try:
            from lowbit.kernels.targets import device_target  # type: ignore[import-not-found]

            chosen = dispatch.choose(dispatch.bucketed(problem), device_target(device).name)
        except (ImportError, ValueError) as error:
            chosen = dispatch.Refusal(reason=str(error))
    if isinstance(chosen, dispatch.Decision):
        return chosen.implementation, chosen
    fall_back(operation, chosen.reason)
    return "dequantize", None


def _dequantized(
    x: Tensor, weights: Weights, activations: Activations, bias: Tensor | None, out_dtype: torch.dtype,
    offsets: list[int] | None = None, routed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The fallback: quantize and dequantize activations, dequantize weights, multiply in float32."""
    if x.dtype in CODES or activations.kind != "none":
        codes, scale = x, activations.scale
        if x.dtype not in CODES:
            codes, scale = reference.quantize(x, reference.unpack(weights).dtype, activations)
        assert scale is not None
        if activations.group:
            scale = scale.repeat_interleave(activations.group, dim=-1)[..., : weights.k]
        x = (codes.float() - activations.zero_point) * scale
    w = reference.dequantize(weights)
    if offsets is None:
        out = x.float() @ w.T
        out = out if bias is None else out + bias.float()
    else:
        out = torch.zeros(x.shape[0], weights.n, device=x.device)
        for expert, (start, end) in enumerate(pairwise(offsets)):
            out[start:end] = x[start:end].float() @ w[expert].T
            if bias is not None:
                out[start:end] += bias[expert].float()
    if routed is not None:
        out = out * routed.float().reshape(-1, 1)
    return out.to(out_dtype)


def _run(
    operation: str, kind: str, x: Tensor, weights: Weights, activations: Activations, bias: Tensor | None,
    out_dtype: torch.dtype, *, offsets: Tensor | None = None, routed: Tensor | None = None,
    weight_sum: Tensor | None = None,
) -> Tensor:  # fmt: skip
    problem = dispatch.problem_of(
        x, weights, kind, zero_point=activations.zero is not None, bias=bias is not None, out_dtype=out_dtype
    )
    name, decision = _implementation(operation, problem, x.device)
    if decision is not None and decision.keeps_floats(problem):
        activations = Activations(kind="none")
    elif activations.kind == "tensor" and offsets is not None:
        x, activations = reference.quantize_by_expert(x, weights.tensor.dtype, activations, offsets)
    if name == "triton":
        from lowbit.ops import triton

        assert decision is not None
        return triton.linear(
            x,
            weights,
            activations,
            bias,
            out_dtype,
            kernel=decision.kernel,
            offsets=offsets,
            routed=routed,
            weight_sum=weight_sum,
        )
    bounds = None if offsets is None else _bounds(offsets, x.shape[0])
    if name == "cpu":
        return cpu.linear(x, weights, activations, bias, out_dtype, offsets=bounds, routed=routed)
    if name == "reference":
        return reference.linear(x, weights, activations, bias, out_dtype, offsets=bounds, routed=routed)
    return _dequantized(x, weights, activations, bias, out_dtype, bounds, routed)


def _bounds(offsets: Tensor, rows: int) -> list[int]:
    bounds: list[int] = offsets.tolist()
    require(
        bounds == sorted(bounds) and bounds[0] == 0 and bounds[-1] == rows,
        lambda: (
            f"expected offsets to rise from 0 to the {rows} rows of x, found {bounds[:4]} … {bounds[-1:]}"
        ),
    )
    return bounds


def rows_of(x: Tensor) -> Tensor:
    """[..., K] → [M, K], where K is 0 too: torch infers no -1 of nothing."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _shaped(out: Tensor, *shape: int) -> Tensor:
    """`out` in another shape, and no view of it: nobody may change a view made within an operation in place."""
    return torch.ops.aten._unsafe_view.default(out, shape)


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
    out = _run("linear", activations, flat, weights, how, bias, x.dtype, weight_sum=weight_sum)
    return out if x.dim() == 2 else _shaped(out, *x.shape[:-1], weights.n)


def _linear_fake(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, input_scale: Tensor | None,
    input_zero_point: Tensor | None, weight_sum: Tensor | None, activations: str, block: list[int],
) -> Tensor:  # fmt: skip
    check_linear(x, weight, weight_scale, bias, input_scale, input_zero_point, activations, block)
    check_weight_sum(weight_sum, weight)
    return x.new_empty([*x.shape[:-1], weight.shape[0]])


linear = _define(
    "linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? input_scale, "
    "Tensor? input_zero_point, Tensor? weight_sum, str activations, int[] block) -> Tensor",
    _linear,
    _linear_fake,
    moving=("x",),
)


def bias_gradient(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """[…, N] of the output → [N], summed in float32 as the bias is added."""
    return grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(dtype)


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


_define(
    "dequantize(Tensor weight, Tensor weight_scale, int[] block, SymInt k, ScalarType dtype) -> Tensor",
    _dequantize,
    _dequantize_fake,
)
torch.library.register_autograd("lowbit::linear", _linear_backward, setup_context=_linear_setup, lib=_library)


# ----------------------------------------------------------------------------- linear_grouped


def _linear_grouped(
    x: Tensor, weight: Tensor, weight_scale: Tensor, offsets: Tensor, bias: Tensor | None,
    row_weight: Tensor | None, input_scale: Tensor | None, activations: str, block: list[int],
) -> Tensor:  # fmt: skip
    keeps = x.is_cpu and settings.implementation is None and row_weight is None and input_scale is None
    rises = offsets.dtype in INTEGERS and offsets.is_cpu and offsets.shape == (weight.shape[0] + 1,)
    if keeps and x.dim() == 2 and rises:
        bounds = _bounds(offsets, x.shape[0])
        found = eager.linear(x, weight, weight_scale, bias, None, activations, tuple(block), bounds)
        if found is not None:
            return found
    _check_grouped(x, weight, weight_scale, offsets, bias, row_weight, input_scale, activations, block)
    weights = Weights(tensor=weight, scale=weight_scale, block=(block[0], block[1]), k=x.shape[-1])
    how = quantized_as(activations, block, weights.k, input_scale)
    return _run(
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


linear_grouped = _define(
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
    bounds = _bounds(offsets, grad.shape[0])
    for expert, (start, end) in enumerate(pairwise(bounds)):
        if end > start:  # one expert's weight at a time is dequantized
            w = _dequantize(weight[expert], weight_scale[expert], block, k, grad.dtype)
            out[start:end] = grad[start:end] @ w
    return out


def _grouped_input_gradient_fake(
    grad: Tensor, weight: Tensor, weight_scale: Tensor, offsets: Tensor, block: list[int], k: int
) -> Tensor:
    return grad.new_empty([grad.shape[0], k])


_define(
    "grouped_input_gradient(Tensor grad, Tensor weight, Tensor weight_scale, Tensor offsets, int[] block, "
    "SymInt k) -> Tensor",
    _grouped_input_gradient,
    _grouped_input_gradient_fake,
)
torch.library.register_autograd(
    "lowbit::linear_grouped", _linear_grouped_backward, setup_context=_linear_grouped_setup, lib=_library
)


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
    out = _run("matmul", kind, flat, weights, how, bias, out_dtype, weight_sum=weight_sum)
    return out if a.dim() == 2 else _shaped(out, *a.shape[:-1], weights.n)


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


matmul = _define(
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


torch.library.register_autograd("lowbit::matmul", _matmul_backward, setup_context=_matmul_setup, lib=_library)
