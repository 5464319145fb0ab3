"""Random operands of `ops.linear` for a scheme."""

from __future__ import annotations

import os
from typing import Any

import torch

from lowbit import ops
from lowbit.quantize import quantize
from lowbit.scheme import SCHEMES

FP8 = torch.float8_e4m3fnuz if os.environ.get("LOWBIT_MACHINE") == "gfx942" else torch.float8_e4m3fn
"""What kernels multiply: on the machine of gfx942 the one without negative zero."""
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
