"""quantize_model: which modules, what is said about the others, and how much memory it takes."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys

import pytest
import torch
import transformers
from accelerate import Accelerator
from nn_reference import build, inputs, logits, tiny
from safetensors.torch import load_file, load_model, save_model
from torch import nn
from torch.nn.utils import prune

import lowbit
from lowbit.checkpoint.opening import open_checkpoint
from lowbit.errors import InputError
from lowbit.formats import read
from lowbit.nn import QuantExperts, QuantLinear, float_activations, quantize_model


class Plain(nn.Module):
    """Not a transformers model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.block = nn.ModuleDict(
            {"q_proj": nn.Linear(64, 64), "k_proj": nn.Linear(64, 64), "v_proj": nn.Linear(64, 8)}
        )
        self.attention = nn.MultiheadAttention(64, 4)
        self.mlp = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))
        self.again = self.mlp[2]
        self.norm = nn.LayerNorm(64)
        self.readout = nn.Linear(64, 50, bias=False)
        self.readout.weight = self.embed.weight
        self.lm_head = nn.Linear(64, 50)


def test_a_plain_model():
    model = Plain()
    same = quantize_model(model, "fp8")
    assert same is model
    report = model.quantization_report
    assert set(report.quantized) == {"mlp.0", "mlp.2", "again"}
    assert model.again is model.mlp[2]
    assert report.kept["lm_head"] == "output head"
    assert report.kept["embed"] == "embedding"
    assert "tied to embed" in report.kept["readout"]
    assert "others may read" in report.kept["attention.out_proj"]
    # One member of a fused group is too small, so all stay.
    assert "smaller than 16" in report.kept["block.v_proj"]
    assert "engines fuse it with v_proj" in report.kept["block.q_proj"]
    assert report.bytes_after < report.bytes_before
    assert "3 fp8" in str(report)
    x = torch.randn(5, 64)
    assert model.mlp(x).shape == (5, 64)


def test_a_linear_alone():
    linear = nn.Linear(64, 32)
    quant = quantize_model(linear, "int8")
    assert isinstance(quant, QuantLinear)
    assert quant.quantization_report.quantized == {"": "int8"}


def test_patterns():
    model = quantize_model(
        build("llama"),
        "int8",
        ignore=["model.layers.0.mlp", "re:.*o_proj"],
        overrides={"*.self_attn.*": "fp8", "nothing": "int8"},
    )
    kinds = {n: m.scheme.name for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert len(kinds) == 3 + 6
    assert {kinds[f"model.layers.{i}.self_attn.{p}_proj"] for i in (0, 1) for p in "qkv"} == {"fp8"}
    assert kinds["model.layers.1.mlp.up_proj"] == "int8"
    assert model.quantization_report.kept["model.layers.0.mlp.up_proj"] == "--ignore model.layers.0.mlp"
    assert model.quantization_report.warnings == ("pattern 'nothing' matches no module",)
    with pytest.raises(InputError, match="fuse"):
        quantize_model(build("llama"), "int8", overrides={"*.q_proj": "fp8"})
    with pytest.raises(InputError, match="regular expression"):
        quantize_model(build("llama"), "int8", ignore=["re:("])


@pytest.mark.parametrize("pattern", ["model.layers.1.mlp.experts", "model.layers.1.block_sparse_moe.experts"])
def test_patterns_on_either_name(pattern):
    """Mixtral's experts are `block_sparse_moe` on disk and `mlp` in memory."""
    model = quantize_model(build("mixtral"), "int8", ignore=[pattern])
    assert [type(layer.mlp.experts) is QuantExperts for layer in model.model.layers] == [True, False]
    assert not model.quantization_report.warnings
    assert model.quantization_report.kept["model.layers.1.mlp.experts"] == f"--ignore {pattern}"


def test_refusals():
    with pytest.raises(InputError, match="measured on data"):
        quantize_model(build("llama"), "int8-static")
    with pytest.raises(ValueError, match="did you mean"):
        quantize_model(build("llama"), "int9")
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(InputError, match="meta"):
        quantize_model(model, "int8")
    with pytest.raises(InputError, match=r"expected a torch.nn.Module .* found str"):
        quantize_model("SmolLM2", "int8")
    with pytest.raises(InputError, match="name of a scheme, found None"):
        quantize_model(build("llama"), None)
    with pytest.raises(InputError, match="expected patterns with a scheme's name"):
        quantize_model(build("llama"), "int8", overrides=["*.mlp.*"])


def test_a_scheme_that_needs_data_is_refused_before_anything_is_quantized():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with pytest.raises(InputError, match="measured on data"):
        quantize_model(model, "int8", overrides={"1": "int8-static"})
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64])
def test_weights_that_are_no_floats_stay(dtype):
    model = nn.Sequential(nn.Linear(64, 64))
    model[0].weight = nn.Parameter(torch.ones(64, 64).to(dtype), requires_grad=False)
    assert str(dtype) in quantize_model(model, "int8").quantization_report.kept["0"]


