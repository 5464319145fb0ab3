"""Have the shards of a source on the Hub fetched while a conversion runs: each before its jobs, and cut off after them.

So a conversion needs room for its result and a few shards, not for the source.
"""

from __future__ import annotations

import itertools
import os
import queue
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path

from lowbit.checkpoint.execute import Cancelled
from lowbit.checkpoint.files import hold
from lowbit.checkpoint.hub import Progress, Repository
from lowbit.checkpoint.jobs import Job, files_of
from lowbit.engines.local import Ready, no_wait
from lowbit.errors import InputError

# So many shards are here or on their way, beyond those that a running job insists on.
AHEAD = 3
_THREADS = 2
# What a thread of ours is to fetch: a shard that a job waits for, one that will be needed, nothing any more.
_NOW, _SOON, _END = 1, 2, 0


def prepare(repository: Repository, others: Sequence[Path], jobs: Sequence[tuple[int, Job]]) -> None:
    """What can go wrong before a conversion begins: fetch its `others`, find room for the shards of its jobs.

    Raises InputError where there is too little, and OSError where files cannot be fetched.
    """
    for file in others:
        repository.fetch(file)
    shards = files_of(job for _, job in jobs) & repository.files.keys()
    missing = sorted(repository.files[file].nbytes for file in shards if not repository.here(file))
    need, free = sum(missing[-AHEAD - 1 :]), shutil.disk_usage(repository.root).free
    if need > free:
        raise InputError(
            f"{repository.root}: expected {-(-need // 10**6)} MB of free disk space, for the shards that are fetched "
            f"ahead, found {free // 10**6} MB; free some, or set HF_HOME to a place on another disk"
        )


@contextmanager
def supplied(
    repository: Repository | None, jobs: Sequence[tuple[int, Job]], fetched: Progress
) -> Iterator[Ready]:
    """While jobs run: what each waits for. Nothing, without a repository; `fetched` is told of bytes as they arrive."""
    if repository is None:
        yield no_wait
        return
    supply = Supply(repository, jobs, fetched)
    with repository.in_use():
        supply.begin()
        try:
            yield supply.ready
        finally:
            supply.end()


class Supply:
    """The shards that jobs read, fetched in the order of the jobs.

    A shard stays whole while a job of this run, or another run of the same source, is to read it.
    """

    def __init__(self, repository: Repository, jobs: Sequence[tuple[int, Job]], fetched: Progress) -> None:
        self._repository, self._tell = repository, fetched
        self._left: Counter[Path] = Counter()
        """Shard → jobs that are yet to read it; those that are needed first come first."""
        for _, job in jobs:
            self._left.update(self._shards(job))
        self._asked: dict[Path, futures.Future[None]] = {}
        self._held: dict[Path, int] = {}
        """Descriptors of shards that are here, which keep others from cutting them off."""
        self._wanted: queue.PriorityQueue[tuple[int, int, Path | None]] = queue.PriorityQueue()
        self._order = itertools.count()
        self._lock, self._closed = threading.Lock(), False

    def begin(self) -> None:
        for number in range(_THREADS):
            threading.Thread(target=self._fetch_all, name=f"lowbit-fetch-{number}", daemon=True).start()
        self._look_ahead()

    def end(self) -> None:
        """Fetch no more. What is here, and was not needed to the end, stays for the next run."""
        with self._lock:
            self._closed = True
            for fd in self._held.values():
                os.close(fd)
        for _ in range(_THREADS):
            self._wanted.put((_END, next(self._order), None))

    @contextmanager
    def ready(self, job: Job, cancelled: Callable[[], bool]) -> Iterator[None]:
        """A context in which all that a job reads is here. Raises Cancelled, and OSError for what cannot be fetched."""
        shards = self._shards(job)
        for file in shards:
            future = self._ask(file, _NOW)
            while not futures.wait([future], timeout=0.2).done:
                if cancelled():
                    raise Cancelled
            future.result()
        yield
        for file in shards:
            self._done(file)

    def _shards(self, job: Job) -> set[Path]:
        return files_of([job]) & self._repository.files.keys()

    def _ask(self, file: Path, when: int) -> futures.Future[None]:
        with self._lock:
            if file not in self._asked:
                self._asked[file] = futures.Future()
                self._wanted.put((when, next(self._order), file))
            return self._asked[file]

    def _look_ahead(self) -> None:
        with self._lock:
            here = sum(self._left[file] > 0 for file in self._asked)
            more = [file for file in self._left if file not in self._asked][: max(AHEAD - here, 0)]
        for file in more:
            self._ask(file, _SOON)

    def _done(self, file: Path) -> None:
        """One job fewer is to read a shard; after the last, its disk space is free again."""
        with self._lock:
            self._left[file] -= 1
            fd = self._held.pop(file) if self._left[file] == 0 else None
        if fd is None:
            return
        # Where locks are unknown, another run that reads it meets its end: an error, not wrong data.
        if hold(fd, wait=False) is not False:
            self._repository.cut(fd, file)
        os.close(fd)
        self._look_ahead()

    def _fetch_all(self) -> None:
        while (file := self._wanted.get()[2]) is not None:
            try:
                self._fetch(file)
            except BaseException as error:  # handed to the jobs that wait for it
                self._asked[file].set_exception(error)
            else:
                self._asked[file].set_result(None)

    def _fetch(self, file: Path) -> None:
        while True:
            self._repository.fetch(file, self._fetched)
            fd = os.open(file, os.O_RDONLY if file.is_symlink() else os.O_RDWR)
            hold(fd, shared=True)
            if os.fstat(fd).st_size == self._repository.files[file].nbytes:
                break
            os.close(fd)  # another run was done with it, just now
        with self._lock:
            if self._closed:
                os.close(fd)
            else:
                self._held[file] = fd

    def _fetched(self, count: int) -> None:
        if self._closed:
            raise Cancelled  # ends the download too
        self._tell(count)
