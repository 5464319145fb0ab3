"""Fused producers against the unfused model (torch, transformers' order of rounding) + the oracle."""

from __future__ import annotations

import pytest
import torch
from lowbit.kernels.checks import MAX_ROW_STRIDE
from lowbit.kernels.fused import rms_norm_quantize, silu_mul_quantize
from lowbit.kernels.hadamard import hadamard
from lowbit.kernels.quantize import quantize_per_group, quantize_per_token, quantize_static
from lowbit.kernels.targets import get_target, pretending
from sample_operands import FP8
from torch.nn import functional

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 32), (5, 100), (3, 2048), (2, 2500)]


def rms_norm(h: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """transformers' LlamaRMSNorm, in its order of rounding."""
    value = h.float()
    value = value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + eps)
    return weight * value.to(h.dtype)


def unfused(y: torch.Tensor, mode: str, dtype: torch.dtype):
    if mode == "token":
        return quantize_per_token(y, dtype)
    if mode == "group":
        return quantize_per_group(y, dtype, 32)
    return quantize_static(y, torch.tensor([0.02]), dtype), torch.tensor([0.02])


def options(mode: str) -> dict:
    return {"token": {}, "group": {"group_size": 32}, "static": {"scale": torch.tensor([0.02])}}[mode]


ULP = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def close(found, expected, x_dtype: torch.dtype) -> None:
    """Sums of squares and exponentials differ in their last bit: a value may then round to its
    neighbour, and its code differ by a step, rarely."""
    codes, scale = found
    assert codes.dtype == expected[0].dtype and scale.shape == expected[1].shape
    torch.testing.assert_close(scale, expected[1], rtol=ULP[x_dtype], atol=0)
    difference = (codes.float() - expected[0].float()).abs()
    step = 1.0 if codes.dtype == torch.int8 else 0.13 * expected[0].float().abs() + 2**-8
    assert (difference <= step).all()
    assert (difference > 0).float().mean() <= 0.02


@pytest.mark.parametrize("dtype", [torch.int8, FP8])
@pytest.mark.parametrize("mode", ["token", "group", "static"])
@pytest.mark.parametrize("x_dtype", FLOATS)
def test_rms_norm(x_dtype, mode, dtype):
    for m, k in SHAPES:
        x, residual = torch.randn(m, k).to(x_dtype), torch.randn(m, k).to(x_dtype)
        weight = torch.randn(k).to(x_dtype)
        codes, scale, h = rms_norm_quantize(x, weight, 1e-5, dtype, residual=residual, **options(mode))
        assert torch.equal(h, x + residual)
        close((codes, scale), unfused(rms_norm(h, weight, 1e-5), mode, dtype), x_dtype)
        codes, scale, h = rms_norm_quantize(x, weight, 1e-5, dtype, **options(mode))
        assert h is None
        close((codes, scale), unfused(rms_norm(x, weight, 1e-5), mode, dtype), x_dtype)


def test_rms_norm_is_exact_where_the_root_is():
    signs = torch.randint(0, 2, (3, 256)) * 2.0 - 1
    weight = torch.arange(256).float() - 128
    codes, scale, _ = rms_norm_quantize(signs * 4, weight, 0.0)
    assert torch.equal(codes, quantize_per_token(signs * weight)[0])
    assert torch.equal(scale, torch.full((3, 1), 128 / 127))
    # A large eps halves the values: it is inside the root.
    _, halved, _ = rms_norm_quantize(signs, weight, 3.0)
    assert torch.equal(halved, torch.full((3, 1), 64 / 127))


@pytest.mark.parametrize("dtype", [torch.int8, FP8])
@pytest.mark.parametrize("mode", ["token", "group", "static"])
@pytest.mark.parametrize("x_dtype", FLOATS)
def test_silu_mul(x_dtype, mode, dtype):
    for m, k in SHAPES:
        gate, up = (torch.randn(m, 2 * k) * 3).to(x_dtype).chunk(2, dim=-1)
        found = silu_mul_quantize(gate, up, dtype, **options(mode))
        close(found, unfused(functional.silu(gate) * up, mode, dtype), x_dtype)


def test_silu_of_large_values_and_zero_point():
    gate, up = torch.tensor([[-200.0, 200.0, 0.0, 1.0]]), torch.ones(1, 4)
    zero = torch.tensor([5], dtype=torch.int8)
    codes, _ = silu_mul_quantize(gate, up, scale=torch.tensor([2.0]), zero_point=zero)
    assert codes.tolist() == [[5, 105, 5, 5]]


def test_column_major_scales_and_ascend():
    gate, up = torch.randn(33, 256).half(), torch.randn(33, 256).half()
    _, scale = silu_mul_quantize(gate, up, group_size=128, column_major=True)
    assert scale.stride() == (1, 33)
    with pretending(get_target("ascend910b")):
        close(
            silu_mul_quantize(gate, up),
            unfused(functional.silu(gate) * up, "token", torch.int8),
            torch.float16,
        )


def test_no_rows():
    codes, scale = silu_mul_quantize(torch.randn(0, 32), torch.randn(0, 32))
    assert codes.shape == (0, 32) and scale.shape == (0, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: rms_norm_quantize(x, torch.ones(31), 1e-5), r"expected weight of shape \[32\]"),
        (
            lambda x: rms_norm_quantize(x, torch.ones(32), 1e-5, residual=x.half()),
            "expected residual of dtype",
        ),
        (lambda x: silu_mul_quantize(x, x[:3]), r"expected up of shape \[4, 32\]"),
        (lambda x: silu_mul_quantize(x, x, scale=torch.ones(1), group_size=32), "found both"),
        (lambda x: silu_mul_quantize(x, x, zero_point=torch.zeros(1, dtype=torch.int8)), "found none"),
        (lambda x: hadamard(x, 24), "power of two"),
        (lambda x: hadamard(x, 64), "largest power of two that divides it is 32"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(4, 32))


def sylvester(size: int) -> torch.Tensor:
    return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)])


@pytest.mark.parametrize(
    ("shape", "block"), [((1, 2), 2), ((5, 96), 32), ((2, 3, 128), 128), ((3, 1536), 512)]
)
def test_hadamard_is_exact_on_integers(shape, block):
    x = torch.randint(-8, 9, shape).float()
    expected = (x.unflatten(-1, (-1, block)) @ sylvester(block)).flatten(-2)
    assert torch.equal(hadamard(x, block, factor=1.0), expected)
    assert torch.equal(hadamard(x.half(), block, factor=1.0).float(), expected.half().float())


def test_hadamard_is_its_own_inverse_and_keeps_the_norm():
    x = torch.randn(70, 256)[:, 64:192]
    once = hadamard(x, 64)
    torch.testing.assert_close(once.norm(dim=1), x.norm(dim=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(hadamard(once, 64), x, rtol=0, atol=1e-6)
    assert hadamard(torch.randn(0, 64), 64).shape == (0, 64)


def test_hadamard_reads_no_row_beyond_int32(monkeypatch):
    tile = {}

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **constants: tile.update(constants)

    monkeypatch.setattr("lowbit.kernels.hadamard.hadamard_kernel", Kernel())
    hadamard(torch.randn(2000, 2), 2)
    assert (tile["ROWS"] - 1) * MAX_ROW_STRIDE + tile["SIZE"] < 2**31


def test_hadamard_is_refused_on_ascend():
    with pretending(get_target("ascend910b")), pytest.raises(ValueError, match="Ascend's compiler"):
        hadamard(torch.randn(2, 64), 64)
