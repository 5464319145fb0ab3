"""A product by the implementation that `dispatch.choose` takes, or by dequantizing where no kernel takes it."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lowbit.ops import cpu, dispatch, reference
from lowbit.ops.checks import CODES, require
from lowbit.ops.problem import Activations, Weights
from lowbit.ops.settings import fall_back, settings


def _implementation(
    operation: str, problem: dispatch.Problem, device: torch.device
) -> tuple[str, dispatch.Decision | None]:
    """(`triton`, `cpu`, `reference`, or `dequantize` where no kernel takes the problem; what was decided)."""
    forced = settings.implementation
    if forced == "cpu" or forced == "reference":
        return forced, None
    if device.type == "cpu" and forced is None:
        chosen = dispatch.choose(problem, "cpu")
    else:
        try:
            from lowbit.kernels.targets import device_target  # type: ignore[import-not-found]

            chosen = dispatch.choose(dispatch.bucketed(problem), device_target(device).name)
        except (ImportError, ValueError) as error:
            chosen = dispatch.Refusal(reason=str(error))
    if isinstance(chosen, dispatch.Decision):
        return chosen.implementation, chosen
    fall_back(operation, chosen.reason)
    return "dequantize", None


def _dequantized(
    x: Tensor, weights: Weights, activations: Activations, bias: Tensor | None, out_dtype: torch.dtype,
    offsets: list[int] | None = None, routed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The fallback: quantize and dequantize activations, dequantize weights, multiply in float32."""
    if x.dtype in CODES or activations.kind != "none":
        codes, scale = x, activations.scale
        if x.dtype not in CODES:
            codes, scale = reference.quantize(x, reference.unpack(weights).dtype, activations)
        assert scale is not None
        if activations.group:
            scale = scale.repeat_interleave(activations.group, dim=-1)[..., : weights.k]
        x = (codes.float() - activations.zero_point) * scale
    w = reference.dequantize(weights)
    if offsets is None:
        out = x.float() @ w.T
        out = out if bias is None else out + bias.float()
    else:
        out = torch.zeros(x.shape[0], weights.n, device=x.device)
        for expert, (start, end) in enumerate(pairwise(offsets)):
            out[start:end] = x[start:end].float() @ w[expert].T
            if bias is not None:
                out[start:end] += bias[expert].float()
    if routed is not None:
        out = out * routed.float().reshape(-1, 1)
    return out.to(out_dtype)


def run(
    operation: str, kind: str, x: Tensor, weights: Weights, activations: Activations, bias: Tensor | None,
    out_dtype: torch.dtype, *, offsets: Tensor | None = None, routed: Tensor | None = None,
    weight_sum: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [M, K], floats or codes, times weights [N, K] (or [E, N, K] with `offsets` [E + 1]) → [M, N] of `out_dtype`.

    `kind`: how activations are quantized, as `problem.Activations` has it; `routed` [M] multiplies rows of the output.
    """
    problem = dispatch.problem_of(
        x, weights, kind, zero_point=activations.zero is not None, bias=bias is not None, out_dtype=out_dtype
    )
    name, decision = _implementation(operation, problem, x.device)
    if decision is not None and decision.keeps_floats(problem):
        activations = Activations(kind="none")
    elif activations.kind == "tensor" and offsets is not None:
        x, activations = reference.quantize_by_expert(x, weights.tensor.dtype, activations, offsets)
    if name == "triton":
        from lowbit.ops import triton

        assert decision is not None
        return triton.linear(
            x,
            weights,
            activations,
            bias,
            out_dtype,
            kernel=decision.kernel,
            offsets=offsets,
            routed=routed,
            weight_sum=weight_sum,
        )
    bounds = None if offsets is None else bounds_of(offsets, x.shape[0])
    if name == "cpu":
        return cpu.linear(x, weights, activations, bias, out_dtype, offsets=bounds, routed=routed)
    if name == "reference":
        return reference.linear(x, weights, activations, bias, out_dtype, offsets=bounds, routed=routed)
    return _dequantized(x, weights, activations, bias, out_dtype, bounds, routed)


def bounds_of(offsets: Tensor, rows: int) -> list[int]:
    """Where the rows of each expert begin, and at last end. ValueError where they do not rise from 0 to `rows`."""
    bounds: list[int] = offsets.tolist()
    require(
        bounds == sorted(bounds) and bounds[0] == 0 and bounds[-1] == rows,
        lambda: (
            f"expected offsets to rise from 0 to the {rows} rows of x, found {bounds[:4]} … {bounds[-1:]}"
        ),
    )
    return bounds
