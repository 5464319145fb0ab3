"""KV-cache scales of a calibration, as a converted checkpoint holds them: engines use them by name and by config."""

from __future__ import annotations

import json

import pytest
import torch
from architectures import ARCHITECTURES
from compressed_tensors.quantization import QuantizationArgs
from safetensors.torch import load_file, save_file
from test_fused_experts import TEXT, model_of
from transformers import (
    BartConfig,
    BartForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import lowbit
from lowbit.calibration import calibrate as calibrating
from lowbit.calibration.kv_cache import KVCache, KVQuantizer, attentions, watched
from lowbit.calibration.layerwise import LayerwiseModel
from lowbit.calibration.run import RunOptions
from lowbit.calibration.source import Source
from lowbit.errors import InputError
from lowbit.evaluate.layerwise import _Stream, calibrated
from lowbit.formats import Layout, get_format

DENSE = {k: v for k, v in TEXT.items() if "expert" not in k and "moe" not in k}
WINDOWS = [torch.randint(3, 120, (24,), generator=torch.Generator().manual_seed(i)) for i in range(2)]
# What vLLM 0.32's CompressedTensorsKVCacheMethod asks of the scheme.
STRATEGIES = {"fp8": "tensor", "fp8-head": "attn_head", "int8": "tensor"}


def converted(model, root, kv_cache):
    torch.manual_seed(0)
    model.save_pretrained(root / "src")
    lowbit.calibrate(
        root / "src", root / "calib", "int8", method="absmax", data=WINDOWS, kv_cache=kv_cache, device="cpu"
    )
    plan = lowbit.plan(root / "src", "int8", calibration=root / "calib")
    lowbit.convert(root / "src", root / "out", "int8", calibration=root / "calib")
    config = json.loads((root / "out" / "config.json").read_text())
    return load_file(root / "out" / "model.safetensors"), config["quantization_config"], plan.warnings


@pytest.mark.parametrize("kind", STRATEGIES)
def test_the_config_says_how_the_cache_is_quantized(kind, tmp_path):
    tensors, config, warnings = converted(LlamaForCausalLM(LlamaConfig(**DENSE)), tmp_path, kind)
    args = QuantizationArgs.model_validate(config["kv_cache_scheme"])
    number = "int" if kind == "int8" else "float"
    assert (args.num_bits, args.type, args.symmetric, args.dynamic) == (8, number, True, False)
    assert args.strategy == STRATEGIES[kind]
    for i in range(2):
        for leaf in ("k_scale", "v_scale"):
            scale = tensors[f"model.layers.{i}.self_attn.{leaf}"]
            assert scale.shape == ((2,) if "head" in kind else (1,)) and scale.dtype == torch.float32
    assert any("INT8" in w for w in warnings) == (kind == "int8")


@pytest.mark.parametrize("kind", STRATEGIES)
def test_an_evaluation_rounds_keys_and_values(kind, tmp_path):
    """Of a converted checkpoint as of the calibration that it was made with."""
    converted(LlamaForCausalLM(LlamaConfig(**DENSE)), tmp_path, kind)
    laid_over = lowbit.measure(tmp_path / "src", WINDOWS, calibration=tmp_path / "calib", device="cpu")
    written = lowbit.measure(tmp_path / "out", WINDOWS, reference=tmp_path / "src", device="cpu")
    assert written.layer_errors == pytest.approx(laid_over.layer_errors, rel=1e-5)
    assert written.agreement.kl == pytest.approx(laid_over.agreement.kl, rel=1e-4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = None
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    without = lowbit.measure(tmp_path / "out", WINDOWS, device="cpu")
    assert without.agreement.nll != pytest.approx(written.agreement.nll, rel=1e-6)


def test_scales_lie_beside_the_projections_of_a_vision_language_model(tmp_path):
    """`model.language_model.layers.…`, where k_proj is: engines that map prefixes refuse any other name."""
    tensors, config, _ = converted(model_of("seeing"), tmp_path, "fp8")
    beside = {n.removesuffix("k_proj.weight") for n in tensors if n.endswith("self_attn.k_proj.weight")}
    assert {n.removesuffix("k_scale") for n in tensors if n.endswith(".k_scale")} == beside
    assert len(beside) == 1 and config["kv_cache_scheme"]["type"] == "float"


def test_attention_whose_projections_are_one_has_scales_too(tmp_path):
    """Its keys are the second part of qkv_proj's rows, turned by the rotary embedding."""
    model = Phi3ForCausalLM(Phi3Config(**DENSE, pad_token_id=0)).eval()
    tensors, config, _ = converted(model, tmp_path, "fp8")
    keys, values = [], []
    with torch.no_grad():
        for window in WINDOWS:
            cache = model(input_ids=window[None], use_cache=True).past_key_values
            keys.append([layer.keys.abs().amax() for layer in cache.layers])
            values.append([layer.values.abs().amax() for layer in cache.layers])
    for i in range(2):
        for leaf, seen in (("k_scale", keys), ("v_scale", values)):
            expected = torch.stack([of[i] for of in seen]).amax() / 448
            found = tensors[f"model.layers.{i}.self_attn.{leaf}"]
            # The second layer's came through the first one's INT8 weights.
            torch.testing.assert_close(found, expected[None], rtol=(1e-5, 0.01)[i], atol=0)
    assert config["kv_cache_scheme"]["num_bits"] == 8


def test_linear_attention_has_no_cache(tmp_path):
    """MiniMax's keeps a state, and makes its keys by a qkv_proj too."""
    config = MiniMaxConfig(**TEXT, layer_types=["linear_attention", "full_attention"], block_size=16)
    tensors, _, _ = converted(MiniMaxForCausalLM(config), tmp_path, "fp8")
    assert [n for n in tensors if n.endswith(".k_scale")] == ["model.layers.1.self_attn.k_scale"]


def test_attention_that_nothing_calls_has_no_scales(tmp_path):
    """BART's decoder alone attends to no encoder."""
    config = BartConfig(
        vocab_size=128, d_model=64, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=96,
        max_position_embeddings=64, is_encoder_decoder=False,
    )  # fmt: skip
    tensors, _, _ = converted(BartForCausalLM(config), tmp_path, "fp8")
    found = {n for n in tensors if n.endswith("k_scale")}
    assert found == {f"model.decoder.layers.{i}.self_attn.k_scale" for i in range(2)}


def test_latent_attention_has_no_keys_to_calibrate(tmp_path):
    heads = {k: v for k, v in DENSE.items() if k not in ("head_dim", "num_key_value_heads")}
    config = DeepseekV3Config(
        **heads, num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16,
        v_head_dim=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=32,
    )  # fmt: skip
    with pytest.raises(InputError, match="k_proj or qkv_proj"):
        converted(DeepseekV3ForCausalLM(config), tmp_path, "fp8")


@pytest.mark.parametrize(
    ("name", "found"), [("gpt_neox", "query_key_value"), ("mamba2", "in_proj"), ("deepseek_v3", "kv_b_proj")]
)
def test_only_models_with_latent_attention_are_said_to_have_it(name, found, tmp_path):
    with pytest.raises(InputError, match="k_proj or qkv_proj") as error:
        converted(ARCHITECTURES[name](), tmp_path, "fp8")
    assert found in str(error.value) and ("latent" in str(error.value)) == (name == "deepseek_v3")


@pytest.mark.parametrize("method", ["gptq", "mse", "smoothquant", "best"])
def test_scales_that_the_source_has_round_while_it_is_calibrated(tmp_path, monkeypatch, method):
    """A conversion carries them. `eval --calibration` went without, layers saw states that no engine gives them, and
    what moved through values left them with scales of others."""
    torch.manual_seed(0)
    converted(LlamaForCausalLM(LlamaConfig(**DENSE, initializer_range=0.2)), tmp_path, "fp8")
    source, seen = tmp_path / "out", []
    by_itself = calibrating.calibrate_layer

    def look(run, index, **more):
        seen.append([h.clone() for h in run.cache])
        return by_itself(run, index, **more)

    monkeypatch.setattr(calibrating, "calibrate_layer", look)
    found = lowbit.calibrate(
        source, tmp_path / "again", "int8", method=method, data=WINDOWS, device="cpu",
        options=RunOptions(batch_size=2, min_tokens=8),
    )  # fmt: skip
    lowbit.convert(source, tmp_path / "more", "int8", calibration=found)
    written, overlaid = (
        lowbit.measure(out, WINDOWS, reference=source, calibration=c, device="cpu").to_dict()
        for out, c in ((tmp_path / "more", None), (source, found))
    )
    assert overlaid["kl"] == pytest.approx(written["kl"], rel=1e-4)
    stream = _Stream.start(calibrated(source, found), calibrating.make_batches(WINDOWS, 2), 1 << 30)
    stream.advance(0)
    for a, b in zip(seen[1], stream.cache, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    moved = [n for report in found.layers.values() for n in report.get("smoothing", {})]
    assert not any("o_proj" in n for n in moved) and bool(moved) == (method in ("smoothquant", "best"))
    if method == "best":  # the residual stream is rotated, the heads' values are not
        before, after = (
            LayerwiseModel(Source(d)).load(0).self_attn.v_proj.weight for d in (source, tmp_path / "more")
        )
        gram = before @ before.T
        assert (after @ after.T - gram).norm() < 0.02 * gram.norm()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_watching_a_whole_model_changes_nothing_else(implementation):
    """transformers makes no mask, not even of the sliding window, for a function of attention that it does not know."""
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**DENSE, sliding_window=8)).eval()
    model.set_attn_implementation(implementation)
    seen: list[str] = []
    hooks = {n: lambda k, v, n=n: (seen.append(n), (k, v))[1] for n, _ in attentions(model)}
    with torch.no_grad():
        expected = model(input_ids=WINDOWS[0][None]).logits
        with watched(model, hooks):
            found = model(input_ids=WINDOWS[0][None]).logits
        again = model(input_ids=WINDOWS[0][None]).logits
    assert seen == list(hooks) and len(seen) == 2
    assert torch.equal(found, expected) and torch.equal(again, expected)


def test_each_head_of_keys_and_values_is_rounded_by_its_own_scale():
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 1, 2, 5, 8, generator=generator)
    for dtype, largest in (("int8", 127), ("e4m3fn", 448)):
        for scales in (([0.02], [0.005]), ([0.02, 0.3], [0.005, 0.01])):
            cache = KVCache(dtype=dtype, each="head" if len(scales[0]) == 2 else "layer")
            found = KVQuantizer(cache, *map(torch.tensor, scales))(key, value)
            for x, scale, rounded in zip((key, value), scales, found, strict=True):
                for head in range(2):
                    one = scale[head % len(scale)]
                    codes = (x[:, head] / one).clamp(-largest, largest)
                    codes = codes.round() if dtype == "int8" else codes.to(torch.float8_e4m3fn).float()
                    torch.testing.assert_close(rounded[:, head], codes * one)


