"""Rounding that knows the data: GPTQ and coordinate descent on a layer's own quadratic error.

For a Linear with inputs x the squared output error of a rounded weight is tr(Δ·H·Δᵀ) with
H = Σ x·xᵀ and Δ = Wq − W. Rows of W do not interact, and any number of Linear layers that
read the same input share H, so they are rounded as one stack.

GPTQ (Frantar et al., arXiv:2210.17323) rounds column after column and lets the columns that are
left make up for the error. Coordinate descent then revisits every column while all others
stand; each step can only lower the error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lowbit.calibration.shared_scale import MatrixOf, share_scales
from lowbit.checkpoint.rules import matmul_key
from lowbit.dtypes import decode, encode
from lowbit.errors import InputError
from lowbit.granularity import PerBlock, PerGroup, block_shape
from lowbit.quantize import Quantized, choose_scale, quantize_with, scale_as_float
from lowbit.scheme import TensorSpec

Rounding = Literal["nearest", "gptq", "coordinate-descent", "gptq+descent"]
ROUNDINGS: tuple[str, ...] = ("nearest", "gptq", "coordinate-descent", "gptq+descent")


@dataclass(frozen=True, kw_only=True)
class RoundingOptions:
    """How weights are rounded."""

    rounding: Rounding = "gptq"
    scale: Literal["absmax", "mse"] = "absmax"
    """How weight scales are chosen; they stay fixed while rounding."""
    act_order: bool = True
    """Columns of large activations first."""
    damping: float = 0.01
    """Added to H's diagonal, as part of its mean."""
    block_size: int = 128
    """Columns whose updates are applied to the rest at once."""
    sweeps: int = 2
    """Passes of coordinate descent."""

    def __post_init__(self) -> None:
        def is_count(x: object) -> bool:
            return isinstance(x, int) and not isinstance(x, bool) and x >= 1

        for key, right, what in (
            ("rounding", self.rounding in ROUNDINGS, f"one of {', '.join(ROUNDINGS)}"),
            ("scale", self.scale in ("absmax", "mse"), "absmax or mse"),
            ("act_order", isinstance(self.act_order, bool), "true or false"),
            (
                "damping",
                isinstance(self.damping, int | float) and 0.0 < self.damping < math.inf,
                "a number above 0",
            ),
            ("block_size", is_count(self.block_size), "a number of columns"),
            ("sweeps", is_count(self.sweeps), "a number of passes"),
        ):
            if not right:
                raise InputError(f"rounding: expected {what} as {key}, found {getattr(self, key)!r}")


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """One Linear's rounded weight and what the rounding cost."""

    quantized: Quantized
    error: float
    """tr(Δ·H·Δᵀ) / tr(W·H·Wᵀ): squared output error, relative."""
    nearest_error: float
    """The same for plain rounding with the same scales."""


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper U with H⁻¹ = Uᵀ·U, [K, K] in the dtype of `hessian` (inside float64), by one Cholesky factorization.

    With P reversing the order, P·H·P = L·Lᵀ gives H = U'·U'ᵀ for the upper U' = P·L·P, so that
    U = U'⁻¹: one factorization and one triangular inverse, where the usual way takes two factorizations
    and a full inverse. The damping grows tenfold until H is positive definite.
    """
    h = hessian.flip(0, 1).double()
    mean = float(h.diagonal().mean())
    if not math.isfinite(mean):
        raise InputError("expected a finite Hessian, found NaN or Inf; use dtype float32 for calibration")
    step, added = max(damping, 1e-8) * (mean if mean > 0 else 1.0), 0.0
    for _ in range(12):
        h.diagonal().add_(step - added)
        lower, info = torch.linalg.cholesky_ex(h)
        if int(info) == 0:
            # A triangular inverse is as accurate as the square root of H's condition asks, and
            # with the damping that is little: the caller's dtype is enough.
            return _inverse_of_upper(lower.to(hessian.dtype).flip(0, 1))
        added = step
        step *= 10
    raise InputError("expected a positive semidefinite Hessian, found one that no damping repairs")


def _inverse_of_upper(u: Tensor, block: int = 256) -> Tensor:
    """The inverse of an upper triangular matrix by halves, so that most of it is matrix products."""
    n = u.shape[0]
    if n <= block:
        return torch.linalg.solve_triangular(u, torch.eye(n, dtype=u.dtype, device=u.device), upper=True)
    half = n // 2
    out = torch.zeros_like(u)
    out[:half, :half] = _inverse_of_upper(u[:half, :half], block)
    out[half:, half:] = _inverse_of_upper(u[half:, half:], block)
    out[:half, half:] = -out[:half, :half] @ (u[:half, half:] @ out[half:, half:])
    return out


def round_group(
    weights: list[Tensor],
    hessian: Tensor | None,
    spec: TensorSpec,
    options: RoundingOptions,
    *,
    targets: list[Tensor] | None = None,
    names: Sequence[str] = (),
    matrix_of: MatrixOf = matmul_key,
) -> list[Rounded]:
    """Round Linear layers that share their input.

    `weights` [N_i, K] float; `hessian` [K, K] of the input, or None for plain rounding.
    `targets` replace `weights` as what is to be rounded (see `compensate`), while errors are
    still measured against `weights`. Those that engines join, by their `names` and
    `matrix_of`, share a scale per tensor (see `share_scales`). Per row the better of GPTQ and plain rounding is kept,
    measured by H, so the result is never worse than rounding on the layer's own data.
    """
    goals = targets or weights
    scales = [choose_scale(w, spec, options.scale)[0] for w in goals]
    if names:
        shared = share_scales(dict(zip(names, scales, strict=True)), spec, matrix_of)
        scales = [shared[n] for n in names]
    if hessian is None:
        nearest = [quantize_with(w, s, spec) for w, s in zip(goals, scales, strict=True)]
        return [
            Rounded(
                quantized=Quantized(codes=c, scale=s, zero_point=None, spec=spec),
                error=0.0,
                nearest_error=0.0,
            )
            for c, s in zip(nearest, scales, strict=True)
        ]
    grid = _Grid.of(goals, scales, spec)
    goal, weight = torch.cat(goals).float(), torch.cat(weights).float()
    plain = grid.code(goal / grid.values(torch.ones_like(goal)))
    h = hessian.float()
    plain_error = _row_error(grid.values(plain) - goal, h)
    best, best_error = plain, plain_error
    codes = plain
    if options.rounding.startswith("gptq"):
        codes = _gptq(goal, h, grid, options)
        best, best_error = _better(codes, _row_error(grid.values(codes) - goal, h), best, best_error)
    if options.rounding in ("coordinate-descent", "gptq+descent"):
        codes = _descend(best, goal, h, grid, options.sweeps)
        best, best_error = _better(codes, _row_error(grid.values(codes) - goal, h), best, best_error)
    power = _row_error(weight, h)
    if targets is not None:
        best_error = _row_error(grid.values(best) - weight, h)
        plain_error = _row_error(grid.values(plain) - weight, h)
    rounded, start = [], 0
    for w, s in zip(weights, scales, strict=True):
        rows = slice(start, start + w.shape[0])
        total = float(power[rows].sum().clamp(min=1e-30))
        rounded.append(
            Rounded(
                quantized=Quantized(
                    codes=encode(best[rows], spec.dtype), scale=s, zero_point=None, spec=spec
                ),
                error=float(best_error[rows].sum()) / total,
                nearest_error=float(plain_error[rows].sum()) / total,
            )
        )
        start += w.shape[0]
    return rounded


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """Fixed scales of a stack of weights: row n and column k have scale `scale[n, k // width]`."""

    scale: Tensor
    width: int
    spec: TensorSpec

    @classmethod
    def of(cls, weights: list[Tensor], scales: list[Tensor], spec: TensorSpec) -> _Grid:
        columns = weights[0].shape[1]
        width = columns
        if isinstance(spec.granularity, PerGroup | PerBlock):
            width = block_shape(tuple(weights[0].shape), spec.granularity)[1]
        stacked = []
        for weight, scale in zip(weights, scales, strict=True):
            rows = weight.shape[0]
            float_scale = scale_as_float(scale)
            if isinstance(spec.granularity, PerBlock):
                float_scale = float_scale.repeat_interleave(spec.granularity.rows, dim=0)[:rows]
            stacked.append(float_scale.reshape(-1, float_scale.shape[-1]).expand(rows, -1))
        return cls(scale=torch.cat(stacked).contiguous(), width=width, spec=spec)

    def column(self, k: int) -> Tensor:
        return self.scale[:, k // self.width]

    def columns(self, index: Tensor) -> Tensor:
        return self.scale[:, index // self.width]

    def code(self, scaled: Tensor) -> Tensor:
        """Values over scale → nearest code, as a float."""
        if self.spec.dtype.kind == "int":
            return scaled.round().clamp_(-self.spec.dtype.max, self.spec.dtype.max)
        return decode(encode(scaled, self.spec.dtype))

    def values(self, codes: Tensor) -> Tensor:
        """Codes [N, K] as floats → what they stand for."""
        if self.scale.shape[1] == 1:
            return codes * self.scale
        return codes * self.scale.repeat_interleave(self.width, dim=1)[:, : codes.shape[1]]


def _row_error(delta: Tensor, h: Tensor) -> Tensor:
    """diag(Δ·H·Δᵀ), as float64."""
    return (delta @ h).mul_(delta).sum(1).double()


def _better(a: Tensor, a_error: Tensor, b: Tensor, b_error: Tensor) -> tuple[Tensor, Tensor]:
    take = a_error < b_error
    return torch.where(take[:, None], a, b), torch.where(take, a_error, b_error)


def _gptq(goal: Tensor, h: Tensor, grid: _Grid, options: RoundingOptions) -> Tensor:
    """Codes [N, K] as floats."""
    columns = goal.shape[1]
    order = torch.arange(columns, device=goal.device)
    if options.act_order:
        order = torch.argsort(h.diagonal(), descending=True, stable=True)
    h = h[order[:, None], order]
    dead = h.diagonal() <= 0
    h.diagonal().add_(dead.to(h.dtype) * h.diagonal().mean().clamp(min=1e-8))
    upper = inverse_factor(h, options.damping)
    work = goal[:, order]
    codes, errors = torch.empty_like(work), torch.empty_like(work[:, : options.block_size])
    round_block = _gptq_block_compiled if _compiled(work, grid) else _gptq_block
    for start in range(0, columns, options.block_size):
        stop = min(start + options.block_size, columns)
        errors = errors[:, : stop - start].contiguous()
        round_block(work, order, upper, grid, start, stop, codes, errors)
        if stop < columns:
            work[:, stop:].addmm_(errors, upper[start:stop, stop:], alpha=-1)
    out = torch.empty_like(codes)
    out[:, order] = codes
    return out


def _compiled(x: Tensor, grid: _Grid) -> bool:
    return x.device.type == "cpu" and grid.spec.dtype.name in ("int8", "e4m3fn")


def _gptq_block(
    work: Tensor,
    order: Tensor,
    upper: Tensor,
    grid: _Grid,
    start: int,
    stop: int,
    codes: Tensor,
    errors: Tensor,
) -> None:
    """Fill `codes` [N, start:stop] and `errors` [N, stop − start]: the loop that `gptq_cpu` compiles."""
    columns = work[:, start:stop].t().contiguous()
    scales = grid.columns(order[start:stop]).t()
    upper = upper[start:stop, start:stop]
    for j, pivot in enumerate(upper.diagonal().tolist()):
        code = grid.code(columns[j] / scales[j])
        error = (columns[j] - code * scales[j]) / pivot
        columns[j + 1 :].addr_(upper[j, j + 1 :], error, alpha=-1)
        codes[:, start + j], errors[:, j] = code, error


def _gptq_block_compiled(
    work: Tensor,
    order: Tensor,
    upper: Tensor,
    grid: _Grid,
    start: int,
    stop: int,
    codes: Tensor,
    errors: Tensor,
) -> None:
    from lowbit.calibration.gptq_cpu import gptq_block

    diagonal = upper[start:stop, start:stop].contiguous()
    group = (order[start:stop] // grid.width).contiguous()
    gptq_block(
        work.numpy(), grid.scale.numpy(), group.numpy(), diagonal.numpy(), start, _kind(grid), _largest(grid),
        codes.numpy(), errors.numpy(),
    )  # fmt: skip


def _kind(grid: _Grid) -> int:
    return 0 if grid.spec.dtype.kind == "int" else 1


def _largest(grid: _Grid) -> Any:
    import numpy

    return numpy.float32(grid.spec.dtype.max)


def _descend(codes: Tensor, goal: Tensor, h: Tensor, grid: _Grid, sweeps: int, block: int = 128) -> Tensor:
    """Coordinate descent from `codes`: every column moves to its best code while the others stand."""
    codes, columns = codes.clone(), goal.shape[1]
    scales = grid.columns(torch.arange(columns, device=goal.device))
    visit = _descend_block_compiled if _compiled(codes, grid) else _descend_block
    for _ in range(sweeps):
        gradient = (grid.values(codes) - goal) @ h
        for start in range(0, columns, block):
            stop = min(start + block, columns)
            part = codes[:, start:stop].contiguous()
            moved = visit(
                part, scales[:, start:stop].contiguous(), gradient[:, start:stop].contiguous(),
                h[start:stop, start:stop].contiguous(), grid,
            )  # fmt: skip
            codes[:, start:stop] = part
            gradient.addmm_(moved, h[start:stop])
    return codes


def _descend_block(codes: Tensor, scales: Tensor, gradient: Tensor, h: Tensor, grid: _Grid) -> Tensor:
    """Visit the columns of a block once: `codes` [N, B] in place; returns how much the values moved."""
    moved = torch.zeros_like(codes)
    diagonal = h.diagonal().clamp(min=1e-12)
    for j in range(codes.shape[1]):
        current = codes[:, j] * scales[:, j]
        codes[:, j] = grid.code((current - gradient[:, j] / diagonal[j]) / scales[:, j])
        moved[:, j] = codes[:, j] * scales[:, j] - current
        gradient.addr_(moved[:, j], h[j])
    return moved


def _descend_block_compiled(
    codes: Tensor, scales: Tensor, gradient: Tensor, h: Tensor, grid: _Grid
) -> Tensor:
    from lowbit.calibration.gptq_cpu import descend_block

    moved = torch.zeros_like(codes)
    descend_block(
        codes.numpy(), scales.numpy(), gradient.numpy(), h.numpy(), _kind(grid), _largest(grid), moved.numpy()
    )  # fmt: skip
    return moved


def compensate(weight: Tensor, hessian: Tensor, cross: Tensor, damping: float) -> Tensor:
    """W' [N, K] = argmin ‖W·x − W'·x̂‖² over inputs x and their quantized versions x̂.

    `hessian` Σ x̂·x̂ᵀ, `cross` Σ x·x̂ᵀ, both [K, K]; the damping pulls towards W. This moves what the
    rounding of activations (and of everything before this layer) did into the weight's target.
    """
    h = hessian.double()
    mean = float(h.diagonal().mean())
    ridge = damping * (mean if mean > 0 else 1.0)  # inputs that are all zero ask for nothing
    h = h + torch.eye(h.shape[0], dtype=h.dtype, device=h.device) * ridge
    right = weight.double() @ (cross.double() - hessian.double())
    return (weight.double() + torch.linalg.solve(h, right.t()).t()).to(weight.dtype)
