"""The commands: calibrate, eval and search on a tiny model with a tokenizer, as a user would call them."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conversions import everything
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM as Auto
from transformers import LlamaConfig
from typer.testing import CliRunner

import lowbit as package
from lowbit import quality
from lowbit.calibration import calibrate as calibrating
from lowbit.calibration import data, store
from lowbit.calibration.data import load_tokenizer, load_windows
from lowbit.calibration.layerwise import LayerwiseModel
from lowbit.cli import app
from lowbit.engines import local
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


def test_calibrate_says_what_it_wrote(source, tmp_path):
    """Of a calibration that had scales of KV caches only it said `0 modules`, and of modules left dynamic nothing."""
    common = ("--data", source.parent / "text.txt", "--samples", 2, "--length", 32)
    done = lowbit("calibrate", source, "-o", tmp_path / "a", "-m", "absmax", "--kv-cache", "fp8", *common)
    assert f"wrote {tmp_path / 'a'}: 3 KV caches in 3 layers" in done.output
    recipe = tmp_path / "r.yaml"
    recipe.write_text("scheme: int8-static\nmethod: {name: rotate-gptq-static, dynamic_below: 200.0}\n")
    static = ("calibrate", source, "--recipe", recipe, "--kv-cache", "int8-head", *common)
    done = lowbit(*static, "-o", tmp_path / "b")
    assert "21 modules and 3 KV caches in 3 layers" in done.output
    assert "resumed: 3 of 3 layers were done already" in lowbit(*static, "-o", tmp_path / "b").output
    found = json.loads(lowbit(*static, "-o", tmp_path / "b", "--json").stdout)
    assert f"{len(found['left_dynamic'])} modules have dynamic activations" in done.output
    assert "would keep less than 200 dB" in done.output and found["left_dynamic"][0] in done.output
    counted = lowbit("plan", source, "--calibration", tmp_path / "b").output.partition("counted in tensors")[
        2
    ]
    assert (
        f" {len(found['left_dynamic'])}  as calibrated: int8\n" in counted
        and "from the calibration" in counted
    )
    # The source's size, not that of the codes which take its weights' place.
    source_size = re.search("^(.*) → ", lowbit("plan", source).output, re.MULTILINE)[1]
    assert f"\n{source_size} → " in counted


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


def test_the_scheme_is_the_calibration_s_where_none_is_given(source, tmp_path, monkeypatch):
    calibration = tmp_path / "c"
    common = ("--data", source.parent / "text.txt", "--samples", 2, "--length", 16)
    lowbit("calibrate", source, "-o", calibration, "-s", "int8-static", "-m", "absmax", *common)
    given = ("--calibration", calibration)
    assert "to int8-static" in lowbit("convert", source, tmp_path / "out", *given).output
    # A chip chooses what the calibration leaves open.
    planned = json.loads(lowbit("plan", source, *given, "--target", "ascend910b", "--json").output)
    assert (planned["scheme"], planned["format"]) == ("int8-static", "ascend")
    assert package.plan(source, calibration=calibration).scheme.name == "int8-static"
    read, load = [], store.load_manifest
    with monkeypatch.context() as patched:
        patched.setattr(store, "load_manifest", lambda path: read.append(path) or load(path))
        lowbit("plan", source, *given)
        assert read == [calibration]  # of a trillion parameters it is long
        found = store.read(calibration)
        one, other = (package.plan(source, calibration=c).digest() for c in (found, calibration))
        assert one == other
        one, other = (
            package.measure(source, source.parent / "text.txt", samples=2, length=16, calibration=c)
            for c in (found, calibration)
        )
        assert one.to_dict() == other.to_dict()
    other = lowbit("convert", source, tmp_path / "b", "--scheme", "int8", *given, code=2)
    assert "expected scheme int8-static" in str(other.exception)
    none = lowbit("plan", source, "--calibration", tmp_path / "none", code=2)
    assert "expected calibration.json" in str(none.exception)


@pytest.mark.parametrize(
    ("overwrite", "message"), [((), "give --overwrite"), (("--overwrite",), "holds none")]
)
def test_a_place_that_is_taken_is_said_before_it_is_calibrated(
    source, tmp_path, monkeypatch, overwrite, message
):
    monkeypatch.setattr(quality, "calibrate", lambda *_, **__: pytest.fail("calibrated in vain"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    command = ("convert", source, tmp_path / "out", "--method", "gptq", "--data", source, *overwrite)
    assert message in str(lowbit(*command, code=2).exception)
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_what_lies_unfinished_in_the_output_is_said_before_it_is_calibrated(source, tmp_path, monkeypatch):
    """It was said after the calibration, and of one that was to replace another after the data had been embedded."""
    command = ("convert", source, tmp_path / "out", "--method", "gptq")
    command += ("--data", source.parent / "text.txt", "--samples", 2, "--length", 16)

    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(local, "run_jobs", stopped)
        lowbit(*command, code=130)
    before = everything(tmp_path)
    assert ".calibration/calibration.json" in " ".join(before) and "journal.jsonl" in " ".join(before)
    with monkeypatch.context() as patched:
        patched.setattr(quality, "calibrate", lambda *_, **__: pytest.fail("calibrated in vain"))
        for other in (("--max-shard-size", "50KB"), ("--scheme", "fp8")):
            assert "an unfinished conversion" in str(lowbit(*command, *other, code=2).exception)
        kept = (tmp_path / "out.calibration").rename(tmp_path / "elsewhere")
        assert "an unfinished conversion" in str(lowbit(*command, code=2).exception)
        kept.rename(tmp_path / "out.calibration")
    with monkeypatch.context() as patched:
        patched.setattr(calibrating, "_start", lambda *_, **__: pytest.fail("embedded in vain"))
        assert "found one with other data" in str(lowbit(*command, "--samples", 3, code=2).exception)
        calibrate = ("calibrate", source, *command[3:], "-o", source / "config.json")
        assert "found that none can be made" in str(lowbit(*calibrate, code=2).exception)
    assert everything(tmp_path) == before
    assert "layers were done already" in lowbit(*command).output
    assert (tmp_path / "out" / "config.json").is_file()


def test_overwrite_replaces_the_calibration_beside_the_output(source, tmp_path):
    common = ("--data", source.parent / "text.txt", "--samples", 6, "--length", 32)
    lowbit("convert", source, tmp_path / "out", "--method", "gptq", *common)
    again = ("convert", source, tmp_path / "out", "--method", "smoothquant", *common)
    assert "give --overwrite" in str(lowbit(*again, code=2).exception)
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    assert "found one with other method" in str(lowbit(*again, code=2).exception)
    assert "run it as it was to go on there" in str(lowbit(*again, code=2).exception)
    lowbit(*again, "--overwrite")
    assert store.read(tmp_path / "out.calibration").method["name"] == "smoothquant"


def test_too_few_tokens_to_round_by_are_said_before_the_run(source, tmp_path, monkeypatch):
    """It said so of ten modules, afterwards."""
    of = ("calibrate", source, "--data", source.parent / "text.txt", "-m", "gptq", "--length", 32)
    done = lowbit(*of, "-o", tmp_path / "a", "--samples", 3)
    said = "warning: expected at least 128 tokens for gptq to round weights by, found 96 in all data"
    assert said in done.stderr
    assert "all 21 modules: rounded without data: fewer than 128 tokens\n" in done.stdout
    enough = lowbit(*of, "-o", tmp_path / "b", "--samples", 4)
    assert not enough.stderr and "without data" not in enough.stdout
    done = lowbit(
        *of[:-4], "-m", "absmax", "-s", "int8-static", *of[-2:], "--samples", 3, "-o", tmp_path / "c"
    )
    assert not done.stderr, "nothing is rounded by data"
    monkeypatch.setattr(calibrating, "calibrate_layer", lambda *a, **k: pytest.fail("a layer was calibrated"))
    told = []
    with pytest.raises(pytest.fail.Exception):
        package.calibrate(source, tmp_path / "d", method="gptq", data=[torch.arange(40)], warn=told.append)
    assert len(told) == 1 and "found 40 in all data" in told[0]


def test_experts_that_few_tokens_reached_are_named(checkpoints, tmp_path):
    """A line for each of their matrices, of which ten were shown, hid which experts these were."""
    generator = torch.Generator().manual_seed(0)
    torch.save(torch.randint(0, 128, (8, 40), generator=generator), tmp_path / "ids.pt")
    where = ("--data", tmp_path / "ids.pt", "--samples", 8, "--length", 40, "--routed-only", "-m", "gptq")
    done = lowbit("calibrate", checkpoints["qwen3_moe"], "-o", tmp_path / "c", *where)
    layers = store.read(tmp_path / "c").layers
    for layer, report in layers.items():
        few = [str(e) for e, n in enumerate(report["experts"]["mlp.experts"]["tokens"]) if n < 128]
        line = f"{layer}.mlp.experts {', '.join(few)}: rounded without data: fewer than 128 tokens\n"
        assert (line in done.stdout) == bool(few)
    assert any(n < 128 for r in layers.values() for n in r["experts"]["mlp.experts"]["tokens"])
    assert "_proj: rounded without data" not in done.stdout


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
    lowbit("search", source, *common, "-o", tmp_path / "r.json", "--overwrite")
    assert load_recipe(tmp_path / "r.json").notes["predicted_kl"] > 1e-4
    lowbit("calibrate", source, "-o", tmp_path / "c", "--recipe", tmp_path / "r.yaml", *common, "--json")
    found = store.read(tmp_path / "c")
    assert found.scheme == recipe.scheme
    for module, name in recipe.overrides.items():
        assert found.module_schemes.get(module, found.scheme) == (None if name == "float" else name)
    # The recipe has no method: this one is taken, and options that would say otherwise than the recipe are not.
    again = ("calibrate", source, "--recipe", tmp_path / "r.yaml", *common)
    lowbit(*again, "-o", tmp_path / "d", "--method", "gptq")
    assert store.read(tmp_path / "d").method["name"] == "gptq" != found.method["name"]
    for option in (("--scheme", "fp8"), ("--ignore", "lm_head")):
        assert "--recipe alone" in str(lowbit(*again, "-o", tmp_path / "e", *option, code=2).exception)


def test_options_come_before_what_a_recipe_says_of_data(source, tmp_path):
    (tmp_path / "other.txt").write_text((source.parent / "text.txt").read_text())
    data = {"path": str(source.parent / "text.txt"), "samples": 6, "length": 32, "seed": 3}
    (tmp_path / "r.json").write_text(json.dumps({"scheme": "int8", "method": "gptq", "data": data}))
    recipe = ("--recipe", tmp_path / "r.json")

    def used(*options, command: str = "calibrate"):
        where = (
            ("-o", tmp_path / "c", "--overwrite")
            if command == "calibrate"
            else (tmp_path / "o", "--overwrite")
        )
        lowbit(command, source, *where, *recipe, *options)
        found = store.read(tmp_path / ("c" if command == "calibrate" else "o.calibration")).data
        return {k: found[k] for k in data}

    assert used() == data
    assert used("--samples", 2, "--seed", 5) == {**data, "samples": 2, "seed": 5}
    assert used("--data", tmp_path / "other.txt") == {**data, "path": str(tmp_path / "other.txt")}
    assert used("--length", 16, command="convert") == {**data, "length": 16}
    alone = lowbit("convert", source, tmp_path / "p", "--length", 16, code=2)
    assert "expected --method beside --data" in str(alone.exception)


def test_the_guide_s_page_of_python_runs(source, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "guide.md").read_text("utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.S)[1]
    (tmp_path / "SRC").symlink_to(source)
    (tmp_path / "text.txt").symlink_to(source.parent / "text.txt")
    monkeypatch.chdir(tmp_path)
    made: dict = {"torch_model": torch.nn.Linear(64, 64)}
    exec(code, made)
    assert made["found"].ok and made["report"]["kl"] < 1
    assert made["other"].scheme.name == "int8" and made["layer"].scheme.name == "fp8"


def test_methods_are_listed():
    listed = json.loads(lowbit("calibrate", "x", "--list-methods", "--json").output)
    assert {"absmax", "percentile", "mse", "entropy", "smoothquant", "gptq", "rotate-gptq"} <= listed.keys()
    assert listed["best"] == "for --scheme int8: rotate-gptq"
    assert "--scheme fp8: gptq" in lowbit("calibrate", "--list-methods", "--scheme", "fp8").output


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
        (("--scheme", "int8-static", "--max-shard-size", "5"), "expected a size such as"),
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


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("calibrate", ("-o", "{at}/file"), "directory for the calibration"),
        ("calibrate", ("-o", "{at}/file/sub"), "directory for the calibration"),
        ("calibrate", ("-o", "{at}/c", "--spill", "{at}/none"), "directory for hidden states"),
        ("calibrate", ("-o", "{at}/c", "--ignore", "model.*"), "at least one weight"),
        ("search", ("-o", "{at}/file/r.yaml"), "where to write a recipe"),
        ("search", ("-o", "{at}"), "where to write a recipe"),
        ("search", ("-o", "{at}/file"), "give another --out, or --overwrite"),
        ("search", ("-o", "{at}/new/r.yaml", "--budget", 3), "at least 8.00 bits"),
        ("search", ("-o", "{at}/new/r.yaml", "--budget", 9, "--max-kl", 1), "either a budget"),
        ("search", ("-o", "{at}/new/r.yaml", "--budget", 16), "less than 16 bits.* found int8, fp8 and 16"),
        ("search", ("-o", "{at}/new/r.yaml", "--max-kl", 0), "more than 0"),
        ("search", ("-o", "{at}/new/r.yaml", "--candidates", "bf16", "--budget", 16), "less than 16 bits"),
        ("search", ("-o", "{at}/new/r.yaml", "--candidates", "bf16"), "less than 16 bits.* found bf16 and 8.5"),
        ("search", ("-o", "{at}/new/r.yaml", "--candidates", "float"), "schemes to choose from"),
        ("search", ("-o", "{at}/new/r.yaml", "--candidates", "fp8,float", "--budget", 3), "which fp8 take"),
        ("search", ("-o", "{at}/new/r.yaml", "--candidates", ","), "schemes to choose from"),
        ("search", ("-o", "{at}/new/r.yaml", "--ignore", "model.*"), "at least one weight"),
        ("eval", ("--reference", "{at}/deeper"), "made from .* of 4 layers .* found 3 layers"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_before_the_work(
    source, tmp_path, monkeypatch, command, arguments, message
):
    """Also that a recipe has no place, which was said when the search was over."""
    (tmp_path / "file").touch()
    shutil.copytree(source, tmp_path / "deeper")
    config = LlamaConfig.from_pretrained(source)
    config.num_hidden_layers = 4
    Auto.from_config(config).save_pretrained(tmp_path / "deeper")
    monkeypatch.setattr(LayerwiseModel, "run_with_grad", lambda *a: pytest.fail("a layer ran"))
    arguments = [str(a).format(at=tmp_path) for a in arguments] + ["-m", "gptq"] * (command == "calibrate")
    common = ("--data", source.parent / "text.txt", "--samples", 6, "--length", 32)
    done = lowbit(command, source, *arguments, *common, code=2)
    assert isinstance(done.exception, InputError) and re.search(message, str(done.exception))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["deeper", "file"], "what is refused leaves nothing"


@pytest.mark.parametrize(
    "arguments",
    [
        ("search", "{src}", "-o", "{at}/a/b/r.yaml", "--data", "{at}/none.txt"),
        ("search", "{at}/none", "-o", "{at}/a/b/r.yaml", "--data", "{text}"),
        ("calibrate", "{src}", "-o", "{at}/a/b", "--data", "{at}/none.txt"),
        ("convert", "{src}", "{at}/a/b", "--method", "best", "--data", "{at}/none.txt"),
        ("convert", "{src}", "{at}/a/b", "--method", "bets", "--data", "{text}"),
        ("convert", "{src}", "{at}/a/b", "--calibration", "{at}/none"),
        ("convert", "{src}", "{at}/a/b", "--scheme", "int8-static"),
        ("convert", "{src}", "{at}/a/b", "--dry-run"),
        ("bench", "{at}/a/b"),
        ("generate", "{at}/a/b", "--prompt", "x"),
        ("verify", "{at}/a/b"),
        ("kernels", "compile", "--target", "sm99"),
    ],
)
def test_what_is_refused_leaves_nothing(source, tmp_path, monkeypatch, arguments):
    """`search` made the directories of --out before it looked at anything else."""
    monkeypatch.chdir(tmp_path)
    given = [a.format(at=tmp_path, src=source, text=source.parent / "text.txt") for a in arguments]
    assert (lowbit(*given, code=2).exit_code != 0) == ("--dry-run" not in given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "out"), [("calibrate", "a/b"), ("search", "a/b/r.yaml"), ("convert", "a/b")]
)
@pytest.mark.parametrize("error", [InputError, KeyboardInterrupt])
def test_what_ends_before_anything_is_kept_leaves_nothing(source, tmp_path, monkeypatch, command, out, error):
    """A calibration that was refused in its first layer left its directory, and a search the directories above."""
    monkeypatch.setattr(LayerwiseModel, "load", lambda *a: (_ for _ in ()).throw(error))
    common = ("--data", source.parent / "text.txt", "--samples", 6, "--length", 32)
    place = (tmp_path / out, "--method", "gptq") if command == "convert" else ("-o", tmp_path / out)
    done = lowbit(command, source, *place, *common, code=2)
    assert isinstance(done.exception, InputError) or done.exit_code == 130
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["calibrate", "search"])
def test_a_place_that_may_not_be_written_is_said_before_the_work(source, tmp_path, monkeypatch, command):
    readable = os.access
    # Nothing keeps root from writing.
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.R_OK and readable(path, mode))
    monkeypatch.setattr(LayerwiseModel, "embed", lambda *a: pytest.fail("the data was embedded"))
    out = tmp_path / "a" / "b"
    data = ("--data", source.parent / "text.txt", "--samples", 6, "--length", 32)
    method = ("-m", "gptq") if command == "calibrate" else ()  # `best` tries layers on a few tokens
    done = lowbit(command, source, "-o", out, *data, *method, code=2)
    assert isinstance(done.exception, InputError)
    assert f"{tmp_path} cannot be written to; choose another place" in str(done.exception)


@pytest.mark.parametrize("method", ["absmax", "entropy"])
def test_what_a_conversion_does_by_itself_is_not_calibrated(source, tmp_path, monkeypatch, method):
    """It said `wrote c: 0 modules`, after all the data had passed."""
    monkeypatch.setattr(LayerwiseModel, "__init__", lambda *a, **k: pytest.fail("a model was built"))
    common = ("--method", method, "--data", source.parent / "text.txt", "--samples", 2, "--length", 16)
    for command in (("calibrate", source, "-o", tmp_path / "c"), ("convert", source, tmp_path / "c")):
        done = lowbit(*command, "--scheme", "fp8", *common, code=2)
        assert isinstance(done.exception, InputError) and "best" in str(done.exception)
        assert "`lowbit convert SRC OUT --scheme fp8`" in str(done.exception)
        assert not list(tmp_path.iterdir())


def test_static_modules_of_a_dynamic_scheme_are_calibrated_with_data(source, tmp_path):
    """Without any their ranges were those of the first 32 tokens of the vocabulary, and nothing said so."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text("scheme: int8\noverrides: {'*.o_proj': int8-static}\nmethod: absmax\n")
    calibrate = ("calibrate", source, "-o", tmp_path / "c", "--recipe", recipe)
    done = lowbit(*calibrate, code=2)
    assert "expected data for method absmax with scheme int8-static" in str(done.exception)
    lowbit(*calibrate, "--data", source.parent / "text.txt", "--samples", 2, "--length", 16)
    assert store.read(tmp_path / "c").modules() == [f"model.layers.{i}.self_attn.o_proj" for i in range(3)]


