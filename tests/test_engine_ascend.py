"""What check_engines.py stands in for a chip is what lowbit computes, and its references round as vLLM-Ascend keeps."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import engine_ascend_kernels as chip
from engine_references import as_bf16_keeps

from lowbit.quantize import quantize
from lowbit.scheme import get_scheme


@pytest.fixture
def numbers():
    torch.manual_seed(0)
    return torch.randn(9, 128) * torch.exp(torch.randn(9, 1))


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_dynamic_activations(numbers, scheme):
    spec = get_scheme(scheme).activations
    codes, scale = chip.npu_dynamic_quant(numbers, spec.dtype.torch_dtype)
    ours = quantize(numbers, spec)
    assert torch.equal(scale, ours.scale.reshape(-1))
    assert torch.equal(codes.float(), ours.codes.float())


def test_mx_products(numbers):
    """Codes and scales of both sides are lowbit's; the product is that of what they mean."""
    scheme = get_scheme("mxfp8")
    weight = torch.randn(64, 128)
    held, x = quantize(weight, scheme.weights), quantize(numbers, scheme.activations)
    codes, tokens = chip.npu_dynamic_mx_quant(numbers, torch.float8_e4m3fn)
    assert torch.equal(codes.float(), x.codes.float()) and torch.equal(tokens, x.scale.view(torch.uint8))
    pairs = held.scale.view(torch.uint8).reshape(64, 2, 2).transpose(0, 1)
    out = chip.npu_quant_matmul(codes, held.codes.T, pairs, pertoken_scale=tokens, group_sizes=[1, 1, 32])
    torch.testing.assert_close(out, x.dequantize() @ held.dequantize().T, rtol=1e-5, atol=1e-4)


def test_static_products(numbers):
    """An INT32 bias is inside the scale, a float one is not."""
    reciprocal, offset = torch.full((128,), 20.0), torch.full((128,), 3.0)
    codes = chip.npu_quantize(numbers, reciprocal, offset)
    assert torch.equal(codes, (numbers * 20 + 3).round().clamp(-128, 127).to(torch.int8))
    weight, scale = torch.randint(-127, 128, (128, 8), dtype=torch.int8), torch.rand(8)
    steps, bias = torch.arange(8, dtype=torch.int32), torch.arange(8.0)
    sums = codes.double() @ weight.double()
    inside = chip.npu_quant_matmul(codes, weight, scale, bias=steps)
    outside = chip.npu_quant_matmul(codes, weight, scale, pertoken_scale=torch.ones(9), bias=bias)
    torch.testing.assert_close(inside.double(), (sums + steps) * scale.double())
    torch.testing.assert_close(outside.double(), sums * scale.double() + bias)


def test_experts_are_chosen_by_groups():
    """The best expert is alone in its group: the other group's two together are better."""
    logits = torch.tensor([[3.0, -9.0, -9.0, -9.0, 2.0, 2.0, -9.0, -9.0]])
    weights, ids, _ = chip.moe_gating_top_k(
        logits, k=2, k_group=1, group_count=2, group_select_mode=1, renorm=0, norm_type=1,
        routed_scaling_factor=2.5, eps=1e-20,
    )  # fmt: skip
    assert sorted(ids[0].tolist()) == [4, 5]
    torch.testing.assert_close(weights, torch.full((1, 2), 1.25))


def test_references_hold_what_the_engine_keeps(tmp_path):
    (tmp_path / "out").mkdir()
    third = torch.full((4, 1), 1 / 3)
    tensors = {
        "a.weight": torch.ones(4, 4, dtype=torch.int8), "a.weight_scale": third,
        "b.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "b.weight_scale": third.clone(),
        "c.input_scale": torch.tensor([0.3]), "c.deq_scale": third.clone(),
    }  # fmt: skip
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    found = load_file(as_bf16_keeps(tmp_path / "out", tmp_path / "to") / "model.safetensors")
    assert torch.equal(found["a.weight_scale"], third.bfloat16().float())
    assert torch.equal(found["b.weight_scale"], third) and torch.equal(found["c.deq_scale"], third)
    kept = found["c.input_scale"].item()
    assert kept == pytest.approx(1 / 3.328125, rel=1e-6), (
        "0.3 is 0.30078125 in BF16, and 1 / that is 3.328125"
    )
