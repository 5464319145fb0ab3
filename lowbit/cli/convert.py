"""`lowbit convert`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowbit.cli.calibrate import Device, Length, Samples
from lowbit.cli.checkpoint import (
    CalibrationDir,
    FormatName,
    Ignore,
    Json,
    Keep,
    RecipeFile,
    SchemeName,
    ShardSize,
    Source,
    TargetName,
    Workers,
    advice_on,
    headline,
    print_warnings,
    summary,
    what_is_asked,
)
from lowbit.cli.output import some_path

if TYPE_CHECKING:
    from lowbit.api import Conversion
    from lowbit.calibration.store import Calibration
    from lowbit.checkpoint.parts import Part
    from lowbit.checkpoint.plan import Plan
    from lowbit.cli.output import Warnings
    from lowbit.recipe import Recipe
    from lowbit.targets import Accelerator


def convert(
    src: Source,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", parser=some_path, help="New directory for the result.")
    ],
    scheme: SchemeName = None,
    format: FormatName = None,
    target: TargetName = None,
    ignore: Ignore = None,
    keep: Keep = None,
    max_shard_size: ShardSize = "5GB",
    calibration: CalibrationDir = None,
    recipe: RecipeFile = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Calibrate first, with this method (`lowbit calibrate --list-methods`), in one step."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            parser=some_path,
            metavar="PATH",
            help="Text, .jsonl or directory for --method.",
            show_default=False,
        ),
    ] = None,
    samples: Samples = None,
    length: Length = None,
    device: Device = "auto",
    workers: Workers = None,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="This machine's share, where N machines convert together on a shared file system: the same "
            "command with 1/N … N/N, at once or in any order; the last to end shows the result.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan and check, but write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint in OUT.")] = False,
    json: Json = False,
) -> None:
    """Rewrite a checkpoint quantized: one pass, constant memory, every other file carried along.

    A run that was killed goes on when the same command is given again. Check the result with
    `lowbit verify OUT --source SRC`.
    """
    from lowbit import api
    from lowbit.calibration import store
    from lowbit.checkpoint.jobs import files_of
    from lowbit.checkpoint.parts import Part
    from lowbit.checkpoint.writer import OutputDirectory
    from lowbit.cli.output import Warnings, bytes_bars, print_json, say_bytes
    from lowbit.errors import InputError

    warn = Warnings()
    share = Part() if part is None else Part.parse(part)
    calibrated = None if calibration is None else store.read(calibration)
    wanted, format, chip = what_is_asked(recipe, scheme, format, target, ignore, keep, calibrated)
    if method or (wanted.method and calibrated is None):
        from lowbit.calibration.distributed import rank
        from lowbit.checkpoint.hub import whole

        _check_options(share, calibrated, dry_run)
        src = whole(src)
        _check_before_calibrating(src, out, wanted, format, max_shard_size, overwrite=overwrite)
        calibrated = _calibrate(
            src, out, wanted, method, data, samples, length, device, overwrite=overwrite, quiet=json, warn=warn
        )  # fmt: skip
        if rank() != 0:
            return
    elif data is not None or samples is not None or length is not None:
        raise InputError(
            "expected --method beside --data, --samples and --length, found none; --method best is the recommended one"
        )
    decided = api.plan(
        src, wanted.scheme, format=format, ignore=wanted.ignore, keep=wanted.keep, overrides=wanted.overrides,
        max_shard_size=max_shard_size, calibration=calibrated,
    )  # fmt: skip
    print_warnings(decided, chip, warn)
    if not json:
        print(headline(decided))
        if chip is not None:
            print(advice_on(decided, chip)[0])
    if dry_run:
        OutputDirectory(out, decided, overwrite=overwrite, part=share)
        if json:
            print_json({**summary(decided, chip), "dry_run": True})
        else:
            print(f"dry run: {say_bytes(decided.output_bytes)} would be written to {out}")
        return
    jobs = [job for _, job in decided.jobs_in(share.shards(decided.shards))]
    totals = {"converting": sum(job.source_bytes for job in jobs)}
    if decided.source.repository is not None:
        totals["fetching"] = decided.source.repository.nbytes(files_of(jobs))
    with bytes_bars(totals, quiet=json) as bars:
        done = api.run_plan(
            decided, out, workers=workers, part=share, overwrite=overwrite, progress=bars[0], fetched=bars[-1]
        )
    _say(done, chip, json=json)


def _say(done: Conversion, chip: Accelerator | None, *, json: bool) -> None:
    """What was written, by this part and by all."""
    from lowbit.cli.output import print_json, say_bytes, warn

    decided, share = done.plan, done.part
    if done.not_finite:
        warn(not_finite_warning(done.not_finite))
    if json:
        body = {
            "out": done.out, "seconds": round(done.seconds, 3), "resumed_jobs": done.resumed_jobs,
            "part": f"{share.number}/{share.count}", "missing_files": list(done.missing),
            "gb_per_second": round(done.bytes_per_second / 1e9, 3), "not_finite": list(done.not_finite),
        }  # fmt: skip
        said = summary(decided, chip)
        if done.not_finite:
            said["warnings"].append(not_finite_warning(done.not_finite))
        print_json({**said, **body})
        return
    if done.resumed_jobs:
        print(f"resumed: {done.resumed_jobs} of {len(decided.jobs)} jobs were done already and are intact")
    speed = f"in {done.seconds:.1f} s, {done.bytes_per_second / 1e9:.2f} GB/s"
    if not share.whole:
        shards = share.shards(decided.shards)
        written = sum(decided.shards[number].nbytes for number in shards)
        print(f"{share}: {say_bytes(written)} in {len(shards)} of {len(decided.shards)} files {speed}")
        if done.missing:
            print(f"{done.out} is shown when the other parts have made {len(done.missing)} more")
            return
        speed = "by all parts"
    ratio = decided.output_bytes / max(decided.source.nbytes, 1)
    print(f"wrote {done.out}: {say_bytes(decided.output_bytes)} ({ratio:.0%} of the source) {speed}")


def not_finite_warning(tensors: Sequence[str]) -> str:
    """What to say of tensors that were copied with NaN or Inf in them."""
    more = f" and {len(tensors) - 3} more" if len(tensors) > 3 else ""
    return (
        f"{', '.join(tensors[:3])}{more}: copied as found, with NaN or Inf; they are so in the source, "
        "and `lowbit verify` reports them"
    )


def _check_options(share: Part, calibration: Calibration | None, dry_run: bool) -> None:
    """Raise for what does not go with --method."""
    from lowbit.errors import InputError

    if not share.whole:
        raise InputError(
            "expected --part without --method: every machine would calibrate; run `lowbit calibrate` once, "
            "then give --calibration to all"
        )
    if calibration is not None:
        raise InputError(
            "expected --calibration or --method, found both; a calibration has its method already"
        )
    if dry_run:
        raise InputError(
            "expected --dry-run without --method: calibrating is the work; plan with --calibration afterwards"
        )


def _check_before_calibrating(
    src: Path, out: Path, wanted: Recipe, format: str | None, max_shard_size: str, *, overwrite: bool
) -> None:
    """Raise now what would otherwise be raised when the calibration, hours maybe, has been made."""
    from lowbit import api
    from lowbit.calibration.resume import CalibrationError
    from lowbit.checkpoint.headers import PARTIAL
    from lowbit.checkpoint.journal import read_journals
    from lowbit.checkpoint.opening import open_checkpoint
    from lowbit.checkpoint.place import another_unfinished, check_place
    from lowbit.errors import InputError, NotCalibratedError
    from lowbit.formats import get_format
    from lowbit.scheme import get_scheme

    def plan(calibration: Path | None = None) -> Plan:
        return api.plan(
            src, wanted.scheme, format=format, ignore=wanted.ignore, keep=wanted.keep, overrides=wanted.overrides,
            max_shard_size=max_shard_size, calibration=calibration,
        )  # fmt: skip

    with suppress(NotCalibratedError):
        plan()
    if not overwrite and (begun := read_journals(out / PARTIAL)).begun:
        # A calibration that is yet to be made is not the one that it was begun with.
        digest = None
        with suppress(CalibrationError):
            digest = plan(_calibration_of(out)).digest()
        if digest != begun.digest:
            raise another_unfinished(out)
    check_place(out, open_checkpoint(src), overwrite=overwrite)
    scheme, target = get_scheme(wanted.scheme), get_format(format)
    if scheme.weights is not None and (why := target.refuse(scheme, (1024, 1024), "")):
        raise InputError(
            f"expected a format that holds {scheme.name} as a calibration makes it, found {target.name}: {why}; "
            "convert without --method, or to compressed-tensors"
        )


def _calibrate(
    src: Path,
    out: Path,
    wanted: Recipe,
    method: str | None,
    data: Path | None,
    samples: int | None,
    length: int | None,
    device: str,
    *,
    overwrite: bool,
    quiet: bool,
    warn: Warnings,
) -> Calibration:
    """Calibrate into OUT.calibration, which stays: a second conversion or a resumed one needs it again."""
    from dataclasses import replace

    from lowbit.calibration.devices import join
    from lowbit.calibration.run import RunOptions
    from lowbit.cli.calibrate import run_recipe, with_data

    wanted = with_data(replace(wanted, method=method or wanted.method), data, samples=samples, length=length)
    options = RunOptions(device=join(device))
    return run_recipe(src, _calibration_of(out), wanted, options, overwrite=overwrite, quiet=quiet, warn=warn)


def _calibration_of(out: Path) -> Path:
    """Where --method calibrates for OUT."""
    named = out.resolve() if out.name in ("", "..") else out
    return named.with_name(named.name + ".calibration")