def test_patterns_that_mean_nothing_are_said(source, tmp_path):
    """As `convert` and `plan` say it; one that means what is not calibrated is no mistake."""
    common = ("--data", source.parent / "text.txt", "--samples", 2, "--length", 16)
    said = "pattern '*.q_prj' matches no module; `lowbit plan` lists their names"
    ignore = ("--ignore", "*.q_prj", "--ignore", "lm_head", "--ignore", "model.embed_tokens")
    calibrate = ("calibrate", source, "-m", "mse", *common)
    done = lowbit(*calibrate, "-o", tmp_path / "a", *ignore)
    assert done.stderr.count(said) == 1 and done.stderr.count("matches no module") == 2  # the head is tied
    recipe = tmp_path / "r.yaml"
    recipe.write_text("scheme: int8\noverrides: {'*.q_prj': fp8}\nignore: ['re:.*o_proj']\n")
    shown = lowbit(*calibrate, "-o", tmp_path / "b", "--recipe", recipe, "--json")
    assert json.loads(shown.stdout)["warnings"] == [said] and said in shown.stderr
    shown = lowbit("search", source, *common, "-o", tmp_path / "s.yaml", *ignore[:2], "--json")
    assert json.loads(shown.stdout)["warnings"] == [said] and said in shown.stderr
    done = lowbit("convert", source, tmp_path / "o", "--method", "mse", *common, *ignore[:2])
    assert done.stderr.count(said) == 1 and done.stderr.index(said) < len(said) + 20
    with pytest.warns(UserWarning, match="q_prj"):
        quality.search(source, source.parent / "text.txt", ignore=["*.q_prj"], samples=2, length=16)


