"""One layer at a time gives the logits of the whole model, and transforms leave them alone."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.models.llama import modeling_llama
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3_moe import modeling_qwen3_moe

from lowbit.calibration import fold, layer
from lowbit.calibration.activations import ActivationCache
from lowbit.calibration.graph import trace
from lowbit.calibration.layerwise import LayerwiseModel, find_layers
from lowbit.calibration.methods import Method
from lowbit.calibration.rotate_model import rotate_outside
from lowbit.calibration.rotation import make_rotation
from lowbit.calibration.simulate import ActivationQuantizer, attach
from lowbit.calibration.source import Source
from lowbit.errors import InputError
from lowbit.evaluate import layerwise as evaluation
from lowbit.evaluate.layerwise import plain, rounded
from lowbit.scheme import get_scheme

MODELS = ("llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma2")


@pytest.fixture(autouse=True)
def double_everywhere(monkeypatch):
    """transformers' RMSNorm and routers compute in float32 whatever comes in, which would hide what is checked here."""

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    for module in (modeling_llama.LlamaRMSNorm, modeling_qwen2.Qwen2RMSNorm, modeling_qwen3.Qwen3RMSNorm,
                   modeling_qwen3_moe.Qwen3MoeRMSNorm, modeling_mixtral.MixtralRMSNorm):  # fmt: skip
        monkeypatch.setattr(module, "forward", forward)

    def route(self, x):
        logits = torch.nn.functional.linear(x.reshape(-1, self.hidden_dim), self.weight)
        top, index = torch.topk(logits.softmax(-1), self.top_k, dim=-1)
        if getattr(self, "norm_topk_prob", True):
            top = top / top.sum(-1, keepdim=True)
        return logits, top, index

    for router in (modeling_qwen3_moe.Qwen3MoeTopKRouter, modeling_mixtral.MixtralTopKRouter):
        monkeypatch.setattr(router, "forward", route)


def whole_logits(path, ids, dtype=torch.float64) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, experts_implementation="eager").eval()
    with torch.no_grad():
        return model(ids).logits


def graph_of(model: LayerwiseModel, module, index: int, hidden, kwargs):
    return trace(module, lambda m: model.run(m, index, hidden, kwargs), hidden.shape[-1], model.config)


@pytest.mark.parametrize("name", MODELS)
def test_layerwise_logits_are_those_of_the_whole_model(checkpoints, windows, name):
    ids = torch.stack(windows[:2])
    model = LayerwiseModel(Source(checkpoints[name]), dtype=torch.float64)
    call = model.embed(ids)
    hidden = call.hidden
    for index in range(len(model)):
        hidden = model.run(model.load(index), index, hidden, call.kwargs[index])
    expected = whole_logits(checkpoints[name], ids)
    # Experts are summed in another order than transformers' fused ones.
    assert torch.allclose(model.head(hidden), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "qwen3_moe", "mixtral"])
@pytest.mark.parametrize("transform", ["rotation", "orthogonal", "heads", "online", "norm", "pairs"])
def test_transforms_leave_float64_logits_unchanged(checkpoints, windows, name, transform):
    """To 1e-9, through every layer, the embeddings and the head."""
    ids = torch.stack(windows[:2])
    model = LayerwiseModel(Source(checkpoints[name]), dtype=torch.float64)
    rotation = None
    if transform in ("rotation", "orthogonal"):
        kind = "hadamard" if transform == "rotation" else "orthogonal"
        rotation = make_rotation(48, kind, seed=3)
        rotate_outside(model, rotation, torch.float32)
    method = Method(
        name="t", rotate_heads=transform == "heads", online_hadamard=transform == "online",
    )  # fmt: skip
    call = model.embed(ids)
    hidden = call.hidden
    generator = torch.Generator().manual_seed(1)
    changes = 0
    for index in range(len(model)):
        module = model.load(index)
        graph = graph_of(model, module, index, hidden, call.kwargs[index])
        before = {n: p.clone() for n, p in module.named_parameters()}
        layer.transform(module, graph, method, rotation)
        if transform == "norm":
            for norm in graph.norms:
                width = module.get_submodule(norm.name).weight.shape[0]
                fold.scale_norm(module, norm, torch.rand(width, generator=generator).double() + 0.5)
        if transform == "pairs":
            for pair in graph.pairs:
                width = module.get_submodule(pair.first).weight.shape[0]
                fold.scale_pair(module, pair, torch.rand(width, generator=generator).double() + 0.5)
        changes += sum(not torch.equal(before[n], p) for n, p in module.named_parameters())
        online = layer.online_modules(module, graph) if transform == "online" else []
        detach = attach(module, {n: ActivationQuantizer(None, hadamard=True) for n in online})
        hidden = model.run(module, index, hidden, call.kwargs[index])
        detach()
    assert changes >= len(model)  # a transform that does nothing is no test
    logits, expected = model.head(hidden), whole_logits(checkpoints[name], ids)
    assert float((logits - expected).abs().max()) < 1e-9 * float(expected.abs().max())


