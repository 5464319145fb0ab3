"""NVFP4 and MXFP4 sources of compressed-tensors, ModelOpt and Quark."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import check_killed_run, everything, int8_error
from fp4_checkpoints import KINDS, by_hand, config_of_library, published
from sample_models import (
    Tensors,
    block_fp8,
    check_quantized,
    deepseek_v3,
    fused_block_fp8,
    fused_mixture,
    llama,
    load,
    qwen3_moe,
    same_bits,
    write,
)

import lowbit
from lowbit.calibration.source import Source
from lowbit.checkpoint import decode, execute, verify
from lowbit.cli import main
from lowbit.errors import InputError
from lowbit.nn.quantizer import runs
from lowbit.scheme import get_scheme

NAME = "model.layers.0.mlp.up_proj"


def config_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "config.json").read_text())


def in_float(root: Path, model: tuple[Tensors, dict[str, Any]], meant: Tensors) -> None:
    """The same checkpoint with what FP4 means in float32, exactly."""
    write(root, {**model[0], **{f"{module}.weight": w for module, w in meant.items()}}, model[1])


@pytest.mark.parametrize("scheme", ["int8", "int8-block", "int8-weight-only", "fp8", "fp8-block", "mxfp8"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_becomes_eight_bits_as_if_it_were_dequantized_first(kind, scheme, tmp_path):
    meant = published(tmp_path / "src", kind, qwen3_moe())
    lowbit.convert(tmp_path / "src", tmp_path / "out", scheme)
    written, spec = load(tmp_path / "out"), get_scheme(scheme).weights
    assert len(meant) == 32 and spec is not None
    mxfp4_to_fp8 = kind.startswith("mxfp4") and spec.dtype.kind == "float"
    for module, w in meant.items():
        if not mxfp4_to_fp8:
            check_quantized(written, module, w, spec)
    report = lowbit.verify(tmp_path / "out", source=tmp_path / "src")
    assert report.ok and len(report.errors) == 32
    if mxfp4_to_fp8:  # its scales are powers of two, which FP8 holds its codes between
        assert all(e.largest == 0 for e in report.errors)
    assert not any("global" in n or n.endswith(("_2", "input_scale")) for n in written)


@pytest.mark.parametrize("scheme", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_float_is_what_the_codes_mean_rounded_once(kind, scheme, tmp_path):
    meant = published(tmp_path / "src", kind, llama())
    lowbit.convert(tmp_path / "src", tmp_path / "out", scheme)
    written, source = load(tmp_path / "out"), Source(tmp_path / "src")
    for module, w in meant.items():
        assert same_bits(source.weight(module), w), module
        narrow = w.to(torch.bfloat16 if scheme == "bf16" else torch.float16)
        assert same_bits(written[f"{module}.weight"], narrow), module
    assert "quantization_config" not in config_of(tmp_path / "out")
    assert written.keys() == llama()[0].keys()


@pytest.mark.parametrize("kind", KINDS)
def test_inspect_counts_weights_once(kind, tmp_path):
    published(tmp_path / "src", kind, llama())
    write(tmp_path / "float", *llama())
    found = lowbit.inspect(tmp_path / "src")
    words = {"nvfp4": "e2m1, per group of 16, e4m3 scales", "mxfp4": "e2m1, per group of 32, e8m0 scales"}
    name = kind.split()[0]
    assert f"14 × {name} ({words[name]})" in found.quantization and not found.odd
    assert found.parameters == lowbit.inspect(tmp_path / "float").parameters


# --- what lies beside it ----------------------------------------------------------------------


@pytest.mark.parametrize("said", ["FP8", "NVFP4", None])
def test_modelopts_config_in_a_file_of_its_own(said, tmp_path):
    """Scales of a KV cache in FP8 are carried; those of one in NVFP4 are for codes up to 6, not 448."""
    cache = {
        f"model.layers.{i}.self_attn.{m}_proj.{m}_scale": torch.tensor(0.5) for i in (0, 1) for m in "kv"
    }
    body = {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": said,
        "group_size": 16,
        "exclude_modules": ["lm_head"],
    }
    file = json.dumps({"producer": {"name": "modelopt"}, "quantization": body})
    meant = published(
        tmp_path / "src", "nvfp4 modelopt", llama(), said={}, files={"hf_quant_config.json": file},
        extra=cache if said else None,
    )  # fmt: skip
    done = lowbit.convert(tmp_path / "src", tmp_path / "out", "int8")
    written, found = load(tmp_path / "out"), config_of(tmp_path / "out")["quantization_config"]
    check_quantized(written, NAME, meant[NAME], get_scheme("int8").weights)
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    assert (found["kv_cache_scheme"] or {}).get("num_bits") == (8 if said == "FP8" else None)
    assert cache.keys() <= written.keys() if said == "FP8" else cache.keys().isdisjoint(written)
    left_out = [
        w for w in done.plan.warnings if "4 scales of a quantized KV cache or attention are left out" in w
    ]
    assert len(left_out) == (said == "NVFP4")


@pytest.mark.parametrize("scheme", [None, "NVFP4", {"num_bits": 4, "type": "float", "dynamic": False}])
def test_a_kv_cache_in_fp4_in_config_json(scheme, tmp_path):
    name = "model.layers.0.self_attn.k_proj.k_scale"
    said = {**KINDS["nvfp4 modelopt"][1], "kv_cache_scheme": scheme}
    published(tmp_path / "src", "nvfp4 modelopt", llama(), said=said, extra={name: torch.tensor(0.5)})
    lowbit.convert(tmp_path / "src", tmp_path / "out", "int8")
    assert config_of(tmp_path / "out")["quantization_config"]["kv_cache_scheme"] is None
    assert (name in load(tmp_path / "out")) == (scheme is None)


def fp8_attention(tensors: Tensors) -> Tensors:
    """Attention in FP8 per tensor, with scales of its inputs, as ModelOpt and Quark have it."""
    found = dict(tensors)
    for name in [n for n in tensors if "self_attn" in n and n.endswith("_proj.weight")]:
        scale = tensors[name].float().abs().max() / 448
        found[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
        found |= {f"{name}_scale": scale, f"{name.removesuffix('weight')}input_scale": torch.tensor(0.0625)}
    return found


def mixed(kind: str, modules: list[str]) -> dict[str, Any]:
    if kind == "mxfp4 quark":
        fp8 = {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}}
        return {**KINDS[kind][1], "layer_quant_config": {"*self_attn*": fp8}}
    fp8, fp4 = {"quant_algo": "FP8"}, {"quant_algo": "NVFP4", "group_size": 16}
    layers = {m: fp8 if "self_attn" in m else fp4 for m in modules}
    return {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}


@pytest.mark.parametrize("kind", ["nvfp4 modelopt", "mxfp4 quark"])
def test_fp8_beside_fp4(kind, tmp_path):
    tensors, config = qwen3_moe()
    coded = fp8_attention(tensors)
    said = mixed(kind, [n.removesuffix(".weight") for n in tensors if n.endswith("_proj.weight")])
    meant = published(tmp_path / "src", kind, (coded, config), only=".experts.", said=said)
    assert len(meant) == 24
    name = kind.split()[0]
    found = lowbit.inspect(tmp_path / "src").quantization
    assert f"24 × {name} " in found and "8 × fp8-static " in found
    lowbit.convert(tmp_path / "src", tmp_path / "out", "int8")
    written, spec = load(tmp_path / "out"), get_scheme("int8").weights
    assert spec is not None
    for module, w in meant.items():
        check_quantized(written, module, w, spec)
    q = "model.layers.1.self_attn.q_proj"
    check_quantized(written, q, coded[f"{q}.weight"].float() * coded[f"{q}.weight_scale"], spec)
    lowbit.convert(tmp_path / "src", tmp_path / "kept", "fp8", overrides={"*self_attn*": "fp8-static"})
    kept = load(tmp_path / "kept")  # as they were, with the scales of their inputs
    assert same_bits(kept[f"{q}.input_scale"], torch.tensor([0.0625]))
    assert lowbit.verify(tmp_path / "kept", source=tmp_path / "src").ok


@pytest.mark.parametrize("other", ["fp8", "int8", "fp8-block"])
def test_another_format_beside_fp4_in_config_groups(other, tmp_path):
    """compressed-tensors' `mixed-precision`: the MLP in NVFP4, attention as lowbit writes it."""
    lowbit.convert(write(tmp_path / "float", *llama()), tmp_path / "first", other, ignore=["*.mlp.*"])
    theirs = config_of(tmp_path / "first")["quantization_config"]["config_groups"]["group_0"]
    said = config_of_library("NVFP4", format="mixed-precision", ignore=["lm_head"])
    said["config_groups"]["group_0"]["targets"] = ["re:.*mlp.*"]
    said["config_groups"]["group_1"] = {**theirs, "targets": ["Linear"]}
    first = load(tmp_path / "first")
    meant = published(tmp_path / "src", "nvfp4 library", (first, llama()[1]), only=".mlp.", said=said)
    assert len(meant) == 6
    lowbit.convert(tmp_path / "src", tmp_path / "out", other)
    written, spec = load(tmp_path / "out"), get_scheme(other).weights
    assert spec is not None
    for module, w in meant.items():
        check_quantized(written, module, w, spec)
    attention = [n for n in first if "self_attn" in n]
    assert len(attention) == 16 and all(same_bits(written[n], first[n]) for n in attention)
    assert lowbit.verify(tmp_path / "out", source=tmp_path / "src").ok


