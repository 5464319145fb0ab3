"""Choose scales, quantize, dequantize: plain torch, and the oracle that every faster path must equal.

The arithmetic, bit for bit, in float32:

    scale      = absmax / dtype.max                 (symmetric; a scale below 2⁻¹²⁶ becomes 1)
    codes      = encode(x / scale + zero_point)     (a true division, then round half to even)
    x ≈        = (codes − zero_point) · scale

Division and not multiplication by a reciprocal: the two differ by an ulp at ties, and this
is what compressed-tensors does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowbit.dtypes import (
    E8M0,
    INT8_ASYMMETRIC_MAX,
    INT8_ASYMMETRIC_MIN,
    decode,
    decode_e8m0,
    encode,
    encode_e8m0,
)
from lowbit.granularity import PerTensor, block_shape, expand_scale, reduce_tiles, scale_shape
from lowbit.scheme import TensorSpec

Method = Literal["absmax", "mse"]

# The smallest normal float32. Scales below it are not worth having: whether they flush to
# zero depends on the processor, and everything that they could scale is zero in BF16 as well.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """Codes with what it takes to read them."""

    codes: Tensor
    """`spec.dtype.torch_dtype`, the shape of the source."""
    scale: Tensor
    """float32 (uint8 for E8M0 scales), `scale_shape(codes.shape, spec.granularity)`."""
    zero_point: Tensor | None
    """int8, the shape of `scale`; None when symmetric."""
    spec: TensorSpec

    def dequantize(self) -> Tensor:
        """float32, the shape of `codes`."""
        return dequantize(self.codes, self.scale, self.spec, self.zero_point)


def check_finite(x: Tensor, name: str = "tensor") -> None:
    """Raise ValueError naming the first NaN or Inf and its position."""
    finite = torch.isfinite(x)
    if bool(finite.all()):
        return
    where = tuple(int(i) for i in (~finite).nonzero()[0])
    raise ValueError(
        f"expected finite values in {name}, found {float(x[where])} at {list(where)} "
        f"({int((~finite).sum())} in all); repair the source, or keep this tensor unquantized"
    )


def scale_from_range(low: Tensor, high: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor | None]:
    """Ranges per tile (float, `scale_shape`) → (scale, zero point or None) as stored.

    The range is widened to contain 0, which must be exact. All-zero tiles get scale 1 and
    zero point 0. E8M0 scales round up to the next power of two of absmax / dtype.max, so
    that nothing saturates (the OCP specification's own rounding is down, with saturation at
    the top; compressed-tensors rounds as we do but for exact ties).
    """
    low, high = low.to(torch.float32).clamp(max=0.0), high.to(torch.float32).clamp(min=0.0)
    one = torch.ones((), dtype=torch.float32, device=low.device)
    if not spec.symmetric:
        span = high - low
        scale = span / float(INT8_ASYMMETRIC_MAX - INT8_ASYMMETRIC_MIN)
        empty = scale < SMALLEST_SCALE
        scale = torch.where(empty, one, scale)
        zero = (INT8_ASYMMETRIC_MIN - low / scale).round()
        zero = torch.where(empty, torch.zeros_like(zero), zero)
        return scale, zero.clamp(INT8_ASYMMETRIC_MIN, INT8_ASYMMETRIC_MAX).to(torch.int8)
    scale = torch.maximum(high, -low) / spec.dtype.max
    scale = torch.where(scale < SMALLEST_SCALE, one, scale)
    if spec.scale == "e8m0":
        return encode_e8m0(scale, "ceil"), None
    if spec.scale == "float32-power-of-2":
        return decode_e8m0(encode_e8m0(scale, "ceil")), None
    return scale, None


def scale_as_float(scale: Tensor) -> Tensor:
    """A stored scale (float, E8M0 bytes as uint8, or the bits of a float32 in an int64) → float32."""
    if scale.dtype in (torch.uint8, E8M0.torch_dtype):
        return decode_e8m0(scale)
    if scale.dtype == torch.int64:  # msModelSlim's deq_scale
        return scale.to(torch.int32).view(torch.float32)
    return scale.to(torch.float32)


def choose_scale(x: Tensor, spec: TensorSpec, method: Method = "absmax") -> tuple[Tensor, Tensor | None]:
    """Scales (and zero points) for `x` […, N, K] → as `scale_from_range` returns them.

    `absmax` covers the range. `mse` shrinks it where clipping a few outliers lowers the
    tile's squared error: a search over 80 ranges from 1 down to 0.2 of absmax.
    """
    x = x.to(torch.float32)
    low, high = reduce_tiles(x, spec.granularity, "amin"), reduce_tiles(x, spec.granularity, "amax")
    if method == "absmax":
        return scale_from_range(low, high, spec)
    if method != "mse":
        raise ValueError(f"expected method absmax or mse, found {method!r}")
    return _mse_scale(x, low, high, spec)


def _mse_scale(x: Tensor, low: Tensor, high: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor | None]:
    best_scale, best_zero = scale_from_range(low, high, spec)
    best_error = _tile_error(x, best_scale, best_zero, spec)
    for step in range(1, 80):
        shrink = 1.0 - step / 100
        scale, zero = scale_from_range(low * shrink, high * shrink, spec)
        error = _tile_error(x, scale, zero, spec)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        if zero is not None and best_zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _tile_error(x: Tensor, scale: Tensor, zero: Tensor | None, spec: TensorSpec) -> Tensor:
    """Sum of squared errors per tile, shape of `scale`, float64 so that long rows add up."""
    codes = quantize_with(x, scale, spec, zero)
    squared = (dequantize(codes, scale, spec, zero) - x).double().square()
    return _sum_tiles(squared, spec)


def _sum_tiles(x: Tensor, spec: TensorSpec) -> Tensor:
    shape = scale_shape(tuple(x.shape), spec.granularity)
    if isinstance(spec.granularity, PerTensor):
        return x.sum().reshape(1)
    if not x.numel():
        return x.new_zeros(shape)
    rows, cols = block_shape(tuple(x.shape), spec.granularity)
    pad_cols, pad_rows = -x.shape[-1] % cols, (-x.shape[-2] % rows if x.dim() > 1 else 0)
    x = torch.nn.functional.pad(x, (0, pad_cols, 0, pad_rows) if x.dim() > 1 else (0, pad_cols))
    x = x.unflatten(-1, (-1, cols)).sum(-1)
    if rows > 1:
        x = x.unflatten(-2, (-1, rows)).sum(-2)
    return x.reshape(shape)


def quantize_with(x: Tensor, scale: Tensor, spec: TensorSpec, zero_point: Tensor | None = None) -> Tensor:
    """Codes of `x` under given scales: `spec.dtype.torch_dtype`, the shape of `x`.

    NaN and Inf follow `encode`: Inf saturates, NaN stays NaN in float formats and is 0 in int8.
    """
    scaled = x.to(torch.float32) / expand_scale(scale_as_float(scale), tuple(x.shape), spec.granularity)
    if zero_point is None:
        return encode(scaled, spec.dtype)
    zero = expand_scale(zero_point.to(torch.float32), tuple(x.shape), spec.granularity)
    shifted = torch.nan_to_num(scaled, nan=0.0, posinf=torch.inf, neginf=-torch.inf) + zero
    return shifted.clamp(INT8_ASYMMETRIC_MIN, INT8_ASYMMETRIC_MAX).round().to(torch.int8)


def quantize(x: Tensor, spec: TensorSpec, method: Method = "absmax", *, name: str = "tensor") -> Quantized:
    """Choose scales for `x` and encode it. Raises ValueError on NaN or Inf (see `check_finite`)."""
    check_finite(x, name)
    scale, zero = choose_scale(x, spec, method)
    return Quantized(codes=quantize_with(x, scale, spec, zero), scale=scale, zero_point=zero, spec=spec)


def dequantize(codes: Tensor, scale: Tensor, spec: TensorSpec, zero_point: Tensor | None = None) -> Tensor:
    """(codes − zero_point) · scale in float32, the shape of `codes`."""
    shape = tuple(codes.shape)
    values = decode(codes)
    if zero_point is not None:
        values = values - expand_scale(zero_point.to(torch.float32), shape, spec.granularity)
    return values * expand_scale(scale_as_float(scale), shape, spec.granularity)
