"""Run a compiled loop on torch's own threads.

torch's wheels bring an OpenMP runtime. A second thread pool beside it (numba's, or Python's)
would oversubscribe the processor, and numba's layers are either not safe to enter from two
threads at once or load a second OpenMP. So the parallel region is opened in the runtime that
torch already uses, through its entry point `GOMP_parallel` (libgomp, and libomp for
compatibility). Fork and nesting then behave as torch's own operators do.

Where no such runtime is found, Python threads run the loop: ctypes releases the GIL.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

_pools = threading.local()


@cache
def _gomp_parallel() -> Callable[..., Any] | None:
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    loaded = {line.split(maxsplit=5)[-1] for line in lines if line.count(" ") >= 5 and "/" in line}
    names = ("libgomp", "libomp", "libiomp5")
    found = sorted(path for path in loaded if Path(path).name.startswith(names))
    # With several runtimes in the process, torch's is the one under its own directory.
    root = str(Path(torch.__file__).parent)
    ours = [path for path in found if path.startswith(root) or Path(path).parent.name == "torch.libs"]
    for path in ours or (found if len(found) == 1 else []):
        try:
            entry = ctypes.CDLL(path).GOMP_parallel
        except (OSError, AttributeError):
            continue
        entry.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        entry.restype = None
        return entry
    return None


def run(function: Any, block: ctypes.Array[ctypes.c_int64], threads: int) -> None:
    """Call `function(block)` once on each of `threads` threads, and wait for all of them.

    `function` is a numba cfunc of one int64 pointer that hands out its work through an
    atomic counter in the block, so any number of calls completes it.
    """
    address = ctypes.addressof(block)
    if threads <= 1:
        _entry(function)(address)
        return
    parallel = _gomp_parallel()
    if parallel is not None:
        parallel(function.address, address, threads, 0)
        return
    pool = getattr(_pools, "pool", None)
    if pool is None or pool._max_workers < threads - 1:
        pool = _pools.pool = ThreadPoolExecutor(threads - 1, thread_name_prefix="lowbit")
    entry = _entry(function)
    waiting = [pool.submit(entry, address) for _ in range(threads - 1)]
    entry(address)
    for future in waiting:
        future.result()


@cache
def _entry(function: Any) -> Callable[[int], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function.address)
