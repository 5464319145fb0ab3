"""What check_engines.py compares an engine with, where the engine does not multiply as the scheme says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from engine_references import by_token_where, float_where, typical

from lowbit.nn import QuantLinear


class Model(nn.Module):
    """A static linear where a decoder has one, and its weight with dynamic activations."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        linear = nn.Linear(64, 32, bias=False)
        self.layers = nn.ModuleList([nn.Module()])
        self.layers[0].q_proj = QuantLinear.from_linear(linear, "int8-static", input_scale=0.1)
        self.dynamic = QuantLinear.from_linear(linear, "int8")


def test_static_layers_are_quantized_by_the_token_where_the_engine_does_so():
    model, x = Model(), torch.randn(2, 3, 64)
    static, dynamic = model.layers[0].q_proj, model.dynamic
    before = static(x)
    with by_token_where(model, ["model.layers.0.qkv_proj"]):
        torch.testing.assert_close(static(x), dynamic(x))
        assert not torch.allclose(static(x), before)
    assert torch.equal(static(x), before)
    with by_token_where(model, ["model.layers.1.qkv_proj"]), float_where(model, []):
        assert torch.equal(static(x), before)


def test_one_token_whose_expert_changed_does_not_count_where_tokens_do():
    prompts = [torch.full((8,), 0.01) for _ in range(5)]
    for prompt in prompts[:3]:
        prompt[2] = 0.7
    assert typical(prompts) > 0.2
    assert typical(prompts, of_tokens=True) == pytest.approx(0.01)
