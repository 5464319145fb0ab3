"""What the commands share: how numbers are said, the progress bar, and JSON on standard output."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any


def torch_seed(value: int | None) -> int | None:
    """A `--seed` as given, if torch takes it. A range of typer's would show both ends, of 19 digits, in the help."""
    import typer

    from lowbit.quality import SEEDS

    if value is not None and abs(value) > SEEDS:
        raise typer.BadParameter(f"expected a seed of 64 bits, found {value}")
    return value


def some_path(text: str) -> Path:
    """A path that was given: Python takes an empty one, of a variable that is not set, for the current directory."""
    import typer

    if not text:
        raise typer.BadParameter("expected a path, found nothing; '.' is the current directory")
    return Path(text)


def say_bytes(count: float) -> str:
    """1536 → `1.5 kB`; decimal units, as disks and the hub count."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def say_count(count: float) -> str:
    """134515008 → `134.5 M`."""
    for unit in ("", " k", " M", " B", " T"):
        if abs(count) < 1000 or unit == " T":
            return f"{count:.4g}{unit}"
        count /= 1000
    raise AssertionError


def print_json(value: Any) -> None:
    """One document on standard output, in any encoding; NaN and Inf, which JSON has not, as null."""
    print(json.dumps(_finite(value), indent=2))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def warn(message: str) -> None:
    """On standard error; of several workers, by the first."""
    if first_worker():
        print(f"warning: {message}", file=sys.stderr)


class Warnings(list[str]):
    """Those of one command: each is said once, and they stay for its JSON."""

    def __call__(self, message: str) -> None:
        if message not in self:
            self.append(message)
            warn(message)


class _StandardError(logging.Handler):
    """Messages as they are, on what is standard error at the time (a progress bar stands in for it)."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr)


def first_worker() -> bool:
    """Whether this process speaks for all those that `torchrun` started."""
    return os.environ.get("RANK", "0") == "0"


def say_when_compiling() -> None:
    """On standard error, once, when loops are not compiled yet; of several workers, by the first."""
    log = logging.getLogger("lowbit.compiling")
    if not log.handlers and first_worker():
        log.setLevel(logging.INFO)
        log.addHandler(_StandardError())
        log.propagate = False


class Seldom:
    """Lines on standard error where it is no terminal, so that a log shows that a long run lives: one per `EVERY`."""

    EVERY = 30.0
    """Seconds."""

    def __init__(self, label: str) -> None:
        self.label, self.last = label, time.monotonic()
        self.lock = threading.Lock()

    def __call__(self, line: str) -> None:
        with self.lock:
            if (now := time.monotonic()) - self.last < self.EVERY:
                return
            self.last = now
        print(f"{self.label}: {line}", file=sys.stderr, flush=True)


@contextmanager
def steps_bar(label: str, *, quiet: bool, live: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """A bar over steps (layers) with the time left on a terminal, seldom a line in pipes; nothing when `quiet`.

    Yields a function of (what, done, total). `live`: the bar moves between the calls too, which takes time from them.
    """
    if quiet:
        yield lambda what, done, total: None
        return
    if not sys.stderr.isatty():
        seldom = Seldom(label)
        yield lambda what, done, total: seldom(f"{done} of {total}, {what}")
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), auto_refresh=live) as bar:
        task = bar.add_task("", total=None)

        def advance(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total, refresh=not live)

        yield advance


@contextmanager
def bytes_bar(label: str, total: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """`bytes_bars` with one; yields its function."""
    with bytes_bars({label: total}, quiet=quiet) as (advance,):
        yield advance


@contextmanager
def bytes_bars(totals: Mapping[str, int], *, quiet: bool) -> Iterator[list[Callable[[int], None]]]:
    """Bars with bytes, speed and time left on a terminal, seldom a line in pipes; nothing when `quiet`.

    `totals`: label → bytes. Yields, for each, a function that any thread may call with the number of bytes just done.
    """
    if quiet:
        yield [lambda count: None for _ in totals]
        return
    if not sys.stderr.isatty():
        yield [_seldom_bytes(label, total) for label, total in totals.items()]
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    lock = threading.Lock()
    with Progress(*columns, console=Console(stderr=True)) as bars:

        def advance(task: TaskID, count: int) -> None:
            with lock:
                bars.advance(task, count)

        yield [partial(advance, bars.add_task(label, total=total)) for label, total in totals.items()]


def _seldom_bytes(label: str, total: int) -> Callable[[int], None]:
    seldom, done = Seldom(label), [0]

    def add(count: int) -> None:
        with seldom.lock:
            done[0] += count
        seldom(f"{say_bytes(done[0])} of {say_bytes(total)}")

    return add


def table(headers: list[str], rows: list[list[str]], *, right: set[int] | None = None) -> str:
    """Plain columns with two spaces between; `right` names columns of numbers."""
    right = right or set()
    widths = [max(len(str(r[i])) for r in [headers, *rows]) for i in range(len(headers))]

    def line(cells: list[str]) -> str:
        padded = (
            c.rjust(w) if i in right else c.ljust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(headers), *(line(r) for r in rows)])
