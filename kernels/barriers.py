"""What AMD's assembly does to on-chip memory before a barrier without waiting for it.

A barrier lets waves go on, and nothing else: what a wave has begun to write or read on-chip has happened only once the
wave has waited for it (`s_waitcnt lgkmcnt(0)`), and other waves' requests may pass it (LLVM's "User Guide for AMDGPU
Backend", memory model of gfx942). The compiler puts the wait there. On gfx950 LLVM, as of Triton 3.9, leaves it out at
the head of a loop that also waits for copies from memory onto the chip; `launch.py` chooses no such loop.
"""

from __future__ import annotations

import re

from .inner_loop import AMDGCN, LABEL

_TOUCHES = re.compile(r"ds_(read|write)")


def unawaited(assembly: str) -> list[str]:
    """On-chip loads and stores that may still be under way at a barrier, as `ds_write_b16 v2, v15`; best none.

    assembly: AMD's .amdgcn of one kernel. Along every path; counted are loads and stores alone, since scalar loads,
    which have the same counter, end in any order: a wait for all but n of them ends the n-th last and those before.
    """
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        if label := LABEL.match(line):
            labels[label.group(1)] = len(code)
        elif found := AMDGCN.match(line):
            code.append((found.group(1), found.group(2).partition(";")[0].strip()))
    after: dict[int, dict[int, int]] = {0: {}}
    """Before each instruction: of each that is under way, the fewest others that followed it on any path."""
    work, found_at_barriers = [0], set()
    while work:
        at = work.pop()
        if at >= len(code):
            continue
        name, rest = code[at]
        now = dict(after[at])
        if name == "s_barrier":
            found_at_barriers.update(now)
        elif name.startswith("ds_"):
            now = {i: count + 1 for i, count in now.items()}
            if _TOUCHES.match(name):
                now[at] = 0
        elif name == "s_waitcnt" and (wait := re.search(r"lgkmcnt\((\d+)\)", rest)):
            now = {i: count for i, count in now.items() if count < int(wait.group(1))}
        for to in _next(name, rest, at, labels):
            before = after.get(to)
            counts = (now, before or {})
            merged = {i: min(c[i] for c in counts if i in c) for i in set().union(*counts)}
            if merged != before:
                after[to] = merged
                work.append(to)
    return [" ".join(code[i]) for i in sorted(found_at_barriers)]


def _next(name: str, rest: str, at: int, labels: dict[str, int]) -> list[int]:
    if name == "s_endpgm":
        return []
    if name == "s_branch":
        return [labels[rest]]
    return [at + 1, labels[rest]] if name.startswith("s_cbranch") else [at + 1]
