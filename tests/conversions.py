"""Conversions in processes of their own, slow enough to be killed, and what they leave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from lowbit.checkpoint.headers import PARTIAL
from lowbit.checkpoint.journal import read_journal

FILES = {"tokenizer.json": "{}", "code/modeling.py": "pass"}


def everything(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


RUN = """
import os, sys, time
from lowbit.checkpoint import execute
import lowbit
write = execute.Worker._write
def slow(self, out, start, data):
    write(self, out, start, data)
    time.sleep(0.02)
execute.Worker._write = slow
print("ready", flush=True)
lowbit.convert(sys.argv[1], sys.argv[2], "int8", workers=2, max_shard_size="200KB")
"""


def start(src: Path, out: Path, code: str = RUN) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, str(src), str(out)], env=environment, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
    )  # fmt: skip


def wait_for_jobs(out: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(read_journal(out / PARTIAL / "journal.jsonl").done) < count:
        assert time.monotonic() < deadline, "the conversion did not get going"
        time.sleep(0.005)
