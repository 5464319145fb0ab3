"""The one message while loops are compiled, and none when they are loaded."""

from __future__ import annotations

import os
import subprocess
import sys

CODE = """
import torch
from lowbit.cli.output import say_when_compiling
say_when_compiling()
from lowbit import ops
ops.hadamard(torch.ones(2, 8), 8)
"""


def test_compiling_is_said_once_and_only_where_it_happens(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}

    def run(**more: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", CODE], env=environment | more, capture_output=True, text=True, check=True
        )
        assert done.stdout == ""
        return done.stderr

    assert run() == "compiling CPU kernels, once per machine …\n"
    assert run() == ""
    environment["NUMBA_CACHE_DIR"] += "/worker"
    assert run(RANK="1") == ""