def test_what_a_config_says_of_the_cache():
    said = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    for change, expected in (
        ({}, KVCache(dtype="e4m3fn")),
        ({"type": "int", "strategy": "attn_head"}, KVCache(dtype="int8", each="head")),
        ({"strategy": "token"}, None),
        ({"num_bits": 4}, None),
        ({"type": "other"}, None),
    ):
        config = {"quantization_config": {"kv_cache_scheme": said | change}}
        assert KVCache.of_config(config) == expected
    assert KVCache.of_config({"quantization_config": {"kv_cache_scheme": "static"}}) == KVCache(
        dtype="e4m3fn"
    )
    assert KVCache.of_config({"quantization_config": {"kv_cache_scheme": None}}) is None
    assert KVCache.parse("fp8-head") == KVCache(dtype="e4m3fn", each="head")
    assert KVCache.parse("int8-channel") == KVCache(dtype="int8", each="channel")
    ascend = {"quant_method": "ascend", "kv_cache_type": "C8"}
    assert KVCache.of_config({"quantization_config": ascend}) == KVCache.parse("int8-channel")
    assert KVCache.of_config({"quantization_config": ascend | {"kv_cache_type": "FLOAT"}}) is None
    for wrong in ("fp8-heads", "fp8-channel", "fp4", ""):
        with pytest.raises(InputError, match="fp8, int8, fp8-head, int8-head or int8-channel, found"):
            KVCache.parse(wrong)


