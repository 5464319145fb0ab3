"""The machine for AMD: what a small program does wrong is a Fault, and what it does right has a known result."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from machines.amdgcn import scalar, vector
from machines.amdgcn.machine import Machine
from machines.amdgcn.program import parse
from machines.memory import Fault, Global
from machines.numbers import Unknown

KERNEL = """
	.amdgcn_target "amdgpu9.42-amd-amdhsa-unknown-gfx942"
kernel:
	s_load_dwordx4 s[4:7], s[0:1], 0x0
	v_lshlrev_b32_e32 v1, 2, v0
	v_xor_b32_e32 v2, 0x100, v1
	v_readfirstlane_b32 s9, v0
	s_waitcnt lgkmcnt(0)
{body}
	s_endpgm
.Lfunc_end0:
	.amdhsa_kernel kernel
		.amdhsa_private_segment_fixed_size 0
		.amdhsa_user_sgpr_count 2
		.amdhsa_user_sgpr_kernarg_segment_ptr 1
		.amdhsa_system_sgpr_workgroup_id_x 1
		.amdhsa_system_sgpr_workgroup_id_y 0
		.amdhsa_system_sgpr_workgroup_id_z 0
		.amdhsa_next_free_vgpr 16
	.end_amdhsa_kernel
    .args:
      - .offset:         0
        .size:           8
        .value_kind:     global_buffer
      - .offset:         8
        .size:           8
        .value_kind:     global_buffer
    .group_segment_fixed_size: 0
    .kernarg_segment_size: 16
    .max_flat_workgroup_size: 128
"""


def run(body: str) -> torch.Tensor:
    """Of two waves, with int32 [128] 0, 1, … to read at s[4:5] + v1 and int32 [128] to write at s[6:7] + v1.

    v2: the place of the same lane of the other wave. 1 KiB on-chip.
    """
    x, out = torch.arange(128, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    parameters = struct.pack("<QQ", x.data_ptr(), out.data_ptr())
    program = parse(KERNEL.format(body=body))
    Machine(program, parameters, Global([x, out]), 1024).launch((1, 1, 1))
    return out


EXCHANGE = """
	global_load_dword v3, v1, s[4:5]
	s_waitcnt vmcnt(0)
	ds_write_b32 v1, v3
	s_waitcnt lgkmcnt(0)
	s_barrier
	ds_read_b32 v4, v2
	s_waitcnt lgkmcnt(0)
	global_store_dword v1, v4, s[6:7]
"""
COPY = """
	s_lshl_b32 m0, s9, 2
	v_mov_b32_e32 v8, v1
	v_mov_b32_e32 v9, 0
	v_lshl_add_u64 v[6:7], s[4:5], 0, v[8:9]
	global_load_lds_dword v[6:7], off
	s_waitcnt vmcnt(0)
	s_barrier
	ds_read_b32 v4, v2
	s_waitcnt lgkmcnt(0)
	global_store_dword v1, v4, s[6:7]
"""


@pytest.mark.parametrize("body", [EXCHANGE, COPY])
def test_two_waves_exchange(body):
    assert torch.equal(run(body), torch.arange(128, dtype=torch.int32) ^ 64)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (EXCHANGE.replace("s_barrier", "s_nop 0"), "another warp wrote, without a barrier|nothing wrote"),
        (EXCHANGE.replace("s_waitcnt vmcnt(0)", "s_nop 0"), "a register that a load still writes"),
        (EXCHANGE.replace("s_waitcnt vmcnt(0)", "s_waitcnt vmcnt(1)"), "a register that a load still writes"),
        (EXCHANGE.replace("v3\n	s_waitcnt lgkmcnt(0)", "v3"), "nothing wrote|without a barrier"),
        (EXCHANGE.replace("v2\n	s_waitcnt lgkmcnt(0)", "v2"), "a register that a load still writes"),
        (COPY.replace("s_barrier", "s_nop 0"), "another warp wrote, without a barrier|nothing wrote"),
        (COPY.replace("s_waitcnt vmcnt(0)", "s_nop 0"), "nothing wrote"),
        (EXCHANGE + EXCHANGE, "another warp reads, without a barrier"),
        (EXCHANGE.replace("ds_read_b32 v4, v2", "ds_read_b32 v4, v2 offset:2"), "no multiple of 4"),
        (EXCHANGE.replace("ds_read_b32 v4, v2", "ds_read_b32 v4, v2 offset:512"), "nothing wrote"),
        (EXCHANGE.replace("ds_read_b32 v4, v2", "ds_read_b32 v4, v2 offset:1024"), "outside of on-chip memory"),
        (EXCHANGE.replace("s[4:5]", "s[4:5] offset:8"), "outside of every tensor"),
        (EXCHANGE.replace("dword v1, v4", "dword v9, v4").replace("ds_read", "v_mov_b32_e32 v9, 0\n	ds_read"),
         "different values to one address"),
        (".L1:\n\ts_branch .L1\n", "a loop without an end"),
    ],
)  # fmt: skip
def test_faults(body, message):
    with pytest.raises(Fault, match=message):
        run(body)


def test_lanes_and_waves_that_part_meet_again():
    body = """
	v_mov_b32_e32 v3, 1
	v_cmp_gt_u32_e32 vcc, 80, v0
	s_and_saveexec_b64 s[10:11], vcc
	s_cbranch_execz .L1
	v_mov_b32_e32 v3, 2
