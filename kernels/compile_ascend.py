"""Lower a recorded launch for Ascend 910B, in the venv that has triton-ascend. No NPU, no CANN.

triton-ascend replaces `triton`, so it lives in a venv of its own (`make ascend-env`), and this
file runs there as a script, one launch as JSON on its input. The last step of the toolchain
(hivmc) belongs to CANN and is not there, so bishengir-compile always exits with 1: success is
that it wrote `module.hivm.opt.mlir`, after it had placed every buffer in on-chip memory.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compile import Row
    from .record import Launch

TARGET = "Ascend910B3"
TIMEOUT = 120


def ascend_python() -> Path | None:
    """The interpreter of the Ascend venv: LOWBIT_ASCEND_ENV, or .venv-ascend in the checkout."""
    root = os.environ.get("LOWBIT_ASCEND_ENV") or Path(__file__).resolve().parent.parent / ".venv-ascend"
    python = Path(root) / "bin" / "python"
    return python if python.exists() else None


def environment() -> dict[str, str]:
    """For a process in the Ascend venv."""
    return {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}


def compile_on_ascend(row: Row, launch: Launch) -> Row:
    """The row with its instruction, or its failure; a refusal where the venv is not installed."""
    python = ascend_python()
    if python is None:
        return replace(
            row, refusal="triton-ascend is not installed: run `make ascend-env` (721 MB) and try again"
        )
    process = subprocess.Popen(
        [python, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=environment(), start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(json.dumps(asdict(launch)), timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return replace(row, failure=f"does not compile: no end after {TIMEOUT} s")
    try:
        answer = json.loads(out.splitlines()[-1])
    except (IndexError, ValueError):
        return replace(row, failure=f"does not compile: {err.strip()[-400:]}")
    if answer.get("error"):
        return replace(row, failure=f"does not compile: {answer['error']}")
    return replace(row, instruction=answer["instruction"])


def compile_launch(launch: dict[str, Any]) -> str:
    """A recorded launch → HIVM, the last form before CANN's part. RuntimeError: the compiler refused it."""
    return _finish(_lower(launch))


def _lower(launch: dict[str, Any], tries: int = 4) -> str:
    """A recorded launch → linalg. triton-adapter-opt dies at random now and then: try again."""
    from triton._C.libtriton import ir
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend = backends["ascend"].compiler(GPUTarget("npu", TARGET, 0))
    options = backend.parse_options(launch["options"])
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options)
    metadata = {"hash": "x", **options.__dict__}
    context = ir.context()
    ir.load_dialects(context)
    signature = {name: kind for name, kind in launch["signature"].items() if kind != "constexpr"}
    source = ASTSource(_kernel(launch["module"], launch["kernel"]), signature, launch["constants"])
    module = source.make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
    module = stages["ttir"](module, metadata)
    for attempt in range(tries):
        try:
            return str(stages["ttadapter"](module, dict(metadata)))
        except subprocess.CalledProcessError as error:
            if attempt == tries - 1 or error.returncode > 0:
                raise RuntimeError(error.stderr.decode()[-1500:]) from error
    raise AssertionError("unreachable")


def _finish(linalg: str) -> str:
    """linalg → the last intermediate form, buffers placed."""
    found = importlib.util.find_spec("ascendnpuir")
    if found is None or found.origin is None:
        raise RuntimeError("ascendnpu-ir is not installed in this venv: run `make ascend-env`")
    tool = Path(found.origin).parent / "bin" / "bishengir-compile"
    with tempfile.TemporaryDirectory() as folder:
        source, kept = Path(folder) / "k.mlir", Path(folder) / "t"
        source.write_text(linalg)
        result = subprocess.run(
            [
                tool, source, f"--target={TARGET}", "--enable-auto-multi-buffer=true",
                "--enable-auto-bind-sub-block=true", "--enable-hfusion-compile=true",
                "--enable-hivm-compile=true", "--enable-triton-kernel-compile=true",
                f"--save-temps={kept}", "-o", Path(folder) / "k",
            ],
            capture_output=True, text=True,
        )  # fmt: skip
        written = kept / "module.hivm.opt.mlir"
        if written.exists():
            return written.read_text()
    errors = [line for line in result.stderr.splitlines() if "error" in line]
    raise RuntimeError(re.sub(r'loc\("[^"]*":[\d:]*\): ', "", " ".join(errors))[-600:])


def _kernel(module: str, name: str) -> Any:
    """The jitted function, from the files beside this one; torch, which is not here, is not needed."""
    import types

    class Absent(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return f"torch.{name}"

    if "kernels" not in sys.modules:
        sys.modules["torch"] = Absent("torch")
        folder = Path(__file__).parent
        spec = importlib.util.spec_from_file_location(
            "kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        sys.modules["kernels"] = package
        spec.loader.exec_module(package)
    return getattr(importlib.import_module(f"kernels.{module}"), name)


def main() -> int:
    launch = json.load(sys.stdin)
    try:
        hivm = compile_launch(launch)
        found = sorted(set(re.findall(r"@(mma_tile_\w+)\(", hivm)))
        answer = {"instruction": ", ".join(found) or None}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"[-600:]}
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    # This folder holds quantize.py and compile.py: as a script's folder it must not be searched first.
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]
    sys.exit(main())
