"""What each lane computes by itself: opcode → function of its operands' bits, arrays [lanes] of uint32.

Names are those of the ISA without `v_` and the encoding (`_e32`, `_e64`, `_sdwa`, `_dpp`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..numbers import Lanes, Unknown, e4m3, to_bfloat16, to_e4m3

_VIEWS = {
    kind: np.dtype(name) for kind, name in {"I": "i8", "U": "u8", "u": "u4", "i": "i4", "f": "f4"}.items()
}
_HALVES = {kind: np.dtype(name) for kind, name in {"w": "u2", "s": "i2", "h": "f2"}.items()}


def value(bits: Lanes, kind: str) -> Lanes:
    """u, i, f: all 32 bits; w, s, h: the low 16, unsigned, signed or as float16."""
    if kind in _VIEWS:
        return bits.view(_VIEWS[kind])
    return bits.astype(np.uint16).view(_HALVES[kind])


def bits_of(x: Lanes) -> Lanes:
    """uint32; of what has 16 bits the upper ones are 0."""
    if x.dtype.itemsize == 2:
        return x.view(np.uint16).astype(np.uint32)
    if x.dtype.itemsize != 4:
        raise TypeError(x.dtype)
    return x.view(np.uint32)


def _fma(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    """Rounded once, nearly: the product is exact in float64, their sum is rounded there first."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _integer(low: int, high: int, dtype: Any) -> Callable[[Lanes], Lanes]:
    def convert(x: Lanes) -> Lanes:
        rounded = np.trunc(np.nan_to_num(x.astype(np.float64), nan=0.0))
        return np.clip(rounded, low, high).astype(np.int64).astype(dtype)

    return convert


def _field(a: Lanes, at: Lanes, length: Lanes) -> Lanes:
    wide = a.astype(np.uint64) >> (at & 31).astype(np.uint64)
    return (wide & ((np.uint64(1) << (length & 31).astype(np.uint64)) - np.uint64(1))).astype(np.uint32)


def _signed_field(a: Lanes, at: Lanes, length: Lanes) -> Lanes:
    top = (np.uint32(1) << (np.maximum(length & 31, 1) - 1).astype(np.uint32)).astype(np.uint32)
    field = _field(a, at, length)
    return np.where(length & 31, (field ^ top) - top, 0).astype(np.uint32)


def _reversed(a: Lanes) -> Lanes:
    octets = np.ascontiguousarray(a).view(np.uint8).reshape(-1, 4)
    turned = np.packbits(np.unpackbits(octets, axis=1, bitorder="little"), axis=1)
    return turned.view(">u4").reshape(-1).astype(np.uint32)


def permute(a: Lanes, b: Lanes, selector: Lanes) -> Lanes:
    """v_perm_b32: a selector's byte of 0 to 3 takes a byte of b, 4 to 7 of a; 12 is 0x00, from 13 on 0xFF."""
    pool = np.stack([b, a], 1).view(np.uint8)
    chosen = np.ascontiguousarray(selector).view(np.uint8).reshape(-1, 4)
    if ((chosen > 7) & (chosen < 12)).any():
        raise Unknown("v_perm_b32 of signs")
    if (selector == selector[0]).all():
        taken = pool[:, chosen[0] & 7]
    else:
        taken = np.take_along_axis(pool, (chosen & 7).astype(np.int64), 1)
    out = np.where(chosen < 8, taken, np.where(chosen == 12, 0, 255)).astype(np.uint8)
    return np.ascontiguousarray(out).view(np.uint32).reshape(-1)


def _median(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    """If one is NaN, the least of the others."""
    middle = np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), c))
    return np.where(np.isnan(a) | np.isnan(b) | np.isnan(c), np.fmin(np.fmin(a, b), c), middle)


def _scaled(x: Lanes, by: Lanes) -> Lanes:
    return np.ldexp(x.astype(np.float64), np.clip(by, -2000, 2000)).astype(np.float32)


def _shifts(function: Callable[[Lanes, Lanes], Lanes], bits: int) -> Callable[[Lanes, Lanes], Lanes]:
    return lambda count, x: function(x, (count & (bits - 1)).astype(x.dtype))


def bfloat16_pair(a: Lanes, b: Lanes) -> Lanes:
    return to_bfloat16(np.stack([a, b], 1)).view(np.uint32).reshape(-1)


