"""Streaming statistics of a tensor, and the ranges that they lead to.

Every observer takes batches in constant memory and merges with another of its kind, so that
workers can each see part of the data. `range()` gives (low, high) in float32, of the shape
that `scale_from_range` takes: [1] per tensor, [channels] per channel or head. All of them are
widened to contain 0.

`absmax` covers everything seen; `moving_average` is the exponential mean of batch ranges (Jacob et al.,
arXiv:1712.05877); `percentile`, `mse` and `entropy` read a histogram that doubles its width
when a value falls outside, so that nothing seen before is lost (the entropy choice is
TensorRT's, Migacz 2017).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.quantize import dequantize, quantize_with, scale_from_range
from lowbit.scheme import TensorSpec

RANGE_METHODS: tuple[str, ...] = ("absmax", "moving-average", "percentile", "mse", "entropy")


class RangeObserver:
    """Smallest and largest value per channel along `dim` (None: of the whole tensor)."""

    def __init__(self, dim: int | None = None) -> None:
        self.dim = dim
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.batches = 0

    def update(self, x: Tensor) -> None:
        if x.numel() == 0:
            return
        low, high = _extremes(x, self.dim)
        self._take(low, high)
        self.batches += 1

    def _take(self, low: Tensor, high: Tensor) -> None:
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def merge(self, other: RangeObserver) -> None:
        if other.low is not None and other.high is not None:
            self._take(other.low, other.high)
            self.batches += other.batches

    def range(self) -> tuple[Tensor, Tensor]:
        return _required(self.low, self.high)


class MovingAverageObserver(RangeObserver):
    """Exponential mean of each batch's range; `momentum` is the weight of the past.

    Merging averages the two means by the number of batches seen.
    """

    def __init__(self, dim: int | None = None, momentum: float = 0.99) -> None:
        super().__init__(dim)
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"expected a momentum in [0, 1), found {momentum}")
        self.momentum = momentum

    def _take(self, low: Tensor, high: Tensor) -> None:
        # Early on the plain mean: one outlier in the first batch would weigh 1/(1−momentum) batches.
        keep = min(self.momentum, self.batches / (self.batches + 1))
        self.low = low if self.low is None else self.low * keep + low * (1 - keep)
        self.high = high if self.high is None else self.high * keep + high * (1 - keep)

    def merge(self, other: RangeObserver) -> None:
        if other.low is None or other.high is None:
            return
        if self.low is None or self.high is None:
            self.low, self.high = other.low, other.high
        else:
            part = other.batches / (self.batches + other.batches)
            self.low = self.low * (1 - part) + other.low * part
            self.high = self.high * (1 - part) + other.high * part
        self.batches += other.batches


class HistogramObserver:
    """Counts in `bins` equal bins over [−width, width] per channel; the width doubles when it must.

    Doubling joins bins in pairs exactly, so the counts are those of one pass over all the
    data. Widths are powers of two, so that any two histograms merge without interpolation.
    `dim` None: one histogram. The true extremes are kept beside.
    """

    def __init__(self, dim: int | None = None, bins: int = 4096) -> None:
        if bins < 8 or bins % 4:
            raise ValueError(f"expected a multiple of 4 bins, at least 8, found {bins}")
        self.dim, self.bins = dim, bins
        self.extremes = RangeObserver(dim)
        self.counts: Tensor | None = None
        self.width: Tensor | None = None

    def update(self, x: Tensor) -> None:
        if x.numel() == 0:
            return
        self.extremes.update(x)
        rows = _rows(x, self.dim).float()
        peak = rows.abs().amax(dim=1)
        # The next power of two strictly above, so that the peak itself falls inside.
        needed = torch.exp2(torch.frexp(peak.clamp(min=2.0**-100)).exponent.float())
        if self.counts is None or self.width is None:
            self.counts = torch.zeros(rows.shape[0], self.bins, dtype=torch.float64, device=x.device)
            self.width = needed
        self._widen(torch.maximum(self.width, needed))
        index = ((rows / self.width[:, None] + 1.0) * (self.bins / 2)).long().clamp_(0, self.bins - 1)
        index += torch.arange(rows.shape[0], device=x.device)[:, None] * self.bins
        self.counts += torch.bincount(index.flatten(), minlength=self.counts.numel()).view_as(self.counts)

    def _widen(self, width: Tensor) -> None:
        assert self.counts is not None and self.width is not None
        half, quarter = self.bins // 2, self.bins // 4
        while bool((grow := self.width < width).any()):
            joined = torch.zeros_like(self.counts)
            joined[:, quarter : quarter + half] = self.counts.view(-1, half, 2).sum(-1)
            self.counts = torch.where(grow[:, None], joined, self.counts)
            self.width = torch.where(grow, self.width * 2, self.width)

    def merge(self, other: HistogramObserver) -> None:
        if other.counts is None or other.width is None:
            return
        if other.bins != self.bins:
            raise ValueError(f"expected {self.bins} bins to merge, found {other.bins}")
        self.extremes.merge(other.extremes)
        if self.counts is None or self.width is None:
            self.counts, self.width = other.counts.clone(), other.width.clone()
            return
        width = torch.maximum(self.width, other.width)
        copy = HistogramObserver(self.dim, self.bins)
        copy.counts, copy.width = other.counts, other.width
        copy._widen(width)
        self._widen(width)
        self.counts = self.counts + copy.counts

    def centres(self) -> Tensor:
        """[channels, bins]: the middle of every bin."""
        assert self.width is not None
        middle = (torch.arange(self.bins, device=self.width.device) + 0.5) * (2.0 / self.bins) - 1.0
        return middle[None, :] * self.width[:, None]

    def range(self) -> tuple[Tensor, Tensor]:
        return self.extremes.range()

    def percentile_range(self, percentile: float) -> tuple[Tensor, Tensor]:
        """The range that holds `percentile` % of the values by magnitude on either side."""
        if not 50.0 < percentile <= 100.0:
            raise ValueError(f"expected a percentile in (50, 100], found {percentile}")
        low, high = self.range()
        assert self.counts is not None and self.width is not None
        total = self.counts.sum(1, keepdim=True)
        below = self.counts.cumsum(1) / total
        tail = (1.0 - percentile / 100.0) / 2
        step = (2.0 * self.width / self.bins).to(torch.float32)
        first = (below <= tail).sum(1)
        last = (below < 1.0 - tail).sum(1).clamp(max=self.bins - 1)
        edge_low = first * step - self.width
        edge_high = (last + 1) * step - self.width
        return _required(torch.maximum(low, edge_low.float()), torch.minimum(high, edge_high.float()))

    def mse_range(self, spec: TensorSpec, steps: int = 100) -> tuple[Tensor, Tensor]:
        """The shrunken range whose quantization error over the histogram is smallest."""
        return self._best_range(spec, steps, entropy=False)

    def entropy_range(self, spec: TensorSpec, steps: int = 100) -> tuple[Tensor, Tensor]:
        """The shrunken range whose quantized distribution is nearest to the histogram in KL divergence."""
        return self._best_range(spec, steps, entropy=True)

    def _best_range(self, spec: TensorSpec, steps: int, entropy: bool) -> tuple[Tensor, Tensor]:
        low, high = self.range()
        assert self.counts is not None
        centres = self.centres().float()
        best: Tensor | None = None
        best_low, best_high = low, high
        for step in range(steps):
            # Geometric steps: outliers may stand a hundred times above the rest.
            factor = 0.005 ** (step / max(steps - 1, 1))
            scale, zero = scale_from_range(low * factor, high * factor, spec)
            loss = self._loss(centres, scale, zero, spec, entropy)
            if best is None:
                best = loss
                continue
            better = loss < best
            best = torch.where(better, loss, best)
            best_low = torch.where(better, low * factor, best_low)
            best_high = torch.where(better, high * factor, best_high)
        return best_low, best_high

    def _loss(
        self, centres: Tensor, scale: Tensor, zero: Tensor | None, spec: TensorSpec, entropy: bool
    ) -> Tensor:
        assert self.counts is not None
        losses = []
        for row in range(centres.shape[0]):
            s, z = scale[row : row + 1], None if zero is None else zero[row : row + 1]
            codes = quantize_with(centres[row], s, spec, z)
            values = dequantize(codes, s, spec, z)
            counts = self.counts[row]
            if not entropy:
                losses.append(((values - centres[row]).double().square() * counts).sum())
                continue
            losses.append(_entropy(counts, codes, values, centres[row]))
        return torch.stack(losses)


def _entropy(counts: Tensor, codes: Tensor, values: Tensor, centres: Tensor) -> Tensor:
    """KL divergence between a histogram with its clipped tail piled up at the edge and its quantized self.

    Every code spreads its mass evenly over the non-empty bins that it stands for (Migacz).
    """
    _, group = torch.unique(values, return_inverse=True)
    inside = (values - centres).abs() <= 1.01 * _spacing(values)
    reference = torch.where(inside, counts, torch.zeros_like(counts))
    clipped = counts - reference
    # Clipped mass belongs to the outermost code of its side.
    mass = torch.zeros(int(group.max()) + 1, dtype=torch.float64, device=counts.device)
    filled = (reference > 0).double()
    mass.scatter_add_(0, group, reference)
    members = torch.zeros_like(mass).scatter_add_(0, group, filled)
    quantized = torch.where(filled > 0, mass[group] / members[group].clamp(min=1), torch.zeros_like(counts))
    p = reference.clone()
    for side in (centres < 0, centres >= 0):
        lost = clipped[side].sum()
        if float(lost) > 0:
            candidates = torch.nonzero(side & inside)
            if candidates.numel() == 0:
                return torch.tensor(float("inf"), dtype=torch.float64, device=counts.device)
            edge = candidates[0] if bool(side[0]) else candidates[-1]
            p[edge] += lost
    p, q = p / p.sum(), quantized / quantized.sum().clamp(min=1e-30)
    keep = p > 0
    return (p[keep] * (p[keep] / q[keep].clamp(min=1e-12)).log()).sum()


def _spacing(values: Tensor) -> Tensor:
    """Distance to the neighbouring representable values: what rounding may move a value by, doubled."""
    unique = torch.unique(values)
    if unique.numel() < 2:
        return torch.full_like(values, torch.inf)
    gaps = unique[1:] - unique[:-1]
    gaps = torch.maximum(torch.cat([gaps[:1], gaps]), torch.cat([gaps, gaps[-1:]]))
    return gaps[torch.searchsorted(unique, values)]


def observed_range(
    observer: RangeObserver | HistogramObserver, method: str, spec: TensorSpec, percentile: float = 99.99
):
    """The range by name of method. A RangeObserver has no histogram and so only its own range."""
    if method in ("absmax", "moving-average"):
        return observer.range()
    if not isinstance(observer, HistogramObserver):
        raise ValueError(f"expected a histogram for method {method}, found {type(observer).__name__}")
    if method == "percentile":
        return observer.percentile_range(percentile)
    if method == "mse":
        return observer.mse_range(spec)
    if method == "entropy":
        return observer.entropy_range(spec)
    raise ValueError(f"expected one of {', '.join(RANGE_METHODS)}, found {method!r}")


def make_observer(method: str, dim: int | None = None) -> RangeObserver | HistogramObserver:
    """The observer that `observed_range` needs for `method`."""
    if method == "absmax":
        return RangeObserver(dim)
    if method == "moving-average":
        return MovingAverageObserver(dim)
    if method in ("percentile", "mse", "entropy"):
        return HistogramObserver(dim)
    raise ValueError(f"expected one of {', '.join(RANGE_METHODS)}, found {method!r}")


def _rows(x: Tensor, dim: int | None) -> Tensor:
    """[channels, values]: one row per histogram."""
    return x.reshape(1, -1) if dim is None else x.transpose(dim, 0).reshape(x.shape[dim], -1)


def _extremes(x: Tensor, dim: int | None) -> tuple[Tensor, Tensor]:
    low, high = torch.aminmax(_rows(x, dim), dim=1)
    if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
        raise InputError(
            "expected finite activations, found NaN or Inf; check the checkpoint, or use dtype float32"
        )
    return low.float(), high.float()


def _required(low: Tensor | None, high: Tensor | None) -> tuple[Tensor, Tensor]:
    if low is None or high is None:
        raise ValueError("expected data, found an observer that has seen none")
    return low.clamp(max=0.0), high.clamp(min=0.0)
