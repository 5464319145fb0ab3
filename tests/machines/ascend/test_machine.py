"""The machine for Ascend: what a small program does wrong is a Fault, and what it does right has a known result."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from machines.ascend import arithmetic
from machines.ascend.machine import Machine
from machines.ascend.program import parse
from machines.memory import Fault
from machines.numbers import Unknown

GM, UB = "#hivm.address_space<gm>", "#hivm.address_space<ub>"
PARAMETERS = (
    f"(%ffts: i64, %lock: memref<?xi8, {GM}>, %work: memref<?xi8, {GM}>, %in: memref<?xi32, {GM}>, "
    f"%out: memref<?xi32, {GM}>, %count: i32, %gx: i32, %gy: i32, %gz: i32) attributes {{hacc.entry}} {{"
)
# Each block has eight elements to read and eight to write.
BEGIN = f"""
    %c0 = arith.constant 0 : index
    %c8 = arith.constant 8 : index
    %c0_i32 = arith.constant 0 : i32
    %at0 = arith.constant 0 : i64
    %at64 = arith.constant 64 : i64
    %block = hivm.hir.get_block_idx -> i64
    %block_index = arith.index_cast %block : i64 to index
    %place = affine.apply #map(%block_index)
    %from = memref.reinterpret_cast %in to offset: [%place], sizes: [8], strides: [1] \
: memref<?xi32, {GM}> to memref<8xi32, strided<[1], offset: ?>, {GM}>
    %to = memref.reinterpret_cast %out to offset: [%place], sizes: [8], strides: [1] \
: memref<?xi32, {GM}> to memref<8xi32, strided<[1], offset: ?>, {GM}>
    %a = hivm.hir.pointer_cast(%at0) : memref<8xi32, {UB}>
    %b = hivm.hir.pointer_cast(%at64) : memref<8xi32, {UB}>
