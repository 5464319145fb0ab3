"""What a wave's vector instructions do: operands and places of results, exchanges between lanes, matrices."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from ..numbers import Lanes, Unknown, e8m0
from . import matrix, vector
from .program import DPP, VCC, Immediate, Instruction, Operand, Register, Source
from .waves import WAVE, Waves

_VCC = Register(False, VCC, 2)


class VectorUnit(Waves):
    fp8: torch.dtype
    saturates: bool
    """MODE.FP16_OVFL."""

    def vector_instruction(self, instruction: Instruction, name: str) -> None:
        if name.startswith("mfma"):
            self._product(instruction)
            return
        name, encoding = _encoding(name)
        if name.startswith("cmp_"):
            _, how, kind = name.split("_")
            if kind.endswith("64"):
                a, b = (self.lanes64(o) for o in instruction.operands[1:])
            else:
                a, b = self._sources(instruction, encoding, 16 if kind.endswith("16") else 32)
            self.put_mask(instruction.register(0), vector.compare(how, kind, a, b))
            return
        if name == "cndmask_b32":
            no, yes = self._sources(instruction, encoding)[:2]
            result = np.where(self.mask(instruction.operands[3]), yes, no)
        elif name in vector.PLAIN:
            kinds, function = vector.PLAIN[name]
            sources = self._sources(instruction, encoding, 32 if _WHOLE.issuperset(kinds) else 16)
            values = [vector.value(s, k) for s, k in zip(sources, kinds, strict=True)]
            result = vector.bits_of(np.ascontiguousarray(function(*values)))
        elif name == "fmac_f32":
            sources = [*self._sources(instruction, encoding), self.vectors[instruction.register(0).first]]
            result = vector.bits_of(vector.PLAIN["fma_f32"][1](*(vector.value(s, "f") for s in sources)))
        else:
            raise Unknown(instruction.opcode)
        self._result(instruction, encoding, result)

    def _sources(self, instruction: Instruction, encoding: str = "", width: int = 32) -> list[Lanes]:
        if instruction.plain:
            return [self.lanes(operand) for operand in instruction.operands[1:]]
        found = []
        for i, operand in enumerate(instruction.operands[1:]):
            bits = self.lanes(operand)
            if encoding == "sdwa":
                select = instruction.options.get(f"src{i}_sel", "DWORD")
                bits = vector.part(bits, select, isinstance(operand, Source) and operand.extended)
            elif encoding == "dpp" and i == 0:
                lanes, valid = self._moved(instruction)
                bits = np.where(valid, bits[lanes], 0).astype(np.uint32)
            assert isinstance(operand, Source)
            sign = np.uint32(1 << (width - 1))
            if operand.absolute:
                bits = bits & ~sign
            if operand.negated:
                bits = bits ^ sign
            found.append(bits)
        return found

    def _moved(self, instruction: Instruction) -> tuple[np.ndarray, np.ndarray]:
        """DPP: (the lane that each reads, whether it gets one)."""
        control = next((c for c in DPP if c in instruction.options), None)
        if control is None or instruction.options.get("bank_mask") != "0xf":
            raise Unknown(instruction.text)
        lane, valid = vector.dpp_sources(control, instruction.options[control])
        wave = np.arange(self.threads) // WAVE * WAVE
        lanes = wave + np.tile(lane, self.count)
        return lanes, np.tile(valid, self.count) & self.executing[lanes]

    def _result(self, instruction: Instruction, encoding: str, bits: Lanes) -> None:
        slot = instruction.register(0).first
        if encoding == "sdwa" and "dst_sel" in instruction.options:
            options = instruction.options
            bits = vector.placed(bits, options["dst_sel"], options["dst_unused"], self.vectors[slot])
        if encoding == "dpp":
            rows = np.array([int(instruction.options["row_mask"], 0) >> row & 1 for row in range(4)], bool)
            writes = np.tile(np.repeat(rows, 16), self.count)
            if "bound_ctrl" not in instruction.options:
                writes = writes & self._moved(instruction)[1]
            bits = np.where(writes, bits, self.vectors[slot])
        self.put(slot, bits)

    def _v_readfirstlane_b32(self, instruction: Instruction) -> None:
        executing = self.executing.reshape(-1, WAVE)
        first = np.arange(self.count) * WAVE + executing.argmax(1)  # lane 0 where none executes
        self.put_scalar(instruction.register(0), self.lanes(instruction.operands[1])[first].astype(np.uint64))

    def _lane(self, operand: Operand) -> np.ndarray:
        """Of each wave the lane that a scalar names."""
        return np.arange(self.count) * WAVE + (self.scalar(operand) & np.uint64(63)).astype(int)

    def _v_readlane_b32(self, instruction: Instruction) -> None:
        lane = self._lane(instruction.operands[2])
        self.put_scalar(instruction.register(0), self.lanes(instruction.operands[1])[lane].astype(np.uint64))

    def _v_writelane_b32(self, instruction: Instruction) -> None:
        """Whatever EXEC says."""
        lane = self._lane(instruction.operands[2])
        values = self.scalar(instruction.operands[1]).astype(np.uint32)
        self.vectors[instruction.register(0).first, lane[self.on]] = values[self.on]

    def _v_bitop3_b32(self, instruction: Instruction) -> None:
        a, b, c = (self.lanes(o) for o in instruction.operands[1:])
        table = instruction.number("bitop3")
        out = np.zeros(self.threads, np.uint32)
        for case in range(8):
            if table >> case & 1:
                out |= (a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c)
        if instruction.opcode.endswith("b16"):
            out &= np.uint32(0xFFFF)
        self.put(instruction.register(0).first, out)

    _v_bitop3_b16 = _v_bitop3_b32

    def _put64(self, instruction: Instruction, bits: Lanes) -> None:
        first = instruction.register(0).first
        self.put(first, bits.astype(np.uint32))
        self.put(first + 1, (bits >> np.uint64(32)).astype(np.uint32))

    def _v_mov_b64_e32(self, instruction: Instruction) -> None:
        self._put64(instruction, self.lanes64(instruction.operands[1]))

    def _v_lshlrev_b64(self, instruction: Instruction) -> None:
        count = (self.lanes(instruction.operands[1]) & 63).astype(np.uint64)
        self._put64(instruction, self.lanes64(instruction.operands[2]) << count)

    def _v_lshrrev_b64(self, instruction: Instruction) -> None:
        count = (self.lanes(instruction.operands[1]) & 63).astype(np.uint64)
        self._put64(instruction, self.lanes64(instruction.operands[2]) >> count)

    def _v_lshl_add_u64(self, instruction: Instruction) -> None:
        _, a, count, b = instruction.operands
        self._put64(
            instruction, (self.lanes64(a) << (self.lanes(count) & 7).astype(np.uint64)) + self.lanes64(b)
        )

    def _v_mad_u64_u32(self, instruction: Instruction) -> None:
        a, b = (self.lanes(o).astype(np.uint64) for o in instruction.operands[2:4])
        c = self.lanes64(instruction.operands[4])
        out = a * b + c
        self._put64(instruction, out)
        self.put_mask(instruction.register(1), out < c)

    def _v_mad_i64_i32(self, instruction: Instruction) -> None:
        a, b = (self.lanes(o).view(np.int32).astype(np.int64) for o in instruction.operands[2:4])
        c = self.lanes64(instruction.operands[4])
        self._put64(instruction, (a * b).view(np.uint64) + c)
        # The carry is of a sum of 65 bits: nothing here reads it.
        self.put_scalar(instruction.register(1), np.full(self.count, 0xDEAD_DEAD_DEAD_DEAD, np.uint64), 64)

    def _v_add_co_u32_e32(self, instruction: Instruction) -> None:
        a, b = (self.lanes(o).astype(np.uint64) for o in instruction.operands[2:4])
        carry = (
            self.mask(instruction.operands[4])
            if len(instruction.operands) > 4
            else np.zeros(self.threads, bool)
        )
        out = a + b + carry.astype(np.uint64)
        self.put(instruction.register(0).first, out.astype(np.uint32))
        self.put_mask(instruction.register(1), out >> np.uint64(32) != 0)

    _v_add_co_u32_e64 = _v_addc_co_u32_e32 = _v_addc_co_u32_e64 = _v_add_co_u32_e32

    def _v_pk_mov_b32(self, instruction: Instruction) -> None:
        low = instruction.flags("op_sel", 2, 0)
        first = instruction.register(0).first
        words = [self.lanes(o, w).copy() for o, w in zip(instruction.operands[1:], low, strict=True)]
        for i, bits in enumerate(words):
            self.put(first + i, bits)

    def _pairs(self, instruction: Instruction) -> list[list[Lanes]]:
        """v_pk_…_f32: for the low and the high result, what each source gives."""
        sources = instruction.operands[1:]
        count = len(sources)
        choices = (instruction.flags("op_sel", count, 0), instruction.flags("op_sel_hi", count, 1))
        negated = (instruction.flags("neg_lo", count, 0), instruction.flags("neg_hi", count, 0))
        found = []
        for chosen, signs in zip(choices, negated, strict=True):
            bits = [self.lanes(o, w) for o, w in zip(sources, chosen, strict=True)]
            found.append(
                [(b ^ np.uint32(s << 31)).view(np.float32) for b, s in zip(bits, signs, strict=True)]
            )
        return found

    def _packed(self, instruction: Instruction) -> None:
        name = instruction.opcode.removeprefix("v_pk_")
        results = [vector.bits_of(vector.PLAIN[name][1](*pair)) for pair in self._pairs(instruction)]
        for i, bits in enumerate(results):
            self.put(instruction.register(0).first + i, bits)

    _v_pk_add_f32 = _v_pk_mul_f32 = _v_pk_fma_f32 = _packed

    def _packed_halves(self, instruction: Instruction) -> None:
        name = instruction.opcode.removeprefix("v_pk_")
        kinds, function = vector.PLAIN[name]
        sources = instruction.operands[1:]
        out = np.zeros(self.threads, np.uint32)
        for half, option in enumerate(("op_sel", "op_sel_hi")):
            chosen = instruction.flags(option, len(sources), half)
            values = [
                vector.value(self.lanes(o) >> np.uint32(16 * c), k)
                for o, c, k in zip(sources, chosen, kinds, strict=True)
            ]
            out |= vector.bits_of(function(*values)) << np.uint32(16 * half)
        self.put(instruction.register(0).first, out)

    _v_pk_lshlrev_b16 = _v_pk_mul_f16 = _v_pk_add_f16 = _packed_halves

    def _v_fma_mix_f32(self, instruction: Instruction) -> None:
        """Sources are float32, or where op_sel_hi says so float16 in one half."""
        values = []
        high, halves = instruction.flags("op_sel", 3, 0), instruction.flags("op_sel_hi", 3, 0)
        for i, operand in enumerate(instruction.operands[1:]):
            assert isinstance(operand, Source)
            x = self.lanes(operand)
            if halves[i] and isinstance(operand.of, Register):
                numbers = vector.value(x >> np.uint32(16 * high[i]), "h").astype(np.float32)
            else:
                numbers = vector.value(x, "f")
            numbers = np.abs(numbers) if operand.absolute else numbers
            values.append(-numbers if operand.negated else numbers)
        out = vector.PLAIN["fma_f32"][1](*values)
        if instruction.opcode == "v_fma_mix_f32":
            self.put(instruction.register(0).first, vector.bits_of(out))
        else:
            self._put_half(
                instruction, int("mixhi" in instruction.opcode), vector.bits_of(out.astype(np.float16))
            )

    _v_fma_mixlo_f16 = _v_fma_mixhi_f16 = _v_fma_mix_f32

    def _v_div_scale_f32(self, instruction: Instruction) -> None:
        s0, divisor, dividend = (self.lanes(o).view(np.float32) for o in instruction.operands[2:])
        out, flag = vector.division_scale(s0, divisor, dividend)
        self.put(instruction.register(0).first, vector.bits_of(out))
        self.put_mask(instruction.register(1), flag)

    def _v_div_fmas_f32(self, instruction: Instruction) -> None:
        a, b, c = (vector.value(s, "f") for s in self._sources(instruction))
        self.put(instruction.register(0).first, vector.bits_of(vector.division_fma(a, b, c, self.mask(_VCC))))

    def _v_div_fixup_f32(self, instruction: Instruction) -> None:
        values = [vector.value(s, "f") for s in self._sources(instruction)]
        self.put(instruction.register(0).first, vector.bits_of(vector.division_end(*values)))

    def _v_permlane32_swap_b32_e32(self, instruction: Instruction) -> None:
        """Odd rows, of 32 or 16 lanes, of the first register and even ones of the second change places."""
        if not self.whole:
            raise Unknown("rows that change places where not all lanes execute")
        size = 32 if "32_swap" in instruction.opcode else 16
        a, b = (self.vectors[instruction.register(i).first].reshape(-1, 2, size) for i in range(2))
        kept = a[:, 1].copy()
        a[:, 1] = b[:, 0]
        b[:, 0] = kept

    _v_permlane16_swap_b32_e32 = _v_permlane32_swap_b32_e32

    # --- fp8 ------------------------------------------------------------------------------------------------------

    def _put_half(self, instruction: Instruction, high: int, low_bits: Lanes) -> None:
        slot = instruction.register(0).first
        keep = np.uint32(0xFFFF if high else 0xFFFF_0000)
        self.put(slot, self.vectors[slot] & keep | low_bits << np.uint32(16 * high))

    def _v_cvt_pk_fp8_f32(self, instruction: Instruction) -> None:
        scaled = instruction.opcode == "v_cvt_scalef32_pk_fp8_f32"
        if scaled and (self.lanes(instruction.operands[3]) != 0x3F80_0000).any():
            raise Unknown("codes of what is divided by a scale")
        a, b = (vector.value(s, "f") for s in self._sources(instruction)[:2])
        codes = [vector.to_fp8(x, self.fp8, self.saturates) for x in (a, b)]
        self._put_half(
            instruction, max(instruction.flags("op_sel", 4, 0)[2:]), codes[0] | codes[1] << np.uint32(8)
        )

    _v_cvt_scalef32_pk_fp8_f32 = _v_cvt_pk_fp8_f32

    def _v_cvt_scalef32_pk_bf16_fp8(self, instruction: Instruction) -> None:
        """Two codes, times the power of two that a float32's exponent says."""
        packed = "cvt_pk_bf16_f32" if "bf16" in instruction.opcode else "cvt_pk_f16_f32"
        codes, scale = (self.lanes(o) for o in instruction.operands[1:])
        pair = vector.fp8_pair(codes, instruction.flags("op_sel", 3, 0)[0], self.fp8)
        factor = e8m0(scale >> np.uint32(23) & np.uint32(255))
        low, high = (np.float32(pair[:, i] * factor) for i in range(2))
        self.put(instruction.register(0).first, vector.PLAIN[packed][1](low, high))

    _v_cvt_scalef32_pk_f16_fp8 = _v_cvt_scalef32_pk_bf16_fp8

    # --- matrices -------------------------------------------------------------------------------------------------

    def _product(self, instruction: Instruction) -> None:
        """Of all lanes, whatever EXEC says."""
        out, size, depth, kind = matrix.shape(instruction.opcode)
        _, a, b, c, *scaling = instruction.operands
        sides = []
        for i, operand in enumerate((a, b)):
            assert isinstance(operand, Source) and isinstance(operand.of, Register) and operand.of.vector
            first, count = operand.of.first, operand.of.count
            side = matrix.operand(self.vectors[first : first + count], size, depth, kind, self.fp8)
            if scaling:
                byte = instruction.flags("op_sel", 2, 0)[i] + 2 * instruction.flags("op_sel_hi", 2, 0)[i]
                side = side * matrix.scales(self.lanes(scaling[i]), size, byte)
            sides.append(side)
        assert isinstance(c, Source)
        before = self.vectors[c.of.first : c.of.first + c.of.count] if isinstance(c.of, Register) else None
        if isinstance(c.of, Immediate) and c.of.bits:
            raise Unknown("a product that begins with a constant")
        sums = matrix.multiply(before, sides[0], sides[1], out)
        register = instruction.register(0)
        here = np.repeat(self.on, WAVE)
        self.vectors[register.first : register.first + register.count, here] = sums[:, here]


_WHOLE = frozenset("uif")


@cache
def _encoding(name: str) -> tuple[str, str]:
    base, _, last = name.rpartition("_")
    return (base, last) if last in ("e32", "e64", "sdwa", "dpp") else (name, "")
