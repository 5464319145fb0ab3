# mypy: ignore-errors
# The bodies below are compiled by numba, whose intrinsics mypy cannot type.
"""Rows of elements to float32 and back, and what every compiled CPU loop has in common.

The loops, `prepare`, `hadamard` and `matmul`, are compiled by numba per instruction set and
cached on disk. Each is a C function of one int64 parameter block, run by every thread of a
parallel region at once; work is handed out through an atomic counter in that block. So a call
crosses from Python once, without the GIL, and needs no numba dispatcher.

numba's cache is keyed on processor and features, a function's bytecode and its closure, but
not on the files of what it calls: `stamp`, a digest of these sources, sits in the closure so
that an edit or an upgrade recompiles.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import numpy as np
from numba import carray, njit, types

import lowbit.compiling  # noqa: F401  (says so when it takes long)
from lowbit.ops.cpu_emit import bf16_to_f32, e4m3_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16, pointer
from lowbit.ops.cpu_params import BF16, E4M3_CODES, F16, I8_CODES

SIGNATURE = types.void(types.CPointer(types.int64))


@njit
def load_row(dtype, source, out, n):  # type: ignore[no-untyped-def]
    """n elements of any input type → float32, exactly."""
    if dtype == F16:
        half = carray(pointer(source), n, np.uint16)
        for i in range(n):
            out[i] = f16_to_f32(half[i])
    elif dtype == BF16:
        brain = carray(pointer(source), n, np.uint16)
        for i in range(n):
            out[i] = bf16_to_f32(brain[i])
    elif dtype == I8_CODES:
        codes = carray(pointer(source), n, np.int8)
        for i in range(n):
            out[i] = np.float32(codes[i])
    elif dtype == E4M3_CODES:
        raw = carray(pointer(source), n, np.uint8)
        for i in range(n):
            out[i] = e4m3_to_f32(raw[i])
    else:
        full = carray(pointer(source), n, np.float32)
        for i in range(n):
            out[i] = full[i]


@njit
def store_row(dtype, values, target, n):  # type: ignore[no-untyped-def]
    """float32 → n elements of float32, float16 or bfloat16, half to even."""
    if dtype == F16:
        half = carray(pointer(target), n, np.uint16)
        for i in range(n):
            half[i] = f32_to_f16(values[i])
    elif dtype == BF16:
        brain = carray(pointer(target), n, np.uint16)
        for i in range(n):
            brain[i] = f32_to_bf16(values[i])
    else:
        full = carray(pointer(target), n, np.float32)
        for i in range(n):
            full[i] = values[i]


@cache
def stamp() -> str:
    """Digest of the sources that the compiled loops come from."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("cpu_*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
