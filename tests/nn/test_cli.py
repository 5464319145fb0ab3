"""`lowbit generate` and `lowbit bench`."""

from __future__ import annotations

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import typer
from nn_reference import build
from transformers import (
    BertConfig,
    BertModel,
    MambaConfig,
    MambaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.utils import ModelOutput
from typer.testing import CliRunner

import lowbit
from lowbit.cli.bench import bench
from lowbit.cli.generate import generate
from lowbit.errors import InputError
from lowbit.nn import QuantLinear
from lowbit.nn.speed import _run, _words

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


def test_a_prompt_that_is_no_text(checkpoint):
    """What a terminal or `$(cat file)` gives in another encoding, which Python hands on as halves of characters."""
    latin, chinese = (b"w5 caf\xe9 w6".decode("utf-8", "surrogateescape"), "w5 \udce6\udcbc\udca2")
    for prompt, read in ((latin, "w5 caf\ufffd w6"), (chinese, "w5 漢")):
        found = json.loads(run("generate", checkpoint / "out", "-p", prompt, "--max-new-tokens", 2, "--json"))
        assert found["prompt"] == read


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
    short = ["generate", str(checkpoint / "out"), "--prompt", "w5 w6", "--max-new-tokens", "8"]
    said = CliRunner().invoke(app, short)
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


def other(model, checkpoint, out):
    """A float checkpoint of another architecture, with the tokenizer of the first."""
    model.eval().save_pretrained(out)
    for file in (checkpoint / "src").glob("tokenizer*"):
        shutil.copy(file, out)
    return out


SMALL = {"vocab_size": 96, "d_model": 32, "num_layers": 2, "num_heads": 2, "d_kv": 16, "d_ff": 64}


def test_a_decoder_with_an_encoder_begins_a_text_of_its_own(checkpoint, tmp_path):
    """The prompt is not the beginning of what it puts out: as many tokens were cut from that."""
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**SMALL, decoder_start_token_id=0, eos_token_id=None))
    model.generation_config.num_beams = 3  # of which no text can be shown as it is made
    path = other(model, checkpoint, tmp_path / "t5")
    found = json.loads(run("generate", path, "-p", "w5 w6 w7", "--max-new-tokens", 6, "--json"))
    with torch.no_grad():
        made = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False, num_beams=1)
    assert (found["prompt_tokens"], found["new_tokens"]) == (3, 6)
    assert found["text"].split() == [f"w{i}" for i in made[0, 1:].tolist()]
    shown = run("generate", path, "-p", "w5 w6 w7", "--max-new-tokens", 6)
    assert shown.split()[-6:] == found["text"].split()
    with pytest.raises(InputError, match="expected a decoder"):
        run("bench", path)


def test_models_that_do_not_go_on_from_text_are_named(checkpoint, tmp_path):
    bert = BertModel(BertConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    ))  # fmt: skip
    whisper = WhisperForConditionalGeneration(WhisperConfig(
        vocab_size=96, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=0, decoder_start_token_id=1,
    ))  # fmt: skip
    for model, message in ((bert, "BertModel, which does not"), (whisper, "which takes input_features")):
        path = other(model, checkpoint, tmp_path / type(model).__name__)
        against = ("bench", checkpoint / "out", "--against", path)
        for command in (("generate", path, "-p", "w1"), ("bench", path), against):
            with pytest.raises(InputError, match=message):
                run(*command)


@pytest.mark.parametrize("kind", ["vision-language", "mamba"])
def test_bench_of_what_sees_and_of_what_has_no_keys(kind, checkpoint, tmp_path):
    if kind == "mamba":
        model = MambaForCausalLM(
            MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, state_size=8)
        )
    else:
        model = build(kind)
    path = other(model, checkpoint, tmp_path / kind)
    options = ("--batch", 1, "--prompt-tokens", 200, "--new-tokens", 3, "--repeats", 1)
    found = json.loads(run("bench", path, *options, "--json"))
    assert all(r["decode_tokens_per_second"] > 0 for r in found["results"])


def test_no_pictures_are_promised_to_a_model_that_is_timed():
    config = build("vision-language").config
    words = _words({"one": SimpleNamespace(config=config)})
    assert config.image_token_index == 95
    assert 95 not in words and {3, 94} <= set(words.tolist())


