"""LLVM emission for the CPU kernels: register tiles and element conversions, as numba intrinsics.

Why by hand: LLVM turns a plain int8 dot product into `pmulld`, a third of the speed of
`pmaddwd`. Here each tile is one loop over K with every accumulator in a register.

Every instruction used is exact on integer codes:

    pmaddwd  int16 × int16, pairs added in int32: no saturation for |a|, |b| < 2¹⁵
    dpbusd   uint8 × int8, four products added into int32 (VNNI's non-saturating form)

`pmaddubsw`, which saturates pairs to 16 bits, is what makes other int8 matmuls wrong
without VNNI, and is not used.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()


class _BFloat(ir.types.Type):
    """llvmlite has no bfloat; only its name is needed."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


BF16 = _BFloat()


def _vec(element: ir.Type, lanes: int) -> ir.VectorType:
    return ir.VectorType(element, lanes)


def _splat(value: ir.Constant, lanes: int) -> ir.Constant:
    return ir.Constant(_vec(value.type, lanes), [value.constant] * lanes)


def _call(builder: Any, name: str, returns: ir.Type, args: list) -> Any:
    kind = ir.FunctionType(returns, [a.type for a in args])
    module = builder.module
    function = module.globals.get(name) or ir.Function(module, kind, name=name)
    return builder.call(function, args)


