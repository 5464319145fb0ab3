"""SGLang's blockwise int8: names, config, what it refuses, and back."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sample_models import block_fp8, deepseek_v3, llama, load, qwen3_moe, same_bits, write

import lowbit
from lowbit.errors import InputError
from lowbit.formats import get_format
from lowbit.formats.format import Layout
from lowbit.scheme import SCHEMES, get_scheme

FORMAT = get_format("sglang")


def quantization(out) -> dict:
    return json.loads((out / "config.json").read_text())["quantization_config"]


def test_it_holds_blocks_of_128_only():
    assert [s for s in SCHEMES if FORMAT.holds(SCHEMES[s])] == ["int8-block"]


def test_names_values_and_config(tmp_path):
    tensors, config = llama()
    src = write(tmp_path / "src", tensors, config)
    lowbit.convert(src, tmp_path / "out", "int8-block", format="sglang")
    assert quantization(tmp_path / "out") == {
        "quant_method": "blockwise_int8", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "ignored_layers": ["lm_head"],
    }  # fmt: skip
    written = load(tmp_path / "out")
    for name, t in tensors.items():
        if "_proj." not in name:
            assert same_bits(written[name], t)
            continue
        codes, scale = written.pop(name), written.pop(name + "_scale_inv")
        tiles = t.float().numpy().reshape(t.shape[0] // 128, 128, t.shape[1] // 128, 128)
        want = np.abs(tiles).max((1, 3)) / np.float32(127)
        assert codes.dtype == torch.int8
        np.testing.assert_array_equal(scale.numpy(), want)
        rounded = np.rint(tiles / want[:, None, :, None]).reshape(t.shape)
        np.testing.assert_array_equal(codes.numpy(), np.clip(rounded, -127, 127))
    assert set(written) == {n for n in tensors if "_proj." not in n}


def test_modules_in_float_are_named_as_the_engine_joins_them(tmp_path):
    src = write(tmp_path / "src", *llama(kv_heads=2))  # ragged blocks, which do not join
    lowbit.convert(src, tmp_path / "out", "int8-block", format="sglang")
    ignored = quantization(tmp_path / "out")["ignored_layers"]
    for layer in (0, 1):
        names = [f"model.layers.{layer}.self_attn.{n}_proj" for n in ("q", "k", "v", "qkv")]
        assert set(names) <= set(ignored)
        assert f"model.layers.{layer}.self_attn.o_proj" not in ignored
    assert not any("mlp" in n for n in ignored)


@pytest.mark.parametrize("source", ["bf16", "fp8"])
def test_deepseek(tmp_path, source):
    tensors, config = deepseek_v3()
    if source == "fp8":
        tensors, config = block_fp8(tensors, config)
    src = write(tmp_path / "src", tensors, config)
    lowbit.convert(src, tmp_path / "out", "int8-block", format="sglang")
    lowbit.convert(src, tmp_path / "other", "int8-block")
    ours, other = load(tmp_path / "out"), load(tmp_path / "other")
    for name, t in ours.items():
        if "kv_b_proj" in name or "q_b_proj" in name or "_a_proj" in name:
            continue  # where a block does not fit, compressed-tensors has a scale per channel
        assert same_bits(t, other[name.replace("_scale_inv", "_scale")]), name
    ignored = quantization(tmp_path / "out")["ignored_layers"]
    assert "model.layers.1.mlp.gate" in ignored and not any("fused_qkv_a_proj" in name for name in ignored)
    assert ours["model.layers.1.self_attn.kv_a_proj_with_mqa.weight"].dtype == torch.int8
    assert lowbit.verify(tmp_path / "out", src).ok


def test_it_is_read_again(tmp_path):
    src = write(tmp_path / "src", *qwen3_moe())
    lowbit.convert(src, tmp_path / "out", "int8-block", format="sglang")
    written = load(tmp_path / "out")
    lowbit.convert(tmp_path / "out", tmp_path / "ct", "int8-block")
    lowbit.convert(tmp_path / "ct", tmp_path / "back", "int8-block", format="sglang")
    back = load(tmp_path / "back")
    assert set(back) == set(written) and all(same_bits(back[n], written[n]) for n in written)
    assert lowbit.inspect(tmp_path / "out").quantization.startswith("blockwise_int8: 32 × int8-block")
    del written["model.layers.0.self_attn.q_proj.weight_scale_inv"]
    bad = write(tmp_path / "bad", written, json.loads((tmp_path / "out" / "config.json").read_text()))
    with pytest.raises(InputError, match=r"expected a scale named .*q_proj.weight_scale_inv beside I8 codes"):
        lowbit.plan(bad, "int8")


def test_int8_per_channel_says_how_sglang_loads_it(tmp_path):
    src = write(tmp_path / "src", *llama())
    with pytest.raises(InputError, match=r"leave --format out, and serve .* --quantization w8a8_int8"):
        lowbit.convert(src, tmp_path / "out", "int8", format="sglang")


def test_experts_in_float_are_refused(tmp_path):
    """The engine builds every mixture quantized, whatever ignored_layers says."""
    src = write(tmp_path / "src", *qwen3_moe())
    with pytest.raises(InputError, match="expected every expert in int8-block, found 12 that stay in float"):
        lowbit.convert(
            src, tmp_path / "out", "int8-block", format="sglang", ignore=["model.layers.1.mlp.experts"]
        )
    shared = Layout(modules={}, ignored=("model.layers.1.mlp.shared_experts.up_proj",))
    assert len(FORMAT.config(shared)["ignored_layers"]) == 2
    block = get_scheme("int8-block")
    assert "not a multiple of 128" in FORMAT.refuse(block, (192, 128), "experts")
    assert FORMAT.refuse(block, (192, 128), "") == ""
