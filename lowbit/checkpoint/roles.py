"""What a module is to its model: a Linear, an expert, or what stays as it is, told from its name and shape.

The first rule that applies decides, and its words are what `lowbit plan` prints.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from lowbit.checkpoint.fused_experts import why_fused
from lowbit.formats.joined import EXPERT


class Rule(NamedTuple):
    """A module whose dotted name matches is left as it is."""

    role: str
    pattern: re.Pattern[str]
    reason: str


def _last(*names: str) -> re.Pattern[str]:
    """The last component of a module's name is one of these."""
    return re.compile(rf"(^|.*\.)({'|'.join(names)})$")


def _inside(*names: str) -> re.Pattern[str]:
    """One of these is a component of the name."""
    return re.compile(rf"(^|.*\.)({'|'.join(names)})(\.|$)")


def _ahead(*names: str) -> re.Pattern[str]:
    """One of these is a component of the name before any number: a part of the whole model, not of a layer."""
    return re.compile(rf"^([^.\d][^.]*\.)*?({'|'.join(names)})(\.|$)")


KEEP_RULES = (
    Rule(
        "vision",
        _inside(
            "visual", "vision", "vision_tower", "vision_model", "vision_encoder", "image_encoder", "image_tower",
            "video_tower", "vision_adapter", "vision_projection",
            "multi_modal_projector", "mm_projector", "img_projector", "connector", "aligner",
            # Molmo, Ovis, Phi-3 and 4, Gemma 3n and 4, MiniCPM-V, DeepSeek-VL2 and -OCR, Keye, BLIP-2, ERNIE
            "vision_backbone", "visual_tokenizer", "vision_embed_tokens", "image_embed",
            "embed_vision", "vpm", "resampler", "projector", "sam_model", "mlp_AR", "language_projection",
            "resampler_model", "qformer",
            # Mistral's own format, Granite 4 Vision, Intern-S1-Pro
            "patch_merger", "layerwise_projectors", "spatial_projectors", "time_series",
        ),
        "vision tower",
    ),
    # Projectors of InternVL, Bailing and MiniCPM-V 4.6; DeepSeek-OCR-2's tower
    Rule("vision", re.compile(r"^(model\.)?(mlp1|linear_proj|merger|qwen2_model)\."), "vision tower"),
    Rule(
        "audio",
        _inside(
            "audio", "audio_tower", "audio_encoder", "audio_model", "audio_embed", "embed_audio", "audio_projector",
            "apm", "audio_projection_layer", "sound_encoder", "sound_projection", "token2wav", "code2wav",
            "vq_adaptor", "linear_proj_audio",
        ),
        "audio tower",
    ),
    Rule(
        "embedding",
        _last(
            r"embed_tokens(\.\d+)?", "embed_tokens_per_layer", "embed_positions", "embed_in", "embed", "embedding",
            "embeddings", "tok_embeddings", "word_embeddings", "position_embeddings", "token_type_embeddings", "wte",
            "wpe", "shared", "relative_attention_bias", "vte", "codebook",
        ),
        "embedding",
    ),
    Rule(
        "router",
        _inside("gate", "router", "shared_expert_gate", "gate_linear", "router_gate"),
        "router: it picks experts, and small errors there change which",
    ),
    Rule(
        "head",
        re.compile(
            # Also InternLM2's within InternVL, ChatGLM's, and OLMo's and Molmo's as first published
            r"^((language_model\.)?output|head|proj_out|(transformer\.)?output_layer|(model\.)?transformer\.ff_out)$"
            r"|(^|.*\.)(embed_out|score|classifier|qa_outputs|shared_head\.(head|output)|predictions\.decoder|codec_head|unembed)$"
            r"|(^|.*\.)\w*lm_heads?(\.|$)"
        ),
        "output head",
    ),
    Rule(
        "head",
        # Of classifiers, rerankers, reward models and embedders of each token
        _ahead(
            "(pre_)?classifier", "classification_head", "sequence_summary", "logits_proj",
            "score", "v_head", "(value|reward|rm)_head", "regression_layer",
            r"cls\.(predictions\.transform|seq_relationship)",
        ),
        "output head",
    ),
    Rule(
        "head",
        re.compile(
            r"^head\.|(^|.*\.)(pooler\.dense|text_model\.head)$"
            r"|^(model\.)?(linear|colbert_linear|sparse_linear|custom_text_proj|embedding_proj_layer|text_projection)$"
        ),
        "behind the last layer; engines keep it in float",
    ),
    Rule(
        "projection",
        # DeepSeek and most others, Qwen3-Next and 3.5, ERNIE, MiMo
        _last("eh_proj", r"mtp\.fc", r"mtp_linear_proj(\.\d+)?", r"mtp_layers\.\d+\.input_proj"),
        "multi-token prediction joins two streams here; engines keep it in float",
    ),
    Rule("projection", re.compile(r"^(model\.)?fc$"), "a draft model joins two streams here"),  # EAGLE
    Rule("projection", _inside("masked_embedding", "self_conditioning"), "engines keep it in float"),  # Gemma 4's
    Rule("projection", _last("weights_proj"), "weights of the sparse-attention indexer"),
    Rule("projection", _last(r"indexer\.wk"), "engines join it with weights_proj, and take INT8 codes for weights"),
    Rule(
        "projection",
        _last(r"compressor\.(indexer\.)?(wkv|wgate|kv_proj|gate_proj)"),
        "compresses keys and values, in float32",
    ),
    Rule("conv", _last("conv1d", "short_conv"), "convolution"),
    Rule(
        "grouped",
        _last("wo_a", "o_a_proj"),
        "its rows multiply groups of heads each, outside of what engines quantize",
    ),
    Rule("norm", re.compile(r".*(norm|ln_[0-9f])$", re.IGNORECASE), "norm"),
    Rule("adapter", _inside("lora_A", "lora_B"), "low-rank adapter: small, and nothing that engines quantize"),
    # Not of the role: where one is a Linear after all, engines must be told that it is in float.
    Rule(
        "other",
        _last(
            r"(\w+_)?(embed|emb|embedding|embedder)s?(_\d+)?(\.\d+)?", "embed_(global|timestep)", r"\w+_tokens?",
            r"\w+_embeds_layers?(\.\d+)?", "visual_embeddings_table", r"HashBucketCodepointEmbedder_\d+",
            r"rel_pos(_[xy])?_bias", "query_feat", "queries_features", "reference_points", "position_embedding_table",
            "embed_char", "pe_k", "(un)?embedding_projection",
        ),
        "an embedding by its name",
    ),
    Rule("other", _inside("ngram_embeddings"), "an embedding by its name"),  # LongCat-Flash, with its projections
)  # fmt: skip

