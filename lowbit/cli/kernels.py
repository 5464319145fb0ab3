"""`lowbit kernels …`: what the kernels compile to, and which one a problem would get."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    name="kernels",
    help="Kernels: compile them for every target, and explain which one runs.",
    no_args_is_help=True,
)


@app.callback()
def _kernels() -> None:
    """A group, also while it has a single command."""


@app.command("compile")
def compile_kernels(
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="sm80, sm86, sm89, sm90, sm100, sm120, gfx942, gfx950 or ascend910b. Repeatable; default: all.",
            show_default=False,
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print a list of rows.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/kernels.md.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; default: one per processor.")] = None,
) -> None:
    """Compile every kernel for every target, without an accelerator.

    Shows the matrix instruction, registers, spills and on-chip memory of each, or why the target
    refuses it. Exit code 1 where a low-precision kernel uses no low-precision instruction though
    the target has one, spills, exceeds the memory, or does not compile.
    """
    import os
    import subprocess
    import sys

    arguments = [sys.executable, "-m", "lowbit.kernels.compile"]
    arguments += [word for name in target or () for word in ("--target", name)]
    arguments += ["--json"] * json + ["--markdown"] * markdown
    arguments += ["--jobs", str(jobs)] if jobs else []
    # A process of its own: whether Triton interprets or compiles is settled when it is imported.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    raise typer.Exit(subprocess.run(arguments, env=environment).returncode)


# `explain` goes here: which implementation and launch parameters a problem would get, or the refusal.