PLAIN: dict[str, tuple[str, Callable[..., Lanes]]] = {
    "mov_b32": ("u", lambda a: a), "accvgpr_read_b32": ("u", lambda a: a), "accvgpr_write_b32": ("u", lambda a: a),
    "accvgpr_mov_b32": ("u", lambda a: a),
    "add_f32": ("ff", np.add), "sub_f32": ("ff", np.subtract), "subrev_f32": ("ff", lambda a, b: b - a),
    "mul_f32": ("ff", np.multiply), "fma_f32": ("fff", _fma), "max_f32": ("ff", np.fmax), "min_f32": ("ff", np.fmin),
    "max3_f32": ("fff", lambda a, b, c: np.fmax(np.fmax(a, b), c)),
    "min3_f32": ("fff", lambda a, b, c: np.fmin(np.fmin(a, b), c)), "med3_f32": ("fff", _median),
    "rcp_f32": ("f", lambda a: np.float32(1) / a), "sqrt_f32": ("f", np.sqrt), "exp_f32": ("f", np.exp2),
    "log_f32": ("f", np.log2), "rsq_f32": ("f", lambda a: (1 / np.sqrt(a.astype(np.float64))).astype(np.float32)),
    "rndne_f32": ("f", np.rint), "floor_f32": ("f", np.floor), "trunc_f32": ("f", np.trunc),
    "ldexp_f32": ("fi", _scaled),
    "cvt_f32_i32": ("i", lambda a: a.astype(np.float32)), "cvt_f32_u32": ("u", lambda a: a.astype(np.float32)),
    "cvt_f32_f16": ("h", lambda a: a.astype(np.float32)),
    "cvt_f16_i16": ("s", lambda a: a.astype(np.float16)), "cvt_f16_f32": ("f", lambda a: a.astype(np.float16)),
    "cvt_i32_f32": ("f", _integer(-(2**31), 2**31 - 1, np.int32)),
    "cvt_u32_f32": ("f", _integer(0, 2**32 - 1, np.uint32)), "cvt_pk_bf16_f32": ("ff", bfloat16_pair),
    "pack_b32_f16": ("ww", lambda a, b: a.astype(np.uint32) | b.astype(np.uint32) << np.uint32(16)),
    "cvt_pk_f16_f32": ("ff", lambda a, b: np.stack([a, b], 1).astype(np.float16).view(np.uint32).reshape(-1)),
    "add_u32": ("uu", np.add), "sub_u32": ("uu", np.subtract), "subrev_u32": ("uu", lambda a, b: b - a),
    "add3_u32": ("uuu", lambda a, b, c: a + b + c), "add_lshl_u32": ("uuu", lambda a, b, c: (a + b) << (c & 31)),
    "lshl_add_u32": ("uuu", lambda a, b, c: (a << (b & 31)) + c), "xad_u32": ("uuu", lambda a, b, c: (a ^ b) + c),
    "lshl_or_b32": ("uuu", lambda a, b, c: (a << (b & 31)) | c), "and_or_b32": ("uuu", lambda a, b, c: a & b | c),
    "or3_b32": ("uuu", lambda a, b, c: a | b | c),
    "mul_lo_u32": ("uu", np.multiply),
    "mul_hi_u32": ("uu", lambda a, b: (a.astype(np.uint64) * b >> np.uint64(32)).astype(np.uint32)),
    "mul_u32_u24": ("uu", lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF)),
    "and_b32": ("uu", np.bitwise_and), "or_b32": ("uu", np.bitwise_or), "xor_b32": ("uu", np.bitwise_xor),
    "not_b32": ("u", np.invert), "bfrev_b32": ("u", _reversed), "bfe_u32": ("uuu", _field),
    "bfe_i32": ("uuu", _signed_field), "perm_b32": ("uuu", permute),
    "lshlrev_b32": ("uu", _shifts(np.left_shift, 32)), "lshrrev_b32": ("uu", _shifts(np.right_shift, 32)),
    "ashrrev_i32": ("ui", _shifts(np.right_shift, 32)),
    "max_i32": ("ii", np.maximum), "min_i32": ("ii", np.minimum), "max_u32": ("uu", np.maximum),
    "min_u32": ("uu", np.minimum), "max3_i32": ("iii", lambda a, b, c: np.maximum(np.maximum(a, b), c)),
    "max_u16": ("ww", np.maximum), "min_u16": ("ww", np.minimum), "max_i16": ("ss", np.maximum),
    "min_i16": ("ss", np.minimum),
    "add_u16": ("ww", np.add), "sub_u16": ("ww", np.subtract), "mul_lo_u16": ("ww", np.multiply),
    "lshlrev_b16": ("ww", _shifts(np.left_shift, 16)), "lshrrev_b16": ("ww", _shifts(np.right_shift, 16)),
    "ashrrev_i16": ("ws", _shifts(np.right_shift, 16)), "mul_f16": ("hh", np.multiply), "add_f16": ("hh", np.add),
    "max_f16": ("hh", np.fmax), "min_f16": ("hh", np.fmin),
}  # fmt: skip


