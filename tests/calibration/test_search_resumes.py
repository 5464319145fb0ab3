"""A search that was killed goes on where it was, to the same result, and only if it is the same."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lowbit import quality
from lowbit.calibration import search as module
from lowbit.calibration.search import sensitivities
from lowbit.checkpoint.rules import Selection
from lowbit.cli import app
from lowbit.errors import InputError
from lowbit.recipe import load_recipe


@pytest.fixture
def stopped(checkpoints, windows, tmp_path, monkeypatch):
    """A search that was killed in the second layer that it measured, and the names of the layers that ran later."""
    gradient, ran = module._layer_gradient, []

    def dies(model, layer, *rest):
        ran.append(layer)
        if len({id(x) for x in ran}) == 2:
            raise KeyboardInterrupt
        return gradient(model, layer, *rest)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module, "_layer_gradient", dies)
        sensitivities(checkpoints["qwen3_moe"], windows, state=tmp_path / "s")
    later: list[tuple[str, int]] = []
    forward, costs = module._Sweep._forward, module._Sweep._costs
    monkeypatch.setattr(module._Sweep, "_forward", lambda s, i: later.append(("forward", i)) or forward(s, i))
    monkeypatch.setattr(module._Sweep, "_costs", lambda s, i, g: later.append(("back", i)) or costs(s, i, g))
    return tmp_path / "s", later


def test_a_killed_search_goes_on_to_the_same_result(checkpoints, windows, stopped):
    state, ran = stopped
    assert sorted(f.name for f in state.iterdir()) == ["gradient-00002-0.safetensors", "search.json"]
    resumed = sensitivities(checkpoints["qwen3_moe"], windows, state=state)
    assert ran == [("forward", 0), ("back", 1), ("back", 0)]
    assert resumed == sensitivities(checkpoints["qwen3_moe"], windows)
    assert [f.name for f in state.iterdir()] == ["search.json"]
    assert json.loads((state / "search.json").read_text())["complete"]
    ran.clear()
    assert resumed == sensitivities(checkpoints["qwen3_moe"], windows, state=state) and not ran


@pytest.mark.parametrize("damage", ["gone", "cut", "of another", "layers"])
def test_a_search_that_lost_its_files_begins_anew(checkpoints, windows, stopped, damage):
    state, ran = stopped
    file, manifest = state / "gradient-00002-0.safetensors", state / "search.json"
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "of another":
        save_file({k: v for k, v in load_file(file).items() if k != "0"}, file)
    else:
        said = json.loads(manifest.read_text())
        said["layers"] = {"model.layers.1": said["layers"]["model.layers.2"]}
        manifest.write_text(json.dumps(said))
    assert sensitivities(checkpoints["qwen3_moe"], windows, state=state) == sensitivities(
        checkpoints["qwen3_moe"], windows
    )
    assert ran[:4] == [("forward", 0), ("forward", 1), ("forward", 2), ("back", 2)]


def test_only_the_same_search_goes_on(checkpoints, windows, stopped):
    state, ran = stopped
    source = checkpoints["qwen3_moe"]
    for change, what in (
        ({"candidates": ["int8"]}, "candidates"),
        ({"selection": Selection(ignore=("*.o_proj",))}, "selection"),
        ({"windows": [w.flip(0) for w in windows]}, "data"),
        ({"seed": 1}, "seed"),
        ({"batch_size": 3}, "batch_size"),
        ({"source": checkpoints["qwen3"]}, "source"),
    ):
        with pytest.raises(InputError, match=rf"the same search in .*, found one with other {what};"):
            sensitivities(**{"source": source, "windows": windows, "state": state} | change)
    assert not ran
    other = [w.flip(0) for w in windows]
    found = sensitivities(source, other, state=state, overwrite=True)
    assert found == sensitivities(source, other)


def test_two_searches_in_one_place(checkpoints, windows, tmp_path, monkeypatch):
    costs = module._Sweep._costs

    def another(sweep, index, gradients):
        with pytest.raises(InputError, match="another search is writing here"):
            sensitivities(checkpoints["llama"], windows, state=tmp_path / "s")
        return costs(sweep, index, gradients)

    monkeypatch.setattr(module._Sweep, "_costs", another)
    assert sensitivities(checkpoints["llama"], windows, state=tmp_path / "s")


def test_a_search_that_has_measured_nothing_leaves_nothing(checkpoints, windows, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(InputError, match=r"a search in .*, found notes\.txt and no search\.json"):
        sensitivities(checkpoints["llama"], windows, state=tmp_path / "mine", overwrite=True)
    monkeypatch.setattr(module, "_head_gradient", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sensitivities(checkpoints["llama"], windows, state=tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_the_command_goes_on_and_chooses_again(source, tmp_path, monkeypatch):
    common = ("--data", source.parent / "text.txt", "--samples", 4, "--length", 32)
    of = {"data": source.parent / "text.txt", "samples": 4, "length": 32, "device": "cpu"}
    out = tmp_path / "new" / "r.yaml"

    def search(*options: object, code: int = 0) -> str:
        command = ["search", source, *common, "-o", out, *options]
        done = CliRunner().invoke(app, [str(a) for a in command])
        assert done.exit_code == code, (done.output, done.exception)
        return done.output

    costs = module._Sweep._costs

    def dies(sweep, index, gradients):
        if index == 1:
            raise KeyboardInterrupt
        return costs(sweep, index, gradients)

    with monkeypatch.context() as patched:
        patched.setattr(module._Sweep, "_costs", dies)
        search("--budget", 9, code=130)
    assert not out.exists()
    assert "resumed: 1 of 3 layers were done already" in search("--budget", 9)
    assert load_recipe(out) == quality.search(source, budget=9, **of)
    monkeypatch.setattr(module, "_layer_gradient", lambda *a: pytest.fail("measured again"))
    assert "resumed: 3 of 3" in search("--budget", 8.5, "--overwrite")
    assert load_recipe(out).notes["bits"] <= 8.5
