"""The products that models ask for: every kernel, kind of scale and size of tile, at the shapes of their layers.

`lowbit kernels compile --models` compiles each launch that comes of them, once. The cases of
`compile_cases.py` are chosen by hand; spills show where nobody looked for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch

from .compile_cases import Case, empty, fp8
from .matmul import matmul
from .matmul_block import matmul_block
from .matmul_grouped import matmul_grouped
from .matmul_mxfp8 import matmul_mxfp8
from .matmul_weight_only import matmul_weight_only
from .targets import Target

TOKENS = (1, 32, 64, 4096)
# (N, K): DeepSeek-V3's output projection; SmolLM2's k, whose K no step divides; a vocabulary whose N is odd; rows that
# are no multiple of 16 bytes.
LAYERS = ((7168, 16384), (192, 576), (32001, 4096), (1000, 500))
# (experts, N, K): Mixtral, DeepSeek-V3.
STACKS = ((8, 28672, 4096), (256, 7168, 2048))

Block = tuple[int, int] | None
"""The block in which weights have a scale; None: a scale per channel."""
CHANNELS, BLOCKS = None, (128, 128)
GROUPS: tuple[Block, ...] = ((1, 32), (1, 128))
Call = Callable[[Target], object]
Kind = Callable[[Target], torch.dtype]
_CODES: dict[Literal["int8", "fp8"], Kind] = {"int8": lambda _: torch.int8, "fp8": fp8}
_STORED: dict[str, tuple[torch.dtype, tuple[Block, ...]]] = {
    "int8": (torch.int8, (CHANNELS, BLOCKS)),
    "packed int8": (torch.uint8, GROUPS),
    "fp8": (torch.float8_e4m3fn, (CHANNELS, BLOCKS)),
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
    for kind, codes in _CODES.items():
        call: Call = partial(_matmul, codes, m, n, k)
        yield Case(name=f"matmul {kind}, {shape}", call=call, product=kind)
        for block in (*GROUPS, BLOCKS):
            call = partial(_block, codes, m, n, k, block)
            yield Case(name=f"matmul_block {kind}, {_words(block)}, {shape}", call=call, product=kind)
    for words, x, w, block in _weight_only_kinds():
        call = partial(_weight_only, x, w, m, n, k, block)
        yield Case(name=f"matmul_weight_only {words}, {shape}", call=call, product="float")
    if k % 32 == 0:
        yield Case(name=f"matmul_mxfp8, {shape}", call=partial(_mxfp8, m, n, k), product="fp8")


def _experts(tokens: int, experts: int, n: int, k: int) -> Iterator[Case]:
    shape = f"{tokens} × {experts} × {n} × {k}"
    for kind, codes in _CODES.items():
        for block in (CHANNELS, *GROUPS, BLOCKS):
            call: Call = partial(_grouped, codes, None, tokens, experts, n, k, block)
            yield Case(name=f"matmul_grouped {kind}, {_words(block)}, {shape}", call=call, product=kind)
    for words, x, w, block in _weight_only_kinds():
        call = partial(_grouped, lambda _, w=w: w, x, tokens, experts, n, k, block)
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


def _scale(n: int, k: int, block: Block) -> torch.Tensor:
    rows, cols = block or (1, k)
    return empty(-(-n // rows), -(-k // cols))


def _matmul(codes: Kind, m: int, n: int, k: int, target: Target) -> object:
    a, w = empty(m, k, dtype=codes(target)), empty(n, k, dtype=codes(target))
    return matmul(a, w, empty(m, 1), empty(n, 1), bias=empty(n, dtype=torch.bfloat16))


def _block(codes: Kind, m: int, n: int, k: int, block: tuple[int, int], target: Target) -> object:
    a, w = empty(m, k, dtype=codes(target)), empty(n, k, dtype=codes(target))
    a_scale = empty(-(-k // block[1]), m).t()
    return matmul_block(a, w, a_scale, _scale(n, k, block), block_shape=block)


def _weight_only(
    x: torch.dtype, w: torch.dtype, m: int, n: int, k: int, block: Block, target: Target
) -> object:
    return matmul_weight_only(
        empty(m, k, dtype=x), empty(n, k, dtype=w), _scale(n, k, block), block_shape=block
    )


def _grouped(
    codes: Kind, x: torch.dtype | None, tokens: int, experts: int, n: int, k: int,
    block: Block, target: Target,
) -> object:  # fmt: skip
    rows = tokens * 8
    a_scale = empty(-(-k // block[1]), rows).t() if block else empty(rows, 1)
    w_scale = _scale(n, k, block)
    return matmul_grouped(
        empty(rows, k, dtype=x or codes(target)), empty(experts, n, k, dtype=codes(target)),
        empty(experts + 1, dtype=torch.int32), None if x else a_scale, empty(experts, *w_scale.shape),
        block_shape=block, routed_weight=empty(rows), out_dtype=x or torch.bfloat16,
    )  # fmt: skip


def _mxfp8(m: int, n: int, k: int, target: Target) -> object:
    a, w = (empty(rows, k, dtype=torch.float8_e4m3fn) for rows in (m, n))
    return matmul_mxfp8(a, w, *(empty(rows, k // 32, dtype=torch.uint8) for rows in (m, n)))