def test_data_in_its_forms(source, tmp_path):
    tokenizer = load_tokenizer(source)
    whole = load_windows(source.parent / "text.txt", tokenizer, samples=None, length=16)
    assert all(w.shape == (16,) for w in whole)
    some = load_windows(source.parent / "text.txt", tokenizer, samples=5, length=16, seed=1)
    assert len(some) == 5 and [w.tolist() for w in some] != [w.tolist() for w in whole[:5]]
    others = load_windows(source.parent / "text.txt", tokenizer, samples=5, length=16, seed=2)
    assert [w.tolist() for w in some] != [w.tolist() for w in others]
    (tmp_path / "p.jsonl").write_text(
        '{"text": "the quick fox"}\r\n"over the dog"\n\n{"text": ""}\n{"prompt": "and then some more"}\n',
        encoding="utf-8-sig",
    )
    prompts = load_windows(tmp_path, tokenizer, samples=None, length=4)
    assert len(prompts) == 3 and all(2 <= w.numel() <= 4 for w in prompts)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ raise(m) if m.bad else m.content }} {% endfor %}"
    )
    (tmp_path / "p.jsonl").write_text('{"messages": [{"role": "user", "content": "the quick fox"}]}\n')
    chat = load_windows(tmp_path, tokenizer)[0].tolist()
    assert chat == tokenizer("user the quick fox ")["input_ids"]
    # Llama 3 and Gemma begin every text with a token that their templates write too.
    begun = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 0)])
    tokenizer.backend_tokenizer.post_processor = begun
    assert tokenizer("user the quick fox ")["input_ids"] == [0, *chat]
    assert load_windows(tmp_path, tokenizer)[0].tolist() == chat
    # So does every window of running text then, and what ends a text stays away.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<unk> <unk> $A <unk>", special_tokens=[("<unk>", 0)]
    )
    each = load_windows(source.parent / "text.txt", tokenizer, samples=None, length=16)
    assert all(w.shape == (16,) and w[:2].tolist() == [0, 0] for w in each)
    together = torch.cat(whole)
    assert torch.equal(torch.cat([w[2:] for w in each])[: len(together)], together)
    with pytest.raises(InputError, match="more than the 2 tokens"):
        load_windows(source.parent / "text.txt", tokenizer, length=2)
    tokenizer.backend_tokenizer.post_processor = begun
    (tmp_path / "p.jsonl").write_text('{"text": "the quick \\ud83d fox"}\n')  # half of an emoji
    assert load_windows(tmp_path, tokenizer)[0].tolist() == tokenizer("the quick ? fox")["input_ids"]
    with pytest.raises(InputError, match="smaller --length"):
        load_windows(source.parent / "text.txt", tokenizer, length=10**6)
    with pytest.raises(InputError, match="found nothing"):
        load_windows(tmp_path / "no.txt", tokenizer)


