"""Data-parallel calibration under `torchrun`: every worker sees its share, statistics are merged.

All workers then hold the same statistics and take the same decisions; the first one writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch import Tensor

from lowbit.calibration.observers import HistogramObserver, RangeObserver
from lowbit.calibration.statistics import InputStatistics


def rank() -> int:
    """This worker's number; 0 without torch.distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def workers() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def join_workers() -> None:
    """Join the process group when started by `torchrun`; nothing otherwise."""
    import os

    if "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")


def wait_for_all() -> None:
    if workers() > 1:
        dist.barrier()


def my_share(windows: Sequence[Tensor]) -> Sequence[Tensor]:
    """Every n-th window, so that shares differ by at most one."""
    if workers() > len(windows) > 0:
        raise ValueError(
            f"expected at least one sample per worker, found {len(windows)} for {workers()} workers"
        )
    return windows[rank() :: workers()]


def merge_statistics(statistics: Mapping[str, InputStatistics]) -> None:
    """Make every worker's statistics those of all the data, in place.

    One tensor at a time, in rank order, so that sums come out the same on every worker.
    """
    if workers() == 1:
        return
    for name in sorted(statistics):
        parts: list[InputStatistics | None] = [None] * workers()
        dist.all_gather_object(parts, statistics[name])
        merged = parts[0]
        assert merged is not None
        for part in parts[1:]:
            assert part is not None
            merged.merge(part)
        statistics[name].__dict__.update(merged.__dict__)


def merge_observers(observers: Sequence[RangeObserver | HistogramObserver]) -> None:
    """The same for observers alone, in place."""
    if workers() == 1:
        return
    for observer in observers:
        parts: list[RangeObserver | HistogramObserver | None] = [None] * workers()
        dist.all_gather_object(parts, observer)
        merged = parts[0]
        assert merged is not None
        for part in parts[1:]:
            assert part is not None
            merged.merge(part)  # type: ignore[arg-type]
        observer.__dict__.update(merged.__dict__)
