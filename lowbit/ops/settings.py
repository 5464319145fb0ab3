"""What may run when no kernel takes a problem, and which implementation is asked for."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Literal

Implementation = Literal["triton", "cpu", "reference"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("triton", "cpu", "reference")

_log = logging.getLogger("lowbit.ops")


class NoKernelError(RuntimeError):
    """No kernel takes this problem, and falling back was made an error."""


@dataclass
class _Settings:
    fallback: bool
    float64_sums: bool
    fast_accumulation: bool
    implementation: Implementation | None


def _from_environment() -> _Settings:
    return _Settings(
        fallback=not _switched_on("LOWBIT_NO_FALLBACK"),
        float64_sums=_switched_on("LOWBIT_FLOAT64_SUMS"),
        fast_accumulation=_switched_on("LOWBIT_FAST_ACCUMULATION"),
        implementation=None,
    )


def _switched_on(variable: str) -> bool:
    return os.environ.get(variable, "0").strip().lower() not in ("", "0", "false", "no", "off")


settings = _from_environment()


def allow_fallback(allowed: bool) -> None:
    """Whether a problem that no kernel takes may run as dequantize-and-multiply.

    True (the default unless LOWBIT_NO_FALLBACK=1 is set): it does, and says so once per
    reason in the log of `lowbit.ops`. False: it raises NoKernelError.
    """
    settings.fallback = allowed


def use_float64_sums(wanted: bool) -> None:
    """Whether products of fp8 codes, weight-only products and those with bfloat16 weights sum in float64 on the CPU.

    False (the default unless LOWBIT_FLOAT64_SUMS=1 is set): in float32, as fast as the CPU can, in an order
    that depends on its instructions. True: in float64, rounded once. Of fp8 codes the sums are then exact (for
    K up to 2¹⁷) and the same bits on every CPU, as int8's always are; of floats, as good as exact. It takes
    about twice the time, and up to four times where the CPU has bfloat16 instructions (benchmarks/cpu.md).
    """
    settings.float64_sums = wanted


def use_fast_accumulation(wanted: bool) -> None:
    """Whether sums of fp8 products may stay in Hopper's matrix unit (H100, H20), which keeps about 14 bits of them.

    False (the default unless LOWBIT_FAST_ACCUMULATION=1 is set): they move to a float32 accumulator after every
    128 of K, as DeepSeek-V3 does. True: they stay, which leaves room for wider tiles; it is
    `torch._scaled_mm`'s `use_fast_accum`. int8, weights in blocks and other chips do not differ.
    """
    settings.fast_accumulation = wanted


@contextmanager
def use_implementation(name: Implementation) -> Iterator[None]:
    """Within the block every operation runs as `triton`, `cpu` or `reference`, whatever the device.

    For tests and for finding faults; `triton` on CPU tensors needs TRITON_INTERPRET=1.
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"expected one of {', '.join(IMPLEMENTATIONS)}, found {name!r}")
    before, settings.implementation = settings.implementation, name
    try:
        yield
    finally:
        settings.implementation = before


@cache
def _log_once(message: str) -> None:
    _log.warning(message)


def fall_back(operation: str, reason: str, instead: str = "dequantizing and multiplying") -> None:
    """Record a fallback of `operation`, once per reason, or raise NoKernelError."""
    message = f"no kernel for lowbit::{operation}: {reason}"
    if not settings.fallback:
        raise NoKernelError(f"{message}; falling back is switched off (LOWBIT_NO_FALLBACK or allow_fallback)")
    _log_once(f"{message}; {instead} instead, which is slow")
