"""The tests of kernels on the machine in place of Triton's interpreter: `LOWBIT_PTX=sm90 pytest tests/kernels/…`.

Tests that ask for another target, or for codes that this one does not have, are skipped.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ptx.device import Driver


def begin(name: str) -> Driver:
    """Before any test module is imported."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "0")
    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="lowbit-ptx-"))
    from lowbit.kernels import targets

    from ptx.device import device

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
        if "multiplies no fp8" in str(error) or "expected codes that sm" in str(error):
            pytest.skip(str(error))
        raise
