"""The text of HIVM, as bishengir-compile leaves it → functions, operations, affine maps and types."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache

import ml_dtypes
import numpy as np

from ..numbers import Unknown

DTYPES: dict[str, type] = {
    "i1": np.bool_, "i8": np.int8, "i16": np.int16, "i32": np.int32, "i64": np.int64, "index": np.int64,
    "f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32,
}  # fmt: skip
_LINE = re.compile(r"(?:(?P<results>%[\w#:, %-]+) = )?(?P<name>[a-z]\w*\.?[\w.]*)(?P<text>.*)", re.DOTALL)
_TYPE = re.compile(r"(?:memref<)?((?:(?:\d+|\?)x)*)([a-z]+\d*)")
_MAP = re.compile(r"(#map\d*) = affine_map<\(([^)]*)\)(?:\[([^\]]*)\])? -> \((.*)\)>")
_FUNCTION = re.compile(r"func\.func @(\w+)\((.*?)\)(?: -> \w+)? attributes")


@dataclass
class Operation:
    results: list[str]
    """Names; of several results `%1#0`, `%1#1`."""
    name: str
    text: str
    """All between the name and the first region, types included."""
    blocks: list[list[Operation]] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.name}{self.text}"


@dataclass(frozen=True)
class Type:
    dtype: type
    shape: tuple[int | None, ...]
    """None: known when it runs. Of a scalar: ()."""
    space: str | None = None
    """`gm`, `ub`, `cbuf` or `cc`."""


@cache
def type_of(text: str) -> Type:
    """`memref<4x?xf32, strided<[?, 1], offset: ?>, #hivm.address_space<ub>>` or a scalar type."""
    found = _TYPE.match(text.strip())
    if found is None or found[2] not in DTYPES:
        raise Unknown(f"the type {text}")
    sizes = tuple(None if size == "?" else int(size) for size in found[1].split("x")[:-1])
    space = re.search(r"address_space<(\w+)>", text)
    return Type(DTYPES[found[2]], sizes, space and space[1])


@dataclass
class Function:
    name: str
    parameters: list[tuple[str, str]]
    """(name, type) of each."""
    body: list[Operation]


@dataclass
class Program:
    functions: dict[str, Function]
    maps: dict[str, Callable[[list[int]], list[int]]]
    """Name → dimensions and symbols → the results."""

    @property
    def name(self) -> str:
        return (
            next(n for n in self.functions if "_infer_" not in n)
            .removesuffix("_mix_aic")
            .removesuffix("_mix_aiv")
        )


def parse(text: str) -> Program:
    functions, maps = {}, {}
    lines = iter([line.strip() for line in text.splitlines() if line.strip()])
    for line in lines:
        if found := _MAP.match(line):
            maps[found[1]] = _map(f"{found[2]}, {found[3] or ''}", found[4])
        elif (found := _FUNCTION.match(line)) and "func.func private" not in line:
            body, _ = _block(lines)
            listed = re.findall(r"(%\w+): (memref<[^>]*>|\w+)", found[2])
            functions[found[1]] = Function(found[1], listed, body)
    if not functions:
        raise Unknown("a module without a function")
    return Program(functions, maps)


def _map(names: str, results: str) -> Callable[[list[int]], list[int]]:
    arguments = [name.strip() for name in names.split(",") if name.strip()]
    source = results.replace("floordiv", "//").replace("mod", "%")
    # a ceildiv b = −(−a // b): the operand before it is all in its parentheses.
    while "ceildiv" in source:
        before, _, after = source.partition(" ceildiv ")
        start = _opening(before)
        source = f"{before[:start]}-(-({before[start:]}) // {after[: (end := _operand(after))]}){after[end:]}"
    made = eval(f"lambda {', '.join(arguments)}: [{source}]", {})
    return lambda values: made(*values)


def _opening(text: str) -> int:
    """Where the last operand of `text` begins."""
    if not text.endswith(")"):
        return text.rfind(" ") + 1
    depth = 0
    for at in range(len(text) - 1, -1, -1):
        depth += (text[at] == ")") - (text[at] == "(")
        if depth == 0:
            return at
    raise Unknown(f"the map {text}")


def _operand(text: str) -> int:
    found = re.match(r"\w+", text)
    assert found is not None
    return found.end()


def _block(lines: Iterator[str]) -> tuple[list[Operation], str]:
    """Operations up to the line that closes the region, and that line."""
    block: list[Operation] = []
    for line in lines:
        if line.startswith("}"):
            return block, line
        block.append(_operation(line, lines))
    raise Unknown("a region that does not end")


def _operation(line: str, lines: Iterator[str]) -> Operation:
    opens = line.endswith("{")
    found = _LINE.fullmatch(line.removesuffix("{").strip())
    if found is None:
        raise Unknown(f"the line {line}")
    made = Operation(list(_results(found["results"] or "")), found["name"], found["text"])
    while opens:
        block, end = _block(lines)
        made.blocks.append(block)
        opens = end.endswith("{")
    return made


def _results(text: str) -> Iterator[str]:
    for name in filter(None, text.split(", ")):
        base, _, count = name.partition(":")
        yield from [f"{base}#{i}" for i in range(int(count))] if count else [base]
