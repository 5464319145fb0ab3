"""What lanes compute, each for itself or from the others of its warp: opcode → function of its operands' bits.

Values are arrays [threads] of unsigned integers, whose bits are reinterpreted as an instruction's types say.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from ..numbers import UNSIGNED, Lanes, Unknown, bfloat16, e4m3, to_bfloat16, to_e4m3
from .program import WIDTHS

_BITS = {width: np.dtype(kind) for width, kind in UNSIGNED.items()}
_TYPES = {
    **{f"b{n}": _BITS[n] for n in (8, 16, 32, 64)}, **{f"u{n}": _BITS[n] for n in (8, 16, 32, 64)},
    **{f"s{n}": np.dtype(f"i{n // 8}") for n in (8, 16, 32, 64)},
    **{f"f{n}": np.dtype(f"f{n // 8}") for n in (16, 32, 64)}, "pred": _BITS[1],
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
    dtype = _TYPES[kind]
    return bits if kind == "pred" else _cut(bits, dtype.itemsize * 8).view(dtype)


def _cut(bits: Lanes, width: int) -> Lanes:
    return bits if bits.dtype == _BITS[width] else bits.astype(_BITS[width])


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
    return out if kind == "pred" else out.view(_BITS[out.itemsize * 8])


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
    if count.max() < width:
        return a << count.astype(a.dtype)
    return np.where(count >= width, a.dtype.type(0), a << np.minimum(count, width - 1).astype(a.dtype))


def _right(a: Lanes, count: Lanes) -> Lanes:
    width = a.dtype.itemsize * 8
    if count.max() < width:
        return a >> count.astype(a.dtype)
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


def _conversion(opcode: str) -> Callable[..., Lanes]:
    """cvt: the last two parts of the opcode are what it becomes and what it is."""
    parts = opcode.split(".")[1:]
    to, of = parts[-2:]
    if set(parts[:-2]) - {"rn", "rzi", "rni", "rmi", "rpi", "sat", "satfinite"}:
        raise Unknown(opcode)
    if to == "e4m3x2" and of == "f32":
        assert "satfinite" in parts, parts
        return _to_e4m3x2
    if of == "e4m3x2":
        return lambda a: bits_of(e4m3(np.ascontiguousarray(_cut(a, 16)).view(np.uint8).reshape(-1, 2)), to)
    if to in ("bf16x2", "f16x2") and of == "f32":
        return lambda high, low: bits_of(np.stack([value(low, of), value(high, of)], 1), to)
    floats = (*_HALF, "f32", "f64")
    if of in floats and to not in floats:
        limits = np.iinfo(_TYPES[to])
        whole = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[parts[0]]

        def rounded(a: Lanes) -> Lanes:
            x = np.nan_to_num(whole(value(a, of).astype(np.float64)), nan=0.0)
            return bits_of(np.clip(x, limits.min, limits.max), to)

        return rounded
    if of in floats:
        return lambda a: bits_of(value(a, of), to)
    if to in floats:
        return lambda a: bits_of(value(a, of).astype(np.float64), to)
    if "sat" in parts:
        limits = np.iinfo(_TYPES[to])
        return lambda a: bits_of(np.clip(value(a, of).astype(np.int64), limits.min, limits.max), to)
    return lambda a: bits_of(value(a, of).astype(np.int64), to)


def _to_e4m3x2(first: Lanes, second: Lanes) -> Lanes:
    high, low = (to_e4m3(value(a, "f32")).astype(np.uint16) for a in (first, second))
    return high << np.uint16(8) | low


def permute(a: Lanes, b: Lanes, selector: Lanes) -> Lanes:
    """prmt: bytes of b:a; bit 3 of a selector's nibble asks for the byte's sign in all its bits."""
    pool = np.stack([a, b], 1).view(np.uint8)
    same = (selector == selector[0]).all()
    nibbles = selector[: 1 if same else None, None] >> _NIBBLES & np.uint32(15)
    index = (nibbles & np.uint32(7)).astype(np.int64)
    chosen = pool[:, index[0]] if same else np.take_along_axis(pool, index, 1)
    signs = nibbles > 7
    if signs.any():
        chosen = np.where(signs, np.where(chosen & 0x80, np.uint8(255), np.uint8(0)), chosen)
    return np.ascontiguousarray(chosen).view(np.uint32).reshape(-1)


_NIBBLES = np.arange(0, 16, 4, dtype=np.uint32)


def extract(a: Lanes, position: Lanes, length: Lanes, kind: str) -> Lanes:
    """bfe."""
    shifted = a.astype(np.uint64) >> position.astype(np.uint64)
    field = shifted & ((np.uint64(1) << length.astype(np.uint64)) - np.uint64(1))
    if kind.startswith("s"):
        sign = np.uint64(1) << (np.maximum(length, 1).astype(np.uint64) - np.uint64(1))
        field = (field ^ sign) - sign
    return field.astype(a.dtype)


@functools.cache
def operation(opcode: str) -> Callable[..., Lanes]:
    """What an instruction without memory, control flow or other lanes makes of its operands' bits."""
    name, *parts = opcode.split(".")
    kind = parts[-1] if parts else ""
    if name == "cvt":
        return _conversion(opcode)
    if name == "setp" and len(parts) == 2:
        how = parts[0]
        return lambda a, b: compare(how, value(a, kind), value(b, kind))
    if name == "selp":
        return lambda a, b, chosen: np.where(chosen, a, b)
    if name == "prmt":
        return permute
    if name == "bfe":
        return lambda a, position, length: extract(a, position, length, kind)
    if name in ("shl", "shr"):
        shift = _left if name == "shl" else _right
        return lambda a, count: bits_of(shift(value(a, kind), count), kind)
    if name in ("mad", "mul") and "wide" in parts:
        return _wide(name, kind)
    if name == "mad" and parts[:-1] == ["lo"]:
        return lambda a, b, c: bits_of(value(a, kind) * value(b, kind) + value(c, kind), kind)
    if name in _PLAIN:
        return _plain(opcode)
    raise Unknown(opcode)


def _wide(name: str, kind: str) -> Callable[..., Lanes]:
    wide = f"{kind[0]}{2 * int(kind[1:])}"
    dtype = _TYPES[wide]

    def product(a: Lanes, b: Lanes, *added: Lanes) -> Lanes:
        found = value(a, kind).astype(dtype) * value(b, kind).astype(dtype)
        return bits_of(found + value(added[0], wide) if name == "mad" else found, wide)

    return product


def _plain(opcode: str) -> Callable[..., Lanes]:
    name, *parts = opcode.split(".")
    kind, function = parts[-1], _PLAIN[name]
    kinds = [p for p in parts if p in WIDTHS]
    if set(parts) - {*kinds, "rn", "lo", "approx", "full", "ftz"} or len(kinds) > 2:
        raise Unknown(opcode)
    result = kinds[0]

    def run(*args: Lanes) -> Lanes:
        # add.f32.bf16: the last operand alone is of the result's dtype.
        values = [value(a, kind) for a in args[:-1]] + [value(args[-1], result)]
        if result in _HALF or (result.startswith("f32") and len(args) == 3):  # rounded once
            values = [v.astype(np.float64) for v in values]
        return bits_of(function(*values), result)

    return run


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
