"""What Triton itself would compile for every case of the matrix, beside what the matrix compiled.

    python tests/kernels/triton_path.py sm90

`record` says which signature, constants and attributes a launch has; Triton finds them again when a kernel is
launched. Here a launch takes Triton's own way, with a driver that only says what the target is, and is stopped before
it compiles. Prints a list of differences, as JSON. A process of its own, without the interpreter.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import torch
import triton
from lowbit.kernels.compile_cases import CASES
from lowbit.kernels.record import Launch, record
from lowbit.kernels.targets import Target, get_target, pretending
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class Driver:
    """A device of one target, of which nothing but the name is known."""

    def __init__(self, target: Target) -> None:
        self.target = GPUTarget(target.backend, target.arch, target.warp_size)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


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


def main() -> None:
    target = get_target(sys.argv[1])
    driver.set_active(Driver(target))
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
    print(json.dumps({"compared": compared, "different": found}, default=str))


if __name__ == "__main__":
    main()
