"""Calibrate a checkpoint layer by layer, from the embeddings up, and write each layer when it is done."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lowbit.calibration import resume, store
from lowbit.calibration.activations import ActivationCache
from lowbit.calibration.calls import shares_states
from lowbit.calibration.distributed import decided, gathered, my_share, wait_for_all, workers
from lowbit.calibration.effect import require_joints, too_few_tokens
from lowbit.calibration.kv_cache import KEYS, KVCache, watched
from lowbit.calibration.layerwise import LayerwiseModel
from lowbit.calibration.methods import Method
from lowbit.calibration.overlay import Overlay
from lowbit.calibration.rotate_model import rotate_outside, settled
from lowbit.calibration.rotation import Rotation, make_rotation
from lowbit.calibration.run import Run, RunOptions
from lowbit.calibration.sequential import fits
from lowbit.calibration.settings import settings_of
from lowbit.calibration.source import Source
from lowbit.calibration.step import calibrate_layer
from lowbit.calibration.stored import stored_quantizers
from lowbit.checkpoint.patterns import Patterns
from lowbit.checkpoint.rules import Decision, Fits, Selection, decide, left_by_source
from lowbit.errors import InputError
from lowbit.formats import FORMATS, StoredModule, get_format
from lowbit.formats.format import Joined
from lowbit.granularity import PerChannel
from lowbit.host_memory import keep_freed_memory
from lowbit.scheme import Scheme, TensorSpec, get_scheme

Progress = Callable[[str, int, int], None]
"""(what, done, total)."""
Resumed = Callable[[int, int], None]
"""Told how many layers earlier runs had done, of how many, where they had any."""
Warn = Callable[[str], None]
"""Told what is odd about what was asked, before the work."""


def module_schemes(
    model: LayerwiseModel, scheme: Scheme, selection: Selection, *, fits: Fits | None = None
) -> dict[str, Scheme]:
    """Our name → scheme for every Linear of the decoder that will be quantized.

    Blocks that the default format does not take are what a conversion makes of them, a scale per channel.
    `fits`: a format's `refuse`, where static activations that it does not take become dynamic, too.
    """
    return quantized_by(module_decisions(model, scheme, selection, fits=fits))


def quantized_by(decisions: Mapping[str, Decision]) -> dict[str, Scheme]:
    """Module → scheme of those that are quantized anew."""
    return {
        name: d.scheme
        for name, d in decisions.items()
        if d.scheme is not None and d.scheme.weights is not None and not d.as_found
    }


def module_decisions(
    model: LayerwiseModel,
    scheme: Scheme,
    selection: Selection,
    *,
    fits: Fits | None = None,
    others: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> dict[str, Decision]:
    """Our name → what happens to every Linear of the decoder; `fits` as for `module_schemes`.

    `others`: our name → shape of what is decided on with them, since what a pattern means depends on all that it takes
    in.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    names: dict[str, str] = {}
    linears = (item for index in range(len(model)) for item in model.linear_shapes(index).items())
    for ours, shape in (*linears, *others.items()):
        names[model.disk_name(ours)] = ours
        shapes[model.disk_name(ours)] = shape
    source = model.source
    left = left_by_source(shapes, source.stored)
    decisions = decide(
        shapes, scheme, selection, config=source.config, left_in_float=left, fused=source.fused,
        fits=fits or _blocks_fit,
    )  # fmt: skip
    return {names[m]: d for m, d in decisions.items()}


def _blocks_fit(scheme: Scheme, shape: tuple[int, ...], joined: Joined) -> str:
    """Why the default format takes no blocks or groups of this shape. What may be static is the conversion's affair."""
    return "" if scheme.needs_calibration else get_format().refuse(scheme, shape, joined)