# --- a cache of INT8 with a scale for each channel: msModelSlim's, `kv_cache_type` C8 ---------------


def description_of(root):
    return json.loads((root / "quant_model_description.json").read_text())


def for_ascend(root, *, model=None, kv_cache="int8-channel"):
    """What a model of two layers with two KV heads of 16 channels becomes, and its float model."""
    torch.manual_seed(0)
    model = model or LlamaForCausalLM(LlamaConfig(**DENSE)).eval()
    model.save_pretrained(root / "src")
    lowbit.calibrate(root / "src", root / "calib", "int8", method="absmax", data=WINDOWS, kv_cache=kv_cache)
    lowbit.convert(root / "src", root / "out", calibration=root / "calib", format="ascend")
    return load_file(root / "out" / "model.safetensors"), model


def test_each_channel_of_keys_and_values_has_a_scale(tmp_path):
    tensors, model = for_ascend(tmp_path)
    caches = [model(input_ids=window[None], use_cache=True).past_key_values for window in WINDOWS]
    for leaf, kept in (("k_proj", "keys"), ("v_proj", "values")):
        largest = torch.stack([getattr(c.layers[0], kept)[0].abs().amax(1) for c in caches]).amax(0)
        scale = tensors[f"model.layers.0.self_attn.{leaf}.kv_cache_scale"]
        torch.testing.assert_close(scale, largest.reshape(-1) / 127, rtol=2**-7, atol=0)
        assert (scale * 127.001 >= largest.reshape(-1)).all(), "nothing saturates"
        assert torch.equal(scale, scale.bfloat16().float()), "as engines keep it"
        for i in range(2):
            zeros = tensors[f"model.layers.{i}.self_attn.{leaf}.kv_cache_offset"]
            assert zeros.shape == scale.shape and zeros.dtype == torch.float32 and not zeros.any()
    description = description_of(tmp_path / "out")
    assert description["kv_cache_type"] == "C8" and description["model_quant_type"] == "W8A8_DYNAMIC"
    of_cache = {n for n in tensors if ".kv_cache_" in n}
    assert len(of_cache) == 8 and {n for n, kind in description.items() if kind == "C8"} == {
        *of_cache,
        "kv_cache_type",
    }
    assert not [n for n in tensors if n.endswith(("k_scale", "v_scale"))]
    assert lowbit.verify(tmp_path / "out", tmp_path / "src").ok


