"""Converted → loaded → logits against the dequantized checkpoint, which transformers runs alone."""

from __future__ import annotations

import pytest
import torch
import transformers
from nn_reference import FUSED, activations_quantized, build, dequantized, fused, inputs, logits, tiny
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.errors import InputError
from lowbit.formats import quantization_of
from lowbit.nn import QuantExperts, QuantLinear, float_activations, load, quantize_model

CONVERTED = [
    "llama", "qwen3", "qwen3-moe", "mixtral", "deepseek-v3", "gemma", "phi", "bert", "vision-language",
    "qwen3.5-moe", "qwen3-vl-moe", "llama4", "gemma4-moe", "granite-moe", "step", "qwen3-omni", "hy-v4", "minimax-m3",
    "longcat",
]  # fmt: skip


def quantized_weights(model) -> dict:
    """Module in memory (each expert's projection by itself) → scheme."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            found[name] = module.scheme
        elif isinstance(module, QuantExperts):
            found |= {
                f"{name}.{i}.{p}": module.scheme for i in range(module.num_experts) for p in ("up", "down")
            }
    return found


def check_against_float(model, float_dir, kind: str) -> None:
    cls, _ = tiny(kind)
    reference = cls.from_pretrained(float_dir, dtype=torch.float32, experts_implementation="eager").eval()
    batch = inputs(kind)
    want = logits(reference, batch)
    with float_activations(model):
        got = logits(model, batch)
    assert torch.isfinite(want).all()
    schemes = quantized_weights(model)
    if any(isinstance(m, QuantExperts) for m in model.modules()):
        # The same products, but the choices of a token are added up in another order.
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(got, want)
    with activations_quantized(reference, schemes):
        simulated = logits(reference, batch)
    got = logits(model, batch)
    cost = (simulated - want).norm()
    assert cost > 0
    # What is left is float rounding, and codes that it tips over.
    assert (got - simulated).norm() < 0.05 * cost


@pytest.mark.parametrize("kind", CONVERTED)
def test_converted_model_equals_the_dequantized_one(kind, tmp_path):
    build(kind).save_pretrained(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", scheme="int8")
    model = load(tmp_path / "out")
    assert not any(t.is_meta for t in model.state_dict().values())
    assert any(isinstance(m, QuantLinear) for m in model.modules())
    check_against_float(model, dequantized(tmp_path / "out", tmp_path / "float", FUSED.get(kind)), kind)


def test_experts_without_weights(tmp_path, caplog):
    """LongCat-Flash as published: transformers writes matrices of them that it never reads, and could not load this."""
    model = build("longcat")
    model.save_pretrained(tmp_path / "src")
    file = tmp_path / "src" / "model.safetensors"
    tensors = load_file(file)
    published = {n: t for n, t in tensors.items() if not any(f".experts.{e}." in n for e in (4, 5))}
    assert len(tensors) - len(published) == 4
    batch = inputs("longcat")
    found = {}
    for name, saved in {"as saved": tensors, "published": published}.items():
        save_file(saved, file, {"format": "pt"})
        lowbit.convert(tmp_path / "src", tmp_path / name, "int8")
        found[name] = load(tmp_path / name)
        found[name].save_pretrained(tmp_path / f"{name} again")
        assert (
            load_file(tmp_path / f"{name} again" / "model.safetensors").keys()
            == found[name].state_dict().keys()
        )
        assert torch.equal(logits(load(tmp_path / f"{name} again"), batch), logits(found[name], batch))
    assert torch.equal(logits(found["as saved"], batch), logits(found["published"], batch))
    assert "UNEXPECTED" not in caplog.text and "MISSING" not in caplog.text
    experts = found["published"].model.layers[0].mlp.experts
    assert (experts.num_experts, experts.identity_experts) == (4, 2)
    rows, index = torch.randn(3, 64), torch.tensor([[4], [5], [6]])
    out = experts(rows, index, torch.tensor([[0.5], [2.0], [1.0]]))
    assert torch.equal(out, rows * torch.tensor([[0.5], [2.0], [0.0]]))


# How these are published; transformers writes them otherwise.
PUBLISHED = {"qwen3.5-moe": "rows", "qwen3-vl-moe": "columns"}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_layouts_of_fused_experts(kind, tmp_path):
    build(kind).save_pretrained(tmp_path / "src")
    tensors = load_file(tmp_path / "src" / "model.safetensors")
    if kind == "qwen3-vl-moe":
        tensors = {n: t.mT if t.dim() == 3 and ".experts." in n else t for n, t in tensors.items()}
    else:
        tensors = fused(tensors, PUBLISHED[kind])
    published = {n: t.contiguous() for n, t in tensors.items()}
    assert sum(t.dim() == 3 and ".experts." in n for n, t in published.items()) == 4
    save_file(published, tmp_path / "src" / "model.safetensors", {"format": "pt"})
    lowbit.convert(tmp_path / "src", tmp_path / "out", scheme="int8")
    model = load(tmp_path / "out")
    assert sum(isinstance(m, QuantExperts) for m in model.modules()) == 2
    check_against_float(model, dequantized(tmp_path / "out", tmp_path / "float", FUSED.get(kind)), kind)
    mine = quantize_model(build(kind), "int8").state_dict()
    theirs = model.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


@pytest.mark.parametrize("pattern", ["the tensor", "*.layers.1.*experts.2.*"])
@pytest.mark.parametrize("kind", ["qwen3-vl-moe", "llama4", "gemma4-moe", "granite-moe"])
def test_fused_experts_in_float_stay_fused(kind, pattern, tmp_path):
    """By the name of the 3-D tensor or of one expert; in memory as in a conversion, and what is saved loads again."""
    leaf = "block_sparse_moe.input_linear" if kind == "granite-moe" else "experts.gate_up_proj"
    pattern = f"*.layers.1.*{leaf}" if pattern == "the tensor" else pattern
    build(kind).save_pretrained(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", "int8", ignore=[pattern])
    converted = load(tmp_path / "out")
    model = quantize_model(build(kind), "int8", ignore=[pattern])
    assert model.quantization_report.warnings == ()
    model.save_pretrained(tmp_path / "saved")
    batch = inputs(kind)
    for other in (converted, load(tmp_path / "saved")):
        assert quantized_weights(other) == quantized_weights(model)
        assert torch.equal(logits(other, batch), logits(model, batch))
    layers = [n for n, m in model.named_modules() if isinstance(m, QuantExperts)]
    assert all(".layers.0." in n for n in layers)
    ignored = [set(quantization_of(m.config.to_dict())["ignore"]) for m in (model, converted)]
    assert ignored[0] == ignored[1]


@pytest.mark.parametrize("kind", ["qwen3-vl-moe", "llama4", "gemma4-moe", "granite-moe"])
def test_experts_taken_apart_do_not_become_float_without_a_word(kind, tmp_path):
    """Back from int8 they are a matrix each, which transformers loads no model of these from; and so it is for load."""
    build(kind).save_pretrained(tmp_path / "src")
    assert not lowbit.plan(tmp_path / "src", "bf16").warnings
    lowbit.convert(tmp_path / "src", tmp_path / "out", "int8")
    done = lowbit.convert(tmp_path / "out", tmp_path / "back", "bf16")
    assert any("model's from 3-D tensors only" in w for w in done.plan.warnings)
    with pytest.raises(
        InputError, match=r"found a float matrix for each .*; convert the original checkpoint"
    ):
        load(tmp_path / "back")


def test_transformers_itself_loads_llama4s_experts(tmp_path):
    """With compressed-tensors, which takes Llama 4's experts apart (and no other's, in this version)."""
    build("llama4").save_pretrained(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", "int8")
    cls, _ = tiny("llama4")
    theirs, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    batch = inputs("llama4")
    want = logits(cls.from_pretrained(tmp_path / "src"), batch)
    mine, got = logits(load(tmp_path / "out"), batch), logits(theirs.eval(), batch)
    # Its dynamic scales are not quite lowbit's, but its error is no larger.
    assert (got - want).norm() < 1.2 * (mine - want).norm() < 0.03 * want.norm()


def test_llama4_calls_its_experts_with_all_rows():
    model = quantize_model(build("llama4"), "int8")
    experts = next(m for m in model.modules() if isinstance(m, QuantExperts))
    rows = torch.randn(4 * 3, 64)
    with float_activations(model):
        got = experts(rows).view(4, 3, 64)
        for e, x in enumerate(rows.view(4, 3, 64)):
            gate, up, down = (experts.dequantize(p)[e] for p in ("gate", "up", "down"))
            want = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
            torch.testing.assert_close(got[e], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheme", ["int8-block", "int8-weight-only", "fp8", "fp8-block", "mxfp8"])
def test_every_scheme_loads(scheme, tmp_path):
    cls, config = tiny("qwen3-moe")
    config.hidden_size, config.moe_intermediate_size, config.intermediate_size = 128, 128, 256
    torch.manual_seed(0)
    cls(config).save_pretrained(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", scheme=scheme)
    model = load(tmp_path / "out")
    assert {s.name for s in quantized_weights(model).values()} >= {scheme}
    reference = cls.from_pretrained(dequantized(tmp_path / "out", tmp_path / "float"), dtype=torch.float32)
    batch = inputs("qwen3-moe")
    with float_activations(model):
        torch.testing.assert_close(logits(model, batch), logits(reference, batch), rtol=1e-5, atol=1e-6)
    if scheme != "int8-weight-only":
        assert not torch.equal(logits(model, batch), logits(reference, batch))


@pytest.mark.parametrize("kind", [*CONVERTED, "gpt2"])
def test_in_memory_equals_converted(kind, tmp_path):
    """quantize_model chooses what the converter chooses, and makes the same codes; what it saves loads again."""
    model = build(kind)
    model.save_pretrained(tmp_path / "src")
    model = quantize_model(model, "int8")
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    batch = inputs(kind)
    assert torch.equal(logits(again, batch), logits(model, batch))
    if kind == "gpt2":
        reference = build(kind)
        assert (logits(model, batch) - logits(reference, batch)).norm() < 0.05 * logits(
            reference, batch
        ).norm()
        assert len(model.quantization_report.quantized) == 8
        return
    assert lowbit.verify(tmp_path / "saved").ok
    lowbit.convert(tmp_path / "src", tmp_path / "out", scheme="int8")
    converted = load(tmp_path / "out")
    mine, theirs = model.state_dict(), converted.state_dict()
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert mine[name].dtype == theirs[name].dtype, name
        assert torch.equal(mine[name], theirs[name]), name


SMALL = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 64,
}  # fmt: skip
SEEN = {"image_size": 16, "patch_size": 8}
BEYOND_TEXT = {
    # Code that initializes what is not filled asks Mamba's mixer for the weights of its Linears; it multiplies by one.
    "mamba": lambda: (
        transformers.MambaForCausalLM(
            transformers.MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=64, time_step_rank=16)
        ),
        {"input_ids": torch.arange(2, 11)[None]},
    ),
    # Its head's attention is torch's own, a function of the weights.
    "siglip": lambda: (
        transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SMALL, **SEEN)),
        {"pixel_values": torch.linspace(-1, 1, 768).view(1, 3, 16, 16)},
    ),
    # It has no embeddings, and says so with an error.
    "wav2vec2": lambda: (
        transformers.Wav2Vec2Model(
            transformers.Wav2Vec2Config(
                **SMALL, conv_dim=(32, 32), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=16,
                num_conv_pos_embedding_groups=4,
            )
        ),
        {"input_values": torch.linspace(-1, 1, 400)[None]},
    ),
    # Its attention is torch's function of the weights.
    "wavlm": lambda: (
        transformers.WavLMModel(
            transformers.WavLMConfig(
                **SMALL, conv_dim=(32, 32), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=16,
                num_conv_pos_embedding_groups=4,
            )
        ),
        {"input_values": torch.linspace(-1, 1, 400)[None]},
    ),
    # Its embeddings of positions are called by the singular.
    "clip": lambda: (
        transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config={**SMALL, "eos_token_id": 2}, vision_config={**SMALL, **SEEN}, projection_dim=32
            )
        ),
        {"input_ids": torch.arange(2, 11)[None], "pixel_values": torch.linspace(-1, 1, 768).view(1, 3, 16, 16)},
    ),
    # Its own code divides weights in place.
    "rwkv": lambda: (
        transformers.RwkvForCausalLM(
            transformers.RwkvConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, rescale_every=1)
        ),
        {"input_ids": torch.arange(2, 11)[None]},
    ),
    # Their own code reads the dtype of weights.
    "switch": lambda: (
        transformers.SwitchTransformersForConditionalGeneration(
            transformers.SwitchTransformersConfig(
                vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, num_experts=4
            )
        ),
        {"input_ids": torch.arange(2, 11)[None], "decoder_input_ids": torch.arange(4)[None]},
    ),
    "seamless": lambda: (
        transformers.SeamlessM4TForTextToText(
            transformers.SeamlessM4TConfig(
                vocab_size=64, hidden_size=64, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=128,
                decoder_ffn_dim=128, encoder_attention_heads=4, decoder_attention_heads=4,
            )
        ),
        {"input_ids": torch.arange(2, 11)[None], "decoder_input_ids": torch.arange(4)[None]},
    ),
    # Its code reads the dtype of one weight whatever that is; another is the output head's too.
    "granite-speech": lambda: (
        transformers.GraniteSpeech5ForCTC(
            transformers.GraniteSpeech5CTCConfig(
                vocab_size=64,
                encoder_config={
                    **SMALL, "num_key_value_heads": 4, "head_dim": 16, "num_mel_bins": 16, "context_size": 16,
                    "subsample_layers": [0],
                },
            )
        ),
        {"input_features": torch.linspace(-1, 1, 16 * 64).view(1, 16, 64)},
    ),
    # Its code asks for the shapes of weights that it would initialize.
    "funnel": lambda: (
        transformers.FunnelForMaskedLM(
            transformers.FunnelConfig(
                vocab_size=64, block_sizes=[1, 1], num_decoder_layers=1, d_model=64, n_head=4, d_head=16, d_inner=128
            )
        ),
        {"input_ids": torch.arange(2, 10)[None]},
    ),
    # Its embedding is called `w`.
    "ctrl": lambda: (
        transformers.CTRLLMHeadModel(
            transformers.CTRLConfig(vocab_size=64, n_positions=32, n_embd=64, dff=128, n_layer=2, n_head=4)
        ),
        {"input_ids": torch.arange(2, 11)[None]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("scheme", ["int8", "fp8", "int8-weight-only"])
@pytest.mark.parametrize("kind", BEYOND_TEXT)
def test_beyond_text_in_memory_equals_converted(kind, scheme, tmp_path):
    torch.manual_seed(0)
    model, batch = BEYOND_TEXT[kind]()
    model.eval().save_pretrained(tmp_path / "src")
    quantize_model(model, scheme)
    lowbit.convert(tmp_path / "src", tmp_path / "out", scheme=scheme)
    converted = load(tmp_path / "out")
    names = {n for n, m in converted.named_modules() if isinstance(m, QuantLinear)}
    assert names == set(model.quantization_report.quantized)
    with torch.no_grad():
        want, found = model(**batch).to_tuple(), converted(**batch).to_tuple()
    assert torch.equal(found[0], want[0])


@pytest.mark.parametrize("scheme", ["int8", "fp8", "int8-weight-only"])
def test_weights_that_transformers_splits_are_refused(scheme, tmp_path):
    """Kimi-K2.5's tower has q, k and v in one matrix on disk, and its rows in another order in memory."""
    _, text = tiny("deepseek-v3")
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Kimi_K25Config(text_config=text, vision_config=vision, projection_hidden_size=64)
    transformers.Kimi_K25ForConditionalGeneration(config).save_pretrained(tmp_path / "src")
    named = {"vision_tower.encoder.blocks.0.wqkv": scheme}
    lowbit.convert(tmp_path / "src", tmp_path / "out", scheme=scheme, overrides=named)
    with pytest.raises(InputError, match=r"blocks\.0\.wqkv: .* splits or joins .* --ignore '\*\.0\.wqkv'$"):
        load(tmp_path / "out")
    lowbit.convert(tmp_path / "src", tmp_path / "float", scheme=scheme)
    load(tmp_path / "float")


