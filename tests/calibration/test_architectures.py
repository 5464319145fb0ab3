"""Every architecture: layer by layer equal to the whole model, transforms exact, calibrated better than rounded."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, TEXT, build
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from transformers import Gemma3nConfig, HrmTextConfig, HrmTextForCausalLM, ZayaConfig, ZayaForCausalLM

import lowbit
from lowbit.calibration import fold, layer, store
from lowbit.calibration.calibrate import calibrate
from lowbit.calibration.calls import shared_states
from lowbit.calibration.graph import LayerGraph, trace
from lowbit.calibration.layerwise import LayerwiseModel
from lowbit.calibration.methods import METHODS, Method, best_method, get_method
from lowbit.calibration.proof import proven
from lowbit.calibration.rotate_model import rotate_outside, settled
from lowbit.calibration.rotation import make_rotation
from lowbit.calibration.run import RunOptions
from lowbit.calibration.search import sensitivities
from lowbit.calibration.source import Source
from lowbit.checkpoint.rules import Selection
from lowbit.errors import InputError
from lowbit.evaluate.layerwise import calibrated, evaluate, plain
from lowbit.scheme import get_scheme

# One of each way of calling layers, naming tensors and holding experts.
CHOSEN = [
    "llama4", "llama4-sees", "gemma3-sees", "gemma4", "gemma4-moe", "gemma4-sees", "qwen2_5_vl", "qwen3_vl",
    "qwen3_vl_moe", "qwen3_5_moe-sees", "qwen3_next", "gpt_oss", "glm4_moe", "minimax_m2", "nemotron_h", "jamba",
    "bamba", "falcon_h1", "deepseek_v4", "gemma3n", "nanochat",
    "idefics3", "kimi_linear", "minimax_m3_vl",
]  # fmt: skip
EACH = pytest.mark.parametrize(
    "name", [n if n in CHOSEN else pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES]
)
ROTATED = {
    "llama4",
    "qwen3_next",
    "glm4_moe",
    "minimax_m2",
    "nemotron_h",
    "jamba",
    "bamba",
    "kimi_linear",
}
"""Of those chosen. The others see, normalize what is added to the residual stream, or have experts in 3-D tensors."""


class Double(TorchFunctionMode):
    """Casts to float32 go to float64: transformers' norms and routers would hide what is to be exact to 1e-9."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        def wide(x: Any) -> Any:
            return torch.float64 if x is torch.float32 else x

        if func is torch.Tensor.float:
            return args[0].double()
        if func is torch.Tensor.view:  # of bytes that were read
            return func(*args, **(kwargs or {}))
        return func(*(wide(a) for a in args), **{k: wide(v) for k, v in (kwargs or {}).items()})


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Name → checkpoint, written when first asked for."""
    root = tmp_path_factory.mktemp("architectures")

    def get(name: str) -> Path:
        if not (root / name).exists():
            build(name).save_pretrained(root / name)
        return root / name

    return get


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 120, (4, 48), generator=torch.Generator().manual_seed(1))


def run_through(model: LayerwiseModel, ids: torch.Tensor) -> torch.Tensor:
    call = model.embed(ids)
    hidden = call.hidden
    for index in range(len(model)):
        hidden = model.run(model.load(index), index, hidden, call.kwargs[index])
    return model.head(hidden)


@EACH
def test_layer_by_layer_equals_the_whole_model(sources, ids, name):
    with torch.no_grad():
        want = build(name)(input_ids=ids).logits
    model = LayerwiseModel(Source(sources(name)))
    torch.testing.assert_close(run_through(model, ids), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    # A second batch of that shape gets its own inputs.
    other = ids.flip(0)
    torch.testing.assert_close(
        run_through(model, other), want.flip(0), rtol=1e-5, atol=1e-5 * float(want.abs().max())
    )


@pytest.mark.skipif(find_spec("timm") is not None, reason="timm is installed")
def test_what_transformers_needs_for_a_tower_is_asked_for(tmp_path):
    """Gemma 3n as published: its vision tower is timm's, even where only the text is read."""
    text = build("gemma3n").config
    Gemma3nConfig(
        text_config=text.to_dict(), architectures=["Gemma3nForConditionalGeneration"]
    ).save_pretrained(tmp_path)
    save_file({"lm_head.weight": torch.zeros(8, 8)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="timm"):
        LayerwiseModel(Source(tmp_path))


def traced(model: LayerwiseModel, index: int, module, hidden, kwargs) -> LayerGraph:
    def run() -> list[torch.Tensor]:
        return [model.run(module, index, hidden, kwargs), *shared_states(kwargs)]

    return proven(module, trace(module, lambda _: run()[0], hidden.shape[-1], model.text_config), run)


@EACH
def test_transforms_are_exact_in_float64(sources, ids, name):
    """Rotation where it is allowed, and a scale through every joint: logits to 1e-9."""
    ids, source = ids[:2, :24], sources(name)
    with Double():
        model = LayerwiseModel(Source(source), dtype=torch.float64)
        want = run_through(model, ids)
        method = settled(Method(name="rotate", rotate="hadamard", rotate_heads=True, else_smooth=True), model)
        if name in CHOSEN:
            assert (method.rotate == "hadamard") == (name in ROTATED), method.not_rotated
        rotation = None
        if method.rotate != "none":
            rotation = make_rotation(64, "hadamard", seed=3)
        plain_call = model.embed(ids)
        states = plain_call.hidden
        graphs = []
        for index in range(len(model)):
            module = model.load(index)
            graphs.append(traced(model, index, module, states, plain_call.kwargs[index]))
            states = model.run(module, index, states, plain_call.kwargs[index])
        if rotation is not None:
            rotate_outside(model, rotation, torch.float32)
        call = model.embed(ids)
        hidden, moved = call.hidden, 0
        generator = torch.Generator().manual_seed(1)
        for index, graph in enumerate(graphs):
            module = model.load(index)
            layer.transform(module, graph, method, rotation)
            for norm in graph.norms:
                if norm.movable:
                    width = module.get_submodule(norm.name).weight.shape[0]
                    fold.scale_norm(module, norm, torch.rand(width, generator=generator).double() + 0.5)
                    moved += 1
            for pair in graph.pairs:
                width = module.get_submodule(pair.first).weight.shape[0]
                fold.scale_pair(module, pair, torch.rand(width, generator=generator).double() + 0.5)
                moved += 1
            hidden = model.run(module, index, hidden, call.kwargs[index])
        got = model.head(hidden)
    assert moved > 0
    assert float((got - want).abs().max()) < 1e-9 * float(want.abs().max())


def kl(a: torch.Tensor, b: torch.Tensor) -> float:
    """Median over tokens: one that is routed otherwise would decide a mean."""
    p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).median())


