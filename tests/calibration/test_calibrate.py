"""Whole calibrations of tiny models: what is written, that it helps, that a killed run goes on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from architectures import TEXT
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import lowbit
from lowbit.calibration import calibrate as module
from lowbit.calibration import fold, step, store
from lowbit.calibration.calibrate import RunOptions, calibrate
from lowbit.calibration.gptq import RoundingOptions
from lowbit.calibration.kv_cache import KVCache
from lowbit.calibration.layerwise import LayerwiseModel
from lowbit.calibration.methods import METHODS, Method
from lowbit.calibration.source import Source
from lowbit.checkpoint.patterns import Patterns
from lowbit.checkpoint.rules import Selection
from lowbit.errors import InputError
from lowbit.evaluate.layerwise import Candidate, _Stream, calibrated, evaluate, plain
from lowbit.quantize import quantize
from lowbit.scheme import get_scheme


def kl(source, calibration, windows) -> float:
    report = evaluate(calibrated(source, calibration), windows, plain(source))
    assert len(report.layer_errors) == 3
    assert all(0 < e < 1 for e in report.layer_errors.values())
    return report.agreement.mean_kl


def tensors_of(calibration) -> dict[str, torch.Tensor]:
    out = {}
    for name, entry in calibration.tensors.items():
        with safe_open(entry.file, framework="pt") as stream:
            out[name] = stream.get_tensor(name)
    return out


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3_moe", "mixtral", "gemma2"])
@pytest.mark.parametrize("method", ["gptq", "smoothquant-gptq", "rotate-gptq", "rotate-gptq-online"])
def test_methods_beat_rounding(checkpoints, windows, tmp_path, name, method):
    source, scheme = checkpoints[name], get_scheme("int8")
    if name == "gemma2" and method.startswith("rotate"):
        with pytest.raises(InputError, match="without rotation"):
            calibrate(source, tmp_path / "m", scheme, METHODS[method], windows)
        return
    rounded = calibrate(source, tmp_path / "r", scheme, METHODS["absmax"], [])
    found = calibrate(source, tmp_path / "m", scheme, METHODS[method], windows)
    assert found.complete
    assert bool(found.config_overrides) == (name == "llama" and method.startswith("rotate"))
    # SmoothQuant is chosen for what its sample loses; models without outliers gain nothing from it.
    margin = 1.1 if method.startswith("smooth") else 1.0
    assert kl(source, found, windows[:4]) < margin * kl(source, rounded, windows[:4])
    with safe_open(source / "model.safetensors", framework="pt") as stream:
        known = set(stream.keys()) | {"lm_head.weight"}
    suffixes = ("weight_scale", "input_scale")
    assert {n for n in found.tensors if not n.endswith(suffixes)} <= known  # the checkpoint's own names


def test_floats_stay_what_the_checkpoint_s_are(checkpoints, tmp_path):
    """Of models in float32 that no longer say so: transformers has written `dtype` only for some years."""
    shutil.copytree(checkpoints["llama"], tmp_path / "src")
    config = json.loads((tmp_path / "src" / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "src" / "config.json").write_text(json.dumps(config))
    found = calibrate(tmp_path / "src", tmp_path / "c", get_scheme("int8"), METHODS["rotate"], [])
    assert {found.tensors[n].dtype for n in found.floats()} == {"F32"}


def test_what_float16_does_not_hold_is_refused(windows, tmp_path):
    """A final norm is folded into lm_head where the model is rotated: it was written with Inf in it."""
    model = LlamaForCausalLM(LlamaConfig(**TEXT)).half()
    with torch.no_grad():
        model.model.norm.weight.fill_(9000.0)
        model.lm_head.weight.mul_(1000.0)
    model.save_pretrained(tmp_path / "src")
    with pytest.raises(InputError, match=r"the output head to fit the source's float16 .* to bf16 first"):
        calibrate(tmp_path / "src", tmp_path / "c", get_scheme("int8"), METHODS["rotate"], [])
    assert not (tmp_path / "c").exists()
    calibrate(tmp_path / "src", tmp_path / "c", get_scheme("int8"), METHODS["gptq"], windows)


@pytest.mark.parametrize("method", ["rotate-gptq", "rotate-gptq-online", "smoothquant-gptq"])
def test_layers_that_add_nothing_are_not_changed(windows, tmp_path, method):
    """As they deepen a model before it is trained on, or are left by pruning."""
    model = LlamaForCausalLM(LlamaConfig(**TEXT | {"num_hidden_layers": 3}))
    with torch.no_grad():
        for index in (0, 2):
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                model.model.layers[index].get_submodule(name).weight.zero_()
    model.save_pretrained(tmp_path / "src")
    wanted = replace(METHODS[method], else_smooth=True)
    found = calibrate(tmp_path / "src", tmp_path / "c", get_scheme("int8"), wanted, windows)
    assert found.complete and found.method["rotate"] == METHODS[method].rotate


@pytest.mark.parametrize(
    "scheme", ["fp8", "int8-block", "int8-weight-only", "mxfp8", "fp8-static", "int8-static-asym"]
)
def test_every_scheme_calibrates(checkpoints, windows, tmp_path, scheme):
    source = checkpoints["llama"]
    found = calibrate(source, tmp_path / "c", get_scheme(scheme), METHODS["smoothquant-gptq"], windows)
    tensors = tensors_of(found)
    module_name = "model.layers.1.mlp.down_proj"
    spec = get_scheme(scheme).weights
    assert tensors[f"{module_name}.weight"].dtype == spec.dtype.torch_dtype
    assert (f"{module_name}.input_scale" in tensors) == get_scheme(scheme).needs_calibration
    assert (f"{module_name}.input_zero_point" in tensors) == (scheme == "int8-static-asym")
    assert kl(source, found, windows[:4]) < 0.05


@pytest.mark.parametrize("ranges", ["absmax", "moving-average", "percentile", "mse", "entropy", "output"])
def test_static_ranges(checkpoints, windows, tmp_path, ranges):
    method = replace(METHODS["absmax"], activation_range=ranges, percentile=99.9)
    found = calibrate(checkpoints["qwen3"], tmp_path / "c", get_scheme("int8-static"), method, windows)
    names = set(found.tensors)
    assert names == {f"{m}.input_scale" for m in found.modules()} and len(names) == 3 * 7
    scales = tensors_of(found)
    layer = "model.layers.0"
    q, k, v = (float(scales[f"{layer}.self_attn.{p}_proj.input_scale"]) for p in "qkv")
    assert q == k == v  # engines run the three as one matmul
    assert kl(checkpoints["qwen3"], found, windows[:4]) < 0.2


def test_static_absmax_scales_cover_what_was_seen(checkpoints, windows, tmp_path):
    found = calibrate(
        checkpoints["qwen3"], tmp_path / "c", get_scheme("int8-static"),
        replace(METHODS["absmax"], propagate=False), windows,
    )  # fmt: skip
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoints["qwen3"], dtype=torch.float32).eval()
    seen = {}
    for i in range(3):
        name = f"model.layers.{i}.mlp.down_proj"
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, n=name: seen.__setitem__(n, max(seen.get(n, 0.0), float(args[0].abs().max())))
        )
    with torch.no_grad():
        model(torch.stack(windows))
    scales = tensors_of(found)
    for name, peak in seen.items():
        assert float(scales[f"{name}.input_scale"]) * 127 == pytest.approx(peak, rel=1e-5)


@pytest.mark.parametrize(
    ("scheme", "format", "holds"),
    [
        ("fp8-block", None, "fp8"),
        ("fp8-block", "fp8", None),
        ("int8-block", None, "int8"),
        ("int8-block", "sglang", None),
        ("int8-weight-only", None, None),
    ],
)
def test_where_blocks_do_not_fit_a_calibration_has_what_the_conversion_makes(
    windows, tmp_path, scheme, format, holds
):
    """Widths of 160 hold no blocks of 128: SmolLM2's 576 do not."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=160, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "src")
    lowbit.calibrate(tmp_path / "src", tmp_path / "calibration", scheme, method="gptq", data=windows)
    lowbit.convert(
        tmp_path / "src", tmp_path / "out", scheme, format=format, calibration=tmp_path / "calibration"
    )
    assert lowbit.verify(tmp_path / "out", source=tmp_path / "src").ok
    plan = lowbit.plan(tmp_path / "src", scheme, format=format)
    narrow = plan.decisions["model.layers.0.self_attn.q_proj"].scheme
    assert (narrow.name if narrow and narrow.name != scheme else None) == holds
    assert plan.decisions["model.layers.0.mlp.down_proj"].scheme.name == scheme  # 256 fit