@pytest.mark.parametrize("format", ["ascend", "sglang", "fp8"])
def test_other_formats_take_it_too(format, tmp_path):
    meant = published(tmp_path / "src", "nvfp4 modelopt", deepseek_v3())
    scheme = {"ascend": "int8", "sglang": "int8-block", "fp8": "fp8-block"}[format]
    done = lowbit.convert(tmp_path / "src", tmp_path / "out", scheme, format=format)
    report = lowbit.verify(tmp_path / "out", source=tmp_path / "src")
    assert report.ok and report.errors
    assert "expert_dtype" not in config_of(tmp_path / "out")
    in_float(tmp_path / "float", deepseek_v3(), meant)
    lowbit.convert(tmp_path / "float", tmp_path / "same", scheme, format=format)
    ours, theirs = load(tmp_path / "out"), load(tmp_path / "same")
    quantized = [m for m, d in done.plan.decisions.items() if d.scheme is not None]
    names = [n for n in ours if n.rpartition(".")[0] in quantized]
    assert len(quantized) > 20 and all(same_bits(ours[n], theirs[n]) for n in names)


def test_rotations_within_the_weights_are_no_matter(tmp_path):
    said = config_of_library("NVFP4", transform_config=rotating("weight_input", "weight_output"))
    published(tmp_path / "src", "nvfp4 library", llama(), said=said)
    assert "transform_config" not in str(lowbit.plan(tmp_path / "src", "int8").config)
    quark = {**KINDS["mxfp4 quark"][1], "algo_config": [{"name": "rotation", "r1": True, "r4": False}]}
    published(tmp_path / "quark", "mxfp4 quark", llama(), said=quark)
    lowbit.plan(tmp_path / "quark", "int8")


