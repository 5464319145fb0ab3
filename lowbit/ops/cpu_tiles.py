"""Register tiles of the CPU products, as LLVM emitted by hand for numba.

Why by hand: LLVM turns a plain int8 dot product into `pmulld`, a third of the speed of
`pmaddwd`. Here each tile is one loop over K with every accumulator in a register.

Two shapes of tile. `dot_tile` runs along K on weights as stored and adds the lanes of its
accumulators at the end: for few rows, which are bound by memory. `packed_tile` has a column
in every lane, and nothing to add at the end, but wants weights transposed in units of 32 bits
(four int8, two int16 or bfloat16, one float32), which `pack` does for a panel at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from lowbit.ops.cpu_emit import (
    F32,
    I1,
    I16,
    I32,
    I64,
    load,
    loop,
    prefetch,
    shuffle,
    splat,
    spread,
    store,
    vec,
)
from lowbit.ops.cpu_step import Step, requests
from lowbit.ops.cpu_winograd import paired_sums

UNROLL = 2  # units per turn of a packed tile's loop: less to count, and one request for memory


def _reduce4(builder: Any, vectors: list, add: Any) -> Any:
    """The sums of the lanes of 4 vectors, as one vector of 4: a fixed order, the same at every call.

    Pairs are interleaved and added twice, which leaves [Σx, Σy, Σz, Σw] per 128 bits; a third
    of the shuffles that four separate sums need.
    """
    width = vectors[0].type.count
    quads = range(0, width, 4)
    low = [q + i + s for q in quads for i in (0, 1) for s in (0, width)]
    high = [q + i + s for q in quads for i in (2, 3) for s in (0, width)]
    xy, zw = (
        add(shuffle(builder, x, y, low), shuffle(builder, x, y, high)) for x, y in (vectors[:2], vectors[2:])
    )
    first = [q + i + s for q in quads for s in (0, width) for i in (0, 1)]
    second = [q + i + s for q in quads for s in (0, width) for i in (2, 3)]
    total = add(shuffle(builder, xy, zw, first), shuffle(builder, xy, zw, second))
    while width > 4:
        width //= 2
        halves = (shuffle(builder, total, total, list(range(s, s + width))) for s in (0, width))
        total = add(*halves)
    return total


@intrinsic(prefer_literal=True)
def dot_tile(typingctx, kind, mr, nr, cache, a, lda, b, ldb, ahead, along, across, c, ldc, k):  # type: ignore[no-untyped-def]
    """c[i, j] += Σₖ a[i, k] · b[j, k] for i < mr, j < nr (4 or 1), weights as stored.

    `kind`, `mr`, `nr`, `cache` are compile-time constants. Addresses and row strides are in
    bytes; `c` is int32 (float32 for the float kinds, `fmad` too); `k` is a multiple of
    `step_elements(kind)`. For dpbusd the sums are those of b + 128.

    Rows are short, so the hardware's own prefetching only ever starts on them: with the step
    at byte x of b go requests for `ahead` + (x · `along` + j · `across`) / 256, one for each of
    the j = 0 … `requests(kind, nr)` − 1 lines that a step reads, to come into cache 1 or 2.
    """
    if not all(isinstance(t, types.Literal) for t in (kind, mr, nr, cache)):
        return None
    step, rows, cols = Step(kind.literal_value), mr.literal_value, nr.literal_value
    signature = types.void(kind, mr, nr, cache, *[types.int64] * 10)

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        a, lda, b, ldb, ahead, along, across, c, ldc, k = args[4:]
        ask = (cache.literal_value, ahead, along, across)
        zero = ir.Constant(I64, 0)
        sums = _dot_sums(builder, step, (rows, cols), (a, lda), (b, ldb), ask, zero, k)
        for i, values in enumerate(sums):
            address = builder.add(c, builder.mul(ldc, ir.Constant(I64, i)))
            values = values if cols == 4 else builder.extract_element(values, ir.Constant(I32, 0))
            step.add_to(builder, values, address)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def scaled_dot_tile(
    typingctx, kind, mr, nr, cache, a, lda, b, ldb, ahead, along, across, c, ldc, k, group, left, a_scale,
    a_scale_row, a_scale_group, a_sum, a_sum_row, w_scale, w_at, w_group,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """c[i, j] = Σ over groups of K of float32(Σₖ a[i, k] · b[j, k]) · a_scale[i] · w_scale[j], rounded in this order.

    As `dot_tile`, for groups of `group` elements, a multiple of a step; the last may have fewer. c is float32. Row
    i's scale stands at `a_scale` + `a_scale_row` · i, and `a_scale_group` on for the next group; column j's
    at `w_scale` + the int64 at `w_at` + 8 · j, times 4, and `w_group` on. For dpbusd 128 · a_sum come off the
    sums first: int32, `a_sum_row` apart, next to each other for the groups. Rows from `left` on take the last one's.
    """
    if not all(isinstance(t, types.Literal) for t in (kind, mr, nr, cache)):
        return None
    step, rows, cols = Step(kind.literal_value), mr.literal_value, nr.literal_value
    signature = types.void(kind, mr, nr, cache, *[types.int64] * 20)

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        a, lda, b, ldb, ahead, along, across, c, ldc, k, group = args[4:15]
        left, a_scale, a_scale_row, a_scale_group, a_sum, a_sum_row, w_scale, w_at, w_group = args[15:]
        ask = (cache.literal_value, ahead, along, across)
        four = ir.Constant(I64, 4)
        scales_at = row_addresses(builder, a_scale, a_scale_row, left, rows)
        codes_at = row_addresses(builder, a_sum, a_sum_row, left, rows)
        columns_at = []
        for j in range(cols):
            offset = load(builder, builder.add(w_at, ir.Constant(I64, 8 * j)), I64)
            columns_at.append(builder.add(w_scale, builder.mul(offset, four)))

        def body(g: Any, totals: list) -> list:
            start = builder.mul(g, group)
            rest = builder.sub(k, start)
            count = builder.select(builder.icmp_signed("<", group, rest), group, rest)
            sums = _dot_sums(builder, step, (rows, cols), (a, lda), (b, ldb), ask, start, count)
            columns: Any = ir.Constant(vec(F32, 4), None)
            for j, at in enumerate(columns_at):
                one = load(builder, builder.add(at, builder.mul(g, w_group)), F32)
                columns = builder.insert_element(columns, one, ir.Constant(I32, j))
            found = []
            for i, values in enumerate(sums):
                offset = None
                if step.name == "dpbusd":
                    codes = load(builder, builder.add(codes_at[i], builder.mul(g, four)), I32)
                    offset = spread(builder, builder.shl(codes, ir.Constant(I32, 7)), 4)
                scale = load(builder, builder.add(scales_at[i], builder.mul(g, a_scale_group)), F32)
                value = builder.fmul(step.as_f32(builder, values, offset), spread(builder, scale, 4))
                found.append(builder.fadd(totals[i], builder.fmul(value, columns)))
            return found

        last = builder.sub(builder.add(k, group), ir.Constant(I64, 1))
        totals = loop(builder, builder.sdiv(last, group), 1, [ir.Constant(vec(F32, 4), None)] * rows, body)
        for i, total in enumerate(totals):
            address = builder.add(c, builder.mul(ldc, ir.Constant(I64, i)))
            store(
                builder, total if cols == 4 else builder.extract_element(total, ir.Constant(I32, 0)), address
            )
        return context.get_dummy_value()

    return signature, codegen


def _dot_sums(
    builder: Any, step: Step, shape: tuple[int, int], a_side: tuple[Any, Any], b_side: tuple[Any, Any],
    ask: tuple[int, Any, Any, Any], start: Any, count: Any,
) -> list:  # fmt: skip
    """The loop over `count` elements of K from `start` on of a dot tile: per row a vector of four columns' sums."""
    rows, cols = shape
    cache, ahead, along, across = ask
    lines = requests(step.kind, cols)
    scale_a, scale_b = ir.Constant(I64, step.a_bytes), ir.Constant(I64, step.b_bytes)
    a_rows = [builder.add(a_side[0], builder.mul(a_side[1], ir.Constant(I64, i))) for i in range(rows)]
    b_rows = [builder.add(b_side[0], builder.mul(b_side[1], ir.Constant(I64, j))) for j in range(cols)]
    zero, no_nan = ir.Constant(step.acc, None), ir.Constant(vec(I16, step.elements), None)

    def body(position: Any, values: list) -> list:
        sums = list(values[: rows * cols])
        step.nan_codes = values[-1] if step.shrunk else None
        position = builder.add(start, position)
        offset_a, offset_b = builder.mul(position, scale_a), builder.mul(position, scale_b)
        b_vectors = []
        for j, row in enumerate(b_rows):
            b_vectors.append(step.load_b(builder, builder.add(row, offset_b)))
            if j < lines:
                line = builder.add(builder.mul(offset_b, along), builder.mul(across, ir.Constant(I64, j)))
                prefetch(builder, builder.add(ahead, builder.lshr(line, ir.Constant(I64, 8))), cache)
        for i, row in enumerate(a_rows):
            a_vector = step.load_a(builder, builder.add(row, offset_a))
            for j, b_vector in enumerate(b_vectors):
                sums[i * cols + j] = step.accumulate(builder, sums[i * cols + j], a_vector, b_vector)
        return sums + ([step.nan_codes] if step.shrunk else [])

    starts = [zero] * (rows * cols) + ([no_nan] if step.shrunk else [])
    ended = loop(builder, count, step.elements, starts, body)
    any_nan = None
    if step.shrunk:
        any_nan = _columns_with_nan(builder, step, b_rows, ended[-1], start, count)
    found = []
    for first in range(0, rows * cols, cols):
        sums = _reduce4(builder, ended[first : first + cols] + [zero] * (4 - cols), step.add(builder))
        found.append(step.finish(builder, sums, any_nan))
    return found


