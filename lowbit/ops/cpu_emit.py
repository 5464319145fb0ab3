"""LLVM emission for the CPU kernels: what all of them build with, and conversions of elements, as numba intrinsics."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()


class _BFloat(ir.types.Type):
    """llvmlite has no bfloat; only its name is needed."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


BF16 = _BFloat()


def vec(element: ir.Type, lanes: int) -> ir.VectorType:
    return ir.VectorType(element, lanes)


def splat(value: ir.Constant, lanes: int) -> ir.Constant:
    return ir.Constant(vec(value.type, lanes), [value.constant] * lanes)


def call(builder: Any, name: str, returns: ir.Type, args: list) -> Any:
    kind = ir.FunctionType(returns, [a.type for a in args])
    module = builder.module
    function = module.globals.get(name) or ir.Function(module, kind, name=name)
    return builder.call(function, args)


def load(builder: Any, address: Any, kind: ir.Type) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1, typ=kind)


def store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def prefetch(builder: Any, address: Any, cache: int) -> None:
    """Ask for the line at `address`, which need not be mapped, in the first or second cache."""
    pointer = builder.inttoptr(address, I8.as_pointer())
    arguments = [pointer, *(ir.Constant(I32, n) for n in (0, 4 - cache, 1))]  # to read; locality; data
    call(builder, "llvm.prefetch.p0", ir.VoidType(), arguments)