_COMPARE: dict[str, Callable[[Lanes, Lanes], Lanes]] = {
    "eq": np.equal, "ne": np.not_equal, "neq": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal,
    "lg": lambda a, b: (a < b) | (a > b),
    "ngt": lambda a, b: ~(a > b), "nge": lambda a, b: ~(a >= b), "nlt": lambda a, b: ~(a < b),
    "nle": lambda a, b: ~(a <= b), "nlg": lambda a, b: ~((a < b) | (a > b)),
    "o": lambda a, b: ~(np.isnan(a) | np.isnan(b)), "u": lambda a, b: np.isnan(a) | np.isnan(b),
}  # fmt: skip
_KINDS = {"i64": "I", "u64": "U", "f32": "f", "i32": "i", "u32": "u", "f16": "h", "u16": "w", "i16": "s"}


def compare(how: str, kind: str, a: Lanes, b: Lanes) -> Lanes:
    if how not in _COMPARE or kind not in _KINDS:
        raise Unknown(f"v_cmp_{how}_{kind}")
    return _COMPARE[how](value(a, _KINDS[kind]), value(b, _KINDS[kind]))


# --- division: three instructions around Newton's steps ---------------------------------------------------------------


def _exponent(x: Lanes) -> Lanes:
    return (x.view(np.uint32) >> np.uint32(23) & np.uint32(255)).astype(np.int64)


def division_scale(s0: Lanes, divisor: Lanes, dividend: Lanes) -> tuple[Lanes, Lanes]:
    """v_div_scale_f32 → (float32, VCC): an operand of a division, scaled where its steps would leave the range."""
    difference = _exponent(dividend) - _exponent(divisor)
    tiny = lambda x: (np.abs(x) < 2.0**-126) & (x != 0)  # noqa: E731
    wide = 1 / divisor.astype(np.float64)
    quotient = dividend.astype(np.float64) * wide
    first, second = (
        s0.view(np.uint32) == divisor.view(np.uint32),
        s0.view(np.uint32) == dividend.view(np.uint32),
    )
    # In this order: the first that holds decides (power of two, flag).
    cases = [
        ((divisor == 0) | (dividend == 0), None, False),
        (difference >= 96, np.where(first, 64, 0), True),
        (tiny(divisor), 64, False),
        (tiny(wide) & tiny(quotient), None, False),  # NaN: what the guide says of it divides wrongly
        (tiny(wide), -64, False),
        (tiny(quotient), np.where(second, 64, 0), True),
        (_exponent(dividend) <= 23, 64, False),
    ]
    out, flag, open_ = s0.copy(), np.zeros(len(s0), bool), np.ones(len(s0), bool)
    for condition, power, flagged in cases:
        here = condition & open_
        scaled = np.nan if power is None else np.ldexp(s0.astype(np.float64), power).astype(np.float32)
        out = np.where(here, scaled, out).astype(np.float32)
        flag |= here & flagged
        open_ &= ~condition
    return out, flag


def division_fma(a: Lanes, b: Lanes, c: Lanes, flag: Lanes) -> Lanes:
    """v_div_fmas_f32."""
    plain = _fma(a, b, c).astype(np.float64)
    scaled = np.ldexp(plain, np.where(_exponent(c) > 127, 64, -64))
    return np.where(flag, scaled, plain).astype(np.float32)


