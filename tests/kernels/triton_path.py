"""What Triton itself would compile for every case of the matrix, beside what the matrix compiled.

    python tests/kernels/triton_path.py sm90

`record` says which signature, constants and attributes a launch has; Triton finds them again when a kernel is
launched. Here a launch takes Triton's own way, with a driver that only says what the target is, and is stopped before
it compiles. Prints a list of differences, as JSON, and calls that would compile again for another number of tokens.
A process of its own, without the interpreter.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from lowbit.kernels.compile_cases import CASES, K, N, empty
from lowbit.kernels.hadamard import hadamard
from lowbit.kernels.matmul import matmul
from lowbit.kernels.matmul_block import matmul_block
from lowbit.kernels.matmul_grouped import matmul_grouped
from lowbit.kernels.matmul_weight_only import matmul_weight_only
from lowbit.kernels.quantize import quantize_per_group, quantize_per_token
from lowbit.kernels.record import Launch, record
from lowbit.kernels.targets import Target, get_target, pretending
from triton.runtime import driver

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests

from machines.device import Driver


class CurrentDevice:
    """In place of torch.accelerator.device_index: counts how deep."""

    depth = 0

    def __init__(self, index: int | None) -> None:
        pass

    def __enter__(self) -> None:
        CurrentDevice.depth += 1

    def __exit__(self, *_: object) -> None:
        CurrentDevice.depth -= 1


class Stopped(Exception):
    """Raised in place of compiling."""


def launched(call: Any, target: Target) -> list[dict[str, Any]]:
    """Signature, constants, attributes and options of every launch of `call`, as Triton finds them."""
    found: list[dict[str, Any]] = []
    run, compile_ = triton.JITFunction.run, triton.compiler.compile

    def compile_nothing(src: Any, target: Any, options: dict[str, Any], **_: Any) -> None:
        names = list(src.signature)
        found.append(
            {
                "kernel": src.fn.__name__,
                "signature": dict(src.signature),
                "constants": {names[path[0]]: value for path, value in src.constants.items()},
                "attributes": {names[path[0]]: value for path, value in src.attrs.items() if value},
                "options": options,
            }
        )
        raise Stopped

    def run_to_the_compiler(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if not CurrentDevice.depth:
            raise AssertionError(f"{self.fn.__name__} is launched on the current device, not on its tensors'")
        self.device_caches.clear()  # they keep the compiler that they were made with
        try:
            run(self, *args, grid=grid, warmup=True, **kwargs)
        except Stopped:
            return
        raise AssertionError(f"{self.fn.__name__} did not reach the compiler")

    triton.JITFunction.run, triton.compiler.compile = run_to_the_compiler, compile_nothing
    try:
        with pretending(target):
            call()
    finally:
        triton.JITFunction.run, triton.compiler.compile = run, compile_
    return found


def differences(recorded: Launch, own: dict[str, Any]) -> dict[str, Any]:
    """Where the two disagree: name → [recorded, Triton's own]."""
    ours = {
        "kernel": recorded.kernel, "signature": recorded.signature, "constants": recorded.constants,
        "attributes": recorded.attributes, "options": recorded.options,
    }  # fmt: skip
    own = own | {"options": {name: own["options"].get(name) for name in recorded.options}}
    return {name: [ours[name], own[name]] for name in ours if ours[name] != own[name]}


_INT8 = {"dtype": torch.int8}
TOKENS: dict[str, Callable[[int], object]] = {
    "matmul": lambda m: matmul(empty(m, K, **_INT8), empty(N, K, **_INT8), empty(m, 1), empty(N, 1)),
    "matmul, static": lambda m: matmul(empty(m, K, **_INT8), empty(N, K, **_INT8), empty(1), empty(N, 1)),
    "matmul_block": lambda m: matmul_block(
        empty(m, K, **_INT8), empty(N, K, **_INT8), empty(m, K // 128), empty(N // 128, K // 128)
    ),
    "matmul_weight_only": lambda m: matmul_weight_only(empty(m, K), empty(N, K, **_INT8), empty(N, 1)),
    "matmul_grouped": lambda m: matmul_grouped(
        empty(m, K, **_INT8),
        empty(8, N, K, **_INT8),
        empty(9, dtype=torch.int32),
        empty(m, 1),
        empty(8, N, 1),
    ),
    "quantize_per_token": lambda m: quantize_per_token(empty(m, K)),
    "quantize_per_group": lambda m: quantize_per_group(empty(m, K)),
    "hadamard": lambda m: hadamard(empty(m, K), 2048),
}
"""Calls with so many tokens: one compilation serves every number of them that has the same launch parameters."""


def main() -> None:
    target = get_target(sys.argv[1])
    driver.set_active(Driver(target))
    torch.accelerator.device_index = CurrentDevice  # type: ignore[assignment, misc]
    warnings.simplefilter("error")
    found, compared = [], 0
    for case in CASES:
        try:
            recorded = record(lambda case=case: case.call(target), target)
        except ValueError:
            continue
        own = launched(lambda case=case: case.call(target), target)
        if len(own) != len(recorded):
            found.append({"case": case.name, "launches": [len(recorded), len(own)]})
        for ours, theirs in zip(recorded, own, strict=False):
            compared += 1
            if wrong := differences(ours, theirs):
                found.append({"case": case.name} | wrong)
    again = [
        name
        for name, call in TOKENS.items()
        if len({repr(record(partial(call, m), target)) for m in (1, 2, 15, 16)}) > 1
    ]
    print(json.dumps({"compared": compared, "different": found, "compiled_again": again}, default=str))


if __name__ == "__main__":
    main()
