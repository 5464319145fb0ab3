"""Experts: one grouped product against the same rows through `linear`, expert by expert."""

from __future__ import annotations

import itertools

import pytest
import torch

from lowbit import ops
from lowbit.quantize import quantize
from lowbit.scheme import SCHEMES

NAMES = ["int8", "fp8", "int8-block", "fp8-block", "mxfp8", "int8-weight-only"]
OFFSETS = [0, 5, 5, 6, 80, 80, 97]  # empty experts, one row, more than one block of rows


def make(name: str, dtype: torch.dtype, n: int = 40, k: int = 256):
    scheme = SCHEMES[name]
    experts = [quantize(torch.randn(n, k), scheme.weights) for _ in OFFSETS[1:]]
    return {
        "x": torch.randn(OFFSETS[-1], k).to(dtype),
        "weight": torch.stack([e.codes.view(torch.uint8) for e in experts]).view(experts[0].codes.dtype),
        "weight_scale": torch.stack([e.scale for e in experts]),
        "offsets": torch.tensor(OFFSETS, dtype=torch.int32),
        "activations": ops.activations_of(scheme),
        "block": ops.block_of(scheme.weights.granularity),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_grouped_is_linear_per_expert(path, name, dtype):
    a = make(name, dtype)
    bias, routed = torch.randn(len(OFFSETS) - 1, 40).to(dtype), torch.rand(OFFSETS[-1])
    out = ops.linear_grouped(**a, bias=bias, row_weight=routed)
    assert out.shape == (OFFSETS[-1], 40) and out.dtype == dtype
    for expert, (start, end) in enumerate(itertools.pairwise(OFFSETS)):
        if start == end:
            continue
        rows = a["x"][start:end].float()  # float32, so that the routed weight multiplies before rounding
        with ops.use_implementation("reference"):
            expected = ops.linear(
                rows, a["weight"][expert], a["weight_scale"][expert], bias[expert],
                activations=a["activations"], block=a["block"],
            )  # fmt: skip
        expected = (expected * routed[start:end].unsqueeze(1)).to(dtype)
        error = (out[start:end].double() - expected.double()).abs().max() / expected.double().abs().max()
        assert float(error) < (2e-6 if dtype == torch.float32 else 8e-3)
        if name.startswith("int8") and name != "int8-weight-only":
            assert torch.equal(out[start:end], expected)


def test_reference_and_cpu_agree_on_per_tensor_experts(path):
    a = make("int8", torch.float32)
    a["block"], a["weight_scale"] = (0, 0), torch.rand(len(OFFSETS) - 1, 1)
    with ops.use_implementation("reference"):
        expected = ops.linear_grouped(**a)
    assert torch.equal(ops.linear_grouped(**a), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["int8-static", "fp8-static"])
def test_a_static_scale_of_each_expert(path, name, dtype):
    a = make(name, dtype)
    assert a["activations"] == "tensor"
    scales = 0.01 * (1 + torch.arange(len(OFFSETS) - 1.0)).reshape(-1, 1)  # the small ones saturate
    bias, routed = torch.randn(len(OFFSETS) - 1, 40).to(dtype), torch.rand(OFFSETS[-1])
    out = ops.linear_grouped(**a, bias=bias, row_weight=routed, input_scale=scales)
    for expert, (start, end) in enumerate(itertools.pairwise(OFFSETS)):
        if start == end:
            continue
        with ops.use_implementation("reference"):
            expected = ops.linear(
                a["x"][start:end].float(), a["weight"][expert], a["weight_scale"][expert], bias[expert],
                activations="tensor", block=a["block"], input_scale=scales[expert],
            )  # fmt: skip
        expected = (expected * routed[start:end].unsqueeze(1)).to(dtype)
        error = (out[start:end].double() - expected.double()).abs().max() / expected.double().abs().max()
        assert float(error) < (2e-6 if dtype == torch.float32 else 8e-3)
        if name == "int8-static":
            assert torch.equal(out[start:end], expected)
    with pytest.raises(ValueError, match=r"expected input_scale of shape \[6, 1\], found \[1\]"):
        ops.linear_grouped(**a, input_scale=scales[0])
    with pytest.raises(ValueError, match="expected input_scale with activations='tensor'"):
        ops.linear_grouped(**a)


def test_no_tokens(path):
    a = make("int8", torch.float32)
    a["x"], a["offsets"] = a["x"][:0], torch.zeros(len(OFFSETS), dtype=torch.int32)
    assert ops.linear_grouped(**a).shape == (0, 40)
    static = {**a, "activations": "tensor", "input_scale": torch.ones(len(OFFSETS) - 1, 1)}
    assert ops.linear_grouped(**static).shape == (0, 40)


def test_gradient_reaches_x_through_each_expert():
    a = make("fp8", torch.float32)
    a["x"].requires_grad_()
    routed = torch.rand(OFFSETS[-1])
    grad = torch.randn(OFFSETS[-1], 40)
    ops.linear_grouped(**a, row_weight=routed).backward(grad)
    weights = ops.dequantize(a["weight"], a["weight_scale"], block=a["block"], k=256)
    for expert, (start, end) in enumerate(itertools.pairwise(OFFSETS)):
        expected = (grad[start:end] * routed[start:end].unsqueeze(1)) @ weights[expert]
        torch.testing.assert_close(a["x"].grad[start:end], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 5, 97], r"expected integer offsets \[7\]"),
        ([0, 5, 4, 6, 80, 80, 97], "expected offsets to rise from 0 to the 97 rows"),
        ([0, 5, 5, 6, 80, 80, 96], "expected offsets to rise from 0 to the 97 rows"),
    ],
)
def test_bad_offsets(offsets, message):
    a = make("int8", torch.float32)
    with pytest.raises(ValueError, match=message):
        ops.linear_grouped(**{**a, "offsets": torch.tensor(offsets)})