def calibrated_kl(source: Path, at: Path, ids: torch.Tensor, want: torch.Tensor, method: Method) -> float:
    generator = torch.Generator().manual_seed(0)
    windows = list(torch.randint(3, 120, (12, 48), generator=generator))
    calibrate(source, at / "calib", get_scheme("int8"), method, windows, options=RunOptions(min_tokens=8))
    lowbit.convert(source, at / "out", "int8", calibration=at / "calib")
    with torch.no_grad():
        return kl(want, lowbit.load(at / "out")(input_ids=ids).logits)


@EACH
def test_best_runs_and_is_better_than_rounding(sources, ids, tmp_path, name):
    with torch.no_grad():
        want = build(name)(input_ids=ids).logits
    lowbit.convert(sources(name), tmp_path / "rounded", "int8")
    with torch.no_grad():
        rounded = kl(want, lowbit.load(tmp_path / "rounded")(input_ids=ids).logits)
    found = calibrated_kl(sources(name), tmp_path, ids, want, best_method(get_scheme("int8")))
    assert 0 < found < rounded
    chosen = store.read(tmp_path / "calib").method
    assert chosen["not_rotated"] or chosen["rotate"] == "hadamard"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["absmax", "smoothquant", "gptq"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_method_runs_and_is_not_worse_than_rounding(sources, ids, tmp_path, name, method):
    with torch.no_grad():
        want = build(name)(input_ids=ids).logits
    lowbit.convert(sources(name), tmp_path / "rounded", "int8")
    with torch.no_grad():
        rounded = kl(want, lowbit.load(tmp_path / "rounded")(input_ids=ids).logits)
    found = calibrated_kl(sources(name), tmp_path, ids, want, get_method(method))
    if method == "absmax":
        assert found == pytest.approx(rounded)
    elif method == "smoothquant":
        assert found < 1.1 * rounded
    else:
        # What GPTQ promises is the layer's own error; the KL of random weights follows it within luck.
        reports = store.read(tmp_path / "calib").layers.values()
        errors = [m for r in reports for m in r["modules"].values() if "nearest_error" in m]
        assert errors and all(m["error"] <= m["nearest_error"] for m in errors)


def test_values_that_are_normalized_or_shared_are_not_scaled(sources, ids):
    """Gemma 4 normalizes its values, and lets later layers use them."""
    model = LayerwiseModel(Source(sources("gemma4")))
    call = model.embed(ids)
    module = model.load(0)
    graph = trace(
        module, lambda m: model.run(m, 0, call.hidden, call.kwargs[0]), call.hidden.shape[-1], model.text_config
    )  # fmt: skip
    assert "self_attn.v_proj" in {p.first for p in graph.pairs}
    found = traced(model, 0, module, call.hidden, call.kwargs[0])
    assert {p.first for p in found.pairs} == {"mlp.up_proj"}
    assert all(n.movable for n in found.norms)


def test_what_reads_a_norm_unseen_keeps_it_in_place(sources, ids):
    """gpt-oss's experts stay in a 3-D tensor, which no scale could move into."""
    model = LayerwiseModel(Source(sources("gpt_oss")))
    call = model.embed(ids)
    graph = traced(model, 0, model.load(0), call.hidden, call.kwargs[0])
    assert {n.name: n.movable for n in graph.norms} == {
        "input_layernorm": True, "post_attention_layernorm": False
    }  # fmt: skip


def test_what_layers_share_survives_an_interruption_and_the_disk(sources, tmp_path, ids):
    """Gemma 4's last layers use the keys and values of earlier ones; per-layer inputs are spilled."""
    windows, scheme = [*ids[:3], ids[3, :32]], get_scheme("int8")
    options = RunOptions(min_tokens=8, batch_size=2)
    method = METHODS["gptq"]
    calibrate(sources("gemma4"), tmp_path / "whole", scheme, method, windows, options=options)

    def stop(what: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    small = RunOptions(min_tokens=8, batch_size=2, memory_limit=0)
    with pytest.raises(KeyboardInterrupt):
        calibrate(
            sources("gemma4"), tmp_path / "again", scheme, method, windows, options=small, progress=stop
        )
    calibrate(sources("gemma4"), tmp_path / "again", scheme, method, windows, options=small)
    for name, tensor in store.read(tmp_path / "whole").tensors.items():
        other = store.read(tmp_path / "again").tensors[name]
        assert tensor.file.read_bytes() == other.file.read_bytes(), name


def test_layers_that_hand_on_more_than_hidden_states_are_refused(tmp_path):
    """ZAYA's routers see those of the layer before; what is lost between layers would be lost in silence."""
    config = ZayaConfig(**TEXT, num_experts=4, num_experts_per_tok=1, moe_intermediate_size=32)
    ZayaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="found prev_router_hidden_states handed on beside them"):
        LayerwiseModel(Source(tmp_path)).embed(torch.arange(16)[None])


def test_windows_longer_than_learned_positions_are_refused(sources, tmp_path):
    with pytest.raises(InputError, match="one of 200 tokens; give a smaller length"):
        windows = list(torch.ones(2, 200, dtype=torch.long))
        calibrate(sources("opt"), tmp_path / "c", get_scheme("int8"), METHODS["gptq"], windows)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("name", "rope", "longest"),
    [
        ("llama", {}, 128),
        ("mistral", {}, 128),  # its window of 8 is not its end
        ("gemma3", {}, 128),
        ("llama", {"rope_type": "linear", "factor": 2.0}, 256),
        ("llama", {"rope_type": "dynamic", "factor": 2.0}, 256),
        ("llama", {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}, 128),
        ("llama", {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}, 256),
        ("gemma3", {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, 256),
        ("mamba2", {}, None),
        ("jamba", {}, None),
        ("granitemoehybrid", {}, None),
    ],
)
def test_windows_longer_than_a_model_was_made_for_are_refused(sources, tmp_path, name, rope, longest):
    """Rotary positions go on in silence, and what comes out is nonsense."""
    shutil.copytree(sources(name), tmp_path / "src")
    config = json.loads((tmp_path / "src" / "config.json").read_text())
    (config.get("rope_parameters") or {}).update(rope)
    (tmp_path / "src" / "config.json").write_text(json.dumps(config))
    model = LayerwiseModel(Source(tmp_path / "src"))
    model.embed(torch.ones(1, longest or 300, dtype=torch.long))
    if longest is not None:
        with pytest.raises(
            InputError, match=f"at most {longest} tokens, .* found one of {longest + 1}; give"
        ):
            model.embed(torch.ones(1, longest + 1, dtype=torch.long))


def test_search_refuses_layers_that_share(sources, ids):
    with pytest.raises(InputError, match="keys and values of others"):
        lowbit.search(sources("gemma4"), list(ids), device="cpu")
    assert lowbit.search(sources("gemma4-moe"), list(ids), budget=12.0, device="cpu").overrides


def test_search_counts_what_a_module_itself_puts_out(sources, ids):
    """Llama 4 adds the experts' outputs to its shared expert's in place."""
    units = sensitivities(sources("llama4"), list(ids), ["int8"])
    cost = {u.modules[0].rpartition("layers.1.feed_forward.")[2]: u.cost["int8"] for u in units}
    assert cost["shared_expert.down_proj"] < 3 * cost["shared_expert.gate_proj"]


@pytest.mark.parametrize(("name", "joined"), [("olmo_hybrid", "g_proj"), ("bailing_hybrid", "b_proj")])
def test_what_some_engines_join_to_q_k_and_v_agrees(sources, tmp_path, ids, name, joined):
    """In a search's recipe one scheme, in a calibration one weight scale."""
    source, scheme = sources(name), get_scheme("fp8-static")
    units = sensitivities(source, list(ids), ["int8", "fp8"])
    of = next(u.modules for u in units if any(re.search(r"layers\.0\..*q_proj", m) for m in u.modules))
    members = {"q_proj", "k_proj", "v_proj", joined}
    assert {m.rpartition(".")[2] for m in of} == members
    calibrate(
        source, tmp_path / "calib", scheme, METHODS["gptq"], list(ids), options=RunOptions(min_tokens=8)
    )
    lowbit.convert(source, tmp_path / "out", "fp8-static", calibration=tmp_path / "calib")
    written = load_file(tmp_path / "out/model.safetensors")
    assert len({float(written[f"{m}.weight_scale"]) for m in of}) == 1
    # The evaluation of a calibration that leaves weights as they are rounds them itself.
    calibrate(
        source, tmp_path / "plain", scheme, METHODS["absmax"], list(ids), options=RunOptions(min_tokens=8)
    )
    lowbit.convert(source, tmp_path / "out-2", "fp8-static", calibration=tmp_path / "plain")
    a = evaluate(plain(tmp_path / "out-2"), list(ids), plain(source)).agreement.to_dict(compared=True)
    b = evaluate(calibrated(source, store.read(tmp_path / "plain")), list(ids), plain(source))
    assert a == pytest.approx(b.agreement.to_dict(compared=True), rel=1e-6)


def test_search_runs_where_some_modules_only_select(sources, ids):
    """No gradient passes DeepSeek-V3.2's indexer."""
    units = sensitivities(sources("deepseek_v32"), list(ids), ["int8"])
    assert {u.cost["int8"] > 0 for u in units if "indexer" not in u.modules[0]} == {True}


@pytest.mark.parametrize("static", ["mlp", "self_attn"])
@pytest.mark.parametrize("ranges", ["percentile", "output"])
def test_static_and_dynamic_modules_mix_in_a_layer(sources, tmp_path, ids, ranges, static):
    """Cohere's attention and MLP read the same norm, of which only one is static."""
    source, scheme = sources("cohere"), get_scheme("int8-static")
    dynamic = {"*.self_attn.*": "int8"} if static == "mlp" else {"*.mlp.*": "int8"}
    method = replace(get_method("absmax"), activation_range=ranges)
    selection = Selection(overrides=dynamic)
    found = calibrate(source, tmp_path / "calib", scheme, method, list(ids), selection=selection)
    modules = {n.removesuffix(".input_scale") for n in found.tensors if n.endswith(".input_scale")}
    assert modules and all(static in m for m in modules) and len(modules) == 2 * (3 if static == "mlp" else 4)
    lowbit.convert(source, tmp_path / "out", scheme, overrides=dynamic, calibration=tmp_path / "calib")
    assert lowbit.verify(tmp_path / "out", source=source).ok


def test_what_is_left_dynamic_is_not_wanted_quantized_by_that(sources, tmp_path, ids):
    """vLLM-Ascend reads kv_b_proj in float: a calibration that left it dynamic named it, and it was INT8 there."""
    source, calib = sources("deepseek_v3"), tmp_path / "calib"
    method = {"name": "mine", "activation_range": "output", "dynamic_below": 200.0}
    name = "model.layers.0.self_attn.kv_b_proj"

    def decided(format: str | None) -> str | None:
        scheme = lowbit.plan(source, calibration=calib, format=format).decisions[name].scheme
        return scheme.name if scheme else None

    lowbit.calibrate(source, calib, "int8-static", method=method, data=list(ids))
    assert (decided(None), decided("ascend")) == ("int8", None)
    named = {"overrides": {name: "int8"}, "overwrite": True}
    lowbit.calibrate(source, calib, "int8-static", method=method, data=list(ids), **named)
    assert (decided(None), decided("ascend")) == ("int8", "int8")


@pytest.mark.parametrize(("scheme", "instead"), [("int8-static", "int8"), ("fp8-static", "fp8")])
def test_what_a_calibration_does_not_run_is_dynamic(sources, tmp_path, ids, scheme, instead):
    """Multi-token prediction, behind the last layer: the conversion asked for the calibration that it was given."""
    tensors = load_file(sources("deepseek_v3") / "model.safetensors")
    more = {n.replace("layers.1.", "layers.2."): t.clone() for n, t in tensors.items() if "layers.1." in n}
    (tmp_path / "src").mkdir()
    save_file(tensors | more, tmp_path / "src/model.safetensors", {"format": "pt"})
    shutil.copy(sources("deepseek_v3") / "config.json", tmp_path / "src")
    lowbit.calibrate(tmp_path / "src", tmp_path / "calib", scheme, method="absmax", data=list(ids))
    asked = {"*.layers.2.self_attn.o_proj": scheme, "*.layers.0.mlp.down_proj": "float"}
    done = lowbit.convert(
        tmp_path / "src", tmp_path / "out", scheme, overrides=asked, calibration=tmp_path / "calib"
    )
    assert sum("outside of its layers" in w for w in done.plan.warnings) == 1
    schemes = {m: d.scheme.name if d.scheme else "float" for m, d in done.plan.decisions.items()}
    assert {schemes[m] for m in schemes if ".layers.2." in m} == {instead, "float"}
    assert schemes["model.layers.2.self_attn.o_proj"] == instead
    assert schemes["model.layers.0.self_attn.o_proj"] == scheme
    assert schemes["model.layers.0.mlp.down_proj"] == "float"
    assert lowbit.verify(tmp_path / "out", source=tmp_path / "src").ok
    with pytest.raises(InputError, match="calibrated input scale"):
        lowbit.plan(tmp_path / "src", scheme)


@pytest.mark.parametrize("name", ["llama4-sees", "gemma4", "jamba", "kimi_linear", "minimax_m3_vl"])
def test_an_evaluation_sees_what_was_written(sources, tmp_path, ids, name):
    source = sources(name)
    calibrate(
        source, tmp_path / "calib", get_scheme("int8"), METHODS["gptq"], list(ids), options=RunOptions(min_tokens=8)
    )  # fmt: skip
    lowbit.convert(source, tmp_path / "out", "int8", calibration=tmp_path / "calib")
    a = evaluate(plain(tmp_path / "out"), list(ids), plain(source)).agreement.to_dict(compared=True)
    b = evaluate(calibrated(source, store.read(tmp_path / "calib")), list(ids), plain(source))
    assert a == pytest.approx(b.agreement.to_dict(compared=True), rel=1e-3)
    assert 0 < a["kl"] < 0.02


@pytest.mark.parametrize("scheme", ["fp8-block", "int8-weight-only", "int8"])
def test_linear_layers_that_transformers_joins_are_read_quantized(sources, tmp_path, ids, scheme):
    """MiniMax-M3's gate and up, each with codes of its own, which may be packed."""
    lowbit.convert(sources("minimax_m3_vl"), tmp_path / "out", scheme)
    found = evaluate(plain(tmp_path / "out"), list(ids), plain(sources("minimax_m3_vl")))
    assert 0 < found.agreement.to_dict(compared=True)["kl"] < 0.05


def test_a_part_that_is_missing_of_what_transformers_joins_is_named(sources, tmp_path):
    """It was a RuntimeError of shapes, since the part that is there was all of the layer."""
    shutil.copytree(sources("minimax_m3_vl"), tmp_path / "src")
    tensors = load_file(tmp_path / "src" / "model.safetensors")
    left = {n: t for n, t in tensors.items() if "layers.0.mlp.up_proj." not in n}
    assert len(left) < len(tensors)
    save_file(left, tmp_path / "src" / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        InputError, match=r"gate_proj\.weight: expected \S*mlp\.up_proj\.weight beside .* incomplete"
    ):
        LayerwiseModel(Source(tmp_path / "src"))


def test_what_transformers_splits_while_loading_is_named(tmp_path):
    """HRM's q, k, v and gate are one tensor: they were called missing, and config.json another checkpoint's."""
    config = HrmTextConfig(**{k: v for k, v in TEXT.items() if k != "num_key_value_heads"})
    HrmTextForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=r"found model\.L_module\.layers\.0\.attn\.gqkv_proj\.weight, of which"
    ):
        LayerwiseModel(Source(tmp_path)).load(0)
