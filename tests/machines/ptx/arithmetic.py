"""What lanes compute, each for itself or from the others of its warp: opcode → function of its operands' bits.

Values are arrays [threads] of unsigned integers, whose bits are reinterpreted as an instruction's types say.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from ..numbers import UNSIGNED, Lanes, Unknown, bfloat16, e4m3, to_bfloat16, to_e4m3
from .program import WIDTHS

_TYPES: dict[str, Any] = {
    **{f"b{n}": UNSIGNED[n] for n in (8, 16, 32, 64)}, **{f"u{n}": UNSIGNED[n] for n in (8, 16, 32, 64)},
    "s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64,
    "f16": np.float16, "f32": np.float32, "f64": np.float64, "pred": np.bool_,
}  # fmt: skip


def value(bits: Lanes, kind: str) -> Lanes:
    """Bits of a register, or of a wider one, as `kind`. bf16 and what is packed come as float32."""
    if kind == "bf16":
        return bfloat16(_cut(bits, 16))
    if kind == "f32x2":
        return np.ascontiguousarray(_cut(bits, 64)).view(np.float32).reshape(-1, 2)
    if kind in ("bf16x2", "f16x2"):
        pairs = np.ascontiguousarray(_cut(bits, 32)).view(np.uint16).reshape(-1, 2)
        return bfloat16(pairs) if kind == "bf16x2" else pairs.view(np.float16)
    dtype = np.dtype(_TYPES[kind])
    return bits if kind == "pred" else _cut(bits, dtype.itemsize * 8).view(dtype)


def _cut(bits: Lanes, width: int) -> Lanes:
    return bits if bits.dtype == UNSIGNED[width] else bits.astype(UNSIGNED[width])


def bits_of(x: Lanes, kind: str) -> Lanes:
    """The other way round: of a float result, rounded to `kind`."""
    if kind == "bf16":
        return to_bfloat16(x)
    if kind == "bf16x2":
        return to_bfloat16(x).view(np.uint32).reshape(-1)
    if kind == "f16x2":
        return np.ascontiguousarray(x.astype(np.float16)).view(np.uint32).reshape(-1)
    if kind == "f32x2":
        return np.ascontiguousarray(x.astype(np.float32)).view(np.uint64).reshape(-1)
    out = np.ascontiguousarray(x.astype(_TYPES[kind], copy=False))
    return out if kind == "pred" else out.view(UNSIGNED[out.dtype.itemsize * 8])


_HALF = ("bf16", "bf16x2", "f16", "f16x2")


def _minimum(*args: Lanes) -> Lanes:
    """Of two, or from sm_100 three."""
    return functools.reduce(np.fmin if args[0].dtype.kind == "f" else np.minimum, args)


def _maximum(*args: Lanes) -> Lanes:
    return functools.reduce(np.fmax if args[0].dtype.kind == "f" else np.maximum, args)


def _quotient(a: Lanes, b: Lanes) -> Lanes:
    if a.dtype.kind == "f":
        return a / b
    # Toward zero; by zero anything may come, and nothing may be made of it.
    divisor = np.where(b == 0, 1, b).astype(np.int64)
    wide = a.astype(np.int64)
    return (np.sign(wide) * np.sign(divisor) * (np.abs(wide) // np.abs(divisor))).astype(a.dtype)


def _remainder(a: Lanes, b: Lanes) -> Lanes:
    return a - _quotient(a, b) * b


def _left(a: Lanes, count: Lanes) -> Lanes:
    width = a.dtype.itemsize * 8
    return np.where(count >= width, a.dtype.type(0), a << np.minimum(count, width - 1).astype(a.dtype))


def _right(a: Lanes, count: Lanes) -> Lanes:
    width = a.dtype.itemsize * 8
    shifted = a >> np.minimum(count, width - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(count >= width, a.dtype.type(0), shifted)


_PLAIN: dict[str, Callable[..., Lanes]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": _quotient, "rem": _remainder,
    "min": _minimum, "max": _maximum, "fma": lambda a, b, c: a * b + c, "neg": np.negative, "abs": np.abs,
    "sqrt": np.sqrt, "rsqrt": lambda a: 1 / np.sqrt(a), "rcp": lambda a: 1 / a, "ex2": np.exp2, "lg2": np.log2,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
}  # fmt: skip

_COMPARE: dict[str, Callable[[Lanes, Lanes], Lanes]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def _unordered(a: Lanes, b: Lanes) -> Lanes:
    return np.isnan(a) | np.isnan(b)


def compare(how: str, a: Lanes, b: Lanes) -> Lanes:
    if how in ("nan", "num"):
        return _unordered(a, b) if how == "nan" else ~_unordered(a, b)
    if how in _COMPARE:
        found = _COMPARE[how](a, b)
        return found & ~_unordered(a, b) if how == "ne" and a.dtype.kind == "f" else found
    if how.endswith("u") and how[:-1] in _COMPARE:
        return _COMPARE[how[:-1]](a, b) | _unordered(a, b)
    raise Unknown(f"setp.{how}")


def convert(parts: list[str], args: list[Lanes]) -> Lanes:
    """cvt: `parts` without the name; the last two are what it becomes and what it is."""
    to, of = parts[-2:]
    if set(parts[:-2]) - {"rn", "rzi", "rni", "rmi", "rpi", "sat", "satfinite"}:
        raise Unknown(f"cvt.{'.'.join(parts)}")
    if to == "e4m3x2" and of == "f32":
        assert "satfinite" in parts, parts
        high, low = (to_e4m3(value(a, of)).astype(np.uint16) for a in args)
        return high << np.uint16(8) | low
    if of == "e4m3x2":
        pairs = np.ascontiguousarray(_cut(args[0], 16)).view(np.uint8).reshape(-1, 2)
        return bits_of(e4m3(pairs), to)
    if to in ("bf16x2", "f16x2") and of == "f32":
        high, low = (value(a, of) for a in args)
        return bits_of(np.stack([low, high], 1), to)
    x = value(args[0], of)
    floats = (*_HALF, "f32", "f64")
    if of in floats and to not in floats:
        limits = np.iinfo(_TYPES[to])
        rounded = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[parts[0]](
            x.astype(np.float64)
        )
        return bits_of(np.clip(np.nan_to_num(rounded, nan=0.0), limits.min, limits.max), to)
    if of not in floats and to in floats:
        x = x.astype(np.float64)
    if "sat" in parts and to not in floats:
        limits = np.iinfo(_TYPES[to])
        x = np.clip(x.astype(np.int64), limits.min, limits.max)
    if x.dtype.kind == "f":
        return bits_of(x, to)
    return bits_of(x.astype(np.int64).astype(_TYPES[to]), to)


def permute(a: Lanes, b: Lanes, selector: Lanes) -> Lanes:
    """prmt: bytes of b:a; bit 3 of a selector's nibble asks for the byte's sign in all its bits."""
    pool = np.stack([a, b], 1).view(np.uint8)
    out = np.zeros(len(a), np.uint32)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = np.take_along_axis(pool, (nibble & 7).astype(np.int64)[:, None], 1)[:, 0]
        byte = np.where(nibble & 8, np.where(byte & 0x80, 255, 0), byte).astype(np.uint32)
        out |= byte << np.uint32(8 * i)
    return out


def extract(a: Lanes, position: Lanes, length: Lanes, kind: str) -> Lanes:
    """bfe."""
    shifted = a.astype(np.uint64) >> position.astype(np.uint64)
    field = shifted & ((np.uint64(1) << length.astype(np.uint64)) - np.uint64(1))
    if kind.startswith("s"):
        sign = np.uint64(1) << (np.maximum(length, 1).astype(np.uint64) - np.uint64(1))
        field = (field ^ sign) - sign
    return field.astype(a.dtype)


def compute(opcode: str, args: list[Lanes]) -> Lanes:
    """Bits of the result of an instruction without memory, control flow or other lanes."""
    name, *parts = opcode.split(".")
    kind = parts[-1] if parts else ""
    if name == "cvt":
        return convert(parts, args)
    if name == "setp" and len(parts) == 2:
        return compare(parts[0], value(args[0], kind), value(args[1], kind))
    if name == "selp":
        return np.where(args[2], args[0], args[1])
    if name == "prmt":
        return permute(*args)
    if name == "bfe":
        return extract(args[0], args[1], args[2], kind)
    if name in ("shl", "shr"):
        return bits_of((_left if name == "shl" else _right)(value(args[0], kind), args[1]), kind)
    if name in ("mad", "mul") and "wide" in parts:
        wide = f"{kind[0]}{2 * int(kind[1:])}"
        product = value(args[0], kind).astype(_TYPES[wide]) * value(args[1], kind).astype(_TYPES[wide])
        return bits_of(product + value(args[2], wide) if name == "mad" else product, wide)
    if name == "mad" and parts[:-1] == ["lo"]:
        a, b, c = (value(arg, kind) for arg in args)
        return bits_of(a * b + c, kind)
    if name in _PLAIN:
        kinds = [p for p in parts if p in WIDTHS]
        if set(parts) - {*kinds, "rn", "lo", "approx", "full", "ftz"} or len(kinds) > 2:
            raise Unknown(opcode)
        # add.f32.bf16: the last operand alone is of the result's dtype.
        of = [kind] * (len(args) - 1) + [kinds[0]]
        values = [value(arg, k) for arg, k in zip(args, of, strict=True)]
        if kinds[0] in _HALF or (kinds[0].startswith("f32") and len(args) == 3):  # rounded once
            values = [v.astype(np.float64) for v in values]
        return bits_of(_PLAIN[name](*values), kinds[0])
    raise Unknown(opcode)


def shuffle(opcode: str, x: Lanes, by: Lanes) -> Lanes:
    """shfl.sync among 32 lanes, without narrower segments."""
    lane = np.arange(32)
    how = opcode.split(".")[2]
    warps, by = x.reshape(-1, 32), by.reshape(-1, 32).astype(np.int64)
    source = {"bfly": lane ^ by, "idx": by & 31, "down": lane + by, "up": lane - by}[how]
    inside = (source >= 0) & (source < 32)
    return np.take_along_axis(warps, np.where(inside, source, lane), 1).reshape(-1)


def reduce(opcode: str, x: Lanes) -> Lanes:
    """redux.sync of whole warps."""
    how, kind = opcode.split(".")[2:4]
    names = {"add": "add", "or": "bitwise_or", "and": "bitwise_and"}
    # NaN is no number to be the largest.
    names |= {"min": "fmin", "max": "fmax"} if kind == "f32" else {"min": "minimum", "max": "maximum"}
    function, warps = getattr(np, names[how]), value(x, kind).reshape(-1, 32)
    return bits_of(np.repeat(function.reduce(warps, axis=1, dtype=warps.dtype), 32), kind)
