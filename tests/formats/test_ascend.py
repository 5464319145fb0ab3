"""msModelSlim's format: what is written, against numpy and fractions; what is read, back and from elsewhere."""

from __future__ import annotations

import json
import signal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conversions import RUN, everything, start, wait_for_jobs
from sample_models import block_fp8, deepseek_v3, fused_mixture, llama, load, qwen3_moe, same_bits, write
from torch import Tensor

import lowbit
from lowbit.calibration import store
from lowbit.checkpoint import execute
from lowbit.checkpoint.opening import open_checkpoint
from lowbit.errors import InputError
from lowbit.formats import get_format, read
from lowbit.formats.format import Layout
from lowbit.scheme import SCHEMES, get_scheme

FORMAT = get_format("ascend")
DESCRIPTION = "quant_model_description.json"
EXTRA = {"version", "model_quant_type", "metadata", "group_size", "optional"}


def describe(out: Path) -> dict:
    return json.loads((out / DESCRIPTION).read_text())


def convert(src: Path, out: Path, scheme: str = "int8", **kw) -> tuple[dict[str, Tensor], dict]:
    lowbit.convert(src, out, scheme, format="ascend", **kw)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    written, description = load(out), describe(out)
    together = {n for n in description if n.endswith(".experts.weight")}
    more = EXTRA | together | {"lm_head.weight"} - set(written)  # a head that is in no shard may be tied
    assert set(description) - more == set(written), "every tensor, and nothing else"
    assert description["version"] == "1.0.0" and description["metadata"] == description["optional"] == {}
    return written, description


def with_biases(model, seed: int = 5):
    """The same model with biases beside every Linear of attention."""
    tensors, config = model
    generator = torch.Generator().manual_seed(seed)
    for name in [n for n in tensors if "_proj.weight" in n and "self_attn" in n]:
        dtype, rows = tensors[name].dtype, tensors[name].shape[0]
        bias = torch.randn(rows, generator=generator).to(dtype)
        tensors[name.replace(".weight", ".bias")] = bias
    return tensors, {**config, "attention_bias": True}


def calibrated(
    src: Path, where: Path, scheme: str, modules, *, offset: int | None = None, codes: bool = False
):
    """A calibration that has an input scale for each module, and codes of its own if asked for."""
    writer = store.Writer(where, {
        "scheme": scheme, "method": {"name": "absmax"}, "data": {}, "source": {"fingerprint": store.fingerprint(src)},
    })  # fmt: skip
    tensors: dict[str, Tensor] = {}
    for i, module in enumerate(modules):
        tensors[f"{module}.input_scale"] = torch.tensor([0.011 + 0.003 * i])
        if offset is not None:
            tensors[f"{module}.input_zero_point"] = torch.tensor([offset], dtype=torch.int8)
        if codes:
            weight = load(src)[f"{module}.weight"].float()
            scale = weight.abs().amax(1, keepdim=True) / 100
            tensors[f"{module}.weight"] = (weight / scale).round().to(torch.int8)
            tensors[f"{module}.weight_scale"] = scale
    writer.write("model.layers.0", tensors)
    writer.finish()
    return tensors


def projections(src: Path, part: str = "") -> list[str]:
    return [
        n.removesuffix(".weight") for n in load(src) if "_proj" in n and n.endswith(".weight") and part in n
    ]


