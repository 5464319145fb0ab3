"""What the scalar unit and the matrix unit compute, on numpy arrays; a scalar is an array of no dimensions."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from ..memory import Fault
from ..numbers import Unknown

Value = np.ndarray


def _unsigned(x: Value) -> Value:
    return x if x.dtype == np.bool_ else x.view(f"u{x.dtype.itemsize}")


def _divide(a: Value, b: Value) -> Value:
    """Towards zero."""
    if (b == 0).any():
        raise Fault("a division by zero")
    quotient = np.abs(a.astype(np.int64)) // np.abs(b.astype(np.int64))
    return (quotient * np.sign(a.astype(np.int64)) * np.sign(b.astype(np.int64))).astype(a.dtype)


def _remainder(a: Value, b: Value) -> Value:
    if (b == 0).any():
        raise Fault("a remainder by zero")
    return np.fmod(a, b)


def _shift(a: Value, b: Value, way: Callable[[Value, Value], Value]) -> Value:
    if ((b < 0) | (b >= 8 * b.dtype.itemsize)).any():
        raise Fault("a shift by more bits than there are")
    return way(a, b)


BINARY: dict[str, Callable[[Value, Value], Value]] = {
    "arith.addi": np.add, "arith.subi": np.subtract, "arith.muli": np.multiply,
    "arith.divsi": _divide, "arith.remsi": _remainder,
    "arith.minsi": np.minimum, "arith.maxsi": np.maximum,
    "arith.andi": np.bitwise_and, "arith.ori": np.bitwise_or, "arith.xori": np.bitwise_xor,
    "arith.shli": lambda a, b: _shift(a, b, np.left_shift),
    "arith.shrsi": lambda a, b: _shift(a, b, np.right_shift),
    "arith.shrui": lambda a, b: _shift(a, b, lambda x, y: (_unsigned(x) >> _unsigned(y)).view(x.dtype)),
    "arith.addf": np.add, "arith.subf": np.subtract, "arith.mulf": np.multiply, "arith.divf": np.divide,
    "arith.maxnumf": np.fmax, "arith.minnumf": np.fmin,
}  # fmt: skip

UNARY: dict[str, Callable[[Value], Value]] = {
    "arith.negf": np.negative, "math.sqrt": np.sqrt,
}  # fmt: skip

COMPARE: dict[str, Callable[[Value, Value], Value]] = {
    "eq": np.equal, "ne": np.not_equal, "slt": np.less, "sle": np.less_equal,
    "sgt": np.greater, "sge": np.greater_equal,
    "ult": lambda a, b: _unsigned(a) < _unsigned(b), "uge": lambda a, b: _unsigned(a) >= _unsigned(b),
    "oeq": np.equal, "une": np.not_equal, "olt": np.less, "ole": np.less_equal,
    "ogt": np.greater, "oge": np.greater_equal,
}  # fmt: skip


def cast(name: str, x: Value, dtype: type) -> Value:
    """One of arith's conversions to `dtype`."""
    if name == "arith.bitcast":
        return np.ascontiguousarray(x).view(dtype).reshape(x.shape)
    if name in ("arith.extui", "arith.index_castui"):
        return _unsigned(x).astype(dtype)
    if name == "arith.fptosi":
        limits = np.iinfo(dtype)
        whole = np.trunc(x.astype(np.float64))
        if not ((whole >= limits.min) & (whole <= limits.max)).all():
            raise Fault(f"a float that no {np.dtype(dtype).name} is")
        return whole.astype(dtype)
    if name in ("arith.extsi", "arith.trunci", "arith.index_cast", "arith.extf", "arith.truncf"):
        return x.astype(dtype)
    if name == "arith.sitofp":
        # Rounded once: ml_dtypes goes by float32, which holds 24 bits.
        exact = x.astype(np.float64)
        return exact.astype(np.float32).astype(dtype) if dtype == ml_dtypes.bfloat16 else exact.astype(dtype)
    raise Unknown(f"the conversion {name}")


def product(a: Value, b: Value, before: Value) -> Value:
    """before + a · b. float64 holds sums of 8-bit codes exactly, and others far better than a matrix unit does."""
    total = a.astype(np.float64) @ b.astype(np.float64)
    if before.dtype == np.int32:
        return before + total.astype(np.int64).astype(np.int32)
    return (before.astype(np.float64) + total).astype(before.dtype)
