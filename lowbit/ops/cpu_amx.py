"""Tiles of AMX, the matrix unit of Intel's server CPUs, as LLVM emitted by hand for numba.

Eight registers of 16 rows × 64 bytes. `tdpbssd` adds int8 × int8 in int32, exactly; `tdpbf16ps`
bfloat16 × bfloat16 in float32, denormals read as zero. Of the two operands only the second must
come in units of 32 bits per row of K. So the weights, as stored, [N, K], are the first, the
activations, few and written by us anyway, are the second, and the product is the transpose:
[N, M]. No weight is rearranged, and 1 to 16 rows of activations cost the same.

One C tile takes 16 cycles a step and gives its sum after 52: at least four are in flight.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from lowbit.ops.cpu_emit import I8, I64, call, loop, prefetch
from lowbit.ops.cpu_params import PANEL_ROWS

ROWS, STEP = PANEL_ROWS, 64  # rows of a tile register; bytes of K in one
SOON = 512  # bytes of a row that are asked for before they are wanted
PANEL_STEP = ROWS * STEP  # bytes of a panel of activations per step of K
_INSTRUCTION = {"tdpbssd512": "llvm.x86.tdpbssd", "tdpbf16512": "llvm.x86.tdpbf16ps"}
# Palette 1 at byte 0; from 16 on bytes per row (16 bits each), from 48 on rows (8 bits each).
_CONFIGURATION = bytes([1, *[0] * 15, *[STEP, 0] * 8, *[0] * 16, *[ROWS] * 8, *[0] * 8])


def _tile(register: int) -> ir.Constant:
    return ir.Constant(I8, register)


def _at(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, I8.as_pointer())


@intrinsic
def amx_begin(typingctx):  # type: ignore[no-untyped-def]
    """All eight tile registers of this thread: 16 rows of 64 bytes. `amx_end` gives them back."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        kind = ir.ArrayType(I8, len(_CONFIGURATION))
        memory = builder.alloca(kind)
        builder.store(ir.Constant(kind, bytearray(_CONFIGURATION)), memory)
        call(builder, "llvm.x86.ldtilecfg", ir.VoidType(), [builder.bitcast(memory, I8.as_pointer())])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def amx_end(typingctx):  # type: ignore[no-untyped-def]
    """No tile register is in use any more: the kernel need not save them."""

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        call(builder, "llvm.x86.tilerelease", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic(prefer_literal=True)
def amx_tile(typingctx, kind, parts, high, wide, add, w, w_row, ahead, lines, a, panel, c, c_row, steps):  # type: ignore[no-untyped-def]
    """c[n, m] (+)= Σₖ w[n, k] · x[m, k] for n < 16 · high and m < 16 · wide, high · wide ≤ 4.

    `kind` (`tdpbssd512`: int8 → int32, `tdpbf16512`: bfloat16 → float32), `parts`, `high` ≥ `wide` are
    compile-time constants. Where `add` is 0, c is written over. Rows of w are `w_row` bytes apart; panel j of
    16 rows of x stands at `a` + j · `panel`, unit (32 bits) u of its row r at 64 · u + 4 · r. x is the
    sum of `parts`, which divide a panel evenly. `c_row` in bytes; `steps` of 64 bytes of K.

    Weights are asked for, to come into the second cache. Of one panel: with each line of w the one
    SOON bytes on or, where the row ends, at its beginning and `ahead` bytes from there (unless that is the
    constant 0). Of two, which read the same weights several times: with each step `lines` of those at `ahead`.
    """
    if not all(isinstance(t, types.Literal) for t in (kind, parts, high, wide)):
        return None
    name = _INSTRUCTION[kind.literal_value]
    count, tall, across = parts.literal_value, high.literal_value, wide.literal_value
    asks = across == 1 and not (isinstance(ahead, types.Literal) and ahead.literal_value == 0)
    signature = types.void(kind, parts, high, wide, *[types.int64] * 3, ahead, *[types.int64] * 6)
    # Registers: C first, then x (all parts of one panel, or two panels), then as many of w as are left, in turn.
    c_tiles = [[i * across + j for j in range(across)] for i in range(tall)]
    x_tiles = [tall * across + j for j in range(count if across == 1 else across)]
    w_tiles = list(range(tall * across + len(x_tiles), 8))

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        add, w, w_row, ahead, lines, a, panel, c, c_row, steps = args[4:]

        def number(value: int) -> ir.Constant:
            return ir.Constant(I64, value)

        def tile_call(instruction: str, *arguments: Any) -> None:
            call(builder, f"llvm.x86.{instruction}", ir.VoidType(), list(arguments))

        corners = []
        for i in range(tall):
            row = builder.add(c, builder.mul(c_row, number(ROWS * i)))
            corners.append([_at(builder, builder.add(row, number(4 * ROWS * j))) for j in range(across)])
        each = [(i, j) for i in range(tall) for j in range(across)]
        with builder.if_else(builder.icmp_signed("!=", add, number(0))) as (adds, starts):
            with adds:
                for i, j in each:
                    tile_call("tileloadd64", _tile(c_tiles[i][j]), corners[i][j], c_row)
            with starts:
                for i, j in each:
                    tile_call("tilezero", _tile(c_tiles[i][j]))
        part_bytes = builder.udiv(panel, number(count))
        panels = [builder.add(a, builder.mul(panel, number(j))) for j in range(across)]
        strips = [builder.add(w, builder.mul(w_row, number(ROWS * i))) for i in range(tall)]

        def body(position: Any, _: list) -> list:
            here = builder.mul(position, number(PANEL_STEP))
            along = builder.mul(position, number(STEP))
            if asks:
                soon = builder.sub(builder.add(along, number(SOON)), builder.mul(steps, number(STEP)))
                beyond = builder.icmp_signed(">=", soon, number(0))
                soon = builder.select(beyond, builder.add(ahead, builder.sub(soon, along)), number(SOON))

            def load_x(part: int, j: int) -> None:
                register = x_tiles[part if across == 1 else j]
                at = builder.add(builder.add(panels[j], here), builder.mul(part_bytes, number(part)))
                tile_call("tileloadd64", _tile(register), _at(builder, at), number(STEP))

            def load_w(i: int) -> None:
                line = builder.add(strips[i], along)
                tile_call("tileloadd64", _tile(w_tiles[i % len(w_tiles)]), _at(builder, line), w_row)
                if asks:
                    line = builder.add(line, soon)
                    for r in range(ROWS):
                        prefetch(builder, builder.add(line, builder.mul(w_row, number(r))), 2)

            def multiply(i: int, part: int, j: int) -> None:
                x = x_tiles[part if across == 1 else j]
                operands = [_tile(c_tiles[i][j]), _tile(w_tiles[i % len(w_tiles)]), _tile(x)]
                call(builder, name, ir.VoidType(), operands)

            if across == 1:
                for part in range(count):
                    load_x(part, 0)
                for i in range(tall):
                    load_w(i)
                    for part in range(count):
                        multiply(i, part, 0)
            else:
                first = builder.add(ahead, builder.mul(lines, along))

                def ask(at: Any, _: list) -> list:
                    prefetch(builder, builder.add(first, builder.mul(at, number(STEP))), 2)
                    return []

                loop(builder, lines, 1, [], ask)
                for i in range(tall):
                    load_w(i)
                for part in range(count):
                    for j in range(across):
                        load_x(part, j)
                    for i, j in each:
                        multiply(i, part, j)
            return []

        loop(builder, steps, 1, [], body)
        for i, j in each:
            tile_call("tilestored64", _tile(c_tiles[i][j]), corners[i][j], c_row)
        return context.get_dummy_value()

    return signature, codegen
