"""Number formats against ml_dtypes and torch's own casts, bit for bit."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.dtypes import (
    DTYPES,
    E4M3FN,
    E4M3FNUZ,
    E5M2,
    E8M0,
    INT8,
    ROUND_MAGIC,
    decode,
    decode_e8m0,
    encode,
    encode_e8m0,
)

ML = {
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2": ml_dtypes.float8_e5m2,
    "e8m0": ml_dtypes.float8_e8m0fnu,
}
FLOAT8 = (E4M3FN, E4M3FNUZ, E5M2)
ALL_BYTES = np.arange(256, dtype=np.uint8)


def floats(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits.astype(np.uint32).view(np.float32).copy())


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal as numbers, the sign of zero included; any NaN equals any NaN."""
    nan = np.isnan(a) & np.isnan(b)
    return bool((nan | ((a == b) & (np.signbit(a) == np.signbit(b)))).all())


def sample_values(dtype) -> torch.Tensor:
    """All codes, all midpoints between neighbours and the floats next to those, and random bits."""
    codes = np.unique(np.abs(ALL_BYTES.view(ML[dtype.name]).astype(np.float32)))
    codes = codes[np.isfinite(codes)]
    middles = ((codes[1:].astype(np.float64) + codes[:-1]) / 2).astype(np.float32)
    points = np.concatenate([codes, middles])
    near = [np.nextafter(points, np.float32(s), dtype=np.float32) for s in (-np.inf, np.inf)]
    random = np.random.default_rng(0).integers(0, 2**32, 50_000, dtype=np.uint32).view(np.float32)
    everything = np.concatenate([points, *near, random[np.isfinite(random)]])
    return torch.from_numpy(np.concatenate([everything, -everything]))


@pytest.mark.parametrize("dtype", [*FLOAT8, E8M0], ids=str)
def test_all_256_codes_decode_as_ml_dtypes_says(dtype):
    theirs = ALL_BYTES.view(ML[dtype.name]).astype(np.float32)
    assert same(decode(torch.from_numpy(ALL_BYTES).view(dtype.torch_dtype)).numpy(), theirs)


def test_int8_codes_decode_to_themselves():
    assert decode(torch.from_numpy(ALL_BYTES).view(torch.int8)).tolist() == [*range(128), *range(-128, 0)]


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_the_declared_range_is_ml_dtypes_own(dtype):
    info = ml_dtypes.finfo(ML[dtype.name])
    assert dtype.max == float(info.max)
    assert dtype.smallest == float(info.smallest_subnormal)
    assert ALL_BYTES.view(ML[dtype.name]).itemsize * 8 == dtype.bits


def test_every_dtype_names_a_torch_dtype_of_its_size():
    for dtype in DTYPES.values():
        assert dtype.torch_dtype.itemsize * 8 == dtype.bits
        assert str(dtype.torch_dtype) == f"torch.{dtype.torch_name}"


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_encode_equals_ml_dtypes_within_the_range_and_saturates_beyond(dtype):
    x = sample_values(dtype)
    ours = encode(x, dtype).view(torch.uint8).numpy()
    clamped = np.clip(x.numpy(), -dtype.max, dtype.max)
    np.testing.assert_array_equal(ours, clamped.astype(ML[dtype.name]).view(np.uint8))
    inside = np.abs(x.numpy()) <= dtype.max
    np.testing.assert_array_equal(ours[inside], x.numpy().astype(ML[dtype.name]).view(np.uint8)[inside])
    np.testing.assert_array_equal(ours[inside], x.to(dtype.torch_dtype).view(torch.uint8).numpy()[inside])


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_encode_goes_to_the_nearest_code_and_ties_go_to_the_even_one(dtype):
    codes = torch.from_numpy(ALL_BYTES).view(dtype.torch_dtype).float()
    finite = codes[codes.isfinite() & (codes >= 0)].unique().double()
    low, high = finite[:-1], finite[1:]
    middle = ((low + high) / 2).float()
    raw = encode(middle, dtype).view(torch.uint8)
    assert ((raw & 1) == 0).all()
    assert (encode(torch.nextafter(middle, torch.tensor(0.0)), dtype).float() == low).all()
    assert (encode(torch.nextafter(middle, torch.tensor(1e9)), dtype).float() == high).all()


@pytest.mark.parametrize("dtype", [INT8, *FLOAT8], ids=str)
def test_nan_inf_and_saturation_policy(dtype):
    x = torch.tensor([math.inf, -math.inf, 3e38, -3e38, dtype.max, math.nan])
    found = encode(x, dtype).float()
    assert found[:5].tolist() == [dtype.max, -dtype.max, dtype.max, -dtype.max, dtype.max]
    assert (found[5] == 0) if dtype is INT8 else math.isnan(found[5])


