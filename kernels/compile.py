"""Compile every kernel for every target and read back what became of it. No accelerator needed.

    python -m lowbit.kernels.compile [--target sm90]… [--json | --markdown | --models] [--jobs 2]

Each launch of `compile_cases.py`, or with `--models` of `compile_models.py`, is recorded as its
Python function makes it, compiled, and the matrix instruction, registers, spills and on-chip
memory are read from the result. A row fails
where a low-precision product uses no low-precision matrix instruction though the target has
one, where registers spill, where the program needs more memory than the target has, where (on
AMD) a barrier does not wait for on-chip memory, or where it does not compile. Rows are kept in a
cache under the key of everything they depend on.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .barriers import unawaited
from .compile_cases import CASES, Case
from .inner_loop import disassemble, inner_loop
from .record import Launch, record
from .targets import TARGETS, Target, get_target

SOURCES = Path(__file__).parent
LOW_PRECISION = re.compile(r"\.s8|e4m3|kind::i8|f8f6f4|_i8$|_fp8_fp8|_int8_t_")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One launch on one target."""

    kernel: str
    target: str
    instruction: str | None = None
    """The matrix instruction, or several, joined by commas; None where there is none."""
    registers: int | None = None
    """Per thread (vector and accumulator registers on AMD); None on Ascend."""
    spills: int | None = None
    """Bytes stored and loaded by spills (NVIDIA), bytes of scratch memory (AMD)."""
    shared_memory: int | None = None
    """Bytes of on-chip memory per program; None on Ascend, whose compiler enforces it."""
    loop: str | None = None
    """`64 of 159`: matrix instructions among all of the innermost loop; None on Ascend and where no loop multiplies."""
    refusal: str | None = None
    """Why the target does not take this call: nothing was compiled."""
    failure: str | None = None
    """Why this row fails the check; None: it passes."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    kernel: str
    target: str
    product: str
    launch: Launch


def compile_rows(
    targets: Sequence[str],
    jobs: int = 2,
    progress: Callable[[int, int], None] | None = None,
    cases: Iterable[Case] = CASES,
    once: bool = False,
) -> list[Row]:
    """Rows for these targets in the order of `cases`. `progress(done, all)` after each compilation.

    once: of cases that lead to the same launch, or to the same refusal, the first alone has a row.
    """
    cases, planned = list(cases), []
    for name in targets:
        found = _plan(get_target(name), cases)
        planned.extend(_first(found) if once else found)
    work = [p for p in planned if isinstance(p, _Job)]
    done: dict[int, Row] = {}
    missing: list[_Job] = []
    for job in work:
        cached = _read_cache(job)
        if cached is None:
            missing.append(job)
        else:
            done[id(job)] = cached
    _report(progress, len(done), len(work))
    with ProcessPoolExecutor(max_workers=max(1, jobs), initializer=_quiet) as pool:
        for job, row in zip(missing, pool.map(_compile_job, missing), strict=True):
            done[id(job)] = row
            _report(progress, len(done), len(work))
    return [p if isinstance(p, Row) else done[id(p)] for p in planned]


def _report(progress: Callable[[int, int], None] | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)


def _first(planned: Iterable[Row | _Job]) -> list[Row | _Job]:
    first: dict[str, Row | _Job] = {}
    for p in planned:
        key = p.refusal if isinstance(p, Row) else json.dumps(asdict(p.launch), sort_keys=True)
        first.setdefault(str(key), p)
    return list(first.values())


def _plan(target: Target, cases: Iterable[Case]) -> list[Row | _Job]:
    planned: list[Row | _Job] = []
    seen: set[str] = set()
    for case in cases:
        try:
            launches = record(lambda case=case: case.call(target), target)  # type: ignore[misc]
        except ValueError as error:
            planned.append(Row(kernel=case.name, target=target.name, refusal=str(error)))
            continue
        for index, launch in enumerate(launches):
            if index == 0:
                planned.append(
                    _Job(kernel=case.name, target=target.name, product=_product(case, target), launch=launch)
                )
                continue
            # A second launch (adding the splits) is a row of its own, once for each variant.
            name = f"{launch.kernel.removesuffix('_kernel')} {launch.signature['raw_ptr'].removeprefix('*')}"
            if name not in seen:
                seen.add(name)
                planned.append(_Job(kernel=name, target=target.name, product="none", launch=launch))
    return planned


def _product(case: Case, target: Target) -> str:
    """What the instruction must multiply on this target: low, float, or none."""
    if case.product == "fp8" and (target.fp8 is None or ("mxfp8" in case.name and target.fp8 != "e4m3fn")):
        return "float"
    return {"int8": "low", "fp8": "low"}.get(case.product, case.product)


def _compile_job(job: _Job) -> Row:
    row = Row(kernel=job.kernel, target=job.target)
    target = get_target(job.target)
    if target.backend == "npu":
        from .compile_ascend import compile_on_ascend

        row = compile_on_ascend(row, job.launch)
    else:
        try:
            row = replace(row, **_compile_gpu(job.launch, target))
        except Exception as error:  # a compiler may raise anything, and every kind is a failure
            return replace(row, failure=f"does not compile: {_last_line(error)}")
    row = replace(row, failure=row.failure or judge(row, job.product, target))
    _write_cache(job, row)
    return row


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:400]


def judge(row: Row, product: str, target: Target) -> str | None:
    """Why this row fails, or None. `product`: low, float or none, what its instruction must multiply."""
    if row.refusal is not None:
        return None
    if product != "none" and row.instruction is None:
        return "no matrix instruction"
    if product == "low" and not LOW_PRECISION.search(row.instruction or ""):
        return f"no low-precision matrix instruction, though {target.name} has one: {row.instruction}"
    if row.spills:
        return f"registers spill: {row.spills} bytes"
    if row.shared_memory is not None and row.shared_memory > target.shared_memory:
        return f"needs {row.shared_memory} bytes of on-chip memory, {target.name} has {target.shared_memory}"
    return None


def _quiet() -> None:
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "0"
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="lowbit-compile-")


def _compile_gpu(launch: Launch, target: Target) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"{__package__}.{launch.module}"), launch.kernel)
    names = list(launch.signature)
    source = ASTSource(
        fn=kernel,
        signature=launch.signature,
        constexprs=launch.constants,
        attrs={(names.index(name),): value for name, value in launch.attributes.items()},
    )
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(
            source,
            target=GPUTarget(target.backend, target.arch, target.warp_size),
            options=dict(launch.options),
        )
    shared = int(compiled.metadata.shared)
    if target.backend == "hip":
        code = compiled.asm["amdgcn"]
        found = _read_amdgcn(code)
        if waits := unawaited(code):
            found["failure"] = f"a barrier does not wait for on-chip memory: {', '.join(waits)}"
    else:
        code = disassemble(compiled.asm["cubin"])
        found = _read_ptx(compiled.asm["ptx"], log.getvalue())
    loop = inner_loop(code)
    return {**found, "shared_memory": shared, "loop": f"{loop[0]} of {loop[1]}" if loop else None}


def _read_ptx(ptx: str, log: str) -> dict[str, Any]:
    """Instruction from the assembly; registers and spills from what ptxas -v said."""
    found = re.findall(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)[\w.:]*", ptx)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    if spills is None or registers is None:
        raise RuntimeError(f"expected the report of ptxas -v, found {log[-200:]!r}")
    return {
        "instruction": _join(found),
        "registers": int(registers.group(1)),
        "spills": int(spills.group(1)) + int(spills.group(2)),
    }


def _read_amdgcn(assembly: str) -> dict[str, Any]:
    def number(name: str) -> int:
        match = re.search(rf"\.{name}:\s*(\d+)", assembly)
        if match is None:
            raise RuntimeError(f"expected .{name} in the assembly, found none")
        return int(match.group(1))

    return {
        "instruction": _join(re.findall(r"\bv_s?mfma_\w+", assembly)),
        "registers": number("vgpr_count"),
        "spills": max(number("private_segment_fixed_size"), 4 * number("vgpr_spill_count")),
    }


def _join(instructions: Iterable[str]) -> str | None:
    # What the operands are tells it apart; `.sync.aligned` and layouts are the same everywhere.
    short = {re.sub(r"\.(sync|aligned|row|col|satfinite)\b", "", i) for i in instructions}
    return ", ".join(sorted(short)) or None


def _cache_path(job: _Job) -> Path:
    import triton

    key = hashlib.sha256(f"{triton.__version__} {json.dumps(asdict(job), sort_keys=True)}".encode())
    for source in sorted(SOURCES.glob("*.py")):
        key.update(source.read_bytes())
    root = os.environ.get("LOWBIT_COMPILE_CACHE") or Path.home() / ".cache" / "lowbit" / "compile"
    return Path(root) / f"{key.hexdigest()[:32]}.json"


def _read_cache(job: _Job) -> Row | None:
    try:
        return Row(**json.loads(_cache_path(job).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _write_cache(job: _Job, row: Row) -> None:
    if "not installed" in (row.refusal or ""):
        return
    path = _cache_path(job)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(asdict(row)))
    scratch.replace(path)


INTRODUCTION = """# What the kernels compile to

