"""One product on the CPU, ready to run: the parameter blocks of `prepare` and `matmul`, filled in.

Filling them in costs more than a small product, so `ops.cpu` keeps calls and runs them again.
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lowbit.ops import cpu_threads
from lowbit.ops.cpu_isa import Instructions, Tile, detect, float_tile, integer_tile
from lowbit.ops.cpu_panels import Pack, blocks_of, panel_rows, table
from lowbit.ops.cpu_params import (
    A_BF16,
    A_E4M3_BYTES,
    A_F32,
    A_I8,
    A_I8_BYTES,
    A_I16,
    BF16,
    E4M3_CODES,
    F16,
    F32,
    I8_CODES,
    MATMUL,
    MODE_E4M3,
    MODE_INT8,
    MODE_NONE,
    PANEL_ROWS,
    PREPARE,
    SCALE_LANES,
    M,
    P,
)
from lowbit.ops.problem import Activations, Weights
from lowbit.ops.settings import settings

DTYPE_CODES = {
    torch.float32: F32,
    torch.float16: F16,
    torch.bfloat16: BF16,
    torch.int8: I8_CODES,
    torch.float8_e4m3fn: E4M3_CODES,
}
CODES = (torch.int8, torch.float8_e4m3fn)
# bfloat16 has 8 bits of significand, float16 has 11 and float32 24.
PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
PARALLEL_FROM = 1 << 16  # elements to prepare before threads are worth waking
_PARALLEL_PRODUCT = 1 << 18  # multiplications that are worth it
_STORAGE = {torch.int8: "i8", torch.float8_e4m3fn: "e4m3", torch.int32: "u8", torch.bfloat16: "bf16"}
_ELEMENT = {A_I16: 2, A_I8: 1, A_F32: 4, A_BF16: 2, A_I8_BYTES: 1, A_E4M3_BYTES: 1}
# Elements of K per pass: a panel of weights stays in the second cache, the rows of a tile in the first.
_CHUNK = {A_I16: 1024, A_I8: 2048, A_F32: 512, A_BF16: 1024}
_PAIRED_CHUNK = 512  # both operands in the first: more loads go with a product there
_BLOCK_ROWS, _BLOCK_COLS = 192, 64
_WORKSPACE_KEPT = 64 << 20
_MATRIX_ROWS, _MATRIX_BYTES = 256, 1 << 20  # of the operand, per block
_MATRIX_CHUNK = {A_I8: 4096, A_BF16: 2048}

# What `Call.run` writes at every call: not looked up in the classes there.
_P_NEXT, _P_SLOT, _P_X, _P_A = P.NEXT, P.SLOT, P.X, P.A
_P_SCALE, _P_SCRATCH, _P_SUMS = P.SCALE, P.SCRATCH, P.SUMS
_M_NEXT, _M_SLOT, _M_A, _M_OUT = M.NEXT, M.SLOT, M.A, M.OUT
_M_A_PANELS, _M_A_SUM, _M_A_SCALE, _M_SCRATCH = M.A_PANELS, M.A_SUM, M.A_SCALE, M.SCRATCH

_local = threading.local()


@cache
def have_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


@cache
def instructions() -> Instructions:
    """What products use here; `portable` where numba is missing. The environment is read once."""
    found = detect()
    return found if have_numba() else Instructions(name="portable")


def up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def workspace(size: int) -> Tensor:
    """Scratch of this thread; kept for the next call unless it is large."""
    kept = getattr(_local, "workspace", None)
    if kept is None or kept.numel() < size:
        kept = torch.empty(size, dtype=torch.uint8)
        if size <= _WORKSPACE_KEPT:
            _local.workspace = kept
    return kept


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How K is cut: `groups` of `group` elements, each padded to `padded` in the operand."""

    group: int
    padded: int
    groups: int

    @classmethod
    def of(cls, k: int, group: int, step: int) -> Layout:
        group = max(min(group, k), 1) if group else max(k, 1)
        return cls(group=group, padded=up(group, step), groups=-(-k // group))

    @property
    def width(self) -> int:
        return self.groups * self.padded


def prepare_block(
    rows: int, k: int, x_dtype: torch.dtype, x_row: int, *, kind: int, layout: Layout, row_bytes: int,
    activations: Activations, mode: int, static: Tensor | None, extra_rows: int, slot: int, threads: int,
    parts: int = 1,
) -> ctypes.Array[ctypes.c_int64]:  # fmt: skip
    """The parameters of `prepare`, but for the addresses of x, of what is written, and of scratch."""
    block = PREPARE()
    block[P.ROWS], block[P.K] = rows, k
    block[P.GROUP], block[P.GROUP_PADDED] = layout.group, layout.padded
    block[P.X_ROW], block[P.X_DTYPE] = x_row, DTYPE_CODES[x_dtype]
    block[P.A_ROW], block[P.A_KIND], block[P.MODE] = row_bytes, kind, mode
    codes = x_dtype in CODES
    if not codes and static is not None:
        block[P.SHIFT] = activations.zero_point
    # Symmetric codes stay in ±127; given codes may be anything.
    block[P.LOWEST] = -127 if activations.zero is None and x_dtype != torch.int8 else -128
    block[P.STATIC] = static.data_ptr() if static is not None else 0
    block[P.ZERO] = activations.zero_point
    block[P.POWER_OF_2], block[P.SLOT_BYTES] = int(activations.power_of_2), slot
    block[P.ROWS_PER_TASK] = max(1, rows // (4 * threads))
    block[P.ROWS_PADDED], block[P.PARTS] = rows + extra_rows, parts
    return block


def static_scale(x_dtype: torch.dtype, mode: int, activations: Activations) -> Tensor | None:
    """The scale [1] that x is divided by, where it is known before x is."""
    if x_dtype in CODES:
        return _one()
    return activations.static_scale() if mode != MODE_NONE and not activations.dynamic else None


@cache
def _one() -> Tensor:
    return torch.ones(1, dtype=torch.float32)


def typical_rows(rows: int, experts: int) -> int:
    """Rows that one weight is multiplied with: of a mixture's, those of one expert."""
    return -(-rows // max(experts, 1))


def _tile_for(x: Tensor, weights: Weights, activations: Activations, rows: int) -> tuple[Tile, int, int]:
    """(tile, operand kind, quantization mode) of a product."""
    have = instructions()
    quantizes, grouped = activations.kind != "none", bool(activations.group or weights.group)
    if quantizes and weights.tensor.dtype == torch.int8:
        tile = integer_tile(have, rows, zero_point=activations.zero is not None, grouped=grouped)
        return tile, A_I16 if tile.wide_codes else A_I8, MODE_INT8
    # All weights and e4m3 codes are exact in bfloat16.
    tile = float_tile(
        have, rows, weight=weights.tensor.dtype, parts=1 if quantizes else PARTS[x.dtype], grouped=grouped,
        float64=settings.float64_sums,
    )  # fmt: skip
    codes = x.dtype == torch.float8_e4m3fn
    mode = MODE_E4M3 if quantizes and not codes else MODE_NONE
    return tile, A_F32 if tile.kind.startswith("fma") else A_BF16, mode


def _block(rows: int, n: int, tile: Tile, threads: int, row_bytes: int) -> tuple[int, int]:
    """Rows and columns of the output per task: weights are packed or decoded once per task, so many
    rows; but every thread should find several tasks, and AMX wants the operand in the second cache."""
    if tile.matrix:
        height = max(_MATRIX_ROWS // 4, min(_MATRIX_ROWS, _MATRIX_BYTES // max(row_bytes, 1) // 32 * 32))
        # A single panel waits for memory, which hands over few rows of weights at a time faster than many.
        many = rows > PANEL_ROWS and -(-n // _BLOCK_COLS) * -(-rows // height) >= threads
        width = _BLOCK_COLS if many else _BLOCK_COLS // 2
        return min(height, up(rows, PANEL_ROWS)), width
    width = up(_BLOCK_COLS, tile.cols)
    if rows <= tile.dot_rows:
        width = min(width, up(-(-n // (4 * threads)), SCALE_LANES))
    across = -(-n // width)
    height = min(_BLOCK_ROWS, up(rows, tile.rows))
    while threads > 1 and height > 8 * tile.rows and across * -(-rows // height) < 4 * threads:
        height = up(height // 2, tile.rows)
    return height, width


@dataclass(kw_only=True, slots=True)
class Call:
    """A product ready to run, but for the addresses of x, of the output and of the workspace.

    `run` writes those into the parameter blocks: one thread at a time.
    """

    prepare: ctypes.Array[ctypes.c_int64]
    pack: Pack | None
    matmul: ctypes.Array[ctypes.c_int64]
    function: Any
    workspace: int
    """Bytes. The operand stands at its beginning; the rest at these offsets (0: absent):"""
    panels: int
    """The operand in panels, where `pack` makes them."""
    sums: int
    scales: int
    scratch: int
    own_scales: bool
    """Scales of activations are computed on the way, into the workspace."""
    write_scales: bool
    prepare_threads: int
    threads: int
    table: ctypes.Array[ctypes.c_int64]
    """Of its blocks."""
    height: int
    """Rows of the output per task, at most."""
    alive: tuple[Any, ...]
    """What was made for this call and whose addresses it holds."""
    base: int = 0
    """The workspace that its addresses are in."""

    def route(self, offsets: list[int]) -> None:
        """Give each expert its rows anew; for calls without `pack`."""
        blocks = blocks_of(offsets[-1], self.height, offsets, 1)
        self.table = table(blocks)
        self.matmul[M.BLOCKS], self.matmul[M.BLOCK_COUNT] = ctypes.addressof(self.table), len(blocks)

    def run(self, x: Tensor, out: Tensor) -> Tensor:
        """x [M, K] (rows of the stride that the call was made for) → out [M, N], contiguous."""
        prepare, block = self.prepare, self.matmul
        memory = workspace(self.workspace)  # held until the loops are done: a large one is nobody else's
        base = memory.data_ptr()
        if base != self.base:
            self._place(base)
        prepare[_P_NEXT] = prepare[_P_SLOT] = block[_M_NEXT] = block[_M_SLOT] = 0
        prepare[_P_X], block[_M_OUT] = x.data_ptr(), out.data_ptr()
        cpu_threads.run(_prepare_function(), prepare, self.prepare_threads)
        if self.pack is not None:
            self.pack.run(self.prepare_threads)
        cpu_threads.run(self.function, block, self.threads)
        return out

    def _place(self, base: int) -> None:
        prepare, block = self.prepare, self.matmul
        prepare[_P_A] = block[_M_A] = base
        prepare[_P_SCRATCH] = block[_M_SCRATCH] = base + self.scratch
        if self.write_scales:
            prepare[_P_SCALE] = base + self.scales
        if self.own_scales:
            block[_M_A_SCALE] = base + self.scales
        sums = base + self.sums if self.sums else 0
        block[_M_A_SUM] = sums
        if self.pack is not None:
            block[_M_A_PANELS] = base + self.panels
            self.pack.place(base, base + self.panels, sums)
        else:
            prepare[_P_SUMS] = sums
        self.base = base


@cache
def _prepare_function() -> Any:
    from lowbit.ops import cpu_prepare

    return cpu_prepare.prepare()


def product(
    x: Tensor,
    weights: Weights,
    activations: Activations,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    *,
    offsets: list[int] | None = None,
    routed: Tensor | None = None,
) -> Call:
    """The call for x [M, K] (last stride 1); the other arguments as in `cpu.linear`. M and N are not 0."""
    from lowbit.ops.cpu_step import operand_step

    (rows, k), n = x.shape, weights.n
    tensor = weights.tensor if weights.tensor.is_contiguous() else weights.tensor.contiguous()
    w_scale = weights.float_scale()
    tile, kind, mode = _tile_for(x, weights, activations, typical_rows(rows, len(offsets or [0, 0]) - 1))
    step, element = operand_step(tile.kind), _ELEMENT[kind]
    layout = Layout.of(k, activations.group or weights.group, step)
    codes = x.dtype in CODES

    # One workspace: operand rows (and spare ones to fill the last tile), sums of their codes, scales, scratch.
    row_bytes = layout.width * element * tile.parts
    unsigned = tile.kind.startswith("dpbusd")
    extra_rows = 0 if tile.matrix else tile.rows
    a_bytes = up((rows + extra_rows) * row_bytes, 64)
    scale_bytes = up(4 * rows * layout.groups, 64)
    sum_bytes = scale_bytes if unsigned or tile.paired else 0
    threads = torch.get_num_threads() if rows * n * k >= _PARALLEL_PRODUCT else 1
    prepare_threads = torch.get_num_threads() if x.numel() >= PARALLEL_FROM else 1
    height, width = _block(rows, n, tile, threads, row_bytes)
    blocks = blocks_of(rows, height, offsets, panel_rows(tile))
    pack, rows_table = Pack.of(tile, blocks, row_bytes, layout.padded), table(blocks)
    per_group, storage = bool(activations.group or weights.group), _STORAGE[tensor.dtype]
    if tile.matrix:
        from lowbit.ops import cpu_matmul_amx

        function = cpu_matmul_amx.matmul(tile.kind, storage, tile.parts)
        # Of groups as many as fit, but whole ones.
        most = _MATRIX_CHUNK[kind]
        chunk = max(layout.padded, min(most, layout.width)) if per_group else min(most, layout.padded)
        slot = up(cpu_matmul_amx.slot_bytes(height, width, chunk, layout.padded, layout.groups, element), 64)
    else:
        from lowbit.ops import cpu_matmul

        lookup = instructions().byte_lookup and kind == A_BF16
        function = cpu_matmul.matmul(
            tile.kind, storage, tile.rows, tile.vectors, grouped=per_group, byte_lookup=lookup
        )
        most = up(_PAIRED_CHUNK if tile.paired else _CHUNK[kind], step)
        if per_group:
            chunk = min(max(most // layout.padded, 1), layout.groups) * layout.padded
        else:
            # float64 sums stay in registers until they are rounded: all of K in one pass.
            chunk = layout.padded if tile.kind.startswith("fmad") else min(most, layout.padded)
        slot = up(cpu_matmul.slot_bytes(tile, height, width, chunk, layout.padded), 64)
    prepare_slot = up(4 * layout.group, 64)
    static = static_scale(x.dtype, mode, activations)
    prepare = prepare_block(
        rows, k, x.dtype, x.stride(0) * x.element_size(), kind=kind, layout=layout, row_bytes=row_bytes,
        activations=activations, mode=mode, static=static, extra_rows=extra_rows, slot=prepare_slot,
        threads=prepare_threads, parts=tile.parts,
    )  # fmt: skip

    block = MATMUL()
    block[M.A_ROW] = row_bytes
    block[M.W], block[M.W_ROW] = tensor.data_ptr(), tensor.stride(-2) * tensor.element_size()
    block[M.W_EXPERT] = tensor.stride(0) * tensor.element_size() if offsets is not None else 0
    block[M.W_END] = tensor.data_ptr() + tensor.numel() * tensor.element_size()
    block[M.OUT_ROW], block[M.OUT_DTYPE] = n * out_dtype.itemsize, DTYPE_CODES[out_dtype]
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
    block[M.PER_GROUP] = int(per_group)
    block[M.SLOT_BYTES] = slot
    block[M.BLOCK_ROWS], block[M.BLOCK_COLS] = height, width
    block[M.DOT_ROWS] = tile.dot_rows
    block[M.BLOCKS], block[M.BLOCK_COUNT] = ctypes.addressof(rows_table), len(blocks)
    if routed is not None:
        routed = routed.to(torch.float32).contiguous()
        block[M.ROUTED] = routed.data_ptr()
    sums = a_bytes + (pack.size if pack is not None else 0)
    scales, scratch = sums + sum_bytes, sums + sum_bytes + scale_bytes
    return Call(
        prepare=prepare, pack=pack, matmul=block, function=function, panels=a_bytes if pack is not None else 0,
        workspace=scratch + max(threads * slot, prepare_threads * prepare_slot),
        sums=sums if sum_bytes else 0, scales=scales, scratch=scratch, table=rows_table,
        own_scales=mode != MODE_NONE and a_scale is None, write_scales=mode != MODE_NONE and not codes,
        prepare_threads=prepare_threads, threads=threads, height=height,
        alive=(tensor, w_scale, bias, a_scale, static, routed),
    )  # fmt: skip
