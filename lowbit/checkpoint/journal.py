"""What a conversion has done so far, so that a killed one goes on where it stopped.

One JSON line per finished job. Nothing in it is believed: when a run resumes, each tensor
that the journal names is read back and its checksum compared, and what does not match is
made again. So no fsync is needed while working, and a lost page costs one job.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from lowbit.checkpoint.jobs import Job
from lowbit.checkpoint.layout import Shard
from lowbit.checkpoint.reading import file_checksum


class Journal:
    """Append-only record beside the unfinished shards."""

    def __init__(self, file: Path, digest: str) -> None:
        """Open for appending. The plan's digest is said again by each run that writes here."""
        self._lock = threading.Lock()
        # Without a buffer: what does not fit on the disk would be in the way of closing the file.
        self._stream = file.open("ab", buffering=0)
        try:
            # An empty line ends what a killed run may have left of its last one.
            self._write(b"\n")
            self._line({"plan": digest})
        except OSError:
            self.close()
            raise

    def record(self, job: int, checksums: Mapping[str, str]) -> None:
        """Job number `job` of the plan is written."""
        self._line({"job": job, "checksums": dict(checksums)})

    def not_finite(self, tensor: str) -> None:
        """An output tensor was copied from the source with NaN or Inf in it."""
        self._line({"not_finite": tensor})

    def synced(self, shards: Iterable[int]) -> None:
        """All jobs of these output files are written, and the files are on the disk."""
        self._line({"synced": sorted(shards)})
        os.fsync(self._stream.fileno())  # other machines go by it

    def _line(self, entry: object) -> None:
        with self._lock:
            self._write(json.dumps(entry).encode() + b"\n")

    def _write(self, data: bytes) -> None:
        while data:
            data = data[self._stream.write(data) :]

    def close(self) -> None:
        with suppress(OSError):  # what counts is synced; a network may say again what failed
            self._stream.close()


@dataclass(frozen=True, kw_only=True)
class Record:
    """What journals say."""

    digest: str = ""
    """Of the plan; "" when unreadable."""
    done: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    """Job number → checksums of its tensors."""
    synced: frozenset[int] = frozenset()
    """Output files that are finished and on the disk."""
    not_finite: frozenset[str] = frozenset()
    """Output tensors that were copied with NaN or Inf in them."""
    begun: bool = False
    """Whether there is a journal at all."""


def read_journal(file: Path) -> Record:
    """One journal. A line that a killed run has torn is left out."""
    digest, done, synced, not_finite = "", {}, set(), set()
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, ValueError):
        return Record()
    for line in lines:
        try:
            entry = json.loads(line)
            if "plan" in entry:
                digest = str(entry["plan"])
            elif "synced" in entry:
                synced |= {int(n) for n in entry["synced"]}
            elif "not_finite" in entry:
                not_finite.add(str(entry["not_finite"]))
            else:
                done[int(entry["job"])] = {str(k): str(v) for k, v in entry["checksums"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return Record(digest=digest, done=done, synced=frozenset(synced), not_finite=frozenset(not_finite))


def read_journals(directory: Path) -> Record:
    """All journals of a directory as one, those of every part; no digest unless all have the same.

    One that was killed before its first line is left out.
    """
    found = [r for f in sorted(directory.glob("journal*.jsonl")) if (r := read_journal(f)).digest]
    digests = {r.digest for r in found}
    return Record(
        digest=digests.pop() if len(digests) == 1 else "",
        done={number: sums for r in found for number, sums in r.done.items()},
        synced=frozenset().union(*(r.synced for r in found)),
        not_finite=frozenset().union(*(r.not_finite for r in found)),
        begun=bool(found),
    )


def intact(
    jobs: Iterable[tuple[int, Job]],
    shards: tuple[Shard, ...],
    root: Path,
    done: Mapping[int, Mapping[str, str]],
) -> dict[int, dict[str, str]]:
    """Those finished jobs whose outputs, read back from the shards under `root`, have their checksums."""
    good = {}
    for number, job in jobs:
        checksums = done.get(number)
        if checksums and all(
            checksums.get(o.name) == file_checksum(root / shards[o.shard].file, o.offset, o.nbytes)
            for o in job.outputs.values()
        ):
            good[number] = dict(checksums)
    return good
