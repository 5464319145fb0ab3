"""Scales as makers of checkpoints store them: `eval` and calibration take them by what the format's reader found."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lowbit
from lowbit.calibration.source import Source
from lowbit.dtypes import E4M3FN
from lowbit.errors import InputError
from lowbit.granularity import PerBlock, PerGroup
from lowbit.quantize import quantize
from lowbit.scheme import TensorSpec


def nll(model: nn.Module, windows: list[Tensor]) -> float:
    with torch.no_grad():
        found = [(model(input_ids=w[None]).logits[0, :-1], w[1:]) for w in windows]
    return sum(float(nn.functional.cross_entropy(*of, reduction="sum")) for of in found)


def rewritten(src: Path, out: Path, rename: dict[str, str], quantization: dict[str, Any]) -> Path:
    """A checkpoint under other names of tensors and another quantization_config."""
    tensors = load_file(src / "model.safetensors")
    for old, new in rename.items():
        tensors = {n.replace(old, new): t for n, t in tensors.items()}
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((src / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return out


@pytest.fixture(scope="module")
def static(checkpoints, windows, tmp_path_factory):
    """Scheme and format → a checkpoint of Qwen3 with static activations, and FP8 keys and values where it is FP8."""
    root = tmp_path_factory.mktemp("static")

    @cache
    def made(scheme: str, fmt: str | None = None) -> Path:
        out, src = root / scheme, checkpoints["qwen3"]
        kv_cache = "fp8" if scheme == "fp8-static" else None
        lowbit.calibrate(
            src, out / "calib", scheme, method="absmax", data=windows, kv_cache=kv_cache, device="cpu"
        )
        lowbit.convert(src, out / "out", scheme, format=fmt, calibration=out / "calib")
        return out / "out"

    return made


def test_an_evaluation_shifts_inputs_as_the_description_says(static, windows):
    """msModelSlim calls the zero point `input_offset`, and has it in float."""
    out = static("int8-static-asym", "ascend")
    assert any(int(t) != 0 for n, t in load_file(out / "model.safetensors").items() if "input_offset" in n)
    model = lowbit.load(out, dtype=torch.float32)
    want = nll(model, windows)
    with lowbit.nn.float_activations(model):
        unrounded = nll(model, windows)
    found = lowbit.measure(out, windows, device="cpu").agreement.nll
    assert abs(found - want) < 0.01 * abs(unrounded - want)


def test_fp8_of_others_is_evaluated_as_ours(static, windows, tmp_path):
    ours = static("fp8-static")
    want = lowbit.measure(ours, windows, device="cpu").agreement.nll
    keys = {".self_attn.k_scale": ".self_attn.k_proj.{}", ".self_attn.v_scale": ".self_attn.v_proj.{}"}
    mistral = {"quant_method": "fp8", "activation_scheme": "static", "kv_cache_scheme": "static"}
    named = {old: new.format("output_scale") for old, new in keys.items()}
    scales = {".input_scale": ".activation_scale", ".weight_scale": ".weight_scale_inv"}
    out = rewritten(ours, tmp_path / "a", named | scales, mistral)
    assert lowbit.measure(out, windows, device="cpu").agreement.nll == want
    modelopt = {
        "quant_method": "modelopt", "quant_algo": "FP8",
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False},
    }  # fmt: skip
    out = rewritten(ours, tmp_path / "b", {old: new.format(old[-7:]) for old, new in keys.items()}, modelopt)
    assert lowbit.measure(out, windows, device="cpu").agreement.nll == want
    plain = {k: v for k, v in modelopt.items() if k != "kv_cache_scheme"}
    out = rewritten(ours, tmp_path / "c", {}, plain)
    assert lowbit.measure(out, windows, device="cpu").agreement.nll != want


def test_a_static_scale_that_is_not_there(static, windows, tmp_path):
    ours = static("fp8-static")
    quantization = json.loads((ours / "config.json").read_text())["quantization_config"]
    out = rewritten(ours, tmp_path / "out", {".input_scale": ".lost"}, quantization)
    with pytest.raises(
        InputError, match="expected a scale of its input, which fp8-static has, found none in"
    ):
        lowbit.measure(out, windows, device="cpu")


@pytest.mark.parametrize("kind", ["in text_config", "as text", "ragged groups", "a single row"])
def test_what_a_scale_covers_is_what_the_config_says(tmp_path, kind):
    """Its shape alone does not tell: of 192 columns, two scales may be of 96 or of 128 and 64."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1 if kind == "a single row" else 96, 192, generator=generator)
    weight[:, :64] *= 30
    name = "model.layers.0.mlp.up_proj.weight"
    config: dict[str, Any] = {"model_type": "llama"}
    granularity = PerBlock(64, 64)
    block = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    said: dict[str, Any] = {"strategy": "block", "block_structure": "64x64"}
    if kind == "in text_config":
        config = {"model_type": "llava", "text_config": {"quantization_config": block}}
    elif kind == "a single row":
        granularity = PerBlock(128, 128)
        config |= {"quantization_config": block | {"weight_block_size": [128, 128]}}
    else:
        if kind == "ragged groups":
            granularity, said = PerGroup(128), {"strategy": "group", "group_size": 128}
        group = {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "symmetric": True, **said},
        }
        config |= {
            "quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
        }
    q = quantize(weight, TensorSpec(dtype=E4M3FN, granularity=granularity))
    suffix = "_scale" if kind in ("as text", "ragged groups") else "_scale_inv"
    (tmp_path / "m").mkdir()
    save_file({name: q.codes, name + suffix: q.scale}, tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    assert torch.equal(Source(tmp_path / "m").tensor(name), q.dequantize())