def test_a_killed_run_resumes_to_the_same_result(checkpoints, windows, tmp_path, monkeypatch):
    source, scheme = checkpoints["qwen3_moe"], get_scheme("int8-static")
    for method in (METHODS["gptq"], METHODS["smoothquant"]):
        whole = calibrate(source, tmp_path / f"whole-{method.name}", scheme, method, windows)
        original, calls = module.calibrate_layer, []

        def dies(run, index, *, need_output, original=original, calls=calls):
            calls.append(index)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return original(run, index, need_output=need_output)

        monkeypatch.setattr(module, "calibrate_layer", dies)
        out = tmp_path / f"killed-{method.name}"
        with pytest.raises(KeyboardInterrupt):
            calibrate(source, out, scheme, method, windows)
        assert not store.read(out).complete
        before = (out / "layer-00001.safetensors").stat().st_mtime_ns
        said: list[tuple[int, int]] = []
        resumed = calibrate(source, out, scheme, method, windows, resumed=lambda *of, to=said: to.append(of))
        assert said == [(2, 3)]
        assert calls[3:] == ([2] if method.propagate else [0, 1, 2])
        assert resumed.complete and (out / "layer-00001.safetensors").stat().st_mtime_ns == before
        monkeypatch.setattr(module, "calibrate_layer", original)
        expected, found = tensors_of(whole), tensors_of(resumed)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            if tensor.dtype == torch.int8:
                assert (tensor == found[name]).double().mean() > 0.99, name
            else:
                assert torch.allclose(tensor.float(), found[name].float(), rtol=1e-3), name


