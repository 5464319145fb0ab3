"""`lowbit bench`: tokens per second and memory of a converted checkpoint, against the unquantized model."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli.models import Device, DTypeName, Json, Model, Threads
from lowbit.cli.output import some_path


def bench(
    out: Model,
    against: Annotated[
        Path | None,
        typer.Option(
            "--against",
            parser=some_path,
            metavar="PATH",
            help="The unquantized checkpoint; default: OUT dequantized, which runs as fast.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Sequences at once; repeatable. Default 1 and 8.", show_default=False),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode after it.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds; the median counts.")] = 3,
    dtype: DTypeName = "auto",
    device: Device = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Measure prefill and decoding, alternating with the unquantized model in the same dtype."""
    from lowbit.cli.models import open_model, require_decoder, too_long
    from lowbit.cli.output import print_json, say_bytes, steps_bar, table, warn

    model, _, seconds = open_model(out, dtype=dtype, device=device, threads=threads)
    require_decoder(model, out)
    import torch

    from lowbit.calibration.positions import longest_text
    from lowbit.nn.speed import measure, weight_bytes

    models = {"lowbit": model, "unquantized": _unquantized(model, against)}
    rows: list[dict[str, Any]] = []
    batches, done = batch or [1, 8], itertools.count()
    total = len(batches) * len(models) * (repeats + 1)
    longest = longest_text(model, model.config.get_text_config())
    if longest is not None and prompt_tokens + new_tokens > longest:
        warn(f"the model was made for texts of at most {longest} tokens; speeds for longer ones mean little")
    # A bar that moves by itself would take time from what is measured.
    with steps_bar("measuring", quiet=json, live=False) as show:
        for size in batches:

            def say(name: str, size: int = size) -> None:
                show(f"{name}, batch {size}", next(done), total)

            try:
                found = measure(
                    models, batch=size, prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats,
                    progress=say,
                )  # fmt: skip
            except IndexError as error:  # of learned positions
                raise too_long(out, prompt_tokens + new_tokens) from error
            rows += [
                {
                    "model": name, "batch": size, "prefill_tokens_per_second": round(s.prefill, 1),
                    "decode_tokens_per_second": round(s.decode, 2), "weight_bytes": weight_bytes(models[name]),
                    "prefill_ratio": round(s.prefill / found["unquantized"].prefill, 3),
                    "decode_ratio": round(s.decode / found["unquantized"].decode, 3),
                }
                for name, s in found.items()
            ]  # fmt: skip
    shown_dtype = str(model.dtype).removeprefix("torch.")
    if json:
        print_json({
            "checkpoint": str(out), "device": str(model.device), "dtype": shown_dtype,
            "threads": torch.get_num_threads(), "prompt_tokens": prompt_tokens, "new_tokens": new_tokens,
            "repeats": repeats, "load_seconds": round(seconds, 3), "results": rows,
        })  # fmt: skip
        return
    print(
        f"{out} on {model.device}, {shown_dtype}, {torch.get_num_threads()} threads, loaded in {seconds:.2f} s"
    )
    cells = [
        [
            r["model"], str(r["batch"]), f"{r['prefill_tokens_per_second']:.1f}", f"{r['prefill_ratio']:.2f}×",
            f"{r['decode_tokens_per_second']:.2f}", f"{r['decode_ratio']:.2f}×", say_bytes(r["weight_bytes"]),
        ]
        for r in rows
    ]  # fmt: skip
    print(
        table(
            ["model", "batch", "prefill tok/s", "", "decode tok/s", "", "weights"],
            cells,
            right={1, 2, 3, 4, 5, 6},
        )
    )


def _unquantized(model: Any, against: Path | None) -> Any:
    from lowbit.cli.models import require_decoder
    from lowbit.errors import InputError
    from lowbit.nn import load
    from lowbit.nn.speed import dequantized_copy

    if against is not None:
        other = load(against, dtype=model.dtype, device=str(model.device))
        require_decoder(other, against)
        return other
    try:
        return dequantized_copy(model, model.dtype)
    except ValueError as error:
        raise InputError(f"{error}: --against SRC") from error
