"""One scale per tensor for all weights that engines join: they would round the codes again, to the largest scale."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.checkpoint.rules import matmul_key
from lowbit.granularity import PerTensor
from lowbit.scheme import TensorSpec


def share_scales(scales: Mapping[str, Tensor], spec: TensorSpec, model_type: str = "") -> dict[str, Tensor]:
    """Module → its scale; of scales per tensor the largest of those of the matrix that engines join it to.

    `model_type`: config.json's, on which that depends (see `rules.matmul_key`).
    """
    if not isinstance(spec.granularity, PerTensor):
        return dict(scales)
    keys = {module: matmul_key(module, model_type) or (module,) for module in scales}
    largest: dict[tuple[str, ...], Tensor] = {}
    for module, scale in scales.items():
        key = keys[module]
        largest[key] = torch.maximum(largest.get(key, scale), scale)
    return {module: largest[key] for module, key in keys.items()}
