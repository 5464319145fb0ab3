"""`lowbit calibrate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli.output import some_path, steps_bar, torch_seed

if TYPE_CHECKING:
    from torch import Tensor

    from lowbit.calibration.methods import Method
    from lowbit.calibration.run import RunOptions
    from lowbit.calibration.store import Calibration
    from lowbit.cli.output import Warnings
    from lowbit.recipe import Recipe

Device = Annotated[
    str,
    typer.Option(
        help="Where layers run: auto (an accelerator if there is one), cpu, cuda, cuda:1, xpu, npu, … Under "
        "`torchrun` or `accelerate launch` every worker takes a device of its own, so give no index."
    ),
]


Samples = Annotated[
    int | None,
    typer.Option(min=1, help="Windows or prompts of --data to use; default: 128.", show_default=False),
]
Length = Annotated[
    int | None,
    typer.Option(
        min=8,
        help="Tokens per window, with the BOS that the tokenizer adds, if any; default: 2048.",
        show_default=False,
    ),
]


def calibrate(
    src: Annotated[
        Path | None,
        typer.Argument(parser=some_path, metavar="SRC", help="Checkpoint directory.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", parser=some_path, metavar="CALIB", help="New directory for the calibration."
        ),
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option("--scheme", "-s", help="Scheme to calibrate for; default: int8.", show_default=False),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            "-m",
            help="A method; --list-methods says what each does. Default: best.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            parser=some_path,
            metavar="PATH",
            help="Text file, .jsonl of prompts (text, prompt or messages), or a directory of them.",
        ),
    ] = None,
    samples: Samples = None,
    length: Length = None,
    seed: Annotated[
        int | None,
        typer.Option(
            callback=torch_seed,
            help="Which samples, and which random rotation; default: 0.",
            show_default=False,
        ),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="SmoothQuant's α, in place of the method's.")
    ] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(
            help="Also calibrate KV-cache scales: fp8, int8, fp8-head, int8-head, or int8-channel for --format ascend."
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Leave these modules in float. Repeatable.")
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            parser=some_path,
            metavar="PATH",
            help="YAML or JSON recipe: scheme and exceptions, and method and data where the options give none.",
        ),
    ] = None,
    device: Device = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Windows that run together.")] = 8,
    memory_limit: Annotated[
        float,
        typer.Option(
            min=0.0,
            metavar="GB",
            help="Hidden states kept in host memory by each worker; the rest goes to disk.",
        ),
    ] = 4.0,
    spill: Annotated[
        Path | None,
        typer.Option(
            parser=some_path, metavar="PATH", help="Where hidden states go; default: the temporary directory."
        ),
    ] = None,
    routed_only: Annotated[
        bool, typer.Option("--routed-only", help="Experts see only tokens that the router sends them.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another calibration in CALIB.")
    ] = False,
    list_methods: Annotated[bool, typer.Option("--list-methods", help="Say what every method does.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
) -> None:
    """Choose scales, transforms and roundings on data, one decoder layer in memory at a time.

    Then:  lowbit convert SRC OUT --scheme SCHEME --calibration CALIB

    A run that was killed goes on when the same command is given again; where the method smooths, some codes may
    then be others than of an undisturbed run. Workers share the data and the rounding, one per
    device:  torchrun --nproc-per-node 4 -m lowbit calibrate SRC -o CALIB …
    """
    from dataclasses import replace

    from lowbit.calibration.devices import join
    from lowbit.calibration.distributed import rank
    from lowbit.calibration.methods import METHODS, best_method
    from lowbit.calibration.run import RunOptions
    from lowbit.cli.checkpoint import what_is_asked
    from lowbit.cli.output import Warnings, print_json
    from lowbit.errors import InputError
    from lowbit.scheme import get_scheme

    wanted, _, _ = what_is_asked(recipe, scheme, None, None, ignore, None)
    if list_methods:
        best = best_method(get_scheme(wanted.scheme))
        rows = {
            "best": f"for --scheme {wanted.scheme}: {best.name}",
            **{m.name: m.describe() for m in METHODS.values()},
        }
        print_json(rows) if json else print("\n".join(f"{n:20} {d}" for n, d in rows.items()))
        return
    if src is None:
        raise InputError("expected the checkpoint to calibrate, found no SRC; give its directory")
    if out is None:
        raise InputError("expected where to write, found no --out; give one, such as -o CALIB")
    wanted = replace(wanted, method=method or wanted.method)
    wanted = with_data(wanted, data, samples=samples, length=length, seed=seed)
    options = RunOptions(
        device=join(device), batch_size=batch_size, memory_limit=int(memory_limit * 1e9),
        all_experts=not routed_only, spill_directory=str(spill) if spill else None,
    )  # fmt: skip
    warn = Warnings()
    found = run_recipe(
        src, out, wanted, options, alpha=alpha, kv_cache=kv_cache, overwrite=overwrite, quiet=json, warn=warn,
    )  # fmt: skip
    if rank() != 0:
        return
    report = summary(found)
    if json:
        print_json({**report, "warnings": warn})
        return
    print(f"next: lowbit convert {src} OUT --scheme {report['scheme']} --calibration {out}")


def with_data(wanted: Recipe, data: Path | None, **given: int | None) -> Recipe:
    """The recipe with what the options say of data before what it says itself."""
    from dataclasses import replace

    said = {"path": None if data is None else str(data), **given}
    return replace(wanted, data={**wanted.data, **{k: v for k, v in said.items() if v is not None}})


def run_recipe(
    src: Path,
    out: Path,
    wanted: Recipe,
    options: RunOptions,
    *,
    alpha: float | None = None,
    kv_cache: str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    warn: Warnings,
) -> Calibration:
    """Calibrate as a recipe says, with a progress bar, and say what was done (unless `quiet`)."""
    from lowbit import quality
    from lowbit.calibration.distributed import rank

    quiet = quiet or rank() != 0

    def started(method: Method, windows: Sequence[Tensor]) -> None:
        tokens = sum(int(w.numel()) for w in windows)
        print(f"{wanted.scheme} with {method.name}: {method.describe()}")
        many = "s" * (len(windows) != 1)
        print(f"{len(windows)} sample{many}, {tokens} tokens" if windows else "no data needed")

    of = dict(wanted.data)
    with steps_bar("calibrating", quiet=quiet) as progress:
        found = quality.calibrate(
            src, out, wanted.scheme, method=wanted.method or "best", data=of.pop("path", None), alpha=alpha,
            ignore=wanted.ignore, keep=wanted.keep, overrides=wanted.overrides, options=options, kv_cache=kv_cache,
            overwrite=overwrite, started=None if quiet else started, resumed=say_resumed(quiet=quiet),
            progress=progress, warn=warn, **of,
        )  # fmt: skip
    if not quiet:
        _say(out, summary(found))
    return found


def say_resumed(*, quiet: bool) -> Callable[[int, int], None]:
    """Says how much was done before; nothing when `quiet`."""

    def say(done: int, layers: int) -> None:
        if not quiet:
            print(f"resumed: {done} of {layers} layers were done already and are intact")

    return say


def _say(out: Path, report: dict[str, Any]) -> None:
    what = {"modules": report["modules"], "KV caches": report["kv_caches"]}
    written = " and ".join(f"{n} {name}" for name, n in what.items() if n) or "0 modules"
    print(f"wrote {out}: {written} in {report['layers']} layers, {report['seconds']:.1f} s")
    if report["error"] is not None:
        print(
            f"squared output error of weights: {report['error']:.2e}, rounding {report['nearest_error']:.2e} (mean)"
        )
    if dynamic := report["left_dynamic"]:
        print(
            f"{len(dynamic)} modules have dynamic activations, since with static ones their outputs would keep less "
            f"than {report['method']['dynamic_below']:g} dB (first: {dynamic[0]})"
        )
    lines = _of_fallbacks(report["fallbacks"], report["modules"])
    for line in lines[:10]:
        print(line)
    if len(lines) > 10:
        print(f"and {len(lines) - 10} more (--json lists all)")
    if report["online_hadamard"]:
        print(
            "down_proj needs its input rotated while running: lowbit's own modules do it, other engines do not"
        )


def _of_fallbacks(fallbacks: Sequence[str], modules: int) -> list[str]:
    """Lines of what was rounded without data, of `modules` in all: a mixture's experts in one."""
    from lowbit.formats.joined import EXPERT

    found: dict[tuple[str, str], list[str]] = {}
    for said in fallbacks:
        module, _, why = said.partition(": ")
        if expert := EXPERT.match(module):
            numbers = found.setdefault((expert.group(1), why), [])
            if (number := module[expert.end(1) + 1 : expert.end() - 1]) not in numbers:
                numbers.append(number)
        else:
            found[module, why] = []
    reasons = {why for _, why in found}
    if len(fallbacks) == modules and len(reasons) == 1:
        return [f"all {modules} modules: {reasons.pop()}"]
    return [
        f"{' '.join((name, ', '.join(numbers))).strip()}: {why}" for (name, why), numbers in found.items()
    ]


def summary(calibration: Any) -> dict[str, Any]:
    """What a finished calibration tells in a few numbers."""
    errors, fallbacks, online, dynamic = [], [], [], []
    for layer, report in calibration.layers.items():
        for module, entry in report.get("modules", {}).items():
            if "fallback" in entry:
                fallbacks.append(f"{layer}.{module}: {entry['fallback']}")
            elif entry.get("nearest_error"):
                errors.append((entry["error"], entry["nearest_error"]))
        online += report.get("online_hadamard", [])
        dynamic += report.get("left_dynamic", {})
    mean = [sum(column) / len(errors) for column in zip(*errors, strict=True)] if errors else [None, None]
    return {
        "path": str(calibration.path), "scheme": calibration.scheme, "method": dict(calibration.method),
        "data": dict(calibration.data), "modules": len(calibration.modules()),
        "layers": sum(1 for n in calibration.layers if n != "model"), "error": mean[0], "nearest_error": mean[1],
        "kv_caches": sum(name.endswith(".k_scale") for name in calibration.tensors), "left_dynamic": dynamic,
        "fallbacks": fallbacks, "online_hadamard": online, "seconds": sum(calibration.seconds.values()),
        "seconds_by_phase": dict(calibration.seconds),
    }  # fmt: skip
