"""The products that models ask for: every kernel, kind of scale and size of tile, at the shapes of their layers.

`lowbit kernels compile --models` compiles each launch that comes of them, once. The cases of
`compile_cases.py` are chosen by hand; spills show where nobody looked for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch

from .compile_cases import (
    BLOCKS,
    Block,
    Case,
    block_call,
    grouped_call,
    matmul_call,
    mxfp8_call,
    weight_only_call,
)

TOKENS = (1, 32, 64, 4096)
# (N, K): DeepSeek-V3's output projection; SmolLM2's k, whose K no step divides; a vocabulary whose N is odd; rows that
# are no multiple of 16 bytes.
LAYERS = ((7168, 16384), (192, 576), (32001, 4096), (1000, 500))
# (experts, N, K): Mixtral, DeepSeek-V3.
STACKS = ((8, 28672, 4096), (256, 7168, 2048))

GROUPS = ((1, 32), (1, 128))
CODES: tuple[Literal["int8", "fp8"], ...] = ("int8", "fp8")
_STORED: dict[str, tuple[torch.dtype, tuple[Block, ...]]] = {
    "int8": (torch.int8, (None, BLOCKS)),
    "packed int8": (torch.uint8, GROUPS),
    "fp8": (torch.float8_e4m3fn, (None, BLOCKS)),
}
_FLOATS = {"bf16": torch.bfloat16, "fp32": torch.float32}  # float16 takes the registers that bfloat16 does


def model_cases() -> Iterator[Case]:
    """Every case; many lead to the same launch."""
    for m in TOKENS:
        for n, k in LAYERS:
            yield from _dense(m, n, k)
        for experts, n, k in STACKS:
            yield from _experts(m, experts, n, k)


def _dense(m: int, n: int, k: int) -> Iterator[Case]:
    shape = f"{m} × {n} × {k}"
    for kind in CODES:
        yield Case(name=f"matmul {kind}, {shape}", call=matmul_call(kind, m, n, k, bias=True), product=kind)
        for block in (*GROUPS, BLOCKS):
            call = block_call(kind, m, n, k, block)
            yield Case(name=f"matmul_block {kind}, {_words(block)}, {shape}", call=call, product=kind)
    for words, x, w, of in _weight_only_kinds():
        call = weight_only_call(x, w, m, of, n, k)
        yield Case(name=f"matmul_weight_only {words}, {shape}", call=call, product="float")
    if k % 32 == 0:
        yield Case(name=f"matmul_mxfp8, {shape}", call=mxfp8_call(m, n, k), product="fp8")


def _experts(tokens: int, experts: int, n: int, k: int) -> Iterator[Case]:
    shape, rows = f"{tokens} × {experts} × {n} × {k}", tokens * 8
    for kind in CODES:
        for block in (None, *GROUPS, BLOCKS):
            call = grouped_call(kind, rows, block, None, experts, n, k)
            yield Case(name=f"matmul_grouped {kind}, {_words(block)}, {shape}", call=call, product=kind)
    for words, x, w, of in _weight_only_kinds():
        call = grouped_call(w, rows, of, x, experts, n, k)
        yield Case(name=f"matmul_grouped {words}, {shape}", call=call, product="float")


def _weight_only_kinds() -> Iterator[tuple[str, torch.dtype, torch.dtype, Block]]:
    for x, dtype in _FLOATS.items():
        for stored, (w, blocks) in _STORED.items():
            for block in blocks:
                yield f"{x} × {stored}, {_words(block)}", dtype, w, block


def _words(block: Block) -> str:
    if block is None:
        return "channels"
    return f"groups of {block[1]}" if block[0] == 1 else f"blocks of {block[0]} × {block[1]}"
