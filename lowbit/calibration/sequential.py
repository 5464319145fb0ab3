"""Round a decoder layer while its data passes through: one run over the data where the usual way takes two.

Every Linear waits for its input, is smoothed and rounded by what that input is, and the run goes on
with what was rounded. A scale that moves out of a module already rounded divides that one's scale per
channel; its codes stay. So each is calibrated on what it will see when deployed: inputs that the rounded
modules before it, in this layer too, have produced ("true sequential" in GPTQ's words). All
tokens pass at once, which takes memory for a layer's intermediate values; `fits` says whether it may.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.calibration.graph import LayerGraph, Pair
from lowbit.calibration.joints import Joint, choose_smoothing, joints, smoothing_report
from lowbit.calibration.layer import groups_of, round_members
from lowbit.calibration.methods import Method
from lowbit.calibration.products import rounded_module
from lowbit.calibration.shared_scale import MatrixOf
from lowbit.calibration.statistics import InputStatistics, Wanted
from lowbit.checkpoint.rules import matmul_key
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


@dataclass(kw_only=True)
class Passed:
    """What became of a layer while its data passed."""

    quantized: dict[str, Quantized] = field(default_factory=dict)
    errors: dict[str, Any] = field(default_factory=dict)
    """Of rounding, as `layer.quantize_weights` reports them."""
    smoothing: dict[str, Any] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    """Modules that scales moved into or out of."""


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
    stored: torch.dtype | None = None,
    matrix_of: MatrixOf = matmul_key,
) -> Passed:
    """Smooth and round every quantized Linear of the layer during `run`, which must run it once over all data.

    Activations must be dynamic or left in float, and weights have a scale per output channel where
    scales move through pairs. `prepare` changes a module's input first (an online rotation); `stored`
    is the dtype of norms on disk. Afterwards the layer holds its float weights, with the scales moved.
    """
    passed = Passed()
    moves: list[tuple[Joint, Tensor]] = []
    seen = replace(wanted, channels=False, sample_rows=0)
    before: dict[str, list[Joint]] = {}
    for joint in joints(graph, schemes, method):
        before.setdefault(joint.first, []).append(joint)
    linears: dict[str, nn.Module] = {}

    def look(members: tuple[str, ...], x: Tensor) -> tuple[Mapping[str, nn.Module], Tensor | None]:
        """The rounded members for their input, and what it is to be divided by."""
        first, scheme = members[0], schemes[members[0]]
        weights: dict[str, Tensor] = {m: linears[m].get_parameter("weight").detach() for m in members}
        divisor = None
        for joint in before.get(first, ()):
            s = InputStatistics(
                wanted=Wanted(sample_rows=wanted.sample_rows), spec=None, rows_per_batch=wanted.sample_rows
            )
            s.update(x)
            chosen = choose_smoothing(joint, s, list(weights.values()), scheme, method)
            if chosen is None or chosen.alpha is None:
                continue
            applied = joint.applied(layer, chosen.scale, stored).to(x)
            x, weights = x / applied, {m: w * applied for m, w in weights.items()}
            divisor = applied if divisor is None else divisor * applied
            moves.append((joint, chosen.scale))
            passed.smoothing[joint.name] = smoothing_report(chosen)
        s = InputStatistics(wanted=seen, spec=scheme.activations)
        writes = any(m in graph.writers for m in members)
        s.update(x, _sketch(x, weights[first]) if writes and seen.anything else None)
        codes, errors = round_members(weights, s, method, schemes, min_tokens=min_tokens, matrix_of=matrix_of)
        passed.quantized.update(codes)
        passed.errors.update(errors)
        return {m: rounded_module(linears[m], codes[m], schemes[m]) for m in members}, divisor

    for first, members in groups_of(graph, schemes):
        group = _Group(members, look, prepare.get(first))
        for m in members:
            linears[m] = layer.get_submodule(m)
            _put(layer, m, _Passing(m, linears[m], group))
    try:
        run()
    finally:
        for m, linear in linears.items():
            _put(layer, m, linear)
    # Only now: what else reads a norm has seen its output as it was.
    for joint, scale in moves:
        joint.move(layer, scale, stored)
        passed.changed |= joint.changes
        if isinstance(joint.before, Pair) and (q := passed.quantized.get(joint.before.first)) is not None:
            divided = q.scale / joint.first_scale(scale).to(q.scale).view(-1, 1)
            passed.quantized[joint.before.first] = replace(q, scale=divided)
    return passed


def _put(layer: nn.Module, name: str, module: nn.Module) -> None:
    setattr(layer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], module)


class _Group:
    """Modules that share an input, rounded when it first comes."""

    def __init__(
        self,
        members: tuple[str, ...],
        look: Callable[[tuple[str, ...], Tensor], tuple[Mapping[str, nn.Module], Tensor | None]],
        change: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.members, self.look, self.change = members, look, change
        self.modules: Mapping[str, nn.Module] | None = None
        self.divisor: Tensor | None = None

    def __call__(self, name: str, x: Tensor) -> Tensor:
        if self.change is not None:
            x = self.change(x)
        if self.modules is None:
            self.modules, self.divisor = self.look(self.members, x)
        out: Tensor = self.modules[name](x if self.divisor is None else x / self.divisor)
        return out


class _Passing(nn.Module):
    """Takes a Linear's place while the data passes."""

    def __init__(self, name: str, linear: nn.Module, group: _Group) -> None:
        super().__init__()
        self.name, self.group = name, group
        # For layers that read it by itself (Mamba), and for those that ask for its dtype or shape.
        self.__dict__["linear"] = linear

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["linear"], name)

    def forward(self, x: Tensor) -> Tensor:
        return self.group(self.name, x)


def _sketch(x: Tensor, weight: Tensor) -> Tensor:
    """[tokens, SKETCH] whose rows have nearly the length of x·Wᵀ (Johnson and Lindenstrauss), at a part of the work."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (SKETCH, weight.shape[0]), generator=generator).to(weight) * 2 - 1
    return x @ (signs @ weight / SKETCH**0.5).t()
