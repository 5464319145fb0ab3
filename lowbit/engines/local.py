"""Run a plan's jobs on threads of this machine. The loops hold no GIL, so threads are enough."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

from lowbit.checkpoint.execute import Cancelled, Progress, Worker
from lowbit.checkpoint.jobs import Job

Ready = Callable[[Job, Callable[[], bool]], AbstractContextManager[None]]
"""(job, whether to give up) → a context in which what the job reads is there."""


def default_workers() -> int:
    """The processors that this process may use, at most 32: a disk is saturated long before."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, min(count, 32))


def no_wait(job: Job, cancelled: Callable[[], bool]) -> AbstractContextManager[None]:
    """All that any job reads is there."""
    return nullcontext()


def run_jobs(
    jobs: Sequence[tuple[int, Job]],
    outputs: Mapping[int, int],
    *,
    workers: int,
    progress: Progress,
    not_finite: Callable[[str], None],
    finished: Callable[[int, dict[str, str]], None],
    ready: Ready = no_wait,
) -> None:
    """Run numbered jobs in order on `workers` threads; `finished(number, checksums)` after each.

    `not_finite(name)` before that, for a tensor that was copied with NaN or Inf in it. Each job runs within `ready`'s
    context (see `supplied`).
    The first error stops the others soon and is raised here; so does Ctrl-C.
    """
    waiting: queue.SimpleQueue[tuple[int, Job]] = queue.SimpleQueue()
    for item in jobs:
        waiting.put(item)
    stop = threading.Event()
    errors: list[BaseException] = []

    def work() -> None:
        worker = Worker(outputs, progress=progress, not_finite=not_finite, cancelled=stop.is_set)
        try:
            while not stop.is_set():
                try:
                    number, job = waiting.get_nowait()
                except queue.Empty:
                    return
                with ready(job, stop.is_set):
                    finished(number, worker.run(job))
        except Cancelled:
            pass
        except BaseException as error:  # handed to the caller, whatever it is
            errors.append(error)
            stop.set()
        finally:
            worker.close()

    threads: list[threading.Thread] = []
    try:
        for number in range(max(1, min(workers, len(jobs)))):
            thread = threading.Thread(target=work, name=f"lowbit-{number}", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the machine allows no more
                if not threads:
                    raise
                break
            threads.append(thread)
        for thread in threads:
            thread.join()
    except BaseException:
        stop.set()
        for thread in threads:
            thread.join()
        raise
    if errors:
        raise errors[0]
