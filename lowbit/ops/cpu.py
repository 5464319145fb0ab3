"""The `cpu` implementation: exact 8-bit products on whatever instructions the CPU has.

int8 × int8 accumulates in int32 and equals the int64 product while that fits in int32
(K < 131,072). fp8 and weight-only products decode to float32 (or bfloat16, where every code
is exact and the CPU multiplies it natively; AMX takes wider activations as sums of bfloat16)
and accumulate in float32, or on request in float64 (`ops.use_float64_sums`), where fp8 × fp8 is
exact too. Weights are read as stored, [N, K]; no second copy is kept.

Without numba, or on processors other than x86-64 with AVX2 and 64-bit Arm, `portable` does the
same in torch: codes as float32, in K blocks whose sums stay below 2²⁴, so that they too are exact.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from lowbit.ops import cpu_call, cpu_threads, reference
from lowbit.ops.cpu_call import DTYPE_CODES, PARALLEL_FROM, Layout, instructions, up
from lowbit.ops.cpu_params import A_E4M3_BYTES, A_I8_BYTES, MODE_E4M3, MODE_INT8, PREPARE, P
from lowbit.ops.problem import Activations, Weights


def quantize(x: Tensor, dtype: torch.dtype, activations: Activations) -> tuple[Tensor, Tensor]:
    """x [M, K] → codes [M, K] of `dtype`, float32 scales [M, groups] (static: those given)."""
    rows, k = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    if not cpu_call.have_numba():
        return reference.quantize(x, dtype, activations)
    layout = Layout.of(k, activations.group, 1)
    codes = torch.empty(rows, k, dtype=dtype)
    scale = torch.empty(rows, layout.groups, dtype=torch.float32)
    if codes.numel():
        from lowbit.ops import cpu_prepare

        integer = dtype == torch.int8
        mode = MODE_INT8 if integer else MODE_E4M3
        threads = torch.get_num_threads() if x.numel() >= PARALLEL_FROM else 1
        slot = up(4 * layout.group, 64)
        static = cpu_call.static_scale(x.dtype, mode, activations)
        block = cpu_call.prepare_block(
            rows, k, x.dtype, x.stride(0) * x.element_size(), kind=A_I8_BYTES if integer else A_E4M3_BYTES,
            layout=layout, row_bytes=k, activations=activations, mode=mode, static=static, extra_rows=0, slot=slot,
            threads=threads,
        )  # fmt: skip
        scratch = cpu_call.workspace(threads * slot)
        block[P.X], block[P.A], block[P.SCALE] = x.data_ptr(), codes.data_ptr(), scale.data_ptr()
        block[P.SCRATCH] = scratch.data_ptr()
        cpu_threads.run(cpu_prepare.prepare(), block, threads)
    return codes, scale


def linear(
    x: Tensor,
    weights: Weights,
    activations: Activations,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    *,
    offsets: list[int] | None = None,
    routed: Tensor | None = None,
) -> Tensor:
    """x [M, K] (floats, or codes with `activations.scale` [M, groups]) → [M, N]; see `ops.linear`.

    With `offsets` (E + 1 row offsets) the weights are [E, N, K] and rows are sorted by expert.
    """
    rows, n = x.shape[0], weights.n
    out = torch.empty(rows, n, dtype=out_dtype)
    if rows == 0 or n == 0:
        return out
    if x.shape[1] == 0:  # nothing but the bias, and no scales to read
        return reference.linear(x, weights, activations, bias, out_dtype, offsets=offsets, routed=routed)
    if instructions().name == "portable":
        from lowbit.ops import cpu_portable

        return cpu_portable.linear(x, weights, activations, bias, out_dtype, offsets=offsets, routed=routed)
    x = x if x.stride(-1) == 1 else x.contiguous()
    call = cpu_call.product(x, weights, activations, bias, out_dtype, offsets=offsets, routed=routed)
    return call.run(x, out)


def hadamard(x: Tensor, length: int) -> Tensor:
    """x [M, K] transformed in blocks of `length` along K, float32 inside; see `ops.hadamard`."""
    if not cpu_call.have_numba():
        from lowbit.ops import cpu_portable

        return cpu_portable.hadamard(x, length)
    from lowbit.ops import cpu_prepare

    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    if not out.numel():
        return out
    threads = torch.get_num_threads() if x.numel() >= PARALLEL_FROM else 1
    slot = up(4 * length, 64)
    scratch = torch.empty(threads * slot, dtype=torch.uint8)
    rows, k = x.shape
    block = PREPARE()
    block[P.ROWS], block[P.K], block[P.GROUP] = rows, k, length
    block[P.X], block[P.X_ROW], block[P.X_DTYPE] = (
        x.data_ptr(),
        x.stride(0) * x.element_size(),
        DTYPE_CODES[x.dtype],
    )
    block[P.A], block[P.A_ROW] = out.data_ptr(), k * out.element_size()
    block[P.SCALE] = int.from_bytes(struct.pack("<f", length**-0.5), "little")
    block[P.SCRATCH], block[P.SLOT_BYTES] = scratch.data_ptr(), slot
    block[P.ROWS_PER_TASK] = max(1, rows * k // length // (8 * threads))
    cpu_threads.run(cpu_prepare.hadamard(), block, threads)
    return out
