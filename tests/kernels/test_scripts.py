"""What can be tested of the GPU scripts with no GPU, and a few mutants."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lowbit.kernels.targets import TARGETS, get_target
from typer.testing import CliRunner

SCRIPTS = Path(__file__).parents[2] / "scripts"


def load(name: str):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


bench, tune, mutate = load("bench_kernels"), load("tune_kernels"), load("mutate_kernels")


def test_dry_runs_list_the_problems(capsys):
    assert bench.main(["--dry-run", "--models", "llama-70b", "--kinds", "fp8", "--m", "1", "8192"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "llama-70b fp8 M=8192 N=10240 K=8192 experts=–"
    assert tune.main(["--dry-run", "--models", "square", "--kinds", "int8", "--m", "16"]) == 0
    assert "candidates" in capsys.readouterr().out
    assert tune.main(["--dry-run", "--target", "h100"]) == 2
    assert tune.main(["--dry-run", "--target", "sm80", "--models", "square", "--m", "16"]) == 0
    printed = capsys.readouterr()
    assert "kind='int8-block'" in printed.out and "fp8" not in printed.out
    assert printed.err.count("fp8-block is left out: sm80 multiplies no fp8") == 1
    models = {p.model for p in bench.problems(list(bench.MODELS), bench.KINDS, bench.M)}
    assert models == {"deepseek-v3", "llama-70b", "qwen3-moe", "square"}
    assert any(p.experts == 256 for p in bench.problems(["deepseek-v3"], ["fp8-block"], [4096]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(capsys):
    for script in (bench, tune):
        assert script.main(["--models", "square"]) == 2
        assert "--dry-run" in capsys.readouterr().err


def test_roofline():
    h100 = bench.roof("NVIDIA H100 80GB HBM3")
    assert h100 == (989, 1979, 1979, 3350)
    assert bench.roof("NVIDIA H200")[3] == 4800 and bench.roof("NVIDIA A100-SXM4-80GB")[3] == 2039
    assert bench.roof("NVIDIA GeForce RTX 4090") is None
    square = bench.Problem(model="square", kind="fp8", m=8192, n=8192, k=8192)
    assert bench.roofline_seconds(square, h100) == pytest.approx(2 * 8192**3 / 1979e12)
    decode = bench.Problem(model="square", kind="int8", m=1, n=8192, k=8192)
    assert bench.roofline_seconds(decode, h100) == pytest.approx(decode.bytes / 3350e9)
    assert decode.bytes == 8192 * 8192 + 8192 + 2 * 8192 + 4 * (1 + 8192)
    grouped = bench.Problem(model="m", kind="fp8", m=2, n=10, k=128, experts=256, chosen=8)
    assert grouped.rows == 16 and grouped.flops == 2 * 16 * 10 * 128


def test_a_line_of_the_table():
    square = bench.Problem(model="square", kind="fp8", m=8192, n=8192, k=8192)
    cells = bench.row(square, 1e-3, {"bf16": 2e-3, "torch": 0.9e-3}, (989, 1979, 1979, 3350))
    assert dict(zip(bench.COLUMNS, cells, strict=True)) == {
        "model": "square", "kind": "fp8", "M": "8192", "N": "8192", "K": "8192", "experts": "–", "µs": "1000.0",
        "TFLOP/s": "1100", "GB/s": "269", "% roof": "56", "× bf16": "2.00", "× torch": "0.90", "× vLLM": "–",
    }  # fmt: skip


@pytest.mark.parametrize("name", [t for t in TARGETS if TARGETS[t].backend != "npu"])
def test_candidates_are_legal(name):
    target = get_target(name)
    for problem in bench.problems(["square", "deepseek-v3"], bench.KINDS, [16, 8192]):
        if target.fp8 is None and problem.kind.startswith("fp8") and "weight-only" not in problem.kind:
            continue
        first = tune.tiles(problem, target)
        tried = first + tune.refinements(first[-1], problem, target)
        assert first[0] == tune.heuristic(problem, target) and 3 <= len(tried) <= 120
        assert len({*tried}) == len(tried)
        for launch in tried:
            assert launch.block_k <= 128 or "block" not in problem.kind
            assert launch.promote_k == min(first[0].promote_k, launch.block_k)
            assert not launch.tma or target.tma


def test_merging_keeps_other_entries_and_replaces_the_same():
    def entry(n: int, block_n: int) -> dict:
        parameters = {"block_m": 16, "block_n": block_n, "block_k": 128}
        return {
            "kernel": "matmul", "a_dtype": "int8", "w_dtype": "int8", "m": 16, "n": n, "k": 64,
            "parameters": parameters,
        }  # fmt: skip

    first = tune.merge(None, "sm90", "a card", "3.9.0", [entry(10, 32), entry(20, 32)])
    second = tune.merge(first, "sm90", "a card", "3.9.0", [entry(20, 64)])
    assert [(e["n"], e["parameters"]["block_n"]) for e in second["entries"]] == [(10, 32), (20, 64)]
    with pytest.raises(ValueError, match="power of two"):
        tune.merge(first, "sm90", "a card", "3.9.0", [entry(20, 48)])


def test_every_mutant_still_applies():
    for mutant in mutate.MUTANTS:
        source = (SCRIPTS.parent / "kernels" / f"{mutant.file}.py").read_text()
        assert source.count(mutant.old) >= 1 and mutant.old != mutant.new, mutant.name
    assert {m.file for m in mutate.MUTANTS} >= {"tile", "matmul", "inner", "matmul_grouped", "quantize"}
    assert mutate.main(["--list"]) == 0
    assert mutate.main(["--only", "no such mutant"]) == 2


@pytest.mark.slow
def test_mutants_are_killed():
    words = (
        "drop the bias",
        "drop the routed weight",
        "truncate",
        "store over the next row",
        "leave out a split",
    )
    assert mutate.main([part for word in words for part in ("--only", word)]) == 0


def test_the_command_compiles(monkeypatch):
    from lowbit.cli.kernels import app

    seen = {}

    def run(arguments, env):
        seen.update(arguments=arguments, env=env)
        return subprocess.CompletedProcess(arguments, 1)

    monkeypatch.setattr(subprocess, "run", run)
    result = CliRunner().invoke(
        app, ["compile", "--target", "sm90", "--target", "sm80", "--json", "--jobs", "1"]
    )
    assert result.exit_code == 1
    assert seen["arguments"][1:] == [
        "-m", "lowbit.kernels.compile", "--target", "sm90", "--target", "sm80", "--json", "--jobs", "1",
    ]  # fmt: skip
    assert "TRITON_INTERPRET" not in seen["env"]


# The halves of the scripts that measure, on the interpreter: everything but the clock.


@pytest.fixture
def rehearsal(monkeypatch):
    """A card that is the CPU under Triton's interpreter, and a clock that tells the calls it was given."""
    import lowbit.kernels.targets

    build, timed = bench.build, []

    def seconds_of(call, repeats=20):
        call()
        timed.append(call)
        return 1e-3 * len(timed)

    monkeypatch.setattr(lowbit.kernels.targets, "device_target", lambda device: get_target("sm90"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for script in (bench, tune, sys.modules["bench_kernels"]):
        monkeypatch.setattr(script, "build", lambda problem: build(problem, "cpu"))
        monkeypatch.setattr(script, "seconds_of", seconds_of)
    monkeypatch.setitem(bench.MODELS, "square", [(80, 256)])
    monkeypatch.setitem(bench.MODELS, "qwen3-moe", [])
    monkeypatch.setitem(bench.EXPERTS, "qwen3-moe", [(80, 256, 4, 2)])
    return timed


@pytest.mark.parametrize("kind", bench.KINDS)
def test_rehearsal_of_the_benchmark(rehearsal, kind, tmp_path, capsys):
    out = tmp_path / "out.json"
    arguments = [
        "--models",
        "square",
        "qwen3-moe",
        "--kinds",
        kind,
        "--m",
        "3",
        "20",
        "--json",
        str(out),
        "--write",
        str(tmp_path / "out.md"),
    ]
    assert bench.main(arguments) == 0
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    grouped = kind in bench.GROUPED_KINDS
    assert len(found["rows"]) == (4 if grouped else 2) and "refused" not in printed
    assert all(0 < r["error"] < 4e-3 for r in found["rows"])
    assert all("bf16" in r["peers"] for r in found["rows"])
    assert len(printed.splitlines()) == 4 + len(found["rows"])
    assert (tmp_path / "out.md").read_text() == "\n" + printed
    assert re.match(r"## NVIDIA H100 80GB HBM3, driver .*, torch 2.*, triton ", printed)


def test_the_clock_starts_when_the_launch_is_queued(monkeypatch):
    queued = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            queued.append("record")

        def synchronize(self):
            queued.append("synchronize")

        def elapsed_time(self, end):
            return 2.0

    class Flush:
        def zero_(self):
            queued.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: queued.append("wait"))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: Flush())
    assert bench.seconds_of(lambda: queued.append("call"), repeats=2) == 2e-3
    assert queued == [*["call"] * 3, *["flush", "wait", "record", "call", "record", "synchronize"] * 2]


