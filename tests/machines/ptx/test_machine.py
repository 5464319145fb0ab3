"""The machine itself: what a small program does wrong is a Fault, and what it does right has a known result."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from machines.memory import Fault, Global
from machines.numbers import Unknown
from machines.ptx.arithmetic import operation
from machines.ptx.machine import Machine
from machines.ptx.program import parse
from machines.ptx.transfer import TensorMap

HEAD = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u64 .ptr .global .align 1 kernel_param_1
)
.reqntid 64
{
	.reg .pred 	%p<4>;
	.reg .b32 	%r<20>;
	.reg .b64 	%rd<8>;
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b64 	%rd2, [kernel_param_1];
	mov.u32 	%r1, %tid.x;
	mov.b32 	%r2, global_smem;
	shl.b32 	%r3, %r1, 2;
	cvt.u64.u32 	%rd3, %r3;
	add.s64 	%rd4, %rd1, %rd3;
	add.s64 	%rd5, %rd2, %rd3;
	add.s32 	%r4, %r2, %r3;
	xor.b32 	%r5, %r3, 128;
	add.s32 	%r6, %r2, %r5;
"""


def run(body: str, count: int = 64) -> torch.Tensor:
    """Of 64 threads, with int32 [count] 0, 1, … to read at %rd4 and int32 [64] to write at %rd5; 512 bytes at %r2."""
    x, out = torch.arange(count, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    program = parse(HEAD + body + "\tret;\n}\n")
    parameters = struct.pack("<QQ", x.data_ptr(), out.data_ptr())
    Machine(program, parameters, {}, Global([x, out]), 512).launch((1, 1, 1))
    return out


EXCHANGE = """
	ld.global.b32 	%r7, [%rd4];
	st.shared.b32 	[%r4], %r7;
	bar.sync 	0;
	ld.shared.b32 	%r8, [%r6];
	st.global.b32 	[%rd5], %r8;
"""
COPY = """
	cp.async.ca.shared.global [ %r4 + 0 ], [ %rd4 + 0 ], 0x4;
	cp.async.commit_group;
	cp.async.wait_group 	0;
	bar.sync 	0;
	ld.shared.b32 	%r8, [%r6];
	st.global.b32 	[%rd5], %r8;
"""


@pytest.mark.parametrize("body", [EXCHANGE, COPY])
def test_two_warps_exchange(body):
    assert torch.equal(run(body), torch.arange(64, dtype=torch.int32) ^ 32)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (EXCHANGE.replace("bar.sync 	0;", ""), "another warp wrote, without a barrier|nothing wrote"),
        (COPY.replace("bar.sync 	0;", ""), "another warp wrote, without a barrier|nothing wrote"),
        (COPY.replace("cp.async.wait_group 	0;", ""), "nothing wrote"),
        (COPY + COPY, "another warp reads, without a barrier"),
        (EXCHANGE.replace("[%r6]", "[%r6+2]"), "no multiple of 4"),
        (EXCHANGE.replace("[%r6]", "[%r6+256]"), "nothing wrote"),
        (EXCHANGE.replace("[%r6]", "[%r6+512]"), "outside of on-chip memory"),
        (EXCHANGE.replace("[%rd4]", "[%rd4+4]"), "outside of every tensor"),
        (EXCHANGE.replace("[%rd5]", "[%rd2]"), "different values to one address"),
        ("\tsetp.lt.s32 	%p1, %r1, 32;\n\t@%p1 bra 	$L__a;\n\tbar.sync 	0;\n$L__a:\n", "others never reach"),
        ("\tsetp.lt.s32 	%p1, %r1, 40;\n\t@%p1 shfl.sync.bfly.b32 	%r7, %r3, 1, 31, -1;\n", "a part of a warp"),
        ("$L__a:\n\tbra.uni 	$L__a;\n", "a loop without an end"),
    ],
)  # fmt: skip
def test_faults(body, message):
    with pytest.raises(Fault, match=message):
        run(body)


