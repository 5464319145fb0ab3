"""Launching a kernel. Of torch nothing is imported: compiling for Ascend does without it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .targets import on_device

_thread = threading.local()

Launched = tuple[Any, tuple[int, ...], list[Any]]
"""(compiled kernel, or None where it was interpreted; grid; arguments and constants, in the kernel's order)."""


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **constants: Any
) -> None:
    """Launch a jitted kernel on `device`; constants are its constexprs and Triton's options."""
    with on_device(device):
        compiled = kernel[grid](*arguments, **constants)
    noted = getattr(_thread, "noted", None)
    if noted is not None:
        names = kernel.arg_names[len(arguments) :]
        noted.append((compiled, grid, [*arguments, *(constants[name] for name in names)]))


@contextmanager
def noting() -> Iterator[list[Launched]]:
    """Within, this thread's launches go into the list too."""
    launches: list[Launched] = []
    _thread.noted = launches
    try:
        yield launches
    finally:
        _thread.noted = None
