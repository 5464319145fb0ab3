"""What is kept and why, from names alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.checkpoint.roles import role_of
from lowbit.checkpoint.rules import Selection, decide, fused_key
from lowbit.errors import InputError
from lowbit.formats import get_format
from lowbit.scheme import get_scheme

INT8 = get_scheme("int8")
BIG = (256, 256)

KEPT = {
    # name → (role, shape)
    "model.embed_tokens": ("embedding", BIG),
    "transformer.wte": ("embedding", BIG),
    "model.layers.61.embed_tokens": ("embedding", BIG),
    "text_model.embeddings.position_embedding": ("other", BIG),
    "encoder.rel_embeddings": ("other", BIG),
    "word_embedding": ("other", BIG),
    "model.decoder.embed_tokens.0": ("embedding", BIG),
    "decoder.block.0.layer.2.DenseReluDense.wo": ("projection", BIG),
    "encoder.block.1.layer.1.mlp.experts.expert_3.wo": ("projection", BIG),  # Switch Transformers
    "bbox_attention.k_linear": ("projection", BIG),  # DETR
    "lm_head": ("head", BIG),
    "output": ("head", BIG),
    "model.layers.61.shared_head.head": ("head", BIG),
    "score": ("head", BIG),
    "model.layers.3.mlp.gate": ("router", BIG),
    "model.layers.3.block_sparse_moe.gate": ("router", BIG),
    "model.layers.3.mlp.router": ("router", BIG),
    "model.layers.3.mlp.shared_expert_gate": ("router", (1, 256)),
    "model.layers.3.feed_forward.router": ("router", BIG),
    "model.layers.61.eh_proj": ("projection", BIG),
    "mtp.fc": ("projection", BIG),  # Qwen3-Next
    "model.mtp_linear_proj.0": ("projection", BIG),  # ERNIE 4.5
    "model.mtp_layers.0.input_proj": ("projection", BIG),  # MiMo
    "model.layers.3.self_attn.indexer.weights_proj": ("projection", BIG),
    "model.layers.3.self_attn.indexer.wk": ("projection", BIG),  # DeepSeek-V3.2, GLM-5
    "visual.blocks.0.attn.qkv": ("vision", BIG),
    "model.visual.blocks.0.mlp.fc1": ("vision", BIG),
    "vision_tower.encoder.layers.0.self_attn.q_proj": ("vision", BIG),
    "model.vision_model.encoder.layers.0.mlp.fc1": ("vision", BIG),
    "multi_modal_projector.linear_1": ("vision", BIG),
    "audio_tower.layers.0.fc1": ("audio", BIG),
    "mlp1.1": ("vision", BIG),  # InternVL
    "visual_tokenizer.backbone.layers.0.mlp.fc1": ("vision", BIG),  # Ovis
    "model.vision_backbone.image_vit.transformer.resblocks.0.attention.wq": ("vision", BIG),  # Molmo
    "model.vision_embed_tokens.img_projection.0": ("vision", BIG),  # Phi-3-vision
    "model.embed_tokens_extend.image_embed.img_processor.encoder.layers.0.mlp.fc1": ("vision", BIG),  # Phi-4
    "model.embed_tokens_extend.audio_embed.encoder.encoders.0.self_attn.linear_q": ("audio", BIG),
    "model.layers.0.self_attn.qkv_proj.lora_A.speech": ("adapter", BIG),
    "model.embed_vision.embedding_projection": ("vision", BIG),  # Gemma 3n
    "vpm.encoder.layers.0.mlp.fc1": ("vision", BIG),  # MiniCPM-V
    "resampler.kv_proj": ("vision", BIG),
    "projector.layers.0": ("vision", BIG),  # DeepSeek-VL2
    "token2wav.code2wav_dit_model.transformer_blocks.0.attn.to_q": ("audio", BIG),  # Qwen2.5-Omni
    "model.layers.0.mlp.gate.wg": ("router", BIG),  # Hunyuan-A13B
    "model.layers.0.mlp.gate.router_mlp.fc1": ("router", BIG),  # Zaya
    "lm_head.decoder": ("head", BIG),  # RoBERTa
    "transformer.tokens_embed": ("other", BIG),  # GPT
    "transformer.word_embedding": ("other", BIG),  # XLNet
    "encoder.layers.0.attn.rel_pos_emb": ("other", BIG),  # Granite speech
    "tapas.embeddings.token_type_embeddings_1": ("other", BIG),
    "model.embed_tokens_extend.audio_embed.encoder.encoders.0.self_attn.q_proj": ("audio", BIG),
    "model.video_tower.encoder.layers.0.mlp.fc1": ("vision", BIG),  # Video-LLaVA
    "model.vision_projection.patch_merger.merging_layer": ("vision", BIG),  # LightOnOCR
    "model.vision_embed_tokens": ("vision", BIG),  # Fuyu
    "qformer.encoder.layer.0.attention.attention.key": ("vision", BIG),  # BLIP-2
    "bert.pooler.dense": ("head", BIG),
    "classifier.dense": ("head", BIG),  # RoBERTa's rerankers
    "classifier.out_proj": ("head", BIG),
    "head.dense": ("head", BIG),  # ModernBERT
    "cls.predictions.transform.dense": ("head", BIG),
    "score.0": ("head", BIG),  # Qwen2.5-Math-RM
    "v_head": ("head", BIG),
    "linear": ("head", BIG),  # ColBERT
    "classification_head.dense": ("head", BIG),  # BART
    "sequence_summary.summary": ("head", BIG),  # XLNet
    "logits_proj": ("head", BIG),
    "model.llm.unembed": ("head", BIG),  # Inkling
    "custom_text_proj": ("head", BIG),  # ColQwen
    "text_projection": ("head", BIG),  # CLIP
    "visual_projection": ("vision", BIG),
    "language_model.output": ("head", BIG),  # InternVL with InternLM2
    "transformer.output_layer": ("head", BIG),  # ChatGLM
    "model.transformer.ff_out": ("head", BIG),  # Molmo
    "model.layers.45.transformer.shared_head.output": ("head", BIG),  # Step 3.5
    "talker.code_predictor.lm_head.3": ("head", BIG),  # Qwen3-Omni
    "talker.code_predictor.model.codec_embedding.3": ("other", BIG),
    "model.ngram_embeddings.embedders.0": ("other", BIG),  # LongCat-Flash
    "model.ngram_embeddings.post_projs.0": ("other", BIG),
    "embed_text_tokens": ("other", BIG),  # CSM
    "fine_acoustics.input_embeds_layers.0": ("other", BIG),  # Bark
    "vte": ("embedding", BIG),  # Ovis
    "encoder.rel_pos_x_bias": ("other", BIG),  # LayoutLMv2 and 3 look rows of it up
    "model.query_feat": ("other", BIG),  # LW-DETR
    "t2u_model.model.decoder.embed_char": ("other", BIG),
    "canine.char_embeddings.HashBucketCodepointEmbedder_0": ("other", BIG),
    "model.layers.0.mlp.router.classifier": ("router", BIG),  # LongCat-Flash
    "model.layers.0.mlp.router_gate": ("router", BIG),  # Doge
    "fc": ("projection", BIG),  # EAGLE
    "vit_large_projector": ("vision", BIG),  # Step-3
    "vision_language_adapter.w_in": ("vision", BIG),  # Pixtral as Mistral has it
    "patch_merger.merging_layer": ("vision", BIG),
    "model.vision_embedding.0.encoder.layers.0.mlp.fc1": ("vision", BIG),  # Isaac
    "model.merger.mlp.0.linear_1": ("vision", BIG),  # MiniCPM-V 4.6
    "model.linear_proj.0": ("vision", BIG),  # Bailing
    "model.spatial_projectors.0.proj": ("vision", BIG),  # Granite 4 Vision
    "model.qwen2_model.model.model.layers.0.mlp.up_proj": ("vision", BIG),  # DeepSeek-OCR-2
    "vision_resampler.layers.0.q_proj": ("vision", BIG),
    "continuous_audio_tower.layers.0.fc1": ("audio", BIG),
    "mm_whisper_embeddings.whisper_encoder.transformer.layers.0.attention.wq": ("audio", BIG),  # Voxtral
    "tts.model.layers.0.self_attn.q_proj": ("audio", BIG),  # MiniCPM-o
    "text_model.head": ("head", BIG),  # SigLIP's
    "model.norm": ("norm", (256,)),
    "model.layers.0.input_layernorm": ("norm", (256,)),
    "model.layers.0.self_attn.q_norm": ("norm", (256,)),
    "model.layers.0.linear_attn.conv1d": ("conv", (256, 1, 4)),
    "model.layers.0.mlp.experts.gate_up_proj": ("experts-3d", (8, 256, 256)),
    "model.layers.0.small": ("linear", (8, 256)),
    "model.layers.0.thin": ("linear", (256, 15)),
    "model.layers.0.conv2d": ("other", (16, 3, 4, 4)),
}

QUANTIZED = {
    "decoder.block.0.layer.2.DenseReluDense.wi_0": "linear",
    "model.layers.0.self_attn.q_proj": "linear",
    "model.layers.0.self_attn.o_proj": "linear",
    "model.layers.0.self_attn.q_a_proj": "linear",
    "model.layers.0.self_attn.kv_a_proj_with_mqa": "linear",
    "model.layers.0.mlp.gate_proj": "linear",
    "model.layers.0.mlp.gate_up_proj": "linear",
    "model.layers.0.mlp.shared_experts.down_proj": "linear",
    "model.layers.0.mlp.shared_expert.gate_proj": "linear",
    "model.layers.0.mlp.experts.17.gate_proj": "expert",
    "model.layers.61.mlp.experts.0.down_proj": "expert",
    "model.layers.0.block_sparse_moe.experts.3.w1": "expert",
    "model.language_model.layers.0.mlp.up_proj": "linear",
    "transformer.h.0.attn.c_attn": "linear",
    "encoder.layer.0.attention.self.query": "linear",
    "encoder.layer.0.attention.output.dense": "linear",
    "model.layers.0.attention.wqkv": "linear",
    "backbone.layers.0.mixer.in_proj": "linear",
    "model.layers.0.mlp.input_linear": "linear",
    "model.layers.0.mlp1.up": "linear",
    "model.layers.0.self_attn.forget_gate.f_a_proj": "linear",
    "model.layers.0.per_layer_input_gate": "linear",
    "model.layers.0.self_attn.qkv_proj.base_layer": "linear",
    "model.transformer.blocks.0.ff_out": "linear",  # Molmo
    "model.layers.0.mlp.vision_mlp.gate_proj": "linear",  # CogVLM: as large as the text's, in each layer
    "vit.encoder.layer.0.attention.attention.query": "linear",  # a model that only sees
    "model.layers.0.attn.linear": "linear",
    "talker.model.layers.0.self_attn.q_proj": "linear",
    "transformer.encoder.layers.0.self_attention.dense": "linear",
}


@pytest.mark.parametrize("module", KEPT)
def test_kept_by_default(module):
    role, shape = KEPT[module]
    decision = decide({module: shape}, INT8)[module]
    assert decision.scheme is None and decision.role == role and decision.reason


@pytest.mark.parametrize("module", QUANTIZED)
def test_quantized_by_default(module):
    decision = decide({module: BIG}, INT8)[module]
    assert decision.scheme is INT8 and decision.role == QUANTIZED[module] and decision.reason == ""


def test_an_encoder_that_hears_stays():
    name = "encoder.layers.0.ff1.up_proj"
    assert role_of(name, BIG, {"model_type": "granite_speech"}) == ("audio", "audio tower")
    assert role_of(name, BIG, {"model_type": "bart"}) == ("linear", "")


def test_towers_of_models_whose_names_are_others_text():
    hears, sees = {"model_type": "kimi_audio"}, {"model_type": "hunyuan_vl"}
    assert role_of("model.encoder.layers.0.fc1", BIG, hears)[0] == "audio"
    assert role_of("vit.layers.0.self_attn.q_proj", BIG, sees)[0] == "vision"
    assert role_of("model.layers.0.self_attn.q_proj", BIG, hears) == ("linear", "")


def test_a_model_that_only_hears_or_sees_is_no_tower():
    for model_type in ("audio-spectrogram-transformer", "data2vec-vision", "data2vec-audio"):
        name = model_type.replace("-", "_") + ".encoder.layer.0.attention.attention.query"
        assert role_of(name, BIG, {"model_type": model_type}) == ("linear", "")
        assert role_of(name, BIG, {"model_type": "llava"})[0] in ("vision", "audio")


def test_heads_that_some_models_call_otherwise():
    for model_type, head in (
        ("modernbert", "decoder"),
        ("distilbert", "vocab_projector"),
        ("xlnet", "lm_loss"),
    ):
        assert role_of(head, BIG, {"model_type": model_type})[0] == "head"
        assert role_of(head, BIG, {"model_type": "llama"}) == ("linear", "")


def test_mamba_layers_that_vllm_does_not_quantize_stay():
    for part in ("in", "x", "dt", "out"):
        assert role_of(f"model.layers.0.mamba.{part}_proj", BIG, {"model_type": "jamba"})[0] == "projection"
        assert role_of(f"model.layers.0.mamba.{part}_proj", BIG, {"model_type": "bamba"}) == ("linear", "")
    assert role_of("model.layers.0.feed_forward.up_proj", BIG, {"model_type": "jamba"}) == ("linear", "")


def test_what_vllm_builds_in_float_stays():
    """vLLM 0.32 and 0.33 refused GLM-5-Next in every format: its attention, latent or linear, has no scales there."""
    config, layer = {"model_type": "glm5_next"}, "model.language_model.layers.0"
    for part in ("q_a_proj", "o_proj", "f_b_proj", "indexer.wq_b"):
        role, reason = role_of(f"{layer}.self_attn.{part}", BIG, config)
        assert role == "projection" and "vLLM" in reason
        assert role_of(f"{layer}.self_attn.{part}", BIG, {"model_type": "glm4_moe"}) == ("linear", "")
    assert role_of(f"{layer}.mlp.experts.0.up_proj", BIG, config) == ("expert", "")
    # Qwen4-Exp's hyper-connections
    for name in (f"{layer}.attn_hyper_connection", "model.language_model.hyper_connection_mixer"):
        name += ".input_mix_weight_up"
        assert role_of(name, BIG, {"model_type": "qwen4_exp"})[0] == "projection"
        assert role_of(name, BIG, {"model_type": "qwen3_5_moe"}) == ("linear", "")


def test_what_a_models_own_code_reads_stays():
    for model_type, name in (
        ("seamless_m4t", "speech_encoder.adapter.layers.0.ffn.fc2"),
        ("rwkv", "blocks.0.feed_forward.value"),
        ("rwkv", "blocks.0.attention.output"),
        ("wavlm", "encoder.layers.0.attention.out_proj"),
        ("mobilebert", "cls.predictions.dense"),
        ("mamba", "backbone.layers.0.mixer.dt_proj"),
    ):
        assert role_of(name, BIG, {"model_type": model_type})[0] == "projection"
        assert role_of(name, BIG, {"model_type": "whisper"}) == ("linear", "")


def test_what_transformers_splits_while_loading_is_quantized():
    """It loads these so (fp8, and int8 since 5.23), and in float beside quantized ones not at all."""
    for model_type, name in (
        ("hrm_text", "model.L_module.layers.0.attn.gqkv_proj"),
        ("hrm_text", "model.L_module.layers.0.mlp.gate_up_proj"),
        ("dinov2", "encoder.layer.0.mlp.weights_in"),
        ("nomic_bert", "encoder.layers.0.attn.Wqkv"),
    ):
        assert role_of(name, BIG, {"model_type": model_type}) == ("linear", "")


def test_conv1d_models_store_the_transpose():
    for model_type, scheme in (("gpt2", None), ("gpt_neox", INT8)):
        found = decide({"h.0.attn.c_attn": BIG}, INT8, config={"model_type": model_type})
        assert found["h.0.attn.c_attn"].scheme is scheme


def test_what_the_source_left_in_float_stays():
    found = decide({"a.x": BIG, "a.y": BIG}, INT8, left_in_float={"a.y": "the source left it unquantized"})
    assert found["a.x"].scheme is INT8
    assert found["a.y"].reason == "the source left it unquantized"


def test_what_engines_want_in_float_is_not_meant_by_a_pattern():
    names = ("a.q_proj", "a.kv_b_proj", "a.o_proj")
    selection = Selection(overrides={"a.*": "fp8", "a.o_proj": "int8"})
    wanted = {"a.kv_b_proj": "used in float", "a.o_proj": "used in float"}
    found = decide(dict.fromkeys(names, BIG), INT8, selection, wanted_in_float=wanted)
    assert found["a.q_proj"].scheme is get_scheme("fp8")
    assert found["a.kv_b_proj"].scheme is None and found["a.kv_b_proj"].reason == "used in float"
    assert found["a.o_proj"].scheme is INT8, "named exactly"


def test_an_unknown_scheme_in_an_override_is_bad_input():
    with pytest.raises(InputError, match="unknown scheme 'fp9'"):
        decide({"a.b": BIG}, INT8, Selection(overrides={"a.b": "fp9"}))


def test_a_pattern_for_a_whole_layer_leaves_its_router():
    """What engines build without scales, such as a router, is quantized for who names nothing else."""
    names = (
        "layers.1.mlp.gate",
        "layers.1.mlp.experts.0.w1",
        "layers.1.attn.wo_a",
        "layers.0.mlp.gate",
        "lm_head",
    )
    for pattern in ("layers.1", "*layers.1.*", r"re:.*layers\.1\."):
        found = decide(dict.fromkeys(names, BIG), INT8, Selection(overrides={pattern: "fp8"}))
        assert found["layers.1.mlp.experts.0.w1"].scheme is get_scheme("fp8")
        assert found["layers.1.mlp.gate"].scheme is None and found["layers.1.mlp.gate"].role == "router"
        assert found["layers.1.attn.wo_a"].scheme is None
    for pattern in ("*.mlp.gate", "re:.*gate$"):
        found = decide(dict.fromkeys(names, BIG), INT8, Selection(overrides={pattern: "fp8"}))
        assert all(found[f"layers.{i}.mlp.gate"].scheme is get_scheme("fp8") for i in (0, 1))


def test_the_users_word_goes_before_the_rules():
    found = decide(
        {"lm_head": BIG, "model.x": BIG}, INT8, Selection(overrides={"lm_head": "fp8"}, ignore=("model.x",))
    )
    assert found["lm_head"].scheme is get_scheme("fp8") and found["lm_head"].reason == "override lm_head"
    assert found["model.x"].reason == "--ignore model.x"


@pytest.mark.parametrize(
    "members",
    [
        ("a.q_proj", "a.k_proj", "a.v_proj"),
        ("a.gate_proj", "a.up_proj"),
        ("a.w1", "a.w3"),
        ("a.c_fc_0", "a.c_fc_1"),  # EXAONE
        ("a.fc11", "a.fc12"),  # Nomic BERT
        ("a.q_a_proj", "a.kv_a_proj_with_mqa"),
        ("a.in_proj_qkv", "a.in_proj_z"),
        ("a.in_proj_b", "a.in_proj_a"),
        ("m.experts.0.gate_proj", "m.experts.7.down_proj", "m.experts.1.up_proj"),
    ],
)
def test_fused_members_follow_one_that_stays(members):
    assert len({fused_key(m) for m in members}) == 1
    for kept in members:
        found = decide(dict.fromkeys(members, BIG), INT8, Selection(ignore=(kept,)))
        assert all(d.scheme is None for d in found.values())
        others = [d.reason for m, d in found.items() if m != kept]
        assert all(kept.rpartition(".")[2] in r and "--ignore" in r for r in others)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("olmo_hybrid", "g_proj"), ("bailing_hybrid", "b_proj"), ("kimi_linear", "b_proj"), ("afmoe", "")],
)
def test_what_some_models_join_to_q_k_and_v(model_type, name):
    """A gate or beta that the source left in float kept engines from loading the rest as codes."""
    members = [f"a.{m}" for m in ("q_proj", "k_proj", "v_proj", "g_proj", "b_proj")]
    left = {"a.g_proj": "left", "a.b_proj": "left"}
    found = decide(
        dict.fromkeys(members, BIG), INT8, config={"model_type": model_type}, left_in_float=left
    )  # fmt: skip
    assert {m for m, d in found.items() if d.scheme} == (set() if name else {*members} - {*left})
    if name:
        assert found["a.q_proj"].reason == f"engines fuse it with {name}, which stays (left)"


@pytest.mark.parametrize("model_type", ["kimi_linear", "alice_ai"])
def test_what_is_too_narrow_for_blocks_beside_q_k_and_v(model_type):
    """vLLM joins as many rows as there are heads, and refused blocks for them: 0.32 and 0.33 all of Kimi-Linear's."""
    rows = {"q_proj": 256, "k_proj": 256, "v_proj": 256, "b_proj": 32, "f_a_proj": 128, "o_proj": 256}
    block, config = get_scheme("fp8-block"), {"model_type": model_type}
    for format, joined in (("compressed-tensors", get_scheme("fp8")), ("fp8", None)):
        shapes = {f"a.{name}": (n, 256) for name, n in rows.items()}
        found = decide(shapes, block, fits=get_format(format).refuse, config=config)
        assert {m: d.scheme for m, d in found.items()} == {**dict.fromkeys(shapes, joined), "a.o_proj": block}


