"""What a format for integer units stores beside codes for static activations: their product's scale and bias.

With activations xq = x / input_scale + offset and weights W ≈ Wq · scale, the engine computes

    y = (Σ_k xq · Wq + quant_bias) · deq_scale
    deq_scale  = input_scale · scale                                 in float32
    quant_bias = round(bias / deq_scale) − offset · Σ_k Wq           in int32

Source: msModelSlim's `ascend_v1` saver, which computes both in float32. Here the sums are integers, so
that the part of the offset is exact; the bias is divided in float64 by deq_scale as written.
"""

from __future__ import annotations

import numpy as np

from lowbit.errors import InputError

_LARGEST = 2**31 - 1


class RowSums:
    """Σ_k of int8 codes [N, K] that pass in blocks of bytes, wherever these are cut. Idle where they are not wanted."""

    def __init__(self, shape: tuple[int, ...], *, wanted: bool) -> None:
        self._wanted = wanted
        self._cols = shape[-1] if wanted else 1
        self._position = 0
        self.values = np.zeros(shape[0] if wanted else 0, np.int64)

    def add(self, block: np.ndarray) -> None:
        """The next bytes, uint8."""
        if not self._wanted or not block.size:
            return
        row, column = divmod(self._position, self._cols)
        starts = np.arange(-column, block.size, self._cols)
        starts[0] = 0
        sums = np.add.reduceat(block.view(np.int8), starts, dtype=np.int64)
        self.values[row : row + sums.size] += sums
        self._position += block.size


def require_no_bias(quant_bias: np.ndarray, offset: int, sums: np.ndarray, name: str) -> None:
    """InputError naming `name` where int32 [N] holds more than the part of the offset, given row sums int64 [N].

    Some versions of msModelSlim write no other bias. The slack is for those that compute that part in float32.
    """
    part = offset * sums
    left = quant_bias + part
    if (beyond := np.abs(left) > 1 + np.abs(part) / 2**16).any():
        row = int(np.flatnonzero(beyond)[0])
        raise InputError(
            f"{name}: expected no bias in it, since there is none beside it, found one of {left[row]} steps in row "
            f"{row}, which would be lost; start from the model in float, or quantize it so that biases are written too"
        )


def static_tensors(
    input_scale: np.float32,
    offset: int,
    bias: np.ndarray | None,
    scale: np.ndarray,
    sums: np.ndarray,
    name: str,
) -> tuple[np.ndarray, np.ndarray]:
    """(deq_scale float32 [N], quant_bias int32 [N]) of weight scales float32 [N] and row sums int64 [N].

    bias: float32 [N]. InputError naming `name` where a bias does not fit into int32.
    """
    deq_scale = np.float32(input_scale) * scale.astype(np.float32)
    steps = np.zeros(deq_scale.shape)
    if bias is not None:
        with np.errstate(all="ignore"):  # what is not finite does not fit
            steps = np.rint(bias.astype(np.float64) / deq_scale.astype(np.float64))
    fits = np.abs(steps - offset * sums) <= _LARGEST
    if not fits.all():
        row = int(np.flatnonzero(~fits)[0])
        found = 0.0 if bias is None else bias[row]
        raise InputError(
            f"{name}: expected a bias that fits into int32, found {found} in steps of {deq_scale[row]} in row {row}; "
            "leave this module dynamic with an override: int8"
        )
    return deq_scale, (steps.astype(np.int64) - offset * sums).astype(np.int32)
