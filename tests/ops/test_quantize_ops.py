"""Quantizing operations against `lowbit.quantize`, fused ones against their parts, Hadamard against scipy's matrix."""

from __future__ import annotations

import re

import pytest
import torch

from lowbit import ops
from lowbit.dtypes import E4M3FN, INT8
from lowbit.granularity import PerGroup, PerTensor, PerToken
from lowbit.quantize import choose_scale, quantize_with
from lowbit.scheme import TensorSpec

DTYPES = {torch.int8: INT8, torch.float8_e4m3fn: E4M3FN}
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal values, NaN equal to NaN whatever its bits, and the same sign of zero."""
    a, b = a.float(), b.float()
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a[~nan].view(torch.int32), b[~nan].view(torch.int32))


def hard_rows(dtype: torch.dtype, k: int) -> torch.Tensor:
    x = torch.randn(20, k) * torch.logspace(-6, 4, 20).unsqueeze(1)
    x[1], x[2, 3], x[3, 5], x[4, 7] = 0, float("nan"), float("inf"), -float("inf")
    x[5], x[6] = 1e-42, torch.arange(k) - k / 2  # subnormal; ties
    x[7, : k // 2] = 127.0
    x[7, k // 2 :] = torch.arange(k - k // 2) + 0.5
    return x.to(dtype)


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [0, 32, 48, 128])
@pytest.mark.parametrize("power_of_2", [False, True])
def test_dynamic_quantization_is_the_oracles(x_dtype, dtype, group, power_of_2):
    x = hard_rows(x_dtype, 300)
    spec = TensorSpec(
        dtype=DTYPES[dtype], granularity=PerGroup(group) if group else PerToken(), dynamic=True,
        scale="float32-power-of-2" if power_of_2 else "float32",
    )  # fmt: skip
    codes, scale = ops.quantize(x, dtype, group=group, power_of_2=power_of_2)
    expected, _ = choose_scale(x, spec)
    assert same(scale, expected)
    assert same(codes, quantize_with(x, expected, spec))
    assert codes.dtype == dtype and codes.shape == x.shape


def test_every_float16_rounds_to_fp8_as_torch_does():
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).view(64, 1024)
    codes = ops.quantize_static(x, torch.ones(1), dtype=torch.float8_e4m3fn)
    assert same(codes, x.float().clamp(-448, 448).to(torch.float8_e4m3fn))


@pytest.mark.parametrize("zero", [None, -128, -3, 127])
@pytest.mark.parametrize("x_dtype", FLOATS)
def test_static_quantization_is_the_oracles(x_dtype, zero):
    x = hard_rows(x_dtype, 100)
    scale, point = torch.tensor([0.037]), None if zero is None else torch.tensor([zero], dtype=torch.int8)
    spec = TensorSpec(dtype=INT8, granularity=PerTensor(), symmetric=zero is None)
    codes = ops.quantize_static(x, scale, point, dtype=torch.int8)
    assert torch.equal(codes, quantize_with(x, scale, spec, point))


@pytest.mark.parametrize("k", [9, 16, 100])
@pytest.mark.parametrize("scale", [0.0, torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_static_scales_that_are_no_scale(dtype, scale, k):
    """0 is what calibration leaves to an expert that saw no token: no loop may stop at the division."""
    x, given = hard_rows(torch.float32, k), torch.tensor([scale])
    codes = ops.quantize_static(x, given, dtype=dtype)
    assert same(codes, quantize_with(x, given, TensorSpec(dtype=DTYPES[dtype], granularity=PerTensor())))


def test_quantized_rows_then_matmul_is_linear():
    x, w, scale = (
        torch.randn(2, 5, 256),
        torch.randint(-127, 128, (40, 256), dtype=torch.int8),
        torch.rand(2, 2),
    )
    codes, a_scale = ops.quantize(x, torch.int8, group=128)
    assert a_scale.shape == (2, 5, 2)
    out = ops.matmul(codes, a_scale, w, scale[:1], block=(128, 128), out_dtype=torch.float32)
    assert torch.equal(out, ops.linear(x, w, scale[:1], activations="group", block=(128, 128)))
    rounded = a_scale.to(torch.bfloat16)
    out = ops.matmul(codes, rounded, w, scale[:1], block=(128, 128), out_dtype=torch.float32)
    exact = ops.matmul(codes, rounded.float(), w, scale[:1], block=(128, 128), out_dtype=torch.float32)
    assert torch.equal(out, exact)
    for wrong in ({"out_dtype": torch.int32}, {"a_scale": a_scale.to(torch.uint8)}):
        given = {"a_scale": a_scale, "out_dtype": torch.float32} | wrong
        with pytest.raises(ValueError, match="expected a_scale and out_dtype of float32"):
            ops.matmul(codes, weight=w, weight_scale=scale[:1], block=(128, 128), **given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [0, 64])
def test_fused_operations_are_their_parts(dtype, group):
    x, weight = torch.randn(3, 7, 128).to(torch.bfloat16), torch.rand(128).to(torch.bfloat16)
    residual = torch.randn(3, 7, 128).to(torch.bfloat16)
    codes, scale, total = ops.rms_norm_quantize(x, weight, 1e-6, residual, dtype=dtype, group=group)
    assert torch.equal(total, x + residual)
    h = (x + residual).float()
    normed = (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)).to(torch.bfloat16) * weight
    expected = ops.quantize(normed, dtype, group=group)
    assert same(codes, expected[0]) and torch.equal(scale, expected[1])
    codes, scale = ops.silu_mul_quantize(x, dtype=dtype, group=group)
    gate, up = x.chunk(2, dim=-1)
    product = torch.nn.functional.silu(gate.float()).to(torch.bfloat16) * up
    expected = ops.quantize(product, dtype, group=group)
    assert same(codes, expected[0]) and torch.equal(scale, expected[1])


@pytest.mark.parametrize("block", [1, 2, 4, 8, 64, 256])
@pytest.mark.parametrize("x_dtype", FLOATS)
def test_hadamard_is_the_matrix(path, block, x_dtype):
    """Sylvester's matrix, H[i, j] = (−1)^popcount(i & j), built from that definition."""
    x = torch.randn(2, 5, 512).to(x_dtype)
    index = torch.arange(block)
    bits = torch.tensor([[bin(int(i) & int(j)).count("1") for j in index] for i in index])
    matrix = (1 - 2 * (bits % 2)).double() / block**0.5
    expected = (x.double().unflatten(-1, (-1, block)) @ matrix).flatten(-2)
    for implementation in ("cpu", "reference"):
        with ops.use_implementation(implementation):
            out = ops.hadamard(x, block)
        bound = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[x_dtype]
        assert out.dtype == x_dtype
        assert float((out.double() - expected).abs().max()) <= bound * float(expected.abs().max())


