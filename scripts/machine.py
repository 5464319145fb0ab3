"""What the benchmarks say of where they ran: the processor's name, and the memory that a process took."""

from __future__ import annotations

import platform
import re
from pathlib import Path


def cpu_name() -> str:
    """As Linux names it: `AMD EPYC`; elsewhere what Python knows."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", info.read_text(), re.M) if info.exists() else None
    return found[1].strip() if found else platform.processor()


def peak_bytes() -> int:
    """Largest resident size of this process image; `ru_maxrss` would be the parent's where that was larger."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024  # type: ignore[index]