def test_an_indexer_that_minimax_m3_joins_to_q_k_and_v():
    """vLLM's MiniMax-M3 took the indexer's BF16 for codes where `--ignore` named it alone."""
    members = [f"a.self_attn.{m}_proj" for m in ("q", "k", "v", "index_q", "index_k")]
    shapes = dict.fromkeys((*members, "a.self_attn.o_proj"), BIG)
    selection = Selection(ignore=("*.index_*",))
    found = decide(shapes, INT8, selection, config={"model_type": "minimax_m3_vl"})
    assert {m for m, d in found.items() if d.scheme} == {"a.self_attn.o_proj"}
    found = decide(shapes, INT8, selection, config={"model_type": "qwen3"})
    assert {m for m, d in found.items() if not d.scheme} == set(members[3:])


def test_a_gate_that_kimi_k3_joins_behind_keys_and_values():
    """vLLM 0.33 makes one matrix of q_a_proj, kv_a_proj_with_mqa and g_proj, and refused 576 rows of blocks in it."""
    shapes = {"a.q_a_proj": (1536, 256), "a.kv_a_proj_with_mqa": (576, 256), "a.g_proj": (512, 256)}
    for model_type, scheme in (("kimi_k3", get_scheme("fp8")), ("deepseek_v3", get_scheme("fp8-block"))):
        fits = get_format("compressed-tensors").refuse
        found = decide(shapes, get_scheme("fp8-block"), fits=fits, config={"model_type": model_type})
        assert [found[m].scheme for m in list(shapes)[:2]] == [scheme] * 2
        assert (found["a.g_proj"].scheme == scheme) and found["a.g_proj"].role == "linear"
    linear = [f"a.{m}_proj" for m in ("q", "k", "v", "g", "b", "f_a")]
    assert len({fused_key(m, "kimi_k3") for m in (*linear, *shapes)}) == 1


