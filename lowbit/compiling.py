"""Says that loops are being compiled, which takes seconds and happens once per machine and version of lowbit.

numba keeps what it compiled on disk, and loads it in milliseconds from then on. Whatever has such loops imports this
module; the message goes to the logger `lowbit.compiling`, once per process, when the first of them is not found there.
"""

from __future__ import annotations

import logging
from typing import Any

from numba import njit
from numba.core import event

_log = logging.getLogger(__name__)


def _place_for_cache() -> bool:
    """Whether numba finds a folder to write to: beside its caller's file, in the user's cache, or NUMBA_CACHE_DIR."""
    try:
        njit(cache=True)(lambda: None)
    except RuntimeError:
        return False
    return True


CACHE = _place_for_cache()
"""What loops give numba as `cache`, which fails where there is no place for one."""


class _Compiling(event.Listener):
    """Hears every pass of numba's compiler; loading from the cache runs none."""

    said = False

    def on_start(self, event: Any) -> None:
        if not self.said and str(event.data.get("module")).startswith("lowbit."):
            self.said = True
            when = "once per machine" if CACHE else "at every start without a writable NUMBA_CACHE_DIR"
            _log.info(f"compiling CPU kernels, {when} …")

    def on_end(self, event: Any) -> None:
        pass


event.register("numba:run_pass", _Compiling())
