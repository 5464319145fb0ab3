"""How the C library hands out memory, for work that makes and frees many large temporaries."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt(3)."""
_LARGE = 1 << 30
_USUAL = 32 << 20
"""Where glibc's own adjustment of the threshold ends."""


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """While inside, blocks of up to 1 GiB are reused when freed, not given back to the system each time.

    glibc gives every large block fresh pages, which the system fills with zeros one by one: a layer
    that makes tensors of 100 MB spends half of its time on that. What was kept is given back at
    the end. For the whole process; does nothing where the C library has no mallopt.
    """
    try:
        library = ctypes.CDLL(None)
        mallopt, trim = library.mallopt, library.malloc_trim
    except (AttributeError, OSError, TypeError):
        yield
        return
    mallopt(_MMAP_THRESHOLD, _LARGE)
    mallopt(_TRIM_THRESHOLD, -1)  # give nothing back
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, _USUAL)
        mallopt(_TRIM_THRESHOLD, 2 * _USUAL)
        trim(0)
