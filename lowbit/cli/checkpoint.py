"""`lowbit plan`, `inspect` and `verify`, and the options that `convert` shares with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli.output import some_path, warn

if TYPE_CHECKING:
    from lowbit.calibration.store import Calibration
    from lowbit.checkpoint.jobs import Job
    from lowbit.checkpoint.plan import Plan
    from lowbit.recipe import Recipe
    from lowbit.targets import Accelerator


REASONS = 20
"""How many reasons `plan` counts; of a large model there may be thousands."""


Source = Annotated[
    Path,
    typer.Argument(
        metavar="SRC",
        parser=some_path,
        help="Checkpoint directory: *.safetensors and config.json. Or one on the Hub: org/name or org/name@revision.",
    ),
]
SchemeName = Annotated[
    str | None,
    typer.Option(
        "--scheme", "-s",
        help="int8, int8-block, int8-weight-only, fp8, fp8-block, mxfp8; int8-static, int8-static-asym, fp8-static "
        "(with --calibration); bf16, fp16 (dequantize). compressed-tensors preset names work too. Default: "
        "the calibration's, or int8.",
        show_default=False,
    ),
]  # fmt: skip
FormatName = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="compressed-tensors (default); fp8: HF/DeepSeek block FP8; ascend: msModelSlim's, for vLLM-Ascend with "
        "--quantization ascend (int8, int8-static, int8-weight-only, mxfp8); sglang: blockwise_int8 (int8-block).",
        show_default=False,
    ),
]  # fmt: skip
TargetName = Annotated[
    str | None,
    typer.Option(
        "--target",
        "-t",
        metavar="CHIP",
        help="What it is to run on: a100, h20, mi300x, ascend910b, cpu, … Chooses the scheme and format that suit "
        "it where none is given, and says how they run there.",
        show_default=False,
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(
        help="Leave these modules in float. A module's or parent's name, a glob ('*.o_proj') or 're:…'; for fused "
        "experts the 3-D tensor's name too. Repeatable.",
        metavar="PATTERN",
    ),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        help="Carry these modules byte for byte as the source has them. Repeatable.", metavar="PATTERN"
    ),
]
ShardSize = Annotated[str, typer.Option(help="Largest output file, such as 5GB or 800MB.")]
CalibrationDir = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        parser=some_path,
        metavar="PATH",
        help="What `lowbit calibrate` wrote.",
        show_default=False,
    ),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        parser=some_path,
        metavar="PATH",
        help="YAML or JSON: scheme, exceptions, mixed precision, method, data.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Threads; default: one per processor.", show_default=False)
]


def plan(
    src: Source,
    scheme: SchemeName = None,
    format: FormatName = None,
    target: TargetName = None,
    ignore: Ignore = None,
    keep: Keep = None,
    max_shard_size: ShardSize = "5GB",
    calibration: CalibrationDir = None,
    recipe: RecipeFile = None,
    json: Json = False,
) -> None:
    """Show what convert would do, tensor by tensor and in sum, without reading weight data."""
    from lowbit import api
    from lowbit.calibration import store
    from lowbit.cli.output import print_json, say_bytes, table

    calibrated = None if calibration is None else store.read(calibration)
    wanted, format, chip = what_is_asked(recipe, scheme, format, target, ignore, keep, calibrated)
    decided = api.plan(
        src, wanted.scheme, format=format, ignore=wanted.ignore, keep=wanted.keep, overrides=wanted.overrides,
        max_shard_size=max_shard_size, calibration=calibrated,
    )  # fmt: skip
    print_warnings(decided, chip)
    modules = _modules(decided)
    if json:
        print_json({**summary(decided, chip), "modules": modules, "files": [s.file for s in decided.shards]})
        return
    rows = [
        [m["name"], "×".join(map(str, m["shape"])), m["before"], m["after"], say_bytes(m["bytes_before"]),
         say_bytes(m["bytes_after"]), m["why"]]
        for m in modules
    ]  # fmt: skip
    headers = ["tensor", "shape", "from", "to", "bytes", "after", "why"]
    print(table(headers, rows, right={1, 4, 5}))
    print()
    print(headline(decided))
    if reasons := Counter(_reason(m) for m in modules if m["why"]).most_common():
        print("why, counted in tensors:")
    for reason, count in reasons[:REASONS]:
        print(f"  {count:6d}  {reason}")
    if others := [count for _, count in reasons[REASONS:]]:
        print(f"  {sum(others):6d}  {len(others)} other reasons, which the table says")
    print(
        f"{say_bytes(decided.source.nbytes)} → {say_bytes(decided.output_bytes)} "
        f"in {len(decided.shards)} file{'s' * (len(decided.shards) != 1)}"
    )
    if chip is not None:
        print(advice_on(decided, chip)[0])


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            parser=some_path, metavar="PATH", help="Checkpoint directory, or org/name on the Hub."
        ),
    ],
    json: Json = False,
) -> None:
    """Say what a checkpoint is: architecture, tensors by dtype and role, quantization, anything odd."""
    from lowbit import api
    from lowbit.cli.output import print_json, say_bytes, say_count, table

    found = api.inspect(path)
    if json:
        print_json(found.to_dict())
        return
    print(f"{found.path}: {found.architecture} ({found.model_type})")
    shape = f"{found.layers} layers" + (f", {found.experts} routed experts" if found.experts else "")
    print(f"{say_count(found.parameters)} parameters, {shape}")
    print(
        f"{found.tensors} tensors, {say_bytes(found.nbytes)} in {found.shards} file{'s' * (found.shards != 1)}"
    )
    print(f"quantization: {found.quantization or 'none'}")
    if found.tied_embeddings:
        print("lm_head is tied to the embedding")
    print()
    rows = [
        [d, str(c["tensors"]), say_count(c["elements"]), say_bytes(c["bytes"])]
        for d, c in found.dtypes.items()
    ]
    print(table(["dtype", "tensors", "elements", "bytes"], rows, right={1, 2, 3}))
    print()
    rows = [[r, str(c["modules"]), say_count(c["parameters"])] for r, c in found.roles.items()]
    print(table(["role", "tensors", "parameters"], rows, right={1, 2}))
    for note in found.odd:
        print(f"odd: {note}")


def verify(
    out: Annotated[
        Path, typer.Argument(parser=some_path, metavar="OUT", help="Converted checkpoint directory.")
    ],
    source: Annotated[
        Path | None,
        typer.Option(
            parser=some_path,
            metavar="PATH",
            help="What it was converted from: the error of each weight is reported.",
        ),
    ] = None,
    workers: Workers = None,
    top: Annotated[int, typer.Option(min=0, help="How many of the worst weights to print.")] = 5,
    json: Json = False,
) -> None:
    """Re-read every tensor: headers, shapes, dtypes, finite scales, the manifest's checksums.

    Exit code 1 when something is wrong.
    """
    from lowbit import api
    from lowbit.checkpoint.hub import whole
    from lowbit.cli.output import bytes_bar, print_json, say_bytes, table

    if source is not None:
        source = whole(source)
    both = [out, source] if source else [out]  # both are decoded and compared
    shards = (f for path in both for f in path.glob("*.safetensors") if f.is_file())
    total = sum(f.stat().st_size for f in shards)
    with bytes_bar("verifying", total, quiet=json) as progress:
        found = api.verify(out, source, workers=workers, progress=progress)
    if json:
        print_json(found.to_dict())
    else:
        print(f"{found.path}: {found.tensors} tensors, {say_bytes(found.nbytes)}")
        for item in found.checked:
            print(f"  checked {item}")
        if found.errors:
            rows = [
                [e.name, e.scheme, f"{e.sqnr_db:.1f}", f"{e.relative:.3%}", f"{e.largest:.3g}"]
                for e in found.errors[:top]
            ]
            print(table(["worst weights", "scheme", "SQNR dB", "relative", "largest"], rows, right={2, 3, 4}))
            middle = sorted(e.sqnr_db for e in found.errors)[len(found.errors) // 2]
            print(f"median SQNR {middle:.1f} dB over {len(found.errors)} weights")
        for problem in found.problems:
            print(f"problem: {problem}")
        print("ok" if found.ok else f"{len(found.problems)} problems")
    if not found.ok:
        raise typer.Exit(1)


def what_is_asked(
    recipe: Path | None,
    scheme: str | None,
    format: str | None,
    target: str | None,
    ignore: list[str] | None,
    keep: list[str] | None,
    calibration: Calibration | None = None,
) -> tuple[Recipe, str | None, Accelerator | None]:
    """(the recipe of a file, or the one that the options spell out; the format; the chip).

    Where neither recipe nor scheme is given, the scheme is the calibration's, or else what suits the chip, and the
    chip chooses the format too. InputError for a recipe beside the options that spell one out.
    """
    from lowbit.errors import InputError
    from lowbit.recipe import Recipe, load_recipe
    from lowbit.scheme import get_scheme
    from lowbit.targets import get_accelerator

    chip = None if target is None else get_accelerator(target)
    if recipe is not None:
        if scheme is not None or ignore or keep:
            raise InputError(
                "expected --recipe alone, found --scheme, --ignore or --keep beside it; put them into the recipe"
            )
        return load_recipe(recipe), format, chip
    usual = chip.scheme if chip else "int8"
    if calibration is not None and scheme is None:
        usual = calibration.scheme
    try:
        name = get_scheme(usual if scheme is None else scheme).name
    except ValueError as error:
        raise InputError(str(error)) from None
    if chip is not None and scheme is None and format is None:
        format = chip.format
    return Recipe(scheme=name, ignore=tuple(ignore or ()), keep=tuple(keep or ())), format, chip


def advice_on(decided: Plan, chip: Accelerator) -> tuple[str, list[str]]:
    """(how the planned checkpoint runs on a chip, warnings)."""
    from lowbit.targets import advice

    weights = decided.scheme.weights
    return advice(chip, None if weights is None else weights.dtype.name, decided.output_bytes)


def print_warnings(
    decided: Plan, chip: Accelerator | None = None, warn: Callable[[str], None] = warn
) -> None:
    for warning in (*decided.warnings, *(advice_on(decided, chip)[1] if chip else ())):
        warn(warning)


def headline(decided: Plan) -> str:
    """What becomes what; of a source on the Hub, also which one it is."""
    quantized = Counter(d.scheme.name for d in decided.decisions.values() if d.scheme and d.scheme.weights)
    kept = len(decided.decisions) - sum(quantized.values())
    target = decided.format.name if decided.format else "plain safetensors"
    parts = [f"{count} weights to {name}" for name, count in quantized.most_common()] or [
        "no weight quantized"
    ]
    apart = decided.split_experts
    split = f" ({len(apart)} split from {len(set(apart.values()))} tensors of fused experts)" if apart else ""
    said = f"{decided.scheme.name} as {target}: {', '.join(parts)}{split}; {kept} modules kept"
    return said if decided.source.repository is None else f"{decided.source.name}\n{said}"


def summary(decided: Plan, chip: Accelerator | None = None) -> dict[str, Any]:
    schemes = Counter(d.scheme.name for d in decided.decisions.values() if d.scheme and d.scheme.weights)
    return {
        "source": decided.source.name,
        "scheme": decided.scheme.name,
        "format": decided.format.name if decided.format else None,
        "plan": decided.digest(),
        "quantized": dict(schemes),
        "kept": len(decided.decisions) - sum(schemes.values()),
        "split_experts": len(decided.split_experts),
        "bytes_before": decided.source.nbytes,
        "bytes_after": decided.output_bytes,
        "warnings": [*decided.warnings, *(advice_on(decided, chip)[1] if chip else ())],
        **({"target": chip.name, "advice": advice_on(decided, chip)[0]} if chip else {}),
    }


def _reason(row: Mapping[str, Any]) -> str:
    """Why, without the tensor's own name: a recipe of `search` names each module that it means."""
    override = f"override {_module_of(row['name'])}"
    return (
        "override of its name" + why[len(override) :]
        if (why := row["why"]).partition(": ")[0] == override
        else why
    )


