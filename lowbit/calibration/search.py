"""Mixed precision: which modules take which scheme, for the least KL divergence under a budget of bits.

Changing a module's output y by Δ changes the model's distribution by KL ≈ ½·E[(g·Δ)²], g the
gradient of the log-likelihood of tokens drawn from the model's own distribution (the Fisher
information: Choi et al., arXiv:1612.01543, here with the whole Δ instead of a diagonal). One
backward sweep, a decoder layer at a time, so gives the cost of every module under every
scheme. Costs add up, and the choice is a knapsack solved on its convex hull. (g·Δ)² is taken of each
token, without the products of two tokens: on SmolLM2 the squares of whole texts' sums give the same,
to 2 % for int8 and 6 % for fp8 over all modules, but a sample per text is noisier than one per token.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.calibration.activations import ActivationCache
from lowbit.calibration.calibrate import Warn, make_batches, module_schemes
from lowbit.calibration.distributed import gathered, my_share, rank
from lowbit.calibration.layerwise import LayerwiseModel
from lowbit.calibration.simulate import fake_quantize
from lowbit.calibration.source import Source
from lowbit.checkpoint.rules import Selection, fused_key
from lowbit.errors import InputError
from lowbit.quantize import quantize
from lowbit.recipe import Recipe
from lowbit.scheme import Scheme, get_scheme

FLOAT = "float"
FLOAT_BITS = 16.0


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Modules that must share a scheme, since engines run them as one matmul."""

    modules: tuple[str, ...]
    """Names in the checkpoint."""
    elements: int
    cost: Mapping[str, float]
    """Scheme name (or `float`: 0) → predicted KL, nats per token."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One point of the curve."""

    bits: float
    """Mean bits per quantizable weight."""
    kl: float
    """Predicted."""
    schemes: tuple[str, ...]
    """One per unit."""


def bits_of(name: str) -> float:
    if name == FLOAT:
        return FLOAT_BITS
    weights = get_scheme(name).weights
    return FLOAT_BITS if weights is None else float(weights.dtype.bits)


