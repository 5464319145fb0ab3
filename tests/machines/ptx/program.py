"""The text of a PTX kernel → instructions, registers and parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

WIDTHS = {"pred": 1, "b8": 8, "u8": 8, "s8": 8}
WIDTHS |= {f"{kind}{bits}": bits for kind in "busf" for bits in (16, 32, 64)} | {
    "bf16": 16,
    "bf16x2": 32,
    "f16x2": 32,
    "f32x2": 64,
}
SHARED_BASE = 0x400
"""Where on-chip memory begins, so that an address of 0 is none."""
PARAM_BASE = 0x0100_0000
"""Where the space of parameters begins."""


@dataclass(frozen=True)
class Register:
    slot: int
    negated: bool = False


@dataclass(frozen=True)
class Immediate:
    value: int
    """Bits, of any width: negative numbers are cut to the width where they are used."""


@dataclass(frozen=True)
class Special:
    name: str


@dataclass(frozen=True)
class Vector:
    items: tuple[Any, ...]


@dataclass(frozen=True)
class Memory:
    base: Any
    offset: int = 0
    coordinates: Vector | None = None


@dataclass(frozen=True)
class Sink:
    """`_`: the result is not wanted."""


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: tuple[Any, ...]
    guard: Register | None
    text: str

    @cached_property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.opcode.split("."))

    @cached_property
    def flow(self) -> str:
        """`branch`, `end` or `barrier` of one that threads part or meet at; nothing of any other."""
        if self.opcode.startswith("bra"):
            return "branch"
        if self.opcode in ("ret", "exit"):
            return "end"
        return "barrier" if self.opcode.startswith(("bar.sync", "barrier.sync")) else ""

    @cached_property
    def sources(self) -> tuple[tuple[Any, int], ...]:
        """Of one that computes lane by lane: what it reads, with the bits of each."""
        name, *parts = self.parts
        width = WIDTHS.get(self.parts[-1], 32)
        widths = [width] * (len(self.operands) - 1)
        if name in ("shl", "shr"):
            widths[1] = 32
        elif name == "bfe":
            widths[1:] = [32, 32]
        elif name == "mad" and "wide" in parts:
            widths[2] = 2 * width
        elif name == "selp":
            widths[2] = 1
        elif name in ("add", "sub", "fma") and self.parts[-2] == "f32":
            widths[-1] = 32
        return tuple(zip(self.operands[1:], widths, strict=True))

    @cached_property
    def slots(self) -> frozenset[int]:
        """Of all registers that it reads or writes."""
        return frozenset(_slots(self.operands))


def _slots(operands: Iterable[Any]) -> Iterator[int]:
    for operand in operands:
        if isinstance(operand, Register):
            yield operand.slot
        elif isinstance(operand, Vector):
            yield from _slots(operand.items)
        elif isinstance(operand, Memory):
            yield from _slots((operand.base, operand.coordinates))


@dataclass
class Program:
    name: str
    threads: int
    code: list[Instruction] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    """Bits of each register."""
    labels: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Name → (offset, bytes), as a launch lays them out."""

    @property
    def parameter_bytes(self) -> int:
        return sum(list(self.parameters.values())[-1])


_ENTRY = re.compile(r"\.visible \.entry (\w+)\(\s*(.*?)\)(.*?)\{\n(.*)\n\}", re.S)
_GUARD = re.compile(r"@(!?)(\S+)\s+(.*)", re.S)
_DECLARED = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.S)
_NUMBER = re.compile(r"-?(0x[0-9a-fA-F]+|\d+)U?$")


