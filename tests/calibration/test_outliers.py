"""Activation outliers: rounding fails on them, SmoothQuant and rotation do not."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowbit.calibration.calibrate import calibrate
from lowbit.calibration.methods import METHODS
from lowbit.calibration.simulate import fake_quantize
from lowbit.calibration.statistics import InputStatistics, Wanted, token_errors
from lowbit.evaluate.layerwise import calibrated, evaluate, plain
from lowbit.quantize import quantize
from lowbit.scheme import get_scheme


@pytest.fixture(scope="module")
def planted(checkpoints, tmp_path_factory):
    """The llama with 8 channels of every norm times 50, undone in the weights that read it; and its own text."""
    import shutil

    out = tmp_path_factory.mktemp("planted") / "model"
    shutil.copytree(checkpoints["llama"], out)
    tensors = load_file(out / "model.safetensors")
    channels = torch.randperm(48, generator=torch.Generator().manual_seed(3))[:8]
    for i in range(3):
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            tensors[f"model.layers.{i}.{norm}.weight"][channels] *= 50
            for reader in readers:
                tensors[f"model.layers.{i}.{reader}.weight"][:, channels] /= 50
    save_file(tensors, out / "model.safetensors")
    original = AutoModelForCausalLM.from_pretrained(checkpoints["llama"], dtype=torch.float32).eval()
    torch.manual_seed(0)
    ids = torch.randint(0, 128, (12, 1))
    with torch.no_grad():
        for _ in range(47):
            p = torch.softmax(original(ids).logits[:, -1].float(), dim=-1)
            ids = torch.cat([ids, torch.multinomial(p, 1)], dim=1)
    return out, list(ids)


@pytest.mark.parametrize("scheme", ["int8", "int8-static"])
def test_smoothing_and_rotation_recover_what_rounding_loses(checkpoints, planted, tmp_path, scheme):
    source, text = planted
    reference = plain(checkpoints["llama"])  # the unplanted model

    def change(method: str) -> tuple[float, float]:
        found = calibrate(source, tmp_path / method, get_scheme(scheme), METHODS[method], text[4:])
        agreement = evaluate(calibrated(source, found), text, reference).agreement
        return agreement.perplexity / agreement.reference_perplexity - 1, agreement.mean_kl

    lost = change("absmax")
    assert lost[1] > 0.01
    static = scheme.endswith("static")
    for method in ("smoothquant", "smoothquant-gptq", "rotate-gptq-static" if static else "rotate-gptq"):
        perplexity, kl = change(method)
        assert abs(perplexity) < 0.01, method
        assert kl < min(math.log(1.01), lost[1] / 3), method


@pytest.mark.parametrize("name", ["int8", "fp8", "int8-block", "fp8-block", "mxfp8"])
def test_simulated_activations_are_the_oracles(name):
    spec = get_scheme(name).activations
    x = torch.randn(7, 5, 256, generator=torch.Generator().manual_seed(0)) * 3
    x[0, 0] = 0
    assert torch.equal(fake_quantize(x, spec), quantize(x, spec).dequantize())


@pytest.mark.parametrize("name", ["int8-static", "int8-static-asym", "fp8-static"])
def test_simulated_static_activations_are_the_oracles(name):
    spec = get_scheme(name).activations
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)) * 3
    q = quantize(x, spec)
    assert torch.equal(fake_quantize(x, spec, q.scale, q.zero_point), q.dequantize())
    clipped = fake_quantize(x, spec, q.scale / 4, q.zero_point)
    assert clipped.abs().max() < x.abs().max()
    with pytest.raises(ValueError, match="calibrate first"):
        fake_quantize(x, spec)


def test_one_massive_token_does_not_decide():
    """Neither the Hessian of what writes the residual stream, nor the error that searches go by."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(500, 16, generator=g), torch.randn(8, 16, generator=g)
    x[0] *= 1000
    y = x @ w.t()
    weighted, plainly = (InputStatistics(wanted=Wanted(hessian=True), spec=None) for _ in range(2))
    weighted.update(x, y)
    plainly.update(x)
    rest = x[1:].t() @ x[1:]
    assert (plainly.hessian - rest).norm() > 100 * rest.norm()
    scale = float((weighted.hessian * rest).sum() / rest.square().sum())
    assert (weighted.hessian / scale - rest).norm() < 0.35 * rest.norm()
    lost = torch.zeros_like(y)
    lost[0] = y[0] * 0.1
    one_bad = float(token_errors(lost, y).mean())
    lost[:] = y * 0.1
    assert float(token_errors(lost, y).mean()) > 200 * one_bad
