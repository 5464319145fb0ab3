"""The assembly of an AMD kernel → instructions, labels, parameters and what a wave finds in its first registers."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from functools import cache, cached_property

from ..numbers import Unknown

_FILES = {"v": 0, "a": 256, "s": 0}
_NAMED = {"vcc": (106, 2), "vcc_lo": (106, 1), "vcc_hi": (107, 1), "m0": (124, 1)}
_NAMED |= {"exec": (126, 2), "exec_lo": (126, 1), "exec_hi": (127, 1)}
VCC, M0, EXEC = 106, 124, 126
SCALARS = 128
VECTORS = 512
"""v0 to v255, then a0 to a255."""


@dataclass(frozen=True)
class Register:
    vector: bool
    first: int
    count: int = 1

    @property
    def slots(self) -> range:
        """Numbers of all that it covers: scalar ones follow the vectors'."""
        start = self.first + (0 if self.vector else VECTORS)
        return range(start, start + self.count)


@dataclass(frozen=True)
class Immediate:
    """bits: of an integer, cut to 64. of_float: of a number that was written as one, as float32's bits."""

    bits: int
    of_float: bool = False


@dataclass(frozen=True)
class Source:
    """What an instruction does to an operand first."""

    of: Register | Immediate | None
    negated: bool = False
    absolute: bool = False
    extended: bool = False
    """sext(…), of a part."""


Operand = Source | str


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: tuple[Operand, ...]
    options: dict[str, str]
    """offset:16 → {"offset": "16"}; offen → {"offen": ""}."""
    text: str

    @cached_property
    def slots(self) -> frozenset[int]:
        """Of all registers that it names."""
        found: set[int] = set()
        for operand in self.operands:
            if isinstance(operand, Source) and isinstance(operand.of, Register):
                found.update(operand.of.slots)
        return frozenset(found)

    @cached_property
    def unit(self) -> tuple[str, str]:
        """What its name begins with, and the rest of it."""
        kind, _, name = self.opcode.partition("_")
        return kind, name

    @cached_property
    def flow(self) -> str:
        """`branch`, `end` or `barrier` of one that waves part or meet at; nothing of any other."""
        if self.opcode.startswith(("s_branch", "s_cbranch")):
            return "branch"
        return {"s_endpgm": "end", "s_barrier": "barrier"}.get(self.opcode, "")

    @cached_property
    def plain(self) -> bool:
        """Whether all operands are taken as they are."""
        return not self.options and not any(
            isinstance(o, str) or o.negated or o.absolute or o.extended for o in self.operands
        )

    def register(self, index: int) -> Register:
        operand = self.operands[index]
        if not isinstance(operand, Source) or not isinstance(operand.of, Register):
            raise Unknown(f"{self.text}: operand {index} is no register")
        return operand.of

    def number(self, option: str, missing: int = 0) -> int:
        return int(self.options[option], 0) if option in self.options else missing

    def flags(self, option: str, count: int, missing: int) -> list[int]:
        """op_sel:[0,1] and the like."""
        if option not in self.options:
            return [missing] * count
        flags = [int(f) for f in self.options[option].strip("[]").split(",")]
        return flags + [missing] * (count - len(flags))


@dataclass
class Program:
    name: str
    target: str
    threads: int
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Name → (offset, bytes), as a launch lays them out."""
    hidden: dict[str, tuple[int, int]] = field(default_factory=dict)
    """What a launch adds."""
    parameter_bytes: int = 0
    kernarg: int = 0
    """The scalar register with the address of the parameters (a pair)."""
    groups: tuple[int | None, ...] = (None, None, None)
    """The scalar registers with the program's number along x, y and z."""


_OPERAND_REGISTER = re.compile(r"([vas])(?:(\d+)|\[(\d+):(\d+)\])$")
_OPTIONS = frozenset(["offen", "lds", "nt", "sc0", "sc1", "row_half_mirror", "row_mirror"])
_RANGE = re.compile(r"\W*[vas]\[")
_INTEGER = re.compile(r"-?(0x[0-9a-f]+|\d+)$")
_FLOAT = re.compile(r"-?\d+\.\d+(e[+-]?\d+)?$")


DPP = ("quad_perm", "row_half_mirror", "row_mirror", "row_ror", "row_shr", "row_shl", "row_bcast")
"""How lanes exchange."""
_KNOWN = (
    (r"s_waitcnt", "vmcnt lgkmcnt expcnt"),
    (r"buffer_", "offen offset lds nt sc0 sc1"),
    (r"global_", "offset nt sc0 sc1"),
    (r"s_load_", "offset"),
    (r"ds_", "offset offset0 offset1"),
    (r"v_mfma_scale_", "op_sel op_sel_hi"),
    (r"v_pk_mov_b32", "op_sel"),
    (r"v_pk_\w+_f32", "op_sel op_sel_hi neg_lo neg_hi"),
    (r"v_pk_|v_fma_mix", "op_sel op_sel_hi"),
    (r"v_cvt_(scalef32_)?pk_(fp8_f32|b?f16_fp8)", "op_sel"),
    (r"v_bitop3", "bitop3"),
    (r"v_\w+_sdwa", "dst_sel dst_unused src0_sel src1_sel"),
    (r"v_\w+_dpp", f"{' '.join(DPP)} row_mask bank_mask bound_ctrl"),
)
"""What the machine takes into account, by the opcode's beginning: any other option is unknown."""


@cache
def _known_options(opcode: str) -> frozenset[str]:
    return frozenset(next((names for begin, names in _KNOWN if re.match(begin, opcode)), "").split())


