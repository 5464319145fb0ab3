"""Which device a process computes on, alone or as one of several workers that a launcher started.

accelerate's PartialState chooses a device too, but the group that it forms moves tensors between devices
(nccl, hccl), while statistics are merged through host memory; and it takes no device by name.
"""

from __future__ import annotations

import os

import torch

from lowbit.errors import InputError


def choose_device(wanted: str | torch.device) -> torch.device:
    """This process's device, made the current one. A `torch.device` is taken as it is.

    `auto`: the machine's accelerator, or cpu where there is none or it has no float64. A name without an
    index is, under `torchrun` or `accelerate launch`, this worker's own device: the one of index
    LOCAL_RANK. Raises InputError for a device that torch does not have, an index that several workers
    of this machine would share, more workers on this machine than devices, and a device without float64.
    """
    if isinstance(wanted, torch.device):
        return wanted
    kind, colon, index = wanted.strip().lower().partition(":")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    there = None if accelerator is None else accelerator.type
    if kind == "cpu" or (kind == "auto" and (there is None or _only_cpu())):
        return torch.device("cpu")
    if there is None or kind not in ("auto", there):
        raise InputError(
            f"expected device auto, cpu{f' or {there}' if there else ''}, found {wanted}, which this torch does not "
            "have here; choose one of those, or install a torch that is built for it"
        )
    count, local = torch.accelerator.device_count(), _local_workers()
    if colon and not (index.isdecimal() and int(index) < count):
        raise InputError(f"expected {kind}:0 to {kind}:{count - 1}, found {wanted}; choose one of those")
    if colon and local > 1:
        raise InputError(
            f"expected a device without an index for {local} workers on one machine, found {wanted}, which all of them "
            f"would share; say --device {kind}, and each takes its own"
        )
    if local > count:
        raise InputError(
            f"expected at most one worker per device, found {local} workers on this machine and {count} of {there}; "
            f"start {count} workers per machine, or say --device cpu"
        )
    if local > 1 and "LOCAL_RANK" not in os.environ:
        raise InputError(
            "expected LOCAL_RANK, which says which of a machine's workers this is, found it unset; start the "
            "workers by torchrun or accelerate launch"
        )
    device = torch.device(there, int(index) if colon else int(os.environ.get("LOCAL_RANK", 0)))
    if reason := _refusal(device):
        if kind == "auto":
            return torch.device("cpu")
        raise InputError(
            f"expected a device that factorizes float64 matrices, as calibration must, found {device} ({reason}); "
            "say --device cpu"
        )
    torch.accelerator.set_device_index(device.index)
    return device


def join(wanted: str | torch.device) -> torch.device:
    """`choose_device`, and join the other workers if there are any. May fail: call it before any work."""
    from lowbit.calibration.distributed import join_workers

    device = choose_device(wanted)
    join_workers()
    return device


def _only_cpu() -> bool:
    """Whether `accelerate launch --cpu` started this process."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")


def _local_workers() -> int:
    """Workers on this machine; all of them where the launcher does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)


def _refusal(device: torch.device) -> str:
    """Why the device cannot calibrate; empty when it can."""
    try:
        matrix = torch.eye(2, dtype=torch.float64, device=device)
        torch.linalg.cholesky_ex(matrix @ matrix)
    except (RuntimeError, TypeError, NotImplementedError, AssertionError) as error:
        return str(error).splitlines()[0]
    return ""