def _module_of(tensor: str) -> str:
    return tensor.removesuffix(".weight").removesuffix(".weight_packed")


def _stored_as(job: Job) -> str:
    """The dtype of what is read, and in what it is packed."""
    source = job.source
    assert source is not None
    if source.codes is not None and (source.packed or source.codes.bits < 8):
        return f"{source.codes} in {source.ref.dtype}"
    return source.ref.dtype


def _modules(decided: Plan) -> list[dict[str, Any]]:
    """One row per weight or other tensor: what it is, what it becomes, and why."""
    rows = []
    for job in decided.jobs:
        if job.source is None:
            continue
        out = next(iter(job.outputs.values()))
        decision = decided.decisions.get(_module_of(out.name))
        ours = decided.source.root in job.source.ref.file.parents
        plain = "" if job.kind != "copy" else "not a matrix" if ours else "from the calibration"
        why = decision.reason if decision else plain
        after = str(job.spec) if job.spec else (out.dtype if job.kind != "copy" else f"{out.dtype} as it is")
        rows.append(
            {
                "name": out.name,
                "shape": list(job.shape),
                "before": _stored_as(job),
                "after": after,
                "bytes_before": job.source_bytes,
                "bytes_after": sum(o.nbytes for o in job.outputs.values()),
                "role": decision.role if decision else "other",
                "why": why,
            }
        )
    return rows
