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
    store,
    vec,
)
from lowbit.ops.cpu_lookup import AT_ONCE, BYTES, IN_ORDER, Lookup
from lowbit.ops.cpu_params import A_BF16, A_F32, W_BF16, W_E4M3, W_U8
from lowbit.ops.cpu_tiles import row_addresses, transpose

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


@intrinsic(prefer_literal=True)
def pack_bf16(typingctx, storage, source, stride, valid, target, ldt, n):  # type: ignore[no-untyped-def]
    """`cpu_tiles.pack` of n codes (a multiple of 64) of 16 rows as bfloat16: transposed as bytes, decoded after that.

    `storage` is a compile-time constant. Half of what there is to transpose once they are decoded.
    """
    if not isinstance(storage, types.Literal):
        return None
    lookup = Lookup(storage.literal_value)
    signature = types.void(storage, *[types.int64] * 6)
    # Four codes of a column are two units: the first of four columns, then the second.
    order = [16 * part + 4 * column + pair + i for part in range(4) for pair in (0, 2)
             for column in range(4) for i in (0, 1)]  # fmt: skip
    columns = AT_ONCE // 4

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        source, stride, valid, target, ldt, n = args[1:]
        rows = row_addresses(builder, source, stride, valid, columns)
        ahead = builder.mul(stride, ir.Constant(I64, columns))

        def body(position: Any, _: list) -> list:
            at_rows = [builder.add(row, position) for row in rows]
            vectors = [load(builder, row, vec(I32, columns)) for row in at_rows]
            for row in at_rows:
                prefetch(builder, builder.add(row, ahead), 2)
            unit = builder.add(target, builder.mul(builder.lshr(position, ir.Constant(I64, 1)), ldt))
            for quad in transpose(builder, vectors):
                codes = builder.bitcast(quad, BYTES)
                for found in lookup.emit(builder, shuffle(builder, codes, codes, order)):
                    store(builder, found, unit)
                    unit = builder.add(unit, ldt)
            return []

        loop(builder, n, AT_ONCE, [], body)
        return context.get_dummy_value()

    return signature, codegen


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