.L1:
	s_or_b64 exec, exec, s[10:11]
	s_cmp_eq_u32 s9, 0
	s_cbranch_scc0 .L2
	v_add_u32_e32 v3, 10, v3
.L2:
	global_store_dword v1, v3, s[6:7]
"""
    assert run(body).tolist() == [12] * 64 + [2] * 16 + [1] * 48


def test_a_barrier_does_not_wait_for_waves_that_have_ended():
    run("\ts_cmp_eq_u32 s9, 0\n\ts_cbranch_scc1 .L1\n\ts_barrier\n.L1:\n")


def test_loads_beyond_a_buffer_are_0_and_stores_are_not_made():
    body = """
	s_mov_b32 s10, 0x104
	v_mov_b32_e32 v3, 7
	s_mov_b32 s8, s6
	s_mov_b32 s9, s7
	s_mov_b32 s11, 0
	buffer_store_dword v3, v1, s[8:11], 0 offen offset:4
	s_mov_b32 s8, s4
	s_mov_b32 s9, s5
	buffer_load_dword v4, v1, s[8:11], 0 offen
	s_waitcnt vmcnt(0)
	v_cmp_lt_u32_e32 vcc, 64, v0
	s_and_saveexec_b64 s[12:13], vcc
	global_store_dword v1, v4, s[6:7]
"""
    assert run(body).tolist() == [0] + [7] * 64 + [0] * 63


def test_halves_of_registers_are_loaded_and_stored():
    body = """
	v_mov_b32_e32 v3, 0x12345678
	ds_write_b32 v1, v3
	s_waitcnt lgkmcnt(0)
	v_mov_b32_e32 v4, 7
	ds_read_u16_d16_hi v4, v1 offset:2
	s_waitcnt lgkmcnt(0)
	ds_write_b16_d16_hi v1, v4
	s_waitcnt lgkmcnt(0)
	ds_read_b32 v5, v1
	s_waitcnt lgkmcnt(0)
	v_add_u32_e32 v5, v4, v5
	global_store_dword v1, v5, s[6:7]
