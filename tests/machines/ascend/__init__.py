"""For Ascend 910B: linalg, as triton-ascend makes it of a kernel."""
