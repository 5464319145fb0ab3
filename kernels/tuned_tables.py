"""Tuned tables: `tuned/<target>.json`, checked against their schema when they are read.

A table is written by scripts/tune_kernels.py from runs on that target, and never by hand:

    {"version": 1, "target": "sm90", "device": "NVIDIA H100 80GB HBM3", "triton": "3.9.0",
     "entries": [{"kernel": "matmul", "a_dtype": "int8", "w_dtype": "int8", "m": 16,
                  "n": 7168, "k": 2048, "parameters": {"block_m": 16, …}}]}

`m` is a bucket (M_BUCKETS) and `parameters` are fields of LaunchParameters.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from .targets import TARGETS, Target

M_BUCKETS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
FOLDER = Path(__file__).parent / "tuned"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class LaunchParameters:
    """How one matmul kernel is cut and launched."""

    block_m: int
    """Tokens per tile, a power of two."""
    block_n: int
    """Output channels per tile, a power of two."""
    block_k: int
    """Elements of K per step, a power of two, at least 32 for 8-bit products."""
    group_m: int = 8
    """Row blocks per band: how tiles are ordered for the cache."""
    split_k: int = 1
    """Programs that share one tile's K; above 1 a second kernel adds their sums, in order."""
    num_warps: int = 4
    num_stages: int = 3
    promote_k: int = 0
    """sm90 fp8 only: add to the float32 accumulator after so many k. 0: never."""
    persistent: bool = False
    """True: one program per core, walking over tiles. False: one program per tile."""
    tma: bool = False
    """True: the variant with tensor descriptors, where alignment allows it."""
    max_registers: int = 0
    """What a thread may have on NVIDIA (at most 255). 0: ptxas decides, and may spill a few to fit one program more."""

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k", "split_k", "num_warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"expected a power of two for {name}, found {value}")
        if self.group_m < 1 or self.num_stages < 1:
            raise ValueError(f"expected group_m and num_stages of at least 1, found {self}")
        if self.promote_k > self.block_k:
            raise ValueError(f"expected promote_k of at most block_k {self.block_k}, found {self.promote_k}")

    def options(self, target: Target) -> dict[str, Any]:
        """Keyword arguments of Triton's launch, without the constants of the kernel.

        Contraction of a·b + c into one rounding is off, so that an epilogue gives the same
        bits on every target and in the reference.
        """
        if target.backend == "npu":
            return {}
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": False}
        if self.max_registers and target.backend == "cuda":
            options["maxnreg"] = self.max_registers
        return options


def m_bucket(m: int) -> int:
    """The bucket of M that launch parameters are chosen for: the next of M_BUCKETS, or the last.

    A key with the raw M would retune for every batch, one without M would fit whichever came first.
    """
    return next((b for b in M_BUCKETS if m <= b), M_BUCKETS[-1])


Key = tuple[str, str, str, int, int, int, bool]
"""Kernel, dtypes of activations and weights, bucket of M, N, K, whether `promote_k` is above 0."""


def tuned_parameters(
    kernel: str, *, m: int, n: int, k: int, a_dtype: str, w_dtype: str, target: Target, promote: bool = False
) -> LaunchParameters | None:
    """The tuned entry of exactly this N and K in M's bucket, with `promote_k` or without, or None."""
    return load_table(target.name).get((kernel, a_dtype, w_dtype, m_bucket(m), n, k, promote))


@cache
def load_table(target: str) -> dict[Key, LaunchParameters]:
    """The entries of one target's table; empty where none was measured."""
    path = FOLDER / f"{target}.json"
    return parse_table(json.loads(path.read_text()), target) if path.exists() else {}


def parse_table(table: Any, target: str) -> dict[Key, LaunchParameters]:
    """Check a table against the schema above. Raises ValueError naming the entry and the fault."""
    if not isinstance(table, dict) or table.get("version") != VERSION:
        raise ValueError(f"tuned/{target}.json: expected an object with version {VERSION}; tune again")
    if table.get("target") != target or target not in TARGETS:
        raise ValueError(f"tuned/{target}.json: expected target {target!r}, found {table.get('target')!r}")
    for name in ("device", "triton"):
        if not isinstance(table.get(name), str):
            raise ValueError(f"tuned/{target}.json: expected a string {name!r}: on what it was measured")
    entries: dict[Key, LaunchParameters] = {}
    for index, entry in enumerate(table.get("entries", ())):
        try:
            key, parameters = _parse_entry(entry)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"tuned/{target}.json, entry {index}: {error}") from error
        if key in entries:
            raise ValueError(f"tuned/{target}.json, entry {index}: the same problem twice: {key}")
        entries[key] = parameters
    return entries


def _parse_entry(entry: dict[str, Any]) -> tuple[Key, LaunchParameters]:
    expected = {"kernel", "a_dtype", "w_dtype", "m", "n", "k", "parameters"}
    if set(entry) != expected:
        raise ValueError(f"expected the keys {sorted(expected)}, found {sorted(entry)}")
    if entry["m"] not in M_BUCKETS:
        raise ValueError(f"expected m to be one of {M_BUCKETS}, found {entry['m']!r}")
    for name in ("n", "k"):
        if type(entry[name]) is not int or entry[name] < 1:
            raise ValueError(f"expected a positive integer {name}, found {entry[name]!r}")
    kinds = {f.name: bool if f.name in ("persistent", "tma") else int for f in fields(LaunchParameters)}
    for name, value in entry["parameters"].items():
        if name not in kinds:
            raise ValueError(f"unknown parameter {name!r}: expected some of {sorted(kinds)}")
        if type(value) is not kinds[name]:
            raise ValueError(f"expected {kinds[name].__name__} for {name}, found {value!r}")
    parameters = LaunchParameters(**entry["parameters"])
    return key_of(entry, parameters), parameters


def key_of(entry: dict[str, Any], parameters: LaunchParameters) -> Key:
    """The problem that an entry is for: there is one entry with `promote_k` and one without."""
    kernel, a_dtype, w_dtype, m, n, k = (entry[x] for x in ("kernel", "a_dtype", "w_dtype", "m", "n", "k"))
    return kernel, a_dtype, w_dtype, m, n, k, parameters.promote_k > 0
