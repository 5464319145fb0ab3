"""inspect: what a checkpoint is, from its headers."""

from __future__ import annotations

import json

import torch
from sample_models import block_fp8, deepseek_v3, llama, qwen3_moe, vision_language, write

import lowbit
from lowbit.checkpoint.planner import BESIDE_CODES


def test_a_dense_model(tmp_path):
    tensors, config = llama(tied=True)
    found = lowbit.inspect(
        write(tmp_path, tensors, config, place=lambda n: len(n) % 2, files={"tokenizer.json": "{}"})
    )
    assert (found.architecture, found.model_type) == ("LlamaForCausalLM", "llama")
    assert found.tensors == len(tensors) and found.shards == 2
    assert found.parameters == sum(t.numel() for t in tensors.values())
    assert found.nbytes == 2 * found.parameters
    assert (found.layers, found.experts, found.tied_embeddings) == (2, 0, True)
    assert found.quantization == "" and found.odd == ()
    assert found.roles["linear"]["modules"] == 14 and found.roles["norm"]["modules"] == 5
    assert found.dtypes == {
        "BF16": {"tensors": len(tensors), "elements": found.parameters, "bytes": found.nbytes}
    }
    assert found.other_files == ("tokenizer.json",)
    json.dumps(found.to_dict(), allow_nan=False)


def test_parameters_do_not_depend_on_quantization(tmp_path):
    tensors, config = deepseek_v3()
    float_model = write(tmp_path / "bf16", tensors, config)
    count = lowbit.inspect(float_model).parameters
    codes, quantized = block_fp8(tensors, config)
    at = "model.layers.0.mlp.down_proj"
    beside = {f"{at}.{n}": torch.zeros(1) for n in BESIDE_CODES}  # as the plan, which does not carry them
    fp8 = write(tmp_path / "fp8", {**codes, **beside}, quantized)
    assert lowbit.inspect(fp8).parameters == count
    for scheme in ("int8", "int8-weight-only", "mxfp8"):
        lowbit.convert(float_model, tmp_path / scheme, scheme)
        found = lowbit.inspect(tmp_path / scheme)
        assert found.parameters == count, scheme
        assert scheme in found.quantization and found.quantized_modules > 40


def test_experts_and_the_layer_beyond_the_last(tmp_path):
    found = lowbit.inspect(write(tmp_path / "a", *deepseek_v3()))
    assert found.experts == 4 and found.roles["router"]["modules"] == 2
    odd = "\n".join(found.odd)
    assert "tensors lie beyond layer 2: multi-token prediction" in odd
    assert (
        "2 tensors are wider than the rest of the model (first: model.layers.1.mlp.gate.e_score_correction_bias"
        in odd
    )
    assert lowbit.inspect(write(tmp_path / "b", *qwen3_moe())).roles["expert"]["modules"] == 24


def test_scales_in_another_shard_are_odd(tmp_path):
    found = lowbit.inspect(
        write(tmp_path, *block_fp8(*llama()), place=lambda n: int(n.endswith("scale_inv")))
    )
    assert any("14 weights have their scale in another shard" in o for o in found.odd)
    assert found.quantization.startswith("fp8: 14 × fp8-block")


def test_vision_and_nested_config(tmp_path):
    found = lowbit.inspect(write(tmp_path, *vision_language()))
    assert found.roles["vision"]["modules"] == 4


def test_what_cannot_be_converted_is_still_described(tmp_path):
    tensors, config = llama()
    tensors["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(16, 256, dtype=torch.int32)
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    found = lowbit.inspect(write(tmp_path, tensors, config))
    assert found.quantization == "gptq"
    assert any("cannot be converted: quantization_config: expected quant_method" in o for o in found.odd)


def test_odd_tensors(tmp_path):
    tensors, config = llama()
    tensors |= {"e.weight": torch.empty(0, 4), "model.layers.0.mlp.experts.w": torch.ones(3, 20, 20)}
    odd = "\n".join(lowbit.inspect(write(tmp_path, tensors, config)).odd)
    assert "1 tensors are empty (first: e.weight)" in odd
    assert "of a layer, fused (first: model.layers.0.mlp.experts.w)" in odd


def test_without_a_config(tmp_path):
    found = lowbit.inspect(write(tmp_path, llama()[0], None))
    assert found.architecture == "unknown" and any("no config.json" in o for o in found.odd)
