"""Calibration of mixtures whose experts lie in 3-D tensors: what it writes has the names of a conversion."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.calibration import store
from lowbit.calibration.calibrate import calibrate
from lowbit.calibration.layerwise import LayerwiseModel
from lowbit.calibration.methods import get_method
from lowbit.calibration.run import RunOptions
from lowbit.calibration.source import Source
from lowbit.checkpoint.rules import Selection
from lowbit.errors import InputError
from lowbit.evaluate.layerwise import calibrated, evaluate, plain
from lowbit.scheme import get_scheme

TEXT = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32,
}  # fmt: skip
QWEN35 = TEXT | {
    "shared_expert_intermediate_size": 32, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64,
    "deepstack_visual_indexes": [0],
}  # fmt: skip


def model_of(kind: str) -> torch.nn.Module:
    match kind:
        case "text":
            return t.Qwen3_5MoeForCausalLM(t.Qwen3_5MoeTextConfig(**QWEN35))
        case "seeing":
            return t.Qwen3_5MoeForConditionalGeneration(
                t.Qwen3_5MoeConfig(text_config=QWEN35, vision_config=VISION)
            )
        case "qwen3-vl":
            return t.Qwen3VLMoeForConditionalGeneration(
                t.Qwen3VLMoeConfig(text_config=TEXT, vision_config=VISION)
            )
        case "llama4":
            config = t.Llama4TextConfig(**TEXT, num_local_experts=4, interleave_moe_layer_step=1)
            return t.Llama4ForCausalLM(config)
        case "gemma4":
            config = t.Gemma4TextConfig(
                **TEXT, global_head_dim=16, top_k_experts=2, enable_moe_block=True, hidden_size_per_layer_input=0,
                layer_types=["sliding_attention", "full_attention"],
            )  # fmt: skip
            return t.Gemma4ForCausalLM(config)
    raise ValueError(kind)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """Qwen3.5 as it is published; the others as transformers saves them."""
    root, found = tmp_path_factory.mktemp("fused"), {}
    for kind in ("text", "seeing", "qwen3-vl", "llama4", "gemma4"):
        torch.manual_seed(0)
        model = model_of(kind)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(3.0) if p.dim() > 1 else p.add_(0.1 * torch.randn_like(p))
        model.save_pretrained(root / kind)
        if kind in ("text", "seeing"):
            file = root / kind / "model.safetensors"
            save_file(fused(load_file(file)), file, {"format": "pt"})
        found[kind] = root / kind
    return found


def fused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    whole = {n: x for n, x in tensors.items() if ".experts." not in n}
    for parent in {n.partition(".experts.")[0] + ".experts" for n in tensors if ".experts." in n}:
        gate, up, down = (
            torch.stack([tensors[f"{parent}.{e}.{p}_proj.weight"] for e in range(4)]) for p in ("gate", "up", "down")
        )  # fmt: skip
        whole |= {f"{parent}.gate_up_proj": torch.cat([gate, up], dim=1), f"{parent}.down_proj": down}
    return whole


@pytest.fixture(scope="module")
def windows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 120, (32,), generator=generator) for _ in range(8)]


PREFIX = {
    "text": "model.layers", "seeing": "model.language_model.layers", "qwen3-vl": "model.language_model.layers",
    "llama4": "model.layers", "gemma4": "model.layers",
}  # fmt: skip
EXPERTS = {"llama4": "feed_forward.experts", "gemma4": "experts"}


@pytest.mark.parametrize("kind", PREFIX)
def test_layer_by_layer_equals_transformers(sources, windows, kind):
    auto = t.AutoModelForImageTextToText if kind == "qwen3-vl" else t.AutoModelForCausalLM
    want = auto.from_pretrained(sources[kind], experts_implementation="eager").eval()
    model = LayerwiseModel(Source(sources[kind]))
    call = model.embed(windows[0][None])
    hidden = call.hidden
    for index in range(len(model)):
        hidden = model.run(model.load(index), index, hidden, call.kwargs[index])
    with torch.no_grad():
        torch.testing.assert_close(
            model.head(hidden), want(input_ids=windows[0][None]).logits, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("kind", PREFIX)
def test_gptq_writes_each_expert_under_its_name(sources, windows, tmp_path, kind):
    found = calibrate(
        sources[kind], tmp_path / "calib", get_scheme("int8"), get_method("gptq"), windows,
        options=RunOptions(min_tokens=8),
    )  # fmt: skip
    experts = EXPERTS.get(kind, "mlp.experts")
    name = f"{PREFIX[kind]}.1.{experts}.3.up_proj"
    modules = [m.removeprefix(PREFIX[kind]) for m in found.modules() if ".experts." in m]
    parts = [f"{e}.{p}_proj" for e in range(4) for p in ("down", "gate", "up")]
    assert modules == [f".{i}.{experts}.{part}" for i in (0, 1) for part in parts]
    done = lowbit.convert(sources[kind], tmp_path / "out", "int8", calibration=tmp_path / "calib")
    assert not [j for j in done.plan.jobs if j.kind == "quantize"]
    written = load_file(tmp_path / "out" / "model.safetensors")
    codes = load_file(found.tensors[name + ".weight"].file)
    assert torch.equal(written[name + ".weight"], codes[name + ".weight"])
    lowbit.convert(sources[kind], tmp_path / "rounded", "int8")
    assert not torch.equal(
        load_file(tmp_path / "rounded" / "model.safetensors")[name + ".weight"], codes[name + ".weight"]
    )
    verified = lowbit.verify(tmp_path / "out", sources[kind])
    assert verified.ok and all(e.sqnr_db > 30 for e in verified.errors)
    # The checkpoint is what the calibration is, and both are near to the source.
    reference = plain(sources[kind])
    a = evaluate(plain(tmp_path / "out"), windows, reference).agreement.to_dict(compared=True)
    b = evaluate(calibrated(sources[kind], store.read(tmp_path / "calib")), windows, reference)
    assert a == pytest.approx(b.agreement.to_dict(compared=True), rel=1e-3)
    assert 0 < a["kl"] < 0.02


@pytest.mark.parametrize("kind", ["text", "qwen3-vl", "llama4", "gemma4"])
def test_static_scales_for_each_expert(sources, windows, tmp_path, kind):
    calibrate(sources[kind], tmp_path / "calib", get_scheme("fp8-static"), get_method("absmax"), windows)
    lowbit.convert(sources[kind], tmp_path / "out", "fp8-static", calibration=tmp_path / "calib")
    written = load_file(tmp_path / "out" / "model.safetensors")
    scales = [n for n in written if n.endswith(".input_scale") and ".experts." in n]
    assert len(scales) == 2 * 4 * 3 and all(written[n] > 0 for n in scales)
    assert lowbit.verify(tmp_path / "out", sources[kind]).ok


def test_a_gated_model_can_be_rotated(sources, windows, tmp_path):
    """Qwen3.5: a norm with a gate, and attention whose heads pass an output gate."""
    calibrate(
        sources["text"], tmp_path / "calib", get_scheme("int8"), get_method("rotate-gptq"), windows,
        options=RunOptions(min_tokens=8),
    )  # fmt: skip
    lowbit.convert(sources["text"], tmp_path / "out", "int8", calibration=tmp_path / "calib")
    report = evaluate(plain(tmp_path / "out"), windows, plain(sources["text"]))
    assert report.agreement.to_dict(compared=True)["kl"] < 0.02


def test_experts_in_float_cannot_be_changed_within_their_3d_tensor(sources, windows, tmp_path):
    ignore = ("*.layers.1.mlp.experts.gate_up_proj",)
    calibrate(
        sources["text"], tmp_path / "calib", get_scheme("int8"), get_method("rotate"), [],
        selection=Selection(ignore=ignore),
    )  # fmt: skip
    with pytest.raises(
        InputError, match=r"layers\.1\..*the calibration changed it, but it stays in float within"
    ):
        lowbit.convert(
            sources["text"], tmp_path / "out", "int8", calibration=tmp_path / "calib", ignore=ignore
        )
    assert not (tmp_path / "out").exists()
    # A method that leaves them as they are is fine.
    calibrate(
        sources["text"], tmp_path / "gptq", get_scheme("int8"), get_method("gptq"), windows,
        selection=Selection(ignore=ignore), options=RunOptions(min_tokens=8),
    )  # fmt: skip
    lowbit.convert(sources["text"], tmp_path / "out", "int8", calibration=tmp_path / "gptq", ignore=ignore)
    name = "model.layers.1.mlp.experts.down_proj"
    written, before = (load_file(d / "model.safetensors") for d in (tmp_path / "out", sources["text"]))
    assert torch.equal(written[name], before[name])


def test_static_int8_leaves_experts_dynamic(tmp_path):
    """Engines run INT8 experts with dynamic activations only; they refuse a checkpoint whose experts are static."""
    torch.manual_seed(0)
    model_of("text").save_pretrained(tmp_path / "src")
    windows = [torch.randint(3, 120, (24,), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    lowbit.calibrate(
        tmp_path / "src", tmp_path / "calib", "int8-static", method="absmax", data=windows, device="cpu"
    )
    plan = lowbit.plan(tmp_path / "src", "int8-static", calibration=tmp_path / "calib")
    expert = plan.decisions["model.layers.1.mlp.experts.0.gate_proj"]
    assert expert.scheme == get_scheme("int8") and "dynamic activations instead" in expert.reason
    assert plan.decisions["model.layers.1.self_attn.q_proj"].scheme == get_scheme("int8-static")
    lowbit.convert(tmp_path / "src", tmp_path / "out", "int8-static", calibration=tmp_path / "calib")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.layers.1.self_attn.q_proj.input_scale" in written
    assert not any(".experts." in n and n.endswith("input_scale") for n in written)
    lowbit.load(tmp_path / "out")
    laid_over = lowbit.measure(tmp_path / "src", windows, calibration=tmp_path / "calib", device="cpu")
    assert laid_over.agreement.perplexity == pytest.approx(
        lowbit.measure(tmp_path / "out", windows, device="cpu").agreement.perplexity, rel=1e-6
    )


def test_a_model_that_sees_is_not_rotated(sources, windows, tmp_path):
    with pytest.raises(InputError, match="a model of text alone to rotate"):
        calibrate(sources["seeing"], tmp_path / "calib", get_scheme("int8"), get_method("rotate"), windows)
