"""Training on quantized weights in several processes, as the guide says: one result in both, codes as they were."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import lowbit


def train(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """What is trained, after three steps on this worker's half of x."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]


def model_of(scheme: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128), nn.LayerNorm(128), nn.Linear(128, 128))
    return lowbit.quantize_model(model, scheme)


def codes_of(model: nn.Module) -> list[torch.Tensor]:
    return [b.view(torch.uint8).clone() for b in model.buffers()]


def main() -> None:
    """One worker; torchrun's variables say which."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    rows = torch.randn(2, 16, 128, generator=torch.Generator().manual_seed(1))
    mine = rows[dist.get_rank()]
    for scheme in ("int8", "fp8", "mxfp8", "int8-weight-only"):
        alone = train(model_of(scheme), rows.flatten(0, 1))
        for kind in ("ddp", "fsdp"):
            model = model_of(scheme)
            before = codes_of(model)
            if kind == "ddp":
                wrapped: nn.Module = DistributedDataParallel(model, broadcast_buffers=False)
            else:
                wrapped = fully_shard(model)  # type: ignore[assignment]
            found = train(wrapped, mine)
            for a, b in zip(found, alone, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
            assert all(torch.equal(a, b) for a, b in zip(codes_of(model), before, strict=True))
            # One write: with PYTHONUNBUFFERED the other worker's came between the words of a line.
            print(f"{scheme} {kind}\n", end="", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    # DDP and FSDP keep the group, whose threads free their tensors when they come to it: one that does while the
    # interpreter ends aborts the process, once in some hundred runs. So nothing is ended here.
    sys.stdout.flush()
    os._exit(0)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
def test_quantized_weights_stay_in_every_process():
    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        __file__,
    ]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    # torch 2.9's own says there that ranks are connected.
    assert len([s for s in done.stdout.splitlines() if not s.startswith("[Gloo]")]) == 2 * 2 * 4


if __name__ == "__main__":
    main()
