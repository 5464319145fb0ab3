"""The command line: exit codes, one JSON document, quiet pipes, and nothing heavy imported."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from sample_models import block_fp8, deepseek_v3, llama, load, write

import lowbit
from lowbit.checkpoint.headers import PARTIAL
from lowbit.cli import main
from lowbit.errors import InputError

LOWBIT = [sys.executable, "-c", "from lowbit.cli import main; main()"]


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory) -> None:
    """On a machine that has compiled no loops yet, the first command says on standard error that it does."""
    root = tmp_path_factory.mktemp("compiled")
    write(root / "src", *llama())
    lowbit.convert(root / "src", root / "out", "int8")
    lowbit.verify(root / "out", root / "src")


@pytest.fixture
def src(tmp_path) -> Path:
    return write(tmp_path / "src", *llama(), files={"tokenizer.json": "{}"})


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command in this process; (exit code, stdout, stderr)."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lowbit", *map(str, args)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def process(*args: object, **kw) -> subprocess.CompletedProcess:
    return subprocess.run([*LOWBIT, *map(str, args)], capture_output=True, text=True, timeout=120, **kw)


def test_convert_and_verify(run, src, tmp_path):
    code, out, err = run("convert", src, tmp_path / "out", "--scheme", "int8")
    assert code == 0 and err == ""
    assert "int8 as compressed-tensors: 14 weights to int8" in out and "GB/s" in out
    code, out, err = run("verify", tmp_path / "out", "--source", src)
    assert code == 0 and err == "" and out.rstrip().endswith("ok")
    assert "SQNR dB" in out and "median SQNR" in out
    assert load(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8


def test_nan_in_what_is_copied_is_a_warning(run, tmp_path):
    tensors, config = llama()
    norms = [n for n in tensors if n.endswith("norm.weight")]
    for name in norms:
        tensors[name][0] = torch.nan
    src = write(tmp_path / "src", tensors, config)
    code, out, err = run("convert", src, tmp_path / "out")
    assert code == 0 and "wrote" in out
    assert re.search(rf"^warning: .* and {len(norms) - 3} more: copied as found, with NaN or Inf", err)
    code, out, err = run("convert", src, tmp_path / "again", "--json")
    body = json.loads(out)
    assert code == 0 and sorted(body["not_finite"]) == sorted(norms)
    assert "copied as found" in body["warnings"][-1] and "copied as found" in err


def test_a_target_chooses_the_scheme(run, src, tmp_path):
    code, out, _ = run("plan", src, "--target", "h100")
    assert code == 0 and "fp8 as compressed-tensors" in out and "NVIDIA H100 SXM: fp8 is multiplied" in out
    code, out, _ = run("convert", src, tmp_path / "out", "-t", "a100", "--json")
    found = json.loads(out)
    assert (found["scheme"], found["target"]) == ("int8", "a100") and "624 TOP/s" in found["advice"]
    code, out, err = run(
        "convert", src, tmp_path / "o", "-t", "a100", "-s", "fp8-block", "--dry-run", "--json"
    )
    assert "does not multiply fp8" in err and "does not multiply fp8" in json.loads(out)["warnings"][-1]
    assert run("plan", src, "-t", "a100", "-s", "bf16")[0] == 0
    assert run("plan", src, "-t", "z80")[0] == 2
    assert "int8 as ascend" in run("plan", src, "-t", "ascend910b")[1]


@pytest.mark.parametrize("scheme", ["bf16", "fp8-block"])
def test_a_recipe_beside_a_target_has_its_own_scheme(run, src, tmp_path, scheme):
    (tmp_path / "r.yaml").write_text(f"scheme: {scheme}")
    for command in (["plan", src], ["convert", src, tmp_path / "o", "--dry-run"]):
        code, out, err = run(*command, "-t", "ascend910b", "--recipe", tmp_path / "r.yaml", "--json")
        assert code == 0, err
        assert json.loads(out)["scheme"] == scheme


def test_verify_of_links_that_lead_nowhere(run, src, tmp_path):
    """As in a hub's cache of which a part was removed."""
    out = tmp_path / "out"
    run("convert", src, out)
    (out / "more.safetensors").symlink_to("nowhere")
    code, said, _ = run("verify", out)
    assert code == 1 and "more.safetensors: not written by this conversion" in said
    (src / "model.safetensors").unlink()
    (src / "model.safetensors").symlink_to("nowhere")
    code, _, err = run("verify", out, "--source", src)
    assert code == 2 and "model.safetensors: cannot be read" in err


