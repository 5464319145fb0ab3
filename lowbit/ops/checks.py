"""What the operations ask of their arguments. Shapes and dtypes only, so that tracing can run it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
ANY_FLOAT = (*FLOATS, torch.float64)
CODES = (torch.int8, torch.float8_e4m3fn)
ACTIVATIONS = ("none", "token", "group", "group_pow2", "tensor")


def require(condition: bool, message: Callable[[], str]) -> None:
    """ValueError unless `condition`. The message is made only then: making it costs more than a small product."""
    if not condition:
        raise ValueError(message())


def check_floats(x: Tensor) -> None:
    require(
        x.dim() >= 1 and x.dtype in FLOATS,
        lambda: f"expected x […, K] of dtype float16, bfloat16 or float32, found {x.dtype} {list(x.shape)}",
    )


def check_zero_point(zero_point: Tensor, codes: torch.dtype, static: bool, name: str) -> None:
    require(
        static and codes == torch.int8 and zero_point.numel() == 1 and zero_point.dtype == torch.int8,
        lambda: (
            f"expected {name} int8 [1], only with int8 codes under one static scale, found {zero_point.dtype} "
            f"{list(zero_point.shape)} with {codes}{'' if static else ' under scales of their own'}"
        ),
    )


def check_devices(x: Tensor, *others: Tensor | None) -> None:
    """What tracing computes would stand for the product where a weight is on meta: memory that nobody wrote."""
    for other in others:
        if other is not None and other.device != x.device:
            raise ValueError(
                f"expected all operands on {x.device}, as x is, found {other.device}; "
                + ("load the weights first" if other.is_meta else "move the one to the other")
            )


def check_scale(scale: Tensor, shape: list[int], name: str) -> None:
    """A static activation scale. E8M0 bytes, or the bits of a float in an integer, would be read as numbers."""
    require(
        scale.numel() == math.prod(shape),
        lambda: f"expected {name} of shape {shape}, found {list(scale.shape)}",
    )
    require(
        scale.dtype in FLOATS,
        lambda: f"expected {name} of float32, found {scale.dtype}; E8M0 is read by lowbit.dtypes.decode_e8m0",
    )


def check_bias(bias: Tensor | None, shape: list[int]) -> None:
    """In float: integers are sums that a scale belongs to (msModelSlim's quant_bias)."""
    if bias is None:
        return
    require(list(bias.shape) == shape, lambda: f"expected bias of shape {shape}, found {list(bias.shape)}")
    require(bias.dtype in ANY_FLOAT, lambda: f"expected a bias of floats, found {bias.dtype}")


def check_weight_sum(weight_sum: Tensor | None, weight: Tensor) -> None:
    """Kernels read it as it lies there."""
    if weight_sum is None:
        return
    check_devices(weight, weight_sum)
    require(
        weight_sum.dtype == torch.int32 and list(weight_sum.shape) == [weight.shape[0]],
        lambda: (
            f"expected weight_sum int32 [{weight.shape[0]}], weight.sum(1, dtype=torch.int32), "
            f"found {weight_sum.dtype} {list(weight_sum.shape)}"
        ),
    )


def check_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, input_scale: Tensor | None,
    input_zero_point: Tensor | None, activations: str, block: list[int], experts: bool = False,
) -> None:  # fmt: skip
    """Raise ValueError saying what was expected, what was found and what to do."""
    name = "linear_grouped" if experts else "linear"
    check_floats(x)
    require(
        activations in ACTIVATIONS,
        lambda: f"expected activations to be one of {', '.join(ACTIVATIONS)}, found {activations!r}",
    )
    check_devices(x, weight, weight_scale, bias, input_scale, input_zero_point)
    check_weight(x.shape[-1], weight, weight_scale, block, experts)
    static = activations == "tensor"
    require(
        (input_scale is not None) == static,
        lambda: (
            f"expected input_scale with activations='tensor' and only then, found activations={activations!r} "
            f"and input_scale {'given' if input_scale is not None else 'missing'} in lowbit::{name}"
        ),
    )
    if input_scale is not None:
        check_scale(input_scale, [weight.shape[0], 1] if experts else [1], "input_scale")
    if input_zero_point is not None:
        check_zero_point(input_zero_point, weight.dtype, static, "input_zero_point")
    check_bias(bias, [weight.shape[0], weight.shape[-2]] if experts else [weight.shape[-2]])


