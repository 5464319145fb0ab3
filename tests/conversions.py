"""Conversions in processes of their own, slow enough to be killed; what they leave, what they take, what they mean."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

import lowbit
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


def check_killed_run(root: Path, scheme: str, jobs: int) -> None:
    """A conversion of `src` that is killed after so many jobs goes on, to the bytes of one that was not."""
    process = start(root / "src", root / "out", RUN.replace('"int8"', f'"{scheme}"'))
    wait_for_jobs(root / "out", jobs)
    process.kill()
    process.wait(60)
    done = lowbit.convert(root / "src", root / "out", scheme, max_shard_size="200KB")
    assert done.resumed_jobs >= jobs
    lowbit.convert(root / "src", root / "fresh", scheme, max_shard_size="200KB")
    assert everything(root / "out") == everything(root / "fresh")


MEMORY = """
import re, sys
import lowbit
small, large, a, b, scheme, workers = sys.argv[1:]
def peak():  # not ru_maxrss, which begins with what the parent process had
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
lowbit.convert(small, a, scheme, workers=int(workers))
before = peak()
lowbit.convert(large, b, scheme, workers=int(workers))
lowbit.verify(b, large, workers=int(workers))
print((peak() - before) * 1024)
"""


def memory_grown(root: Path, scheme: str, workers: int) -> int:
    """Bytes that converting `large`, to `b`, and verifying it take beyond what `small`, to `a`, took."""
    paths = [str(root / name) for name in ("small", "large", "a", "b")]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *paths, scheme, str(workers)],
        capture_output=True, text=True, check=False, env=dict(os.environ),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def int8_error(root: Path) -> float:
    """Of the logits of `src` in int8 as lowbit runs it, activations in float, against transformers' of it in bf16."""
    from transformers import AutoModelForCausalLM

    from lowbit.nn import float_activations

    ids = torch.arange(3, 35)[None]
    for scheme in ("bf16", "int8"):
        lowbit.convert(root / "src", root / scheme, scheme)
    with torch.no_grad():
        exact = AutoModelForCausalLM.from_pretrained(root / "bf16", dtype=torch.float32)(ids).logits
        model = lowbit.load(root / "int8", dtype=torch.float32)
        with float_activations(model):
            ours = model(input_ids=ids).logits
    return float((ours - exact).norm() / exact.norm())
