"""Search launch parameters on this GPU and write kernels/tuned/<target>.json.

    python scripts/tune_kernels.py [--models …] [--kinds int8 fp8 …] [--m 16 …] [--dry-run]

Every candidate must give the right result before it is timed. An entry is written only where
the best candidate beats the heuristic by 2 %; entries of other problems stay as they are. Products that
the target has not are left out; a problem that fails is left behind and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from bench_kernels import (
    KINDS,
    MODELS,
    TOLERANCE,
    Problem,
    build,
    error_of,
    first_line,
    problems,
    seconds_of,
)
from lowbit.kernels.launch import choose_launch, refusal
from lowbit.kernels.targets import Target, get_target
from lowbit.kernels.tuned_tables import (
    FOLDER,
    M_BUCKETS,
    VERSION,
    Key,
    LaunchParameters,
    key_of,
    m_bucket,
    parse_table,
)

KERNELS = {"": "matmul", "fast-accum": "matmul", "block": "matmul_block", "weight-only": "matmul_weight_only"}


def names(problem: Problem, target: Target) -> dict[str, Any]:
    """kernel, a_dtype and w_dtype of a problem, as launch tables name them."""
    element, _, rest = problem.kind.partition("-")
    w_dtype = "int8" if element == "int8" else target.fp8 or "e4m3fn"
    kernel = "matmul_grouped" if problem.experts else KERNELS[rest]
    return {"kernel": kernel, "a_dtype": "bfloat16" if rest == "weight-only" else w_dtype, "w_dtype": w_dtype}


def heuristic(problem: Problem, target: Target) -> LaunchParameters:
    """What would be launched now."""
    block = 128 if "block" in problem.kind else 0
    key = names(problem, target)
    m = -(-problem.rows // problem.experts) if problem.experts else problem.m
    return choose_launch(
        key["kernel"], m=m, n=problem.n, k=problem.k, a_dtype=key["a_dtype"], w_dtype=key["w_dtype"],
        target=target, group_n=block, group_k=block, fast_accum=problem.fast_accum,
    )  # fmt: skip


def multiplied(chosen: Sequence[Problem], target: Target) -> list[Problem]:
    """Those that the target has a product for; why it has none of others is said once for each kind."""
    kept: list[Problem] = []
    refused: set[str] = set()
    for problem in chosen:
        reason = refusal(k=problem.k, target=target, **names(problem, target))
        if reason is None:
            kept.append(problem)
        elif problem.kind not in refused:
            refused.add(problem.kind)
            print(f"{problem.kind} is left out: {reason}", file=sys.stderr)
    return kept


def is_legal(launch: LaunchParameters, problem: Problem, target: Target) -> bool:
    """Whether the tile fits the scale blocks, the memory and the registers."""
    size = 2 if "weight-only" in problem.kind else 1
    if "block" in problem.kind and (launch.block_n > 128 or launch.block_k > 128):
        return False
    staged = launch.block_k * (launch.block_m * size + launch.block_n) * launch.num_stages
    accumulators = launch.block_m * launch.block_n // (32 * launch.num_warps)
    return staged <= target.shared_memory and 8 <= accumulators <= (64 if launch.promote_k else 128)


def tiles(problem: Problem, target: Target) -> list[LaunchParameters]:
    """The first round: the heuristic, then other tiles and splits of K.

    `promote_k` is kept in both rounds: it is accuracy and not speed.
    """
    base = heuristic(problem, target)
    rows = problem.rows // max(problem.experts, 1)
    heights = [h for h in (16, 32, 64, 128, 256) if base.block_m >= 64 or h <= max(16, 2 * rows)]
    if base.block_m == 64 and problem.kind.startswith("fp8"):
        heights = [h for h in heights if h >= 64]
    splits = (1, 2, 4, 8, 16) if rows <= 64 and not problem.experts else (1,)
    found = [base]
    for height, width, split in itertools.product(heights, (64, 128, 256), splits):
        warps = 8 if height * width > 64 * 128 else 4
        found.append(replace(base, block_m=height, block_n=width, num_warps=warps, split_k=split))
    return _distinct(found, problem, target)


def refinements(best: LaunchParameters, problem: Problem, target: Target) -> list[LaunchParameters]:
    """The second round: of the best tile, how deep it is, how it is loaded and walked over."""
    loads = [(best.tma, best.persistent)]
    if target.tma:
        loads += itertools.product((False, True), (False, True))
    found = [
        replace(
            best, block_k=depth, num_stages=stages, tma=tma, persistent=persistent,
            promote_k=min(best.promote_k, depth),
        )
        for depth in (64, 128, 256) for stages in (2, 3, 4, 5) for tma, persistent in loads
    ]  # fmt: skip
    found += [replace(best, group_m=group) for group in (1, 4, 16)]
    return [launch for launch in _distinct(found, problem, target) if launch != best]


def _distinct(found: list[LaunchParameters], problem: Problem, target: Target) -> list[LaunchParameters]:
    return [x for x in dict.fromkeys(found) if is_legal(x, problem, target)]


def compile_ahead(calls: Sequence[Callable[[], Any]], jobs: int) -> None:
    """Compile what these calls would launch, `jobs` at a time, and launch nothing.

    What does not compile is left to the call itself, which will say so. Triton 3.5 would end with it, so there
    every call compiles its own.
    """
    import triton
    from lowbit.kernels.targets import interpreting

    if interpreting() or "ignore_errors" not in inspect.signature(triton.AsyncCompileMode).parameters:
        return
    run = triton.JITFunction.run
    triton.JITFunction.run = lambda *args, warmup, **kwargs: run(*args, warmup=True, **kwargs)
    try:
        with ThreadPoolExecutor(jobs) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            for call in calls:
                with contextlib.suppress(Exception):
                    call()
    finally:
        triton.JITFunction.run = run


def tune(problem: Problem, target: Target, jobs: int = 1) -> tuple[LaunchParameters, float, float]:
    """(best parameters, their seconds, the heuristic's seconds); candidates compile `jobs` at a time."""
    call, oracle, _ = build(problem)
    expected = oracle()
    best: tuple[LaunchParameters, float] | None = None
    first = 0.0

    def try_all(launches: list[LaunchParameters]) -> None:
        nonlocal best, first
        compile_ahead([functools.partial(call, launch=launch) for launch in launches], jobs)
        for launch in launches:
            run = functools.partial(call, launch=launch)
            try:
                if not error_of(run, lambda: expected) < TOLERANCE:  # NaN is no small error
                    continue
                seconds = seconds_of(run, repeats=7)
            except Exception as error:  # a candidate may exceed some resource: it is no candidate then
                print(f"  {launch}: {type(error).__name__}", file=sys.stderr)
                continue
            first = first or seconds
            if best is None or seconds < best[1]:
                best = launch, seconds

    try_all(tiles(problem, target))
    if best is None:
        raise RuntimeError(f"no candidate gave the right result for {problem}")
    try_all(refinements(best[0], problem, target))
    return *best, first


def merge(
    table: dict[str, Any] | None, target: str, device: str, triton: str, new: list[dict[str, Any]]
) -> dict[str, Any]:
    """A table with `new` entries in place of those of the same problems; checked against the schema."""

    def key(entry: dict[str, Any]) -> Key:
        return key_of(entry, LaunchParameters(**entry["parameters"]))

    entries = {key(entry): entry for entry in (table or {}).get("entries", [])}
    entries |= {key(entry): entry for entry in new}
    merged = {
        "version": VERSION, "target": target, "device": device, "triton": triton,
        "entries": [entries[k] for k in sorted(entries)],
    }  # fmt: skip
    parse_table(merged, target)
    return merged


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=["int8", "fp8", "fp8-fast-accum", "int8-block", "fp8-block"],
    )
    parser.add_argument("--m", nargs="+", type=int, choices=M_BUCKETS, default=list(M_BUCKETS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="candidates compiled at a time")
    parser.add_argument("--target", default="sm90", help="for --dry-run only; else the device's own")
    parser.add_argument("--dry-run", action="store_true", help="count the candidates; needs no GPU")
    arguments = parser.parse_args(argv)
    chosen = problems(arguments.models, arguments.kinds, arguments.m)
    if arguments.dry_run:
        try:
            target = get_target(arguments.target)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        for problem in multiplied(chosen, target):
            first = tiles(problem, target)
            second = refinements(first[0], problem, target)
            print(f"{problem}: {len(first)} tiles, then {len(second)} candidates of the best")
        return 0

    import torch
    import triton
    from lowbit.kernels.targets import device_target

    if not torch.cuda.is_available():
        print("error: expected a GPU, found none; --dry-run counts what would be tried", file=sys.stderr)
        return 2
    try:
        target = device_target(torch.device("cuda", torch.cuda.current_device()))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    path = FOLDER / f"{target.name}.json"
    failed = 0
    for problem in multiplied(chosen, target):
        try:
            launch, seconds, before = tune(problem, target, arguments.jobs)
        except Exception as failure:  # too little memory, say: the other problems go on
            failed += 1
            print(f"{problem}: FAILED: {type(failure).__name__}: {first_line(failure)}", flush=True)
            continue
        print(f"{problem}: {before * 1e6:.1f} → {seconds * 1e6:.1f} µs {launch}", flush=True)
        if seconds > 0.98 * before:
            continue
        m = m_bucket(-(-problem.rows // problem.experts) if problem.experts else problem.m)
        entry = {
            **names(problem, target),
            "m": m,
            "n": problem.n,
            "k": problem.k,
            "parameters": asdict(launch),
        }
        table = json.loads(path.read_text()) if path.exists() else None
        merged = merge(table, target.name, torch.cuda.get_device_name(), triton.__version__, [entry])
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(merged, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
