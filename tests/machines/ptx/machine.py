"""One program (CTA): all of its threads go through the code together, those at the lowest instruction first."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import numpy as np

from ..memory import Fault, Global, Shared, run_twice
from ..numbers import UNSIGNED, Lanes, Unknown
from . import matrix, tensor_memory
from .arithmetic import operation, reduce, shuffle
from .program import (
    PARAM_BASE,
    SHARED_BASE,
    WIDTHS,
    Immediate,
    Instruction,
    Memory,
    Program,
    Vector,
)
from .tensor_memory import TensorMemory
from .threads import Threads
from .transfer import Barriers, Groups, TensorMap

_ASYNCHRONOUS = ("cp.async", "wgmma", "tcgen05.mma")


class Machine:
    """A program with its parameters, and what its copies and products do while they may still be on the way."""

    def __init__(
        self, program: Program, parameters: bytes, maps: dict[int, TensorMap], memory: Global, shared: int
    ) -> None:
        """maps: of parameters that are tensor maps, by their offsets. shared: bytes of on-chip memory."""
        self.program, self.maps, self.memory = program, maps, memory
        self.parameters, self.shared_bytes = np.frombuffer(parameters, np.uint8), shared

    def launch(self, grid: tuple[int, int, int]) -> None:
        """Twice, and the results must agree: copies end at once and products of wgmma as late as they may; and the
        other way round. The one shows on-chip memory that is filled while it is read, the other what nothing waits for.
        """
        if any(instruction.opcode.startswith(_ASYNCHRONOUS) for instruction in self.program.code):
            run_twice(self.memory, self.program.name, partial(self._all, grid))
        else:
            self._all(grid, late_copies=False)

    def _all(self, grid: tuple[int, int, int], late_copies: bool) -> None:
        for z, y, x in product(*(range(count) for count in reversed(grid))):
            _Cta(self, (x, y, z), grid, late_copies).run()


class _Cta(Threads):
    def __init__(
        self, machine: Machine, index: tuple[int, int, int], grid: tuple[int, int, int], late_copies: bool
    ) -> None:
        super().__init__(machine.program, index, grid)
        self.machine = machine
        self.shared = Shared(machine.shared_bytes, self.thread.astype(np.int16) // 32, SHARED_BASE)
        self.copies, self.products = Groups(late_copies), Groups(not late_copies)
        self.barriers = Barriers(late_copies)
        self.tensors = TensorMemory(self.barriers, not late_copies)
        self.summing: set[int] = set()
        """Registers that products on the way add to."""

    def barrier(self) -> None:
        self.shared.barrier()

    def run(self) -> None:
        super().run()
        self.tensors.end()

    # --- instructions ---------------------------------------------------------------------------------------------

    def do(self, instruction: Instruction) -> None:
        parts = instruction.parts
        name = parts[0]
        if self.summing and name != "wgmma" and not self.summing.isdisjoint(instruction.slots):
            # Triton adds up partial sums of fp8 before it waits for them; ptxas puts a wait there (its note C7517).
            self.products.commit()
            self._wait_for_products(0)
        special = getattr(self, f"_{name}", None)
        if special is not None:
            special(instruction.opcode, instruction.operands)
            return
        out = instruction.operands[0]
        result = operation(instruction.opcode)(*[self.read(s, w) for s, w in instruction.sources])
        if isinstance(out, Vector):  # setp of two packed numbers
            for item, each in zip(out.items, result.T, strict=True):
                self.write(item, each)
            return
        self.write(out, result, parts[-2] if name == "cvt" else parts[-1])

    def _mov(self, opcode: str, operands: tuple[Any, ...]) -> None:
        width = WIDTHS[opcode.split(".")[-1]]
        out, source = operands
        if isinstance(source, Vector):
            part = width // len(source.items)
            bits = np.stack([self.read(s, part) for s in source.items], 1)
            self.write(out, np.ascontiguousarray(bits).view(UNSIGNED[width]).reshape(-1))
        elif isinstance(out, Vector):
            pieces = (
                self.read(source, width).view(UNSIGNED[width // len(out.items)]).reshape(self.threads, -1)
            )
            for i, item in enumerate(out.items):
                self.write(item, np.ascontiguousarray(pieces[:, i]))
        else:
            bits = self.read(source, width)
            self.write(out, bits != 0 if width == 1 else bits)

    def _cvta(self, opcode: str, operands: tuple[Any, ...]) -> None:
        self.write(operands[0], self.read(operands[1], 64))

    def _ld(self, opcode: str, operands: tuple[Any, ...]) -> None:
        parts, (out, where) = opcode.split("."), operands
        outs = out.items if isinstance(out, Vector) else (out,)
        item = WIDTHS[parts[-1]] // 8
        if parts[1] == "param":
            at = int(where.base.value) - PARAM_BASE + where.offset
            raw = self.machine.parameters[at : at + item]
            data = np.broadcast_to(raw, (self.threads, item))
        else:
            lanes = np.flatnonzero(self.active)
            nbytes = item * len(outs)
            address = self.addresses(where, 32 if parts[1] == "shared" else 64)[lanes]
            if parts[1] == "shared":
                read = self.shared.load(self.shared.offsets(address, nbytes, opcode), lanes, opcode)
            else:
                read = self.machine.memory.load(address, nbytes, opcode)
            data = np.zeros((self.threads, nbytes), np.uint8)
            data[lanes] = read
        values = np.ascontiguousarray(data).view(UNSIGNED[8 * item])
        for i, register in enumerate(outs):
            self.write(register, np.ascontiguousarray(values[:, i]), parts[-1])

    def _st(self, opcode: str, operands: tuple[Any, ...]) -> None:
        parts, (where, source) = opcode.split("."), operands
        sources = source.items if isinstance(source, Vector) else (source,)
        width, lanes = WIDTHS[parts[-1]], np.flatnonzero(self.active)
        values = np.stack([self.read(s, width)[lanes].astype(UNSIGNED[width]) for s in sources], 1)
        data = np.ascontiguousarray(values).view(np.uint8)
        address = self.addresses(where, 32 if parts[1] == "shared" else 64)[lanes]
        if parts[1] == "shared":
            self.shared.store(self.shared.offsets(address, data.shape[1], opcode), data, lanes, opcode)
        else:
            self.machine.memory.store(address, data, opcode)

    def _shfl(self, opcode: str, operands: tuple[Any, ...]) -> None:
        self.whole_warps()
        out, x, by, clamp, _ = operands
        if not isinstance(clamp, Immediate) or clamp.value not in (31, 0):
            raise Unknown(f"{opcode} of a part of a warp")
        self.write(out, shuffle(opcode, self.read(x, 32), self.read(by, 32)))

    def _redux(self, opcode: str, operands: tuple[Any, ...]) -> None:
        self.whole_warps()
        self.write(operands[0], reduce(opcode, self.read(operands[1], 32)))

    def _elect(self, opcode: str, operands: tuple[Any, ...]) -> None:
        lane, chosen = operands[0].items
        self.whole_warps()
        self.write(lane, np.zeros(self.threads, np.uint32))
        self.write(chosen, self.thread % 32 == 0)

    # --- matrices -------------------------------------------------------------------------------------------------

    def _ldmatrix(self, opcode: str, operands: tuple[Any, ...]) -> None:
        self.whole_warps()
        out, where = operands
        count, address, lanes = matrix.matrix_rows(opcode, self.addresses(where, 32))
        taking = self.active[lanes]
        rows = np.zeros((len(lanes), 16), np.uint8)
        at = self.shared.offsets(address[taking], 16, opcode)
        rows[taking] = self.shared.load(at, lanes[taking], opcode)
        for register, bits in zip(out.items, matrix.from_rows(opcode, rows, count), strict=True):
            self.write(register, bits)

    def _stmatrix(self, opcode: str, operands: tuple[Any, ...]) -> None:
        self.whole_warps()
        where, source = operands
        _, address, lanes = matrix.matrix_rows(opcode, self.addresses(where, 32))
        rows = matrix.to_rows(opcode, [self.read(s, 32) for s in source.items])
        taking = self.active[lanes]
        at = self.shared.offsets(address[taking], 16, opcode)
        self.shared.store(at, rows[taking], lanes[taking], opcode)

    def _mma(self, opcode: str, operands: tuple[Any, ...]) -> None:
        self.whole_warps()
        out, a, b, c, *scaling = operands
        fragments = [[self.read(r, 32) for r in fragment.items] for fragment in (a, b, c)]
        scales = []
        for rows, register, chosen in zip((16, 8), scaling[::2], scaling[1::2], strict=False):
            byte, thread = (item.value for item in chosen.items)
            scales.append(matrix.block_scales(self.read(register, 32), rows, byte, thread))
        for register, bits in zip(out.items, matrix.mma(opcode, *fragments, scales), strict=True):
            self.write(register, bits)

    def _wgmma(self, opcode: str, operands: tuple[Any, ...]) -> None:
        if not self.full:
            raise Fault("a part of a warpgroup alone")
        if ".fence." in opcode:
            return
        if ".commit_group." in opcode:
            self.products.commit()
        elif ".wait_group." in opcode:
            self._wait_for_products(operands[0].value)
        else:
            self.summing |= {r.slot for r in operands[0].items}
            self.products.add(self._product(opcode, operands))

    def _wait_for_products(self, left: int) -> None:
        self.products.wait(left)
        if left == 0:
            self.summing.clear()

    def _product(self, opcode: str, operands: tuple[Any, ...]) -> Any:
        columns, kind, of = matrix.wgmma_shape(opcode)
        out, a, b, add, *rest = operands
        # Factors of both operands, 1 or -1, and whether they are turned.
        if [item.value for item in rest[:2]] not in ([], [1, 1]) or any(item.value for item in rest[2:]):
            raise Unknown(f"{opcode} of operands that are negated or turned")
        accumulates = self.read(add, 1) != 0
        right = self.read(b, 64)
        given = matrix.rows_of_a([self.read(r, 32) for r in a.items]) if isinstance(a, Vector) else None
        left = None if isinstance(a, Vector) else self.read(a, 64)

        def rows(descriptors: Lanes, group: int, count: int) -> np.ndarray:
            mine = descriptors[128 * group : 128 * group + 128]
            if (mine != mine[0]).any():
                raise Fault("lanes of a warpgroup differ in a descriptor")
            return self.shared.asynchronous(matrix.described_rows(int(mine[0]), count) - SHARED_BASE, opcode)

        def do() -> None:
            before = matrix.sums([self.registers[r.slot] for r in out.items], columns)
            sums = []
            for group in range(self.threads // 128):
                warps = slice(4 * group, 4 * group + 4)
                first = rows(left, group, 64) if given is None else given[warps].reshape(64, 32)
                base = before[warps] if accumulates[128 * group] else None
                sums.append(matrix.wgmma(base, first, rows(right, group, columns), kind, of))
            for register, bits in zip(out.items, matrix.sum_registers(np.concatenate(sums)), strict=True):
                self.registers[register.slot] = bits

        return do

    def _tcgen05(self, opcode: str, operands: tuple[Any, ...]) -> None:
        how = opcode.split(".")[1]
        if how == "alloc":
            address = np.array([[self.tensors.allocate(operands[1].value)]], np.uint32).view(np.uint8)
            to = np.array([self.place(operands[0])])
            self.shared.deliver(self.shared.offsets(to, 4, opcode), address)
        elif how == "dealloc":
            self.tensors.release(self.one(operands[0], 32), operands[1].value)
        elif how in ("ld", "st"):
            self._words(opcode, operands)
        elif how == "commit":
            if self.active.sum() != 1:
                raise Fault("a commit by more than one thread")
            self.tensors.commit(self.place(operands[0]))
        elif how == "mma":
            self._tensor_product(opcode, operands)
        elif (
            opcode.split("::")[0] not in ("tcgen05.wait", "tcgen05.fence")
            and how != "relinquish_alloc_permit"
        ):
            raise Unknown(opcode)

    def _words(self, opcode: str, operands: tuple[Any, ...]) -> None:
        """tcgen05.ld and st: each warp has a quarter of the lanes."""
        self.whole_warps()
        loads = ".ld." in opcode
        where = next(o for o in operands if isinstance(o, Memory))
        registers = next(o for o in operands if isinstance(o, Vector)).items
        lanes = np.flatnonzero(self.active)
        address = self.addresses(where, 32)[lanes].astype(np.int64)
        quarter, lane = lanes // 32 % 4 * 32, lanes % 32
        first = address & 0xFFFF
        if ".16x32bx2." in opcode:
            # The first 16 threads of a warp have 16 lanes' words, the others more words of the same lanes.
            split = next(o for o in operands if isinstance(o, Immediate)).value
            first, lane = first + lane // 16 * split, lane % 16
        elif ".32x32b." not in opcode:
            raise Unknown(opcode)
        if (address >> 16 != quarter).any():
            raise Fault("a warp reaches for the lanes of another")
        if loads:
            values = np.zeros((self.threads, len(registers)), np.uint32)
            values[lanes] = self.tensors.load(quarter + lane, first, len(registers))
            for i, register in enumerate(registers):
                self.write(register, np.ascontiguousarray(values[:, i]))
        else:
            values = np.stack([self.read(r, 32)[lanes] for r in registers], 1)
            self.tensors.store(quarter + lane, first, values)

    def _tensor_product(self, opcode: str, operands: tuple[Any, ...]) -> None:
        if self.active.sum() != 1:
            raise Fault("a product by more than one thread")
        out, a, b, descriptor, *scaling, add = operands
        what = tensor_memory.described(opcode, self.one(descriptor, 32))

        def rows(operand: Any, count: int, turned: bool) -> Any:
            at = tensor_memory.rows_in_memory(self.one(operand, 64), count, turned) - SHARED_BASE
            return partial(self.shared.asynchronous, at, opcode)

        if isinstance(a, Memory):
            left = partial(self.tensors.operand, self.place(a), what.rows)
        else:
            left = rows(a, what.rows, what.turned_a)
        right = rows(b, what.columns, what.turned_b)
        scales = [self.place(operand) for operand in scaling]
        self.tensors.multiply(self.place(out), left, right, what, bool(self.one(add, 1)), scales)

    # --- copies ---------------------------------------------------------------------------------------------------

    def _cp(self, opcode: str, operands: tuple[Any, ...]) -> None:
        if opcode.startswith("cp.async.bulk.tensor.2d.shared::cta.global."):
            self._tile(opcode, operands)
        elif opcode == "cp.async.commit_group":
            self.copies.commit()
        elif opcode == "cp.async.wait_group":
            self.copies.wait(operands[0].value)
        elif opcode in ("cp.async.cg.shared.global", "cp.async.ca.shared.global"):
            to, source, size, *left = operands
            lanes = np.flatnonzero(self.active)
            at = self.shared.offsets(self.addresses(to, 32)[lanes], size.value, opcode)
            address = self.addresses(source, 64)[lanes]
            wanted = self.read(left[0], 32)[lanes] if left else np.full(len(lanes), size.value)
            if not ((wanted == 0) | (wanted == size.value)).all():
                raise Unknown(f"{opcode} of a part")

            def do() -> None:
                data = np.zeros((len(lanes), size.value), np.uint8)
                some = wanted > 0
                if some.any():
                    data[some] = self.machine.memory.load(address[some], size.value, opcode)
                self.shared.store(at, data, lanes, opcode)

            self.copies.add(do)
        else:
            raise Unknown(opcode)

    def _tile(self, opcode: str, operands: tuple[Any, ...]) -> None:
        to, source, barrier = operands
        columns, rows = (self.read(c, 32).view(np.int32) for c in source.coordinates.items)
        tensor_map = self.machine.maps[self.one(source.base, 64) - PARAM_BASE]
        places, barriers = self.addresses(to, 32), self.addresses(barrier, 32)
        for lane in np.flatnonzero(self.active):
            copy = tensor_map.copy(
                self.machine.memory,
                self.shared,
                int(places[lane]),
                int(rows[lane]),
                int(columns[lane]),
                opcode,
            )
            self.barriers.copy(int(barriers[lane]), tensor_map.nbytes, copy)

    def _mbarrier(self, opcode: str, operands: tuple[Any, ...]) -> None:
        how = opcode.split(".")[1]
        where = next(o for o in operands if isinstance(o, Memory))
        address = self.place(where)
        if how == "init":
            self.barriers.init(address, operands[1].value)
        elif how == "inval":
            self.barriers.invalidate(address)
        elif how == "arrive" and "expect_tx" in opcode:
            if self.active.sum() != 1:
                raise Unknown(f"{opcode} by several threads")
            self.barriers.arrive(address, operands[2].value)
        elif how == "try_wait" and "parity" in opcode:
            done = self.barriers.done(address, self.one(operands[2], 32) & 1)
            self.write(operands[0], np.full(self.threads, done))
        else:
            raise Unknown(opcode)

    def _bar(self, opcode: str, operands: tuple[Any, ...]) -> None:
        if opcode != "bar.warp.sync":  # lanes of a warp go together
            raise Unknown(opcode)

    def _fence(self, opcode: str, operands: tuple[Any, ...]) -> None:
        if "proxy.async" in opcode:
            self.shared.fence()