def _check_options(instruction: Instruction) -> None:
    if unknown := instruction.options.keys() - _known_options(instruction.opcode):
        raise Unknown(f"{', '.join(sorted(unknown))} in {instruction.text!r}")


@cache
def _operand(text: str) -> Operand:
    negated = absolute = extended = False
    if found := re.fullmatch(r"sext\((.*)\)", text):
        text, extended = found[1], True
    if found := re.fullmatch(r"neg\((.*)\)", text):
        text, negated = found[1], True
    if text.startswith("-") and not text[1:2].isdigit():
        text, negated = text[1:], True
    if text.startswith("|"):
        text, absolute = text.strip("|"), True
    if found := _OPERAND_REGISTER.match(text):
        kind, one, low, high = found.groups()
        first, last = int(one or low), int(one or high)
        of = Register(kind != "s", _FILES[kind] + first, last - first + 1)
        return Source(of, negated, absolute, extended)
    if text in _NAMED:
        return Source(Register(False, *_NAMED[text]), negated, absolute, extended)
    if text == "off":
        return Source(None)
    if _INTEGER.match(text):
        return Source(Immediate(int(text, 0) & (1 << 64) - 1), negated, absolute, extended)
    if _FLOAT.match(text):
        bits = struct.unpack("<I", struct.pack("<f", float(text)))[0]
        return Source(Immediate(bits, of_float=True), negated, absolute, extended)
    return text


def _split(text: str) -> list[str]:
    """At commas that no bracket encloses."""
    return [part.strip() for part in re.split(r",(?![^\[(]*[\])])", text) if part.strip()]


def _instruction(line: str) -> Instruction:
    opcode, _, rest = line.partition(" ")
    if opcode == "s_waitcnt":
        return Instruction(opcode, (), dict(re.findall(r"(\w+)\((\d+)\)", rest)), line)
    if opcode == "s_setreg_imm32_b32":
        return Instruction(opcode, (rest,), {}, line)
    operands: list[Operand] = []
    options: dict[str, str] = {}
    for part in _split(rest):
        words = part.split()
        first = words[0]
        if first not in _OPTIONS and (":" not in first or _RANGE.match(first)):
            operands.append(_operand(words.pop(0)))
        for word in words:
            name, _, value = word.partition(":")
            options[name] = value
    return Instruction(opcode, tuple(operands), options, line)


def parse(text: str) -> Program:
    """The one kernel of an assembly file, as LLVM writes it."""
    kernel = re.search(r"\.amdhsa_kernel (\w+)\n(.*?)\.end_amdhsa_kernel", text, re.S)
    target = re.search(r"\.amdgcn_target \"[^\"]*-(gfx\w+)\"", text)
    threads = re.search(r"\.max_flat_workgroup_size: (\d+)", text)
    if kernel is None or target is None or threads is None:
        raise ValueError("expected the assembly of a kernel for AMD (.amdhsa_kernel, .amdgcn_target)")
    program = Program(kernel[1], target[1], int(threads[1]))
    about = {name: int(value) for name, value in re.findall(r"\.amdhsa_(\w+) (\d+)$", kernel[2], re.M)}
    _first_registers(program, about)
    _parameters(program, text)
    body = text[text.index(f"\n{program.name}:") : text.index("\n.Lfunc_end0:")]
    for line in body.splitlines():
        line = line.split(";")[0].strip()
        if found := re.fullmatch(r"(\.?\w+):", line):
            program.labels[found[1]] = len(program.code)
        elif line and not line.startswith("."):
            program.code.append(_instruction(re.sub(r"\s+", " ", line)))
            _check_options(program.code[-1])
    return program


_USER = (
    ("private_segment_buffer", 4), ("dispatch_ptr", 2), ("queue_ptr", 2), ("kernarg_segment_ptr", 2),
    ("dispatch_id", 2), ("flat_scratch_init", 2), ("private_segment_size", 1),
)  # fmt: skip


def _first_registers(program: Program, about: dict[str, int]) -> None:
    """Which registers a launch fills: the user's, in this order, then the number of the program."""
    at = 0
    for name, count in _USER:
        if about.get(f"user_sgpr_{name}"):
            if name == "kernarg_segment_ptr":
                program.kernarg = at
            at += count
    if about["private_segment_fixed_size"] or about.get("uses_dynamic_stack"):
        raise Unknown("registers that are spilled to memory")
    # Parameters that a launch puts into registers: the code loads them itself where firmware does not.
    at = about["user_sgpr_count"]
    groups: list[int | None] = []
    for axis in "xyz":
        taken = about[f"system_sgpr_workgroup_id_{axis}"]
        groups.append(at if taken else None)
        at += taken
    program.groups = tuple(groups)


def _parameters(program: Program, text: str) -> None:
    arguments = re.search(r"\.args:\n(.*?)\n    \.group_segment", text, re.S)
    assert arguments is not None
    for number, entry in enumerate(re.split(r"^      - ", arguments[1], flags=re.M)[1:]):
        about = dict(re.findall(r"\.(\w+):\s+(\S+)", entry))
        place = int(about["offset"]), int(about["size"])
        kind = about["value_kind"]
        if kind.startswith("hidden_"):
            program.hidden[kind.removeprefix("hidden_")] = place
        else:
            program.parameters[str(number)] = place
    size = re.search(r"\.kernarg_segment_size: (\d+)", text)
    assert size is not None
    program.parameter_bytes = int(size[1])
