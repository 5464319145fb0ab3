"""One scale per tensor for weights that engines join: what an engine makes of them loses nothing more."""

import pytest
import sample_models
import torch
from safetensors.torch import load_file

import lowbit
from lowbit.calibration import store
from lowbit.calibration.calibrate import calibrate
from lowbit.calibration.methods import Method
from lowbit.calibration.run import RunOptions
from lowbit.calibration.shared_scale import share_scales
from lowbit.dtypes import decode
from lowbit.errors import InputError
from lowbit.evaluate.layerwise import calibrated, evaluate, plain
from lowbit.quantize import quantize, quantize_with
from lowbit.scheme import get_scheme

FP8 = get_scheme("fp8-static")
# Of gate and up, the calibration writes one and leaves the other to be rounded from the source.
UP_DOWN = {"name": "smoothquant", "smooth_joints": ["up-down"]}
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def joined_by_engines(kind: str, layer: int) -> list[list[str]]:
    """The members of each matrix that vLLM and SGLang build."""
    at = f"model.layers.{layer}."
    mlp = {
        "llama": ["mlp.{}_proj"],
        "qwen3_moe": [f"mlp.experts.{e}.{{}}_proj" for e in range(4)],
        "mixtral": [f"block_sparse_moe.experts.{e}.{{}}" for e in range(4)],
    }[kind]
    names = ("w1", "w3") if kind == "mixtral" else ("gate", "up")
    return [[at + n for n in ATTENTION], *([at + pattern.format(n) for n in names] for pattern in mlp)]


def as_an_engine_joins(written: dict[str, torch.Tensor], members: list[str]) -> list[torch.Tensor]:
    """The codes after every member was dequantized and rounded again to the largest scale of all."""
    scale = max(written[f"{m}.weight_scale"] for m in members)
    values = (decode(written[f"{m}.weight"]) * written[f"{m}.weight_scale"] for m in members)
    return [quantize_with(v, scale, FP8.weights) for v in values]


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "mixtral"])
@pytest.mark.parametrize("method", ["absmax", "gptq", "smoothquant", "mse", UP_DOWN], ids=str)
def test_what_an_engine_joins_keeps_its_codes(checkpoints, windows, tmp_path, kind, method):
    src = checkpoints[kind]
    calibrate(
        src, tmp_path / "calib", FP8, Method.from_dict(method), windows, options=RunOptions(min_tokens=8)
    )
    done = lowbit.convert(src, tmp_path / "out", "fp8-static", calibration=tmp_path / "calib")
    written, original = load_file(tmp_path / "out/model.safetensors"), load_file(src / "model.safetensors")
    quantized = {name.removesuffix(".weight_scale") for name in written if name.endswith(".weight_scale")}
    for layer in range(3):
        for members in joined_by_engines(kind, layer):
            assert quantized.issuperset(members), done.plan.warnings
            codes = as_an_engine_joins(written, members)
            assert all(torch.equal(written[f"{m}.weight"], c) for m, c in zip(members, codes, strict=True))
            if method == "absmax":
                weights = [original[f"{m}.weight"] for m in members]
                both = quantize(torch.cat(weights), FP8.weights)
                assert torch.equal(both.codes, torch.cat([written[f"{m}.weight"] for m in members]))
                assert all(torch.equal(both.scale, written[f"{m}.weight_scale"]) for m in members)
    alone = {float(written[f"model.layers.{i}.self_attn.o_proj.weight_scale"]) for i in range(3)}
    assert len(alone) == 3
    assert lowbit.verify(tmp_path / "out", src).ok
    # The checkpoint is what the calibration is.
    reference = plain(src)
    a = evaluate(plain(tmp_path / "out"), windows, reference).agreement.to_dict(compared=True)
    b = evaluate(calibrated(src, store.read(tmp_path / "calib")), windows, reference)
    assert a == pytest.approx(b.agreement.to_dict(compared=True), rel=1e-3)


def test_only_scales_per_tensor_are_shared():
    scales = {
        f"layers.0.self_attn.{n}_proj": torch.tensor([s]) for n, s in (("q", 1.0), ("k", 3.0), ("o", 2.0))
    }
    assert {n: float(s) for n, s in share_scales(scales, FP8.weights).items()} == {
        "layers.0.self_attn.q_proj": 3.0, "layers.0.self_attn.k_proj": 3.0, "layers.0.self_attn.o_proj": 2.0,
    }  # fmt: skip
    assert share_scales(scales, get_scheme("fp8").weights) == scales


def test_block_fp8_sources_are_read_for_what_they_share(windows, tmp_path):
    tensors, config = sample_models.llama()
    src = sample_models.write(tmp_path / "src", *sample_models.block_fp8(tensors, config))
    lowbit.calibrate(src, tmp_path / "calib", "fp8-static", data=[w % 64 for w in windows], method="absmax")
    lowbit.convert(src, tmp_path / "out", "fp8-static", calibration=tmp_path / "calib")
    written, stored = load_file(tmp_path / "out/model.safetensors"), load_file(src / "model.safetensors")
    for members in joined_by_engines("llama", 1):
        weights = [
            sample_models.decode_block_fp8(stored[f"{m}.weight"], stored[f"{m}.weight_scale_inv"])
            for m in members
        ]
        both = quantize(torch.cat(weights), FP8.weights)
        assert len({float(w.abs().max()) for w in weights}) > 1
        assert torch.equal(both.codes, torch.cat([written[f"{m}.weight"] for m in members]))
        assert all(torch.equal(both.scale, written[f"{m}.weight_scale"]) for m in members)


def test_nan_in_a_weight_that_shares_the_scale_is_named_by_its_own_name(windows, tmp_path):
    tensors, config = sample_models.llama()
    src = sample_models.write(tmp_path / "src", tensors, config)
    lowbit.calibrate(src, tmp_path / "calib", "fp8-static", data=[w % 64 for w in windows], method="absmax")
    tensors["model.layers.1.self_attn.v_proj.weight"][3, 5] = torch.nan
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.v_proj\.weight.*\[3, 5\]"):
        src = sample_models.write(tmp_path / "src", tensors, config)
        lowbit.convert(src, tmp_path / "out", "fp8-static", calibration=tmp_path / "calib")
