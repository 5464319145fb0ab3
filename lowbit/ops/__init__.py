"""Operators: quantized products, quantization and rotation, as `torch.library` operations.

| function | what it returns |
|---|---|
| `linear(x, weight, weight_scale, bias, *, activations, block, …)` | x · Wᵀ + bias, in x.dtype |
| `linear_grouped(x, weight, weight_scale, offsets, …)` | the same per expert, rows sorted by expert |
| `linear_bfloat16(x, weight, bias)` | x · Wᵀ + bias in float32, W in bfloat16 and never widened as a whole |
| `matmul(a, a_scale, weight, weight_scale, …)` | the same from codes that are quantized already |
| `dequantize(weight, weight_scale, block, k, dtype)` | the weight as floats |
| `quantize(x, dtype, group, power_of_2)` | (codes, scale), dynamic: per token or per group |
| `quantize_static(x, scale, zero_point, dtype)` | codes under a given scale |
| `rms_norm_quantize(x, weight, eps, residual, …)` | (codes, scale, x + residual) |
| `silu_mul_quantize(x, dtype, group)` | (codes, scale) of silu(gate) · up |
| `hadamard(x, block)` | x times the orthonormal Walsh–Hadamard matrix, in blocks of the last dimension |

**`block`** says which elements of a weight [N, K] share a scale, as (rows, columns), 0 meaning
all of them: `(0, 0)` per tensor, scale [1]; `(1, 0)` per channel, [N, 1]; `(1, g)` per group,
[N, ⌈K/g⌉]; `(r, c)` per block, [⌈N/r⌉, ⌈K/c⌉]. `block_of(granularity)` gives it.

**`activations`** says what happens to x before the product; the codes have the weight's dtype:

| | scale | |
|---|---|---|
| `none` | | weight-only: x stays as it is, codes are decoded on the way |
| `token` | dynamic, per row | with `block` (0, 0) or (1, 0) |
| `group` | dynamic, per row and `block[1]` columns | 1×128 against 128×128 blocks |
| `group_pow2` | as `group`, rounded up to a power of two | MX (block (1, 32)), and HF's `scale_fmt: ue8m0` |
| `tensor` | static: `input_scale` [1], optionally `input_zero_point` int8 [1] | of experts: [E, 1] |

`activations_of(scheme)` gives it.

Every operation runs as `triton`, `cpu` or `reference`, chosen by `dispatch.choose`; the last is
the oracle that the others equal, bit for bit where codes are integers with no scale along K.
All trace under `torch.compile(fullgraph=True)` with any number of rows. Gradients reach `x`
(through the dequantized weight; rounding counts as identity) and `bias`, never codes and scales.

Nothing falls back to dequantize-and-multiply unseen: it is logged once per reason, and raises
`NoKernelError` under `allow_fallback(False)` or LOWBIT_NO_FALLBACK=1. `LOWBIT_CPU_ISA` pins the
instruction set of the CPU path (see `cpu_isa.ISAS`). Floats are summed in float32 there; `use_float64_sums(True)`
or LOWBIT_FLOAT64_SUMS=1 makes fp8 as exact as int8, the same bits on every CPU. `use_fast_accumulation(True)` or
LOWBIT_FAST_ACCUMULATION=1 lets Hopper sum fp8 in its matrix unit, as `torch._scaled_mm`'s `use_fast_accum` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.granularity import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from lowbit.ops import (  # importing them registers the operations
    eager,
    register,
    register_bfloat16,
    register_quantize,
)
from lowbit.ops.checks import check_no_tangent, check_no_transform
from lowbit.ops.settings import (
    NoKernelError,
    allow_fallback,
    use_fast_accumulation,
    use_float64_sums,
    use_implementation,
)
from lowbit.scheme import Scheme

__all__ = [
    "NoKernelError", "activations_of", "allow_fallback", "block_of", "dequantize", "hadamard", "linear",
    "linear_bfloat16", "linear_grouped", "matmul", "quantize", "quantize_static", "rms_norm_quantize",
    "silu_mul_quantize", "use_fast_accumulation", "use_float64_sums", "use_implementation",
]  # fmt: skip

_ops = torch.ops.lowbit


def block_of(granularity: Granularity) -> tuple[int, int]:
    """A weight's granularity as the `block` argument."""
    match granularity:
        case PerTensor():
            return 0, 0
        case PerChannel() | PerToken():
            return 1, 0
        case PerGroup(size):
            return 1, size
        case PerBlock(rows, cols):
            return rows, cols
    raise TypeError(f"expected a granularity, found {granularity!r}")


