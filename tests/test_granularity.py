"""Which elements share a scale: shapes, expansion and reduction against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.granularity import (
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    block_shape,
    expand_scale,
    reduce_tiles,
    scale_shape,
)

GRANULARITIES = st.one_of(
    st.just(PerTensor()),
    st.just(PerChannel()),
    st.just(PerToken()),
    st.builds(PerGroup, st.integers(1, 9)),
    st.builds(PerBlock, st.integers(1, 5), st.integers(1, 9)),
)
SHAPES = st.tuples(st.integers(1, 13), st.integers(1, 17))


def tile_of(row: int, col: int, shape, granularity) -> tuple[int, ...]:
    """The naive definition: where the scale of one element stands."""
    match granularity:
        case PerTensor():
            return (0,)
        case PerGroup(size):
            return (row, col // size)
        case PerBlock(rows, cols):
            return (row // rows, col // cols)
    return (row, 0)


@given(SHAPES, GRANULARITIES)
def test_expand_and_reduce_follow_the_naive_definition(shape, granularity):
    rows, cols = shape
    scales = scale_shape(shape, granularity)
    scale = torch.arange(1.0, 1 + torch.Size(scales).numel()).reshape(scales)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(rows * 31 + cols))
    wide = expand_scale(scale, shape, granularity).expand(shape)
    top, low = torch.full(scales, -torch.inf), torch.full(scales, torch.inf)
    for r in range(rows):
        for c in range(cols):
            at = tile_of(r, c, shape, granularity)
            assert wide[r, c] == scale[at]
            top[at] = max(top[at], x[r, c])
            low[at] = min(low[at], x[r, c])
    assert torch.equal(reduce_tiles(x, granularity, "amax"), top)
    assert torch.equal(reduce_tiles(x, granularity, "amin"), low)


@given(SHAPES, GRANULARITIES)
def test_block_shape_is_the_tile(shape, granularity):
    rows, cols = block_shape(shape, granularity)
    expected = (-(-shape[0] // rows), -(-shape[1] // cols))
    found = scale_shape(shape, granularity)
    assert found == (expected if not isinstance(granularity, PerTensor) else (1,))


@pytest.mark.parametrize(
    ("shape", "granularity", "expected"),
    [
        ((576, 7168), PerBlock(128, 128), (5, 56)),
        ((4096, 1408), PerChannel(), (4096, 1)),
        ((2, 7, 130), PerToken(), (2, 7, 1)),
        ((3, 130), PerGroup(128), (3, 2)),
        ((4, 300, 200), PerBlock(128, 128), (4, 3, 2)),
        ((5,), PerChannel(), (1,)),
        ((), PerTensor(), (1,)),
        ((0, 8), PerChannel(), (0, 1)),
        ((8, 0), PerGroup(4), (8, 0)),
    ],
)
def test_scale_shapes_as_stored(shape, granularity, expected):
    assert scale_shape(shape, granularity) == expected


def test_nan_propagates_through_reductions():
    x = torch.zeros(4, 6)
    x[1, 2] = torch.nan
    found = reduce_tiles(x, PerGroup(4), "amax")
    assert found.isnan().nonzero().tolist() == [[1, 0]]


def test_empty_tensors_reduce_to_zeros():
    assert reduce_tiles(torch.empty(0, 8), PerChannel(), "amax").shape == (0, 1)
    assert reduce_tiles(torch.empty(3, 0), PerChannel(), "amax").tolist() == [[0.0]] * 3


def test_leading_dimensions_stay():
    x = torch.randn(3, 5, 7)
    for granularity in (PerGroup(3), PerBlock(2, 3), PerChannel()):
        each = torch.stack([reduce_tiles(m, granularity, "amax") for m in x])
        assert torch.equal(reduce_tiles(x, granularity, "amax"), each)


@pytest.mark.parametrize("bad", [lambda: PerGroup(0), lambda: PerBlock(0, 4), lambda: PerBlock(4, -1)])
def test_empty_tiles_are_refused(bad):
    with pytest.raises(ValueError, match="at least"):
        bad()


def test_a_scale_of_the_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"expected a scale of shape \[4, 2\].*found \[2, 4\]"):
        expand_scale(torch.ones(2, 4), (4, 6), PerGroup(4))
    with pytest.raises(ValueError, match="scalar"):
        scale_shape((), PerChannel())
    with pytest.raises(ValueError, match="two dimensions"):
        scale_shape((4,), PerBlock(2, 2))
