"""Row × channel products against float64 oracles: bitwise wherever the arithmetic is exact."""

from __future__ import annotations

import itertools

import pytest
import torch
from lowbit.kernels.matmul import matmul
from lowbit.kernels.targets import get_target, pretending
from lowbit.kernels.tuned_tables import LaunchParameters
from sample_operands import FP8

M, N, K = (0, 1, 2, 15, 16, 17, 31, 33, 64, 127, 128, 257), (1, 16, 100, 576, 971), (16, 32, 100, 496, 3884)
# Every value of every dimension at least once; the whole product runs under `-m slow`.
QUICK = [
    (0, 16, 32), (1, 1, 16), (2, 100, 100), (15, 576, 496), (16, 971, 32), (17, 16, 3884), (31, 1, 496),
    (33, 100, 16), (64, 576, 100), (127, 971, 16), (128, 16, 496), (257, 100, 32),
]  # fmt: skip
SHAPES = [
    pytest.param(*shape, marks=() if shape in QUICK else pytest.mark.slow)
    for shape in itertools.product(M, N, K)
]
SMALL = LaunchParameters(block_m=16, block_n=32, block_k=32, group_m=2)
VARIANTS = {
    "split": LaunchParameters(block_m=16, block_n=32, block_k=32, split_k=4),
    "persistent": LaunchParameters(block_m=16, block_n=32, block_k=64, persistent=True),
    "tma": LaunchParameters(block_m=32, block_n=32, block_k=32, tma=True),
    "promote": LaunchParameters(block_m=16, block_n=32, block_k=64, promote_k=32),
}


def int8(*shape: int, low: int = -127, high: int = 127) -> torch.Tensor:
    return torch.randint(low, high + 1, shape, dtype=torch.int8)


def powers_of_2(*shape: int) -> torch.Tensor:
    return 2.0 ** torch.randint(-6, 4, shape).float()


def epilogue(acc, a_scale, w_scale, bias=None):
    """int64 or float64 sums → float32, in the order that is promised."""
    value = acc.float() * a_scale.reshape(-1, 1) * w_scale.reshape(1, -1)
    return value if bias is None else value + bias.float()


