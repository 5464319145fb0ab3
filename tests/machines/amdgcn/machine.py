"""One program (workgroup): its instructions, its memory, and a whole launch."""

from __future__ import annotations

import struct
from functools import partial
from itertools import product

import numpy as np

from ..memory import Global, Shared, run_twice
from ..numbers import Lanes, Unknown
from . import scalar
from .memory_unit import PARAMETERS, MemoryUnit
from .program import EXEC, Instruction, Program, Register, Source
from .vector import fp8_dtype
from .vector_unit import VectorUnit
from .waves import WAVE

_EXEC = Register(False, EXEC, 2)


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


class _Workgroup(VectorUnit, MemoryUnit):
    def __init__(self, machine: Machine, index: tuple[int, int, int], late: bool) -> None:
        super().__init__(machine.program, index, PARAMETERS)
        self.memory, self.late = machine.memory, late
        self.block = np.frombuffer(bytes(machine.block), np.uint8)
        self.shared = Shared(machine.shared_bytes, np.arange(self.threads) // WAVE, 0)
        self.fp8 = fp8_dtype(self.program.target)
        self.saturates = False

    def barrier(self) -> None:
        self.shared.barrier()

    def do(self, instruction: Instruction) -> None:
        kind, name = instruction.unit
        special = getattr(self, f"_{instruction.opcode}", None)
        if special is not None:
            special(instruction)
        elif kind == "v":
            self.vector_instruction(instruction, name)
        elif kind == "s":
            self._scalar(instruction, name)
        elif kind in ("buffer", "global"):
            self.memory_instruction(instruction, kind, name)
        elif kind == "ds":
            self.on_chip_instruction(instruction, name)
        else:
            raise Unknown(instruction.opcode)

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
            self.scalar_load(instruction)
            return
        base, _, kind = name.rpartition("_")
        if base.endswith("saveexec"):
            before = self.scalar(Source(_EXEC), 64)
            given = self.scalar(operands[1], 64)
            # s_andn2_saveexec: the operand without what executes.
            how = base.removesuffix("_saveexec")
            after, self.scc = self._merged(*scalar.compute(how, kind, [given, before], self.scc))
            self.put_scalar(instruction.register(0), before, 64)
            self.put_scalar(_EXEC, after, 64)
            return
        width = 64 if kind.endswith("64") else 32
        if base.startswith(("cmp_", "cmpk_", "bitcmp")):
            a, b = (self.scalar(operand, width) for operand in operands)
            found = scalar.compare(base, kind, a, b)
            self.scc = np.where(self.on, found, self.scc)
            return
        sources = operands if base in ("addk", "mulk") else operands[1:]  # to what it writes
        counts = base in ("lshl", "lshr", "ashr", "bfe")  # the second is a number of bits
        args = [self.scalar(o, 32 if counts and i == 1 else width) for i, o in enumerate(sources)]
        result, self.scc = self._merged(*scalar.compute(base, kind, args, self.scc))
        self.put_scalar(instruction.register(0), result, width)

    def _merged(self, result: Lanes, scc: Lanes | None) -> tuple[Lanes, Lanes]:
        return result, self.scc if scc is None else np.where(self.on, scc, self.scc)
