"""Every kind of linear: each implementation against the reference, and the reference against float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from sample_operands import NAMES, linear_arguments
from torch import Tensor

from lowbit import ops
from lowbit.dtypes import E4M3FN, INT8
from lowbit.ops import cpu, cpu_isa
from lowbit.ops.cpu_call import up
from lowbit.quantize import dequantize, quantize
from lowbit.scheme import SCHEMES, TensorSpec

# int8 codes with one scale for all of K, and int8 blocks: every implementation gives the same bits.
EXACT = ("int8", "int8-static", "int8-static-asym", "int8-block")
# Sums of decoded floats: the order of summation differs. Relative to the largest output.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass
class Case:
    arguments: dict
    exact_values: Tensor
    """float64: the product of what the codes stand for."""


def make(scheme_name: str, m: int, n: int, k: int, dtype: torch.dtype, *, packed: bool = False) -> Case:
    scheme, call = SCHEMES[scheme_name], linear_arguments(scheme_name, m, n, k, dtype)
    assert scheme.weights is not None
    values, weight = call["x"].double(), dequantize(call["weight"], call["weight_scale"], scheme.weights)
    if scheme.activations is not None and m:
        values = quantize(call["x"].float(), scheme.activations).dequantize().double()
    if packed:
        call["weight"] = pack(call["weight"])
    return Case(call, values @ weight.double().T + call["bias"].double())


def pack(codes: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 4))
    return (padded.to(torch.int16) + 128).to(torch.uint8).contiguous().view(torch.int32)


def relative(out: Tensor, expected: Tensor) -> float:
    return float(
        (out.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)
    )


SIZES = [(1, 100, 160), (3, 16, 100), (8, 37, 200), (33, 130, 496)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", NAMES)
def test_reference_is_the_product_of_the_values(name, dtype):
    for m, n, k in SIZES:
        case = make(name, m, n, k, dtype)
        with ops.use_implementation("reference"):
            out = ops.linear(**case.arguments)
        assert out.dtype == dtype and out.shape == (m, n)
        assert relative(out, case.exact_values) < TOLERANCE[dtype]


def equals_reference(name: str, case: Case, dtype: torch.dtype) -> None:
    out = ops.linear(**case.arguments)
    with ops.use_implementation("reference"):
        expected = ops.linear(**case.arguments)
    if name in EXACT:
        assert torch.equal(out, expected)
    else:
        assert relative(out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", NAMES)
def test_cpu_equals_reference(path, name, dtype):
    for m, n, k in SIZES:
        case = make(name, m, n, k, dtype)
        equals_reference(name, case, dtype)


@pytest.mark.parametrize("name", ["int8", "int8-block", "int8-weight-only", "fp8", "fp8-block", "mxfp8"])
def test_rows_too_long_for_one_pass(path, name):
    """More of K than any tile takes at a time, and more rows than a block of the output has."""
    for m, n, k in ((5, 80, 9000), (300, 48, 2208)):
        case = make(name, m, n, k, torch.bfloat16)
        equals_reference(name, case, torch.bfloat16)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_activations_keep_all_of_their_bits(path, dtype):
    """Sums of two: nothing rounds but the output, whatever the activations are cut into."""
    x = torch.zeros(33, 96, dtype=dtype)
    x[:, 5] = torch.logspace(-18, 18, 33, base=10 if dtype != torch.float16 else 1.5).to(dtype) * (1 + 2**-7)
    x[:, 5] = torch.nextafter(x[:, 5], torch.tensor(torch.inf, dtype=dtype))
    x[3, 6], x[4, 6], x[5, 6] = torch.inf, -torch.inf, torch.nan
    x[6, 5] = torch.finfo(dtype).max
    for weight in (torch.ones(40, 96, dtype=torch.int8), torch.ones(40, 96).to(torch.float8_e4m3fn)):
        out = ops.linear(x, weight, torch.ones(40, 1), activations="none", block=(1, 0))
        assert torch.equal(out.nan_to_num(7.0), x.sum(1, keepdim=True).expand(33, 40).nan_to_num(7.0))


@pytest.mark.parametrize("m", [1, 5, 20])
@pytest.mark.parametrize("name", ["int8", "int8-block", "int8-weight-only", "fp8"])
def test_an_empty_sum_is_the_bias(path, name, m):
    weight = torch.empty(40, 0, dtype=torch.int8 if name.startswith("int8") else torch.float8_e4m3fn)
    scheme = SCHEMES[name]
    block = ops.block_of(scheme.weights.granularity)
    scale, bias = torch.ones(-(-40 // (block[0] or 40)), 0 if block[1] else 1), torch.randn(40)
    arguments = {"activations": ops.activations_of(scheme), "block": block}
    out = ops.linear(torch.empty(m, 0), weight, scale, bias, **arguments)
    assert torch.equal(out, bias.expand(m, 40))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_groups_longer_than_a_pass(path, dtype):
    x, codes = torch.randn(20, 11_000).bfloat16(), (100 * torch.rand(40, 11_000) - 50).to(dtype)
    arguments = (x, codes, torch.rand(40, 2))
    out = ops.linear(*arguments, activations="group", block=(1, 6000))
    with ops.use_implementation("reference"):
        expected = ops.linear(*arguments, activations="group", block=(1, 6000))
    assert relative(out, expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("packed", [False, True])
def test_every_int8_code_multiplies_as_itself(path, packed):
    codes = torch.arange(-128, 128, dtype=torch.int8)[:, None].repeat(1, 130)
    # Column 3 is decoded 64 at a time where the CPU can, column 129 never.
    for m, column in ((1, 3), (5, 3), (5, 129)):
        x = torch.zeros(m, 130, dtype=torch.bfloat16)
        x[:, column] = 1.0
        weight = pack(codes) if packed else codes
        out = ops.linear(x, weight, torch.ones(256, 1), activations="none", block=(1, 0))
        assert torch.equal(out, codes[:, 0].bfloat16().expand(m, 256))


@pytest.mark.parametrize("block", [(1, 0), (1, 32), (1, 48), (128, 128)])
def test_packed_weights_are_the_int8_ones(path, block):
    codes, x = torch.randint(-128, 128, (70, 102), dtype=torch.int8), torch.randn(6, 102)
    rows, groups = -(-70 // block[0]), -(-102 // block[1]) if block[1] else 1
    scale = torch.rand(rows, groups) + 0.1
    for part in (x, x[:1]):
        out = ops.linear(part, pack(codes), scale, activations="none", block=block)
        expected = part.double() @ ops.dequantize(codes, scale, block=block, k=102).double().T
        assert relative(out, expected) < 2e-6


def test_packing_is_compressed_tensors_own():
    library = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(-128, 128, (8, 64), dtype=torch.int8)
    theirs = library.pack_to_int32(codes, 8)
    x, scale = torch.randn(3, 64), torch.rand(8, 1)
    ours = ops.linear(x, codes, scale, activations="none", block=(1, 0))
    assert torch.equal(ops.linear(x, theirs, scale, activations="none", block=(1, 0)), ours)


def test_fp8_products_are_exact_where_float32_is(path):
    """Small integers and powers of two: no sum rounds, so any order gives the same bits."""
    for m in (1, 7, 70):
        x = torch.randint(-4, 5, (m, 256)).float()
        x[:, 0] = 448 / 64  # so that the scale of each row is 2⁻⁶
        w = torch.randint(-8, 9, (52, 256)).float().to(torch.float8_e4m3fn)
        scale = 2.0 ** torch.randint(-3, 4, (52, 1))
        out = ops.linear(x, w, scale, activations="token", block=(1, 0))
        assert torch.equal(out.double(), x.double() @ (w.double() * scale.double()).T)


def test_every_fp8_code_multiplies_as_itself(path):
    raw = torch.arange(256, dtype=torch.uint8)
    w = torch.stack([raw, raw.flip(0)]).T.contiguous().view(torch.float8_e4m3fn)  # [256, 2]
    w = torch.nn.functional.pad(w.view(torch.uint8), (0, 62)).view(torch.float8_e4m3fn)
    for m in (1, 5):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.zeros(m, 64, dtype=dtype)
            x[:, 0] = 1.0
            out = ops.linear(x, w, torch.ones(256, 1), activations="none", block=(1, 0))
            expected = w[:, 0].float()
            expected[raw.flip(0) == 0x7F] = torch.nan  # NaN · 0 in the other column
            expected[raw.flip(0) == 0xFF] = torch.nan
            assert torch.equal(out.float().nan_to_num(nan=9e9), expected.expand(m, 256).nan_to_num(nan=9e9))


@pytest.mark.parametrize("name", ["int8", "fp8", "int8-block", "int8-weight-only"])
def test_inputs_of_any_layout(path, name):
    case = make(name, 24, 40, 96, torch.float32)
    a = case.arguments
    expected = ops.linear(**a)
    strided = torch.empty(24, 200)[:, ::2][:, :96].copy_(a["x"])
    wide = torch.empty(24, 150)[:, 20:116].copy_(a["x"])
    for x in (strided, wide, a["x"].T.contiguous().T):
        assert not x.is_contiguous()
        assert torch.equal(ops.linear(**{**a, "x": x}), expected)
    batched = ops.linear(**{**a, "x": a["x"].view(2, 3, 4, 96)})
    assert torch.equal(batched, expected.view(2, 3, 4, 40))
    # One row alone may be summed in another order where the products are floats.
    alone = ops.linear(**{**a, "x": a["x"][5]})
    assert torch.equal(alone, expected[5]) if name in EXACT else relative(alone, expected[5]) < 2e-6
    narrow = torch.empty(40, 96 * 2, dtype=a["weight"].dtype)[:, :96]
    narrow.copy_(a["weight"])
    assert torch.equal(ops.linear(**{**a, "weight": narrow}), expected)


def test_empty_inputs(path):
    w, scale, bias = torch.ones(5, 8, dtype=torch.int8), torch.ones(5, 1), torch.arange(5.0)
    assert ops.linear(torch.empty(0, 8), w, scale, bias, activations="token", block=(1, 0)).shape == (0, 5)
    assert ops.linear(torch.empty(2, 0, 8), w, scale, bias, activations="none", block=(1, 0)).shape == (
        2,
        0,
        5,
    )
    codes, a_scale = ops.quantize(torch.empty(2, 0, 8), torch.int8)
    out = ops.matmul(codes, a_scale, w, scale, bias, block=(1, 0), out_dtype=torch.float32)
    assert out.shape == (2, 0, 5)
    none = ops.linear(torch.empty(3, 0), w[:, :0], scale, bias, activations="token", block=(1, 0))
    assert torch.equal(none, bias.expand(3, 5))
    codes, ones = torch.empty(0, 8, dtype=torch.int8), torch.empty(0, 1)
    assert ops.matmul(codes, ones, w, scale, block=(1, 0), out_dtype=torch.float32).shape == (0, 5)


@pytest.mark.parametrize("name", ["int8", "fp8", "int8-block", "fp8-block"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_row_is_nan_and_leaves_the_others_alone(path, name, bad):
    case = make(name, 6, 30, 256, torch.bfloat16)
    expected = ops.linear(**case.arguments)
    x = case.arguments["x"].clone()
    x[2, 17] = bad
    out = ops.linear(**{**case.arguments, "x": x})
    assert bool(out[2].isnan().all())
    rest = [0, 1, 3, 4, 5]
    assert torch.equal(out[rest], expected[rest])


def test_rows_of_zeros_give_the_bias(path):
    for name in ("int8", "fp8", "int8-block", "mxfp8", "int8-weight-only"):
        case = make(name, 4, 20, 64, torch.float32)
        case.arguments["x"].zero_()
        assert torch.equal(ops.linear(**case.arguments), case.arguments["bias"].expand(4, 20))


def test_large_sums_become_float32_before_they_are_scaled(path):
    """An int32 sum times an fp16 scale would be infinite."""
    x = torch.ones(2, 16384, dtype=torch.float16)
    w = torch.full((3, 16384), 127, dtype=torch.int8)
    out = ops.linear(x, w, torch.full((3, 1), 1 / 127), activations="token", block=(1, 0))
    assert torch.equal(out, torch.full((2, 3), 16384.0, dtype=torch.float16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_sign_data_at_long_k(path, dtype):
    x = torch.rand(3, 16384).to(dtype)
    w = quantize(
        torch.rand(20, 16384), TensorSpec(dtype=E4M3FN, granularity=SCHEMES["fp8"].weights.granularity)
    )
    out = ops.linear(x, w.codes, w.scale, activations="none", block=(1, 0))
    assert relative(out, x.double() @ w.dequantize().double().T) < (2e-6 if dtype == torch.float32 else 4e-3)


def test_eight_bit_activations_keep_their_eight_bits(path):
    """SQNR of a Gaussian product: 7-bit or per-tensor activations would fall below this."""
    x, w = torch.randn(32, 1024) * torch.logspace(-2, 2, 32).unsqueeze(1), torch.randn(64, 1024)
    weight = quantize(w, TensorSpec(dtype=INT8, granularity=SCHEMES["int8"].weights.granularity))
    out = ops.linear(x, weight.codes, weight.scale, activations="token", block=(1, 0)).double()
    exact = x.double() @ w.double().T
    error = ((out - exact) ** 2).sum(1) / (exact**2).sum(1)
    assert float(-10 * torch.log10(error.mean())) > 37


@pytest.fixture
def float64_sums():
    ops.use_float64_sums(True)
    yield
    ops.use_float64_sums(False)


@pytest.mark.parametrize("scheme", ["fp8", "fp8-static", "fp8-block", "mxfp8"])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 67, 576), (3, 6, 40), (7, 33, 200), (9, 70, 1000), (65, 130, 2048)]
)
def test_float64_sums_of_fp8_codes_are_exact(path, float64_sums, scheme, m, n, k):
    """The same bits as the reference's, on every instruction set; float32 sums are not, also right after."""
    if scheme == "mxfp8" and k % 32:
        k = up(k, 32)
    arguments = make(scheme, m, n, k, torch.float32).arguments
    arguments["x"] *= torch.logspace(-2, 2, k)
    exact = ops.linear(**arguments)
    with ops.use_implementation("reference"):
        assert torch.equal(exact, ops.linear(**arguments))
    if k == 2048 and scheme in ("fp8", "fp8-static"):
        ops.use_float64_sums(False)
        assert not torch.equal(exact, ops.linear(**arguments))


