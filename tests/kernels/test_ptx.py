"""Kernels as Triton compiles them for NVIDIA, run instruction by instruction on the CPU (tests/ptx).

Operators of every scheme at decode and at prefill, in a process for each target: sm80 (mma), sm89 and sm120
(mma of fp8, TMA, mxfp8), sm90 (wgmma, TMA), sm100 (tcgen05 and its memory, TMA).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "target", ["sm80", pytest.param("sm89", marks=pytest.mark.slow), "sm90", "sm100", "sm120"]
)
@pytest.mark.parametrize("file", ["test_operators.py", "test_prefill.py"])
def test_the_compiled_kernels_compute_what_the_reference_does(target, file, tmp_path):
    environment = os.environ | {
        "LOWBIT_PTX": target,
        "OMP_NUM_THREADS": "1",
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(HERE / file)],
        capture_output=True, text=True, env=environment, cwd=HERE.parents[1], timeout=1200,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:]
    launches = re.search(r"(\d+) launches, compiled", result.stdout)
    assert launches is not None and int(launches[1]) > 30, result.stdout[-400:]
