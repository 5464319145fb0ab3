"""Which implementation runs a problem, with what launch parameters: a pure function.

No device is asked and nothing is launched here, so `lowbit kernels explain` can answer for
an accelerator that is not present.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lowbit.ops.problem import Weights, inner_block, within
from lowbit.ops.settings import Implementation, settings

if TYPE_CHECKING:
    from lowbit.kernels.tuned_tables import LaunchParameters  # type: ignore[import-not-found]
    from lowbit.ops.cpu_isa import Tile


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One product out[M, N] = activations[M, K] · weightᵀ, by sizes and formats alone."""

    m: int
    n: int
    k: int
    activation_dtype: str
    """Of the input: `bfloat16`, `float16`, `float32`, or `int8`, `e4m3fn` for given codes."""
    weight_dtype: str
    """`int8`, `e4m3fn`, or `uint8`: int8 plus 128, four packed in an int32."""
    activations: Literal["none", "token", "group", "group_pow2", "tensor"]
    """How activations are quantized (see `lowbit.ops`)."""
    block: tuple[int, int]
    """Rows and columns of the weight that share a scale; 0 stands for all of them."""
    weight_scale: Literal["float32", "e8m0"] = "float32"
    """Format of the weight's scales; E8M0 holds powers of two."""
    zero_point: bool = False
    bias: bool = False
    out_dtype: str = "bfloat16"
    experts: int = 0
    """Above 0: a grouped product over so many experts; `m` counts the tokens of all."""

    @property
    def weight_group(self) -> int:
        """Elements along K per weight scale; 0: one scale for all of K."""
        return within(self.block[1], self.k)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What runs."""

    implementation: Implementation
    kernel: str
    """A function of lowbit.kernels, or the tile of the CPU path."""
    multiplies: str
    """Dtypes of the two sides of the product, e.g. `int8 × int8`."""
    launch: LaunchParameters | None = None
    note: str = ""
    """What differs from what the problem literally asks, and why."""

    def keeps_floats(self, problem: Problem) -> bool:
        """Whether activations that `problem` would quantize go into an accelerator's kernel as they are."""
        unit = self.multiplies.partition(" ")[0]
        return self.implementation == "triton" and problem.activations != "none" and unit in FLOAT_NAMES


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why no kernel takes the problem."""

    reason: str


_NAMES = {
    torch.int8: "int8", torch.float8_e4m3fn: "e4m3fn", torch.int32: "uint8",
    torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def problem_of(
    x: Tensor, weights: Weights, activations: str, *, zero_point: bool = False, bias: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Problem:  # fmt: skip
    """The problem that a call is. x [M, K]; the output is of its dtype unless said otherwise."""
    return Problem(
        m=x.shape[0], n=weights.n, k=weights.k, activation_dtype=_NAMES[x.dtype],
        weight_dtype=_NAMES[weights.tensor.dtype], activations=activations,  # type: ignore[arg-type]
        block=weights.block, weight_scale="e8m0" if weights.exponents else "float32", zero_point=zero_point,
        bias=bias, out_dtype=_NAMES[out_dtype or x.dtype],
        experts=weights.tensor.shape[0] if weights.tensor.dim() == 3 else 0,
    )  # fmt: skip


FLOAT_NAMES = ("float16", "bfloat16", "float32")


def choose(problem: Problem, target: str) -> Decision | Refusal:
    """The implementation of `problem` on `target`: `cpu`, or a name in `lowbit.kernels.targets`."""
    reason = _invalid(problem)
    if reason:
        return Refusal(reason=reason)
    if target == "cpu":
        return choose_cpu(problem, settings.float64_sums)
    return _choose_triton(problem, target, settings.fast_accumulation)


def _invalid(problem: Problem) -> str | None:
    quantizes = problem.activations != "none"
    if problem.weight_dtype == "uint8" and quantizes:
        return "packed int8 weights (pack-quantized) are weight-only, found quantized activations"
    if problem.zero_point and (problem.weight_dtype != "int8" or problem.activations != "tensor"):
        return "a zero point belongs to static int8 activations, one scale per tensor"
    if problem.zero_point and problem.experts:
        return "grouped products have no zero points: each expert's product is one of its own"
    if problem.activations in ("group", "group_pow2") and not problem.block[1]:
        return "activations per group need a weight block that says how long a group is"
    if inner_block(problem.block, problem.k) and problem.activations in ("token", "tensor"):
        return (
            f"weights with a scale per {problem.block[1]} along K need activations per group or "
            f"unquantized, found per {problem.activations}"
        )
    return None


# Times 128 · 128, and 255 · 128 less a zero point, these stay below 2³¹.
_MAX_K, _MAX_K_ZERO_POINT = 131_071, 65_793


@lru_cache(maxsize=4096)
def choose_cpu(problem: Problem, float64_sums: bool) -> Decision | Refusal:
    """The same for the CPU that this runs on."""
    from lowbit.ops.cpu_call import PARTS, instructions, typical_rows
    from lowbit.ops.cpu_isa import float_tile, integer_tile

    have, rows = instructions(), typical_rows(problem.m, problem.experts)
    quantizes = problem.activations != "none"
    summed, most = problem.weight_group or problem.k, _MAX_K_ZERO_POINT if problem.zero_point else _MAX_K
    if quantizes and problem.weight_dtype == "int8" and summed > most:
        return Refusal(reason=f"an int32 sum of int8 products may overflow for K = {summed} > {most}")
    if have.name == "portable":
        floats = "float64 × float64" if float64_sums else "float32 × float32"
        both = "int8 × int8" if quantizes and problem.weight_dtype == "int8" else floats
        return Decision(
            implementation="cpu", kernel="portable", multiplies=both,
            note="plain torch: this CPU has no AVX2, or numba is missing; exact, but slower",
        )  # fmt: skip
    grouped = problem.activations.startswith("group") or bool(problem.weight_group)
    if quantizes and problem.weight_dtype == "int8":
        tile = integer_tile(have, rows, zero_point=problem.zero_point, grouped=grouped)
        note = "one multiplication for every two products, exactly (Winograd's inner product)"
        return Decision(
            implementation="cpu", kernel=_tile_name(tile, rows), multiplies="int8 × int8",
            note=note if tile.paired else "",
        )  # fmt: skip
    tile = float_tile(
        have, rows, weight=_DTYPES[problem.weight_dtype], grouped=grouped, float64=float64_sums,
        parts=1 if quantizes else PARTS[_DTYPES[problem.activation_dtype]],
    )  # fmt: skip
    unit = "bfloat16" if "bf16" in tile.kind else "float64" if float64_sums else "float32"
    when = "while they are loaded" if rows <= tile.dot_rows else "block by block"
    return Decision(
        implementation="cpu", kernel=_tile_name(tile, rows), multiplies=f"{unit} × {unit}",
        note=f"{problem.weight_dtype} codes are decoded to {unit} {when}, exactly",
    )  # fmt: skip


def _tile_name(tile: Tile, rows: int) -> str:
    if rows <= tile.dot_rows:
        return f"{tile.kind}, dot products with rows as stored"
    parts = f", activations as {tile.parts} bfloat16" if tile.parts > 1 else ""
    return f"{tile.kind}, {tile.rows}×{tile.cols} tile{parts}"


def kernel_of(problem: Problem) -> str:
    """The function of lowbit.kernels that this problem literally asks for."""
    if problem.experts:
        return "matmul_grouped"
    if problem.activations == "none":
        return "matmul_weight_only"
    exponents = problem.activations == "group_pow2" and problem.weight_scale == "e8m0"
    if exponents and problem.block == (1, 32) and problem.weight_dtype == "e4m3fn":
        return "matmul_mxfp8"
    return "matmul_block" if inner_block(problem.block, problem.k) else "matmul"


@lru_cache(maxsize=4096)
def _choose_triton(problem: Problem, name: str, fast_accumulation: bool) -> Decision | Refusal:
    try:
        from lowbit.kernels.launch import (  # type: ignore[import-not-found]
            block_refusal,
            choose_launch,
            group_refusal,
            refusal,
        )
        from lowbit.kernels.targets import get_target  # type: ignore[import-not-found]
    except ImportError as error:
        return Refusal(reason=f"triton cannot be imported ({error}); install it to use {name}")
    target = get_target(name)
    kernel = kernel_of(problem)
    weight, quantizes = problem.weight_dtype, problem.activations != "none"
    a_dtype = weight if quantizes else problem.activation_dtype
    note = ""
    if quantizes and weight == "e4m3fn" != target.fp8 and problem.activation_dtype in FLOAT_NAMES:
        # A target without this fp8 still reads it: the kernel decodes the bytes, and
        # activations are simply not quantized, for which it has no instruction either.
        lacks = refusal("matmul", k=problem.k, a_dtype=weight, w_dtype=weight, target=target) or ""
        kernel = "matmul_grouped" if problem.experts else "matmul_weight_only"
        note = f"{lacks.split(';')[0].split(':')[0]}: weights are decoded in the kernel, activations stay as they are"
        a_dtype = problem.activation_dtype
    why_not = refusal(kernel, k=problem.k, a_dtype=a_dtype, w_dtype=weight, target=target)
    inner_rows, group = inner_block(problem.block, problem.k) or (0, 0)
    if group and not why_not:
        why_not = block_refusal(inner_rows, group)
        if quantizes and a_dtype == weight and problem.weight_group:
            why_not = why_not or group_refusal(group, target)
    if why_not:
        return Refusal(reason=why_not)
    rows = -(-problem.m // problem.experts) if problem.experts else problem.m
    blocks = {"group_n": inner_rows if inner_rows > 1 else 0, "group_k": group}
    launch = choose_launch(
        kernel,
        fast_accum=fast_accumulation,
        m=max(rows, 1),
        n=max(problem.n, 1),
        k=max(problem.k, 1),
        a_dtype=a_dtype,
        w_dtype=weight,
        target=target,
        **({} if kernel == "matmul" else _mxfp8_blocks(target) if kernel == "matmul_mxfp8" else blocks),
    )
    return Decision(
        implementation="triton", kernel=kernel, multiplies=f"{a_dtype} × {weight}", launch=launch, note=note
    )


def _mxfp8_blocks(target) -> dict[str, int]:  # type: ignore[no-untyped-def]
    """Where the matrix unit scales, no tile needs to fit the groups."""
    return {"group_n": 0, "group_k": 0 if target.scaled_dot else 32}


def bucketed(problem: Problem) -> Problem:
    """The problem with M raised to its bucket, so that decisions are few and reused."""
    from lowbit.kernels.tuned_tables import m_bucket  # type: ignore[import-not-found]

    return replace(problem, m=1 if problem.m <= 1 else m_bucket(problem.m))
