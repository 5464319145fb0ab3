"""Static FP8, what ModelOpt, FBGEMM and SGLang store, and what others store that is not read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sample_models import Tensors, llama, load, same_bits, write

import lowbit
from lowbit.calibration.source import Source
from lowbit.errors import InputError

NAME = "model.layers.0.mlp.up_proj"
QUARK_FP8 = {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}, "input_tensors": {"dtype": "fp8_e4m3"}}
AUTOFP8 = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
KV = {
    "num_bits": 8,
    "type": "float",
    "symmetric": True,
    "strategy": "tensor",
    "dynamic": False,
}


def per_tensor(**extra: float) -> tuple[Tensors, dict[str, Any], Tensors]:
    """(tensors with a scalar weight_scale and input_scale, config.json, what the weights mean)."""
    tensors, config = llama()
    stored, meant = dict(tensors), {}
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        scale = tensors[name].float().abs().max() / 448
        stored[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
        stored[name + "_scale"] = scale
        stored[name.removesuffix("weight") + "input_scale"] = torch.tensor(0.0625)
        meant[name] = stored[name].float() * scale
    for layer in (0, 1):
        for key, value in extra.items():
            stored[f"model.layers.{layer}.self_attn.{key[0]}_proj.{key}"] = torch.tensor(value)
    return stored, config, meant


def quantization(out: Path) -> dict[str, Any]:
    return json.loads((out / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("declared", [
    AUTOFP8,
    {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"], "producer": {"name": "modelopt"}},
    {"quant_method": "quark", "layer_quant_config": {"*k_proj": QUARK_FP8}, "global_quant_config": QUARK_FP8},
])  # fmt: skip
def test_static_fp8_is_carried_bit_for_bit(declared, tmp_path):
    stored, config, meant = per_tensor()
    src = write(tmp_path / "src", stored, {**config, "quantization_config": declared})
    lowbit.convert(src, tmp_path / "static", "fp8-static")
    written = load(tmp_path / "static")
    assert same_bits(written[NAME + ".weight"], stored[NAME + ".weight"])
    for scale in ("weight_scale", "input_scale"):
        assert same_bits(written[f"{NAME}.{scale}"], stored[f"{NAME}.{scale}"].reshape(1))
    assert (
        quantization(tmp_path / "static")["config_groups"]["group_0"]["input_activations"]["dynamic"] is False
    )
    lowbit.convert(src, tmp_path / "bf16", "bf16")
    assert same_bits(load(tmp_path / "bf16")[NAME + ".weight"], meant[NAME + ".weight"].bfloat16())
    assert lowbit.verify(tmp_path / "static", src).ok


@pytest.mark.parametrize("said", ["static", {"num_bits": 8, "type": "float", "dynamic": False}])
def test_a_kv_cache_that_is_described_in_short(said, tmp_path):
    """vLLM refuses a kv_cache_scheme that does not say that it is symmetric and per tensor."""
    stored, config, _ = per_tensor(k_scale=0.5, v_scale=0.25)
    config["quantization_config"] = {**AUTOFP8, "kv_cache_scheme": said}
    lowbit.convert(write(tmp_path / "src", stored, config), tmp_path / "out", "int8")
    assert quantization(tmp_path / "out")["kv_cache_scheme"] == KV
    assert load(tmp_path / "out")["model.layers.0.self_attn.v_proj.v_scale"] == 0.25


@pytest.mark.parametrize("kind", ["output_scale", "k_scale"])
def test_scales_of_attention_have_names_that_engines_know(kind, tmp_path):
    """vLLM refused a checkpoint in compressed-tensors with `k_proj.output_scale`, and one in BF16 with either."""
    stored, config, _ = per_tensor()
    at = "model.layers.0.self_attn."
    names = {f"{at}{m}_proj.output_scale": 0.5 for m in "qkv"} | {f"{at}prob_output_scale": 0.5}
    if kind == "k_scale":
        names = {f"{at}{m}_proj.{m}_scale": 0.5 for m in "kv"}
    stored |= {name: torch.tensor(value) for name, value in names.items()}
    src = write(tmp_path / "src", stored, {**config, "quantization_config": AUTOFP8})
    lowbit.convert(src, tmp_path / "out", "int8")
    found = {name for name in load(tmp_path / "out") if name.startswith(at) and ".weight" not in name}
    renamed = {f"{at}{m}_scale" for m in "qkv"}
    assert found == (renamed if kind == "output_scale" else set(names))
    plan = lowbit.plan(src, "bf16")
    assert any(
        f"{len(names)} scales of a quantized KV cache or attention are left out" in w for w in plan.warnings
    )
    lowbit.convert(src, tmp_path / "bf16", "bf16")
    assert not any(name.endswith("_scale") for name in load(tmp_path / "bf16"))


def test_modelopts_config_in_a_file_of_its_own(tmp_path):
    stored, config, meant = per_tensor(k_scale=0.5, v_scale=0.25)
    said = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    file = json.dumps({"producer": {"name": "modelopt"}, "quantization": said})
    src = write(tmp_path / "src", stored, config, files={"hf_quant_config.json": file})
    assert "14 × fp8-static" in lowbit.inspect(src).quantization
    lowbit.convert(src, tmp_path / "out", "int8")
    assert not (
        tmp_path / "out" / "hf_quant_config.json"
    ).exists()  # engines would take the result for ModelOpt's
    assert quantization(tmp_path / "out")["kv_cache_scheme"] == KV
    lowbit.convert(src, tmp_path / "bf16", "bf16")
    assert same_bits(load(tmp_path / "bf16")[NAME + ".weight"], meant[NAME + ".weight"].bfloat16())


@pytest.mark.parametrize("said", [{}, {"quantization": None}, {"quantization": {"quant_algo": "W4A8_AWQ"}}])
def test_modelopt_that_is_not_read(said, tmp_path):
    stored, config, _ = per_tensor()
    src = write(tmp_path / "src", stored, config, files={"hf_quant_config.json": json.dumps(said)})
    with pytest.raises(
        InputError, match=r"of ModelOpt expected quant_algo FP8, NVFP4, .*found (None|'W4A8_AWQ')"
    ):
        lowbit.plan(src, "int8")


QUARK_OTHERS = [
    {},
    {"global_quant_config": {"weight": [QUARK_FP8["weight"]]}},
    {"global_quant_config": {"weight": {"dtype": "fp4"}}},
    {"global_quant_config": QUARK_FP8, "layer_quant_config": {"*lm_head": {}}},
]


@pytest.mark.parametrize("said", QUARK_OTHERS)
def test_quark_that_is_not_read(said, tmp_path):
    stored, config, _ = per_tensor()
    src = write(tmp_path, stored, {**config, "quantization_config": {"quant_method": "quark", **said}})
    with pytest.raises(InputError, match="of Quark expected all weights in fp8_e4m3, per_tensor"):
        lowbit.plan(src, "int8")


@pytest.mark.parametrize(
    ("method", "scheme"), [("fbgemm_fp8", "fp8"), ("w8a8_fp8", "fp8"), ("w8a8_int8", "int8")]
)
def test_a_scale_per_row_under_other_names_is_carried_bit_for_bit(method, scheme, tmp_path):
    lowbit.convert(write(tmp_path / "float", *llama()), tmp_path / "first", scheme)
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "activation_scheme": "dynamic"}
    stored = load(tmp_path / "first")
    bounds = {f"{NAME}.input_scale_ub": torch.tensor([1200.0])} if method == "fbgemm_fp8" else {}
    src = write(tmp_path / "src", {**stored, **bounds}, config)
    lowbit.convert(src, tmp_path / "out", scheme)
    written = load(tmp_path / "out")
    assert written.keys() == stored.keys() and all(same_bits(written[n], stored[n]) for n in stored)
    assert quantization(tmp_path / "out") == quantization(tmp_path / "first")
    assert lowbit.inspect(src).parameters == lowbit.inspect(tmp_path / "float").parameters


QUARK_BY_ROW = {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_channel", "ch_axis": 0}}


@pytest.mark.parametrize("said", [
    {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
    {"quant_method": "quark", "layer_quant_config": {}, "global_quant_config": QUARK_BY_ROW},
])  # fmt: skip
def test_a_scale_per_row_in_one_dimension(said, tmp_path):
    lowbit.convert(write(tmp_path / "float", *llama()), tmp_path / "first", "fp8")
    config, stored = json.loads((tmp_path / "first" / "config.json").read_text()), load(tmp_path / "first")
    config["quantization_config"] = said
    flat = {n: t.reshape(-1) if n.endswith("_scale") else t for n, t in stored.items()}
    src = write(tmp_path / "src", flat, config)
    lowbit.convert(src, tmp_path / "out", "fp8")
    written = load(tmp_path / "out")
    assert written.keys() == stored.keys() and all(same_bits(written[n], stored[n]) for n in stored)
    lowbit.convert(src, tmp_path / "bf16", "bf16")
    meant = stored[NAME + ".weight"].float() * stored[NAME + ".weight_scale"]
    assert same_bits(load(tmp_path / "bf16")[NAME + ".weight"], meant.bfloat16())
    assert same_bits(Source(src).weight(NAME), meant) and lowbit.verify(tmp_path / "bf16", src).ok


OTHERS = {
    "GPTQ": {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16},
    "bitsandbytes": {
        "weight": torch.uint8,
        "weight.absmax": torch.float32,
        "weight.quant_map": torch.float32,
    },
    "NVFP4": {"weight": torch.uint8, "weight_scale": torch.float32},
    "MLX": {"weight": torch.uint32, "scales": torch.bfloat16, "biases": torch.bfloat16},
    "HQQ": {"W_q": torch.uint8, "meta": torch.uint8},
    "MXFP4": {"weight": torch.uint8, "scale": torch.uint8},
    "gpt-oss": {"gate_up_proj_blocks": torch.uint8, "gate_up_proj_scales": torch.uint8},
    "gpt-oss as its makers store it": {"blocks": torch.uint8, "scales": torch.uint8},
    "experts in 3-D": {"gate_up_proj": torch.uint8, "gate_up_proj_weight_scale": torch.uint8},
    "2:4": {"compressed": torch.bfloat16, "bitmask": torch.uint8},
}


@pytest.mark.parametrize("scheme", ["int8", "bf16"])
@pytest.mark.parametrize("kind", OTHERS)
def test_weights_of_other_quantizations_are_refused(kind, scheme, tmp_path):
    """Their config may be elsewhere: what was left of the model was quantized, and their codes copied beside it."""
    tensors, config = llama()
    del tensors[NAME + ".weight"]
    tensors |= {f"{NAME}.{suffix}": torch.ones(64, 32, dtype=dtype) for suffix, dtype in OTHERS[kind].items()}
    src = write(tmp_path / "src", tensors, config)
    with pytest.raises(
        InputError, match="found what belongs to weights of a quantization that cannot be read"
    ):
        lowbit.plan(src, scheme)


def test_a_quantization_without_a_method(tmp_path):
    """MLX's config says `group_size` and `bits`; it was said to be incomplete."""
    tensors, config = llama()
    src = write(tmp_path, tensors, {**config, "quantization_config": {"group_size": 64, "bits": 4}})
    with pytest.raises(
        InputError, match=r"expected quant_method compressed-tensors or .*, found None; start from"
    ):
        lowbit.plan(src, "int8")
