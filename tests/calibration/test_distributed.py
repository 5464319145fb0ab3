"""Workers that share the data, started by torchrun and by accelerate, write what one process writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import worker
from safetensors.torch import load_file
from typer.testing import CliRunner

from lowbit.calibration import distributed, store
from lowbit.calibration.distributed import balanced
from lowbit.cli import app
from lowbit.errors import InputError

LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc-per-node"),
    # `--cpu` would start one process, however many are asked for; the device is lowbit's own choice.
    "accelerate": (
        "accelerate.commands.launch", "--multi_gpu", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--num_machines", "1", "--main_process_port", "0", "--num_processes",
    ),
}  # fmt: skip


def launch(
    launcher: str, workers: int, *arguments: object, code: int = 0
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *LAUNCHERS[launcher], str(workers), *map(str, arguments)]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "PYTHONPATH": root},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == code, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def directory(checkpoints, windows, tmp_path_factory):
    """Two checkpoints and token ids, and what one process makes of them."""
    out = tmp_path_factory.mktemp("distributed")
    for name in ("qwen3", "qwen3_moe"):
        (out / name).symlink_to(checkpoints[name])
    torch.save(torch.stack(windows), out / "ids.pt")
    worker.calibrations(out)
    return out


@pytest.fixture(scope="module")
def by_torchrun(directory):
    """What two of torchrun's workers made of them. They also stop a search and go on with it, and leave their group."""
    launch("torchrun", 2, worker.__file__, directory, "calibrations,search,leaving")
    return (directory / "calibrations-2").rename(directory / "by-torchrun")


@pytest.fixture(scope="module")
def by_accelerate(by_torchrun, directory):
    launch("accelerate", 2, worker.__file__, directory, "calibrations")
    return (directory / "calibrations-2").rename(directory / "by-accelerate")


@pytest.mark.parametrize("launcher", list(LAUNCHERS))
def test_two_workers_write_what_one_writes(directory, launcher, request):
    two = request.getfixturevalue(f"by_{launcher}")
    for path in sorted((directory / "calibrations-1").iterdir()):
        _compare(store.read(path), store.read(two / path.name))


def _compare(one: store.Calibration, two: store.Calibration) -> None:
    assert two.complete and two.tensors.keys() == one.tensors.keys() and two.data == one.data
    sampled = one.method["smooth"] == "search"
    for layer, report in one.layers.items():
        _compare_experts(report, two.layers[layer], exactly=layer == "model.layers.0")
        near = 1e-5 if layer == "model.layers.0" else 1e-2  # later ones see codes that a last bit has flipped
        a, b = (load_file(c.path / report["file"]) for c in (one, two))
        for name in a:
            if name.endswith(("input_scale", "k_scale", "v_scale")) and not sampled:
                torch.testing.assert_close(b[name], a[name], rtol=near, atol=0)
        for module, entry in report["modules"].items():
            found = two.layers[layer]["modules"][module]
            if sampled and near > 1e-5:
                continue
            assert found.get("fallback") == entry.get("fallback")
            if "error" in entry:
                # For the searches other tokens are sampled; the errors are measured on all of them.
                assert found["error"] == pytest.approx(entry["error"], rel=0.3 if sampled else near), module


def _compare_experts(one: dict, two: dict, *, exactly: bool) -> None:
    """Counts are those of all workers' tokens; after the first layer a last bit may send a token elsewhere."""
    a, b = (r.get("experts", {}).get("mlp.experts", {}).get("tokens", []) for r in (one, two))
    assert sum(a) == sum(b) and (a == b or not exactly)


def test_merged_statistics_are_those_of_all_data_on_every_worker(tmp_path):
    launch("torchrun", 3, worker.__file__, tmp_path, "merging,rounding,refusal")
    found = torch.load(tmp_path / "merging-3.pt", weights_only=True)
    merged = worker.statistics_of(0)
    for rank in (1, 2):
        for name, s in worker.statistics_of(rank, empty=rank == 1).items():
            merged[name].merge(s)
    expected = worker._plain(merged)
    assert len(found) == 3
    for one in found:
        assert float(one.pop("average")) == 2.0
        assert one.keys() == expected.keys()
        for key, value in expected.items():
            if key[1] == "sample":
                assert len(one[key]) == len(value) and all(map(torch.equal, one[key], value))
            elif key[1] == "tokens":
                assert one[key] == value
            else:
                assert torch.equal(one[key], value), key
    worker.rounding(tmp_path)
    alone = torch.load(tmp_path / "rounding-1.pt", weights_only=True)[0]
    for codes, report in torch.load(tmp_path / "rounding-3.pt", weights_only=True):
        assert report == alone[1] and list(codes) == list(alone[0])
        for name, (code, scale) in alone[0].items():
            assert torch.equal(codes[name][0], code) and torch.equal(codes[name][1], scale)
    assert [(tmp_path / f"refusal-{r}.txt").read_text() for r in range(3)] == ["raised by 1"] * 3


