"""calibrate, evaluate and search as Python functions: what the commands do, from a text or from token ids."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import lowbit
from lowbit.calibration.data import load_tokenizer, load_windows
from lowbit.calibration.methods import get_method
from lowbit.errors import InputError

DRAWN = {"samples": 6, "length": 32}


@pytest.fixture
def text(source):
    return source.parent / "text.txt"


def tensors(path):
    return {k: v for f in path.rglob("*.safetensors") for k, v in load_file(f).items()}


def test_from_a_text_or_from_its_windows(source, text, tmp_path):
    seen = []
    found = lowbit.calibrate(
        source, tmp_path / "a", "int8", method="gptq", data=text, **DRAWN, device="cpu",
        started=lambda method, windows: seen.append((method.name, len(windows))),
    )  # fmt: skip
    assert seen == [("gptq", 6)] and found.data["samples"] == 6 and found.scheme == "int8"
    windows = load_windows(text, load_tokenizer(source), seed=0, **DRAWN)
    lowbit.calibrate(source, tmp_path / "b", "int8", method=get_method("gptq"), data=windows, device="cpu")
    a, b = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert a.keys() == b.keys() and a and all(torch.equal(a[k], b[k]) for k in a)


def test_calibrate_convert_evaluate(source, text, tmp_path):
    calibration, out = tmp_path / "c", tmp_path / "out"
    lowbit.calibrate(source, calibration, "int8", data=text, **DRAWN, device="cpu")
    lowbit.convert(source, out, "int8", calibration=calibration)
    found = lowbit.measure(out, text, reference=source, **DRAWN, device="cpu").to_dict()
    overlaid = lowbit.measure(source, text, calibration=calibration, **DRAWN, device="cpu").to_dict()
    assert 0 < found["kl"] == pytest.approx(overlaid["kl"], rel=1e-3)
    lowbit.convert(source, tmp_path / "plain", "int8")
    # A rotated weight is not like the source's at all, and nothing is wrong with it.
    rotated, plain = (lowbit.verify(o, source) for o in (out, tmp_path / "plain"))
    assert rotated.ok and max(e.sqnr_db for e in rotated.errors) < 10 < min(e.sqnr_db for e in plain.errors)
    assert ["may have rotated" in v.checked[-1] for v in (rotated, plain)] == [True, False]
    rounded = lowbit.measure(tmp_path / "plain", text, reference=source, **DRAWN, device="cpu").to_dict()
    assert found["kl"] < rounded["kl"]
    assert "kl" not in lowbit.measure(source, text, **DRAWN, device="cpu").to_dict()


def test_search_gives_a_recipe(source, text, tmp_path):
    recipe = lowbit.search(source, text, budget=9, **DRAWN, device="cpu")
    assert recipe.notes["bits"] <= 9 and recipe.overrides
    recipe.save(tmp_path / "r.yaml")
    done = lowbit.convert(source, tmp_path / "out", recipe.scheme, overrides=recipe.overrides)
    assert {d.scheme.name for d in done.plan.decisions.values() if d.scheme} <= {"int8", "fp8"}


def test_windows_in_one_tensor_or_one_after_the_other(source):
    ids = torch.arange(64).reshape(4, 16)
    found = [lowbit.measure(source, d, device="cpu").agreement.nll for d in (list(ids), ids, iter(ids))]
    assert found[0] == found[1] == found[2]


def test_data_that_is_no_tokens(source, tmp_path):
    with pytest.raises(InputError, match="windows of token ids"):
        lowbit.calibrate(source, tmp_path / "c", method="gptq", data=[torch.randn(32)], device="cpu")
    for wrong in ([3, 4], {"input_ids": torch.ones(8)}, torch.ones(8), torch.ones(8).bool(), torch.ones(1, 8).long(),
                  torch.ones(0).long()):  # fmt: skip
        with pytest.raises(InputError, match=r"integer tensors \[T\], found one that is a"):
            lowbit.measure(source, [wrong])
    with pytest.raises(InputError, match="at least one window to measure on"):
        lowbit.measure(source, [])
    with pytest.raises(InputError, match="a window of at least two tokens"):
        lowbit.measure(
            source, [torch.tensor([5]), torch.tensor([6])]
        )  # a perplexity of 1, whatever the model
    for wrong in ({"samples": 0}, {"length": -5}, {"seed": 2**70}):
        with pytest.raises(InputError, match="at least 1 and a seed of 64 bits, found"):
            lowbit.search(source, source.parent / "text.txt", **wrong)
    with pytest.raises(InputError, match="expected data for method"):
        lowbit.calibrate(source, tmp_path / "c", method="gptq", device="cpu")
    assert not (tmp_path / "c").exists()


def test_arguments_that_mean_nothing(source, tmp_path):
    windows = [torch.arange(3, 35)]
    with pytest.raises(InputError, match="a list of schemes as candidates, found 'int8'"):
        lowbit.search(source, windows, candidates="int8")
    for method in ("gptq", "absmax", {"name": "mine", "rotate": "hadamard"}):
        with pytest.raises(InputError, match="expected a method that smooths, to give it an alpha, found"):
            lowbit.calibrate(source, tmp_path / "c", method=method, alpha=0.5, data=windows)
    with pytest.raises(InputError, match="a mapping of its settings or a Method, found 3"):
        lowbit.calibrate(source, tmp_path / "c", method=3, data=windows)
    with pytest.raises(InputError, match="a scheme that quantizes weights, found bf16"):
        lowbit.quantize_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), "bf16")
    assert not (tmp_path / "c").exists()
    found = lowbit.calibrate(source, tmp_path / "c", method="smoothquant", alpha=0.25, data=windows)
    assert found.method["smooth"] == 0.25


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_a_quantized_head_rounds_what_it_multiplies(checkpoints, windows, tmp_path, scheme):
    """Heads stay in float unless an override names one; then `lowbit.load` and engines round its input."""
    alone = {"lm_head": scheme, "*.layers.*": "float"}
    lowbit.convert(checkpoints["qwen3"], tmp_path / "out", scheme, overrides=alone)
    report = lowbit.measure(tmp_path / "out", windows, device="cpu")
    model = lowbit.load(tmp_path / "out", dtype=torch.float32)
    assert isinstance(model.lm_head, lowbit.nn.QuantLinear)
    with torch.no_grad():
        nll = sum(
            torch.nn.functional.cross_entropy(model(input_ids=w[None]).logits[0, :-1], w[1:], reduction="sum")
            for w in windows
        )
        with lowbit.nn.float_activations(model.lm_head):
            other = sum(
                torch.nn.functional.cross_entropy(
                    model(input_ids=w[None]).logits[0, :-1], w[1:], reduction="sum"
                )
                for w in windows
            )
    assert abs(report.agreement.nll - float(nll)) < 0.05 * abs(float(other) - float(nll))
