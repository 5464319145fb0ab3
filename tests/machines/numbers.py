"""Bits and the numbers that they are, as arrays. Unsigned integers hold the bits."""

from __future__ import annotations

import numpy as np
import torch

UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
Lanes = np.ndarray
"""A value for each thread."""


class Unknown(Exception):
    """An instruction that a machine does not have."""


def bfloat16(bits: Lanes) -> Lanes:
    """uint16 → float32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(x: Lanes) -> Lanes:
    """Any float → uint16, rounded to nearest, ties to even, once."""
    return torch.from_numpy(np.ascontiguousarray(x)).to(torch.bfloat16).view(torch.uint16).numpy()


def e4m3(bits: Lanes, dtype: torch.dtype = torch.float8_e4m3fn) -> Lanes:
    """uint8 → float32, exactly."""
    return torch.from_numpy(np.ascontiguousarray(bits)).view(dtype).float().numpy()


def to_e4m3(x: Lanes, dtype: torch.dtype = torch.float8_e4m3fn) -> Lanes:
    """float32 → uint8, rounded to nearest, ties to even; what is too large becomes the largest."""
    largest = torch.finfo(dtype).max
    return (
        torch.from_numpy(np.ascontiguousarray(x)).clamp(-largest, largest).to(dtype).view(torch.uint8).numpy()
    )


def e8m0(bits: Lanes) -> Lanes:
    """uint8 → 2^(byte − 127), float64."""
    return np.ldexp(1.0, bits.astype(np.int64) - 127)


def elements(raw: np.ndarray, kind: str, fp8: torch.dtype = torch.float8_e4m3fn) -> np.ndarray:
    """Bytes, uint8 […, n] → what a product multiplies, float64 […, n or n / 2], which holds sums exactly enough."""
    raw = np.ascontiguousarray(raw)
    if kind == "s8":
        return raw.view(np.int8).astype(np.float64)
    if kind == "e4m3":
        return e4m3(raw, fp8).astype(np.float64)
    if kind == "bf16":
        return bfloat16(raw.view(np.uint16)).astype(np.float64)
    if kind == "f16":
        return raw.view(np.float16).astype(np.float64)
    raise Unknown(f"a product of {kind}")
