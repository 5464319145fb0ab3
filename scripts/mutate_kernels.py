"""Change one thing at a time in the kernels and show that a test fails each time.

    python scripts/mutate_kernels.py [--only WORD]… [--jobs 2] [--list]

Each mutant is a copy of kernels/ with one line changed, put before the real package on the
import path of a pytest process: the working tree is not touched. A mutant that survives, or
whose line is no longer in the source, makes the exit code 1.

Not here, since the interpreter cannot see them: `PROMOTE_K` (accumulator precision) and masks
of loads whose other factor is zero anyway.
"""

# ruff: noqa: E501  (a table of source lines is easier to read unbroken)

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One change, and the tests that should notice it."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    """Test files without folder, prefix and ending: `matmul matmul_inner`."""
    k: str = ""
    """pytest's -k, to run the right test first."""


def mutants(file: str, tests: str, *changes: tuple[str, ...]) -> tuple[Mutant, ...]:
    """Mutants of one file from (name, old, new[, k])."""
    return tuple(
        Mutant(name=f"{file}: {name}", file=file, old=old, new=new, tests=tests, k=k[0] if k else "")
        for name, old, new, *k in changes
    )


ROW_MASK = "mask=row_mask[:, None] & col_mask[None, :]"

MUTANTS: tuple[Mutant, ...] = (
    *mutants(
        "tile", "matmul",
        ("drop the scale per token", "value = value * tl.load(a_scale_ptr + rows, mask=row_mask, other=0.0)[:, None]", "value = value"),
        ("drop the scale of the activations' tensor", "value = value * tl.load(a_scale_ptr)\n", "value = value\n", "scale_shapes"),
        ("drop the scale per channel", "value = value * tl.load(w_scale_ptr + cols, mask=col_mask, other=0.0)[None, :]", "value = value"),
        ("drop the scale of the weight's tensor", "value = value * tl.load(w_scale_ptr)\n", "value = value\n", "scale_shapes"),
        ("drop the bias", "if HAS_BIAS:\n        value = value +", "if HAS_BIAS:\n        value = value + 0 *"),
        ("drop the zero point per token", "acc -= zero[:, None] * w_sum[None, :]", "acc -= 0 * zero[:, None]"),
        ("drop the zero point of the tensor", "acc -= (tl.load(a_zero_ptr).to(tl.int32) * w_sum)[None, :]", "acc -= 0", "zero_points"),
        ("scale with the token's neighbour", "tl.load(a_scale_ptr + rows, mask", "tl.load(a_scale_ptr + rows // 2, mask"),
        ("drop the mask of K", "if not EVEN_K:", "if False:"),
        ("wrong column in a band", "return first + within % height, within // height", "return first + within % height, within % height"),
        ("bands of the wrong height", "height = tl.minimum(blocks_m - first, GROUP_M)", "height = GROUP_M"),
        ("32-bit start of the activations", "a_ptr += m0.to(tl.int64) * stride_am", "a_ptr += (m0 * stride_am).to(tl.int32)", "beyond"),
        ("32-bit start of the weight", "w_ptr += n0.to(tl.int64) * stride_wn", "w_ptr += (n0 * stride_wn).to(tl.int32)", "beyond"),
    ),
    *mutants(
        "tile", "matmul_inner",
        ("read the NaN of fp8 as a number", 'return tl.where(tl.abs(value) > 448.0, float("nan"), value)', "return value", "byte"),
        ("lose the sign of fp8 decoded to float32", "& -0x78100000", "& 0x07F00000", "byte"),
        ("decode fp8 to float32 with the wrong bias", "* 1.329227995784916e36", "* 6.64613997892458e35", "byte"),
        ("cut the lower half of float32", ">> 16).to(tl.int16)", ">> 15).to(tl.int16)", "byte"),
        ("lose the sign of decoded fp8", "((bits & 128) << 8) | ", "", "byte"),
        ("decode fp8 with the wrong bias", "* 256.0", "* 128.0", "byte"),
        ("forget the offset of packed int8", "return raw ^ -128", "return raw", "byte"),
        ("E8M0 of 0 as 0", "tl.where(exponent == 0, 0x00400000, exponent << 23)", "exponent << 23", "ends"),
        ("E8M0 of 255 as infinity", "tl.where(exponent == 255, 0x7FC00000, bits)", "bits", "ends"),
        ("drop the last of three summands", "part = tl.dot(low, w, out_dtype=PART)", "part = tl.dot(low * 0, w, out_dtype=PART)", "24_bits"),
        ("drop the middle summand", "part = tl.dot(middle, w, part, out_dtype=PART)", "part = part", "24_bits"),
        ("always the first group of K", "group = k // GROUP_K", "group = 0", "bitwise"),
        ("drop the weight's group scale", "scale = a_scale[:, None] * scale", "scale = a_scale[:, None]", "block_is"),
        ("drop the activations' group scale", "scale = a_scale[:, None] * scale", "scale = scale", "block_is"),
        ("drop the scale of weight-only groups", "acc = tl.fma(part.to(tl.float32), scale, acc)", "acc += part.to(tl.float32)", "weight_only"),
        ("the last product instead of the sum", "acc = tl.fma(part.to(tl.float32), scale, acc)", "acc = part.to(tl.float32) * scale", "block_is"),
        ("described rows of the first tile of the weight", "w_ptr.load([n0, k])", "w_ptr.load([0, k])", "block_with_random"),
        ("described rows of the first tokens", "a_ptr.load([m0, k])", "a_ptr.load([0, k])", "block_with_random"),
        ("described columns of the start of K", "a_ptr.load([m0, k])", "a_ptr.load([m0, 0])", "block_with_random"),
        ("a tile loaded turned is turned again", "if LOAD != TURNED:\n            w = w.T", "w = w.T", "shapes_and_targets"),
    ),
    *mutants(
        "matmul", "matmul",
        ("every split from the start of K", "k_start = split * k_per_split", "k_start = 0", "variant"),
        ("splits in one place", "out_ptr += split.to(tl.int64) * M * N", "out_ptr += 0", "variant"),
        ("scales of the first tile's tokens", "a_scale_ptr + m0 if A_SCALE == 2 else a_scale_ptr", "a_scale_ptr"),
        ("scales of the first tile's channels", "w_scale_ptr + n0 if W_SCALE == 2 else w_scale_ptr", "w_scale_ptr"),
        ("bias of the first tile", "bias_ptr + n0 if HAS_BIAS else None", "bias_ptr"),
        ("zero points of the first tile", "a_zero_ptr + m0 if A_ZERO == 2 else a_zero_ptr", "a_zero_ptr"),
        ("sums of the first tile's channels", "w_sum_ptr + n0 if A_ZERO > 0 else None", "w_sum_ptr"),
        ("store over the next row", ROW_MASK, "mask=row_mask[:, None]"),
        ("K is always even", "EVEN_K=k % launch.block_k == 0", "EVEN_K=True"),
        ("persistent programs do one tile", "in range(tl.program_id(0), tiles,", "in range(tl.program_id(0), tl.num_programs(0),", "several"),
        ("loops that are one do one tile", "tl.range(tl.program_id(0), tiles,", "tl.range(tl.program_id(0), tl.num_programs(0),", "several"),
    ),
    *mutants(
        "split", "matmul",
        ("leave out a split", "range(1, SPLIT_K)", "range(2, SPLIT_K)", "variant"),
        ("scales of the first tile", "w_scale_ptr + n0 if W_SCALE == 2 else w_scale_ptr", "w_scale_ptr", "zero_points"),
        ("store over the next row", "value.to(out_ptr.dtype.element_ty), mask=mask", "value.to(out_ptr.dtype.element_ty), mask=row_mask[:, None]", "variant"),
    ),
    *mutants(
        "operands", "operands matmul_grouped",
        ("describe experts that are not adjacent", "adjacent = not stacked or w.stride(0) == w.shape[1] * w.stride(1)", "adjacent = True"),
        ("describe rows that are not aligned", "rows_aligned(a, rows) and ", ""),
        ("describe rows that overlap", "t.stride(0) >= t.shape[1] and ", ""),
        ("describe a column of any stride", " and t.stride(1) == 1", ""),
    ),
    *mutants(
        "inner", "matmul_inner",
        ("scales of the first weight block", "w_scale_ptr + (n0 // GROUP_N) * stride_wsn", "w_scale_ptr", "block"),
        ("group scales of the first channels", "w_scale_ptr + col * stride_wsn", "w_scale_ptr", "weight_only or mxfp8"),
        ("group scales of the first tokens", "a_scale_ptr + row * stride_asm", "a_scale_ptr", "block"),
        ("every split from the start of K", "k_start = split * k_per_split", "k_start = 0", "split"),
        ("bias of the first tile", "bias_ptr + n0 if HAS_BIAS else None", "bias_ptr", "block_is"),
        ("channel scales of the first tile", "w_scale_ptr + n0 if W_SCALE == 2 else w_scale_ptr", "w_scale_ptr", "weight_only"),
        ("persistent programs do one tile", "in range(tl.program_id(0), tiles,", "in range(tl.program_id(0), tl.num_programs(0),", "several"),
        ("loops that are one do one tile", "tl.range(tl.program_id(0), tiles,", "tl.range(tl.program_id(0), tl.num_programs(0),", "several"),
        ("store over the next row", ROW_MASK, "mask=row_mask[:, None]"),
    ),
    *mutants(
        "inner", "matmul_grouped",
        ("drop the routed weight", "if HAS_ROUTED:", "if False:"),
        ("routed weight of the first rows", "routed_ptr + row + ", "routed_ptr + "),
        ("store over the next expert's rows", ROW_MASK, "mask=col_mask[None, :]"),
        ("scales of the first tokens", "a_scale_ptr + row if A_SCALE == 2 else a_scale_ptr", "a_scale_ptr"),
    ),
    *mutants(
        "matmul_grouped", "matmul_grouped",
        ("slots without the expert's own", "// BLOCK_M + experts\n", "// BLOCK_M\n"),
        ("weights of the expert before", "axis=0) - 1\n", "axis=0) - 2\n"),
        ("described weights of the first expert", "n0 + expert * N if LOAD == TMA else n0", "n0", "exact"),
        ("32-bit start of an expert", "w_ptr + expert.to(tl.int64) * stride_we", "w_ptr + (expert * stride_we).to(tl.int32)", "beyond"),
        ("bias of the first expert", "bias_ptr + expert * N if HAS_BIAS else None", "bias_ptr"),
        ("scales of the first expert", "w_scale_ptr + expert.to(tl.int64) * stride_wse", "w_scale_ptr"),
        ("too few slots", "slots = tokens // launch.block_m + experts", "slots = tokens // launch.block_m + 1"),
        ("padding experts count", "((starts <= slot) & (experts < EXPERTS))", "(starts <= slot)"),
        ("one slot per expert", "(slot - begin // BLOCK_M - expert) * BLOCK_M", "0 * slot"),
    ),
    *mutants(
        "matmul_mxfp8", "matmul_inner",
        ("scales of the first tokens", "a_scale_ptr += m0.to(tl.int64) * groups", "a_scale_ptr += 0", "mxfp8"),
        ("scales of the first channels", "w_scale_ptr += n0.to(tl.int64) * groups", "w_scale_ptr += 0", "mxfp8"),
        ("always the first groups", "w_scale_ptr + k // 32 + ", "w_scale_ptr + ", "mxfp8"),
        ("drop the bias", "bias_ptr + n0 if HAS_BIAS else None, None, None,\n        row_mask, col_mask, BLOCK_M, BLOCK_N, 0, 0, 0, HAS_BIAS", "None, None, None,\n        row_mask, col_mask, BLOCK_M, BLOCK_N, 0, 0, 0, False", "mxfp8"),
        ("drop the mask of K", "EVEN_K=k % launch.block_k == 0", "EVEN_K=True", "mxfp8"),
        ("store over the next row", ROW_MASK, "mask=row_mask[:, None]", "mxfp8"),
    ),
    *mutants(
        "quantize", "quantize",
        ("truncate", "rounded = (clamped + 12582912.0) - 12582912.0", "rounded = clamped"),
        ("round half up", "rounded = (clamped + 12582912.0) - 12582912.0", "rounded = tl.floor(clamped + 0.5)"),
        ("multiply by the reciprocal", "scaled = divide(value, scale, FORMAT, FUSED and MODE > 0)", "scaled = value * (1.0 / scale)[:, None]"),
        ("do not correct the quotient", "quotient = tl.fma(tl.fma(-quotient, divisor, value), inverse, quotient)\n        return tl.fma(tl.fma(-quotient, divisor, value), inverse, quotient)", "return quotient", "beside_ties"),
        ("do not lift small scales", "tl.where(scale < 8.673617379884035e-19, 1.8446744073709552e19, 1.0)", "tl.where(scale < 0.0, 2.0, 1.0)", "beside_ties"),
        ("NaN for a row with an infinity", 'infinite = scale == float("inf")', "infinite = scale < 0.0", "nan"),
        ("multiply by a power of two", "value * inverse.to(tl.float32, bitcast=True)[:, None]", "value * scale[:, None]", "powers"),
        ("NaN is forgotten in an inverse", "inverse = tl.where(scale != scale, bits, 0x7F000000 - bits)", "inverse = 0x7F000000 - bits", "powers"),
        ("do not saturate", "clamped = tl.minimum(tl.maximum(value, LOW), HIGH)", "clamped = value"),
        ("NaN becomes a code", "return tl.where(value != value, 0.0, rounded).to(DTYPE)", "return tl.where(value != value, 1.0, rounded).to(DTYPE)", "nan"),
        ("NaN leaves the scale alone", 'scale = tl.where(has_nan > 0, float("nan"), scale)', "scale = scale", "nan"),
        ("0/0 for a row of zeros", "tl.where(quotient < 1.1754943508222875e-38, 1.0, quotient)", "quotient"),
        ("negative values do not count", "tl.where(value != value, 0.0, tl.abs(value)))\n            # Divided", "tl.where(value != value, 0.0, value))\n            # Divided", "per_token"),
        ("negative values of a group do not count", "largest = tl.max(tl.where(value != value, 0.0, tl.abs(value)), axis=1)", "largest = tl.max(tl.where(value != value, 0.0, value), axis=1)", "per_group"),
        ("exact powers of two round up", "((bits & 0x7FFFFF) != 0)", "((bits & 0x7FFFFF) >= 0)", "powers"),
        ("scales in the wrong row", "scale_ptr + tl.cast(row, tl.int64) * stride_sm", "scale_ptr"),
        ("scales in the wrong group", "scale_row + (first + gs) * stride_sg", "scale_row + gs * stride_sg", "per_group"),
        ("scales beyond the last group", "stored, mask=gs < tl.cdiv(K, GROUP) - first)", "stored)", "per_group"),
        ("drop the zero point", "+ tl.load(zero_ptr).to(tl.float32)", "+ 0.0", "zero"),
        ("zero point within ±127", "encode_codes(scaled, -128.0, 127.0,", "encode_codes(scaled, -127.0, 127.0,", "zero"),
        ("rows without their stride", "x_ptr + tl.cast(row, tl.int64) * stride_xm", "x_ptr + tl.cast(row, tl.int64) * K", "strided"),
    ),
    *mutants(
        "quantize", "fused",
        ("drop the gate's rounding", "gate = (value / (1.0 + tl.exp(-value))).to(dtype).to(tl.float32)", "gate = value / (1.0 + tl.exp(-value))", "silu_mul"),
        ("drop up", "value = (gate * up)", "value = (gate)", "silu_mul"),
        ("drop the norm's weight", "value = (value * weight)", "value = (value)", "rms"),
        ("drop the norm's rounding", "value = (value * inverse_rms).to(dtype).to(tl.float32)", "value = value * inverse_rms", "rms"),
        ("drop eps", "/ K + eps)", "/ K)", "exact"),
        ("mean over the block", "axis=0) / K + eps", "axis=0) / BLOCK + eps", "rms"),
        ("drop the residual", "value = (value + other).to(dtype).to(tl.float32)", "value = value", "rms"),
        ("keep the sum without the residual", "total = (value + other.to(tl.float32)).to(x.dtype)", "total = value.to(x.dtype)", "rms"),
    ),
    *mutants(
        "hadamard", "fused",
        ("sums only", "tl.join(left + right, left - right)", "tl.join(left + right, left + right)", "hadamard"),
        ("a stage too few", "STAGES=block_size.bit_length() - 1", "STAGES=block_size.bit_length() - 2", "hadamard"),
        ("drop the factor", "(x * factor)", "(x)", "hadamard"),
        ("order of the halves", "(0, 2, 1)", "(0, 1, 2)", "hadamard"),
        ("rows without their stride", "tl.cast(row, tl.int64) * stride_xm", "tl.cast(row, tl.int64) * stride_om", "inverse"),
    ),
)  # fmt: skip


