"""The compile matrix: every kernel for every target, and the page that shows it.

Compiling needs Triton without the interpreter, so it happens in a process of its own, one for all targets. Rows
are cached under the key of the sources; a first run takes about a minute for each target.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from lowbit.kernels import compile as matrix
from lowbit.kernels.compile_ascend import ascend_python
from lowbit.kernels.targets import TARGETS, get_target

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lowbit.kernels.compile", *arguments],
        capture_output=True, text=True, env=ENVIRONMENT | environment, cwd=ROOT, timeout=3600,
    )  # fmt: skip


@pytest.fixture(scope="module")
def compiled() -> dict[str, tuple[matrix.Row, ...]]:
    """Target → its rows. Ascend is none of them where its venv is not there."""
    names = [name for name in TARGETS if name != "ascend910b" or ascend_python() is not None]
    result = run(*(word for name in names for word in ("--target", name)), "--json", "--jobs", "1")
    rows = [matrix.Row(**row) for row in json.loads(result.stdout)]
    assert result.returncode == (1 if any(row.failure for row in rows) else 0), result.stderr
    return {name: tuple(row for row in rows if row.target == name) for name in names}


@pytest.mark.parametrize("name", TARGETS)
def test_every_kernel_compiles_without_spills_and_the_page_says_so(name, compiled):
    if name not in compiled:
        pytest.skip("triton-ascend is not installed: make ascend-env")
    rows = compiled[name]
    assert not [row for row in rows if row.failure]
    assert len(rows) >= 46
    by_name = {row.kernel: row for row in rows}
    target = get_target(name)
    for row in rows:
        # A refusal that nobody expects would hide a broken case.
        assert row.refusal is None or "fp8" in row.kernel or row.kernel.startswith("hadamard"), row
        assert row.refusal is None or target.fp8 != "e4m3fn", row
        assert not row.spills
        assert row.shared_memory is None or row.shared_memory <= target.shared_memory
        if " int8 " in row.kernel and row.kernel.startswith(
            ("matmul int8", "matmul_block", "matmul_grouped int8")
        ):
            assert matrix.LOW_PRECISION.search(row.instruction or ""), row
    # fp8 is native wherever the target has one, and refused, not converted, where it has none.
    row = by_name["matmul fp8 prefill"]
    if target.fp8 is None:
        assert "multiplies no fp8" in (row.refusal or "")
    else:
        assert matrix.LOW_PRECISION.search(row.instruction or ""), row
    assert by_name["matmul_weight_only bf16 × fp8 block decode"].refusal is None
    # Where a warp multiplies 16 × 8 × 32, operands that are taken apart or loaded byte by byte show in the count.
    for row in rows:
        if (row.instruction or "").startswith("mma.m16n8k32") and row.kernel.endswith("prefill"):
            matrix_instructions, all_instructions = map(int, (row.loop or "").split(" of "))
            # A scale for each row and column takes a product for each sum, beside the addition.
            limit = 8 if "groups" in row.kernel else 6 if "block" in row.kernel else 3.5
            assert all_instructions <= limit * matrix_instructions or "mxfp8" in row.kernel, row
    page, table = (ROOT / "docs" / "kernels.md").read_text(), matrix.markdown(rows)
    overview = next(line for line in table.splitlines() if line.startswith(f"| {name} |"))
    out_of_date = "docs/kernels.md is out of date: lowbit kernels compile --markdown > docs/kernels.md"
    assert overview in page.splitlines(), out_of_date
    assert section(page, name) == section(table, name), out_of_date


def section(page: str, name: str) -> list[str]:
    return page.split(f"\n## {name}\n")[1].split("\n## ")[0].strip().splitlines()


@pytest.mark.parametrize("name", ["sm80", "sm90", "gfx950"])
def test_the_matrix_compiles_what_triton_would_when_a_kernel_is_launched(name):
    result = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "triton_path.py"), name],
        capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout)
    assert found["compared"] >= 29 and not found["different"]
    assert not found["compiled_again"]


def test_without_the_ascend_venv_rows_are_refused_with_the_remedy(tmp_path):
    result = run(
        "--target",
        "ascend910b",
        "--json",
        LOWBIT_ASCEND_ENV=str(tmp_path),
        LOWBIT_COMPILE_CACHE=str(tmp_path),
    )
    rows = json.loads(result.stdout)
    assert result.returncode == 0
    assert all("make ascend-env" in row["refusal"] for row in rows if row["kernel"] == "matmul int8 prefill")
    assert not list(tmp_path.glob("*.json"))


def test_an_unknown_target_is_bad_usage(capsys):
    assert matrix.main(["--target", "h100"]) == 2
    assert "expected one of sm80" in capsys.readouterr().err


MODELS = """
import json
from lowbit.kernels import compile as matrix
from lowbit.kernels.compile_models import model_cases
from lowbit.kernels.targets import TARGETS
cases = list(model_cases())
assert len({case.name for case in cases}) == len(cases)
counts = {}
for target in TARGETS.values():
    planned = matrix._first(matrix._plan(target, cases))
    refused = [p.refusal for p in planned if isinstance(p, matrix.Row)]
    kernels = {p.launch.kernel for p in planned if not isinstance(p, matrix.Row)}
    counts[target.name] = [len(planned), refused, sorted(kernels)]
