"""The ends of CPU products as LLVM emitted by hand for numba: integer or float sums, scaled, become outputs.

By hand because numba computes in int64, which does not vectorize.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from lowbit.ops.cpu_emit import (
    F32,
    I32,
    I64,
    emit_f32_to_bf16,
    emit_f32_to_f16,
    load,
    loop,
    spread,
    store,
    vec,
)
from lowbit.ops.cpu_params import BF16, F16, SCALE_LANES
from lowbit.ops.cpu_params import F32 as F32_OUT
from lowbit.ops.cpu_tiles import transpose

_CONVERT: dict[int, Any] = {F32_OUT: None, F16: emit_f32_to_f16, BF16: emit_f32_to_bf16}


@intrinsic(prefer_literal=True)
def add_scaled_across(typingctx, integer, wide, sums, sums_row, a_scale, w_scale, totals, totals_row, n):  # type: ignore[no-untyped-def]
    """One group of a transposed block: totals[j, i] += float32(sums[j, i]) · a_scale[i] · w_scale[j].

    j < n, and i over `wide` vectors of SCALE_LANES; `integer` and `wide` are compile-time constants.
    Rows of sums and totals are `sums_row` and `totals_row` bytes apart.
    """
    if not all(isinstance(t, types.Literal) for t in (integer, wide)):
        return None
    whole, vectors = bool(integer.literal_value), wide.literal_value
    signature = types.void(integer, wide, *[types.int64] * 7)

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        sums, sums_row, a_scale, w_scale, totals, totals_row, n = args[2:]
        real = vec(F32, SCALE_LANES)
        offsets = [ir.Constant(I64, 4 * SCALE_LANES * v) for v in range(vectors)]
        a_scales = [load(builder, builder.add(a_scale, offset), real) for offset in offsets]

        def body(position: Any, _: list) -> list:
            scale = builder.add(w_scale, builder.mul(position, ir.Constant(I64, 4)))
            source = builder.add(sums, builder.mul(position, sums_row))
            target = builder.add(totals, builder.mul(position, totals_row))
            for offset, of_rows in zip(offsets, a_scales, strict=True):
                value = _scaled_column(builder, whole, builder.add(source, offset), of_rows, scale)
                at = builder.add(target, offset)
                store(builder, builder.fadd(load(builder, at, real), value), at)
            return []

        loop(builder, n, 1, [], body)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def finish_row(
    typingctx, integer, scales, out_dtype, sums, offset, a_scale, w_scale, bias, routed, out, spill, n
):  # type: ignore[no-untyped-def]
    """out[j] = ((float32(sums[j] − offset) · a_scale · w_scale[j]) + bias[j]) · routed, rounded once.

    `integer` and `scales` (else sums are float32 and scaled already) and `out_dtype` are compile-time
    constants. Only whole vectors of SCALE_LANES go to `out`; what follows goes to `spill` (at
    the same place in the row) as float32. sums, w_scale, bias are readable up to a whole vector.
    """
    if not all(isinstance(t, types.Literal) for t in (integer, scales, out_dtype)):
        return None
    whole, scaling = bool(integer.literal_value), bool(scales.literal_value)
    convert = _CONVERT[out_dtype.literal_value]
    signature = types.void(
        integer, scales, out_dtype, types.int64, types.int32, types.float32, types.int64, types.int64,
        types.float32, *[types.int64] * 3,
    )  # fmt: skip

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        sums, offset, a_scale, w_scale, bias, routed, out, spill, n = args[3:]
        real = vec(F32, SCALE_LANES)
        scaled = _scaled(builder, whole, sums, offset, a_scale, w_scale)
        routes = spread(builder, routed, SCALE_LANES)

        def value(here: Any) -> Any:
            found = scaled(here) if scaling else load(builder, builder.add(sums, here), real)
            found = builder.fadd(found, load(builder, builder.add(bias, here), real))
            return builder.fmul(found, routes)

        def body(position: Any, _: list) -> list:
            found = value(builder.mul(position, ir.Constant(I64, 4)))
            found = convert(builder, found) if convert else found
            element = 4 if convert is None else 2
            store(builder, found, builder.add(out, builder.mul(position, ir.Constant(I64, element))))
            return []

        full = builder.and_(n, ir.Constant(I64, -SCALE_LANES))
        loop(builder, full, SCALE_LANES, [], body)
        with builder.if_then(builder.icmp_signed("<", full, n)):
            here = builder.mul(full, ir.Constant(I64, 4))
            store(builder, value(here), builder.add(spill, here))
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def finish_tile(
    typingctx, integer, scales, out_dtype, sums, sums_row, a_scale, w_scale, bias, routed, out, out_row, rows
):  # type: ignore[no-untyped-def]
    """`finish_row` for a transposed square, sums[j, i]: out[i, j] for i < rows ≤ 16 and all j < 16.

    a_scale and routed [i], w_scale and bias [j] are float32, 16 each. The rest as there.
    """
    if not all(isinstance(t, types.Literal) for t in (integer, scales, out_dtype)):
        return None
    whole, scaling = bool(integer.literal_value), bool(scales.literal_value)
    convert = _CONVERT[out_dtype.literal_value]
    signature = types.void(integer, scales, out_dtype, *[types.int64] * 9)

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        sums, sums_row, a_scale, w_scale, bias, routed, out, out_row, rows = args[3:]
        real = vec(F32, SCALE_LANES)
        a_scales, routes = load(builder, a_scale, real), load(builder, routed, real)
        columns = []
        for j in range(SCALE_LANES):
            at = builder.add(sums, builder.mul(sums_row, ir.Constant(I64, j)))
            here = ir.Constant(I64, 4 * j)
            if scaling:
                value = _scaled_column(builder, whole, at, a_scales, builder.add(w_scale, here))
            else:
                value = load(builder, at, real)
            value = builder.fadd(value, _everywhere(builder, builder.add(bias, here)))
            columns.append(builder.fmul(value, routes))
        for i, row in enumerate(transpose(builder, columns)):
            with builder.if_then(builder.icmp_signed("<", ir.Constant(I64, i), rows)):
                found = convert(builder, row) if convert else row
                store(builder, found, builder.add(out, builder.mul(out_row, ir.Constant(I64, i))))
        return context.get_dummy_value()

    return signature, codegen


def _everywhere(builder: Any, address: Any) -> Any:
    return spread(builder, load(builder, address, F32), SCALE_LANES)


def _scaled_column(builder: Any, whole: bool, sums: Any, a_scales: Any, w_scale: Any) -> Any:
    """float32(sums) · a_scales · w_scale of one column: SCALE_LANES of its rows, whose scales are a vector."""
    real = vec(F32, SCALE_LANES)
    value = load(builder, sums, vec(I32, SCALE_LANES) if whole else real)
    if whole:
        value = builder.sitofp(value, real)
    return builder.fmul(builder.fmul(value, a_scales), _everywhere(builder, w_scale))


def _scaled(builder: Any, whole: bool, sums: Any, offset: Any, a_scale: Any, w_scale: Any) -> Any:
    """here (bytes) → float32(sums − offset) · a_scale · w_scale, a vector."""
    wide, real = vec(I32, SCALE_LANES), vec(F32, SCALE_LANES)
    offsets, a_scales = spread(builder, offset, SCALE_LANES), spread(builder, a_scale, SCALE_LANES)

    def at(here: Any) -> Any:
        value = load(builder, builder.add(sums, here), wide if whole else real)
        if whole:
            value = builder.sitofp(builder.sub(value, offsets), real)
        scale = load(builder, builder.add(w_scale, here), real)
        return builder.fmul(builder.fmul(value, a_scales), scale)

    return at