def test_no_thread_of_the_group_outlives_it(directory, by_torchrun):
    assert (directory / "left-0").exists() and (directory / "left-1").exists()


def test_workers_go_on_with_a_search(directory, by_torchrun):
    found = json.loads((directory / "search-2.json").read_text())
    assert found["resumed"] == found["whole"] and found["ran"] == [1, 0]
    assert [f.name for f in (directory / "state").iterdir()] == ["search.json"]


def test_rounding_is_divided_by_its_cost():
    assert balanced([1, 1, 9, 3, 3], 2) == [1, 1, 0, 1, 1]
    assert balanced([5, 5, 5, 5], 4) == [0, 1, 2, 3]
    assert balanced([], 3) == []


def test_every_window_is_one_worker_s(monkeypatch):
    windows = [torch.tensor([i]) for i in range(7)]
    monkeypatch.setattr(distributed, "workers", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append([int(w) for w in distributed.my_share(windows)])
    assert sorted(i for share in shares for i in share) == list(range(7)) and [len(s) for s in shares] == [
        3,
        2,
        2,
    ]
    with pytest.raises(InputError, match="at least one sample per worker, found 2 for 3 workers"):
        distributed.my_share(windows[:2])
    assert not distributed.my_share([])  # methods that need no data


@pytest.fixture(scope="module")
def commands(source, tmp_path_factory):
    """A folder where two workers converted the source (`out`), and then ran commands in one process each."""
    folder = tmp_path_factory.mktemp("commands")
    data = ("--data", source.parent / "text.txt", "--samples", 6, "--length", 32)
    launched = launch(
        "torchrun", 2, "-m", "lowbit", "convert", source, folder / "out", "--method", "best", *data
    )
    (folder / "convert.txt").write_text(launched.stdout)
    one = ("--data", source.parent / "text.txt", "--samples", 1, "--length", 32)
    refused = ("calibrate", source, "-o", folder / "c", "-m", "gptq", *one)
    lines = [
        (("eval", folder / "out", "--reference", source, *data, "--json"), 0),
        (("search", source, *data, "-o", folder / "r.yaml", "--json"), 0),
        ((*refused, "--device", "cuda"), 2),
        ((*refused, "--device", "cpu"), 2),
    ]
    listed = [([str(word) for word in line], code) for line, code in lines]
    (folder / "commands.json").write_text(json.dumps(listed))
    (folder / "stderr.txt").write_text(
        launch("torchrun", 2, worker.__file__, folder, "commands", code=1).stderr
    )
    return folder


def test_commands_under_a_launcher(source, commands):
    # The calibration and the checkpoint, by one worker.
    assert (commands / "convert.txt").read_text().count("wrote") == 2
    data = ("--data", source.parent / "text.txt", "--samples", 6, "--length", 32)
    command = ("eval", commands / "out", "--reference", source, *data, "--json")
    alone = CliRunner().invoke(app, [str(word) for word in command])
    assert alone.exit_code == 0, alone.output
    one, two = json.loads(alone.stdout), json.loads((commands / "eval-0.txt").read_text())
    assert two["tokens"] == one["tokens"] == 6 * 31
    for key in ("perplexity", "kl", "top1_agreement"):
        assert two[key] == pytest.approx(one[key], rel=1e-3)
    assert two["layer_errors"] == pytest.approx(one["layer_errors"], rel=1e-3)
    assert json.loads((commands / "search-0.txt").read_text())["scheme"] in ("int8", "fp8")
    assert not (commands / "eval-1.txt").read_text() and not (commands / "search-1.txt").read_text()


def test_bad_input_ends_every_worker_with_code_2(commands):
    said = (commands / "stderr.txt").read_text()
    for message in (
        "expected device auto, cpu, found cuda",
        "expected at least one sample per worker, found 1 for 2 workers",
    ):
        assert said.count(message) == 2, said  # each worker says it
    assert "exitcode  : 2" in said
    assert not (commands / "c" / store.MANIFEST).exists()
