"""`lowbit.load` on files of msModelSlim and SGLang: outputs of other formats, static layers by the engine's formula."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from nn_reference import build, inputs, logits
from safetensors.torch import load_file, save_file
from torch import Tensor

import lowbit
from lowbit import ops
from lowbit.calibration import store
from lowbit.errors import InputError
from lowbit.nn import QuantExperts, QuantLinear

DESCRIPTION = "quant_model_description.json"


def saved(kind: str, where: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    build(kind).to(dtype).save_pretrained(where)
    return where


@pytest.mark.parametrize("kind", ["llama", "qwen3-moe", "deepseek-v3"])
@pytest.mark.parametrize("scheme", ["int8", "mxfp8"])
def test_the_same_outputs_as_from_compressed_tensors(tmp_path, kind, scheme):
    src = saved(kind, tmp_path / "src")
    lowbit.convert(src, tmp_path / "ascend", scheme, format="ascend")
    # What engines of this format want in float is left so in both.
    names = [m.removesuffix(".weight") for m, t in json.loads((tmp_path / "ascend" / DESCRIPTION).read_text()).items()
             if t == "FLOAT" and m.endswith("_proj.weight")]  # fmt: skip
    lowbit.convert(src, tmp_path / "other", scheme, ignore=names)
    ascend, other = (lowbit.load(tmp_path / d, dtype=torch.float32) for d in ("ascend", "other"))
    assert any(isinstance(m, QuantLinear) for m in ascend.modules())
    # For mxfp8 the experts of these models are too narrow.
    experts = any(isinstance(m, QuantExperts) for m in ascend.modules())
    assert experts == (kind != "llama" and scheme == "int8")
    batch = inputs(kind)
    assert torch.equal(logits(ascend, batch), logits(other, batch))


def test_sglang_blocks_give_the_same_outputs(tmp_path):
    from sample_models import llama, write

    src = write(tmp_path / "src", *llama())
    lowbit.convert(src, tmp_path / "sglang", "int8-block", format="sglang")
    lowbit.convert(src, tmp_path / "other", "int8-block")
    sglang, other = (lowbit.load(tmp_path / d, dtype=torch.float32) for d in ("sglang", "other"))
    assert sum(isinstance(m, QuantLinear) for m in sglang.modules()) == 14
    batch = {"input_ids": torch.arange(3, 23).reshape(2, 10)}
    assert torch.equal(logits(sglang, batch), logits(other, batch))


def static(tmp_path: Path, offset: int | None, dtype: torch.dtype) -> tuple[Path, Path]:
    """(source, ascend checkpoint) of a Qwen2 with biases, every Linear static."""
    import transformers

    torch.manual_seed(3)
    config = transformers.Qwen2Config(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(tmp_path / "src")
    scheme = "int8-static" if offset is None else "int8-static-asym"
    writer = store.Writer(tmp_path / "calib", {
        "scheme": scheme, "method": {"name": "absmax"}, "data": {},
        "source": {"fingerprint": store.fingerprint(tmp_path / "src")},
    })  # fmt: skip
    given: dict[str, Tensor] = {}
    for name in load_file(tmp_path / "src" / "model.safetensors"):
        if name.endswith("_proj.weight"):
            module = name.removesuffix(".weight")
            given[f"{module}.input_scale"] = torch.tensor([0.021])
            if offset is not None:
                given[f"{module}.input_zero_point"] = torch.tensor([offset], dtype=torch.int8)
    writer.write("model.layers.0", given)
    writer.finish()
    for name, fmt in (("ascend", "ascend"), ("other", None)):
        lowbit.convert(tmp_path / "src", tmp_path / name, scheme, format=fmt, calibration=tmp_path / "calib")
    return tmp_path / "other", tmp_path / "ascend"


@pytest.mark.parametrize("offset", [None, 0, -77], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_static_layers_compute_what_the_engine_does(tmp_path, offset, dtype):
    other, out = static(tmp_path, offset, dtype)
    model = lowbit.load(out, dtype=torch.float32)
    stored = load_file(out / "model.safetensors")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert len(layers) == 14
    generator = torch.Generator().manual_seed(0)
    for name, layer in layers.items():
        for suffix in ("weight", "deq_scale", "quant_bias", "input_scale", "input_offset"):
            assert torch.equal(layer.state_dict()[suffix], stored[f"{name}.{suffix}"])
        x = torch.randn(5, layer.in_features, generator=generator)
        x[0] *= 3  # saturates
        scale, zero = stored[f"{name}.input_scale"], stored[f"{name}.input_offset"]
        codes = (x / scale + zero).round().clamp(-128, 127)
        sums = codes.double() @ stored[f"{name}.weight"].double().T + stored[f"{name}.quant_bias"].double()
        deq = stored[f"{name}.deq_scale"]
        deq = deq.to(torch.int32).view(torch.float32) if deq.dtype == torch.int64 else deq
        want = sums * deq.double()
        size = want.abs() + stored[f"{name}.quant_bias"].double().abs() * deq.double()
        assert ((layer(x).double() - want).abs() <= 4e-7 * size).all()
    if offset is not None:  # symmetric codes end at −127 there, and the engine's at −128
        batch = inputs("llama")
        models = (model, *(lowbit.load(d, dtype=torch.float32) for d in (other, tmp_path / "src")))
        mine, others, want = (logits(m, batch) for m in models)
        # A bias is rounded to a multiple of deq_scale here.
        assert (mine - others).norm() < 0.2 * (others - want).norm()


def test_static_layers_move_copy_and_dequantize(tmp_path, monkeypatch):
    _, out = static(tmp_path, -77, torch.bfloat16)
    model = lowbit.load(out, dtype=torch.float32)
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 64)
    before = layer(x)
    given = []
    with monkeypatch.context() as patched:
        patched.setattr(ops, "linear", lambda *_, weight_sum, **__: given.append(weight_sum))
        layer(x)
    assert torch.equal(given[0], layer.codes.sum(1, dtype=torch.int32))
    assert torch.equal(copy.deepcopy(layer)(x), before)
    layer.to(torch.bfloat16)
    assert layer.deq_scale.dtype == torch.float32 and torch.equal(layer(x), before)
    layer.quant_bias = layer.quant_bias + 1000  # another buffer, as a loader sets it
    assert not torch.equal(layer(x), before)
    torch.testing.assert_close(layer(x) - before, 1000 * layer.deq_scale.expand(3, -1), rtol=1e-3, atol=1e-5)
    weight = load_file(tmp_path / "src" / "model.safetensors")[
        "model.layers.0.self_attn.q_proj.weight"
    ].float()
    assert (layer.dequantize() - weight).norm() < 0.02 * weight.norm()


def test_static_layers_pass_gradients_after_inference(tmp_path):
    """What they compute once was made in inference mode then, and could not be saved for a gradient."""
    _, out = static(tmp_path, -77, torch.bfloat16)
    layer = lowbit.load(out, dtype=torch.float32).model.layers[0].self_attn.q_proj
    x = torch.randn(3, 64)
    with torch.inference_mode():
        before = layer(x)
    x.requires_grad_()
    found = layer(x)
    assert torch.equal(found, before)
    found.sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(3, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shards", [1, 3])
def test_files_named_as_msmodelslim_names_them(tmp_path, shards):
    src = saved("llama", tmp_path / "src")
    lowbit.convert(src, tmp_path / "out", "int8", format="ascend")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    want = logits(lowbit.load(tmp_path / "out", dtype=torch.float32), inputs("llama"))
    (tmp_path / "out" / "model.safetensors").unlink()
    (tmp_path / "out" / "lowbit_manifest.json").unlink()
    weight_map = {}
    for i in range(shards):
        part = {n: t for j, (n, t) in enumerate(tensors.items()) if j % shards == i}
        file = f"quant_model_weights-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, tmp_path / "out" / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (tmp_path / "out" / "quant_model_weights.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(logits(lowbit.load(tmp_path / "out", dtype=torch.float32), inputs("llama")), want)
    assert lowbit.verify(tmp_path / "out", src).ok
    lowbit.convert(tmp_path / "out", tmp_path / "again", "int8", format="ascend")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert set(again) == set(tensors) and all(torch.equal(again[n], tensors[n]) for n in again)


@pytest.mark.parametrize("kind", ["llama", "qwen3-moe"])
def test_asymmetric_weights_are_refused(tmp_path, kind):
    src = saved(kind, tmp_path / "src")
    lowbit.convert(src, tmp_path / "out", "int8", format="ascend")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    name = next(
        n
        for n in reversed(tensors)
        if n.endswith("down_proj.weight_offset") and ("experts" in n) == (kind == "qwen3-moe")
    )
    tensors[name][2] = 1
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="weight_offset: expected symmetric weights"):
        lowbit.load(tmp_path / "out")


def test_quantize_model_and_static_layers_name_the_way(tmp_path):
    with pytest.raises(InputError, match="lowbit convert --format ascend"):
        lowbit.quantize_model(build("llama"), "int8", format="ascend")
    with pytest.raises(ValueError, match="expected a format that stores the weight's scale, found ascend"):
        QuantLinear.from_linear(torch.nn.Linear(64, 64), "int8-static", format="ascend", input_scale=0.1)
    layer = QuantLinear.from_linear(torch.nn.Linear(64, 64), "int8", format="ascend")
    assert set(layer.state_dict()) == {"weight", "weight_scale", "weight_offset", "bias"}
    assert not layer.weight_offset.any()


def test_calibration_and_evaluation_read_static_weights(tmp_path):
    from lowbit.calibration.source import Source

    for dtype in (torch.bfloat16, torch.float16):
        other, out = static(tmp_path / str(dtype), -5, dtype)
        name = "model.layers.1.mlp.up_proj"
        assert len(Source(out).stored) == 14
        torch.testing.assert_close(Source(out).weight(name), Source(other).weight(name), rtol=2e-7, atol=0)


@pytest.mark.parametrize("kind", ["llama", "qwen3-moe"])
def test_a_loaded_model_saves_and_loads_again(tmp_path, kind):
    """The description goes into config.json then, where vLLM-Ascend takes it too."""
    src = saved(kind, tmp_path / "src")
    lowbit.convert(src, tmp_path / "out", "int8", format="ascend")
    model = lowbit.load(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("out", "again"))
    assert set(before) == set(after) and all(torch.equal(before[n], after[n]) for n in before)
    again = lowbit.load(tmp_path / "again")
    assert torch.equal(logits(again, inputs(kind)), logits(model, inputs(kind)))
