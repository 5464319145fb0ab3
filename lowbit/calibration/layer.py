"""One decoder layer: transform it, look at its inputs, choose ranges, round its weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.calibration import fold
from lowbit.calibration.distributed import balanced, divided, workers
from lowbit.calibration.gptq import RoundingOptions, compensate, round_group
from lowbit.calibration.graph import LayerGraph
from lowbit.calibration.methods import Method
from lowbit.calibration.observers import observed_range
from lowbit.calibration.products import multiplies_integers, rounded_module
from lowbit.calibration.rotation import Rotation, has_hadamard, online_block
from lowbit.calibration.shared_scale import MatrixOf
from lowbit.calibration.simulate import ActivationQuantizer, fake_quantize
from lowbit.calibration.statistics import InputStatistics, Wanted, token_errors
from lowbit.checkpoint.rules import matmul_key
from lowbit.errors import InputError
from lowbit.quantize import Quantized, scale_from_range
from lowbit.scheme import SCHEMES, Scheme, TensorSpec

SMALLEST_BLOCK = 16
"""Of an online rotation: a smaller one spreads an outlier over too few values to be worth its time."""
SAMPLE_ROWS = 384
"""Tokens that searches are scored on."""


def transform(layer: nn.Module, graph: LayerGraph, method: Method, rotation: Rotation | None) -> set[str]:
    """Apply the transforms that need no data; returns the names of tensors that changed."""
    changed: set[str] = set()
    if rotation is not None:
        fold.rotate_residual(layer, graph, rotation)
        for norm in graph.norms:
            changed |= {norm.name, *norm.readers}
        changed |= set(graph.writers)
    if method.rotate_heads:
        for pair in graph.pairs:
            if pair.head_dim and not pair.gated and has_hadamard(pair.head_dim):
                fold.rotate_heads(layer, pair)
                changed |= {pair.first, pair.second}
    if method.online_hadamard:
        fold.rotate_input(layer, online_modules(layer, graph))
        changed |= set(online_modules(layer, graph))
    return changed


def online_modules(layer: nn.Module, graph: LayerGraph) -> list[str]:
    """The down projections whose input can be rotated by a Hadamard matrix in blocks worth having."""
    return [
        n for n in graph.linears
        if n.rpartition(".")[2] == "down_proj" and online_block(layer.get_submodule(n).in_features) >= SMALLEST_BLOCK  # type: ignore[arg-type]
    ]  # fmt: skip


def wanted_statistics(method: Method, schemes: Iterable[Scheme]) -> Wanted:
    """What a layer's modules of these schemes need."""
    activations = [s.activations for s in schemes if s.activations is not None]
    static = any(not a.dynamic for a in activations)
    histogram = method.activation_range if static and method.activation_range != "output" else None
    return Wanted(
        hessian=method.rounding.rounding != "nearest",
        cross=method.compensate and any(a.dynamic for a in activations),
        sample_rows=SAMPLE_ROWS if method.smooth == "search" or method.activation_range == "output" else 0,
        observer=histogram,
    )