@pytest.mark.parametrize("kind", ["llama", "qwen3-moe", "mixtral", "deepseek-v3", "bert", "vision-language"])
def test_the_same_modules_as_the_converter(kind, tmp_path):
    model = build(kind)
    model.save_pretrained(tmp_path / "src")
    plan = lowbit.plan(tmp_path / "src", "int8-block", ignore=["re:.*layers?.1.*"])
    quantize_model(model, "int8-block", ignore=["re:.*layers?.1.*"])
    planned = {m: d.scheme.name for m, d in plan.decisions.items() if d.scheme is not None}
    model.save_pretrained(tmp_path / "saved")
    saved = open_checkpoint(tmp_path / "saved")
    assert {m: s.scheme.name for m, s in read(saved.config, saved.tensors).items()} == planned


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_model_within_a_wrapper_is_saved_as_if_alone(kind, tmp_path):
    """As in a LightningModule, or sentence-transformers: its config said nothing of codes, and they became floats."""
    for name, model in (("alone", build(kind)), ("wrapped", build(kind))):
        quantize_model(model if name == "alone" else nn.ModuleDict({"net": nn.ModuleList([model])}), "int8")
        model.save_pretrained(tmp_path / name)
    alone, wrapped = (open_checkpoint(tmp_path / name) for name in ("alone", "wrapped"))
    assert alone.config == wrapped.config and alone.config["quantization_config"]
    assert alone.tensors.keys() == wrapped.tensors.keys()
    with pytest.raises(InputError, match="or quantized in fp8, found compressed-tensors"):
        quantize_model(nn.ModuleList([model]), "fp8-block", format="fp8")


def test_patterns_mean_a_wrapper_s_names_too():
    model = nn.ModuleDict({"net": build("mixtral"), "extra": nn.Linear(64, 64)})
    model["again"] = model["net"]
    patterns = ["net.model.layers.0", "model.layers.1.block_sparse_moe.experts"]
    report = quantize_model(model, "int8", ignore=patterns).quantization_report
    assert not report.warnings
    assert report.kept["net.model.layers.0.self_attn.q_proj"] == "--ignore net.model.layers.0"
    assert report.kept["net.model.layers.1.mlp.experts"] == f"--ignore {patterns[1]}"
    assert {"extra", "net.model.layers.1.self_attn.q_proj"} <= report.quantized.keys()
    assert model["again"] is model["net"]


