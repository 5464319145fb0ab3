"""Weights that are one matrix on disk and several in transformers' modules, or the other way round."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as t
from nn_reference import dequantized, inputs, logits
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.errors import InputError
from lowbit.nn import QuantLinear, float_activations, load
from lowbit.nn.joined import SplitLinear

BERT = {
    "vocab_size": 96, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
TEXT = {
    "vocab_size": 96, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "head_dim": 32, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SEEN = {"image_size": 28, "patch_size": 14}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def molmo() -> torch.nn.Module:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    return t.Molmo2ForConditionalGeneration(
        t.Molmo2Config(
            text_config=TEXT
            | {"num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 256, "attention_bias": True},
            vision_config=VISION | heads | {"image_size": [28, 28]},
            adapter_config=heads
            | {
                "hidden_size": 32,
                "intermediate_size": 64,
                "text_hidden_size": 128,
                "vision_feature_layer": [-1],
            },
        )
    )


def minimax() -> torch.nn.Module:
    text = TEXT | {
        "num_key_value_heads": 2, "intermediate_size": 64, "dense_intermediate_size": 128, "num_local_experts": 4,
        "shared_intermediate_size": 64, "num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"],
        "rotary_dim": 32, "index_n_heads": 2, "index_head_dim": 16, "index_block_size": 8, "index_topk_blocks": 2,
    }  # fmt: skip
    return t.MiniMaxM3SparseForConditionalGeneration(
        t.MiniMaxM3VLConfig(
            vision_config=VISION | SEEN | {"num_channels": 3}, projector_hidden_size=64, text_config=text
        )
    )


MODELS = {
    "nomic": lambda: t.NomicBertModel(t.NomicBertConfig(**BERT)),
    # Its names begin with the base model's.
    "nomic-head": lambda: t.NomicBertForMaskedLM(t.NomicBertConfig(**BERT)),
    "gte": lambda: t.GteModel(t.GteConfig(**BERT)),
    "jina": lambda: t.JinaEmbeddingsV3Model(t.JinaEmbeddingsV3Config(**BERT)),
    # Its q is larger than k and v, and they have biases.
    "molmo": molmo,
    "radio": lambda: t.RadioModel(
        t.RadioConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, max_img_size=56, **SEEN)
    ),
    "dinov2": lambda: t.Dinov2Model(
        t.Dinov2Config(
            hidden_size=64, num_hidden_layers=1, num_attention_heads=4, use_swiglu_ffn=True, **SEEN
        )
    ),
    "hrm": lambda: t.HrmTextForCausalLM(t.HrmTextConfig(**TEXT)),
    "minimax-m3": minimax,
}
NAMED = {
    "dinov2": ["*.mlp.weights_in"],
    "hrm": ["*.attn.gqkv_proj", "*.mlp.gate_up_proj"],
}
"""What an override names, exactly."""
SPLIT = {
    "nomic": ("layers.1.self_attn", "qkv"), "nomic-head": ("nomic_bert.layers.1.self_attn", "qkv"),
    "gte": ("layers.1.self_attn", "qkv"), "jina": ("layers.1.self_attn", "qkv"),
    "molmo": ("model.language_model.layers.1.self_attn", "qkv"), "radio": ("encoder.layer.1.attention", "qkv"),
    "dinov2": ("encoder.layer.0.mlp", ("gate", "up")), "hrm": ("model.L_module.layers.0.self_attn", "qkv"),
}  # fmt: skip
"""Where modules are that are one matrix on disk."""


def made(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = MODELS[kind]().float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(kind: str) -> dict:
    if kind in ("radio", "dinov2"):
        return {"pixel_values": torch.linspace(0, 1, 2 * 3 * 28 * 28).view(2, 3, 28, 28)}
    return inputs("llama")


def check(kind: str, path, model=None) -> None:
    """What path/out holds, loaded, equals the dequantized checkpoint by transformers alone, and saves as it was."""
    model = load(path / "out") if model is None else model
    reference = type(model).from_pretrained(
        dequantized(path / "out", path / "float"), dtype=torch.float32, experts_implementation="eager"
    )
    want = logits(reference.eval(), batch(kind))
    with float_activations(model):
        torch.testing.assert_close(logits(model, batch(kind)), want, rtol=1e-5, atol=1e-6)
    found = logits(model, batch(kind))
    assert (found - want).norm() < 0.2 * want.norm()
    model.save_pretrained(path / "again")
    first, second = (load_file(path / d / "model.safetensors") for d in ("out", "again"))
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].shape == second[name].shape and first[name].dtype == second[name].dtype, name
        assert torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)), name
    assert lowbit.verify(path / "again").ok
    assert torch.equal(logits(load(path / "again"), batch(kind)), found)


@pytest.mark.parametrize("scheme", ["int8", "fp8-block", "mxfp8"])
@pytest.mark.parametrize("kind", MODELS)
def test_joined_weights_equal_the_dequantized_ones(kind, scheme, tmp_path):
    made(kind).save_pretrained(tmp_path / "src")
    named = dict.fromkeys(NAMED.get(kind, ()), scheme)
    lowbit.convert(tmp_path / "src", tmp_path / "out", scheme, overrides=named)
    model = load(tmp_path / "out")
    assert any(isinstance(m, SplitLinear) for m in model.modules()) == (kind == "minimax-m3")
    if kind in SPLIT:
        parent, parts = SPLIT[kind]
        assert all(isinstance(model.get_submodule(f"{parent}.{p}_proj"), QuantLinear) for p in parts)
    check(kind, tmp_path, model)


@pytest.mark.parametrize("part", ["", "layer", "matrix", "mixed"])
@pytest.mark.parametrize("kind", [k for k in MODELS if k != "minimax-m3"])
def test_transformers_takes_for_codes_what_is_quantized_alone(kind, part, tmp_path):
    """RADIO's patches and Molmo's tower stay in float, but under other names on disk than in memory: transformers made
    up scales for them. So it did for the parts of what DINOv2 and HRM have joined on disk, while that stayed in float;
    quantized, it loads."""
    made(kind).save_pretrained(tmp_path / "src")
    layer = r"re:.*(layers?|blocks)\.0\."
    asked = {
        "": {}, "layer": {"ignore": [layer]}, "matrix": {"ignore": [layer + r".*(qkv|qkv_proj|Wqkv|att_proj|fc11)$"]},
        "mixed": {"overrides": {layer: "int8"}},
    }  # fmt: skip
    if (kind, part) == ("dinov2", "layer"):
        return  # it has one
    lowbit.convert(tmp_path / "src", tmp_path / "out", "fp8", **asked[part])
    model, info = type(made(kind)).from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    want = logits(load(tmp_path / "out", dtype="float32"), batch(kind))
    # compressed-tensors rounds inputs of int8 between other scales; scales that are made up give 0.5 and more.
    limit = 0.05 if part == "mixed" else 1e-3
    assert (logits(model.eval(), batch(kind)) - want).norm() < limit * want.norm()


@pytest.mark.parametrize("scheme", ["int8", "fp8-block", "int8-weight-only"])
@pytest.mark.parametrize("kind", [*SPLIT, "minimax-m3"])
def test_in_memory_joined_weights_equal_converted_ones(kind, scheme, tmp_path):
    made(kind).save_pretrained(tmp_path / "src")
    named = dict.fromkeys(NAMED.get(kind, ()), scheme)
    lowbit.convert(tmp_path / "src", tmp_path / "out", scheme, overrides=named)
    converted = load(tmp_path / "out")
    for model in (made(kind), type(converted).from_pretrained(tmp_path / "src")):
        lowbit.quantize_model(model, scheme, overrides=named)
        assert model.quantization_report.warnings == ()
        mine, theirs = model.state_dict(), converted.state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[n].view(torch.uint8), theirs[n].view(torch.uint8)) for n in mine)
        model.save_pretrained(tmp_path / "saved")
        first, second = (load_file(tmp_path / d / "model.safetensors") for d in ("out", "saved"))
        assert first.keys() == second.keys() and all(first[n].shape == second[n].shape for n in first)
        assert lowbit.verify(tmp_path / "saved").ok
        assert torch.equal(logits(load(tmp_path / "saved"), batch(kind)), logits(converted, batch(kind)))


def test_blocks_over_two_matrices_stay_in_float_in_memory(tmp_path):
    model = t.GteModel(t.GteConfig(**BERT | {"intermediate_size": 192})).eval()
    lowbit.quantize_model(model, "int8-block")
    kept = model.quantization_report.kept
    assert kept["layers.0.mlp.up_proj"] == kept["layers.0.mlp.gate_proj"]
    assert kept["layers.0.mlp.up_proj"].endswith("splits it after rows 192, within blocks of 128")
    assert isinstance(model.layers[0].self_attn.q_proj, QuantLinear)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path), batch("gte")), logits(model, batch("gte")))


@pytest.mark.parametrize(
    ("kind", "bad", "whole"),
    [
        ("nomic", "layers.1.self_attn.k_proj", "encoder.layers.1.attn.Wqkv"),
        ("minimax-m3", "model.language_model.layers.1.self_attn.o_proj", ""),
    ],
)
def test_after_an_error_joined_weights_are_saved_as_they_are(kind, bad, whole, tmp_path):
    """Of a matrix with a weight that is not finite no part is quantized, and what came before is one on disk."""
    model = made(kind)
    weight = model.get_submodule(bad).weight
    with torch.no_grad():
        weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="expected finite values"):
        lowbit.quantize_model(model, "int8")
    assert model.get_submodule(bad).weight is weight
    with torch.no_grad():
        weight[0, 0] = 0.0
    lowbit.quantize_model(model, "int8", ignore=[bad])
    model.save_pretrained(tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    if whole:
        assert saved[f"{whole}.weight"].dtype == torch.float32 and f"{whole}.weight_scale" not in saved
    assert torch.equal(logits(load(tmp_path / "out"), batch(kind)), logits(model, batch(kind)))


def test_a_pattern_for_one_of_the_modules_means_all_of_the_matrix(tmp_path):
    model = made("nomic")
    lowbit.quantize_model(model, "int8", ignore=["layers.0.self_attn.k_proj"])
    kept = model.quantization_report.kept
    assert all(
        f"layers.0.self_attn.{x}_proj" in kept and f"layers.1.self_attn.{x}_proj" not in kept for x in "qkv"
    )
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(logits(again, batch("nomic")), logits(model, batch("nomic")))
    lowbit.quantize_model(model, "int8")
    assert isinstance(model.layers[0].self_attn.k_proj, QuantLinear)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again"), batch("nomic")), logits(model, batch("nomic")))


def test_joined_weights_of_some_layers(tmp_path):
    """transformers' own conversions, for those in float, fit the names of all."""
    made("nomic").save_pretrained(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", "int8-weight-only", ignore=["*.0.attn.Wqkv"])
    check("nomic", tmp_path)


@pytest.mark.parametrize("kind", ["nomic", "molmo", "minimax-m3"])
def test_packed_and_ascends_joined_weights(kind, tmp_path):
    made(kind).save_pretrained(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", "int8-weight-only")
    model = load(tmp_path / "out")
    check(kind, tmp_path, model)
    lowbit.convert(tmp_path / "src", tmp_path / "out", "int8", format="ascend", overwrite=True)
    source = logits(type(model).from_pretrained(tmp_path / "src").eval(), batch(kind))
    assert (logits(load(tmp_path / "out"), batch(kind)) - source).norm() < 0.1 * source.norm()


def per_tensor(path, ends, scales) -> None:
    """The checkpoint at path/src with the weights of such modules in E4M3, as AutoFP8 has them, in path/out."""
    tensors = load_file(path / "src" / "model.safetensors")
    for end, scale in zip(ends, scales, strict=True):
        found = [n.removesuffix(".weight") for n in tensors if n.endswith(f"{end}.weight")]
        if not found:
            pytest.skip("this transformers has it joined on disk too")
        name = found[0]
        weight = tensors[f"{name}.weight"].float()
        tensors[f"{name}.weight"] = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors |= {
            f"{name}.weight_scale": torch.tensor([scale]),
            f"{name}.input_scale": torch.tensor([0.02]),
        }
    (path / "out").mkdir()
    save_file(tensors, path / "out" / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "src" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "static"}
    (path / "out" / "config.json").write_text(json.dumps(config))


def test_one_scale_for_all_of_a_joined_weight(tmp_path):
    made("nomic").save_pretrained(tmp_path / "src")
    names = [f"encoder.layers.{i}.attn.Wqkv" for i in (0, 1)]
    per_tensor(tmp_path, names, [0.001, 0.002])
    model = load(tmp_path / "out")
    assert model.get_submodule("layers.1.self_attn.k_proj").scale.tolist() == pytest.approx([0.002])
    check("nomic", tmp_path, model)
    model.layers[0].self_attn.k_proj.weight_scale.mul_(2)
    with pytest.raises(ValueError, match=r"Wqkv\.weight_scale: expected one value"):
        model.save_pretrained(tmp_path / "other")


def test_parts_with_scales_of_their_own(tmp_path):
    """Gate and up of one joined layer: no one scale per tensor would do."""
    made("minimax-m3").save_pretrained(tmp_path / "src")
    per_tensor(tmp_path, [f"layers.0.mlp.{p}_proj" for p in ("gate", "up")], [0.001, 0.002])
    check("minimax-m3", tmp_path)


def test_a_layer_of_which_one_part_is_in_float_is_refused(tmp_path):
    made("minimax-m3").save_pretrained(tmp_path / "src")
    per_tensor(tmp_path, ["layers.0.mlp.gate_proj"], [0.001])
    with pytest.raises(
        InputError, match=r"with others, which are in float, .* --ignore '\*\.mlp\.gate_proj'"
    ):
        load(tmp_path / "out")


@pytest.mark.parametrize("scheme", ["int8", "int8-weight-only"])
def test_a_part_that_is_missing_is_named(tmp_path, scheme):
    """It was said to be in float, and to convert again so."""
    made("minimax-m3").save_pretrained(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", scheme)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    part = "layers.0.mlp.up_proj"
    left = {n: t for n, t in tensors.items() if f"{part}." not in n}
    assert len(left) < len(tensors)
    save_file(left, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        InputError, match=rf"layers\.0\.mlp\.gate_proj: expected \S*{part} beside it, .* is incomplete"
    ):
        load(tmp_path / "out")


def test_a_block_over_two_matrices_is_refused(tmp_path):
    """Codes of DeepSeek's kind whose blocks end within k, say."""
    config = t.NomicBertConfig(**BERT | {"hidden_size": 192})
    t.NomicBertModel(config).save_pretrained(tmp_path / "src")
    tensors = load_file(tmp_path / "src" / "model.safetensors")
    name = "encoder.layers.0.attn.Wqkv"
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.float8_e4m3fn)
    tensors[f"{name}.weight_scale_inv"] = torch.ones(5, 2)
    config = json.loads((tmp_path / "src" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "src" / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "src" / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        InputError, match=r"after rows 192, 384, within blocks of 128; .* --ignore '\*\.attn\.Wqkv'$"
    ):
        load(tmp_path / "src")


@pytest.mark.parametrize("kind", ["nomic-head", "minimax-m3"])
def test_joined_weights_in_float_again(kind, tmp_path):
    made(kind).save_pretrained(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", "int8", ignore=["*.experts.*"])
    model = load(tmp_path / "out")
    with float_activations(model):
        want = logits(model, batch(kind))
    model.dequantize()
    assert not any(isinstance(m, QuantLinear | SplitLinear) for m in model.modules())
    torch.testing.assert_close(logits(model, batch(kind)), want, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again").eval()
    torch.testing.assert_close(logits(again, batch(kind)), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["nomic-head", "minimax-m3"])
def test_joined_weights_on_disk(kind, tmp_path):
    """What is not in a file as the model needs it goes to the folder; the rest is read where it is."""
    made(kind).save_pretrained(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", "int8")
    want = logits(load(tmp_path / "out"), batch(kind))
    place = {
        "nomic-head": {"nomic_bert.embeddings": "cpu", "nomic_bert.layers": "disk", "cls": "cpu"},
        "minimax-m3": {
            "model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu",
            "model.language_model.embed_tokens": "cpu", "model.language_model.layers": "disk",
            "model.language_model.norm": "cpu", "model.language_model.rotary_emb": "cpu",
        },
    }[kind]  # fmt: skip
    model = load(tmp_path / "out", device_map=place, offload_folder=tmp_path / "folder")
    assert torch.equal(logits(model, batch(kind)), want)
