"""Run this process again as a machine with AVX2 and nothing newer, for the benchmarks."""

from __future__ import annotations

import os
import sys

_NEWER = ("amx", "avx10", "avx512", "avxvnni")


def environment() -> dict[str, str]:
    """What holds torch, oneDNN, lowbit and the code that numba compiles to AVX2.

    numba takes the features of this processor whatever NUMBA_CPU_NAME says, so they are given too.
    FBGEMM, behind torch.ao, looks at the processor itself and cannot be held back.
    """
    import llvmlite.binding

    features = llvmlite.binding.get_host_cpu_features()
    return {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "LOWBIT_CPU_ISA": "avx2",
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": ",".join(
            ("+" if found and not name.startswith(_NEWER) else "-") + name for name, found in features.items()
        ),
    }


def rerun(wanted: dict[str, str]) -> None:
    """Start again with `wanted` in the environment, unless it is: libraries read it once, when they are loaded."""
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})