@pytest.mark.parametrize("kind", ["llama", "qwen3-moe", "mixtral", "vision-language"])
def test_in_two_calls(kind, tmp_path):
    """The config that is saved speaks of what both calls quantized, and of what a loaded checkpoint brought along."""
    model = build(kind)
    first = ["re:.*mlp.*", "re:.*feed_forward.*", "re:.*block_sparse_moe.*"]
    quantize_model(model, "fp8", ignore=first)
    model.save_pretrained(tmp_path / "half")
    for name, each in (("twice", model), ("loaded", lowbit.load(tmp_path / "half"))):
        quantize_model(each, "int8")
        each.save_pretrained(tmp_path / name)
        saved = open_checkpoint(tmp_path / name)
        schemes = {m: s.scheme.name for m, s in read(saved.config, saved.tensors).items()}
        assert set(schemes.values()) == {"fp8", "int8"}
        assert all((scheme == "fp8") == ("attn" in m) for m, scheme in schemes.items())
        assert lowbit.verify(tmp_path / name).ok
        batch = inputs(kind)
        assert torch.equal(logits(lowbit.load(tmp_path / name), batch), logits(each, batch))
    with pytest.raises(
        InputError, match="expected a model in float, or quantized in fp8, found compressed-tensors"
    ):
        quantize_model(model, "fp8-block", format="fp8")


