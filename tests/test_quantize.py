"""The torch oracle: against compressed-tensors bit for bit, float64 arithmetic, and its own contract."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize as their_dequantize
from compressed_tensors.quantization.lifecycle.forward import quantize as their_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.dtypes import E4M3FN, E4M3FNUZ, E5M2, INT8, decode_e8m0
from lowbit.granularity import (
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    expand_scale,
    reduce_tiles,
    scale_shape,
)
from lowbit.quantize import (
    SMALLEST_SCALE,
    check_finite,
    choose_scale,
    dequantize,
    quantize,
    quantize_with,
    scale_from_range,
)
from lowbit.scheme import TensorSpec

GRANULARITIES = [
    PerTensor(),
    PerChannel(),
    PerToken(),
    PerGroup(32),
    PerGroup(7),
    PerBlock(128, 128),
    PerBlock(3, 5),
]
RAGGED = [(1, 1), (1, 33), (33, 1), (130, 257), (5, 64)]


def spec(dtype, granularity, **kw) -> TensorSpec:
    return TensorSpec(dtype=dtype, granularity=granularity, **kw)


def noise(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Rows of very different size, as in real weights.
    size = torch.exp(3 * torch.randn(shape[0], 1, generator=generator))
    return (torch.randn(shape, generator=generator) * size).to(dtype)


def their_args(s: TensorSpec) -> QuantizationArgs:
    g = s.granularity
    extra: dict = {}
    match g:
        case PerTensor():
            extra = {"strategy": "tensor"}
        case PerChannel():
            extra = {"strategy": "channel"}
        case PerToken():
            extra = {"strategy": "token", "dynamic": True}
        case PerGroup(size):
            extra = {"strategy": "group", "group_size": size}
        case PerBlock(rows, cols):
            extra = {"strategy": "block", "block_structure": [rows, cols]}
    kind = "int" if s.dtype is INT8 else "float"
    return QuantizationArgs(num_bits=8, type=kind, symmetric=s.symmetric, **extra)


SAME_AS_THEIRS = [
    (PerTensor(), (33, 130)),
    (PerChannel(), (33, 130)),
    (PerToken(), (33, 130)),
    (PerGroup(32), (33, 128)),
    (PerBlock(128, 128), (256, 384)),
    (PerBlock(16, 8), (32, 40)),
]


@pytest.mark.parametrize(("granularity", "shape"), SAME_AS_THEIRS, ids=str)
@pytest.mark.parametrize("dtype", [INT8, E4M3FN], ids=str)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=str)
def test_codes_and_values_equal_compressed_tensors_under_the_same_scales(granularity, shape, dtype, source):
    s = spec(dtype, granularity)
    x = noise(*shape, dtype=source).float()
    scale, _ = choose_scale(x, s)
    codes = quantize_with(x, scale, s)
    zero = torch.zeros_like(scale)
    theirs = their_quantize(x=x, scale=scale, zero_point=zero, args=their_args(s), dtype=s.dtype.torch_dtype)
    assert torch.equal(codes.view(torch.uint8), theirs.view(torch.uint8))
    back = their_dequantize(x_q=theirs, scale=scale, zero_point=None, args=their_args(s), dtype=torch.float32)
    assert torch.equal(dequantize(codes, scale, s), back)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(32)], ids=str)
def test_float8_scales_equal_compressed_tensors(granularity):
    """Theirs for int8 divides by 127.5 and uses −128; ours keeps ±127 on purpose."""
    x = noise(16, 128)
    s = spec(E4M3FN, granularity)
    low, high = reduce_tiles(x, granularity, "amin"), reduce_tiles(x, granularity, "amax")
    theirs, _ = calculate_qparams(low, high, their_args(s))
    assert torch.equal(choose_scale(x, s)[0], theirs)
    int8, _ = calculate_qparams(low, high, their_args(spec(INT8, granularity)))
    ours = choose_scale(x, spec(INT8, granularity))[0]
    assert torch.equal(ours, torch.maximum(high, -low) / 127)
    assert torch.allclose(ours * 127, int8 * 127.5)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(32)], ids=str)
def test_asymmetric_int8_equals_compressed_tensors(granularity):
    x = noise(16, 128) + 0.7
    s = spec(INT8, granularity, symmetric=False)
    low, high = reduce_tiles(x, granularity, "amin"), reduce_tiles(x, granularity, "amax")
    their_scale, their_zero = calculate_qparams(low, high, their_args(s))
    scale, zero = choose_scale(x, s)
    assert torch.equal(scale, their_scale)
    assert zero is not None and torch.equal(zero, their_zero)
    codes = quantize_with(x, scale, s, zero)
    theirs = their_quantize(x=x, scale=scale, zero_point=their_zero, args=their_args(s), dtype=torch.int8)
    assert torch.equal(codes, theirs)
    back = their_dequantize(x_q=theirs, scale=scale, zero_point=their_zero, args=their_args(s))
    assert torch.equal(dequantize(codes, scale, s, zero), back)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("dtype", [INT8, E4M3FN, E4M3FNUZ, E5M2], ids=str)
def test_equals_numpy_element_by_element_on_ragged_shapes(granularity, dtype):
    """The definition in numpy: absmax / max, a true division, rounding by an independent library."""
    import ml_dtypes

    s = spec(dtype, granularity)
    for shape in RAGGED:
        x = noise(*shape, seed=sum(shape))
        q = quantize(x, s)
        peak = reduce_tiles(x.abs(), granularity, "amax").numpy()
        np.testing.assert_array_equal(q.scale.numpy(), peak / np.float32(dtype.max))
        wide = expand_scale(q.scale, shape, granularity).expand(shape).numpy()
        scaled = np.clip(x.numpy() / wide, -dtype.max, dtype.max)
        if dtype is INT8:
            expected = np.rint(scaled).astype(np.int8).view(np.uint8)
        else:
            kind = {"e4m3fn": "float8_e4m3fn", "e4m3fnuz": "float8_e4m3fnuz", "e5m2": "float8_e5m2"}
            expected = scaled.astype(getattr(ml_dtypes, kind[dtype.name])).view(np.uint8)
        np.testing.assert_array_equal(q.codes.view(torch.uint8).numpy(), expected)
        assert q.codes.shape == x.shape


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_int8_error_is_at_most_half_a_step_and_the_peak_is_exact(granularity):
    x = noise(130, 257)
    for symmetric in (True, False):
        s = spec(INT8, granularity, symmetric=symmetric)
        q = quantize(x, s)
        step = expand_scale(q.scale, (130, 257), granularity).double()
        error = (q.dequantize().double() - x.double()).abs()
        # Asymmetric: rounding the zero point may clip by up to half a step more.
        assert (error <= step * (0.5 if symmetric else 1.0) * (1 + 1e-5)).all()
    s = spec(INT8, granularity)
    codes = quantize(x, s).codes
    assert reduce_tiles(codes.int().abs(), granularity, "amax").eq(127).all()


def test_asymmetric_keeps_zero_exact_and_uses_the_whole_range():
    x = torch.cat([torch.linspace(0.0, 3.0, 200), torch.tensor([-0.5])]).reshape(1, -1)
    q = quantize(x, spec(INT8, PerChannel(), symmetric=False))
    assert q.zero_point is not None and q.zero_point.dtype == torch.int8
    assert q.dequantize()[0, 0] == 0
    assert q.codes.min() == -128 and q.codes.max() == 127
    only_positive = quantize(torch.full((1, 4), 5.0), spec(INT8, PerChannel(), symmetric=False))
    assert only_positive.zero_point is not None and only_positive.zero_point.item() == -128
    assert torch.allclose(only_positive.dequantize(), torch.full((1, 4), 5.0))


@given(
    rows=st.integers(1, 6), cols=st.integers(1, 40), seed=st.integers(0, 2**16),
    exponent=st.integers(-120, 120), group=st.integers(1, 40),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_power_of_two_factors_change_only_the_scale(rows, cols, seed, exponent, group):
    """Scaling by 2^e is exact, so codes must not change as long as nothing becomes subnormal."""
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    for dtype in (INT8, E4M3FN):
        s = spec(dtype, PerGroup(group))
        a, b = quantize(x, s), quantize(x.double().mul(2.0**exponent).float(), s)
        if bool((b.scale.double() == a.scale.double() * 2.0**exponent).all()):
            assert torch.equal(a.codes.view(torch.uint8), b.codes.view(torch.uint8))
        else:
            assert (a.scale.double() * 2.0**exponent < 2.0**-120).any() or (a.scale == 1).any()


@given(st.integers(0, 2**16), st.sampled_from(GRANULARITIES))
@settings(max_examples=40, deadline=None)
def test_quantizing_what_was_quantized_changes_nothing(seed, granularity):
    """Idempotence: values on the grid stay there (int8, symmetric: the scale is recovered within an ulp)."""
    x = noise(6, 21, seed=seed)
    s = spec(INT8, granularity)
    q = quantize(x, s)
    assert torch.equal(quantize_with(q.dequantize(), q.scale, s), q.codes)
    assert torch.equal(quantize(q.dequantize(), s).codes, q.codes)


def test_zero_rows_have_scale_one_and_codes_zero():
    x = noise(4, 64)
    x[2] = 0
    for dtype in (INT8, E4M3FN, E5M2):
        for symmetric in (True, False) if dtype is INT8 else (True,):
            q = quantize(x, spec(dtype, PerChannel(), symmetric=symmetric))
            assert q.scale[2] == 1 and (q.codes[2].float() == 0).all()
            assert (q.dequantize()[2] == 0).all()
            if q.zero_point is not None:
                assert q.zero_point[2] == 0
    mx = quantize(x, spec(E4M3FN, PerGroup(32), scale="e8m0"))
    assert mx.scale[2].tolist() == [127, 127] and (mx.dequantize()[2] == 0).all()


@pytest.mark.parametrize("value", [2.0**-149, 2.0**-130, 2.0**-126])
def test_tiny_rows_never_divide_by_a_subnormal_scale(value):
    x = torch.full((1, 8), value)
    q = quantize(x, spec(INT8, PerChannel()))
    assert q.scale.item() >= SMALLEST_SCALE
    assert q.scale.item() == 1 and (q.codes == 0).all()
    large_enough = quantize(torch.full((1, 8), 2.0**-119), spec(INT8, PerChannel()))
    assert (large_enough.codes == 127).all()


def test_the_largest_floats_do_not_overflow():
    top = torch.finfo(torch.float32).max
    for dtype in (INT8, E4M3FN, E5M2):
        q = quantize(torch.tensor([[top, -top, 0.0]]), spec(dtype, PerChannel()))
        assert q.codes.float().tolist() == [[dtype.max, -dtype.max, 0.0]]
        assert q.scale.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_weights_are_named_with_their_position(bad):
    x = torch.zeros(3, 5)
    x[1, 4] = bad
    with pytest.raises(ValueError, match=rf"in layer\.q, found {bad} at \[1, 4\] \(1 in all\)"):
        quantize(x, spec(INT8, PerChannel()), name="layer.q")
    with pytest.raises(ValueError, match="finite values in tensor"):
        check_finite(x)


def test_given_scales_saturate_inf_and_follow_the_nan_policy():
    x = torch.tensor([[math.nan, math.inf, -math.inf, 1e30]])
    one = torch.ones(1, 1)
    assert quantize_with(x, one, spec(INT8, PerChannel())).tolist() == [[0, 127, -127, 127]]
    codes = quantize_with(x, one, spec(E4M3FN, PerChannel())).float()
    assert math.isnan(codes[0, 0]) and codes[0, 1:].tolist() == [448, -448, 448]
    zero = torch.tensor([[3]], dtype=torch.int8)
    asym = quantize_with(x, one, spec(INT8, PerChannel(), symmetric=False), zero)
    assert asym.tolist() == [[3, 127, -128, 127]]


# --- power-of-two scales ----------------------------------------------------------------------


def test_e8m0_scales_are_the_smallest_power_of_two_that_saturates_nothing():
    x = noise(64, 96, seed=3)
    q = quantize(x, spec(E4M3FN, PerGroup(32), scale="e8m0"))
    scale = decode_e8m0(q.scale)
    assert q.scale.dtype == torch.uint8
    peak = reduce_tiles(x.abs(), PerGroup(32), "amax").double()
    assert (peak / scale.double() <= 448).all()
    assert (peak / (scale.double() / 2) > 448).all()
    as_float = quantize(x, spec(E4M3FN, PerGroup(32), scale="float32-power-of-2"))
    assert torch.equal(as_float.scale, scale)
    assert torch.equal(as_float.codes.view(torch.uint8), q.codes.view(torch.uint8))


def test_e8m0_at_exact_powers_of_two():
    """absmax = 448 · 2^e must give 2^e and not the next one: no logarithm is taken."""
    for exponent in range(-110, 110):
        x = torch.tensor([[448.0]], dtype=torch.float64).mul(2.0**exponent).float()
        q = quantize(x, spec(E4M3FN, PerGroup(1), scale="e8m0"))
        assert q.scale.item() == exponent + 127
        assert q.dequantize().item() == x.item()


# --- MSE --------------------------------------------------------------------------------------


def tile_errors(x: torch.Tensor, s: TensorSpec, method: str) -> torch.Tensor:
    q = quantize(x, s, method)  # type: ignore[arg-type]
    squared = (q.dequantize().double() - x.double()).square()
    expanded = torch.zeros(q.scale.shape, dtype=torch.float64)
    index = torch.arange(q.scale.numel()).reshape(q.scale.shape)
    where = expand_scale(index, tuple(x.shape), s.granularity).expand(x.shape)
    return expanded.flatten().index_add(0, where.flatten(), squared.flatten())


@given(
    st.integers(0, 2**16), st.sampled_from(GRANULARITIES),
    st.sampled_from([(INT8, True), (INT8, False), (E4M3FN, True)]),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_mse_is_never_worse_than_absmax_in_any_tile(seed, granularity, kind):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(9, 40, generator=generator) ** 3
    s = spec(kind[0], granularity, symmetric=kind[1])
    assert (tile_errors(x, s, "mse") <= tile_errors(x, s, "absmax") * (1 + 1e-12)).all()


def test_mse_clips_an_outlier_where_that_pays():
    x = torch.randn(1, 65536, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 40.0
    s = spec(INT8, PerChannel())
    assert (tile_errors(x, s, "mse") < 0.8 * tile_errors(x, s, "absmax")).all()


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="absmax or mse, found 'max'"):
        choose_scale(torch.ones(1, 1), spec(INT8, PerChannel()), "max")  # type: ignore[arg-type]


def test_a_range_is_widened_to_hold_zero():
    low, high = torch.tensor([[2.0]]), torch.tensor([[3.0]])
    scale, zero = scale_from_range(low, high, spec(INT8, PerChannel(), symmetric=False))
    assert scale.item() == pytest.approx(3 / 255) and zero is not None and zero.item() == -128


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)])
def test_empty_tensors_quantize_to_empty_ones(shape):
    q = quantize(torch.empty(shape), spec(INT8, PerChannel()))
    assert q.codes.shape == shape and q.dequantize().shape == shape


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(3), PerBlock(2, 3)])
@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)])
def test_mse_of_empty_tensors(shape, granularity):
    """A RuntimeError about a reshape of rows without elements."""
    q = quantize(torch.empty(shape), spec(INT8, granularity), "mse")
    assert q.codes.shape == shape and q.scale.shape == scale_shape(shape, granularity)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ["absmax", "mse"])
def test_a_scalar_stays_one(symmetric, method):
    q = quantize(torch.tensor(-3.0), spec(INT8, PerTensor(), symmetric=symmetric), method)
    assert q.codes.shape == () and q.dequantize().shape == () and q.scale.shape == (1,)
    assert q.dequantize().item() == pytest.approx(-3.0)
