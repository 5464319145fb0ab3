"""Which module takes which scheme, given what each costs: the least KL divergence under a budget of bits.

Costs add up (see `search`), and the choice is a knapsack solved on its convex hull.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lowbit.errors import InputError
from lowbit.recipe import Recipe
from lowbit.scheme import get_scheme

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
    if max(least, budget or 0) >= FLOAT_BITS or (max_kl is not None and not max_kl > 0):
        raise InputError(
            f"expected schemes and a budget of less than {FLOAT_BITS:.0f} bits, or a KL of more than 0, which float "
            f"alone reaches, found {', '.join(candidates)} and {budget if max_kl is None else max_kl}"
        )
    if budget is not None and not budget >= least - 1e-9:
        raise InputError(
            f"expected a budget of at least {least:.2f} bits, which {', '.join(candidates)} take, found {budget}"
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
