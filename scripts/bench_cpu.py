"""CPU products against torch's own, quantization of activations included.

    python scripts/bench_cpu.py                     # this machine as it is
    python scripts/bench_cpu.py --avx2              # torch, oneDNN and lowbit held to AVX2
    python scripts/bench_cpu.py --copies 24         # weights that no cache holds, as in a model of many layers
    python scripts/bench_cpu.py --markdown > benchmarks/cpu.md

Activations are bfloat16 but for `fp32` and what is `of fp32`, whose activations and results are float32.
Every row is measured in rounds that take each contender in turn, and a contender's time is the
median over rounds, so that a busy moment hits all of them. Ratios are to fp32 and bf16
`F.linear` of the same run. lowbit runs through its public operations.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from itertools import cycle, islice

from machine import cpu_name  # beside this file

GOALS = (
    "goals on an AVX2 machine, K = N = 2048: int8 at least 1.4 × fp32 and 9 × bf16 at M ≥ 16, "
    "2.5 × both at M = 1; fp8 at least 1 × bf16"
)


FLOAT64 = "fp8 summed in float64"


def contenders(m: int, n: int, k: int) -> dict[str, Callable[[], object]]:
    import torch
    from torch.nn.functional import linear

    from lowbit import ops
    from lowbit.quantize import quantize
    from lowbit.scheme import get_scheme

    torch.manual_seed(0)
    x, w = torch.randn(m, k), torch.randn(n, k) / k**0.5
    brain, brain_weight = x.bfloat16(), w.bfloat16()
    calls: dict[str, Callable[[], object]] = {
        "fp32": lambda: linear(x, w),
        "bf16": lambda: linear(brain, brain_weight),
    }
    for name in ("int8", "int8-block", "int8-weight-only", "fp8", "fp8-block", "fp8 weight-only", FLOAT64):
        scheme = get_scheme(name.split()[0])
        assert scheme.weights is not None
        weight = quantize(w, scheme.weights)
        arguments = {
            "activations": "none" if "weight-only" in name else ops.activations_of(scheme),
            "block": ops.block_of(scheme.weights.granularity),
        }
        calls[name] = lambda a=arguments, q=weight: ops.linear(brain, q.codes, q.scale, **a)
        if "weight-only" in name:
            calls[f"{name} of fp32"] = lambda a=arguments, q=weight: ops.linear(x, q.codes, q.scale, **a)
    calls["bf16 weights of fp32"] = lambda: ops.linear_bfloat16(x, brain_weight)
    calls[FLOAT64] = _in_float64(calls[FLOAT64])
    return calls


def _in_float64(call: Callable[[], object]) -> Callable[[], object]:
    from lowbit import ops

    def run() -> None:
        ops.use_float64_sums(True)
        call()
        ops.use_float64_sums(False)

    return run


def measure(m: int, n: int, k: int, rounds: int, copies: int) -> dict[str, float]:
    """Seconds per call of each contender, whose copies take turns."""
    sets = [contenders(m, n, k) for _ in range(copies)]
    repeats, order = max(1, int(2e8 / (m * n * k))), cycle(range(copies))
    seconds: dict[str, list[float]] = {name: [] for name in sets[0]}
    for calls in sets:
        for call in calls.values():
            call()
    for _ in range(rounds):
        for name in seconds:
            turns = list(islice(order, repeats))
            start = time.perf_counter()
            for turn in turns:
                sets[turn][name]()
            seconds[name].append((time.perf_counter() - start) / repeats)
    return {name: statistics.median(values) for name, values in seconds.items()}


def run(arguments: argparse.Namespace) -> list[dict]:
    import torch

    torch.set_num_threads(arguments.threads)
    rows = []
    with torch.inference_mode():
        for m in arguments.m:
            seconds = measure(m, arguments.n, arguments.k, arguments.rounds, arguments.copies)
            for name, value in seconds.items():
                rows.append(
                    {
                        "m": m, "n": arguments.n, "k": arguments.k, "contender": name, "us": value * 1e6,
                        "gops": 2 * m * arguments.n * arguments.k / value / 1e9,
                        "times_fp32": seconds["fp32"] / value, "times_bf16": seconds["bf16"] / value,
                    }
                )  # fmt: skip
            print(f"measured M = {m}", file=sys.stderr)
    return rows


def machine() -> str:
    import torch

    from lowbit.ops import cpu

    have = cpu.instructions()
    return (
        f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__} "
        f"({torch.backends.cpu.get_cpu_capability()}), "
        f"lowbit {have.name}{' + bfloat16' if have.bfloat16 else ''}"
    )


def table(rows: list[dict], markdown: bool) -> str:
    names = list(dict.fromkeys(row["contender"] for row in rows))
    by = {(row["m"], row["contender"]): row for row in rows}
    lines = ["| M | contender | µs | GOP/s | × fp32 | × bf16 |", "|---:|---|---:|---:|---:|---:|"]
    for m in dict.fromkeys(row["m"] for row in rows):
        for name in names:
            r = by[m, name]
            lines.append(
                f"| {m} | {name} | {r['us']:.0f} | {r['gops']:.1f} | {r['times_fp32']:.2f} | {r['times_bf16']:.2f} |"
            )
    if not markdown:
        lines = [line.strip("| ").replace(" | ", "\t") for line in lines if not line.startswith("|---")]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--m", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--n", type=int, default=2048)
    parser.add_argument("--k", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--copies", type=int, default=1, help="of each weight, which take turns")
    parser.add_argument("--avx2", action="store_true", help="hold torch, oneDNN and lowbit to AVX2")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.avx2:
        from avx2 import environment, rerun  # beside this file

        rerun(environment())
    rows = run(arguments)
    if arguments.json:
        print(json.dumps({"machine": machine(), "rows": rows}, indent=2))
        return 0
    copies = f", {arguments.copies} weights in turn" if arguments.copies > 1 else ""
    print(f"{machine()}; N = {arguments.n}, K = {arguments.k}{copies}; {GOALS}\n")
    print(table(rows, arguments.markdown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
