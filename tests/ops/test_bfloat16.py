"""Products of bfloat16 weights in float32: against float64, for every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from lowbit import ops

SHAPES = [
    (1, 24, 64),
    (2, 65, 577),
    (3, 64, 32),
    (5, 7, 33),
    (8, 130, 576),
    (17, 100, 31),
    (200, 70, 96),
    (1, 1, 1),
]


def close(got: torch.Tensor, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Within what K float32 additions may lose of the sum of magnitudes."""
    exact = x.double() @ w.double().T + (0 if bias is None else bias.double())
    room = x.double().abs() @ w.double().abs().T + (0 if bias is None else bias.double().abs())
    return bool(((got.double() - exact).abs() <= room * 2.0**-24 * (w.shape[1] + 2)).all())


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_float64(path, m, n, k, with_bias):
    x, w = torch.randn(m, k), torch.randn(n, k).bfloat16()
    bias = torch.randn(n) if with_bias else None
    assert close(ops.linear_bfloat16(x, w, bias), x, w, bias)


def test_widening_is_exact(path):
    """One product per output: every finite bfloat16, subnormals and infinities too, comes back bit for bit."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    w = bits.view(torch.bfloat16).reshape(-1, 1)
    got = ops.linear_bfloat16(torch.ones(1, 1), w)[0]
    want = w[:, 0].float() + 0.0  # a sum begins at 0, which takes the sign off −0
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[~want.isnan()], want[~want.isnan()])


def test_any_strides_and_dimensions(path):
    w = torch.randn(40, 48).bfloat16()
    x = torch.randn(3, 48, 5).transpose(1, 2)
    got = ops.linear_bfloat16(x, w)
    assert got.shape == (3, 5, 40) and close(got.reshape(-1, 40), x.reshape(-1, 48), w, None)
    assert ops.linear_bfloat16(torch.randn(48), w).shape == (40,)
    assert ops.linear_bfloat16(torch.empty(0, 48), w).shape == (0, 40)
    assert close(ops.linear_bfloat16(x[0], w[::2]), x[0], w[::2], None)


def test_rounds_once_to_the_dtype_of_x(path):
    x, w = torch.randn(4, 48).bfloat16(), torch.randn(40, 48).bfloat16()
    got = ops.linear_bfloat16(x, w)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, ops.linear_bfloat16(x.float(), w).bfloat16())


def test_reference_is_float64():
    x, w, bias = torch.randn(4, 48), torch.randn(40, 48).bfloat16(), torch.randn(40)
    with ops.use_implementation("reference"):
        got = ops.linear_bfloat16(x, w, bias)
    assert torch.equal(got, (x.double() @ w.double().T).float() + bias)


def test_opcheck_and_gradients():
    x, bias = torch.randn(5, 64, requires_grad=True), torch.randn(24, requires_grad=True)
    w = torch.randn(24, 64).bfloat16()
    opcheck(torch.ops.lowbit.linear_bfloat16.default, (x, w, bias))
    grad = torch.randn(5, 24)
    ops.linear_bfloat16(x, w, bias).backward(grad)
    torch.testing.assert_close(x.grad, grad @ w.float())
    torch.testing.assert_close(bias.grad, grad.sum(0))


@pytest.mark.parametrize(
    ("x", "weight", "words"),
    [
        (torch.randn(2, 8), torch.randn(4, 8), "expected a bfloat16 weight"),
        (torch.randn(2, 8), torch.randn(8, 4).bfloat16(), "not transposed"),
        (torch.randn(2, 8).double(), torch.randn(4, 8).bfloat16(), "found torch.float64"),
    ],
)
def test_bad_arguments(x, weight, words):
    with pytest.raises(ValueError, match=words):
        ops.linear_bfloat16(x, weight)
