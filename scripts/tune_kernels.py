"""Search launch parameters on this GPU and write kernels/tuned/<target>.json.

    python scripts/tune_kernels.py [--models …] [--kinds int8 fp8 …] [--m 16 …] [--dry-run]

Every candidate must give the right result before it is timed. An entry is written only where
the best candidate beats the heuristic by 2 %; entries of other problems stay as they are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from bench_kernels import MODELS, Problem, build, error_of, problems, seconds_of
from lowbit.kernels.launch import choose_launch
from lowbit.kernels.targets import Target, get_target
from lowbit.kernels.tuned_tables import FOLDER, M_BUCKETS, VERSION, LaunchParameters, m_bucket, parse_table

KINDS = ("int8", "fp8", "int8-block", "fp8-block", "int8-weight-only", "fp8-weight-only")
KERNELS = {"int8": "matmul", "fp8": "matmul", "block": "matmul_block", "weight-only": "matmul_weight_only"}


def names(problem: Problem, target: Target) -> dict[str, Any]:
    """kernel, a_dtype and w_dtype of a problem, as launch tables name them."""
    element, _, rest = problem.kind.partition("-")
    w_dtype = "int8" if element == "int8" else target.fp8 or "e4m3fn"
    kernel = "matmul_grouped" if problem.experts else KERNELS[rest or element]
    return {"kernel": kernel, "a_dtype": "bfloat16" if rest == "weight-only" else w_dtype, "w_dtype": w_dtype}


def heuristic(problem: Problem, target: Target) -> LaunchParameters:
    """What would be launched now."""
    block = 128 if "block" in problem.kind else 0
    key = names(problem, target)
    m = -(-problem.rows // problem.experts) if problem.experts else problem.m
    return choose_launch(
        key["kernel"], m=m, n=problem.n, k=problem.k, a_dtype=key["a_dtype"], w_dtype=key["w_dtype"],
        target=target, group_n=block, group_k=block,
    )  # fmt: skip


def candidates(problem: Problem, target: Target) -> Iterator[LaunchParameters]:
    """The parameters to try: legal in memory and for the scale blocks, the heuristic first.

    `promote_k` is kept (it is accuracy and not speed), and so is `persistent`.
    """
    base = heuristic(problem, target)
    yield base
    block = 128 if "block" in problem.kind else 0
    size = 2 if "weight-only" in problem.kind else 1
    rows = problem.rows // max(problem.experts, 1)
    heights = [h for h in (16, 32, 64, 128, 256) if base.block_m >= 64 or h <= max(16, 2 * rows)]
    if base.block_m == 64 and problem.kind.startswith("fp8"):
        heights = [h for h in heights if h >= 64]
    splits = (1, 2, 4, 8, 16) if rows <= 64 and not problem.experts else (1,)
    depths = (64, 128) if size == 2 else (128, 256) if rows <= 64 and not block else (128,)
    for height, width, depth, stages, split in itertools.product(
        heights, (64, 128, 256), depths, (2, 3, 4, 5), splits
    ):
        warps = 8 if height * width > 64 * 128 else 4
        staged = depth * (height * size + width) * stages
        accumulators = height * width // (32 * warps)
        if block and width > block:
            continue
        if staged > target.shared_memory or not 8 <= accumulators <= (64 if base.promote_k else 128):
            continue
        yield replace(
            base, block_m=height, block_n=width, block_k=depth, num_stages=stages, num_warps=warps,
            split_k=split, tma=base.tma and split == 1, promote_k=min(base.promote_k, depth),
        )  # fmt: skip


def tune(problem: Problem, target: Target) -> tuple[LaunchParameters, float, float]:
    """(best parameters, their seconds, the heuristic's seconds)."""
    call, oracle, _ = build(problem)
    expected = oracle()
    best: tuple[LaunchParameters, float] | None = None
    first = 0.0
    for launch in candidates(problem, target):
        try:
            if error_of(lambda launch=launch: call(launch=launch), lambda: expected) > 4e-3:  # type: ignore[misc]
                continue
            seconds = seconds_of(lambda launch=launch: call(launch=launch), repeats=7)  # type: ignore[misc]
        except Exception as error:  # a candidate may exceed some resource: it is no candidate then
            print(f"  {launch}: {type(error).__name__}", file=sys.stderr)
            continue
        first = first or seconds
        if best is None or seconds < best[1]:
            best = launch, seconds
    if best is None:
        raise RuntimeError(f"no candidate gave the right result for {problem}")
    return *best, first


def merge(
    table: dict[str, Any] | None, target: str, device: str, triton: str, new: list[dict[str, Any]]
) -> dict[str, Any]:
    """A table with `new` entries in place of those of the same problems; checked against the schema."""

    def key(entry: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(entry[name] for name in ("kernel", "a_dtype", "w_dtype", "m", "n", "k"))

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
        "--kinds", nargs="+", choices=KINDS, default=["int8", "fp8", "int8-block", "fp8-block"]
    )
    parser.add_argument("--m", nargs="+", type=int, choices=M_BUCKETS, default=list(M_BUCKETS))
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
        for problem in chosen:
            print(f"{problem}: {sum(1 for _ in candidates(problem, target))} candidates")
        return 0

    import torch
    import triton
    from lowbit.kernels.targets import device_target

    if not torch.cuda.is_available():
        print("error: expected a GPU, found none; --dry-run counts what would be tried", file=sys.stderr)
        return 2
    target = device_target(torch.device("cuda", torch.cuda.current_device()))
    path = FOLDER / f"{target.name}.json"
    for problem in chosen:
        launch, seconds, before = tune(problem, target)
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
        path.write_text(json.dumps(merged, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
