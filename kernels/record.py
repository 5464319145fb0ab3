"""What a kernel's Python function would launch on a target, recorded instead of launched.

So the compile matrix compiles what users run, with the parameters that they run it with, and
not a second list of signatures that could go stale. Tensors are on the meta device: they cost
no memory, whatever their size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton

from .targets import Target, interpreting, pretending

_POINTERS = {
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e4m3fnuz: "fp8e4b8",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch, in plain values: it goes to another process, or another Triton, as JSON."""

    module: str
    """File of the kernel, without folder and ending: `matmul`."""
    kernel: str
    """Name of the jitted function: `matmul_kernel`."""
    signature: dict[str, str]
    """Argument → Triton type, in the order of the kernel: `*i8`, `i32`, `constexpr`."""
    constants: dict[str, Any]
    attributes: dict[str, list[list[Any]]]
    """Argument → what Triton would specialize on: divisibility by 16, a range of 32 bits."""
    options: dict[str, Any]
    """num_warps, num_stages, …"""


def record(call: Callable[[], object], target: Target) -> list[Launch]:
    """Run `call`, a kernel function on meta tensors, and return what it would launch on `target`."""
    if interpreting():
        raise RuntimeError(
            "expected compiled kernels, found TRITON_INTERPRET set: unset it, in a process of its own"
        )
    launches: list[Launch] = []
    run = triton.JITFunction.run

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(describe(self, args, kwargs, target))

    triton.JITFunction.run = note
    try:
        with pretending(target):
            call()
    finally:
        triton.JITFunction.run = run
    return launches


def describe(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], target: Target) -> Launch:
    """The launch of a jitted kernel with these arguments, as Triton would specialize it on `target`."""
    parameters = inspect.signature(kernel.fn).parameters
    values = dict(zip(parameters, args, strict=False))
    values.update({name: value for name, value in kwargs.items() if name in parameters})
    options = {name: value for name, value in kwargs.items() if name not in parameters}
    signature, constants, attributes = {}, {}, {}
    for name, parameter in parameters.items():
        value, general = values[name], name in kernel.do_not_specialize
        one = type(value) is int and value == 1 and not general
        if "constexpr" in str(parameter.annotation) or value is None or one:
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name], attribute = _type(value, target)
        if attribute and not general:
            attributes[name] = attribute
    return Launch(
        module=kernel.fn.__module__.rpartition(".")[2], kernel=kernel.fn.__name__, signature=signature,
        constants=constants, attributes=attributes, options=options,
    )  # fmt: skip


def _type(value: Any, target: Target) -> tuple[str, list[list[Any]]]:
    aligned: list[list[Any]] = [["tt.divisibility", 16]]
    if isinstance(value, torch.Tensor):
        small = value.numel() * value.element_size() < 2**31
        return f"*{_POINTERS[value.dtype]}", [
            *aligned, *([["tt.pointer_range", 32]] if small and target.backend == "hip" else [])
        ]  # fmt: skip
    if isinstance(value, float):
        return "fp32", []
    if isinstance(value, int):
        return "i32" if abs(value) < 2**31 else "i64", aligned if value % 16 == 0 else []
    block = ", ".join(str(size) for size in value.block_shape)
    return f"tensordesc<{_POINTERS[value.base.dtype]}[{block}]>", []
