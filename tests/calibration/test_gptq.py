"""GPTQ and coordinate descent: the textbook algorithm, never worse than rounding, on every grid."""

from __future__ import annotations

import pytest
import torch

from lowbit.calibration import gptq
from lowbit.calibration.gptq import RoundingOptions, compensate, inverse_factor, round_group
from lowbit.dtypes import decode, encode
from lowbit.quantize import quantize
from lowbit.scheme import get_scheme

SCHEMES = ("int8", "fp8", "int8-weight-only", "fp8-block", "int8-block", "fp8-static", "mxfp8")


def problem(n: int = 96, k: int = 272, tokens: int = 400, seed: int = 0):
    """Correlated inputs with outlier channels, and a weight."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=g) / k**0.5
    x = torch.randn(tokens, k, generator=g) @ mix
    x[:, ::37] *= 8
    return torch.randn(n, k, generator=g) * 0.05, x, x.t() @ x


def textbook(weight, hessian, scale, damping):
    """GPTQ as in the paper, float64, one column after the other, on an int8 grid per channel."""
    k = weight.shape[1]
    h = hessian.double() + torch.eye(k).double() * damping * hessian.double().diagonal().mean()
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    w, codes = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.float64)
    for j in range(k):
        codes[:, j] = (w[:, j] / scale[:, 0]).round().clamp(-127, 127)
        error = (w[:, j] - codes[:, j] * scale[:, 0]) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:][None]
    return codes


def test_inverse_factor_is_the_cholesky_factor_of_the_inverse():
    _, _, h = problem()
    damped = h.double() + torch.eye(272).double() * 0.01 * h.double().diagonal().mean()
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    assert torch.allclose(inverse_factor(h.double(), 0.01), expected, rtol=1e-8, atol=1e-10)
    singular = torch.zeros(4, 4, dtype=torch.float64)
    assert torch.isfinite(inverse_factor(singular, 0.0)).all()


@pytest.mark.parametrize("compiled", [True, False])
def test_codes_are_those_of_the_textbook(monkeypatch, compiled):
    monkeypatch.setattr(gptq, "_compiled", lambda x, grid: compiled)
    weight, _, h = problem(n=32)
    options = RoundingOptions(act_order=False)
    found = round_group([weight], h, get_scheme("int8").weights, options)[0]
    expected = textbook(weight, h, found.quantized.scale.double(), 0.01)
    # float32 errors move a value across a tie now and then, and that moves what comes after it.
    assert (found.quantized.codes == expected).double().mean() > 0.98
    delta = found.quantized.dequantize().double() - weight.double()
    delta_expected = expected * found.quantized.scale.double() - weight.double()
    error = ((delta @ h.double()) * delta).sum()
    assert error <= 1.01 * ((delta_expected @ h.double()) * delta_expected).sum()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rounding", ["gptq", "coordinate-descent", "gptq+descent"])
def test_never_worse_than_rounding_and_mostly_better(scheme, rounding):
    weight, x, h = problem()
    spec = get_scheme(scheme).weights
    found = round_group([weight[:40], weight[40:]], h, spec, RoundingOptions(rounding=rounding))
    assert [f.quantized.codes.shape[0] for f in found] == [40, 56]
    for part, w in zip(found, (weight[:40], weight[40:]), strict=True):
        nearest = quantize(w, spec).dequantize()
        y = x.double() @ w.double().t()
        lost = (x.double() @ part.quantized.dequantize().double().t() - y).square().sum(0)
        plain = (x.double() @ nearest.double().t() - y).square().sum(0)
        assert (lost <= plain * 1.001).all()
        assert lost.sum() < 0.75 * plain.sum()
        assert part.error == pytest.approx(float(lost.sum() / y.square().sum()), rel=1e-3)
        assert part.nearest_error == pytest.approx(float(plain.sum() / y.square().sum()), rel=1e-3)


def test_a_hopeless_row_falls_back_to_rounding():
    """A Hessian that has nothing to do with the damping used: GPTQ alone would lose."""
    weight, _, h = problem(n=8)
    options = RoundingOptions(damping=1e-8, act_order=False)
    diagonal = torch.diag(h.diagonal())
    found = round_group([weight], diagonal, get_scheme("int8").weights, options)[0]
    assert found.error <= found.nearest_error
    assert torch.equal(found.quantized.codes, quantize(weight, get_scheme("int8").weights).codes)


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
@pytest.mark.parametrize("rounding", ["gptq", "coordinate-descent"])
def test_compiled_and_torch_loops_agree(monkeypatch, scheme, rounding):
    weight, _, h = problem(n=64)
    options = RoundingOptions(rounding=rounding, sweeps=1)
    spec = get_scheme(scheme).weights
    compiled = round_group([weight], h, spec, options)[0]
    monkeypatch.setattr(gptq, "_compiled", lambda x, grid: False)
    plain = round_group([weight], h, spec, options)[0]
    same = decode(compiled.quantized.codes) == decode(plain.quantized.codes)
    assert same.double().mean() > 0.97
    assert compiled.error == pytest.approx(plain.error, rel=0.02)


def test_the_compiled_rounding_is_encode():
    import numpy as np

    from lowbit.calibration.gptq_cpu import gptq_block
    from lowbit.dtypes import E4M3FN, INT8

    g = torch.Generator().manual_seed(0)
    values = torch.cat([torch.randn(4000, generator=g) * 10.0**e for e in range(-5, 4)])
    ties = decode(torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn))
    ties = ties[torch.isfinite(ties)].sort().values
    values = torch.cat([values, ties, (ties[1:] + ties[:-1]) / 2, torch.arange(-300, 300) / 2.0])
    for kind, dtype in ((0, INT8), (1, E4M3FN)):
        codes = torch.empty(values.numel(), 1)
        ones = np.ones((values.numel(), 1), dtype=np.float32)
        gptq_block(
            values[:, None].clone().numpy(), ones, np.zeros(1, dtype=np.int64), np.ones((1, 1), dtype=np.float32),
            0, kind, np.float32(dtype.max), codes.numpy(), np.empty_like(ones),
        )  # fmt: skip
        assert torch.equal(codes[:, 0], decode(encode(values, dtype)))


def test_compensation_is_the_least_squares_answer():
    weight, x, _ = problem(n=16, tokens=2000)
    noisy = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(5)) * 0.3
    found = compensate(weight, noisy.t() @ noisy, x.t() @ noisy, 1e-8).double()
    y = x.double() @ weight.double().t()
    expected = torch.linalg.lstsq(noisy.double(), y).solution.t()
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert (noisy.double() @ found.t() - y).norm() < (noisy.double() @ weight.double().t() - y).norm()


def test_a_bad_hessian_is_named():
    weight, _, h = problem(n=4)
    h[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        round_group([weight], h, get_scheme("int8").weights, RoundingOptions())


def test_the_factor_of_a_float32_hessian_is_made_in_float64():
    """Of few tokens H is singular but for the damping, which float32's sums would drown."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(40, 96, generator=g)
    h = x.t() @ x
    damped = h.double() + torch.eye(96).double() * 1e-6 * h.double().diagonal().mean()
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    found = inverse_factor(h, 1e-6).double()
    assert (found - expected).norm() < 1e-3 * expected.norm()


