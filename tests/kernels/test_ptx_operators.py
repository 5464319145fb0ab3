"""Compiled kernels of few rows: operators of every scheme, experts, whole mixtures.

The tests of test_operators.py, with kernels as Triton compiles them for NVIDIA, run instruction by instruction on the
CPU (tests/ptx), in a process for each target: sm80 (mma), sm89 and sm120 (mma of fp8, TMA, mxfp8), sm90 (wgmma, TMA),
sm100 (tcgen05 and its memory, TMA).
"""

from __future__ import annotations

from pathlib import Path

import pytest
from machines.session import run_tests

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "target", ["sm80", pytest.param("sm89", marks=SLOW), "sm90", "sm100", pytest.param("sm120", marks=SLOW)]
)
def test_the_compiled_kernels_compute_what_the_reference_does(target, tmp_path):
    assert run_tests(Path(__file__).parent / "test_operators.py", target, tmp_path) > 30
