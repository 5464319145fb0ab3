"""Runs what Triton compiles for AMD, the assembly of CDNA 3 and 4: all waves of a program (workgroup) in lockstep.

    program.py    text of a kernel → instructions, parameters, what the first registers hold
    scalar.py     what a wave computes once
    vector.py     what each lane computes
    matrix.py     v_mfma
    waves.py      a workgroup's waves: registers, masks, branches, barriers, and s_waitcnt
    vector_unit.py, memory_unit.py    their instructions
    machine.py    a workgroup, and a whole launch

Written after AMD's "Instinct MI300" and "CDNA4" instruction set architecture guides and LLVM's "User Guide for AMDGPU
Backend".
"""

from .machine import Machine
from .program import Program, parse

__all__ = ["Machine", "Program", "parse"]
