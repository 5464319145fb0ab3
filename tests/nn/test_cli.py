"""`lowbit generate` and `lowbit bench`."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import typer
from nn_reference import build
from typer.testing import CliRunner

import lowbit
from lowbit.cli.bench import bench
from lowbit.cli.generate import generate
from lowbit.errors import InputError

app = typer.Typer()
app.command("generate")(generate)
app.command("bench")(bench)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("cli")
    build("llama").save_pretrained(root / "src")
    words = {f"w{i}": i for i in range(96)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2").save_pretrained(root / "src")
    lowbit.convert(root / "src", root / "out", scheme="int8")
    return root


def run(*arguments) -> str:
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_generate(checkpoint):
    text = run("generate", checkpoint / "out", "--prompt", "w5 w6 w7", "--max-new-tokens", 4)
    assert text.startswith("w5 w6 w7")
    found = json.loads(
        run("generate", checkpoint / "out", "--prompt", "w5 w6 w7", "--max-new-tokens", 4, "--json")
    )
    assert found["prompt_tokens"] == 3
    assert 1 <= found["new_tokens"] <= 4
    assert text.split()[3:] == found["text"].split()
    assert found["weight_bytes"] > 0
    sampled = [
        json.loads(
            run("generate", checkpoint / "out", "-p", "w5", "--temperature", 5.0, "--seed", s, "--json")
        )["text"]
        for s in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_generate_says_why_a_chat_model_said_nothing(checkpoint, tmp_path):
    """Many end at once where their template is left out."""
    shutil.copytree(checkpoint / "out", tmp_path / "out")
    made = lowbit.load(checkpoint / "out", dtype=torch.float32)(input_ids=torch.tensor([[5, 6]])).logits[
        0, -1
    ]
    settings = {"eos_token_id": int(made.argmax())}
    (tmp_path / "out" / "generation_config.json").write_text(json.dumps(settings))
    of = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    of |= {"eos_token": f"w{made.argmax()}", "chat_template": "{{ messages[0]['content'] }}"}
    (tmp_path / "out" / "tokenizer_config.json").write_text(json.dumps(of))
    said = CliRunner().invoke(app, ["generate", str(tmp_path / "out"), "--prompt", "w5 w6"])
    assert said.exit_code == 0 and "warning: the model ended at once; --chat" in said.stderr
    assert "w5" in said.stdout
    said = CliRunner().invoke(app, ["generate", str(tmp_path / "out"), "--prompt", "w5 w6", "--chat"])
    assert said.exit_code == 0 and not said.stdout.strip()
    said = CliRunner().invoke(app, ["generate", str(checkpoint / "out"), "--prompt", "w5 w6"])
    assert said.exit_code == 0 and "warning" not in said.stderr


def test_bench(checkpoint):
    options = (
        "--batch",
        1,
        "--batch",
        2,
        "--prompt-tokens",
        8,
        "--new-tokens",
        2,
        "--repeats",
        1,
        "--dtype",
        "float32",
    )
    found = json.loads(run("bench", checkpoint / "out", *options, "--json"))
    assert [(r["model"], r["batch"]) for r in found["results"]] == [
        ("lowbit", 1), ("unquantized", 1), ("lowbit", 2), ("unquantized", 2),
    ]  # fmt: skip
    assert found["results"][0]["weight_bytes"] < found["results"][1]["weight_bytes"]
    assert all(r["decode_tokens_per_second"] > 0 for r in found["results"])
    against = json.loads(
        run("bench", checkpoint / "out", "--against", checkpoint / "src", *options, "--json")
    )
    assert [r["weight_bytes"] for r in against["results"]] == [r["weight_bytes"] for r in found["results"]]
    assert "prefill tok/s" in run("bench", checkpoint / "out", *options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "absent", "--prompt", "w1"), "found nothing there"),
        (("generate", "out", "--prompt", "w1", "--dtype", "int3"), "--dtype"),
        (("generate", "out", "--prompt", "w1", "--device", "nonsense"), "torch cannot use it"),
        (("generate", "out", "--prompt", "w1", "--device", "meta"), "a device that computes"),
        (("generate", "out", "--prompt", "w1", "--temperature", "inf"), "a finite --temperature"),
        (("generate", "out", "--prompt", "w1", "--chat"), "chat template"),
        (("generate", "out", "--prompt", ""), "at least one token"),
        (("bench", "absent"), "found nothing there"),
    ],
)
def test_bad_input(checkpoint, arguments, message):
    command, name, *rest = arguments
    with pytest.raises(InputError, match=message):
        run(command, checkpoint / name, *rest)


def test_bad_usage():
    assert CliRunner().invoke(app, ["bench", "out", "--batch", "0"]).exit_code == 2


@pytest.mark.parametrize("option", [("--threads", 100_000), ("--seed", 2**64), ("--temperature", "nan")])
def test_numbers_that_torch_does_not_take(checkpoint, option):
    said = CliRunner().invoke(app, ["generate", str(checkpoint / "out"), "-p", "w1", *map(str, option)])
    # Which typer refuses a NaN by itself depends on its version.
    assert said.exit_code == 2 or isinstance(said.exception, InputError)


def test_a_temperature_of_nearly_nothing_is_the_likeliest_token(checkpoint):
    cold = run("generate", checkpoint / "out", "-p", "w5", "--temperature", 1e-40)
    assert cold == run("generate", checkpoint / "out", "-p", "w5")
