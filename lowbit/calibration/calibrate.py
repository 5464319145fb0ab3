"""Calibrate a checkpoint layer by layer, from the embeddings up, and write each layer when it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.calibration import fold, store
from lowbit.calibration.activations import ActivationCache
from lowbit.calibration.distributed import merge_observers, merge_statistics, my_share, rank, wait_for_all
from lowbit.calibration.experts import UnfusedExperts
from lowbit.calibration.graph import LayerGraph, norm_gain, trace
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
from lowbit.calibration.layerwise import LayerwiseModel, final_norm
from lowbit.calibration.methods import Method
from lowbit.calibration.overlay import Overlay
from lowbit.calibration.rotation import Rotation, apply_hadamard, make_rotation
from lowbit.calibration.simulate import ActivationQuantizer, attach
from lowbit.calibration.source import Source
from lowbit.calibration.statistics import InputStatistics, Wanted, collect
from lowbit.checkpoint.rules import Selection, decide
from lowbit.errors import InputError
from lowbit.quantize import Quantized
from lowbit.scheme import Scheme, get_scheme

Progress = Callable[[str, int, int], None]
"""(what, done, total)."""


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
class _Run:
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
    seconds: dict[str, float] = field(default_factory=dict)

    def timed(self, what: str, start: float) -> None:
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start


def module_schemes(model: LayerwiseModel, scheme: Scheme, selection: Selection) -> dict[str, Scheme]:
    """Our name → scheme for every Linear of the decoder that will be quantized."""
    shapes: dict[str, tuple[int, ...]] = {}
    names: dict[str, str] = {}
    for index in range(len(model)):
        for ours, shape in model.linear_shapes(index).items():
            names[model.disk_name(ours)] = ours
            shapes[model.disk_name(ours)] = shape
    decisions = decide(shapes, scheme, selection, config=model.source.config)
    return {
        names[m]: d.scheme
        for m, d in decisions.items()
        if d.scheme is not None and d.scheme.weights is not None and not d.as_found
    }


def calibrate(
    source: str | Path,
    out: str | Path,
    scheme: Scheme,
    method: Method,
    windows: Sequence[Tensor],
    *,
    selection: Selection | None = None,
    kv_cache: KVCache | None = None,
    options: RunOptions | None = None,
    data: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> store.Calibration:
    """Calibrate `source` for `scheme` with `method` on `windows` of token ids [T]; returns what was written.

    One decoder layer and the hidden states of the data (spilled past `options.memory_limit`) are in
    memory. An interrupted run resumes when called again with the same arguments. Raises
    InputError for a scheme that quantizes no weights, data that is missing, and architectures
    that cannot be run layer by layer or rotated.
    """
    selection, options = selection or Selection(), options or RunOptions()
    if scheme.weights is None:
        raise InputError(
            f"expected a scheme that quantizes weights, found {scheme.name}; calibration has nothing to do"
        )
    if not windows and (kv_cache is not None or method.needs_data(scheme)):
        raise InputError(
            f"expected data for method {method.name} with scheme {scheme.name}, found none; pass --data"
        )
    reader = Source(source)
    model = LayerwiseModel(reader, device=options.device, dtype=options.dtype)
    schemes = module_schemes(model, scheme, selection)
    settings: dict[str, Any] = {
        "scheme": scheme.name,
        "module_schemes": _exceptions(model, schemes, scheme),
        "method": method.to_dict(),
        "data": dict(data or {}) | {"windows": len(windows), "tokens": sum(int(w.numel()) for w in windows)},
        "source": {"path": str(Path(source).name), "fingerprint": store.fingerprint(source)},
        "tool": _version(),
    }
    if kv_cache is not None:
        settings["kv_cache"] = asdict(kv_cache)
    writer = store.Writer(out, settings, overwrite=overwrite) if rank() == 0 else None
    wait_for_all()
    done = set(store.load_manifest(Path(out))["layers"])
    rotation = None
    hidden_size = model.model.get_input_embeddings().weight.shape[1]
    if method.rotate != "none":
        rotation = make_rotation(hidden_size, method.rotate, method.seed)
        outside = rotate_outside(model, rotation, reader.float_dtype)
        if writer is not None and store.MODEL_PART not in done:
            writer.write(store.MODEL_PART, {model.disk_name(n): t for n, t in outside.items()})
    run = _start(model, method, schemes, options, rotation, windows)
    run.kv_cache = kv_cache
    for index in range(len(model)):
        name = model.layer_name(index)
        if progress:
            progress(name, index, len(model))
        last = index == len(model) - 1
        finished = name in done
        if finished and (last or not windows):
            continue
        if finished and method.propagate:
            _replay(run, index, store.read(out))
            continue
        tensors, report = _calibrate_layer(run, index, need_output=not last)
        if writer is not None and not finished:
            writer.write(name, tensors, report)
    run.cache.close()
    if progress:
        progress("done", len(model), len(model))
    if writer is not None:
        overrides = {"tie_word_embeddings": False} if rotation is not None and _tied(model) else {}
        exceptions = settings["module_schemes"]
        for entry in writer.manifest["layers"].values():
            exceptions |= entry.get("left_dynamic", {})
        writer.finish(
            module_schemes=exceptions,
            config_overrides=overrides,
            seconds={k: round(v, 3) for k, v in run.seconds.items()},
        )
    return store.read(out)


def rotate_outside(model: LayerwiseModel, rotation: Rotation, stored: torch.dtype) -> dict[str, Tensor]:
    """Rotate embeddings and lm_head of a model in memory, in place, the final norm folded into lm_head.

    Returns the changed tensors by our names, as they will be stored; the model computes with those.
    """
    embedding = model.model.get_input_embeddings()
    head = model.model.get_output_embeddings()
    norm = final_norm(model.base)
    if head is None or not isinstance(embedding, nn.Embedding):
        raise InputError(
            "expected token embeddings and lm_head to rotate, found none; use a method without rotation"
        )
    others = [n for n, m in model.base.named_modules() if isinstance(m, nn.Embedding) and m is not embedding]
    offset, centered = norm_gain(norm, rotation.size)
    if others or centered:
        raise InputError(
            f"expected one embedding and RMSNorm, found {others or type(norm).__name__}; use a method without rotation"
        )
    gain = norm.weight.detach() + offset  # type: ignore[operator]

    def keep(x: Tensor) -> nn.Parameter:
        if model.dtype == torch.float64:
            return nn.Parameter(x, requires_grad=False)
        return nn.Parameter(x.to(stored).to(model.dtype), requires_grad=False)

    before = embedding.weight.detach()
    head.weight = keep(rotation.apply(head.weight.detach() * gain))
    embedding.weight = keep(rotation.apply(before))
    norm.weight = nn.Parameter(torch.full_like(gain, 1.0 - offset), requires_grad=False)
    names = {id(m): n for n, m in model.model.named_modules()}
    return {
        f"{names[id(m)]}.weight": m.weight.detach().to(stored)  # type: ignore[operator]
        for m in (embedding, head, norm)
    }


def _start(
    model: LayerwiseModel,
    method: Method,
    schemes: dict[str, Scheme],
    options: RunOptions,
    rotation: Rotation | None,
    windows: Sequence[Tensor],
) -> _Run:
    """Embed the data and remember what every layer is called with."""
    cache = ActivationCache(options.memory_limit, options.spill_directory)
    calls = []
    for batch in make_batches(my_share(windows), options.batch_size):
        call = model.embed(batch)
        cache.append(call.hidden)
        calls.append(call.kwargs)
    ids = windows[0].reshape(1, -1)[:, :32] if windows else torch.arange(32).reshape(1, -1)
    call = model.embed(ids)
    if not windows:
        # Something to trace the layers with; what it becomes does not matter.
        cache.append(call.hidden)
        calls.append(call.kwargs)
    return _Run(
        model=model, method=method, schemes=schemes, options=options, rotation=rotation, cache=cache,
        calls=calls, small=call.kwargs, small_shape=(1, int(ids.shape[1])), has_data=bool(windows),
    )  # fmt: skip


def make_batches(windows: Sequence[Tensor], batch_size: int) -> list[Tensor]:
    """Windows of token ids [T] → batches [B, T] of equal lengths, without padding, in order of length."""
    by_length: dict[int, list[Tensor]] = {}
    for window in windows:
        by_length.setdefault(int(window.numel()), []).append(window.reshape(-1))
    batches = []
    for _, group in sorted(by_length.items()):
        batches += [torch.stack(group[i : i + batch_size]) for i in range(0, len(group), batch_size)]
    return batches


def _calibrate_layer(run: _Run, index: int, *, need_output: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
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
    prepare: dict[str, Callable[[Tensor], Tensor]] = dict.fromkeys(online, apply_hadamard)
    for module in experts.values():
        module.token_counts.zero_()  # tracing and checking ran a few tokens too
    if kv or wanted.anything or method.smooths or (activations is not None and not activations.dynamic):
        with watched(layer, dict(kv)):
            statistics = _collect(run, layer, index, graph, schemes, wanted, prepare)
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
    quantized, errors = quantize_weights(
        layer, graph, method, schemes, statistics, min_tokens=options.min_tokens
    )  # fmt: skip
    scales = input_scales(layer, graph, method, schemes, statistics, quantized)
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
    if need_output and run.has_data:
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
            _advance(run, layer, index, quantizers)
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
    run: _Run,
    layer: nn.Module,
    index: int,
    graph: LayerGraph,
    schemes: Mapping[str, Scheme],
    wanted: Wanted,
    prepare: Mapping[str, Callable[[Tensor], Tensor]],
) -> dict[str, InputStatistics]:
    batches = max(len(run.cache), 1)
    statistics = {
        first: InputStatistics(
            wanted=wanted, spec=schemes[first].activations, rows_per_batch=-(-wanted.sample_rows // batches)
        )
        for first, _ in groups_of(graph, schemes)
    }
    collect(
        layer, statistics, lambda: _run_all(run, layer, index), prepare=prepare, by_output=graph.writers,
    )  # fmt: skip
    merge_statistics(statistics)
    return statistics


def _run_all(run: _Run, layer: nn.Module, index: int) -> None:
    for batch, hidden in enumerate(run.cache):
        run.model.run(layer, index, hidden, run.calls[batch][index])


def _advance(run: _Run, layer: nn.Module, index: int, quantizers: dict) -> None:
    """Replace the cached hidden states by what comes out of the layer."""
    detach = attach(layer, quantizers)
    try:
        for batch in range(len(run.cache)):
            out = run.model.run(layer, index, run.cache[batch], run.calls[batch][index])
            run.cache.replace(batch, out)
    finally:
        detach()


def _replay(run: _Run, index: int, calibration: store.Calibration) -> None:
    """Run a layer that an earlier run finished, from what that run wrote."""
    left = calibration.layers[run.model.layer_name(index)].get("left_dynamic", {})
    run.schemes.update({n: get_scheme(left[d]) for n in run.schemes if (d := run.model.disk_name(n)) in left})
    overlay = Overlay(calibration, run.model, run.schemes)
    layer, quantizers = overlay.load(index)
    with watched(layer, overlay.kv_hooks(layer, index)):
        _advance(run, layer, index, quantizers)


def _tensors(
    run: _Run,
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


def _exceptions(
    model: LayerwiseModel, schemes: Mapping[str, Scheme], scheme: Scheme
) -> dict[str, str | None]:
    """Modules with another scheme than the main one; None for those left in float."""
    out: dict[str, str | None] = {}
    for index in range(len(model)):
        for ours in model.linear_shapes(index):
            found = schemes.get(ours)
            if found is None:
                out[model.disk_name(ours)] = None
            elif found.name != scheme.name:
                out[model.disk_name(ours)] = found.name
    return out


def _tied(model: LayerwiseModel) -> bool:
    return bool(getattr(model.config, "tie_word_embeddings", False))


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"lowbit {version('lowbit')}"
    except PackageNotFoundError:
        return "lowbit"
