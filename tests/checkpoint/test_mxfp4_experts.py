"""gpt-oss as published: each layer's experts in one tensor of MXFP4, the rest in BF16."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import check_killed_run, memory_grown
from fp4_checkpoints import gpt_oss
from sample_models import Tensors, check_quantized, load, same_bits, write
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import lowbit
from lowbit.calibration.source import Source
from lowbit.checkpoint import turned
from lowbit.cli import main
from lowbit.errors import InputError
from lowbit.nn import float_activations
from lowbit.scheme import get_scheme

AT = "model.layers.0.mlp.experts"
IDS = torch.arange(3, 35)[None]


def config_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "config.json").read_text())


def dequantized(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """What transformers makes of the experts, [E, K, N]."""
    names = [n.removesuffix("_blocks") for n in tensors if n.endswith("_blocks")]
    return {
        n: convert_moe_packed_tensors(tensors[f"{n}_blocks"], tensors[f"{n}_scales"], dtype=dtype)
        for n in names
    }


@pytest.mark.parametrize(
    ("scheme", "dtype", "exponents"),
    [("bf16", torch.bfloat16, (-127, 124)), ("fp16", torch.float16, (-30, 12))],
)
def test_it_becomes_what_transformers_dequantizes(scheme, dtype, exponents, tmp_path):
    """Bit for bit, -0 and subnormal numbers too."""
    tensors = gpt_oss(tmp_path / "src", exponents)
    lowbit.convert(tmp_path / "src", tmp_path / "out", scheme)
    written, meant = load(tmp_path / "out"), dequantized(tensors, dtype)
    assert len(meant) == 4 and meant[f"{AT}.gate_up_proj"].shape == (5, 64, 192)
    meant |= {n: t.to(dtype) for n, t in tensors.items() if not n.endswith(("_blocks", "_scales"))}
    assert written.keys() == meant.keys()
    for name, tensor in meant.items():
        assert same_bits(written[name], tensor), name
    assert "quantization_config" not in config_of(tmp_path / "out")
    report = lowbit.verify(tmp_path / "out", source=tmp_path / "src")
    assert report.ok
    names = {e.name: e.largest for e in report.errors}
    assert f"{AT}.4.gate_up_proj.weight" in names and f"{AT}.0.down_proj.weight" in names
    if scheme == "bf16":
        assert len(names) == 20 and set(names.values()) == {0.0}


def test_transformers_loads_it_as_it_does_the_source(tmp_path):
    gpt_oss(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", "bf16")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "src", quantization_config=Mxfp4Config(dequantize=True), dtype="auto"
    )
    for ours in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto"), lowbit.load(tmp_path / "out")
    ):  # fmt: skip
        assert ours.dtype == torch.bfloat16 and ours.state_dict().keys() == theirs.state_dict().keys()
        with torch.no_grad():
            assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


def test_a_tile_of_columns_at_a_time_is_the_same(tmp_path, monkeypatch):
    """Of large experts a tile holds a part of the columns, and a few rows are decoded at a time."""
    gpt_oss(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "whole", "bf16")
    for tile, strip in ((192 * 2 * 5, 1000), (1, 1)):
        monkeypatch.setattr(turned, "TILE_BYTES", tile)
        monkeypatch.setattr(turned, "_STRIP_BYTES", strip)
        done = []
        lowbit.convert(
            tmp_path / "src",
            tmp_path / f"{tile}",
            "bf16",
            progress=lambda count, done=done: done.append(count),
        )
        assert load(tmp_path / f"{tile}").keys() == load(tmp_path / "whole").keys()
        for name, tensor in load(tmp_path / f"{tile}").items():
            assert same_bits(tensor, load(tmp_path / "whole")[name]), name
        assert sum(done) == lowbit.plan(tmp_path / "src", "bf16").source_bytes


def test_memory_does_not_grow_with_the_experts(tmp_path):
    for name, experts, rows in (("small", 2, 64), ("large", 96, 2048)):
        said = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
        blocks = torch.randint(256, (experts, rows, 16, 16), dtype=torch.uint8)
        scales = torch.full((experts, rows, 16), 120, dtype=torch.uint8)
        write(
            tmp_path / name,
            {f"{AT}.gate_up_proj_blocks": blocks, f"{AT}.gate_up_proj_scales": scales},
            said,
        )
    assert (
        tmp_path / "large" / "model.safetensors"
    ).stat().st_size > 50 << 20  # and four times as much is written
    assert memory_grown(tmp_path, "bf16", workers=1) < 12 << 20


def test_a_killed_run_goes_on(tmp_path):
    gpt_oss(tmp_path / "src", num_hidden_layers=6)
    check_killed_run(tmp_path, "bf16", 40)


@pytest.mark.parametrize("scheme", ["int8", "fp8", "int8-weight-only"])
def test_attention_is_quantized_and_experts_are_dequantized(scheme, tmp_path):
    """That attention is not in FP4 says nothing of 8 bits: it was said to be left unquantized, and nothing was done."""
    tensors = gpt_oss(tmp_path / "src")
    plan = lowbit.plan(tmp_path / "src", scheme)
    assert any("4 tensors of experts" in w and "become BF16" in w for w in plan.warnings)
    assert "gate and up projections alternate" in plan.decisions[f"{AT}.down_proj"].reason
    assert f"{AT}" in plan.config["quantization_config"]["ignore"]
    lowbit.convert(tmp_path / "src", tmp_path / "out", scheme)
    written = load(tmp_path / "out")
    for name, tensor in dequantized(tensors, torch.bfloat16).items():
        assert same_bits(written[name], tensor), name
    spec = get_scheme(scheme).weights
    assert spec is not None
    for module in ("q_proj", "k_proj", "v_proj", "o_proj"):
        name = f"model.layers.1.self_attn.{module}"
        check_quantized(written, name, tensors[f"{name}.weight"].float(), spec)
    assert lowbit.verify(tmp_path / "out", source=tmp_path / "src").ok
    lowbit.convert(tmp_path / "src", tmp_path / "bf16", "bf16")
    assert not any("tensors of experts" in w for w in lowbit.plan(tmp_path / "src", "bf16").warnings)
    meant = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.float32)
    ours, theirs = (
        f(tmp_path / "out", dtype=torch.float32) for f in (lowbit.load, type(meant).from_pretrained)
    )
    rounded = Source(tmp_path / "out")
    with torch.no_grad():
        for name in rounded.stored:
            meant.get_submodule(name).weight.copy_(rounded.weight(name))
        with float_activations(ours):
            logits, expected = ours(IDS).logits, meant(IDS).logits
        assert float((logits - expected).norm() / expected.norm()) < 1e-5
        assert torch.isfinite(theirs(IDS).logits).all()
    for name, parameter in meant.named_parameters():
        assert torch.allclose(theirs.get_parameter(name), parameter, rtol=1e-6, atol=0), name


def test_a_changed_value_is_seen(tmp_path):
    gpt_oss(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", "bf16")
    written = load(tmp_path / "out")
    changed = {**written, f"{AT}.gate_up_proj": written[f"{AT}.gate_up_proj"].clone()}
    changed[f"{AT}.gate_up_proj"][3, 7, 11] += 1
    write(tmp_path / "changed", changed, config_of(tmp_path / "out"))
    worst, *others = lowbit.verify(tmp_path / "changed", source=tmp_path / "src").errors
    assert worst.name == f"{AT}.3.gate_up_proj.weight" and worst.largest > 0.9
    assert all(e.largest == 0 for e in others)
    turned_back = {n: t.transpose(1, 2).contiguous() if t.dim() == 3 else t for n, t in written.items()}
    write(tmp_path / "turned", turned_back, config_of(tmp_path / "out"))
    report = lowbit.verify(tmp_path / "turned", source=tmp_path / "src")
    assert len(report.problems) == 4 and "expected [5, 64, 192] in float" in "".join(report.problems)


def test_a_source_is_compared_with_itself(tmp_path):
    gpt_oss(tmp_path / "src")
    report = lowbit.verify(tmp_path / "src", source=tmp_path / "src")
    assert report.ok and not report.errors


def test_what_is_no_number_is_named(tmp_path):
    tensors = gpt_oss(tmp_path / "src")
    config = config_of(tmp_path / "src")
    tensors[f"{AT}.down_proj_scales"][2, 5, 1] = 255
    write(tmp_path / "nan", tensors, config)
    with pytest.raises(InputError, match="down_proj_scales: expected finite scales, found nan"):
        lowbit.convert(tmp_path / "nan", tmp_path / "a", "bf16")
    tensors[f"{AT}.down_proj_scales"][2, 5, 1] = 127 + 14
    tensors[f"{AT}.down_proj_blocks"][2, 5] = 0
    tensors[f"{AT}.down_proj_blocks"][2, 5, 1, 3] = 0xF0
    write(tmp_path / "large", tensors, config)
    lowbit.convert(tmp_path / "large", tmp_path / "b", "bf16")
    at = r"down_proj_blocks: expected values that float16 can hold, found -98304.0 at \[2, 5, 39\]"
    with pytest.raises(InputError, match=at):
        lowbit.convert(tmp_path / "large", tmp_path / "c", "fp16")


def spoil(tensors: Tensors, how: str) -> None:
    blocks, scales = f"{AT}.down_proj_blocks", f"{AT}.down_proj_scales"
    match how:
        case "expected a scale named":
            del tensors[scales]
        case "expected packed FP4 of experts":
            tensors[blocks] = tensors[blocks].flatten(2)
        case r"as U8 \[E, N, K / 32, 16\], found U8 \[0":
            tensors |= {n: tensors[n][:0].contiguous() for n in (blocks, scales)}
        case "expected an exponent in U8 for each of":
            tensors[scales] = tensors[scales][:, :, :2].contiguous()
        case "expected an exponent in U8":
            tensors[scales] = tensors[scales].float()


@pytest.mark.parametrize(
    "why",
    [
        "expected a scale named",
        "expected packed FP4 of experts",
        r"as U8 \[E, N, K / 32, 16\], found U8 \[0",
        "expected an exponent in U8 for each of",
        "expected an exponent in U8",
    ],
)
def test_what_does_not_fit_together_is_refused(why, tmp_path):
    tensors = gpt_oss(tmp_path / "src")
    spoil(tensors, why)
    write(tmp_path / "bad", tensors, config_of(tmp_path / "src"))
    with pytest.raises(InputError, match=why):
        lowbit.plan(tmp_path / "bad", "bf16")


def test_no_output_keeps_it(tmp_path):
    gpt_oss(tmp_path / "src")
    with pytest.raises(InputError, match="can hold, found mxfp4 in the source; use --ignore"):
        lowbit.plan(tmp_path / "src", "int8", keep=[f"{AT}.gate_up_proj"])
    with pytest.raises(InputError, match="found e2m1; convert the checkpoint with `lowbit convert` first"):
        lowbit.load(tmp_path / "src")


def test_inspect_says_what_it_is(tmp_path, capsys, monkeypatch):
    tensors = gpt_oss(tmp_path / "src")
    found = lowbit.inspect(tmp_path / "src")
    assert found.quantization == "mxfp4: 4 × mxfp4 (e2m1, per group of 32, e8m0 scales)"
    assert (found.experts, found.quantized_modules) == (5, 4)
    assert found.roles["experts-3d"] == {"modules": 4, "parameters": 2 * 5 * 64 * 3 * 96}
    floats = sum(t.numel() for n, t in tensors.items() if not n.endswith(("_blocks", "_scales")))
    assert found.parameters == 2 * 5 * 64 * 3 * 96 + floats
    assert any(o.startswith("4 tensors hold all experts of a layer") for o in found.odd)
    assert any("4 of them can only be dequantized" in o and "alternate" in o for o in found.odd)
    monkeypatch.setattr(sys, "argv", ["lowbit", "plan", str(tmp_path / "src"), "--scheme", "bf16"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith(f"{AT}.gate_up_proj "))
    assert line.split()[1:6] == ["5×192×64", "e2m1", "in", "U8", "BF16"]


def test_calibration_reads_what_a_conversion_writes(tmp_path):
    gpt_oss(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "bf16", "bf16")
    source, plain = Source(tmp_path / "src"), Source(tmp_path / "bf16")
    for name in plain.tensors:
        assert source.has(name) and same_bits(source.tensor(name), plain.tensor(name)), name
    windows = [IDS[0], IDS[0].flip(0)]
    report = lowbit.measure(tmp_path / "bf16", windows, reference=tmp_path / "src").to_dict()
    assert report["kl"] == 0
    for name in ("src", "bf16"):
        lowbit.calibrate(tmp_path / name, tmp_path / f"{name}-calib", "int8", method="gptq", data=windows)
        lowbit.convert(
            tmp_path / name, tmp_path / f"{name}-int8", "int8", calibration=tmp_path / f"{name}-calib"
        )
    ours, theirs = load(tmp_path / "src-int8"), load(tmp_path / "bf16-int8")
    assert ours.keys() == theirs.keys() and all(same_bits(ours[n], theirs[n]) for n in ours)
