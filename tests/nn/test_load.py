"""What `load` and `from_pretrained` read: published formats, shards, several layers of naming, bad input."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from nn_reference import build, dequantized, inputs, logits, tiny
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.calibration.data import load_tokenizer
from lowbit.calibration.layerwise import LayerwiseModel
from lowbit.calibration.source import Source
from lowbit.cli.models import open_model
from lowbit.errors import InputError
from lowbit.nn import QuantExperts, QuantLinear, float_activations, load, quantize_model
from lowbit.nn.integration import register, unregister
from lowbit.nn.stored import QuantModule
from lowbit.quantize import quantize
from lowbit.scheme import SCHEMES


@pytest.fixture
def on_lowbit():
    register()
    yield
    unregister()


def published_compressed_tensors(kind: str, preset: str, path) -> None:
    """A checkpoint quantized and saved by the compressed-tensors library itself."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        apply_quantization_config,
        preset_name_to_scheme,
    )

    model = build(kind)
    scheme = preset_name_to_scheme(preset, ["Linear"])
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "quantization_scheme") and hasattr(module, "weight_scale"):
            weight = module.weight.detach()
            limit = 127.5 if scheme.weights.type == "int" else 448.0
            dims = (1,) if module.weight_scale.numel() > 1 else (0, 1)
            scale = weight.abs().amax(dims, keepdim=True) / limit
            module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
            if hasattr(module, "input_scale"):
                module.input_scale.data.fill_(0.02)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(path)
    compressor.update_config(str(path))


@pytest.mark.parametrize("preset", ["W8A8", "FP8_DYNAMIC", "FP8"])
def test_published_compressed_tensors(preset, tmp_path):
    published_compressed_tensors("llama", preset, tmp_path / "out")
    unregister()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert not any(isinstance(m, QuantLinear) for m in theirs.modules())
    mine = load(tmp_path / "out", dtype=torch.float32)
    assert sum(isinstance(m, QuantLinear) for m in mine.modules()) == 14
    batch = inputs("llama")
    want = logits(theirs, batch)
    unquantized = logits(build("llama"), batch)
    theirs_off, mine_off = (want - unquantized).norm(), (logits(mine, batch) - unquantized).norm()
    # Both quantize activations; theirs multiplies dequantized values in float32.
    if preset == "W8A8":
        # Their scale of activations is absmax / 127.5 and ours absmax / 127: other codes, of the same quality.
        assert mine_off < 1.1 * theirs_off
    else:
        assert (logits(mine, batch) - want).norm() < 0.1 * theirs_off
    reference = transformers.LlamaForCausalLM.from_pretrained(
        dequantized(tmp_path / "out", tmp_path / "float"), dtype=torch.float32
    )
    with float_activations(mine):
        assert torch.equal(logits(mine, batch), logits(reference, batch))