def test_two_calibrations_into_one_place(checkpoints, windows, tmp_path, monkeypatch):
    """Layers of both would stand under the manifest of one."""
    source, scheme = checkpoints["llama"], get_scheme("int8")

    def another(run, index, *, need_output):
        with pytest.raises(InputError, match="another calibration is writing here"):
            calibrate(source, tmp_path / "c", scheme, METHODS["absmax"], windows, overwrite=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module, "calibrate_layer", another)
        calibrate(source, tmp_path / "c", scheme, METHODS["gptq"], windows)
    assert calibrate(source, tmp_path / "c", scheme, METHODS["gptq"], windows).complete


def test_only_the_same_calibration_goes_on(checkpoints, windows, tmp_path, monkeypatch):
    source, scheme, out = checkpoints["mixtral"], get_scheme("int8"), tmp_path / "c"
    first = tensors_of(calibrate(source, out, scheme, METHODS["gptq"], windows))
    with pytest.raises(InputError, match="other data"):  # of the same number and lengths
        calibrate(source, out, scheme, METHODS["gptq"], [w.flip(0) for w in windows])
    with pytest.raises(InputError, match="other experts"):
        calibrate(source, out, scheme, METHODS["gptq"], windows, options=RunOptions(all_experts=False))
    (out / "layer-00001.safetensors").unlink()
    original, made = module.calibrate_layer, []
    monkeypatch.setattr(module, "calibrate_layer", lambda r, i, **k: made.append(i) or original(r, i, **k))
    monkeypatch.setattr(
        module, "_replay", lambda r, i, c, was=module._replay: made.append(-i) or was(r, i, c)
    )
    again = tensors_of(calibrate(source, out, scheme, METHODS["gptq"], windows))
    assert made == [0, 1]  # nobody needs to see what follows
    assert again.keys() == first.keys() and all(torch.equal(first[n], again[n]) for n in first)


def test_spilling_and_batches_do_not_change_the_result(checkpoints, windows, tmp_path):
    source, scheme = checkpoints["llama"], get_scheme("int8-static")
    a = calibrate(source, tmp_path / "a", scheme, METHODS["absmax"], windows)
    options = RunOptions(memory_limit=1, batch_size=3, spill_directory=str(tmp_path))
    b = calibrate(source, tmp_path / "b", scheme, METHODS["absmax"], windows, options=options)
    x, y = tensors_of(a), tensors_of(b)
    assert x.keys() == y.keys() and all(torch.allclose(x[n], y[n], rtol=1e-5) for n in x)