Generated by `lowbit kernels compile --markdown > docs/kernels.md`; a test compares. No accelerator
takes part: this shows which instructions, registers and memory each launch takes, and not how fast it is.
"bf16 × …" products run on 16-bit units on purpose: their activations are 16-bit. Registers are per
thread, spills in bytes (NVIDIA: stored + loaded; AMD: scratch), on-chip memory in bytes per program;
Ascend's compiler enforces its buffers and reports none of them. "Loop": matrix instructions among all
instructions of the innermost loop, without what a persistent kernel's only does between tiles; one of sm90,
sm100 and AMD multiplies many times what an `mma` does.

| target | int8 × int8 | fp8 × fp8 | weight-only | rows | refused | spills |
|---|---|---|---|---:|---:|---:|
"""


def markdown(rows: Sequence[Row]) -> str:
    """docs/kernels.md: an overview of the targets, and a table for each."""
    names = list(dict.fromkeys(row.target for row in rows))
    by_target = {name: [row for row in rows if row.target == name] for name in names}
    overview = [_overview(name, by_target[name]) for name in names]
    sections = [_section(name, by_target[name]) for name in names]
    return INTRODUCTION + "\n".join(overview) + "\n" + "".join(sections)


def _overview(name: str, rows: Sequence[Row]) -> str:
    def instruction(kernel: str) -> str:
        row = next((r for r in rows if r.kernel == kernel), None)
        return f"`{row.instruction}`" if row and row.instruction else "–"

    kernels = ("matmul int8 prefill", "matmul fp8 prefill", "matmul_weight_only bf16 × fp8 block prefill")
    cells = [name, *(instruction(kernel) for kernel in kernels), str(len(rows))]
    cells += [str(sum(r.refusal is not None for r in rows)), str(sum(r.spills or 0 for r in rows))]
    return f"| {' | '.join(cells)} |"


def _section(name: str, rows: Sequence[Row]) -> str:
    lines = [f"\n## {name}\n", "| kernel | matrix instruction | loop | registers | spills | on-chip memory |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    for row in rows:
        if row.refusal is not None:
            lines.append(f"| {row.kernel} | refused: {row.refusal} | | | | |")
            continue
        instruction = f"`{row.instruction}`" if row.instruction else "–"
        if row.failure:
            instruction += f" **fails: {row.failure}**"
        cells = (row.loop, row.registers, row.spills, row.shared_memory)
        numbers = ["–" if cell is None else str(cell) for cell in cells]
        lines.append(f"| {row.kernel} | {instruction} | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """0: every row passes; 1: some row fails; 2: bad usage."""
    parser = argparse.ArgumentParser(
        prog="python -m lowbit.kernels.compile", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--target", action="append", help=f"one of {', '.join(TARGETS)}; repeatable (default: all)"
    )
    parser.add_argument(
        "--models", action="store_true", help="launches of models' layers in place of the table's"
    )
    parser.add_argument("--json", action="store_true", help="print a list of rows")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/kernels.md")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="processes")
    arguments = parser.parse_args(argv)
    targets = arguments.target or list(TARGETS)
    cases: Iterable[Case] = CASES
    if arguments.models:
        from .compile_models import model_cases

        cases = model_cases()
    try:
        for name in targets:
            get_target(name)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(
                f"\rcompiled {done} of {total}",
                end="\n" if done == total else "",
                file=sys.stderr,
                flush=True,
            )

    rows = compile_rows(targets, arguments.jobs, progress, cases, once=arguments.models)
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=1, ensure_ascii=False))
    elif arguments.markdown:
        print(markdown(rows), end="")
    else:
        print("".join(_section(name, [r for r in rows if r.target == name]) for name in targets).lstrip())
    failed = [row for row in rows if row.failure]
    for row in failed:
        print(f"fails: {row.kernel} on {row.target}: {row.failure}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