def block_fp8(path, kind: str = "deepseek-v3") -> None:
    """A DeepSeek-style checkpoint: block FP8 with `weight_scale_inv`, some scales in another shard."""
    cls, config = tiny(kind)
    config.hidden_size, config.intermediate_size, config.moe_intermediate_size = 128, 192, 128
    torch.manual_seed(3)
    cls(config).save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    spec = SCHEMES["fp8-block"].weights
    first, second = {}, {}
    for name, tensor in tensors.items():
        keep = tensor.dim() != 2 or any(w in name for w in ("embed", "lm_head", "norm", "mlp.gate."))
        if keep:
            first[name] = tensor
            continue
        q = quantize(tensor, spec)
        first[name], second[name + "_scale_inv"] = q.codes, q.scale
    (path / "model.safetensors").unlink()
    save_file(first, path / "model-00001-of-00002.safetensors", {"format": "pt"})
    save_file(second, path / "model-00002-of-00002.safetensors", {"format": "pt"})
    where = dict.fromkeys(first, "model-00001-of-00002.safetensors")
    where |= dict.fromkeys(second, "model-00002-of-00002.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))


def test_published_block_fp8(tmp_path):
    block_fp8(tmp_path / "out")
    model = load(tmp_path / "out")
    assert any(isinstance(m, QuantExperts) for m in model.modules())
    names = set(model.state_dict())
    on_disk = {k for f in (tmp_path / "out").glob("*.safetensors") for k in load_file(f)}
    assert names == on_disk
    cls, _ = tiny("deepseek-v3")
    reference = cls.from_pretrained(dequantized(tmp_path / "out", tmp_path / "float"), dtype=torch.float32)
    batch = inputs("deepseek-v3")
    with float_activations(model):
        torch.testing.assert_close(logits(model, batch), logits(reference, batch), rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path / "again")
    assert lowbit.verify(tmp_path / "again").ok
    assert torch.equal(logits(load(tmp_path / "again"), batch), logits(model, batch))
    # And it converts: int8 from the codes, in one step.
    lowbit.convert(tmp_path / "out", tmp_path / "int8", scheme="int8")
    load(tmp_path / "int8")


def test_nothing_is_held_in_full_precision(tmp_path):
    build("llama").save_pretrained(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", scheme="int8")
    model = load(tmp_path / "out")
    quantized = {n for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert len(quantized) == 14
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[0] in quantized and name.endswith(".weight"):
            assert tensor.dtype == torch.int8
            # Mapped from the file, not copied: its storage is the file's.
            assert (
                tensor.untyped_storage().nbytes()
                >= (tmp_path / "out/model.safetensors").stat().st_size - 10**6
            )


def test_mixed_precision(tmp_path):
    """Experts of one layer in float, the others quantized; and another scheme for attention."""
    cls, config = tiny("qwen3-moe")
    config.mlp_only_layers, config.num_hidden_layers = [], 3
    torch.manual_seed(0)
    cls(config).save_pretrained(tmp_path / "src")
    lowbit.convert(
        tmp_path / "src", tmp_path / "out", scheme="int8", ignore=["model.layers.1.mlp"],
        overrides={"*.self_attn.*": "fp8"},
    )  # fmt: skip
    model = load(tmp_path / "out")
    kinds = [type(layer.mlp.experts) is QuantExperts for layer in model.model.layers]
    assert kinds == [True, False, True]
    assert model.model.layers[0].self_attn.q_proj.scheme.name == "fp8"
    reference = cls.from_pretrained(dequantized(tmp_path / "out", tmp_path / "float"), dtype=torch.float32)
    batch = inputs("qwen3-moe")
    with float_activations(model):
        torch.testing.assert_close(logits(model, batch), logits(reference, batch), rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again"), batch), logits(model, batch))
    assert set(load_file(tmp_path / "again/model.safetensors")) == set(
        load_file(tmp_path / "out/model.safetensors")
    )


def test_from_pretrained_runs_on_lowbit(on_lowbit, tmp_path):
    build("mixtral").save_pretrained(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", scheme="fp8")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert any(isinstance(m, QuantExperts) for m in model.modules())
    batch = inputs("mixtral")
    want = logits(model, batch)
    assert torch.equal(want, logits(load(tmp_path / "out"), batch))
    model.save_pretrained(tmp_path / "again")
    assert lowbit.verify(tmp_path / "again").ok
    assert torch.equal(logits(load(tmp_path / "again"), batch), want)
    assert logits(model.half().float(), batch).dtype == torch.float32
    unregister()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "src")
    assert not any(isinstance(m, QuantLinear) for m in theirs.modules())


def test_what_lowbit_does_not_run_stays_with_transformers(on_lowbit):
    from transformers.quantizers.auto import AutoQuantizationConfig

    four_bits = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "channel"}}
        },
    }  # fmt: skip
    config = AutoQuantizationConfig.from_dict(four_bits)
    assert type(config).__name__ == "CompressedTensorsConfig"
    four_bits["config_groups"]["group_0"]["weights"]["num_bits"] = 8
    config = AutoQuantizationConfig.from_dict(four_bits)
    assert type(config).__name__ == "LowbitConfig"
    assert config.to_dict() == four_bits


