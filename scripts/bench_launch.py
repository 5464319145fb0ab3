"""What a call on a GPU costs the host: with launches kept (lowbit/ops/again.py) against going through all of it again.

    python scripts/bench_launch.py [--target sm90 | --gpu] [--check] [--write benchmarks/launch.md]

Needs no GPU but a C compiler: kernels are compiled for the target, Triton's own launcher launches them, and a CUDA
driver that does nothing stands below it (stub_cuda.py). First every operation is checked: what kept launches are
given must be what the call itself gives, address by address; exit code 1 where it is not. Then times, the least of
several rounds: the work of the GPU, of its driver and of torch's allocator for GPUs is not in them. `--gpu` takes this
machine's GPU in place of the stub: results are compared too, bit for bit, and the driver's time is in the times.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import cpu_name
from stub_cuda import install
from torch import Tensor

from lowbit import ops
from lowbit.ops import again

TIMED = ("int8", "int8, 300 rows", "fp8-block", "int8-weight-only", "int8 experts", "hadamard")


@dataclass(frozen=True)
class Case:
    """A call: `run(*inputs)`, whose `inputs` differ from call to call."""

    run: Callable[..., Any]
    inputs: Callable[[], list[Tensor]]
    weights: tuple[Tensor, ...] = ()


def cases(k: int = 2048, n: int = 1024) -> dict[str, Case]:
    """Every operation that launches kernels, of every kind of scale."""
    int8, fp8, bf16 = torch.int8, torch.float8_e4m3fn, torch.bfloat16
    bias, one, zero = torch.zeros(n), torch.ones(1), torch.zeros(1, dtype=int8)
    found: dict[str, Case] = {}

    def floats(*shape: int) -> Callable[[], list[Tensor]]:
        return lambda: [torch.zeros(*shape, dtype=bf16)]

    def linear(name: str, activations: str, block: tuple[int, int], weight: Tensor, scale: Tensor, *shape: int,
               with_bias: bool = False, **more: Any) -> None:  # fmt: skip
        given = {"bias": bias if with_bias else None, "activations": activations, "block": block, **more}
        tensors = [weight, scale, *(v for v in given.values() if isinstance(v, Tensor))]
        found[name] = Case(
            lambda x: ops.linear(x, weight, scale, **given), floats(*(shape or (1, k))), tuple(tensors)
        )

    for name, dtype in (("int8", int8), ("fp8", fp8)):
        codes, channel = torch.zeros(n, k, dtype=dtype), torch.ones(n, 1)
        blocks, groups = torch.ones(-(-n // 128), -(-k // 128)), torch.ones(n, -(-k // 128))
        linear(name, "token", (1, 0), codes, channel)
        linear(f"{name}, 300 rows", "token", (1, 0), codes, channel, 300, k)
        linear(f"{name}, bias, 3-D", "token", (1, 0), codes, channel, 2, 5, k, with_bias=True)
        linear(f"{name}-block", "group", (128, 128), codes, blocks)
        linear(f"{name}-block, 300 rows", "group", (128, 128), codes, blocks, 300, k)
        linear(f"{name}-weight-only", "none", (1, 0), codes, channel)
        linear(f"{name}-weight-only, groups", "none", (1, 128), codes, groups, 20, k)
        linear(f"{name}-static", "tensor", (1, 0), codes, channel, input_scale=one)
        stack = torch.zeros(8, n, k, dtype=dtype)
        per_block = torch.ones(8, -(-n // 128), -(-k // 128))
        for kind, how, block, scale in (
            ("", "token", (1, 0), torch.ones(8, n, 1)), ("-block", "group", (128, 128), per_block),
            ("-weight-only", "none", (1, 0), torch.ones(8, n, 1)),
        ):  # fmt: skip
            found[f"{name}{kind} experts"] = Case(
                lambda x, o, r, w=stack, s=scale, how=how, block=block: ops.linear_grouped(
                    x, w, s, o, activations=how, block=block, row_weight=r
                ),
                lambda: [torch.zeros(40, k, dtype=bf16), torch.arange(0, 45, 5, dtype=torch.int32), torch.ones(40)],
                (stack, scale),
            )  # fmt: skip
        found[f"quantize to {name}"] = Case(lambda x, d=dtype: ops.quantize(x, d), floats(7, k))
        found[f"quantize to {name}, groups"] = Case(
            lambda x, d=dtype: ops.quantize(x, d, group=128), floats(7, k)
        )
        found[f"matmul of {name}"] = Case(
            lambda a, s, w=codes, ws=channel: ops.matmul(a, s, w, ws, block=(1, 0), out_dtype=bf16),
            lambda d=dtype: [torch.zeros(3, k, dtype=d), torch.ones(3, 1)], (codes, channel),
        )  # fmt: skip
    codes = torch.zeros(n, k, dtype=int8)
    sums = torch.zeros(n, dtype=torch.int32)
    linear("int8-static, zero point", "tensor", (1, 0), codes, torch.ones(n, 1), input_scale=one,
           input_zero_point=zero, weight_sum=sums)  # fmt: skip
    linear(
        "packed int8", "none", (1, 128), torch.zeros(n, k // 4, dtype=torch.int32), torch.ones(n, k // 128)
    )
    exponents = torch.full((n, k // 32), 127, dtype=torch.uint8)
    linear("mxfp8", "group_pow2", (1, 32), torch.zeros(n, k, dtype=fp8), exponents, 3, k)
    norm = torch.ones(k, dtype=bf16)
    found["quantize under a scale"] = Case(
        lambda x: ops.quantize_static(x, one, zero, dtype=int8), floats(7, k), (one, zero)
    )
    found["RMSNorm, quantize"] = Case(
        lambda x, r: ops.rms_norm_quantize(x, norm, 1e-6, r, dtype=int8),
        lambda: [torch.zeros(7, k, dtype=bf16), torch.zeros(7, k, dtype=bf16)], (norm,),
    )  # fmt: skip
    found["SiLU·mul, quantize"] = Case(lambda x: ops.silu_mul_quantize(x, dtype=int8), floats(7, k))
    found["hadamard"] = Case(lambda x: ops.hadamard(x, k), floats(1, k))
    return found


def fill(given: Iterable[Tensor]) -> None:
    """Random values for codes and activations, where something computes with them; scales stay 1."""
    for t in given:
        if t.dtype == torch.int8 and t.numel() > 1:
            t.random_(-127, 128)
        elif t.dtype in (torch.bfloat16, torch.float8_e4m3fn):
            t.copy_(torch.randn(t.shape))


Note = tuple[str, tuple, list[Any]]


@contextmanager
def noted() -> Iterator[list[Note]]:
    """Within, launches go into the list: kernel, grid, arguments."""
    from triton.backends.nvidia.driver import CudaLauncher

    notes: list[Note] = []
    real = CudaLauncher.__call__

    def note(self: Any, *given: Any) -> None:
        names = self.noted_arguments
        notes.append((self.noted_kernel, given[:3], list(zip(names, given[-len(names) :], strict=True))))
        real(self, *given)

    CudaLauncher.__call__ = note
    try:
        yield notes
    finally:
        CudaLauncher.__call__ = real


def name_launchers() -> None:
    """Launchers know neither their kernel's name nor its arguments; `noted` wants both."""
    from triton.backends.nvidia.driver import CudaLauncher

    real = CudaLauncher.__init__

    def init(self: Any, src: Any, metadata: Any) -> None:
        real(self, src, metadata)
        self.noted_kernel, self.noted_arguments = metadata.name, src.fn.arg_names

    CudaLauncher.__init__ = init


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def places(notes: list[Note], inputs: list[Tensor], weights: tuple[Tensor, ...], result: Any) -> list[Any]:
    """Launches with what addresses stand for in their place: input 0, that weight, the third temporary."""
    known = {t.data_ptr(): f"input {i}" for i, t in enumerate(inputs)}
    known |= {t.data_ptr(): f"weight {i}" for i, t in enumerate(weights)}
    for i, t in enumerate(tensors(result)):
        known[t.data_ptr()] = f"result {i}: {t.dtype} {list(t.shape)} {t.stride()}"

    def place(address: int) -> str:
        return known.setdefault(address, f"temporary {len(known)}")

    def told(value: Any) -> Any:
        if isinstance(value, Tensor):
            return place(value.data_ptr())
        if hasattr(value, "block_shape"):
            return (place(value.base.data_ptr()), *value.shape, *value.strides, *value.block_shape)
        # Addresses come as integers from kept launches; no size here is as large.
        return place(value) if isinstance(value, int) and value > 2**40 else value

    return [
        (kernel, tuple(grid), [(name, told(value)) for name, value in arguments])
        for kernel, grid, arguments in notes
    ]


