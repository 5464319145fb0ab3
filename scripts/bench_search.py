"""`lowbit search` against uniform schemes and layers left in float, at equal size, on SmolLM2.

    python scripts/bench_search.py --work DIR [--budgets 8 9 10 12] [--out FILE.md]

Searches on windows of one half of Debian's handbook (16, less than `bench_calibration.py`
calibrates with), and evaluates every recipe on the other half and on unseen text, as `convert --recipe`
would write it. At 8 bits a recipe mixes int8 and fp8; above, what it leaves in float is compared
with the better uniform scheme whose first or last layers are left in float, n as large as the budget
allows. `--work` may be that of `bench_calibration.py`. Finished rows are kept there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from bench_calibration import cpu, evaluated, prepare, write  # beside this file

from lowbit.calibration.choice import curve, pick, recipe_of
from lowbit.calibration.search import sensitivities
from lowbit.checkpoint.rules import Selection
from lowbit.evaluate.layerwise import rounded
from lowbit.scheme import get_scheme

CANDIDATES = ("int8", "fp8")


def measure(work: Path, source: Path, name: str, scheme: str, overrides: Mapping[str, str]) -> dict[str, Any]:
    """{evaluate: {kl, …}, unseen: {…}} of plain conversion with these exceptions."""
    cached = work / "search" / f"{name.replace(' ', '-').replace(':', '')}.json"
    if cached.is_file():
        return json.loads(cached.read_text(encoding="utf-8"))
    candidate = rounded(source, get_scheme(scheme), Selection(overrides=dict(overrides)))
    row = evaluated(work, source, candidate)
    cached.parent.mkdir(exist_ok=True)
    cached.write_text(json.dumps(row, indent=1), encoding="utf-8")
    return row


def left_in_float(layers: list[int]) -> dict[str, str]:
    return {rf"re:.*layers\.{i}\..*": "float" for i in layers}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--budgets", type=float, nargs="+", default=[8.0, 9.0, 10.0, 12.0])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--out", type=Path, help="write the table here")
    arguments = parser.parse_args()
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    source, text, other = prepare(work, max(32, arguments.samples), 512, 16, [0])
    windows = list(torch.load(work / "calibrate-0.pt", weights_only=True))[: arguments.samples]
    units = sensitivities(source, windows, CANDIDATES)
    points = curve(units)
    depth = 1 + max(int(m.split(".")[2]) for u in units for m in u.modules)
    lines = [
        "| bits | model | predicted KL | KL | unseen text: KL | of the best uniform |",
        "|---|---|---|---|---|---|",
    ]
    for budget in arguments.budgets:
        choice = pick(points, budget=budget)
        recipe = recipe_of(units, choice, points)
        left = int((budget - 8.0) / (16.0 - 8.0) * depth + 1e-9)
        rivals: dict[str, tuple[str, dict[str, str]]] = {}
        for scheme in CANDIDATES:
            if not left:
                rivals[f"{scheme} everywhere"] = (scheme, {})
                continue
            rivals[f"{scheme}, first {left} layers in float"] = (scheme, left_in_float(list(range(left))))
            last = list(range(depth - left, depth))
            rivals[f"{scheme}, last {left} layers in float"] = (scheme, left_in_float(last))
        found = {n: measure(work, source, n, *r) for n, r in rivals.items()}
        best = {t: min(r[t]["kl"] for r in found.values()) for t in ("evaluate", "unseen")}
        mine = measure(work, source, f"search {budget:g}", recipe.scheme, recipe.overrides)
        for name, row in found.items():
            size = 8.0 + 8.0 * left / depth
            lines.append(
                f"| {size:.2f} | {name} | | {row['evaluate']['kl']:.5f} | {row['unseen']['kl']:.5f} | |"
            )
        shares = " / ".join(f"{mine[t]['kl'] / best[t]:.2f}" for t in best)
        lines.append(
            f"| {choice.bits:.2f} | **search** | {choice.kl:.5f} | {mine['evaluate']['kl']:.5f} | "
            f"{mine['unseen']['kl']:.5f} | {shares} |"
        )
        print("\n".join(lines[-len(found) - 1 :]), flush=True)
    used = {
        n: sum(u.elements for u, c in zip(units, points[0].schemes, strict=True) if c == n)
        for n in CANDIDATES
    }
    share = used["fp8"] / max(sum(used.values()), 1)
    note = (
        f"SmolLM2-135M; searched on {arguments.samples} × 512 tokens of one half of {text}, evaluated on the other "
        f"half and on {other} (unseen); schemes {', '.join(CANDIDATES)} and float, plain rounding. "
        f"At 8 bits the search gives fp8 to {share:.0%} of the weights. {cpu()}."
    )
    table = "\n".join(lines)
    print(f"\n{note}\n\n{table}")
    if arguments.out:
        write(arguments.out, f"# Search\n\n{note}\n\n{table}\n")


if __name__ == "__main__":
    main()
