"""Runs one launch of a kernel as bishengir-compile leaves it for CANN's last step: block by block, all cores of each.

What it refuses: addresses outside of every tensor and of a core's memories, what two blocks touch, reads of what
nothing wrote, instructions that touch what another one may not have ended with (`order`), flags that are never set or
stay set, and cores that wait for each other. A call or an operation that it does not know is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..memory import Fault
from .core import Core
from .memory import MemRef, Shared
from .order import Order
from .program import Program, type_of


class Machine:
    """`launch` runs all blocks of a grid."""

    def __init__(self, program: Program, arguments: Sequence[Tensor | float | int]) -> None:
        """arguments: those of the kernel that are no constants, in its order."""
        self._program, self._arguments = program, arguments

    def launch(self, grid: Sequence[int]) -> None:
        sizes = [*grid, 1, 1][:3]
        blocks = int(np.prod(sizes))
        workspace = torch.zeros(max(1, self._workspace() * blocks), dtype=torch.uint8)
        memory = Shared([workspace, *(a for a in self._arguments if isinstance(a, Tensor))])
        # Two addresses and the workspace of the runtime come first, and the grid last.
        given = [0, None, workspace, *self._arguments, *sizes]
        for block in range(blocks):
            memory.begin(block + 1)
            with np.errstate(all="ignore"):
                self._run(block, memory, given)

    def _workspace(self) -> int:
        """Bytes that a block wants."""
        host = self._program.functions.get(f"{self._program.name}_infer_workspace_shape_function")
        if host is None:
            return 0
        constant = next(o for o in host.body if o.name == "arith.constant")
        return int(constant.text.partition(":")[0])

    def _run(self, block: int, memory: Shared, given: list[Any]) -> None:
        """Of a block: the cube core, which is number 0, and its two vector cores; or one vector core alone."""
        functions, name = self._program.functions, self._program.name
        if name in functions:
            order = Order(1)
            cores = [(Core(self._program, block, 0, [], memory, order), functions[name])]
        else:
            order = Order(3)
            cores = [
                (
                    Core(self._program, block, number, [0] if number else [1, 2], memory, order),
                    functions[name + of],
                )
                for number, of in enumerate(("_mix_aic", "_mix_aiv", "_mix_aiv"))
            ]
        running = [
            core.run(function, self._given(function.parameters, memory, given)) for core, function in cores
        ]
        waits = 0
        while running and waits < 3 * len(running):
            one = running.pop(0)
            before = order.moment
            try:
                next(one)
                running.append(one)
                waits = 0 if order.moment != before else waits + 1
            except StopIteration:
                waits = 0
        if running:
            raise Fault(f"{name}: cores wait for each other")
        order.end()

    def _given(self, parameters: list[tuple[str, str]], memory: Shared, given: list[Any]) -> list[Any]:
        if len(parameters) != len(given):
            raise Fault(
                f"{self._program.name}: takes {len(parameters) - 6} arguments, found {len(given) - 6}"
            )
        return [_argument(value, kind, memory) for (_, kind), value in zip(parameters, given, strict=True)]


def _argument(value: Any, kind: str, memory: Shared) -> Any:
    dtype = type_of(kind).dtype
    if isinstance(value, Tensor):
        return MemRef(memory, value.data_ptr(), dtype, (1 << 62,), (1,))
    return None if value is None else np.array(value, dtype)
