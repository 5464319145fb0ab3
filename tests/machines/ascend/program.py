"""The text of triton-ascend's linalg → operations, blocks and types."""

from __future__ import annotations

import re
from collections.abc import Iterator
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
_TYPE = re.compile(r"(?:(tensor|memref)<)?((?:(?:\d+|\?)x)*)([a-z]+\d*)")


@dataclass
class Block:
    arguments: list[str] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)


@dataclass
class Operation:
    results: list[str]
    """Names; of several results `%1#0`, `%1#1`."""
    name: str
    text: str
    """All between the name and the first region, types included."""
    blocks: list[Block] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.name}{self.text}"


@dataclass(frozen=True)
class Type:
    dtype: type
    shape: tuple[int | None, ...]
    """None: known when it runs. Of a scalar: ()."""


@cache
def type_of(text: str) -> Type:
    """`tensor<4x?xf32>`, `memref<…>` or a scalar type; of a list of types the first."""
    found = _TYPE.match(text.strip())
    if found is None or found[3] not in DTYPES:
        raise Unknown(f"the type {text}")
    sizes = tuple(None if size == "?" else int(size) for size in found[2].split("x")[:-1])
    return Type(DTYPES[found[3]], sizes)


@dataclass
class Program:
    name: str
    parameters: list[tuple[str, str]]
    """(name, type) of each."""
    body: Block


def parse(text: str) -> Program:
    """The one function of a module."""
    lines = iter([line.strip() for line in text.splitlines() if line.strip()])
    for line in lines:
        found = re.match(r"func\.func @(\w+)\((.*)\) attributes|func\.func @(\w+)\((.*)\) \{", line)
        if found is None:
            continue
        listed = re.findall(r"(%\w+): ((?:memref|tensor)<[^>]*>|\w+)", found[2] or found[4])
        return Program(found[1] or found[3], listed, _block(lines, [])[0])
    raise Unknown("a module without a function")


def _block(lines: Iterator[str], arguments: list[str]) -> tuple[Block, str]:
    """Operations up to the line that closes the region, and that line."""
    block = Block(arguments)
    for line in lines:
        if line.startswith("}"):
            return block, line
        if line.startswith("^"):
            block.arguments = re.findall(r"(%[\w-]+):", line)
            continue
        if line.startswith("("):  # the region of the linalg.reduce before
            block.operations[-1].blocks.append(_block(lines, re.findall(r"(%[\w-]+):", line))[0])
            continue
        block.operations.append(_operation(line, lines))
    raise Unknown("a region that does not end")


def _operation(line: str, lines: Iterator[str]) -> Operation:
    opens = line.endswith("{")
    found = _LINE.fullmatch(line.removesuffix("{").strip())
    if found is None:
        raise Unknown(f"the line {line}")
    made = Operation(list(_results(found["results"] or "")), found["name"], found["text"])
    while opens:
        block, end = _block(lines, [])
        made.blocks.append(block)
        opens = end.endswith("{")
        if not opens and "->" in end:
            made.text += end.removeprefix("}")
    return made


def _results(text: str) -> Iterator[str]:
    for name in filter(None, text.split(", ")):
        base, _, count = name.partition(":")
        yield from [f"{base}#{i}" for i in range(int(count))] if count else [base]
