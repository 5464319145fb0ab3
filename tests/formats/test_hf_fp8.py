"""HF / DeepSeek block FP8: names, config, and what transformers makes of it."""

from __future__ import annotations

import json

import pytest
import torch
from sample_models import block_fp8, deepseek_v3, llama, load, same_bits, write

import lowbit
from lowbit.errors import InputError
from lowbit.formats import get_format
from lowbit.formats.format import Layout
from lowbit.granularity import PerTensor
from lowbit.scheme import SCHEMES, get_scheme

FORMAT = get_format("fp8")


class Info:
    def __init__(self, dtype: str, *shape: int) -> None:
        self.dtype, self.shape = dtype, shape


def test_it_holds_blocks_of_128_only():
    assert [s for s in SCHEMES if FORMAT.holds(SCHEMES[s])] == ["fp8-block"]


@pytest.mark.parametrize(
    ("shape", "joined", "refused"),
    [
        ((256, 256), "fused", ""),
        ((576, 256), "", ""),
        ((576, 256), "fused", "N = 576"),
        ((256, 100), "", "K = 100"),
    ],
)
def test_shapes_that_engines_refuse(shape, joined, refused):
    for name in ("fp8", "compressed-tensors"):
        assert get_format(name).refuse(get_scheme("fp8-block"), shape, joined).startswith(refused)


@pytest.mark.parametrize("suffix", [".weight_scale_inv", ".scale", ".weight_scale"])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F8_E8M0"])
def test_all_names_and_dtypes_of_scales(suffix, dtype):
    tensors = {"m.a.weight": Info("F8_E4M3", 576, 300), "m.a" + suffix: Info(dtype, 5, 3)}
    found = FORMAT.read({"weight_block_size": [128, 128]}, tensors)["m.a"]
    assert found.shape == (576, 300) and found.names == {"codes": "m.a.weight", "scale": "m.a" + suffix}
    assert found.scheme == get_scheme("fp8-block")


@pytest.mark.parametrize("block", [[128, 128], [64, 32], [1, 128]])
def test_other_block_sizes_are_read_and_not_mistaken(tmp_path, block):
    tensors, config = block_fp8(*llama(), block=tuple(block))
    src = write(tmp_path / "src", tensors, config)
    lowbit.convert(src, tmp_path / "out", "bf16")
    from sample_models import decode_block_fp8

    name = "model.layers.0.mlp.up_proj"
    meant = decode_block_fp8(tensors[name + ".weight"], tensors[name + ".weight_scale_inv"], tuple(block))
    assert same_bits(load(tmp_path / "out")[name + ".weight"], meant.to(torch.bfloat16))
    if block != [128, 128]:
        with pytest.raises(InputError, match="expected weights that fp8 can hold, found fp8-block-"):
            lowbit.plan(src, "fp8-block", format="fp8", keep=["*.up_proj"])


def test_one_scale_per_weight(tmp_path):
    """`weight_block_size` absent: FP8 per tensor, with static activations as Mistral has them."""
    tensors, config = llama()
    stored = dict(tensors)
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        scale = tensors[name].float().abs().max() / 448
        stored[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
        stored[name + "_scale_inv"] = scale
        stored[name.removesuffix("weight") + "activation_scale"] = torch.tensor(0.5)
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "static"}
    src = write(tmp_path / "src", stored, config)
    found = FORMAT.read(config["quantization_config"], lowbit.plan(src, "bf16").source.tensors)
    assert all(isinstance(m.spec.granularity, PerTensor) for m in found.values()) and len(found) == 14
    lowbit.convert(src, tmp_path / "out", "int8")
    name = "model.layers.0.mlp.up_proj.weight"
    from lowbit.quantize import quantize

    spec = get_scheme("int8").weights
    assert spec is not None
    q = quantize(stored[name].float() * stored[name + "_scale_inv"], spec)
    written = load(tmp_path / "out")
    assert same_bits(written[name], q.codes) and same_bits(written[name + "_scale"], q.scale)
    assert not any("activation_scale" in n for n in written)
    parameters = sum(t.numel() for t in tensors.values())
    assert lowbit.inspect(src).parameters == lowbit.inspect(tmp_path / "out").parameters == parameters


@pytest.mark.parametrize("block", [[128], "128", [128, 128, 1], {}])
def test_a_broken_block_size(block):
    with pytest.raises(InputError, match=r"expected weight_block_size \[rows, cols\]"):
        FORMAT.read({"weight_block_size": block}, {"a.b.weight": Info("F8_E4M3", 4, 4)})


