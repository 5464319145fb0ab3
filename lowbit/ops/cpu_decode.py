# mypy: ignore-errors
# Some bodies below are compiled by numba, whose intrinsics mypy cannot type.
"""Stored weights → what a tile multiplies: exactly, and zeros up to a whole step."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit
from numba.core import types
from numba.extending import intrinsic

from lowbit.ops.cpu_emit import (
    F32,
    I32,
    I64,
    bf16_to_f32,
    e4m3_to_f32,
    f32_to_bf16,
    load,
    loop,
    pointer,
    prefetch,
    shuffle,
    splat,
    store,
    vec,
)
from lowbit.ops.cpu_lookup import AT_ONCE, BYTES, IN_ORDER, Lookup
from lowbit.ops.cpu_params import A_BF16, A_F32, W_BF16, W_E4M3, W_U8
from lowbit.ops.cpu_step import lanes
from lowbit.ops.cpu_tiles import pack, row_addresses, transpose

AHEAD = 4096  # bytes: codes further on are asked for, to come into the second cache


@njit
def decode_row(storage, source, kind, target, n, padded):  # type: ignore[no-untyped-def]
    """n stored weights → float32, bfloat16 (both exact) or int8, zeros up to `padded`."""
    codes = carray(pointer(source), n, np.int8)
    raw = carray(pointer(source), n, np.uint8)
    if kind == A_F32:
        full = carray(pointer(target), padded, np.float32)
        if storage == W_BF16:
            brain = carray(pointer(source), n, np.uint16)
            for i in range(n):
                full[i] = bf16_to_f32(brain[i])
        elif storage == W_E4M3:
            for i in range(n):
                full[i] = e4m3_to_f32(raw[i])
        elif storage == W_U8:
            for i in range(n):
                full[i] = np.float32(raw[i]) - np.float32(128.0)
        else:
            for i in range(n):
                full[i] = np.float32(codes[i])
        full[n:padded] = 0
    elif kind == A_BF16:
        half = carray(pointer(target), padded, np.uint16)
        if storage == W_BF16:
            brain = carray(pointer(source), n, np.uint16)
            half[:n] = brain
        elif storage == W_E4M3:
            for i in range(n):
                half[i] = f32_to_bf16(e4m3_to_f32(raw[i]))
        elif storage == W_U8:
            for i in range(n):
                half[i] = f32_to_bf16(np.float32(raw[i]) - np.float32(128.0))
        else:
            for i in range(n):
                half[i] = f32_to_bf16(np.float32(codes[i]))
        half[n:padded] = 0
    else:
        plain = carray(pointer(target), padded, np.int8)
        for i in range(n):
            plain[i] = codes[i]
        plain[n:padded] = 0


@intrinsic(prefer_literal=True)
def decode_bf16(typingctx, storage, source, target, n):  # type: ignore[no-untyped-def]
    """n codes (a multiple of 64) → bfloat16. `storage` is a compile-time constant."""
    if not isinstance(storage, types.Literal):
        return None
    lookup = Lookup(storage.literal_value)
    signature = types.void(storage, *[types.int64] * 3)

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        source, target, n = args[1:]

        def body(position: Any, _: list) -> list:
            here = builder.add(source, position)
            prefetch(builder, builder.add(here, ir.Constant(I64, AHEAD)), 2)
            at = builder.add(target, builder.mul(position, ir.Constant(I64, 2)))
            codes = load(builder, here, BYTES)
            for i, found in enumerate(lookup.emit(builder, shuffle(builder, codes, codes, IN_ORDER))):
                store(builder, found, builder.add(at, ir.Constant(I64, 64 * i)))
            return []

        loop(builder, n, AT_ONCE, [], body)
        return context.get_dummy_value()

    return signature, codegen


def packs_at_once(kind: str, storage: int, lookup: bool) -> int:
    """How many codes (or bfloat16) of a row `pack_codes` takes at a time; 0 where it does not know the kind."""
    if lookup:
        return AT_ONCE
    return (2 if storage == W_BF16 else 4) * lanes(kind) if kind.startswith("fma") else 0


@intrinsic(prefer_literal=True)
def pack_codes(typingctx, kind, storage, source, stride, valid, target, ldt, n):  # type: ignore[no-untyped-def]
    """`cpu_tiles.pack` of n codes (or bfloat16) of rows as stored: transposed as they are, decoded after that.

    `kind` and `storage` are compile-time constants, n is a multiple of `packs_at_once`. A half
    or a quarter of what there is to transpose once they are decoded.
    """
    if not all(isinstance(t, types.Literal) for t in (kind, storage)):
        return None
    columns, stored = lanes(kind.literal_value), storage.literal_value
    lookup = Lookup(stored) if kind.literal_value.startswith("dpbf16") else None
    # Four codes of a column are two units: the first of four columns, then the second.
    order = [16 * part + 4 * column + pair + i for part in range(4) for pair in (0, 2)
             for column in range(4) for i in (0, 1)]  # fmt: skip
    signature = types.void(kind, storage, *[types.int64] * 6)

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        source, stride, valid, target, ldt, n = args[2:]
        rows = row_addresses(builder, source, stride, valid, columns)
        ahead = builder.mul(stride, ir.Constant(I64, columns))
        halved = ir.Constant(
            I64, 1 if lookup else 0
        )  # four codes are two units of bfloat16 or four of float32
        doubled = ir.Constant(I64, 1 if stored == W_BF16 else 0)

        def body(position: Any, _: list) -> list:
            at_rows = [builder.add(row, builder.shl(position, doubled)) for row in rows]
            vectors = [load(builder, row, vec(I32, columns)) for row in at_rows]
            for row in at_rows:
                prefetch(builder, builder.add(row, ahead), 2)
            unit = builder.add(target, builder.mul(builder.lshr(position, halved), ldt))
            for four in transpose(builder, vectors):
                if lookup is None:
                    units = _as_floats(builder, stored, four)
                else:
                    codes = builder.bitcast(four, BYTES)
                    units = lookup.emit(builder, shuffle(builder, codes, codes, order))
                for found in units:
                    store(builder, found, unit)
                    unit = builder.add(unit, ldt)
            return []

        loop(builder, n, (2 if stored == W_BF16 else 4) * columns, [], body)
        return context.get_dummy_value()

    return signature, codegen


def _as_floats(builder: Any, stored: int, four: Any) -> list:
    """A vector of four codes (or two bfloat16) each → four (or two) of float32, exactly: the first, the second, …"""
    count = four.type.count

    def all_of(value: int) -> ir.Constant:
        return splat(ir.Constant(I32, value), count)

    real = vec(F32, count)
    if stored == W_BF16:
        upper_halves = (builder.shl(four, all_of(16)), builder.and_(four, all_of(-0x10000)))
        return [builder.bitcast(half, real) for half in upper_halves]
    if stored != W_E4M3:
        if stored == W_U8:  # int8 plus 128
            four = builder.xor(four, all_of(-0x7F7F7F80))
        tops = [builder.shl(four, all_of(shift)) for shift in (24, 16, 8, 0)]
        return [builder.sitofp(builder.ashr(top, all_of(24)), real) for top in tops]
    found = []
    for shift in (0, 8, 16, 24):
        code = builder.lshr(four, all_of(shift))
        magnitude = builder.and_(code, all_of(0x7F))
        bits = builder.shl(magnitude, all_of(20))
        # Below 2⁻⁶ codes count 2⁻⁹: with a one in front, less that one. No denormals, which may be switched off.
        normal = builder.add(bits, all_of(120 << 23))
        small = builder.bitcast(builder.add(bits, all_of(121 << 23)), real)
        small = builder.bitcast(builder.fsub(small, splat(ir.Constant(F32, 2.0**-6), count)), four.type)
        value = builder.select(builder.icmp_unsigned("<", magnitude, all_of(8)), small, normal)
        value = builder.select(
            builder.icmp_unsigned("==", magnitude, all_of(0x7F)), all_of(0x7FC00000), value
        )
        sign = builder.shl(builder.and_(code, all_of(0x80)), all_of(24))
        found.append(builder.bitcast(builder.or_(value, sign), real))
    return found


@njit(inline="always")
def decode(lookup, storage, source, kind, target, n, padded):  # type: ignore[no-untyped-def]
    """`decode_row`, with `lookup` 64 codes at a time, to bfloat16. It and `storage` are compile-time constants."""
    if lookup:
        whole = n // AT_ONCE * AT_ONCE
        decode_bf16(storage, source, target, whole)
        if whole < padded:
            decode_row(storage, source + whole, kind, target + 2 * whole, n - whole, padded - whole)
    else:
        decode_row(storage, source, kind, target, n, padded)


@njit(inline="always")
def column_at(panel, panel_row, units, j):  # type: ignore[no-untyped-def]
    """Where the first unit of column j stands: strips of `units` rows of `panel_row` bytes follow each other."""
    across = panel_row // 4
    return panel + j // across * panel_row * units + j % across * 4


@njit(inline="always")
def fill_panel(
    kind, storage, lookup, at_once, row_kind, size, row_element, step, columns, w, w_row, cols, depth, piece, padded,
    straight, panel, panel_row, units, decoded,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """`depth` weights (of `size` bytes) of each of `cols` rows → the panel of a block, `units` of them.

    Each `piece` along K is filled up to a whole `step` with zeros: `padded` elements in all. `straight`: rows are
    packed as they stand. Else `at_once` codes (see `packs_at_once`) at a time where the rows are one piece, and
    what is left by way of `decoded`, memory for `columns` rows of `row_kind`, whose elements take `row_element` bytes.
    """
    quick = depth // at_once * at_once if at_once and piece == depth else 0
    done = quick * units // padded
    for j in range(0, cols, columns):
        valid = min(columns, cols - j)
        rows_at, stride = w + j * w_row, w_row
        at = column_at(panel, panel_row, units, j)
        if at_once and quick > 0:
            pack_codes(kind, storage, rows_at, stride, valid, at, panel_row, quick)
        if done < units:
            if not straight:
                rows_at, stride = decoded, padded * row_element
                for i in range(valid):
                    source, target = w + (j + i) * w_row, decoded + i * stride
                    for first in range(quick, depth, piece):
                        count = min(piece, depth - first)
                        filled = (count + step - 1) // step * step
                        decode(lookup, storage, source + size * first, row_kind, target, count, filled)
                        target += filled * row_element
            pack(kind, rows_at, stride, valid, at + done * panel_row, panel_row, units - done)
