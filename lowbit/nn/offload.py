"""Experts under accelerate's offloading: it asks for a module's buffers by name, which are stacks of all experts,
and knows the checkpoint's tensors, which are one expert's each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lowbit.nn.stacked import StackedModule, fill, stack_of


class StackedWeights(Mapping[str, Tensor]):
    """Stacked buffers of `experts`, made from the checkpoint's tensors in `weights` when asked for.

    Offloaded to memory, those lie in one stack, which is then what is returned; on disk
    they are read and stacked each time. The checkpoint's own names give its tensors, to be saved again.
    """

    def __init__(self, experts: StackedModule, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights
        self._names: dict[str, list[str]] = {}
        for name, buffer, _, _ in experts.disk_tensors():
            self._names.setdefault(buffer, []).append(name)
        self._dtypes = {buffer: experts.get_buffer(buffer).dtype for buffer in self._names}

    def __getitem__(self, buffer: str) -> Tensor:
        if buffer not in self._names:
            return self._weights[buffer].clone()
        parts = [self._weights[name] for name in self._names[buffer]]
        if (stack := stack_of(parts)) is not None:
            return stack
        stack = torch.empty(len(parts), *parts[0].shape, dtype=self._dtypes[buffer])
        for i, part in enumerate(parts):
            fill(stack, i, part)
        return stack

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def follow_offloading(experts: StackedModule, hook: Any) -> None:
    """Let accelerate's hook of `experts`, or those that it holds, find the stacks where it offloads them."""
    for each in getattr(hook, "hooks", (hook,)):
        weights = getattr(each, "weights_map", None)
        if weights is not None and not isinstance(weights, StackedWeights):
            each.weights_map = StackedWeights(experts, weights)
