"""The threads of one program (CTA): registers, masks, branches and barriers.

All go through the code together, those at the lowest instruction first, so that what a branch parted meets again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from typing import Any

import numpy as np

from ..memory import Fault
from ..numbers import UNSIGNED, Lanes, Unknown
from .program import Immediate, Instruction, Memory, Program, Register, Sink, Special

_GARBAGE = 0x7FC0_DEAD_7FC0_DEAD
"""In registers that nothing has written: a NaN as a float."""


class Threads(ABC):
    """What runs is in `do`."""

    def __init__(self, program: Program, index: tuple[int, int, int], grid: tuple[int, int, int]) -> None:
        self.program = program
        threads = self.threads = program.threads
        self.thread = np.arange(threads, dtype=np.uint32)
        self.active, self.full = np.ones(threads, bool), True
        self.registers = [
            np.full(threads, _GARBAGE & (1 << width) - 1, UNSIGNED[width]) for width in program.widths
        ]
        zero = np.zeros(threads, np.uint32)
        self.special = {"%tid.x": self.thread, "%tid.y": zero, "%tid.z": zero, "%laneid": self.thread % 32}
        for axis, number, count in zip("xyz", index, grid, strict=True):
            self.special[f"%ctaid.{axis}"] = zero + np.uint32(number)
            self.special[f"%nctaid.{axis}"] = zero + np.uint32(count)
        self.text = ""

    @abstractmethod
    def do(self, instruction: Instruction) -> None:
        """Anything but a branch, a barrier or the end, in the lanes that are active."""

    @abstractmethod
    def barrier(self) -> None:
        """All threads have met."""

    # --- control flow ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        end, code = len(self.program.code), self.program.code
        groups: dict[int, Lanes] = {0: np.ones(self.threads, bool)}
        parked: dict[int, Lanes] = {}
        live, spins = np.ones(self.threads, bool), 0
        while groups or parked:
            if not groups:
                raise Fault(f"threads wait at a barrier that others never reach: {self.text}")
            at = min(groups)
            self._activate(groups.pop(at))
            stop = min(groups, default=end)
            while at < end and at != stop:
                instruction = code[at]
                self.text = instruction.text
                at += 1
                taken = self.active
                if instruction.guard is not None:
                    taken = self._taken(instruction.guard)
                    if not taken.any():
                        continue
                flow = instruction.flow
                if flow == "branch":
                    to = self.program.labels[str(instruction.operands[0])]
                    if to < at:
                        spins += 1
                        if spins > 1_000_000:
                            raise Fault(f"a loop without an end: {self.text}")
                    left = self.active & ~taken
                    if not left.any() and not groups:
                        at, stop = to, end
                        continue
                    _join(groups, to, taken)
                    if left.any():
                        _join(groups, at, left)
                    break
                if flow == "end":
                    live &= ~taken
                    left = self.active & ~taken
                    if left.any():
                        _join(groups, at, left)
                    break
                if flow == "barrier":
                    if (taken | ~live).all():
                        self.barrier()
                        continue
                    _join(parked, at, taken)
                    if (np.logical_or.reduce(list(parked.values())) | ~live).all():
                        self.barrier()
                        for where, lanes in parked.items():
                            _join(groups, where, lanes)
                        parked = {}
                    break
                whole, full = self.active, self.full
                if taken is not whole:
                    self._activate(taken)
                try:
                    self.do(instruction)
                except (Fault, Unknown) as error:
                    raise type(error)(f"{error} in {self.text!r}") from None
                self.active, self.full = whole, full
            else:
                if at < end:
                    _join(groups, at, self.active)

    def _activate(self, lanes: Lanes) -> None:
        self.active, self.full = lanes, bool(lanes.all())

    def _taken(self, guard: Register) -> Lanes:
        condition = self.registers[guard.slot]
        return self.active & (~condition if guard.negated else condition)

    # --- operands -------------------------------------------------------------------------------------------------

    def read(self, operand: Any, width: int) -> Lanes:
        """Bits [threads] of an operand."""
        if isinstance(operand, Register):
            bits = self.registers[operand.slot]
            return ~bits if operand.negated else bits
        if isinstance(operand, Immediate):
            return _constant(self.threads, operand.value & (1 << width) - 1, width)
        if isinstance(operand, Special):
            return self.special[operand.name]
        raise Unknown(f"operand {operand}")

    def write(self, operand: Any, bits: Lanes, kind: str = "") -> None:
        """Into a register that may be wider than the result: signed ones are extended."""
        if isinstance(operand, Sink):
            return
        before = self.registers[operand.slot]
        if bits.dtype != before.dtype:
            if bits.dtype.itemsize > before.dtype.itemsize:
                raise Unknown(f"a result of {bits.dtype} for a register of {before.dtype}")
            if kind.startswith("s"):
                bits = bits.view(f"i{bits.dtype.itemsize}").astype(f"i{before.dtype.itemsize}")
            bits = bits.astype(before.dtype) if bits.dtype.kind == "u" else bits.view(before.dtype)
        self.registers[operand.slot] = bits if self.full else np.where(self.active, bits, before)

    def addresses(self, operand: Memory, width: int) -> Lanes:
        return self.read(operand.base, width) + UNSIGNED[width](operand.offset & (1 << width) - 1)

    def one(self, operand: Any, width: int) -> int:
        """What must be the same in all lanes that take part."""
        values = self.read(operand, width)[self.active]
        if (values != values[0]).any():
            raise Fault("lanes differ where they must agree")
        return int(values[0])

    def place(self, operand: Memory) -> int:
        """An address of 32 bits that is the same in all lanes that take part."""
        return self.one(operand.base, 32) + operand.offset

    def whole_warps(self) -> None:
        warps = self.active.reshape(-1, 32)
        if (warps.any(1) != warps.all(1)).any():
            raise Fault("a part of a warp alone")


@cache
def _constant(threads: int, value: int, width: int) -> Lanes:
    """The same in all lanes; nothing may write to it, since it is kept."""
    lanes = np.full(threads, value, UNSIGNED[width])
    lanes.flags.writeable = False
    return lanes


def _join(groups: dict[int, Lanes], at: int, lanes: Lanes) -> None:
    groups[at] = groups[at] | lanes if at in groups else lanes