def test_verify_exits_with_1_when_something_is_wrong(run, src, tmp_path):
    run("convert", src, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    code, out, _ = run("verify", tmp_path / "out")
    assert code == 1 and "problem: " in out and "checksum differs" in out and "1 problems" in out
    code, out, _ = run("verify", tmp_path / "out", "--json")
    assert code == 1 and json.loads(out)["ok"] is False
    file.write_bytes(raw[:-100])
    code, out, _ = run("verify", tmp_path / "out")
    assert code == 1 and "truncated" in out


BAD = {
    "no source": ["convert", "{none}", "{out}"],
    "unknown scheme": ["convert", "{src}", "{out}", "--scheme", "int5"],
    "unknown format": ["convert", "{src}", "{out}", "--format", "gguf"],
    "empty scheme": ["convert", "{src}", "{out}", "--scheme", ""],  # a variable that is not set
    "empty format": ["convert", "{src}", "{out}", "--format", ""],
    "out too long": ["convert", "{src}", "{out}" + 300 * "x"],
    "source too long": ["plan", "{none}" + 300 * "x"],
    "format cannot hold it": ["convert", "{src}", "{out}", "--format", "fp8"],
    "inside the source": ["convert", "{src}", "{src}/out"],
    "no size": ["convert", "{src}", "{out}", "--max-shard-size", "many"],
    "pattern": ["convert", "{src}", "{out}", "--ignore", "re:("],
    "plan": ["plan", "{none}"],
    "inspect": ["inspect", "{none}"],
    "verify": ["verify", "{none}"],
    "verify source": ["verify", "{src}", "--source", "{none}"],
}


@pytest.mark.parametrize("command", BAD.values(), ids=BAD)
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_bad_input_is_one_line_and_exit_code_2(run, src, tmp_path, command, as_json):
    places = {"src": src, "out": tmp_path / "out", "none": tmp_path / "nowhere"}
    arguments = [c.format(**places) for c in command] + ["--json"] * as_json
    code, out, err = run(*arguments)
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1
    if as_json:
        assert json.loads(out) == {"error": err.removeprefix("error: ").rstrip("\n")}
    else:
        assert "wrote" not in out
    assert not (tmp_path / "out").exists() and not (src / "out").exists()


def test_of_several_workers_the_first_writes_the_document(run, tmp_path, monkeypatch):
    for rank, expected in (("0", '"error"'), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        for arguments in (["inspect", tmp_path / "nowhere"], ["nonsense"]):
            code, out, err = run(*arguments, "--json")
            assert code == 2 and err and bool(out) == bool(expected) and expected in out


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert"],
        ["convert", "a", "b", "--nope"],
        ["convert", "a", "b", "--workers", "0"],
        ["nonsense"],
        ["verify", "a", "--top", "x"],
        ["plan", ""],
    ],
)
def test_bad_usage_is_exit_code_2_and_still_a_document(run, arguments):
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and err
    code, out, err = run(*arguments, "--json")
    assert code == 2 and "error" in json.loads(out) and err


@pytest.mark.parametrize("command", ["convert", "dry run", "plan", "inspect", "verify"])
def test_json_is_a_single_document(run, src, tmp_path, command):
    out = tmp_path / "out"
    if command == "verify":
        run("convert", src, out)
    arguments = {
        "convert": ["convert", src, out, "--ignore", "typo"],
        "dry run": ["convert", src, out, "--dry-run", "--ignore", "typo"],
        "plan": ["plan", src, "--ignore", "typo"],
        "inspect": ["inspect", src],
        "verify": ["verify", out, "--source", src],
    }[command]
    code, text, err = run(*arguments, "--json")
    body = json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert code == 0
    if "typo" in arguments:
        assert body["warnings"] == ["pattern 'typo' matches no module; `lowbit plan` lists their names"]
        assert err == "warning: " + body["warnings"][0] + "\n"
        assert body["scheme"] == "int8" and body["quantized"] == {"int8": 14}
    expected = {
        "convert": {"out", "seconds", "resumed_jobs", "gb_per_second", "bytes_before", "bytes_after", "plan"},
        "dry run": {"dry_run", "bytes_after"},
        "plan": {"modules", "files"},
        "inspect": {"architecture", "parameters", "roles", "dtypes", "odd"},
        "verify": {"ok", "problems", "errors", "checked"},
    }[command]
    assert expected <= set(body)


