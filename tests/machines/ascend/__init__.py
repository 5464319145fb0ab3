"""For Ascend 910B: HIVM, as triton-ascend and bishengir-compile make it of a kernel."""