def division_end(quotient: Lanes, divisor: Lanes, dividend: Lanes) -> Lanes:
    """v_div_fixup_f32: signs, infinities, NaN and zeros. A quotient beyond float32 stays what its steps made, NaN."""
    negative = np.signbit(divisor) ^ np.signbit(dividend)
    sign = np.where(negative, np.float32(-1), np.float32(1))
    out = np.abs(quotient) * sign
    infinite, zero = sign * np.float32(np.inf), sign * np.float32(0)
    out = np.where(_exponent(dividend) - _exponent(divisor) < -150, zero, out)
    out = np.where((divisor == 0) | np.isinf(dividend), infinite, out)
    out = np.where(np.isinf(divisor) | (dividend == 0), zero, out)
    invalid = (divisor == 0) & (dividend == 0) | np.isinf(divisor) & np.isinf(dividend)
    invalid |= np.isnan(divisor) | np.isnan(dividend)
    return np.where(invalid, np.float32(np.nan), out).astype(np.float32)


# --- conversions to and from fp8 --------------------------------------------------------------------------------------


def fp8_dtype(target: str) -> torch.dtype:
    return torch.float8_e4m3fnuz if target == "gfx942" else torch.float8_e4m3fn


def to_fp8(x: Lanes, dtype: torch.dtype, saturates: bool) -> Lanes:
    """float32 → uint32. What is too large becomes NaN, unless MODE says otherwise (FP16_OVFL)."""
    if saturates:
        return to_e4m3(x, dtype).astype(np.uint32)
    codes = torch.from_numpy(np.ascontiguousarray(x)).to(dtype)
    return codes.view(torch.uint8).numpy().astype(np.uint32)


def fp8_pair(bits: Lanes, high: int, dtype: torch.dtype) -> Lanes:
    """Two of a register's four codes → float32 [lanes, 2]."""
    codes = np.ascontiguousarray(bits).view(np.uint8).reshape(-1, 4)[:, 2 * high : 2 * high + 2]
    return e4m3(codes, dtype)


# --- parts of registers -----------------------------------------------------------------------------------------------

_PARTS = {f"BYTE_{i}": (8 * i, 8) for i in range(4)} | {
    "WORD_0": (0, 16),
    "WORD_1": (16, 16),
    "DWORD": (0, 32),
}


def part(bits: Lanes, select: str, extended: bool) -> Lanes:
    """SDWA's choice of a source."""
    at, width = _PARTS[select]
    if width == 32:
        return bits
    field = bits >> np.uint32(at) & np.uint32((1 << width) - 1)
    if extended:
        top = np.uint32(1 << (width - 1))
        field = (field ^ top) - top
    return field


def placed(bits: Lanes, select: str, unused: str, before: Lanes) -> Lanes:
    """SDWA's place for a result."""
    at, width = _PARTS[select]
    if width == 32:
        return bits
    mask = np.uint32(((1 << width) - 1) << at)
    if unused not in ("UNUSED_PAD", "UNUSED_PRESERVE"):
        raise Unknown(unused)
    rest = before & ~mask if unused == "UNUSED_PRESERVE" else np.uint32(0)
    return (bits << np.uint32(at)) & mask | rest


@functools.cache
def dpp_sources(control: str, argument: str) -> tuple[np.ndarray, np.ndarray]:
    """(the lane [64] that each lane reads, whether there is one)."""
    lane = np.arange(64)
    row, column = lane // 16 * 16, lane % 16
    valid = np.ones(64, bool)
    if control == "quad_perm":
        chosen = np.array([int(i) for i in argument.strip("[]").split(",")])
        return lane // 4 * 4 + chosen[lane % 4], valid
    if control == "row_half_mirror":
        return lane // 8 * 8 + 7 - lane % 8, valid
    if control == "row_mirror":
        return row + 15 - column, valid
    count = int(argument or 0)
    if control == "row_ror":
        return row + (column - count) % 16, valid
    if control == "row_shr":
        return np.maximum(lane - count, 0), column >= count
    if control == "row_shl":
        return np.minimum(lane + count, 63), column + count < 16
    if control == "row_bcast" and count == 15:
        return np.maximum(row - 1, 0), lane >= 16
    if control == "row_bcast" and count == 31:
        return np.full(64, 31), lane >= 32
    raise Unknown(f"{control}:{argument}")
