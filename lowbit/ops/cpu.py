"""The `cpu` implementation: exact 8-bit products on whatever instructions the CPU has.

int8 × int8 accumulates in int32 and equals the int64 product while that fits in int32
(K < 131,072). fp8 and weight-only products decode to float32 (or bfloat16, where every code
is exact and the CPU multiplies it natively) and accumulate in float32. Weights are read as
stored, [N, K]; no second copy is kept.

Without numba, or on processors other than x86-64 with AVX2, `portable` does the same in
torch: codes as float32, in K blocks whose sums stay below 2²⁴, so that they too are exact.
"""

from __future__ import annotations

import ctypes
import importlib.util
import struct
import threading
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from lowbit.ops import cpu_threads
from lowbit.ops.cpu_isa import Instructions, Tile, detect, float_tile, integer_tile
from lowbit.ops.cpu_params import (
    A_BF16,
    A_E4M3_BYTES,
    A_F32,
    A_I8_BYTES,
    A_I16,
    A_U8,
    BF16,
    E4M3_CODES,
    F16,
    F32,
    I8_CODES,
    MODE_E4M3,
    MODE_INT8,
    MODE_NONE,
    M,
    P,
)
from lowbit.ops.problem import Activations, Weights

_DTYPE = {
    torch.float32: F32,
    torch.float16: F16,
    torch.bfloat16: BF16,
    torch.int8: I8_CODES,
    torch.float8_e4m3fn: E4M3_CODES,
}
_STORAGE = {torch.int8: "i8", torch.float8_e4m3fn: "e4m3", torch.int32: "u8"}
_ELEMENT = {A_I16: 2, A_U8: 1, A_F32: 4, A_BF16: 2, A_I8_BYTES: 1, A_E4M3_BYTES: 1}
# Elements of K per pass: the rows of one tile and of a panel stay in the first two caches.
_CHUNK = {A_I16: 2048, A_U8: 4096, A_F32: 512, A_BF16: 1024}
_BLOCK_ROWS, _BLOCK_COLS = 64, 48
_PARALLEL_FROM = 1 << 16  # elements to prepare before threads are worth waking
_PARALLEL_PRODUCT = 1 << 18  # multiplications that are worth it
_WORKSPACE_KEPT = 64 << 20

_local = threading.local()


@cache
def _have_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