def _columns_with_nan(builder: Any, step: Step, b_rows: list, largest: Any, start: Any, count: Any) -> Any:
    """Which of up to four columns have a NaN code among `count` from `start` on, four bits.

    `largest` is what all of them left in `nan_codes`: one register in the loop, and columns are looked
    through one by one only where it says that there is one.
    """
    nowhere = ir.Constant(vec(I1, 4), None)
    met, before = step.met_nan(builder, largest), builder.block
    with builder.if_then(met, likely=False):
        found: Any = nowhere
        for j, row in enumerate(b_rows):

            def body(position: Any, values: list, row: Any = row) -> list:
                step.nan_codes = values[0]
                step.look_for_nan(builder, builder.add(row, builder.add(start, position)))
                return [step.nan_codes]

            codes = loop(builder, count, step.elements, [ir.Constant(largest.type, None)], body)[0]
            found = builder.insert_element(found, step.met_nan(builder, codes), ir.Constant(I32, j))
        looked = builder.block
    either = builder.phi(nowhere.type)
    either.add_incoming(nowhere, before)
    either.add_incoming(found, looked)
    return either


@intrinsic(prefer_literal=True)
def packed_tile(typingctx, kind, mr, nv, ldb, a, lda, b, ahead, along, c, ldc, units, w_sum):  # type: ignore[no-untyped-def]
    """c[i, j] += Σₖ a[i, k] · b[j, k] for i < mr and the columns j of nv vectors, b packed by `pack`.

    `kind`, `mr`, `nv`, `ldb` are compile-time constants. `b` + `ldb` · u holds unit u of every
    column; `units` is a multiple of UNROLL. With unit u goes a request for `ahead` + u · `along` / 256.
    The kinds of `cpu_winograd` take a panel of its rows as `a`, and at `w_sum` what its `paired_columns` found;
    the sums of rows have still to come off. The rest is as in `dot_tile`.
    """
    if not all(isinstance(t, types.Literal) for t in (kind, mr, nv, ldb)):
        return None
    step, rows, vectors = Step(kind.literal_value), mr.literal_value, nv.literal_value
    signature = types.void(kind, mr, nv, ldb, *[types.int64] * 9)

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        a, lda, b, ahead, along, c, ldc, units, w_sum = args[4:]
        shape, stride = (rows, vectors), ldb.literal_value
        sums = _packed_sums(builder, step, shape, stride, a, lda, b, ahead, along, units, w_sum)
        for i, v, address in _places(builder, step, rows, vectors, c, ldc):
            step.add_to(builder, sums[i * vectors + v], address)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def scaled_tile(
    typingctx, kind, mr, nv, ldb, a, lda, b, ahead, along, c, ldc, units, w_sum, left, a_scale, a_scale_row, a_sum,
    a_sum_row, w_scale,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """c[i, j] += float32(Σₖ a[i, k] · b[j, k]) · a_scale[i] · w_scale[j], rounded in this order: one group of K.

    c, a_scale and w_scale are float32; row i of a_scale stands at `a_scale` + `a_scale_row` · i. For dpbusd
    128 · a_sum[i], int32 and likewise placed, come off the sums first, for winograd a_sum[i]. Rows from `left` on
    take the scale of the last: what they give is nobody's. The rest is as in `packed_tile`.
    """
    if not all(isinstance(t, types.Literal) for t in (kind, mr, nv, ldb)):
        return None
    step, rows, vectors = Step(kind.literal_value), mr.literal_value, nv.literal_value
    signature = types.void(kind, mr, nv, ldb, *[types.int64] * 15)

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        a, lda, b, ahead, along, c, ldc, units, w_sum = args[4:13]
        left, a_scale, a_scale_row, a_sum, a_sum_row, w_scale = args[13:]
        shape, stride = (rows, vectors), ldb.literal_value
        sums = _packed_sums(builder, step, shape, stride, a, lda, b, ahead, along, units, w_sum)

        def of_rows(address: Any, row: Any, kind: Any) -> list:
            places = row_addresses(builder, address, row, left, rows)
            return [spread(builder, load(builder, at, kind), step.lanes) for at in places]

        scales, offsets = of_rows(a_scale, a_scale_row, F32), [None] * rows
        if step.paired or step.name == "dpbusd":
            offsets = of_rows(a_sum, a_sum_row, I32)
        if step.name == "dpbusd":
            seven = splat(ir.Constant(I32, 7), step.lanes)
            offsets = [builder.shl(codes, seven) for codes in offsets]
        for i, v, address in _places(builder, step, rows, vectors, c, ldc):
            value = step.as_f32(builder, sums[i * vectors + v], offsets[i])
            columns = load(builder, builder.add(w_scale, ir.Constant(I64, 4 * v * step.lanes)), step.real)
            value = builder.fmul(builder.fmul(value, scales[i]), columns)
            store(builder, builder.fadd(load(builder, address, step.real), value), address)
        return context.get_dummy_value()

    return signature, codegen


def _packed_sums(
    builder: Any, step: Step, shape: tuple[int, int], unit_stride: int, a: Any, lda: Any, b: Any, ahead: Any,
    along: Any, units: Any, w_sum: Any,
) -> list:  # fmt: skip
    """The loop over K of a packed tile: its accumulators, row by row."""
    rows, vectors = shape
    if step.paired:
        return paired_sums(builder, step, shape, unit_stride, a, b, ahead, along, units, w_sum)
    a_rows = [builder.add(a, builder.mul(lda, ir.Constant(I64, i))) for i in range(rows)]

    def one_unit(u: int, a_here: list, b_here: Any, sums: list) -> None:
        places = [unit_stride * u + step.bits // 8 * v for v in range(vectors)]
        b_vectors = [load(builder, builder.add(b_here, ir.Constant(I64, at)), step.unit) for at in places]
        for i, row in enumerate(a_here):
            one = load(builder, builder.add(row, ir.Constant(I64, 4 * u)), I32)
            everywhere = builder.bitcast(spread(builder, one, step.lanes), step.unit)
            for v, b_vector in enumerate(b_vectors):
                at = i * vectors + v
                sums[at] = step.accumulate(builder, sums[at], everywhere, b_vector)

    def body(position: Any, sums: list) -> list:
        sums = list(sums)
        line = builder.lshr(builder.mul(position, along), ir.Constant(I64, 8))
        prefetch(builder, builder.add(ahead, line), 2)
        offset = builder.mul(position, ir.Constant(I64, 4))
        a_here = [builder.add(row, offset) for row in a_rows]
        b_here = builder.add(b, builder.mul(position, ir.Constant(I64, unit_stride)))
        for u in range(UNROLL):
            one_unit(u, a_here, b_here, sums)
        return sums

    return loop(builder, units, UNROLL, [ir.Constant(step.acc, None)] * (rows * vectors), body)


def _places(
    builder: Any, step: Step, rows: int, vectors: int, c: Any, ldc: Any
) -> Iterator[tuple[int, int, Any]]:
    """(row, vector, address) of everything that a packed tile adds to; 32 bits a column."""
    for i in range(rows):
        row = builder.add(c, builder.mul(ldc, ir.Constant(I64, i)))
        for v in range(vectors):
            yield i, v, builder.add(row, ir.Constant(I64, 4 * step.lanes * v))


@intrinsic(prefer_literal=True)
def pack(typingctx, kind, source, stride, valid, target, ldt, units):  # type: ignore[no-untyped-def]
    """Transposes 32-bit units of one vector's worth of rows: unit u of row j → target + ldt · u + 4 · j.

    `kind` is a compile-time constant; rows at `source` + `stride` · j are codes as stored for the
    integer kinds, else the operand's type. From `valid` rows on, the last row is repeated.
    `units` is a multiple of the vector's lanes.
    """
    if not isinstance(kind, types.Literal):
        return None
    step = Step(kind.literal_value)
    signature = types.void(kind, *[types.int64] * 6)

    def codegen(context, builder, sig, args):  # type: ignore[no-untyped-def]
        source, stride, valid, target, ldt, units = args[1:]
        count = step.lanes
        rows = row_addresses(builder, source, stride, valid, count)
        unit_bytes = ir.Constant(I64, 4 * step.b_bytes // step.a_bytes)
        ahead = builder.mul(stride, ir.Constant(I64, count))

        def body(position: Any, _: list) -> list:
            offset = builder.mul(position, unit_bytes)
            at_rows = [builder.add(row, offset) for row in rows]
            vectors = [step.load_units(builder, row) for row in at_rows]
            for row in at_rows:
                prefetch(builder, builder.add(row, ahead), 1)
            at = builder.add(target, builder.mul(position, ldt))
            for u, column in enumerate(transpose(builder, vectors)):
                store(builder, column, builder.add(at, builder.mul(ldt, ir.Constant(I64, u))))
            return []

        loop(builder, units, count, [], body)
        return context.get_dummy_value()

    return signature, codegen


def row_addresses(builder: Any, source: Any, stride: Any, valid: Any, count: int) -> list:
    """`count` addresses, `stride` apart; from `valid` on, the last valid one's."""
    last = builder.sub(valid, ir.Constant(I64, 1))
    found = []
    for j in range(count):
        at = ir.Constant(I64, j)
        at = builder.select(builder.icmp_signed("<", at, last), at, last)
        found.append(builder.add(source, builder.mul(at, stride)))
    return found


def transpose(builder: Any, rows: list) -> list:
    """A square of 32-bit elements: within 128 bits first, then whole 128-bit parts, as the hardware does."""
    n = len(rows)
    parts = range(n // 4)

    def mix(x: Any, y: Any, pattern: tuple[int, ...]) -> Any:
        """Per 128 bits: elements 0–3 are x's, 4–7 are y's."""
        where = [4 * q + i if i < 4 else n + 4 * q + i - 4 for q in parts for i in pattern]
        return shuffle(builder, x, y, where)

    def join(x: Any, y: Any, chosen: list[int]) -> Any:
        """Whole 128-bit parts: below n/4 x's, from there on y's."""
        where = [4 * part + i if part < len(parts) else n + 4 * (part - len(parts)) + i
                 for part in chosen for i in range(4)]  # fmt: skip
        return shuffle(builder, x, y, where)

    columns: list[list] = [[], [], [], []]
    for first in range(0, n, 4):
        r = rows[first : first + 4]
        low = [mix(r[0], r[1], (0, 4, 1, 5)), mix(r[2], r[3], (0, 4, 1, 5))]
        high = [mix(r[0], r[1], (2, 6, 3, 7)), mix(r[2], r[3], (2, 6, 3, 7))]
        for j, (x, y) in enumerate((low, low, high, high)):
            columns[j].append(mix(x, y, (0, 1, 4, 5) if j % 2 == 0 else (2, 3, 6, 7)))
    if n == 4:
        return [found[0] for found in columns]
    out: list = [None] * n
    for j, found in enumerate(columns):
        if n == 8:
            out[j], out[4 + j] = join(found[0], found[1], [0, 2]), join(found[0], found[1], [1, 3])
            continue
        a, b = join(found[0], found[1], [0, 1, 4, 5]), join(found[0], found[1], [2, 3, 6, 7])
        c, d = join(found[2], found[3], [0, 1, 4, 5]), join(found[2], found[3], [2, 3, 6, 7])
        out[j], out[4 + j] = join(a, c, [0, 2, 4, 6]), join(a, c, [1, 3, 5, 7])
        out[8 + j], out[12 + j] = join(b, d, [0, 2, 4, 6]), join(b, d, [1, 3, 5, 7])
    return out