def groups_of(graph: LayerGraph, schemes: Mapping[str, Scheme]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(first member, members with a scheme): modules that read one input, those in float left out."""
    for group in graph.groups:
        members = tuple(n for n in group if n in schemes)
        if members:
            yield members[0], members


def quantize_weights(
    layer: nn.Module,
    graph: LayerGraph,
    method: Method,
    schemes: Mapping[str, Scheme],
    statistics: Mapping[str, InputStatistics],
    *,
    min_tokens: int,
    matrix_of: MatrixOf = matmul_key,
) -> tuple[dict[str, Quantized], dict[str, Any]]:
    """Round every quantized Linear of the layer, groups that share an input together.

    A group with fewer than `min_tokens` tokens is rounded without its data, and the report says so.
    Several workers divide the groups among them.
    """
    quantized: dict[str, Quantized] = {}
    report: dict[str, Any] = {}
    tasks, costs = [], []
    for first, members in groups_of(graph, schemes):
        weights = {m: _weight(layer, m) for m in members}
        tasks.append(
            partial(
                round_members,
                weights,
                statistics.get(first),
                method,
                schemes,
                min_tokens=min_tokens,
                matrix_of=matrix_of,
            )
        )
        rows, columns = sum(w.shape[0] for w in weights.values()), weights[first].shape[1]
        costs.append(columns**2 * (columns + rows))  # a factorization, and updates of every row
    device = next(layer.parameters()).device
    for codes, errors in divided(tasks, balanced(costs, workers()), device):
        quantized |= codes
        report |= errors
    return quantized, report


def round_members(
    weights: Mapping[str, Tensor],
    s: InputStatistics | None,
    method: Method,
    schemes: Mapping[str, Scheme],
    *,
    min_tokens: int,
    matrix_of: MatrixOf = matmul_key,
) -> tuple[dict[str, Quantized], dict[str, Any]]:
    """`quantize_weights` for Linear layers of one group: name → weight [N, K]."""
    quantized: dict[str, Quantized] = {}
    report: dict[str, Any] = {}
    hessian, options = (s.hessian if s is not None else None), method.rounding
    starved = s is not None and method.rounding.rounding != "nearest" and s.tokens < min_tokens
    if starved or hessian is None:
        hessian, options = None, RoundingOptions(rounding="nearest", scale=method.rounding.scale)
    by_spec: dict[TensorSpec, list[str]] = {}
    for m in weights:
        spec = schemes[m].weights
        assert spec is not None  # `schemes` holds quantized modules only
        by_spec.setdefault(spec, []).append(m)
    for spec, names in by_spec.items():
        found = [weights[m] for m in names]
        targets = None
        if hessian is not None and s is not None and s.cross is not None:
            targets = [compensate(w, hessian, s.cross, options.damping) for w in found]
        codes = round_group(found, hessian, spec, options, targets=targets, names=names, matrix_of=matrix_of)
        for m, rounded in zip(names, codes, strict=True):
            quantized[m] = rounded.quantized
            report[m] = {"error": rounded.error, "nearest_error": rounded.nearest_error}
            if starved and s is not None:
                report[m] = {
                    "tokens": s.tokens,
                    "fallback": f"rounded without data: fewer than {min_tokens} tokens",
                }
    return quantized, report


def input_scales(
    layer: nn.Module,
    graph: LayerGraph,
    method: Method,
    schemes: Mapping[str, Scheme],
    statistics: Mapping[str, InputStatistics],
    quantized: Mapping[str, Quantized],
) -> tuple[dict[str, tuple[Tensor, Tensor | None]], dict[str, Scheme]]:
    """Static activation scales [1] (and zero points) of every module whose scheme wants them, and all schemes.

    A module whose static activations lose too much gets no scales, and a dynamic scheme among those returned.
    """
    out: dict[str, tuple[Tensor, Tensor | None]] = {}
    schemes = dict(schemes)
    for first, scheme, members in _static_groups(graph, schemes):
        spec, s = scheme.activations, statistics.get(first)
        assert spec is not None
        if s is None or s.absmax is None:
            raise InputError(
                f"expected data for {first}, found none that reached it; give more samples, "
                "or let all experts of a mixture see every token (leave out --routed-only)"
            )
        if method.activation_range == "output":
            chosen, error = _least_output_error(layer, s, spec, members, quantized)
            if (dynamic := left_dynamic(scheme, error, method)) is not None:
                schemes.update(dict.fromkeys(members, dynamic))
                continue
        else:
            assert s.observer is not None
            low, high = observed_range(s.observer, method.activation_range, spec, method.percentile)
            chosen = scale_from_range(low.reshape(1), high.reshape(1), spec)
        out.update(dict.fromkeys(members, chosen))
    return out, schemes


def _static_groups(
    graph: LayerGraph, schemes: Mapping[str, Scheme]
) -> list[tuple[str, Scheme, tuple[str, ...]]]:
    """(first of the group, scheme, its members): of the groups, those parts that have one static scheme."""
    found = []
    for first, members in groups_of(graph, schemes):
        for scheme in dict.fromkeys(schemes[m] for m in members if schemes[m].needs_calibration):
            found.append((first, scheme, tuple(m for m in members if schemes[m] == scheme)))
    return found


def left_dynamic(scheme: Scheme, error: float, method: Method) -> Scheme | None:
    """The dynamic scheme of the same weights for a module whose static output error is too large; None: stay."""
    spec = scheme.activations
    if spec is None or spec.dynamic or method.dynamic_below is None:
        return None
    if -10.0 * math.log10(max(error, 1e-30)) >= method.dynamic_below:
        return None
    for other in SCHEMES.values():
        found = other.activations
        if (
            found is not None
            and found.dynamic
            and found.dtype == spec.dtype
            and other.weights == scheme.weights
        ):
            return other
    return None


def _least_output_error(
    layer: nn.Module,
    s: InputStatistics,
    spec: TensorSpec,
    members: tuple[str, ...],
    quantized: Mapping[str, Quantized],
) -> tuple[tuple[Tensor, Tensor | None], float]:
    """The clipped range whose quantized outputs on the sample are nearest to the float ones, and their error.

    The error is the mean over tokens, and a part of the worst token's: the massive activations of a few
    tokens are what attention rests on, and clipping them ruins all others.
    """
    assert s.absmax is not None
    sample = s.rows().float()
    reference = torch.cat([_weight(layer, m).float() for m in members])
    rounded = torch.cat([quantized[m].dequantize().to(sample) for m in members])
    target = sample @ reference.t()
    peak = s.absmax.max().reshape(1).float()
    low, high = -peak, peak
    if not spec.symmetric:
        low, high = sample.min().reshape(1), sample.max().reshape(1)
    best, best_error, factor = scale_from_range(low, high, spec), float("inf"), 1.0
    while factor > 1e-3:
        scale, zero = scale_from_range(low * factor, high * factor, spec)
        errors = token_errors(fake_quantize(sample, spec, scale, zero) @ rounded.t() - target, target)
        error = float(errors.mean() + 0.1 * errors.max())
        if error < best_error:
            best, best_error = (scale, zero), error
        elif error > 4 * best_error:
            break  # clipping has taken over
        factor *= 0.92
    return best, best_error


def correct_biases(
    layer: nn.Module,
    statistics: Mapping[str, InputStatistics],
    graph: LayerGraph,
    schemes: Mapping[str, Scheme],
    quantized: Mapping[str, Quantized],
) -> set[str]:
    """Add the mean output error of rounding, (W − Wq)·mean(x), to biases that exist.

    Nagel et al., arXiv:1906.04721. Biases are not created: engines take none where the model has none.
    """
    changed = set()
    for first, members in groups_of(graph, schemes):
        s = statistics.get(first)
        for m in members:
            bias = layer.get_submodule(m).bias
            if not isinstance(bias, Tensor) or s is None or s.total is None:
                continue
            delta = _weight(layer, m).double() - quantized[m].dequantize().double().to(bias.device)
            with torch.no_grad():
                bias.add_((delta @ s.mean.to(delta)).to(bias))
            changed.add(m)
    return changed


@torch.no_grad()
def install(
    layer: nn.Module,
    schemes: Mapping[str, Scheme],
    quantized: Mapping[str, Quantized],
    scales: Mapping[str, tuple[Tensor | None, Tensor | None]],
    online: frozenset[str] = frozenset(),
) -> dict[str, ActivationQuantizer]:
    """Put rounded weights into the layer; returns the quantizers of its inputs, to be attached.

    Modules with the same spec and scale share a quantizer, and so the work where they share an input;
    those that multiply integers (see `products`) round their inputs themselves.
    """
    whole: set[str] = set()
    for name, q in quantized.items():
        weight = _weight(layer, name)
        if name in schemes and name not in online and multiplies_integers(schemes[name], weight):
            parent = layer.get_submodule(name.rpartition(".")[0])
            setattr(
                parent,
                name.rpartition(".")[2],
                rounded_module(layer.get_submodule(name), q, schemes[name]),
            )
            whole.add(name)
        else:
            weight.copy_(q.dequantize())
    quantizers: dict[str, ActivationQuantizer] = {}
    shared: dict[tuple, ActivationQuantizer] = {}
    for name in {*schemes, *online} - whole:
        spec = schemes[name].activations if name in schemes else None
        if spec is None and name not in online:
            continue
        scale, zero = scales.get(name, (None, None))
        key = (
            spec,
            None if scale is None else float(scale),
            None if zero is None else int(zero),
            name in online,
        )
        if key not in shared:
            shared[key] = ActivationQuantizer(spec, scale, zero, hadamard=name in online)
        quantizers[name] = shared[key]
    return quantizers


def _weight(layer: nn.Module, name: str) -> Tensor:
    weight = layer.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight
