"""Compiled kernels of few rows: operators of every scheme, experts, whole mixtures.

The tests of test_operators.py, with kernels as Triton compiles them, run instruction by instruction on the CPU
(tests/machines), in a process for each target: sm80 (mma), sm89 and sm120 (mma of fp8, TMA, mxfp8), sm90 (wgmma, TMA),
sm100 (tcgen05 and its memory, TMA), gfx942 (MFMA, e4m3fnuz), gfx950 (MFMA of mxfp8, copies onto the chip), and Ascend
910B (HIVM: cube and vector cores and the flags between them).
"""

from __future__ import annotations

from pathlib import Path

import pytest
from machines.session import ASCEND, run_tests

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "target",
    ["sm80", "sm90", "sm100", "gfx942", "gfx950", ASCEND]
    + [pytest.param(name, marks=SLOW) for name in ("sm89", "sm120")],
)
def test_the_compiled_kernels_compute_what_the_reference_does(target):
    assert run_tests(Path(__file__).parent / "test_operators.py", target) > 30


@pytest.mark.slow
@pytest.mark.parametrize("target", [ASCEND])
@pytest.mark.parametrize("file", ["quantize", "fused", "matmul", "matmul_grouped", "matmul_inner"])
def test_each_kernel_alone(file, target):
    """Ascend's compiler makes other programs of other shapes, and takes not all."""
    assert run_tests(Path(__file__).parent / f"test_{file}.py", target) > 10
