"""In place of Triton's launches: a kernel is compiled in the Ascend venv, and runs on the memory of CPU tensors."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import triton
from lowbit.kernels import compile_ascend, record
from lowbit.kernels.targets import Target

from .machine import Machine
from .program import Program, parse


class Device:
    """`launches`: names of the kernels that ran."""

    def __init__(self, target: Target) -> None:
        python = compile_ascend.ascend_python()
        if python is None:
            raise RuntimeError("expected the venv of triton-ascend: run `make ascend-env`")
        kernels = Path(compile_ascend.__file__).resolve().parent
        worker = Path(__file__).with_name("worker.py")
        self._command = [python, worker, kernels]
        self._kept = Path(os.environ["TRITON_CACHE_DIR"]) / "ascend"
        packages = sorted(
            path.name for path in python.parent.parent.glob("lib/python*/site-packages/*.dist-info")
        )
        self._key = hashlib.sha256(" ".join(packages).encode())
        """What a kernel is compiled from and by: its launch is missing yet."""
        for source in (worker, *sorted(kernels.glob("*.py"))):
            self._key.update(source.read_bytes())
        self._target = target
        self._programs: dict[str, Program] = {}
        self.launches: list[str] = []

    def launch(
        self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        launch = record.describe(kernel, args, kwargs, self._target)
        if any("tensordesc" in kind or "fp8" in kind for kind in launch.signature.values()):
            raise ValueError(f"{self._target.name} multiplies no fp8 and has no tensor descriptors")
        text = json.dumps(asdict(launch))
        if text not in self._programs:
            self._programs[text] = parse(self._compile(text))
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        given = [values[name] for name, kind in launch.signature.items() if kind != "constexpr"]
        Machine(self._programs[text], given).launch(grid)
        self.launches.append(launch.kernel)

    @cached_property
    def _worker(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=compile_ascend.environment(),
        )

    def _compile(self, launch: str) -> str:
        key = self._key.copy()
        key.update(launch.encode())
        kept = self._kept / f"{key.hexdigest()[:32]}.hivm"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            scratch = kept.with_suffix(f".{os.getpid()}")
            scratch.write_text(self._compiled(launch))
            scratch.replace(kept)
        return kept.read_text()

    def _compiled(self, launch: str) -> str:
        assert self._worker.stdin is not None and self._worker.stdout is not None
        self._worker.stdin.write(launch + "\n")
        self._worker.stdin.flush()
        answer = json.loads(self._worker.stdout.readline())
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["hivm"]


def device(target: Target) -> Device:
    """From now on Triton launches kernels on the machine. Without the interpreter."""
    made = Device(target)

    def run(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        made.launch(self, grid, args, kwargs)

    triton.JITFunction.run = run
    return made
