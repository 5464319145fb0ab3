"""Compiled kernels of many rows: large tiles, several for a program, TMA.

The tests of test_prefill.py, as test_compiled_operators.py runs those of few rows.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from machines.session import ASCEND, run_tests

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "target",
    ["sm80", "sm90", "sm100", "gfx950", ASCEND]
    + [pytest.param(name, marks=SLOW) for name in ("sm89", "sm120", "gfx942")],
)
def test_the_compiled_kernels_compute_what_the_reference_does(target):
    assert run_tests(Path(__file__).parent / "test_prefill.py", target) > 30
