"""Activations and weights as kernels take them: tensors, or tensor descriptors where the target has TMA."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .checks import rows_aligned
from .targets import Target
from .tile import AS_STORED, TMA, TURNED
from .tuned_tables import LaunchParameters


def operands(a: Tensor, w: Tensor, launch: LaunchParameters, target: Target) -> tuple[Any, Any, Any]:
    """(activations, weight, LOAD) for `multiply_tile`.

    a: [M, K]. w: [N, K], or [E, N, K], whose descriptor has E · N rows. Descriptors load tiles
    [block_m, block_k] and [block_n, block_k] and give zeros beyond the edges. They need rows that
    start at multiples of 16 bytes and do not overlap, whose elements lie side by side (where K is 1, a
    column may have any stride), and experts one after the other: where that is not so, or the launch
    does not ask for TMA, the tensors themselves are returned.
    """
    stacked = w.dim() == 3
    adjacent = not stacked or w.stride(0) == w.shape[1] * w.stride(1)
    if launch.tma and adjacent:
        rows = w.flatten(0, 1) if stacked else w
        if rows_aligned(a, rows) and all(t.stride(0) >= t.shape[1] and t.stride(1) == 1 for t in (a, rows)):
            from triton.tools.tensor_descriptor import TensorDescriptor  # Ascend's Triton has none

            return (
                TensorDescriptor.from_tensor(a, [launch.block_m, launch.block_k]),
                TensorDescriptor.from_tensor(rows, [launch.block_n, launch.block_k]),
                TMA.value,
            )
    return a, w, TURNED.value if target.loads_turned else AS_STORED.value


def flattens(launch: LaunchParameters, raw: Tensor, target: Target) -> bool:
    """Whether a persistent kernel's loops over tiles and over K are one (FLATTEN).

    Results of four bytes are stored by way of so much on-chip memory that the next tile's loads would find none.
    """
    return launch.persistent and launch.split_k == 1 and raw.element_size() == 2 and target.backend == "cuda"
