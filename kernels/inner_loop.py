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
AMDGCN = re.compile(r"^\t([a-z]\w+)(.*)")
LABEL = re.compile(r"^(\.L\w+):")
_JUMP = re.compile(r"(?:BRA|s_c?branch)")


def inner_loop(assembly: str) -> tuple[int, int] | None:
    """(matrix instructions, all instructions) of the shortest loop that multiplies matrices, or None.

    assembly: what nvdisasm prints, or AMD's .amdgcn. A loop reaches from a label to a jump back to it.
    What a jump ahead within the loop leaves out is not counted: where the loops over tiles and over K are
    one, a tile's beginning and end.
    """
    multiplies: list[bool] = []  # for each instruction
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    shortest: tuple[int, int] | None = None
    for line in assembly.splitlines():
        if label := LABEL.match(line):
            labels[label.group(1)] = len(multiplies)
            continue
        instruction = _SASS.match(line) or AMDGCN.match(line)
        if instruction is None:
            continue
        name, rest = instruction.groups()
        multiplies.append(_MATRIX.match(name) is not None)
        target = re.search(r"\.L\w+", rest) if _JUMP.match(name) else None
        if target is None:
            continue
        start = labels.get(target.group())
        if start is None:
            jumps.append((len(multiplies), target.group()))
            continue
        skipped = (range(first, labels.get(label, 0)) for first, label in jumps if first > start)
        left_out = {i for gap in skipped if not any(multiplies[i] for i in gap) for i in gap}
        body = [i for i in range(start, len(multiplies)) if i not in left_out]
        matrix = sum(multiplies[i] for i in body)
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
