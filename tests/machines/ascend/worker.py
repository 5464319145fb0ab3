"""Runs in the venv that has triton-ascend: a launch as JSON on each line of input, its HIVM on a line of output."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path


def main() -> None:
    kernels = Path(sys.argv[1])
    spec = importlib.util.spec_from_file_location("compile_ascend", kernels / "compile_ascend.py")
    assert spec is not None and spec.loader is not None
    compiler = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compiler)
    for line in sys.stdin:
        launch = json.loads(line)
        try:
            answer = {"hivm": compiler.compile_launch(launch)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
