"""Runs compiled kernels on the CPU, instruction by instruction: machines in Python for what Triton compiles.

    ptx/          for NVIDIA: PTX of sm80 to sm120
    amdgcn/       for AMD: assembly of gfx942 and gfx950
    ascend/       for Ascend 910B: HIVM, which CANN's last step would take; needs the venv of `make ascend-env`
    numbers.py    bits and the numbers that they are
    memory.py     global and on-chip memory, with the checks that a device makes, and some that it does not
    device.py     Triton's driver: launches kernels on CPU tensors
    session.py    the tests of kernels, run so

They are no models of speed. What they find that Triton's interpreter cannot: addresses that a vector load or a
descriptor does not take, elements read outside of a tensor, layouts of operands, loads and copies that nothing waits
for, on-chip memory that two warps touch without a barrier between them.
"""