def _load(builder: Any, address: Any, kind: ir.Type) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1, typ=kind)


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def _shuffle(builder: Any, x: Any, y: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(x, y, ir.Constant(_vec(I32, len(lanes)), lanes))


def _reduce4(builder: Any, vectors: list, add: Any) -> Any:
    """The sums of the lanes of 4 vectors, as one vector of 4: a fixed order, the same at every call.

    Pairs are interleaved and added twice, which leaves [Σx, Σy, Σz, Σw] per 128 bits; a third
    of the shuffles that four separate sums need.
    """
    lanes = vectors[0].type.count
    quads = range(0, lanes, 4)
    low = [q + i + s for q in quads for i in (0, 1) for s in (0, lanes)]
    high = [q + i + s for q in quads for i in (2, 3) for s in (0, lanes)]
    xy, zw = (
        add(_shuffle(builder, x, y, low), _shuffle(builder, x, y, high))
        for x, y in (vectors[:2], vectors[2:])
    )
    first = [q + i + s for q in quads for s in (0, lanes) for i in (0, 1)]
    second = [q + i + s for q in quads for s in (0, lanes) for i in (2, 3)]
    total = add(_shuffle(builder, xy, zw, first), _shuffle(builder, xy, zw, second))
    while lanes > 4:
        lanes //= 2
        halves = (_shuffle(builder, total, total, list(range(s, s + lanes))) for s in (0, lanes))
        total = add(*halves)
    return total


class _Step:
    """One step along K: how both sides load, and what adds their product to an accumulator.

    `kind` is the instruction with its vector width in bits, then the weight's storage where
    it is decoded while loading: `pmaddwd256`, `dpbusd512`, `fma256:e4m3`, `dpbf16512`.
    """

    def __init__(self, kind: str) -> None:
        name, _, self.storage = kind.partition(":")
        self.name, self.bits = name[:-3], int(name[-3:])
        self.acc_lanes = self.bits // 32
        self.acc = _vec(F32 if self.name in ("fma", "dpbf16") else I32, self.acc_lanes)
        self.elements = step_elements(kind)
        self.nan_codes: Any = None
        self.a_bytes = {"pmaddwd": 2, "dpbusd": 1, "fma": 4, "dpbf16": 2}[self.name]
        self.b_bytes = {"": self.a_bytes, "i8": 1, "u8": 1, "e4m3": 1}[self.storage]
        if self.name in ("pmaddwd", "dpbusd"):
            self.b_bytes = 1

    def load_a(self, builder: Any, address: Any) -> Any:
        """One vector; for `fma` with decoding, the two float vectors that match a half's worth."""
        if self.name == "fma" and self.storage:
            second = builder.add(address, ir.Constant(I64, 4 * self.acc_lanes))
            return [_load(builder, address, self.acc), _load(builder, second, self.acc)]
        kind = {"fma": self.acc, "dpbusd": self.acc, "pmaddwd": _vec(I16, self.elements)}
        return _load(builder, address, kind.get(self.name, _vec(BF16, self.elements)))

    def load_b(self, builder: Any, address: Any) -> Any:
        if self.name == "pmaddwd":
            return builder.sext(_load(builder, address, _vec(I8, self.elements)), _vec(I16, self.elements))
        if self.storage:
            return self._decode(builder, _load(builder, address, _vec(I8, self.elements)))
        return self.load_a(builder, address)

    def _decode(self, builder: Any, raw: Any) -> list:
        """Stored codes → two float vectors; e4m3 times 2⁻⁸, which `finish` takes back.

        NaN codes of e4m3 read as ±1.875 here. Checking each value would cost as much as
        decoding it, and one NaN makes the whole sum NaN: so the largest magnitude is kept,
        and `finish` looks at that.
        """
        halves = [list(range(s, s + self.acc_lanes)) for s in (0, self.acc_lanes)]
        if self.storage != "e4m3":
            if self.storage == "u8":  # int8 plus 128: flipping the top bit takes it off
                raw = builder.xor(raw, _splat(ir.Constant(I8, -128), self.elements))
            parts = (_shuffle(builder, raw, raw, half) for half in halves)
            return [builder.sitofp(builder.sext(part, _vec(I32, self.acc_lanes)), self.acc) for part in parts]
        wide = builder.sext(raw, _vec(I16, self.elements))
        bits = builder.and_(
            builder.shl(wide, _splat(ir.Constant(I16, 7), self.elements)),
            _splat(ir.Constant(I16, -0x4080), self.elements),  # 0xBF80: sign, exponent, mantissa
        )
        magnitude = builder.and_(bits, _splat(ir.Constant(I16, 0x7FFF), self.elements))
        greater = builder.icmp_unsigned(">", magnitude, self.nan_codes)
        self.nan_codes = builder.select(greater, magnitude, self.nan_codes)
        parts = (_shuffle(builder, bits, bits, half) for half in halves)
        return [builder.fpext(builder.bitcast(part, _vec(F16, self.acc_lanes)), self.acc) for part in parts]

    def accumulate(self, builder: Any, acc: Any, a: Any, b: Any) -> Any:
        if self.name == "pmaddwd":
            name = {256: "llvm.x86.avx2.pmadd.wd", 512: "llvm.x86.avx512.pmaddw.d.512"}[self.bits]
            return builder.add(acc, _call(builder, name, self.acc, [a, b]))
        if self.name == "dpbusd":
            lanes8 = _vec(I8, self.elements)
            operands = [acc, builder.bitcast(a, lanes8), builder.bitcast(b, lanes8)]
            return _call(builder, f"llvm.x86.avx512.vpdpbusd.{self.bits}", self.acc, operands)
        if self.name == "dpbf16":
            return _call(builder, f"llvm.x86.avx512bf16.dpbf16ps.{self.bits}", self.acc, [acc, a, b])
        pairs = zip(a, b, strict=True) if self.storage else [(a, b)]
        for x, y in pairs:
            acc = _call(builder, f"llvm.fma.v{self.acc_lanes}f32", self.acc, [x, y, acc])
        return acc

    def finish(self, builder: Any, sums: Any, nan_codes: Any) -> Any:
        """Sums of one column, after the loop: what decoding left out."""
        if self.storage != "e4m3":
            return sums
        found = builder.icmp_unsigned("==", nan_codes, _splat(ir.Constant(I16, 0x3F80), self.elements))
        any_nan = builder.icmp_unsigned(
            "!=", builder.bitcast(found, ir.IntType(self.elements)), ir.Constant(ir.IntType(self.elements), 0)
        )
        scaled = builder.fmul(sums, _splat(ir.Constant(F32, 256.0), self.acc_lanes))
        return builder.select(any_nan, _splat(ir.Constant(F32, float("nan")), self.acc_lanes), scaled)

    def add(self, builder: Any) -> Any:
        return builder.fadd if self.acc.element is F32 else builder.add


def step_elements(kind: str) -> int:
    """Elements of K that one step of `kind` consumes."""
    name, _, storage = kind.partition(":")
    once = int(name[-3:]) // {"pmaddwd": 16, "dpbusd": 8, "fma": 32, "dpbf16": 16}[name[:-3]]
    return 2 * once if storage else once


def operand_step(kind: str) -> int:
    """What the operand's rows are padded to: a whole step, also where `fma` decodes while loading."""
    return step_elements(f"{kind}:i8" if kind.startswith("fma") else kind)


def _e4m3_to_f32(builder: Any, raw: Any) -> Any:
    """<n x i8> or i8 → float32: the bits moved into a half (exact, subnormals too), times 2⁸.

    NaN codes (0x7F, 0xFF) give NaN. Independent of the denormals-are-zero mode, since half
    to float conversion ignores it.
    """
    lanes = raw.type.count if isinstance(raw.type, ir.VectorType) else 0

    def of(element: ir.Type) -> ir.Type:
        return _vec(element, lanes) if lanes else element

    def const(element: ir.Type, value: Any) -> ir.Constant:
        scalar = ir.Constant(element, value)
        return _splat(scalar, lanes) if lanes else scalar

    wide = builder.zext(raw, of(I16))
    magnitude = builder.and_(wide, const(I16, 0x7F))
    sign = builder.shl(builder.and_(wide, const(I16, 0x80)), const(I16, 8))
    half = builder.bitcast(builder.or_(sign, builder.shl(magnitude, const(I16, 7))), of(F16))
    value = builder.fmul(builder.fpext(half, of(F32)), const(F32, 256.0))
    nan = builder.icmp_unsigned("==", magnitude, const(I16, 0x7F))
    return builder.select(nan, const(F32, float("nan")), value)


@intrinsic(prefer_literal=True)
def tile(typingctx, kind, mr, nr, a, lda, b, ldb, c, ldc, k):  # type: ignore[no-untyped-def]
    """c[i, j] += Σₖ a[i, k] · b[j, k] for i < mr, j < nr: one register tile.

    `kind`, `mr`, `nr` are compile-time constants. Addresses and row strides are in bytes;
    `c` is int32 (float32 for the float kinds); `k` is a multiple of `step_elements(kind)`.
    """
    if not all(isinstance(t, types.Literal) for t in (kind, mr, nr)):
        return None
    step, rows, cols = _Step(kind.literal_value), mr.literal_value, nr.literal_value
    signature = types.void(kind, mr, nr, *[types.int64] * 7)

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        a, lda, b, ldb, c, ldc, k = args[3:]
        scale_a, scale_b = ir.Constant(I64, step.a_bytes), ir.Constant(I64, step.b_bytes)
        a_rows = [builder.add(a, builder.mul(lda, ir.Constant(I64, i))) for i in range(rows)]
        b_rows = [builder.add(b, builder.mul(ldb, ir.Constant(I64, j))) for j in range(cols)]
        entry = builder.block
        body, done = builder.append_basic_block("tile.k"), builder.append_basic_block("tile.done")
        zero, no_nan = ir.Constant(step.acc, None), ir.Constant(_vec(I16, step.elements), None)
        tracks_nan = step.storage == "e4m3"
        nonempty = builder.icmp_signed(">", k, ir.Constant(I64, 0))
        builder.cbranch(nonempty, body, done)

        builder.position_at_end(body)
        position = builder.phi(I64)
        position.add_incoming(ir.Constant(I64, 0), entry)
        phis = [[builder.phi(step.acc) for _ in range(cols)] for _ in range(rows)]
        nan_phis = [builder.phi(no_nan.type) for _ in range(cols if tracks_nan else 0)]
        offset_a, offset_b = builder.mul(position, scale_a), builder.mul(position, scale_b)
        sums = [list(row) for row in phis]
        nans: list = [None] * cols
        b_vectors = []
        for j, row in enumerate(b_rows):
            step.nan_codes = nan_phis[j] if tracks_nan else None
            b_vectors.append(step.load_b(builder, builder.add(row, offset_b)))
            nans[j] = step.nan_codes
        for i, row in enumerate(a_rows):
            a_vector = step.load_a(builder, builder.add(row, offset_a))
            for j, b_vector in enumerate(b_vectors):
                sums[i][j] = step.accumulate(builder, sums[i][j], a_vector, b_vector)
        following = builder.add(position, ir.Constant(I64, step.elements))
        last = builder.block
        position.add_incoming(following, last)
        loop_values = [(phis[i][j], zero, sums[i][j]) for i in range(rows) for j in range(cols)]
        loop_values += [(phi, no_nan, nans[j]) for j, phi in enumerate(nan_phis)]
        for phi, start, value in loop_values:
            phi.add_incoming(start, entry)
            phi.add_incoming(value, last)
        builder.cbranch(builder.icmp_signed("<", following, k), body, done)

        builder.position_at_end(done)
        ended = []
        for _, start, value in loop_values:
            phi = builder.phi(value.type)
            phi.add_incoming(start, entry)
            phi.add_incoming(value, last)
            ended.append(phi)
        totals, nans = ended[: rows * cols], ended[rows * cols :] or [None] * cols
        totals = [step.finish(builder, total, nans[at % cols]) for at, total in enumerate(totals)]
        add, element = step.add(builder), step.acc.element
        for i in range(rows):
            row_address = builder.add(c, builder.mul(ldc, ir.Constant(I64, i)))
            for j in range(0, cols, 4):
                width = min(4, cols - j)
                four = totals[i * cols + j : i * cols + j + width] + [zero] * (4 - width)
                values = _reduce4(builder, four, add)
                address = builder.add(row_address, ir.Constant(I64, 4 * j))
                if width == 4:
                    _store(builder, add(_load(builder, address, values.type), values), address)
                    continue
                for at in range(width):
                    value = builder.extract_element(values, ir.Constant(I32, at))
                    there = builder.add(address, ir.Constant(I64, 4 * at))
                    _store(builder, add(_load(builder, there, element), value), there)
        return context.get_dummy_value()

    return signature, codegen


SCALE_LANES = 8


@intrinsic(prefer_literal=True)
def scale_row(typingctx, integer, add, sums, zero, columns, a_scale, w_scale, out, n):  # type: ignore[no-untyped-def]
    """out[j] (+)= float32(sums[j] − zero · columns[j]) · a_scale · w_scale[j], and sums[j] = 0.

    `integer` (else sums are float32 and there is no zero point) and `add` are compile-time
    constants. Addresses; n is a multiple of SCALE_LANES. By hand because numba computes in
    int64, which does not vectorize.
    """
    if not (isinstance(integer, types.Literal) and isinstance(add, types.Literal)):
        return None
    whole, adds = bool(integer.literal_value), bool(add.literal_value)
    wide, real = _vec(I32, SCALE_LANES), _vec(F32, SCALE_LANES)
    signature = types.void(
        integer, add, types.int64, types.int32, types.int64, types.float32, *[types.int64] * 3
    )

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        sums, zero, columns, a_scale, w_scale, out, n = args[2:]

        def spread(value: Any, kind: Any) -> Any:
            one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
            return _shuffle(builder, one, one, [0] * SCALE_LANES)

        zeros, a_scales = spread(zero, wide), spread(a_scale, real)
        entry = builder.block
        body, done = builder.append_basic_block("scale"), builder.append_basic_block("scale.done")
        builder.cbranch(builder.icmp_signed(">", n, ir.Constant(I64, 0)), body, done)
        builder.position_at_end(body)
        position = builder.phi(I64)
        position.add_incoming(ir.Constant(I64, 0), entry)
        offset = builder.mul(position, ir.Constant(I64, 4))
        at = builder.add(sums, offset)
        if whole:
            total = _load(builder, at, wide)
            correction = builder.mul(zeros, _load(builder, builder.add(columns, offset), wide))
            value = builder.sitofp(builder.sub(total, correction), real)
        else:
            value = _load(builder, at, real)
        value = builder.fmul(
            builder.fmul(value, a_scales), _load(builder, builder.add(w_scale, offset), real)
        )
        target = builder.add(out, offset)
        if adds:
            value = builder.fadd(_load(builder, target, real), value)
        _store(builder, value, target)
        _store(builder, ir.Constant(wide, None), at)
        following = builder.add(position, ir.Constant(I64, SCALE_LANES))
        position.add_incoming(following, builder.block)
        builder.cbranch(builder.icmp_signed("<", following, n), body, done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return signature, codegen


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
        value = _load(builder, args[0], _vec(F32, 8))
        for distance in (1, 2, 4):
            lanes = ir.Constant(_vec(I32, 8), [lane ^ distance for lane in range(8)])
            signs = ir.Constant(_vec(F32, 8), [-1.0 if lane & distance else 1.0 for lane in range(8)])
            neighbour = builder.shuffle_vector(value, value, lanes)
            value = builder.fadd(neighbour, builder.fmul(value, signs))
        _store(builder, value, args[0])
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


def _emit_f16_to_f32(builder: Any, x: Any) -> Any:
    return builder.fpext(builder.bitcast(x, F16), F32)


def _emit_f32_to_f16(builder: Any, x: Any) -> Any:
    return builder.bitcast(builder.fptrunc(x, F16), I16)


def _emit_bf16_to_f32(builder: Any, x: Any) -> Any:
    return builder.bitcast(builder.shl(builder.zext(x, I32), ir.Constant(I32, 16)), F32)


def _emit_f32_to_bf16(builder: Any, x: Any) -> Any:
    """Round half to even; NaN becomes the quiet NaN 0x7FC0, as in torch."""
    bits = builder.bitcast(x, I32)
    odd = builder.and_(builder.lshr(bits, ir.Constant(I32, 16)), ir.Constant(I32, 1))
    rounded = builder.add(bits, builder.add(odd, ir.Constant(I32, 0x7FFF)))
    nan = builder.fcmp_unordered("uno", x, x)
    high = builder.lshr(builder.select(nan, ir.Constant(I32, 0x7FC00000), rounded), ir.Constant(I32, 16))
    return builder.trunc(high, I16)


def _emit_magnitude_bits(builder: Any, x: Any) -> Any:
    """Bits of |x| as int32: they order as |x| does, with NaN above infinity, so an integer
    maximum is a vectorizable absmax that propagates NaN."""
    return builder.and_(builder.bitcast(x, I32), ir.Constant(I32, 0x7FFFFFFF))


def _emit_bits_to_f32(builder: Any, x: Any) -> Any:
    return builder.bitcast(x, F32)


def _clamp(builder: Any, x: Any, low: float, high: float) -> Any:
    """NaN passes through: neither comparison holds."""
    low_c, high_c = ir.Constant(F32, low), ir.Constant(F32, high)
    x = builder.select(builder.fcmp_ordered("<", x, low_c), low_c, x)
    return builder.select(builder.fcmp_ordered(">", x, high_c), high_c, x)


def _emit_zero_if_nan(builder: Any, x: Any) -> Any:
    return builder.select(builder.fcmp_unordered("uno", x, x), ir.Constant(F32, 0.0), x)


def _emit_round_code(builder: Any, x: Any) -> Any:
    """float32 that is no NaN → int32 in −128 … 127, half to even."""
    rounded = _call(builder, "llvm.roundeven.f32", F32, [_clamp(builder, x, -128.0, 127.0)])
    return builder.fptosi(rounded, I32)


def _emit_round_e4m3(builder: Any, x: Any) -> Any:
    """float32 → nearest e4m3fn value (as float32), half to even, saturating at ±448; NaN stays.

    Normal values round in the float32 mantissa (20 bits dropped); below 2⁻⁶ the grid is 2⁻⁹,
    where adding and subtracting 1.5 · 2²³ · 2⁻⁹ rounds.
    """
    x = _clamp(builder, x, -448.0, 448.0)
    bits = builder.bitcast(x, I32)
    odd = builder.and_(builder.lshr(bits, ir.Constant(I32, 20)), ir.Constant(I32, 1))
    rounded = builder.add(bits, builder.add(odd, ir.Constant(I32, 0x7FFFF)))
    normal = builder.bitcast(builder.and_(rounded, ir.Constant(I32, -0x100000)), F32)
    magic = ir.Constant(F32, 12582912.0 / 512)
    subnormal = builder.fsub(builder.fadd(x, magic), magic)
    magnitude = builder.bitcast(builder.and_(bits, ir.Constant(I32, 0x7FFFFFFF)), F32)
    small = builder.fcmp_ordered("<", magnitude, ir.Constant(F32, 2.0**-6))
    value = builder.select(small, subnormal, normal)
    # −0.0 and tiny negatives keep their sign, as torch's cast does.
    sign = builder.and_(bits, ir.Constant(I32, -0x80000000))
    unsigned = builder.and_(builder.bitcast(value, I32), ir.Constant(I32, 0x7FFFFFFF))
    value = builder.bitcast(builder.or_(unsigned, sign), F32)
    return builder.select(builder.fcmp_unordered("uno", x, x), x, value)


def _emit_e4m3_code(builder: Any, x: Any) -> Any:
    """A float32 that is an e4m3fn value → its byte. NaN → 0x7F with its sign."""
    bits = builder.bitcast(x, I32)
    sign = builder.and_(builder.lshr(bits, ir.Constant(I32, 24)), ir.Constant(I32, 0x80))
    magnitude_bits = builder.and_(bits, ir.Constant(I32, 0x7FFFFFFF))
    magnitude = builder.bitcast(magnitude_bits, F32)
    normal = builder.sub(builder.lshr(magnitude_bits, ir.Constant(I32, 20)), ir.Constant(I32, 120 << 3))
    nan = builder.fcmp_unordered("uno", x, x)
    scaled = builder.fmul(magnitude, ir.Constant(F32, 512.0))
    small = builder.fcmp_ordered("<", magnitude, ir.Constant(F32, 2.0**-6))
    safe = builder.select(small, scaled, ir.Constant(F32, 0.0))
    code = builder.select(small, builder.fptosi(safe, I32), normal)
    code = builder.select(nan, ir.Constant(I32, 0x7F), code)
    return builder.trunc(builder.or_(code, sign), I8)


f16_to_f32 = _elementwise(types.uint16, types.float32, _emit_f16_to_f32)
f32_to_f16 = _elementwise(types.float32, types.uint16, _emit_f32_to_f16)
bf16_to_f32 = _elementwise(types.uint16, types.float32, _emit_bf16_to_f32)
f32_to_bf16 = _elementwise(types.float32, types.uint16, _emit_f32_to_bf16)
e4m3_to_f32 = _elementwise(types.uint8, types.float32, _e4m3_to_f32)
magnitude_bits = _elementwise(types.float32, types.int32, _emit_magnitude_bits)
bits_to_f32 = _elementwise(types.int32, types.float32, _emit_bits_to_f32)
zero_if_nan = _elementwise(types.float32, types.float32, _emit_zero_if_nan)
round_code = _elementwise(types.float32, types.int32, _emit_round_code)
round_e4m3 = _elementwise(types.float32, types.float32, _emit_round_e4m3)
e4m3_code = _elementwise(types.float32, types.uint8, _emit_e4m3_code)
