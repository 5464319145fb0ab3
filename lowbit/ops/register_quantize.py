"""Registration of the operations that quantize: alone, after a norm, after SiLU·mul; and Hadamard."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit.ops import cpu, reference
from lowbit.ops.checks import (
    ANY_FLOAT,
    check_devices,
    check_quantize,
    check_rows,
    check_scale,
    check_zero_point,
    require,
)
from lowbit.ops.library import define, differentiate, shaped
from lowbit.ops.problem import Activations, within
from lowbit.ops.settings import fall_back, settings


def _implementation(operation: str, device: torch.device, what: torch.dtype | int, group: int = 0) -> str:
    """`triton`, `cpu` or `reference`, for codes of a dtype (in groups), or a Hadamard transform of so many elements."""
    forced = settings.implementation
    if forced == "cpu" or forced == "reference":
        return forced
    if device.type == "cpu" and forced is None:
        return "cpu"
    try:
        from lowbit.kernels import hadamard, quantize  # type: ignore[import-not-found]
        from lowbit.kernels.targets import device_target  # type: ignore[import-not-found]

        target = device_target(device)
        transform = isinstance(what, int)
        reason = hadamard.refusal(what, target) if transform else quantize.refusal(what, target, group)
    except (ImportError, ValueError) as error:
        reason = str(error)
    if reason is None:
        return "triton"
    fall_back(operation, reason, "computing with torch's own operations")
    return "reference"


def _groups(k: int, group: int) -> int:
    return -(-k // group) if group else 1


def _dynamic(group: int, power_of_2: bool = False) -> Activations:
    return Activations(kind="group" if group else "token", group=group, power_of_2=power_of_2)


def _quantize_flat(operation: str, x: Tensor, dtype: torch.dtype, how: Activations) -> tuple[Tensor, Tensor]:
    """x [M, K] in any strides → (codes, scale [M, groups]), contiguous as the fake implementations are."""
    name = _implementation(operation, x.device, dtype, how.group)
    if name == "triton":
        from lowbit.ops import triton

        return triton.quantize(x, dtype, how)
    return cpu.quantize(x, dtype, how) if name == "cpu" else reference.quantize(x.contiguous(), dtype, how)


def _quantize(x: Tensor, dtype: torch.dtype, group: int, power_of_2: bool) -> tuple[Tensor, Tensor]:
    check_quantize(x, dtype, group)
    flat = x.reshape(-1, x.shape[-1])
    how = _dynamic(within(group, x.shape[-1]), power_of_2)
    codes, scale = _quantize_flat("quantize", flat, dtype, how)
    return codes.view(x.shape), scale.view(*x.shape[:-1], -1) if scale.numel() else _no_scale(x, group)


def _no_scale(x: Tensor, group: int) -> Tensor:
    return x.new_empty([*x.shape[:-1], _groups(x.shape[-1], group)], dtype=torch.float32)


def _quantize_fake(x: Tensor, dtype: torch.dtype, group: int, power_of_2: bool) -> tuple[Tensor, Tensor]:
    check_quantize(x, dtype, group)
    return x.new_empty(x.shape, dtype=dtype), _no_scale(x, group)


def _constants(ctx: Any, inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
    """Codes and scales pass no gradient, so that what is computed of them asks for none."""
    ctx.arguments = len(inputs)
    ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))


def _nothing(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
    return (None,) * ctx.arguments


quantize = define(
    "quantize(Tensor x, ScalarType dtype, int group, bool power_of_2) -> (Tensor codes, Tensor scale)",
    _quantize,
    _quantize_fake,
    moving=("x",),
)


def _quantize_static(x: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    _check_static(x, scale, zero_point, dtype)
    how = Activations(kind="tensor", scale=scale, zero=zero_point)
    codes, _ = _quantize_flat("quantize_static", x.reshape(-1, x.shape[-1]), dtype, how)
    return codes.view(x.shape)


def _check_static(x: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> None:
    check_quantize(x, dtype, 0)
    check_devices(x, scale, zero_point)
    check_scale(scale, [1], "scale")
    if zero_point is not None:
        check_zero_point(zero_point, dtype, True, "zero_point")


def _quantize_static_fake(x: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    _check_static(x, scale, zero_point, dtype)
    return x.new_empty(x.shape, dtype=dtype)


quantize_static = define(
    "quantize_static(Tensor x, Tensor scale, Tensor? zero_point, ScalarType dtype) -> Tensor",
    _quantize_static,
    _quantize_static_fake,
    moving=("x",),
)


# ------------------------------------------------------------------------------------- fused


def _rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, dtype: torch.dtype, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    _check_norm(x, weight, residual, dtype, group)
    k = x.shape[-1]
    flat, group = x.reshape(-1, k), within(group, k)
    other = None if residual is None else residual.reshape(-1, k)
    if _implementation("rms_norm_quantize", x.device, dtype, group) == "triton":
        from lowbit.ops import triton

        codes, scale, total = triton.rms_norm_quantize(flat, weight, eps, other, dtype, group)
    else:
        values, total = reference.rms_norm(flat, weight, eps, other)
        codes, scale = _quantize_flat("rms_norm_quantize", values, dtype, _dynamic(group))
        # A copy where nothing was added; `clone` alone would keep the order of x's strides.
        total = total.clone(memory_format=torch.contiguous_format) if residual is None else total.contiguous()
    scale = scale.view([*x.shape[:-1], _groups(k, group)])
    return codes.view(x.shape), scale, shaped(total, *x.shape)


def _check_norm(x: Tensor, weight: Tensor, residual: Tensor | None, dtype: torch.dtype, group: int) -> None:
    check_quantize(x, dtype, group)
    check_devices(x, weight, residual)
    require(
        list(weight.shape) == [x.shape[-1]] and weight.dtype in ANY_FLOAT,
        lambda: f"expected weight of floats [{x.shape[-1]}], found {weight.dtype} {list(weight.shape)}",
    )
    if residual is not None:
        require(
            residual.shape == x.shape and residual.dtype == x.dtype,
            lambda: (
                f"expected residual {x.dtype} {list(x.shape)} like x, found {residual.dtype} {list(residual.shape)}"
            ),
        )


def _rms_norm_quantize_fake(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, dtype: torch.dtype, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    _check_norm(x, weight, residual, dtype, group)
    return x.new_empty(x.shape, dtype=dtype), _no_scale(x, group), x.new_empty(x.shape)


rms_norm_quantize = define(
    "rms_norm_quantize(Tensor x, Tensor weight, float eps, Tensor? residual, ScalarType dtype, int group) "
    "-> (Tensor codes, Tensor scale, Tensor total)",
    _rms_norm_quantize,
    _rms_norm_quantize_fake,
    moving=("x", "residual"),
)


def _silu_mul_quantize(x: Tensor, dtype: torch.dtype, group: int) -> tuple[Tensor, Tensor]:
    _check_silu(x, dtype, group)
    shape = [*x.shape[:-1], x.shape[-1] // 2]
    flat, group = x.reshape(-1, x.shape[-1]), within(group, shape[-1])
    if _implementation("silu_mul_quantize", x.device, dtype, group) == "triton":
        from lowbit.ops import triton

        codes, scale = triton.silu_mul_quantize(flat, dtype, group)
    else:
        codes, scale = _quantize_flat("silu_mul_quantize", reference.silu_mul(flat), dtype, _dynamic(group))
    return codes.view(shape), scale.view([*shape[:-1], _groups(shape[-1], group)])


def _check_silu(x: Tensor, dtype: torch.dtype, group: int) -> None:
    check_quantize(x, dtype, group)
    require(
        x.shape[-1] % 2 == 0,
        lambda: f"expected gate and up side by side, an even width, found {list(x.shape)}",
    )


def _silu_mul_quantize_fake(x: Tensor, dtype: torch.dtype, group: int) -> tuple[Tensor, Tensor]:
    _check_silu(x, dtype, group)
    half = x.new_empty([*x.shape[:-1], x.shape[-1] // 2], dtype=dtype)
    return half, _no_scale(half, group)


silu_mul_quantize = define(
    "silu_mul_quantize(Tensor x, ScalarType dtype, int group) -> (Tensor codes, Tensor scale)",
    _silu_mul_quantize,
    _silu_mul_quantize_fake,
    moving=("x",),
)


def _norm_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[:2])


def _norm_backward(ctx: Any, to_codes: None, to_scale: None, to_total: Tensor) -> tuple:
    """To x and residual, whose sum is given back."""
    return to_total, None, None, to_total if ctx.needs_input_grad[3] else None, None, None


for _name in ("quantize", "quantize_static", "silu_mul_quantize"):
    differentiate(_name, _constants, _nothing)
differentiate("rms_norm_quantize", _norm_setup, _norm_backward)


# ---------------------------------------------------------------------------------- hadamard


def _hadamard(x: Tensor, block: int) -> Tensor:
    _check_hadamard(x, block)
    flat = x.reshape(-1, x.shape[-1])
    name = _implementation("hadamard", x.device, block)
    if name == "triton":
        from lowbit.ops import triton

        return shaped(triton.hadamard(flat, block), *x.shape)
    return shaped((cpu.hadamard if name == "cpu" else reference.hadamard)(flat, block), *x.shape)


def _check_hadamard(x: Tensor, block: int) -> None:
    check_rows(x)
    require(
        block >= 1 and block & (block - 1) == 0,
        lambda: f"expected a power of two for the block, found {block}",
    )
    require(
        x.shape[-1] % block == 0,
        lambda: (
            f"expected a last dimension that {block} divides, found {list(x.shape)}; take a smaller block"
        ),
    )


def _hadamard_fake(x: Tensor, block: int) -> Tensor:
    _check_hadamard(x, block)
    return x.new_empty(x.shape)


define("hadamard(Tensor x, int block) -> Tensor", _hadamard, _hadamard_fake, moving=("x",))


def _hadamard_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.block = inputs[1]


def _hadamard_backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    """The matrix is orthonormal and symmetric: its own transpose."""
    return torch.ops.lowbit.hadamard(grad, ctx.block), None


differentiate("hadamard", _hadamard_setup, _hadamard_backward)