def test_a_damping_that_does_not_suffice_grows_tenfold():
    h = torch.diag(torch.tensor([-0.05, 1.0, 1.5, 2.0], dtype=torch.float64))
    mean = h.diagonal().mean()
    expected = (h + torch.eye(4).double() * 0.1 * mean).diagonal().rsqrt()
    torch.testing.assert_close(inverse_factor(h, 0.01), torch.diag(expected))


def test_descent_begins_where_gptq_ended_and_each_sweep_lowers_the_error():
    weight, _, h = problem(n=32)
    spec = get_scheme("int8").weights

    def error(**options) -> float:
        return round_group([weight], h, spec, RoundingOptions(**options))[0].error

    gptq_alone, descent = error(rounding="gptq"), error(rounding="coordinate-descent")
    assert error(rounding="gptq+descent") < gptq_alone < descent
    once, thrice = (error(rounding="coordinate-descent", sweeps=n) for n in (1, 3))
    assert thrice < descent < once


@pytest.mark.parametrize("compiled", [True, False])
def test_channels_that_no_input_reaches_leave_descent_its_gain(monkeypatch, compiled):
    monkeypatch.setattr(gptq, "_compiled", lambda x, grid: compiled)
    weight, x, _ = problem(n=16)
    x[:, 5:9] = 0
    options = RoundingOptions(rounding="coordinate-descent")
    found = round_group([weight], x.t() @ x, get_scheme("int8").weights, options)[0]
    assert found.error < 0.8 * found.nearest_error


def test_errors_are_of_the_weights_though_others_are_rounded():
    weight, x, h = problem(n=24)
    spec = get_scheme("int8").weights
    target = weight + 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    found = round_group([weight], h, spec, RoundingOptions(), targets=[target])[0]
    y = x.double() @ weight.double().t()
    for error, q in ((found.error, found.quantized), (found.nearest_error, quantize(target, spec))):
        lost = x.double() @ q.dequantize().double().t() - y
        assert error == pytest.approx(float(lost.square().sum() / y.square().sum()), rel=1e-4)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("scheme", ["int8", "int8-block", "fp8-block"])
def test_ragged_blocks_and_clipped_codes_are_those_of_the_oracle(monkeypatch, scheme, compiled):
    """200 rows are a block and a part of one; with scales that clip, codes end at ±127."""
    monkeypatch.setattr(gptq, "_compiled", lambda x, grid: compiled)
    weight, x, h = problem(n=200)
    weight[::3] *= 6
    weight[:, 7] = -12 * weight.abs().mean(1)
    spec = get_scheme(scheme).weights
    found = round_group([weight], h, spec, RoundingOptions(scale="mse"))[0]
    assert decode(found.quantized.codes).abs().max() <= spec.dtype.max
    y = x.double() @ weight.double().t()
    for error, q in (
        (found.error, found.quantized),
        (found.nearest_error, quantize(weight, spec, "mse")),
    ):
        lost = x.double() @ q.dequantize().double().t() - y
        assert error == pytest.approx(float(lost.square().sum() / y.square().sum()), rel=1e-4)


def test_inputs_that_are_all_zero_compensate_nothing():
    weight, nothing = torch.randn(3, 5), torch.zeros(5, 5)
    assert torch.equal(compensate(weight, nothing, nothing, 0.01), weight)