def sensitivities(
    source: str | Path,
    windows: Sequence[Tensor],
    candidates: Sequence[str] = ("int8", "fp8"),
    *,
    selection: Selection | None = None,
    device: str | torch.device = "cpu",
    batch_size: int = 4,
    memory_limit: int = 4 << 30,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    warn: Warn = warnings.warn,
) -> list[Unit]:
    """Predicted KL of every unit under every candidate scheme (dynamic activations), on windows of ids [T].

    Workers share the windows (see `distributed`), and all return the same. `warn` is told of patterns that
    mean nothing.
    """
    schemes = list(dict.fromkeys(get_scheme(c) for c in candidates))
    for scheme in schemes:
        if scheme.weights is None or scheme.needs_calibration:
            raise InputError(f"expected candidates with dynamic or no activations, found {scheme.name}")
    reader = Source(source)
    reader.require_unrotated()
    model = LayerwiseModel(reader, device=device)
    selection = selection or Selection()
    for warning in selection.warnings(reader.modules):
        warn(warning)
    # A conversion has a scale per channel where blocks or groups do not fit.
    made = {s.name: module_schemes(model, s, selection) for s in schemes}
    quantizable = list(dict.fromkeys(n for of in made.values() for n in of))
    if not quantizable:
        raise InputError(
            f"expected at least one weight to quantize in the layers of {source}, found none that the rules allow; "
            "`lowbit plan` says which rule kept each"
        )
    total = 2 * len(model)
    batches = make_batches(my_share(windows), batch_size)
    if not batches:
        raise InputError("expected data to search on, found none; pass --data")
    states = [ActivationCache(memory_limit // (len(model) + 1)) for _ in range(len(model) + 1)]
    calls = []
    for ids in batches:
        call = model.embed(ids, states[0].hold)
        states[0].append(call.hidden)
        calls.append(call.kwargs)
    for index in range(len(model)):
        if progress:
            progress(model.layer_name(index), index, total)
        layer = model.load(index)
        for batch, hidden in enumerate(states[index]):
            states[index + 1].append(model.run(layer, index, hidden, calls[batch][index]))
    if any(model.shares(call[-1]) for call in calls):
        raise InputError(
            f"expected decoder layers on their own, found some in {source} that use the keys and values of others, "
            "whose cost would be counted in part; use one scheme, or a recipe of your own"
        )
    generator = torch.Generator().manual_seed(seed + rank())
    gradients = [_head_gradient(model, hidden, generator) for hidden in states[-1]]
    costs: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for index in reversed(range(len(model))):
        if progress:
            progress(model.layer_name(index), total - 1 - index, total)
        layer, prefix = model.load(index), model.layer_name(index) + "."
        names = [n.removeprefix(prefix) for n in quantizable if n.startswith(prefix)]
        candidates_of = {n: {c: of[prefix + n] for c, of in made.items() if prefix + n in of} for n in names}
        rounded = {n: _rounded(layer, n, of) for n, of in candidates_of.items()}
        for batch, hidden in enumerate(states[index]):
            gradients[batch], seen = _layer_gradient(
                model, layer, hidden, calls[batch][index], gradients[batch], names
            )
            for name, calls_of in seen.items():
                for x, y, g in calls_of:
                    for candidate, scheme in candidates_of[name].items():
                        q = x if scheme.activations is None else fake_quantize(x, scheme.activations)
                        lost = nn.functional.linear(q, rounded[name][candidate]) - y
                        change = (lost * g).sum(-1).double().square().sum()
                        costs[prefix + name][candidate] += 0.5 * float(change)
        states[index].close()
    tokens = sum(gathered(sum(int(b.numel()) for b in batches)))
    return _units(model, made, _summed(costs), tokens)


def _summed(costs: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Module → scheme → cost, summed over workers in rank order."""
    out: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for part in gathered({module: dict(of) for module, of in costs.items()}):
        for module, of in part.items():
            for name, cost in of.items():
                out[module][name] += cost
    return out


def _head_gradient(model: LayerwiseModel, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """∂/∂h of Σ log p(token drawn from p), one sequence at a time to bound the logits."""
    grads = []
    for row in hidden:
        h = row[None].to(model.device, copy=True).requires_grad_(True)
        with torch.enable_grad():
            log_p = torch.log_softmax(model.head_with_grad(h).float(), dim=-1)[0]
            drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(log_p.device)
            log_p.gather(1, drawn).sum().backward()
        assert h.grad is not None
        grads.append(h.grad)
    return torch.cat(grads)


def _layer_gradient(
    model: LayerwiseModel,
    layer: nn.Module,
    hidden: Tensor,
    kwargs: dict[str, Any],
    gradient: Tensor,
    names: Sequence[str],
) -> tuple[Tensor, dict[str, list[tuple[Tensor, Tensor, Tensor]]]]:
    """(gradient at the layer's input, name → [(input, output without bias, gradient at the output)])."""
    seen: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, out: Tensor) -> None:
            if not out.requires_grad:
                return  # what only selects tokens (DeepSeek-V3.2's indexer) costs nothing that a gradient tells
            # As they are now: a layer may add to an output in place (Llama 4 to its shared expert's).
            plain = out.detach() - module.bias if isinstance(module.bias, Tensor) else out.detach().clone()
            out.register_hook(lambda gradient: seen[name].append((args[0].detach(), plain, gradient)))

        return hook

    handles = [layer.get_submodule(n).register_forward_hook(keep(n)) for n in names]
    try:
        with torch.enable_grad():
            h = hidden.to(model.device, copy=True).requires_grad_(True)
            model.run_with_grad(layer, h, kwargs).backward(gradient)
    finally:
        for handle in handles:
            handle.remove()
    assert h.grad is not None
    return h.grad, seen


def _rounded(layer: nn.Module, name: str, schemes: Mapping[str, Scheme]) -> dict[str, Tensor]:
    weight = layer.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return {
        candidate: quantize(weight, s.weights, name=name).dequantize().to(weight)
        for candidate, s in schemes.items()
        if s.weights
    }


def _units(
    model: LayerwiseModel,
    made: Mapping[str, Mapping[str, Scheme]],
    costs: Mapping[str, Mapping[str, float]],
    tokens: int,
) -> list[Unit]:
    """`made`: candidate → module → the scheme that a conversion gives it; without those that it leaves in float."""
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(len(model)):
        shapes |= model.linear_shapes(index)
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for ours in dict.fromkeys(ours for of in made.values() for ours in of):
        disk = model.disk_name(ours)
        groups[fused_key(disk, model.model_type) or (disk,)].append(ours)
    units = []
    for members in groups.values():
        possible = [n for n, of in made.items() if all(m in of for m in members)]
        cost = {n: sum(costs[m].get(n, 0.0) for m in members) / tokens for n in possible}
        units.append(
            Unit(
                modules=tuple(model.disk_name(m) for m in members),
                elements=sum(shapes[m][0] * shapes[m][1] for m in members),
                cost={**cost, FLOAT: 0.0},
            )
        )
    return units


def curve(units: Sequence[Unit]) -> list[Choice]:
    """The best choices from fewest bits to most: every unit starts at its cheapest among the smallest
    schemes, then the step with the most KL saved per bit is taken, one after the other."""
    total = sum(u.elements for u in units)
    smallest = min(bits_of(n) for u in units for n in u.cost)
    chosen = []
    for unit in units:
        least = min(bits_of(n) for n in unit.cost)
        chosen.append(min((n for n in unit.cost if bits_of(n) == least), key=unit.cost.__getitem__))
    steps: list[tuple[float, int, str]] = []
    for i, unit in enumerate(units):
        steps += [(rate, i, name) for rate, name in _hull(unit, chosen[i])]
    points = [_point(units, chosen, total)]
    for _, i, name in sorted(steps, key=lambda s: -s[0]):
        chosen[i] = name
        points.append(_point(units, chosen, total))
    assert smallest <= points[0].bits <= points[-1].bits <= FLOAT_BITS
    return points


def _hull(unit: Unit, start: str) -> list[tuple[float, str]]:
    """Steps (KL saved per bit, scheme) along the lower convex hull of one unit, steepest first."""
    steps: list[tuple[float, str]] = []
    current = start
    while True:
        better = [n for n in unit.cost if bits_of(n) > bits_of(current) and unit.cost[n] < unit.cost[current]]
        if not better:
            return steps

        def rate(n: str, current: str = current) -> float:
            return (unit.cost[current] - unit.cost[n]) / ((bits_of(n) - bits_of(current)) * unit.elements)

        best = max(better, key=rate)
        steps.append((rate(best), best))
        current = best


def _point(units: Sequence[Unit], chosen: Sequence[str], total: int) -> Choice:
    bits = sum(bits_of(n) * u.elements for n, u in zip(chosen, units, strict=True)) / max(total, 1)
    return Choice(
        bits=bits, kl=sum(u.cost[n] for n, u in zip(chosen, units, strict=True)), schemes=tuple(chosen)
    )


def _require_one_goal(budget: float | None, max_kl: float | None) -> None:
    if (budget is None) == (max_kl is None):
        raise InputError("expected either a budget of bits or a largest KL, found both or neither")


def check_wish(
    candidates: Sequence[str], *, budget: float | None = None, max_kl: float | None = None
) -> None:
    """Raise InputError where no search can give that (see `pick`): to be said before one has run."""
    _require_one_goal(budget, max_kl)
    if not candidates:
        raise InputError("expected schemes to choose from, found none; int8,fp8 are the usual ones")
    least = min(bits_of(name) for name in candidates)
    if budget is not None and not budget >= least - 1e-9:
        raise InputError(
            f"expected a budget of at least {least:.2f} bits, which {', '.join(candidates)} take, found {budget}"
        )
    if max(least, budget or 0) >= FLOAT_BITS or (max_kl is not None and not max_kl > 0):
        raise InputError(
            f"expected schemes and a budget of less than {FLOAT_BITS:.0f} bits, or a KL of more than 0, which float "
            f"alone reaches, found {', '.join(candidates)} and {budget if max_kl is None else max_kl}"
        )


def pick(points: Sequence[Choice], *, budget: float | None = None, max_kl: float | None = None) -> Choice:
    """The most accurate point within `budget` mean bits, or the smallest with KL ≤ `max_kl`.

    Raises InputError naming what is possible.
    """
    _require_one_goal(budget, max_kl)
    if budget is not None:
        within = [p for p in points if p.bits <= budget + 1e-9]
        if not within:
            raise InputError(f"expected a budget of at least {points[0].bits:.2f} bits, found {budget}")
        return min(within, key=lambda p: (p.kl, p.bits))
    enough = [p for p in points if max_kl is not None and p.kl <= max_kl]
    return enough[0] if enough else points[-1]


def recipe_of(
    units: Sequence[Unit], choice: Choice, points: Sequence[Choice], *, ignore: Sequence[str] = ()
) -> Recipe:
    """A recipe with the most common scheme as the main one and overrides for the rest.

    `ignore`: patterns of modules that the search left in float, and so no units. The recipe's main scheme would
    quantize them.
    """
    weight: dict[str, int] = defaultdict(int)
    for unit, name in zip(units, choice.schemes, strict=True):
        weight[name] += unit.elements if name != FLOAT else 0
    main = max(weight, key=lambda n: weight[n])
    overrides = {
        module: name
        for unit, name in zip(units, choice.schemes, strict=True)
        for module in unit.modules
        if name != main
    }
    if main == FLOAT:
        raise InputError(
            "expected a wish that some scheme fulfils, found one that leaves every module in float; give a larger KL, "
            "or a budget"
        )
    step = max(1, len(points) // 32)
    schemes = dict.fromkeys(n for unit in units for n in unit.cost if n != FLOAT)
    notes = {
        "bits": round(choice.bits, 4), "predicted_kl": float(f"{choice.kl:.4g}"),
        "curve": [[round(p.bits, 3), float(f"{p.kl:.4g}")] for p in points[::step]],
        # What a conversion leaves in float under a scheme costs nothing.
        "uniform": {n: float(f"{sum(u.cost.get(n, 0.0) for u in units):.4g}") for n in schemes},
    }  # fmt: skip
    return Recipe(scheme=main, ignore=tuple(ignore), overrides=overrides, notes=notes)