def test_prompts_of_different_lengths(checkpoints, windows, tmp_path):
    uneven = [w[: 20 + i] for i, w in enumerate(windows)]
    found = calibrate(checkpoints["llama"], tmp_path / "c", get_scheme("int8"), METHODS["gptq"], uneven)
    assert found.complete


def test_experts_report_tokens_and_starved_ones_fall_back(checkpoints, windows, tmp_path):
    source, scheme = checkpoints["qwen3_moe"], get_scheme("int8")
    options = RunOptions(all_experts=False, min_tokens=300)
    routed = calibrate(source, tmp_path / "a", scheme, METHODS["gptq"], windows, options=options)
    everyone = calibrate(source, tmp_path / "b", scheme, METHODS["gptq"], windows)
    fallbacks = 0
    for calibration, all_seen in ((routed, False), (everyone, True)):
        for layer in calibration.layers.values():
            tokens = layer["experts"]["mlp.experts"]["tokens"]
            assert sum(tokens) == 12 * 48 * 2  # tokens × experts per token
            for i, seen in enumerate(tokens):
                report = layer["modules"][f"mlp.experts.{i}.down_proj"]
                starved = seen < 300 and not all_seen
                assert ("fallback" in report) == starved
                if starved:
                    fallbacks += 1
                    assert report["tokens"] == seen and "without data" in report["fallback"]
    assert fallbacks > 0
    assert "model.layers.0.mlp.gate" not in everyone.modules()


def test_mixtral_tensors_have_the_names_of_its_checkpoint(checkpoints, windows, tmp_path):
    found = calibrate(
        checkpoints["mixtral"], tmp_path / "c", get_scheme("int8"), METHODS["gptq"], windows[:4]
    )
    with safe_open(checkpoints["mixtral"] / "model.safetensors", framework="pt") as stream:
        disk = set(stream.keys())
    assert {f"{m}.weight" for m in found.modules()} <= disk
    assert len(found.modules()) == 3 * (4 + 4 * 3)


@pytest.mark.parametrize("kind", ["fp8", "int8-head"])
def test_kv_scales(checkpoints, windows, tmp_path, kind):
    cache = KVCache.parse(kind)
    found = calibrate(
        checkpoints["qwen3"], tmp_path / "c", get_scheme("int8"), METHODS["absmax"], windows, kv_cache=cache
    )
    tensors = tensors_of(found)
    for i in range(3):
        for leaf in ("k_scale", "v_scale"):
            scale = tensors[f"model.layers.{i}.self_attn.{leaf}"]
            assert scale.shape == ((2,) if cache.each == "head" else (1,)) and (scale > 0).all()
    # Qwen3 normalizes its keys: after the rotary embedding no key is longer than √d·max|gain|.
    gain = safe_open(checkpoints["qwen3"] / "model.safetensors", framework="pt").get_tensor(
        "model.layers.0.self_attn.k_norm.weight"
    )
    top = cache.spec.dtype.max * float(tensors["model.layers.0.self_attn.k_scale"].max())
    assert 0.5 < top < 4.0 * float(gain.abs().max()) * 1.5
    without = calibrate(checkpoints["qwen3"], tmp_path / "w", get_scheme("int8"), METHODS["absmax"], [])
    a, b = kl(checkpoints["qwen3"], found, windows[:4]), kl(checkpoints["qwen3"], without, windows[:4])
    assert b < a < b + 0.05  # the cache's rounding is simulated, and costs little


def test_mixed_schemes_and_exceptions(checkpoints, windows, tmp_path):
    selection = Selection(ignore=("*.o_proj",), overrides={"re:.*layers\\.1\\..*": "fp8"})
    found = calibrate(
        checkpoints["llama"],
        tmp_path / "c",
        get_scheme("int8"),
        METHODS["gptq"],
        windows,
        selection=selection,
    )
    assert "model.layers.0.mlp.down_proj" not in found.module_schemes
    assert found.module_schemes["model.layers.1.mlp.down_proj"] == "fp8"
    assert found.module_schemes["model.layers.0.self_attn.o_proj"] is None
    assert found.codes("model.layers.1.mlp.down_proj").dtype == "F8_E4M3"
    assert not found.has("model.layers.0.self_attn.o_proj.weight")
    assert kl(checkpoints["llama"], found, windows[:4]) < 0.05


