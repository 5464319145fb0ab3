"""Implementations of the CPU path that this machine can run, and random operands."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lowbit.ops import cpu, cpu_isa, dispatch

ISAS = cpu_isa.available()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _pin(name: str, monkeypatch) -> Iterator[str]:
    monkeypatch.setenv("LOWBIT_CPU_ISA", name)
    cpu.instructions.cache_clear()
    dispatch.choose_cpu.cache_clear()
    assert cpu.instructions().name == name
    yield name
    monkeypatch.undo()
    cpu.instructions.cache_clear()
    dispatch.choose_cpu.cache_clear()


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch) -> Iterator[str]:
    """Each instruction set in turn, pinned."""
    yield from _pin(request.param, monkeypatch)


# Those between these differ in integer tiles only.
PATHS = dict.fromkeys((ISAS[0], *(name for name in ISAS if name in ("avx512_vnni", "avx2", "portable"))))


@pytest.fixture(params=list(PATHS))
def path(request, monkeypatch) -> Iterator[str]:
    """The best instruction set, AVX-512, AVX2 and none."""
    yield from _pin(request.param, monkeypatch)
