"""What the CPU products become on 64-bit Arm, which LLVM compiles for on any machine: instructions, and registers.

The results are checked on such a machine, or under emulation: `make check-arm`.
"""

from __future__ import annotations

import re

import pytest

pytest.importorskip("llvmlite")

import llvmlite.binding as llvm
from llvmlite import ir

from lowbit.ops import cpu_isa
from lowbit.ops.cpu_emit import I64, store
from lowbit.ops.cpu_step import Step
from lowbit.ops.cpu_tiles import UNROLL, _dot_sums, _packed_sums

TILES = [
    cpu_isa._INTEGER["neon_dotprod"],
    cpu_isa._MULTIPLY_ADD[128],
    cpu_isa._FLOAT[128],
    cpu_isa._DOUBLE[128],
]
# What multiplies four lanes of 32 bits (or two of 64), and how many times a step takes it.
MULTIPLIES = {"sdot": ("sdot", 1), "smull": ("smull2?", 2), "fma": ("fmla", 1), "fmad": ("fmla", 2)}


def assembly(emit, features: str = "+dotprod") -> str:
    """A function of ten int64, the last of which is where to store what `emit` makes of the others."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 10), "tile")
    builder = ir.IRBuilder(function.append_basic_block())
    *arguments, out = function.args
    for at, value in enumerate(emit(builder, arguments)):
        store(builder, value, builder.add(out, ir.Constant(I64, 64 * at)))
    builder.ret_void()
    try:
        target = llvm.Target.from_triple("aarch64-unknown-linux-gnu")
    except RuntimeError:
        pytest.skip("this LLVM was built without Arm")
    machine = target.create_target_machine(cpu="neoverse-n1", features=features, opt=3)
    parsed = llvm.parse_assembly(str(module))
    parsed.triple = machine.triple
    builder_ = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    builder_.getModulePassManager().run(parsed, builder_)
    return machine.emit_assembly(parsed)


def loop_of(text: str, instruction: str) -> tuple[int, str]:
    """(how many of the instruction it has, the loop): of all innermost loops the one that has most."""
    found = [(0, "")]
    for block in re.split(r"^(?=\.LBB)", text, flags=re.MULTILINE)[1:]:
        label = block[: block.index(":")]
        body = re.match(
            rf"(?s).*?^\s+(?:b\.\w+|cbn?z\s+\w+,|tbn?z\s+\w+, #\d+,)\s+{re.escape(label)}$",
            block,
            re.MULTILINE,
        )
        if body:
            found.append((len(re.findall(rf"^\s+(?:{instruction})\s", body[0], re.MULTILINE)), body[0]))
    return max(found)


def packed(tile):
    step = Step(tile.kind)

    def emit(builder, arguments):
        a, lda, b, ahead, along, units, w_sum = arguments[:7]
        shape, stride = (tile.rows, tile.vectors), 4 * tile.cols
        return _packed_sums(builder, step, shape, stride, a, lda, b, ahead, along, units, w_sum)

    return emit


def dot(kind: str, rows: int):
    step = Step(kind)

    def emit(builder, arguments):
        a, lda, b, ldb, ahead, along, across, start, count = arguments
        return _dot_sums(
            builder, step, (rows, 4), (a, lda), (b, ldb), (1, ahead, along, across), start, count
        )

    return emit


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.kind)
def test_packed_tiles_multiply_in_registers(tile):
    instruction, times = MULTIPLIES[tile.kind[:-3]]
    found, loop = loop_of(assembly(packed(tile)), instruction)
    assert found == times * UNROLL * tile.rows * tile.vectors
    assert "[sp" not in loop


@pytest.mark.parametrize(
    ("tile", "storage"),
    [
        (tile, s)
        for tile in TILES
        for s in (("i8", "u8", "e4m3", "bf16") if tile.kind.startswith("fma") else ("",))
    ],
    ids=lambda given: getattr(given, "kind", given),
)
def test_dot_products_multiply_in_registers(tile, storage):
    instruction, times = MULTIPLIES[tile.kind[:-3]]
    kind, halves = (f"{tile.kind}:{storage}", 2) if storage else (tile.kind, 1)
    for rows in (1, 2, 4):
        if rows <= tile.dot_rows:
            found, loop = loop_of(assembly(dot(kind, rows)), instruction)
            assert found == halves * times * rows * 4
            assert "[sp" not in loop, rows


def test_without_the_dot_product_there_is_none():
    found, _ = loop_of(assembly(packed(cpu_isa._MULTIPLY_ADD[128]), features="-dotprod"), "sdot")
    assert found == 0