def test_a_wrong_kernel_is_not_timed(rehearsal, monkeypatch, capsys):
    import lowbit.kernels.matmul

    right = lowbit.kernels.matmul.matmul
    monkeypatch.setattr(lowbit.kernels.matmul, "matmul", lambda *a, **kw: 1.01 * right(*a, **kw))
    assert bench.main(["--models", "square", "--kinds", "int8", "--m", "3"]) == 1
    assert "WRONG" in capsys.readouterr().out and not rehearsal


def test_what_fails_does_not_stop_the_rest(rehearsal, monkeypatch, capsys, tmp_path):
    import lowbit.kernels.matmul_block

    def fails(*_: object, **__: object):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(lowbit.kernels.matmul_block, "matmul_block", fails)
    monkeypatch.setattr(torch, "_int_mm", lambda *_: [][0])
    out = tmp_path / "new" / "out.json"
    arguments = ["--models", "square", "--kinds", "int8-block", "int8", "--m", "20", "--json", str(out)]
    assert bench.main(arguments) == 1
    assert "| FAILED: OutOfMemoryError: CUDA out of memory. |" in capsys.readouterr().out
    (row,) = json.loads(out.read_text())["rows"]
    assert row["kind"] == "int8" and list(row["peers"]) == ["bf16"]

    def tuned(problem, target, jobs):
        return fails() if problem.kind == "int8-block" else (tune.heuristic(problem, target), 1.0, 2.0)

    monkeypatch.setattr(tune, "tune", tuned)
    monkeypatch.setattr(tune, "FOLDER", tmp_path / "tuned")
    assert tune.main(["--models", "square", "--kinds", "int8-block", "int8", "--m", "16"]) == 1
    assert "FAILED: OutOfMemoryError: CUDA out of memory." in capsys.readouterr().out
    (entry,) = json.loads((tmp_path / "tuned" / "sm90.json").read_text())["entries"]
    assert entry["kernel"] == "matmul"