def test_a_call_that_failed_is_gone_on_from(tmp_path):
    model = build("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = torch.nan
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj, rows from 0 on, found nan"):
        quantize_model(model, "fp8")
    quantize_model(model, "int8", ignore=["model.layers.1.mlp.*"])
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = 0.0
    model.save_pretrained(tmp_path / "out")
    batch = inputs("llama")
    assert torch.equal(logits(lowbit.load(tmp_path / "out"), batch), logits(model, batch))


@pytest.mark.parametrize("inference", [torch.inference_mode, torch.no_grad])
def test_torchs_encoder_layers(inference):
    """In inference torch multiplies by their weights itself, unless it is kept from it."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2).eval()
    x, padding = torch.randn(2, 7, 64), torch.zeros(2, 7, dtype=torch.bool)
    padding[0, 5:] = True
    with inference():
        want = [encoder(x), encoder(x, src_key_padding_mask=padding)]
        assert len(quantize_model(encoder, "int8").quantization_report.quantized) == 4
        found = [encoder(x), encoder(x, src_key_padding_mask=padding)]
    torch.testing.assert_close(found[0], want[0], atol=0.05, rtol=0)
    torch.testing.assert_close(found[1][~padding], want[1][~padding], atol=0.05, rtol=0)


def test_weights_that_are_computed_stay():
    """What a reparametrized Linear calls its weight is of the last call, or older."""
    parts = [nn.Linear(64, 64) for _ in range(4)]
    nn.utils.spectral_norm(parts[0])
    prune.l1_unstructured(parts[1], "weight", 0.5)
    nn.utils.parametrizations.weight_norm(parts[2])
    model = quantize_model(nn.Sequential(*parts), "int8")
    assert list(model.quantization_report.quantized) == ["3"]
    assert all("computed from others" in reason for reason in model.quantization_report.kept.values())


@pytest.mark.parametrize("scheme", ["int8", "fp8", "int8-weight-only"])
@pytest.mark.parametrize("kind", ["falcon", "t5"])
def test_linears_that_a_model_treats_in_its_own_way(kind, scheme, tmp_path):
    """Falcon has a class for them; T5 casts activations to the dtype of one, so that stays in float."""
    torch.manual_seed(0)
    ids = torch.randint(3, 60, (2, 9))
    if kind == "falcon":
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
        model = transformers.FalconForCausalLM(transformers.FalconConfig(**sizes)).eval()
        batch = {"input_ids": ids}
    else:
        sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval()
        batch = {"input_ids": ids, "decoder_input_ids": ids}
    want = logits(model, batch)
    model.save_pretrained(tmp_path / "src")
    quantize_model(model, scheme)
    assert len(model.quantization_report.quantized) == {"falcon": 8, "t5": 28}[kind]
    found = logits(model, batch)
    assert (found - want).norm() < 0.1 * want.norm()
    lowbit.convert(tmp_path / "src", tmp_path / "out", scheme=scheme)
    assert torch.equal(logits(lowbit.load(tmp_path / "out"), batch), found)


def test_hooks_stay():
    linear, calls = nn.Linear(64, 64), []
    handles = [
        linear.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append("before"), with_kwargs=True
        ),
        linear.register_forward_hook(lambda module, args, out: calls.append(type(module))),
        linear.register_full_backward_hook(lambda module, grad_in, grad_out: calls.append("back")),
    ]
    model, x = quantize_model(nn.Sequential(linear), "int8"), torch.randn(3, 64, requires_grad=True)
    model(x).sum().backward()
    assert calls == ["before", QuantLinear, "back"]
    for handle in handles:
        handle.remove()
    model(x).sum().backward()
    assert len(calls) == 3


def test_experts_match_the_fused_ones():
    model = build("deepseek-v3")
    fused = model.model.layers[1].mlp.experts
    x = torch.randn(11, 64)
    index = torch.randint(0, 8, (11, 2))
    index[3] = 5
    weights = torch.rand(11, 2)
    quant = QuantExperts.from_experts(fused, "int8")
    with torch.no_grad():
        gate, up = quant.dequantize("gate"), quant.dequantize("up")
        fused.gate_up_proj.copy_(torch.cat([gate, up], dim=1))
        fused.down_proj.copy_(quant.dequantize("down"))
        model.config._experts_implementation = "eager"
        want = fused(x, index, weights)
        with float_activations(quant):
            torch.testing.assert_close(quant(x, index, weights), want, rtol=1e-5, atol=1e-6)
        got = quant(x, index, weights)
    assert 0 < (got - want).norm() < 0.05 * want.norm()
    assert quant(x[:0], index[:0], weights[:0]).shape == (0, 64)
    wide = quant(x.double(), index, weights.double())  # computes in float32, as QuantLinear does
    assert wide.dtype == torch.float64 and torch.equal(wide.float(), got)
    # Another rank's expert, as expert parallelism marks it, adds nothing.
    index[:, 1] = 8
    alone = quant(x, index[:, :1], weights[:, :1])
    torch.testing.assert_close(quant(x, index, weights), alone)


@pytest.mark.parametrize(
    ("index", "weights"),
    [
        (torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2)),  # tokens were left out
        (torch.zeros(3, 2, dtype=torch.int64), torch.ones(2, 3)),  # other tokens' weights
        (torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 1)),
        (torch.zeros(3, 2), torch.ones(3, 2)),
        (torch.zeros(3, dtype=torch.int64), torch.ones(3)),
        (torch.zeros(3, 2, dtype=torch.int64), None),  # taken for rows sorted by expert
        (torch.zeros(3, 2, dtype=torch.int64, device="meta"), torch.ones(3, 2, device="meta")),
    ],
)
def test_routing_of_another_shape_is_refused(index, weights):
    quant = QuantExperts.from_experts(build("qwen3-moe").model.layers[1].mlp.experts, "int8")
    x = torch.randn(3, quant.hidden_size)
    quant(x, torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2))
    with pytest.raises(
        ValueError, match=r"expected top_k_index and top_k_weights \[3, k\] on cpu, found torch\."
    ):
        quant(x, index, weights)
    with pytest.raises(
        ValueError, match=rf"as many rows for each of {quant.num_experts} experts, found 3 rows"
    ):
        quant(x)


def test_experts_of_a_scheme_that_the_format_does_not_hold():
    experts = build("qwen3-moe").model.layers[1].mlp.experts
    with pytest.raises(ValueError, match="experts: expected a format that holds int8, found fp8; use one of"):
        QuantExperts.from_experts(experts, "int8", format="fp8")


def test_experts_gradient_and_state():
    experts = build("qwen3-moe").model.layers[1].mlp.experts
    quant = QuantExperts.from_experts(experts, "fp8")
    x = torch.randn(6, 64, requires_grad=True)
    weights = torch.rand(6, 2, requires_grad=True)
    index = torch.randint(0, 6, (6, 2))
    quant(x, index, weights).sum().backward()
    assert x.grad.abs().sum() > 0
    assert weights.grad.abs().sum() > 0
    before = {n: t.clone() for n, t in quant.state_dict().items()}
    assert set(before) == {
        f"{i}.{p}_proj.{s}"
        for i in range(6)
        for p in ("gate", "up", "down")
        for s in ("weight", "weight_scale")
    }
    quant.half().bfloat16()
    for name, tensor in quant.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8))
    fresh = QuantExperts.like(experts, "fp8").to_empty(device="meta")
    fresh.load_state_dict(before)
    assert torch.equal(fresh(x, index, weights), quant(x, index, weights))
    del before["3.up_proj.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*3\.up_proj\.weight"):
        fresh.load_state_dict(before)
    before["2.up_proj.weight"] = before["2.up_proj.weight"].view(torch.int8)
    with pytest.raises(
        RuntimeError, match=r"2\.up_proj\.weight: expected codes in torch.float8_e4m3fn, found"
    ):
        fresh.load_state_dict(before, strict=False)


@pytest.mark.parametrize("scheme", ["int8", "fp8-block", "int8-weight-only"])
def test_experts_are_saved_by_who_drops_what_shares_memory(scheme, tmp_path):
    """accelerate and safetensors take what lies in one storage for one tensor of many names."""
    model = quantize_model(build("qwen3-moe"), scheme)
    state = model.state_dict()
    want = logits(model, inputs("qwen3-moe"))
    Accelerator(cpu=True).save_model(model, tmp_path / "accelerate")
    assert load_file(tmp_path / "accelerate" / "model.safetensors").keys() == state.keys()
    save_model(model, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "state.pt")
    assert (tmp_path / "state.pt").stat().st_size < 2 * sum(t.nbytes for t in state.values())
    for value in state.values():  # the same memory as the model's
        value.view(torch.uint8).zero_()
    assert not torch.equal(logits(model, inputs("qwen3-moe")), want)
    load_model(model, tmp_path / "model.safetensors")
    assert torch.equal(logits(model, inputs("qwen3-moe")), want)
    for copied in (copy.deepcopy(state), torch.load(tmp_path / "state.pt", weights_only=True)):
        model.load_state_dict(copied)
        assert torch.equal(logits(model, inputs("qwen3-moe")), want)


def test_experts_compile_whole():
    quant = QuantExperts.from_experts(build("qwen3-moe").model.layers[1].mlp.experts, "int8")
    compiled = torch.compile(quant, fullgraph=True, dynamic=True, backend="eager")
    for tokens in (4, 7):
        x, index, weights = torch.randn(tokens, 64), torch.randint(0, 6, (tokens, 2)), torch.rand(tokens, 2)
        assert torch.equal(compiled(x, index, weights), quant(x, index, weights))


def test_other_layouts_are_kept_and_said():
    config = transformers.GptOssConfig(
        vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    model = quantize_model(transformers.GptOssForCausalLM(config).eval(), "int8")
    reason = model.quantization_report.kept["model.layers.0.mlp.experts"]
    assert reason == "experts fused into one 3-D tensor: its gate and up projections are interleaved"
    assert torch.isfinite(logits(model, inputs("llama"))).all()


MEMORY = """
import gc, re, sys, torch
from torch import nn
from lowbit.nn import quantize_model
def peak():  # not ru_maxrss, which begins with what the parent process had
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
torch.set_num_threads(1)
quantize_model(nn.Sequential(nn.Linear(64, 64)), "int8")
layers = [nn.Linear(2048, 2048, bias=False) for _ in range(12)]
model = nn.Sequential(*layers); del layers; gc.collect()
before = peak()
quantize_model(model, "int8")
print((peak() - before) / (2048 * 2048 * 4))
"""


def test_peak_memory_is_one_layer():
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=False,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # In layers of float32: all twelve would add 3 as int8, and 12 more if they were copied.
    assert float(done.stdout) < 1.0, done.stdout


def test_float_weights_are_freed():
    model = build("llama")
    kept = model.model.layers[0].mlp.up_proj
    weight = kept.weight.data_ptr()
    quantize_model(model, "int8")
    gc.collect()
    assert kept.weight is None
    assert model.model.layers[0].mlp.up_proj.weight.data_ptr() != weight
    assert tiny("llama")
