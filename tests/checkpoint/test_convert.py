"""The converter end to end: every scheme and source, bit for bit against the torch oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import pack_to_int32, unpack_from_int32
from safetensors.torch import save_file
from sample_models import (
    Tensors,
    block_fp8,
    decode_block_fp8,
    deepseek_v3,
    llama,
    load,
    quantizable,
    qwen3_moe,
    same_bits,
    vision_language,
    write,
)

import lowbit
from lowbit.checkpoint.headers import ITEM_BYTES, read_header
from lowbit.checkpoint.layout import OutTensor, assign
from lowbit.checkpoint.opening import open_checkpoint
from lowbit.checkpoint.plan import Plan
from lowbit.errors import InputError
from lowbit.quantize import choose_scale, quantize_with
from lowbit.scheme import get_scheme

MODELS = {"llama": llama, "qwen3_moe": qwen3_moe, "deepseek_v3": deepseek_v3}
DYNAMIC = ["int8", "int8-block", "int8-weight-only", "fp8", "fp8-block", "mxfp8"]
SUFFIXES = (".weight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".weight_shape")


def float_weights(tensors: Tensors) -> Tensors:
    """What the source means, in float32; the float tensors as they are."""
    found: Tensors = {}
    for name, t in tensors.items():
        module = name.removesuffix(".weight")
        scale = next(
            (tensors[n] for s in (".weight_scale_inv", ".scale") if (n := module + s) in tensors), None
        )
        if name.endswith((".weight_scale_inv", ".scale")):
            continue
        found[name] = decode_block_fp8(t, scale) if t.dtype == torch.float8_e4m3fn else t
    return found


def check_output(out: Path, tensors: Tensors, plan: Plan) -> dict[str, Tensors]:
    """Each quantized module equals the oracle on the decoded source; returns them by module."""
    written, meant = load(out), float_weights(tensors)
    modules: dict[str, Tensors] = {}
    for module, decision in plan.decisions.items():
        if decision.scheme is None or decision.scheme.weights is None:
            continue
        x, spec = meant[module + ".weight"].float(), decision.scheme.weights
        scale, _ = choose_scale(x, spec)
        codes = quantize_with(x, scale, spec)
        found = {s: written.pop(module + s) for s in SUFFIXES if module + s in written}
        modules[module] = found
        stored = found.get(".weight_scale", found.get(".weight_scale_inv"))
        assert stored is not None and same_bits(stored, scale), module
        if ".weight_packed" in found:
            packed = found[".weight_packed"].view(torch.uint8).reshape(x.shape[0], -1)
            codes = (codes.to(torch.int16) + 128).to(torch.uint8)
            assert same_bits(packed[:, : x.shape[1]].contiguous(), codes), module
            assert found[".weight_shape"].tolist() == list(x.shape)
        else:
            assert same_bits(found[".weight"], codes), module
    for name, t in written.items():  # whatever is not quantized
        assert same_bits(t, meant[name]), name
    assert {n for n in meant if n.removesuffix(".weight") not in modules} == set(written)
    return modules


@pytest.mark.parametrize("scheme", DYNAMIC)
@pytest.mark.parametrize("model", MODELS)
def test_bf16_sources_equal_the_oracle(tmp_path, model, scheme):
    tensors, config = MODELS[model]()
    src = write(tmp_path / "src", tensors, config, place=lambda n: hash_of(n) % 3)
    done = lowbit.convert(src, tmp_path / "out", scheme)
    modules = check_output(tmp_path / "out", tensors, done.plan)
    assert len(modules) > 8
    assert lowbit.verify(tmp_path / "out", src).problems == ()


def hash_of(name: str) -> int:
    return sum(name.encode())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", ["int8", "fp8-block", "mxfp8", "int8-weight-only"])
def test_other_float_sources_equal_the_oracle(tmp_path, scheme, dtype):
    tensors, config = llama(dtype=dtype)
    src = write(tmp_path / "src", tensors, config)
    done = lowbit.convert(src, tmp_path / "out", scheme)
    check_output(tmp_path / "out", tensors, done.plan)


SCALES = {
    "float32": {},
    "bf16": {"scale_dtype": torch.bfloat16},
    "e8m0": {"scale_dtype": torch.float8_e8m0fnu},
    "short name": {"suffix": ".scale"},
    "short name, e8m0": {"suffix": ".scale", "scale_dtype": torch.float8_e8m0fnu},
}


@pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("scheme", ["int8", "int8-block", "fp8", "mxfp8", "int8-weight-only"])
def test_block_fp8_converts_in_one_step_with_scales_in_a_shard_of_their_own(tmp_path, scheme, scales):
    tensors, config = block_fp8(*deepseek_v3(), **scales)
    # Shard 2 holds nothing but scales, and every scale lies in another file than its weight.
    src = write(
        tmp_path / "src",
        tensors,
        config,
        place=lambda n: 2 if n.endswith(("scale", "scale_inv")) else hash_of(n) % 2,
    )
    done = lowbit.convert(src, tmp_path / "out", scheme)
    modules = check_output(tmp_path / "out", tensors, done.plan)
    assert any("experts" in m for m in modules)
    assert lowbit.verify(tmp_path / "out", src).ok


def test_one_step_is_not_the_two_step_conversion_through_bf16(tmp_path):
    """Decoding to float32 keeps what a BF16 copy would lose: the codes must differ somewhere."""
    tensors, config = block_fp8(*llama())
    src = write(tmp_path / "src", tensors, config)
    lowbit.convert(src, tmp_path / "one", "int8")
    lowbit.convert(src, tmp_path / "bf16", "bf16")
    lowbit.convert(tmp_path / "bf16", tmp_path / "two", "int8")
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    name = "model.layers.0.mlp.down_proj.weight"
    assert one[name].dtype == two[name].dtype == torch.int8
    differing = (one[name] != two[name]).float().mean()
    assert 0 < differing < 0.2


@pytest.mark.parametrize(("scheme", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_dequantizing_schemes(tmp_path, scheme, dtype):
    tensors, config = block_fp8(*deepseek_v3())
    src = write(tmp_path / "src", tensors, config)
    done = lowbit.convert(src, tmp_path / "out", scheme)
    written, meant = load(tmp_path / "out"), float_weights(tensors)
    assert set(written) == set(meant)
    for name, t in written.items():
        if "e_score_correction_bias" in name:
            assert same_bits(t, meant[name])  # wider than the model on purpose
        else:
            assert same_bits(t, meant[name].to(dtype)), name
    out = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in out and out["torch_dtype"] == scheme.replace("bf", "bfloat").replace(
        "fp", "float"
    )
    assert done.plan.format is None


def test_dequantizing_int8_again(tmp_path):
    """Ours in, floats out: what compressed-tensors checkpoints mean."""
    tensors, config = llama()
    src = write(tmp_path / "src", tensors, config)
    for scheme in ("int8", "int8-weight-only", "mxfp8", "fp8-block"):
        lowbit.convert(src, tmp_path / scheme, scheme)
        lowbit.convert(tmp_path / scheme, tmp_path / f"{scheme}-back", "bf16")
        back = load(tmp_path / f"{scheme}-back")
        assert set(back) == set(tensors)
        name = "model.layers.1.mlp.down_proj.weight"
        spec = get_scheme(scheme).weights
        assert spec is not None
        x = tensors[name].float()
        scale, _ = choose_scale(x, spec)
        from lowbit.quantize import dequantize

        expected = dequantize(quantize_with(x, scale, spec), scale, spec).to(torch.bfloat16)
        assert same_bits(back[name], expected), scheme


def test_converting_what_is_already_so_is_bit_for_bit(tmp_path):
    """FP8 blocks to compressed-tensors FP8 blocks: only names and config change."""
    tensors, config = block_fp8(*llama())
    src = write(tmp_path / "src", tensors, config)
    lowbit.convert(src, tmp_path / "out", "fp8-block")
    written = load(tmp_path / "out")
    for name, t in tensors.items():
        assert same_bits(written[name.replace("_scale_inv", "_scale")], t), name


@pytest.mark.parametrize("packed", [True, False], ids=["out of int32", "into int32"])
def test_int8_codes_are_packed_and_unpacked_as_they_are(tmp_path, packed):
    """Between W8A16 and W8A8, also those of -128, which most libraries write: rounded again, all of a row changed."""
    tensors, config = llama(hidden=96, intermediate=160)  # which groups of 128 do not fit
    modules = [n.removesuffix(".weight") for n in tensors if n.endswith("_proj.weight")]
    codes = {m: torch.randint(-128, 128, tensors[f"{m}.weight"].shape).to(torch.int8) for m in modules}
    scales = {m: (torch.rand(c.shape[0], 1) + 0.5).to(torch.bfloat16) for m, c in codes.items()}
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    if not packed:
        group["input_activations"] = weights | {"strategy": "token", "dynamic": True}
    for m, c in codes.items():
        del tensors[f"{m}.weight"]
        tensors[f"{m}.weight_scale"] = scales[m]
        if packed:
            tensors[f"{m}.weight_packed"] = pack_to_int32(c, 8)
            tensors[f"{m}.weight_shape"] = torch.tensor(c.shape)
        else:
            tensors[f"{m}.weight"] = c
    form = "pack-quantized" if packed else "int-quantized"
    quantization = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
    src = write(tmp_path / "src", tensors, config | {"quantization_config": quantization})
    lowbit.convert(src, tmp_path / "out", "int8" if packed else "int8-weight-only")
    written = load(tmp_path / "out")
    for m, c in codes.items():
        assert same_bits(written[f"{m}.weight_scale"], scales[m].float()), m
        if packed:
            assert same_bits(written[f"{m}.weight"], c), m
        else:
            assert torch.equal(unpack_from_int32(written[f"{m}.weight_packed"], 8, c.shape), c), m
            assert written[f"{m}.weight_shape"].tolist() == list(c.shape)
    assert lowbit.verify(tmp_path / "out", src).errors[0].largest == 0


@pytest.mark.parametrize("source", ["bf16", "fp8"])
def test_hf_fp8_output(tmp_path, source):
    tensors, config = deepseek_v3()
    if source == "fp8":
        tensors, config = block_fp8(tensors, config, scale_dtype=torch.bfloat16)
    src = write(tmp_path / "src", tensors, config)
    done = lowbit.convert(src, tmp_path / "out", "fp8-block", format="fp8")
    written = load(tmp_path / "out")
    for name, t in written.items():
        if name.endswith("_scale_inv"):
            assert t.dtype == torch.float32
        if source == "fp8":
            expected = tensors[name].float() if name.endswith("_scale_inv") else tensors[name]
            assert same_bits(t, expected), name
    if source == "bf16":
        check_output(tmp_path / "out", tensors, done.plan)
    out = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert out["quant_method"] == "fp8" and out["weight_block_size"] == [128, 128]
    assert "lm_head" in out["modules_to_not_convert"]


# --- rules in the whole -----------------------------------------------------------------------


def test_every_other_file_is_carried_byte_for_byte(tmp_path):
    files = {
        "tokenizer.json": b'{"a": 1}\n', "tokenizer.model": bytes(range(256)), "generation_config.json": b"{}",
        "modeling_deepseek.py": b"raise SystemExit('executed')\n", "chat_template.jinja": "{{ ü }}".encode(),
        "README.md": b"# m\r\n", "inference/convert.py": b"1/0\n", "empty.txt": b"",
    }  # fmt: skip
    tensors, config = deepseek_v3()
    src = write(tmp_path / "src", tensors, config, files=files)
    lowbit.convert(src, tmp_path / "out", "int8")
    for name, content in files.items():
        assert (tmp_path / "out" / name).read_bytes() == content
    expected = {*files, "model.safetensors", "config.json", "lowbit_manifest.json"}
    assert {
        str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()
    } == expected


def test_names_of_files_that_are_not_utf_8(tmp_path):
    tensors, config = llama()
    src = write(
        tmp_path / "sr\udcffc", tensors, {**config, "token": "\ud83d"}, files={"Gr\udcfc\udcdfe.txt": "x"}
    )
    (src / "model.safetensors").rename(src / "mod\udce8le.safetensors")
    out = tmp_path / "o\udcff"
    lowbit.convert(src, out, "int8")
    assert (out / "Gr\udcfc\udcdfe.txt").read_text() == "x"
    assert json.loads((out / "config.json").read_text())["token"] == "\ud83d"
    assert lowbit.verify(out, src).ok
    (out / "Gr\udcfc\udcdfe.txt").write_text("y")
    assert not lowbit.verify(out).ok


def test_config_keeps_all_but_its_quantization(tmp_path):
    tensors, config = block_fp8(*deepseek_v3())
    src = write(tmp_path / "src", tensors, config)
    lowbit.convert(src, tmp_path / "out", "int8")
    out = json.loads((tmp_path / "out" / "config.json").read_text())
    assert out.pop("quantization_config")["quant_method"] == "compressed-tensors"
    config.pop("quantization_config")
    assert out == config and list(out) == list(config)


def test_a_nested_quantization_config_is_replaced(tmp_path):
    text, text_config = block_fp8(*llama())
    config = {"model_type": "some_vl", "architectures": ["X"], "text_config": text_config}
    src = write(tmp_path / "src", text, config)
    lowbit.convert(src, tmp_path / "out", "int8")
    out = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in out["text_config"]
    assert out["quantization_config"]["format"] == "int-quantized"


@pytest.mark.parametrize("stored", ["bytes", "F8_E8M0", "F8_E8M0, declared", "F32", "BF16"])
def test_mxfp8_is_carried_however_its_exponents_are_stored(tmp_path, stored):
    """Of E8M0 four bytes were written for each, over the tensors behind them."""
    lowbit.convert(write(tmp_path / "src", *llama()), tmp_path / "mx", "mxfp8")
    meant, config = load(tmp_path / "mx"), json.loads((tmp_path / "mx" / "config.json").read_text())
    meant["model.layers.0.mlp.up_proj.weight_scale"][0, :2] = torch.tensor([0, 254])  # 2⁻¹²⁷ and 2¹²⁷
    tensors = dict(meant)
    for name in [n for n in meant if n.endswith("weight_scale")]:
        exponents = meant[name].view(torch.float8_e8m0fnu)
        dtype = {"F32": torch.float32, "BF16": torch.bfloat16}.get(stored, torch.float8_e8m0fnu)
        tensors[name] = meant[name] if stored == "bytes" else exponents.to(dtype)
    if "declared" in stored:
        group = config["quantization_config"]["config_groups"]["group_0"]
        group["weights"]["scale_dtype"] = "torch.float8_e8m0fnu"
    again = write(tmp_path / "again", tensors, config)
    lowbit.convert(again, tmp_path / "out", "mxfp8")
    written = load(tmp_path / "out")
    assert written.keys() == meant.keys() and all(same_bits(written[n], meant[n]) for n in meant)


@pytest.mark.parametrize("value", [0.75, 0.0, -1.0])
def test_scales_that_are_no_powers_of_two_are_no_exponents(tmp_path, value):
    lowbit.convert(write(tmp_path / "src", *llama()), tmp_path / "mx", "mxfp8")
    tensors, config = load(tmp_path / "mx"), json.loads((tmp_path / "mx" / "config.json").read_text())
    name = "model.layers.0.mlp.up_proj.weight_scale"
    tensors[name] = torch.full(tensors[name].shape, value)
    src = write(tmp_path / "again", tensors, config)
    with pytest.raises(InputError, match=r"up_proj\.weight_scale: expected scales that are powers of two"):
        lowbit.convert(src, tmp_path / "out", "mxfp8")


def test_a_source_without_a_config_makes_no_model(tmp_path):
    """Mistral's own format has params.json; what was written had a config.json that no engine can read."""
    tensors, config = llama()
    src = write(tmp_path / "src", tensors, None, files={"params.json": "{}"})
    said = "since the source has none: engines need the model's own"
    assert any(said in warning for warning in lowbit.plan(src, "int8").warnings)
    assert not any(said in warning for warning in lowbit.plan(src, "bf16").warnings)
    assert lowbit.plan(write(tmp_path / "whole", tensors, config), "int8").warnings == ()