@cache
def instructions() -> Instructions:
    """What products use here; `portable` where numba is missing. The environment is read once."""
    found = detect()
    return found if _have_numba() else Instructions(name="portable")


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _workspace(size: int) -> Tensor:
    """Scratch of this thread; kept for the next call unless it is large."""
    kept = getattr(_local, "workspace", None)
    if kept is None or kept.numel() < size:
        kept = torch.empty(size, dtype=torch.uint8)
        if size <= _WORKSPACE_KEPT:
            _local.workspace = kept
    return kept


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """How K is cut: `groups` of `group` elements, each padded to `padded` in the operand."""

    group: int
    padded: int
    groups: int

    @classmethod
    def of(cls, k: int, group: int, step: int) -> _Layout:
        group = max(min(group, k), 1) if group else max(k, 1)
        return cls(group=group, padded=_up(group, step), groups=-(-k // group))

    @property
    def width(self) -> int:
        return self.groups * self.padded


def _prepare(
    x: Tensor, *, target: int, kind: int, layout: _Layout, row_bytes: int, activations: Activations,
    mode: int, scale_out: int, ones: int, extra_rows: int,
) -> None:  # fmt: skip
    from lowbit.ops import cpu_kernels

    rows, k = x.shape
    threads = torch.get_num_threads() if x.numel() >= _PARALLEL_FROM else 1
    slot = _up(4 * layout.group, 64)
    scratch = torch.empty(threads * slot, dtype=torch.uint8)
    block = (ctypes.c_int64 * 32)()
    block[P.ROWS], block[P.K] = rows, k
    block[P.GROUP], block[P.GROUP_PADDED] = layout.group, layout.padded
    block[P.X], block[P.X_ROW], block[P.X_DTYPE] = (
        x.data_ptr(),
        x.stride(0) * x.element_size(),
        _DTYPE[x.dtype],
    )
    block[P.A], block[P.A_ROW], block[P.A_KIND], block[P.MODE] = target, row_bytes, kind, mode
    static = None
    if x.dtype in (torch.int8, torch.float8_e4m3fn):
        static = _one()
    elif mode != MODE_NONE and not activations.dynamic:
        static = activations.static_scale()
        block[P.SHIFT] = activations.zero_point
    # Symmetric codes stay in ±127; given codes may be anything.
    block[P.LOWEST] = -127 if activations.zero is None and x.dtype != torch.int8 else -128
    block[P.STATIC] = static.data_ptr() if static is not None else 0
    block[P.ZERO] = activations.zero_point
    block[P.SCALE], block[P.POWER_OF_2] = scale_out, int(activations.power_of_2)
    block[P.SCRATCH], block[P.SLOT_BYTES], block[P.ONES] = scratch.data_ptr(), slot, ones
    block[P.ROWS_PER_TASK] = max(1, rows // (4 * threads))
    block[P.ROWS_PADDED] = rows + extra_rows
    cpu_threads.run(cpu_kernels.prepare(), block, threads)


@cache
def _one() -> Tensor:
    return torch.ones(1, dtype=torch.float32)


def quantize(x: Tensor, dtype: torch.dtype, activations: Activations) -> tuple[Tensor, Tensor]:
    """x [M, K] → codes [M, K] of `dtype`, float32 scales [M, groups] (static: those given)."""
    rows, k = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    if not _have_numba():
        from lowbit.ops import reference

        return reference.quantize(x, dtype, activations)
    layout = _Layout.of(k, activations.group, 1)
    codes = torch.empty(rows, k, dtype=dtype)
    scale = torch.empty(rows, layout.groups, dtype=torch.float32)
    if codes.numel():
        integer = dtype == torch.int8
        _prepare(
            x, target=codes.data_ptr(), kind=A_I8_BYTES if integer else A_E4M3_BYTES, layout=layout,
            row_bytes=k, activations=activations, mode=MODE_INT8 if integer else MODE_E4M3,
            scale_out=scale.data_ptr(), ones=0, extra_rows=0,
        )  # fmt: skip
    return codes, scale


def _blocks(rows: int, height: int, offsets: list[int] | None) -> list[int]:
    """Flat (expert, first row, rows) of every block of at most `height` rows."""
    if offsets is None:
        offsets = [0, rows]
    flat: list[int] = []
    for expert, (start, end) in enumerate(pairwise(offsets)):
        for first in range(start, end, height):
            flat += (expert, first, min(height, end - first))
    return flat


def _tile_for(x: Tensor, weights: Weights, activations: Activations, rows: int) -> tuple[Tile, int, int]:
    """(tile, operand kind, quantization mode) of a product."""
    have = instructions()
    quantizes = activations.kind != "none"
    if quantizes and weights.tensor.dtype == torch.int8:
        tile = integer_tile(have)
        return tile, A_U8 if tile.kind.startswith("dpbusd") else A_I16, MODE_INT8
    # e4m3 codes and bfloat16 activations are both exact in bfloat16.
    tile = float_tile(have, rows, bfloat_exact=quantizes or x.dtype == torch.bfloat16)
    codes = x.dtype == torch.float8_e4m3fn
    mode = MODE_E4M3 if quantizes and not codes else MODE_NONE
    return tile, A_F32 if tile.kind.startswith("fma") else A_BF16, mode


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
    rows, k = x.shape
    n = weights.n
    out = torch.empty(rows, n, dtype=out_dtype)
    if rows == 0 or n == 0:
        return out
    if instructions().name == "portable":
        from lowbit.ops import cpu_portable

        return cpu_portable.linear(x, weights, activations, bias, out_dtype, offsets=offsets, routed=routed)
    from lowbit.ops import cpu_kernels
    from lowbit.ops.cpu_emit import operand_step

    x = x if x.stride(-1) == 1 else x.contiguous()
    tensor = weights.tensor if weights.tensor.is_contiguous() else weights.tensor.contiguous()
    w_scale = weights.float_scale()
    tile, kind, mode = _tile_for(x, weights, activations, rows)
    step, element = operand_step(tile.kind), _ELEMENT[kind]
    layout = _Layout.of(k, activations.group or weights.group, step)
    codes = x.dtype in (torch.int8, torch.float8_e4m3fn)

    # One workspace: operand rows (and spare ones to fill the last tile), a row of ones, scales.
    row_bytes = layout.width * element
    unsigned = tile.kind.startswith("dpbusd")
    a_bytes = _up((rows + tile.rows) * row_bytes, 64)
    ones_bytes = _up(row_bytes, 64) if unsigned else 0
    scale_bytes = _up(4 * rows * layout.groups, 64)
    height = min(_BLOCK_ROWS // tile.rows * tile.rows, _up(rows, tile.rows))
    threads = torch.get_num_threads() if rows * n * k >= _PARALLEL_PRODUCT else 1
    width = min(_BLOCK_COLS, _up(-(-n // (4 * threads)), 24))
    chunk = min(_up(_CHUNK[kind], step), layout.padded)
    slot = _up(
        8 * height * width
        + 16 * width
        + width * chunk * (1 if mode == MODE_INT8 or unsigned or kind == A_I16 else element),
        64,
    )
    memory = _workspace(a_bytes + ones_bytes + scale_bytes + threads * slot)
    base = memory.data_ptr()
    ones = base + a_bytes if unsigned else 0
    scales, scratch = base + a_bytes + ones_bytes, base + a_bytes + ones_bytes + scale_bytes
    _prepare(
        x, target=base, kind=kind, layout=layout, row_bytes=row_bytes, activations=activations, mode=mode,
        scale_out=0 if mode == MODE_NONE or codes else scales, ones=ones, extra_rows=tile.rows,
    )  # fmt: skip

    flat = _blocks(rows, height, offsets)
    blocks = (ctypes.c_int64 * max(len(flat), 1))(*flat)
    block = (ctypes.c_int64 * 48)()
    block[M.A], block[M.A_ROW], block[M.ONES] = base, row_bytes, ones
    block[M.W], block[M.W_ROW] = tensor.data_ptr(), tensor.stride(-2) * tensor.element_size()
    block[M.W_EXPERT] = tensor.stride(0) * tensor.element_size() if offsets is not None else 0
    block[M.W_END] = tensor.data_ptr() + tensor.numel() * tensor.element_size()
    block[M.OUT], block[M.OUT_ROW], block[M.OUT_DTYPE] = (
        out.data_ptr(),
        n * out.element_size(),
        _DTYPE[out_dtype],
    )
    if codes and activations.scale is not None:
        a_scale = activations.scale.contiguous()
        per_row = 0 if a_scale.numel() == 1 else layout.groups if activations.group else 1
        block[M.A_SCALE], block[M.A_SCALE_ROW] = a_scale.data_ptr(), per_row
        block[M.A_SCALE_GROUP] = 1 if activations.group else 0
    elif mode != MODE_NONE:
        block[M.A_SCALE], block[M.A_SCALE_ROW], block[M.A_SCALE_GROUP] = scales, layout.groups, 1
    block[M.W_SCALE] = w_scale.data_ptr()
    block[M.W_SCALE_ROWS] = weights.block[0] or n
    block[M.W_SCALE_ROW], block[M.W_SCALE_GROUP], block[M.W_SCALE_EXPERT] = weights.scale_strides(w_scale)
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
        block[M.BIAS], block[M.BIAS_EXPERT] = bias.data_ptr(), n if bias.dim() > 1 else 0
    if routed is not None:
        routed = routed.to(torch.float32).contiguous()
        block[M.ROUTED] = routed.data_ptr()
    block[M.BLOCKS], block[M.BLOCK_COUNT] = ctypes.addressof(blocks), len(flat) // 3
    block[M.N], block[M.K] = n, k
    block[M.GROUP], block[M.GROUP_PADDED], block[M.CHUNK] = layout.group, layout.padded, chunk
    block[M.PER_GROUP] = int(bool(activations.group or weights.group))
    block[M.ZERO] = 128 + activations.zero_point if unsigned else 0
    block[M.SCRATCH], block[M.SLOT_BYTES] = scratch, slot
    block[M.BLOCK_ROWS], block[M.BLOCK_COLS] = height, width
    function = cpu_kernels.matmul(tile.kind, _STORAGE[tensor.dtype], tile.rows, tile.cols)
    cpu_threads.run(function, block, threads)
    return out


def hadamard(x: Tensor, length: int) -> Tensor:
    """x [M, K] transformed in blocks of `length` along K, float32 inside; see `ops.hadamard`."""
    if not _have_numba():
        from lowbit.ops import cpu_portable

        return cpu_portable.hadamard(x, length)
    from lowbit.ops import cpu_kernels

    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    if not out.numel():
        return out
    threads = torch.get_num_threads() if x.numel() >= _PARALLEL_FROM else 1
    slot = _up(4 * length, 64)
    scratch = torch.empty(threads * slot, dtype=torch.uint8)
    rows, k = x.shape
    block = (ctypes.c_int64 * 32)()
    block[P.ROWS], block[P.K], block[P.GROUP] = rows, k, length
    block[P.X], block[P.X_ROW], block[P.X_DTYPE] = (
        x.data_ptr(),
        x.stride(0) * x.element_size(),
        _DTYPE[x.dtype],
    )
    block[P.A], block[P.A_ROW] = out.data_ptr(), k * out.element_size()
    block[P.SCALE] = int.from_bytes(struct.pack("<f", length**-0.5), "little")
    block[P.SCRATCH], block[P.SLOT_BYTES] = scratch.data_ptr(), slot
    block[P.ROWS_PER_TASK] = max(1, rows * k // length // (8 * threads))
    cpu_threads.run(cpu_kernels.hadamard(), block, threads)
    return out
