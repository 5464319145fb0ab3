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
    models: Annotated[
        bool,
        typer.Option(
            "--models",
            help="The launches of models' layers, about 400 for a target, in place of the table's.",
        ),
    ] = False,
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
    arguments += ["--models"] * models + ["--json"] * json + ["--markdown"] * markdown
    arguments += ["--jobs", str(jobs)] if jobs else []
    # A process of its own: whether Triton interprets or compiles is settled when it is imported.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    raise typer.Exit(subprocess.run(arguments, env=environment).returncode)


@app.command("explain")
def explain_problem(
    m: Annotated[int, typer.Option(help="Tokens: rows of the activations, one for each expert of a token.")],
    n: Annotated[int, typer.Option(help="Output features: rows of the weight.")],
    k: Annotated[int, typer.Option(help="Input features: columns of both.")],
    scheme: Annotated[str, typer.Option(help="int8, fp8, fp8-block, …: as `lowbit convert` takes it.")],
    target: Annotated[str, typer.Option(help="a100, h100, mi300x, ascend910b, cpu, …")],
    dtype: Annotated[
        str, typer.Option(help="Of activations and output: bfloat16, float16, float32.")
    ] = "bfloat16",
    experts: Annotated[int, typer.Option(min=0, help="Above 0: a grouped product over so many experts.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the decision as one object.")] = False,
) -> None:
    """Say which kernel would run a product, with what launch parameters, or why none does.

    Asks no device. Exit code 1 where no kernel takes the problem.
    """
    from lowbit.ops.explain import as_text, explain

    found = explain(m=m, n=n, k=k, scheme=scheme, target=target, activation_dtype=dtype, experts=experts)
    if json:
        from lowbit.cli.output import print_json

        print_json(found)
    else:
        print(as_text(found))
    if "refusal" in found:
        raise typer.Exit(1)