"""
LOAD = "func.call @load_gm_to_ubuf_1d_int32_t(%from, %a, %c0_i32, %c0_i32, %c0) : (x) -> ()\n"
DOUBLE = "func.call @vadd_1d_int32_t(%a, %a, %b) : (x) -> ()\n"
STORE = "func.call @store_ubuf_to_gm_1d_int32_t(%b, %to, %c0_i32) : (x) -> ()\n"
LOADED, DONE = (
    f"hivm.hir.set_flag[{pipes}]\nhivm.hir.wait_flag[{pipes}]\n"
    for pipes in ("<PIPE_MTE2>, <PIPE_V>, <EVENT_ID0>", "<PIPE_V>, <PIPE_MTE3>, <EVENT_ID1>")
)
WHOLE = LOAD + LOADED + DOUBLE + DONE + STORE


def function(name: str, body: str) -> str:
    return f"func.func @{name}{PARAMETERS}\n{BEGIN}\n{body}\nreturn\n}}\n"


def program(**bodies: str) -> str:
    maps = "#map = affine_map<(d0) -> (d0 * 8)>\n#map1 = affine_map<(d0)[s0] -> ((d0 - s0) ceildiv 3, s0 mod 4)>\n"
    return maps + "module {\n" + "".join(function(name, body) for name, body in bodies.items()) + "}\n"


def run(text: str, blocks: int = 2, size: int = 16) -> list[int]:
    x, out = torch.arange(1, 1 + size, dtype=torch.int32), torch.zeros(size, dtype=torch.int32)
    Machine(parse(text), [x, out, 5]).launch((blocks,))
    return out.tolist()


def test_a_vector_core_alone():
    assert run(program(kernel=WHOLE)) == [2 * (i + 1) for i in range(16)]


@pytest.mark.parametrize(
    ("without", "fault"),
    [
        (
            LOADED,
            "core 0's V reads what an instruction that may not have ended is writing, in func.call @vadd",
        ),
        (
            DONE,
            "core 0's MTE3 reads what an instruction that may not have ended is writing, in func.call @store",
        ),
        (DONE.splitlines()[0] + "\n", "MTE3 waits for the flag 1 of V, which nothing has set"),
        (DONE.splitlines()[1] + "\n", "MTE3 reads what an instruction that may not have ended"),
        (LOAD, "a read of what nothing wrote in ub"),
    ],
)
def test_each_wait_is_needed(without, fault):
    assert without in WHOLE
    with pytest.raises(Fault, match=fault):
        run(program(kernel=WHOLE.replace(without, "")))


def test_what_is_written_again_or_still_read_must_have_ended():
    again = DOUBLE + "func.call @vadd_1d_int32_t(%b, %b, %b) : (x) -> ()\n"
    barrier = DOUBLE + "hivm.hir.pipe_barrier[<PIPE_V>]\n" + again.removeprefix(DOUBLE)
    with pytest.raises(Fault, match="core 0's V reads what an instruction"):
        run(program(kernel=WHOLE.replace(DOUBLE, again)))
    assert run(program(kernel=WHOLE.replace(DOUBLE, barrier)))[:3] == [4, 8, 12]
    over = "func.call @load_gm_to_ubuf_1d_int32_t(%from, %b, %c0_i32, %c0_i32, %c0) : (x) -> ()\n"
    with pytest.raises(
        Fault, match="core 0's MTE2 writes what an instruction that may not have ended is writing"
    ):
        run(program(kernel=WHOLE.replace(DOUBLE, DOUBLE + over)))
    with pytest.raises(
        Fault, match="core 0's MTE2 writes what an instruction that may not have ended is reading"
    ):
        run(program(kernel=WHOLE.replace(DONE, DONE.replace("MTE3", "MTE2")).replace(STORE, over)
                    .replace(DOUBLE, DOUBLE + DONE + STORE)))  # fmt: skip


def test_flags_stay_for_nobody():
    with pytest.raises(Fault, match="the flag 2 from V to MTE2 is left set"):
        run(program(kernel=WHOLE + "hivm.hir.set_flag[<PIPE_V>, <PIPE_MTE2>, <EVENT_ID2>]\n"))
    with pytest.raises(Fault, match="is set twice"):
        run(program(kernel="hivm.hir.set_flag[<PIPE_V>, <PIPE_MTE2>, <EVENT_ID2>]\n" * 2))


def test_what_lies_outside_is_a_fault():
    with pytest.raises(Fault, match="outside of every tensor"):
        run(program(kernel=WHOLE), blocks=3)
    with pytest.raises(Fault, match=r"outside of ub \(196608 bytes\)"):
        far = f"%far = arith.constant 196600 : i64\n%a9 = hivm.hir.pointer_cast(%far) : memref<8xi32, {UB}>\n"
        run(program(kernel=far + LOAD.replace("%a,", "%a9,")))
    with pytest.raises(Fault, match="a window of 9 elements from 0 on, in one of 8"):
        run(program(kernel="%w = memref.subview %from[0] [9] [1] : memref<8xi32> to memref<9xi32>\n"))


def test_what_two_blocks_touch_is_a_fault():
    there = "%to0 = memref.reinterpret_cast %out to offset: [%c0], sizes: [8], strides: [1] : x to memref<8xi32>\n"
    with pytest.raises(Fault, match="a block writes what another one wrote"):
        run(program(kernel=there + WHOLE.replace("%b, %to,", "%b, %to0,")))


SET = "hivm.hir.sync_block_set[<{}>, <PIPE_{}>, <PIPE_S>] flag = 1 ffts_base_addr = %ffts\n"
WAIT = "hivm.hir.sync_block_wait[<{}>, <PIPE_{}>, <PIPE_S>] flag = 1\n"
# Vector core 0 stores what vector core 1 has loaded and doubled, after the cube core has heard of it.
FIRST = """
    %sub = hivm.hir.get_sub_block_idx -> i64
    %one = arith.constant 1 : i64
    %is = arith.cmpi eq, %sub, %one : i64
    scf.if %is {
""" + WHOLE + "}\n" + SET.format("VECTOR", "MTE3")  # fmt: skip
SECOND = WAIT.format("VECTOR", "S") + """
    %is0 = arith.cmpi eq, %sub, %at0 : i64
    scf.if %is0 {
""" + WHOLE.replace("%from,", "%to,") + "}\n"  # fmt: skip
CUBE = WAIT.format("CUBE", "MTE3") + SET.format("CUBE", "S")


def test_cores_wait_for_each_other():
    def mixed(cube: str, vector: str) -> list[int]:
        return run(program(kernel_mix_aic=cube, kernel_mix_aiv=vector))

    assert mixed(CUBE, FIRST + SECOND) == [4 * (i + 1) for i in range(16)]
    with pytest.raises(
        Fault, match="core 1's MTE2 reads what an instruction that may not have ended is writing"
    ):
        mixed(CUBE + WAIT.format("CUBE", "MTE3"), SET.format("VECTOR", "S") + FIRST + SECOND)
    with pytest.raises(
        Fault, match="core 1's MTE2 reads what an instruction that may not have ended is writing"
    ):
        mixed(CUBE, FIRST.replace("<PIPE_MTE3>, <PIPE_S>] flag", "<PIPE_V>, <PIPE_S>] flag") + SECOND)
    with pytest.raises(Fault, match="kernel: cores wait for each other"):
        mixed(CUBE, WAIT.format("VECTOR", "S") + FIRST + SECOND)
    with pytest.raises(Fault, match="the flag 1 from core 0 to core 1 is left set"):
        mixed(CUBE, FIRST)


def test_products_come_in_tiles():
    """[16, 64] · [16, 64]ᵀ by the cube core, int8 codes of a and b side by side in memory."""
    text = f"""
#map = affine_map<(d0) -> (d0 * 8)>
module {{
func.func @kernel_mix_aic(%ffts: i64, %lock: memref<?xi8, {GM}>, %work: memref<?xi8, {GM}>, %in: memref<?xi8, {GM}>, \
%out: memref<?xi32, {GM}>, %gx: i32, %gy: i32, %gz: i32) attributes {{hacc.entry}} {{
    %c0 = arith.constant 0 : index
    %m = arith.constant 11 : index
    %k = arith.constant 33 : index
    %n = arith.constant 16 : index
    %at0 = arith.constant 0 : i64
    %one = arith.constant 1 : i64
    %at4096 = arith.constant 4096 : i64
    %none = arith.constant -1 : i64
    %zero = arith.constant 0 : i8
    %false = arith.constant false
    %true = arith.constant true
    %a = memref.reinterpret_cast %in to offset: [%c0], sizes: [11, 33], strides: [33, 1] : x to memref<11x33xi8, {GM}>
    %b = memref.reinterpret_cast %in to offset: [363], sizes: [16, 33], strides: [33, 1] : x to memref<16x33xi8, {GM}>
    %c = memref.reinterpret_cast %out to offset: [0], sizes: [11, 16], strides: [16, 1] : x to memref<11x16xi32, {GM}>
    %a1 = hivm.hir.pointer_cast(%at0) : memref<2x1x16x32xi8, #hivm.address_space<cbuf>>
    %b1 = hivm.hir.pointer_cast(%at4096) : memref<2x1x16x32xi8, #hivm.address_space<cbuf>>
    %c1 = hivm.hir.pointer_cast(%at0) : memref<1x1x16x16xi32, #hivm.address_space<cc>>
    func.call @nd2nz_int8_t(%a, %a1) : (x) -> ()
    hivm.hir.set_flag[<PIPE_MTE2>, <PIPE_MTE1>, <EVENT_ID0>]
    func.call @nd2nz_int8_t(%b, %b1) : (x) -> ()
    hivm.hir.set_flag[<PIPE_MTE2>, <PIPE_MTE1>, <EVENT_ID1>]
    func.call @mma_tile_int8_t_to_int32_t_tb(%a1, %b1, %true, %m, %k, %n, %c1, %at0, %one, %none, %none) : (x) -> ()
    func.call @mma_tile_int8_t_to_int32_t_tb(%a1, %b1, %false, %m, %k, %n, %c1, %none, %none, %none, %none) : (x) -> ()
    hivm.hir.set_flag[<PIPE_M>, <PIPE_FIX>, <EVENT_ID0>]
    hivm.hir.wait_flag[<PIPE_M>, <PIPE_FIX>, <EVENT_ID0>]
    func.call @fixpipe_nz2nd_int32_t_to_int32_t_4d_to_2d(%c1, %c, %false) : (x) -> ()
    return
}}
func.func @kernel_mix_aiv(%ffts: i64, %lock: memref<?xi8, {GM}>, %work: memref<?xi8, {GM}>, %in: memref<?xi8, {GM}>, \
%out: memref<?xi32, {GM}>, %gx: i32, %gy: i32, %gz: i32) attributes {{hacc.entry}} {{
    return
}}
}}
"""
    a, b = torch.randint(-128, 128, (27, 33), dtype=torch.int8).split([11, 16])
    out = torch.zeros(11, 16, dtype=torch.int32)
    both = torch.cat([a, b])
    Machine(parse(text), [both, out]).launch((1,))
    assert torch.equal(out, 2 * (a.int() @ b.int().T))
    waits = "%m, %k, %n, %c1, %at0, %one,"
    with pytest.raises(
        Fault, match="core 0's MTE1 reads what an instruction that may not have ended is writing"
    ):
        Machine(parse(text.replace(waits, waits.replace("%one", "%none"))), [both, out]).launch((1,))


def test_maps_are_floored_and_ceiled():
    first = parse(program(kernel="")).maps["#map1"]
    assert first([7, 0]) == [3, 0] and first([0, 7]) == [-2, 3] and first([1, 1]) == [0, 1]


def test_numbers():
    assert arithmetic.BINARY["arith.divsi"](np.array(-7), np.array(2)) == -3
    assert arithmetic.BINARY["arith.remsi"](np.array(-7), np.array(2)) == -1
    assert arithmetic.cast("arith.extui", np.array([-1], np.int8), np.int32).tolist() == [255]
    with pytest.raises(Fault, match="a float that no int8 is"):
        arithmetic.cast("arith.fptosi", np.array([128.0]), np.int8)
    with pytest.raises(Fault, match="a division by zero"):
        arithmetic.BINARY["arith.divsi"](np.array(1), np.array(0))


def test_what_it_does_not_know_is_an_error():
    with pytest.raises(Unknown, match="the call of vsin_1d_float"):
        run(program(kernel="func.call @vsin_1d_float(%a, %b) : (x) -> ()\n"))
    with pytest.raises(Unknown, match=r"the operation hivm\.hir|the operation barter"):
        run(program(kernel="hivm.hir.barter %a\n"))
    with pytest.raises(Fault, match="takes 3 arguments, found 1"):
        Machine(parse(program(kernel="")), [1]).launch((1,))