# Towers, and what joins them to the text, by other names: `vision_resampler`, `vit_merger`, `whisper_encoder`
_TOWERS = (
    Rule("vision", _ahead(r"(\w+_)?(vision|visual|image|video)(_\w+)?", r"vit_\w+"), "vision tower"),
    Rule("audio", _ahead(r"(\w+_)?audio(_\w+)?", r"(\w+_)?whisper_\w+", "tts"), "audio tower"),
)

# Their `encoder` hears; of other models it reads text, and is quantized.
_HEARS = Rule("audio", re.compile(r"^(model\.)?(encoder|adapter)\."), "audio tower")
KEEP_RULES_OF = {
    **dict.fromkeys(("granite_speech", "granite_speech_plus", "kimi_audio", "step_audio_2"), _HEARS),
    "ctrl": Rule("embedding", re.compile(r"^(transformer\.)?w$"), "embedding"),
    # One weight in transformers' model, under two names
    "granite_speech5_ctc": Rule("head", re.compile(r"^(encoder\.out|ctc_head)$"), "output head"),
    "pp_doclayout_v3": Rule("head", _inside("enc_bbox_head", r"decoder\.bbox_embed"), "output head"),
    "hunyuan_vl": Rule("vision", _ahead("vit"), "vision tower"),
    "jamba": Rule(
        "projection",
        _last(r"mamba\.(in|x|dt|out)_proj"),
        "vLLM builds Jamba's Mamba layers without quantization",
    ),
    **dict.fromkeys(
        ("glm5_next", "glm5_next_text"),
        Rule("projection", _inside("self_attn"), "vLLM builds GLM-5-Next's attention without quantization"),
    ),
    **dict.fromkeys(
        ("qwen4_exp", "qwen4_exp_text"),
        Rule(
            "projection",
            _inside(r"\w*hyper_connection\w*"),
            "vLLM builds hyper-connections without quantization",
        ),
    ),
}
"""model_type → the rule that goes before `KEEP_RULES`."""

_CALLED = {
    "cls.predictions.decoder": "bert big_bird deberta deberta-v2 ernie fnet layoutlm lxmert megatron-bert mobilebert "
    "mra nomic_bert nystromformer roc_bert roformer squeezebert tapas visual_bert yoso",
    "lm_head.decoder": "bert-generation camembert esm gte ibert jina_embeddings_v3 longformer mpnet roberta "
    "roberta-prelayernorm xlm-roberta xlm-roberta-xl xmod",
    "lm_head.out_proj": "t5gemma t5gemma2",
    "proj_out": "whisper moonshine moonshine_streaming cohere_asr canary",
    "output_projection": "biogpt trocr",
    "generator_lm_head": "convbert electra",
    "decoder": "modernbert modernbert-decoder",
    "predictions.decoder": "albert",
    "text_decoder.cls.predictions.decoder": "blip",
    "vocab_projector": "distilbert",
    "decoder.output_projection": "fsmt",
    "text_decoder_postnet.lm_head": "speecht5",
    "lm_loss": "xlnet",
}
_TIED_HEADS = {model_type: head for head, types in _CALLED.items() for model_type in types.split()}
"""model_type → what transformers calls an output head that shares the embedding's weight, and so is in no shard, where
that is not `lm_head`."""