@pytest.mark.parametrize("scheme", ["int8", "fp8", "int8-weight-only"])
def test_weights_that_transformers_joins_stay_in_memory(scheme, tmp_path):
    """What was quantized in memory and joined on the way to disk could not be read again."""
    model = transformers.Dinov2Model(
        transformers.Dinov2Config(
            hidden_size=64, num_hidden_layers=1, num_attention_heads=4, use_swiglu_ffn=True, **SEEN
        )
    ).eval()
    quantize_model(model, scheme)
    assert "encoder.layer.0.mlp.gate_proj" in model.quantization_report.quantized
    assert len(model.quantization_report.quantized) == 7
    model.save_pretrained(tmp_path / "saved")
    batch = {"pixel_values": torch.linspace(-1, 1, 768).view(1, 3, 16, 16)}
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "saved")(**batch)[0], model(**batch)[0])


@pytest.mark.parametrize("scheme", ["int8", "fp8", "int8-weight-only"])
def test_codes_of_weights_that_a_models_code_reads_are_refused(scheme, tmp_path):
    """They failed in the first forward; where only the dtype is read, int8 codes do not."""
    rwkv, _ = BEYOND_TEXT["rwkv"]()
    rwkv.save_pretrained(tmp_path / "rwkv")
    wanted = {f"rwkv.blocks.{i}.attention.output": scheme for i in (0, 1)}
    lowbit.convert(tmp_path / "rwkv", tmp_path / "out", scheme=scheme, overrides=wanted)
    with pytest.raises(
        InputError, match=r"output and 1 more: .* in place; .* --ignore '\*\.attention\.output'$"
    ):
        load(tmp_path / "out")
    switch, batch = BEYOND_TEXT["switch"]()
    switch.save_pretrained(tmp_path / "switch")
    name = "decoder.block.1.layer.2.mlp.experts.expert_2.wo"
    lowbit.convert(
        tmp_path / "switch", tmp_path / "out", scheme=scheme, overrides={name: scheme}, overwrite=True
    )
    if scheme == "int8":
        with torch.no_grad():
            load(tmp_path / "out")(**batch)
        return
    with pytest.raises(InputError, match=r"casts activations .* --ignore '\*\.expert_\*\.wo'$"):
        load(tmp_path / "out")


@pytest.mark.parametrize("scheme", ["int8", "int8-weight-only"])
def test_codes_of_what_transformers_ties_are_refused(scheme, tmp_path):
    """One half of a pair cannot hold codes while the other is a float Linear: tying them ended in a TypeError."""
    model, _ = BEYOND_TEXT["granite-speech"]()
    model.save_pretrained(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", scheme=scheme, overrides={"encoder.out": scheme})
    with pytest.raises(InputError, match=r"one weight with that of ctc_head, .* --ignore 'encoder\.out'$"):
        load(tmp_path / "out")


def test_greedy_generation_runs(tmp_path):
    model = quantize_model(build("llama"), "int8")
    out = model.generate(**inputs("llama"), max_new_tokens=5, do_sample=False)
    assert out.shape == (2, 14)
    assert transformers.PreTrainedModel in type(model).__mro__