print(json.dumps(counts))
"""


def test_launches_of_models_are_planned_once_each():
    result = subprocess.run(
        [sys.executable, "-c", MODELS], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    for name, (planned, refused, kernels) in json.loads(result.stdout).items():
        target = get_target(name)
        assert 250 < planned < 500
        assert all(reason.startswith(f"{name} multiplies no fp8") for reason in refused)
        assert len(refused) <= 1 and bool(refused) == (target.fp8 is None)
        # Weight-only and block products share a kernel, and mxfp8 where nothing multiplies it.
        assert {"matmul_kernel", "inner_kernel", "matmul_grouped_kernel"} <= set(kernels)


def test_keys_of_a_row():
    required = {"kernel", "target", "instruction", "registers", "spills", "shared_memory", "refusal"}
    assert required <= set(matrix.Row.__dataclass_fields__)


ROW = {
    "kernel": "k",
    "target": "sm90",
    "instruction": "mma.s8.s8",
    "registers": 9,
    "spills": 0,
    "shared_memory": 1,
}


@pytest.mark.parametrize(
    ("change", "product", "reason"),
    [
        ({}, "low", None),
        ({"instruction": "mma.m16n8k16.f32.f16.f16.f32"}, "low", "no low-precision matrix instruction"),
        ({"instruction": "v_mfma_f32_32x32x8_f16"}, "low", "no low-precision matrix instruction"),
        ({"instruction": "v_mfma_f32_32x32x16_fp8_fp8"}, "low", None),
        ({"instruction": "mma_tile_int8_t_to_int32_t"}, "low", None),
        ({"instruction": "mma_tile_half_to_float"}, "low", "no low-precision matrix instruction"),
        ({"instruction": "mma.f16"}, "float", None),
        ({"instruction": None}, "float", "no matrix instruction"),
        ({"instruction": None}, "none", None),
        ({"spills": 4}, "low", "spill: 4 bytes"),
        ({"spills": None, "registers": None, "shared_memory": None}, "low", None),
        ({"shared_memory": 10**6}, "low", "on-chip memory"),
        ({"refusal": "why", "instruction": None}, "low", None),
    ],
)
def test_what_fails_a_row(change, product, reason):
    found = matrix.judge(matrix.Row(**(ROW | change)), product, get_target("sm90"))
    assert found == reason if reason is None else reason in (found or "")


SPILLING = """
import torch
from lowbit.kernels import compile as matrix
from lowbit.kernels.compile_cases import empty
from lowbit.kernels.matmul import matmul
from lowbit.kernels.record import record
from lowbit.kernels.targets import get_target
from lowbit.kernels.tuned_tables import LaunchParameters
matrix._quiet()
target = get_target("sm80")
a, w = empty(4096, 2048, dtype=torch.int8), empty(4096, 2048, dtype=torch.int8)
launch = LaunchParameters(block_m=128, block_n=256, block_k=64, num_warps=4)
[recorded] = record(lambda: matmul(a, w, empty(4096, 1), empty(4096, 1), launch=launch), target)
print(matrix._compile_gpu(recorded, target)["spills"])
"""


def test_spills_are_seen():
    result = subprocess.run(
        [sys.executable, "-c", SPILLING], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT
    )
    assert int(result.stdout.splitlines()[-1]) > 100, result.stderr
