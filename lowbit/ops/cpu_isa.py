"""Which instructions this CPU has, and which tile each kind of product uses with them."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from lowbit.errors import InputError
from lowbit.ops.cpu_params import PAIRED_ROWS

# From best to most portable. `portable` is plain torch: exact float32 blocks.
ISAS = ("amx", "avx512_vnni", "avx_vnni", "avx512bw", "avx2", "neon_dotprod", "neon", "portable")


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A register tile: the instruction (see `cpu_step.Step`), and rows × vectors of accumulators."""

    kind: str
    rows: int
    vectors: int
    dot_rows: int = 0
    """Up to so many rows are multiplied with weights as stored; for more, transposing them first pays."""
    parts: int = 1
    """bfloat16 values that an activation is the sum of (AMX)."""

    @property
    def matrix(self) -> bool:
        """It is AMX's (see `cpu_amx`): weights as stored at any number of rows, activations in panels."""
        return self.kind.startswith("tdp")

    @property
    def paired(self) -> bool:
        """It is that of `cpu_winograd`: for more than `dot_rows`, activations in panels."""
        return self.kind.startswith("winograd")

    @property
    def wide_codes(self) -> bool:
        """Its integers have 16 bits."""
        return self.kind.startswith(("pmaddwd", "winograd", "smull"))

    @property
    def cols(self) -> int:
        """Columns of the output that it covers: one per 32 bits of a vector."""
        return self.vectors * int(self.kind[-3:]) // 32


@dataclass(frozen=True, kw_only=True)
class Instructions:
    """What a CPU multiplies with."""

    name: str
    """One of `ISAS`."""
    bfloat16: bool = False
    """It has the bfloat16 dot product, exact on 8-bit codes at twice float32's rate."""
    byte_lookup: bool = False
    """It looks 64 bytes up at once (AVX-512 VBMI): codes become bfloat16 so."""

    @property
    def bits(self) -> int:
        """Of a vector."""
        if self.name.startswith("neon"):
            return 128
        return 512 if self.name in ("amx", "avx512_vnni", "avx512bw") else 256


# As many accumulators as leave registers for the vectors of B, one of A and one product: there are 16 of 256 bits,
# 32 of 512, and 32 of Arm's 128.
# Rows as stored read weights from memory as fast as it can; their lanes are added up once per scale, and codes that
# become floats are decoded again for every four (or two) rows. Measured on a Zen 4, with weights that no cache holds.
_MULTIPLY_ADD = {
    512: Tile(kind="pmaddwd512", rows=6, vectors=4, dot_rows=48),
    256: Tile(kind="pmaddwd256", rows=6, vectors=2, dot_rows=24),
    128: Tile(kind="smull128", rows=4, vectors=4, dot_rows=16),
}
# Sums of two codes and their products: 8 accumulators, and twice the vectors of A and B.
_PAIRED = Tile(kind="winograd256", rows=PAIRED_ROWS, vectors=2, dot_rows=16)
_INTEGER = {
    "amx": Tile(kind="dpbusd512", rows=6, vectors=4, dot_rows=48),
    "avx512_vnni": Tile(kind="dpbusd512", rows=6, vectors=4, dot_rows=48),
    "avx_vnni": Tile(kind="dpbusd256", rows=6, vectors=2, dot_rows=24),
    "avx512bw": _MULTIPLY_ADD[512],
    "avx2": _PAIRED,
    "neon_dotprod": Tile(kind="sdot128", rows=6, vectors=4, dot_rows=16),
    "neon": _MULTIPLY_ADD[128],
}
_DOT_ROWS_GROUPED = 12
_FLOAT = {
    512: Tile(kind="fma512", rows=6, vectors=4, dot_rows=16),
    256: Tile(kind="fma256", rows=6, vectors=2, dot_rows=10),
    128: Tile(kind="fma128", rows=5, vectors=4, dot_rows=8),
}
_WIDE_PLAIN = replace(_FLOAT[512], dot_rows=128)  # bfloat16 values: one shift each while they are loaded
# In float64 each vector takes two registers.
_DOUBLE = {
    512: Tile(kind="fmad512", rows=4, vectors=2, dot_rows=8),
    256: Tile(kind="fmad256", rows=4, vectors=1, dot_rows=4),
    128: Tile(kind="fmad128", rows=4, vectors=2, dot_rows=1),
}
# Twice float32's rate. e4m3 codes may be looked up while they are loaded; others of a few rows become float32 there.
_BFLOAT = Tile(kind="dpbf16512", rows=6, vectors=4)
_BFLOAT_ROWS = 5
_MATRIX_INTEGER = Tile(kind="tdpbssd512", rows=32, vectors=2)
_MATRIX_BFLOAT = Tile(kind="tdpbf16512", rows=32, vectors=2)
# Fewer rows are multiplied in vector registers: those read int8 weights of few rows at memory's speed. Measured on an
# Emerald Rapids; where sums are scaled group by group, or weights decoded, AMX is ahead earlier, and later where
# activations come in several parts.
_MATRIX_ROWS, _MATRIX_ROWS_OTHERWISE, _MATRIX_ROWS_IN_PARTS = 12, 4, 8