@pytest.mark.parametrize("smooth", [0.5, "none"])
def test_bias_correction_moves_existing_biases(checkpoints, windows, tmp_path, smooth):
    method = replace(METHODS["absmax"], name="b", bias_correction=True, smooth=smooth)
    found = calibrate(checkpoints["qwen2"], tmp_path / "c", get_scheme("int8"), method, windows)
    biases = {n for n in found.tensors if n.endswith(".bias")}
    assert biases == {f"model.layers.{i}.self_attn.{p}_proj.bias" for i in range(3) for p in "qkv"}


@pytest.mark.parametrize("keep", ["*.input_layernorm", "*.mlp.gate", "lm_head", "model.layers.0.mlp"])
def test_what_is_kept_in_float_stays_byte_for_byte(checkpoints, windows, tmp_path, keep):
    """Norms gave their gain away, and routers got it."""
    source = checkpoints["qwen3_moe"]
    for method in ("smoothquant", "best"):
        found = lowbit.calibrate(
            source, tmp_path / "c", "int8", method=method, data=windows, keep=[keep], overwrite=True
        )
        assert found.method["rotate"] == "none"
        lowbit.convert(source, tmp_path / "out", "int8", calibration=found, overwrite=True)
        before, after = (load_file(d / "model.safetensors") for d in (source, tmp_path / "out"))
        kept = [n for n in before if Patterns([keep]).matching(n.removesuffix(".weight"))]
        assert kept and all(torch.equal(before[n], after[n]) for n in kept), method


def test_biases_alone_of_a_model_without_any_are_refused(checkpoints, windows, tmp_path):
    """0 modules were written, after all the data had passed."""
    method = Method.from_dict({"bias_correction": True})
    with pytest.raises(InputError, match="and corrects biases, of which there are none"):
        calibrate(checkpoints["llama"], tmp_path / "c", get_scheme("int8"), method, windows)
    assert not (tmp_path / "c").exists()


@pytest.fixture(scope="module")
def half_quantized(checkpoints, tmp_path_factory):
    """Scheme → a checkpoint whose first two layers, and down_proj of the last, have codes; the rest is in float."""
    root = tmp_path_factory.mktemp("half")

    @cache
    def made(scheme: str) -> Path:
        overrides = {"re:.*layers.2.(self_attn|mlp.(gate|up)_proj).*": "float"}
        lowbit.convert(checkpoints["llama"], root / scheme, scheme, overrides=overrides)
        return root / scheme

    return made


KEPT = Selection(
    keep=("model.layers.0", "model.layers.1", "*.down_proj"), overrides={"model.layers.2": "int8"}
)


@pytest.mark.parametrize("scheme", ["fp8", "int8"])
@pytest.mark.parametrize("method", ["gptq", "smoothquant-gptq", "mse"])
def test_what_is_kept_rounds_its_input_before_the_next_layer_sees_it(
    half_quantized, windows, tmp_path, monkeypatch, method, scheme
):
    """As engines and `eval` do. The last layer was calibrated on states that no engine will give it."""
    source, seen = half_quantized(scheme), []
    by_itself = module.calibrate_layer

    def look(run, index, **more):
        if index == 2:
            seen.append([h.clone() for h in run.cache])
        return by_itself(run, index, **more)

    def states(side):
        stream = _Stream.start(side, module.make_batches(windows, len(windows)), 1 << 30)
        for index in (0, 1):
            stream.advance(index)
        return list(stream.cache)

    monkeypatch.setattr(module, "calibrate_layer", look)
    options = RunOptions(batch_size=len(windows))
    arguments = (get_scheme("int8"), METHODS[method], windows)
    for name, write in (("whole", None), ("resumed", store.Writer.write)):
        if write is not None:  # layers 0 and 1 are done; 2 is not
            lines = json.loads((tmp_path / "whole" / "calibration.json").read_text())
            del lines["layers"]["model.layers.2"]
            shutil.copytree(tmp_path / "whole", tmp_path / name)
            (tmp_path / name / "calibration.json").write_text(json.dumps(lines | {"complete": False}))
        calibrate(source, tmp_path / name, *arguments, selection=KEPT, options=options)
    want = states(plain(source))
    for found in seen:
        assert len(seen) == 2
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    unrounded = LayerwiseModel(Source(source))
    far = states(Candidate(model=unrounded, load=lambda i: (unrounded.load(i), {})))
    assert all((a - b).norm() > 1e-3 * b.norm() for a, b in zip(far, want, strict=True))


