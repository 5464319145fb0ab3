"""The tests of kernels on the machine in place of Triton's interpreter: `LOWBIT_MACHINE=sm90 pytest tests/kernels/…`.

Tests that ask for another target, or for codes that this one does not have, are skipped.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from lowbit.kernels.compile_ascend import ascend_python

if TYPE_CHECKING:
    from machines.device import Driver


_REFUSALS = re.compile(
    r"multiplies (no fp8|e4m3fnuz and not)|expected codes that (sm|gfx|ascend)\w+ converts to"
    r"|expected an NVIDIA or AMD device"
)


def begin(name: str) -> Driver:
    """Before any test module is imported."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "0")
    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="lowbit-machine-"))
    from lowbit.kernels import targets

    if name == "ascend910b":
        from machines.ascend.device import device
    else:
        from machines.device import device

    target, pretending = targets.get_target(name), targets.pretending
    driver = device(target)
    targets._pretended = target

    @contextmanager
    def as_machine(other: targets.Target) -> Iterator[None]:
        if other.name != name:
            pytest.skip(f"the machine is {name}")
        with pretending(other):
            yield

    targets.pretending = as_machine
    return driver


@contextmanager
def refusals_skip() -> Iterator[None]:
    """Around a test that takes fp8 for granted."""
    try:
        yield
    except ValueError as error:
        if _REFUSALS.search(str(error)):
            pytest.skip(str(error))
        raise


ASCEND = pytest.param(
    "ascend910b", marks=pytest.mark.skipif(ascend_python() is None, reason="run `make ascend-env` first")
)


_ROOT = Path(__file__).parents[2]
CACHE = _ROOT / ".triton" / "machines"
"""Of what Triton compiled, under the keys of its sources. Its own: here a kernel's binary is text (see device.py)."""


def run_tests(file: Path, target: str) -> int:
    """The tests of a file, in a process of their own → how many launches the machine ran. None of them may fail."""
    changed = {"LOWBIT_MACHINE": target, "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(CACHE)}
    environment = os.environ | changed
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(file)],
        capture_output=True, text=True, env=environment, cwd=_ROOT, timeout=1200,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    launches = re.search(r"(\d+) launches, compiled", result.stdout)
    assert launches is not None, result.stdout[-400:]
    return int(launches[1])
