"""Loads and stores: vector memory, on-chip memory, copies from the one into the other."""

from __future__ import annotations

import numpy as np

from ..memory import Global, Shared
from ..numbers import Unknown
from . import matrix
from .program import M0, Instruction, Operand, Register, Source
from .waves import WAVE, Waves

PARAMETERS = 0x7000_0000_0000
"""Where the block of parameters lies."""


class MemoryUnit(Waves):
    memory: Global
    shared: Shared
    block: np.ndarray
    """The parameters, bytes."""
    late: bool
    """Loads from vector memory end when they are waited for, and what is done on-chip is done at once; or the other way
    round."""

    def scalar_load(self, instruction: Instruction) -> None:
        _, base, *rest = instruction.operands
        width = 4 * instruction.register(0).count
        address = self.scalar(base, 64) + np.uint64(instruction.number("offset"))
        if rest:
            address = address + self.scalar(rest[0])
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

    def memory_instruction(self, instruction: Instruction, kind: str, name: str) -> None:
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
            if "offset" in instruction.options:
                raise Unknown("an offset in memory and on-chip")
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
            if high:  # the other half stays
                bits = bits << np.uint32(16) | self.vectors[register.first] & np.uint32(0xFFFF)
            self.vectors[register.first, lanes] = bits[lanes]
            return
        words = data.view(np.uint32)
        for i in range(register.count):
            self.vectors[register.first + i, lanes] = words[lanes, i]

    def _bytes(self, register: Register, lanes: np.ndarray, width: int, high: int) -> np.ndarray:
        """[lanes, width]."""
        registers = slice(register.first, register.first + max(1, width // 4))
        bits = self.vectors[registers, lanes] >> np.uint32(16 * high)
        return np.ascontiguousarray(bits.T).view(np.uint8)[:, :width]

    def _buffer(
        self, instruction: Instruction, operands: tuple[Operand, ...], width: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(lanes that reach something, their addresses). What lies outside of the buffer is 0, or not written."""
        if "offen" in instruction.options:
            offset = self.lanes(operands[0]).astype(np.uint64)
        else:
            offset = np.zeros(self.threads, np.uint64)
        _, resource, start = operands
        assert isinstance(resource, Source) and isinstance(resource.of, Register)
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
        assert isinstance(base, Source)
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

    def on_chip_instruction(self, instruction: Instruction, name: str) -> None:
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
