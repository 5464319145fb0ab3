"""What operators refuse: operands on other devices, scales that are no floats, sums of another length."""

from __future__ import annotations

import pytest
import torch

from lowbit import ops

X = torch.randn(4, 32)
CODES = torch.randint(-127, 128, (3, 8, 32), dtype=torch.int8)
SCALE = torch.rand(3, 8, 1) + 0.1
WEIGHT = {"weight": CODES[0], "weight_scale": SCALE[0], "block": (1, 0)}
EXPERTS = {"weight": CODES, "weight_scale": SCALE, "block": (1, 0), "activations": "token"}
OFFSETS = torch.tensor([0, 1, 1, 4])
ZERO = torch.ones(1, dtype=torch.int8)


def static(**more):
    return {"activations": "tensor", "input_scale": torch.ones(1)} | more


def meta(*shape, dtype=torch.float32):
    return torch.ones(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.quantize_static(X, meta(1), dtype=torch.int8),
        lambda: ops.quantize_static(X, torch.ones(1), meta(1, dtype=torch.int8), dtype=torch.int8),
        lambda: ops.rms_norm_quantize(X, meta(32), 1e-6, dtype=torch.int8),
        lambda: ops.rms_norm_quantize(X, torch.ones(32), 1e-6, meta(4, 32), dtype=torch.int8),
        lambda: ops.dequantize(CODES[0], meta(8, 1), block=(1, 0), k=32),
        lambda: ops.linear_grouped(X, offsets=OFFSETS.to("meta"), **EXPERTS),
        lambda: ops.linear_grouped(X, offsets=OFFSETS, row_weight=meta(4), **EXPERTS),
    ],
)
def test_operands_on_another_device_are_refused(call):
    """Of tensors on meta whatever lay in memory was read."""
    with pytest.raises(ValueError, match="expected all operands on cpu, as x is, found meta"):
        call()


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.float8_e8m0fnu, torch.int64, torch.float64, torch.complex64]
)
def test_static_scales_are_floats(dtype):
    """E8M0's byte of 1.0 was a scale of 127, and so would be the bits of a float in an int64."""
    scale = (
        torch.full((1,), 127, dtype=torch.uint8).view(dtype)
        if dtype.itemsize == 1
        else torch.ones(1).to(dtype)
    )
    for call in (
        lambda: ops.quantize_static(X, scale, dtype=torch.int8),
        lambda: ops.linear(X, **WEIGHT, **static(input_scale=scale)),
        lambda: ops.linear_grouped(
            X, offsets=OFFSETS, **EXPERTS | static(input_scale=scale.repeat(3).view(3, 1))
        ),
    ):
        with pytest.raises(
            ValueError, match=r"expected (input_)?scale of float32, found torch\." + str(dtype)[6:]
        ):
            call()


def test_sums_biases_and_weights_of_rows_are_what_kernels_read():
    sums = CODES[0].sum(1, dtype=torch.int32)
    codes, scale = ops.quantize(X, torch.int8)
    product = WEIGHT | {"out_dtype": torch.float32}
    ops.linear(X, **WEIGHT, **static(input_zero_point=ZERO, weight_sum=sums))
    for wrong in (sums[:3], sums.long(), sums.float()):
        with pytest.raises(ValueError, match=r"expected weight_sum int32 \[8\]"):
            ops.linear(X, **WEIGHT, **static(input_zero_point=ZERO, weight_sum=wrong))
        with pytest.raises(ValueError, match=r"expected weight_sum int32 \[8\]"):
            ops.matmul(codes, torch.ones(1), a_zero_point=ZERO, weight_sum=wrong, **product)
    for call in (
        lambda: ops.linear(X, **WEIGHT, bias=sums, activations="token"),
        lambda: ops.matmul(codes, scale, bias=sums, **product),
        lambda: ops.linear_bfloat16(X, torch.ones(8, 32, dtype=torch.bfloat16), sums),
    ):
        with pytest.raises(ValueError, match=r"expected a bias of floats, found torch\.int32"):
            call()
    with pytest.raises(
        ValueError, match=r"expected row_weight of 4 floats, one per row of x, found torch\.int64"
    ):
        ops.linear_grouped(X, offsets=OFFSETS, row_weight=torch.ones(4, dtype=torch.int64), **EXPERTS)
    with pytest.raises(ValueError, match=r"expected weight of floats \[32\], found torch.int64 \[32\]"):
        ops.rms_norm_quantize(X, torch.ones(32, dtype=torch.int64), 1e-6, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"expected codes \[…, K\] of one dtype.* found torch.int8 \[\]"):
        ops.matmul(codes[0, 0], scale, **product)
    for of in (torch.bool, torch.complex64):
        with pytest.raises(ValueError, match=r"expected integer offsets \[4\].* int32 or int64"):
            ops.linear_grouped(X, offsets=OFFSETS.to(of), **EXPERTS)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_dequantize_asks_the_same_of_a_tensor_on_meta(device):
    given = {"weight": CODES[0].to(device), "weight_scale": SCALE[0].to(device), "block": (1, 0)}
    with pytest.raises(ValueError, match="expected a weight with 31 columns"):
        ops.dequantize(**given, k=31)
    with pytest.raises(ValueError, match=r"expected a float dtype for the weight, found torch\.int8"):
        ops.dequantize(**given, k=32, dtype=torch.int8)


@pytest.mark.parametrize("shape", [(4, 0), (2, 3, 0), (0,)])
def test_products_of_no_columns_are_the_bias(shape):
    """torch infers no number of rows of nothing: a RuntimeError about a reshape."""
    x, bias = torch.empty(shape), torch.arange(8.0)
    weight = {"weight": CODES[0, :, :0], "weight_scale": SCALE[0], "block": (1, 0), "bias": bias}
    expected = bias.expand(*shape[:-1], 8)
    assert torch.equal(ops.linear(x, **weight, activations="token"), expected)
    assert torch.equal(ops.linear(x, **weight, activations="none"), expected)
    found = ops.matmul(x.to(torch.int8), torch.ones(*shape[:-1], 1), **weight, out_dtype=torch.float32)
    assert torch.equal(found, expected)
    assert torch.equal(ops.linear_bfloat16(x, torch.empty(8, 0, dtype=torch.bfloat16), bias), expected)
