"""The command line: one thin file per command. Nothing heavy is imported until a command runs."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress

import typer

from lowbit.cli import bench, calibrate, checkpoint, convert, evaluate, generate, kernels, search

app = typer.Typer(
    name="lowbit",
    help=(
        "Low-precision quantization of large models: convert, calibrate, verify and run checkpoints.\n\n"
        "Start with:  lowbit convert SRC OUT --scheme int8   then   lowbit verify OUT --source SRC\n\n"
        "Exit codes: 0 done, 1 a check failed, 2 bad input or usage."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("convert")(convert.convert)
app.command("plan")(checkpoint.plan)
app.command("inspect")(checkpoint.inspect)
app.command("verify")(checkpoint.verify)
app.command("calibrate")(calibrate.calibrate)
app.command("eval")(evaluate.evaluate)
app.command("search")(search.search)
app.command("generate")(generate.generate)
app.command("bench")(bench.bench)
app.add_typer(kernels.app, name="kernels")


def _version(wanted: bool) -> None:
    if wanted:
        from lowbit import __version__

        print(f"lowbit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Say the version."
    ),
) -> None:
    pass


def main() -> None:
    """Entry point. Bad input is one line on standard error and exit code 2."""
    from lowbit.cli.output import say_when_compiling
    from lowbit.errors import InputError

    _open_what_is_closed()
    say_when_compiling()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Neither `→` nor a file's name that is no text can end a command, whatever the encoding.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except (InputError, OSError) as error:
        said = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            # Such as a path that may not be looked at.
            said = f"{error.filename}: {error.strerror}; check the path and permissions"
        _say_as_json(said)
        print(f"error: {said}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == 2:
            _say_as_json("bad usage; standard error says what was expected")
        if stop.code == 130:  # typer's answer to Ctrl-C
            again = "; run the same command again to go on from here"
            said = "stopped" + again * (sys.argv[1:2] in (["convert"], ["calibrate"], ["search"]))
            print(said, file=sys.stderr)
            _say_as_json(said)
        raise


def _open_what_is_closed() -> None:
    """Standard streams that were closed lead nowhere: a shard would get the number of one, and what is said there."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # The lowest number that is free, which is that one's.
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))


def _say_as_json(error: str) -> None:
    """Where --json is given, and by one worker."""
    from lowbit.cli.output import first_worker, print_json

    if "--json" in sys.argv and first_worker():
        with suppress(OSError):  # where nothing can be written, the error may be that one
            print_json({"error": error})
