"""Data-parallel calibration under `torchrun` or `accelerate launch`: every worker sees its share of the data.

Statistics are merged, so that all workers hold the same; what is chosen from them is chosen by one worker
and sent to the others; the first one writes. Everything travels through host memory, whatever
the workers compute on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lowbit.calibration.observers import HistogramObserver, RangeObserver
from lowbit.calibration.statistics import InputStatistics
from lowbit.errors import InputError

T = TypeVar("T")


def rank() -> int:
    """This worker's number; 0 without torch.distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def workers() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def join_workers() -> None:
    """Join the process group when started by `torchrun` or `accelerate launch`; nothing otherwise."""
    import atexit
    import os

    if int(os.environ.get("WORLD_SIZE") or 1) > 1 and not dist.is_initialized():
        # Its functions have the group as a default argument: imported later (by torch.compile, so by most
        # models), they would keep a group alive that has been left.
        import torch.distributed.nn.functional  # noqa: F401

        dist.init_process_group("gloo")
        atexit.register(_leave)


def _leave() -> None:
    """Give up the group: a thread of it that frees a tensor while the interpreter ends aborts the process."""
    _group.cache_clear()
    if dist.is_initialized():
        dist.destroy_process_group()


@cache
def _group() -> Any:
    """The workers as a group that moves host memory: the default one, unless somebody formed it for devices."""
    return dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


def wait_for_all() -> None:
    if workers() > 1:
        dist.barrier(group=_group())


def my_share(windows: Sequence[Tensor]) -> Sequence[Tensor]:
    """Every n-th window, so that shares differ by at most one."""
    if workers() > len(windows) > 0:
        raise InputError(
            f"expected at least one sample per worker, found {len(windows)} for {workers()} workers; "
            "give more data, or start fewer workers"
        )
    return windows[rank() :: workers()]


def gathered(value: T) -> list[T]:
    """Every worker's `value`, in rank order, tensors in host memory."""
    if workers() == 1:
        return [value]
    parts: list[Any] = [None] * workers()
    dist.all_gather_object(parts, moved(value, "cpu"), group=_group())
    return parts


def decided(choose: Callable[[], T], device: torch.device) -> T:
    """What `choose` returns on the first worker, on all of them, tensors on `device`. See `divided`."""
    return divided([choose], [0], device)[0]


def divided(tasks: Sequence[Callable[[], T]], owners: Sequence[int], device: torch.device) -> list[T]:
    """What the tasks return, each run by the worker that owns it and sent to the others, tensors on `device`.

    What one of them raises is raised on every worker, so that none waits for one that has stopped.
    """
    if workers() == 1:
        return [task() for task in tasks]
    mine = {i: _outcome(tasks[i]) for i, owner in enumerate(owners) if owner == rank()}
    out: list[T] = []
    for i, owner in enumerate(owners):
        box = [moved(mine.pop(i, None), "cpu")]
        dist.broadcast_object_list(box, src=owner, group=_group())
        if isinstance(box[0], Exception):
            raise box[0]
        out.append(moved(box[0], device))
    return out


def balanced(costs: Sequence[float], count: int) -> list[int]:
    """Task → which of `count` workers does it: the dearest first, each to whom has least to do."""
    owners, loads = [0] * len(costs), [0.0] * count
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    return owners


def _outcome(task: Callable[[], T]) -> T | Exception:
    try:
        return task()
    except Exception as error:
        return error


def moved(value: Any, device: torch.device | str) -> Any:
    """`value` with every tensor in it on `device`: containers, dataclasses and observers are copied."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {k: moved(v, device) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(moved(v, device) for v in value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: getattr(value, f.name) for f in fields(value)}
    elif isinstance(value, RangeObserver | HistogramObserver):
        parts = value.__dict__
    else:
        return value
    new = object.__new__(type(value))
    for name, part in parts.items():
        object.__setattr__(new, name, moved(part, device))
    return new


def merge_statistics(statistics: Mapping[str, InputStatistics], device: torch.device) -> None:
    """Make every worker's statistics those of all the data, in place, tensors on `device`.

    One statistic at a time and in rank order, so that sums come out the same on every worker. Of matrices
    [K, K] a worker holds its own and one more in host memory, however many workers there are.
    """
    if workers() == 1:
        return
    for name in sorted(statistics):
        mine = statistics[name]
        sums = {n: getattr(mine, n) for n in ("hessian", "cross")}
        for n in sums:
            setattr(mine, n, None)
        parts = gathered((mine, {n: None if x is None else (x.shape, x.dtype) for n, x in sums.items()}))
        merged = parts[0][0]
        for part, _ in parts[1:]:
            merged.merge(part)
        for n, x in sums.items():
            like = next((shapes[n] for _, shapes in parts if shapes[n] is not None), None)
            if like is not None:
                here = torch.zeros(like[0], dtype=like[1]) if x is None else x.cpu()
                setattr(merged, n, _sum_in_rank_order(here))
        mine.__dict__.update(moved(merged, device).__dict__)


def _sum_in_rank_order(x: Tensor) -> Tensor:
    """((x₀ + x₁) + x₂) + … over workers, the same bits on each. `x` is overwritten, in host memory."""
    x = x.contiguous()
    if rank() > 0:
        before = torch.empty_like(x)
        dist.recv(before, rank() - 1, group=_group())
        x = before.add_(x)
    if rank() < workers() - 1:
        dist.send(x, rank() + 1, group=_group())
    dist.broadcast(x, workers() - 1, group=_group())
    return x


def merge_observers(observers: Sequence[RangeObserver | HistogramObserver], device: torch.device) -> None:
    """The same for observers alone, in place."""
    if workers() == 1:
        return
    for observer in observers:
        merged, *others = gathered(observer)
        for other in others:
            merged.merge(other)  # type: ignore[arg-type]
        observer.__dict__.update(moved(merged, device).__dict__)