def test_a_long_text_is_tokenized_in_pieces(source, tmp_path, monkeypatch):
    """Of each character a tokenizer takes 150 bytes while it is at work, and data may have gigabytes."""
    tokenizer = load_tokenizer(source)
    whole = torch.cat(load_windows(source.parent / "text.txt", tokenizer, samples=None, length=16))
    seen = []
    monkeypatch.setattr(data, "PIECE", 100)
    encode = data._encode
    monkeypatch.setattr(
        data, "_encode", lambda t, text, **o: (seen.append(len(text)), encode(t, text, **o))[1]
    )
    pieces = torch.cat(load_windows(source.parent / "text.txt", tokenizer, samples=None, length=16))
    assert torch.equal(whole, pieces) and max(seen) <= 100
    (tmp_path / "t.txt").write_text(
        "the quick\n" + "fox" * 99 + " " + "dog" * 99
    )  # neither a line nor a word ends
    assert (
        load_windows(tmp_path / "t.txt", tokenizer, length=16)
        and "".join(data._pieces("a" * 250)) == "a" * 250
    )


def test_only_prompts_that_are_picked_are_tokenized(source, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(source)
    lines = [json.dumps({"text": "the quick fox " * (i % 7) + "x" * (i == 35)}) for i in range(50)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    seen = []
    encode = data._encode
    monkeypatch.setattr(data, "_encode", lambda t, text, **o: (seen.append(text), encode(t, text, **o))[1])
    some = load_windows(tmp_path / "p.jsonl", tokenizer, samples=5, seed=3)
    assert len(some) == 5 and len(seen) <= 6
    seen.clear()
    assert (
        len(load_windows(tmp_path / "p.jsonl", tokenizer, samples=99)) == 42
    )  # without empty and one-token ones


def test_texts_of_token_ids_are_windows_of_their_own(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(60).reshape(3, 20))
    found = load_windows(tmp_path / "ids.npy", None, length=32)
    assert [w.tolist() for w in found] == [list(range(a, a + 20)) for a in (0, 20, 40)]
    found = load_windows(tmp_path / "ids.npy", None, length=8)
    assert [int(w[0]) for w in found] == [0, 8, 20, 28, 40, 48]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (torch.ones(2, 40, 4, dtype=torch.int64), r"found Tensor \[2, 40, 4\]"),  # as one text of 320 tokens
        (torch.tensor(3), r"found Tensor \[\]"),
        ([torch.arange(20), torch.arange(9)], "found list"),
        ({"input_ids": torch.arange(20)}, "found dict"),
    ],
)
def test_token_ids_of_another_form_are_named(tmp_path, found, message):
    torch.save(found, tmp_path / "ids.pt")
    with pytest.raises(InputError, match=r"\[T\] or \[N, T\] of N texts, " + message):
        load_windows(tmp_path / "ids.pt", None, length=8)