@pytest.mark.parametrize("keep", ["*.o_proj", "*.v_proj", "*.down_proj", "*.up_proj"])
def test_what_is_kept_stays_byte_for_byte(checkpoints, windows, tmp_path, keep):
    """Scales that moved through it, and rotations, were rounded into codes of its scheme again."""
    lowbit.convert(checkpoints["llama"], tmp_path / "src", "fp8")
    common = {"keep": [keep]}
    calibration = tmp_path / "c"
    for method in ("smoothquant", "best"):
        found = lowbit.calibrate(
            tmp_path / "src", calibration, "int8", method=method, data=windows, overwrite=True, **common
        )
        assert found.method["rotate"] == "none"
        lowbit.convert(tmp_path / "src", tmp_path / "out", "int8", calibration=calibration, overwrite=True)
        before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("src", "out"))
        kept = [n for n in before if keep[1:] in n]
        assert len(kept) == 6
        for name in kept:
            assert before[name].dtype == after[name].dtype, (method, name)
            assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)), (method, name)
    with pytest.raises(InputError, match=r"found model\.layers\.0\.\S+ and \d more to be kept"):
        lowbit.calibrate(tmp_path / "src", tmp_path / "d", "int8", method="rotate", **common)


def test_what_cannot_be_done_is_said(checkpoints, windows, tmp_path):
    with pytest.raises(InputError, match="--data"):
        calibrate(checkpoints["llama"], tmp_path / "c", get_scheme("int8"), METHODS["gptq"], [])
    with pytest.raises(InputError, match="bf16"):
        calibrate(checkpoints["llama"], tmp_path / "c", get_scheme("bf16"), METHODS["gptq"], windows)
    with pytest.raises(InputError, match="rotate-gptq"):
        Method.from_dict("rotate-gptk")
    with pytest.raises(InputError, match="unknown keys"):
        Method.from_dict({"name": "gptq", "alpha": 0.5})
    with pytest.raises(InputError, match="α"):
        Method.from_dict({"name": "smoothquant", "smooth": 1.5})


def test_the_method_that_a_mapping_starts_from_is_one_that_there_is(checkpoints, windows, tmp_path):
    """A misspelt one was a method of its own, without all that the preset does; so was best."""
    with pytest.raises(InputError, match="did you mean 'gptq'"):
        Method.from_dict({"name": "gtpq", "rounding": {"act_order": False}})
    common = {"data": windows, "options": RunOptions(min_tokens=8)}
    for scheme, name in (("int8", "rotate-gptq"), ("fp8", "gptq")):
        method = {"name": "best", "rounding": {"act_order": False}}
        found = lowbit.calibrate(checkpoints["llama"], tmp_path / scheme, scheme, method=method, **common)
        assert found.method["name"] == name and found.method["rounding"]["rounding"] == "gptq"
        assert not found.method["rounding"]["act_order"]
        again = Method.from_dict({**found.method, "name": "as-it-was"})
        assert replace(again, name=name).to_dict() == found.method


def test_methods_survive_json():
    for method in METHODS.values():
        again = Method.from_dict(json.loads(json.dumps(method.to_dict())))
        assert replace(again, summary="") == replace(method, summary="")
    custom = Method.from_dict({"name": "gptq", "rounding": {"act_order": False}, "smooth": 0.3})
    assert custom.rounding == RoundingOptions(rounding="gptq", act_order=False) and custom.smooth == 0.3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", 3), ("smooth", True), ("smooth", 1.5), ("smooth", [0.5]), ("smooth_joints", "norm"),
        ("smooth_joints", ["norms"]), ("percentile", 3), ("percentile", "most"), ("dynamic_below", "30 dB"),
        ("propagate", "no"), ("rounding", None), ("rounding", {"damping": -1}), ("rounding", {"damping": "some"}),
        ("rounding", {"block_size": 0}), ("rounding", {"sweeps": 1.5}), ("rounding", {"act_order": "yes"}),
        ("rounding", {"scale": "max"}), ("activation_range", "mean"),
    ],
)  # fmt: skip
def test_settings_of_a_method_that_make_no_sense_are_named(key, value):
    of = next(iter(value)) if isinstance(value, dict) else key
    with pytest.raises(InputError, match=rf"expected .*\b{of}\b|{of}: expected|expected a name, found 3"):
        Method.from_dict({"name": "gptq", key: value})


