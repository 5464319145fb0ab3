"""Runs what Triton compiles for NVIDIA, its PTX: a whole program (CTA) in lockstep, a lane per thread.

    program.py         text of a kernel → instructions, registers, parameters
    arithmetic.py      what each lane computes by itself, or from the lanes of its warp
    matrix.py          ldmatrix, stmatrix, mma, wgmma
    tensor_memory.py   sm100's, and its products
    transfer.py        copies that end later: cp.async, TMA, mbarriers
    threads.py         a CTA's threads: registers, masks, branches, barriers
    machine.py         a CTA, and a whole launch

Written after NVIDIA's "Parallel Thread Execution ISA".
"""

from .machine import Machine
from .program import Program, parse

__all__ = ["Machine", "Program", "parse"]