def int8_by_numpy(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    values = x.float().numpy()
    scale = np.abs(values).max(1, keepdims=True) / np.float32(127)
    return np.clip(np.rint(values / scale), -127, 127).astype(np.int8), scale


# --- what is written ----------------------------------------------------------------------------


def test_the_schemes_that_it_holds():
    held = [s for s in SCHEMES if SCHEMES[s].weights and FORMAT.holds(SCHEMES[s])]
    assert held == ["int8", "int8-static", "int8-static-asym", "int8-weight-only", "mxfp8"]


@pytest.mark.parametrize(("scheme", "kind"), [("int8", "W8A8_DYNAMIC"), ("int8-weight-only", "W8A16")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_int8_with_a_scale_per_channel(tmp_path, scheme, kind, dtype):
    tensors, config = with_biases(llama(dtype=dtype))
    src = write(tmp_path / "src", tensors, config)
    written, description = convert(src, tmp_path / "out", scheme, max_shard_size="100KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert description["model_quant_type"] == kind and description["group_size"] == 0
    for module in projections(src):
        codes, scale = int8_by_numpy(tensors[f"{module}.weight"])
        assert written[f"{module}.weight"].dtype == torch.int8
        np.testing.assert_array_equal(written[f"{module}.weight"].numpy(), codes)
        np.testing.assert_array_equal(written[f"{module}.weight_scale"].numpy(), scale)
        offset = written[f"{module}.weight_offset"]
        assert (offset.dtype, offset.shape) == (torch.float32, (codes.shape[0], 1)) and not offset.any()
        assert {description[f"{module}.{n}"] for n in ("weight", "weight_scale", "weight_offset")} == {kind}
    for name in tensors:
        if "_proj.weight" not in name:
            assert description[name] == "FLOAT" and same_bits(written[name], tensors[name])


def test_mxfp8_is_that_of_compressed_tensors(tmp_path):
    tensors, config = llama()
    src = write(tmp_path / "src", tensors, config)
    written, description = convert(src, tmp_path / "out", "mxfp8")
    lowbit.convert(src, tmp_path / "other", "mxfp8")
    other = load(tmp_path / "other")
    assert set(written) == set(other) and all(same_bits(written[n], other[n]) for n in other)
    name = "model.layers.0.mlp.down_proj.weight"
    assert (written[name].dtype, written[name + "_scale"].dtype) == (torch.float8_e4m3fn, torch.uint8)
    assert written[name + "_scale"].shape == (128, 256 // 32)
    assert (
        description[name] == "W8A8_MXFP8" == description["model_quant_type"]
        and description["group_size"] == 32
    )


def check_static(
    written, module: str, weight: Tensor, given, bias: Tensor | None, dtype: torch.dtype
) -> None:
    """deq_scale and quant_bias by exact fractions, from what is written and what was given."""
    if f"{module}.weight" in given:
        codes, scale = given[f"{module}.weight"].numpy(), given[f"{module}.weight_scale"].numpy()
    else:
        codes, scale = int8_by_numpy(weight)
    np.testing.assert_array_equal(written[f"{module}.weight"].numpy(), codes)
    input_scale, offset = written[f"{module}.input_scale"], written[f"{module}.input_offset"]
    assert (input_scale.dtype, offset.dtype) == (torch.float32, torch.float32)
    assert same_bits(input_scale, given[f"{module}.input_scale"]) and offset.shape == (1,)
    zero = int(given.get(f"{module}.input_zero_point", torch.zeros(1)))
    assert float(offset) == zero
    deq = np.float32(input_scale.numpy()) * scale[:, 0]
    stored = written[f"{module}.deq_scale"]
    if dtype == torch.float16:
        assert stored.dtype == torch.int64
        np.testing.assert_array_equal(stored.numpy(), deq.view(np.int32).astype(np.int64))
    else:
        assert stored.dtype == torch.float32
        np.testing.assert_array_equal(stored.numpy(), deq)
    quant_bias = written[f"{module}.quant_bias"]
    assert (quant_bias.dtype, quant_bias.shape) == (torch.int32, (codes.shape[0],))
    for row, found in enumerate(quant_bias.tolist()):
        want = 0 if bias is None else round(Fraction(float(bias[row])) / Fraction(float(deq[row])))
        assert found == want - zero * sum(map(int, codes[row])), (module, row)
    assert f"{module}.weight_scale" not in written


@pytest.mark.parametrize("codes", [False, True], ids=["rounded here", "calibration's codes"])
@pytest.mark.parametrize("offset", [None, -37], ids=["symmetric", "offset"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_static_scales_and_biases_are_exact(tmp_path, monkeypatch, dtype, offset, codes):
    monkeypatch.setattr(execute, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(execute, "COPY_BYTES", 336)  # cuts rows
    tensors, config = with_biases(llama(dtype=dtype, layers=1))
    src = write(tmp_path / "src", tensors, config)
    scheme = "int8-static" if offset is None else "int8-static-asym"
    given = calibrated(src, tmp_path / "calib", scheme, projections(src), offset=offset, codes=codes)
    written, description = convert(src, tmp_path / "out", scheme, calibration=tmp_path / "calib")
    assert description["model_quant_type"] == "W8A8"
    for module in projections(src):
        bias = tensors.get(f"{module}.bias")
        check_static(written, module, tensors[f"{module}.weight"], given, bias, dtype)
        kinds = {description[n] for n in written if n.startswith(module + ".") and not n.endswith(".bias")}
        assert kinds == {"W8A8"} and description.get(f"{module}.bias", "FLOAT") == "FLOAT"
    assert lowbit.verify(tmp_path / "out", src).ok


def test_a_bias_that_int32_does_not_hold_is_refused(tmp_path):
    tensors, config = with_biases(llama(layers=1))
    tensors["model.layers.0.self_attn.q_proj.bias"][3] = 1e6
    src = write(tmp_path / "src", tensors, config)
    calibrated(src, tmp_path / "calib", "int8-static", projections(src))
    with pytest.raises(
        InputError, match=r"q_proj\.quant_bias: expected a bias that fits into int32.* in row 3"
    ):
        lowbit.convert(src, tmp_path / "out", "int8-static", format="ascend", calibration=tmp_path / "calib")
    assert not (tmp_path / "out").exists()


def test_block_fp8_of_deepseek_in_one_step(tmp_path):
    """The job of an Ascend 910B, which reads no FP8: what engines want in float is dequantized, the rest is int8."""
    tensors, config = block_fp8(*deepseek_v3())
    src = write(tmp_path / "src", tensors, config, place=lambda n: int(n.endswith("scale_inv")))
    written, description = convert(src, tmp_path / "out", "int8", max_shard_size="200KB")
    lowbit.convert(src, tmp_path / "int8", "int8")
    lowbit.convert(src, tmp_path / "bf16", "bf16")
    int8, bf16 = load(tmp_path / "int8"), load(tmp_path / "bf16")
    quantized = {n.removesuffix(".weight") for n, kind in description.items() if kind == "W8A8_DYNAMIC"}
    quantized = {m for m in quantized if f"{m}.weight" in written}
    for name, t in written.items():
        module = name.rpartition(".")[0]
        if module not in quantized:
            assert description[name] == "FLOAT" and same_bits(t, bf16[name]), name
        elif not name.endswith("weight_offset"):
            assert same_bits(t, int8[name]), name
    for layer in (0, 1):
        attention = f"model.layers.{layer}.self_attn"
        for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"):
            assert f"{attention}.{name}" in quantized
        assert f"{attention}.kv_b_proj" not in quantized
    assert sum(".experts." in m for m in quantized) == 12 and "model.layers.1.mlp.gate" not in quantized
    assert not any(m.startswith("model.layers.2.") for m in quantized), "multi-token prediction"
    assert lowbit.verify(tmp_path / "out", src).ok


@pytest.mark.parametrize("model", ["qwen3.5", "qwen3-vl"])
def test_experts_fused_into_3d_tensors(tmp_path, model):
    fused, split, config = fused_mixture(model)
    from_fused, description = convert(write(tmp_path / "fused", fused, config), tmp_path / "a")
    from_split, _ = convert(write(tmp_path / "split", split, config), tmp_path / "b")
    assert set(from_fused) == set(from_split) and all(
        same_bits(from_fused[n], from_split[n]) for n in from_split
    )
    assert sum(".experts." in n and n.endswith("_proj.weight") for n in description) == 18


def test_static_attention_and_dynamic_experts(tmp_path):
    """The usual recipe for DeepSeek, by an override; and from int8-static, whose experts cannot be static."""
    src = write(tmp_path / "src", *deepseek_v3())
    attention = [m for m in projections(src, "self_attn") if "kv_b" not in m and "layers.2" not in m]
    given = calibrated(src, tmp_path / "calib", "int8", attention)
    static = {r"re:model\.layers\.[01]\.self_attn\.(q_a|q_b|kv_a|o)_proj": "int8-static"}
    written, description = convert(src, tmp_path / "out", calibration=tmp_path / "calib", overrides=static)
    tensors = load(src)
    for module in attention:
        check_static(written, module, tensors[f"{module}.weight"], given, None, torch.bfloat16)
    assert description["model.layers.1.mlp.experts.3.up_proj.weight"] == "W8A8_DYNAMIC"
    assert description["model_quant_type"] == "W8A8"
    kept = ("kv_b", "layers.2", ".experts.")
    everywhere = [m for m in projections(src) if not any(k in m for k in kept)]
    calibrated(src, tmp_path / "static", "int8-static", everywhere)
    plan = lowbit.plan(src, "int8-static", format="ascend", calibration=tmp_path / "static")
    expert = plan.decisions["model.layers.1.mlp.experts.0.gate_proj"]
    assert expert.scheme == get_scheme("int8")
    assert expert.reason == "vLLM-Ascend does not run experts as W8A8; dynamic activations instead"


@pytest.mark.parametrize("fmt", ["ascend", "compressed-tensors"])
def test_a_calibrations_codes_of_what_stays_in_float_are_dequantized(tmp_path, fmt):
    """kv_b_proj by the engine's wish, o_proj by the user's: what lies there is what the description says."""
    src = write(tmp_path / "src", *deepseek_v3())
    given = calibrated(src, tmp_path / "calib", "int8", projections(src, "self_attn"), codes=True)
    done = lowbit.convert(
        src, tmp_path / "out", "int8", format=fmt, calibration=tmp_path / "calib", ignore=["*.o_proj"]
    )
    assert any("stay in float that the calibration quantized" in w for w in done.plan.warnings)
    written = load(tmp_path / "out")
    kept = projections(src, "o_proj") + (projections(src, "kv_b_proj") if fmt == "ascend" else [])
    for module in kept:
        want = given[f"{module}.weight"].float() * given[f"{module}.weight_scale"]
        assert same_bits(written[f"{module}.weight"], want.to(torch.bfloat16))
        assert f"{module}.weight_scale" not in written
    assert lowbit.verify(tmp_path / "out", src).ok


def test_experts_have_a_common_name(tmp_path):
    """vLLM-Ascend looks for it where it does not know an architecture's names of experts: Mixtral's, Qwen2-MoE's."""
    src = write(tmp_path / "src", *deepseek_v3())
    _, description = convert(src, tmp_path / "out")
    assert {n: t for n, t in description.items() if n.endswith(".experts.weight")} == {
        "model.layers.1.mlp.experts.weight": "W8A8_DYNAMIC"
    }
    assert lowbit.verify(tmp_path / "out", src).ok
    _, description = convert(src, tmp_path / "float", ignore=["*.experts.*"])
    assert not any(n.endswith(".experts.weight") for n in description)


def test_experts_in_float_in_one_tensor_have_the_names_of_the_first(tmp_path):
    """vLLM-Ascend asks for those, and ended with a KeyError."""
    fused, _, config = fused_mixture("qwen3-vl")
    src = write(tmp_path / "src", fused, config)
    lowbit.convert(src, tmp_path / "out", "int8", format="ascend", ignore=["*.layers.1.mlp.experts*"])
    description, written = describe(tmp_path / "out"), load(tmp_path / "out")
    (parent,) = {n.rpartition(".")[0] for n in written if n.endswith("layers.1.mlp.experts.gate_up_proj")}
    for name in (".weight", ".0.gate_proj.weight", ".0.up_proj.weight", ".0.down_proj.weight"):
        assert description[parent + name] == "FLOAT" and parent + name not in written
    assert lowbit.verify(tmp_path / "out", src).ok
    description[f"{parent.replace('layers.1', 'layers.9')}.0.up_proj.weight"] = "FLOAT"
    (tmp_path / "out" / DESCRIPTION).write_text(json.dumps(description))
    assert not lowbit.verify(tmp_path / "out", src).ok, "no tensor of that layer"


def test_a_tied_head_is_described(tmp_path):
    src = write(tmp_path / "src", *llama(tied=True))
    lowbit.convert(src, tmp_path / "out", "int8", format="ascend")
    assert describe(tmp_path / "out")["lm_head.weight"] == "FLOAT" and "lm_head.weight" not in load(
        tmp_path / "out"
    )
    assert lowbit.verify(tmp_path / "out", src).ok


@pytest.mark.parametrize("model", [llama, qwen3_moe, deepseek_v3])
def test_what_the_engine_looks_up_is_there_and_agrees(tmp_path, model):
    """vLLM-Ascend asks for `prefix.weight` of each member of what it fuses, and wants one answer."""
    src = write(tmp_path / "src", *model())
    _, description = convert(src, tmp_path / "out")
    fused = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa"))
    for module in projections(src):
        parent, _, name = module.rpartition(".")
        for members in fused:
            if name in members:
                assert len({description[f"{parent}.{m}.weight"] for m in members}) == 1
        if ".experts." in module:
            first = module.partition(".experts.")[0] + ".experts.0"
            assert len({description[f"{first}.{p}_proj.weight"] for p in ("gate", "up", "down")}) == 1


def test_shapes_and_joins_that_engines_refuse():
    mx, only, static = (get_scheme(s) for s in ("mxfp8", "int8-weight-only", "int8-static"))
    assert FORMAT.refuse(mx, (64, 128), "") == "" and "multiple of 64" in FORMAT.refuse(mx, (64, 96), "")
    assert FORMAT.refuse(only, (64, 128), "") == "vLLM-Ascend runs W8A16 with one scale per channel only"
    assert FORMAT.refuse(static, (64, 128), "fused") == "" and "experts as W8A8" in FORMAT.refuse(
        static, (64, 128), "experts"
    )
    assert FORMAT.refuse(get_scheme("fp8"), (64, 128), "") == "the ascend format does not hold fp8"


@pytest.mark.parametrize(("scheme", "message"), [
    ("fp8", r"cannot hold the scheme fp8; use int8, or mxfp8 on chips that multiply FP8"),
    ("fp8-block", r"cannot hold the scheme fp8-block; use int8"),
    ("int8-block", r"cannot hold the scheme int8-block; use int8, which has a scale per channel"),
    ("int8-static", r"calibrated input scale for every quantized module"),
])  # fmt: skip
def test_what_it_cannot_hold_is_refused_with_the_alternative(tmp_path, scheme, message):
    src = write(tmp_path / "src", *llama())
    with pytest.raises(InputError, match=message):
        lowbit.convert(src, tmp_path / "out", scheme, format="ascend")
    assert not (tmp_path / "out").exists()


def test_a_kv_cache_of_another_kind_is_refused():
    with pytest.raises(InputError, match="expected a KV cache of INT8 with a scale for each channel"):
        FORMAT.config(Layout(modules={}, ignored=(), kv_cache=get_scheme("fp8-static").activations))


# --- what is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int8", "mxfp8", "int8-static", "int8-static-asym"])
def test_what_is_written_is_read(tmp_path, scheme):
    tensors, config = with_biases(llama())
    src = write(tmp_path / "src", tensors, config)
    calibration = None
    if get_scheme(scheme).needs_calibration:
        calibration = tmp_path / "calib"
        calibrated(src, calibration, scheme, projections(src), offset=5 if "asym" in scheme else None)
    written, _ = convert(src, tmp_path / "out", scheme, calibration=calibration)
    checkpoint = open_checkpoint(tmp_path / "out")
    found = read(checkpoint.config, checkpoint.tensors)
    assert set(found) == set(projections(src))
    taken = {n for m in found.values() for n in m.names.values()}
    assert taken == {n for n in written if n.rpartition(".")[0] in found and not n.endswith(".bias")}
    # An offset of 0 cannot be told from the headers.
    want = "int8-static-asym" if scheme == "int8-static" else scheme
    assert {(m.scheme, m.format) for m in found.values()} == {(get_scheme(want), "ascend")}
    again, _ = convert(tmp_path / "out", tmp_path / "again", want)
    assert set(again) == set(written) and all(same_bits(again[n], written[n]) for n in written)


def test_what_is_kept_is_not_computed_again(tmp_path):
    src = write(tmp_path / "src", *llama())
    calibrated(src, tmp_path / "calib", "int8-static-asym", projections(src), offset=9)
    written, _ = convert(src, tmp_path / "out", "int8-static-asym", calibration=tmp_path / "calib")
    name = "model.layers.0.mlp.up_proj.quant_bias"
    written[name] += 1  # as rounded by another tool
    files = {DESCRIPTION: (tmp_path / "out" / DESCRIPTION).read_text()}
    other = write(tmp_path / "other", written, llama()[1], files=files)
    again, description = convert(other, tmp_path / "again", "int8", keep=["*.mlp.*"])
    assert same_bits(again[name], written[name]) and description[name] == "W8A8"
    assert description["model.layers.0.self_attn.q_proj.weight"] == "W8A8_DYNAMIC"


def test_to_compressed_tensors_bit_for_bit(tmp_path):
    src = write(tmp_path / "src", *qwen3_moe())
    convert(src, tmp_path / "ascend")
    lowbit.convert(tmp_path / "ascend", tmp_path / "out", "int8")
    lowbit.convert(src, tmp_path / "direct", "int8")
    out, direct = load(tmp_path / "out"), load(tmp_path / "direct")
    assert set(out) == set(direct) and all(same_bits(out[n], direct[n]) for n in out)
    configs = [json.loads((tmp_path / d / "config.json").read_text()) for d in ("out", "direct")]
    assert configs[0] == configs[1] and not (tmp_path / "out" / DESCRIPTION).exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_static_to_compressed_tensors_and_back(tmp_path, dtype):
    tensors, config = with_biases(llama(dtype=dtype))
    src = write(tmp_path / "src", tensors, config)
    given = calibrated(src, tmp_path / "calib", "int8-static-asym", projections(src), offset=-90)
    written, _ = convert(src, tmp_path / "out", "int8-static-asym", calibration=tmp_path / "calib")
    lowbit.convert(tmp_path / "out", tmp_path / "ct", "int8-static-asym")
    lowbit.convert(src, tmp_path / "direct", "int8-static-asym", calibration=tmp_path / "calib")
    ct, direct = load(tmp_path / "ct"), load(tmp_path / "direct")
    assert set(ct) == set(direct)
    for name in ct:
        if name.endswith("weight_scale"):  # through a product and a quotient in float32
            torch.testing.assert_close(ct[name], direct[name], rtol=2e-7, atol=0)
        else:
            assert same_bits(ct[name], direct[name]), name
    assert ct["model.layers.0.mlp.up_proj.input_zero_point"].tolist() == [-90]
    back, _ = convert(tmp_path / "direct", tmp_path / "back", "int8-static-asym")
    assert set(back) == set(written) and all(same_bits(back[n], written[n]) for n in written)
    lowbit.convert(tmp_path / "out", tmp_path / "floats", "bf16")
    name = "model.layers.1.self_attn.v_proj"
    codes, scale = int8_by_numpy(tensors[f"{name}.weight"])
    floats = load(tmp_path / "floats")
    torch.testing.assert_close(
        floats[f"{name}.weight"].float(), torch.from_numpy(codes * scale), rtol=2**-7, atol=0
    )
    assert set(floats) == set(tensors) and given
    with pytest.raises(InputError, match="the source's own are for int8-static-asym"):
        lowbit.convert(tmp_path / "out", tmp_path / "no", "int8-static")


@pytest.mark.parametrize("scheme", ["int8", "bf16", "int8-static-asym"])
@pytest.mark.parametrize("offset", [0, -90])
def test_biases_that_only_quant_bias_holds_are_not_lost(tmp_path, scheme, offset):
    """As versions of msModelSlim write them. Where it holds the part of the offset alone, there is no bias."""
    tensors, config = with_biases(llama())
    src = write(tmp_path / "src", tensors, config)
    calibrated(src, tmp_path / "calib", "int8-static-asym", projections(src), offset=offset)
    written, described = convert(src, tmp_path / "out", "int8-static-asym", calibration=tmp_path / "calib")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    left = {n: t for n, t in written.items() if not n.endswith("_proj.bias")}
    assert len(left) < len(written)
    files = {DESCRIPTION: json.dumps({n: k for n, k in described.items() if n in left or n not in written})}
    with pytest.raises(InputError, match=r"quant_bias: expected no bias in it.*which would be lost"):
        lowbit.convert(write(tmp_path / "old", left, config, files=files), tmp_path / "no", scheme)
    assert not (tmp_path / "no").exists()
    for name in [n for n in left if n.endswith("quant_bias")]:
        codes = left[name.replace("quant_bias", "weight")].float()
        left[name] = (-offset * codes.sum(1) - 0.25).round().to(torch.int32)  # in float32, as it does
    lowbit.convert(write(tmp_path / "none", left, config, files=files), tmp_path / "yes", scheme)
    assert lowbit.verify(tmp_path / "yes", tmp_path / "none").ok


@pytest.mark.parametrize("shape", [(), (1,), (64, 2)])
def test_a_static_scale_that_is_not_one_per_row_is_refused(tmp_path, shape):
    """The loops took what lies behind it for scales."""
    src = write(tmp_path / "src", *llama())
    written, described = convert(src, tmp_path / "out")
    module = "model.layers.0.mlp.up_proj"
    rows = len(written[f"{module}.weight"])
    del written[f"{module}.weight_scale"], written[f"{module}.weight_offset"]
    written |= {
        f"{module}.input_scale": torch.tensor([0.25]), f"{module}.input_offset": torch.tensor([3.0]),
        f"{module}.deq_scale": torch.ones(shape), f"{module}.quant_bias": torch.zeros(rows, dtype=torch.int32),
    }  # fmt: skip
    described |= {name: "W8A8" for name in written if name.startswith(module + ".")}
    bad = write(tmp_path / "bad", written, llama()[1], files={DESCRIPTION: json.dumps(described)})
    with pytest.raises(InputError, match=r"up_proj\.deq_scale: expected one number for each of"):
        lowbit.plan(bad, "bf16")


@pytest.mark.parametrize("kind", ["W8A8", "W8A8_MIX"])
def test_scales_for_static_and_dynamic_activations_in_one(tmp_path, kind):
    """W8A8_MIX was refused; where W8A8 has a scale of the weight too, that was carried, or in the way."""
    src = write(tmp_path / "src", *llama())
    written, described = convert(src, tmp_path / "out")
    module = "model.layers.0.mlp.up_proj"
    scale = written[f"{module}.weight_scale"].reshape(-1)
    written |= {
        f"{module}.input_scale": torch.tensor([0.25]), f"{module}.input_offset": torch.tensor([3.0]),
        f"{module}.deq_scale": 0.25 * scale, f"{module}.quant_bias": torch.zeros(scale.numel(), dtype=torch.int32),
    }  # fmt: skip
    written[f"{module}.quant_bias"] -= 3 * written[f"{module}.weight"].sum(1, dtype=torch.int32)
    described |= {name: kind for name in written if name.startswith(module + ".")}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    both = write(tmp_path / "both", written, config, files={DESCRIPTION: json.dumps(described)})
    lowbit.convert(both, tmp_path / "ct", "int8")
    lowbit.convert(src, tmp_path / "direct", "int8")
    ct, direct = load(tmp_path / "ct"), load(tmp_path / "direct")
    assert ct.keys() == direct.keys()
    assert same_bits(ct[f"{module}.weight"], direct[f"{module}.weight"])
    torch.testing.assert_close(
        ct[f"{module}.weight_scale"], direct[f"{module}.weight_scale"], rtol=2e-7, atol=0
    )
    lowbit.convert(both, tmp_path / "floats", "bf16")
    assert load(tmp_path / "floats").keys() == load(src).keys()
    assert lowbit.inspect(both).parameters == lowbit.inspect(src).parameters


def test_inspect_and_verify_know_it(tmp_path):
    src = write(tmp_path / "src", *deepseek_v3())
    convert(src, tmp_path / "out")
    found = lowbit.inspect(tmp_path / "out")
    assert found.quantization == "ascend: 26 × int8 (int8, per channel)" and found.quantized_modules == 26
    assert found.parameters == lowbit.inspect(src).parameters and DESCRIPTION not in found.other_files
    done = lowbit.verify(tmp_path / "out", src)
    assert (
        done.ok
        and len(done.errors) == 26
        and f"{DESCRIPTION} against the names of all tensors" in done.checked
    )


def damaged(out: Path, change) -> None:
    body = describe(out)
    change(body)
    (out / DESCRIPTION).write_text(json.dumps(body))


NAME = "model.layers.0.mlp.up_proj.weight"
DAMAGE = {
    "a name is missing": (lambda b: b.pop(NAME), rf"expected a type for every tensor, found none for {NAME}"),
    "a norm is missing": (lambda b: b.pop("model.norm.weight"), "found none for model.norm.weight"),
    "an unknown type": (lambda b: b.update({NAME: "W4A8_DYNAMIC"}), "found W4A8_DYNAMIC for"),
    "codes called float": (lambda b: b.update({NAME: "FLOAT"}), "without a weight of that type"),
    "another type": (lambda b: b.update({NAME: "W8A8"}), r"expected .*up_proj.quant_bias beside a weight of type W8A8"),
    "another dtype": (lambda b: b.update({NAME: "W8A8_MXFP8"}), r"expected F8_E4M3 \[N, K\] for W8A8_MXFP8, found I8"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_description_that_does_not_fit_is_refused(tmp_path, change, message):
    src = write(tmp_path / "src", *llama())
    convert(src, tmp_path / "out")
    damaged(tmp_path / "out", change)
    with pytest.raises(InputError, match=message):
        lowbit.plan(tmp_path / "out", "int8")
    done = lowbit.verify(tmp_path / "out")
    assert not done.ok and len(done.problems) == 1


def test_verify_finds_a_description_that_says_too_much_or_has_changed(tmp_path):
    src = write(tmp_path / "src", *llama())
    convert(src, tmp_path / "out")
    damaged(tmp_path / "out", lambda b: b.update({"model.ghost.weight": "FLOAT"}))
    problems = lowbit.verify(tmp_path / "out").problems
    assert problems == (
        f"{DESCRIPTION}: describes model.ghost.weight, which is in no shard",
        f"{DESCRIPTION}: missing, or changed since it was written; convert again",
    )


def test_new_scales_of_inputs_are_in_what_is_computed_from_them(tmp_path):
    """A static checkpoint calibrated again: its own deq_scale and quant_bias are of the old ones."""
    src = write(tmp_path / "src", *with_biases(llama()))
    modules = projections(src)
    calibrated(src, tmp_path / "first", "int8-static-asym", modules, offset=-90)
    out, _ = convert(src, tmp_path / "out", "int8-static-asym", calibration=tmp_path / "first")
    given = calibrated(tmp_path / "out", tmp_path / "second", "int8-static-asym", modules[::-1], offset=7)
    again, _ = convert(
        tmp_path / "out", tmp_path / "again", "int8-static-asym", calibration=tmp_path / "second"
    )
    for m in modules:
        scale = again[f"{m}.deq_scale"]
        old = out[f"{m}.deq_scale"] / out[f"{m}.input_scale"]
        torch.testing.assert_close(scale, given[f"{m}.input_scale"] * old, rtol=3e-7, atol=0)
        assert same_bits(again[f"{m}.weight"], out[f"{m}.weight"]) and again[
            f"{m}.input_offset"
        ].tolist() == [7]
        bias = (out[f"{m}.bias"].double() / scale.double()).round() if f"{m}.bias" in out else 0
        expected = bias - 7 * again[f"{m}.weight"].sum(1, dtype=torch.int32)
        assert torch.equal(again[f"{m}.quant_bias"].double(), expected.double()), m


def test_an_offset_of_all_rows_in_one_is_written_for_each(tmp_path):
    """It was an AssertionError in the midst of the work."""
    src = write(tmp_path / "src", *llama())
    written, _ = convert(src, tmp_path / "out", "int8")
    name = "model.layers.0.mlp.up_proj.weight_offset"
    files = {DESCRIPTION: (tmp_path / "out" / DESCRIPTION).read_text()}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    one = write(tmp_path / "one", {**written, name: torch.zeros(1)}, config, files=files)
    again, _ = convert(one, tmp_path / "again", "int8")
    assert again.keys() == written.keys() and all(same_bits(again[n], written[n]) for n in written)


@pytest.mark.parametrize("suffix", ["deq_scale", "input_scale"])
def test_verify_looks_at_the_scales_of_static_products(tmp_path, suffix):
    src = write(tmp_path / "src", *llama())
    calibrated(src, tmp_path / "calib", "int8-static", projections(src))
    written, _ = convert(src, tmp_path / "out", "int8-static", calibration=tmp_path / "calib")
    name = f"model.layers.0.mlp.up_proj.{suffix}"
    written[name][-1] = 0
    files = {DESCRIPTION: (tmp_path / "out" / DESCRIPTION).read_text()}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    problems = lowbit.verify(write(tmp_path / "bad", written, config, files=files)).problems
    assert problems == (f"{name}: expected finite, positive scales, found others",)


def test_asymmetric_weights_are_not_read_as_symmetric(tmp_path):
    src = write(tmp_path / "src", *llama())
    written, _ = convert(src, tmp_path / "out", "int8-weight-only")
    written["model.layers.0.mlp.up_proj.weight_offset"][7] = 3
    files = {DESCRIPTION: (tmp_path / "out" / DESCRIPTION).read_text()}
    bad = write(tmp_path / "bad", written, llama()[1], files=files)
    for scheme in ("int8", "bf16"):
        with pytest.raises(InputError, match=r"up_proj\.weight_offset: expected symmetric weights"):
            lowbit.convert(bad, tmp_path / scheme, scheme)
    again, _ = convert(bad, tmp_path / "again", "int8", keep=["model.layers"])
    assert all(same_bits(again[n], written[n]) for n in written)


# --- running --------------------------------------------------------------------------------------


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path):
    src = write(tmp_path / "src", *deepseek_v3())
    lowbit.convert(src, tmp_path / "whole", "int8", format="ascend", workers=2, max_shard_size="200KB")
    code = RUN.replace('"int8", workers', '"int8", format="ascend", workers')
    process = start(src, tmp_path / "out", code)
    wait_for_jobs(tmp_path / "out", 10)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / DESCRIPTION).exists()
    done = lowbit.convert(src, tmp_path / "out", "int8", format="ascend", workers=2, max_shard_size="200KB")
    assert done.resumed_jobs >= 10
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")
    assert DESCRIPTION in done.manifest["files"]


def test_another_format_leaves_no_description_behind(tmp_path):
    src = write(tmp_path / "src", *llama())
    convert(src, tmp_path / "out")
    lowbit.convert(src, tmp_path / "out", "int8", overwrite=True)
    assert not (tmp_path / "out" / DESCRIPTION).exists() and lowbit.verify(tmp_path / "out", src).ok


def test_progress_reaches_the_bytes_of_the_plan(tmp_path):
    tensors, config = with_biases(llama())
    src = write(tmp_path / "src", tensors, config)
    calibrated(src, tmp_path / "calib", "int8-static", projections(src), codes=True)
    seen: list[int] = []
    done = lowbit.convert(
        src,
        tmp_path / "out",
        "int8-static",
        format="ascend",
        calibration=tmp_path / "calib",
        progress=seen.append,
    )
    assert sum(seen) == done.plan.source_bytes
    for scheme in ("int8", "int8-static-asym", "bf16"):
        seen.clear()
        done = lowbit.convert(tmp_path / "out", tmp_path / scheme, scheme, progress=seen.append)
        assert sum(seen) == done.plan.source_bytes, scheme
