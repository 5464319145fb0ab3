"""One scale per tensor for all weights that engines join: they would round the codes again, to the largest scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lowbit.checkpoint.rules import matmul_key
from lowbit.granularity import PerTensor
from lowbit.scheme import TensorSpec

MatrixOf = Callable[[str], tuple[str, ...] | None]
"""Module → the same for all that engines join to one matrix with it, as `rules.matmul_key` has it; None: alone."""


def share_scales(
    scales: Mapping[str, Tensor], spec: TensorSpec, matrix_of: MatrixOf = matmul_key
) -> dict[str, Tensor]:
    """Module → its scale; of scales per tensor the largest of those of the matrix that engines join it to.

    `matrix_of`: for names that are not the checkpoint's, and models of which engines join others (see `in_checkpoint`).
    """
    if not isinstance(spec.granularity, PerTensor):
        return dict(scales)
    keys = {module: matrix_of(module) or (module,) for module in scales}
    largest: dict[tuple[str, ...], Tensor] = {}
    for module, scale in scales.items():
        key = keys[module]
        largest[key] = torch.maximum(largest.get(key, scale), scale)
    return {module: largest[key] for module, key in keys.items()}


def in_checkpoint(disk_name: Callable[[str], str], model_type: str) -> MatrixOf:
    """`matmul_key` by the checkpoint's names, which engines go by: DeepSeek-V4's are not transformers'."""
    return lambda module: matmul_key(disk_name(module), model_type)