def test_a_gate_of_attention_that_one_model_joins_to_q_k_and_v():
    """Beam's, which has the name of an MLP's: vLLM 0.33 builds one matrix of the four."""
    members = [f"layers.0.self_attn.{m}" for m in ("q_proj", "k_proj", "v_proj", "gate_proj")]
    mlp = [f"layers.0.mlp.{m}" for m in ("gate_proj", "up_proj")]
    shapes = dict.fromkeys((*members, *mlp), BIG)
    found = decide(shapes, INT8, config={"model_type": "beam"}, left_in_float={members[-1]: "left"})
    assert {m for m, d in found.items() if d.scheme} == set(mlp)
    assert len({fused_key(m, "beam") for m in members}) == len({fused_key(m, "beam") for m in mlp}) == 1
    found = decide(shapes, INT8, config={"model_type": "llama"}, left_in_float={members[-1]: "left"})
    assert {m for m, d in found.items() if d.scheme} == {*members[:-1], *mlp}


@pytest.mark.parametrize("float_by", ["ignore", "source"])
@pytest.mark.parametrize("reverse", [False, True])
def test_of_fused_members_one_that_is_kept_as_found_decides(float_by, reverse):
    """The first one that stays decided, which is another in a model than on disk."""
    names = ["a.mlp.gate_proj", "a.mlp.up_proj"]
    selection = Selection(keep=("*.up_proj",), ignore=("*.gate_proj",) if float_by == "ignore" else ())
    left = {"a.mlp.gate_proj": "left"} if float_by == "source" else {}
    found = decide(
        dict.fromkeys(reversed(names) if reverse else names, BIG), INT8, selection, left_in_float=left
    )
    assert [(found[n].scheme, found[n].as_found) for n in names] == [(None, True)] * 2