@pytest.mark.parametrize("out", [".", "../here", "../here/x/.."])
def test_a_calibration_lies_beside_the_output_whatever_that_is_called(run, src, tmp_path, monkeypatch, out):
    def calibrate(source, directory, *args, **kw):
        raise InputError(f"into {directory.resolve()}")

    (tmp_path / "here" / "x").mkdir(parents=True)
    (tmp_path / "here" / "config.json").touch()  # a checkpoint, to be replaced
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("lowbit.cli.calibrate.run_recipe", calibrate)
    command = ("convert", src, out, "--method", "best", "--data", src / "config.json", "--overwrite")
    code, _, err = run(*command)
    assert code == 2 and f"into {tmp_path / 'here.calibration'}" in err


def test_a_dry_run_writes_nothing(run, src, tmp_path):
    before = sorted(p for p in tmp_path.rglob("*"))
    code, out, _ = run("convert", src, tmp_path / "a" / "out", "--dry-run")
    assert code == 0 and "dry run:" in out
    assert sorted(p for p in tmp_path.rglob("*")) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    assert run("convert", src, tmp_path / "full", "--dry-run")[0] == 2


def test_plan_counts_why_without_the_names_of_modules(run, tmp_path):
    """A recipe of `search` names every module that it means: it was a line for each."""
    src = write(tmp_path / "src", *block_fp8(*deepseek_v3()))
    names = [n for n, d in lowbit.plan(src, "int8").decisions.items() if d.scheme]
    asked = {n: "fp8" for n in names if ".layers.0.self_attn" in n} | {"model.layers.0.mlp": "float"}
    (tmp_path / "r.json").write_text(json.dumps({"scheme": "int8", "overrides": asked}))
    code, out, _ = run("plan", src, "--recipe", tmp_path / "r.json")
    assert code == 0
    counted = out.partition("why, counted in tensors:")[2]
    assert f" {len(asked) - 1}  override of its name\n" in counted
    assert " 3  override model.layers.0.mlp: float\n" in counted and "0.self_attn" not in counted
    many = [f"re:.*layers\\.1\\.mlp\\.experts\\.{i}\\..*" for i in range(4)] + names[:30]
    options = [word for pattern in many for word in ("--ignore", pattern)]
    _, out, _ = run("plan", src, *options)
    counted = out.partition("why, counted in tensors:\n")[2].splitlines()
    assert "other reasons, which the table says" in counted[20] and "→" in counted[21]


def test_plan_says_why(run, tmp_path):
    src = write(tmp_path / "src", *block_fp8(*deepseek_v3()))
    code, out, _ = run("plan", src, "--scheme", "int8", "--keep", "*.shared_experts.*")
    assert code == 0
    line = next(x for x in out.splitlines() if x.startswith("model.layers.1.mlp.gate.weight"))
    assert "router" in line and "4×128" in line
    assert "--keep *.shared_experts.*" in out and "output head" in out
    # Not of modules, which the line before counts: a module may have several tensors.
    _, _, counted = out.partition("modules kept\nwhy, counted in tensors:\n")
    assert any(line.endswith("  output head") for line in counted.splitlines())
    body = json.loads(run("plan", src, "--json")[1])
    rows = {m["name"]: m for m in body["modules"]}
    decisions = lowbit.plan(src, "int8").decisions
    for name, row in rows.items():
        decision = decisions.get(name.removesuffix(".weight"))
        if decision is not None:
            assert row["why"] == decision.reason
        assert row["why"] or row["after"].startswith("int8")
    assert rows["model.layers.1.mlp.experts.0.up_proj.weight"]["before"] == "F8_E4M3"
    assert sum(m["bytes_before"] for m in body["modules"]) == body["bytes_before"]


def test_inspect_says_what_it_is(run, tmp_path):
    src = write(tmp_path / "src", *deepseek_v3())
    code, out, _ = run("inspect", src)
    assert code == 0
    assert "DeepseekV3ForCausalLM (deepseek_v3)" in out and "4 routed experts" in out
    assert "odd: " in out and "quantization: none" in out


