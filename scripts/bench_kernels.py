"""Kernels on a GPU: first correctness, then speed, as a table of ratios to named peers.

    python scripts/bench_kernels.py [--models deepseek-v3 …] [--kinds fp8 int8 …] [--m 1 16 …]
        [--json out.json] [--write benchmarks/kernels.md] [--dry-run]

Times are CUDA events around each launch, medians, with the L2 cache overwritten before each; the host's
share of a launch is not in them, as it is not in a CUDA graph.
A problem whose result is wrong is not timed, one whose kernel fails is left behind: both make the exit
code 1. `--dry-run` lists the problems and needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# (N, K) of every distinct linear layer; experts as (N, K, number, chosen per token).
MODELS: dict[str, list[tuple[int, int]]] = {
    "deepseek-v3": [(2112, 7168), (24576, 1536), (7168, 16384), (7168, 18432), (36864, 7168), (4096, 7168)],
    "llama-70b": [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)],
    "qwen3-moe": [(9216, 4096), (4096, 8192)],
    "square": [(8192, 8192)],
}
EXPERTS: dict[str, list[tuple[int, int, int, int]]] = {
    "deepseek-v3": [(4096, 7168, 256, 8), (7168, 2048, 256, 8)],
    "qwen3-moe": [(3072, 4096, 128, 8), (4096, 1536, 128, 8)],
}
KINDS = (
    "int8", "fp8", "fp8-fast-accum", "int8-block", "fp8-block", "int8-weight-only", "fp8-weight-only"
)  # fmt: skip
GROUPED_KINDS = ("int8", "fp8", "fp8-fast-accum", "int8-block", "fp8-block")
TOLERANCE = 4e-3
"""Relative rms error that is no fault: bfloat16 output alone makes 1.7e-3."""
WAIT = 2_000_000
"""Clock cycles, about a millisecond; launching took a host here 0.15 to 0.2 ms, split or with descriptors."""
M = (1, 4, 16, 64, 256, 1024, 4096, 8192)

# Dense peaks: TFLOP/s of bf16, int8, fp8 and GB/s, from the vendors' data sheets.
ROOFS: dict[str, tuple[float, float, float, float]] = {
    "A100": (312, 624, 0, 2039),
    "H20": (148, 296, 296, 4000),
    "H200": (989, 1979, 1979, 4800),
    "H100": (989, 1979, 1979, 3350),
    "MI300X": (1307, 2615, 2614, 5300),
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One product to be timed."""

    model: str
    kind: str
    m: int
    n: int
    k: int
    experts: int = 0
    """0: a dense product."""
    chosen: int = 0
    """Experts per token: a grouped product has m · chosen rows."""

    @property
    def fast_accum(self) -> bool:
        """Sums of fp8 products may stay in the matrix unit, and the peer's do."""
        return self.kind == "fp8-fast-accum"

    @property
    def rows(self) -> int:
        return self.m * (self.chosen or 1)

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.n * self.k

    @property
    def bytes(self) -> float:
        """Codes, scales and the bf16 output, each moved once; of the experts those that can be met."""
        met = min(self.experts, self.rows) if self.experts else 1
        per_element = 2 if "weight-only" in self.kind else 1
        moved = met * self.n * self.k + per_element * self.rows * self.k + 2 * self.rows * self.n
        scales = self.rows * -(-self.k // 128) if "block" in self.kind else self.rows + met * self.n
        return float(moved + 4 * scales)


def problems(models: Sequence[str], kinds: Sequence[str], ms: Sequence[int]) -> list[Problem]:
    """Every problem of these models, kinds and token counts, experts last."""
    dense = [
        Problem(model=model, kind=kind, m=m, n=n, k=k)
        for model in models for n, k in MODELS[model] for kind in kinds for m in ms
    ]  # fmt: skip
    grouped = [
        Problem(model=model, kind=kind, m=m, n=n, k=k, experts=experts, chosen=chosen)
        for model in models for n, k, experts, chosen in EXPERTS.get(model, [])
        for kind in kinds if kind in GROUPED_KINDS for m in ms
    ]  # fmt: skip
    return dense + grouped


def roof(device: str) -> tuple[float, float, float, float] | None:
    """Peaks of a device by its name, or None where unknown (no percentage is shown then)."""
    words = re.split(r"[^A-Za-z0-9]+", device)
    return next((peaks for name, peaks in ROOFS.items() if name in words), None)


def roofline_seconds(problem: Problem, peaks: tuple[float, float, float, float]) -> float:
    """The least time that the peaks allow: the larger of multiplying and moving."""
    bf16, int8, fp8, bandwidth = peaks
    rate = bf16 if "weight-only" in problem.kind else int8 if problem.kind.startswith("int8") else fp8
    return max(problem.flops / (rate * 1e12) if rate else 0.0, problem.bytes / (bandwidth * 1e9))


COLUMNS = (
    "model",
    "kind",
    "M",
    "N",
    "K",
    "experts",
    "µs",
    "TFLOP/s",
    "GB/s",
    "% roof",
    "× bf16",
    "× torch",
    "× vLLM",
)


def row(
    problem: Problem, seconds: float, peers: dict[str, float], peaks: tuple[float, float, float, float] | None
) -> list[str]:
    """One line of the table. `peers`: seconds of bf16, torch's own product, vLLM; those that ran."""
    percent = f"{100 * roofline_seconds(problem, peaks) / seconds:.0f}" if peaks else "–"
    ratios = [f"{peers[name] / seconds:.2f}" if name in peers else "–" for name in ("bf16", "torch", "vllm")]
    return [
        problem.model, problem.kind, str(problem.m), str(problem.n), str(problem.k), str(problem.experts or "–"),
        f"{seconds * 1e6:.1f}", f"{problem.flops / seconds / 1e12:.0f}", f"{problem.bytes / seconds / 1e9:.0f}",
        percent, *ratios,
    ]  # fmt: skip


def build(
    problem: Problem, device: Any = "cuda"
) -> tuple[Callable[..., Any], Callable[[], Any], dict[str, Callable[[], Any]]]:
    """(kernel call, oracle of it in float32, peers by name) on `device`, the current GPU."""
    import torch
    from lowbit.kernels.matmul import matmul
    from lowbit.kernels.matmul_block import matmul_block
    from lowbit.kernels.matmul_grouped import matmul_grouped
    from lowbit.kernels.matmul_weight_only import matmul_weight_only
    from lowbit.kernels.targets import device_target

    device = torch.device(device)
    fp8 = torch.float8_e4m3fnuz if device_target(device).fp8 == "e4m3fnuz" else torch.float8_e4m3fn

    def codes(*shape: int) -> torch.Tensor:
        if problem.kind.startswith("int8"):
            return torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
        return torch.randn(shape, device=device, dtype=torch.bfloat16).to(fp8)

    rows, n, k = problem.rows, problem.n, problem.k
    block = "block" in problem.kind
    group = torch.rand(-(-k // 128), rows, device=device).t() if block else torch.rand(rows, 1, device=device)

    def spread(scale: torch.Tensor, height: int) -> torch.Tensor:
        return scale.repeat_interleave(height, -2).repeat_interleave(128, -1)[..., :k]

    def bf16(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device)

    if problem.experts:
        counts = torch.bincount(torch.randint(problem.experts, (rows,)), minlength=problem.experts)
        offsets = torch.cat([torch.zeros(1), counts.cumsum(0)]).to(torch.int32).to(device)
        a, w = codes(rows, k), codes(problem.experts, n, k)
        scale_shape = (problem.experts, -(-n // 128), -(-k // 128)) if block else (problem.experts, n, 1)
        w_scale = torch.rand(scale_shape, device=device)

        def oracle() -> torch.Tensor:
            out = torch.empty(rows, n, device=device)
            for e, (i, j) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:], strict=False)):
                left = a[i:j].float() * (spread(group[i:j], 1) if block else group[i:j])
                right = w[e].float() * (spread(w_scale[e], 128)[:n] if block else w_scale[e])
                out[i:j] = left @ right.t()
            return out

        kwargs: dict[str, Any] = {
            "block_shape": (128, 128) if block else None,
            "fast_accum": problem.fast_accum,
        }
        return (
            lambda launch=None: matmul_grouped(a, w, offsets, group, w_scale, launch=launch, **kwargs),
            oracle,
            {"bf16": _grouped_bf16(rows, k, bf16((problem.experts, n, k)), offsets)},
        )

    w = codes(n, k)
    x, dense = bf16((rows, k)), bf16((n, k))
    peers: dict[str, Callable[[], Any]] = {"bf16": lambda: torch.matmul(x, dense.t())}
    if "weight-only" in problem.kind:
        w_scale = torch.rand(n, 1, device=device)
        return (
            lambda launch=None: matmul_weight_only(x, w, w_scale, launch=launch),
            lambda: x.float() @ (w.float() * w_scale).t(),
            peers,
        )
    a = codes(rows, k)
    if block:
        w_scale = torch.rand(-(-n // 128), -(-k // 128), device=device)
        call = lambda launch=None: matmul_block(a, w, group, w_scale, launch=launch)  # noqa: E731
        left, right = lambda: a.float() * spread(group, 1), lambda: w.float() * spread(w_scale, 128)[:n]
        if problem.kind == "fp8-block":
            peers["torch"] = _block_scaled(a, w, group, w_scale)
    else:
        w_scale = torch.rand(n, 1, device=device)
        call = lambda launch=None: matmul(  # noqa: E731
            a, w, group, w_scale, fast_accum=problem.fast_accum, launch=launch
        )
        left, right = lambda: a.float() * group, lambda: w.float() * w_scale
        if problem.kind.startswith("fp8"):
            peers["torch"] = lambda: torch._scaled_mm(
                a, w.t(), scale_a=group, scale_b=w_scale.t(), out_dtype=torch.bfloat16,
                use_fast_accum=problem.fast_accum,
            )  # fmt: skip
        elif rows > 16:
            peers["torch"] = lambda: torch._int_mm(a, w.t())
    try:
        from vllm import _custom_ops as vllm
    except ImportError:
        pass
    else:
        peers["vllm"] = lambda: vllm.cutlass_scaled_mm(a, w.t(), group, w_scale.t(), torch.bfloat16)
    return call, lambda: left() @ right().t(), peers


def _grouped_bf16(rows: int, k: int, w: Any, offsets: Any) -> Callable[[], Any]:
    """torch's own grouped product in bfloat16, on the same division of rows among experts."""
    import torch

    x = torch.randn(rows, k, dtype=torch.bfloat16, device=w.device)
    return lambda: torch.nn.functional.grouped_mm(x, w.transpose(-2, -1), offs=offsets[1:])


def _block_scaled(a: Any, w: Any, a_scale: Any, w_scale: Any) -> Callable[[], Any]:
    """torch's own fp8 product with 1×128 and 128×128 scales (newer torch, sm90, CUDA 12.9 or later)."""
    import torch

    def call() -> Any:
        from torch.nn.functional import ScalingType

        return torch.nn.functional.scaled_mm(
            a, w.t(), a_scale, ScalingType.BlockWise1x128, w_scale.t(), ScalingType.BlockWise128x128,
            output_dtype=torch.bfloat16,
        )  # fmt: skip

    return call


def error_of(call: Callable[[], Any], oracle: Callable[[], Any]) -> float:
    """Relative rms error against the oracle."""
    expected = oracle()
    return float((call().float() - expected).norm() / expected.norm())


def seconds_of(call: Callable[[], Any], repeats: int = 20) -> float:
    """Median seconds of one call on the GPU, L2 overwritten before each.

    The GPU waits before it starts its clock, so that what the call launches is queued by then: a launch takes
    Python longer than some products take the GPU.
    """
    import torch

    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        flush.zero_()
        torch.cuda._sleep(WAIT)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


def first_line(error: Exception) -> str:
    """What an error says, in a line: a table has no room for more."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def measure(problem: Problem) -> tuple[float, float, dict[str, float]] | str:
    """(seconds, relative error, seconds of peers that ran), or why nothing was timed.

    Its tensors end with it: those of two problems need not fit the GPU together.
    """
    try:
        call, oracle, peers = build(problem)
        error = error_of(call, oracle)
        if not error < TOLERANCE:
            return f"WRONG: {error:.1e}"
        seconds = seconds_of(call)
    except ValueError as refusal:
        return f"refused: {refusal}"
    except Exception as failure:  # too little memory, or a kernel that does not compile: the others go on
        return f"FAILED: {type(failure).__name__}: {first_line(failure)}"
    others = {}
    for name, peer in peers.items():
        try:
            others[name] = seconds_of(peer)
        except Exception as unsupported:  # a peer may raise anything: vLLM asserts
            print(f"{name} cannot run {problem}: {first_line(unsupported)}", file=sys.stderr)
    return seconds, error, others


def driver() -> str:
    """The driver's version, as its own tool says it."""
    for command in (
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        ["rocm-smi", "--version"],
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return done.stdout.strip().splitlines()[0]
    return "unknown"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--m", nargs="+", type=int, default=list(M))
    parser.add_argument("--json", type=Path, help="also write the measurements here")
    parser.add_argument("--write", type=Path, help="also append the table to this Markdown file")
    parser.add_argument("--dry-run", action="store_true", help="list the problems; needs no GPU")
    arguments = parser.parse_args(argv)
    chosen = problems(arguments.models, arguments.kinds, arguments.m)
    if arguments.dry_run:
        for p in chosen:
            print(f"{p.model} {p.kind} M={p.m} N={p.n} K={p.k} experts={p.experts or '–'}")
        return 0

    import torch
    import triton

    if not torch.cuda.is_available():
        print("error: expected a GPU, found none; --dry-run lists what would be timed", file=sys.stderr)
        return 2
    for path in (arguments.json, arguments.write):  # found out before hours of measuring
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name()
    peaks = roof(device)
    torch.backends.cuda.matmul.allow_tf32 = False
    versions = f"driver {driver()}, torch {torch.__version__}, triton {triton.__version__}"
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    say(f"## {device}, {versions}\n\n| {' | '.join(COLUMNS)} |")
    say(f"|{'---|' * len(COLUMNS)}")
    measured, faults = [], 0
    for problem in chosen:
        found = measure(problem)
        if isinstance(found, str):
            faults += not found.startswith("refused")
            say(f"| {problem.model} | {problem.kind} | {problem.m} | {problem.n} | {problem.k} | {found} |")
            continue
        seconds, error, others = found
        say(f"| {' | '.join(row(problem, seconds, others, peaks))} |")
        measured.append(asdict(problem) | {"seconds": seconds, "error": error, "peers": others})
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"device": device, "versions": versions, "rows": measured}, indent=1)
        )
    if arguments.write:
        with arguments.write.open("a", encoding="utf-8") as stream:
            stream.write("\n" + "\n".join(lines) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