def check_bfloat16(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Of `linear_bfloat16`: ValueError saying what was expected, what was found and what to do."""
    check_devices(x, weight, bias)
    check_floats(x)
    require(
        weight.dtype == torch.bfloat16 and weight.dim() == 2 and weight.shape[1] == x.shape[-1],
        lambda: (
            f"expected a bfloat16 weight [N, {x.shape[-1]}], found {weight.dtype} {list(weight.shape)} "
            "(weights are [out_features, in_features], not transposed)"
        ),
    )
    check_bias(bias, [weight.shape[0]])


def check_weight(k: int, weight: Tensor, weight_scale: Tensor, block: list[int], experts: bool) -> None:
    """Whether a weight [N, K] ([E, N, K] of experts; packed: ⌈K/4⌉ columns) fits inputs of `k`, its scale `block`."""
    rank = 3 if experts else 2
    require(
        weight.dtype in (*CODES, torch.int32),
        lambda: f"expected a weight of int8, float8_e4m3fn or packed int32, found {weight.dtype}",
    )
    require(
        weight.dim() == rank,
        lambda: f"expected a weight {'[E, N, K]' if experts else '[N, K]'}, found {list(weight.shape)}",
    )
    stored = -(-k // 4) if weight.dtype == torch.int32 else k
    require(
        weight.shape[-1] == stored,
        lambda: (
            f"expected a weight with {stored} columns for inputs of {k} features, found {list(weight.shape)} "
            "(weights are [out_features, in_features], not transposed)"
        ),
    )
    require(
        len(block) == 2 and min(block) >= 0 and (block[0] > 0 or block[1] == 0),
        lambda: (
            f"expected block=[rows, columns] that share a weight scale, 0 for all of them, found {list(block)}; "
            "[0, 0] per tensor, [1, 0] per channel, [1, g] per group, [128, 128] per block"
        ),
    )
    leading = [weight.shape[0]] if experts else []
    if not block[0]:
        shape = [*leading, 1]
    else:
        shape = [*leading, -(-weight.shape[-2] // block[0]), -(-k // block[1]) if block[1] else 1]
    require(
        list(weight_scale.shape) == shape,
        lambda: (
            f"expected weight_scale of shape {shape} for a weight {list(weight.shape)} with block={list(block)}, "
            f"found {list(weight_scale.shape)}"
        ),
    )
    require(
        weight_scale.dtype in (*FLOATS, torch.uint8, torch.float8_e8m0fnu),
        lambda: f"expected weight_scale of float32 (or E8M0 bytes as uint8), found {weight_scale.dtype}",
    )


def check_rows(x: Tensor) -> None:
    """x [..., K] in a float dtype, with something in each row: what has no elements has no scale."""
    check_floats(x)
    require(
        x.shape[-1] > 0,
        lambda: f"expected x […, K] with K of at least 1, found {list(x.shape)}",
    )


def check_quantize(x: Tensor, dtype: torch.dtype, group: int) -> None:
    check_rows(x)
    require(dtype in CODES, lambda: f"expected dtype int8 or float8_e4m3fn, found {dtype}")
    require(group >= 0, lambda: f"expected a group of at least 0 elements (0: the whole row), found {group}")


def check_no_transform(*tensors: Tensor | None) -> None:
    """NotImplementedError where torch.func differentiates: torch would ask for a method of its own class for this."""
    if torch.compiler.is_compiling() or functorch.peek_interpreter_stack() is None:
        return
    for t in tensors:
        while t is not None and functorch.is_functorch_wrapped_tensor(t):
            if functorch.is_gradtrackingtensor(t) and t.requires_grad:
                raise NotImplementedError(
                    "expected no torch.func.grad, vjp or jacrev around lowbit's operators, found one, and torch takes "
                    "none of operators with a gradient of their own; use backward() or torch.autograd.grad, or a "
                    "Linear that to_linear() makes"
                )
            t = functorch.get_unwrapped(t)


def check_no_tangent(*tensors: Tensor | None) -> None:
    """NotImplementedError in forward-mode differentiation, where torch would take the derivative for zero, and under
    transforms (see `check_no_transform`)."""
    check_no_transform(*tensors)
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            "expected no tangents, found some: lowbit's operators have no forward-mode derivative (torch.func.jvp, "
            "jacfwd); use reverse mode, or a Linear that to_linear() makes"
        )
