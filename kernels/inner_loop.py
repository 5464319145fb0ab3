"""How many instructions a kernel's innermost loop takes, and how many of them multiply matrices.

What the matrix unit waits for is what else the loop issues: addresses, masks, conversions. That can
be counted in the machine code, on no accelerator.
"""

from __future__ import annotations

import re
import subprocess
import tempfile

_MATRIX = re.compile(r"(?:[IHQ]G?MMA|UTC[IHQO]MMA|v_s?mfma_)")
_SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)([^;]*)")
_AMDGCN = re.compile(r"^\t([a-z]\w+)(.*)")
_LABEL = re.compile(r"^(\.L\w+):")
_JUMP = re.compile(r"(?:BRA|s_c?branch)")


def inner_loop(assembly: str) -> tuple[int, int] | None:
    """(matrix instructions, all instructions) of the shortest loop that multiplies matrices, or None.

    assembly: what nvdisasm prints, or AMD's .amdgcn. A loop reaches from a label to a jump back to it.
    """
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    shortest: tuple[int, int] | None = None
    for line in assembly.splitlines():
        if label := _LABEL.match(line):
            labels[label.group(1)] = len(instructions)
            continue
        instruction = _SASS.match(line) or _AMDGCN.match(line)
        if instruction is None:
            continue
        name, rest = instruction.groups()
        instructions.append((name, rest))
        target = re.search(r"\.L\w+", rest) if _JUMP.match(name) else None
        if target is None or target.group() not in labels:
            continue
        body = instructions[labels[target.group()] :]
        matrix = sum(_MATRIX.match(n) is not None for n, _ in body)
        if matrix and (shortest is None or len(body) < shortest[1]):
            shortest = matrix, len(body)
    return shortest


def disassemble(cubin: bytes) -> str:
    """What nvdisasm, which Triton brings, prints of a cubin."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        call = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(call, check=True, capture_output=True, text=True).stdout
