"""When a kernel is handed tensor descriptors, and when tensors."""

from __future__ import annotations

import pytest
import torch
from lowbit.kernels.checks import rows_aligned
from lowbit.kernels.operands import flattens, operands
from lowbit.kernels.targets import TARGETS, get_target
from lowbit.kernels.tile import AS_STORED, TMA, TURNED
from lowbit.kernels.tuned_tables import LaunchParameters

LAUNCH = LaunchParameters(block_m=16, block_n=32, block_k=64, tma=True)


def int8(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int8)


@pytest.mark.parametrize(
    ("a", "w", "described"),
    [
        (int8(20, 96), int8(40, 96), True),
        (int8(20, 112)[:, :96], int8(40, 96), True),
        (int8(20, 96), int8(3, 40, 96), True),
        (int8(20, 96), int8(6, 40, 96)[::2], False),  # experts not one after the other
        (int8(20, 100), int8(40, 100), False),  # rows not at multiples of 16 bytes
        (int8(20, 112)[:, 8:104], int8(40, 96), False),
        (int8(1, 96).expand(20, 96), int8(40, 96), False),
        (int8(20, 32)[:, ::5][:, :1], int8(40, 16)[:, :1], False),  # one column, of a stride
    ],
)
def test_descriptors_where_the_layout_allows_them(a, w, described):
    a_rows, w_rows, load = operands(a, w, LAUNCH, get_target("sm90"))
    assert (load == TMA.value) == described
    if described:
        assert list(a_rows.block_shape) == [16, 64] and list(w_rows.block_shape) == [32, 64]
        assert w_rows.base.data_ptr() == w.data_ptr() and list(w_rows.shape) == [w[..., 0].numel(), 96]
    else:
        assert a_rows is a and w_rows is w and load == AS_STORED.value


@pytest.mark.parametrize(
    ("tensor", "sm90", "gfx950"),
    [
        (torch.zeros(4, 48, dtype=torch.bfloat16), True, True),
        (torch.zeros(4, 56, dtype=torch.bfloat16)[:, :48], True, False),  # 112 bytes apart, 56 elements
        (torch.zeros(4, 64, dtype=torch.bfloat16)[:, :40], True, False),  # masks that end anywhere
        (torch.zeros(200, dtype=torch.bfloat16)[1:193].view(4, 48), False, False),
        (int8(4, 40), False, False),
    ],
)
def test_rows_are_aligned_as_triton_sees_it(tensor, sm90, gfx950):
    assert rows_aligned(tensor) == rows_aligned(tensor, target=get_target("sm90")) == sm90
    assert rows_aligned(tensor, target=get_target("gfx950")) == gfx950


def test_a_launch_without_tma_has_tensors_and_the_target_says_how_a_tile_is_loaded():
    a, w = int8(20, 96), int8(40, 96)
    plain = LaunchParameters(block_m=16, block_n=32, block_k=64)
    for name, target in TARGETS.items():
        turned = name == "gfx950"
        assert operands(a, w, plain, target) == (a, w, TURNED.value if turned else AS_STORED.value)


def test_loops_are_one_where_a_persistent_kernel_has_room_for_it():
    def one(*, dtype=torch.bfloat16, target="sm90", **changes) -> bool:
        launch = LaunchParameters(block_m=128, block_n=256, block_k=128, **{"persistent": True, **changes})
        return flattens(launch, torch.empty(4, 4, dtype=dtype), get_target(target))

    assert one() and one(dtype=torch.float16) and one(target="sm120")
    assert not one(persistent=False) and not one(split_k=2) and not one(dtype=torch.float32)
    assert not one(target="ascend910b")  # whose Triton has no such loops