def check() -> tuple[int, list[str]]:
    """(calls that this target has kernels for, what differs)."""
    ops.allow_fallback(False)
    checked, wrong = 0, []
    for name, case in cases().items():
        try:
            why = differs(case)
        except ops.NoKernelError:
            continue
        checked += 1
        wrong += [f"{name}: {why}"] if why else []
    return checked, wrong


def differs(case: Case) -> str | None:
    """What kept launches of a case do otherwise than the call itself; None: nothing."""
    first, second, again._local.calls = case.inputs(), case.inputs(), {}
    if first[0].is_cuda:
        fill([*first, *second, *case.weights])
    with noted() as ran:
        case.run(*first)
        ran.clear()
        want = case.run(*first)
    if not any(again._local.calls.values()):
        return "nothing was kept"
    with noted() as kept:
        found = case.run(*second)
    if len(again._local.calls) > 1:
        return "the same shapes were another call"
    if first[0].is_cuda:
        again._local.calls = NothingKept()
        alone = case.run(*second)
        if not all(torch.equal(a, b) for a, b in zip(tensors(found), tensors(alone), strict=True)):
            return "other results"
    one, other = places(ran, first, case.weights, want), places(kept, second, case.weights, found)
    return None if one == other else f"\n  call: {one}\n  kept: {other}"