def test_a_candidate_that_gives_nan_is_none(rehearsal, monkeypatch):
    problem = bench.Problem(model="square", kind="int8", m=16, n=80, k=256)
    target = get_target("sm90")
    base = tune.heuristic(problem, target)
    right, wrong = torch.ones(2, 2), torch.full((2, 2), torch.nan)

    def build(problem):
        return (lambda launch: right if launch == base else wrong), lambda: right, {}

    monkeypatch.setattr(tune, "build", build)
    clock = iter([2.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr(tune, "seconds_of", lambda call, repeats: next(clock))
    assert tune.tune(problem, target) == (base, 2.0, 2.0)


def test_nothing_compiles_ahead_where_one_failure_would_end_it(monkeypatch):
    class AsyncCompileMode:  # of Triton 3.5
        def __init__(self, executor):
            raise AssertionError("entered")

    monkeypatch.setattr("lowbit.kernels.targets.interpreting", lambda: False)
    monkeypatch.setattr("triton.AsyncCompileMode", AsyncCompileMode)
    tune.compile_ahead([lambda: None], jobs=1)


def test_rehearsal_of_tuning(rehearsal, monkeypatch, tmp_path):
    tiles, refinements = tune.tiles, tune.refinements
    # The interpreter is slow: two tiles, and two refinements of the better one.
    monkeypatch.setattr(tune, "tiles", lambda p, t: tiles(p, t)[:6:5])
    monkeypatch.setattr(tune, "refinements", lambda best, p, t: refinements(best, p, t)[3:8:4])
    monkeypatch.setattr(tune, "FOLDER", tmp_path)
    clock = iter([5e-3, 2e-3, 1e-3, 3e-3])
    monkeypatch.setattr(tune, "seconds_of", lambda call, repeats: (call(), next(clock))[1])
    monkeypatch.setattr(tune, "device_target", lambda device: get_target("sm90"), raising=False)
    assert tune.main(["--models", "square", "--kinds", "int8", "--m", "16"]) == 0
    table = json.loads((tmp_path / "sm90.json").read_text())
    (entry,) = table["entries"]
    assert (entry["kernel"], entry["m"], entry["n"], entry["k"]) == ("matmul", 16, 80, 256)
    assert table["device"] == "NVIDIA H100 80GB HBM3"


AHEAD = """
import functools, sys
sys.path[:0] = {folders!r}
import triton
import bench_kernels, triton_path, tune_kernels
from lowbit.kernels.targets import get_target, pretending

target = get_target("sm90")
triton_path.driver.set_active(triton_path.Driver(target))
problem = bench_kernels.Problem(model="square", kind="int8", m=16, n=512, k=512)
with pretending(target):
    call, _, _ = bench_kernels.build(problem, "meta")
    launches = tune_kernels.tiles(problem, target)[:3]
    before = triton.JITFunction.run
    tune_kernels.compile_ahead([functools.partial(call, launch=launch) for launch in launches], jobs=2)
assert triton.JITFunction.run is before
"""


def test_candidates_compile_ahead_of_the_clock(tmp_path):
    """With a driver that launches nothing: what comes of it is in Triton's cache, where the real call finds it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = AHEAD.format(folders=[str(SCRIPTS), str(Path(__file__).parent)])
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    compiled = {file.name for file in tmp_path.rglob("*.cubin")}
    assert "matmul_kernel.cubin" in compiled and len(list(tmp_path.rglob("*.cubin"))) >= 3
