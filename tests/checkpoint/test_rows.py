"""The fused loops against the torch oracle, bit for bit, for every source and output."""

from __future__ import annotations

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.checkpoint import rows as loops
from lowbit.checkpoint.decode import decode_slowly, to_float
from lowbit.dtypes import E4M3FN, INT8
from lowbit.granularity import PerBlock, PerChannel, PerGroup, block_shape, expand_scale, scale_shape
from lowbit.quantize import choose_scale, quantize_with
from lowbit.scheme import TensorSpec

SOURCES = {
    "bf16": (loops.BF16, torch.bfloat16),
    "f16": (loops.F16, torch.float16),
    "f32": (loops.F32, torch.float32),
    "e4m3": (loops.E4M3, torch.float8_e4m3fn),
    "int8": (loops.INT8, torch.int8),
    "packed": (loops.INT8_PACKED, torch.uint8),
    "int4": (loops.INT4_PACKED, torch.uint8),
    "e2m1": (loops.E2M1_PACKED, torch.uint8),
}
HALVES = ("int4", "e2m1")
SPECS = {
    "int8 channel": TensorSpec(dtype=INT8, granularity=PerChannel()),
    "int8 block": TensorSpec(dtype=INT8, granularity=PerBlock(128, 128)),
    "int8 small block": TensorSpec(dtype=INT8, granularity=PerBlock(3, 5)),
    "int8 group": TensorSpec(dtype=INT8, granularity=PerGroup(128)),
    "fp8 channel": TensorSpec(dtype=E4M3FN, granularity=PerChannel()),
    "fp8 block": TensorSpec(dtype=E4M3FN, granularity=PerBlock(128, 128)),
    "mxfp8": TensorSpec(dtype=E4M3FN, granularity=PerGroup(32), scale="e8m0"),
    "fp8 power of 2": TensorSpec(dtype=E4M3FN, granularity=PerBlock(128, 128), scale="float32-power-of-2"),
}
SHAPES = [(1, 1), (1, 300), (300, 1), (7, 129), (130, 257), (64, 64)]