def activations_of(scheme: Scheme) -> str:
    """A scheme's activations as the `activations` argument."""
    spec = scheme.activations
    if spec is None:
        return "none"
    if not spec.dynamic:
        if not isinstance(spec.granularity, PerTensor):
            raise ValueError(f"expected static activations per tensor, found {spec} in scheme {scheme.name}")
        return "tensor"
    if isinstance(spec.granularity, PerGroup):
        return "group" if spec.scale == "float32" else "group_pow2"
    if isinstance(spec.granularity, PerToken):
        return "token"
    raise ValueError(
        f"expected dynamic activations per token or per group, found {spec} in scheme {scheme.name}"
    )


def linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    activations: str,
    block: tuple[int, int],
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    weight_sum: Tensor | None = None,
) -> Tensor:
    """x · Wᵀ + bias: [..., K] float16, bfloat16 or float32 → [..., N] of the same dtype.

    weight: int8 or float8_e4m3fn [N, K] as stored, or int32 [N, ⌈K/4⌉] holding four int8 codes
    plus 128 each, little end first (compressed-tensors' pack-quantized; weight-only). weight_scale:
    float32, or E8M0 bytes as uint8, of the shape that `block` gives; it multiplies. bias: [N].
    activations, block: see the module. input_scale, input_zero_point: for activations "tensor".
    weight_sum: int32 [N], `weight.sum(1, dtype=torch.int32)`; spares computing it at every call
    where a GPU kernel needs it for a zero point.

    The order is acc → × activation scale → × weight scale → + bias, in float32, then one
    rounding to x.dtype. int8 sums are exact (K < 131,072; 65,794 with a zero point). A row with
    NaN or Inf gives NaN when it is quantized dynamically. Raises ValueError naming what was
    expected, found, and what to do.
    """
    arguments = (x, weight, weight_scale, bias, input_scale, input_zero_point, weight_sum, activations, block)
    if not torch.compiler.is_compiling() and eager.applies(*arguments[:-2]):
        return register.linear(*arguments)
    check_no_tangent(x, bias)
    return _ops.linear.default(*arguments)


