"""A model larger than the memory it is calibrated in: `python scripts/calibrate_small_memory.py`.

Generates a Llama-shaped BF16 checkpoint, then calibrates it with SmoothQuant in a process whose
memory (RLIMIT_DATA: everything that is not a mapped file) is limited to half of the
checkpoint's size, and says how much was used. `--method gptq` takes longer.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from bench_convert import generate  # beside this file

CHILD = """
import resource, sys, torch
src, out, method, limit = sys.argv[1:5]
resource.setrlimit(resource.RLIMIT_DATA, (int(limit), int(limit)))
from lowbit.calibration.calibrate import RunOptions, calibrate
from lowbit.calibration.methods import get_method
from lowbit.scheme import get_scheme
windows = list(torch.randint(0, 32000, (8, 128), generator=torch.Generator().manual_seed(0)))
found = calibrate(src, out, get_scheme("int8"), get_method(method), windows,
                  options=RunOptions(memory_limit=1 << 20), overwrite=True)
status = open("/proc/self/status").read()
print(len(found.modules()), "modules", status.split("VmHWM:")[1].split()[0])
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=4.0, help="size of the checkpoint")
    parser.add_argument("--method", default="smoothquant")
    parser.add_argument("--work", type=Path, default=Path(".bench"))
    arguments = parser.parse_args()
    source = generate(arguments.work / f"bf16-{arguments.gb:g}", arguments.gb)
    size = sum(f.stat().st_size for f in source.glob("*.safetensors"))
    limit = size // 2
    begin = time.perf_counter()
    command = [
        sys.executable, "-c", CHILD, str(source), str(arguments.work / "calibration"), arguments.method, str(limit),
    ]  # fmt: skip
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"failed under a limit of {limit / 1e9:.2f} GB:\n{done.stderr[-3000:]}")
    modules, peak = done.stdout.strip().rsplit(maxsplit=1)
    print(
        f"{size / 1e9:.2f} GB of weights, {arguments.method} under a limit of {limit / 1e9:.2f} GB: "
        f"{modules} in {time.perf_counter() - begin:.0f} s, peak resident {int(peak) * 1024 / 1e9:.2f} GB "
        "(mapped files included)"
    )


if __name__ == "__main__":
    main()
