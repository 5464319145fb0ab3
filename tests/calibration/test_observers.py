"""Observers: what one pass sees is what all the data says, and merging loses nothing."""

from __future__ import annotations

import math

import pytest
import torch

from lowbit.calibration.observers import (
    RANGE_METHODS,
    HistogramObserver,
    MovingAverageObserver,
    RangeObserver,
    _entropy,
    make_observer,
    observed_range,
)
from lowbit.dtypes import E4M3FN, INT8
from lowbit.granularity import PerTensor
from lowbit.quantize import dequantize, quantize_with, scale_from_range
from lowbit.scheme import TensorSpec

INT8_TENSOR = TensorSpec(dtype=INT8, granularity=PerTensor())
FP8_TENSOR = TensorSpec(dtype=E4M3FN, granularity=PerTensor())


def batches(seed: int = 0, outliers: bool = True) -> list[torch.Tensor]:
    """Batches of growing range, Gaussian with rare outliers."""
    g = torch.Generator().manual_seed(seed)
    out = [torch.randn(64, 3, 40, generator=g) * (0.1 * 3.0**i) for i in range(4)]
    if outliers:
        out[2].view(-1)[::1501] = 30.0
    return out


@pytest.mark.parametrize("dim", [None, 1, -1])
def test_range_is_that_of_all_the_data(dim):
    data = batches()
    observer = RangeObserver(dim)
    for batch in data:
        observer.update(batch)
    whole = torch.cat(data)
    rows = whole.reshape(1, -1) if dim is None else whole.transpose(dim, 0).reshape(whole.shape[dim], -1)
    low, high = observer.range()
    assert torch.equal(low, rows.amin(1)) and torch.equal(high, rows.amax(1))


@pytest.mark.parametrize("dim", [None, 1])
def test_histogram_counts_are_those_of_one_pass_over_everything(dim):
    data = batches()
    observer = HistogramObserver(dim, bins=256)
    for batch in data:
        observer.update(batch)
    whole = torch.cat(data)
    rows = whole.reshape(1, -1) if dim is None else whole.transpose(1, 0).reshape(3, -1)
    for row, counts, width in zip(rows, observer.counts, observer.width, strict=True):
        expected = torch.histc(row.double(), 256, -float(width), float(width))
        assert float((counts - expected).abs().sum()) <= 4  # values on a bin's edge
        assert counts.sum() == row.numel()


@pytest.mark.parametrize("method", RANGE_METHODS)
def test_merging_two_workers_is_one_worker(method):
    data = batches()
    one, a, b = make_observer(method), make_observer(method), make_observer(method)
    for i, batch in enumerate(data):
        one.update(batch)
        (a if i < 2 else b).update(batch)
    a.merge(b)
    expected, found = observed_range(one, method, INT8_TENSOR), observed_range(a, method, INT8_TENSOR)
    tolerance = 1e-6 if method != "moving-average" else 0.05
    for x, y in zip(expected, found, strict=True):
        assert torch.allclose(x, y, rtol=tolerance)
    empty = make_observer(method)
    empty.merge(one)
    for x, y in zip(expected, observed_range(empty, method, INT8_TENSOR), strict=True):
        assert torch.equal(x, y)


def test_moving_average_forgets():
    observer = MovingAverageObserver(momentum=0.5)
    for value in (1.0, 1.0, 9.0):
        observer.update(torch.tensor([0.0, value]))
    assert float(observer.range()[1]) == pytest.approx(0.5 * 1.0 + 0.5 * 9.0)
    with pytest.raises(ValueError, match="momentum"):
        MovingAverageObserver(momentum=1.0)


def test_percentile_leaves_out_the_tail():
    x = torch.linspace(-1, 1, 100001)
    observer = HistogramObserver()
    observer.update(x)
    low, high = observer.percentile_range(99.0)
    assert float(low) == pytest.approx(-0.99, abs=2e-3) and float(high) == pytest.approx(0.99, abs=2e-3)
    assert float(observer.percentile_range(100.0)[1]) == 1.0
    with pytest.raises(ValueError, match="percentile"):
        observer.percentile_range(0.99)
    for sign in (1, -1):  # all on one side of 0, which any range contains
        observer = make_observer("percentile")
        observer.update(sign * torch.linspace(5, 6, 1000))
        low, high = observer.percentile_range(99.9)
        assert float(low if sign > 0 else high) == 0 and abs(float(high - low) - 6) < 0.01


