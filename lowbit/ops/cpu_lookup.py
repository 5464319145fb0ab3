"""Stored codes → bfloat16 by looking both bytes up, 64 at once: wants AVX-512 VBMI."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from lowbit.ops.cpu_emit import I8, I16, call, shuffle, splat, vec
from lowbit.ops.cpu_params import W_E4M3, W_U8

AT_ONCE = 64
BYTES = vec(I8, AT_ONCE)
# Which codes `Lookup.emit` wants where for them to come out in order: it interleaves bytes within 128 bits.
IN_ORDER = [8 * quad + i for quad in (0, 4, 1, 5, 2, 6, 3, 7) for i in range(8)]


def _table(storage: int) -> list[int]:
    """bfloat16 bits of what each of 128 magnitudes stands for."""
    import torch

    codes = torch.arange(128, dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn) if storage == W_E4M3 else codes
    bits = values.to(torch.bfloat16).view(torch.int16)
    if storage == W_E4M3:
        bits[127] = 0x7FC0
    return [int(value) for value in bits]


class Lookup:
    """Of one kind of storage (`W_I8`, `W_U8`, `W_E4M3`); half the instructions of going through float32."""

    def __init__(self, stored: int) -> None:
        self.stored, table = stored, _table(stored)

        def constant(values: list[int]) -> ir.Constant:
            signed = [value - 256 if value > 127 else value for value in values]
            return ir.Constant(BYTES, [ir.Constant(I8, value) for value in signed])

        self.halves = [
            [constant([bits >> shift & 0xFF for bits in table[first : first + 64]]) for first in (0, 64)]
            for shift in (0, 8)
        ]

    def emit(self, builder: Any, codes: Any) -> list:
        """Two vectors: of every 16 codes those of the first 8, and those of the others."""
        sign_bits = splat(ir.Constant(I8, -128), AT_ONCE)
        if self.stored == W_U8:  # int8 plus 128
            codes = builder.xor(codes, sign_bits)
        magnitude = codes
        if self.stored != W_E4M3:
            negated = builder.sub(splat(ir.Constant(I8, 0), AT_ONCE), codes)
            negative = builder.icmp_signed("<", codes, splat(ir.Constant(I8, 0), AT_ONCE))
            magnitude = builder.select(negative, negated, codes)
        lower, upper = (
            call(builder, "llvm.x86.avx512.vpermi2var.qi.512", BYTES, [pair[0], magnitude, pair[1]])
            for pair in self.halves
        )
        upper = builder.or_(upper, builder.and_(codes, sign_bits))
        if self.stored != W_E4M3:  # −128 is beyond the table: 0xC300
            lowest = builder.icmp_signed("==", codes, sign_bits)
            upper = builder.select(lowest, splat(ir.Constant(I8, -61), AT_ONCE), upper)
        # Bytes are interleaved within 128 bits, as the hardware does.
        return [
            builder.bitcast(
                shuffle(builder, lower, upper, [16 * part + at + side for part in range(4)
                                                for at in range(first, first + 8) for side in (0, AT_ONCE)]),
                vec(I16, AT_ONCE // 2),
            )
            for first in (0, 8)
        ]  # fmt: skip