"""
    assert run(body).tolist() == [0x12340007 + 0x12341234] * 128


@pytest.mark.parametrize(
    "line",
    [
        "v_add_f32_e64 v1, v2, v3 clamp", "v_mul_f32_e64 v1, v2, v3 mul:2", "v_add_u32_e64 v1, v2, v3 op_sel:[1,0,0]",
        "buffer_load_dword v1, v2, s[4:7], 0 idxen", "ds_read_b32 v1, v2 gds", "v_nothing_b32 v1, v2",
        "s_nothing_b32 s1, s2", "v_mfma_f32_16x16x4_f32 v[0:3], v0, v1, v[0:3]", "v_cmp_class_f32_e32 vcc, v1, v2",
        "v_mov_b32_dpp v1, v2 wave_shr:1 row_mask:0xf bank_mask:0xf",
    ],
)  # fmt: skip
def test_what_it_does_not_know_is_not_guessed(line):
    with pytest.raises(Unknown):
        run(f"\t{line}")


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def words(*values: int) -> np.ndarray:
    return np.array(values, np.int64).astype(np.uint32)


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("perm_b32", [words(0x88776655), words(0x44332211), words(0x0C040D03)], words(0x0055FF44)),
        ("bfe_i32", [words(0b1100, 0b0100), words(2, 2), words(2, 2)], words(-1, 1)),
        ("bfe_u32", [words(0b1100), words(2), words(2)], words(3)),
        ("bfrev_b32", [words(1, 0x80000001)], words(0x80000000, 0x80000001)),
        ("ashrrev_i32", [words(1, 33), words(-8, -8)], words(-4, -4)),
        ("lshlrev_b16", [words(4), words(0xABCDE)], words(0xCDE0)),
        ("ashrrev_i16", [words(4), words(0x8000)], words(0xF800)),
        ("cvt_i32_f32", [floats(-2.9, 3e9, float("nan"))], words(-2, 2**31 - 1, 0)),
        ("cvt_u32_f32", [floats(-2.9, 3e9, 5e9)], words(0, 3_000_000_000, 2**32 - 1)),
        (
            "cvt_pk_bf16_f32",
            [floats(1.00390625, -2.0), floats(1.01171875, 1.0)],
            words(0x3F823F80, 0x3F80C000),
        ),
        ("med3_f32", [floats(5, -9, float("nan")), floats(-1, -1, 2), floats(1, 1, 1)], floats(1, -1, 1)),
        ("max_f32", [floats(float("nan"), 1), floats(2, 2)], floats(2, 2)),
        ("fma_f32", [floats(1 + 2**-12), floats(1 + 2**-12), floats(-1 - 2**-11)], floats(2**-24)),
        ("xad_u32", [words(5), words(3), words(10)], words(16)),
    ],
)
def test_what_a_lane_computes(name, args, expected):
    kinds, function = vector.PLAIN[name]
    values = [vector.value(a.view(np.uint32), kind) for a, kind in zip(args, kinds, strict=True)]
    assert (
        vector.bits_of(np.ascontiguousarray(function(*values))).tolist() == expected.view(np.uint32).tolist()
    )


@pytest.mark.parametrize(
    ("name", "kind", "args", "expected", "scc"),
    [
        ("add", "i32", [0x7FFFFFFF, 1], 0x80000000, True),
        ("add", "u32", [0xFFFFFFFF, 1], 0, True),
        ("addc", "u32", [1, 1], 3, False),
        ("sub", "u32", [1, 2], 0xFFFFFFFF, True),
        ("addk", "i32", [200, 0xFF80], 72, False),
        ("movk", "i32", [0xFF00], 0xFFFFFF00, None),
        ("bfe", "u32", [0xABCD, 0x80004], 0xBC, True),
        ("bfe", "i32", [0xF0, 0x40004], 0xFFFFFFFF, True),
        ("ashr", "i32", [0x80000000, 31], 0xFFFFFFFF, True),
        ("lshl3_add", "u32", [3, 4], 28, False),
        ("andn2", "b64", [0xFF00000000, 0x0F00000000], 0xF000000000, True),
        ("min", "i32", [0xFFFFFFFF, 1], 0xFFFFFFFF, True),
        ("abs", "i32", [0xFFFFFFFB], 5, True),
        ("mul_hi", "u32", [0xFFFFFFFF, 2], 1, None),
    ],
)
def test_what_a_wave_computes(name, kind, args, expected, scc):
    result, flag = scalar.compute(name, kind, [np.array([a], np.uint64) for a in args], np.array([True]))
    assert int(result[0]) == expected and (flag is None if scc is None else bool(flag[0]) == scc)


def test_the_steps_of_a_division_give_the_rounded_quotient():
    """As LLVM divides: scaled where a step would leave the range, Newton's steps, and what is special at the end."""
    generator = np.random.default_rng(0)
    x = generator.integers(0, 2**32, (2, 200_000), dtype=np.uint32).view(np.float32)
    special = floats(
        0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 1e-45, 1.1e-38, 3.4e38, 2.0**-126, 2.0**-100, 2.0**127
    )
    pairs = np.stack([a.ravel() for a in np.meshgrid(special, special)])
    a, b = np.concatenate([x, pairs], 1)
    with np.errstate(all="ignore"):
        fma = vector.PLAIN["fma_f32"][1]
        divisor, _ = vector.division_scale(b, b, a)
        dividend, flag = vector.division_scale(a, b, a)
        r = np.float32(1) / divisor
        r = fma(fma(-divisor, r, floats(1)), r, r)
        q = dividend * r
        q = fma(fma(-divisor, q, dividend), r, q)
        q = vector.division_fma(fma(-divisor, q, dividend), r, q, flag)
        found, exact = vector.division_end(q, b, a), a / b
    same = (found.view(np.uint32) == exact.view(np.uint32)) | (np.isnan(found) & np.isnan(exact))
    special = ~np.isfinite(a) | ~np.isfinite(b) | (a == 0) | (b == 0)
    normal = np.isfinite(exact) & (np.abs(exact) >= 2.0**-126)
    assert same[special | normal].all() and normal.sum() > 100_000
    # Twice rounded where the quotient is subnormal: one unit in the last place.
    small = ~special & (np.abs(exact) < 2.0**-126) & (np.abs(b) <= 2.0**126)
    assert (np.abs(found.view(np.int32).astype(np.int64) - exact.view(np.int32))[small] <= 1).all()
