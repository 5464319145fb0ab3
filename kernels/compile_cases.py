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


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of one kernel."""

    name: str
    """How the table names it."""
    call: Callable[[Target], object]
    """Runs the kernel's function on meta tensors. ValueError: the target refuses it."""
    product: Literal["int8", "fp8", "float", "none"]
    """What its matrix instruction should multiply where the target can."""


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def fp8(target: Target) -> torch.dtype:
    """The fp8 that the target multiplies; e4m3fn, and so a refusal, where it has none."""
    return torch.float8_e4m3fnuz if target.fp8 == "e4m3fnuz" else torch.float8_e4m3fn


def _codes(kind: str, target: Target) -> torch.dtype:
    return torch.int8 if kind == "int8" else fp8(target)


def _matmul(kind: str, m: int, n: int = N, k: int = K, **options: object) -> Callable[[Target], object]:
    def call(target: Target) -> object:
        dtype = _codes(kind, target)
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


def _block(kind: str, m: int, n: int = N, k: int = K, rows: int = 128) -> Callable[[Target], object]:
    def call(target: Target) -> object:
        dtype = _codes(kind, target)
        groups = -(-k // 128)
        return matmul_block(
            empty(m, k, dtype=dtype), empty(n, k, dtype=dtype), empty(groups, m).t(),
            empty(-(-n // rows), groups), block_shape=(rows, 128),
        )  # fmt: skip

    return call


def _weight_only(
    x: torch.dtype, w: torch.dtype, m: int, block_shape: tuple[int, int] | None
) -> Callable[[Target], object]:
    def call(target: Target) -> object:
        rows, cols = block_shape or (1, K)
        w_scale = empty(N // rows, K // cols)
        return matmul_weight_only(
            empty(m, K, dtype=x), empty(N, K, dtype=w), w_scale, block_shape=block_shape
        )

    return call


def _grouped(kind: str, block: bool, tokens: int) -> Callable[[Target], object]:
    def call(target: Target) -> object:
        weight_only = kind == "bf16 × fp8"
        dtype = torch.float8_e4m3fn if weight_only else _codes(kind, target)
        a = empty(tokens, K, dtype=torch.bfloat16 if weight_only else dtype)
        groups = K // 128
        a_scale = None if weight_only else empty(groups, tokens).t() if block else empty(tokens, 1)
        return matmul_grouped(
            a, empty(EXPERTS, N, K, dtype=dtype), empty(EXPERTS + 1, dtype=torch.int32), a_scale,
            empty(EXPERTS, N // 128, groups) if block else empty(EXPERTS, N, 1),
            block_shape=(128, 128) if block else None, routed_weight=empty(tokens),
        )  # fmt: skip

    return call


def _mxfp8(m: int, n: int = N) -> Callable[[Target], object]:
    def call(target: Target) -> object:
        a, w = (empty(rows, K, dtype=torch.float8_e4m3fn) for rows in (m, n))
        scales = (empty(rows, K // 32, dtype=torch.uint8) for rows in (m, n))
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
            ("decode", _matmul(kind, 1)),
            ("M=64", _matmul(kind, 64)),
            ("prefill", _matmul(kind, TOKENS)),
            ("unaligned, bias", _matmul(kind, 1000, 576, 7161, bias=True)),
            ("prefill, N=1000", _matmul(kind, TOKENS, 1000, bias=True)),
        )
    ),
    Case(
        name="matmul fp8 fast accumulation prefill",
        call=_matmul("fp8", TOKENS, fast_accum=True),
        product="fp8",
    ),
    Case(
        name="matmul int8 zero point",
        call=_matmul("int8", TOKENS, bias=True, zero_point=True),
        product="int8",
    ),
    *(
        Case(name=f"matmul_block {kind} {name}", call=call, product=kind)
        for kind in ("int8", "fp8")
        for name, call in (
            ("decode", _block(kind, 1)),
            ("prefill", _block(kind, TOKENS)),
            ("ragged, unaligned", _block(kind, 1000, 576, 7161)),
            ("groups, prefill", _block(kind, TOKENS, rows=1)),
            ("groups, unaligned", _block(kind, 64, 576, 7161, rows=1)),
        )
    ),
    *(
        Case(name=f"matmul_weight_only {name}", call=call, product="float")
        for name, call in (
            ("bf16 × int8 decode", _weight_only(_BF16, torch.int8, 1, None)),
            ("bf16 × int8 prefill", _weight_only(_BF16, torch.int8, TOKENS, None)),
            ("bf16 × packed int8, group 128", _weight_only(_BF16, torch.uint8, 1, (1, 128))),
            ("bf16 × packed int8, group 128, prefill", _weight_only(_BF16, torch.uint8, TOKENS, (1, 128))),
            ("bf16 × fp8 block decode", _weight_only(_BF16, _E4M3, 1, (128, 128))),
            ("bf16 × fp8 block prefill", _weight_only(_BF16, _E4M3, TOKENS, (128, 128))),
            ("fp32 × int8 prefill", _weight_only(_FP32, torch.int8, TOKENS, None)),
        )
    ),
    *(
        Case(name=f"matmul_grouped {kind} {'block' if block else 'channel'} {name}", call=call, product=kind)
        for kind in ("int8", "fp8")
        for block in (False, True)
        for name, call in (
            ("decode", _grouped(kind, block, 128)),
            ("prefill", _grouped(kind, block, TOKENS * 8)),
        )
    ),
    Case(name="matmul_grouped bf16 × fp8 block", call=_grouped("bf16 × fp8", True, TOKENS), product="float"),
    Case(name="matmul_mxfp8 decode", call=_mxfp8(1), product="fp8"),
    Case(name="matmul_mxfp8 prefill", call=_mxfp8(TOKENS), product="fp8"),
    Case(name="matmul_mxfp8 prefill, N=1000", call=_mxfp8(TOKENS, 1000), product="fp8"),
    *(
        Case(name=name, call=call, product="none")
        for name, call in (
            ("quantize_per_token int8", lambda t: quantize_per_token(_x())),
            ("quantize_per_token fp8", lambda t: quantize_per_token(_x(), fp8(t))),
            ("quantize_per_group int8", lambda t: quantize_per_group(_x(), column_major=True)),
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
            ("silu_mul_quantize int8", lambda t: silu_mul_quantize(*_x(4096).chunk(2, dim=-1))),
            ("silu_mul_quantize fp8 group", lambda t: silu_mul_quantize(_x(), _x(), fp8(t), group_size=128)),
            ("hadamard 512", lambda t: hadamard(_x(), 512)),
        )
    ),
)
