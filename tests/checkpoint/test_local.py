"""Jobs on threads: how many, and that none goes on when one has failed."""

from __future__ import annotations

import os
import threading
import time

import pytest

from lowbit.checkpoint.execute import Cancelled
from lowbit.engines import local
from lowbit.engines.local import default_workers, run_jobs


@pytest.fixture
def worker(monkeypatch):
    """What the threads' workers did: number of each job, and how many were made and closed."""
    seen: dict[str, list] = {"made": [], "closed": [], "done": [], "cancelled": []}

    class Recording:
        def __init__(self, outputs, *, progress, not_finite, cancelled) -> None:
            seen["made"].append(self)
            self.cancelled = cancelled

        def run(self, job):
            until = time.monotonic() + 0.01
            while time.monotonic() < until:
                if self.cancelled():
                    seen["cancelled"].append(job)
                    raise Cancelled
                time.sleep(0.001)
            if isinstance(job, Exception):
                raise job
            seen["done"].append(job)
            return {"sum": str(job)}

        def close(self) -> None:
            seen["closed"].append(self)

    monkeypatch.setattr(local, "Worker", Recording)
    return seen


def run(jobs, workers: int = 2, finished=lambda number, checksums: None) -> None:
    run_jobs(
        list(enumerate(jobs)), {}, workers=workers, progress=print, not_finite=print, finished=finished
    )  # fmt: skip


def test_every_job_is_done_once_and_told_of(worker):
    told: dict[int, dict] = {}
    run(range(9), finished=told.__setitem__)
    assert told == {i: {"sum": str(i)} for i in range(9)} and sorted(worker["done"]) == list(range(9))
    assert len(worker["made"]) == 2 and len(worker["closed"]) == 2
    run(range(3), workers=64)  # no more threads than jobs
    assert len(worker["made"]) == 5
    run([])
    assert len(worker["closed"]) == len(worker["made"])


def test_the_first_error_stops_the_others(worker):
    with pytest.raises(OSError, match="full"):
        run([OSError("full"), *range(200)])
    assert len(worker["done"]) < 20 and len(worker["closed"]) == 2

    def fails(number, checksums):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(range(200), finished=fails)
    assert len(worker["done"]) < 40


def test_an_interrupt_stops_them_too(worker, monkeypatch):
    original = threading.Thread.join
    interrupts = [KeyboardInterrupt]

    def join(self, timeout=None):
        if interrupts:
            raise interrupts.pop()
        original(self, timeout)

    monkeypatch.setattr(threading.Thread, "join", join)
    with pytest.raises(KeyboardInterrupt):
        run(range(200))
    assert len(worker["closed"]) == 2 and len(worker["done"]) < 20


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_a_machine_that_allows_no_more_threads(worker, monkeypatch, allowed):
    original, started = threading.Thread.start, []

    def start(self):
        if len(started) == allowed:
            raise RuntimeError("can't start new thread")
        started.append(self)
        original(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    if allowed:
        run(range(9), workers=3)
        assert len(worker["done"]) == 9 and len(worker["made"]) == allowed
    else:
        with pytest.raises(RuntimeError, match="new thread"):
            run(range(9), workers=3)


@pytest.mark.parametrize(("processors", "expected"), [(1, 1), (5, 5), (32, 32), (200, 32)])
def test_workers_are_the_processors_that_may_be_used(monkeypatch, processors, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(processors)), raising=False)
    assert default_workers() == expected