def test_modules_of_different_parents_are_not_fused():
    assert fused_key("a.q_proj") != fused_key("b.k_proj")
    assert fused_key("a.o_proj") is None and fused_key("a.down_proj") is None
    # Qwen3-Next: in_proj_ba has few rows, no blocks, and is in float in the model's own FP8.
    assert fused_key("a.in_proj_qkvz") is None and fused_key("a.in_proj_ba") is None
    assert fused_key("m.shared_experts.gate_proj") != fused_key("m.experts.0.gate_proj")


def test_a_scheme_that_does_not_fit_is_replaced_for_the_whole_group():
    def fits(scheme, shape, fused):
        return "too odd" if scheme.name == "int8-block" and shape[0] == 100 else ""

    shapes = {"a.q_proj": BIG, "a.k_proj": (100, 256), "a.v_proj": BIG, "a.o_proj": BIG}
    found = decide(shapes, get_scheme("int8-block"), fits=fits)
    assert {m: d.scheme.name for m, d in found.items() if d.scheme} == {
        "a.q_proj": "int8", "a.k_proj": "int8", "a.v_proj": "int8", "a.o_proj": "int8-block",
    }  # fmt: skip
    assert found["a.q_proj"].reason == "too odd; a scale per channel instead"


def test_where_nothing_fits_it_is_kept_and_says_why():
    found = decide({"a.o_proj": BIG}, get_scheme("int8-block"), fits=lambda *a: "cannot be held")
    assert found["a.o_proj"].scheme is None and found["a.o_proj"].reason == "cannot be held"


