"""Activations → codes, 16 at a time, as LLVM emitted by hand for numba.

By hand because what LLVM makes of the loops spends three times the instructions: division, a comparison
for each bound, a rounding and a conversion.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from lowbit.ops.cpu_emit import (
    F16,
    F32,
    I8,
    I16,
    I32,
    I64,
    call,
    emit_e4m3_code,
    emit_round_e4m3,
    load,
    loop,
    spread,
    store,
    vec,
)
from lowbit.ops.cpu_params import A_BF16, A_F32, A_I8, A_I16, BF16
from lowbit.ops.cpu_params import F16 as F16_IN

AT_ONCE = 16
# Added to a small float32, this leaves no bits below 1: the integer is in the lowest bits, half to even.
_ROUNDS, _ROUNDED = 1.5 * 2**23, 0x4B400000


def _all(element: ir.Type, value: Any) -> ir.Constant:
    return ir.Constant(vec(element, AT_ONCE), [value] * AT_ONCE)


def _magnitude(builder: Any, x: Any) -> Any:
    return builder.and_(builder.bitcast(x, vec(I32, AT_ONCE)), _all(I32, 0x7FFFFFFF))


@intrinsic(prefer_literal=True)
def load_absmax(typingctx, dtype, source, values, n):  # type: ignore[no-untyped-def]
    """n floats (a multiple of 16) at `source` → float32 at `values`; returns the bits of the largest magnitude.

    `dtype` is a compile-time constant. Bits order as magnitudes do, NaN above infinity.
    """
    if not isinstance(dtype, types.Literal):
        return None
    signature = types.int32(dtype, *[types.int64] * 3)
    kind = dtype.literal_value

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        source, values, n = args[1:]
        real, wide = vec(F32, AT_ONCE), vec(I32, AT_ONCE)

        def body(position: Any, tops: list) -> list:
            at = builder.add(
                source, builder.mul(position, ir.Constant(I64, 2 if kind in (F16_IN, BF16) else 4))
            )
            if kind == BF16:
                bits = builder.zext(load(builder, at, vec(I16, AT_ONCE)), wide)
                x = builder.bitcast(builder.shl(bits, _all(I32, 16)), real)
            elif kind == F16_IN:
                x = builder.fpext(load(builder, at, vec(F16, AT_ONCE)), real)
            else:
                x = load(builder, at, real)
            store(builder, x, builder.add(values, builder.mul(position, ir.Constant(I64, 4))))
            bits = _magnitude(builder, x)
            return [builder.select(builder.icmp_signed(">", bits, tops[0]), bits, tops[0])]

        (tops,) = loop(builder, n, AT_ONCE, [ir.Constant(wide, None)], body)
        return call(builder, f"llvm.vector.reduce.smax.v{AT_ONCE}i32", I32, [tops])

    return signature, codegen


@intrinsic(prefer_literal=True)
def quantize_values(typingctx, kind, bounded, values, lift, inverse, divisor, shift, lowest, zero, target, n):  # type: ignore[no-untyped-def]
    """n float32 (a multiple of 16) / scale → codes or their values at `target`; returns the sum of int8 codes.

    `kind` (of operand, see `cpu_params`) and `bounded` are compile-time constants. The scale is `divisor` / `lift`,
    with 2⁻⁶⁰ ≤ divisor ≤ 2⁶⁰ (or 0 with inverse 0, for infinity) and `lift` a power of two; `inverse`
    is 1 / divisor, rounded. Codes come out as of an IEEE division: of a product with the inverse, twice
    what is missing of x is added (Markstein, "Computation of elementary functions on the IBM RISC
    System/6000", 1990). int8: plus `shift`, half to even, within [`lowest`, 127], NaN as 0, less `zero`.
    `bounded`: values are finite and no larger than the codes reach, lift is 1 and shift 0.
    """
    if not all(isinstance(t, types.Literal) for t in (kind, bounded)):
        return None
    operand, known = kind.literal_value, bool(bounded.literal_value)
    signature = types.int32(kind, bounded, types.int64, *[types.float32] * 4, *[types.int64] * 4)

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        values, lift, inverse, divisor, shift, lowest, zero, target, n = args[2:]
        real, wide = vec(F32, AT_ONCE), vec(I32, AT_ONCE)
        lift, inverse, divisor, shift = (spread(builder, v, AT_ONCE) for v in (lift, inverse, divisor, shift))
        low = spread(builder, builder.sitofp(lowest, F32), AT_ONCE)
        base = builder.add(builder.trunc(zero, I32), ir.Constant(I32, _ROUNDED))
        base = spread(builder, base, AT_ONCE)
        negative = builder.fneg(divisor)

        def fma(a: Any, b: Any, c: Any) -> Any:
            return call(builder, f"llvm.fma.v{AT_ONCE}f32", real, [a, b, c])

        def quotient(x: Any) -> Any:
            product = q = builder.fmul(x, inverse)
            for _ in range(2):
                q = fma(fma(q, negative, x), inverse, q)
            if operand not in (A_I8, A_I16):  # where zero has a sign, it is the product's
                sign = builder.and_(builder.bitcast(product, wide), _all(I32, -0x80000000))
                q = builder.bitcast(builder.or_(_magnitude(builder, q), sign), real)
            if known:
                return q
            # Where every code saturates the product will do, and infinity stays one.
            small = builder.fcmp_ordered(
                "<", builder.bitcast(_magnitude(builder, product), real), _all(F32, 2.0**20)
            )
            return builder.select(small, q, product)

        def body(position: Any, sums: list) -> list:
            x = load(builder, builder.add(values, builder.mul(position, ir.Constant(I64, 4))), real)
            x = quotient(x if known else builder.fmul(x, lift))
            if operand in (A_I8, A_I16):
                if not known:
                    x = builder.select(builder.fcmp_ordered("ord", x, x), x, ir.Constant(real, None))
                    x = builder.fadd(x, shift)
                x = builder.select(builder.fcmp_ordered(">", x, low), x, low)
                top = _all(F32, 127.0)
                x = builder.select(builder.fcmp_ordered("<", x, top), x, top)
                codes = builder.bitcast(builder.fadd(x, _all(F32, _ROUNDS)), wide)
                codes = builder.sub(codes, base)
                sums = [builder.add(sums[0], codes)]
                found = builder.trunc(codes, vec(I16 if operand == A_I16 else I8, AT_ONCE))
            else:
                x = emit_round_e4m3(builder, x)
                if operand == A_F32:
                    found = x
                elif operand == A_BF16:
                    bits = builder.lshr(builder.bitcast(x, wide), _all(I32, 16))
                    found = builder.trunc(bits, vec(I16, AT_ONCE))
                else:
                    found = emit_e4m3_code(builder, x)
            element = {A_I16: 2, A_F32: 4, A_BF16: 2}.get(operand, 1)
            store(builder, found, builder.add(target, builder.mul(position, ir.Constant(I64, element))))
            return sums

        (sums,) = loop(builder, n, AT_ONCE, [ir.Constant(wide, None)], body)
        return call(builder, f"llvm.vector.reduce.add.v{AT_ONCE}i32", I32, [sums])

    return signature, codegen