@keep_freed_memory()
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
    started: Callable[[Method, Sequence[Tensor]], None] | None = None,
    resumed: Resumed = lambda done, layers: None,
    progress: Progress | None = None,
    warn: Warn = warnings.warn,
) -> store.Calibration:
    """Calibrate `source` for `scheme` with `method` on `windows` of token ids [T]; returns what was written.

    One decoder layer and the hidden states of the data (spilled past `options.memory_limit`) are in
    memory. An interrupted run resumes when called again with the same arguments. Where layers are smoothed
    and rounded in passing (see `sequential`), what finished layers then hand on differs in the last bits from
    what they did in passing (x · (norm / s), it was x · norm / s): the layers after them may choose other
    scales and codes than in an undisturbed run. `started` is called with the method, which may not rotate where
    the model does not allow it (see `Method.else_smooth`), `resumed` with what a killed run had done, `warn` of
    patterns that mean nothing. Raises InputError for a scheme that quantizes no weights, data that is missing, biases
    to correct that are missing, and architectures that cannot be run layer by layer or rotated.
    """
    selection, options = selection or Selection(), options or RunOptions()
    if scheme.weights is None:
        raise InputError(
            f"expected a scheme that quantizes weights, found {scheme.name}; calibration has nothing to do"
        )
    wanting = [s.name for s in selection.schemes(scheme) if method.needs_data(s)]
    if not windows and (kv_cache is not None or wanting):
        raise InputError(
            f"expected data for method {method.name} with scheme {', '.join(wanting) or scheme.name}, found none; "
            "pass --data"
        )
    if few := too_few_tokens(method, windows, options):
        warn(few)
    share = my_share(windows)
    reader = Source(source)
    reader.require_unrotated()
    model = LayerwiseModel(reader, device=options.device, dtype=options.dtype)
    for warning in selection.warnings(reader.modules):
        warn(warning)
    if kv_cache is not None:
        _require_keys(model)
    decisions = module_decisions(model, scheme, selection)
    schemes, keep = quantized_by(decisions), Patterns(selection.keep)
    kept = frozenset(model.disk_name(n) for n, d in decisions.items() if d.as_found)
    kept |= {module for module in reader.modules if keep.matching(module)}
    _require_held(kept, reader.stored)
    method = settled(method, model, kept)
    if not schemes:
        raise InputError(
            f"expected at least one weight to calibrate in the layers of {source}, found none that the rules allow; "
            "`lowbit plan` says which rule kept each"
        )
    if kv_cache is None and method.bias_correction:
        biased = {n for i in range(len(model)) for n in model.biased(i)}
        if not any(method.has_effect(s, biased=n in biased) for n, s in schemes.items()):
            raise method.without_effect(scheme)
    settings: dict[str, Any] = {
        "scheme": scheme.name,
        "module_schemes": _exceptions(model, decisions, scheme),
        "method": method.to_dict(),
        "experts": {"all_tokens": options.all_experts, "min_tokens": options.min_tokens},
        **settings_of(source, selection, windows, data),
    }
    if kv_cache is not None:
        settings["kv_cache"] = asdict(kv_cache)
    decided(lambda: store.Writer.require_usable(out, settings, overwrite=overwrite), model.device)
    if started is not None:
        started(method, windows)
    rotation, outside = None, {}
    hidden_size = model.model.get_input_embeddings().weight.shape[1]
    if method.rotate != "none":
        rotation = make_rotation(hidden_size, method.rotate, method.seed)
        outside = rotate_outside(model, rotation, reader.float_dtype)
    run = _start(model, method, schemes, kept, options, rotation, windows, share)
    run.kv_cache = kv_cache
    require_joints(run)
    writer: store.Writer | None = None
    with ExitStack() as held:

        def start() -> set[str]:
            nonlocal writer
            held.enter_context(resume.alone(out, store.KIND))
            writer = store.Writer(out, settings, overwrite=overwrite)
            held.callback(_remove_unless_begun, writer)
            return writer.finished

        done = decided(start, model.device)
        if already := sum(model.layer_name(i) in done for i in range(len(model))):
            resumed(already, len(model))
        if writer is not None and outside and store.MODEL_PART not in done:
            writer.write(store.MODEL_PART, {model.disk_name(n): t.cpu() for n, t in outside.items()})
        # What follows the last unfinished layer, nobody needs to see.
        stop = max((i + 1 for i in range(len(model)) if model.layer_name(i) not in done), default=0)
        for index in range(stop):
            name = model.layer_name(index)
            if progress:
                progress(name, index, len(model))
            finished = name in done
            if finished and not (windows or shares_states(run.small[index])):
                continue
            if finished and method.propagate:
                _replay(run, index, store.read(out))
                continue
            tensors, report = calibrate_layer(run, index, need_output=index < stop - 1)
            if writer is not None and not finished:
                writer.write(name, tensors, report)
        run.cache.close()
        if progress:
            progress("done", len(model), len(model))
        if writer is not None and not writer.manifest["complete"]:
            overrides = {"tie_word_embeddings": False} if rotation is not None and _tied(model) else {}
            exceptions = settings["module_schemes"]
            for entry in writer.manifest["layers"].values():
                exceptions |= entry.get("left_dynamic", {})
            writer.finish(
                module_schemes=exceptions,
                config_overrides=overrides,
                seconds={k: round(v, 3) for k, v in run.seconds.items()},
            )
        wait_for_all()
    found = store.read(out)
    if method.smooths and not found.tensors:
        warn(
            f"{method.name} found nothing that lowers the error, and the calibration holds nothing: a conversion makes "
            "the same without it; give another method: best"
        )
    return found


def _remove_unless_begun(writer: store.Writer) -> None:
    """What was refused, or stopped, in the first layer leaves nothing behind."""
    if not writer.finished - {store.MODEL_PART}:
        writer.remove()


def _require_held(kept: Collection[str], stored: Mapping[str, StoredModule]) -> None:
    """InputError for modules to be kept that no conversion could write."""
    for module in sorted(stored.keys() & set(kept)):
        scheme = stored[module].scheme
        if not any(known.holds(scheme) for known in FORMATS.values()):
            raise InputError(
                f"keep {module}: expected weights that some format can hold, found {scheme.name} in the source; ignore "
                "it in place of keeping it, to have it in float"
            )


