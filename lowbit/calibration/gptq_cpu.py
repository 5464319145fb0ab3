"""The column loops of GPTQ and coordinate descent on the CPU, a row of the weight at a time.

A column loop of torch operations costs a dozen dispatches per column; rows do not interact, so one
compiled loop per row over a block of columns does the same arithmetic from registers and L2.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from lowbit.compiling import CACHE  # which says so when compiling takes long

INT, E4M3FN = 0, 1


@njit(inline="always", cache=CACHE)
def _code(x, kind, largest):
    """float32 → nearest code as a float32: half to even, saturating."""
    if kind == 0:
        r = np.rint(x)
        return np.float32(min(max(r, -largest), largest))
    a = min(abs(x), largest)
    if a < np.float32(0.015625):  # below 2⁻⁶ e4m3fn counts in steps of 2⁻⁹
        r = np.float32(np.rint(a * np.float32(512.0)) * np.float32(0.001953125))
    else:
        bits = np.float32(a).view(np.int32)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF
        r = min(np.int32(bits).view(np.float32), largest)
    return np.float32(-r) if x < 0 else np.float32(r)


@njit(parallel=True, cache=CACHE, fastmath={"contract"})
def gptq_block(work, scale, group, upper, start, kind, largest, codes, errors):
    """Round columns [start, start + B) of every row; float32 throughout.

    `work`, `codes` [N, K] (work is spoilt), `scale` [N, G], `group` [B] the scale of each column, `upper` [B, B]
    the factor's diagonal block, `errors` [N, B].
    """
    rows, columns = errors.shape
    for n in prange(rows):
        row = work[n, start : start + columns]
        for j in range(columns):
            s = scale[n, group[j]]
            w = row[j]
            c = _code(w / s, kind, largest)
            codes[n, start + j] = c
            e = (w - c * s) / upper[j, j]
            errors[n, j] = e
            for t in range(j + 1, columns):
                row[t] -= e * upper[j, t]


@njit(parallel=True, cache=CACHE, fastmath={"contract"})
def descend_block(codes, scale, gradient, h, kind, largest, moved):
    """One visit of every column of a block: `codes`, `scale`, `gradient` (Δ·H), `moved` [N, B]; `h` [B, B].

    `codes` is updated in place, `moved` says by how much the values changed.
    """
    rows, columns = codes.shape
    for n in prange(rows):
        for j in range(columns):
            s = scale[n, j]
            old = codes[n, j]
            current = old * s
            c = _code((current - gradient[n, j] / max(h[j, j], np.float32(1e-12))) / s, kind, largest)
            step = c * s - current
            moved[n, j] = step
            if c != old:
                codes[n, j] = c
                for t in range(columns):
                    gradient[n, t] += step * h[j, t]