def test_an_evaluation_rounds_each_channel(tmp_path):
    for_ascend(tmp_path)
    laid_over = lowbit.measure(tmp_path / "src", WINDOWS, calibration=tmp_path / "calib")
    written = lowbit.measure(tmp_path / "out", WINDOWS, reference=tmp_path / "src")
    assert written.layer_errors == pytest.approx(laid_over.layer_errors, rel=1e-5)
    description = description_of(tmp_path / "out")
    del description["kv_cache_type"]
    for name in [n for n, kind in description.items() if kind == "C8"]:
        description[name] = "FLOAT"
    (tmp_path / "out" / "quant_model_description.json").write_text(json.dumps(description))
    without = lowbit.measure(tmp_path / "out", WINDOWS)
    assert without.agreement.nll != pytest.approx(written.agreement.nll, rel=1e-6)


def test_channels_are_rounded_by_their_own_scales():
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 3, 2, 5, 8, generator=generator)
    scales = torch.rand(2, 16, generator=generator) * 0.05 + 1e-3
    found = KVQuantizer(KVCache.parse("int8-channel"), *scales)(key, value)
    for x, scale, rounded in zip((key, value), scales, found, strict=True):
        column = scale.double().view(2, 1, 8)
        codes = (x.float() / scale.view(2, 1, 8)).round().clamp(-127, 127)
        torch.testing.assert_close(rounded.double(), codes * column, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("config", "model", "loads"),
    [(LlamaConfig, LlamaForCausalLM, False), (Qwen3Config, Qwen3ForCausalLM, True)],
)
def test_engines_that_do_not_load_it_are_named_before(config, model, loads, tmp_path):
    for_ascend(tmp_path, model=model(config(**DENSE)).eval())
    plan = lowbit.plan(tmp_path / "src", calibration=tmp_path / "calib", format="ascend")
    assert any("Qwen3, GLM-4.5 and MiniMax-M2 alone" in w for w in plan.warnings) != loads


