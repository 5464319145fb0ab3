"""`lowbit eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.calibrate import Device
from lowbit.cli.output import some_path, torch_seed


def evaluate(
    out: Annotated[
        Path,
        typer.Argument(parser=some_path, metavar="OUT", help="Checkpoint to evaluate, quantized or not."),
    ],
    data: Annotated[
        Path,
        typer.Option(
            parser=some_path, metavar="PATH", help="Text file, .jsonl of prompts, or a directory of them."
        ),
    ],
    reference: Annotated[
        Path | None,
        typer.Option(
            parser=some_path,
            metavar="SRC",
            help="What it was made from: KL, top-1 and layer errors against it.",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            parser=some_path,
            metavar="CALIB",
            help="Evaluate OUT with this calibration laid over it, unconverted.",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows or prompts to use.")] = 64,
    length: Annotated[
        int, typer.Option(min=8, help="Tokens per window, with the BOS that the tokenizer adds, if any.")
    ] = 512,
    seed: Annotated[int, typer.Option(callback=torch_seed, help="Which samples.")] = 0,
    device: Device = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Windows that run together.")] = 4,
    max_kl: Annotated[float | None, typer.Option(help="Exit code 1 when the mean KL is above this.")] = None,
    max_change: Annotated[
        float | None,
        typer.Option(metavar="PERCENT", help="Exit code 1 when perplexity rises by more than this."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Perplexity, and against a reference the KL divergence, top-1 agreement and each layer's error.

    Activations are rounded as an engine would. One decoder layer of each model is in memory at a time.
    """
    from lowbit import quality
    from lowbit.calibration.devices import join
    from lowbit.calibration.distributed import rank
    from lowbit.cli.output import print_json, steps_bar
    from lowbit.errors import InputError

    if (max_kl is not None or max_change is not None) and reference is None and calibration is None:
        raise InputError("expected --reference SRC for --max-kl and --max-change, found none")
    where = join(device)
    with steps_bar("evaluating", quiet=json or rank() != 0) as progress:
        report = quality.measure(
            out, data, reference=reference, calibration=calibration, samples=samples, length=length, seed=seed,
            device=where, batch_size=batch_size, progress=progress,
        )  # fmt: skip
    result = report.to_dict()
    too_far = []
    # Not `above`, which NaN never is.
    if max_kl is not None and not result["kl"] <= max_kl:
        too_far.append(f"KL {result['kl']:.5f} is not at most {max_kl}")
    if max_change is not None and not result["perplexity_change"] * 100 <= max_change:
        too_far.append(f"perplexity rose by {result['perplexity_change']:.2%}, not at most {max_change} %")
    if rank() != 0:
        pass  # the first worker says it
    elif json:
        print_json({**result, "passed": not too_far})
    else:
        print(f"tokens             {result['tokens']}")
        print(f"perplexity         {result['perplexity']:.4f}")
        if report.compared:
            print(
                f"  of the reference {result['reference_perplexity']:.4f} ({result['perplexity_change']:+.2%})"
            )
            print(f"KL divergence      {result['kl']:.5f} nats per token")
            print(f"top-1 agreement    {result['top1_agreement']:.2%}")
            print("relative error of hidden states after each layer:")
            for name, error in report.layer_errors.items():
                print(f"  {name:24} {error:.4f}")
        for line in too_far:
            print(f"FAILED: {line}")
    if too_far:
        raise typer.Exit(1)