def exact_sum(a, w, zero=None):
    shifted = a.double() if zero is None else a.double() - zero.double().reshape(-1, 1)
    return shifted @ w.double().T


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_int8_is_bitwise_exact_on_every_shape(m, n, k):
    a, w = int8(m, k, low=-128), int8(n, k)
    a_scale, w_scale, bias = torch.rand(m, 1), torch.rand(n, 1), torch.randn(n)
    zero = int8(m, 1, low=-128)
    plain = matmul(a, w, a_scale, w_scale, out_dtype=torch.float32)
    assert torch.equal(plain, epilogue(exact_sum(a, w), a_scale, w_scale))
    w_sum = w.sum(1, dtype=torch.int32)
    shifted = matmul(
        a, w, a_scale, w_scale, bias=bias, a_zero_point=zero, w_sum=w_sum, out_dtype=torch.float32
    )
    assert torch.equal(shifted, epilogue(exact_sum(a, w, zero), a_scale, w_scale, bias))


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_fp8_is_bitwise_exact_where_sums_are(m, n, k):
    a = torch.randint(-4, 5, (m, k)).to(FP8)
    w = torch.randint(-4, 5, (n, k)).to(FP8)
    a_scale, w_scale, bias = powers_of_2(m, 1), powers_of_2(n, 1), torch.randint(-8, 9, (n,)).float()
    found = matmul(a, w, a_scale, w_scale, bias=bias, out_dtype=torch.float32)
    expected = (a.double() @ w.double().T) * a_scale.double() * w_scale.double().T + bias.double()
    assert torch.equal(found.double(), expected)


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_output_is_rounded_once(out_dtype):
    a, w = int8(17, 100, low=-7, high=7), int8(33, 100, low=-7, high=7)
    a_scale, w_scale, bias = powers_of_2(17, 1), powers_of_2(33, 1), torch.randn(33).to(torch.bfloat16)
    found = matmul(a, w, a_scale, w_scale, bias=bias, out_dtype=out_dtype)
    assert found.dtype == out_dtype
    assert torch.equal(found, epilogue(exact_sum(a, w), a_scale, w_scale, bias).to(out_dtype))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_gives_the_same_bits(variant):
    launch = VARIANTS[variant]
    for m, n, k in ((1, 16, 496), (33, 100, 496), (17, 33, 64)):
        a, w = int8(m, k), int8(n, k)
        scales = torch.rand(m, 1), torch.rand(n, 1)
        extra = {
            "bias": torch.randn(n),
            "a_zero_point": int8(1),
            "w_sum": w.sum(1, dtype=torch.int32),
            "out_dtype": torch.float32,
        }
        rounded = extra | {"out_dtype": torch.bfloat16}  # where a persistent kernel's loops are one
        if launch.promote_k == 0:
            assert torch.equal(
                matmul(a, w, *scales, **rounded, launch=launch),
                matmul(a, w, *scales, **rounded, launch=SMALL),
            )
            found = matmul(a, w, *scales, **extra, launch=launch)
            assert torch.equal(found, matmul(a, w, *scales, **extra, launch=SMALL))
            expected = epilogue(exact_sum(a, w, extra["a_zero_point"]), *scales, extra["bias"])
            assert torch.equal(found, expected)
        codes = [torch.randn(rows, k).to(FP8) for rows in (m, n)]
        found = matmul(*codes, *scales, out_dtype=torch.float32, launch=launch)
        expected = (codes[0].double() @ codes[1].double().T) * scales[0] * scales[1].T
        assert (found - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("name", ["sm80", "sm90", "sm100", "gfx942", "gfx950", "ascend910b"])
def test_parameters_of_every_family_of_targets(name):
    # More tiles than Ascend's 20 programs.
    a, w = int8(257, 496), int8(1100, 496)
    scales = torch.rand(257, 1), torch.rand(1100, 1)
    with pretending(get_target(name)):
        found = matmul(a, w, *scales, out_dtype=torch.float32)
    assert torch.equal(found, epilogue(exact_sum(a, w), *scales))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_persistent_program_does_several_tiles(dtype, monkeypatch):
    monkeypatch.setattr("lowbit.kernels.matmul.core_count", lambda device: 3)
    a, w = int8(70, 96), int8(90, 96)
    call = a, w, torch.rand(70, 1), torch.rand(90, 1)
    found = matmul(*call, out_dtype=dtype, launch=VARIANTS["persistent"])
    assert torch.equal(found, matmul(*call, out_dtype=dtype, launch=SMALL))


def test_fnuz_codes_on_gfx942():
    codes = [torch.randn(rows, 100).to(torch.float8_e4m3fnuz) for rows in (17, 33)]
    with pretending(get_target("gfx942")):
        found = matmul(*codes, torch.ones(1), torch.ones(1), out_dtype=torch.float32)
    expected = codes[0].double() @ codes[1].double().T
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("a_shape", [(33, 1), (33,), (1,), ()])
@pytest.mark.parametrize("w_shape", [(20, 1), (20,), (1,)])
def test_scale_shapes(a_shape, w_shape):
    a, w = int8(33, 64), int8(20, 64)
    a_scale, w_scale = torch.rand(a_shape) + 0.5, torch.rand(w_shape) + 0.5
    found = matmul(a, w, a_scale, w_scale, out_dtype=torch.float32)
    assert torch.equal(found, epilogue(exact_sum(a, w), a_scale.expand(33, 1) if a_scale.numel() == 1 else a_scale,
                                       w_scale.expand(20) if w_scale.numel() == 1 else w_scale))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32])
@pytest.mark.parametrize("shape", [(40, 1), (40,), (1,)])
@pytest.mark.parametrize("split", [1, 2])
def test_zero_points_per_token_and_per_tensor(dtype, shape, split):
    a, w = int8(40, 64, low=-128), int8(200, 64)
    zero = torch.randint(-128, 128, shape).to(dtype)
    scales = torch.rand(40, 1), torch.rand(200, 1)
    launch = LaunchParameters(block_m=16, block_n=128, block_k=32, split_k=split)
    found = matmul(
        a,
        w,
        *scales,
        a_zero_point=zero,
        w_sum=w.sum(1, dtype=torch.int32),
        out_dtype=torch.float32,
        launch=launch,
    )
    assert torch.equal(found, epilogue(exact_sum(a, w, zero), *scales))


def test_same_sign_codes_at_long_k():
    a, w = torch.full((2, 16384), -128, dtype=torch.int8), torch.full((3, 16384), 127, dtype=torch.int8)
    found = matmul(a, w, torch.ones(1), torch.ones(1), out_dtype=torch.float32)
    assert torch.equal(found, torch.full((2, 3), -128.0 * 127 * 16384))


def test_strided_rows_and_columns_of_a_larger_tensor():
    wide, tall = int8(40, 200), int8(128, 33)
    w = int8(50, 256)[:, 64:192]
    scales = torch.rand(33, 1), torch.rand(50, 1)
    for a in (wide[3:36, 30:158], tall.t()):
        found = matmul(a, w, *scales, out_dtype=torch.float32)
        assert torch.equal(found, epilogue(exact_sum(a, w), *scales))


