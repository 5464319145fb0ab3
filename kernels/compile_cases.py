"""The calls that the compile matrix compiles: every kernel, at decode and at prefill shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .fused import rms_norm_quantize, silu_mul_quantize
from .hadamard import hadamard
from .matmul import matmul
from .matmul_block import matmul_block
from .matmul_grouped import matmul_grouped
from .matmul_mxfp8 import matmul_mxfp8
from .matmul_weight_only import matmul_weight_only
from .quantize import quantize_per_group, quantize_per_token, quantize_static
from .targets import Target

# N and K of DeepSeek-V3's and Llama-70B's projections; TOKENS at prefill.
N, K, TOKENS, EXPERTS = 7168, 2048, 4096, 32

Call = Callable[[Target], object]
"""Runs a kernel's function on meta tensors. ValueError: the target refuses it."""
Block = tuple[int, int] | None
"""The block in which weights have a scale; None: a scale per channel."""
BLOCKS = (128, 128)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of one kernel."""

    name: str
    """How the table names it."""
    call: Call
    product: Literal["int8", "fp8", "float", "none"]
    """What its matrix instruction should multiply where the target can."""


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def fp8(target: Target) -> torch.dtype:
    """The fp8 that the target multiplies; e4m3fn, and so a refusal, where it has none."""
    return torch.float8_e4m3fnuz if target.fp8 == "e4m3fnuz" else torch.float8_e4m3fn


def codes_of(kind: str | torch.dtype, target: Target) -> torch.dtype:
    """`int8`, or `fp8` as the target multiplies it; a dtype is itself."""
    return kind if isinstance(kind, torch.dtype) else torch.int8 if kind == "int8" else fp8(target)


def _scale(n: int, k: int, block: Block) -> Tensor:
    rows, cols = block or (1, k)
    return empty(-(-n // rows), -(-k // cols))


def matmul_call(kind: str, m: int, n: int = N, k: int = K, **options: object) -> Call:
    def call(target: Target) -> object:
        dtype = codes_of(kind, target)
        a, w = empty(m, k, dtype=dtype), empty(n, k, dtype=dtype)
        extra = {}
        if options.get("bias"):
            extra["bias"] = empty(n, dtype=torch.bfloat16)
        if options.get("zero_point"):
            extra |= {"a_zero_point": empty(1, dtype=torch.int8), "w_sum": empty(n, dtype=torch.int32)}
        if options.get("fast_accum"):
            extra["fast_accum"] = True
        return matmul(a, w, empty(m, 1), empty(n, 1), **extra)

    return call


def block_call(kind: str, m: int, n: int = N, k: int = K, block: tuple[int, int] = BLOCKS) -> Call:
    def call(target: Target) -> object:
        dtype = codes_of(kind, target)
        a_scale = empty(-(-k // block[1]), m).t()
        return matmul_block(
            empty(m, k, dtype=dtype),
            empty(n, k, dtype=dtype),
            a_scale,
            _scale(n, k, block),
            block_shape=block,
        )

    return call


def weight_only_call(x: torch.dtype, w: torch.dtype, m: int, block: Block, n: int = N, k: int = K) -> Call:
    def call(target: Target) -> object:
        return matmul_weight_only(
            empty(m, k, dtype=x), empty(n, k, dtype=w), _scale(n, k, block), block_shape=block
        )

    return call


def grouped_call(
    kind: str | torch.dtype, rows: int, block: Block, x: torch.dtype | None = None,
    experts: int = EXPERTS, n: int = N, k: int = K,
) -> Call:  # fmt: skip
    """`x`: the dtype of activations that stay in float; `rows` of them, all experts' together."""

    def call(target: Target) -> object:
        dtype = codes_of(kind, target)
        a_scale = empty(-(-k // block[1]), rows).t() if block else empty(rows, 1)
        return matmul_grouped(
            empty(rows, k, dtype=x or dtype), empty(experts, n, k, dtype=dtype),
            empty(experts + 1, dtype=torch.int32), None if x else a_scale,
            empty(experts, *_scale(n, k, block).shape), block_shape=block, routed_weight=empty(rows),
            out_dtype=x or torch.bfloat16,
        )  # fmt: skip

    return call


def mxfp8_call(m: int, n: int = N, k: int = K) -> Call:
    def call(target: Target) -> object:
        a, w = (empty(rows, k, dtype=torch.float8_e4m3fn) for rows in (m, n))
        scales = (empty(rows, k // 32, dtype=torch.uint8) for rows in (m, n))
        return matmul_mxfp8(a, w, *scales)

    return call


def _x(k: int = K, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return empty(TOKENS, k, dtype=dtype)


_BF16, _FP32, _E4M3 = torch.bfloat16, torch.float32, torch.float8_e4m3fn

CASES: tuple[Case, ...] = (
    *(
        Case(name=f"matmul {kind} {name}", call=call, product=kind)
        for kind in ("int8", "fp8")
        for name, call in (
            ("decode", matmul_call(kind, 1)),
            ("M=64", matmul_call(kind, 64)),
            ("prefill", matmul_call(kind, TOKENS)),
            ("unaligned, bias", matmul_call(kind, 1000, 576, 7161, bias=True)),
            ("prefill, N=1000", matmul_call(kind, TOKENS, 1000, bias=True)),
        )
    ),
    Case(
        name="matmul fp8 fast accumulation prefill",
        call=matmul_call("fp8", TOKENS, fast_accum=True),
        product="fp8",
    ),
    Case(
        name="matmul int8 zero point",
        call=matmul_call("int8", TOKENS, bias=True, zero_point=True),
        product="int8",
    ),
    *(
        Case(name=f"matmul_block {kind} {name}", call=call, product=kind)
        for kind in ("int8", "fp8")
        for name, call in (
            ("decode", block_call(kind, 1)),
            ("prefill", block_call(kind, TOKENS)),
            ("ragged, unaligned", block_call(kind, 1000, 576, 7161)),
            ("groups, prefill", block_call(kind, TOKENS, block=(1, 128))),
            ("groups, unaligned", block_call(kind, 64, 576, 7161, (1, 128))),
        )
    ),
    *(
        Case(name=f"matmul_weight_only {name}", call=call, product="float")
        for name, call in (
            ("bf16 × int8 decode", weight_only_call(_BF16, torch.int8, 1, None)),
            ("bf16 × int8 prefill", weight_only_call(_BF16, torch.int8, TOKENS, None)),
            ("bf16 × packed int8, group 128", weight_only_call(_BF16, torch.uint8, 1, (1, 128))),
            (
                "bf16 × packed int8, group 128, prefill",
                weight_only_call(_BF16, torch.uint8, TOKENS, (1, 128)),
            ),
            ("bf16 × fp8 block decode", weight_only_call(_BF16, _E4M3, 1, (128, 128))),
            ("bf16 × fp8 block prefill", weight_only_call(_BF16, _E4M3, TOKENS, (128, 128))),
            ("fp32 × int8 prefill", weight_only_call(_FP32, torch.int8, TOKENS, None)),
        )
    ),
    *(
        Case(name=f"matmul_grouped {kind} {'block' if block else 'channel'} {name}", call=call, product=kind)
        for kind in ("int8", "fp8")
        for block in (None, BLOCKS)
        for name, call in (
            ("decode", grouped_call(kind, 128, block)),
            ("prefill", grouped_call(kind, TOKENS * 8, block)),
        )
    ),
    Case(
        name="matmul_grouped bf16 × fp8 block",
        call=grouped_call(_E4M3, TOKENS, BLOCKS, _BF16),
        product="float",
    ),
    Case(name="matmul_mxfp8 decode", call=mxfp8_call(1), product="fp8"),
    Case(name="matmul_mxfp8 prefill", call=mxfp8_call(TOKENS), product="fp8"),
    Case(name="matmul_mxfp8 prefill, N=1000", call=mxfp8_call(TOKENS, 1000), product="fp8"),
    *(
        Case(name=name, call=call, product="none")
        for name, call in (
            ("quantize_per_token int8", lambda t: quantize_per_token(_x())),
            ("quantize_per_token fp8", lambda t: quantize_per_token(_x(), fp8(t))),
            ("quantize_per_token int8, K=1001", lambda t: quantize_per_token(_x(1001))),
            ("quantize_per_group int8", lambda t: quantize_per_group(_x(), column_major=True)),
            ("quantize_per_group int8, K=1001", lambda t: quantize_per_group(_x(1001), column_major=True)),
            ("quantize_per_group fp8", lambda t: quantize_per_group(_x(), fp8(t), column_major=True)),
            (
                "quantize_per_group mxfp8",
                lambda t: quantize_per_group(_x(), _E4M3, 32, scale_format="e8m0"),
            ),
            (
                "quantize_static int8 zero point",
                lambda t: quantize_static(_x(), empty(1), zero_point=empty(1, dtype=torch.int8)),
            ),
            (
                "rms_norm_quantize int8",
                lambda t: rms_norm_quantize(_x(7168), empty(7168, dtype=_BF16), 1e-6, residual=_x(7168)),
            ),
            (
                "rms_norm_quantize fp8 group",
                lambda t: rms_norm_quantize(_x(7168), empty(7168, dtype=_BF16), 1e-6, fp8(t), group_size=128),
            ),
            (
                "rms_norm_quantize int8, K=1001",
                lambda t: rms_norm_quantize(_x(1001), empty(1001, dtype=_BF16), 1e-6, residual=_x(1001)),
            ),
            ("silu_mul_quantize int8", lambda t: silu_mul_quantize(*_x(4096).chunk(2, dim=-1))),
            ("silu_mul_quantize fp8 group", lambda t: silu_mul_quantize(_x(), _x(), fp8(t), group_size=128)),
            ("hadamard 512", lambda t: hadamard(_x(), 512)),
        )
    ),
)
