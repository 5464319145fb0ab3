"""On-chip memory that a barrier does not wait for, in AMD's assembly."""

from __future__ import annotations

import pytest
from lowbit.kernels.barriers import unawaited

LOOP = """
	s_load_dword s4, s[0:1], 0x8
	ds_write_b16 v2, v15
	s_waitcnt lgkmcnt(0)
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	{head}
	s_barrier
	ds_read_b64 v[4:5], v3 offset:8
	s_waitcnt lgkmcnt(0)
	s_barrier
	ds_write_b16 v2, v15 offset:4128
	{tail}
	s_cbranch_scc1 .LBB0_1
	s_waitcnt vmcnt(0) lgkmcnt(0)
	s_barrier
	s_endpgm
"""


@pytest.mark.parametrize(
    ("head", "tail", "found"),
    [
        ("s_waitcnt vmcnt(0)", "s_nop 0", ["ds_write_b16 v2, v15 offset:4128"]),  # as LLVM leaves it
        ("s_waitcnt lgkmcnt(0)", "s_nop 0", []),
        ("s_waitcnt vmcnt(0) lgkmcnt(0)", "s_nop 0", []),
        ("s_nop 0", "s_waitcnt lgkmcnt(0)", []),
        ("s_nop 0", "ds_read_b32 v6, v7\n\ts_waitcnt lgkmcnt(1)", ["ds_read_b32 v6, v7"]),
        ("s_waitcnt lgkmcnt(1)", "s_nop 0", ["ds_write_b16 v2, v15 offset:4128"]),
        ("s_nop 0", "ds_bpermute_b32 v6, v7, v8\n\ts_waitcnt lgkmcnt(1)", []),
        (
            "s_nop 0",
            "s_load_dword s6, s[0:1], 0x8\n\ts_waitcnt lgkmcnt(1)",
            ["ds_write_b16 v2, v15 offset:4128"],
        ),
    ],
)
def test_loops(head, tail, found):
    assert unawaited(LOOP.format(head=head, tail=tail)) == found


def test_of_two_paths_the_one_without_a_wait_counts():
    code = """
	ds_write_b32 v1, v2
	s_cbranch_execz .LBB0_2
	s_waitcnt lgkmcnt(0)
	s_branch .LBB0_3
.LBB0_2:
	s_nop 0
.LBB0_3:
	s_barrier
	s_endpgm
	ds_write_b32 v3, v4
	s_barrier
"""
    assert unawaited(code) == ["ds_write_b32 v1, v2"]
    assert unawaited(code.replace("s_nop 0", "s_waitcnt lgkmcnt(0)")) == []