def test_token_ids_that_were_on_an_accelerator(tmp_path, monkeypatch):
    """Of which there may be none here."""
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(torch.arange(20), tmp_path / "ids.pt")
    (window,) = load_windows(tmp_path / "ids.pt", None, length=16)
    assert window.tolist() == list(range(16))


def test_messages_come_with_their_tools(source, tmp_path):
    tokenizer = load_tokenizer(source)
    tokenizer.chat_template = (
        "{% for t in tools %}{{ t.function.name }} {% endfor %}{{ messages[0].content }}"
    )
    tool = {
        "type": "function",
        "function": {"name": "dog", "parameters": {"type": "object", "properties": {}}},
    }
    entry = {"messages": [{"role": "user", "content": "the quick fox"}], "tools": [tool]}
    (tmp_path / "p.jsonl").write_text(json.dumps(entry))
    (found,) = load_windows(tmp_path / "p.jsonl", tokenizer)
    assert found.tolist() == tokenizer("dog the quick fox")["input_ids"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b"{", "line 1"),
        ("p.jsonl", b'{"prompt": [{"role": "user", "content": "x"}]}', "a text as `prompt` .* line 1, found list"),
        ("p.jsonl", b'"the quick fox"\n42', "line 2, found int"),
        ("p.jsonl", b"[1, 2]", "line 1, found list"),
        ("p.jsonl", b'{"body": "the"}', "line 1, found .'body'"),
        ("p.jsonl", b'{"messages": "the quick fox"}', "`role` and `content`"),
        ("p.jsonl", b'{"conversations": [{"from": "human", "value": "the"}]}', "`role` and `content`"),
        ("p.jsonl", b'{"messages": [{"role": "user", "bad": 1}]}', "that the chat template takes"),
        ("p.jsonl", '{"text": "café"}'.encode("latin-1"), "UTF-8"),
        ("t.txt", "the quick fox ".encode("utf-16") * 20, "UTF-8"),
        ("t.gz", gzip.compress(b"the quick fox " * 99, mtime=0), "UTF-8"),
        ("p.JSONL", b"{", "line 1"),
        ("p.json", b'[{"text": "the quick fox"}]', "make it a .jsonl"),
        ("t.npy", b"", "one tensor of token ids"),
        ("t.pt", b"the", "one tensor of token ids"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_used_is_named(source, tmp_path, name, content, message):
    tokenizer = load_tokenizer(source)
    tokenizer.chat_template = "{% for m in messages %}{{ raise(m) if m.bad else m.content }}{% endfor %}"
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_windows(tmp_path / name, tokenizer, length=8)


def test_a_text_that_is_too_short_says_how_long_it_is(source, tmp_path):
    tokenizer = load_tokenizer(source)
    (tmp_path / "a.txt").write_text("the quick brown fox")
    (tmp_path / "b.txt").write_text("the fox")
    count = len(tokenizer("the quick brown fox")["input_ids"])
    with pytest.raises(
        InputError, match=f"found less text, at most {count} tokens in a file; give more text"
    ):
        load_windows(tmp_path, tokenizer, length=64)
    assert load_windows(tmp_path, tokenizer, length=count)[0].numel() == count
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "d.txt").write_text("")
    with pytest.raises(InputError, match="found less text; give more text"):
        load_windows(tmp_path / "c", tokenizer, length=64)