def test_an_index_keeps_adapters_apart_from_weights(tmp_path):
    """vLLM takes all *.safetensors of a directory for weights where no index names them."""
    src = write(tmp_path / "src", *llama(), files={"adapter_config.json": "{}"})
    save_file({"base_model.x.lora_A.weight": torch.ones(2, 2)}, src / "adapter_model.safetensors")
    lowbit.convert(src, tmp_path / "out", "int8")
    adapter = "adapter_model.safetensors"
    assert (tmp_path / "out" / adapter).read_bytes() == (src / adapter).read_bytes()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == {"model.safetensors"}
    assert lowbit.verify(tmp_path / "out", src).ok


@pytest.mark.parametrize("scheme", ["int8", "bf16", "fp16"])
def test_a_quantization_config_within_any_part_is_replaced(scheme, tmp_path):
    """InternVL has an `llm_config`, Qwen's Omni models a `text_config` in a `thinker_config`."""
    text, text_config = block_fp8(*llama())
    config = {"model_type": "internvl_chat", "llm_config": {"deeper": text_config}, "torch_dtype": "bfloat16",
              "vision_config": {"torch_dtype": "float32", "quantization_config": {"quant_method": "fp8"}}}  # fmt: skip
    lowbit.convert(write(tmp_path / "src", text, config), tmp_path / "out", scheme)
    out = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in out["llm_config"]["deeper"]
    assert out["vision_config"] == {"torch_dtype": "float32"}
    assert ("quantization_config" in out) == (scheme == "int8")
    dtype = "float16" if scheme == "fp16" else "bfloat16"
    assert (out["torch_dtype"], out["llm_config"]["deeper"]["torch_dtype"]) == (dtype, dtype)