def test_transformers_reads_the_config_and_finds_every_name(tmp_path):
    """FineGrainedFP8 on the meta device: the modules that it builds hold exactly what we wrote."""
    transformers = pytest.importorskip("transformers")
    from transformers.quantizers.auto import AutoHfQuantizer

    src = write(tmp_path / "src", *llama(kv_heads=4))
    lowbit.convert(src, tmp_path / "out", "fp8-block", format="fp8")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    quantizer = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
    assert type(quantizer).__name__ == "FineGrainedFP8HfQuantizer"
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
        quantizer.modules_to_not_convert = quantizer.quantization_config.modules_to_not_convert
        from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

        replace_with_fp8_linear(
            model, modules_to_not_convert=list(quantizer.modules_to_not_convert),
            quantization_config=quantizer.quantization_config, pre_quantized=True,
        )  # fmt: skip
    expected = {n: (t.dtype, t.shape) for n, t in model.state_dict().items()}
    written = load(tmp_path / "out")
    assert set(expected) == set(written)
    for name, (dtype, shape) in expected.items():
        assert written[name].shape == shape, name
        if name.endswith("scale_inv") or "proj.weight" in name:
            assert written[name].dtype == dtype, name


def test_transformers_dequantizes_it_to_the_same_values(tmp_path):
    transformers = pytest.importorskip("transformers")
    src = write(tmp_path / "src", *llama())
    lowbit.convert(src, tmp_path / "out", "fp8-block", format="fp8")
    lowbit.convert(tmp_path / "out", tmp_path / "bf16", "bf16")
    quantization = transformers.FineGrainedFP8Config(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", quantization_config=quantization, dtype=torch.bfloat16
    )
    theirs, ours = model.state_dict(), load(tmp_path / "bf16")
    for name, t in ours.items():
        difference = (theirs[name].float() - t.float()).abs().max()
        assert difference <= t.float().abs().max() * 2**-7, name  # theirs multiplies in bfloat16


def test_the_config_names_what_stays(tmp_path):
    src = write(tmp_path / "src", *deepseek_v3())
    lowbit.convert(src, tmp_path / "out", "fp8-block", format="fp8")
    q = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    left = set(q["modules_to_not_convert"])
    assert {
        "lm_head",
        "model.layers.1.mlp.gate",
        "model.layers.2.eh_proj",
        "model.layers.2.shared_head.head",
    } <= left
    assert not any("_a_proj" in m for m in left)
    written = load(tmp_path / "out")
    assert not any(m + ".weight_scale_inv" in written for m in left)


def test_a_tower_is_named_as_a_whole():
    """SGLang has other names for what is in GLM-4.1V's, and compares each part of a name; vLLM has joined ones."""
    text, tower = "model.language_model.layers.0.mlp.up_proj", "model.visual.blocks.0.mlp.up_proj"
    layout = Layout(modules={text: get_scheme("fp8-block")}, ignored=("lm_head", tower))
    named = FORMAT.config(layout)["modules_to_not_convert"]
    assert named == ["lm_head", tower, "model.visual.blocks.0.mlp.gate_up_proj", "visual"]


@pytest.mark.parametrize(("format", "key"), [("fp8", "modules_to_not_convert"), ("sglang", "ignored_layers")])
def test_parts_of_what_is_joined_on_disk_are_named_too(format, key):
    """SGLang looks for these alone, and took HRM's gate_up_proj in BF16 for codes."""
    scheme = get_scheme("fp8-block" if format == "fp8" else "int8-block")
    layout = Layout(
        modules={"layers.0.o_proj": scheme}, ignored=("layers.0.gate_up_proj", "layers.0.qkv_proj")
    )
    named = get_format(format).config(layout)[key]
    assert {f"layers.0.{p}_proj" for p in ("gate", "up", "gate_up", "q", "k", "v", "qkv")} <= set(named)


@pytest.mark.parametrize("shape", [(2,), (0,), (64, 1)])
def test_several_scales_of_an_input_are_refused(tmp_path, shape):
    """It was an AssertionError in the midst of the work."""
    tensors, config = llama()
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        tensors[name] = tensors[name].float().to(torch.float8_e4m3fn)
        tensors |= {f"{name}_scale": torch.ones(()), name.replace("weight", "input_scale"): torch.ones(shape)}
    quantization = {"quant_method": "fp8", "activation_scheme": "static"}
    src = write(tmp_path / "src", tensors, {**config, "quantization_config": quantization})
    with pytest.raises(InputError, match=r"input_scale: expected one number for all activations, found \["):
        lowbit.plan(src, "fp8-static")
    lowbit.convert(src, tmp_path / "out", "int8")