def test_a_checkpoint_with_such_a_cache_is_converted_further(tmp_path):
    """As it is to the same format; to others without the scales, which they do not hold."""
    tensors, _ = for_ascend(tmp_path)
    name = "model.layers.1.self_attn.k_proj.kv_cache_offset"
    tensors[name] = tensors[name] + 3  # as msModelSlim has it for ranges that are not symmetric
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    (tmp_path / "out" / "lowbit_manifest.json").unlink()
    lowbit.convert(tmp_path / "out", tmp_path / "again", "int8", format="ascend", ignore=["*.0.*.o_proj"])
    again = load_file(tmp_path / "again" / "model.safetensors")
    of_cache = [n for n in tensors if ".kv_cache_" in n]
    assert all(torch.equal(again[n], tensors[n]) for n in of_cache)
    assert description_of(tmp_path / "again")["kv_cache_type"] == "C8"
    plan = lowbit.plan(tmp_path / "out", "int8")
    assert any(w.startswith("8 scales of a quantized KV cache") for w in plan.warnings)
    assert not [n for shard in plan.shards for n in shard.names if "kv_cache" in n]
    with pytest.raises(InputError, match=r"kv_cache_offset: expected zero points of 0"):
        lowbit.measure(tmp_path / "out", WINDOWS)
    found = lowbit.inspect(tmp_path / "out")
    assert found.parameters == lowbit.inspect(tmp_path / "src").parameters
    logits = lowbit.load(tmp_path / "out")(WINDOWS[0][None]).logits
    assert logits.isfinite().all()


def test_a_new_calibration_replaces_scales_and_zero_points(tmp_path):
    tensors, _ = for_ascend(tmp_path)
    for name in [n for n in tensors if n.endswith("kv_cache_scale")]:
        tensors[name] *= 2
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    (tmp_path / "out" / "lowbit_manifest.json").unlink()
    lowbit.calibrate(
        tmp_path / "out", tmp_path / "new", "int8", method="absmax", data=WINDOWS, kv_cache="int8-channel"
    )
    lowbit.convert(tmp_path / "out", tmp_path / "again", calibration=tmp_path / "new", format="ascend")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    for name in [n for n in tensors if n.endswith("kv_cache_scale")]:
        torch.testing.assert_close(again[name], tensors[name] / 2, rtol=0.02, atol=0)


def test_scales_of_another_cache_do_not_become_those_of_int8(tmp_path):
    """A source's FP8 cache, for one."""
    converted(LlamaForCausalLM(LlamaConfig(**DENSE)), tmp_path, "fp8")
    plan = lowbit.plan(tmp_path / "out", "int8", format="ascend")
    assert any(w.startswith("4 scales of a quantized KV cache") for w in plan.warnings)
    assert not [n for shard in plan.shards for n in shard.names if n.endswith(("k_scale", "v_scale"))]


@pytest.mark.parametrize(
    ("kind", "target", "message"),
    [
        (
            "int8-channel",
            "compressed-tensors",
            "those of channels in the calibration; .*--format ascend",
        ),
        ("int8-head", "ascend", "calibrate with --kv-cache int8-channel"),
        ("fp8", "ascend", "calibrate with --kv-cache int8-channel"),
    ],
)
def test_caches_that_a_format_does_not_hold(kind, target, message, tmp_path):
    LlamaForCausalLM(LlamaConfig(**DENSE)).save_pretrained(tmp_path / "src")
    lowbit.calibrate(
        tmp_path / "src", tmp_path / "calib", "int8", method="absmax", data=WINDOWS, kv_cache=kind
    )
    with pytest.raises(InputError, match=message):
        lowbit.plan(tmp_path / "src", calibration=tmp_path / "calib", format=target)


@pytest.mark.parametrize("target", ["fp8", "sglang"])
@pytest.mark.parametrize("kind", ["int8", "int8-head", "int8-channel", "fp8"])
def test_formats_whose_caches_are_of_fp8(kind, target):
    layout = Layout(modules={}, ignored=(), kv_cache=KVCache.parse(kind).stored)
    if kind == "fp8":
        assert get_format(target).config(layout)["quant_method"]
        return
    with pytest.raises(InputError, match="calibrate with --kv-cache fp8"):
        get_format(target).config(layout)
