"""One core of a block: its scalar unit, which runs the program and hands instructions to its pipes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from ..memory import Fault
from ..numbers import Unknown
from . import arithmetic, library
from .memory import SIZES, Local, MemRef, Shared, Step
from .order import Order
from .program import DTYPES, Function, Operation, Program, type_of

_NAME = re.compile(r"%[\w-]+(?:#\d+)?")
_PIPE = re.compile(r"<PIPE_(\w+)>")


class Core:
    """`run` goes on until the core waits for another one, and then yields."""

    def __init__(
        self, program: Program, block: int, number: int, others: list[int], memory: Shared, order: Order
    ) -> None:
        """number: in the block. others: the numbers of the cores that it signals."""
        self.number, self.order = number, order
        self._maps, self._block, self._others = program.maps, block, others
        self._memory: dict[str, Shared | Local] = {space: Local(space) for space in SIZES} | {"gm": memory}
        self._values: dict[str, Any] = {}

    def issue(self, pipe: str) -> Step:
        return Step(*self.order.issue(self.number, pipe), self.order)

    def run(self, function: Function, arguments: list[Any]) -> Iterator[None]:
        self._values = {name: value for (name, _), value in zip(function.parameters, arguments, strict=True)}
        yield from self._run_block(function.body)

    def _run_block(self, block: list[Operation]) -> Iterator[None]:
        """Returns what its last operation yields."""
        for operation in block:
            if operation.name in ("scf.yield", "return"):
                return self._named(operation.text.partition(" : ")[0])
            try:
                results = yield from self._run(operation)
            except Fault as fault:
                raise fault if operation.blocks else Fault(f"{fault}, in {operation}") from None
            for name, value in zip(operation.results, results, strict=True):
                self._values[name] = value
        return []

    def _named(self, text: str) -> list[Any]:
        return [self._values[name] for name in _NAME.findall(text)]

    def _numbers(self, listed: str) -> list[int]:
        """`%1, 16` → the numbers."""
        items = filter(None, (item.strip() for item in listed.split(",")))
        return [int(self._values[item]) if item.startswith("%") else int(item) for item in items]

    def _run(self, operation: Operation) -> Iterator[None]:
        name, text = operation.name.removeprefix("func."), operation.text
        if name == "scf.for":
            return (yield from self._for(operation))
        if name == "scf.if":
            (condition,) = self._named(text.partition("->")[0])
            taken = operation.blocks[:1] if condition else operation.blocks[1:]
            return (yield from self._run_block(taken[0])) if taken else []
        if name == "hivm.hir.sync_block_wait":
            flag = self._flag(text)
            while not self.order.signalled(self.number, self._others, flag):
                yield
            self.order.take(self.number, self._others, flag, _PIPE.findall(text)[1])
            return []
        if name == "call":
            found = re.match(r" @(\w+)\(([^)]*)\)", text)
            assert found is not None
            library.call(self, found[1], self._named(found[2]))
            return []
        if name.startswith("hivm.hir."):
            return self._hivm(name.removeprefix("hivm.hir."), text)
        if name.startswith("memref."):
            return self._memref(name.removeprefix("memref."), text)
        if name.startswith("affine."):
            return [self._affine(name, text)]
        return [self._scalar(name, text)]

    def _for(self, operation: Operation) -> Iterator[None]:
        head = operation.text.partition(" -> ")[0]
        counter, *bounds = _NAME.findall(head)[:4]
        kept = _NAME.findall(head.partition("iter_args")[2])
        low, high, step = (self._values[name] for name in bounds)
        state = [self._values[name] for name in kept[1::2]]
        if step <= 0:
            raise Fault("a loop whose step is not positive")
        for count in range(int(low), int(high), int(step)):
            self._values[counter] = np.array(count, low.dtype)
            self._values.update(zip(kept[::2], state, strict=True))
            state = yield from self._run_block(operation.blocks[0])
        return state

    def _scalar(self, name: str, text: str) -> Any:
        head, _, kind = text.rpartition(" : ")
        if name == "arith.constant":
            return _constant(text)
        values = self._named(head)
        if name == "arith.select":
            return values[1] if values[0] else values[2]
        if name in arithmetic.BINARY:
            return arithmetic.BINARY[name](*values)
        if name in arithmetic.UNARY:
            return arithmetic.UNARY[name](*values)
        if name in ("arith.cmpi", "arith.cmpf"):
            return arithmetic.COMPARE[head.split()[0].rstrip(",")](*values)
        if name.startswith("arith."):
            return arithmetic.cast(name, *values, type_of(kind.partition(" to ")[2]).dtype)
        raise Unknown(f"the operation {name}{text}")

    def _affine(self, name: str, text: str) -> np.ndarray:
        found = re.match(r" (#map\d*)(.*)", text)
        assert found is not None
        results = self._maps[found[1]]([int(value) for value in self._named(found[2])])
        return np.array(
            {"apply": lambda x: x[0], "min": min, "max": max}[name.partition(".")[2]](results), np.int64
        )

    def _flag(self, text: str) -> int:
        (flag,) = self._numbers(re.search(r"flag = (%?[\w-]+)", text)[1])  # type: ignore[index]
        return flag

    def _hivm(self, name: str, text: str) -> list[Any]:
        pipes = _PIPE.findall(text)
        if name in ("set_flag", "wait_flag"):
            event = re.search(r"<EVENT_ID(\d+)>", text)
            number = int(event[1]) if event else int(self._named(text)[0])
            getattr(self.order, name)(self.number, *pipes, number)
        elif name == "pipe_barrier":
            self.order.barrier(self.number, pipes[0])
        elif name == "sync_block_set":
            self.order.signal(self.number, pipes[0], self._others, self._flag(text))
        elif name == "get_block_idx":
            return [np.array(self._block, np.int64)]
        elif name == "get_sub_block_idx":
            return [np.array(self.number - 1, np.int64)]
        elif name == "pointer_cast":
            kind = type_of(text.rpartition(" : ")[2])
            shape = tuple(size for size in kind.shape if size is not None)
            (address,) = self._named(text.partition(" : ")[0])
            return [self._new(kind.space, int(address), kind.dtype, shape)]
        elif name == "bitcast":
            (source,) = self._named(text.partition(" : ")[0])
            dtype = type_of(text.rpartition(" -> ")[2]).dtype
            if np.dtype(dtype).itemsize != source.width:
                raise Unknown(f"the operation {name}{text}")
            return [replace(source, dtype=dtype)]
        elif name not in ("set_ffts_base_addr", "set_mask_norm"):
            raise Unknown(f"the operation {name}{text}")
        return []

    def _new(self, space: str | None, address: int, dtype: type, shape: tuple[int, ...]) -> MemRef:
        assert space is not None
        strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
        return MemRef(self._memory[space], address, dtype, shape, strides)

    def _memref(self, name: str, text: str) -> list[Any]:
        head, _, kind = text.rpartition(" : ")
        lists = re.findall(r"\[([^\[\]]*)\]", head)
        if name == "cast":
            return self._named(head)
        if name == "view":
            source, at = self._named(head)
            into = type_of(kind.partition(" to ")[2])
            shape = tuple(size for size in into.shape if size is not None)
            return [self._new(into.space, source.address + int(at), into.dtype, shape)]
        if name == "reinterpret_cast":
            found = re.search(r"offset: \[(.*?)\], sizes: \[(.*?)\], strides: \[(.*?)\]", head)
            assert found is not None
            source = self._named(head[: found.start()])[0]
            (offset,), sizes, strides = (self._numbers(part) for part in found.groups())
            return [replace(source, offset=offset, sizes=tuple(sizes), strides=tuple(strides))]
        if name == "subview":
            window = self._named(head)[0].window(*(self._numbers(part) for part in lists[:3]))
            return [window.of_rank(len(type_of(kind.partition(" to ")[2]).shape))]
        if name == "collapse_shape":
            return [self._named(head)[0].collapsed([self._numbers(part) for part in lists])]
        if name == "expand_shape":
            groups, sizes = head.split("output_shape")
            listed = [self._numbers(part) for part in re.findall(r"\[([^\[\]]*)\]", groups)]
            return [self._named(groups)[0].expanded(listed, self._numbers(lists[-1]))]
        if name == "extract_strided_metadata":
            (source,) = self._named(head)
            numbers = [source.offset, *source.sizes, *source.strides]
            base = replace(source, offset=0, sizes=(), strides=())
            return [base, *(np.array(each, np.int64) for each in numbers)]
        if name in ("load", "store"):
            place = self._numbers(lists[0])
            value, source = (None, *self._named(head)[:1]) if name == "load" else self._named(head)[:2]
            one = source.window(place, [1] * len(place), [1] * len(place))
            step = self.issue("S")
            if name == "load":
                return [one.load(step).reshape(())]
            one.store(value, step)
            return []
        raise Unknown(f"the operation memref.{name}{text}")


def _constant(text: str) -> np.ndarray:
    value, _, kind = text.strip().rpartition(" : ")
    if not value:  # true and false have no type
        return np.array(kind == "true")
    dtype = DTYPES[kind]
    if value.startswith("0x"):
        width = np.dtype(dtype).itemsize
        return np.frombuffer(int(value, 16).to_bytes(width, "little"), dtype)[0].reshape(())
    return np.array(float(value) if "." in value or "e" in value else int(value), dtype)
