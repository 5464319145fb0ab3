# mypy: ignore-errors
# Some bodies below are compiled by numba, whose intrinsics mypy cannot type.
"""int8 products with half of the multiplications: Winograd's inner product, for CPUs with AVX2 and no VNNI.

    Σ (a₀ + b₁)(a₁ + b₀)  =  Σ (a₀b₀ + a₁b₁)  +  Σ a₀a₁  +  Σ b₀b₁

S. Winograd, "A new algorithm for inner product", IEEE Transactions on Computers C-17 (1968). The last two sums
belong to a row and to a column alone. They are made once, by `paired_rows` and `paired_columns`, and come off again.
Everything is exact: sums of two codes have 10 bits at most, and where int32 wraps around it wraps back.

`pmaddwd` multiplies 16 pairs of int16 at once and wants an addition after it, so two vectors of products take two of
each. Here they take one `pmaddwd` and three additions: no more instructions, but any vector unit of a CPU adds, and
few multiply (two of four in a Zen 3 or 4, one of three in a Zen 2 or Haswell).

Index 0 and 1 are two neighbouring units of 32 bits along K, two int16 each. Activations lie in panels of PAIRED_ROWS
rows, whose pairs of units stand next to each other: with rows apart, loads wait for each other.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc
from numba.core import types
from numba.extending import intrinsic

from lowbit.compiling import CACHE
from lowbit.ops.cpu_emit import (
    I16,
    I32,
    I64,
    fetch_add,
    load,
    loop,
    pointer,
    prefetch,
    shuffle,
    spread,
    store,
    vec,
)
from lowbit.ops.cpu_params import PAIRED_ROWS, P
from lowbit.ops.cpu_rows import SIGNATURE, stamp
from lowbit.ops.cpu_step import Step

# Copied into plain module constants: numba freezes those, and cannot read attributes of classes.
P_A, P_GROUP_PADDED, P_K, P_NEXT, P_ROWS = P.A, P.GROUP_PADDED, P.K, P.NEXT, P.ROWS
P_STATIC, P_SUMS, P_X, P_X_ROW = P.STATIC, P.SUMS, P.X, P.X_ROW

PAIR = 8  # bytes of a pair of units
UNROLL = 2  # units per turn of the loop


def paired_sums(
    builder: Any, step: Step, shape: tuple[int, int], unit_stride: int, a: Any, b: Any, ahead: Any, along: Any,
    units: Any, w_sum: Any,
) -> list:  # fmt: skip
    """The loop over K of a packed tile: its accumulators, row by row, less the columns' own sums.

    `a` is a panel of activations; `w_sum` the address of int32 for each column, from `paired_columns`.
    """
    rows, vectors = shape
    bytes_ = step.bits // 8

    def body(position: Any, sums: list) -> list:
        line = builder.lshr(builder.mul(position, along), ir.Constant(I64, 8))
        prefetch(builder, builder.add(ahead, line), 2)
        a_here = builder.add(a, builder.mul(position, ir.Constant(I64, PAIR * PAIRED_ROWS // 2)))
        b_here = builder.add(b, builder.mul(position, ir.Constant(I64, unit_stride)))

        def columns(v: int, u: int) -> Any:
            at = builder.add(b_here, ir.Constant(I64, unit_stride * u + bytes_ * v))
            return load(builder, at, step.unit)

        def everywhere(pair: int, row: int, u: int) -> Any:
            at = PAIR * (PAIRED_ROWS * pair + row) + PAIR // 2 * u
            one = load(builder, builder.add(a_here, ir.Constant(I64, at)), I32)
            return builder.bitcast(spread(builder, one, step.lanes), step.unit)

        sums = list(sums)
        for pair in range(UNROLL // 2):
            b_pairs = [(columns(v, 2 * pair), columns(v, 2 * pair + 1)) for v in range(vectors)]
            for i in range(rows):
                a_0, a_1 = everywhere(pair, i, 0), everywhere(pair, i, 1)
                for v, (b_0, b_1) in enumerate(b_pairs):
                    at = i * vectors + v
                    left, right = builder.add(a_0, b_1), builder.add(a_1, b_0)
                    sums[at] = step.accumulate(builder, sums[at], left, right)
        return sums

    starts = []
    for v in range(vectors):
        own = load(builder, builder.add(w_sum, ir.Constant(I64, bytes_ * v)), step.acc)
        starts.append(builder.sub(ir.Constant(step.acc, None), own))
    return loop(builder, units, UNROLL, starts * rows, body)


@intrinsic(prefer_literal=True)
def paired_columns(typingctx, kind, b, ldb, units, target):  # type: ignore[no-untyped-def]
    """Σ b₀b₁ of one vector's columns of a panel (as `cpu_tiles.pack` makes it) → int32 for each, at `target`.

    `kind` is a compile-time constant; unit u of the columns stands at `b` + `ldb` · u; `units` is even.
    """
    if not isinstance(kind, types.Literal):
        return None
    step = Step(kind.literal_value)
    signature = types.void(kind, *[types.int64] * 4)

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        b, ldb, units, target = args[1:]

        def body(position: Any, sums: list) -> list:
            at = builder.add(b, builder.mul(position, ldb))
            first, second = (load(builder, where, step.unit) for where in (at, builder.add(at, ldb)))
            return [step.accumulate(builder, sums[0], first, second)]

        store(builder, loop(builder, units, 2, [ir.Constant(step.acc, None)], body)[0], target)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def paired_row(typingctx, kind, a, units):  # type: ignore[no-untyped-def]
    """Σ a₀a₁ of `units` (a multiple of a vector's) of a row of the operand at `a`, as int32. `kind` as above."""
    if not isinstance(kind, types.Literal):
        return None
    step = Step(kind.literal_value)
    signature = types.int32(kind, types.int64, types.int64)

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        count = step.elements
        nothing = ir.Constant(vec(I16, count), None)
        # The second unit of each pair under the first, and nothing under the second.
        lanes = [lane + 2 if lane % 4 < 2 else count for lane in range(count)]

        def body(position: Any, sums: list) -> list:
            here = load(builder, builder.add(args[1], builder.mul(position, ir.Constant(I64, 4))), step.unit)
            return [step.accumulate(builder, sums[0], here, shuffle(builder, here, nothing, lanes))]

        total = loop(builder, args[2], step.lanes, [ir.Constant(step.acc, None)], body)[0]
        found = builder.extract_element(total, ir.Constant(I32, 0))
        for lane in range(2, step.lanes, 2):
            found = builder.add(found, builder.extract_element(total, ir.Constant(I32, lane)))
        return found

    return signature, codegen


@cache
def paired_rows(kind: str) -> Any:
    """Compile (or load) what makes panels of an operand; its block is that of `prepare`.

    Pair p of units of row r of a panel comes to 8 · (PAIRED_ROWS · p + r). X, X_ROW and A are operand and output,
    ROWS the panels, STATIC the address of (first row, rows) of each, K the units of a row, GROUP_PADDED the elements
    of a scale group in the operand; SUMS becomes Σ a₀a₁ of each row and group. Rows that a panel lacks are its last.
    """
    source = stamp()

    @cfunc(SIGNATURE, cache=CACHE)
    def pair_rows(parameters):  # type: ignore[no-untyped-def]
        _ = source
        p = carray(parameters, 32)
        base = p.ctypes.data
        pairs, row, group = p[P_K] // 2, p[P_X_ROW], p[P_GROUP_PADDED]
        groups = 2 * p[P_K] // group
        table = carray(pointer(p[P_STATIC]), (p[P_ROWS], 2), np.int64)
        sums = carray(pointer(p[P_SUMS]), 1 << 62, np.int32)
        while True:
            which = fetch_add(base + 8 * P_NEXT, 1)
            if which >= p[P_ROWS]:
                break
            first, count = table[which, 0], table[which, 1]
            target = carray(pointer(p[P_A] + which * PAIRED_ROWS * row), (pairs, PAIRED_ROWS), np.int64)
            for i in range(PAIRED_ROWS):
                at = p[P_X] + (first + min(i, count - 1)) * row
                units = carray(pointer(at), pairs, np.int64)
                for pair in range(pairs):
                    target[pair, i] = units[pair]
                if i < count:
                    for g in range(groups):
                        sums[(first + i) * groups + g] = paired_row(kind, at + 2 * g * group, group // 2)

    return pair_rows