def test_hadamard_of_strided_rows_and_its_inverse():
    x = torch.randn(64, 40).T[:, :32]
    assert torch.equal(ops.hadamard(x, 32), ops.hadamard(x.contiguous(), 32))
    torch.testing.assert_close(ops.hadamard(ops.hadamard(x, 16), 16), x, rtol=1e-5, atol=1e-6)
    assert ops.hadamard(torch.empty(0, 8), 8).shape == (0, 8)


@pytest.mark.parametrize("shape", [(3, 0), (2, 0, 0)])
def test_rows_without_elements_are_refused(shape):
    """They were a RuntimeError of torch's about a reshape."""
    for operation in (
        lambda x: ops.quantize(x, torch.int8),
        lambda x: ops.quantize_static(x, torch.ones(1), dtype=torch.int8),
        lambda x: ops.rms_norm_quantize(x, torch.ones(0), 1e-6, dtype=torch.int8),
        lambda x: ops.silu_mul_quantize(x, dtype=torch.int8),
        lambda x: ops.hadamard(x, 1),
    ):
        for device in ("cpu", "meta"):
            with pytest.raises(ValueError, match=re.escape(f"K of at least 1, found {list(shape)}")):
                operation(torch.empty(shape, device=device))


def test_errors():
    with pytest.raises(ValueError, match="a power of two for the block, found 12"):
        ops.hadamard(torch.ones(2, 24), 12)
    with pytest.raises(ValueError, match="that 16 divides"):
        ops.hadamard(torch.ones(2, 24), 16)
    with pytest.raises(ValueError, match="expected dtype int8 or float8_e4m3fn"):
        ops.quantize(torch.ones(2, 24), torch.int32)
    with pytest.raises(ValueError, match="expected zero_point"):
        ops.quantize_static(
            torch.ones(2, 2), torch.ones(1), torch.zeros(1, dtype=torch.int8), dtype=torch.float8_e4m3fn
        )


@pytest.mark.parametrize("exponent", [-37, -20, 0, 20, 36])
@pytest.mark.parametrize("k", [31, 256, 1000])
def test_quotients_next_to_half_an_integer(isa, k, exponent):
    """Codes are those of a division: a product by the inverse tips some of these (and saves no time)."""
    scale = torch.tensor([1.7 * 10.0**exponent])
    halves = torch.randint(-126, 126, (64, k)) + 0.5
    x = halves * scale * (1 + torch.randint(-3, 4, (64, k)) * 2.0**-24)
    x[:, 0] = 127 * scale
    found, found_scale = ops.quantize(x, torch.int8)
    own = x.abs().amax(1, keepdim=True) / 127
    assert torch.equal(found_scale, own)
    assert torch.equal(found, (x / own).round().to(torch.int8))
    for zero in (-77, 127):
        point = torch.tensor([zero], dtype=torch.int8)
        found = ops.quantize_static(2 * x, scale, point, dtype=torch.int8)
        assert torch.equal(found, (2 * x / scale + zero).round().clamp(-128, 127).to(torch.int8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_quotients_beside_the_edges_between_codes(dtype):
    """Codes are those of a division, though none is done per value: half a unit in the last place decides."""
    if dtype == torch.int8:
        edges = torch.arange(-127, 127) + 0.5
    else:
        values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        edges = torch.cat([(values[1:] + values[:-1]) / 2, -values[1:]])
    scales = torch.cat(
        [torch.logspace(-37, 35, 300), 2.0 ** torch.arange(-124, 120, 7), torch.rand(200) + 0.5]
    )
    lowest, highest = (-127, 127) if dtype == torch.int8 else (-448, 448)
    for scale in scales:
        x = edges * scale
        x = torch.stack(
            [x, torch.nextafter(x, torch.tensor(-torch.inf)), torch.nextafter(x, torch.tensor(torch.inf))]
        )
        quotient = (x / scale).clamp(lowest, highest)
        expected = quotient.round().to(torch.int8) if dtype == torch.int8 else quotient.to(dtype)
        assert same(ops.quantize_static(x, scale.reshape(1), dtype=dtype), expected), scale
        # The same as dynamic codes: what the largest value makes of the scale is close to it.
        x = torch.cat([x, (highest * scale).expand(3, 1)], 1)
        codes, found = ops.quantize(x, dtype)
        quotient = (x / found).clamp(lowest, highest)
        expected = quotient.round().to(torch.int8) if dtype == torch.int8 else quotient.to(dtype)
        assert same(codes, expected), scale