def shuffle(builder: Any, x: Any, y: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(x, y, ir.Constant(vec(I32, len(lanes)), lanes))


def loop(builder: Any, count: Any, step: int, starts: list, body: Any) -> list:
    """`values = body(position, values)` for position in range(0, count, step); returns the last values."""
    entry = builder.block
    inside, done = builder.append_basic_block("loop"), builder.append_basic_block("loop.done")
    builder.cbranch(builder.icmp_signed(">", count, ir.Constant(I64, 0)), inside, done)
    builder.position_at_end(inside)
    position = builder.phi(I64)
    position.add_incoming(ir.Constant(I64, 0), entry)
    phis = [builder.phi(start.type) for start in starts]
    values = body(position, phis)
    following = builder.add(position, ir.Constant(I64, step))
    last = builder.block
    position.add_incoming(following, last)
    for phi, start, value in zip(phis, starts, values, strict=True):
        phi.add_incoming(start, entry)
        phi.add_incoming(value, last)
    builder.cbranch(builder.icmp_signed("<", following, count), inside, done)
    builder.position_at_end(done)
    ended = []
    for start, value in zip(starts, values, strict=True):
        phi = builder.phi(start.type)
        phi.add_incoming(start, entry)
        phi.add_incoming(value, last)
        ended.append(phi)
    return ended


def _e4m3_to_f32(builder: Any, raw: Any) -> Any:
    """<n x i8> or i8 → float32: the bits moved into a half (exact, subnormals too), times 2⁸.

    NaN codes (0x7F, 0xFF) give NaN. Independent of the denormals-are-zero mode, since half
    to float conversion ignores it.
    """

    def of(element: ir.Type) -> ir.Type:
        return _like(raw, element)

    def const(element: ir.Type, value: Any) -> ir.Constant:
        return _constant(raw, element, value)

    wide = builder.zext(raw, of(I16))
    magnitude = builder.and_(wide, const(I16, 0x7F))
    sign = builder.shl(builder.and_(wide, const(I16, 0x80)), const(I16, 8))
    half = builder.bitcast(builder.or_(sign, builder.shl(magnitude, const(I16, 7))), of(F16))
    value = builder.fmul(builder.fpext(half, of(F32)), const(F32, 256.0))
    nan = builder.icmp_unsigned("==", magnitude, const(I16, 0x7F))
    return builder.select(nan, const(F32, float("nan")), value)


def spread(builder: Any, value: Any, count: int) -> Any:
    """A scalar in every lane."""
    kind = vec(value.type, count)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    return shuffle(builder, one, one, [0] * count)


@intrinsic
def fetch_add(typingctx, address, value):  # type: ignore[no-untyped-def]
    """Atomically add to the int64 at `address`; returns what was there before."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        pointer = builder.inttoptr(args[0], I64.as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "monotonic")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def pointer(typingctx, address):  # type: ignore[no-untyped-def]
    """int64 address → void pointer, for `numba.carray`."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), codegen


@intrinsic
def hadamard8(typingctx, address):  # type: ignore[no-untyped-def]
    """The unnormalized 8-point Walsh–Hadamard transform of 8 float32, in place.

    Three butterflies in one register: the neighbour at distance h, plus the value itself
    with its sign flipped where bit h of the lane is set.
    """

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        value = load(builder, args[0], vec(F32, 8))
        for distance in (1, 2, 4):
            lanes = ir.Constant(vec(I32, 8), [lane ^ distance for lane in range(8)])
            signs = ir.Constant(vec(F32, 8), [-1.0 if lane & distance else 1.0 for lane in range(8)])
            neighbour = builder.shuffle_vector(value, value, lanes)
            value = builder.fadd(neighbour, builder.fmul(value, signs))
        store(builder, value, args[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


def _elementwise(argument: Any, result: Any, emit: Any) -> Any:
    """A scalar conversion that the loop vectorizer turns into vector code."""

    def typed(typingctx, x):  # type: ignore[no-untyped-def]
        def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
            return emit(builder, args[0])

        return result(argument), codegen

    typed.__name__ = emit.__name__
    return intrinsic(typed)


def _like(x: Any, element: ir.Type) -> ir.Type:
    """The type of x with other elements: a vector where x is one."""
    return vec(element, x.type.count) if isinstance(x.type, ir.VectorType) else element


def _constant(x: Any, element: ir.Type, value: Any) -> ir.Constant:
    scalar = ir.Constant(element, value)
    return splat(scalar, x.type.count) if isinstance(x.type, ir.VectorType) else scalar


def _emit_f16_to_f32(builder: Any, x: Any) -> Any:
    return builder.fpext(builder.bitcast(x, F16), F32)


def emit_f32_to_f16(builder: Any, x: Any) -> Any:
    return builder.bitcast(builder.fptrunc(x, _like(x, F16)), _like(x, I16))


def _emit_bf16_to_f32(builder: Any, x: Any) -> Any:
    return builder.bitcast(builder.shl(builder.zext(x, I32), ir.Constant(I32, 16)), F32)


def emit_f32_to_bf16(builder: Any, x: Any) -> Any:
    """Round half to even; NaN becomes the quiet NaN 0x7FC0, as in torch."""
    bits = builder.bitcast(x, _like(x, I32))
    odd = builder.and_(builder.lshr(bits, _constant(x, I32, 16)), _constant(x, I32, 1))
    rounded = builder.add(bits, builder.add(odd, _constant(x, I32, 0x7FFF)))
    nan = builder.fcmp_unordered("uno", x, x)
    high = builder.lshr(builder.select(nan, _constant(x, I32, 0x7FC00000), rounded), _constant(x, I32, 16))
    return builder.trunc(high, _like(x, I16))


def _emit_upper_half(builder: Any, x: Any) -> Any:
    """float32 → bfloat16 bits, cut off; NaN stays one."""
    nan = builder.fcmp_unordered("uno", x, x)
    bits = builder.select(nan, ir.Constant(I32, 0x7FC00000), builder.bitcast(x, I32))
    return builder.trunc(builder.lshr(bits, ir.Constant(I32, 16)), I16)


def _emit_lower_half(builder: Any, x: Any) -> Any:
    """What `_emit_upper_half` leaves of a float32, exactly; 0 of infinity."""
    bits = builder.and_(builder.bitcast(x, I32), ir.Constant(I32, -0x10000))
    rest = builder.fsub(x, builder.bitcast(bits, F32))
    return builder.select(builder.fcmp_ordered("ord", rest, rest), rest, ir.Constant(F32, 0.0))


def _emit_magnitude_bits(builder: Any, x: Any) -> Any:
    """Bits of |x| as int32: they order as |x| does, with NaN above infinity, so an integer
    maximum is a vectorizable absmax that propagates NaN."""
    return builder.and_(builder.bitcast(x, I32), ir.Constant(I32, 0x7FFFFFFF))


def _emit_bits_to_f32(builder: Any, x: Any) -> Any:
    return builder.bitcast(x, F32)


def _clamp(builder: Any, x: Any, low: float, high: float) -> Any:
    """NaN passes through: neither comparison holds."""
    low_c, high_c = _constant(x, F32, low), _constant(x, F32, high)
    x = builder.select(builder.fcmp_ordered("<", x, low_c), low_c, x)
    return builder.select(builder.fcmp_ordered(">", x, high_c), high_c, x)


def _emit_zero_if_nan(builder: Any, x: Any) -> Any:
    return builder.select(builder.fcmp_unordered("uno", x, x), _constant(x, F32, 0.0), x)


def _emit_round_code(builder: Any, x: Any) -> Any:
    """float32 that is no NaN → int32 in −128 … 127, half to even."""
    rounded = call(builder, "llvm.roundeven.f32", F32, [_clamp(builder, x, -128.0, 127.0)])
    return builder.fptosi(rounded, I32)


def emit_round_e4m3(builder: Any, x: Any) -> Any:
    """float32 (or a vector) → nearest e4m3fn value (as float32), half to even, saturating at ±448; NaN stays.

    Normal values round in the float32 mantissa (20 bits dropped); below 2⁻⁶ the grid is 2⁻⁹,
    where adding and subtracting 1.5 · 2²³ · 2⁻⁹ rounds.
    """
    x = _clamp(builder, x, -448.0, 448.0)
    bits = builder.bitcast(x, _like(x, I32))
    odd = builder.and_(builder.lshr(bits, _constant(x, I32, 20)), _constant(x, I32, 1))
    rounded = builder.add(bits, builder.add(odd, _constant(x, I32, 0x7FFFF)))
    normal = builder.bitcast(builder.and_(rounded, _constant(x, I32, -0x100000)), _like(x, F32))
    magic = _constant(x, F32, 12582912.0 / 512)
    subnormal = builder.fsub(builder.fadd(x, magic), magic)
    magnitude = builder.bitcast(builder.and_(bits, _constant(x, I32, 0x7FFFFFFF)), _like(x, F32))
    small = builder.fcmp_ordered("<", magnitude, _constant(x, F32, 2.0**-6))
    value = builder.select(small, subnormal, normal)
    # −0.0 and tiny negatives keep their sign, as torch's cast does.
    sign = builder.and_(bits, _constant(x, I32, -0x80000000))
    unsigned = builder.and_(builder.bitcast(value, _like(x, I32)), _constant(x, I32, 0x7FFFFFFF))
    value = builder.bitcast(builder.or_(unsigned, sign), _like(x, F32))
    return builder.select(builder.fcmp_unordered("uno", x, x), x, value)


def emit_e4m3_code(builder: Any, x: Any) -> Any:
    """A float32 that is an e4m3fn value → its byte. NaN → 0x7F with its sign."""
    bits = builder.bitcast(x, _like(x, I32))
    sign = builder.and_(builder.lshr(bits, _constant(x, I32, 24)), _constant(x, I32, 0x80))
    magnitude_bits = builder.and_(bits, _constant(x, I32, 0x7FFFFFFF))
    magnitude = builder.bitcast(magnitude_bits, _like(x, F32))
    normal = builder.sub(builder.lshr(magnitude_bits, _constant(x, I32, 20)), _constant(x, I32, 120 << 3))
    nan = builder.fcmp_unordered("uno", x, x)
    scaled = builder.fmul(magnitude, _constant(x, F32, 512.0))
    small = builder.fcmp_ordered("<", magnitude, _constant(x, F32, 2.0**-6))
    safe = builder.select(small, scaled, _constant(x, F32, 0.0))
    code = builder.select(small, builder.fptosi(safe, _like(x, I32)), normal)
    code = builder.select(nan, _constant(x, I32, 0x7F), code)
    return builder.trunc(builder.or_(code, sign), _like(x, I8))


f16_to_f32 = _elementwise(types.uint16, types.float32, _emit_f16_to_f32)
f32_to_f16 = _elementwise(types.float32, types.uint16, emit_f32_to_f16)
bf16_to_f32 = _elementwise(types.uint16, types.float32, _emit_bf16_to_f32)
f32_to_bf16 = _elementwise(types.float32, types.uint16, emit_f32_to_bf16)
e4m3_to_f32 = _elementwise(types.uint8, types.float32, _e4m3_to_f32)
upper_half = _elementwise(types.float32, types.uint16, _emit_upper_half)
lower_half = _elementwise(types.float32, types.float32, _emit_lower_half)
magnitude_bits = _elementwise(types.float32, types.int32, _emit_magnitude_bits)
bits_to_f32 = _elementwise(types.int32, types.float32, _emit_bits_to_f32)
zero_if_nan = _elementwise(types.float32, types.float32, _emit_zero_if_nan)
round_code = _elementwise(types.float32, types.int32, _emit_round_code)
round_e4m3 = _elementwise(types.float32, types.float32, emit_round_e4m3)
e4m3_code = _elementwise(types.float32, types.uint8, emit_e4m3_code)