def integer_tile(
    instructions: Instructions, rows: int, *, zero_point: bool = False, grouped: bool = False
) -> Tile:
    """The tile for int8 × int8 → int32, of so many rows per weight.

    Less a zero point, codes need 9 bits, so 16-bit operands. `grouped`: there are scales along K.
    """
    tile = _INTEGER[instructions.name]
    if zero_point:
        tile = _PAIRED if instructions.bits == 256 else _MULTIPLY_ADD[instructions.bits]
    elif instructions.name == "amx" and rows >= (_MATRIX_ROWS_OTHERWISE if grouped else _MATRIX_ROWS):
        return _MATRIX_INTEGER
    if tile.paired and rows <= (_DOT_ROWS_GROUPED if grouped else tile.dot_rows):
        tile = _MULTIPLY_ADD[256]
    return replace(tile, dot_rows=_DOT_ROWS_GROUPED) if grouped else tile


def float_tile(
    instructions: Instructions,
    rows: int,
    *,
    weight: torch.dtype,
    parts: int,
    grouped: bool = False,
    float64: bool = False,
) -> Tile:
    """The tile for products of decoded codes accumulated in float32, or in float64.

    `weight`: bfloat16 values, or codes, packed ones as int32; `parts`: how many bfloat16 values an activation
    is the sum of, exactly. A few rows are decoded while they are loaded, which the float32 tiles do.
    """
    if float64:
        return _DOUBLE[instructions.bits]
    if instructions.name == "amx" and rows >= (
        _MATRIX_ROWS_OTHERWISE if parts == 1 else _MATRIX_ROWS_IN_PARTS
    ):
        return replace(_MATRIX_BFLOAT, parts=parts)
    if instructions.bfloat16 and parts == 1 and weight != torch.bfloat16:
        if instructions.byte_lookup and weight == torch.float8_e4m3fn:
            return replace(_BFLOAT, dot_rows=8 if grouped else 16)
        if rows >= _BFLOAT_ROWS:
            return _BFLOAT
    if instructions.bits == 512 and weight == torch.bfloat16:
        return _WIDE_PLAIN
    return _FLOAT[instructions.bits]


@cache
def _may_use_tiles() -> bool:
    """Ask Linux for the tile registers, which a process may use only after that."""
    request, tile_data = 0x1023, 18  # ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    try:
        return ctypes.CDLL(None).syscall(158, request, tile_data) == 0  # arch_prctl
    except (OSError, AttributeError):
        return False


@cache
def _features() -> frozenset[str]:
    query = getattr(torch.cpu, "get_capabilities", None)
    if query is not None:
        return frozenset(name for name, value in query().items() if value is True)
    # Older torch: the kernel's flags, renamed as get_capabilities names them.
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    renamed = {"fma": "fma3", "avx512bw": "avx512_bw", "avx512vl": "avx512_vl", "avx512vbmi": "avx512_vbmi"}
    return frozenset(renamed.get(flag, flag) for flag in flags)


def _has_dotprod() -> bool:
    """Whether numba compiles for an Arm CPU with the int8 dot product (from ARMv8.2 on)."""
    try:
        from llvmlite import binding

        if os.environ.get("NUMBA_CPU_NAME"):
            return "+dotprod" in os.environ.get("NUMBA_CPU_FEATURES", "").split(",")
        # On macOS LLVM knows the processor's name alone.
        return bool(binding.get_host_cpu_features().get("dotprod")) or (
            binding.get_host_cpu_name().startswith("apple-m")
        )
    except (ImportError, RuntimeError):
        return False


def available() -> tuple[str, ...]:
    """The names in `ISAS` that this CPU can run, best first."""
    machine = platform.machine().lower()
    if machine in ("aarch64", "arm64"):
        return (*(("neon_dotprod",) if _has_dotprod() else ()), "neon", "portable")
    if machine not in ("x86_64", "amd64"):
        return ("portable",)
    features = _features()
    found = []
    wide = {"avx512_bw", "avx512_vl", "avx2", "fma3", "f16c"} <= features
    if wide and "avx512_vnni" in features:
        # CPUs with AMX have these too; old torch names none of them.
        matrix = {"amx_tile", "amx_int8", "amx_bf16", "avx512_bf16", "avx512_vbmi"}
        if matrix <= features and sys.platform == "linux" and _may_use_tiles():
            found.append("amx")
        found.append("avx512_vnni")
    if "avx_vnni" in features and {"avx2", "fma3", "f16c"} <= features:
        found.append("avx_vnni")
    if wide:
        found.append("avx512bw")
    if {"avx2", "fma3", "f16c"} <= features:
        found.append("avx2")
    return (*found, "portable")


def detect() -> Instructions:
    """What to use: the best that this CPU has, or the one that LOWBIT_CPU_ISA names.

    LOWBIT_CPU_ISA is one of `ISAS`; a pinned `avx2` leaves bfloat16 instructions out as well.
    Raises InputError for an unknown name, and for one that this CPU lacks.
    """
    pinned = os.environ.get("LOWBIT_CPU_ISA", "").strip().lower()
    usable = available()
    if not pinned:
        name = usable[0]
        # Code is compiled for the CPU that NUMBA_CPU_NAME names: do not emit beyond it.
        if os.environ.get("NUMBA_CPU_NAME"):
            name = next(isa for isa in ("neon_dotprod", "neon", "avx2", "portable") if isa in usable)
    elif pinned not in ISAS:
        raise InputError(f"expected LOWBIT_CPU_ISA to be one of {', '.join(ISAS)}, found {pinned!r}")
    elif pinned not in usable:
        raise InputError(
            f"LOWBIT_CPU_ISA asks for {pinned}, but this CPU has only {', '.join(usable)}; unset it"
        )
    else:
        name = pinned
    features = _features() if name in ("amx", "avx512_vnni") else frozenset()
    return Instructions(name=name, bfloat16="avx512_bf16" in features, byte_lookup="avx512_vbmi" in features)
