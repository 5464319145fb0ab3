"""Quantizing kernels against the torch oracle of lowbit.quantize: the same bits."""

from __future__ import annotations

import pytest
import torch
from lowbit.kernels.quantize import quantize_per_group, quantize_per_token, quantize_static
from lowbit.kernels.targets import get_target, pretending
from sample_operands import FP8

from lowbit import quantize as oracle
from lowbit.dtypes import E4M3FN, E4M3FNUZ, INT8, DType
from lowbit.granularity import PerGroup, PerTensor, PerToken
from lowbit.scheme import TensorSpec

NATIVE, FOREIGN = (E4M3FN, E4M3FNUZ) if torch.float8_e4m3fn == FP8 else (E4M3FNUZ, E4M3FN)
DTYPES = [INT8, NATIVE]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(0, 32), (1, 1), (2, 16), (3, 100), (17, 496), (5, 2048), (2, 3884)]


def hard(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of many magnitudes; one of zeros, one tiny, one of ties."""
    x = torch.randn(m, k) * 2.0 ** torch.randint(-12, 8, (m, 1)).float()
    for row, value in ((1, 0.0), (2, 1e-39), (3, 127.0)):
        if row < m:
            x[row] = value
            if row == 3:
                x[row, 1:] = torch.randint(-126, 126, (k - 1,)) + 0.5
    return x.to(dtype)


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bitwise, but for which NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype in (torch.int8, torch.uint8):
        return torch.equal(a, b)
    a, b = a.float(), b.float()
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def check(found, x: torch.Tensor, spec: TensorSpec) -> None:
    scale, _ = oracle.choose_scale(x, spec)
    assert equal(found[1], scale)
    assert equal(found[0], oracle.quantize_with(x, scale, spec))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("x_dtype", FLOATS)
def test_per_token(dtype: DType, x_dtype):
    spec = TensorSpec(dtype=dtype, granularity=PerToken(), dynamic=True)
    for m, k in SHAPES:
        x = hard(m, k, x_dtype)
        check(quantize_per_token(x, dtype.torch_dtype), x, spec)


@pytest.mark.parametrize("power", [-124, -117, -60, 0, 115])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quotients_beside_ties_are_rounded_as_a_division_rounds_them(dtype: DType, power):
    """Values around (n + ½) · scale, where the last bit of a quotient decides the code."""
    largest = (1 + torch.rand(64, 1)) * 2.0**power
    scale = largest / dtype.max
    between = torch.arange(-126, 126) + 0.5
    if dtype is not INT8:  # halfway between two codes
        codes = torch.arange(1, 120, dtype=torch.uint8).view(dtype.torch_dtype).float()
        between = (codes[1:] + codes[:-1]) / 2
    tie = between * scale
    beside = [torch.nextafter(tie, torch.full_like(tie, end)) for end in (float("inf"), -float("inf"))]
    x = torch.cat([largest, tie, *beside], dim=1)
    spec = TensorSpec(dtype=dtype, granularity=PerToken(), dynamic=True)
    check(quantize_per_token(x, dtype.torch_dtype), x, spec)


@pytest.mark.parametrize("column_major", [False, True])
@pytest.mark.parametrize("group", [16, 32, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_per_group(dtype: DType, group, column_major):
    spec = TensorSpec(dtype=dtype, granularity=PerGroup(group), dynamic=True)
    for m, k in SHAPES:
        x = hard(m, k, torch.float16)
        found = quantize_per_group(x, dtype.torch_dtype, group, column_major=column_major)
        check(found, x, spec)
        if column_major and m > 1:
            assert found[1].stride(0) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_format", ["e8m0", "float32-power-of-2"])
def test_scales_that_are_powers_of_2(dtype: DType, scale_format):
    for group in (None, 32):
        granularity = PerToken() if group is None else PerGroup(group)
        spec = TensorSpec(dtype=dtype, granularity=granularity, dynamic=True, scale=scale_format)
        x = hard(17, 100, torch.float32)
        x[5] = (
            2.0 ** torch.randint(-9, 9, (100,)).float() * dtype.max
        )  # exact powers of two must not round up
        x[6, 40], x[7, 41] = float("nan"), float("inf")
        x[8], x[9] = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
        if group is None:
            found = quantize_per_token(x, dtype.torch_dtype, scale_format=scale_format)
        else:
            found = quantize_per_group(x, dtype.torch_dtype, group, scale_format=scale_format)
        check(found, x, spec)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity(dtype: DType):
    x = torch.randn(4, 300)
    x[0, 299], x[1, 5], x[2, 7] = float("nan"), float("inf"), -float("inf")
    check(quantize_per_token(x, dtype.torch_dtype), x, TensorSpec(dtype=dtype, granularity=PerToken()))
    check(quantize_per_group(x, dtype.torch_dtype), x, TensorSpec(dtype=dtype, granularity=PerGroup(128)))
    scale = quantize_per_token(x, dtype.torch_dtype)[1]
    assert scale[0].isnan() and scale[1].isinf() and scale[2].isinf() and scale[3].isfinite()
    spec, one = TensorSpec(dtype=dtype, granularity=PerTensor()), torch.ones(1)
    assert equal(quantize_static(x, one, dtype.torch_dtype), oracle.quantize_with(x, one, spec))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.02, 0.3, 1e-8, 1e6])
def test_static(dtype: DType, scale):
    spec, stored = TensorSpec(dtype=dtype, granularity=PerTensor()), torch.tensor([scale])
    for m, k in SHAPES:
        x = hard(m, k, torch.float32)
        assert equal(quantize_static(x, stored, dtype.torch_dtype), oracle.quantize_with(x, stored, spec))


@pytest.mark.parametrize("zero", [-128, -3, 0, 127])
def test_static_with_a_zero_point(zero):
    spec = TensorSpec(dtype=INT8, granularity=PerTensor(), symmetric=False)
    x, scale = hard(17, 300, torch.float32), torch.tensor([0.037])
    x[0, 0], x[0, 1] = float("nan"), float("inf")
    for stored in (torch.tensor([zero], dtype=torch.int8), torch.tensor([zero], dtype=torch.int32)):
        found = quantize_static(x, scale, zero_point=stored)
        assert torch.equal(
            found, oracle.quantize_with(x, scale, spec, torch.tensor([zero], dtype=torch.int8))
        )


@pytest.mark.parametrize(("name", "dtype"), [("gfx942", E4M3FNUZ), ("gfx942", INT8), ("ascend910b", INT8)])
def test_other_targets(name, dtype: DType):
    x = hard(33, 300, torch.bfloat16)
    with pretending(get_target(name)):
        found = quantize_per_token(x, dtype.torch_dtype)
    check(found, x, TensorSpec(dtype=dtype, granularity=PerToken()))


def test_strided_rows():
    x = torch.randn(20, 200)
    for view in (x[3:9, 17:150], x.t()):
        check(quantize_per_token(view), view, TensorSpec(dtype=INT8, granularity=PerToken()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: quantize_per_token(x[0]), "flatten the leading dimensions"),
        (lambda x: quantize_per_token(x.double()), "expected activations of dtype"),
        (lambda x: quantize_per_token(x, torch.int32), "expected codes of int8 or e4m3"),
        (lambda x: quantize_per_token(x, FOREIGN.torch_dtype), r"expected codes that \w+ converts to"),
        (lambda x: quantize_per_group(x, group_size=48), "power of two"),
        (lambda x: quantize_static(x, torch.ones(2)), "expected one scale"),
        (
            lambda x: quantize_static(x, torch.ones(1), FP8, zero_point=torch.zeros(1, dtype=torch.int8)),
            "int8 codes with a zero point",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(4, 32))


def test_groups_that_overflow_ascends_buffer():
    with (
        pretending(get_target("ascend910b")),
        pytest.raises(ValueError, match="to 256 on ascend910b, found 512"),
    ):
        quantize_per_group(torch.randn(4, 1024), group_size=512)