def test_an_embedding_and_a_head_in_fp4_are_dequantized(tmp_path):
    """ModelOpt's `nvfp4_embed`, and heads that it quantizes."""
    tensors, config = llama()
    meant = {}
    for module in ("model.embed_tokens", "lm_head"):
        stored, means = by_hand("nvfp4", tensors.pop(f"{module}.weight").float())
        tensors |= {f"{module}.{suffix}": t for suffix, t in stored.items()}
        meant[module] = means.float()
    published(tmp_path / "src", "nvfp4 modelopt", (tensors, config))
    lowbit.convert(tmp_path / "src", tmp_path / "out", "int8")
    written = load(tmp_path / "out")
    for module, w in meant.items():
        assert same_bits(written[f"{module}.weight"], w.to(torch.bfloat16))
        assert f"{module}.weight_scale_2" not in written


# --- running and calibrating ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nvfp4 modelopt", "mxfp4 library"])
def test_the_result_runs_and_means_what_transformers_reads(kind, tmp_path):
    published(tmp_path / "src", kind, qwen3_moe())
    assert int8_error(tmp_path) < 0.04  # of rows that differ much in size


@pytest.mark.parametrize("kind", KINDS)
def test_lowbit_does_not_run_fp4(kind, tmp_path):
    published(tmp_path / "src", kind, qwen3_moe())
    with pytest.raises(InputError, match="found e2m1; convert the checkpoint with `lowbit convert` first"):
        lowbit.load(tmp_path / "src")


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_kept_is_said_before_it_is_calibrated(kind, tmp_path):
    """The conversion said it, hours later."""
    published(tmp_path / "src", kind, qwen3_moe())
    with pytest.raises(
        InputError, match=r"keep model\.layers\.0\.\S+: .* found (nv|mx)fp4 in the source; ignore"
    ):
        lowbit.calibrate(
            tmp_path / "src", tmp_path / "calib", "int8", method="gptq", keep=["*.experts.*"], device="cpu",
            data=[torch.arange(3, 40)],
        )  # fmt: skip
    assert not (tmp_path / "calib").exists()


