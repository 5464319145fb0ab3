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


def test_nowhere_to_keep_what_is_compiled_is_no_error():
    """As in a container whose files are read only."""
    code = (
        "import tempfile\ndef refuse(*_, **__):\n    raise PermissionError\ntempfile.TemporaryFile = refuse\n"
        + CODE
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "compiling CPU kernels, at every start without a writable NUMBA_CACHE_DIR …\n"
