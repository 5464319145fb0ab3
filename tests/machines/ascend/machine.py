"""Runs one launch of a kernel as triton-ascend hands it to CANN's compiler: linalg, program by program.

What it refuses: windows and addresses outside of every tensor, and memory that one program writes and another reads
or writes, since programs run at once. Buffers hold 0xA5 before they are written. A call of an operation that it does
not know is an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from torch import Tensor

from ..memory import Fault
from ..numbers import Unknown
from . import operations
from .memory import MemRef, Pointer, Watched, within_bounds
from .program import Block, Operation, Program, type_of

_NAME = re.compile(r"%[\w-]+(?:#\d+)?")


class Machine:
    """`launch` runs all programs of a grid."""

    def __init__(self, program: Program, arguments: Sequence[Tensor | float | int]) -> None:
        """arguments: those of the kernel that are no constants, in its order."""
        self._program, self._arguments = program, arguments
        self._memory = Watched([a for a in arguments if isinstance(a, Tensor)])

    def launch(self, grid: Sequence[int]) -> None:
        sizes = [*grid, 1, 1][:3]
        # Two pointers of the runtime come first, and the grid and the program's place in it last.
        taken = len(self._program.parameters) - 8
        if taken != len(self._arguments):
            raise Fault(f"{self._program.name}: takes {taken} arguments, found {len(self._arguments)}")
        for number, place in enumerate(product(*(range(n) for n in reversed(sizes))), 1):
            self._memory.program = number
            given = [None, None, *self._arguments, *sizes, *reversed(place)]
            values = {
                name: self._argument(value, kind)
                for (name, kind), value in zip(self._program.parameters, given, strict=True)
            }
            with np.errstate(all="ignore"):
                _Run(values).block(self._program.body)

    def _argument(self, value: Any, kind: str) -> Any:
        dtype = type_of(kind).dtype
        if isinstance(value, Tensor):
            return MemRef(Pointer(self._memory, value.data_ptr(), dtype), 0, (1 << 62,), (1,))
        return None if value is None else np.array(value, dtype)


class _Run:
    """One program: names and what they are."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def block(self, block: Block) -> list[Any]:
        """What its last operation yields."""
        for operation in block.operations:
            if operation.name.endswith((".yield", "return")):
                return self._named(operation.text.partition(" : ")[0])
            try:
                results = self._run(operation)
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

    def _run(self, operation: Operation) -> Sequence[Any]:
        name, text = operation.name, operation.text
        head, _, kind = text.rpartition(" : ")
        if name in operations.BINARY:
            return [operations.BINARY[name](*self._named(head))]
        if name in operations.UNARY:
            return [operations.UNARY[name](*self._named(head))]
        if name in operations.TERNARY:
            return [operations.TERNARY[name](*self._named(head))]
        if name in ("arith.cmpi", "arith.cmpf"):
            return [operations.COMPARE[head.split()[0].rstrip(",")](*self._named(head))]
        if name == "arith.constant":
            return [_constant(text)]
        if name.startswith("arith."):
            return [operations.cast(name, *self._named(head), type_of(kind.partition(" to ")[2]).dtype)]
        dialect, _, what = name.partition(".")
        method = getattr(self, f"_{dialect}_{what}", None)
        if method is None:
            raise Unknown(f"the operation {operation}")
        return method(operation) or ()

    def _annotation_mark(self, operation: Operation) -> None:
        """A hint for the compiler."""

    # scf

    def _scf_for(self, operation: Operation) -> list[Any]:
        head, _, _ = operation.text.partition(" -> ")
        counter, *bounds = _NAME.findall(head)[:4]
        kept = _NAME.findall(head.partition("iter_args")[2])
        low, high, step = (self._values[name] for name in bounds)
        state = [self._values[name] for name in kept[1::2]]
        if step <= 0:
            raise Fault("a loop whose step is not positive")
        for count in range(int(low), int(high), int(step)):
            self._values[counter] = np.array(count, low.dtype)
            self._values.update(zip(kept[::2], state, strict=True))
            state = self.block(operation.blocks[0])
        return state

    def _scf_if(self, operation: Operation) -> list[Any]:
        (condition,) = self._named(operation.text.partition("->")[0])
        taken = operation.blocks[:1] if condition else operation.blocks[1:]
        return self.block(taken[0]) if taken else []

    # tensor

    def _tensor_empty(self, operation: Operation) -> list[Any]:
        kind = type_of(operation.text.rpartition(" : ")[2])
        shape = tuple(size for size in kind.shape if size is not None)
        return [MemRef.new(shape, kind.dtype).load("")]

    _bufferization_alloc_tensor = _tensor_empty

    def _shaped(self, operation: Operation) -> list[Any]:
        source = self._named(operation.text.partition("[[")[0])[0]
        return [source.reshape(type_of(operation.text.rpartition(" into ")[2]).shape)]

    _tensor_expand_shape = _tensor_collapse_shape = _shaped

    def _tensor_extract(self, operation: Operation) -> list[Any]:
        source, *index = self._named(operation.text.partition(" : ")[0])
        return [source[tuple(int(i) for i in index)]]

    def _tensor_insert(self, operation: Operation) -> list[Any]:
        value, into, *index = self._named(operation.text.partition(" : ")[0])
        changed = into.copy()
        changed[tuple(int(i) for i in index)] = value
        return [changed]

    def _tensor_extract_slice(self, operation: Operation) -> list[Any]:
        source, offsets, sizes, strides = self._slice(operation)
        within_bounds(source.shape, offsets, sizes, strides)
        return [
            source[tuple(slice(o, o + n * s, s) for o, n, s in zip(offsets, sizes, strides, strict=True))]
        ]

    def _slice(self, operation: Operation) -> tuple[Any, list[int], list[int], list[int]]:
        source, lists = operation.text.partition(" : ")[0].split("[", 1)
        offsets, sizes, strides = (self._numbers(part) for part in re.findall(r"\[([^\]]*)\]", f"[{lists}"))
        return self._named(source)[0], offsets, sizes, strides

    # memref and bufferization

    def _memref_alloc(self, operation: Operation) -> list[Any]:
        kind = type_of(operation.text.rpartition(" : ")[2])
        return [MemRef.new(tuple(size for size in kind.shape if size is not None), kind.dtype)]

    def _memref_reinterpret_cast(self, operation: Operation) -> list[Any]:
        found = re.search(r"offset: \[(.*?)\], sizes: \[(.*?)\], strides: \[(.*?)\]", operation.text)
        assert found is not None
        source = self._named(operation.text[: found.start()])[0]
        (offset,), sizes, strides = (self._numbers(part) for part in found.groups())
        return [MemRef(source.base, offset, tuple(sizes), tuple(strides))]

    def _memref_subview(self, operation: Operation) -> list[Any]:
        source, offsets, sizes, strides = self._slice(operation)
        return [source.window(offsets, sizes, strides)]

    def _memref_load(self, operation: Operation) -> list[Any]:
        source, *index = self._named(operation.text.partition(" : ")[0])
        one = source.window([int(i) for i in index], [1] * len(index), [1] * len(index))
        return [one.load(operation.name).reshape(())]

    def _memref_copy(self, operation: Operation) -> None:
        source, into = self._named(operation.text.partition(" : ")[0])
        if source.sizes != into.sizes:
            raise Fault(f"a copy of {source.sizes} to {into.sizes}")
        into.store(source.load(operation.name), operation.name)

    def _bufferization_to_tensor(self, operation: Operation) -> list[Any]:
        return [self._named(operation.text.partition(" : ")[0])[0].load(operation.name)]

    def _bufferization_materialize_in_destination(self, operation: Operation) -> None:
        value, into = self._named(operation.text.partition(" : ")[0])
        if value.shape != into.sizes:
            raise Fault(f"a tensor of {value.shape} for {into.sizes}")
        into.store(value, operation.name)

    # linalg

    def _operands(self, operation: Operation) -> list[Any]:
        """Of ins(…) and outs(…), in this order."""
        lists = re.findall(r"(?:ins|outs)\(([^:]*) :", operation.text)
        return [value for part in lists for value in self._named(part)]

    def _linalg_fill(self, operation: Operation) -> list[Any]:
        value, into = self._operands(operation)
        if isinstance(into, MemRef):
            into.store(value, operation.name)
            return []
        return [np.full(into.shape, value, into.dtype)]

    def _linalg_broadcast(self, operation: Operation) -> list[Any]:
        source, into = self._operands(operation)
        return [np.broadcast_to(np.expand_dims(source, _axes(operation.text, "dimensions")), into.shape)]

    def _linalg_transpose(self, operation: Operation) -> list[Any]:
        source, into = self._operands(operation)
        turned = source.transpose(_axes(operation.text, "permutation"))
        assert turned.shape == into.shape
        return [turned]

    def _linalg_matmul(self, operation: Operation) -> list[Any]:
        return [operations.product(*self._operands(operation))]

    def _linalg_reduce(self, operation: Operation) -> list[Any]:
        source, start = self._operands(operation)
        (one, _) = operation.blocks[0].operations  # the operation, and the yield
        return [operations.reduced(one.name, source, start, _axes(operation.text, "dimensions"))]

    def _linalg_generic(self, operation: Operation) -> list[Any]:
        """Without inputs: a function of the place."""
        (into,) = self._operands(operation)
        block = operation.blocks[0]
        self._places = np.indices(into.shape)
        self._values[block.arguments[0]] = into
        return self.block(block)

    def _linalg_index(self, operation: Operation) -> list[Any]:
        return [self._places[int(operation.text.split()[0])]]


def _axes(text: str, what: str) -> tuple[int, ...]:
    found = re.search(rf"{what} = \[([\d, ]*)\]", text)
    assert found is not None
    return tuple(int(axis) for axis in found[1].split(","))


def _constant(text: str) -> np.ndarray:
    value, _, kind = text.strip().rpartition(" : ")
    if not value:  # true and false have no type
        return np.array(kind == "true")
    found = type_of(kind)
    shape = tuple(size for size in found.shape if size is not None)
    value = re.sub(r"dense<(.*)>", r"\1", value)
    if value.startswith("0x"):
        width = np.dtype(found.dtype).itemsize
        return np.full(shape, np.frombuffer(int(value, 16).to_bytes(width, "little"), found.dtype)[0])
    if value in ("true", "false"):
        return np.full(shape, value == "true")
    return np.full(shape, float(value) if "." in value or "e" in value else int(value), found.dtype)
