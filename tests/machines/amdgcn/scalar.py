"""What a wave computes once for all of its lanes: opcode → (result, SCC) of its operands, arrays [waves] of uint64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..numbers import Lanes, Unknown

_ALL = {32: np.uint64(0xFFFF_FFFF), 64: np.uint64(0xFFFF_FFFF_FFFF_FFFF)}
Result = tuple[Lanes, Lanes | None]


def signed(x: Lanes, width: int = 32) -> Lanes:
    """int64, of the low bits."""
    return x.astype(np.uint32).view(np.int32).astype(np.int64) if width == 32 else x.view(np.int64)


def short(x: Lanes) -> Lanes:
    """What an instruction holds in 16 bits, with its sign."""
    return _cut(x.astype(np.uint16).view(np.int16).astype(np.int64).view(np.uint64))


def _cut(x: Lanes, width: int = 32) -> Lanes:
    return x.astype(np.uint64, copy=False) & _ALL[width]


def _shift(count: Lanes, width: int) -> Lanes:
    return count & np.uint64(width - 1)


def _field(a: Lanes, b: Lanes, sign: bool) -> Lanes:
    """s_bfe: from bit b[4:0], b[22:16] bits."""
    length = b >> np.uint64(16) & np.uint64(0x7F)
    out = a >> (b & np.uint64(31)) & ((np.uint64(1) << length) - np.uint64(1))
    if sign:
        top = np.uint64(1) << np.maximum(length, 1).astype(np.uint64) - np.uint64(1)
        out = (out ^ top) - top
    return _cut(out)


_COMPARE: dict[str, Callable[[Lanes, Lanes], Lanes]] = {
    "eq": np.equal, "lg": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def compare(name: str, kind: str, a: Lanes, b: Lanes) -> Lanes:
    """name: cmp_lt, cmpk_lt, bitcmp1 and so on."""
    if name in ("bitcmp0", "bitcmp1") and kind == "b32":
        return (a >> _shift(b, 32) & np.uint64(1)) == int(name[-1])
    how = name.partition("_")[2]
    b = short(b) if name.startswith("cmpk") and kind == "i32" else b
    if how not in _COMPARE or kind not in ("i32", "u32", "u64"):
        raise Unknown(f"s_{name}_{kind}")
    return _COMPARE[how](*((signed(a), signed(b)) if kind == "i32" else (a, b)))


_BITS: dict[str, Callable[[Lanes, Lanes], Lanes]] = {
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "andn2": lambda a, b: a & ~b,
    "orn2": lambda a, b: a | ~b,
}  # fmt: skip


def compute(name: str, kind: str, args: list[Lanes], scc: Lanes) -> Result:
    """name: without `s_` and the type, `kind`. A result of None for SCC leaves it as it was."""
    width = 64 if kind.endswith("64") else 32
    a, b = args[0], args[-1]
    if name in ("movk", "addk", "mulk"):
        b = short(b)
    if name in ("mov", "movk"):
        return _cut(b, width), None
    if name in _BITS:
        out = _cut(_BITS[name](a, b), width)
        return out, out != 0
    if name == "not":
        out = _cut(~a, width)
        return out, out != 0
    if name == "lshl":
        out = _cut(a << _shift(b, width), width)
        return out, out != 0
    if name == "lshr":
        out = a >> _shift(b, width)
        return out, out != 0
    if name == "ashr":
        out = _cut((signed(a, width) >> _shift(b, width).astype(np.int64)).astype(np.uint64), width)
        return out, out != 0
    if name == "bfe" and width == 32:
        out = _field(a, b, kind == "i32")
        return out, out != 0
    if name == "cselect":
        return np.where(scc, a, b), None
    if width != 32:
        raise Unknown(f"s_{name}_{kind}")
    if name in ("add", "sub", "addk") and kind == "i32":
        wide = signed(a) - signed(b) if name == "sub" else signed(a) + signed(b)
        return _cut(wide.astype(np.uint64)), (wide < -(2**31)) | (wide >= 2**31)
    if name in ("add", "addc") and kind == "u32":
        wide = a + b + (scc.astype(np.uint64) if name == "addc" else np.uint64(0))
        return _cut(wide), wide > _ALL[32]
    if name in ("sub", "subb") and kind == "u32":
        less = b + (scc.astype(np.uint64) if name == "subb" else np.uint64(0))
        return _cut(a - less), a < less
    if name in ("mul", "mulk") and kind == "i32":
        return _cut(a * b), None
    if name == "mul_hi" and kind == "u32":
        return a * b >> np.uint64(32), None
    if name == "mul_hi" and kind == "i32":
        return _cut((signed(a) * signed(b) >> 32).astype(np.uint64)), None
    if name == "abs":
        out = _cut(np.abs(signed(a)).astype(np.uint64))
        return out, out != 0
    if name in ("min", "max"):
        x, y = (signed(a), signed(b)) if kind == "i32" else (a, b)
        first = x < y if name == "min" else x > y
        return np.where(first, a, b), first
    if name.startswith("lshl") and name.endswith("_add"):
        wide = (a << np.uint64(int(name[4]))) + b
        return _cut(wide), wide > _ALL[32]
    raise Unknown(f"s_{name}_{kind}")