class _Parser:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.scopes: list[dict[str, int]] = [{}]
        self.blocks = 0
        self.label_scopes: list[str] = [""]

    def declare(self, kind: str, names: str) -> None:
        for name in names.split(","):
            many = re.fullmatch(r"\s*(\S+?)<(\d+)>\s*", name)
            each = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]
            for one in each:
                self.scopes[-1][one] = len(self.program.widths)
                self.program.widths.append(WIDTHS[kind])

    def operand(self, text: str) -> Any:
        text = text.strip()
        if text == "_":
            return Sink()
        if text.startswith("!"):
            return Register(self.operand(text[1:]).slot, negated=True)
        if text.startswith("{"):
            return Vector(tuple(self.operand(t) for t in _split(text[1:-1])))
        if text.startswith("["):
            first, *rest = _split(text[1:-1])
            base, _, offset = first.partition("+")
            where = self.operand(rest[0]) if rest else None
            return Memory(self.operand(base), int(offset or "0", 0), where)
        if "|" in text:
            return Vector(tuple(self.operand(t) for t in text.split("|")))
        for scope in reversed(self.scopes):
            if text in scope:
                return Register(scope[text])
        if text.startswith("%"):
            return Special(text)
        if text.startswith(("0f", "0F", "0d", "0D")):
            return Immediate(int(text[2:], 16))
        if _NUMBER.match(text):
            return Immediate(int(text.removesuffix("U"), 0))
        if text == "global_smem":
            return Immediate(SHARED_BASE)
        if text in self.program.parameters:
            return Immediate(PARAM_BASE + self.program.parameters[text][0])
        return text  # a label

    def statement(self, text: str) -> None:
        text = text.strip()
        if not text:
            return
        if declared := _DECLARED.match(text):
            self.declare(*declared.groups())
            return
        guard = None
        if found := _GUARD.match(text):
            guard = Register(self.operand(found[2]).slot, negated=bool(found[1]))
            text = found[3].strip()
        opcode, *rest = text.split(None, 1)
        operands = tuple(self.operand(o) for o in _split("".join(rest)))
        if opcode.startswith("bra"):
            operands = (self.label(str(operands[0])),)
        self.program.code.append(Instruction(opcode, operands, guard, text))

    def label(self, name: str) -> str:
        return name if name.startswith("$") else f"{name}@{self.label_scopes[-1]}"

    def parse(self, body: str) -> None:
        for piece in re.split(r"([;{}]|^\s*[$\w]+:)", _joined(body), flags=re.M):
            if piece == "{":
                self.blocks += 1
                self.scopes.append({})
                self.label_scopes.append(str(self.blocks))
            elif piece == "}":
                self.scopes.pop()
                self.label_scopes.pop()
            elif re.fullmatch(r"\s*[$\w]+:", piece):
                self.program.labels[self.label(piece.strip()[:-1])] = len(self.program.code)
            elif piece != ";":
                self.statement(piece)


def _joined(body: str) -> str:
    """Without comments; braces that enclose operands become round, so that those of blocks alone are left."""
    body = re.sub(r"//[^\n]*", "", body)
    body = re.sub(r"^\s*\.(?:loc|file|pragma)[^\n]*$", "", body, flags=re.M)
    return re.sub(r"(?<![\n;])(?<=[\w,\[. \t])\{([^{};\n]*)\}", r"⟨\1⟩", body)


def _split(text: str) -> list[str]:
    """At commas that no bracket encloses."""
    parts, depth, last = [], 0, ""
    for character in text.replace("⟨", "{").replace("⟩", "}"):
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append(last)
            last = ""
        else:
            last += character
    return [p for p in (*parts, last) if p.strip()]


def parse(ptx: str) -> Program:
    """The one kernel of a PTX file."""
    entry = _ENTRY.search(ptx)
    if entry is None:
        raise ValueError("expected a kernel (.visible .entry)")
    name, parameters, attributes, body = entry.groups()
    threads = re.search(r"\.(?:reqntid|maxntid) (\d+)", attributes)
    assert threads is not None, attributes
    program = Program(name, int(threads[1]))
    at = 0
    for line in filter(str.strip, parameters.split(",")):
        found = re.search(r"\.param (?:\.align (\d+) )?\.(\w+)(?: .*?)? ?(\w+_param_\d+)(?:\[(\d+)\])?", line)
        assert found is not None, line
        alignment, kind, parameter, count = found.groups()
        size = WIDTHS[kind] // 8 * int(count or 1)
        at += -at % int(alignment or size)
        program.parameters[parameter] = at, size
        at += size
    _Parser(program).parse(body)
    return program
