"""One program (workgroup): its instructions, its memory, and a whole launch."""

from __future__ import annotations

import struct
from functools import partial
from itertools import product

import numpy as np

from ..memory import Global, Shared, run_twice
from ..numbers import Lanes, Unknown
from . import matrix, scalar, vector
from .program import M0, VCC, Instruction, Program, Register, Source
from .waves import WAVE, Waves

PARAMETERS = 0x7000_0000_0000
"""Where the block of parameters lies."""
_VCC = Register(False, VCC, 2)


class Machine:
    def __init__(self, program: Program, parameters: bytes, memory: Global, shared: int) -> None:
        """shared: bytes of on-chip memory."""
        self.program, self.memory, self.shared_bytes = program, memory, shared
        self.block = bytearray(parameters)

    def launch(self, grid: tuple[int, int, int]) -> None:
        """Twice, and the results must agree: vector memory late and on-chip memory at once, and the other way round.
        What is read before it has come is a Fault, of registers; on-chip memory shows it by another result.
        """
        for axis, count in zip("xyz", grid, strict=True):
            if f"block_count_{axis}" in self.program.hidden:
                at, size = self.program.hidden[f"block_count_{axis}"]
                self.block[at : at + size] = struct.pack("<I", count)
        run_twice(self.memory, self.program.name, partial(self._all, grid))

    def _all(self, grid: tuple[int, int, int], late: bool) -> None:
        for z, y, x in product(*(range(count) for count in reversed(grid))):
            _Workgroup(self, (x, y, z), late).run()


