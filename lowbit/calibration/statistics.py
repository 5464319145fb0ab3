"""What calibration remembers of a Linear's input: enough to choose transforms, ranges and codes, and no more.

One pass over the data fills it; transforms that scale or rotate the input afterwards rescale
the statistics instead of running the layer again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lowbit.calibration.observers import HistogramObserver, RangeObserver, make_observer
from lowbit.calibration.simulate import fake_quantize
from lowbit.errors import InputError
from lowbit.scheme import TensorSpec


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which statistics a method needs."""

    hessian: bool = False
    cross: bool = False
    """Also Σ x·x̂ᵀ with x̂ the quantized input; the Hessian is then that of x̂."""
    sample_rows: int = 0
    channels: bool = True
    """Largest magnitude and sum per channel."""
    observer: str | None = None
    """A range method's observer (see `observers`) for static scales."""

    @property
    def anything(self) -> bool:
        return self.hessian or self.cross or self.sample_rows > 0 or self.observer is not None


@dataclass(kw_only=True)
class InputStatistics:
    """Statistics of one input [tokens, K], mergeable."""

    wanted: Wanted
    spec: TensorSpec | None
    rows_per_batch: int = 0
    tokens: int = 0
    absmax: Tensor | None = None
    """[K], per channel."""
    total: Tensor | None = None
    """[K], float64: sum over tokens."""
    hessian: Tensor | None = None
    cross: Tensor | None = None
    sample: list[Tensor] = field(default_factory=list)
    typical: float | None = None
    """Median squared length of the module's output over the first batch; None: tokens count alike."""
    observer: RangeObserver | HistogramObserver | None = None

    @torch.no_grad()
    def update(self, x: Tensor, output: Tensor | None = None) -> None:
        """Take a batch of inputs […, K]. With the module's `output` […, N], tokens are weighted by it.

        A few tokens (the first of a sequence, mostly) produce outputs hundreds of times longer than all
        others (massive activations: Sun et al., arXiv:2402.17762). The norm that follows takes that
        length away again, so an error counts relative to it; unweighted, those tokens would
        decide every sum of squares.
        """
        x = x.reshape(-1, x.shape[-1])
        if x.shape[0] == 0:
            return
        weight = None
        if output is not None and (self.wanted.hessian or self.wanted.cross):
            power = output.reshape(-1, output.shape[-1]).float().square().sum(-1)
            if self.typical is None:
                self.typical = float(power.median().clamp(min=1e-30))
            weight = (1.0 / (1.0 + power / self.typical)).to(x.dtype)[:, None]
        self.tokens += x.shape[0]
        if self.wanted.channels:
            absmax = torch.maximum(x.amax(0), -x.amin(0))
            if not bool(torch.isfinite(absmax).all()):
                raise InputError("expected finite activations, found NaN or Inf; use dtype float32")
            self.absmax = absmax if self.absmax is None else torch.maximum(self.absmax, absmax)
            total = (x.t() @ x.new_ones(x.shape[0])).double()
            self.total = total if self.total is None else self.total + total
        if self.wanted.observer is not None:
            self.observer = self.observer or make_observer(self.wanted.observer)
            self.observer.update(x)
        if self.wanted.sample_rows:
            take = min(self.rows_per_batch, x.shape[0])
            # Always the first token: it carries the massive activations where a model has them.
            index = torch.linspace(0, x.shape[0] - 1, take).round().long()
            self.sample.append(x[index.to(x.device)].clone())
        if self.wanted.cross and self.spec is not None:
            quantized = fake_quantize(x, self.spec) if self.spec.dynamic else x
            weighted = quantized if weight is None else quantized * weight
            self.hessian = _add_product(self.hessian, weighted, quantized)
            self.cross = _add_product(self.cross, x, weighted)
        elif self.wanted.hessian:
            self.hessian = _add_square(self.hessian, x if weight is None else x * weight.sqrt())

    def merge(self, other: InputStatistics) -> None:
        """Add what another worker saw."""
        if other.tokens == 0:
            return
        self.tokens += other.tokens
        if other.absmax is not None:
            self.absmax = other.absmax if self.absmax is None else torch.maximum(self.absmax, other.absmax)
            self.total = other.total if self.total is None else self.total + other.total  # type: ignore[operator]
        for name in ("hessian", "cross"):
            mine, theirs = getattr(self, name), getattr(other, name)
            setattr(self, name, theirs if mine is None else mine + theirs if theirs is not None else mine)
        self.sample += other.sample
        if self.observer is None:
            self.observer = other.observer
        elif other.observer is not None:
            self.observer.merge(other.observer)  # type: ignore[arg-type]

    def rows(self) -> Tensor:
        """[S, K]: the sampled tokens."""
        return torch.cat(self.sample)

    @property
    def mean(self) -> Tensor:
        assert self.total is not None
        return self.total / max(self.tokens, 1)

    def rescale(self, divisor: Tensor) -> None:
        """The input is now divided by `divisor` [K]: everything but a histogram follows."""
        if self.absmax is None:
            return
        d = divisor.to(self.absmax)
        self.absmax = self.absmax / d
        if self.total is not None:
            self.total = self.total / d.double()
        for name in ("hessian", "cross"):
            if (matrix := getattr(self, name)) is not None:
                setattr(self, name, matrix / d[:, None] / d[None, :])
        self.sample = [row / d for row in self.sample]


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + aᵀ·b, in float32 at least."""
    a, b = (a, b) if a.dtype in (torch.float32, torch.float64) else (a.float(), b.float())
    if total is None:
        return a.t() @ b
    return total.addmm_(a.t(), b)


def _add_square(total: Tensor | None, x: Tensor) -> Tensor:
    """total + xᵀ·x, in float32 at least, by blocks of rows up to the diagonal: 60 % of the product's work."""
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    columns = x.shape[1]
    total = x.new_zeros(columns, columns) if total is None else total
    width = max(192, -(-columns // 8))
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        total[start:stop, :stop].addmm_(x[:, start:stop].t(), x[:, :stop])
        total[:start, start:stop] = total[start:stop, :start].t()
    return total


def collect(
    layer: nn.Module,
    groups: Mapping[str, InputStatistics],
    run_batches: Callable[[], None],
    *,
    prepare: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    by_output: Collection[str] = (),
) -> None:
    """Fill the statistics of the inputs of the named modules while `run_batches` runs the layer.

    `prepare` changes a module's input before it is looked at (an online rotation). `by_output` names
    modules that write into the residual stream: their tokens are weighted (see `update`).
    """

    def hook(name: str) -> Callable[..., None]:
        change = (prepare or {}).get(name)

        def watch(_: nn.Module, args: tuple, out: Tensor) -> None:
            x = args[0] if change is None else change(args[0])
            groups[name].update(x, out if name in by_output else None)

        return watch

    handles = [layer.get_submodule(name).register_forward_hook(hook(name)) for name in groups]
    try:
        run_batches()
    finally:
        for handle in handles:
            handle.remove()


def token_errors(lost: Tensor, target: Tensor) -> Tensor:
    """Squared error of outputs `lost` [S, N] per token, relative to `target` [S, N]: float64 [S].

    Relative to the token's own length or a typical token's, whichever is more, for the reason that
    `InputStatistics.update` gives: summed over tokens, a massive one would decide alone.
    """
    power = target.double().square().sum(-1)
    return lost.double().square().sum(-1) / power.clamp(min=float(power.median().clamp(min=1e-30)))