@pytest.mark.parametrize(
    "spec", [INT8_TENSOR, TensorSpec(dtype=INT8, granularity=PerTensor(), symmetric=False)]
)
def test_mse_range_is_near_the_best_of_a_fine_search(spec):
    x = torch.cat([b.reshape(-1) for b in batches(outliers=False)[:1]])
    x[:4] = torch.tensor([4.0, -4.0, 5.0, 3.0])
    observer = HistogramObserver()
    observer.update(x)

    def error(low, high) -> float:
        scale, zero = scale_from_range(low, high, spec)
        codes = quantize_with(x, scale, spec, zero)
        return float((dequantize(codes, scale, spec, zero) - x).double().square().sum())

    low, high = observer.range()
    best = min(error(low * f, high * f) for f in torch.linspace(0.01, 1.0, 400).tolist())
    found = error(*observer.mse_range(spec))
    assert found <= 1.1 * best
    plain = error(low, high)
    # Clipping helps the symmetric grid here; with a zero point the whole range is best already.
    assert found < plain if spec.symmetric else found <= plain


def test_entropy_clips_outliers_of_an_integer_grid_but_not_a_plain_range():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, generator=g)
    x[:20] = 60.0
    observer = HistogramObserver(bins=2048)
    observer.update(x)
    high = float(observer.entropy_range(INT8_TENSOR)[1])
    assert 2.5 < high < 20.0
    uniform = HistogramObserver(bins=2048)
    uniform.update(torch.rand(200_000, generator=g) * 2 - 1)
    assert float(uniform.entropy_range(INT8_TENSOR)[1]) > 0.95


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="NaN"):
        RangeObserver().update(torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match="seen none"):
        RangeObserver().range()
    with pytest.raises(ValueError, match="histogram"):
        observed_range(RangeObserver(), "mse", INT8_TENSOR)
    with pytest.raises(ValueError, match="expected one of"):
        make_observer("median")
    observer = RangeObserver()
    observer.update(torch.empty(0))
    assert observer.batches == 0


def test_means_of_workers_count_by_their_batches():
    a, b = MovingAverageObserver(), MovingAverageObserver()
    for observer, values in ((a, (1.0,)), (b, (3.0, 3.0, 3.0))):
        for value in values:
            observer.update(torch.tensor([-value, value]))
    a.merge(b)
    assert float(a.range()[1]) == pytest.approx(2.5) and float(a.range()[0]) == pytest.approx(-2.5)


def test_bins_and_their_edges():
    observer = HistogramObserver(bins=8)
    observer.update(torch.tensor([0.9]))
    middles = torch.tensor([[-7.0, -5.0, -3.0, -1.0, 1.0, 3.0, 5.0, 7.0]]) / 8
    assert torch.equal(observer.centres(), middles)
    # Ten values to a bin: of the outermost 10 % on either side, a bin is left out, and no more.
    observer = HistogramObserver(bins=16)
    x = ((torch.arange(160) + 0.5) / 80 - 1) * 0.999
    observer.update(x)
    low, high = (float(t) for t in observer.percentile_range(80.0))
    assert (low, high) == (-0.875, 0.875)
    assert [int((x < low).sum()), int((x > high).sum())] == [10, 10]


@pytest.mark.parametrize("method", ["percentile", "mse", "entropy"])
def test_every_channel_has_the_range_that_it_has_alone(method):
    x = batches()[2].reshape(-1, 3, 8) * torch.tensor([1.0, 7.0, 0.2])[:, None]
    together = HistogramObserver(1, bins=256)
    together.update(x)
    found = observed_range(together, method, INT8_TENSOR)
    for channel in range(3):
        alone = HistogramObserver(bins=256)
        alone.update(x[:, channel])
        for one, all_of in zip(observed_range(alone, method, INT8_TENSOR), found, strict=True):
            assert torch.equal(one, all_of[channel : channel + 1])


def test_divergence_is_that_of_the_definition():
    """What is clipped stands in the outermost bin of its side that is not; a code's mass lies evenly on its bins."""
    g = torch.Generator().manual_seed(4)
    observer = HistogramObserver(bins=1024)
    observer.update(torch.cat([torch.randn(4000, generator=g) * 0.1 + 0.02, torch.tensor([0.9, 0.9, -0.8])]))
    counts, centres, scale = observer.counts[0], observer.centres()[0], torch.tensor([0.3 / 127])
    codes = quantize_with(centres, scale, INT8_TENSOR)
    found = _entropy(counts, codes, dequantize(codes, scale, INT8_TENSOR), centres)
    bins = range(1024)
    inside = [abs(float(centres[i])) <= 128.01 * float(scale) for i in bins]
    p = [float(counts[i]) if inside[i] else 0.0 for i in bins]
    q = list(p)
    for code in set(codes.tolist()):
        mine = [i for i in bins if int(codes[i]) == code and p[i] > 0]
        for i in mine:
            q[i] = sum(p[j] for j in mine) / len(mine)
    first, last = inside.index(True), 1023 - inside[::-1].index(True)
    p[first] += sum(float(counts[i]) for i in bins if i < first)
    p[last] += sum(float(counts[i]) for i in bins if i > last)
    p, q = ([x / sum(of) for x in of] for of in (p, q))
    want = sum(x * math.log(x / max(y, 1e-12)) for x, y in zip(p, q, strict=True) if x > 0)
    assert float(found) == pytest.approx(want, rel=1e-6)