@pytest.mark.parametrize("chat", [False, True])
def test_what_is_said_while_it_reads_the_prompt_has_a_line_of_its_own(
    checkpoint, tmp_path, monkeypatch, chat
):
    """Loops are compiled in the first forward, and that is said; it stood in the middle of the prompt's line."""
    shutil.copytree(checkpoint / "out", tmp_path / "out")
    (tmp_path / "out/chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %} w7")
    forward = QuantLinear.forward

    def first(self, x):
        if not said:
            said.append(print("compiling …", file=sys.stderr, flush=True))
        return forward(self, x)

    said: list[None] = []
    monkeypatch.setattr(QuantLinear, "forward", first)
    more = ["--chat"] * chat
    done = CliRunner().invoke(app, ["generate", str(tmp_path / "out"), "-p", "w5 w6", *more])
    assert done.output.startswith("compiling …\n" + ("w5 w6 " if not chat else "w"))
    assert ("w5 w6" in done.output) != chat


def test_what_was_read_is_handed_on_by_the_name_that_a_transformers_has_for_it():
    """5.24 takes it as `cache`, and the name of before with a warning until it is gone."""

    class Model(torch.nn.Linear):
        def forward(self, input_ids, cache=None, *, use_cache, logits_to_keep):
            seen.append(cache)
            return ModelOutput(logits=torch.zeros(1, 1, 4), cache=len(seen), past_key_values=len(seen))

    class Forgets(torch.nn.Linear):
        def forward(self, input_ids, *, use_cache, logits_to_keep):
            return ModelOutput(logits=torch.zeros(1, 1, 4))

    seen: list[int | None] = []
    tokens = torch.zeros(1, 3, dtype=torch.long)
    _run(Model(1, 1), tokens, tokens[:, :2])
    assert seen == [None, 1, 2]
    with pytest.raises(InputError, match="found none in what Forgets returns"):
        _run(Forgets(1, 1), tokens, tokens)
    rwkv = RwkvConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2)
    assert min(_run(RwkvForCausalLM(rwkv).eval(), tokens, tokens)) > 0


def test_texts_longer_than_a_model_was_made_for(checkpoint, tmp_path):
    learned = other(build("gpt2"), checkpoint, tmp_path / "gpt2")
    for command in (
        ("generate", learned, "-p", "w5 w6", "--max-new-tokens", 300),
        ("bench", learned, "--prompt-tokens", 300, "--new-tokens", 1, "--batch", 1),
    ):
        with pytest.raises(InputError, match="than the model has positions for, found 30"):
            run(*command)
    said = CliRunner().invoke(
        app, ["generate", str(checkpoint / "out"), "-p", "w5 w6", "--max-new-tokens", "90", "--json"]
    )
    beyond = json.loads(said.stdout)["new_tokens"] + 2 > 64
    assert said.exit_code == 0 and ("at most 64 tokens" in said.stderr) == beyond
    said = CliRunner().invoke(
        app, ["generate", str(checkpoint / "out"), "-p", "w5 " * 70, "--max-new-tokens", "1"]
    )
    assert said.exit_code == 0 and "warning: the model was made for texts of at most 64 tokens" in said.stderr


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


def test_bench_says_how_far_it_is(checkpoint, monkeypatch):
    """It was silent from start to end, a minute for a small model; and of texts longer than the model takes."""
    from lowbit.cli.output import Seldom

    monkeypatch.setattr(Seldom, "EVERY", 0.0)
    short = ("--prompt-tokens", 4, "--new-tokens", 2, "--repeats", 1, "--batch", 1, "--batch", 2)
    done = CliRunner().invoke(app, [str(a) for a in ("bench", checkpoint / "out", *short)])
    assert done.stderr.splitlines() == [
        f"measuring: {i} of 8, {('lowbit', 'unquantized')[i % 2]}, batch {1 + i // 4}" for i in range(8)
    ]
    positions = json.loads((checkpoint / "out" / "config.json").read_text())["max_position_embeddings"]
    long = ("--prompt-tokens", positions, "--new-tokens", 1, "--repeats", 1, "--batch", 1, "--json")
    done = CliRunner().invoke(app, [str(a) for a in ("bench", checkpoint / "out", *long)])
    said = f"warning: the model was made for texts of at most {positions} tokens; speeds for longer ones mean little\n"
    assert done.stderr == said and json.loads(done.stdout)["results"]
