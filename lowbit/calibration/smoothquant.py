"""SmoothQuant: move the outliers of activations into the weights, channel by channel.

x·Wᵀ = (x/s)·(W·s)ᵀ with s_k = max|x_k|^α / max|W_k|^(1−α) (Xiao et al., arXiv:2211.10438). α is
given, or searched per joint: the candidate whose quantized output, on sampled tokens, is nearest to
the float output wins, and "no smoothing" is always among the candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.calibration.simulate import fake_quantize
from lowbit.calibration.statistics import token_errors
from lowbit.quantize import choose_scale, dequantize, quantize_with
from lowbit.scheme import TensorSpec

ALPHAS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True, kw_only=True)
class Smoothing:
    """A chosen scale and what it is worth."""

    scale: Tensor
    """[K]: the input is divided by it, the weights' columns multiplied."""
    alpha: float | None
    """None: no smoothing."""
    error: float
    """Relative squared output error on the sample, quantized with this scale."""
    plain_error: float
    """The same without smoothing."""


def smooth_scale(activation_absmax: Tensor, weight_absmax: Tensor, alpha: float) -> Tensor:
    """s [K] of SmoothQuant, divided by its geometric mean; channels that are dead on either side get 1."""
    a, w = activation_absmax.float(), weight_absmax.float()
    alive = (a > 0) & (w > 0)
    floor = 1e-5
    scale = a.clamp(min=floor).pow(alpha) / w.clamp(min=floor).pow(1.0 - alpha)
    scale = torch.where(alive, scale, torch.ones_like(scale))
    if bool(alive.any()):
        scale = torch.where(alive, scale / scale[alive].log().mean().exp(), scale)
    return scale.clamp(1e-4, 1e4)


def column_absmax(weights: Sequence[Tensor]) -> Tensor:
    """[K]: the largest magnitude per input channel of weights [N_i, K]."""
    return torch.stack([w.abs().amax(0) for w in weights]).amax(0)


def output_error(
    sample: Tensor,
    weights: Sequence[Tensor],
    weight_spec: TensorSpec | None,
    activation_spec: TensorSpec | None,
    reference: Sequence[Tensor],
) -> float:
    """Squared error of the quantized outputs against `reference`, relative to it per token (see `token_errors`).

    Static activations get the range of the sample.
    """
    x = sample
    if activation_spec is not None:
        scale, zero = (None, None) if activation_spec.dynamic else choose_scale(sample, activation_spec)
        x = fake_quantize(sample, activation_spec, scale, zero)
    lost = []
    for weight, target in zip(weights, reference, strict=True):
        rounded = weight
        if weight_spec is not None:
            scale, _ = choose_scale(weight, weight_spec)
            rounded = dequantize(quantize_with(weight, scale, weight_spec), scale, weight_spec).to(
                weight.dtype
            )
        lost.append(x @ rounded.t() - target)
    return float(token_errors(torch.cat(lost, dim=-1), torch.cat(list(reference), dim=-1)).mean())


def search_smoothing(
    sample: Tensor,
    activation_absmax: Tensor,
    weights: Sequence[Tensor],
    weight_spec: TensorSpec | None,
    activation_spec: TensorSpec | None,
    alphas: Sequence[float] = ALPHAS,
    *,
    tie: Callable[[Tensor], Tensor] | None = None,
) -> Smoothing:
    """The best of `alphas` and of no smoothing for Linear layers `weights` [N_i, K] that read one input.

    `tie` maps a scale [K] to one that the joint allows (equal across heads that share a value head).
    """
    reference = [sample @ w.t() for w in weights]
    plain = output_error(sample, weights, weight_spec, activation_spec, reference)
    best = Smoothing(scale=torch.ones_like(activation_absmax), alpha=None, error=plain, plain_error=plain)
    weight_absmax = column_absmax(weights)
    for alpha in alphas:
        scale = smooth_scale(activation_absmax, weight_absmax, alpha).to(sample)
        scale = tie(scale) if tie is not None else scale
        error = output_error(
            sample / scale, [w * scale for w in weights], weight_spec, activation_spec, reference
        )
        if error < best.error:
            best = Smoothing(scale=scale, alpha=alpha, error=error, plain_error=plain)
    return best
