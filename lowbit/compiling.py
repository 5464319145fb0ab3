"""Says that loops are being compiled, which takes seconds and happens once per machine and version of lowbit.

numba keeps what it compiled on disk, and loads it in milliseconds from then on. Whatever has such loops imports this
module; the message goes to the logger `lowbit.compiling`, once per process, when the first of them is not found there.
"""

from __future__ import annotations

import logging
from typing import Any

from numba.core import event

_log = logging.getLogger(__name__)


class _Compiling(event.Listener):
    """Hears every pass of numba's compiler; loading from the cache runs none."""

    said = False

    def on_start(self, event: Any) -> None:
        if not self.said and str(event.data.get("module")).startswith("lowbit."):
            self.said = True
            _log.info("compiling CPU kernels, once per machine …")

    def on_end(self, event: Any) -> None:
        pass


event.register("numba:run_pass", _Compiling())
