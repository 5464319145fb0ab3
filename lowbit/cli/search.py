"""`lowbit search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.calibrate import Device
from lowbit.cli.output import some_path, torch_seed


def search(
    src: Annotated[Path, typer.Argument(parser=some_path, metavar="SRC", help="Checkpoint directory.")],
    data: Annotated[
        Path,
        typer.Option(
            parser=some_path, metavar="PATH", help="Text file, .jsonl of prompts, or a directory of them."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", parser=some_path, metavar="RECIPE", help="Recipe to write, .yaml or .json."
        ),
    ] = Path("recipe.yaml"),
    budget: Annotated[
        float | None,
        typer.Option(
            min=1.0, max=16.0, help="Mean bits per weight of the quantizable modules; 8.5 without --max-kl."
        ),
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
    length: Annotated[
        int, typer.Option(min=8, help="Tokens per window, with the BOS that the tokenizer adds, if any.")
    ] = 512,
    seed: Annotated[int, typer.Option(callback=torch_seed, help="Which samples.")] = 0,
    device: Device = "auto",
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the file RECIPE, and another search in RECIPE.search."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Find a scheme per module: the least KL divergence for a mean number of bits. Writes a recipe.

    Modules that engines fuse get one scheme. Then:  lowbit convert SRC OUT --recipe RECIPE

    What is measured is kept in RECIPE.search: a run that was killed goes on when the same command is given again, and
    another --budget (with --overwrite) takes no measuring.
    """
    from lowbit import quality
    from lowbit.calibration.devices import join
    from lowbit.calibration.distributed import rank
    from lowbit.checkpoint.files import cannot_make
    from lowbit.cli.calibrate import say_resumed
    from lowbit.cli.output import Warnings, print_json, steps_bar, table
    from lowbit.errors import InputError

    where, warn = join(device), Warnings()
    if why := "it is a directory" if out.is_dir() else cannot_make(out):
        raise InputError(
            f"expected where to write a recipe, found {out}: {why}; choose another place, or check its permissions"
        )
    if out.exists() and not overwrite:
        raise InputError(
            f"expected no file at {out}, where the recipe will be, found one; give another --out, or --overwrite"
        )
    quiet = json or rank() != 0
    with steps_bar("searching", quiet=quiet) as progress:
        recipe = quality.search(
            src, data, budget=budget, max_kl=max_kl, candidates=[c.strip() for c in candidates.split(",") if c.strip()],
            ignore=tuple(ignore or ()), samples=samples, length=length, seed=seed, device=where,
            state=out.with_name(out.name + ".search"), overwrite=overwrite, resumed=say_resumed(quiet=quiet),
            progress=progress, warn=warn,
        )  # fmt: skip
    if rank() != 0:
        return
    recipe.save(out)
    if json:
        print_json({"recipe": str(out), **recipe.to_dict(), "warnings": warn})
        return
    notes = recipe.notes
    bits, kl, curve = notes["bits"], notes["predicted_kl"], notes["curve"]
    rows = [(b, f"{k:.5f}", "") for b, k in curve[:: max(1, len(curve) // 12)] if abs(b - bits) > 0.001]
    shown = [[f"{b:.3f}", k, mark] for b, k, mark in sorted([*rows, (bits, f"{kl:.5f}", "<-")])]
    print(table(["bits", "predicted KL", ""], shown, right={0, 1}))
    for name, uniform in notes["uniform"].items():
        print(f"{name} everywhere: predicted KL {uniform:.5f}")
    print(f"wrote {out}: {bits:.3f} bits, predicted KL {kl:.5f}, {len(recipe.overrides)} exceptions")
    print(f"next: lowbit convert {src} OUT --recipe {out}")