def test_a_mamba_in_proj_has_parts_that_engines_divide():
    """vLLM refuses blocks of Granite 4's, whose last part has as many rows as there are heads."""
    fits = get_format("compressed-tensors").refuse
    block, channel = get_scheme("fp8-block"), get_scheme("fp8")
    for name in ("model.layers.0.mamba.in_proj", "backbone.layers.0.mixer.in_proj", "a.in_proj_ba"):
        found = decide({name: (2 * 512 + 256 + 48, 256)}, block, fits=fits)
        assert found[name].scheme == channel and "joined" in found[name].reason
        assert decide({name: (1280, 256)}, block, fits=fits)[name].scheme is block
    assert (
        decide({"layers.0.conv.in_proj": (1328, 256)}, block, fits=fits)["layers.0.conv.in_proj"].scheme
        is block
    )


@pytest.mark.parametrize(
    ("name", "rows", "config", "scheme"),
    [
        # vLLM refuses the first of each pair: its parts, or heads that it takes apart, end within a block
        ("attn.c_attn", 384, {"n_head": 4, "n_embd": 256, "multi_query": True}, "fp8"),
        ("attn.c_attn", 768, {"n_head": 2, "n_embd": 512, "multi_query": True}, "fp8-block"),
        ("qkv_proj", 448, {"num_attention_heads": 5, "num_key_value_heads": 1, "hidden_size": 320}, "fp8"),
        ("qkv_proj", 512, {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}, "fp8-block"),
        ("query_key_value", 768, {"model_type": "bloom", "n_head": 4, "hidden_size": 256}, "fp8"),
        ("query_key_value", 768, {"model_type": "bloom", "n_head": 2, "hidden_size": 256}, "fp8-block"),
        ("query_key_value", 768, {"model_type": "gpt_neox", "n_head": 4, "hidden_size": 256}, "fp8-block"),
        ("key_value", 512, {"model_type": "telechat", "n_head": 4, "hidden_size": 256}, "fp8"),
        ("qkv_proj", 512, {"text_config": {"n_heads": 6, "num_kv_heads": 1, "head_dim": 64}}, "fp8"),
        ("mlp.gate_up_proj", 384, {}, "fp8"),
        ("mlp.gate_up_proj", 512, {}, "fp8-block"),
        ("qkv_proj", 640, {"n_head": 4, "hidden_size": 256}, "fp8-block"),  # another layout than is known
    ],
)
def test_several_matrices_in_one_on_disk_have_parts_that_engines_divide(name, rows, config, scheme):
    module, fits = f"model.layers.0.{name}", get_format("compressed-tensors").refuse
    found = decide({module: (rows, 256)}, get_scheme("fp8-block"), fits=fits, config=config)[module]
    assert found.scheme == get_scheme(scheme)
    assert ("joined" in found.reason) == (scheme == "fp8")


