"""Runs what Triton compiles for NVIDIA, its PTX, on the CPU: a whole program (CTA) in lockstep, a lane per thread.

    program.py         text of a kernel → instructions, registers, parameters
    arithmetic.py      what each lane computes by itself, or from the lanes of its warp
    memory.py          global and on-chip memory, with the checks that a device makes, and some that it does not
    matrix.py          ldmatrix, stmatrix, mma, wgmma
    tensor_memory.py   sm100's, and its products
    transfer.py        copies that end later: cp.async, TMA, mbarriers
    threads.py         a CTA's threads: registers, masks, branches, barriers
    machine.py         a CTA, and a whole launch
    device.py          Triton's driver: launches kernels on CPU tensors
    session.py         the tests of kernels, run so

Written after NVIDIA's "Parallel Thread Execution ISA". It is no model of speed. What it finds that Triton's interpreter
cannot: addresses that a vector load or a descriptor does not take, elements read outside of a tensor, layouts of
operands, copies that nothing waits for, on-chip memory that two warps touch without a barrier between them.
"""
