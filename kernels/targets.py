"""What each compilation target can multiply, and how much on-chip memory a program may use.

Constants only, so that choosing launch parameters needs no device. The one function that
looks at a device does so when a kernel is called, never at import.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch


@dataclass(frozen=True, kw_only=True)
class Target:
    """One compilation target."""

    name: str
    """`sm90`, `gfx942`, `ascend910b`: the name in tables and tuned files."""
    backend: Literal["cuda", "hip", "npu"]
    arch: int | str
    """What Triton calls it: 90, "gfx942", "Ascend910B3"."""
    warp_size: int
    shared_memory: int
    """Bytes of on-chip memory that one program may use (the unified buffer on Ascend)."""
    cores: int
    """Nominal number of multiprocessors of the usual card; a launch heuristic, not a limit."""
    fp8: Literal["e4m3fn", "e4m3fnuz"] | None
    """The fp8 format that its matrix unit multiplies; None: fp8 is decoded from bytes."""
    scaled_dot: bool = False
    """True where `tl.dot_scaled` on fp8 is a hardware instruction."""
    loads_turned: bool = False
    """True where tiles of a weight [N, K] are best loaded as [K, N]; elsewhere they are turned after they are loaded.
    Loaded turned, Triton on sm80 to sm89 carries 8-bit operands from step to step of K, taken apart byte by byte: more
    than half of the loop's instructions. On gfx950 it is the other way that costs instructions."""
    copies_tiles: bool = False
    """True where Triton's loops copy tiles from memory straight onto the chip, as far as a lane copies 4 bytes or more
    of it, and load them through registers else. A loop that did both would be wrong: `barriers.py`."""
    cuts_bfloat16: bool = False
    """True where cutting float32 is the shortest way to bfloat16, for codes of 8 bits, which is exact."""
    tma: bool = False
    """True where Triton's tensor descriptors become tensor memory accesses."""


_KIB = 1024

TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target(
            name="sm80", backend="cuda", arch=80, warp_size=32, shared_memory=163 * _KIB, cores=108, fp8=None,
            cuts_bfloat16=True,
        ),
        Target(
            name="sm86", backend="cuda", arch=86, warp_size=32, shared_memory=99 * _KIB, cores=82, fp8=None,
            cuts_bfloat16=True,
        ),
        Target(
            name="sm89", backend="cuda", arch=89, warp_size=32, shared_memory=99 * _KIB, cores=128,
            fp8="e4m3fn",
        ),
        Target(
            name="sm90", backend="cuda", arch=90, warp_size=32, shared_memory=227 * _KIB, cores=132,
            fp8="e4m3fn", tma=True,
        ),
        Target(
            name="sm100", backend="cuda", arch=100, warp_size=32, shared_memory=227 * _KIB, cores=148,
            fp8="e4m3fn", scaled_dot=True, tma=True,
        ),
        Target(
            name="sm120", backend="cuda", arch=120, warp_size=32, shared_memory=99 * _KIB, cores=170,
            fp8="e4m3fn", scaled_dot=True, tma=True,
        ),
        Target(
            name="gfx942", backend="hip", arch="gfx942", warp_size=64, shared_memory=64 * _KIB, cores=304,
            fp8="e4m3fnuz", cuts_bfloat16=True,
        ),
        Target(
            name="gfx950", backend="hip", arch="gfx950", warp_size=64, shared_memory=160 * _KIB, cores=256,
            fp8="e4m3fn", scaled_dot=True, loads_turned=True, copies_tiles=True,
        ),
        Target(
            name="ascend910b", backend="npu", arch="Ascend910B3", warp_size=1, shared_memory=192 * _KIB,
            cores=20, fp8=None,
        ),
    )
}  # fmt: skip

# Architectures that run the code of another one in the table.
_SAME_AS = {87: "sm86", 103: "sm100", 110: "sm100", 121: "sm120"}

# What the interpreter pretends to be. Any target would do: the arithmetic is the same.
INTERPRETED_AS = "sm90"

_pretended: Target | None = None


def get_target(name: str) -> Target:
    """The target of that name. Raises ValueError naming those that exist."""
    if name not in TARGETS:
        raise ValueError(f"unknown target {name!r}: expected one of {', '.join(TARGETS)}")
    return TARGETS[name]


def interpreting() -> bool:
    """True when kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0", "false", "off")


@contextmanager
def pretending(target: Target) -> Iterator[None]:
    """Within, every device is `target`: to record or interpret what would be launched there."""
    global _pretended
    before, _pretended = _pretended, target
    try:
        yield
    finally:
        _pretended = before


def device_target(device: torch.device) -> Target:
    """The target of the device that a tensor lies on.

    Raises ValueError for a CPU tensor outside the interpreter and for an unknown device.
    """
    if _pretended is not None:
        return _pretended
    if device.type == "cpu" and interpreting():
        return TARGETS[INTERPRETED_AS]
    if device.type in ("cuda", "npu"):
        return _accelerator_target(device.type, device.index or 0)
    raise ValueError(
        f"expected tensors on a CUDA, ROCm or Ascend device, found {device}; "
        "on a CPU use lowbit.ops, or set TRITON_INTERPRET=1 before triton is imported"
    )


@cache
def _accelerator_target(kind: str, index: int) -> Target:
    if kind == "npu":
        return TARGETS["ascend910b"]
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        name = properties.gcnArchName.split(":")[0]
    else:
        arch = properties.major * 10 + properties.minor
        name = _SAME_AS.get(arch, f"sm{arch}")
    if name not in TARGETS:
        raise ValueError(f"no kernels for {properties.name} ({name}): expected one of {', '.join(TARGETS)}")
    return TARGETS[name]


def on_device(device: torch.device) -> torch.accelerator.device_index:
    """Within, `device` is the current one: Triton launches there, wherever the tensors lie. Nothing for a CPU."""
    return torch.accelerator.device_index(device.index)


def core_count(device: torch.device) -> int:
    """Multiprocessors of this device: the grid of a persistent kernel."""
    if device.type == "cuda":
        return _cuda_cores(device.index or 0)
    return device_target(device).cores


@cache
def _cuda_cores(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)