def seconds(run: Callable[[], Any], rounds: int = 7, calls: int = 300) -> float:
    for _ in range(20):
        run()
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        best = min(best, time.perf_counter() - start)
    return best / calls


class NothingKept(dict):
    """In place of the calls that were kept: every call is made as if it could not be."""

    def get(self, key: Any, default: Any = None) -> None:
        return None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="sm90", help="sm80, sm86, sm89, sm90, sm100 or sm120")
    parser.add_argument("--gpu", action="store_true", help="on this machine's GPU, its results too")
    parser.add_argument("--check", action="store_true", help="check, and measure nothing")
    parser.add_argument("--write", type=Path, help="a page for the times")
    options = parser.parse_args()
    if options.gpu and not torch.cuda.is_available():
        print("expected a GPU with --gpu, found none; without it a stub stands for one", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder, ExitStack() as within:
        from lowbit.kernels.targets import device_target, get_target, pretending  # type: ignore[import-not-found]

        if options.gpu:
            torch.set_default_device("cuda")
            options.target = device_target(torch.device("cuda", 0)).name
        else:
            install(options.target, Path(folder))
            within.enter_context(pretending(get_target(options.target)))
        name_launchers()
        with ops.use_implementation("triton"), torch.inference_mode():
            checked, wrong = check()
            print(*wrong, f"{options.target}: checked {checked} calls, {len(wrong)} differ", sep="\n")
            if wrong or options.check:
                return 1 if wrong else 0
            rows = [(name, *timed(cases()[name])) for name in TIMED]
    page = table(rows, options.target, options.gpu)
    print(page)
    if options.write:
        options.write.write_text(page, encoding="utf-8")
    return 0


def timed(case: Case) -> tuple[float, float]:
    """Seconds with launches kept and without."""
    inputs = case.inputs()
    again._local.calls = NothingKept()
    without = seconds(lambda: case.run(*inputs))
    again._local.calls = {}
    return seconds(lambda: case.run(*inputs)), without


def table(rows: list[tuple[str, float, float]], target: str, gpu: bool) -> str:
    import triton

    below = f"{torch.cuda.get_device_name()} with its driver" if gpu else "a CUDA driver that does nothing"
    about = (
        f"Written by `make bench-launch` (`scripts/bench_launch.py`) on {cpu_name()}, Python "
        f"{platform.python_version()}, torch {torch.__version__}, Triton {triton.__version__}: kernels compiled for "
        f"{target} and launched by Triton's launcher on {below}. Eager mode, K = 2048, one row unless said otherwise; "
        "the least of seven rounds."
    )
    if not gpu:
        about += (
            " The work of the GPU, of its driver and of torch's allocator for GPUs is not in these times."
        )
    lines = ["# What a call costs the host", "", *textwrap.wrap(about, 120), ""]
    lines += ["| call | launches kept, µs | without, µs | |", "|---|---|---|---|"]
    for name, kept, without in rows:
        lines.append(f"| {name} | {kept * 1e6:.0f} | {without * 1e6:.0f} | {without / kept:.1f} × |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
