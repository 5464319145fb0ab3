"""Number formats: their range, their storage, and how a float32 becomes one of their codes.

Everything rounds to nearest, ties to even, and saturates: a value beyond the range becomes
the largest code of its sign. Infinities saturate too. NaN stays NaN in the float formats;
an integer format has no NaN, so NaN becomes code 0 there (`quantize` refuses it before).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # planning and streaming conversion import this module and never need torch
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DType:
    """One number format."""

    name: str
    """The field's name for it: `int8`, `e4m3fn`, …"""
    kind: Literal["int", "float", "exponent"]
    torch_name: str
    """How torch names its storage."""
    safetensors: str
    """How a safetensors header names it."""
    max: float
    """Largest finite value of a symmetric code: codes lie in [-max, max]."""
    smallest: float
    """Smallest positive value (a subnormal where the format has them)."""

    bits: int = 8

    @property
    def torch_dtype(self) -> torch.dtype:
        """How torch stores it."""
        import torch

        return getattr(torch, self.torch_name)

    def __str__(self) -> str:
        return self.name


# Symmetric codes stay in ±127: −128 has no negation, and ±128 overflows an int32
# accumulator from K = 131,072 on. Asymmetric codes use all of −128 … 127.
INT8 = DType(name="int8", kind="int", torch_name="int8", safetensors="I8", max=127.0, smallest=1.0)
E4M3FN = DType(
    name="e4m3fn", kind="float", torch_name="float8_e4m3fn", safetensors="F8_E4M3",
    max=448.0, smallest=2.0**-9,
)  # fmt: skip
E4M3FNUZ = DType(
    name="e4m3fnuz", kind="float", torch_name="float8_e4m3fnuz", safetensors="F8_E4M3FNUZ",
    max=240.0, smallest=2.0**-10,
)  # fmt: skip
E5M2 = DType(
    name="e5m2", kind="float", torch_name="float8_e5m2", safetensors="F8_E5M2",
    max=57344.0, smallest=2.0**-16,
)  # fmt: skip
E8M0 = DType(
    name="e8m0", kind="exponent", torch_name="float8_e8m0fnu", safetensors="F8_E8M0",
    max=2.0**127, smallest=2.0**-127,
)  # fmt: skip

# Of sources only, and weights only. INT4 is stored packed, eight to an int32; E2M1 (FP4), two to a byte.
INT4 = DType(
    name="int4", kind="int", torch_name="int8", safetensors="I32", max=7.0, smallest=1.0, bits=4,
)  # fmt: skip
E2M1 = DType(
    name="e2m1", kind="float", torch_name="int8", safetensors="I8", max=6.0, smallest=0.5, bits=4,
)  # fmt: skip
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

DTYPES: dict[str, DType] = {d.name: d for d in (INT8, E4M3FN, E4M3FNUZ, E5M2, E8M0)}

INT8_ASYMMETRIC_MIN, INT8_ASYMMETRIC_MAX = -128, 127
E8M0_NAN = 0xFF

# Adding and subtracting 1.5 · 2²³ rounds a float32 below 2²² to an integer, ties to even.
# torch.round does the same; the constant is for code that has no such instruction.
ROUND_MAGIC = 12582912.0


def encode(x: Tensor, dtype: DType) -> Tensor:
    """Nearest code of each element: float tensor of any shape → `dtype.torch_dtype`, same shape.

    Rounds half to even, saturates (infinities too). NaN → NaN, or 0 for int8. For E8M0 use
    `encode_e8m0`, where the rounding must be named.
    """
    import torch

    x = x.to(torch.float32)
    if dtype.kind == "int":
        return torch.nan_to_num(x, nan=0.0).clamp(-dtype.max, dtype.max).round().to(dtype.torch_dtype)
    if dtype.kind == "float":
        # Clamp first: torch's own cast turns values beyond the range into NaN or Inf.
        return x.clamp(-dtype.max, dtype.max).to(dtype.torch_dtype)
    raise ValueError(f"expected an element format, found {dtype}; use encode_e8m0 and name the rounding")


def decode(codes: Tensor) -> Tensor:
    """Codes of any format here → float32, exactly. float8 NaN codes give NaN."""
    import torch

    return codes.to(torch.float32)


def encode_e8m0(x: Tensor, rounding: Literal["floor", "ceil", "nearest"]) -> Tensor:
    """Positive float32 → the biased exponent of a power of two, uint8, same shape.

    `floor` and `ceil` go to the next power of two below and above (a power of two stays
    itself); `nearest` rounds the value, ties up. Read from the exponent bits, since
    `ceil(log2(x))` is wrong at powers of two. Range 2⁻¹²⁷ … 2¹²⁷, saturating; 0 → 2⁻¹²⁷;
    NaN, Inf and negative values → 0xFF, the format's NaN.
    """
    import torch

    x = x.to(torch.float32).contiguous()
    bits = x.view(torch.int32)
    exponent, mantissa = (bits >> 23) & 0xFF, bits & 0x7FFFFF
    subnormal = exponent == 0
    if rounding == "ceil":
        # Below 2⁻¹²⁶ the grid still has 2⁻¹²⁷ (mantissa 0x400000).
        up = torch.where(subnormal, mantissa > 0x400000, mantissa > 0)
    elif rounding == "nearest":
        up = torch.where(subnormal, mantissa >= 0x600000, mantissa >= 0x400000)
    elif rounding == "floor":
        up = torch.zeros_like(subnormal)
    else:
        raise ValueError(f"expected rounding floor, ceil or nearest, found {rounding!r}")
    code = (exponent + up.to(torch.int32)).clamp(0, 254)
    bad = torch.isnan(x) | torch.isinf(x) | (x < 0)
    return torch.where(bad, torch.full_like(code, E8M0_NAN), code).to(torch.uint8)


def decode_e8m0(codes: Tensor) -> Tensor:
    """E8M0 bytes (uint8 or float8_e8m0fnu) → float32 powers of two; 0xFF → NaN."""
    import torch

    return codes.view(torch.uint8).view(torch.float8_e8m0fnu).to(torch.float32)
