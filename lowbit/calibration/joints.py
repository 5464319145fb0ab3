"""Where scales may move between the modules of a decoder layer, how large they are, and moving them.

A joint is a norm and what reads it, or two Linears whose channels correspond (v→o, up→down). SmoothQuant
divides what comes through a joint by a scale per channel and multiplies the weights behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.calibration import fold
from lowbit.calibration.distributed import decided
from lowbit.calibration.graph import LayerGraph, Norm, Pair
from lowbit.calibration.layer import groups_of, left_dynamic
from lowbit.calibration.methods import Method
from lowbit.calibration.smoothquant import Smoothing, column_absmax, search_smoothing, smooth_scale
from lowbit.calibration.statistics import InputStatistics
from lowbit.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class Joint:
    """Where the input of one group of quantized modules comes from."""

    before: Norm | Pair
    first: str
    """First member of the group, by which its statistics go."""
    members: tuple[str, ...]

    @property
    def name(self) -> str:
        """As reports call it."""
        return self.before.name if isinstance(self.before, Norm) else self.before.second

    @property
    def changes(self) -> set[str]:
        """Modules whose tensors change when a scale moves."""
        if isinstance(self.before, Norm):
            return {self.before.name, *self.before.readers}
        return {self.before.first, self.before.second}

    def tie(self, scale: Tensor) -> Tensor:
        """The nearest scale [K] that may move: query heads of one value head share theirs (geometric mean)."""
        if isinstance(self.before, Norm) or self.before.repeat == 1:
            return scale
        return fold.repeat_heads(_untie(scale, self.before), self.before)

    def applied(self, layer: nn.Module, scale: Tensor, stored: torch.dtype | None) -> Tensor:
        """What `move` divides by [K]: `scale`, or what is near it and keeps a norm exact (see `fold.scaled_norm`)."""
        if isinstance(self.before, Norm):
            return fold.scaled_norm(layer, self.before, scale, stored)[1]
        return scale

    def move(self, layer: nn.Module, scale: Tensor, stored: torch.dtype | None) -> Tensor:
        """Divide what the group receives by `applied`, multiply what reads it, in place; returns `applied`."""
        if isinstance(self.before, Norm):
            return fold.scale_norm(layer, self.before, scale, stored)
        fold.scale_pair(layer, self.before, self.first_scale(scale))
        return scale

    def first_scale(self, scale: Tensor) -> Tensor:
        """[K] → [N of the pair's first module]: what its output channels are divided by."""
        assert isinstance(self.before, Pair)
        return _untie(scale, self.before)


def _untie(scale: Tensor, pair: Pair) -> Tensor:
    """[second.in] → [first.out]."""
    if pair.repeat == 1:
        return scale
    return scale.view(-1, pair.repeat, pair.head_dim).log().mean(1).exp().reshape(-1)


def joints(graph: LayerGraph, schemes: Mapping[str, Scheme], method: Method) -> Iterator[Joint]:
    """Where the method lets scales move: norms first, then pairs."""
    if not method.smooths:
        return
    by_member = {m: (first, ms) for first, ms in groups_of(graph, schemes) for m in ms}
    for norm in graph.norms if "norm" in method.smooth_joints else ():
        groups = {by_member[r] for r in norm.readers if r in by_member}
        if (
            norm.movable and len(groups) == 1
        ):  # else nothing quantized reads it, or its readers see different tokens (experts)
            first, members = groups.pop()
            yield Joint(before=norm, first=first, members=members)
    for pair in graph.pairs:
        kind = "v-o" if pair.head_dim else "up-down"
        if kind not in method.smooth_joints or pair.second not in by_member:
            continue
        if kind == "up-down" and method.online_hadamard:
            continue  # a scale would have to pass through the rotation
        first, members = by_member[pair.second]
        yield Joint(before=pair, first=first, members=members)


def choose_smoothing(
    joint: Joint, s: InputStatistics, weights: Sequence[Tensor], scheme: Scheme, method: Method
) -> Smoothing | None:
    """The scale to move for weights [N_i, K] of the joint's members; None where nothing reached them."""
    if s.absmax is None:
        return None
    if method.smooth == "search":
        sample = s.rows().to(weights[0])
        return search_smoothing(sample, s.absmax, weights, scheme.weights, scheme.activations, tie=joint.tie)
    alpha = float(method.smooth)
    scale = joint.tie(smooth_scale(s.absmax, column_absmax(weights), alpha))
    return Smoothing(scale=scale, alpha=alpha, error=0.0, plain_error=0.0)


def smoothing_report(chosen: Smoothing) -> dict[str, Any]:
    return {"alpha": chosen.alpha, "error": chosen.error, "plain_error": chosen.plain_error}


def smooth(
    layer: nn.Module,
    graph: LayerGraph,
    method: Method,
    schemes: dict[str, Scheme],
    statistics: Mapping[str, InputStatistics],
    stored: torch.dtype | None = None,
) -> tuple[dict[str, Any], set[str]]:
    """Move scales through every joint that has data; returns (report, names of what changed).

    The statistics follow. `stored` is the dtype that norms are written in (see `fold.scale_norm`).
    Modules whose static activations lose too much get a dynamic scheme in `schemes` (see `Method.dynamic_below`).
    """
    report: dict[str, Any] = {}
    changed: set[str] = set()
    for joint in joints(graph, schemes, method):
        weights = [layer.get_submodule(m).get_parameter("weight") for m in joint.members]
        s, scheme = statistics[joint.first], schemes[joint.first]
        choose = partial(choose_smoothing, joint, s, weights, method=method)
        chosen = decided(partial(choose, scheme), weights[0].device)
        if chosen is not None and method.smooth == "search":
            dynamic = left_dynamic(scheme, chosen.error, method)
            if dynamic is not None:
                schemes.update({m: dynamic for m in joint.members if schemes[m] == scheme})
                chosen = decided(partial(choose, dynamic), weights[0].device)
        if chosen is None or chosen.alpha is None:
            continue
        s.rescale(joint.move(layer, chosen.scale, stored))
        changed |= joint.changes
        report[joint.name] = smoothing_report(chosen)
    return report, changed
