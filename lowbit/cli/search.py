"""`lowbit search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.calibrate import Device


def search(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="Checkpoint directory.")],
    data: Annotated[Path, typer.Option(help="Text file, .jsonl of prompts, or a directory of them.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="RECIPE", help="Recipe to write, .yaml or .json.")
    ] = Path("recipe.yaml"),
    budget: Annotated[
        float | None, typer.Option(min=1.0, max=16.0, help="Mean bits per weight of the quantizable modules.")
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(min=0.0, help="In place of a budget: the smallest model with this predicted KL."),
    ] = None,
    candidates: Annotated[
        str, typer.Option(help="Schemes to choose from; float is always one.")
    ] = "int8,fp8",
    ignore: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Leave these modules in float. Repeatable.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows to measure on.")] = 16,
    length: Annotated[int, typer.Option(min=8, help="Tokens per window.")] = 512,
    seed: Annotated[int, typer.Option(help="Which samples.")] = 0,
    device: Device = "auto",
    json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Find a scheme per module: the least KL divergence for a mean number of bits. Writes a recipe.

    Modules that engines fuse get one scheme. Then:  lowbit convert SRC OUT --recipe RECIPE
    """
    from lowbit.calibration.data import load_tokenizer, load_windows
    from lowbit.calibration.distributed import rank
    from lowbit.calibration.search import curve, pick, recipe_of, sensitivities
    from lowbit.checkpoint.rules import Selection
    from lowbit.cli.calibrate import steps_bar, worker_device
    from lowbit.cli.output import print_json, table

    if budget is None and max_kl is None:
        budget = 8.5
    where = worker_device(device)
    windows = load_windows(data, load_tokenizer(src), samples=samples, length=length, seed=seed)
    names = [c.strip() for c in candidates.split(",") if c.strip()]
    with steps_bar("searching", quiet=json or rank() != 0) as progress:
        units = sensitivities(
            src, windows, names, selection=Selection(ignore=tuple(ignore or ())), device=where, seed=seed,
            progress=progress,
        )  # fmt: skip
    points = curve(units)
    choice = pick(points, budget=budget, max_kl=max_kl)
    recipe = recipe_of(units, choice, points)
    if rank() != 0:
        return
    recipe.save(out)
    if json:
        print_json({"recipe": str(out), **recipe.to_dict()})
        return
    step = max(1, len(points) // 12)
    rows = [[f"{p.bits:.3f}", f"{p.kl:.5f}", "<-" if p == choice else ""] for p in points[::step]]
    if choice not in points[::step]:
        rows.append([f"{choice.bits:.3f}", f"{choice.kl:.5f}", "<-"])
    print(table(["bits", "predicted KL", ""], sorted(rows, key=lambda r: float(r[0])), right={0, 1}))
    for name, kl in recipe.notes["uniform"].items():
        print(f"{name} everywhere: predicted KL {kl:.5f}")
    print(
        f"wrote {out}: {choice.bits:.3f} bits, predicted KL {choice.kl:.5f}, {len(recipe.overrides)} exceptions"
    )
    print(f"next: lowbit convert {src} OUT --recipe {out}")