def test_qwen3_next_in_fp8_keeps_its_gates_in_float_and_no_more():
    shapes = {"linear_attn.in_proj_qkvz": (512, 256), "linear_attn.in_proj_ba": (64, 256)}
    left = {"linear_attn.in_proj_ba": "the source left it unquantized"}
    assert {d.scheme for d in decide(shapes, INT8, left_in_float=left).values()} == {INT8, None}


def test_ragged_blocks_that_the_source_has_already_stay():
    block = get_scheme("fp8-block")
    shapes = {"a.gate_proj": (256, 128), "a.up_proj": (160, 128)}
    fits = lambda scheme, shape, fused: "ragged" if fused and scheme == block else ""  # noqa: E731
    new = decide(shapes, block, fits=fits)
    assert {d.scheme for d in new.values()} == {get_scheme("fp8")}
    carried = decide(shapes, block, fits=fits, already=dict.fromkeys(shapes, block.weights))
    assert {d.scheme for d in carried.values()} == {block}
    half = decide(shapes, block, fits=fits, already={"a.gate_proj": block.weights})
    assert {d.scheme for d in half.values()} == {get_scheme("fp8")}


@pytest.mark.parametrize(
    ("shapes", "scheme"),
    [
        ({"a.q_a_proj": (1536, 256), "a.kv_a_proj_with_mqa": (576, 256)}, "fp8-block"),  # DeepSeek-V3's
        ({"a.wq_a": (1536, 256), "a.wkv": (576, 256)}, "fp8-block"),
        (
            {"a.q_a_proj": (192, 256), "a.kv_a_proj_with_mqa": (576, 256)},
            "fp8",
        ),  # the second starts inside a block
        (
            {"a.q_proj": (256, 256), "a.k_proj": (128, 256), "a.v_proj": (192, 256)},
            "fp8",
        ),  # divided among devices
    ],
)
@pytest.mark.parametrize("format", ["compressed-tensors", "fp8"])
def test_the_last_of_what_engines_join_and_do_not_divide_may_have_ragged_blocks(shapes, scheme, format):
    found = decide(shapes, get_scheme("fp8-block"), fits=get_format(format).refuse)
    wanted = None if (scheme, format) == ("fp8", "fp8") else get_scheme(scheme)
    assert {d.scheme for d in found.values()} == {wanted}


@given(st.text(alphabet="abgw.013_", max_size=30), st.lists(st.integers(0, 64), max_size=4))
def test_every_name_has_a_role(module, shape):
    role, reason = role_of(module, tuple(shape), {})
    assert role and (reason or (len(shape) == 2 and min(shape) >= 16))
