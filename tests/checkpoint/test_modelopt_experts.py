"""Llama 4 as ModelOpt exports it: each layer's experts in one tensor of NVFP4 or FP8, transposed as in float."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import int8_error, memory_grown
from fp4_checkpoints import fused_of_modelopt, llama4_of_modelopt
from sample_models import Tensors, check_quantized, load, same_bits, write
from transformers import Llama4ForCausalLM, Llama4TextConfig

import lowbit
from lowbit.calibration.source import Source
from lowbit.checkpoint import execute
from lowbit.errors import InputError
from lowbit.scheme import get_scheme

KINDS = ["nvfp4", "fp8"]


def config_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("scheme", ["int8", "int8-block", "int8-weight-only", "fp8", "fp8-block", "mxfp8"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_expert_becomes_eight_bits_as_if_it_were_dequantized_first(kind, scheme, tmp_path):
    _, single = llama4_of_modelopt(tmp_path / "src", kind)
    done = lowbit.convert(tmp_path / "src", tmp_path / "out", scheme)
    written, spec = load(tmp_path / "out"), get_scheme(scheme).weights
    assert spec is not None and len(done.plan.split_experts) == len(single) == 18
    for name, w in single.items():
        check_quantized(written, name.removesuffix(".weight"), w, spec)
        assert torch.equal(Source(tmp_path / "src").tensor(name), w), name
    assert not any("_input_scale" in n or "gate_up_proj" in n for n in written)
    report = lowbit.verify(tmp_path / "out", source=tmp_path / "src")
    assert report.ok and len(report.errors) == 18


@pytest.mark.parametrize(("scheme", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("kind", KINDS)
def test_in_float_they_stay_in_one_tensor(kind, scheme, dtype, tmp_path, monkeypatch):
    """By which alone transformers loads Llama 4; also a few rows at a time."""
    meant, single = llama4_of_modelopt(tmp_path / "src", kind)
    lowbit.convert(tmp_path / "src", tmp_path / "out", scheme)
    monkeypatch.setattr(execute, "BLOCK_BYTES", 3 * 256)
    done: list[int] = []
    few = lowbit.convert(tmp_path / "src", tmp_path / "few", scheme, progress=done.append)
    assert sum(done) == few.plan.source_bytes
    for out in ("out", "few"):
        written = load(tmp_path / out)
        assert {n for n, t in written.items() if t.dim() == 3} == meant.keys()
        for name, w in meant.items():
            assert same_bits(written[name], w.to(dtype)), name
        assert not any(n.endswith(("_scale", "_scale_2")) for n in written)
    assert "quantization_config" not in config_of(tmp_path / "out")
    report = lowbit.verify(tmp_path / "out", source=tmp_path / "src")
    assert report.ok and single.keys() <= {e.name for e in report.errors}
    lowbit.convert(tmp_path / "src", tmp_path / "some", "int8", ignore=["*.layers.1.*"])
    some = load(tmp_path / "some")
    for name, w in meant.items():
        assert (name in some) == (".layers.1." in name)
        assert name not in some or same_bits(some[name], w.bfloat16())


def test_what_float16_cannot_hold_is_named(tmp_path):
    llama4_of_modelopt(tmp_path / "src", "nvfp4")
    tensors, config = load(tmp_path / "src"), config_of(tmp_path / "src")
    name = "language_model.model.layers.1.feed_forward.experts.down_proj"
    tensors[f"{name}_weight_scale_2"] = torch.tensor(100.0)
    tensors[name][:], tensors[f"{name}_weight_scale"][:] = 0, 192.0
    tensors[name][1, 9, 5] = 0x60  # the upper half is the second of two rows
    write(tmp_path / "large", tensors, config)
    lowbit.convert(tmp_path / "large", tmp_path / "a", "bf16")
    assert load(tmp_path / "a")[name][1, 19, 5] == 76800
    at = rf"{name}: expected values that float16 can hold, found 76800.0 at \[{128 + 19}, 5\]"
    with pytest.raises(InputError, match=at):
        lowbit.convert(tmp_path / "large", tmp_path / "b", "fp16")


def test_fp8_stays_what_it_is(tmp_path):
    """One scale for all experts of a layer, and one of their inputs: codes are copied, turned."""
    _, single = llama4_of_modelopt(tmp_path / "src", "fp8")
    lowbit.convert(tmp_path / "src", tmp_path / "out", "fp8-static")
    written = load(tmp_path / "out")
    for name, w in single.items():
        module = name.removesuffix(".weight")
        assert written[name].dtype == torch.float8_e4m3fn and written[f"{module}.input_scale"] == 0.25
        assert torch.equal(written[name].float() * written[f"{module}.weight_scale"], w)


@pytest.mark.parametrize("kind", KINDS)
def test_inspect_counts_them_once(kind, tmp_path):
    _, single = llama4_of_modelopt(tmp_path / "src", kind)
    found = lowbit.inspect(tmp_path / "src")
    assert found.quantized_modules == 18 and found.experts == 3
    assert found.roles["expert"] == {"modules": 18, "parameters": sum(w.numel() for w in single.values())}
    assert "4 tensors hold all experts of a layer" in "".join(found.odd)
    assert "other" not in found.roles


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_runs_and_means_what_transformers_reads(kind, tmp_path):
    torch.manual_seed(0)
    config = Llama4TextConfig(
        vocab_size=64, hidden_size=128, intermediate_size=64, intermediate_size_mlp=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_local_experts=4, pad_token_id=0,
        max_position_embeddings=256, attention_chunk_size=64,
    )  # fmt: skip
    Llama4ForCausalLM(config).bfloat16().save_pretrained(tmp_path / "float")
    tensors, meant = fused_of_modelopt(kind, load(tmp_path / "float"))
    assert len(meant) == 4
    said = {"quant_method": "modelopt", "quant_algo": kind.upper()}
    write(tmp_path / "src", tensors, {**config_of(tmp_path / "float"), "quantization_config": said})
    assert int8_error(tmp_path) < 0.04
    windows = [torch.arange(3, 35), torch.arange(35, 3, -1)]
    report = lowbit.measure(tmp_path / "bf16", windows, reference=tmp_path / "src").to_dict()
    assert report["kl"] < 1e-4  # its inputs are rounded where they have a scale, and its weights to bfloat16


def test_memory_does_not_grow_with_the_experts(tmp_path):
    for name, experts, cols in (("small", 2, 64), ("large", 64, 2048)):
        at = "model.layers.0.feed_forward.experts."
        tensors: Tensors = {}
        for leaf, k, n in (("gate_up_proj", 256, 2 * cols), ("down_proj", cols, 256)):
            tensors[at + leaf] = torch.randint(256, (experts, k // 2, n), dtype=torch.uint8)
            scales = torch.ones(experts, k // 16, n).to(torch.float8_e4m3fn)
            tensors |= {f"{at}{leaf}_weight_scale": scales, f"{at}{leaf}_weight_scale_2": torch.tensor(0.1)}
        said = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
        write(
            tmp_path / name,
            tensors,
            {"model_type": "llama4_text", "hidden_size": 256, "quantization_config": said},
        )
    assert (tmp_path / "large" / "model.safetensors").stat().st_size > 50 << 20
    assert memory_grown(tmp_path, "bf16", workers=1) < 12 << 20


def spoil(tensors: Tensors, config: dict[str, Any], how: str) -> None:
    at = next(n for n in tensors if n.endswith("experts.down_proj"))
    match how:
        case "without scales":
            del tensors[f"{at}_weight_scale"]
        case "without the number":
            del tensors[f"{at}_weight_scale_2"]
        case "a number for each":
            tensors[f"{at}_weight_scale_2"] = torch.ones(3)
        case "other groups":
            tensors[f"{at}_weight_scale"] = tensors[f"{at}_weight_scale"][:, :4].contiguous()
        case "not transposed":
            tensors[at] = tensors[at].transpose(1, 2).contiguous()
        case "another model":
            config["model_type"] = config["text_config"]["model_type"] = "something_new"


@pytest.mark.parametrize("scheme", ["int8", "bf16"])
@pytest.mark.parametrize(
    "how",
    [
        "without scales",
        "without the number",
        "a number for each",
        "other groups",
        "not transposed",
        "another model",
    ],
)
def test_what_is_not_certain_is_refused(how, scheme, tmp_path):
    llama4_of_modelopt(tmp_path / "src", "nvfp4")
    tensors, config = load(tmp_path / "src"), config_of(tmp_path / "src")
    spoil(tensors, config, how)
    write(tmp_path / "bad", tensors, config)
    with pytest.raises(InputError, match=r"experts.*(cannot be read|incomplete)"):
        lowbit.plan(tmp_path / "bad", scheme)