@pytest.mark.parametrize("m", [1, 40])
def test_float64_sums_of_floats_are_rounded_once(path, float64_sums, m):
    x, w = torch.rand(m, 4096), torch.rand(24, 4096)
    weight = quantize(w, SCHEMES["int8-weight-only"].weights)
    brain = w.to(torch.bfloat16)
    found = ops.linear(x, weight.codes, weight.scale.float(), activations="none", block=(1, 128))
    with ops.use_implementation("reference"):
        expected = ops.linear(x, weight.codes, weight.scale.float(), activations="none", block=(1, 128))
    assert relative(found, expected.double()) < 1e-7
    assert relative(ops.linear_bfloat16(x, brain), x.double() @ brain.double().T) < 2**-24


@pytest.mark.parametrize("m", [1, 20])
def test_float64_sums_keep_not_a_number(path, float64_sums, m):
    x, codes = torch.randn(m, 256), torch.randn(40, 256).to(torch.float8_e4m3fn)
    codes.view(torch.uint8)[7, 100] = 0x7F
    out = ops.linear(x, codes, torch.ones(40, 1), activations="token", block=(1, 0))
    assert out[:, 7].isnan().all() and not out[:, :7].isnan().any() and not out[:, 8:].isnan().any()


def test_float64_sums_of_experts(path, float64_sums):
    codes, x = torch.randn(3, 50, 320).to(torch.float8_e4m3fn), torch.randn(24, 320)
    arguments = {
        "x": x, "weight": codes, "weight_scale": torch.rand(3, 50, 1), "offsets": torch.tensor([0, 1, 1, 24]),
        "activations": "token", "block": (1, 0),
    }  # fmt: skip
    found = ops.linear_grouped(**arguments)
    with ops.use_implementation("reference"):
        assert torch.equal(found, ops.linear_grouped(**arguments))