def test_token_ids_that_are_not_the_model_s(source, tmp_path):
    options = ("-o", tmp_path / "c", "--method", "gptq", "--length", 8, "--data", tmp_path / "ids.npy")
    for ids, message in (
        (np.arange(99) + 40, "from 0 to 127, .* found 13"),
        (np.full(99, -1), "found -1"),
        (np.ones(99), "numbers of torch.float64"),
        (np.ones(99, bool), "numbers of torch.bool"),  # an attention mask
    ):
        np.save(tmp_path / "ids.npy", ids)
        done = lowbit("calibrate", source, *options, code=2)
        assert isinstance(done.exception, InputError) and re.search(message, str(done.exception))
        assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("command", ["calibrate", "eval", "search"])
def test_a_source_that_is_not_there_is_named_before_its_tokenizer(source, tmp_path, command):
    done = lowbit(
        command, tmp_path / "none", "--data", source.parent / "text.txt", "-o", tmp_path / "c", code=2
    )
    if command == "eval":
        done = lowbit(command, tmp_path / "none", "--data", source.parent / "text.txt", code=2)
    assert "expected a checkpoint directory" in str(done.exception)


def test_token_ids_need_no_tokenizer(source, tmp_path):
    """Kimi's is code of its own, which is not run."""
    shutil.copytree(source, tmp_path / "src", ignore=shutil.ignore_patterns("token*"))
    np.save(tmp_path / "ids.npy", np.arange(999) % 100)
    assert json.loads(
        lowbit("eval", tmp_path / "src", "--data", tmp_path / "ids.npy", "--length", 32, "--json").output
    )["perplexity"]
    done = lowbit("eval", tmp_path / "src", "--data", source.parent / "text.txt", code=2)
    assert isinstance(done.exception, InputError) and "token ids in a .npy" in str(done.exception)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mystery"},
        {"model_type": None},
        {"model_type": "mystery", "auto_map": {"AutoConfig": "configuration_mystery.MysteryConfig"}},
    ],
)
def test_a_model_that_transformers_has_not_is_named(source, tmp_path, change):
    """Whoever starts it in the night is asked for nothing, and no code of the checkpoint's is run."""
    shutil.copytree(source, tmp_path / "src")
    config = json.loads((source / "config.json").read_text()) | change
    (tmp_path / "src" / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if v is not None})
    )
    (tmp_path / "src" / "configuration_mystery.py").write_text("raise AssertionError")
    done = lowbit("eval", tmp_path / "src", "--data", source.parent / "text.txt", "--length", 32, code=2)
    assert isinstance(done.exception, InputError), done.exception
    assert f"found {change['model_type']!r}" in str(done.exception) and "[y/N]" not in done.output
    # It said to convert what may be converted already.
    assert "to compare weights `lowbit verify OUT --source SRC`" in str(done.exception)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj", "model.norm", "model.embed_tokens"])