@pytest.mark.parametrize("kind", ["nvfp4 modelopt", "nvfp4 library", "mxfp4 quark"])
def test_calibrating_and_evaluating_read_it(kind, tmp_path):
    """As if it were in float32: bit for bit."""
    meant = published(tmp_path / "src", kind, qwen3_moe())
    in_float(tmp_path / "float", qwen3_moe(), meant)
    windows = [torch.randint(3, 60, (24,), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    given = {"overrides": {"*.experts.*": "int8"}}
    for name in ("src", "float"):
        lowbit.calibrate(
            tmp_path / name, tmp_path / f"{name}-calib", "int8-static", method="gptq", data=windows, device="cpu",
            **given,
        )  # fmt: skip
        lowbit.convert(tmp_path / name, tmp_path / f"{name}-out", calibration=tmp_path / f"{name}-calib")
    assert lowbit.verify(tmp_path / "src-out").ok
    ours, theirs = load(tmp_path / "src-out"), load(tmp_path / "float-out")
    coded = [n for n in ours if n.rpartition(".")[0] in meant]
    assert len(coded) == 32 * 2 + 8 and all(same_bits(ours[n], theirs[n]) for n in coded)
    measured = [
        lowbit.measure(tmp_path / "src-out", windows, reference=tmp_path / name, device="cpu").to_dict()["kl"]
        for name in ("src", "float")
    ]
    assert measured[0] == measured[1]
    with pytest.raises(lowbit.InputError, match="expected a calibrated input scale"):  # FP4's are none
        lowbit.plan(tmp_path / "src", "int8-static", **given)


def test_keeping_it_is_refused(tmp_path):
    published(tmp_path / "src", "nvfp4 library", qwen3_moe())
    with pytest.raises(InputError, match="found nvfp4 in the source; use --ignore to have it in float"):
        lowbit.plan(tmp_path / "src", "int8", keep=["*.experts.*"])


def test_transformers_own_loading_is_left_alone():
    assert not runs(config_of_library("NVFP4")) and not runs(config_of_library("MXFP4"))


# --- killed, damaged, wrong -------------------------------------------------------------------


def test_a_killed_run_goes_on(tmp_path):
    published(tmp_path / "src", "nvfp4 modelopt", llama(layers=6))
    check_killed_run(tmp_path, "int8", 20)


@pytest.mark.parametrize("kind", ["nvfp4 modelopt", "mxfp4 library", "blocks", "fused blocks"])
def test_scales_read_a_few_rows_at_a_time_are_the_same(kind, tmp_path, monkeypatch):
    """Of weights, and of experts in 3-D that lie transposed; ragged at the end."""
    src = tmp_path / "src"
    if kind == "blocks":
        write(src, *block_fp8(*llama(kv_heads=2)))
    elif kind == "fused blocks":
        fused, _, config = fused_mixture("qwen3-vl")
        write(src, *fused_block_fp8(fused, config))
    else:
        published(src, kind, llama(kv_heads=2))
    for scheme in ("int8", "mxfp8"):
        lowbit.convert(src, tmp_path / scheme, scheme)
    errors = lowbit.verify(tmp_path / "int8", source=src).errors
    monkeypatch.setattr(decode, "_SPAN_SCALES", 1)
    monkeypatch.setattr(execute, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(verify, "BLOCK_BYTES", 1000)
    for scheme in ("int8", "mxfp8"):
        lowbit.convert(src, tmp_path / "few" / scheme, scheme)
        assert everything(tmp_path / "few" / scheme) == everything(tmp_path / scheme)
    again = lowbit.verify(tmp_path / "few" / "int8", source=src).errors
    assert [e.largest for e in again] == [e.largest for e in errors] and len(errors) > 10


def test_a_flipped_bit_of_the_source_is_in_the_errors(tmp_path):
    """And one of the result is a problem: its checksum differs."""
    published(tmp_path / "src", "nvfp4 modelopt", llama())
    lowbit.convert(tmp_path / "src", tmp_path / "out", "bf16")
    before = lowbit.verify(tmp_path / "out", source=tmp_path / "src")
    tensors, config = load(tmp_path / "src"), config_of(tmp_path / "src")
    tensors[f"{NAME}.weight"][3, 5] ^= 0x60
    write(tmp_path / "src", tensors, config)
    after = lowbit.verify(tmp_path / "out", source=tmp_path / "src")
    assert before.ok and after.ok and after.errors[0].name == f"{NAME}.weight"
    assert after.errors[0].sqnr_db < min(e.sqnr_db for e in before.errors) - 3
    file = tmp_path / "out" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)
    assert "checksum differs" in " ".join(lowbit.verify(tmp_path / "out").problems)


def test_a_source_itself_is_verified(tmp_path):
    """Scales in E4M3 may be 0, of groups of zeros."""
    published(tmp_path / "src", "nvfp4 modelopt", llama())
    tensors = load(tmp_path / "src")
    tensors[f"{NAME}.weight_scale"].view(torch.uint8)[1, 1] = 0
    write(tmp_path / "src", tensors, config_of(tmp_path / "src"))
    assert lowbit.verify(tmp_path / "src").problems == ()


def nan_in(scale: torch.Tensor) -> torch.Tensor:
    scale = scale.clone()
    scale.view(torch.uint8)[2, 3] = 0xFF if scale.dtype == torch.uint8 else 0x7F
    return scale


WRONG: dict[str, tuple[str, Any, str]] = {
    "no second scale": ("nvfp4 modelopt", {"weight_scale_2": None}, "expected a scale named .*weight_scale_2 beside"),
    "no global scale": (
        "nvfp4 library", {"weight_global_scale": None}, "expected a scale named .*weight_global_scale beside",
    ),
    "no scale": ("nvfp4 library", {"weight_scale": None}, "expected a scale named .*weight_scale beside NVFP4 codes"),
    "a NaN": ("nvfp4 modelopt", {"weight_scale": nan_in}, "weight_scale: expected finite scales, found nan at .* 19"),
    "a NaN of E8M0": ("mxfp4 quark", {"weight_scale": nan_in}, "expected finite scales, found nan at flat index 11"),
    "a global NaN": (
        "nvfp4 modelopt", {"weight_scale_2": lambda s: s * float("nan")}, "weight_scale_2: expected one finite number",
    ),
    "a global zero": ("nvfp4 library", {"weight_global_scale": torch.zeros_like}, "expected a positive scale, found 0"),
    "two global ones": (
        "nvfp4 modelopt", {"weight_scale_2": lambda s: torch.stack([s, s])}, "_2: expected one finite number",
    ),
    "groups of 32": (
        "nvfp4 modelopt", {"weight_scale": lambda s: s[:, ::2].contiguous()},
        r"expected a scale of shape \[256, 8\] .*found \[256, 4\]",
    ),
    "scales in float": (
        "nvfp4 library", {"weight_scale": lambda s: s.float()}, "expected scales of NVFP4 in F8_E4M3, found F32",
    ),
    "scales of the other": (
        "mxfp4 library", {"weight_scale": lambda s: s.view(torch.float8_e4m3fn)},
        "expected scales of MXFP4 in U8 or F8_E8M0, found F8_E4M3",
    ),
    "half a row": (
        "nvfp4 modelopt", {"weight": lambda w: w[:, :-3].contiguous()}, "whole groups of 16 columns, found 122 columns",
    ),
    "three dimensions": (
        "nvfp4 modelopt", {"weight": lambda w: w[None].contiguous()}, r"packed FP4 as U8 \[N, K / 2\], found U8 \[1, ",
    ),
    "INT4 in its place": (
        "nvfp4 library", {"weight_packed": lambda w: w.view(torch.int32)}, "expected FP4 codes as .* found I32",
    ),
    "zero points": (
        "nvfp4 library", {"weight_zero_point": torch.zeros(256, 8)}, "expected symmetric weights in the order",
    ),
    "smoothed inputs": ("nvfp4 modelopt", {"pre_quant_scale": torch.ones(128)}, "inputs that this tensor changes"),
    "rotated inputs": ("mxfp4 quark", {"input_rotation": torch.eye(128)}, "inputs that this tensor changes"),
    "rotated alike": ("mxfp4 quark", {"shared_input_rotation_128": torch.eye(128)}, "inputs that this tensor changes"),
    "FP8 in its place": (
        "nvfp4 modelopt", {"weight": torch.zeros(256, 128).to(torch.float8_e4m3fn), "weight_scale": torch.ones(())},
        r"expected what quant_algo of ModelOpt says \(NVFP4\), found FP8 codes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_refused(what, tmp_path, monkeypatch, capsys):
    kind, changes, message = WRONG[what]
    published(tmp_path / "src", kind, llama())
    tensors, config = load(tmp_path / "src"), config_of(tmp_path / "src")
    for suffix, change in changes.items():
        name = f"{NAME}.{suffix}"
        if change is None:
            del tensors[name]
        else:
            tensors[name] = change(tensors[name]) if callable(change) else change
    write(tmp_path / "src", tensors, config)
    with pytest.raises(InputError, match=message):
        lowbit.convert(tmp_path / "src", tmp_path / "out", "int8")
    arguments = ["lowbit", "convert", str(tmp_path / "src"), str(tmp_path / "out"), "--scheme", "int8"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "error" in capsys.readouterr().err
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("scheme", ["int8", "bf16", "int8-block"])
@pytest.mark.parametrize("kind", ["nvfp4 modelopt", "mxfp4 quark"])
def test_what_is_no_number_is_named_with_its_place(kind, scheme, tmp_path, monkeypatch):
    published(tmp_path / "src", kind, llama())
    tensors, config = load(tmp_path / "src"), config_of(tmp_path / "src")
    scale = tensors[f"{NAME}.weight_scale"].view(torch.uint8)
    scale[:131] = 0
    scale[130, 3], column = (0x7E, 48) if kind.startswith("nvfp4") else (254, 96)  # 448, and 2¹²⁷
    tensors[f"{NAME}.weight"][130, column // 2] = 0x70  # 0 and 6
    if kind.startswith("nvfp4"):
        tensors[f"{NAME}.weight_scale_2"] = torch.tensor(2.0**120)
    write(tmp_path / "src", tensors, config)
    monkeypatch.setattr(decode, "_SPAN_SCALES", 1)
    monkeypatch.setattr(execute, "BLOCK_BYTES", 1000)
    with pytest.raises(InputError, match=rf"up_proj.weight: expected .*, found inf at \[130, {column + 1}\]"):
        lowbit.convert(tmp_path / "src", tmp_path / "out", scheme)
    scale[130, 3] = 0x7F if kind.startswith("nvfp4") else 0xFF
    write(tmp_path / "src", tensors, config)
    at = 130 * (8 if kind.startswith("nvfp4") else 4) + 3
    with pytest.raises(
        InputError, match=f"weight_scale: expected finite scales, found nan at flat index {at}$"
    ):
        lowbit.convert(tmp_path / "src", tmp_path / "out", scheme)


def rotating(*locations: str) -> dict[str, Any]:
    apply = [{"targets": ["Linear"], "location": location} for location in locations]
    return {"config_groups": {"R1": {"type": "hadamard", "apply": apply}}}


CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    ("nvfp4 modelopt", {"quant_algo": "NVFP4", "group_size": 32}, "expected NVFP4 in groups of 16, found 32"),
    ("nvfp4 modelopt", {"quant_algo": "FP8"}, r"says \(FP8\), found FP4 codes"),
    ("nvfp4 modelopt", {"quant_algo": "MIXED_PRECISION"}, "found 'MIXED_PRECISION'"),
    (
        "nvfp4 modelopt",
        {"quant_algo": "MIXED_PRECISION", "quantized_layers": {NAME: {"quant_algo": "W4A16_AWQ"}}},
        "found 'W4A16_AWQ'",
    ),
    ("mxfp4 quark", {"global_quant_config": {"weight": {"dtype": "mx"}}}, "of Quark expected all weights in"),
    ("mxfp4 quark", {"algo_config": [{"name": "rotation", "r4": True}]}, "rotations while running"),
    ("mxfp4 quark", {"algo_config": {"name": "rotation", "online_r1_rotation": True}}, "rotations while running"),
    ("nvfp4 library", {"transform_config": rotating("weight_input", "input")}, "hadamard, location=input"),
    ("nvfp4 library", {"transform_config": rotating("k_cache")}, "transforms activations while running"),
    (
        "mxfp4 quark",
        {"global_quant_config": {"weight": {"dtype": "fp4", "qscheme": "per_group", "group_size": 32}}},
        "of Quark expected all weights in",
    ),
    ("nvfp4 library", {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int",
      "group_size": 32, "strategy": "group"}}}}, "expected packed codes as I32 .* found U8, which is FP4"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "change", "message"), CONFIGS)
def test_configs_that_do_not_fit_are_refused(kind, change, message, tmp_path):
    published(tmp_path / "src", kind, llama(), said={**KINDS[kind][1], **change})
    with pytest.raises(InputError, match=message):
        lowbit.plan(tmp_path / "src", "int8")
    assert any("cannot be converted" in word for word in lowbit.inspect(tmp_path / "src").odd)