def test_modules_that_no_static_scale_fits_are_left_dynamic(checkpoints, windows, tmp_path, monkeypatch):
    method = replace(METHODS["rotate-gptq-static"], dynamic_below=36.0)
    source, scheme = checkpoints["qwen3"], get_scheme("int8-static")
    found = calibrate(source, tmp_path / "c", scheme, method, windows)
    left = {m: n for layer in found.layers.values() for m, n in layer.get("left_dynamic", {}).items()}
    assert 0 < len(left) < 21 and set(left.values()) == {"int8"}
    assert left.items() <= found.module_schemes.items()
    for name in found.modules():
        assert found.has(f"{name}.input_scale") == (name not in left)
    fixed = calibrate(source, tmp_path / "s", scheme, replace(method, dynamic_below=None), windows)
    assert kl(source, found, windows[:4]) < kl(source, fixed, windows[:4])
    original = module.calibrate_layer

    def dies(run, index, *, need_output):
        if index == 2:
            raise KeyboardInterrupt
        return original(run, index, need_output=need_output)

    monkeypatch.setattr(module, "calibrate_layer", dies)
    with pytest.raises(KeyboardInterrupt):
        calibrate(source, tmp_path / "k", scheme, method, windows)
    monkeypatch.setattr(module, "calibrate_layer", original)
    resumed = calibrate(source, tmp_path / "k", scheme, method, windows)
    assert resumed.module_schemes == found.module_schemes


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize(
    "method", ["gptq", "rotate-gptq", "rotate-gptq-online", "descent", "smoothquant", "smoothquant-gptq"]
)
def test_rounding_in_passing_is_as_good_as_in_two_runs(
    checkpoints, windows, tmp_path, monkeypatch, name, method
):
    """All tokens in one batch: rounded while they pass. Little memory: batches, and two runs per layer."""
    passes = []
    original = step.round_in_passing
    monkeypatch.setattr(step, "round_in_passing", lambda *a, **k: passes.append(1) or original(*a, **k))
    source, scheme = checkpoints[name], get_scheme("int8")
    once = calibrate(source, tmp_path / "a", scheme, METHODS[method], windows)
    assert len(passes) == 3
    little = RunOptions(memory_limit=1 << 16, spill_directory=str(tmp_path))
    twice = calibrate(source, tmp_path / "b", scheme, METHODS[method], windows, options=little)
    assert len(passes) == 3
    a, b = tensors_of(once), tensors_of(twice)
    assert a.keys() == b.keys()
    if method in ("gptq", "descent"):
        # The first layer's queries see the same inputs: all but a few codes are the same.
        first = "model.layers.0.self_attn.q_proj.weight"
        assert (a[first] == b[first]).double().mean() > 0.995
    x, y = kl(source, once, windows[:4]), kl(source, twice, windows[:4])
    assert x < 1.25 * y and y < 1.25 * x


def test_scales_of_least_error_are_written_with_their_codes(checkpoints, tmp_path):
    """Plain rounding is what a conversion does by itself, but between other scales."""
    source, fp8 = checkpoints["qwen3"], get_scheme("fp8")
    found = tensors_of(calibrate(source, tmp_path / "c", fp8, METHODS["mse"], []))
    for name, weight in load_file(source / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            wanted = quantize(weight, fp8.weights, "mse")
            assert torch.equal(found[f"{name}_scale"], wanted.scale)
            assert torch.equal(found[name].float(), wanted.codes.float())
    assert not calibrate(source, tmp_path / "plain", fp8, METHODS["absmax"], []).tensors


def test_a_killed_run_whose_layers_see_floats_goes_on_with_floats(
    checkpoints, windows, tmp_path, monkeypatch
):
    method = replace(METHODS["gptq"], propagate=False)
    source, scheme, original = checkpoints["llama"], get_scheme("int8"), module.calibrate_layer
    whole = tensors_of(calibrate(source, tmp_path / "whole", scheme, method, windows))

    def dies(run, index, *, need_output):
        if index == 2:
            raise KeyboardInterrupt
        return original(run, index, need_output=need_output)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module, "calibrate_layer", dies)
        calibrate(source, tmp_path / "killed", scheme, method, windows)
    found = tensors_of(calibrate(source, tmp_path / "killed", scheme, method, windows))
    assert found.keys() == whole.keys() and all(torch.equal(found[n], whole[n]) for n in whole)


