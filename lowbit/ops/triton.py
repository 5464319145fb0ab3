"""The `triton` implementation: the operations in terms of lowbit.kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.kernels import fused  # type: ignore[import-not-found]
from lowbit.kernels import hadamard as hadamard_kernel  # type: ignore[import-not-found]
from lowbit.kernels import quantize as quantize_kernels  # type: ignore[import-not-found]
from lowbit.kernels.matmul import matmul  # type: ignore[import-not-found]
from lowbit.kernels.matmul_block import matmul_block  # type: ignore[import-not-found]
from lowbit.kernels.matmul_grouped import matmul_grouped  # type: ignore[import-not-found]
from lowbit.kernels.matmul_mxfp8 import matmul_mxfp8  # type: ignore[import-not-found]
from lowbit.kernels.matmul_weight_only import matmul_weight_only  # type: ignore[import-not-found]
from lowbit.ops.problem import Activations, Weights
from lowbit.ops.settings import settings


def linear(
    x: Tensor,
    weights: Weights,
    activations: Activations,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    *,
    kernel: str,
    offsets: Tensor | None = None,
    routed: Tensor | None = None,
    weight_sum: Tensor | None = None,
) -> Tensor:
    """x [M, K] (floats, or codes with `activations.scale`) → [M, N] by `kernel`, as dispatch chose it."""
    tensor = weights.tensor
    if tensor.dtype == torch.int32:
        tensor = tensor.view(torch.uint8)[..., : weights.k]
    if kernel == "matmul_weight_only":
        return matmul_weight_only(
            x, tensor, _inside_or_float(weights), bias=bias, block_shape=weights.inner_block,
            out_dtype=out_dtype,
        )  # fmt: skip
    codes = x.dtype in (torch.int8, torch.float8_e4m3fn)
    floats = not codes and activations.kind == "none"
    if kernel == "matmul_mxfp8":
        a, exponents = quantize(x, tensor.dtype, activations, "e8m0")
        return matmul_mxfp8(a, tensor, exponents, weights.scale, bias=bias, out_dtype=out_dtype)
    if floats:
        a, a_scale = x, None
    elif codes:
        a, a_scale = x, activations.scale
    else:
        a, a_scale = quantize(x, tensor.dtype, activations)
    if kernel == "matmul_grouped":
        assert offsets is not None
        return matmul_grouped(
            a, tensor, offsets.to(torch.int32), a_scale, _expert_scale(weights),
            block_shape=weights.inner_block, bias=bias,
            routed_weight=None if routed is None else routed.to(torch.float32).reshape(-1), out_dtype=out_dtype,
            fast_accum=settings.fast_accumulation,
        )  # fmt: skip
    assert a_scale is not None
    if kernel == "matmul_block":
        return matmul_block(
            a,
            tensor,
            a_scale,
            _inside_or_float(weights),
            bias=bias,
            block_shape=weights.block,
            out_dtype=out_dtype,
        )
    if activations.zero is not None and weight_sum is None:
        weight_sum = tensor.sum(1, dtype=torch.int32)
    return matmul(
        a, tensor, a_scale, weights.float_scale(), bias=bias, a_zero_point=activations.zero,
        w_sum=weight_sum, out_dtype=out_dtype, fast_accum=settings.fast_accumulation,
    )  # fmt: skip


def _inside_or_float(weights: Weights) -> Tensor:
    """Scales that lie inside the sum as stored, where a kernel reads that (E8M0 too); else as float32."""
    inside = weights.inner_block and weights.exponents
    return weights.scale.view(torch.uint8) if inside else weights.float_scale()


def _expert_scale(weights: Weights) -> Tensor:
    scale = _inside_or_float(weights)
    if not weights.block[0]:  # per tensor: [E, 1] → one value per channel
        scale = scale.unsqueeze(-1).expand(-1, weights.n, 1).contiguous()
    return scale


def quantize(
    x: Tensor, dtype: torch.dtype, activations: Activations, power_of_2: str = "float32-power-of-2"
) -> tuple[Tensor, Tensor]:
    """x [M, K] → codes [M, K] of `dtype`, float32 scales [M, groups] ([1] when static).

    power_of_2: the format of dynamic scales that are powers of two; `e8m0` gives their bytes.
    """
    scale_format = power_of_2 if activations.power_of_2 else "float32"
    if activations.kind == "tensor":
        scale = activations.static_scale()
        return quantize_kernels.quantize_static(x, scale, dtype, zero_point=activations.zero), scale
    if activations.group:
        return quantize_kernels.quantize_per_group(x, dtype, activations.group, scale_format=scale_format)
    return quantize_kernels.quantize_per_token(x, dtype, scale_format=scale_format)


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, dtype: torch.dtype, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K] → (codes, scale, x + residual)."""
    codes, scale, total = fused.rms_norm_quantize(
        x, weight, eps, dtype, residual=residual, group_size=group or None
    )
    return codes, scale, _copy(x) if total is None else total


def silu_mul_quantize(x: Tensor, dtype: torch.dtype, group: int) -> tuple[Tensor, Tensor]:
    """x [M, 2·I] → (codes [M, I], scale)."""
    gate, up = x.chunk(2, dim=-1)
    return fused.silu_mul_quantize(gate, up, dtype, group_size=group or None)


def hadamard(x: Tensor, block: int) -> Tensor:
    """x [M, K] transformed in blocks along K."""
    return _copy(x) if block == 1 else hadamard_kernel.hadamard(x, block)


def _copy(x: Tensor) -> Tensor:
    """A contiguous one, as the fake implementations say; `clone` alone keeps the order of strides."""
    return x.clone(memory_format=torch.contiguous_format)