REGISTER = """
import sys
import lowbit
import lowbit.nn.integration
assert "torch" not in sys.modules and "transformers" not in sys.modules
lowbit.register()
import transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(sorted({type(m).__name__ for m in model.modules() if "Quant" in type(m).__name__}))
"""


def test_register_is_asked_for_and_light_until_then(tmp_path):
    build("llama").save_pretrained(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", scheme="int8")
    done = subprocess.run(
        [sys.executable, "-c", REGISTER, tmp_path / "out"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['QuantLinear']"


def test_device_map(tmp_path):
    build("llama").save_pretrained(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", scheme="int8")
    batch = inputs("llama")
    want = logits(load(tmp_path / "out"), batch)
    for where in ({"device": "cpu"}, {"device_map": "cpu"}, {"device_map": "auto"}):
        assert torch.equal(logits(load(tmp_path / "out", **where), batch), want)
    with pytest.raises(InputError, match="found both"):
        load(tmp_path / "out", device="cpu", device_map="auto")


@pytest.mark.parametrize("kind", ["llama", "qwen3-moe"])
@pytest.mark.parametrize("scheme", ["int8", "fp8-block", "mxfp8"])
def test_what_is_offloaded_is_fetched_for_every_use(tmp_path, kind, scheme):
    """To disk by a device map, and to memory as beside an accelerator: codes leave, results stay."""
    from accelerate import cpu_offload, disk_offload
    from accelerate.hooks import remove_hook_from_submodules

    build(kind).save_pretrained(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", scheme=scheme)
    batch = inputs(kind)
    want = logits(load(tmp_path / "out"), batch)
    where = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    where |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    on_disk = load(tmp_path / "out", device_map=where, offload_folder=tmp_path / "offload")
    in_memory = load(tmp_path / "out")
    cpu_offload(in_memory, execution_device=torch.device("cpu"), offload_buffers=True)
    by_hand = load(tmp_path / "out")
    disk_offload(by_hand, tmp_path / "by_hand", execution_device=torch.device("cpu"), offload_buffers=True)
    for model in (on_disk, in_memory, by_hand):
        quantized = [m for m in model.model.layers[1].modules() if isinstance(m, QuantModule)]
        assert quantized and all(m.get_buffer(n).is_meta for m in quantized for n in m.frozen)
        assert torch.equal(logits(model, batch), want)
        assert torch.equal(logits(model, batch), want)  # and again, when all has been given up once
    remove_hook_from_submodules(in_memory)
    assert not any(b.is_meta for b in in_memory.buffers())
    assert torch.equal(logits(in_memory, batch), want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "nowhere"}, "a device that torch can use, found nowhere"),
        ({"device": 77}, "a device that torch can use, found 77"),
        ({"dtype": "float33"}, "a dtype of float32, bfloat16"),
        ({"dtype": torch.int8}, "a dtype of float32, bfloat16"),
        ({"dtype": torch.float8_e4m3fn}, "or auto, found torch.float8_e4m3fn"),
        ({"device_map": "nowhere"}, "load it with, found: When passing device_map"),
        ({"attn_implementation": "flash"}, "load it with, found: Specified"),
    ],
)
def test_arguments_that_make_no_sense(tmp_path, options, message):
    build("llama").save_pretrained(tmp_path / "src")
    with pytest.raises(InputError, match=message):
        load(tmp_path / "src", **options)


def test_bad_input(tmp_path):
    with pytest.raises(InputError, match="found nothing there"):
        load(tmp_path / "absent")
    build("llama").save_pretrained(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", scheme="int8")
    config = json.loads((tmp_path / "out/config.json").read_text())
    file = tmp_path / "out/config.json"
    file.write_text(json.dumps(config | {"architectures": ["NoSuchModel"]}))
    with pytest.raises(InputError, match="NoSuchModel"):
        load(tmp_path / "out")
    file.write_text(json.dumps(config | {"intermediate_size": 80}))
    with pytest.raises(InputError, match=r"config\.json and weights do not belong together"):
        load(tmp_path / "out")
    # What transformers' own classes say of both was an error of another kind.
    file.write_text(json.dumps(config | {"vocab_size": 80}))
    with pytest.raises(InputError, match=r"another shape \(first: model\.embed_tokens\.weight"):
        load(tmp_path / "out")
    file.write_text(json.dumps(config | {"num_attention_heads": 7}))
    with pytest.raises(InputError, match=r"cannot use this config\.json"):
        load(tmp_path / "out")
    file.write_text(json.dumps(config))
    tensors = load_file(tmp_path / "out/model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight_scale"]
    save_file(tensors, tmp_path / "out/model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="weight_scale"):
        load(tmp_path / "out")


def test_shapes_are_checked_where_transformers_leaves_it_to_a_quantizer(tmp_path, monkeypatch):
    """As it does before 5.23: the embeddings were those on disk, whatever config.json said."""
    from lowbit.nn.quantizer import LowbitQuantizer

    monkeypatch.setattr(LowbitQuantizer, "param_needs_quantization", lambda *a, **k: True)
    build("llama").save_pretrained(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", scheme="int8")
    load(tmp_path / "out")
    file = tmp_path / "out/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 80}))
    with pytest.raises(InputError, match=r"another shape \(first: model\.embed_tokens\.weight, \[96, 64\]"):
        load(tmp_path / "out")


@pytest.mark.parametrize("found", ["none", "5.20.2"])
def test_transformers_missing_or_too_old(found, tmp_path, monkeypatch):
    model = build("llama")
    model.save_pretrained(tmp_path / "src")
    if found == "none":
        monkeypatch.setitem(sys.modules, "transformers", None)
    else:
        monkeypatch.setattr(sys.modules["transformers"], "__version__", found)
    for call in (
        lambda: load(tmp_path / "src"),
        lambda: open_model(tmp_path / "src", dtype="auto", device="cpu", threads=None),
        lambda: load_tokenizer(tmp_path / "src"),
        lambda: LayerwiseModel(Source(tmp_path / "src")),
        lambda: quantize_model(model, "int8"),
        register,
    ):
        with pytest.raises(InputError, match=rf"transformers 5\.21 or newer, found {found}; pip install"):
            call()


def test_no_transformers_on_an_old_python_is_said_as_such(monkeypatch):
    """pip installs none that is new enough there, so that its command is no advice."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(sys, "version_info", (3, 10, 13))
    with pytest.raises(InputError, match=r"needs Python 3\.11 or newer, and this is 3\.10") as error:
        register()
    assert "pip install" not in str(error.value)


def test_missing_tensors_are_an_error(tmp_path):
    """transformers would initialize what a checkpoint lacks and warn."""
    build("llama").save_pretrained(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", scheme="int8")
    tensors = load_file(tmp_path / "out/model.safetensors")
    del tensors["model.layers.0.input_layernorm.weight"]
    save_file(tensors, tmp_path / "out/model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.0\.input_layernorm\.weight"):
        load(tmp_path / "out")


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_scales_that_nothing_here_reads_are_passed_over(scheme, tmp_path, caplog):
    """AutoFP8's, of inputs that are quantized dynamically after all, and of what attention and its cache hold."""
    caplog.set_level("WARNING", logger="transformers")  # whatever another test has asked of it
    build("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    names = [n.removesuffix("weight") for n in tensors if n.endswith("_proj.weight")]
    for name in names:
        scale = tensors[f"{name}weight"].abs().max() / 448
        tensors[f"{name}weight"] = (tensors[f"{name}weight"] / scale).to(torch.float8_e4m3fn)
        tensors |= {f"{name}weight_scale": scale.reshape(1), f"{name}input_scale": torch.tensor([0.02])}
    at = "model.layers.0.self_attn"
    of_attention = ("kv_scale", "k_scale", "q_scale", "prob_output_scale", "k_proj.output_scale")
    tensors |= {f"{at}.{leaf}": torch.ones(1) for leaf in of_attention}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": scheme}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load(tmp_path)
    assert "UNEXPECTED" not in caplog.text
    assert torch.isfinite(logits(model, inputs("llama"))).all()
    save_file(tensors | {f"{at}.other": torch.ones(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    load(tmp_path)
    assert caplog.text.count("UNEXPECTED |") == 1 and f"{at}.other" in caplog.text


def test_scales_of_a_kv_cache_are_passed_over(tmp_path, caplog):
    build("llama").save_pretrained(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", scheme="fp8")
    want = logits(load(tmp_path / "out"), inputs("llama"))
    tensors = load_file(tmp_path / "out/model.safetensors")
    tensors |= {f"model.layers.{i}.self_attn.{x}_scale": torch.ones(1) for i in (0, 1) for x in "kv"}
    save_file(tensors, tmp_path / "out/model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = {
        "num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False,
    }  # fmt: skip
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    model = load(tmp_path / "out")
    assert "UNEXPECTED" not in caplog.text
    assert torch.equal(logits(model, inputs("llama")), want)
    model.save_pretrained(tmp_path / "again")
    assert lowbit.verify(tmp_path / "again").ok


def test_online_hadamard(tmp_path):
    """Weights rotated on disk, inputs rotated while running: the same model."""
    from lowbit.calibration.rotation import apply_online_hadamard

    cls, config = tiny("llama")
    config.intermediate_size = 192
    torch.manual_seed(0)
    model = cls(config).eval()
    want = logits(model, inputs("llama"))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.copy_(apply_online_hadamard(layer.mlp.down_proj.weight))
    rotated = logits(model, inputs("llama"))
    model.save_pretrained(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", scheme="int8")
    file = tmp_path / "out/config.json"
    config = json.loads(file.read_text())
    names = {f"model.layers.{i}.mlp.down_proj": 64 for i in (0, 1)}
    file.write_text(json.dumps(config | {"lowbit": {"online_hadamard": names}}))
    loaded = load(tmp_path / "out")
    got = logits(loaded, inputs("llama"))
    assert (got - want).norm() < 0.1 * (rotated - want).norm()
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again"), inputs("llama")), got)
    file.write_text(json.dumps(config | {"lowbit": {"online_hadamard": {"lm_head": 64}}}))
    with pytest.raises(InputError, match="not a quantized Linear"):
        load(tmp_path / "out")


def check_rotated_source(path, want) -> None:
    """Converted again it stays what it is, with the warning; in float nothing would rotate its inputs."""
    for scheme, format in (("fp8", None), ("int8", "ascend"), ("int8-weight-only", None)):
        done = lowbit.convert(path / "out", path / "again", scheme, format=format, overwrite=True)
        assert any("online Hadamard" in w for w in done.plan.warnings)
        assert (logits(load(path / "again"), inputs("llama")) - want).norm() < 0.05 * want.norm()
    for source, options in (
        ("out", {"scheme": "bf16"}),
        ("out", {"ignore": ["*.1.*down_proj"]}),
        ("src", {"ignore": ["*.1.*down_proj"], "calibration": path / "calib"}),
    ):
        with pytest.raises(InputError, match=r"inputs are rotated .* become float"):
            lowbit.plan(path / source, **options)
    for ask in (
        lambda: lowbit.calibrate(
            path / "out", path / "c", "int8", method="gptq", data=path / "ids.npy", length=32
        ),
        lambda: lowbit.search(path / "out", path / "ids.npy", budget=8, length=32),
    ):
        with pytest.raises(InputError, match="give the checkpoint from before the rotation"):
            ask()


def rotated_online(model, path):
    """The model with inputs rotated while running, converted to path/out and loaded; and what calibrated it."""
    model.save_pretrained(path / "src")
    seed = torch.Generator().manual_seed(0)
    windows = list(torch.randint(0, model.config.vocab_size, (8, 32), generator=seed))
    lowbit.calibrate(path / "src", path / "calib", "int8", method="rotate-gptq-online", data=windows)
    lowbit.convert(path / "src", path / "out", "int8", calibration=path / "calib")
    return load(path / "out", dtype=torch.float32), windows


@pytest.mark.parametrize("kind", ["qwen3-moe", "qwen3.5-moe", "mixtral"])
def test_an_online_hadamard_of_experts(kind, tmp_path):
    model = build(kind)
    want = logits(model, inputs(kind))
    loaded, windows = rotated_online(model, tmp_path)
    found = logits(loaded, inputs(kind))
    report = lowbit.measure(tmp_path / "out", windows)
    assert (found - want).norm() < 0.05 * want.norm()
    experts = [m for m in loaded.modules() if isinstance(m, QuantExperts)]
    assert experts and all(m.hadamard == m.intermediate_size & -m.intermediate_size for m in experts)
    with torch.no_grad():
        nll = sum(
            torch.nn.functional.cross_entropy(
                loaded(input_ids=w[None]).logits[0, :-1], w[1:], reduction="sum"
            )
            for w in windows
        )
    assert float(nll) == pytest.approx(report.agreement.nll, rel=1e-3)
    for m in experts:
        m.hadamard = 0
    assert (logits(loaded, inputs(kind)) - want).norm() > 2 * (found - want).norm()
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again", dtype=torch.float32), inputs(kind)), found)
    file = tmp_path / "out/config.json"
    config = json.loads(file.read_text())
    for change, message in (
        (
            lambda names: names.pop(next(n for n in names if ".experts." in n)),
            r"of all \d experts, or of none",
        ),
        (
            lambda names: names.update({n: 3 for n in names if ".experts." in n}),
            "a power of two that divides",
        ),
    ):
        names = dict(config["lowbit"]["online_hadamard"])
        change(names)
        file.write_text(json.dumps(config | {"lowbit": {"online_hadamard": names}}))
        with pytest.raises(InputError, match=message):
            load(tmp_path / "out")


def test_a_float_copy_of_a_rotated_layer_takes_inputs_as_they_are(tmp_path):
    loaded, _ = rotated_online(build("llama"), tmp_path)
    with float_activations(loaded):
        want = logits(loaded, inputs("llama"))
    loaded.save_pretrained(tmp_path / "as it is")  # which leaves the name of the dtype in the config
    loaded.dequantize()
    assert not any(isinstance(m, QuantLinear) for m in loaded.modules())
    torch.testing.assert_close(logits(loaded, inputs("llama")), want, rtol=1e-4, atol=1e-4)
    loaded.save_pretrained(tmp_path / "again")
    lowbit.convert(tmp_path / "again", tmp_path / "int8", "int8")
    found = logits(load(tmp_path / "int8", dtype=torch.float32), inputs("llama"))
    assert (found - want).norm() < 0.05 * want.norm()


def test_a_calibration_with_an_online_hadamard_converts_and_runs(tmp_path):
    from lowbit.calibration.calibrate import calibrate
    from lowbit.calibration.methods import METHODS
    from lowbit.scheme import get_scheme

    cls, config = tiny("llama")
    config.intermediate_size = 192
    torch.manual_seed(0)
    model = cls(config).eval()
    want = logits(model, inputs("llama"))
    model.save_pretrained(tmp_path / "src")
    windows = list(torch.randint(0, config.vocab_size, (8, 32)))
    calibrate(
        tmp_path / "src", tmp_path / "calib", get_scheme("int8"), METHODS["rotate-gptq-online"], windows
    )
    done = lowbit.convert(tmp_path / "src", tmp_path / "out", "int8", calibration=tmp_path / "calib")
    assert any("online Hadamard" in w for w in done.plan.warnings)
    found = logits(load(tmp_path / "out"), inputs("llama"))
    assert (found - want).norm() < 0.05 * want.norm()
    np.save(tmp_path / "ids.npy", torch.stack(windows).numpy())
    options = {"reference": tmp_path / "src", "samples": 2, "length": 32}
    report = lowbit.measure(tmp_path / "out", tmp_path / "ids.npy", **options)
    assert max(report.layer_errors.values()) < 0.05  # it left the inputs as they are
    check_rotated_source(tmp_path, want)
    file = tmp_path / "out/config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "lowbit"}))
    unrotated = logits(load(tmp_path / "out"), inputs("llama"))
    assert (unrotated - want).norm() > 5 * (found - want).norm()