def test_int8_rounds_half_to_even_and_stays_symmetric():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.5, -127.5, -128.0, 0.49999997])
    assert encode(x, INT8).tolist() == [0, 2, 2, 0, -2, -2, 126, 127, -127, -127, 0]


@given(st.floats(width=32, allow_nan=False))
def test_int8_equals_numpy_rint(x):
    expected = int(np.rint(np.clip(np.float64(np.float32(x)), -127, 127)))
    assert encode(torch.tensor([x]), INT8).item() == expected


@given(st.floats(min_value=-(2.0**21), max_value=2.0**21, width=32))
def test_the_rounding_constant_rounds_as_rint(x):
    magic = np.float32(ROUND_MAGIC)
    assert (np.float32(x) + magic) - magic == np.rint(np.float32(x))


def test_encode_takes_half_precision_and_any_shape():
    x = torch.randn(3, 1, 5).to(torch.bfloat16)
    for dtype in (INT8, E4M3FN):
        assert encode(x, dtype).shape == x.shape
        assert torch.equal(encode(x, dtype).float(), encode(x.float(), dtype).float())
    assert encode(torch.empty(0, 4), INT8).shape == (0, 4)


def test_encode_asks_for_a_rounding_of_e8m0():
    with pytest.raises(ValueError, match="encode_e8m0"):
        encode(torch.ones(1), E8M0)
    with pytest.raises(ValueError, match="floor, ceil or nearest, found 'up'"):
        encode_e8m0(torch.ones(1), "up")  # type: ignore[arg-type]


# --- E8M0 -------------------------------------------------------------------------------------

POWERS = [math.ldexp(1.0, e) for e in range(-127, 128)]


@pytest.mark.parametrize("rounding", ["floor", "ceil", "nearest"])
def test_powers_of_two_stay_themselves(rounding):
    x = torch.tensor(POWERS, dtype=torch.float64).to(torch.float32)
    assert encode_e8m0(x, rounding).tolist() == list(range(255))


def test_e8m0_neighbours_of_powers_of_two():
    x = np.array(POWERS[2:-1], np.float32)
    above, below = np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(0))
    n = np.arange(2, 254)
    for values, floor, ceil, nearest in ((above, n, n + 1, n), (below, n - 1, n, n)):
        t = torch.from_numpy(values)
        assert encode_e8m0(t, "floor").numpy().tolist() == floor.tolist()
        assert encode_e8m0(t, "ceil").numpy().tolist() == ceil.tolist()
        assert encode_e8m0(t, "nearest").numpy().tolist() == nearest.tolist()


@given(st.floats(min_value=2.0**-149, max_value=3.4028234663852886e38, width=32))
def test_e8m0_against_exact_arithmetic(x):
    mantissa, exponent = math.frexp(x)  # x = mantissa · 2^exponent, mantissa in [½, 1)
    floor = exponent - 1
    expected = {
        "floor": floor,
        "ceil": floor + (mantissa > 0.5),
        "nearest": floor + (mantissa >= 0.75),
    }
    for rounding, power in expected.items():
        code = encode_e8m0(torch.tensor([x]), rounding).item()
        assert code == min(max(power + 127, 0), 254), rounding


def test_e8m0_nearest_equals_ml_dtypes_on_normal_values():
    bits = np.random.default_rng(1).integers(1 << 23, 0x7F000000, 100_000, dtype=np.uint32)
    x = bits.view(np.float32)
    theirs = x.astype(ML["e8m0"]).view(np.uint8)
    np.testing.assert_array_equal(encode_e8m0(torch.from_numpy(x), "nearest").numpy(), theirs)


def test_e8m0_policy_for_zero_nan_inf_and_negatives():
    x = torch.tensor([0.0, -0.0, 2.0**-149, 2.0**-128, math.nan, math.inf, -math.inf, -1.0])
    for rounding in ("floor", "ceil", "nearest"):
        assert encode_e8m0(x, rounding).tolist() == [0, 0, 0, 0, 255, 255, 255, 255], rounding
    just_below = torch.tensor([1.9 * 2.0**-127])
    assert [encode_e8m0(just_below, r).item() for r in ("floor", "nearest", "ceil")] == [0, 1, 1]
    assert encode_e8m0(torch.tensor([3.4e38]), "ceil").item() == 254


def test_decode_e8m0_reads_both_storage_types():
    raw = torch.from_numpy(ALL_BYTES)
    expected = ALL_BYTES.view(ML["e8m0"]).astype(np.float32)
    assert same(decode_e8m0(raw).numpy(), expected)
    assert same(decode_e8m0(raw.view(torch.float8_e8m0fnu)).numpy(), expected)