class _Workgroup(Waves):
    def __init__(self, machine: Machine, index: tuple[int, int, int], late: bool) -> None:
        """late: loads from vector memory end when they are waited for, and what is done on-chip is done at once; or
        the other way round."""
        super().__init__(machine.program, index, PARAMETERS)
        self.machine, self.memory, self.late = machine, machine.memory, late
        self.block = np.frombuffer(bytes(machine.block), np.uint8)
        self.shared = Shared(machine.shared_bytes, np.arange(self.threads) // WAVE, 0)
        self.fp8 = vector.fp8_dtype(self.program.target)
        self.saturates = False
        """MODE.FP16_OVFL."""

    def barrier(self) -> None:
        self.shared.barrier()

    def do(self, instruction: Instruction) -> None:
        kind, _, name = instruction.opcode.partition("_")
        special = getattr(self, f"_{instruction.opcode}", None)
        if special is not None:
            special(instruction)
        elif kind == "v":
            self._vector(instruction, name)
        elif kind == "s":
            self._scalar(instruction, name)
        elif kind in ("buffer", "global"):
            self._memory(instruction, kind, name)
        elif kind == "ds":
            self._on_chip(instruction, name)
        else:
            raise Unknown(instruction.opcode)

    # --- scalars --------------------------------------------------------------------------------------------------

    def _s_nop(self, instruction: Instruction) -> None: ...

    def _s_setprio(self, instruction: Instruction) -> None: ...

    def _s_waitcnt(self, instruction: Instruction) -> None:
        for name, counters in (("vmcnt", ("vm",)), ("lgkmcnt", ("lds", "smem"))):
            if name in instruction.options:
                self.wait(counters, instruction.number(name))

    def _s_setreg_imm32_b32(self, instruction: Instruction) -> None:
        if instruction.operands[0] not in ("hwreg(HW_REG_MODE, 23, 1), 1", "hwreg(HW_REG_MODE, 23, 1), 0"):
            raise Unknown(instruction.text)
        self.saturates = str(instruction.operands[0]).endswith("1")

    def _scalar(self, instruction: Instruction, name: str) -> None:
        operands = instruction.operands
        if name.startswith("load_"):
            self._scalar_load(instruction)
            return
        base, _, kind = name.rpartition("_")
        if base.endswith("saveexec"):
            before = self.scalar(Source(Register(False, 126, 2)), 64)
            given = self.scalar(operands[1], 64)
            # s_andn2_saveexec: the operand without what executes.
            how = base.removesuffix("_saveexec")
            after, self.scc = self._merged(*scalar.compute(how, kind, [given, before], self.scc))
            self.put_scalar(instruction.register(0), before, 64)
            self.put_scalar(Register(False, 126, 2), after, 64)
            return
        width = 64 if kind.endswith("64") else 32
        if base.startswith(("cmp_", "cmpk_", "bitcmp")):
            a, b = (self.scalar(operand, width) for operand in operands)
            found = scalar.compare(base, kind, a, b)
            self.scc = np.where(self.on, found, self.scc)
            return
        counts = [width] * len(operands)
        if base in ("lshl", "lshr", "ashr") or base == "bfe":
            counts[2:] = [32]
        sources = operands[1:] if base not in ("addk", "mulk") or len(operands) > 2 else operands
        args = [self.scalar(o, w) for o, w in zip(sources, counts[len(counts) - len(sources) :], strict=True)]
        result, self.scc = self._merged(*scalar.compute(base, kind, args, self.scc))
        self.put_scalar(instruction.register(0), result, width)

    def _merged(self, result: Lanes, scc: Lanes | None) -> tuple[Lanes, Lanes]:
        return result, self.scc if scc is None else np.where(self.on, scc, self.scc)

    def _scalar_load(self, instruction: Instruction) -> None:
        _, base, *rest = instruction.operands
        width = 4 * instruction.register(0).count
        address = self.scalar(base, 64) + (self.scalar(rest[0]) if rest else np.uint64(0))
        data = np.zeros((self.count, width), np.uint8)
        for wave in np.flatnonzero(self.on):
            at = int(address[wave]) - PARAMETERS
            if 0 <= at <= len(self.block) - width:
                data[wave] = self.block[at : at + width]
            else:
                data[wave] = self.memory.load(address[wave : wave + 1], width, instruction.opcode, 4)[0]
        words, register = data.view(np.uint32), instruction.register(0)

        def end(waves: np.ndarray) -> None:
            self.scalars[register.first : register.first + register.count, waves] = words[waves].T

        self.begin("smem", end, (register,))

    # --- vectors --------------------------------------------------------------------------------------------------

    def _vector(self, instruction: Instruction, name: str) -> None:
        if name.startswith("mfma"):
            self._product(instruction)
            return
        name, encoding = _encoding(name)
        if name.startswith("cmp_"):
            _, how, kind = name.split("_")
            a, b = self._sources(instruction, encoding, 1, 16 if kind.endswith("16") else 32)
            self.put_mask(instruction.register(0), vector.compare(how, kind, a, b))
            return
        if name == "cndmask_b32":
            no, yes = self._sources(instruction, encoding, 1)[:2]
            result = np.where(self.mask(instruction.operands[3]), yes, no)
        elif name in vector.PLAIN:
            kinds, function = vector.PLAIN[name]
            half = any(k in "wsh" for k in kinds)
            sources = self._sources(instruction, encoding, 1, 16 if half else 32)
            values = [vector.value(s, k) for s, k in zip(sources, kinds, strict=True)]
            result = vector.bits_of(np.ascontiguousarray(function(*values)))
        elif name == "fmac_f32":
            sources = [*self._sources(instruction, encoding, 1), self.vectors[instruction.register(0).first]]
            result = vector.bits_of(vector.PLAIN["fma_f32"][1](*(vector.value(s, "f") for s in sources)))
        else:
            raise Unknown(instruction.opcode)
        self._result(instruction, encoding, result)

    def _sources(self, instruction: Instruction, encoding: str, first: int, width: int = 32) -> list[Lanes]:
        found = []
        for i, operand in enumerate(instruction.operands[first:]):
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
        control = next((c for c in vector.DPP if c in instruction.options), None)
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

    def _v_readlane_b32(self, instruction: Instruction) -> None:
        lane = np.arange(self.count) * WAVE + (self.scalar(instruction.operands[2]) & np.uint64(63)).astype(
            int
        )
        self.put_scalar(instruction.register(0), self.lanes(instruction.operands[1])[lane].astype(np.uint64))

    def _v_writelane_b32(self, instruction: Instruction) -> None:
        """Whatever EXEC says."""
        lane = np.arange(self.count) * WAVE + (self.scalar(instruction.operands[2]) & np.uint64(63)).astype(
            int
        )
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

    _v_pk_lshlrev_b16 = _v_pk_mul_f16 = _packed_halves

    def _v_fma_mix_f32(self, instruction: Instruction) -> None:
        """Sources are float32, or where op_sel_hi says so float16 in one half."""
        values = []
        high, halves = instruction.flags("op_sel", 3, 0), instruction.flags("op_sel_hi", 3, 0)
        for i, bits in enumerate(self._sources(instruction, "", 1)):
            operand = instruction.operands[1 + i]
            if halves[i] and isinstance(operand, Source) and isinstance(operand.of, Register):
                if operand.negated or operand.absolute:
                    raise Unknown(instruction.text)
                values.append(vector.value(bits >> np.uint32(16 * high[i]), "h").astype(np.float32))
            else:
                values.append(vector.value(bits, "f"))
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
        values = [vector.value(s, "f") for s in self._sources(instruction, "", 1)]
        self.put(instruction.register(0).first, vector.bits_of(vector.division_fma(*values, self.mask(_VCC))))

    def _v_div_fixup_f32(self, instruction: Instruction) -> None:
        values = [vector.value(s, "f") for s in self._sources(instruction, "", 1)]
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
        if instruction.opcode == "v_cvt_scalef32_pk_fp8_f32":
            self._unscaled(instruction, 3)
        a, b = (vector.value(s, "f") for s in self._sources(instruction, "", 1)[:2])
        codes = [vector.to_fp8(x, self.fp8, self.saturates) for x in (a, b)]
        high = instruction.flags("op_sel", 4, 0)[2] or instruction.flags("op_sel", 4, 0)[3]
        self._put_half(instruction, high, codes[0] | codes[1] << np.uint32(8))

    _v_cvt_scalef32_pk_fp8_f32 = _v_cvt_pk_fp8_f32

    def _v_cvt_scalef32_pk_bf16_fp8(self, instruction: Instruction) -> None:
        self._unscaled(instruction, 2)
        pair = vector.fp8_pair(
            self.lanes(instruction.operands[1]), instruction.flags("op_sel", 3, 0)[0], self.fp8
        )
        self.put(instruction.register(0).first, vector.bfloat16_pair(pair[:, 0], pair[:, 1]))

    def _unscaled(self, instruction: Instruction, index: int) -> None:
        if (self.lanes(instruction.operands[index]) != 0x3F80_0000).any():
            raise Unknown("a conversion with a scale")

    # --- matrices -------------------------------------------------------------------------------------------------

    def _product(self, instruction: Instruction) -> None:
        """Of all lanes, whatever EXEC says."""
        out, size, depth, kind = matrix.shape(instruction.opcode)
        _, a, b, c, *scaling = instruction.operands
        if {"cbsz", "abid", "blgp"} & instruction.options.keys():
            raise Unknown(instruction.text)
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
        if before is None and c.of.bits:
            raise Unknown("a product that begins with a constant")
        sums = matrix.multiply(before, *sides, out)
        register = instruction.register(0)
        here = np.repeat(self.on, WAVE)
        self.vectors[register.first : register.first + register.count, here] = sums[:, here]

    # --- memory ---------------------------------------------------------------------------------------------------

    def _memory(self, instruction: Instruction, kind: str, name: str) -> None:
        stores = name.startswith("store_")
        onto_chip = "lds" in instruction.options or name.startswith("load_lds_")
        width, extended, high = _item(name.split("_", 2 if name.startswith("load_lds_") else 1)[-1])
        operands = instruction.operands
        if kind == "buffer":
            lanes, address = self._buffer(instruction, operands[0 if onto_chip else 1 :], width)
        else:
            lanes, address = self._global(instruction, 0 if onto_chip or stores else 1)
        what = instruction.opcode
        if stores:
            register = instruction.register(0 if kind == "buffer" else 1)
            self.memory.store(address, self._bytes(register, lanes, width, high), what, min(width, 4))
            self.begin("vm", lambda waves: None)
            return
        if onto_chip:
            self._copy(lanes, address, width, what)
            return
        register = instruction.register(0)
        executing = self.executing.copy()
        data = np.zeros((self.threads, width), np.uint8)

        def fetch() -> None:
            data[lanes] = self.memory.load(address, width, what, min(width, 4))

        def end(waves: np.ndarray) -> None:
            if self.late:
                fetch()
            self._deliver(register, data, executing & np.repeat(waves, WAVE), extended, high)

        if not self.late:
            fetch()
        self.begin("vm", end, (register,))

    def _deliver(
        self, register: Register, data: np.ndarray, lanes: np.ndarray, extended: bool, high: int
    ) -> None:
        """data: uint8 [threads, bytes]."""
        width = data.shape[1]
        if width < 4:
            bits = data.view(f"i{width}" if extended else f"u{width}")[:, 0].astype(np.int32).view(np.uint32)
            self.vectors[register.first, lanes] = bits[lanes]
            return
        words = data.view(np.uint32)
        for i in range(register.count):
            self.vectors[register.first + i, lanes] = words[lanes, i]

    def _bytes(self, register: Register, lanes: np.ndarray, width: int, high: int) -> np.ndarray:
        """[lanes, width]."""
        bits = self.vectors[register.first : register.first + max(1, width // 4), lanes] >> np.uint32(
            16 * high
        )
        return np.ascontiguousarray(bits.T).view(np.uint8)[:, :width]

    def _buffer(self, instruction: Instruction, operands: tuple, width: int) -> tuple[np.ndarray, np.ndarray]:
        """(lanes that reach something, their addresses). What lies outside of the buffer is 0, or not written."""
        if "idxen" in instruction.options:
            raise Unknown("a buffer with an index")
        if "offen" in instruction.options:
            offset = self.lanes(operands[0]).astype(np.uint64)
        else:
            offset = np.zeros(self.threads, np.uint64)
        _, resource, start = operands
        register = resource.of
        words = self.scalars[register.first : register.first + 4].astype(np.uint64)
        if (words[1, self.on] >> np.uint64(16)).any():
            raise Unknown("a buffer of records")
        base = words[0] | words[1] << np.uint64(32)
        offset = offset + np.uint64(instruction.number("offset"))
        inside = self.executing & (offset + np.uint64(width) <= np.repeat(words[2], WAVE))
        lanes = np.flatnonzero(inside)
        base = base + self.scalar(start)
        return lanes, (np.repeat(base, WAVE) + offset)[lanes]

    def _global(self, instruction: Instruction, index: int) -> tuple[np.ndarray, np.ndarray]:
        """index: of the operand with the addresses."""
        where, base = instruction.operands[index], instruction.operands[-1]
        offset = np.uint64(instruction.number("offset") & (1 << 64) - 1)
        lanes = np.flatnonzero(self.executing)
        if base.of is None:
            address = self.lanes64(where)
        else:
            address = np.repeat(self.scalar(base, 64), WAVE) + self.lanes(where).astype(np.uint64)
        return lanes, (address + offset)[lanes]

    def _copy(self, lanes: np.ndarray, address: np.ndarray, width: int, what: str) -> None:
        """From memory onto the chip: lane after lane from where M0 says."""
        at = np.repeat(self.scalars[M0].astype(np.int64), WAVE) + np.tile(np.arange(WAVE) * width, self.count)
        executing = self.executing.copy()
        data = np.zeros((self.threads, width), np.uint8)

        def do(waves: np.ndarray) -> None:
            data[lanes] = self.memory.load(address, width, what, min(width, 4))
            some = np.flatnonzero(executing & np.repeat(waves, WAVE))
            self.shared.store(self.shared.offsets(at[some], width, what, 4), data[some], some, what)

        if not self.late:
            do(self.on.copy())
        self.begin("vm", do if self.late else lambda waves: None)

    # --- on-chip memory -------------------------------------------------------------------------------------------

    def _on_chip(self, instruction: Instruction, name: str) -> None:
        if name == "bpermute_b32":
            self._permute(instruction)
            return
        how, _, kind = name.partition("_")
        turned = kind.partition("_tr_")[2]
        kind = kind.partition("_tr_")[0]
        pair = how in ("read2", "write2", "read2st64", "write2st64")
        width, extended, high = _item(kind)
        writes = how.startswith("write")
        address = self.lanes(instruction.operands[0 if writes else 1]).astype(np.int64)
        step = width * (64 if how.endswith("st64") else 1)
        if pair:
            offsets = [instruction.number(f"offset{i}") * step for i in range(2)]
        else:
            offsets = [instruction.number("offset")]
        lanes, what = np.flatnonzero(self.executing), instruction.opcode
        places = [self.shared.offsets((address + o)[lanes], width, what) for o in offsets]
        if writes:
            data = [self._bytes(instruction.register(1 + i), lanes, width, high) for i in range(len(offsets))]

            def write(waves: np.ndarray) -> None:
                here = waves[lanes // WAVE]
                for at, each in zip(places, data, strict=True):
                    self.shared.store(at[here], each[here], lanes[here], what)

            if self.late:
                write(self.on.copy())
            self.begin("lds", (lambda waves: None) if self.late else write)
            return
        register = instruction.register(0)
        executing = self.executing.copy()
        if turned and not executing.reshape(-1, WAVE)[self.on].all():
            raise Unknown("rows that are turned where not all lanes execute")
        found = np.zeros((self.threads, width * len(places)), np.uint8)

        def read(waves: np.ndarray) -> None:
            here = waves[lanes // WAVE]
            for i, at in enumerate(places):
                found[lanes[here], i * width : (i + 1) * width] = self.shared.load(
                    at[here], lanes[here], what
                )

        def end(waves: np.ndarray) -> None:
            if not self.late:
                read(waves)
            data = matrix.turned(found, int(turned[1:])) if turned else found
            self._deliver(register, data, executing & np.repeat(waves, WAVE), extended, high)

        if self.late:
            read(self.on.copy())
        self.begin("lds", end, (register,))

    def _permute(self, instruction: Instruction) -> None:
        """ds_bpermute: each lane reads a register of another of its wave, 0 of one that does not execute."""
        source = self.lanes(instruction.operands[1]).astype(np.int64) // 4 % WAVE
        source += np.arange(self.threads) // WAVE * WAVE
        values = np.where(self.executing, self.lanes(instruction.operands[2]), 0).astype(np.uint32)[source]
        executing, register = self.executing.copy(), instruction.register(0)

        def end(waves: np.ndarray) -> None:
            lanes = executing & np.repeat(waves, WAVE)
            self.vectors[register.first, lanes] = values[lanes]

        self.begin("lds", end, (register,))


def _encoding(name: str) -> tuple[str, str]:
    base, _, last = name.rpartition("_")
    return (base, last) if last in ("e32", "e64", "sdwa", "dpp") else (name, "")


_ITEMS = {
    "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2,
    "short": 2, "b8": 1, "u8": 1, "i8": 1, "b16": 2, "u16": 2, "i16": 2, "b32": 4, "b64": 8, "b128": 16,
}  # fmt: skip


def _item(kind: str) -> tuple[int, bool, int]:
    """(bytes, whether its sign is extended, whether it is the upper half of a register)."""
    base = kind.removesuffix("_d16_hi")
    if base not in _ITEMS:
        raise Unknown(kind)
    return _ITEMS[base], base in ("sbyte", "sshort", "i8", "i16"), int(base != kind)