def test_a_transform_that_changes_what_a_layer_puts_out_is_refused(
    checkpoints, windows, tmp_path, monkeypatch
):
    """Whatever the graph says of it."""
    scale = fold.scale_norm

    def forgets(layer, norm, *more):
        return scale(layer, replace(norm, readers=norm.readers[:1]), *more)

    monkeypatch.setattr(fold, "scale_norm", forgets)
    for options in (RunOptions(), RunOptions(memory_limit=1 << 16)):  # in passing, and in two runs
        with pytest.raises(
            InputError, match=r"smoothing of model.layers.0 to leave the layer's output as it was"
        ):
            calibrate(
                checkpoints["llama"], tmp_path / str(options.memory_limit), get_scheme("int8"),
                METHODS["smoothquant"], windows, options=options,
            )  # fmt: skip
    unchecked = RunOptions(verify=False)
    assert calibrate(
        checkpoints["llama"],
        tmp_path / "u",
        get_scheme("int8"),
        METHODS["smoothquant"],
        windows,
        options=unchecked,
    ).complete


def test_a_prompt_shorter_than_the_check(checkpoints, tmp_path):
    """The shortest is shorter than the tokens that layers are checked on; it need not come first."""
    windows = [torch.arange(n) % 128 for n in (40, 9, 40, 25)]
    done = calibrate(
        checkpoints["llama"], tmp_path / "c", get_scheme("int8"), METHODS["smoothquant-gptq"], windows
    )
    assert done.complete and done.data["tokens"] == 114


@pytest.mark.parametrize(
    ("joints", "ignore"),
    [
        (("v-o",), ["*.o_proj"]),
        (("up-down",), ["*.down_proj"]),
        (("norm",), ["*.q_proj", "*.k_proj", "*.v_proj", "*.gate_proj", "*.up_proj"]),
        ((), []),
        (("norm", "v-o"), ["re:.*(q|k|v|o|gate|up)_proj"]),
    ],
)
@pytest.mark.parametrize("smooth", [0.5, "search"])
def test_smoothing_that_finds_no_joint_is_refused_before_the_run(
    checkpoints, windows, tmp_path, monkeypatch, joints, ignore, smooth
):
    """0 modules were written without a word, after all the data had passed."""
    method = Method(name="smoothquant", smooth=smooth, smooth_joints=joints)
    monkeypatch.setattr(module, "calibrate_layer", lambda *a, **k: pytest.fail("a layer was calibrated"))
    given = (checkpoints["llama"], tmp_path / "c", get_scheme("int8"))
    with pytest.raises(InputError, match="a place where smoothquant can move scales"):
        calibrate(*given, method, windows, selection=Selection(ignore=tuple(ignore)))
    assert not (tmp_path / "c").exists()
    for other in (replace(method, rounding=RoundingOptions(rounding="gptq")), METHODS["smoothquant"]):
        with pytest.raises(pytest.fail.Exception):
            calibrate(*given, other, windows)


def test_smoothing_that_finds_a_joint_in_a_later_layer_runs(checkpoints, windows, tmp_path):
    method = Method(name="smoothquant", smooth=0.5, smooth_joints=("v-o",))
    selection = Selection(ignore=("model.layers.0", "model.layers.1"))
    found = calibrate(
        checkpoints["llama"], tmp_path / "c", get_scheme("int8"), method, windows, selection=selection
    )
    assert set(found.modules()) == {f"model.layers.2.self_attn.{n}_proj" for n in ("v", "o")}


def test_smoothing_that_lowers_no_error_says_so(checkpoints, windows, tmp_path, monkeypatch):
    from lowbit.calibration import joints, sequential
    from lowbit.calibration.smoothquant import Smoothing

    nothing = Smoothing(scale=torch.ones(1), alpha=None, error=0.1, plain_error=0.1)
    for where in (joints, sequential):
        monkeypatch.setattr(where, "choose_smoothing", lambda *a, **k: nothing)
    given = (checkpoints["llama"], tmp_path / "c", get_scheme("int8"), METHODS["smoothquant-search"], windows)
    with pytest.warns(UserWarning, match="smoothquant-search found nothing that lowers the error"):
        assert not calibrate(*given).tensors
