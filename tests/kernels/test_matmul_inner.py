"""Products with scales inside the sum (block, weight-only, mxfp8) against float64 oracles."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from lowbit.kernels.matmul_block import matmul_block
from lowbit.kernels.matmul_mxfp8 import matmul_mxfp8
from lowbit.kernels.matmul_weight_only import matmul_weight_only
from lowbit.kernels.targets import get_target, pretending
from lowbit.kernels.tuned_tables import LaunchParameters
from sample_operands import FP8

M, N, K = (0, 1, 2, 15, 16, 17, 31, 33, 64, 127, 128, 257), (1, 16, 100, 576, 971), (16, 32, 100, 496, 3884)
QUICK = [
    (0, 16, 32), (1, 1, 16), (2, 100, 100), (15, 576, 496), (16, 971, 32), (17, 16, 3884), (31, 1, 496),
    (33, 100, 16), (127, 16, 100), (64, 576, 32), (128, 16, 496), (257, 100, 32),
]  # fmt: skip
SHAPES = [
    pytest.param(*shape, marks=() if shape in QUICK else pytest.mark.slow)
    for shape in itertools.product(M, N, K)
]
KINDS = ["int8", "fp8"]
SPLIT = LaunchParameters(block_m=16, block_n=32, block_k=32, split_k=4)
PERSISTENT = LaunchParameters(block_m=16, block_n=32, block_k=32, persistent=True)
TMA = LaunchParameters(block_m=16, block_n=32, block_k=32, tma=True)
TMA_SPLIT = LaunchParameters(block_m=16, block_n=32, block_k=32, tma=True, split_k=2, persistent=True)
VARIANTS = {"split": SPLIT, "persistent": PERSISTENT, "tma": TMA, "tma, split, persistent": TMA_SPLIT}


def codes(kind: str, *shape: int) -> torch.Tensor:
    """Small integers, whose products and sums are exact in float32."""
    values = torch.randint(-4, 5, shape)
    return values.to(torch.int8 if kind == "int8" else FP8)


def powers_of_2(*shape: int) -> torch.Tensor:
    return 2.0 ** torch.randint(-2, 3, shape).float()


def expand(scale: torch.Tensor, rows: int, cols: int, block: tuple[int, int]) -> torch.Tensor:
    scale = scale.double().repeat_interleave(block[0], -2)[..., :rows, :]
    return scale.repeat_interleave(block[1], -1)[..., :cols]


def ceil(a: int, b: int) -> int:
    return -(-a // b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_block_is_bitwise_exact(kind, m, n, k):
    a, w = codes(kind, m, k), codes(kind, n, k)
    a_scale, w_scale = powers_of_2(m, ceil(k, 128)), powers_of_2(ceil(n, 128), ceil(k, 128))
    bias = torch.randint(-8, 9, (n,)).float()
    expected = (a.double() * expand(a_scale, m, k, (1, 128))) @ (
        w.double() * expand(w_scale, n, k, (128, 128))
    ).T + bias.double()
    found = matmul_block(a, w, a_scale, w_scale, bias=bias, out_dtype=torch.float32)
    assert torch.equal(found.double(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_persistent_program_does_several_tiles(dtype, monkeypatch):
    monkeypatch.setattr("lowbit.kernels.inner.core_count", lambda device: 3)
    a, w = (torch.randint(-127, 128, (rows, 160), dtype=torch.int8) for rows in (70, 90))
    call = a, w, torch.rand(70, 2), torch.rand(1, 2)
    found = matmul_block(*call, out_dtype=dtype, launch=PERSISTENT)
    assert torch.equal(
        found, matmul_block(*call, out_dtype=dtype, launch=replace(PERSISTENT, persistent=False))
    )


@pytest.mark.parametrize("variant", [None, *VARIANTS])
@pytest.mark.parametrize("kind", KINDS)
def test_block_with_random_operands(kind, variant):
    m, n, k, launch = 33, 200, 304, VARIANTS.get(variant)
    if kind == "int8":
        a, w = (torch.randint(-127, 128, (rows, k), dtype=torch.int8) for rows in (m, n))
    else:
        a, w = ((torch.randn(rows, k) * 100).to(FP8) for rows in (m, n))
    a_scale, w_scale = torch.rand(3, m).t(), torch.rand(2, 3)
    expected = (a.double() * expand(a_scale, m, k, (1, 128))) @ (
        w.double() * expand(w_scale, n, k, (128, 128))
    ).T
    found = matmul_block(a, w, a_scale, w_scale, out_dtype=torch.float32, launch=launch)
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    again = matmul_block(a, w, a_scale.contiguous(), w_scale, out_dtype=torch.float32, launch=launch)
    assert torch.equal(found, again)
    assert torch.equal(found.bfloat16(), matmul_block(a, w, a_scale, w_scale, launch=launch))


@pytest.mark.parametrize("name", ["sm80", "gfx950", "ascend910b"])
@pytest.mark.parametrize("block_shape", [(128, 128), (64, 32), (16, 96), (1, 64)])
def test_block_shapes_and_targets(name, block_shape):
    m, n, k = 17, 100, 200
    a, w = codes("int8", m, k), codes("int8", n, k)
    rows, cols = block_shape
    a_scale, w_scale = powers_of_2(m, ceil(k, cols)), powers_of_2(ceil(n, rows), ceil(k, cols))
    with pretending(get_target(name)):
        found = matmul_block(a, w, a_scale, w_scale, block_shape=block_shape, out_dtype=torch.float32)
    expected = (a.double() * expand(a_scale, m, k, (1, cols))) @ (
        w.double() * expand(w_scale, n, k, block_shape)
    ).T
    assert torch.equal(found.double(), expected)


WEIGHT_ONLY_SHAPES = [(1, 16, 32), (17, 100, 496), (64, 33, 100), (2, 576, 300), (0, 16, 32)]


@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [*KINDS, "packed"])
@pytest.mark.parametrize("block_shape", [None, (1, 32), (1, 128), (128, 128)], ids=str)
@pytest.mark.parametrize("name", ["sm80", "sm90"])
def test_weight_only_is_bitwise_exact(x_dtype, kind, block_shape, name):
    for m, n, k in WEIGHT_ONLY_SHAPES:
        x = torch.randint(-8, 9, (m, k)).to(x_dtype)
        w = codes("int8" if kind == "packed" else kind, n, k)
        rows, cols = block_shape or (1, k)
        w_scale = powers_of_2(ceil(n, rows), ceil(k, cols))
        bias = torch.randint(-8, 9, (n,)).float()
        stored = (w.to(torch.int16) + 128).to(torch.uint8) if kind == "packed" else w
        with pretending(get_target(name)):
            found = matmul_weight_only(
                x, stored, w_scale, bias=bias, block_shape=block_shape, out_dtype=torch.float32
            )
        expected = x.double() @ (w.double() * expand(w_scale, n, k, (rows, cols))).T + bias.double()
        assert torch.equal(found.double(), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("m", "n", "k"), list(itertools.product(M, N, K)))
def test_weight_only_on_every_shape(m, n, k):
    x, w = torch.randint(-8, 9, (m, k)).to(torch.float16), codes("fp8", n, k)
    w_scale = powers_of_2(ceil(n, 128), ceil(k, 128))
    found = matmul_weight_only(x, w, w_scale, block_shape=(128, 128), out_dtype=torch.float32)
    assert torch.equal(found.double(), x.double() @ (w.double() * expand(w_scale, n, k, (128, 128))).T)


@pytest.mark.parametrize("name", ["sm80", "sm89", "gfx942"])
@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_byte_of_fp8_is_decoded_exactly(name, x_dtype):
    w = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(256, 1)
    w = torch.cat([w, torch.zeros(256, 31).to(w.dtype)], dim=1)
    x = torch.zeros(1, 32, dtype=x_dtype)
    x[0, 0] = 1
    with pretending(get_target(name)):
        found = matmul_weight_only(x, w, torch.ones(1), out_dtype=torch.float32)[0]
    expected = w[:, 0].float()
    assert int(expected.isnan().sum()) == 2
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("name", ["sm80", "sm90", "gfx942"])
@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_byte_of_int8_and_of_the_packed_form(name, x_dtype):
    w = torch.arange(-128, 128).to(torch.int8).reshape(256, 1).repeat(1, 32)
    x = torch.zeros(1, 32, dtype=x_dtype)
    x[0, 5] = 1
    for stored in (w, (w.to(torch.int16) + 128).to(torch.uint8)):
        with pretending(get_target(name)):
            found = matmul_weight_only(x, stored, torch.ones(1), out_dtype=torch.float32)[0]
        assert torch.equal(found, w[:, 0].float())


def test_float32_activations_keep_24_bits():
    x, w = torch.randn(16, 496), torch.randint(-127, 128, (32, 496), dtype=torch.int8)
    found = matmul_weight_only(x, w, torch.ones(1))
    expected = x.double() @ w.double().T
    assert found.dtype == torch.float32
    # One bf16 summand alone would be off by 2e-3, two by 1e-5.
    assert (found - expected).norm() <= 3e-7 * expected.norm()


@pytest.mark.parametrize("packed", [False, True], ids=["int8", "packed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_weight_only_variants(variant, packed):
    x, w = torch.randn(17, 304).half(), torch.randint(-127, 128, (40, 304), dtype=torch.int8)
    scale, bias = torch.rand(40, 1), torch.randn(40)
    stored = (w.to(torch.int16) + 128).to(torch.uint8) if packed else w
    found = matmul_weight_only(x, stored, scale, bias=bias, out_dtype=torch.float32, launch=VARIANTS[variant])
    expected = x.double() @ (w.double() * scale).T + bias
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_nan_and_infinite_activations_stay_in_their_rows():
    x, w = torch.randn(5, 64).half(), codes("int8", 20, 64)
    w[:, 7] = 1
    x[1, 7], x[3, 7] = float("nan"), float("inf")
    found = matmul_weight_only(x, w, torch.ones(1))
    assert found[1].isnan().all() and (found[3] == float("inf")).all()
    assert found[[0, 2, 4]].isfinite().all()


@pytest.mark.parametrize("name", ["sm80", "sm90", "sm100", "gfx942", "ascend910b"])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 16, 32), (17, 100, 496), (33, 16, 100), (3, 5, 40), (0, 16, 32)]
)
def test_mxfp8_is_bitwise_exact(name, m, n, k):
    a, w = codes("fp8", m, k), codes("fp8", n, k)
    a_scale, w_scale = (torch.randint(124, 131, (rows, ceil(k, 32)), dtype=torch.uint8) for rows in (m, n))
    bias = torch.randint(-8, 9, (n,)).float()
    with pretending(get_target(name)):
        found = matmul_mxfp8(a, w, a_scale, w_scale, bias=bias, out_dtype=torch.float32)
    expected = (a.double() * expand(2.0 ** (a_scale.double() - 127), m, k, (1, 32))) @ (
        w.double() * expand(2.0 ** (w_scale.double() - 127), n, k, (1, 32))
    ).T
    assert torch.equal(found.double(), expected + bias.double())


@pytest.mark.parametrize("name", ["sm90", "sm100"])
def test_mxfp8_of_many_tiles(name):
    m, n, k = 40, 50, 100
    a, w = codes("fp8", m, k), codes("fp8", n, k)
    a_scale, w_scale = (torch.randint(124, 131, (rows, 4), dtype=torch.uint8) for rows in (m, n))
    launch = LaunchParameters(block_m=16, block_n=16, block_k=32, group_m=2)
    with pretending(get_target(name)):
        found = matmul_mxfp8(a, w, a_scale, w_scale, out_dtype=torch.float32, launch=launch)
    expected = (a.double() * expand(2.0 ** (a_scale.double() - 127), m, k, (1, 32))) @ (
        w.double() * expand(2.0 ** (w_scale.double() - 127), n, k, (1, 32))
    ).T
    assert torch.equal(found.double(), expected)


@pytest.mark.parametrize("name", ["sm80", "sm90"])
def test_mxfp8_scales_at_the_ends(name):
    a, w = codes("fp8", 2, 32), codes("fp8", 3, 32)
    a_scale = torch.tensor([[0], [255]], dtype=torch.uint8)
    w_scale = torch.tensor([[254], [254], [127]], dtype=torch.uint8)
    with pretending(get_target(name)):
        found = matmul_mxfp8(a, w, a_scale, w_scale, out_dtype=torch.float32)
    product = a.double() @ w.double().T
    assert torch.equal(found[0, :2].double(), product[0, :2])  # 2⁻¹²⁷ · 2¹²⁷
    assert found[1].isnan().all()


def test_nothing_to_multiply():
    bias = torch.randn(5)
    found = matmul_weight_only(torch.randn(3, 0), codes("int8", 5, 0), torch.ones(5, 1), bias=bias)
    assert torch.equal(found, bias.expand(3, 5))
    empty = torch.zeros(3, 0, dtype=torch.int8), torch.zeros(5, 0, dtype=torch.int8)
    found = matmul_block(*empty, torch.zeros(3, 0), torch.zeros(1, 0), out_dtype=torch.float32)
    assert torch.equal(found, torch.zeros(3, 5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, w: matmul_block(a, w, torch.ones(4, 1), torch.ones(1, 1)), "expected w_scale of shape"),
        (lambda a, w: matmul_block(a, w, torch.ones(4, 1), torch.ones(1, 2)), "expected a_scale of shape"),
        (
            lambda a, w: matmul_block(a, w, torch.ones(4, 5), torch.ones(1, 5), block_shape=(128, 48)),
            "multiples of 32",
        ),
        (lambda a, w: matmul_weight_only(a, w, torch.ones(8, 1)), "expected activations of dtype float16"),
        (lambda a, w: matmul_weight_only(a.half(), w, torch.ones(8, 2)), "give block_shape"),
        (
            lambda a, w: matmul_mxfp8(a, w, torch.ones(4, 7), torch.ones(8, 7)),
            "expected activations of dtype",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(codes("int8", 4, 200), codes("int8", 8, 200))
