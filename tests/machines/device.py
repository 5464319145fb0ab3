"""Triton's driver for the machines: kernels are compiled as ever, and run on the memory of CPU tensors."""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import Any

import torch
import triton
from lowbit.kernels.targets import Target
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from . import amdgcn, ptx
from .memory import Global
from .ptx.transfer import TensorMap

_PACK = {
    "i1": "b",
    "i8": "b",
    "i16": "h",
    "i32": "i",
    "i64": "q",
    "u32": "I",
    "u64": "Q",
    "fp32": "f",
    "fp64": "d",
}


class Driver:
    """In place of a GPU's. `launches`: names of the kernels that ran."""

    def __init__(self, target: Target) -> None:
        self._target = GPUTarget(target.backend, target.arch, target.warp_size)
        self._shared = target.shared_memory
        self.launches: list[str] = []
        self.utils = SimpleNamespace(get_device_properties=self._properties, load_binary=self._load)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def _properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self._shared}

    def _load(self, name: str, code: bytes, shared: int, device: int) -> tuple[None, Any, int, int, int]:
        parse = amdgcn.parse if self._target.backend == "hip" else ptx.parse
        return None, parse(code.decode()), 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What Triton calls to launch."""

        def launch(x: int, y: int, z: int, stream: int, program: Any, *rest: Any) -> None:
            arguments = rest[4:]
            assert metadata.num_ctas == 1 and not metadata.global_scratch_size, metadata
            parameters, maps, tensors = _parameters(program, source.signature, metadata, arguments)
            memory, shared = Global(tensors), metadata.shared
            if isinstance(program, ptx.Program):
                ptx.Machine(program, parameters, maps, memory, shared).launch((x, y, z))
            else:
                amdgcn.Machine(program, parameters, memory, shared).launch((x, y, z))
            self.launches.append(program.name)

        return launch


def _parameters(
    program: Any, signature: dict[str, str], metadata: Any, arguments: tuple[Any, ...]
) -> tuple[bytes, dict[int, TensorMap], list[Tensor]]:
    """(bytes of all parameters, tensor maps by their offsets, tensors that may be touched)."""
    block = bytearray(program.parameter_bytes)
    places = iter(program.parameters.values())
    maps, tensors, described = {}, [], iter(metadata.tensordesc_meta or ())

    def put(value: Any, form: str) -> None:
        at, size = next(places)
        data = struct.pack(f"<{form}", value)
        assert len(data) == size, (value, form, size)
        block[at : at + size] = data

    for kind, value in zip(signature.values(), arguments, strict=True):
        if kind == "constexpr":
            continue
        if kind.startswith("tensordesc"):
            tensors.append(value.base)
            if metadata.tensordesc_meta:
                at, _ = next(places)
                maps[at] = _tensor_map(value, next(described))
            else:  # a target without TMA
                put(value.base.data_ptr(), "Q")
                for number in (*value.shape, *value.strides):
                    put(number, "q")
                for flag in (value.padding == "nan", value.round_f32_to_tf32):
                    put(flag, "b")
            for extent in value.shape:
                put(extent, "i")
            for stride in value.strides:
                put(stride, "q")
        elif kind.startswith("*"):
            put(value.data_ptr(), "Q")
            tensors.append(value)
        else:
            put(value, _PACK[kind])
    for at, size in places:  # scratch memory, of which there is none
        block[at : at + size] = bytes(size)
    return bytes(block), maps, tensors


def _tensor_map(descriptor: Any, meta: dict[str, Any]) -> TensorMap:
    (rows, columns), (stride, one) = descriptor.shape, descriptor.strides
    assert one == 1 and not meta["fp4_padded"], meta
    return TensorMap(
        base=descriptor.base.data_ptr(), rows=rows, columns=columns, row_stride=stride * meta["elem_size"],
        item=meta["elem_size"], box=tuple(meta["block_size"]), row_bytes=16 << meta["swizzle"],
    )  # fmt: skip


def device(target: Target) -> Driver:
    """From now on Triton launches kernels on the machine, as on a device of that target. Without the interpreter."""

    text, binary = ("amdgcn", "hsaco") if target.backend == "hip" else ("ptx", "cubin")

    def stages(backend: Any = None, found: Any = None, *_: Any) -> Any:
        if found is None:
            return text, text
        found[binary] = lambda source, metadata: source.encode()
        return None

    triton.knobs.runtime.add_stages_inspection_hook = stages
    made = Driver(target)
    driver.set_active(made)
    return made