def _require_keys(model: LayerwiseModel) -> None:
    """InputError where no layer has an attention of which the cache holds what `KEYS` make."""
    linears = dict.fromkeys(n.rpartition(".")[2] for i in range(len(model)) for n in model.linear_shapes(i))
    if linears.keys().isdisjoint(KEYS):
        latent = any(n.startswith("kv_a_proj") for n in linears)
        raise InputError(
            f"expected attention with {' or '.join(KEYS)}, which make the keys and values of a cache, found layers of "
            f"{', '.join(linears) or 'no Linears'}{' (latent attention caches something else)' if latent else ''}; "
            "calibrate without a KV cache"
        )


def _start(
    model: LayerwiseModel,
    method: Method,
    schemes: dict[str, Scheme],
    kept: frozenset[str],
    options: RunOptions,
    rotation: Rotation | None,
    windows: Sequence[Tensor],
    share: Sequence[Tensor],
) -> Run:
    """Embed this worker's share of the data and remember what every layer is called with."""
    cache = ActivationCache(options.memory_limit, options.spill_directory)
    calls = []
    one_batch = _passes(model, method, schemes, options, windows)
    for batch in make_batches(share, len(windows) if one_batch else options.batch_size):
        call = model.embed(batch, cache.hold)
        cache.append(call.hidden)
        calls.append(call.kwargs)
    # Of the shortest, so that as many tokens can be taken from the first batch of any worker.
    shortest = min(windows, key=torch.numel) if windows else torch.arange(32)
    ids = shortest.reshape(1, -1)[:, :32]
    call = model.embed(ids)
    if not windows:
        # Something to trace the layers with; what it becomes does not matter.
        cache.append(call.hidden)
        calls.append(call.kwargs)
    return Run(
        model=model, method=method, schemes=schemes, options=options, rotation=rotation, cache=cache,
        calls=calls, small=call.kwargs, small_shape=(1, int(ids.shape[1])), has_data=bool(windows),
        batches=sum(gathered(len(cache))), one_batch=one_batch, kept=kept,
    )  # fmt: skip


def _passes(
    model: LayerwiseModel,
    method: Method,
    schemes: Mapping[str, Scheme],
    options: RunOptions,
    windows: Sequence[Tensor],
) -> bool:
    """Whether layers are smoothed and rounded while all data passes as one batch (see `sequential`)."""
    if not windows or workers() > 1 or not method.propagate:
        return False
    if method.rounding.rounding == "nearest" and not method.smooths:
        return False
    moves = method.smooths and not {"v-o", "up-down"}.isdisjoint(method.smooth_joints)
    if moves and not all(_per_channel(s.weights) for s in schemes.values()):
        return False  # what is rounded could not be divided afterwards
    if any(s.activations is not None and not s.activations.dynamic for s in schemes.values()):
        return False
    shapes = model.linear_shapes(0).values()
    # Hyper-connections (DeepSeek-V4) carry several residual streams from layer to layer.
    streams = getattr(model.text_config, "hc_mult", 1)
    hidden = streams * int(model.model.get_input_embeddings().weight.shape[1])
    widest = max((max(shape) for shape in shapes), default=hidden)
    return fits(windows, hidden, widest, options.memory_limit)


def _per_channel(weights: TensorSpec | None) -> bool:
    return weights is not None and weights.symmetric and isinstance(weights.granularity, PerChannel)


def make_batches(windows: Sequence[Tensor], batch_size: int) -> list[Tensor]:
    """Windows of token ids [T] → batches [B, T] of equal lengths, without padding, in order of length."""
    by_length: dict[int, list[Tensor]] = {}
    for window in windows:
        by_length.setdefault(int(window.numel()), []).append(window.reshape(-1))
    batches = []
    for _, group in sorted(by_length.items()):
        batches += [torch.stack(group[i : i + batch_size]) for i in range(0, len(group), batch_size)]
    return batches


def _replay(run: Run, index: int, calibration: store.Calibration) -> None:
    """Run a layer that an earlier run finished, from what that run wrote."""
    left = calibration.layers[run.model.layer_name(index)].get("left_dynamic", {})
    run.schemes.update({n: get_scheme(left[d]) for n in run.schemes if (d := run.model.disk_name(n)) in left})
    overlay = Overlay(calibration, run.model, run.schemes)
    layer, quantizers = overlay.load(index)
    quantizers |= stored_quantizers(run.model, layer, index, run.kept.__contains__)
    if shares_states(run.small[index]):  # what later layers' samples will look up
        run.model.run(layer, index, run.cache[0][:1, : run.small_shape[1]], run.small[index])
    with watched(layer, overlay.kv_hooks(layer, index) or run.carried_kv(layer, index)):
        run.hand_on(layer, index, quantizers)


def _exceptions(
    model: LayerwiseModel, decisions: Mapping[str, Decision], scheme: Scheme
) -> dict[str, str | None]:
    """Modules with another scheme than the main one; None for those in float. Not those that are kept as found, of
    which the patterns tell."""
    schemes = quantized_by(decisions)
    found = {n: schemes[n].name if n in schemes else None for n, d in decisions.items() if not d.as_found}
    return {model.disk_name(n): name for n, name in found.items() if name != scheme.name}


def _tied(model: LayerwiseModel) -> bool:
    return bool(getattr(model.config, "tie_word_embeddings", False))
