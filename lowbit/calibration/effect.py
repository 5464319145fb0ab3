"""What of a method comes to nothing for a model or its data, said before the run that it would take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from lowbit.calibration.calls import shares_states
from lowbit.calibration.joints import joints
from lowbit.calibration.methods import Method
from lowbit.calibration.run import Run, RunOptions
from lowbit.calibration.step import LayerStep
from lowbit.errors import InputError


def too_few_tokens(method: Method, windows: Sequence[Tensor], options: RunOptions) -> str:
    """What to say of windows of token ids that are less than any weight is rounded by; "" where they are enough."""
    tokens, least = sum(int(w.numel()) for w in windows), options.min_tokens
    if method.rounding.rounding == "nearest" or not windows or tokens >= least:
        return ""
    return (
        f"expected at least {least} tokens for {method.name} to round weights by, found {tokens} in all data: all "
        "weights are rounded without data, to the nearest; give more or longer windows (samples, length)"
    )


def require_joints(run: Run) -> None:
    """InputError where scales that move through joints are all that the method changes, and no layer has one.

    Layers that differ in nothing but weights are looked at once, up to the first that has one.
    """
    without = replace(run.method, smooth="none")
    if (
        not run.method.smooths
        or run.kv_cache is not None
        or any(without.has_effect(s) for s in run.schemes.values())
    ):
        return
    seen = set()
    for index in range(len(run.model)):
        inside = run.model.layer_name(index) + "."
        own = tuple((n.removeprefix(inside), s) for n, s in run.schemes.items() if n.startswith(inside))
        kept = tuple(n.removeprefix(inside) for n in sorted(run.kept) if n.startswith(inside))
        if (what := (run.model.kind(index), own, kept)) in seen:
            continue
        seen.add(what)
        step = LayerStep.load(run, index)
        # What layers hand to later ones is there only when all before have run.
        if next(joints(step.graph, step.schemes, run.method), None) or shares_states(run.small[index]):
            return
    raise InputError(
        f"expected a place where {run.method.name} can move scales ({', '.join(run.method.smooth_joints) or 'none'}), "
        "found none before the modules that are quantized, so that the calibration would hold nothing; quantize what "
        "reads a norm (q_proj, gate_proj), or give another method: gptq"
    )