def test_overwrite_and_refusal(run, src, tmp_path):
    assert run("convert", src, tmp_path / "out")[0] == 0
    code, _, err = run("convert", src, tmp_path / "out", "--scheme", "fp8")
    assert code == 2 and "give --overwrite" in err
    assert run("convert", src, tmp_path / "out", "--scheme", "fp8", "--overwrite")[0] == 0
    assert load(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"].dtype == torch.float8_e4m3fn


# --- in a process of its own ------------------------------------------------------------------


def test_help_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys, time\nbegin = time.process_time()\nfrom lowbit.cli import main\n"
        "sys.argv = ['lowbit', '--help']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'numba', 'numpy', 'transformers', 'triton', 'safetensors', 'xxhash'} & set(sys.modules)\n"
        "print(time.process_time() - begin, sorted(heavy), file=sys.stderr)\n"
    )
    times = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        seconds, _, heavy = done.stderr.strip().partition(" ")
        assert heavy == "[]" and "Exit codes: 0 done, 1 a check failed, 2 bad input" in done.stdout
        times.append(float(seconds))
    assert min(times) < 0.4


@pytest.mark.parametrize("command", ["convert", "plan", "inspect", "verify"])
def test_converting_loads_no_torch(src, tmp_path, command):
    lowbit.convert(src, tmp_path / "done", "int8")
    arguments = {
        "convert": ["convert", str(src), str(tmp_path / "out")],
        "plan": ["plan", str(src)],
        "inspect": ["inspect", str(src)],
        "verify": ["verify", str(tmp_path / "done"), "--source", str(src)],
    }[command]
    heavy = {"torch", "transformers", "triton"} | ({"numba"} if command in ("plan", "inspect") else set())
    code = (
        f"import sys\nfrom lowbit.cli import main\nsys.argv = ['lowbit', *{arguments!r}]\n"
        "try: main()\nexcept SystemExit as stop: assert not stop.code\n"
        f"print(sorted({heavy!r} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.strip() == "[]", done.stderr


def test_pipes_are_quiet_and_terminals_have_a_bar(src, tmp_path):
    done = process("convert", src, tmp_path / "a")
    assert (
        done.returncode == 0 and done.stderr == "" and "\r" not in done.stdout and "\x1b" not in done.stdout
    )
    leader, follower = pty.openpty()
    shown = subprocess.Popen(
        [*LOWBIT, "convert", str(src), str(tmp_path / "b")], stdout=subprocess.PIPE, stderr=follower
    )
    os.close(follower)
    text = b""
    try:
        while part := os.read(leader, 4096):
            text += part
    except OSError:  # the other end is closed
        pass
    os.close(leader)
    assert shown.wait(60) == 0
    assert b"converting" in text and b"B/s" in text


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_output_in_any_encoding(tmp_path, encoding):
    src = write(tmp_path / "src", *llama(), files={"\u2603 \udcff.txt": "x"})
    for command in ("plan", "inspect"):
        for options in ([], ["--json"]):
            environment = {**os.environ, "PYTHONIOENCODING": f"{encoding}:strict"}
            done = process(command, src, *options, env=environment)
            assert done.returncode == 0, done.stderr
            if options:
                json.loads(done.stdout)


def test_version_and_help_of_every_command(run):
    assert run("--version")[:2] == (0, f"lowbit {lowbit.__version__}\n")
    commands = ("convert", "plan", "inspect", "verify", "calibrate", "eval", "search", "generate", "bench")
    for command in (*commands, "kernels explain", "kernels compile"):
        code, out, _ = run(*command.split(), "--help")
        assert code == 0 and "--json" in out
        assert not re.search(r"\d{10}", out)  # no ends of a range that nobody reaches


@pytest.mark.parametrize(
    "given", ["calibrate SRC", "eval OUT --data t", "search SRC --data t", "generate OUT -p w"]
)
def test_a_seed_that_torch_does_not_take(run, given):
    code, _, err = run(*given.split(), "--seed", 2**63)
    assert code == 2 and "expected a seed of 64 bits, found 9223372036854775808" in err


def test_ctrl_c_says_how_to_go_on(tmp_path):
    src = write(tmp_path / "src", *llama(layers=8))
    out = tmp_path / "out"
    code = (
        "import sys, time\nfrom lowbit.checkpoint import execute\nwrite = execute.Worker._write\n"
        "def slow(*a):\n    write(*a)\n    time.sleep(0.05)\n"
        "execute.Worker._write = slow\nfrom lowbit.cli import main\n"
        f"sys.argv = ['lowbit', 'convert', {str(src)!r}, {str(out)!r}, '--workers', '1', '--json']\nmain()\n"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
    )  # fmt: skip
    deadline = time.monotonic() + 60
    journal = out / PARTIAL / "journal.jsonl"
    while not journal.is_file() or len(journal.read_text().splitlines()) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    said, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "run the same command again to go on from here" in err and "Traceback" not in err
    assert json.loads(said)["error"].startswith("stopped; run the same command")
    done = process("convert", src, out)
    assert done.returncode == 0 and "resumed: " in done.stdout


def test_output_that_nobody_reads_to_the_end(tmp_path):
    src = write(tmp_path / "src", *llama(layers=40, hidden=64, intermediate=64))
    pipe = subprocess.Popen([*LOWBIT, "plan", str(src)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert pipe.stdout is not None and pipe.stderr is not None
    pipe.stdout.read(10)
    pipe.stdout.close()
    assert b"Traceback" not in pipe.stderr.read()
    pipe.wait(60)


def test_an_empty_path_is_not_the_current_directory(run, src, tmp_path, monkeypatch):
    """Of a variable that is not set; with --overwrite the checkpoint there was lost."""
    lowbit.convert(src, tmp_path / "old", "fp8")
    monkeypatch.chdir(tmp_path / "old")
    for arguments in ([src, ""], ["", tmp_path / "out"]):
        code, out, err = run("convert", *arguments, "--overwrite")
        assert code == 2 and out == "" and "expected a path, found nothing" in err
    assert lowbit.verify(tmp_path / "old", src).ok and not (tmp_path / "out").exists()
    code, out, err = run("convert", src, ".", "--overwrite")
    assert code == 0
    assert json.loads(Path("config.json").read_text())["quantization_config"]["format"] == "int-quantized"


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_standard_streams_that_are_closed(src, tmp_path, closed):
    def close():
        os.close(closed)

    out = tmp_path / "out"
    done = subprocess.run([*LOWBIT, "convert", str(src), str(out)], preexec_fn=close, check=False)
    assert done.returncode == 0 and lowbit.verify(out, src).ok
    done = subprocess.run([*LOWBIT, "convert", str(src), str(out)], preexec_fn=close, check=False)
    assert done.returncode == 2


EMPTY = {
    "convert": ["SRC", "OUT", "--calibration", "--recipe", "--data"],
    "plan": ["SRC", "--calibration", "--recipe"],
    "inspect": ["PATH"],
    "verify": ["OUT", "--source"],
    "calibrate": ["SRC", "--out", "--data", "--recipe", "--spill"],
    "eval": ["OUT", "--data", "--reference", "--calibration"],
    "search": ["SRC", "--data", "--out"],
    "generate": ["OUT"],
    "bench": ["OUT", "--against"],
}


@pytest.mark.parametrize(("command", "which"), [(c, w) for c, of in EMPTY.items() for w in of])
def test_an_empty_path_is_of_a_variable_that_is_not_set(run, command, which):
    """`--data "$TEXT"` read the texts of the current directory."""
    places = [w for w in EMPTY[command] if not w.startswith("-")]
    options = [] if which in places else [which, ""]
    needed = {"eval": ["--data", "x"], "search": ["--data", "x"], "generate": ["--prompt", "x"]}.get(
        command, []
    )
    needed = [] if which in needed else needed
    code, out, err = run(command, *("" if w == which else "x" for w in places), *options, *needed)
    assert code == 2 and out == "" and "expected a path, found nothing" in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("command", ["plan", "inspect"])
def test_json_where_nothing_can_be_written(src, command):
    """It was a traceback, of the message that says so."""
    with Path("/dev/full").open("w") as full:
        given = [*LOWBIT, command, str(src), "--json"]
        env = os.environ | {"PYTHONUNBUFFERED": "1"}
        done = subprocess.run(given, stdout=full, stderr=subprocess.PIPE, text=True, env=env)
    assert done.returncode == 2 and done.stderr == "error: [Errno 28] No space left on device\n"