def test_bfloat16_instructions_are_tested_where_they_exist():
    """They belong to the best instruction set only; the parametrized tests above then cover them."""
    have = cpu.instructions()
    if not have.bfloat16:
        pytest.skip("no bfloat16 dot product here")
    wanted = "tdpbf16512" if have.name == "amx" else "dpbf16512"
    for weight in (torch.int8, torch.float8_e4m3fn):
        assert cpu_isa.float_tile(have, 16, weight=weight, parts=1).kind == wanted
        assert have.name == "amx" or cpu_isa.float_tile(have, 16, weight=weight, parts=3).kind.startswith(
            "fma"
        )


BAD = [
    ({"weight": torch.ones(8, 5, dtype=torch.int8)}, r"expected a weight with 4 columns .* found \[8, 5\]"),
    (
        {"weight": torch.ones(8, 4, dtype=torch.int8, device="meta")},
        "on cpu, as x is, found meta; load the weights first",
    ),
    ({"x": torch.ones(2, 4, device="meta")}, "on meta, as x is, found cpu; move"),
    ({"weight": torch.ones(8, 4)}, "expected a weight of int8, float8_e4m3fn or packed int32"),
    ({"weight_scale": torch.ones(8)}, r"expected weight_scale of shape \[8, 1\]"),
    ({"block": (0, 128)}, "expected block="),
    ({"activations": "row"}, "expected activations to be one of none, token"),
    ({"activations": "tensor"}, "expected input_scale with activations='tensor'"),
    ({"input_scale": torch.ones(1)}, "expected input_scale with activations='tensor' and only then"),
    ({"bias": torch.ones(4)}, r"expected bias of shape \[8\], found \[4\]"),
    (
        {"x": torch.ones(2, 4, dtype=torch.float64)},
        "of dtype float16, bfloat16 or float32, found torch.float64",
    ),
    ({"x": torch.ones(())}, r"expected x \[…, K\] .* found torch.float32 \[\]"),
    ({"input_zero_point": torch.zeros(1, dtype=torch.int8)}, "expected input_zero_point"),
    (
        {"activations": "tensor", "input_scale": torch.ones(1), "input_zero_point": torch.tensor([300])},
        r"expected input_zero_point int8 \[1\], .* found torch.int64 \[1\]",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_errors_say_what_was_expected(change, message):
    good = {
        "x": torch.ones(2, 4), "weight": torch.ones(8, 4, dtype=torch.int8), "weight_scale": torch.ones(8, 1),
        "activations": "token", "block": (1, 0),
    }  # fmt: skip
    ops.linear(**good)
    with pytest.raises(ValueError, match=message):
        ops.linear(**{**good, **change})