CASTS = "the model's own code casts activations to the dtype of this weight"
_CASTS_TO_CODES = f"{CASTS}, to that of codes too"
BY_TORCH = "torch's MultiheadAttention multiplies by this weight, past its module"
_MULTIPLIES = "the model's own code multiplies by this weight, past its module"
_READ_BY_CODE = (
    (_last(r"(DenseReluDense|mlp|expert_\d+)\.wo"), CASTS),  # T5, Switch, Pix2Struct
    (_last(r"bbox_attention\.k_(linear|proj)"), _MULTIPLIES),  # DETR
)
_READ_BY_CODE_OF = {
    **dict.fromkeys(("nllb-moe", "seamless_m4t", "seamless_m4t_v2"), (_last("fc2"), CASTS)),
    **dict.fromkeys(
        ("granite_speech5_ctc", "granite_speech5_encoder"), (_last("input_linear"), _CASTS_TO_CODES)
    ),
    **dict.fromkeys(("mamba", "falcon_mamba", "jamba"), (_last("dt_proj"), _MULTIPLIES)),
    "wavlm": (_last(r"attention\.(q|k|v|out)_proj"), _MULTIPLIES),
    "mobilebert": (_last(r"predictions\.dense"), _MULTIPLIES),
    "rwkv": (
        _last(r"attention\.output", r"feed_forward\.value"),
        "the model's own code divides this weight in place",
    ),
}

# Stored [in, out] by these models' own Conv1D class, while every format stores [out, in].
CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "gpt_neo_x_conv1d", "clvp"}
_CONV1D = _last("c_attn", "c_proj", "c_fc", "q_attn")

SMALLEST_SIDE = 16


_NUMBERS = re.compile(r"(?<=\.)\d+(?=\.|$)")


@lru_cache(4096)
def _kept_by_name(module: str, model_type: str) -> tuple[str, str] | None:
    """(role, reason) of a module that its name keeps. Its numbers are all 0: a hundred thousand experts are a few."""
    if reason := read_by_code(module, {"model_type": model_type}):
        return "projection", reason
    if module == _TIED_HEADS.get(model_type):  # untied, so that it is there
        return "head", "output head"
    own = KEEP_RULES_OF.get(model_type)
    # All of a model may lie below its own name: `audio_spectrogram_transformer`, `data2vec_vision`.
    inside = module.removeprefix(model_type.replace("-", "_") + ".")
    for rule in (*([own] if own else ()), *KEEP_RULES, *_TOWERS):
        if rule.pattern.match(inside if rule in _TOWERS else module):
            return rule.role, rule.reason
    return None


def role_of(module: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> tuple[str, str]:
    """(role, reason to keep it or "") of the module that owns a weight of that shape."""
    if kept := _kept_by_name(_NUMBERS.sub("0", module), str(config.get("model_type", ""))):
        return kept
    if reason := why_fused(module, shape):
        return "experts-3d", reason
    if len(shape) != 2:
        return ("norm" if len(shape) == 1 else "other"), "not a matrix"
    if config.get("model_type") in CONV1D_MODELS and _CONV1D.match(module):
        return "conv1d", "Conv1D stores [in, out]; formats hold [out, in] only"
    if min(shape) < SMALLEST_SIDE:
        return "linear", f"smaller than {SMALLEST_SIDE}: nothing to gain"
    return ("expert" if EXPERT.match(module) else "linear"), ""


def read_by_code(module: str, config: Mapping[str, Any]) -> str:
    """What transformers' code for the model does with the weight of a Linear beside multiplying by it; "" for nothing.

    Where it is `CASTS`, int8 codes are let be.
    """
    own = _READ_BY_CODE_OF.get(config.get("model_type", ""))
    known = (*_READ_BY_CODE, *([own] if own else ()))
    return next((reason for pattern, reason in known if pattern.match(module)), "")


def with_heads(
    ignored: Iterable[str], quantized: Collection[str], config: Mapping[str, Any]
) -> tuple[str, ...]:
    """Modules in float, and the output head by the names that transformers has for it in memory.

    A tied head is in no shard, whether config.json says that it is tied or not (Gemma's does not), and others have
    another name there (GPT-NeoX, LLaVA); but it is a Linear, of which a scale would be looked for.
    """
    names = {"lm_head", _TIED_HEADS.get(str(config.get("model_type")), "lm_head")}
    if any(m.rpartition(".")[2] in ("lm_head", "embed_out") for m in quantized):
        names.discard("lm_head")
    return (*ignored, *sorted(names.difference(ignored, quantized)))
