"""The waves of one program (workgroup): registers, masks, branches, barriers, and what has not ended yet.

All waves go through the code together, those at the lowest instruction first, so that what a branch parted meets again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..memory import Fault
from ..numbers import Lanes, Unknown
from .program import EXEC, SCALARS, VCC, VECTORS, Immediate, Instruction, Operand, Program, Register, Source

_GARBAGE = 0x7FC0_DEAD
"""In registers that nothing has written: a NaN as a float."""
WAVE = 64


@dataclass
class Pending:
    """What a wave has begun, and must wait for. `left`: the waves [waves] of which it is still to come."""

    counter: str
    """vm (vector memory), lds or smem (which share a counter)."""
    left: np.ndarray
    slots: frozenset[int]
    """Registers that it writes."""
    end: Callable[[np.ndarray], None]
    """Ends it for some waves."""


class Waves(ABC):
    """What runs is in `do`."""

    def __init__(self, program: Program, index: tuple[int, int, int], parameters: int) -> None:
        """parameters: the address of the block of parameters."""
        self.program = program
        self.count = program.threads // WAVE
        self.threads = program.threads
        self.vectors = np.full((VECTORS, self.threads), _GARBAGE, np.uint32)
        self.vectors[0] = np.arange(self.threads)
        self.rows = list(self.vectors)
        """Each of them: the same memory."""
        self.scalars = np.full((SCALARS, self.count), _GARBAGE, np.uint32)
        self.scc = np.zeros(self.count, bool)
        self.on = np.ones(self.count, bool)
        """The waves that go on now."""
        for register, number in zip(program.groups, index, strict=True):
            if register is not None:
                self.scalars[register] = number
        self.scalars[program.kernarg] = parameters & 0xFFFF_FFFF
        self.scalars[program.kernarg + 1] = parameters >> 32
        self.scalars[EXEC : EXEC + 2] = 0xFFFF_FFFF
        self.executing = np.ones(self.threads, bool)
        """The lanes that do: of waves that go on, those in EXEC."""
        self.whole = True
        self.constants: dict[int, Lanes] = {}
        self.pending: list[Pending] = []
        self.busy: set[int] = set()
        """Registers that something pending writes."""

    @abstractmethod
    def do(self, instruction: Instruction) -> None:
        """Anything but a branch, a barrier or the end."""

    @abstractmethod
    def barrier(self) -> None:
        """All waves have met."""

    # --- control flow ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        code = self.program.code
        groups: dict[int, np.ndarray] = {0: np.ones(self.count, bool)}
        parked: dict[int, np.ndarray] = {}
        live, back = np.ones(self.count, bool), 0
        while groups:
            at = min(groups)
            self._go(groups.pop(at))
            stop = min(groups, default=len(code))
            while at != stop:
                instruction = code[at]
                flow = instruction.flow
                at += 1
                if flow == "branch":
                    to = self.program.labels[str(instruction.operands[0])]
                    taken = self.on & self._condition(instruction.opcode)
                    if to < at:
                        back += 1
                        if back > 1_000_000:
                            raise Fault(f"a loop without an end: {instruction.text}")
                    left = self.on & ~taken
                    if not left.any() and not groups:
                        at = to
                        continue
                    for where, some in ((to, taken), (at, left)):
                        if some.any():
                            _join(groups, where, some)
                    break
                if flow:
                    if flow == "end":
                        live &= ~self.on
                    elif (self.on | ~live).all():
                        self.barrier()
                        continue
                    else:
                        _join(parked, at, self.on)
                    # Waves that have ended are waited for by none.
                    if parked and (np.logical_or.reduce(list(parked.values())) | ~live).all():
                        self.barrier()
                        for where, some in parked.items():
                            _join(groups, where, some)
                        parked = {}
                    break
                try:
                    if self.busy and not self.busy.isdisjoint(instruction.slots):
                        self._still_coming(instruction)
                    self.do(instruction)
                except (Fault, Unknown) as error:
                    raise type(error)(f"{error} in {instruction.text!r}") from None
            else:
                _join(groups, at, self.on)

    def _go(self, waves: np.ndarray) -> None:
        self.on = waves
        self.masked()

    def masked(self) -> None:
        """After a change of EXEC, or of the waves that go on."""
        self.executing = self.mask(Register(False, EXEC, 2)) & np.repeat(self.on, WAVE)
        self.whole = bool(self.executing.all())

    def _condition(self, name: str) -> np.ndarray:
        if name == "s_branch":
            return self.on
        kind = name.removeprefix("s_cbranch_")
        if kind in ("scc0", "scc1"):
            return self.scc == (kind == "scc1")
        register = {"exec": EXEC, "vcc": VCC}.get(kind[:-1].removesuffix("n"))
        if register is None or kind[-1] != "z":
            raise Unknown(name)
        zero = (self.scalars[register] | self.scalars[register + 1]) == 0
        return ~zero if kind.endswith("nz") else zero

    # --- what has not ended ---------------------------------------------------------------------------------------

    def begin(
        self, counter: str, end: Callable[[np.ndarray], None], registers: tuple[Register, ...] = ()
    ) -> None:
        slots = frozenset(slot for register in registers for slot in register.slots)
        self.pending.append(Pending(counter, self.on.copy(), slots, end))
        self.busy |= slots

    def wait(self, counters: tuple[str, ...], left: int) -> None:
        """s_waitcnt: until each wave has at most `left`. They end in the order of their beginning, but for smem."""
        later = np.zeros(self.count, int)
        due: list[tuple[Pending, np.ndarray]] = []
        for entry in reversed(self.pending):
            if entry.counter not in counters:
                continue
            some = entry.left & self.on
            # A scalar load may end before or after all others: only a wait for all of them says that it has.
            ends = some & (later >= left)
            if left and entry.counter == "lds":
                ends &= later - left >= self._scalar_loads()
            if entry.counter != "smem" or left == 0:
                due.append((entry, ends))
            later += some
        for entry, ends in reversed(due):
            if ends.any():
                entry.end(ends)
                entry.left &= ~ends
        self.pending = [entry for entry in self.pending if entry.left.any()]
        self.busy = set().union(*(entry.slots for entry in self.pending))

    def _scalar_loads(self) -> np.ndarray:
        return sum((e.left for e in self.pending if e.counter == "smem"), np.zeros(self.count, int))

    def _still_coming(self, instruction: Instruction) -> None:
        for entry in self.pending:
            if (entry.left & self.on).any() and not entry.slots.isdisjoint(instruction.slots):
                raise Fault("touches a register that a load still writes")

    # --- operands -------------------------------------------------------------------------------------------------

    def lanes(self, operand: Operand, word: int = 0) -> Lanes:
        """Bits [threads] of a register, or of the word-th one of several. Not to be written to."""
        of = _source(operand).of
        if isinstance(of, Register):
            if word >= of.count:
                raise Unknown(f"word {word} of {of.count}")
            at = of.first + word
            return self.rows[at] if of.vector else self.scalars[at].repeat(WAVE)
        assert isinstance(of, Immediate)
        bits = of.bits >> 32 * word & 0xFFFF_FFFF
        if bits not in self.constants:
            self.constants[bits] = np.full(self.threads, bits, np.uint32)
        return self.constants[bits]

    def lanes64(self, operand: Operand) -> Lanes:
        low, high = (self.lanes(operand, word).astype(np.uint64) for word in range(2))
        return low | high << np.uint64(32)

    def put(self, slot: int, bits: Lanes) -> None:
        if self.whole:
            self.rows[slot][:] = bits
        else:
            np.copyto(self.rows[slot], bits, where=self.executing)

    def scalar(self, operand: Operand, width: int = 32) -> Lanes:
        """uint64 [waves]."""
        of = _source(operand).of
        if isinstance(of, Register):
            if of.vector:
                raise Unknown("a scalar instruction of a vector register")
            low = self.scalars[of.first].astype(np.uint64)
            return low if width == 32 else low | self.scalars[of.first + 1].astype(np.uint64) << np.uint64(32)
        assert isinstance(of, Immediate)
        if width == 64 and of.of_float:
            raise Unknown("a float of 64 bits")
        return np.full(self.count, of.bits & (1 << width) - 1, np.uint64)

    def put_scalar(self, register: Register, bits: Lanes, width: int = 32) -> None:
        """bits: uint64 [waves]."""
        words = (bits,) if width == 32 else (bits, bits >> np.uint64(32))
        for i, word in enumerate(words):
            np.copyto(self.scalars[register.first + i], word.astype(np.uint32), where=self.on)
        if EXEC <= register.first + len(words) - 1 < SCALARS:
            self.masked()

    def mask(self, operand: Operand | Register) -> Lanes:
        """bool [threads], of a bit for each lane."""
        of = operand if isinstance(operand, Register) else _source(operand).of
        if isinstance(of, Immediate):
            words = np.full((self.count, 1), of.bits, np.uint64)
        else:
            assert isinstance(of, Register) and not of.vector
            words = np.ascontiguousarray(self.scalars[of.first : of.first + 2].T)
        return np.unpackbits(words.view(np.uint8), axis=1, bitorder="little").reshape(-1).astype(bool)

    def put_mask(self, register: Register, lanes: Lanes) -> None:
        """A bit for each lane that executes; 0 for the others."""
        packed = np.packbits((lanes & self.executing).reshape(-1, WAVE), axis=1, bitorder="little")
        self.put_scalar(register, packed.view(np.uint64).reshape(-1), 64)


def _source(operand: Operand) -> Source:
    if not isinstance(operand, Source):
        raise Unknown(f"operand {operand!r}")
    return operand


def _join(groups: dict[int, np.ndarray], at: int, waves: np.ndarray) -> None:
    groups[at] = groups[at] | waves if at in groups else waves