def test_vision_towers_stay(tmp_path):
    tensors, config = vision_language()
    src = write(tmp_path / "src", tensors, config)
    done = lowbit.convert(src, tmp_path / "out", "int8")
    modules = check_output(tmp_path / "out", tensors, done.plan)
    assert len(modules) == 14 and not any("visual" in m for m in modules)
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert {"visual.blocks.0.attn.qkv", "visual.blocks.0.mlp.fc1", "visual.merger.mlp.0", "lm_head"} <= set(
        ignored
    )


def test_tied_weights_stay_tied(tmp_path):
    tensors, config = llama(tied=True)
    src = write(tmp_path / "src", tensors, config)
    lowbit.convert(src, tmp_path / "out", "int8")
    out = json.loads((tmp_path / "out" / "config.json").read_text())
    assert out["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load(tmp_path / "out")
    assert "lm_head" in out["quantization_config"]["ignore"]


@pytest.mark.parametrize("scheme", ["int8-block", "fp8-block", "int8"])
def test_fused_groups_agree(tmp_path, scheme):
    """k and v have 64 rows: ragged blocks do not concatenate, so all of q/k/v change together."""
    tensors, config = llama(kv_heads=2)
    src = write(tmp_path / "src", tensors, config)
    plan = lowbit.plan(src, scheme)
    for i in range(2):
        at = f"model.layers.{i}"
        for group in (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("mlp.gate_proj", "mlp.up_proj"),
        ):
            assert len({plan.decisions[f"{at}.{m}"].scheme for m in group}) == 1
        q = plan.decisions[f"{at}.self_attn.q_proj"]
        assert q.scheme is not None and q.scheme.name == scheme.removesuffix("-block")
        if scheme != "int8":
            assert "N = 64 is not a multiple of 128" in q.reason
            assert plan.decisions[f"{at}.self_attn.o_proj"].scheme == get_scheme(scheme)


def test_ignoring_one_member_keeps_its_group(tmp_path):
    tensors, config = llama()
    src = write(tmp_path / "src", tensors, config)
    done = lowbit.convert(
        src, tmp_path / "out", "int8", ignore=["model.layers.0.self_attn.k_proj", "*.1.mlp.up_proj"]
    )
    modules = check_output(tmp_path / "out", tensors, done.plan)
    gone = {f"model.layers.0.self_attn.{x}_proj" for x in "qkv"} | {
        f"model.layers.1.mlp.{x}_proj" for x in ("gate", "up")
    }
    assert not gone & set(modules) and len(modules) == 14 - 5
    assert done.plan.decisions["model.layers.0.self_attn.q_proj"].reason == (
        "engines fuse it with k_proj, which stays (--ignore model.layers.0.self_attn.k_proj)"
    )
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert gone <= set(ignored)


def test_ignore_dequantizes_and_keep_carries_fp8(tmp_path):
    tensors, config = block_fp8(*llama())
    src = write(tmp_path / "src", tensors, config)
    done = lowbit.convert(
        src, tmp_path / "out", "int8", ignore=["*.0.mlp.down_proj"], keep=["re:.*\\.1\\.mlp\\."]
    )
    written, meant = load(tmp_path / "out"), float_weights(tensors)
    down = "model.layers.0.mlp.down_proj"
    assert same_bits(written[f"{down}.weight"], meant[f"{down}.weight"].to(torch.bfloat16))
    assert f"{down}.weight_scale" not in written
    for m in ("gate_proj", "up_proj", "down_proj"):
        kept = f"model.layers.1.mlp.{m}"
        assert same_bits(written[f"{kept}.weight"], tensors[f"{kept}.weight"])
        assert same_bits(written[f"{kept}.weight_scale"], tensors[f"{kept}.weight_scale_inv"])
        assert done.plan.decisions[kept].as_found
    q = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert q["format"] == "mixed-precision"
    # Blocks are the default, since SGLang looks for their size there.
    assert [g["format"] for g in q["config_groups"].values()] == ["float-quantized", "int-quantized"]
    assert q["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert set(q["config_groups"]["group_1"]["targets"]) == {
        *(rf"re:.*\blayers\.0\.mlp\.{m}_proj$" for m in ("gate", "up", "gate_up")),
        *(rf"re:.*\blayers\.\d+\.self_attn\.{m}_proj$" for m in ("q", "k", "v", "o", "qkv")),
    }
    assert down in q["ignore"]


def test_keep_refuses_what_the_format_cannot_hold_in_that_shape(tmp_path):
    """Groups where a scale per channel is held, or int8 per channel where K does not fill int32s."""
    src = write(tmp_path / "src", *llama(intermediate=258))
    lowbit.convert(src, tmp_path / "grouped", "int8-weight-only")
    with pytest.raises(
        InputError, match=r"o_proj: expected weights that ascend can hold, found .* \(vLLM-Ascend"
    ):
        lowbit.convert(tmp_path / "grouped", tmp_path / "out", "int8", format="ascend", keep=["*.o_proj"])
    lowbit.convert(src, tmp_path / "ascend", "int8-weight-only", format="ascend")
    with pytest.raises(InputError, match=r"down_proj: expected weights .* \(K = 258 is not a multiple of 4"):
        lowbit.convert(tmp_path / "ascend", tmp_path / "out", "int8", keep=["*.down_proj"])
    lowbit.convert(tmp_path / "ascend", tmp_path / "out", "int8", format="ascend", keep=["*.down_proj"])


def test_overrides_give_mixed_precision(tmp_path):
    tensors, config = llama()
    src = write(tmp_path / "src", tensors, config)
    done = lowbit.convert(
        src, tmp_path / "out", "int8", overrides={"*.down_proj": "fp8", "*.0.self_attn.o_proj": "float"}
    )
    check_output(tmp_path / "out", tensors, done.plan)
    written = load(tmp_path / "out")
    assert written["model.layers.0.mlp.down_proj.weight"].dtype == torch.float8_e4m3fn
    assert written["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    assert written["model.layers.0.self_attn.o_proj.weight"].dtype == torch.bfloat16
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"][
        "config_groups"
    ]
    assert groups["group_1"]["targets"] == [r"re:.*\blayers\.\d+\.mlp\.down_proj$"]


def test_an_override_that_needs_data_is_not_filled_with_zeros(tmp_path):
    src = write(tmp_path / "src", *llama())
    with pytest.raises(InputError, match="expected a calibrated input scale"):
        lowbit.convert(src, tmp_path / "out", "int8", overrides={"*.o_proj": "int8-static"})


@pytest.mark.parametrize("scheme", ["bf16", "fp16"])
def test_a_float_scheme_has_no_overrides_that_quantize(tmp_path, scheme):
    src = write(tmp_path / "src", *llama())
    with pytest.raises(
        InputError, match=r"override '\*\.o_proj': expected float .* found int8; make int8 the"
    ):
        lowbit.plan(src, scheme, overrides={"*.o_proj": "int8"})
    assert lowbit.plan(src, scheme, overrides={"*.o_proj": "float", "*.up_proj": "bf16"}).format is None


def test_an_override_to_a_float_scheme_keeps_the_weight(tmp_path):
    tensors, config = llama()
    src = write(tmp_path / "src", tensors, config)
    done = lowbit.convert(src, tmp_path / "out", "int8", overrides={"*.o_proj": "bf16"})
    assert len(check_output(tmp_path / "out", tensors, done.plan)) == 12


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("shape", [(1,), ()], ids=str)
def test_static_sources_keep_their_input_scales(tmp_path, asymmetric, shape):
    """compressed-tensors INT8 with calibrated activations, in and out again."""
    tensors, config = llama()
    lowbit.convert(write(tmp_path / "base", tensors, config), tmp_path / "int8", "int8")
    written = load(tmp_path / "int8")
    quantized = json.loads((tmp_path / "int8" / "config.json").read_text())
    args = quantized["quantization_config"]["config_groups"]["group_0"]["input_activations"]
    args |= {"strategy": "tensor", "dynamic": False, "symmetric": not asymmetric}
    for i, name in enumerate([n for n in written if n.endswith("_proj.weight")]):
        written[name.replace(".weight", ".input_scale")] = torch.full(shape, 0.5 + i, dtype=torch.bfloat16)
        if asymmetric:
            written[name.replace(".weight", ".input_zero_point")] = torch.full(shape, i - 3, dtype=torch.int8)
    src = write(tmp_path / "static", written, quantized)
    scheme = "int8-static-asym" if asymmetric else "int8-static"
    lowbit.convert(src, tmp_path / "out", scheme)
    again = load(tmp_path / "out")
    assert set(again) == set(written)
    for name, t in written.items():
        if not name.endswith((".input_scale", ".input_zero_point")):
            assert same_bits(again[name], t), name
        else:
            assert again[name].shape == (1,) and again[name].item() == t.item()
            assert again[name].dtype == (torch.float32 if name.endswith("scale") else torch.int8)
    with pytest.raises(InputError, match="expected a calibrated input scale"):
        lowbit.plan(src, "fp8-static")


def test_a_fused_group_with_two_schemes_is_refused(tmp_path):
    src = write(tmp_path / "src", *llama())
    with pytest.raises(InputError, match="need one scheme, found fp8, int8; give one override for all"):
        lowbit.plan(src, "int8", overrides={"*.q_proj": "fp8"})


# --- layout -----------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["80KB", "200KB", 150_000])
def test_shards_keep_the_limit_and_the_index_is_right(tmp_path, limit):
    tensors, config = deepseek_v3()
    src = write(tmp_path / "src", tensors, config)
    out = tmp_path / "out"
    done = lowbit.convert(src, out, "int8", max_shard_size=limit)
    size = {"80KB": 80_000, "200KB": 200_000}.get(str(limit), 150_000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    assert [f.name for f in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    assert all(f.stat().st_size <= size for f in files)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    where = {name: f.name for f in files for name in read_header(f)[0]}
    assert index["weight_map"] == where
    assert index["metadata"]["total_size"] == open_checkpoint(out).nbytes
    for module in done.plan.decisions:  # a weight and its scale stay together
        if f"{module}.weight_scale" in where:
            assert where[f"{module}.weight"] == where[f"{module}.weight_scale"]
    check_output(out, tensors, done.plan)


def test_no_file_of_several_modules_passes_the_limit():
    """By a byte neither, headers included; and each begins with as many as fit."""
    for elements in (3, 400):
        many = [[OutTensor(f"{'é' * (n % 7)}{n}", "I8", (elements + n % 50,))] for n in range(300)]
        for limit in range(1000, 1300):
            shards, _ = assign(many, limit)
            assert all(s.nbytes <= limit or len(s.names) == 1 for s in shards), limit
        assert len(shards) < 200


def test_a_module_larger_than_the_limit_gets_a_shard_of_its_own(tmp_path):
    tensors, config = llama()
    src = write(tmp_path / "src", tensors, config)
    done = lowbit.convert(src, tmp_path / "out", "int8", max_shard_size=1000)
    assert len(done.plan.shards) > 14
    check_output(tmp_path / "out", tensors, done.plan)


@pytest.mark.parametrize("scheme", DYNAMIC)
def test_tensors_are_aligned(tmp_path, scheme):
    tensors, config = deepseek_v3()
    tensors["odd"] = torch.ones(3, dtype=torch.uint8)
    src = write(tmp_path / "src", tensors, config)
    lowbit.convert(src, tmp_path / "out", scheme)
    for ref in open_checkpoint(tmp_path / "out").tensors.values():
        assert ref.offset % ITEM_BYTES[ref.dtype] == 0
        assert ref.offset % 64 == 0 or ref.nbytes % 64 != 0  # those of whole cache lines begin at one


def odd_tensors() -> Tensors:
    return {
        "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
        "empty.weight": torch.empty(0, 64, dtype=torch.bfloat16),
        "narrow.weight": torch.ones(64, 1, dtype=torch.bfloat16),
        "flat.weight": torch.ones(1, 64, dtype=torch.bfloat16),
        "Größe.名前.weight": torch.randn(32, 64).to(torch.bfloat16),
        "with space and \"quotes\".weight": torch.randn(32, 64).to(torch.bfloat16),
        "inv_freq": torch.arange(8, dtype=torch.float64),
        "ids": torch.arange(5),
        "mask": torch.ones(3, 3, dtype=torch.bool),
        "weight": torch.randn(32, 32).to(torch.bfloat16),
        "conv.weight": torch.randn(16, 16, 3).to(torch.bfloat16),
    }  # fmt: skip


@pytest.mark.parametrize("scheme", [*DYNAMIC, "bf16", "fp16"])
def test_odd_names_shapes_and_dtypes(tmp_path, scheme):
    tensors = {**llama()[0], **odd_tensors()}
    src = write(tmp_path / "src", tensors, llama()[1])
    done = lowbit.convert(src, tmp_path / "out", scheme)
    if scheme not in ("bf16", "fp16"):
        modules = check_output(tmp_path / "out", tensors, done.plan)
        assert "Größe.名前" in modules and "empty" not in modules and "narrow" not in modules
    assert lowbit.verify(tmp_path / "out", src).ok


@pytest.mark.parametrize("shape", [(16, 1), (1, 16), (1, 1), (0, 16), (16, 0), (300, 131)], ids=str)
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_an_override_quantizes_any_matrix(tmp_path, scheme, shape):
    """Rules keep small matrices; a user who names one gets it."""
    tensors = {**llama(layers=1)[0], "x.weight": torch.randn(shape).to(torch.bfloat16)}
    src = write(tmp_path / "src", tensors, llama(layers=1)[1])
    done = lowbit.convert(src, tmp_path / "out", "int8", overrides={"x": scheme})
    modules = check_output(tmp_path / "out", tensors, done.plan)
    assert modules["x"][".weight"].shape == shape
    assert lowbit.verify(tmp_path / "out", src).ok


def test_fused_3d_experts_of_an_unknown_layout_stay_and_are_said_to(tmp_path):
    """Stored [experts, in, out] by a model_type that is not known for it; see test_fused_experts.py."""
    tensors, config = llama()
    experts = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.randn(4, 128, 256).to(torch.bfloat16),
        "model.layers.0.mlp.experts.down_proj": torch.randn(4, 128, 128).to(torch.bfloat16),
    }
    src = write(tmp_path / "src", tensors | experts, config)
    done = lowbit.convert(src, tmp_path / "out", "int8")
    check_output(tmp_path / "out", tensors | experts, done.plan)
    assert "3-D tensor" in done.plan.decisions["model.layers.0.mlp.experts.down_proj"].reason
    assert "model.layers.0.mlp.experts" in done.plan.config["quantization_config"]["ignore"]
    assert lowbit.inspect(src).experts == 4


# --- what must not be silent ------------------------------------------------------------------


def refused(
    tmp_path: Path, tensors: Tensors, config: dict[str, Any] | None, match: str, scheme="int8", **kw
) -> None:
    src = write(tmp_path / "src", tensors, config)
    with pytest.raises(InputError, match=match):
        lowbit.convert(src, tmp_path / "out", scheme, **kw)
    assert not (tmp_path / "out").exists()


def test_a_quantized_weight_without_a_scale(tmp_path):
    tensors, config = block_fp8(*llama())
    del tensors["model.layers.1.mlp.down_proj.weight_scale_inv"]
    refused(
        tmp_path,
        tensors,
        config,
        r"layers\.1\.mlp\.down_proj\.weight: expected a scale named .*weight_scale_inv.*fetch it again",
    )


def test_a_scale_of_the_wrong_shape(tmp_path):
    tensors, config = block_fp8(*llama())
    tensors["model.layers.1.mlp.down_proj.weight_scale_inv"] = torch.ones(2, 1)
    refused(
        tmp_path,
        tensors,
        config,
        r"weight_scale_inv: expected a scale of shape \[1, 2\] .*found \[2, 1\]; config and tensors",
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_scale_that_is_not_finite(tmp_path, bad):
    tensors, config = block_fp8(*llama())
    tensors["model.layers.1.mlp.down_proj.weight_scale_inv"][0, 1] = bad
    refused(tmp_path, tensors, config, r"weight_scale_inv: expected finite scales, found .* at flat index 1")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("scheme", ["int8", "fp8-block", "mxfp8"])
def test_nan_and_inf_in_a_weight_are_named_with_their_position(tmp_path, scheme, bad, dtype):
    tensors, config = llama(dtype=dtype)
    tensors["model.layers.1.mlp.down_proj.weight"][101, 203] = bad
    message = (
        rf"layers\.1\.mlp\.down_proj\.weight: expected finite values, found {bad} at \[101, 203\]; repair"
    )
    refused(tmp_path, tensors, config, message, scheme)


def test_nan_in_an_fp8_weight(tmp_path):
    tensors, config = block_fp8(*llama())
    raw = tensors["model.layers.0.mlp.up_proj.weight"].view(torch.uint8)
    raw[200, 7] = 0xFF
    refused(tmp_path, tensors, config, r"up_proj\.weight: expected finite values, found nan at \[200, 7\]")


@pytest.mark.parametrize("scheme", ["bf16", "fp16"])
def test_a_value_that_the_narrower_float_cannot_hold(tmp_path, scheme):
    tensors, config = llama(dtype=torch.float32)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = 3.4e38
    refused(
        tmp_path,
        tensors,
        config,
        rf"up_proj\.weight: expected values that .*{scheme[-2:]} can hold, found 3\.(4|399).* at \[3, 4\]",
        scheme,
    )


@pytest.mark.parametrize("scheme", ["bf16", "fp16", "int8"])
def test_scales_that_overflow_when_decoded(tmp_path, scheme):
    tensors, config = block_fp8(*llama())
    tensors["model.layers.0.mlp.up_proj.weight_scale_inv"][1, 0] = 2e38
    refused(tmp_path, tensors, config, r"up_proj\.weight: expected .*, found .*(inf|e\+38) at \[1", scheme)


def test_scales_that_overflow_when_decoded_in_a_model_of_float32(tmp_path):
    """Inf was written."""
    tensors, config = block_fp8(*llama())
    tensors = {n: t.float() if t.dtype == torch.bfloat16 else t for n, t in tensors.items()}
    tensors["model.layers.0.mlp.down_proj.weight_scale_inv"][0, 0] = 3e38
    src = write(tmp_path / "src", tensors, {**config, "torch_dtype": "float32"})
    with pytest.raises(InputError, match=r"down_proj\.weight: expected finite values, found -?inf at \["):
        lowbit.convert(src, tmp_path / "out", "int8", ignore=["*.down_proj"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e5m2], ids=str)
def test_a_matrix_of_another_dtype_is_refused_before_any_work(tmp_path, dtype):
    tensors, config = llama()
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].float().to(dtype)
    src = write(tmp_path / "src", tensors, config)
    with pytest.raises(InputError, match=r"down_proj\.weight: (expected .*found (F64|I32)|found F8_E5M2)"):
        lowbit.plan(src, "int8")


def test_fp8_tensors_that_nothing_explains_are_refused(tmp_path):
    """3-D experts in FP8 would be carried without the config that says how to read them."""
    tensors, config = block_fp8(*llama())
    tensors["model.layers.0.mlp.experts.down_proj"] = torch.zeros(2, 128, 128).to(torch.float8_e4m3fn)
    tensors["model.layers.0.mlp.experts.down_proj_scale_inv"] = torch.ones(2, 1, 1)
    refused(tmp_path, tensors, config, r"experts\.down_proj: found F8_E4M3 codes")


def test_codes_without_a_config(tmp_path):
    tensors, config = block_fp8(*llama())
    config.pop("quantization_config")
    src = write(tmp_path / "recognized", tensors, config)
    done = lowbit.convert(src, tmp_path / "recognized-out", "int8")
    check_output(tmp_path / "recognized-out", tensors, done.plan)
    renamed = {n.replace("weight_scale_inv", "weight_scale"): t for n, t in tensors.items()}
    refused(tmp_path, renamed, config, "found F8_E4M3 codes, but config.json has no quantization_config")


def test_output_names_that_the_source_already_uses(tmp_path):
    tensors, config = llama()
    tensors["model.layers.0.mlp.down_proj.weight_scale"] = torch.ones(128, 1)
    refused(tmp_path, tensors, config, r"down_proj\.weight_scale.*already")


def test_asymmetric_sources_are_refused(tmp_path):
    """A zero point that is left out changes every weight."""
    tensors, config = llama()
    lowbit.convert(write(tmp_path / "base", tensors, config), tmp_path / "int8", "int8")
    written = load(tmp_path / "int8")
    written["model.layers.0.mlp.down_proj.weight_zero_point"] = torch.zeros(128, 1, dtype=torch.int8)
    quantized = json.loads((tmp_path / "int8" / "config.json").read_text())
    quantized["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = False
    refused(tmp_path, written, quantized, "zero point", "bf16")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_other_quantization_methods_are_named(tmp_path, method):
    tensors, config = llama()
    refused(tmp_path, tensors, config | {"quantization_config": {"quant_method": method}},
            rf"quantization_config.*'{method}'")  # fmt: skip


@pytest.mark.parametrize("body", [
    {"quant_method": "compressed-tensors", "config_groups": {"a": "b"}},
    {"quant_method": "compressed-tensors", "config_groups": {"a": {"targets": ["re:("], "weights": {"num_bits": 8}}}},
    {"quant_method": "compressed-tensors", "config_groups": []},
    {"quant_method": "compressed-tensors"},
    {"quant_method": "fp8", "weight_block_size": ["a", "b"]},
    {"quant_method": "fp8", "weight_block_size": [0, 128]},
    {"quant_method": ["fp8"]},
])  # fmt: skip
def test_a_broken_quantization_config(tmp_path, body):
    tensors, _ = block_fp8(*llama(), suffix=".weight_scale")
    refused(tmp_path, tensors, llama()[1] | {"quantization_config": body}, "quantization_config: expected")


def test_quantizable_is_what_the_rules_say():
    """The generator above and the converter agree on what DeepSeek keeps."""
    tensors, _ = deepseek_v3()
    assert quantizable(
        "model.layers.1.mlp.experts.0.up_proj.weight", tensors["model.layers.1.mlp.experts.0.up_proj.weight"]
    )
    assert not quantizable("model.layers.1.mlp.gate.weight", tensors["model.layers.1.mlp.gate.weight"])


@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_kv_cache_scales_keep_what_describes_them(tmp_path, scheme):
    """Scales of keys and values that a source has are carried, and so is the config that makes engines use them."""
    src = write(tmp_path / "src", *llama())
    lowbit.convert(src, tmp_path / "fp8", "fp8")
    tensors = load(tmp_path / "fp8")
    tensors |= {f"model.layers.0.self_attn.{kv}_scale": torch.tensor([0.5]) for kv in "kv"}
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    kv = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    config["quantization_config"]["kv_cache_scheme"] = kv
    with_kv = write(tmp_path / "kv", tensors, config)
    lowbit.convert(with_kv, tmp_path / "out", scheme)
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written["kv_cache_scheme"] == kv
    assert load(tmp_path / "out")["model.layers.0.self_attn.k_scale"].item() == 0.5
    lowbit.convert(tmp_path / "fp8", tmp_path / "without", scheme)
    plain = json.loads((tmp_path / "without" / "config.json").read_text())["quantization_config"]
    assert plain["kv_cache_scheme"] is None
