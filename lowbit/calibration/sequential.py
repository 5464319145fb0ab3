"""Round a decoder layer while its data passes through: one run over the data where the usual way takes two.

Every Linear waits for its input, is rounded by the Hessian of that input, and the run goes on with
what was rounded. So each is calibrated on what it will see when deployed: inputs that the rounded
modules before it, in this layer too, have produced ("true sequential" in GPTQ's words). All
tokens pass at once, which takes memory for a layer's intermediate values; `fits` says whether it may.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.calibration.graph import LayerGraph
from lowbit.calibration.layer import groups_of, round_members
from lowbit.calibration.methods import Method
from lowbit.calibration.products import rounded_module
from lowbit.calibration.statistics import InputStatistics, Wanted
from lowbit.quantize import Quantized
from lowbit.scheme import Scheme

SKETCH = 32
"""Random projections of a module's output that stand for its length."""


def fits(windows: Sequence[Tensor], hidden: int, intermediate: int, memory_limit: int) -> bool:
    """Whether windows of token ids [T] can pass a layer as one batch: equal lengths, and room for their values.

    About four tensors of the hidden size and three of the intermediate size live at once, in float32.
    """
    lengths = {int(w.numel()) for w in windows}
    tokens = sum(int(w.numel()) for w in windows)
    return len(lengths) == 1 and tokens * (4 * hidden + 3 * intermediate) * 4 <= memory_limit


def round_in_passing(
    layer: nn.Module,
    graph: LayerGraph,
    method: Method,
    schemes: Mapping[str, Scheme],
    wanted: Wanted,
    run: Callable[[], None],
    *,
    min_tokens: int,
    prepare: Mapping[str, Callable[[Tensor], Tensor]],
) -> tuple[dict[str, Quantized], dict[str, Any]]:
    """Round every quantized Linear of the layer during `run`, which must run it once over all the data.

    Activations must be dynamic or left in float. `prepare` changes a module's input first (an
    online rotation). The layer itself stays as it was. Returns what `layer.quantize_weights` does.
    """
    quantized: dict[str, Quantized] = {}
    report: dict[str, Any] = {}
    seen = replace(wanted, channels=False, sample_rows=0)
    everything: dict[str, nn.Module] = {}
    for first, members in groups_of(graph, schemes):
        linears = {m: layer.get_submodule(m) for m in members}
        writes = any(m in graph.writers for m in members)
        change = prepare.get(first)

        def look(
            x: Tensor,
            first: str = first,
            linears: Mapping[str, nn.Module] = linears,
            writes: bool = writes,
        ) -> dict[str, nn.Module]:
            weights: dict[str, Tensor] = {m: linear.get_parameter("weight") for m, linear in linears.items()}
            s = InputStatistics(wanted=seen, spec=schemes[first].activations)
            s.update(x, _sketch(x, weights[first]) if writes else None)
            codes, errors = round_members(weights, s, method, schemes, min_tokens=min_tokens)
            quantized.update(codes)
            report.update(errors)
            return {m: rounded_module(linears[m], codes[m], schemes[m]) for m in linears}

        everything |= linears
        group = _Group(look, change)
        for m in members:
            _put(layer, m, _Passing(m, group))
    try:
        run()
    finally:
        for m, linear in everything.items():
            _put(layer, m, linear)
    return quantized, report


def _put(layer: nn.Module, name: str, module: nn.Module) -> None:
    setattr(layer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], module)


class _Group:
    """Modules that share an input, rounded when it first comes."""

    def __init__(
        self, look: Callable[[Tensor], Mapping[str, nn.Module]], change: Callable[[Tensor], Tensor] | None
    ) -> None:
        self.look, self.change = look, change
        self.modules: Mapping[str, nn.Module] | None = None

    def __call__(self, name: str, x: Tensor) -> Tensor:
        if self.change is not None:
            x = self.change(x)
        if self.modules is None:
            self.modules = self.look(x)
        out: Tensor = self.modules[name](x)
        return out


class _Passing(nn.Module):
    """Takes a Linear's place while the data passes."""

    def __init__(self, name: str, group: _Group) -> None:
        super().__init__()
        self.name, self.group = name, group

    def forward(self, x: Tensor) -> Tensor:
        return self.group(self.name, x)


def _sketch(x: Tensor, weight: Tensor) -> Tensor:
    """[tokens, SKETCH] whose rows have nearly the length of x·Wᵀ (Johnson and Lindenstrauss), at a part of the work."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (SKETCH, weight.shape[0]), generator=generator).to(weight) * 2 - 1
    return x @ (signs @ weight / SKETCH**0.5).t()
