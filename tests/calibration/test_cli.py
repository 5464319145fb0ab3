"""The commands: calibrate, eval and search on a tiny model with a tokenizer, as a user would call them."""

from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

from lowbit import quality
from lowbit.calibration import store
from lowbit.calibration.data import load_tokenizer, load_windows
from lowbit.cli import app
from lowbit.errors import InputError
from lowbit.recipe import load_recipe


def lowbit(*arguments, code: int = 0):
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    if code != 2:
        assert done.exit_code == code, (done.output, done.exception)
    return done


def test_calibrate_then_eval(source, tmp_path):
    text = source.parent / "text.txt"
    common = ("--data", text, "--samples", 6, "--length", 32)
    done = lowbit("calibrate", source, "-o", tmp_path / "c", "--method", "rotate-gptq", *common)
    assert "hadamard rotation" in done.output and "lowbit convert" in done.output
    report = json.loads(lowbit("calibrate", source, "-o", tmp_path / "d", *common, "--json").output)
    assert report["method"]["name"] == "rotate-gptq" and report["modules"] == 21
    assert report["error"] < report["nearest_error"]
    store.read(tmp_path / "c").require(fingerprint=store.fingerprint(source), scheme="int8")
    shown = lowbit("eval", source, "--calibration", tmp_path / "c", *common)
    assert "KL divergence" in shown.output and "model.layers.2" in shown.output
    result = json.loads(lowbit("eval", source, "--calibration", tmp_path / "c", *common, "--json").output)
    assert 0 < result["kl"] < 0.05 and len(result["layer_errors"]) == 3
    failed = lowbit("eval", source, "--calibration", tmp_path / "c", *common, "--max-kl", 1e-9, code=1)
    assert "FAILED" in failed.output
    alone = json.loads(lowbit("eval", source, *common, "--json").output)
    assert "kl" not in alone and alone["perplexity"] > 1


def test_eval_of_a_converted_checkpoint(source, tmp_path):
    common = ("--data", source.parent / "text.txt", "--samples", 6, "--length", 32, "--json")
    calibration = ("--calibration", tmp_path / "c")
    for scheme, method in (("int8", "rotate-gptq"), ("int8-static", "best"), ("fp8", "gptq")):
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        lowbit("calibrate", source, "-o", tmp_path / "c", "-s", scheme, "-m", method, *common)
        out = tmp_path / f"out-{scheme}"
        lowbit("convert", source, out, "--scheme", scheme, *calibration)
        written = json.loads(lowbit("eval", out, "--reference", source, *common).output)
        overlaid = json.loads(lowbit("eval", source, *calibration, *common).output)
        assert written["kl"] == pytest.approx(overlaid["kl"], rel=1e-3)
        assert written["perplexity"] == pytest.approx(overlaid["perplexity"], rel=1e-5)
        rotated = scheme != "fp8"
        errors = written["layer_errors"].values()
        assert all(0 < e < 0.2 for e in errors), (rotated, errors)  # also when the basis is another


def test_overwrite_replaces_the_calibration_beside_the_output(source, tmp_path):
    common = ("--data", source.parent / "text.txt", "--samples", 6, "--length", 32)
    lowbit("convert", source, tmp_path / "out", "--method", "gptq", *common)
    again = ("convert", source, tmp_path / "out", "--method", "smoothquant", *common)
    assert "found one with other method" in str(lowbit(*again, code=2).exception)
    lowbit(*again, "--overwrite")
    assert store.read(tmp_path / "out.calibration").method["name"] == "smoothquant"


def test_search_writes_a_recipe_that_calibrate_takes(source, tmp_path):
    common = ("--data", source.parent / "text.txt", "--samples", 6, "--length", 32)
    done = lowbit("search", source, *common, "--budget", 9, "-o", tmp_path / "r.yaml")
    assert "predicted KL" in done.output
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.overrides and recipe.notes["bits"] <= 9
    report = json.loads(
        lowbit("search", source, *common, "--max-kl", 1e-4, "-o", tmp_path / "r.json", "--json").output
    )
    assert report["notes"]["predicted_kl"] <= 1e-4
    lowbit("calibrate", source, "-o", tmp_path / "c", "--recipe", tmp_path / "r.yaml", *common, "--json")
    found = store.read(tmp_path / "c")
    assert found.scheme == recipe.scheme
    for module, name in recipe.overrides.items():
        assert found.scheme_of(module) == (None if name == "float" else name)


def test_methods_are_listed():
    listed = json.loads(lowbit("calibrate", "x", "--list-methods", "--json").output)
    assert {"absmax", "percentile", "mse", "entropy", "smoothquant", "gptq", "rotate-gptq"} <= listed.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "gptk"), "gptq"),
        (("--method", "gptq"), "--data"),
        (("--kv-cache", "int4"), "fp8-head"),
        (("--scheme", "int9"), "int8"),
    ],
)
def test_bad_input_is_named(source, tmp_path, arguments, message):
    done = lowbit("calibrate", source, "-o", tmp_path / "c", *arguments, code=2)
    assert isinstance(done.exception, ValueError) and message in str(done.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scheme", "fp8", "--format", "ascend"), "cannot hold the scheme fp8"),
        (
            ("--scheme", "int8-weight-only", "--format", "ascend"),
            "one scale per channel only; convert without",
        ),
        (("--scheme", "int8", "--ignore", "model.*"), "at least one weight"),
    ],
)
def test_what_cannot_be_converted_is_said_before_it_is_calibrated(
    source, tmp_path, monkeypatch, arguments, message
):
    def calibrate(*_, **__):
        raise AssertionError("calibrated in vain")

    monkeypatch.setattr(quality, "calibrate", calibrate)
    done = lowbit(
        "convert", source, tmp_path / "out", *arguments, "--method", "gptq", "--data", source, code=2
    )
    assert isinstance(done.exception, InputError) and message in str(done.exception)
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(AssertionError, match="in vain"):
        raise lowbit(
            "convert", source, tmp_path / "out", "-s", "int8-static", "--method", "gptq", code=2
        ).exception


def test_data_in_its_forms(source, tmp_path):
    tokenizer = load_tokenizer(source)
    whole = load_windows(source.parent / "text.txt", tokenizer, samples=None, length=16)
    assert all(w.shape == (16,) for w in whole)
    some = load_windows(source.parent / "text.txt", tokenizer, samples=5, length=16, seed=1)
    assert len(some) == 5 and [w.tolist() for w in some] != [w.tolist() for w in whole[:5]]
    (tmp_path / "p.jsonl").write_text(
        '{"text": "the quick fox"}\n"over the dog"\n\n{"prompt": "and then some more"}\n'
    )
    prompts = load_windows(tmp_path, tokenizer, samples=None, length=4)
    assert len(prompts) == 3 and all(2 <= w.numel() <= 4 for w in prompts)
    for text, message in (
        ('{"messages": [{"role": "user", "content": "x"}]}', "chat template"),
        ("{", "line 1"),
    ):
        (tmp_path / "p.jsonl").write_text(text + "\n")
        with pytest.raises(InputError, match=message):
            load_windows(tmp_path / "p.jsonl", tokenizer)
    with pytest.raises(InputError, match="smaller --length"):
        load_windows(source.parent / "text.txt", tokenizer, length=10**6)
    with pytest.raises(InputError, match="found nothing"):
        load_windows(tmp_path / "no.txt", tokenizer)