def test_a_head_of_its_own_is_not_tied_whatever_config_json_says(tmp_path, windows):
    """Nor does transformers tie two that differ."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=64,
        )
    )  # fmt: skip
    model.config.tie_word_embeddings = True
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    model.config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    ids = windows[0][None] % 64
    want = whole_logits(tmp_path, ids)
    layered = LayerwiseModel(Source(tmp_path), dtype=torch.float64)
    call = layered.embed(ids)
    got = layered.head(layered.run(layered.load(0), 0, call.hidden, call.kwargs[0]))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["whisper", "bart"])
def test_a_decoder_that_goes_by_an_encoder_is_refused(kind, tmp_path):
    """Its decoder alone ran: a perplexity, and scales, of text without the sound that it is about."""
    sizes = {
        "vocab_size": 128, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "pad_token_id": 0,
        "decoder_start_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": 2, "bos_token_id": 1,
    }  # fmt: skip
    if kind == "whisper":
        sizes.pop("forced_eos_token_id")
        model = WhisperForConditionalGeneration(WhisperConfig(**sizes))
    else:
        model = BartForConditionalGeneration(BartConfig(**sizes))
    model.save_pretrained(tmp_path / kind)
    with pytest.raises(InputError, match=f"found '{kind}', whose decoder goes by what an encoder has read"):
        LayerwiseModel(Source(tmp_path / kind))


def test_a_residual_stream_that_cannot_be_rotated_is_refused(checkpoints, windows):
    model = LayerwiseModel(Source(checkpoints["gemma2"]), dtype=torch.float64)
    call = model.embed(torch.stack(windows[:1]))
    module = model.load(0)
    graph = graph_of(model, module, 0, call.hidden, call.kwargs[0])
    assert "added to the residual stream" in graph.rotation_refusal
    with pytest.raises(ValueError, match="without rotation"):
        fold.rotate_residual(module, graph, make_rotation(48, "hadamard", 0))


def test_the_graph_of_a_layer_is_what_the_architecture_says(checkpoints, windows):
    model = LayerwiseModel(Source(checkpoints["qwen3_moe"]), dtype=torch.float64)
    call = model.embed(torch.stack(windows[:1]))
    module = model.load(1)
    graph = graph_of(model, module, 1, call.hidden, call.kwargs[1])
    readers = {n.name: set(n.readers) for n in graph.norms}
    assert readers["input_layernorm"] == {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
    experts = {f"mlp.experts.{i}.{p}_proj" for i in range(4) for p in ("gate", "up")}
    assert readers["post_attention_layernorm"] == {"mlp.gate", *experts}
    assert set(graph.writers) == {"self_attn.o_proj", *(f"mlp.experts.{i}.down_proj" for i in range(4))}
    assert {len(g) for g in graph.groups if "self_attn.q_proj" in g} == {3}


def test_what_has_another_width_writes_no_residual_stream():
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.o_proj, self.out_proj = nn.Linear(8, 8), nn.Linear(8, 4)  # the second of a router

        def forward(self, x):
            return x + self.o_proj(x) * self.out_proj(x).softmax(-1).amax(-1, keepdim=True)

    x = torch.randn(1, 3, 8)
    assert trace(Layer(), lambda m: m(x), 8, None).writers == ("o_proj",)


def test_layers_of_the_decoder_itself_go_before_those_of_its_towers():
    """Phi-4 multimodal holds its towers in its decoder."""

    class Body(nn.Module):
        def __init__(self, count: int, tower: nn.Module | None = None) -> None:
            super().__init__()
            self.tower, self.layers = tower, nn.ModuleList(nn.Linear(2, 2) for _ in range(count))

    model = nn.Module()
    model.model = Body(2, tower=Body(3))
    assert find_layers(model, model.model) == ("model.layers", model.model.layers)


def test_activation_cache_spills_and_reads_back(tmp_path):
    cache = ActivationCache(1000, tmp_path)
    items = [torch.randn(10, 20) for _ in range(4)]  # 800 bytes each: one fits
    for item in items:
        cache.append(item)
    assert cache.bytes_in_memory == 800 and cache.bytes_spilled == 2400
    cache.replace(3, items[0] * 2)
    assert torch.equal(cache[2], items[2]) and torch.equal(cache[3], items[0] * 2)
    with pytest.raises(ValueError, match="expected shape"):
        cache.replace(0, torch.zeros(3))
    cache.close()
    assert not list(tmp_path.iterdir())


def test_what_is_held_keeps_nothing_else_in_memory(tmp_path):
    cache, whole = ActivationCache(1000, tmp_path), torch.randn(4, 50, 100)
    held = cache.hold(whole[:, 3, :10])
    assert torch.equal(held, whole[:, 3, :10]) and held.untyped_storage().nbytes() == 160
    cache.append(whole[0, :, 2])
    assert torch.equal(cache[0], whole[0, :, 2]) and cache.bytes_in_memory == 360
    cache.close()


def test_a_block_fp8_checkpoint_is_decoded(checkpoints, windows, tmp_path):
    import json
    import shutil

    from safetensors.torch import load_file, save_file

    from lowbit.granularity import PerBlock
    from lowbit.quantize import quantize
    from lowbit.scheme import get_scheme

    spec = get_scheme("fp8-block").weights
    tensors = load_file(checkpoints["qwen3"] / "model.safetensors")
    out, expected = {}, {}
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and "layers" in name:
            q = quantize(tensor, spec)
            assert q.spec.granularity == PerBlock(128, 128)
            out[name], out[name + "_scale_inv"] = q.codes, q.scale
            expected[name] = q.dequantize()
        else:
            out[name] = tensor
    shutil.copytree(checkpoints["qwen3"], tmp_path / "fp8")
    save_file(out, tmp_path / "fp8" / "model.safetensors")
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
    model = LayerwiseModel(Source(tmp_path / "fp8"))
    module = model.load(0)
    found = module.get_submodule("mlp.down_proj").weight
    assert torch.equal(found, expected["model.layers.0.mlp.down_proj.weight"])
    del out["model.layers.1.mlp.down_proj.weight_scale_inv"]
    save_file(out, tmp_path / "fp8" / "model.safetensors")
    with pytest.raises(ValueError, match=r"expected a scale named .* found none in any shard"):
        Source(tmp_path / "fp8")


def test_an_evaluation_holds_few_logits_at_a_time(checkpoints, windows, monkeypatch):
    """Gemma 3's of 4 windows of 2,048 tokens are 8 GB, of each model."""
    found, sizes, head = [], [], LayerwiseModel.head

    def seen(self: LayerwiseModel, hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(hidden.shape[0] * hidden.shape[1] * 128)
        return head(self, hidden)

    monkeypatch.setattr(LayerwiseModel, "head", seen)
    for limit in (1 << 26, 128 * 4 * 10):
        monkeypatch.setattr(evaluation, "LOGITS", limit)
        sizes.clear()
        sides = (rounded(checkpoints["qwen3"], get_scheme("int8")), plain(checkpoints["qwen3"]))
        report = evaluation.evaluate(sides[0], windows[:6], sides[1])
        assert max(sizes) <= limit
        found.append(report.agreement.to_dict())
    assert found[0]["tokens"] == 6 * 47 and found[1] == pytest.approx(found[0], rel=1e-5)
