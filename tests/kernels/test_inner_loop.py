"""Counting a loop's instructions in machine code."""

from __future__ import annotations

from lowbit.kernels.inner_loop import inner_loop

SASS = """
.text.matmul_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_2:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_1:
        /*0020*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0030*/                   IMMA.16832.S8.S8.SAT R8, R4.ROW, R6.COL, R8 ;
        /*0040*/              @!P0 BRA `(.L_x_3) ;
        /*0050*/              @UP0 UIADD3 UR4, UR4, 0x80, URZ ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
        /*0070*/                   F2FP.BF16.F32.PACK_AB R4, R8, R7 ;
        /*0080*/               @P2 BRA `(.L_x_2) ;
.L_x_3:
        /*0090*/                   EXIT ;
.L_x_4:
        /*00a0*/                   BRA `(.L_x_4);
"""
AMDGCN = """
matmul_kernel:                          ; @matmul_kernel
\ts_load_dwordx2 s[0:1], s[2:3], 0x0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\t.loc\t1 2 3
\tv_mfma_f32_32x32x16_fp8_fp8 a[0:15], v[0:1], v[2:3], a[0:15]
\t; a comment
\tv_mfma_f32_32x32x16_fp8_fp8 a[0:15], v[4:5], v[6:7], a[0:15]
\ts_waitcnt vmcnt(0)
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
"""


def test_the_shortest_loop_with_a_matrix_instruction_counts():
    assert inner_loop(SASS) == (1, 5)
    assert inner_loop(SASS.replace("IMMA.16832", "QGMMA.64x128x32")) == (1, 5)
    assert inner_loop(AMDGCN) == (2, 4)


# The loops over tiles and over K made one: a tile's beginning and end are jumped over in between.
FLAT = """
.L_x_0:
        /*0010*/              @!P0 BRA `(.L_x_1) ;
        /*0020*/                   IMAD R2, R2, R3, RZ ;
        /*0030*/                   IMAD R3, R2, R3, RZ ;
.L_x_1:
        /*0040*/              @!P1 BRA `(.L_x_2) ;
        /*0050*/                   IMMA.16832.S8.S8.SAT R8, R4.ROW, R6.COL, R8 ;
.L_x_2:
        /*0060*/              @!P2 BRA `(.L_x_3) ;
        /*0070*/                   STG.E R8, R4 ;
.L_x_3:
        /*0080*/               @P3 BRA `(.L_x_0) ;
"""


def test_what_a_loop_seldom_does_does_not_count():
    assert inner_loop(FLAT) == (1, 5)


def test_without_one_there_is_none():
    assert inner_loop(SASS.replace("IMMA", "IMAD")) is None
    assert inner_loop(AMDGCN.replace("scc1 .LBB0_1", "scc1 .LBB0_2")) is None
    assert inner_loop("") is None
