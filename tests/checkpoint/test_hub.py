"""Sources on the Hub, through huggingface_hub's own client and a server that speaks its protocol."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from conversions import FILES as OTHERS
from conversions import everything
from hub_server import COMMIT, Hub, serve
from huggingface_hub import constants
from sample_models import block_fp8, deepseek_v3, fused_mixture, llama, write
from typer.testing import CliRunner

import lowbit
from lowbit.checkpoint import hub as hub_module
from lowbit.checkpoint.headers import MANIFEST, PARTIAL
from lowbit.checkpoint.hub import Repository, open_source
from lowbit.checkpoint.opening import repository_named
from lowbit.checkpoint.parts import Part
from lowbit.cli import app
from lowbit.engines import supply
from lowbit.errors import InputError

NAME = "org/model"
FILES = {**OTHERS, "README.md": "what it is"}
SHARDS = 6


@pytest.fixture
def remote(tmp_path, monkeypatch):
    with serve(tmp_path / "remote") as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.address)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            served.address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        yield served


@pytest.fixture
def model(remote) -> Path:
    """A DeepSeek in block FP8, of which a module's codes and scales lie in different shards."""
    return write(
        remote.root / NAME, *block_fp8(*deepseek_v3()), files=FILES, place=lambda n: hash_of(n) % SHARDS
    )


def hash_of(name: str) -> int:
    return sum(name.encode())


def shards_of(model: Path) -> list[str]:
    return sorted(f.name for f in model.glob("*.safetensors"))


