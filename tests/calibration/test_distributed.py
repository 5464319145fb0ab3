"""Two workers that share the data write what one worker writes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import torch

from lowbit.calibration import store
from lowbit.calibration.calibrate import calibrate
from lowbit.calibration.methods import METHODS
from lowbit.scheme import get_scheme

SCRIPT = """
import sys, torch
from lowbit.calibration.calibrate import calibrate
from lowbit.calibration.distributed import join_workers
from lowbit.calibration.methods import METHODS
from lowbit.scheme import get_scheme
torch.set_num_threads(1)
join_workers()
windows = list(torch.load(sys.argv[3], weights_only=True))
calibrate(sys.argv[1], sys.argv[2], get_scheme("int8-static"), METHODS["smoothquant-gptq"], windows)
"""


def test_torchrun_merges_statistics(checkpoints, windows, tmp_path):
    source, scheme = checkpoints["qwen3"], get_scheme("int8-static")
    torch.save(torch.stack(windows), tmp_path / "ids.pt")
    (tmp_path / "worker.py").write_text(SCRIPT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(2):
        environment = {
            **os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [
            sys.executable,
            str(tmp_path / "worker.py"),
            str(source),
            str(tmp_path / "two"),
            str(tmp_path / "ids.pt"),
        ]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-2000:]
    two = store.read(tmp_path / "two")
    one = calibrate(source, tmp_path / "one", scheme, METHODS["smoothquant-gptq"], windows)
    assert two.complete and two.tensors.keys() == one.tensors.keys()
    a, b = one.layers["model.layers.0"], two.layers["model.layers.0"]
    for module, report in a["modules"].items():
        # Other tokens are sampled for the searches; the errors are measured on all of them.
        assert abs(b["modules"][module]["error"] - report["error"]) < 0.3 * report["error"], module
