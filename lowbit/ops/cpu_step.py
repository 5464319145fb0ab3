"""What one step along K is, for every instruction of the CPU products: how both sides load, and how a sum grows.

Every instruction used is exact on integer codes:

    pmaddwd  int16 × int16, pairs added in int32: no saturation for |a|, |b| < 2¹⁵
    dpbusd   uint8 × int8, four products added into int32 (VNNI's non-saturating form);
             the weight is made unsigned, w + 128, and 128 · Σa is taken off at the end
    winograd half as many of pmaddwd, and more additions (see `cpu_winograd`)

and of decoded codes, `fma` and `dpbf16` add in float32, `fmad` in float64: exact for e4m3, whose
products are multiples of 2⁻¹⁸ below 2¹⁸, so that 2¹⁷ of them fit float64's 53 bits.

`pmaddubsw`, which saturates pairs to 16 bits, is what makes other int8 matmuls wrong
without VNNI, and is not used.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from llvmlite.binding import llvm_version_info

from lowbit.ops.cpu_emit import BF16, F16, F32, F64, I8, I16, I32, I64, call, load, shuffle, splat, store, vec
from lowbit.ops.cpu_lookup import IN_ORDER, Lookup
from lowbit.ops.cpu_params import W_E4M3, W_I8, W_U8

# Multiply integer codes, weights as stored.
INTEGER = ("pmaddwd", "winograd", "dpbusd")


class Step:
    """One step along K: how both sides load, and what adds their product to an accumulator.

    `kind` is the instruction with its vector width in bits, then the weight's storage where
    it is decoded while loading: `pmaddwd256`, `winograd256`, `dpbusd512`, `fma256:e4m3`, `dpbf16512`, `dpbf16512:u8`.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        name, _, self.storage = kind.partition(":")
        self.name, self.bits = name[:-3], int(name[-3:])
        self.lanes = self.bits // 32
        self.real = vec(F32, self.lanes)
        self.acc = {"fma": self.real, "dpbf16": self.real, "fmad": vec(F64, self.lanes)}.get(
            self.name, vec(I32, self.lanes)
        )
        self.elements = step_elements(kind)
        # e4m3 by arithmetic; looked up, NaN codes are NaN and values are whole.
        self.shrunk = self.storage == "e4m3" and self.name != "dpbf16"
        self.nan_codes: Any = None
        self.a_bytes = _BITS[self.name] // 8
        stored = {"": self.a_bytes, "bf16": 2}.get(self.storage, 1)
        self.b_bytes = 1 if self.name in INTEGER else stored
        # Two units of K at a time (see `cpu_winograd`).
        self.paired = self.name == "winograd"

    def load_a(self, builder: Any, address: Any) -> Any:
        """One vector; where codes are decoded while loading, two, each for half of them."""
        if self.storage:
            second = builder.add(address, ir.Constant(I64, self.bits // 8))
            return [load(builder, at, vec(self.element, self.elements // 2)) for at in (address, second)]
        return load(builder, address, vec(self.element, self.elements))

    def load_b(self, builder: Any, address: Any) -> Any:
        if self.name in ("pmaddwd", "winograd"):
            return builder.sext(load(builder, address, vec(I8, self.elements)), vec(I16, self.elements))
        if self.name == "dpbusd":
            codes = load(builder, address, vec(I8, self.elements))
            return builder.xor(codes, splat(ir.Constant(I8, -128), self.elements))
        if self.storage == "bf16":
            second = builder.add(address, ir.Constant(I64, 2 * self.lanes))
            return [self._widen(builder, load(builder, at, vec(I16, self.lanes))) for at in (address, second)]
        if self.storage:
            return self._decode(builder, load(builder, address, vec(I8, self.elements)))
        return self.load_a(builder, address)

    def _widen(self, builder: Any, raw: Any) -> Any:
        """bfloat16 → float32: its bits are the upper half."""
        wide = builder.zext(raw, vec(I32, self.lanes))
        return builder.bitcast(builder.shl(wide, splat(ir.Constant(I32, 16), self.lanes)), self.real)

    def _decode(self, builder: Any, raw: Any) -> list:
        """Stored codes → two vectors of the element; e4m3 as floats times 2⁻⁸, which `finish` takes back.

        NaN codes of e4m3 read as ±1.875 here. Checking each value would cost as much as
        decoding it, and one NaN makes the whole sum NaN: so the largest magnitude is kept,
        in `nan_codes`, and looked at after the loop.
        """
        if self.name == "dpbf16":
            found = _lookup(self.storage).emit(builder, shuffle(builder, raw, raw, IN_ORDER))
            return [builder.bitcast(half, vec(BF16, self.elements // 2)) for half in found]
        halves = [list(range(s, s + self.lanes)) for s in (0, self.lanes)]
        if self.storage != "e4m3":
            if self.storage == "u8":  # int8 plus 128: flipping the top bit takes it off
                raw = builder.xor(raw, splat(ir.Constant(I8, -128), self.elements))
            parts = (shuffle(builder, raw, raw, half) for half in halves)
            return [builder.sitofp(builder.sext(part, vec(I32, self.lanes)), self.real) for part in parts]
        bits = self._half_bits(builder, raw)
        self._keep_largest(builder, bits)
        parts = (shuffle(builder, bits, bits, half) for half in halves)
        return [builder.fpext(builder.bitcast(part, vec(F16, self.lanes)), self.real) for part in parts]

    def _half_bits(self, builder: Any, raw: Any) -> Any:
        """e4m3 codes → the bits of float16, times 2⁻⁸."""
        wide = builder.sext(raw, vec(I16, self.elements))
        return builder.and_(
            builder.shl(wide, splat(ir.Constant(I16, 7), self.elements)),
            splat(ir.Constant(I16, -0x4080), self.elements),  # 0xBF80: sign, exponent, mantissa
        )

    def _keep_largest(self, builder: Any, bits: Any) -> None:
        magnitude = builder.and_(bits, splat(ir.Constant(I16, 0x7FFF), self.elements))
        greater = builder.icmp_unsigned(">", magnitude, self.nan_codes)
        self.nan_codes = builder.select(greater, magnitude, self.nan_codes)

    def look_for_nan(self, builder: Any, address: Any) -> None:
        """What `load_b` does for `nan_codes`, alone."""
        raw = load(builder, address, vec(I8, self.elements))
        self._keep_largest(builder, self._half_bits(builder, raw))

    def _declared(self, builder: Any, vectors: list, *, since: int) -> list:
        """Vectors as LLVM declares the operands of an instruction: before version `since`, as 32-bit integers."""
        if llvm_version_info[0] >= since:
            return vectors
        return [builder.bitcast(vector, vec(I32, self.lanes)) for vector in vectors]

    def accumulate(self, builder: Any, acc: Any, a: Any, b: Any) -> Any:
        if self.name in ("pmaddwd", "winograd"):
            name = {256: "llvm.x86.avx2.pmadd.wd", 512: "llvm.x86.avx512.pmaddw.d.512"}[self.bits]
            return builder.add(acc, call(builder, name, self.acc, [a, b]))
        if self.name == "dpbusd":
            pair = self._declared(builder, [b, a], since=21)
            return call(builder, f"llvm.x86.avx512.vpdpbusd.{self.bits}", self.acc, [acc, *pair])
        pairs = zip(a, b, strict=True) if self.storage else [(a, b)]
        for x, y in pairs:
            if self.name == "dpbf16":
                pair = self._declared(builder, [x, y], since=16)
                acc = call(builder, f"llvm.x86.avx512bf16.dpbf16ps.{self.bits}", self.acc, [acc, *pair])
                continue
            if self.name == "fmad":
                x, y = (builder.fpext(v, self.acc) for v in (x, y))
            acc = call(
                builder, f"llvm.fma.v{self.lanes}{self.acc.element.intrinsic_name}", self.acc, [x, y, acc]
            )
        return acc

    def finish(self, builder: Any, sums: Any, any_nan: Any) -> Any:
        """Sums after the loop, one in each lane: what decoding left out. `any_nan`: which of them met a NaN code."""
        if not self.shrunk:
            return sums
        one, count = self.acc.element, sums.type.count
        scaled = builder.fmul(sums, splat(ir.Constant(one, 256.0), count))
        return builder.select(any_nan, splat(ir.Constant(one, float("nan")), count), scaled)

    def met_nan(self, builder: Any, nan_codes: Any) -> Any:
        """Whether the largest magnitudes of some codes are those of NaN in any lane: a bit."""
        found = builder.icmp_unsigned("==", nan_codes, splat(ir.Constant(I16, 0x3F80), self.elements))
        bits = ir.IntType(self.elements)
        return builder.icmp_unsigned("!=", builder.bitcast(found, bits), ir.Constant(bits, 0))

    def add(self, builder: Any) -> Any:
        return builder.add if self.acc.element is I32 else builder.fadd

    def as_f32(self, builder: Any, sums: Any, offset: Any = None) -> Any:
        """Sums less an offset (of integers) in float32, rounded once."""
        if self.name == "fmad":
            return builder.fptrunc(sums, _as_f32(sums.type))
        if self.acc.element is not I32:
            return sums
        return builder.sitofp(sums if offset is None else builder.sub(sums, offset), _as_f32(sums.type))

    def add_to(self, builder: Any, sums: Any, address: Any) -> None:
        """Add to what stands in memory, in 32 bits: float64 sums are rounded here, once."""
        if self.name == "fmad":
            sums = self.as_f32(builder, sums)
        store(builder, self.add(builder)(load(builder, address, sums.type), sums), address)

    @property
    def element(self) -> ir.Type:
        """What the operand holds."""
        return {"pmaddwd": I16, "winograd": I16, "dpbusd": I8, "fma": F32, "fmad": F32, "dpbf16": BF16}[
            self.name
        ]

    @property
    def unit(self) -> ir.VectorType:
        """A vector of 32-bit units as this instruction reads it."""
        return vec(self.element, self.bits // (8 * self.a_bytes))

    def load_units(self, builder: Any, address: Any) -> Any:
        """One row's next `lanes` units, as `packed_tile` wants them, in a vector of int32."""
        units = vec(I32, self.lanes)
        if self.name in INTEGER:
            return builder.bitcast(self.load_b(builder, address), units)
        return load(builder, address, units)


@cache
def _lookup(storage: str) -> Lookup:
    return Lookup({"i8": W_I8, "u8": W_U8, "e4m3": W_E4M3}[storage])


def _as_f32(kind: ir.Type) -> ir.Type:
    return vec(F32, kind.count) if isinstance(kind, ir.VectorType) else F32


# Bits of an operand's element; AMX's (`cpu_amx`) take a row of 64 bytes at a step as well.
_BITS = {
    "pmaddwd": 16,
    "winograd": 16,
    "dpbusd": 8,
    "fma": 32,
    "fmad": 32,
    "dpbf16": 16,
    "tdpbssd": 8,
    "tdpbf16": 16,
}


def step_elements(kind: str) -> int:
    """Elements of K that one step of `kind` consumes."""
    name, _, storage = kind.partition(":")
    once = int(name[-3:]) // _BITS[name[:-3]]
    return 2 * once if storage else once


def requests(kind: str, cols: int) -> int:
    """Lines of 64 bytes that one step of a `dot_tile` reads of `cols` rows of weights, at least one."""
    return max(1, cols * step_elements(kind) * Step(kind).b_bytes // 64)


def lanes(kind: str) -> int:
    """Columns in one vector of a packed tile."""
    return int(kind[-3:]) // 32


def operand_step(kind: str) -> int:
    """What the operand's rows are padded to: a whole step, also where `fma` decodes while loading."""
    return step_elements(f"{kind}:i8" if kind.startswith("fma") else kind)