def run(mutant: Mutant) -> tuple[str, float]:
    """(`killed`, `SURVIVED` or `GONE`, seconds) of one mutant."""
    source = (ROOT / "kernels" / f"{mutant.file}.py").read_text()
    if mutant.old not in source:
        return "GONE", 0.0
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="lowbit-mutant-") as folder:
        package = Path(folder) / "lowbit"
        package.mkdir()
        for entry in (ROOT / "lowbit").iterdir():
            if entry.name != "__pycache__":
                (package / entry.name).symlink_to(entry)
        shutil.copytree(ROOT / "kernels", package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
        (package / "kernels" / f"{mutant.file}.py").write_text(source.replace(mutant.old, mutant.new))
        files = [str(ROOT / "tests" / "kernels" / f"test_{name}.py") for name in mutant.tests.split()]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
        command += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), *files]
        command += ["-k", mutant.k] if mutant.k else []
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    # 0: all passed. 1: a test failed. Below 0: it crashed, which counts. Else nothing was run.
    if result.returncode == 0:
        return "SURVIVED", time.perf_counter() - start
    if result.returncode > 1:
        raise RuntimeError(
            f"pytest could not run for {mutant.name!r}:\n{result.stdout[-2000:]}{result.stderr[-500:]}"
        )
    return "killed", time.perf_counter() - start


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only", action="append", default=[], help="mutants whose name has this word; repeatable"
    )
    parser.add_argument("--jobs", type=int, default=2, help="pytest processes at a time")
    parser.add_argument("--list", action="store_true", help="list the mutants and stop")
    arguments = parser.parse_args(argv)
    chosen = [m for m in MUTANTS if not arguments.only or any(word in m.name for word in arguments.only)]
    if not chosen:
        print(f"error: no mutant's name has {' or '.join(arguments.only)}; see --list", file=sys.stderr)
        return 2
    if arguments.list:
        print("\n".join(m.name for m in chosen))
        return 0
    counts = {"killed": 0, "SURVIVED": 0, "GONE": 0}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        # Killing means nothing unless the same tests pass on the unchanged kernels.
        unchanged = {(m.tests, m.k): replace(m, name="unchanged", old="\n", new="\n") for m in chosen}
        for (tests, k), (outcome, _) in zip(unchanged, pool.map(run, unchanged.values()), strict=True):
            if outcome != "SURVIVED":
                print(f"error: {tests} -k {k!r} fails on the unchanged kernels", file=sys.stderr)
                return 2
        for mutant, (outcome, seconds) in zip(chosen, pool.map(run, chosen), strict=True):
            counts[outcome] += 1
            print(f"{outcome:9}{seconds:6.1f} s  {mutant.name}", flush=True)
    print(f"{counts['killed']} of {len(chosen)} killed, {counts['SURVIVED']} survived, {counts['GONE']} gone")
    return 0 if counts["killed"] == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
