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
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

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

_KEPT_ROWS, _KEPT_CALLS = 16, 4096

_PREPARE, _MATMUL = ctypes.c_int64 * len(P), ctypes.c_int64 * len(M)
# As plain numbers: a member of an enum costs several times as much as an index.
_P_X, _P_A, _P_SCALE, _P_SCRATCH, _P_ONES = (int(p) for p in (P.X, P.A, P.SCALE, P.SCRATCH, P.ONES))
_M_A, _M_OUT, _M_ONES, _M_A_SCALE, _M_SCRATCH = (int(m) for m in (M.A, M.OUT, M.ONES, M.A_SCALE, M.SCRATCH))
_M_BLOCKS, _M_BLOCK_COUNT, _M_BLOCK_ROWS = int(M.BLOCKS), int(M.BLOCK_COUNT), int(M.BLOCK_ROWS)

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


def _prepare_block(
    rows: int, k: int, x_dtype: torch.dtype, x_row: int, *, kind: int, layout: _Layout, row_bytes: int,
    activations: Activations, mode: int, static: Tensor | None, extra_rows: int, slot: int, threads: int,
) -> ctypes.Array[ctypes.c_int64]:  # fmt: skip
    """The parameters of `prepare`, but for the addresses of x, of what is written, and of scratch."""
    block = _PREPARE()
    block[P.ROWS], block[P.K] = rows, k
    block[P.GROUP], block[P.GROUP_PADDED] = layout.group, layout.padded
    block[P.X_ROW], block[P.X_DTYPE] = x_row, _DTYPE[x_dtype]
    block[P.A_ROW], block[P.A_KIND], block[P.MODE] = row_bytes, kind, mode
    codes = x_dtype in (torch.int8, torch.float8_e4m3fn)
    if not codes and static is not None:
        block[P.SHIFT] = activations.zero_point
    # Symmetric codes stay in ±127; given codes may be anything.
    block[P.LOWEST] = -127 if activations.zero is None and x_dtype != torch.int8 else -128
    block[P.STATIC] = static.data_ptr() if static is not None else 0
    block[P.ZERO] = activations.zero_point
    block[P.POWER_OF_2], block[P.SLOT_BYTES] = int(activations.power_of_2), slot
    block[P.ROWS_PER_TASK] = max(1, rows // (4 * threads))
    block[P.ROWS_PADDED] = rows + extra_rows
    return block


def _static_scale(x_dtype: torch.dtype, mode: int, activations: Activations) -> Tensor | None:
    """The scale [1] that x is divided by, where it is known before x is."""
    if x_dtype in (torch.int8, torch.float8_e4m3fn):
        return _one()
    return activations.static_scale() if mode != MODE_NONE and not activations.dynamic else None


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
        from lowbit.ops import cpu_kernels

        integer = dtype == torch.int8
        mode = MODE_INT8 if integer else MODE_E4M3
        threads = torch.get_num_threads() if x.numel() >= _PARALLEL_FROM else 1
        slot = _up(4 * layout.group, 64)
        static = _static_scale(x.dtype, mode, activations)
        block = _prepare_block(
            rows, k, x.dtype, x.stride(0) * x.element_size(), kind=A_I8_BYTES if integer else A_E4M3_BYTES,
            layout=layout, row_bytes=k, activations=activations, mode=mode, static=static, extra_rows=0, slot=slot,
            threads=threads,
        )  # fmt: skip
        scratch = _workspace(threads * slot)
        block[P.X], block[P.A], block[P.SCALE] = x.data_ptr(), codes.data_ptr(), scale.data_ptr()
        block[P.SCRATCH] = scratch.data_ptr()
        cpu_threads.run(cpu_kernels.prepare(), block, threads)
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


@dataclass(frozen=True, kw_only=True)
class _Call:
    """A product ready to run, but for the addresses of x, of the output and of the workspace.

    Filling in the parameters costs more than a small product, so those of products with few rows
    are kept and used again.
    """

    prepare: bytes
    matmul: bytes
    function: Any
    workspace: int
    """Bytes. The operand stands at its beginning; the rest at these offsets:"""
    ones: int
    scales: int
    scratch: int
    own_scales: bool
    """Scales of activations are computed on the way, into the workspace."""
    write_scales: bool
    prepare_threads: int
    threads: int
    alive: tuple[Tensor | None, ...]
    """Tensors made for this call whose addresses it holds."""


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
    if instructions().name == "portable":
        from lowbit.ops import cpu_portable

        return cpu_portable.linear(x, weights, activations, bias, out_dtype, offsets=offsets, routed=routed)
    x = x if x.stride(-1) == 1 else x.contiguous()
    if rows > _KEPT_ROWS or offsets is not None or not _holds_addresses(x, weights, activations, bias):
        call = _call_for(x, weights, activations, bias, out_dtype, offsets)
    else:
        key = (
            rows, x.stride(0), x.dtype, out_dtype, weights.tensor.data_ptr(), weights.tensor.shape,
            weights.tensor.dtype, weights.k, weights.scale.data_ptr(), weights.block,
            0 if bias is None else bias.data_ptr(), activations.kind, activations.group, activations.power_of_2,
            torch.get_num_threads(),
        )  # fmt: skip
        calls = _local.__dict__.setdefault("calls", {})
        found = calls.get(key)
        if found is None:
            if len(calls) >= _KEPT_CALLS:
                calls.clear()
            # No tensor is kept alive: the addresses are those in the key.
            found = calls[key] = replace(_call_for(x, weights, activations, bias, out_dtype, None), alive=())
        call = found
    return _run(call, x, out, rows, offsets, routed)


def _holds_addresses(x: Tensor, weights: Weights, activations: Activations, bias: Tensor | None) -> bool:
    """Whether a call's parameters hold only addresses of the tensors given, and depend on no value in them."""
    return (
        activations.kind != "tensor"
        and x.dtype not in (torch.int8, torch.float8_e4m3fn)
        and weights.tensor.is_contiguous()
        and weights.scale.dtype == torch.float32
        and weights.scale.is_contiguous()
        and (bias is None or (bias.dtype == torch.float32 and bias.is_contiguous()))
    )


def _call_for(
    x: Tensor,
    weights: Weights,
    activations: Activations,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    offsets: list[int] | None,
) -> _Call:
    from lowbit.ops import cpu_kernels
    from lowbit.ops.cpu_emit import operand_step

    (rows, k), n = x.shape, weights.n
    tensor = weights.tensor if weights.tensor.is_contiguous() else weights.tensor.contiguous()
    w_scale = weights.float_scale()
    tile, kind, mode = _tile_for(x, weights, activations, rows)
    step, element = operand_step(tile.kind), _ELEMENT[kind]
    layout = _Layout.of(k, activations.group or weights.group, step)
    codes = x.dtype in (torch.int8, torch.float8_e4m3fn)

    # One workspace: operand rows (and spare ones to fill the last tile), a row of ones, scales, scratch.
    row_bytes = layout.width * element
    unsigned = tile.kind.startswith("dpbusd")
    a_bytes = _up((rows + tile.rows) * row_bytes, 64)
    ones_bytes = _up(row_bytes, 64) if unsigned else 0
    scale_bytes = _up(4 * rows * layout.groups, 64)
    height = min(_BLOCK_ROWS // tile.rows * tile.rows, _up(rows, tile.rows))
    threads = torch.get_num_threads() if rows * n * k >= _PARALLEL_PRODUCT else 1
    prepare_threads = torch.get_num_threads() if x.numel() >= _PARALLEL_FROM else 1
    width = min(_BLOCK_COLS, _up(-(-n // (4 * threads)), 24))
    chunk = min(_up(_CHUNK[kind], step), layout.padded)
    slot = _up(
        8 * height * width
        + 16 * width
        + width * chunk * (1 if mode == MODE_INT8 or unsigned or kind == A_I16 else element),
        64,
    )
    prepare_slot = _up(4 * layout.group, 64)
    static = _static_scale(x.dtype, mode, activations)
    prepare = _prepare_block(
        rows, k, x.dtype, x.stride(0) * x.element_size(), kind=kind, layout=layout, row_bytes=row_bytes,
        activations=activations, mode=mode, static=static, extra_rows=tile.rows, slot=prepare_slot,
        threads=prepare_threads,
    )  # fmt: skip

    block = _MATMUL()
    block[M.A_ROW] = row_bytes
    block[M.W], block[M.W_ROW] = tensor.data_ptr(), tensor.stride(-2) * tensor.element_size()
    block[M.W_EXPERT] = tensor.stride(0) * tensor.element_size() if offsets is not None else 0
    block[M.W_END] = tensor.data_ptr() + tensor.numel() * tensor.element_size()
    block[M.OUT_ROW], block[M.OUT_DTYPE] = n * out_dtype.itemsize, _DTYPE[out_dtype]
    a_scale = None
    if codes and activations.scale is not None:
        a_scale = activations.scale.contiguous()
        per_row = 0 if a_scale.numel() == 1 else layout.groups if activations.group else 1
        block[M.A_SCALE], block[M.A_SCALE_ROW] = a_scale.data_ptr(), per_row
        block[M.A_SCALE_GROUP] = 1 if activations.group else 0
    elif mode != MODE_NONE:
        block[M.A_SCALE_ROW], block[M.A_SCALE_GROUP] = layout.groups, 1
    block[M.W_SCALE] = w_scale.data_ptr()
    block[M.W_SCALE_ROWS] = weights.block[0] or n
    block[M.W_SCALE_ROW], block[M.W_SCALE_GROUP], block[M.W_SCALE_EXPERT] = weights.scale_strides(w_scale)
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
        block[M.BIAS], block[M.BIAS_EXPERT] = bias.data_ptr(), n if bias.dim() > 1 else 0
    block[M.N], block[M.K] = n, k
    block[M.GROUP], block[M.GROUP_PADDED], block[M.CHUNK] = layout.group, layout.padded, chunk
    block[M.PER_GROUP] = int(bool(activations.group or weights.group))
    block[M.ZERO] = 128 + activations.zero_point if unsigned else 0
    block[M.SLOT_BYTES] = slot
    block[M.BLOCK_ROWS], block[M.BLOCK_COLS] = height, width
    scales, scratch = a_bytes + ones_bytes, a_bytes + ones_bytes + scale_bytes
    return _Call(
        prepare=bytes(prepare), matmul=bytes(block),
        function=cpu_kernels.matmul(tile.kind, _STORAGE[tensor.dtype], tile.rows, tile.cols),
        workspace=scratch + max(threads * slot, prepare_threads * prepare_slot),
        ones=a_bytes if unsigned else 0, scales=scales, scratch=scratch,
        own_scales=mode != MODE_NONE and a_scale is None, write_scales=mode != MODE_NONE and not codes,
        prepare_threads=prepare_threads, threads=threads, alive=(tensor, w_scale, bias, a_scale, static),
    )  # fmt: skip


def _run(
    call: _Call, x: Tensor, out: Tensor, rows: int, offsets: list[int] | None, routed: Tensor | None
) -> Tensor:
    from lowbit.ops import cpu_kernels

    memory = _workspace(call.workspace)
    base = memory.data_ptr()
    prepare = _PREPARE.from_buffer_copy(call.prepare)
    prepare[_P_X], prepare[_P_A], prepare[_P_SCRATCH] = x.data_ptr(), base, base + call.scratch
    if call.write_scales:
        prepare[_P_SCALE] = base + call.scales
    block = _MATMUL.from_buffer_copy(call.matmul)
    if call.ones:
        prepare[_P_ONES] = block[_M_ONES] = base + call.ones
    cpu_threads.run(cpu_kernels.prepare(), prepare, call.prepare_threads)

    flat = _blocks(rows, block[_M_BLOCK_ROWS], offsets)
    blocks = (ctypes.c_int64 * max(len(flat), 1))(*flat)
    block[_M_A], block[_M_OUT], block[_M_SCRATCH] = base, out.data_ptr(), base + call.scratch
    if call.own_scales:
        block[_M_A_SCALE] = base + call.scales
    if routed is not None:
        routed = routed.to(torch.float32).contiguous()
        block[M.ROUTED] = routed.data_ptr()
    block[_M_BLOCKS], block[_M_BLOCK_COUNT] = ctypes.addressof(blocks), len(flat) // 3
    cpu_threads.run(call.function, block, call.threads)
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
    block = _PREPARE()
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
