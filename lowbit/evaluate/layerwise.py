"""Evaluate a checkpoint against its reference with one decoder layer of each in memory at a time.

Weights are what is stored, dequantized; activations are rounded as an engine would round them. So
it works for any scheme, on any machine, for models that do not fit it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.calibration.activations import ActivationCache
from lowbit.calibration.calibrate import make_batches, quantized_by
from lowbit.calibration.distributed import gathered, my_share
from lowbit.calibration.kv_cache import KVHook, watched
from lowbit.calibration.layer import install
from lowbit.calibration.layerwise import LayerwiseModel
from lowbit.calibration.overlay import Overlay, tensor_of
from lowbit.calibration.simulate import ActivationQuantizer, attach
from lowbit.calibration.source import Source
from lowbit.calibration.store import Calibration
from lowbit.calibration.stored import install_stored, stored_kv_hooks
from lowbit.checkpoint.rules import Selection
from lowbit.errors import InputError
from lowbit.evaluate.beside import decided_beside, outside, round_inputs
from lowbit.evaluate.metrics import Agreement
from lowbit.host_memory import keep_freed_memory
from lowbit.quantize import quantize
from lowbit.scheme import Scheme, get_scheme

LOGITS = 1 << 24
"""Logits that are in memory at a time, of each model: 64 MB, where all of a batch may be gigabytes."""

LoadLayer = Callable[[int], tuple[nn.Module, Mapping[str, ActivationQuantizer]]]


@dataclass(kw_only=True)
class Report:
    """What `evaluate` found."""

    agreement: Agreement
    compared: bool
    layer_errors: dict[str, float] = field(default_factory=dict)
    """‖h − h_ref‖ / ‖h_ref‖ after each layer, root mean square over tokens, in the reference's basis."""

    def to_dict(self) -> dict[str, Any]:
        out = self.agreement.to_dict(compared=self.compared)
        if self.layer_errors:
            out["layer_errors"] = self.layer_errors
        return out


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model to evaluate, and how its layers come with their activation quantizers."""

    model: LayerwiseModel
    load: LoadLayer
    kv_hooks: Callable[[nn.Module, int], dict[str, KVHook]] = lambda layer, index: {}


def plain(path: str | Path, **model_options: Any) -> Candidate:
    """A checkpoint as it is: weights dequantized; activations rounded as its quantization_config says, and
    keys and values where it has scales for them."""
    model = LayerwiseModel(Source(path), **model_options)
    stored = model.source.stored
    round_inputs(
        model, {n: stored[d].scheme for n, _ in outside(model) if (d := model.disk_name(n)) in stored}
    )

    def load(index: int) -> tuple[nn.Module, Mapping[str, ActivationQuantizer]]:
        layer = model.load(index)
        return layer, install_stored(model, layer, index)

    return Candidate(model=model, load=load, kv_hooks=partial(stored_kv_hooks, model))


def rounded(
    source: str | Path, scheme: Scheme, selection: Selection | None = None, **model_options: Any
) -> Candidate:
    """A checkpoint as plain conversion to `scheme` would make it, without writing it. Dynamic activations only."""
    model = LayerwiseModel(Source(source), **model_options)
    beside = decided_beside(model, scheme, selection or Selection())
    beside.round_outside(model)
    schemes = quantized_by(beside.linears)

    def load(index: int) -> tuple[nn.Module, Mapping[str, ActivationQuantizer]]:
        layer, prefix = model.load(index), model.layer_name(index) + "."
        mine = {n.removeprefix(prefix): s for n, s in schemes.items() if n.startswith(prefix)}
        quantized = {}
        for name, s in mine.items():
            weight = layer.get_submodule(name).weight
            if isinstance(weight, Tensor) and s.weights is not None:
                quantized[name] = quantize(weight, s.weights, name=prefix + name)
        return layer, {**install(layer, mine, quantized, {}), **beside.round_inside(model, layer, index)}

    return Candidate(model=model, load=load, kv_hooks=partial(stored_kv_hooks, model))


def calibrated(source: str | Path, calibration: Calibration, **model_options: Any) -> Candidate:
    """A source with a calibration laid over it, as `convert` will write it in the default format."""
    calibration.require()
    model = LayerwiseModel(
        Source(source), override=lambda n: tensor_of(calibration, n),
        config_overrides=dict(calibration.config_overrides), **model_options,
    )  # fmt: skip
    scheme, selection = get_scheme(calibration.scheme), calibration.selection
    beside = decided_beside(model, scheme, selection, calibration.tensors)
    beside.round_outside(model)
    overlay = Overlay(calibration, model, quantized_by(beside.linears))
    kept = beside.kept(model)
    dequantized = (model.source.stored.keys() - kept) - beside.rounded(model)

    def load(index: int) -> tuple[nn.Module, Mapping[str, ActivationQuantizer]]:
        layer, quantizers = overlay.load(index)
        for name, module in layer.named_modules():  # in the dtype that they are written in
            if model.disk_name(f"{model.layer_name(index)}.{name}") in dequantized:
                weight = module.get_parameter("weight")
                weight.copy_(weight.to(model.source.float_dtype))
        quantizers |= beside.round_inside(model, layer, index)
        return layer, {**quantizers, **install_stored(model, layer, index, kept.__contains__)}

    # Scales that the source has are carried where the calibration has none.
    kv_hooks = overlay.kv_hooks if calibration.kv_cache else partial(stored_kv_hooks, model)
    return Candidate(model=model, load=load, kv_hooks=kv_hooks)


@torch.no_grad()
@keep_freed_memory()
def evaluate(
    candidate: Candidate,
    windows: Sequence[Tensor],
    reference: Candidate | None = None,
    *,
    batch_size: int = 4,
    memory_limit: int = 4 << 30,
    reference_states: Sequence[Tensor] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Perplexity of `candidate` on windows of token ids [T]; with a reference also KL, top-1 and layer errors.

    `reference_states` are the reference's `final_states` on the same windows and batch size: with them it
    does not run again, and there are no layer errors. Workers share the windows, and all return the same.
    """
    if reference is not None:
        _check_same_shape(candidate.model, reference.model)
    batches = make_batches(my_share(windows), batch_size)
    again = reference is not None and reference_states is None
    sides = [candidate, reference] if again and reference is not None else [candidate]
    streams = [_Stream.start(side, batches, memory_limit // len(sides)) for side in sides]
    basis = _basis(candidate.model, reference.model) if again and reference is not None else None
    report = Report(agreement=Agreement(), compared=reference is not None)
    for index in range(len(candidate.model)):
        name = candidate.model.layer_name(index)
        if progress:
            progress(name, index, len(candidate.model))
        for stream in streams:
            stream.advance(index)
        if again:
            report.layer_errors[name] = _distance(streams[0].cache, streams[1].cache, basis)
    before: Sequence[Tensor] | ActivationCache | None = streams[1].cache if again else reference_states
    for batch, ids in enumerate(batches):
        for part in _parts(ids, candidate.model):
            expected = None
            if reference is not None and before is not None:
                expected = reference.model.head(before[batch][:, part])
            report.agreement.update(
                candidate.model.head(streams[0].cache[batch][:, part]), ids[:, part], expected
            )
    for stream in streams:
        stream.cache.close()
    report.agreement, *others = gathered(report.agreement)
    for other in others:
        report.agreement.merge(other)
    return report


def _parts(ids: Tensor, model: LayerwiseModel) -> Iterator[slice]:
    """Spans of tokens [B, T] with at most `LOGITS`, or one predicted token; the last of each only ends it."""
    vocabulary = model.model.get_input_embeddings().weight.shape[0]
    tokens = max(1, LOGITS // (ids.shape[0] * vocabulary) - 1)
    for start in range(0, ids.shape[1] - 1, tokens):
        yield slice(start, start + tokens + 1)


def _check_same_shape(model: LayerwiseModel, reference: LayerwiseModel) -> None:
    """Raise InputError for models that are not of one kind: layers beyond the other's would be left out."""
    found = []
    for m in (reference, model):
        tokens, width = m.model.get_input_embeddings().weight.shape
        found.append(f"{len(m)} layers of width {width} for {tokens} tokens")
    if found[0] != found[1]:
        raise InputError(
            f"expected {model.source.path} made from {reference.source.path}, of {found[0]}, found {found[1]}; "
            "give the checkpoint that it was converted from"
        )


@keep_freed_memory()
def final_states(candidate: Candidate, windows: Sequence[Tensor], *, batch_size: int = 4) -> list[Tensor]:
    """Hidden states [B, T, H] after the last layer, one tensor per batch (of this worker's share), on the CPU."""
    stream = _Stream.start(candidate, make_batches(my_share(windows), batch_size), 1 << 40)
    for index in range(len(candidate.model)):
        stream.advance(index)
    return list(stream.cache)


@dataclass(kw_only=True)
class _Stream:
    """The hidden states of all batches on their way through a model."""

    side: Candidate
    cache: ActivationCache
    calls: list[tuple[dict[str, Any], ...]]

    @classmethod
    def start(cls, side: Candidate, batches: Sequence[Tensor], memory_limit: int) -> _Stream:
        stream = cls(side=side, cache=ActivationCache(memory_limit), calls=[])
        for ids in batches:
            call = side.model.embed(ids, stream.cache.hold)
            stream.cache.append(call.hidden)
            stream.calls.append(call.kwargs)
        return stream

    def advance(self, index: int) -> None:
        layer, quantizers = self.side.load(index)
        detach = attach(layer, dict(quantizers))
        try:
            with watched(layer, self.side.kv_hooks(layer, index)):
                for batch in range(len(self.cache)):
                    out = self.side.model.run(layer, index, self.cache[batch], self.calls[batch][index])
                    self.cache.replace(batch, out)
        finally:
            detach()


def _basis(model: LayerwiseModel, reference: LayerwiseModel) -> Tensor | None:
    """The rotation between two models' residual streams, read off their embeddings (orthogonal Procrustes)."""
    a = model.model.get_input_embeddings().weight
    b = reference.model.get_input_embeddings().weight
    if a.shape != b.shape or torch.equal(a, b):
        return None
    used = torch.isfinite(a).all(1) & torch.isfinite(b).all(1)  # others belong to no token of the data
    u, _, v = torch.linalg.svd(a[used].double().t() @ b[used].double())
    return u @ v


def _distance(a: ActivationCache, b: ActivationCache, basis: Tensor | None) -> float:
    # Per token: a few tokens are hundreds of times longer than the rest (massive activations).
    total, tokens = 0.0, 0
    for x, y in zip(a, b, strict=True):
        back = x if basis is None else x @ basis.to(x)
        lost = (back - y).double().square().sum(-1)
        total += float((lost / y.double().square().sum(-1).clamp(min=1e-30)).sum())
        tokens += lost.numel()
    totals, counts = zip(*gathered((total, tokens)), strict=True)
    return (sum(totals) / max(sum(counts), 1)) ** 0.5
