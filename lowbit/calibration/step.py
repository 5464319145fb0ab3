"""One decoder layer's calibration: transform, watch, smooth, round, and hand on what comes out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.calibration import fold
from lowbit.calibration.activations import ActivationCache
from lowbit.calibration.distributed import merge_observers, merge_statistics
from lowbit.calibration.experts import UnfusedExperts
from lowbit.calibration.graph import LayerGraph, trace
from lowbit.calibration.kv_cache import KVCache, KVObserver, KVQuantizer, attentions, watched
from lowbit.calibration.layer import (
    correct_biases,
    groups_of,
    input_scales,
    install,
    online_modules,
    quantize_weights,
    smooth,
    transform,
    wanted_statistics,
)
from lowbit.calibration.layerwise import LayerwiseModel
from lowbit.calibration.methods import Method
from lowbit.calibration.rotation import Rotation, apply_online_hadamard
from lowbit.calibration.sequential import round_in_passing
from lowbit.calibration.simulate import ActivationQuantizer, attach
from lowbit.calibration.statistics import InputStatistics, Wanted, collect
from lowbit.errors import InputError
from lowbit.quantize import Quantized
from lowbit.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How to run, none of which changes what is computed (beyond float rounding)."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    """Compute dtype. float32 is the fastest exact choice on CPUs."""
    batch_size: int = 8
    """Sequences that run through a layer together."""
    memory_limit: int = 4 << 30
    """Bytes of hidden states kept in memory; the rest is spilled to disk."""
    spill_directory: str | None = None
    all_experts: bool = True
    """Every expert of a mixture sees every token (for its statistics only)."""
    min_tokens: int = 128
    """A Linear that fewer tokens reached is rounded without data."""
    verify: bool = True
    """Check on a few tokens of every layer that transforms leave its output as it was."""


@dataclass(kw_only=True)
class Run:
    """What one calibration carries from layer to layer."""

    model: LayerwiseModel
    method: Method
    schemes: dict[str, Scheme]
    options: RunOptions
    rotation: Rotation | None
    cache: ActivationCache
    calls: list[tuple[dict[str, Any], ...]]
    small: tuple[dict[str, Any], ...]
    small_shape: tuple[int, int]
    has_data: bool
    kv_cache: KVCache | None = None
    few: tuple[dict[str, Any], ...] | None = None
    """What layers are called with for the first `few_windows` of the data: set when all data is one batch,
    and layers are rounded while it passes (see `sequential`)."""
    few_windows: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def timed(self, what: str, start: float) -> None:
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start


def calibrate_layer(run: Run, index: int, *, need_output: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    model, method, options = run.model, run.method, run.options
    start = time.perf_counter()
    layer = model.load(index)
    prefix = model.layer_name(index)
    schemes = {n.removeprefix(prefix + "."): s for n, s in run.schemes.items() if n.startswith(prefix + ".")}
    experts = {n: m for n, m in layer.named_modules() if isinstance(m, UnfusedExperts)}
    for module in experts.values():
        module.see_all = options.all_experts
    sample = run.cache[0][:1, : run.small_shape[1]].to(model.device)

    def run_sample(target: nn.Module, hidden: Tensor | None = None) -> Tensor:
        return model.run(target, index, sample if hidden is None else hidden, run.small[index])

    plain_sample = sample if run.rotation is None else _unrotate(sample, run.rotation)
    graph = trace(layer, lambda target: run_sample(target, plain_sample), sample.shape[-1], model.config)
    expected = run_sample(layer, plain_sample)
    changed = transform(layer, graph, method, run.rotation)
    online = frozenset(online_modules(layer, graph)) if method.online_hadamard else frozenset()
    if run.rotation is not None:
        expected = run.rotation.apply(expected)
    if changed and options.verify:
        _verify(layer, run_sample, expected, sample, online, f"the rotation of {prefix}")
    run.timed("load and transform", start)

    start = time.perf_counter()
    activations = next((s.activations for s in schemes.values()), None)
    wanted = wanted_statistics(method, activations)
    statistics: dict[str, InputStatistics] = {}
    kv = {} if run.kv_cache is None else {n: KVObserver(run.kv_cache) for n, _ in attentions(layer)}
    prepare: dict[str, Callable[[Tensor], Tensor]] = dict.fromkeys(online, apply_online_hadamard)
    for module in experts.values():
        module.token_counts.zero_()  # tracing and checking ran a few tokens too
    # Transforms are exact, so where the next layer is to see unquantized inputs, what this pass puts
    # out is what they are; unless experts see more than is routed to them, or it must run again.
    in_passing = run.few is not None and not (experts or kv or method.bias_correction or wanted.observer)
    advancing = need_output and not (method.propagate or experts or online or wanted.observer is not None)
    advanced = False
    if in_passing:
        if method.smooths:
            # Where scales move is searched on a part of the data; the rounding then sees all of it.
            part = replace(wanted, hessian=False, cross=False)
            statistics = _collect(run, layer, index, graph, schemes, part, prepare, few=True)
    elif kv or wanted.anything or method.smooths or (activations is not None and not activations.dynamic):
        with watched(layer, dict(kv)):
            statistics = _collect(run, layer, index, graph, schemes, wanted, prepare, advance=advancing)
        advanced = advancing
    merge_observers([o for k in kv.values() for o in (k.keys, k.values)])
    tokens = {n: {"tokens": m.token_counts.tolist()} for n, m in experts.items() if int(m.token_counts.sum())}
    kv_scales = {n: observer.scales() for n, observer in kv.items()}
    run.timed("statistics", start)

    start = time.perf_counter()
    report: dict[str, Any] = {}
    if method.smooths:
        before = run_sample(layer) if options.verify and not online else None
        stored = model.source.float_dtype if options.dtype != torch.float64 else None
        report["smoothing"], moved = smooth(layer, graph, method, schemes, statistics, stored)
        changed |= moved
        if moved and before is not None:
            _verify(layer, run_sample, before, sample, online, f"smoothing of {prefix}")
        if wanted.observer is not None:
            # A histogram of the whole tensor cannot follow a change per channel: look again.
            again = _collect(run, layer, index, graph, schemes, Wanted(observer=wanted.observer), prepare)
            for name, s in again.items():
                statistics[name].observer = s.observer
    run.timed("smoothing", start)

    start = time.perf_counter()
    if in_passing:
        quantized, errors = round_in_passing(
            layer, graph, method, schemes, wanted, lambda: _run_all(run, layer, index, need_output),
            min_tokens=options.min_tokens, prepare=prepare,
        )  # fmt: skip
        advanced = True
    else:
        quantized, errors = quantize_weights(
            layer, graph, method, schemes, statistics, min_tokens=options.min_tokens
        )  # fmt: skip
    scales = {} if in_passing else input_scales(layer, graph, method, schemes, statistics, quantized)
    if method.bias_correction:
        changed |= correct_biases(layer, statistics, graph, schemes, quantized)
    report["modules"] = errors
    if tokens:
        report["experts"] = tokens
    if online:
        report["online_hadamard"] = [model.disk_name(f"{prefix}.{n}") for n in sorted(online)]
    dynamic = [n for n, s in schemes.items() if s != run.schemes[f"{prefix}.{n}"]]
    if dynamic:
        report["left_dynamic"] = {model.disk_name(f"{prefix}.{n}"): schemes[n].name for n in dynamic}
        run.schemes.update({f"{prefix}.{n}": schemes[n] for n in dynamic})
    tensors = _tensors(run, prefix, layer, quantized, scales, changed)
    for name, pair in kv_scales.items():
        for leaf, scale in zip(("k_scale", "v_scale"), pair, strict=True):
            tensors[f"{model.disk_name(f'{prefix}.{name}')}.{leaf}"] = scale.float().cpu()
    run.timed("rounding", start)

    start = time.perf_counter()
    if need_output and run.has_data and not advanced:
        for module in experts.values():
            module.see_all = False
        if method.propagate:
            quantizers = install(layer, schemes, quantized, scales, online)
        else:
            quantizers = install(layer, {}, {}, {}, online)
        hooks = {}
        if method.propagate and run.kv_cache is not None:
            hooks = {n: KVQuantizer(run.kv_cache, *pair) for n, pair in kv_scales.items()}
        with watched(layer, dict(hooks)):
            advance_layer(run, layer, index, quantizers)
    run.timed("output", start)
    return tensors, report


def _unrotate(x: Tensor, rotation: Rotation) -> Tensor:
    return (x.double() @ rotation.dense().to(x.device).t()).to(x.dtype)


def _verify(
    layer: nn.Module,
    run_sample: Callable[[nn.Module], Tensor],
    expected: Tensor,
    sample: Tensor,
    online: frozenset[str],
    what: str,
) -> None:
    detach = attach(layer, {n: ActivationQuantizer(None, hadamard=True) for n in online})
    try:
        found = run_sample(layer)
    finally:
        detach()
    lost = fold.relative_change(expected - sample, found - sample)
    limit = 1e-9 if found.dtype == torch.float64 else 5e-3
    if not lost < limit:
        raise InputError(
            f"expected {what} to leave the layer's output as it was, found it changed by {lost:.1e}; this "
            "architecture is not understood: use a method without rotation and smoothing (gptq, mse), and report it"
        )


def _collect(
    run: Run,
    layer: nn.Module,
    index: int,
    graph: LayerGraph,
    schemes: Mapping[str, Scheme],
    wanted: Wanted,
    prepare: Mapping[str, Callable[[Tensor], Tensor]],
    *,
    advance: bool = False,
    few: bool = False,
) -> dict[str, InputStatistics]:
    """The statistics of every group over all data, or the first `few` windows of it."""
    batches = max(len(run.cache), 1)
    statistics = {
        first: InputStatistics(
            wanted=wanted, spec=schemes[first].activations, rows_per_batch=-(-wanted.sample_rows // batches)
        )
        for first, _ in groups_of(graph, schemes)
    }

    def run_few() -> None:
        assert run.few is not None
        run.model.run(layer, index, run.cache[0][: run.few_windows], run.few[index])

    run_data = run_few if few else lambda: _run_all(run, layer, index, advance)
    collect(layer, statistics, run_data, prepare=prepare, by_output=graph.writers)
    merge_statistics(statistics)
    return statistics


def _run_all(run: Run, layer: nn.Module, index: int, advance: bool) -> None:
    """The layer over all batches; with `advance`, its outputs take the place of the hidden states."""
    for batch in range(len(run.cache)):
        out = run.model.run(layer, index, run.cache[batch], run.calls[batch][index])
        if advance:
            run.cache.replace(batch, out)


def advance_layer(run: Run, layer: nn.Module, index: int, quantizers: dict) -> None:
    """Replace the cached hidden states by what comes out of the layer."""
    detach = attach(layer, quantizers)
    try:
        _run_all(run, layer, index, advance=True)
    finally:
        detach()


def _tensors(
    run: Run,
    prefix: str,
    layer: nn.Module,
    quantized: Mapping[str, Quantized],
    scales: Mapping[str, tuple[Tensor, Tensor | None]],
    changed: set[str],
) -> dict[str, Tensor]:
    """What is written for a layer, in the checkpoint's names."""
    method, disk = run.method, lambda n: run.model.disk_name(f"{prefix}.{n}")
    stored = run.model.source.float_dtype
    out: dict[str, Tensor] = {}
    chosen = method.rounding.rounding != "nearest" or method.rounding.scale != "absmax"
    for name, q in quantized.items():
        if chosen or name in changed:
            out[f"{disk(name)}.weight"] = q.codes.cpu()
            out[f"{disk(name)}.weight_scale"] = q.scale.cpu()
    for name, (scale, zero) in scales.items():
        out[f"{disk(name)}.input_scale"] = scale.reshape(1).float().cpu()
        if zero is not None:
            out[f"{disk(name)}.input_zero_point"] = zero.reshape(1).cpu()
    for name in sorted(changed):
        module = layer.get_submodule(name)
        for leaf in ("weight", "bias"):
            value = getattr(module, leaf, None)
            if isinstance(value, Tensor) and not (leaf == "weight" and name in quantized):
                out[f"{disk(name)}.{leaf}"] = value.detach().to(stored).cpu()
    return out
