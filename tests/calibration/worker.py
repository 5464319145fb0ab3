"""What a worker of the distributed tests does: `worker.py TASK DIRECTORY`, started by a launcher or alone.

Each task writes what it found to DIRECTORY/TASK-<workers>.pt (the calibrations to a directory of that name).
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partialmethod
from pathlib import Path
from unittest.mock import patch

import torch
from other_device import OtherDevice
from torch import nn

from lowbit.calibration import distributed
from lowbit.calibration import search as sensitivity
from lowbit.calibration.calibrate import calibrate
from lowbit.calibration.graph import LayerGraph
from lowbit.calibration.kv_cache import KVCache
from lowbit.calibration.layer import quantize_weights
from lowbit.calibration.methods import METHODS
from lowbit.calibration.observers import make_observer
from lowbit.calibration.run import RunOptions
from lowbit.calibration.statistics import InputStatistics, Wanted
from lowbit.scheme import get_scheme

CPU = torch.device("cpu")


def calibrations(directory: Path) -> None:
    """A dense model and a mixture, whose checkpoints lie in the directory, by methods with and without samples.

    The length that tokens are weighted by is that of a worker's own first batch; here it is fixed, so that
    nothing but the order of sums tells several workers from one.
    """
    windows = list(torch.load(directory / "ids.pt", weights_only=True))
    out = directory / f"calibrations-{distributed.workers()}"
    for model in ("qwen3", "qwen3_moe"):
        source = directory / model
        for scheme, method in (
            ("int8-static", "smoothquant-gptq"),
            ("int8-static", "absmax"),
            ("int8", "gptq"),
        ):
            kv = KVCache(dtype="int8", each="head") if method == "absmax" else None
            # One process takes the way of several, not all data as one batch.
            options = RunOptions(all_experts=method != "gptq", min_tokens=300, memory_limit=1 << 20)
            with patch.object(
                InputStatistics, "__init__", partialmethod(InputStatistics.__init__, typical=1.0)
            ):
                calibrate(
                    source, out / f"{model}-{method}", get_scheme(scheme), METHODS[method], windows,
                    kv_cache=kv, options=options,
                )  # fmt: skip


def statistics_of(
    worker: int, *, empty: bool = False, device: torch.device = CPU
) -> dict[str, InputStatistics]:
    """What worker number `worker` saw; nothing where `empty`."""
    generator = torch.Generator().manual_seed(worker)
    wanted = Wanted(hessian=True, cross=True, sample_rows=8, observer="mse")
    spec = get_scheme("int8").activations
    found = {n: InputStatistics(wanted=wanted, spec=spec, rows_per_batch=2) for n in ("a", "b")}
    for name, s in found.items():
        for batch in range(0 if empty and name == "b" else 2):
            x = torch.randn(16, 64, generator=generator).to(device) * (batch + 1)
            s.update(x, x if name == "a" else None)
    return found


def merging(directory: Path) -> None:
    """Statistics and moving averages of workers of which the second saw nothing for `b`."""
    rank = distributed.rank()
    mine = torch.device("cuda", rank)
    with OtherDevice():  # each worker's own, so that tensors of two workers' devices cannot meet
        found = statistics_of(rank, empty=rank == 1, device=mine)
        distributed.merge_statistics(found, mine)
        average = make_observer("moving-average")
        average.update(torch.full((4,), float(rank + 1), device=mine))
        distributed.merge_observers([average], mine)
        for s in found.values():
            one = torch.ones(64, device=mine)
            s.update(one * s.absmax @ s.hessian @ s.cross + s.total.float() + s.rows().sum(0))
            assert s.hessian.device == s.observer.counts.device == average.high.device == mine
        found = statistics_of(rank, empty=rank == 1, device=mine)
        distributed.merge_statistics(found, mine)
        same = distributed.gathered((found, average))
    if rank == 0:
        torch.save([_plain(s) | {"average": a.high} for s, a in same], directory / f"merging-{len(same)}.pt")


def _plain(statistics: dict[str, InputStatistics]) -> dict:
    return {
        (name, field): getattr(s, field)
        for name, s in statistics.items()
        for field in ("tokens", "absmax", "total", "hessian", "cross", "sample")
    } | {(name, "counts"): s.observer.counts for name, s in statistics.items()}


def rounding(directory: Path) -> None:
    """Modules of one layer rounded from the same statistics on every worker."""
    torch.manual_seed(0)
    layer = nn.ModuleDict({n: nn.Linear(64, 96) for n in ("a", "b", "c")}).requires_grad_(False)
    statistics = statistics_of(0) | {"c": statistics_of(5)["a"]}
    graph = LayerGraph(
        linears=("a", "b", "c"), groups=(("a",), ("b",), ("c",)), norms=(), pairs=(), writers=()
    )
    scheme = get_scheme("int8")
    method = replace(METHODS["gptq"], compensate=True)
    schemes = dict.fromkeys("abc", scheme)
    done = quantize_weights(layer, graph, method, schemes, statistics, min_tokens=1)
    same = distributed.gathered(({n: (q.codes, q.scale) for n, q in done[0].items()}, done[1]))
    if distributed.rank() == 0:
        torch.save(same, directory / f"rounding-{len(same)}.pt")


def refusal(directory: Path) -> None:
    """What one worker raises reaches all of them."""

    def fail() -> None:
        raise ValueError(f"raised by {distributed.rank()}")

    try:
        distributed.divided([lambda: None, fail], [0, 1], CPU)
    except ValueError as error:
        (directory / f"refusal-{distributed.rank()}.txt").write_text(str(error))


def search(directory: Path) -> None:
    """A search that stops on all workers in the second layer that it measures, and goes on; and an undisturbed one."""
    source, windows = directory / "qwen3", list(torch.load(directory / "ids.pt", weights_only=True))
    costs, ran = sensitivity._Sweep._costs, []

    def dies(sweep, index, gradients):
        if index == 1:
            raise KeyboardInterrupt
        return costs(sweep, index, gradients)

    def notes(sweep, index, gradients):
        ran.append(index)
        return costs(sweep, index, gradients)

    with patch.object(sensitivity._Sweep, "_costs", dies), suppress(KeyboardInterrupt):
        sensitivity.sensitivities(source, windows, state=directory / "state")
    with patch.object(sensitivity._Sweep, "_costs", notes):
        resumed = sensitivity.sensitivities(source, windows, state=directory / "state")
    whole = sensitivity.sensitivities(source, windows)
    if distributed.rank() == 0:
        same = {"resumed": [asdict(u) for u in resumed], "whole": [asdict(u) for u in whole], "ran": ran}
        (directory / f"search-{distributed.workers()}.json").write_text(json.dumps(same))


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.join_workers()
    for task in sys.argv[2].split(","):
        tasks = {f.__name__: f for f in (calibrations, merging, rounding, refusal, search)}
        tasks[task](Path(sys.argv[1]))