def test_threads_that_part_wait_for_each_other():
    body = """
	setp.lt.s32 	%p1, %r1, 32;
	@%p1 bra 	$L__a;
	st.shared.b32 	[%r4], 7;
	bar.sync 	0;
	mov.b32 	%r8, 1;
	bra.uni 	$L__b;
$L__a:
	bar.sync 	0;
	ld.shared.b32 	%r8, [%r6];
$L__b:
	st.global.b32 	[%rd5], %r8;
"""
    assert run(body).tolist() == [7] * 32 + [1] * 32


@pytest.mark.parametrize(
    "opcode", ["add.sat.s32", "mul.hi.s32", "vadd.s32", "add.rz.f32", "cvt.rn.relu.bf16.f32", "mad.hi.s32"]
)
def test_what_it_does_not_know_is_not_guessed(opcode):
    x = np.ones(4, np.uint32)
    with pytest.raises(Unknown):
        operation(opcode)(*[x] * (3 if opcode.startswith("mad") else 2))


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32).view(np.uint32)


def words(*values: int) -> np.ndarray:
    return np.array(values, np.int64).astype(np.uint32)


@pytest.mark.parametrize(
    ("opcode", "args", "expected"),
    [
        ("div.s32", [words(-7, 7, -7), words(2, -2, -2)], words(-3, -3, 3)),
        ("rem.s32", [words(-7, 7), words(2, -2)], words(-1, 1)),
        ("shr.s32", [words(-8, -8), words(1, 40)], words(-4, -1)),
        ("shr.u32", [words(-8, -8), words(28, 40)], words(15, 0)),
        ("bfe.s32", [words(0b1100, 0b0100), words(2, 2), words(2, 2)], words(-1, 1)),
        ("bfe.u32", [words(0b1100), words(2), words(2)], words(3)),
        ("prmt.b32", [words(0x44332211), words(0x88776655), words(0x7040)], words(0x88115511)),
        ("prmt.b32", [words(0x80), words(0), words(0x8888)], words(-1)),
        ("cvt.rzi.s16.f32", [floats(-2.9, 40000.0, float("nan"))], np.array([-2, 32767, 0], np.int16).view(np.uint16)),
        ("cvt.rn.bf16x2.f32", [floats(1.0, 1.00390625), floats(-2.0, 1.01171875)], words(0x3F80C000, 0x3F803F82)),
        ("cvt.rn.satfinite.e4m3x2.f32", [floats(1000.0), floats(-0.3)], np.array([0x7EAA], np.uint16)),
        ("min.f32", [floats(float("nan"), 1.0), floats(2.0, 2.0)], floats(2.0, 1.0)),
        ("mul.wide.s32", [words(-3), words(1 << 30)], np.array([-3 << 30]).view(np.uint64)),
        ("add.rn.f32.bf16", [np.array([0x3F80], np.uint16), floats(0.5)], floats(1.5)),
        ("fma.rn.f32", [floats(1 + 2**-12), floats(1 + 2**-12), floats(-1 - 2**-11)], floats(2**-24)),
    ],
)  # fmt: skip
def test_arithmetic(opcode, args, expected):
    assert operation(opcode)(*args).tolist() == expected.tolist()


def test_a_tensor_map_has_the_limits_of_the_drivers():
    good = {
        "base": 4096,
        "rows": 8,
        "columns": 64,
        "row_stride": 64,
        "item": 1,
        "box": (8, 64),
        "row_bytes": 64,
    }
    TensorMap(**good)
    for wrong in (
        {"base": 8},
        {"row_stride": 72},
        {"box": (512, 64)},
        {"box": (8, 8)},
        {"row_bytes": 32},
        {"rows": 0},
    ):
        with pytest.raises(Fault, match="a tensor map with"):
            TensorMap(**(good | wrong))