def outside(remote: Hub, tmp_path: Path) -> dict[str, str]:
    """The environment of a process of its own."""
    home = {"HF_ENDPOINT": remote.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    return {**os.environ, **home}


def stand_in(tmp_path: Path, name: str = NAME) -> Path:
    return tmp_path / "home" / "lowbit" / f"models--{name.replace('/', '--')}" / COMMIT


def whole(model: Path, tmp_path: Path) -> list[str]:
    """Shards that are here, all of them."""
    here = stand_in(tmp_path)
    return [s for s in shards_of(model) if (here / s).stat().st_size == (model / s).stat().st_size]


def fetched(remote: Hub, model: Path) -> dict[str, int]:
    """Shard → how often all of it was sent."""
    return {s: remote.sent(f"{NAME}/{s}").count("") for s in shards_of(model)}


def but_the_manifest(root: Path) -> dict[str, bytes]:
    return {name: data for name, data in everything(root).items() if name != MANIFEST}


def as_from_here(model: Path, tmp_path: Path, scheme: str = "int8", **more) -> dict[str, bytes]:
    lowbit.convert(model, tmp_path / "local", scheme, **more)
    return but_the_manifest(tmp_path / "local")


MODELS = {
    "block-fp8": lambda: block_fp8(*deepseek_v3()),
    "dense": llama,
    "fused-experts": lambda: fused_mixture("qwen3.5")[::2],
}


@pytest.mark.parametrize("scheme", ["int8", "mxfp8", "bf16", "int8-block"])
@pytest.mark.parametrize("kind", MODELS)
def test_what_a_download_becomes(kind, scheme, remote, tmp_path):
    model = write(remote.root / NAME, *MODELS[kind](), files=FILES, place=lambda n: hash_of(n) % SHARDS)
    done = lowbit.convert(NAME, tmp_path / "out", scheme)
    assert but_the_manifest(tmp_path / "out") == as_from_here(model, tmp_path, scheme)
    assert fetched(remote, model) == dict.fromkeys(shards_of(model), 1)
    assert done.manifest["source"]["path"] == f"{NAME}@{COMMIT}"
    assert lowbit.verify(tmp_path / "out", model).ok
    # What is left takes no room.
    assert not whole(model, tmp_path)
    left = sum(f.stat().st_size for f in stand_in(tmp_path).rglob("*.safetensors"))
    assert left < sum((model / s).stat().st_size for s in shards_of(model)) / 3


def test_plan_and_inspect_fetch_headers_alone(model, remote, tmp_path):
    plan, here = lowbit.plan(NAME, "int8"), lowbit.plan(model, "int8")
    assert [s.header for s in plan.shards] == [s.header for s in here.shards]
    assert plan.source.name == f"{NAME}@{COMMIT}"
    found = lowbit.inspect(NAME)
    assert found.path == f"{NAME}@{COMMIT}"
    assert {**found.to_dict(), "path": ""} == {**lowbit.inspect(model).to_dict(), "path": ""}
    for shard in shards_of(model):
        asked = remote.sent(f"{NAME}/{shard}")
        assert len(asked) == 1 and asked[0].startswith("bytes=0-"), "once, for both commands"
    assert not any(path.endswith(("README.md", "modeling.py")) for _, path, _ in remote.requests)
    assert not whole(model, tmp_path)


def test_long_headers_take_a_second_request(model, remote, monkeypatch):
    monkeypatch.setattr(hub_module, "_HEAD_BYTES", 100)
    assert lowbit.plan(NAME, "int8").digest()
    for shard in shards_of(model):
        first, second = remote.sent(f"{NAME}/{shard}")
        assert first == "bytes=0-99" and second.startswith("bytes=100-")


def test_a_server_that_knows_no_ranges(model, remote, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_module, "_HEAD_BYTES", 100)
    remote.broken = dict.fromkeys(shards_of(model), "all")
    lowbit.convert(NAME, tmp_path / "out", "int8")
    assert but_the_manifest(tmp_path / "out") == as_from_here(model, tmp_path)


def test_few_shards_are_here_at_a_time(remote, tmp_path):
    model = write(
        remote.root / NAME, *llama(layers=12), place=lambda n: int(n.split(".")[2]) if ".layers." in n else 0
    )
    most = []

    def look(count: int) -> None:
        time.sleep(0.03)  # so that more would come, if more were asked for
        most.append(len(whole(model, tmp_path)))

    lowbit.convert(NAME, tmp_path / "out", "int8", workers=2, progress=look)
    # Those ahead, and one or two that a job insisted on, of which some may be done but not yet cut off.
    assert len(shards_of(model)) == 12
    assert 1 <= max(most) <= supply.AHEAD + 2
    assert not whole(model, tmp_path)


def test_weights_that_nobody_fetched_are_an_error(model, remote, tmp_path, monkeypatch):
    """Whatever goes wrong with fetching: never zeros."""
    monkeypatch.setattr(supply.Supply, "ready", lambda self, job, cancelled: contextlib.nullcontext())
    monkeypatch.setattr(supply.Supply, "_look_ahead", lambda self: None)
    with pytest.raises(InputError, match="the file ended"):
        lowbit.convert(NAME, tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("broken", ["503", "404", "cut"])
def test_what_cannot_be_fetched_keeps_what_was_written(broken, model, remote, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's own tries
    last = shards_of(model)[-1]
    open_source(NAME)
    remote.broken[last] = broken
    with pytest.raises(InputError, match=rf"{NAME}/{last}: cannot be fetched: .*stays; check the network"):
        lowbit.convert(NAME, tmp_path / "out", "int8", workers=1)
    assert (tmp_path / "out" / PARTIAL).is_dir()
    assert not (tmp_path / "out" / "config.json").exists()
    remote.broken.clear()
    done = lowbit.convert(NAME, tmp_path / "out", "int8")
    assert done.resumed_jobs > 0
    assert but_the_manifest(tmp_path / "out") == as_from_here(model, tmp_path)


def test_data_of_another_checksum_is_not_used(model, remote, tmp_path):
    last = shards_of(model)[-1]
    remote.broken[last] = "flip"
    with pytest.raises(InputError, match="not what the Hub names"):
        lowbit.convert(NAME, tmp_path / "out", "int8")
    assert last not in whole(model, tmp_path)
    remote.broken.clear()
    lowbit.convert(NAME, tmp_path / "out", "int8")
    assert but_the_manifest(tmp_path / "out") == as_from_here(model, tmp_path)


KILLED = """
import sys, lowbit
print("ready", flush=True)
lowbit.convert(sys.argv[1], sys.argv[2], "int8", workers=1, max_shard_size="200KB")
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_goes_on(how, model, remote, tmp_path):
    open_source(NAME)
    remote.slow = 0.3
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, NAME, str(tmp_path / "out")],
        env=outside(remote, tmp_path), stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while sum(fetched(remote, model).values()) < 4:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    began = time.monotonic()
    process.send_signal(how)
    process.wait(60)
    assert time.monotonic() - began < 5, "it waits for no download"
    remote.slow = 0
    lowbit.convert(NAME, tmp_path / "out", "int8", max_shard_size="200KB")
    assert but_the_manifest(tmp_path / "out") == as_from_here(model, tmp_path, max_shard_size="200KB")
    arriving = list(stand_in(tmp_path).glob(hub_module._ARRIVING + "*"))
    assert not arriving, "what the killed run had begun is removed"


def test_what_is_converted_is_not_fetched_again(model, remote, tmp_path):
    last = shards_of(model)[-1]
    open_source(NAME)
    remote.broken[last] = "flip"
    with pytest.raises(InputError):
        lowbit.convert(NAME, tmp_path / "out", "int8", workers=1)
    kept = whole(model, tmp_path)
    remote.broken.clear()
    remote.requests.clear()
    lowbit.convert(NAME, tmp_path / "out", "int8")
    again = fetched(remote, model)
    assert again[last] == 1
    assert kept and all(again[s] == 0 for s in kept)


def test_two_machines_with_one_home(model, remote, tmp_path):
    """Parts of one conversion, and a second conversion, at the same time from one stand-in."""
    remote.slow = 0.01
    expected = as_from_here(model, tmp_path, max_shard_size="200KB")
    errors: list[Exception] = []

    def run(out: str, part: str, scheme: str) -> None:
        try:
            lowbit.convert(
                NAME, tmp_path / out, scheme, part=Part.parse(part), max_shard_size="200KB", workers=1
            )
        except Exception as error:
            errors.append(error)

    runs = [("out", "1/2", "int8"), ("out", "2/2", "int8"), ("other", "1/1", "fp8")]
    threads = [threading.Thread(target=run, args=arguments) for arguments in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert but_the_manifest(tmp_path / "out") == expected
    assert but_the_manifest(tmp_path / "other") == as_from_here(
        model, tmp_path / "8", "fp8", max_shard_size="200KB"
    )
    assert not whole(model, tmp_path)


def test_machines_that_begin_together(model, remote, tmp_path):
    """Each makes the stand-in, and may find files that another has fetched already."""
    open_source(NAME)
    first = stand_in(tmp_path) / shards_of(model)[0]
    header = first.read_bytes()
    shutil.copy(model / first.name, first)
    hub_module._fetch_head(open_source(NAME).repository, first)
    assert first.read_bytes() != header, "what is whole stays whole"
    assert not list(first.parent.glob(f".{first.name}*"))


def test_a_shard_that_another_run_reads_is_not_cut_off(model, remote, tmp_path):
    open_source(NAME)
    first = stand_in(tmp_path) / shards_of(model)[0]
    shutil.copy(model / first.name, first)
    with first.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        lowbit.convert(NAME, tmp_path / "out", "int8")
        assert whole(model, tmp_path) == [first.name]
    lowbit.convert(NAME, tmp_path / "out-2", "int8")
    assert not whole(model, tmp_path)


def test_the_hubs_own_cache_is_used_and_left_alone(model, remote, tmp_path):
    for name in (*shards_of(model)[:2], "tokenizer.json"):
        huggingface_hub.hf_hub_download(NAME, name, revision=COMMIT)
    before = everything(tmp_path / "home" / "hub")
    remote.requests.clear()
    lowbit.convert(NAME, tmp_path / "out", "int8")
    assert but_the_manifest(tmp_path / "out") == as_from_here(model, tmp_path)
    sent = fetched(remote, model)
    assert [sent[s] for s in shards_of(model)] == [0, 0, *[1] * (SHARDS - 2)]
    assert everything(tmp_path / "home" / "hub") == before


def test_a_download_of_before_serves_offline(model, remote, tmp_path, monkeypatch):
    huggingface_hub.snapshot_download(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    lowbit.convert(NAME, tmp_path / "out", "int8")
    assert but_the_manifest(tmp_path / "out") == as_from_here(model, tmp_path)


def test_too_little_space_is_said_before(model, remote, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"home.*expected 1 MB of free disk space.*set HF_HOME"):
        lowbit.convert(NAME, tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_while_fetching_keeps_what_was_written(model, remote, tmp_path, monkeypatch):
    open_source(NAME)
    last, rename = shards_of(model)[-1], Repository._fetch

    def full(self, file, name, told):
        if name == last:
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(self, file, name, told)

    monkeypatch.setattr(Repository, "_fetch", full)
    with pytest.raises(InputError, match=r"no space is left in .*HF_HOME.*stays"):
        lowbit.convert(NAME, tmp_path / "out", "int8", workers=1)
    monkeypatch.setattr(Repository, "_fetch", rename)
    assert lowbit.convert(NAME, tmp_path / "out", "int8").resumed_jobs > 0


def test_another_commit_is_another_source(model, remote, tmp_path):
    remote.broken[shards_of(model)[-1]] = "flip"
    with pytest.raises(InputError):
        lowbit.convert(NAME, tmp_path / "out", "int8")
    remote.broken.clear()
    first = open_source(NAME).fingerprint()
    # As large, with the same header: only what the Hub says of its contents differs.
    shard = model / shards_of(model)[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    remote.commit = "f" * 40
    assert open_source(NAME).fingerprint() != first
    with pytest.raises(InputError, match="unfinished conversion of another source"):
        lowbit.convert(NAME, tmp_path / "out", "int8")


def test_revisions(model, remote, tmp_path):
    assert lowbit.plan(f"{NAME}@main", "int8").digest() == lowbit.plan(f"{NAME}@{COMMIT}", "int8").digest()
    assert lowbit.plan(f"hf://{NAME}@{COMMIT}", "int8").digest() == lowbit.plan(NAME, "int8").digest()
    with pytest.raises(InputError, match=f"{NAME} without this revision"):
        lowbit.plan(f"{NAME}@v9", "int8")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("deepseek-ai/DeepSeek-V3", ("deepseek-ai/DeepSeek-V3", None)),
        ("org/model.v1_2@refs/pr/3", ("org/model.v1_2", "refs/pr/3")),
        ("hf://org/model@v1", ("org/model", "v1")),
        (Path("hf://org/model"), ("org/model", None)),
        ("model", None),
        ("/org/model", None),
        ("../org/model", None),
        ("./org/model", None),
        ("a/b/c", None),
        ("org/", None),
        ("here/model", None),
        ("here/there", None),
        ("hf://here/there", ("here/there", None)),
    ],
)  # fmt: skip
def test_names_of_repositories(text, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "there").mkdir(parents=True)
    assert repository_named(text) == expected


def test_a_directory_of_that_name_comes_first(model, remote, tmp_path, monkeypatch):
    monkeypatch.chdir(remote.root)
    assert lowbit.plan(NAME, "int8").source.repository is None
    assert not remote.requests


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        (f"{NAME}:401:GatedRepo", f"terms to accept: https://huggingface.co/{NAME}"),
        (f"{NAME}:401:RepoNotFound", "found neither.*hf auth login"),
        (f"{NAME}:404:RepoNotFound", "found neither"),
        (f"{NAME}:500:", "cannot be reached.*hf download org/model --local-dir"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "inspect", "convert"])
def test_models_that_cannot_be_had(command, gone, said, model, remote, tmp_path):
    remote.gone.add(gone)
    out = [str(tmp_path / "out")] if command == "convert" else []
    result = CliRunner().invoke(app, [command, NAME, *out], standalone_mode=False)
    assert isinstance(result.exception, InputError)
    assert re.search(said, str(result.exception)), result.exception
    assert not (tmp_path / "out").exists()


def test_nobody_answers(model, remote, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="cannot be reached"):
        lowbit.plan(NAME, "int8")


def test_no_model_is_made_of_other_files(remote, tmp_path):
    (remote.root / NAME).mkdir(parents=True)
    (remote.root / NAME / "config.json").write_text("{}")
    (remote.root / NAME / "pytorch_model.bin").write_bytes(b"x" * 1000)
    with pytest.raises(InputError, match=r"found pytorch_model.bin; pickle files"):
        lowbit.plan(NAME, "int8")
    assert (stand_in(tmp_path) / "pytorch_model.bin").stat().st_size == 0, "it was not fetched"


@pytest.mark.parametrize("evil", ["../../evil.json", "/evil.json", "a/../../evil.json"])
def test_names_that_leave_the_directory(evil, remote, tmp_path, monkeypatch):
    class Sibling:
        rfilename, size, lfs, blob_id = evil, 2, None, "00"

    class Info:
        sha, siblings = COMMIT, [Sibling()]

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **more: Info())
    with pytest.raises(InputError, match="do not trust it"):
        lowbit.plan(NAME, "int8")
    assert not list(tmp_path.rglob("evil.json"))


def test_damaged_headers_are_said_to_be(model, remote):
    shard = model / shards_of(model)[0]
    shard.write_bytes(b"\xff" * 4096)
    with pytest.raises(InputError, match="expected a header of at most"):
        lowbit.plan(NAME, "int8")


def test_weights_beside_the_model_are_carried_whole(remote, tmp_path):
    """Modules of sentence-transformers, and adapters, are loaded beside the weights."""
    model = write(remote.root / NAME, *llama(), files=FILES)
    (model / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
    (model / "2_Dense").mkdir()
    (model / "onnx").mkdir()
    for name in ("2_Dense/model.safetensors", "adapter_model.safetensors", "onnx/model.onnx"):
        (model / name).write_bytes((model / "model.safetensors").read_bytes())
    (model / "adapter_config.json").write_text("{}")
    lowbit.convert(NAME, tmp_path / "out", "int8")
    assert but_the_manifest(tmp_path / "out") == as_from_here(model, tmp_path)
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_size > 4096


def test_calibrating_and_running_download_all_of_it(remote, tmp_path):
    """Into the Hub's own cache, once; a conversion with a calibration reads it there."""
    model = write(remote.root / NAME, *llama(layers=1), place=lambda n: hash_of(n) % 2)
    (model / "pytorch_model.bin").write_bytes(b"x" * 1000)
    lowbit.calibrate(NAME, tmp_path / "calibration", "int8", method="rotate")
    lowbit.convert(NAME, tmp_path / "out", calibration=tmp_path / "calibration")
    lowbit.convert(model, tmp_path / "local", calibration=tmp_path / "calibration")
    assert but_the_manifest(tmp_path / "out") == but_the_manifest(tmp_path / "local")
    windows = [torch.arange(32)]
    found = lowbit.measure(tmp_path / "out", windows, reference=NAME).to_dict()
    assert found["kl"] == lowbit.measure(tmp_path / "out", windows, reference=model).to_dict()["kl"]
    lowbit.search(NAME, windows, budget=9)
    logits = lowbit.load(NAME)(torch.arange(8)[None]).logits
    torch.testing.assert_close(logits, lowbit.load(model)(torch.arange(8)[None]).logits, rtol=0, atol=0)
    assert lowbit.verify(tmp_path / "out", NAME).errors
    assert fetched(remote, model) == dict.fromkeys(shards_of(model), 1)
    assert not [path for _, path, _ in remote.requests if path.endswith(".bin")]


@pytest.mark.parametrize("command", ["convert", "verify", "eval", "generate", "bench"])
def test_commands_that_want_all_of_it(command, remote, tmp_path):
    model = write(remote.root / NAME, *llama())
    lowbit.convert(model, tmp_path / "out", "int8")
    out, text = str(tmp_path / "out"), tmp_path / "text.npy"
    np.save(text, np.arange(64) % 60)
    arguments = {
        "convert": [NAME, str(tmp_path / "new"), "--method", "rotate", "--json"],
        "verify": [out, "--source", NAME],
        "eval": [out, "--reference", NAME, "--data", str(text), "--length", "32"],
        "generate": [NAME, "--prompt", "x"],
        "bench": [NAME, "--prompt-tokens", "4", "--new-tokens", "2"],
    }[command]
    result = CliRunner().invoke(app, [command, *arguments], standalone_mode=False)
    if command in ("generate", "bench"):  # it has no tokenizer
        assert isinstance(result.exception, InputError) and "tokenizer" in str(result.exception)
    else:
        assert result.exception is None, result.output
    assert fetched(remote, model) == {"model.safetensors": 1}


@pytest.mark.parametrize(
    "call", [lowbit.load, lambda name: lowbit.calibrate(name, "calibration", method="rotate")]
)
def test_what_is_no_model_is_said_before_a_download(call, remote):
    (remote.root / NAME).mkdir(parents=True)
    (remote.root / NAME / "model.gguf").write_bytes(b"x" * 1000)
    with pytest.raises(InputError, match=r"expected .*safetensors files, found none"):
        call(NAME)
    with pytest.raises(InputError, match="found neither"):
        call("org/nothing")
    assert not [path for _, path, _ in remote.requests if path.endswith(".gguf")]


def test_a_failed_run_ends_its_downloads(remote, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 20)  # it is asked between chunks
    tensors, config = llama(hidden=512, intermediate=8192, layers=2)
    bad = "model.layers.0.self_attn.q_proj.weight"
    tensors[bad][0, 0] = float("nan")
    model = write(
        remote.root / NAME, tensors, config, place=lambda n: 0 if n == bad else 1 + ("layers.1" in n)
    )
    assert (model / shards_of(model)[2]).stat().st_size > 20e6
    open_source(NAME)
    remote.slow = 1  # so the first shard takes 1 s, and the others 25
    begin = time.monotonic()
    with pytest.raises(InputError, match="finite values"):
        lowbit.convert(NAME, tmp_path / "out", "int8", workers=2)
    assert time.monotonic() < begin + 15, "the other worker waited for its shard"
    while any(thread.name.startswith("lowbit-fetch") for thread in threading.enumerate()):
        assert time.monotonic() < begin + 20, "a download goes on"
        time.sleep(0.05)


def test_without_huggingface_hub(model, remote, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="pip install huggingface_hub"):
        lowbit.plan(NAME, "int8")


def test_the_command_line(model, remote, tmp_path):
    """In a process of its own, as a user has it."""
    done = subprocess.run(
        [sys.executable, "-m", "lowbit", "convert", NAME, str(tmp_path / "out"), "--json"],
        env=outside(remote, tmp_path), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert f'"source": "{NAME}@{COMMIT}"' in done.stdout
    assert done.stderr == "" or "compiling" in done.stderr
    assert but_the_manifest(tmp_path / "out") == as_from_here(model, tmp_path)
