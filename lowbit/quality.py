"""Calibration, measuring and search as Python functions; the command line is a thin layer over these."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lowbit.calibration.methods import Method
    from lowbit.calibration.run import RunOptions
    from lowbit.calibration.store import Calibration
    from lowbit.checkpoint.rules import Selection
    from lowbit.evaluate.layerwise import Report
    from lowbit.recipe import Recipe
    from lowbit.scheme import Scheme

Progress = Callable[[str, int, int], None]
"""(what, done, total)."""
SEEDS = 2**63 - 1
"""The largest seed that torch takes, less or more than 0."""
Resumed = Callable[[int, int], None]
"""Told how many layers earlier runs had done, of how many, where they had any."""
Warn = Callable[[str], None]
"""Told what is odd about what was asked, before the work."""


def calibrate(
    src: str | Path,
    out: str | Path,
    scheme: str | Scheme = "int8",
    *,
    method: str | Mapping[str, Any] | Method = "best",
    data: str | Path | Sequence[Tensor] | None = None,
    samples: int = 128,
    length: int = 2048,
    seed: int = 0,
    alpha: float | None = None,
    kv_cache: str | None = None,
    ignore: Sequence[str] = (),
    keep: Sequence[str] = (),
    overrides: Mapping[str, str] | None = None,
    device: str | torch.device = "auto",
    options: RunOptions | None = None,
    overwrite: bool = False,
    started: Callable[[Method, Sequence[Tensor]], None] | None = None,
    resumed: Resumed = lambda done, layers: None,
    progress: Progress | None = None,
    warn: Warn = warnings.warn,
) -> Calibration:
    """Choose scales, transforms and roundings for `scheme` on data, and write them to the directory `out`.

    Then: `lowbit.convert(src, …, scheme, calibration=out)`. `method`: `best` (the recommended combination
    for the scheme), a name in `lowbit.calibration.methods.METHODS`, a mapping of settings, or a Method;
    `alpha` replaces its SmoothQuant exponent. `data`: a text file, a .jsonl of prompts or a directory of
    them, or a .npy of token ids, of which `samples` windows of `length` tokens are drawn with `seed`; or windows of
    token ids [T].
    `kv_cache`: also scales of keys and values: fp8, int8, fp8-head, int8-head, int8-channel. `ignore`, `keep`,
    `overrides`: as for `lowbit.convert`. `device`: `auto`, or where layers run (see `calibration.devices`), unless
    `options` says it. One decoder layer is in memory at a time; an interrupted run resumes when
    it is called again with the same arguments (where the method smooths, some codes may then be others
    than of an undisturbed run: see `lowbit.calibration.calibrate`); workers under `torchrun` share
    the work. Before the work `started` is called with the method and the windows, `resumed` with how many layers an
    interrupted run had done, of how many, `warn` with what is odd: patterns that match no module. Raises InputError,
    also for a method that chooses nothing for the scheme (`absmax` for a dynamic one, without a KV cache):
    `lowbit.convert` does that by itself.
    """
    from dataclasses import replace

    from lowbit.calibration.calibrate import calibrate as run
    from lowbit.calibration.devices import join
    from lowbit.calibration.kv_cache import KVCache
    from lowbit.calibration.methods import Method as MethodClass
    from lowbit.calibration.methods import best_method
    from lowbit.calibration.run import RunOptions as Options
    from lowbit.checkpoint.hub import whole
    from lowbit.checkpoint.rules import Selection
    from lowbit.scheme import scheme_of

    src, target = whole(src), scheme_of(scheme)
    options = options or Options(device=join(device))
    if isinstance(method, MethodClass):
        chosen = method
    elif isinstance(method, str | Mapping):
        given = method if isinstance(method, str) else dict(method)
        chosen = MethodClass.from_dict(given, best=best_method(target))
    else:
        raise InputError(f"expected a method's name, a mapping of its settings or a Method, found {method!r}")
    if alpha is not None and not chosen.smooths:
        raise InputError(
            f"expected a method that smooths, to give it an alpha, found {chosen.name}; smoothquant-gptq smooths and "
            "rounds by GPTQ"
        )
    chosen = replace(chosen, seed=seed, smooth=chosen.smooth if alpha is None else alpha)
    selection = Selection.of(ignore=ignore, keep=keep, overrides=overrides)
    if kv_cache is None:
        _require_effect(chosen, target, selection)
    windows, described = _windows(src, data, samples, length, seed)
    return run(
        src, out, target, chosen, windows, options=options, overwrite=overwrite, started=started, resumed=resumed,
        progress=progress, data=described, warn=warn, selection=selection,
        kv_cache=KVCache.parse(kv_cache) if kv_cache else None,
    )  # fmt: skip


def _require_effect(method: Method, scheme: Scheme, selection: Selection) -> None:
    """Raise InputError for a method that leaves all schemes asked for as a conversion by itself has them."""
    if scheme.weights is not None and not any(method.has_effect(s) for s in selection.schemes(scheme)):
        raise method.without_effect(scheme)


def measure(
    out: str | Path,
    data: str | Path | Sequence[Tensor],
    *,
    reference: str | Path | None = None,
    calibration: str | Path | Calibration | None = None,
    samples: int = 64,
    length: int = 512,
    seed: int = 0,
    device: str | torch.device = "auto",
    batch_size: int = 4,
    progress: Progress | None = None,
) -> Report:
    """Perplexity of a checkpoint, quantized or not, its activations rounded as an engine would, and keys and values
    where it has scales for them.

    With `reference`, what it was made from: also the KL divergence to it in nats per token, how often the
    likeliest token is the same, and the error after each layer. `calibration`, what `calibrate` returned or
    wrote: `out` is evaluated with that laid over it, unconverted, against itself. `data`, `samples`, `length`,
    `seed`, `device`: as for `calibrate`. One decoder layer of each model is in memory at a time. Raises InputError.
    """
    from lowbit.calibration import store
    from lowbit.calibration.devices import join
    from lowbit.checkpoint.hub import whole
    from lowbit.evaluate.layerwise import calibrated, plain
    from lowbit.evaluate.layerwise import evaluate as run

    out, reference, where = whole(out), None if reference is None else whole(reference), join(device)
    windows, _ = _windows(reference or out, data, samples, length, seed)
    if not windows or batch_size < 1:
        raise InputError(
            f"expected at least one window to measure on, and in a batch, found {len(windows)} and {batch_size}"
        )
    if all(window.numel() < 2 for window in windows):
        raise InputError(
            "expected a window of at least two tokens, since each is predicted from those before it, found none; give "
            "longer ones"
        )
    if calibration is None:
        candidate = plain(out, device=where)
    else:
        found = store.read(calibration) if isinstance(calibration, str | Path) else calibration
        found.require(fingerprint=store.fingerprint(out))
        candidate = calibrated(out, found, device=where)
        reference = reference or out
    before = None if reference is None else plain(reference, device=where)
    return run(candidate, windows, before, batch_size=batch_size, progress=progress)


def search(
    src: str | Path,
    data: str | Path | Sequence[Tensor],
    *,
    budget: float | None = None,
    max_kl: float | None = None,
    candidates: Sequence[str] = ("int8", "fp8"),
    ignore: Sequence[str] = (),
    samples: int = 16,
    length: int = 512,
    seed: int = 0,
    device: str | torch.device = "auto",
    state: str | Path | None = None,
    overwrite: bool = False,
    resumed: Resumed = lambda done, layers: None,
    progress: Progress | None = None,
    warn: Warn = warnings.warn,
) -> Recipe:
    """A recipe with a scheme per module: the least KL divergence for `budget` mean bits per weight (default 8.5).

    Or, with `max_kl`, the smallest model whose predicted KL is at most that. `candidates`: schemes to choose
    from; float is always one. Modules that engines fuse get one scheme. `ignore`: patterns of modules in float,
    in the recipe too. `recipe.notes` has the curve of bits against KL; `recipe.save` writes it for `lowbit convert
    --recipe`. `state`: a directory for what is measured. An interrupted search goes on in it, to the same result, when
    it is called again with the same arguments, and another budget is chosen for without measuring again; a search of
    something else is refused there, or replaces it with `overwrite`. The rest as for `calibrate`.
    """
    from lowbit.calibration.choice import FLOAT, check_wish, curve, pick, recipe_of
    from lowbit.calibration.devices import join
    from lowbit.calibration.search import sensitivities
    from lowbit.checkpoint.hub import whole
    from lowbit.checkpoint.rules import Selection

    if budget is None and max_kl is None:
        budget = 8.5
    if isinstance(candidates, str):
        raise InputError(f"expected a list of schemes as candidates, found {candidates!r}; put it in one")
    candidates = [name for name in candidates if name != FLOAT]
    check_wish(candidates, budget=budget, max_kl=max_kl)
    src, where = whole(src), join(device)
    windows, described = _windows(src, data, samples, length, seed)
    units = sensitivities(
        src, windows, list(candidates), selection=Selection.of(ignore=ignore), device=where, seed=seed,
        state=state, data=described, overwrite=overwrite, resumed=resumed, progress=progress, warn=warn,
    )  # fmt: skip
    points = curve(units)
    return recipe_of(units, pick(points, budget=budget, max_kl=max_kl), points, ignore=ignore)


def _windows(
    src: str | Path, data: str | Path | Sequence[Tensor] | None, samples: int, length: int, seed: int
) -> tuple[Sequence[Tensor], dict[str, Any]]:
    """(windows of token ids, what is said of them in a calibration)."""
    from lowbit.calibration.data import is_tokenized, load_tokenizer, load_windows

    whole = all(isinstance(n, Integral) for n in (samples, length, seed))
    if not whole or samples < 1 or length < 1 or abs(seed) > SEEDS:
        raise InputError(
            "expected whole numbers: samples and a length of at least 1 and a seed of 64 bits, found "
            f"{samples!r}, {length!r} and {seed!r}"
        )
    if data is None:
        return [], {}
    if not isinstance(data, str | Path):
        windows = list(data)
        for window in windows:
            if not _is_window(window):
                found = tuple(getattr(window, "shape", ()))
                raise InputError(
                    "expected data as windows of token ids, integer tensors [T], found one that is a "
                    f"{type(window).__name__} {list(found)}; tokenize it, and torch.tensor it, first"
                )
        return windows, {}
    tokenizer = None if is_tokenized(data) else load_tokenizer(src)
    windows = load_windows(data, tokenizer, samples=samples, length=length, seed=seed)
    return windows, {"path": str(data), "samples": samples, "length": length, "seed": seed}


def _is_window(window: object) -> bool:
    import torch

    from lowbit.calibration.data import holds_ids

    return isinstance(window, torch.Tensor) and window.dim() == 1 and window.numel() > 0 and holds_ids(window)
