"""FP4 sources as DeepSeek-V4 is published: routed experts in E2M1 with MXFP4's scales, the rest in block FP8."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conversions import memory_grown
from sample_models import (
    BLOCK,
    Tensors,
    block_fp8,
    check_quantized,
    decode_block_fp8,
    fp4,
    load,
    same_bits,
    write,
)
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

import lowbit
from lowbit.calibration.source import Source
from lowbit.errors import InputError
from lowbit.nn import QuantExperts, float_activations
from lowbit.scheme import get_scheme

HIDDEN, INNER, EXPERTS = 256, 128, 3
CONFIG = {
    "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "hidden_size": HIDDEN,
    "moe_intermediate_size": INNER, "n_routed_experts": EXPERTS, "num_hidden_layers": 1, "torch_dtype": "bfloat16",
    "expert_dtype": "fp4",
    "quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [BLOCK, BLOCK],
        "activation_scheme": "dynamic",
    },
}  # fmt: skip


def published(root: Path) -> tuple[Tensors, Tensors]:
    """Written below `root`; returns float32 weights of the experts, and of what is in block FP8."""
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator) * 0.05  # noqa: E731
    at, float_ = "layers.0", torch.bfloat16
    tensors: Tensors = {
        "embed.weight": make(64, HIDDEN).to(float_), "head.weight": make(64, HIDDEN).to(float_),
        "norm.weight": torch.ones(HIDDEN, dtype=float_), "hc_head_fn": make(4, 4 * HIDDEN),
        f"{at}.attn.compressor.wkv.weight": make(64, HIDDEN).to(float_),
        f"{at}.attn.compressor.wgate.weight": make(64, HIDDEN).to(float_),
        f"{at}.ffn.gate.weight": make(EXPERTS, HIDDEN).to(float_),
    }  # fmt: skip
    linears = {
        "attn.wq_a": (128, HIDDEN), "attn.wq_b": (256, 128), "attn.wkv": (128, HIDDEN), "attn.wo_a": (256, 128),
        "attn.wo_b": (HIDDEN, 256), "ffn.shared_experts.w1": (INNER, HIDDEN),
        "ffn.shared_experts.w2": (HIDDEN, INNER), "ffn.shared_experts.w3": (INNER, HIDDEN),
    }  # fmt: skip
    floats = {f"{at}.{name}.weight": make(*shape) for name, shape in linears.items()}
    coded, _ = block_fp8(floats, {}, suffix=".scale", scale_dtype=torch.float8_e8m0fnu)
    tensors |= coded
    modules = [f"{at}.{name}" for name in linears]
    blocks = {m: decode_block_fp8(coded[f"{m}.weight"], coded[f"{m}.scale"]) for m in modules}
    experts: Tensors = {}
    for e in range(EXPERTS):
        for name, shape in (("w1", (INNER, HIDDEN)), ("w2", (HIDDEN, INNER)), ("w3", (INNER, HIDDEN))):
            module = f"{at}.ffn.experts.{e}.{name}"
            tensors[f"{module}.weight"], tensors[f"{module}.scale"], experts[module] = fp4(make(*shape))
    write(root, tensors, CONFIG)
    return experts, blocks


def config_of(out: Path) -> dict:
    return json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("scheme", ["int8", "int8-block", "int8-weight-only"])
def test_experts_become_int8_as_if_they_were_dequantized_first(tmp_path, scheme):
    experts, blocks = published(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", scheme)
    written, spec = load(tmp_path / "out"), get_scheme(scheme).weights
    assert spec is not None
    grouped = blocks.pop("layers.0.attn.wo_a")
    assert same_bits(written["layers.0.attn.wo_a.weight"], grouped.to(torch.bfloat16))
    for module, w in (experts | blocks).items():
        check_quantized(written, module, w, spec)
    kept = {n for n, t in written.items() if t.dtype == torch.bfloat16}
    assert {"head.weight", "layers.0.attn.compressor.wkv.weight", "layers.0.ffn.gate.weight"} <= kept
    assert config_of(tmp_path / "out")["expert_dtype"] == "int8"
    assert lowbit.verify(tmp_path / "out", source=tmp_path / "src").ok


@pytest.mark.parametrize(
    ("scheme", "format"), [("fp8-block", "fp8"), ("fp8-block", None), ("fp8", None), ("mxfp8", None)]
)
def test_experts_become_fp8_without_any_loss(tmp_path, scheme, format):
    experts, _ = published(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", scheme, format=format)
    report = lowbit.verify(tmp_path / "out", source=tmp_path / "src")
    assert report.ok
    errors = {e.name.removesuffix(".weight"): e.largest for e in report.errors}
    assert all(errors[module] == 0 for module in experts)
    assert config_of(tmp_path / "out")["expert_dtype"] == "fp8"
    if format == "fp8":
        before, after = load(tmp_path / "src"), load(tmp_path / "out")
        for name in ("attn.wq_a", "attn.wo_a", "ffn.shared_experts.w2"):  # as they were
            assert same_bits(after[f"layers.0.{name}.weight"], before[f"layers.0.{name}.weight"]), name
        scale = after["layers.0.ffn.experts.0.w1.weight_scale_inv"]
        assert scale.dtype == torch.float32 and scale.shape == (1, 2)


def test_bf16_is_what_the_codes_mean(tmp_path):
    experts, blocks = published(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", "bf16")
    written, config = load(tmp_path / "out"), config_of(tmp_path / "out")
    for module, w in (experts | blocks).items():
        assert same_bits(written[f"{module}.weight"], w.to(torch.bfloat16)), module
        assert torch.equal(Source(tmp_path / "src").weight(module), w), module
    assert config["expert_dtype"] == "bf16" and "quantization_config" not in config


def test_what_the_output_cannot_hold_is_refused(tmp_path):
    published(tmp_path / "src")
    with pytest.raises(InputError, match="found fp4 in the source"):
        lowbit.convert(tmp_path / "src", tmp_path / "out", "int8", keep=["*experts*"])


def test_scales_of_other_groups_are_refused(tmp_path):
    published(tmp_path / "src")
    tensors = load(tmp_path / "src")
    name = "layers.0.ffn.experts.0.w1.scale"
    write(tmp_path / "other", tensors | {name: tensors[name][:, ::2].contiguous()}, CONFIG)
    with pytest.raises(InputError, match=r"w1.scale: expected a scale of shape \[128, 8\].*found \[128, 4\]"):
        lowbit.plan(tmp_path / "other", "int8")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("scheme", ["int8", "mxfp8"])
def test_scales_of_a_large_weight_are_never_in_memory_at_once(tmp_path, scheme):
    """4 million of the source, which took 23 MB, and as many of the result, which took 71 with them."""
    for name, rows in {"small": 256, "large": 16384}.items():
        module = "layers.0.ffn.experts.0.w1"
        codes = torch.randint(-128, 128, (rows, 4096), dtype=torch.int8)
        scale = torch.randint(118, 122, (rows, 256), dtype=torch.uint8).view(torch.float8_e8m0fnu)
        write(tmp_path / name, {f"{module}.weight": codes, f"{module}.scale": scale}, CONFIG)
    assert memory_grown(tmp_path, scheme, workers=1) < 12 << 20


def test_the_result_runs_and_means_what_transformers_reads(tmp_path):
    """A whole model: experts in FP4, attention in block FP8, then INT8; its logits in float against transformers'."""
    torch.manual_seed(0)
    config = DeepseekV4Config(
        vocab_size=64, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1,
        head_dim=64, moe_intermediate_size=INNER, n_routed_experts=4, num_experts_per_tok=2, q_lora_rank=128,
        o_lora_rank=64, o_groups=2, qk_rope_head_dim=16,
    )  # fmt: skip
    DeepseekV4ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    tensors, saved = load(tmp_path / "bf16"), json.loads((tmp_path / "bf16" / "config.json").read_text())
    for name in [n for n in tensors if ".experts." in n]:
        tensors[name], tensors[name.removesuffix("weight") + "scale"], _ = fp4(tensors[name].float())
    attention = {
        n: tensors.pop(n) for n in list(tensors) if n.endswith(("wq_a.weight", "wq_b.weight", "wo_b.weight"))
    }
    tensors |= block_fp8(attention, {}, suffix=".scale", scale_dtype=torch.float8_e8m0fnu)[0]
    quantization = {"quantization_config": CONFIG["quantization_config"], "expert_dtype": "fp4"}
    write(tmp_path / "src", tensors, saved | quantization)
    lowbit.convert(tmp_path / "src", tmp_path / "plain", "bf16")
    lowbit.convert(tmp_path / "src", tmp_path / "out", "int8")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        exact = DeepseekV4ForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)(ids).logits
        model = lowbit.load(tmp_path / "out", dtype=torch.float32)
        with float_activations(model):
            ours = model(ids).logits
    assert sum(isinstance(m, QuantExperts) for m in model.modules()) == 2
    assert float((ours - exact).norm() / exact.norm()) < 0.03