def source(kind: str, shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """A stored weight of that kind, whose rows differ in size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp(2 * torch.randn(shape[0], 1, generator=generator))
    dtype = SOURCES[kind][1]
    if dtype == torch.int8:
        return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    if dtype == torch.uint8:
        return torch.randint(0, 16 if kind in HALVES else 256, shape, generator=generator, dtype=torch.uint8)
    # torch 2.9 makes NaN of what is too large for it.
    return (x.clamp(-448, 448) if dtype == torch.float8_e4m3fn else x).to(dtype)


def decoded(kind: str, stored: torch.Tensor) -> torch.Tensor:
    if kind == "e2m1":
        return torch.from_numpy(stored.numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float32))
    return stored.float() - {"packed": 128, "int4": 8}.get(kind, 0)


def raw(stored: torch.Tensor, kind: str = "") -> np.ndarray:
    if kind in HALVES:  # two to a byte, the first in the lower half, across the ends of rows
        halves = np.append(stored.reshape(-1).numpy(), np.uint8(0))
        return halves[: halves.size // 2 * 2 : 2] | halves[1::2] << 4
    return stored.contiguous().reshape(-1).view(torch.uint8).numpy()


def run(
    kind: str, stored: torch.Tensor, out_kind: int, *, spec: TensorSpec | None = None,
    source_scale: torch.Tensor | None = None, source_block: tuple[int, int] = (1, 1),
    scale: torch.Tensor | None = None, out_cols: int | None = None, row0: int = 0,
    multiplier: float = 1.0, divisor: float = 1.0,
) -> tuple[int, np.ndarray, np.ndarray]:  # fmt: skip
    """(result, codes as bytes [rows, out_cols · item], scales) of one call of `convert_rows`."""
    rows, cols = stored.shape
    out_cols = out_cols or cols
    tile_rows, tile_cols = block_shape((rows, cols), spec.granularity) if spec else (1, cols)
    scales = np.full(scale_shape((rows, cols), spec.granularity) if spec else (rows, 1), 1, np.float32)
    if scale is not None:
        scales = scale.numpy().copy()
    out = np.zeros(rows * out_cols * loops.OUTPUT_BYTES[out_kind], np.uint8)
    given_source = np.empty((0, 0), np.float32) if source_scale is None else source_scale.numpy()
    bad = loops.convert_rows(
        raw(stored, kind), SOURCES[kind][0], rows, cols, given_source, *source_block, row0, out, out_kind, out_cols,
        scales, tile_rows, tile_cols, spec is None or scale is not None,
        spec is not None and spec.scale != "float32", np.empty(max(cols, tile_rows * tile_cols), np.float32),
        np.float32(multiplier), np.float32(divisor),
    )  # fmt: skip
    return bad, out.reshape(rows, -1), scales


def out_kind_of(spec: TensorSpec) -> int:
    return loops.TO_INT8 if spec.dtype is INT8 else loops.TO_E4M3


def check(kind: str, stored: torch.Tensor, spec: TensorSpec, values: torch.Tensor, **kw) -> None:
    stored_scale, _ = choose_scale(values, spec)
    codes = quantize_with(values, stored_scale, spec).view(torch.uint8).numpy()
    bad, found, scales = run(kind, stored, out_kind_of(spec), spec=spec, **kw)
    assert bad == -1
    if spec.scale == "e8m0":
        scales = (scales.view(np.uint32) >> 23).astype(np.uint8)
    np.testing.assert_array_equal(scales, stored_scale.numpy())
    np.testing.assert_array_equal(found, codes)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("kind", SOURCES)
def test_quantizing_equals_the_oracle(kind, spec, shape):
    stored = source(kind, shape)
    check(kind, stored, spec, decoded(kind, stored))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("block", [(128, 128), (1, 32), (1000, 1000), (3, 7)], ids=str)
@pytest.mark.parametrize("kind", ["e4m3", "int8", "packed", "int4", "e2m1", "bf16"])
def test_scaled_sources_are_decoded_to_float32_first(kind, block, spec):
    shape = (133, 261)
    stored = source(kind, shape)
    tiles = scale_shape(shape, PerBlock(*block))
    scale = torch.rand(tiles, generator=torch.Generator().manual_seed(4)) * 0.1 + 1e-3
    values = decoded(kind, stored) * expand_scale(scale, shape, PerBlock(*block))
    check(kind, stored, spec, values, source_scale=scale, source_block=block)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("way", ["multiplier", "divisor"])
def test_nvfp4_is_rounded_once(way, spec):
    """In float64 the product of all three is exact, and a quotient rounds to the same float32 as the true one."""
    shape, number = (37, 208), np.float32(0.0007123)
    stored = source("e2m1", shape)
    scale = torch.rand((37, 13), generator=torch.Generator().manual_seed(5)) * 448
    scale = scale.to(torch.float8_e4m3fn).float()
    exact = decoded("e2m1", stored).double() * expand_scale(scale, shape, PerGroup(16)).double()
    values = (exact * float(number) if way == "multiplier" else exact / float(number)).float()
    check("e2m1", stored, spec, values, source_scale=scale, source_block=(1, 16), **{way: number})
    args = (
        raw(stored, "e2m1"),
        loops.E2M1_PACKED,
        *shape,
        scale.numpy(),
        1,
        16,
        0,
        np.empty(208, np.float32),
    )
    numbers = (number, np.float32(1)) if way == "multiplier" else (np.float32(1), number)
    assert loops.absmax_rows(*args, *numbers) == (values.abs().max().item(), -1)


def test_a_row_block_in_the_middle_uses_its_own_source_scales():
    stored, scale = source("e4m3", (40, 64)), torch.rand(4, 2) + 0.5
    _, whole, scales = run("e4m3", stored, loops.TO_INT8, spec=SPECS["int8 channel"], source_scale=scale,
                           source_block=(10, 32))  # fmt: skip
    for start, stop in ((0, 7), (7, 25), (25, 40)):
        _, part, part_scales = run(
            "e4m3", stored[start:stop], loops.TO_INT8, spec=SPECS["int8 channel"], source_scale=scale,
            source_block=(10, 32), row0=start,
        )  # fmt: skip
        np.testing.assert_array_equal(part, whole[start:stop])
        np.testing.assert_array_equal(part_scales, scales[start:stop])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", [SPECS["int8 channel"], SPECS["fp8 channel"], SPECS["mxfp8"]], ids=str)
def test_all_65536_half_precision_patterns(dtype, spec):
    """Every pattern in a row with others of its own exponent, so that none rounds to 0 unseen."""
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = bits[bits.isfinite()]
    width = 128 if dtype == torch.bfloat16 else 1024
    stored = finite[: finite.numel() // width * width].reshape(-1, width)
    assert stored.numel() == finite.numel()
    kind = "bf16" if dtype == torch.bfloat16 else "f16"
    check(kind, stored, spec, stored.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_all_half_precision_patterns_decode(dtype):
    kind = "bf16" if dtype == torch.bfloat16 else "f16"
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    for pattern in (bits[bits.isfinite()].reshape(1, -1),):
        bad, found, _ = run(kind, pattern, loops.TO_F32)
        assert bad == -1
        np.testing.assert_array_equal(found.view(np.uint32), pattern.float().numpy().view(np.uint32))
    for pattern in bits[~bits.isfinite()][:: 37 if dtype == torch.float16 else 5]:
        assert run(kind, pattern.reshape(1, 1), loops.TO_F32)[0] == 0


def test_every_fp8_code_decodes():
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn).float()
    finite = codes[values.isfinite()].view(torch.float8_e4m3fn).reshape(1, -1)
    bad, found, _ = run("e4m3", finite, loops.TO_F32)
    assert bad == -1 and finite.shape[1] == 254
    np.testing.assert_array_equal(found.view(np.uint32), finite.float().numpy().view(np.uint32))
    for code in (0x7F, 0xFF):
        nan = torch.tensor([[0, code]], dtype=torch.uint8).view(torch.float8_e4m3fn)
        assert run("e4m3", nan, loops.TO_INT8, spec=SPECS["int8 channel"])[0] == 0


PLAIN = {
    "bf16": (loops.TO_BF16, torch.bfloat16),
    "f16": (loops.TO_F16, torch.float16),
    "f32": (loops.TO_F32, torch.float32),
}


@pytest.mark.parametrize("out", PLAIN)
@pytest.mark.parametrize("kind", SOURCES)
def test_casts_equal_torch(kind, out):
    out_kind, dtype = PLAIN[out]
    stored = source(kind, (17, 129))
    bad, found, _ = run(kind, stored, out_kind)
    assert bad == -1
    np.testing.assert_array_equal(found, raw(decoded(kind, stored).to(dtype)).reshape(17, -1))


@pytest.mark.parametrize("out", ["bf16", "f16"])
def test_casts_of_random_bits_equal_torch(out):
    """Denormals, ties and overflow included."""
    out_kind, dtype = PLAIN[out]
    bits = np.random.default_rng(5).integers(0, 2**32, 200_000, dtype=np.uint32)
    ties = np.arange(65536, dtype=np.uint32) << 16
    halves = np.concatenate([bits, ties, ties + 0x8000, ties + 0x1000, ties + 0x7FFF, ties + 0x8001])
    x = torch.from_numpy(halves.view(np.float32).copy())
    x = x[x.isfinite()].reshape(1, -1)
    bad, found, _ = run("f32", x, out_kind)
    assert bad == -1
    np.testing.assert_array_equal(found, raw(x.to(dtype)).reshape(1, -1))


@pytest.mark.parametrize("spec", [SPECS["int8 channel"], SPECS["fp8 channel"], SPECS["mxfp8"]], ids=str)
def test_random_float32_bits_equal_the_oracle(spec):
    """Rows of equal exponents with random mantissas, over the whole range of float32."""
    rng = np.random.default_rng(6)
    exponent = np.repeat(np.arange(0, 255, dtype=np.uint32), 4)[:, None]
    spread = np.minimum(rng.integers(0, 12, (len(exponent), 64), dtype=np.uint32), exponent)
    bits = (exponent - spread) << 23 | rng.integers(0, 2**23, spread.shape, dtype=np.uint32)
    bits |= rng.integers(0, 2, spread.shape, dtype=np.uint32) << 31
    x = torch.from_numpy(bits.view(np.float32).copy())
    check("f32", x, spec, x)


def test_encoding_of_random_ratios_under_a_given_scale():
    """Saturation and rounding under scales that are too small, as a calibration may choose them."""
    x = torch.from_numpy(np.random.default_rng(7).normal(size=(64, 96)).astype(np.float32))
    for spec in (SPECS["int8 channel"], SPECS["fp8 channel"]):
        scale = choose_scale(x, spec)[0] * torch.linspace(0.1, 2.0, 64).reshape(-1, 1)
        bad, found, scales = run("f32", x, out_kind_of(spec), spec=spec, scale=scale)
        assert bad == -1 and np.array_equal(scales, scale.numpy())
        np.testing.assert_array_equal(found, quantize_with(x, scale, spec).view(torch.uint8).numpy())


def test_packed_codes_are_the_codes_plus_128():
    stored = source("bf16", (5, 12))
    spec = SPECS["int8 group"]
    plain = run("bf16", stored, loops.TO_INT8, spec=spec)[1]
    packed = run("bf16", stored, loops.TO_INT8_PACKED, spec=spec, out_cols=16)[1]
    np.testing.assert_array_equal(packed[:, :12].astype(int), plain.view(np.int8).astype(int) + 128)


@pytest.mark.parametrize("kind", ["bf16", "f16", "f32", "e4m3"])
@pytest.mark.parametrize("spec", [SPECS["int8 channel"], SPECS["int8 small block"]], ids=str)
def test_nan_and_inf_stop_at_their_row(kind, spec):
    for bad in (torch.nan, torch.inf, -torch.inf):
        if kind == "e4m3" and bad != torch.nan:
            continue
        stored = source(kind, (9, 33)).float()
        stored[7, 32] = bad
        found = run(kind, stored.to(SOURCES[kind][1]), loops.TO_INT8, spec=spec)[0]
        assert found == 7


def test_a_source_scale_that_overflows_float32_is_noticed():
    stored = torch.full((2, 4), 448.0).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0], [1e38]])
    found = run(
        "e4m3", stored, loops.TO_INT8, spec=SPECS["int8 channel"], source_scale=scale, source_block=(1, 4)
    )
    assert found[0] == 1


@given(
    rows=st.integers(1, 9), cols=st.integers(1, 70), seed=st.integers(0, 999),
    kind=st.sampled_from(["bf16", "f16", "f32", "e4m3"]), spec=st.sampled_from(list(SPECS.values())),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_any_shape_equals_the_oracle(rows, cols, seed, kind, spec):
    stored = source(kind, (rows, cols), seed)
    check(kind, stored, spec, decoded(kind, stored))


@pytest.mark.parametrize("kind", SOURCES)
def test_absmax_of_all_rows(kind):
    stored = source(kind, (17, 129))
    scale = torch.rand(2, 2) + 0.5
    values = decoded(kind, stored) * expand_scale(scale, (17, 129), PerBlock(10, 100))
    args = (raw(stored), SOURCES[kind][0], 17, 129, scale.numpy(), 10, 100, 0, np.empty(129, np.float32))
    args += (np.float32(1), np.float32(1))
    assert loops.absmax_rows(*args) == (values.abs().max().item(), -1)


def test_errors_are_summed_in_float64():
    x = np.random.default_rng(8).normal(size=100_000).astype(np.float32)
    y = x + np.float32(1e-3)
    error, power, worst = loops.error_rows(x, y)
    difference = x.astype(np.float64) - y.astype(np.float64)
    assert error == pytest.approx((difference**2).sum(), rel=1e-12)
    assert power == pytest.approx((x.astype(np.float64) ** 2).sum(), rel=1e-12)
    assert worst == np.abs(difference).max()


def test_slow_decoding_for_messages_says_the_same():
    codes = np.arange(256, dtype=np.uint8)
    theirs = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(decode_slowly(codes, loops.E4M3), theirs)
    e8m0 = torch.from_numpy(codes).view(torch.float8_e8m0fnu).float().numpy()
    np.testing.assert_array_equal(to_float(codes, "F8_E8M0"), e8m0)
    np.testing.assert_array_equal(to_float(codes, "F8_E4M3"), theirs)


def test_scales_of_a_large_weight_are_decoded_in_place():
    codes = np.full(1 << 20, 127, np.uint8)
    tracemalloc.start()
    to_float(codes, "U8")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * codes.size


def test_exponents_are_powers_of_two_down_to_a_subnormal_one():
    for dtype in ("U8", "F8_E8M0"):
        found = to_float(np.arange(256, dtype=np.uint8), dtype).astype(np.float64)
        assert found[:255].tolist() == [2.0 ** (e - 127) for e in range(255)] and np.isnan(found[255])