def test_rows_beyond_2_to_the_31_elements():
    # Only the touched pages of this storage exist.
    rows, stride = 300, 2**23
    storage = torch.empty(rows * stride, dtype=torch.int8)
    a = storage.as_strided((rows, 32), (stride, 1))
    a.copy_(int8(rows, 32))
    w = int8(16, 32)
    found = matmul(a, w, torch.ones(1), torch.ones(1), out_dtype=torch.float32, launch=SMALL)
    assert torch.equal(found.double(), exact_sum(a, w))
    transposed = storage.as_strided((rows, 32), (stride, 1))
    transposed.copy_(int8(rows, 32))
    found = matmul(w, transposed, torch.ones(1), torch.ones(1), out_dtype=torch.float32, launch=SMALL)
    assert torch.equal(found.double(), exact_sum(w, transposed))


def test_infinite_and_nan_scales_reach_the_output():
    a, w = int8(4, 32, low=1, high=5), int8(8, 32, low=1, high=5)
    a_scale = torch.tensor([[1.0], [float("nan")], [float("inf")], [0.0]])
    found = matmul(a, w, a_scale, torch.ones(1), out_dtype=torch.float32)
    assert found[0].isfinite().all() and found[1].isnan().all() and found[2].isinf().all()
    assert torch.equal(found[3], torch.zeros(8))


def test_nothing_to_multiply():
    bias = torch.randn(5)
    scales = torch.ones(1), torch.ones(1)
    assert matmul(int8(0, 32), int8(5, 32), *scales).shape == (0, 5)
    empty = matmul(int8(3, 0), int8(5, 0), *scales, bias=bias, out_dtype=torch.float32)
    assert torch.equal(empty, bias.expand(3, 5))
    assert torch.equal(matmul(int8(3, 0), int8(5, 0), *scales), torch.zeros(3, 5, dtype=torch.bfloat16))


def test_signal_to_noise_of_int8_and_fp8():
    x, weight = torch.randn(33, 496), torch.randn(100, 496)
    exact = x.double() @ weight.double().T
    for dtype, largest, decibels in ((torch.int8, 127.0, 39.0), (FP8, torch.finfo(FP8).max, 28.0)):
        a_scale, w_scale = (t.abs().amax(1, keepdim=True) / largest for t in (x, weight))
        a, w = (
            (t / s).round() if dtype == torch.int8 else t / s for t, s in ((x, a_scale), (weight, w_scale))
        )
        found = matmul(a.to(dtype), w.to(dtype), a_scale, w_scale, out_dtype=torch.float32)
        assert 20 * torch.log10(exact.norm() / (found - exact).norm()) > decibels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": int8(4, 31)}, "expected the same K"),
        ({"a": torch.randn(4, 32)}, "expected activations of dtype int8"),
        ({"w": torch.zeros(8, 32, dtype=FP8)}, "expected one dtype"),
        ({"w": int8(32, 8).t()}, "as stored"),
        ({"a_scale": torch.ones(3, 1)}, r"expected a_scale of shape \[4, 1\] or \[1\]"),
        ({"w_scale": torch.ones(8, 1).half()}, "expected w_scale of dtype float32"),
        ({"bias": torch.ones(7)}, r"expected bias of shape \[8\]"),
        ({"a_zero_point": int8(1)}, "expected w_sum"),
        ({"a_zero_point": int8(3), "w_sum": torch.zeros(8, dtype=torch.int32)}, "a_zero_point of shape"),
        ({"out_dtype": torch.int32}, "expected out_dtype"),
        ({"a": int8(2, 4, 32)}, "flatten the leading dimensions"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"a": int8(4, 32), "w": int8(8, 32), "a_scale": torch.ones(4, 1), "w_scale": torch.ones(8, 1)}
    with pytest.raises(ValueError, match=message):
        matmul(**(arguments | change))


def test_products_that_a_target_lacks_are_refused():
    codes = [torch.zeros(rows, 32).to(torch.float8_e4m3fn) for rows in (4, 8)]
    for name, reason in (("sm80", "multiplies no fp8"), ("gfx942", "multiplies e4m3fnuz and not e4m3fn")):
        with pretending(get_target(name)), pytest.raises(ValueError, match=reason):
            matmul(*codes, torch.ones(1), torch.ones(1))
    long = [torch.zeros(1, 131_072, dtype=torch.int8) for _ in range(2)]
    with pytest.raises(ValueError, match="may overflow"):
        matmul(*long, torch.ones(1), torch.ones(1))