def test_what_is_not_finite_is_named(source, tmp_path, name):
    """`the` is a token of the data; a weight, and a norm, before anything is computed with them."""
    shutil.copytree(source, tmp_path / "src")
    tensors = load_file(source / "model.safetensors")
    tensors[f"{name}.weight"][..., 5] = float("nan")
    save_file(tensors, tmp_path / "src" / "model.safetensors", metadata={"format": "pt"})
    common = ("--data", source.parent / "text.txt", "--samples", 6, "--length", 32)
    for arguments in (("calibrate", "-o", tmp_path / "c", "-m", "gptq"), ("eval",), ("search",)):
        done = lowbit(arguments[0], tmp_path / "src", *arguments[1:], *common, code=2)
        assert isinstance(done.exception, InputError) and "found NaN or Inf" in str(done.exception)
        assert name in str(done.exception) or "embeddings" in str(done.exception)


def test_nan_in_the_embedding_of_a_token_that_is_not_used(source, tmp_path):
    """As rows that only fill up a vocabulary may be: a rotated model is compared by the others."""
    shutil.copytree(source, tmp_path / "src")
    tensors = load_file(source / "model.safetensors")
    tensors["model.embed_tokens.weight"][127] = float("nan")
    save_file(tensors, tmp_path / "src" / "model.safetensors", metadata={"format": "pt"})
    quality.calibrate(tmp_path / "src", tmp_path / "c", method="rotate", device="cpu")
    common = ("--data", source.parent / "text.txt", "--samples", 6, "--length", 32, "--json")
    found = json.loads(lowbit("eval", tmp_path / "src", "--calibration", tmp_path / "c", *common).output)
    assert all(0 < error < 0.1 for error in found["layer_errors"].values())


def test_a_model_that_gives_nan_passes_no_gate(source, tmp_path):
    shutil.copytree(source, tmp_path / "src")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = torch.full_like(tensors["model.embed_tokens.weight"], float("inf"))
    save_file(tensors, tmp_path / "src" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "src" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    common = ("--data", source.parent / "text.txt", "--samples", 6, "--length", 32, "--reference", source)
    for gate in ("--max-kl", "--max-change"):
        done = lowbit("eval", tmp_path / "src", *common, gate, 1000, "--json", code=1)
        found = json.loads(done.output, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
        assert found["passed"] is False and found["kl"] is None