def linear_bfloat16(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · Wᵀ + bias for a weight that is bfloat16 [N, K] where the rest computes in a wider dtype.

    x: [..., K] float32, float16 or bfloat16 → [..., N] of the same dtype. Widening a bfloat16 is
    exact, so this equals `F.linear(x, weight.float())` up to the order of the float32 sums, at half
    of the memory. A gradient reaches x and bias. On CPUs only: elsewhere the weight is widened, which
    is logged (see the module).
    """
    if not torch.compiler.is_compiling() and eager.applies(x, weight, bias):
        return register_bfloat16.linear(x, weight, bias)
    check_no_tangent(x, bias)
    return _ops.linear_bfloat16.default(x, weight, bias)


def linear_grouped(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    offsets: Tensor,
    *,
    activations: str,
    block: tuple[int, int],
    bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> Tensor:
    """Experts: rows offsets[e] … offsets[e+1] of x [T, K] times weight[e]ᵀ → [T, N] in x.dtype.

    weight: [E, N, K] (or packed int32). weight_scale: [E, …] with the rest as in `linear`
    (per tensor: [E, 1]). offsets: int32 or int64 [E + 1], rising from 0 to T; experts may be
    empty. bias: [E, N]. row_weight: [T], the routed weight, multiplied in float32 after the
    bias. activations: as in `linear`; for "tensor" `input_scale` is float32 [E, 1], one of each
    expert, and there are no zero points.
    """
    arguments = (x, weight, weight_scale, offsets, bias, row_weight, input_scale, activations, block)
    if not torch.compiler.is_compiling() and eager.applies(*arguments[:-2]):
        return register.linear_grouped(*arguments)
    check_no_tangent(x, bias, row_weight)
    return _ops.linear_grouped.default(*arguments)


def matmul(
    a: Tensor,
    a_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    block: tuple[int, int],
    out_dtype: torch.dtype,
    a_zero_point: Tensor | None = None,
    weight_sum: Tensor | None = None,
) -> Tensor:
    """`linear` from codes: a int8 or float8_e4m3fn [..., K] like the weight → [..., N] of `out_dtype`.

    a_scale: float32 [1] per tensor, [..., 1] per token, or [..., ⌈K/block[1]⌉] per group, as
    `quantize` returns it. a_zero_point: int8 [1], with one scale per tensor. A gradient reaches bias.
    """
    tensors = (a, a_scale, weight, weight_scale, bias, a_zero_point, weight_sum)
    if not torch.compiler.is_compiling() and eager.applies(*tensors):
        return register.matmul(*tensors, block, out_dtype)
    check_no_tangent(a_scale, weight_scale, bias)
    return _ops.matmul.default(*tensors, block, out_dtype)


def dequantize(
    weight: Tensor,
    weight_scale: Tensor,
    *,
    block: tuple[int, int],
    k: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """code · scale in float32, rounded to `dtype`: [(E,) N, K] from a weight as `linear` takes it."""
    return _ops.dequantize.default(weight, weight_scale, block, k, dtype)


def quantize(
    x: Tensor, dtype: torch.dtype, *, group: int = 0, power_of_2: bool = False
) -> tuple[Tensor, Tensor]:
    """Dynamic quantization along the last dimension: (codes of `dtype` [..., K], float32 scale).

    dtype: int8 (±127) or float8_e4m3fn. group: elements per scale, 0 for the whole row; scale
    [..., ⌈K/group⌉] or [..., 1]. Equals `lowbit.quantize`: scale = absmax / largest code (1 for a
    row of zeros), codes = x / scale rounded half to even. power_of_2: scales rounded up.
    """
    if not torch.compiler.is_compiling() and eager.applies(x):
        return register_quantize.quantize(x, dtype, group, power_of_2)
    check_no_transform(x)
    return _ops.quantize.default(x, dtype, group, power_of_2)


def quantize_static(
    x: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, dtype: torch.dtype
) -> Tensor:
    """Codes of x [..., K] under one scale [1] (and zero point int8 [1]): saturating, half to even."""
    if not torch.compiler.is_compiling() and eager.applies(x, scale, zero_point):
        return register_quantize.quantize_static(x, scale, zero_point, dtype)
    check_no_transform(x, scale)
    return _ops.quantize_static.default(x, scale, zero_point, dtype)


def rms_norm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    *,
    dtype: torch.dtype,
    group: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm of h = x (+ residual), quantized: (codes, scale, h in x.dtype), see `quantize`.

    x, residual: [..., K] of one dtype; weight: [K]. h / √(mean(h²) + eps) is computed in float32 and
    rounded to x.dtype, then multiplied by the weight and rounded again, as transformers does. A gradient
    reaches x and residual through h.
    """
    arguments = (x, weight, eps, residual, dtype, group)
    if not torch.compiler.is_compiling() and eager.applies(x, weight, residual):
        return register_quantize.rms_norm_quantize(*arguments)
    check_no_tangent(x, weight, residual)
    return _ops.rms_norm_quantize.default(*arguments)


def silu_mul_quantize(x: Tensor, *, dtype: torch.dtype, group: int = 0) -> tuple[Tensor, Tensor]:
    """silu(gate) · up of x [..., 2·I] = (gate, up), quantized: (codes [..., I], scale), see `quantize`.

    silu is computed in float32 and rounded to x.dtype, as is the product with up, as transformers does.
    """
    if not torch.compiler.is_compiling() and eager.applies(x):
        return register_quantize.silu_mul_quantize(x, dtype, group)
    check_no_transform(x)
    return _ops.silu_mul_quantize.default(x, dtype, group)


def hadamard(x: Tensor, block: int) -> Tensor:
    """x [..., K] · H, H block-diagonal of orthonormal Sylvester–Hadamard matrices of `block` (a power
    of two that divides K), computed in float32 and rounded to x.dtype. Its own inverse."""
    check_no_tangent(x)
    return _ops.hadamard.default(x, block)
