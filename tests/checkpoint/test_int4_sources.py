"""INT4 sources as Kimi-K2-Thinking is published: experts packed in groups of 32, the rest in BF16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from conversions import int8_error
from sample_models import Tensors, check_quantized, load, qwen3_moe, same_bits, write
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.calibration.source import Source
from lowbit.errors import InputError
from lowbit.scheme import get_scheme

GROUP = 32
CONFIG = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
    "kv_cache_scheme": None, "global_compression_ratio": None,
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*gate$"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"], "input_activations": None, "output_activations": None,
            "weights": {
                "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP,
                "dynamic": False, "actorder": None, "block_structure": None, "observer": "minmax",
                "observer_kwargs": {},
            },
        }
    },
}  # fmt: skip
IDS = torch.arange(3, 35)[None]


def published(root: Path, **weights: Any) -> Tensors:
    """Written below `root`; returns the float32 weights that the library itself unpacks."""
    tensors, config = qwen3_moe()
    meant: Tensors = {}
    for name in [n for n in tensors if ".experts." in n]:
        w, module = tensors.pop(name).float(), name.removesuffix(".weight")
        groups = w.reshape(w.shape[0], -1, GROUP)
        scale = (groups.abs().amax(-1) / 7).to(torch.bfloat16)
        codes = (groups / scale.float()[..., None]).round().clamp(-8, 7).to(torch.int8).reshape(w.shape)
        tensors[f"{module}.weight_packed"] = pack_to_int32(codes, 4)
        tensors[f"{module}.weight_scale"] = scale
        tensors[f"{module}.weight_shape"] = torch.tensor(w.shape, dtype=torch.int32)
        again = unpack_from_int32(tensors[f"{module}.weight_packed"], 4, w.shape)
        meant[module] = (again.reshape(groups.shape).float() * scale.float()[..., None]).reshape(w.shape)
    tensors |= weights
    write(root, tensors, config | {"quantization_config": CONFIG})
    return meant


@pytest.mark.parametrize("scheme", ["int8", "fp8-block", "int8-weight-only", "fp8", "mxfp8"])
def test_int4_becomes_eight_bits_as_if_it_were_dequantized_first(tmp_path, scheme):
    meant = published(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", scheme)
    written, spec = load(tmp_path / "out"), get_scheme(scheme).weights
    assert len(meant) == 24 and spec is not None
    for module, w in meant.items():
        check_quantized(written, module, w, spec)
    report = lowbit.verify(tmp_path / "out", source=tmp_path / "src")
    assert report.ok and not report.problems


def test_the_result_runs_and_means_what_transformers_reads(tmp_path):
    published(tmp_path / "src")
    # A scale per channel of 127 steps over INT4's groups of 32, each with 7 steps of its own.
    assert int8_error(tmp_path) < 0.02


def test_bf16_is_the_dequantized_weight_rounded_once(tmp_path):
    meant = published(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", "bf16")
    written = load(tmp_path / "out")
    for module, w in meant.items():
        assert same_bits(written[f"{module}.weight"], w.to(torch.bfloat16)), module
        assert same_bits(Source(tmp_path / "src").weight(module), w), module


def test_experts_may_stay_int4_beside_int8_attention(tmp_path):
    published(tmp_path / "src")
    lowbit.convert(
        tmp_path / "src", tmp_path / "out", "int8", keep=["*experts*"], overrides={"*self_attn*": "int8"}
    )
    before, after = load(tmp_path / "src"), load(tmp_path / "out")
    for name, t in before.items():
        if ".experts." in name:
            assert torch.equal(after[name].to(torch.float32), t.to(torch.float32)), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    groups = QuantizationConfig.model_validate(config).config_groups.values()
    assert {(g.weights.num_bits, g.weights.group_size, g.format) for g in groups} == {
        (4, GROUP, "pack-quantized"), (8, None, "int-quantized")
    }  # fmt: skip
    assert after["model.layers.0.self_attn.q_proj.weight"].dtype == torch.int8
    assert lowbit.verify(tmp_path / "out", source=tmp_path / "src").ok


@pytest.mark.parametrize("asked", [{}, {"keep": ["*experts*"], "overrides": {"*self_attn*": "int8"}}])
def test_columns_that_do_not_fill_an_int32_are_refused(tmp_path, asked):
    """Kept too: the shape that was written took in the padding."""
    name = "model.layers.0.mlp.experts.0.up_proj.weight_shape"
    published(tmp_path / "src", **{name: torch.tensor([128, 124], dtype=torch.int32)})
    with pytest.raises(InputError, match=r"up_proj.weight_shape: expected \[128, 128\].*found \[128, 124\]"):
        lowbit.convert(tmp_path / "src", tmp_path / "out", "int8", **asked)
    assert not (tmp_path / "out" / "config.json").exists()


def test_scales_of_other_groups_than_config_says_are_refused(tmp_path):
    """The loops took what lies behind them for scales."""
    name = "model.layers.0.mlp.experts.0.up_proj.weight_scale"
    published(tmp_path / "src", **{name: torch.ones(128, 2, dtype=torch.bfloat16)})
    with pytest.raises(
        InputError, match=r"up_proj\.weight_scale: expected a scale of shape \[128, 4\].*found \[128, 2\]"
    ):
        lowbit.plan(tmp_path / "src", "int8")


@pytest.mark.parametrize(
    "packed", [torch.zeros(128, 16, dtype=torch.int64), torch.zeros(2, 64, 16, dtype=torch.int32)]
)
def test_codes_packed_otherwise_are_refused(tmp_path, packed):
    published(tmp_path / "src", **{"model.layers.0.mlp.experts.0.up_proj.weight_packed": packed})
    with pytest.raises(InputError, match=r"up_proj\.weight_packed: expected packed codes as I32 \[N, K"):
        lowbit.plan(tmp_path / "src", "int8")


def test_a_shape_in_another_dtype_is_refused(tmp_path):
    name = "model.layers.0.mlp.experts.0.up_proj.weight_shape"
    published(tmp_path / "src", **{name: torch.tensor([128, 128], dtype=torch.int16)})
    with pytest.raises(InputError, match=r"up_proj\.weight_shape: expected I32 or I64, found I16"):
        lowbit.convert(tmp_path / "src", tmp_path / "out", "int8")


def test_lowbit_does_not_run_int4(tmp_path):
    published(tmp_path / "src")
    with pytest.raises(InputError, match="found int4; convert the checkpoint with `lowbit convert` first"):
        lowbit.load(tmp_path / "src")


def test_what_was_left_out_when_it_was_calibrated_stays_out(tmp_path):
    """Also what is no module of a decoder layer, and what is carried as found; unless the conversion is told."""
    published(tmp_path / "src")
    windows = [torch.randint(3, 60, (24,), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    lowbit.calibrate(
        tmp_path / "src", tmp_path / "calib", "int8", method="gptq", data=windows, device="cpu",
        keep=["*.layers.0.mlp.experts.*"], overrides={"lm_head": "fp8"},
    )  # fmt: skip
    given = {"calibration": tmp_path / "calib"}
    decisions = lowbit.plan(tmp_path / "src", "int8", **given).decisions
    experts = [d for n, d in decisions.items() if ".layers.0.mlp.experts." in n]
    assert experts and all(d.as_found for d in experts)
    assert decisions["lm_head"].scheme.name == "fp8"
    told = {"*.layers.0.mlp.experts.*": "int8", "lm_head": "float"}
    decisions = lowbit.plan(tmp_path / "src", "int8", overrides=told, **given).decisions
    experts = [d for n, d in decisions.items() if ".layers.0.mlp.experts." in n]
    assert all(d.scheme.name == "int8" and not d.as_found for d in experts)
    assert decisions["lm_head"].scheme is None


@pytest.mark.parametrize("method", ["gptq", "best"])
def test_calibration_leaves_in_float_what_the_source_did(tmp_path, method):
    published(tmp_path / "src")
    windows = [torch.randint(3, 60, (24,), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    lowbit.calibrate(tmp_path / "src", tmp_path / "calib", "int8", method=method, data=windows, device="cpu")
    lowbit.convert(tmp_path / "src", tmp_path / "out", "int8", calibration=tmp_path / "calib")
    before, after = load(tmp_path / "src"), load(tmp_path / "out")
    attention = [n for n in before if "_proj.weight" in n and "self_attn" in n]
    assert len(attention) == 8 and all(after[n].dtype == torch.bfloat16 for n in attention)
    if method == "gptq":
        assert all(torch.equal(after[n], before[n]) for n in attention)
    with torch.no_grad():
        logits = lowbit.load(tmp_path / "out", dtype=torch.float32)(input_ids=IDS).logits
        lowbit.convert(tmp_path / "src", tmp_path / "bf16", "bf16")
        exact = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.float32)(IDS).logits
    assert float((logits - exact).norm() / exact.norm()) < 0.2
