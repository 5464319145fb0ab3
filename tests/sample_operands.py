"""Random operands of `ops.linear` for a scheme."""

from __future__ import annotations

from typing import Any

import torch

from lowbit import ops
from lowbit.quantize import quantize
from lowbit.scheme import SCHEMES

NAMES = [name for name, scheme in SCHEMES.items() if scheme.weights is not None]


def linear_arguments(name: str, m: int, n: int, k: int, dtype: torch.dtype) -> dict[str, Any]:
    """x [m, k] and bias [n] in `dtype`, a weight [n, k] under the scheme, static scales from x itself."""
    scheme = SCHEMES[name]
    assert scheme.weights is not None
    weight = quantize(torch.randn(n, k), scheme.weights)
    found = {
        "x": torch.randn(m, k).to(dtype), "weight": weight.codes, "weight_scale": weight.scale,
        "bias": torch.randn(n).to(dtype), "activations": ops.activations_of(scheme),
        "block": ops.block_of(scheme.weights.granularity),
    }  # fmt: skip
    if scheme.needs_calibration:
        activations = quantize(found["x"].float(), scheme.activations)
        found |= {"input_scale": activations.scale, "input_zero_point": activations.zero_point}
    return found
