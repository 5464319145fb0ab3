"""Which joints of a traced layer are true: scales are sent through them, and the layer's output must stay.

`graph.trace` goes by who receives what a norm returned, and by names. A layer may read the same tensor in a way
that no hook sees, or normalize values on their way (Gemma 4): a scale may not move there. Here a random
power of two per channel, which rounds nothing, is divided from what comes through a joint and multiplied to
what its readers receive; no weight is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from lowbit.calibration import fold
from lowbit.calibration.graph import LayerGraph, Norm, Pair

Run = Callable[[], Sequence[Tensor]]
"""Runs the layer once; returns its output and what else it hands on."""


@torch.no_grad()
def proven(layer: nn.Module, graph: LayerGraph, run: Run) -> LayerGraph:
    """`graph` with only the joints that change nothing that `run` returns. Experts of one module share a verdict."""
    expected = [t.clone() for t in run()]
    joints: list[Norm | Pair] = [*graph.norms, *graph.pairs]
    if not joints or _unchanged(layer, joints, run, expected):
        return graph
    trials: dict[str, list[Norm | Pair]] = {}
    for joint in joints:
        trials.setdefault(_trial(joint), []).append(joint)
    true = {id(j) for of in trials.values() if _unchanged(layer, of, run, expected) for j in of}
    return replace(
        graph,
        norms=tuple(n if id(n) in true else replace(n, movable=False) for n in graph.norms),
        pairs=tuple(p for p in graph.pairs if id(p) in true),
    )


def _trial(joint: Norm | Pair) -> str:
    if isinstance(joint, Norm):
        return joint.name
    experts, found, rest = joint.first.partition(".experts.")
    return f"{experts}{found}{rest.partition('.')[2]}" if found else joint.first


def _unchanged(layer: nn.Module, joints: Sequence[Norm | Pair], run: Run, expected: Sequence[Tensor]) -> bool:
    handles = []
    generator = torch.Generator().manual_seed(0)
    for joint in joints:
        first, readers = (
            (joint.name, joint.readers) if isinstance(joint, Norm) else (joint.first, (joint.second,))
        )
        module = layer.get_submodule(first)
        width = module.get_parameter("weight").shape[0]
        scale = 2.0 ** torch.randint(-1, 2, (width,), generator=generator)
        passed = scale if isinstance(joint, Norm) else fold.repeat_heads(scale, joint)
        handles.append(module.register_forward_hook(partial(_divide, scale)))
        for reader in readers:
            handles.append(
                layer.get_submodule(reader).register_forward_pre_hook(
                    partial(_multiply, passed), with_kwargs=True
                )
            )
    try:
        got = list(run())
    finally:
        for handle in handles:
            handle.remove()
    limit = 1e-9 if expected[0].dtype == torch.float64 else 1e-4
    return len(got) == len(expected) and all(
        fold.relative_change(e, g) < limit for e, g in zip(expected, got, strict=True)
    )


def _divide(scale: Tensor, module: nn.Module, args: tuple, out: Tensor) -> Tensor:
    return out / scale.to(out)


def _multiply(scale: Tensor, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if args:
        return (args[0] * scale.to(args[0]), *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, kwargs | {name: kwargs[name] * scale.to(kwargs[name])}
