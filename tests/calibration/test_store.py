"""The calibration directory: what is written is what is read, and damage is named."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from lowbit.calibration import store

SETTINGS = {
    "scheme": "int8",
    "method": {"name": "gptq"},
    "data": {"samples": 2},
    "source": {"fingerprint": "f"},
}


def layer(i: int = 0) -> dict[str, torch.Tensor]:
    module = f"model.layers.{i}.mlp.down_proj"
    return {
        f"{module}.weight": torch.randint(-127, 128, (4, 6), dtype=torch.int8),
        f"{module}.weight_scale": torch.rand(4, 1),
        f"{module}.bias": torch.rand(4, dtype=torch.bfloat16),
        f"model.layers.{i}.input_layernorm.weight": torch.ones(6, dtype=torch.bfloat16),
    }


def test_round_trip(tmp_path):
    writer = store.Writer(tmp_path, SETTINGS)
    tensors = layer()
    writer.write("model.layers.0", tensors, {"error": 0.5})
    calibration = store.read(tmp_path)
    assert not calibration.complete
    with pytest.raises(store.CalibrationError, match="resumes where it stopped"):
        calibration.require()
    writer.finish(config_overrides={"tie_word_embeddings": False})
    calibration = store.read(tmp_path)
    calibration.require(fingerprint="f", scheme="int8")
    assert calibration.config_overrides == {"tie_word_embeddings": False}
    assert calibration.modules() == ["model.layers.0.mlp.down_proj"]
    assert calibration.layers["model.layers.0"]["error"] == 0.5
    codes = calibration.codes("model.layers.0.mlp.down_proj")
    assert codes is not None and codes.dtype == "I8" and codes.shape == (4, 6)
    raw = codes.file.read_bytes()[codes.start : codes.start + codes.nbytes]
    expected = tensors["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(torch.frombuffer(bytearray(raw), dtype=torch.int8).view(4, 6), expected)
    assert calibration.floats() == [
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.mlp.down_proj.bias",
    ]


def test_others_may_read_it_as_they_may_the_manifest(tmp_path):
    file = store.Writer(tmp_path, SETTINGS).write("model.layers.0", layer())
    assert file.stat().st_mode == (tmp_path / store.MANIFEST).stat().st_mode


@pytest.mark.parametrize(("key", "value"), [("fingerprint", "other"), ("scheme", "fp8")])
def test_another_source_or_scheme_is_refused(tmp_path, key, value):
    writer = store.Writer(tmp_path, SETTINGS)
    writer.write("model.layers.0", layer())
    writer.finish()
    with pytest.raises(store.CalibrationError, match=value):
        store.read(tmp_path).require(**{key: value})


def test_resume_knows_the_finished_parts_and_refuses_other_settings(tmp_path):
    store.Writer(tmp_path, SETTINGS).write("model.layers.0", layer())
    again = store.Writer(tmp_path, SETTINGS)
    assert again.finished == {"model.layers.0"}
    with pytest.raises(store.CalibrationError, match="method"):
        store.Writer(tmp_path, {**SETTINGS, "method": {"name": "mse"}})
    assert store.Writer(tmp_path, {**SETTINGS, "method": {"name": "mse"}}, overwrite=True).finished == set()


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_holds_something_else_is_left_alone(tmp_path, overwrite):
    """The source, say, given for the output."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(store.CalibrationError, match=r"found config\.json and no calibration\.json"):
        store.Writer(tmp_path, SETTINGS, overwrite=overwrite)
    assert [f.name for f in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("damage", [lambda f: f.unlink(), lambda f: f.write_bytes(f.read_bytes()[:-1])])
def test_a_part_that_is_gone_or_damaged_is_written_again(tmp_path, damage):
    writer = store.Writer(tmp_path, SETTINGS)
    writer.write("model.layers.0", layer())
    damage(writer.write("model.layers.1", {"model.layers.1.mlp.down_proj.bias": torch.ones(4)}))
    assert store.Writer(tmp_path, SETTINGS).finished == {"model.layers.0"}
    store.Writer(tmp_path, {**SETTINGS, "method": {"name": "mse"}}, overwrite=True)
    assert not list(tmp_path.glob("*.safetensors"))  # of what was replaced nothing stays


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.0.mlp.down_proj.weight_scale"), "weight_scale beside"),
        (lambda t: t.update({"x.input_scale": torch.ones(2)}), "one F32 scale"),
        (lambda t: t.update({"x.weight_scale": torch.ones(2, 1).half()}), "F32 or U8"),
        (lambda t: t.update({"x.input_zero_point": torch.zeros(1)}), "I8 zero point"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, change, message):
    tensors = layer()
    change(tensors)
    writer = store.Writer(tmp_path, SETTINGS)
    writer.write("model.layers.0", tensors)
    with pytest.raises(store.CalibrationError, match=message):
        writer.finish()


def test_a_truncated_or_missing_file_and_another_version_are_named(tmp_path):
    writer = store.Writer(tmp_path, SETTINGS)
    file = writer.write("model.layers.0", layer())
    raw = file.read_bytes()
    file.write_bytes(raw[:-1])
    with pytest.raises(store.CalibrationError, match="truncated"):
        store.read(tmp_path)
    file.unlink()
    with pytest.raises(store.CalibrationError, match="found nothing"):
        store.read(tmp_path)
    manifest = json.loads((tmp_path / store.MANIFEST).read_text())
    (tmp_path / store.MANIFEST).write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(store.CalibrationError, match="99"):
        store.read(tmp_path)
    with pytest.raises(store.CalibrationError, match="lowbit calibrate"):
        store.read(tmp_path / "nowhere")


def test_patterns_that_it_does_not_know_are_named(tmp_path):
    store.Writer(tmp_path, SETTINGS).write("model.layers.0", layer())
    manifest = json.loads((tmp_path / store.MANIFEST).read_text())
    manifest["selection"] = {"ignore": ["*.down_proj"], "skip": ["lm_head"]}
    (tmp_path / store.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(store.CalibrationError, match="found skip"):
        store.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": {"model.layers.0": {}}}, r"'file' \(str\) for model\.layers\.0 in .*, found {}"),
        ({"layers": {"model.layers.0": None}}, "found None"),
        ({"module_schemes": []}, r"a mapping as 'module_schemes' in .*, found \[\]"),
        ({"config_overrides": None}, "a mapping as 'config_overrides'"),
        (None, "a mapping in .*, found NoneType"),
    ],
)
def test_what_a_manifest_should_not_hold_is_named(tmp_path, change, message):
    """To whoever reads it and whoever goes on with it; it was a TypeError, or a KeyError."""
    store.Writer(tmp_path, SETTINGS).write("model.layers.0", layer())
    manifest = json.loads((tmp_path / store.MANIFEST).read_text())
    changed = None if change is None else manifest | change
    (tmp_path / store.MANIFEST).write_text(json.dumps(changed))
    for use in (store.read, lambda path: store.Writer(path, SETTINGS)):
        with pytest.raises(store.CalibrationError, match=message):
            use(tmp_path)


def test_what_is_damaged_says_how_to_mend_it(tmp_path):
    written = store.Writer(tmp_path, SETTINGS).write("model.layers.0", layer())
    written.write_bytes(written.read_bytes()[:100])
    with pytest.raises(
        store.CalibrationError, match=r"100 bytes .*; run the same `lowbit calibrate` into .* again"
    ):
        store.read(tmp_path)
    (tmp_path / store.MANIFEST).write_text("{")
    with pytest.raises(
        store.CalibrationError, match=r"expected JSON in .*: calibrate again, with overwrite$"
    ):
        store.read(tmp_path)
    (tmp_path / store.MANIFEST).write_text("[]")
    with pytest.raises(store.CalibrationError, match=r"found list; .*: calibrate again, with overwrite$"):
        store.read(tmp_path)


def test_fingerprint_tells_values_apart(tmp_path):
    save_file({"a": torch.zeros(1000)}, tmp_path / "model.safetensors")
    first = store.fingerprint(tmp_path)
    assert store.fingerprint(tmp_path) == first
    save_file({"a": torch.ones(1000)}, tmp_path / "model.safetensors")
    assert store.fingerprint(tmp_path) != first
    with pytest.raises(store.CalibrationError, match="found none"):
        store.fingerprint(tmp_path / "nowhere")


def test_fingerprint_tells_names_configs_and_the_middle_of_files_apart(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1 << 20, dtype=torch.uint8)}, file)
    found = [store.fingerprint(tmp_path)]
    content = bytearray(file.read_bytes())
    for offset in (len(content) // 2, len(content) - 1):  # 16 pieces, one in the middle and one at the end
        for at in range(offset, max(offset - 70_000, 0), -1):
            content[at] ^= 1
        file.write_bytes(content)
        found.append(store.fingerprint(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    found.append(store.fingerprint(tmp_path))
    file.rename(tmp_path / "other.safetensors")
    found.append(store.fingerprint(tmp_path))
    assert len(set(found)) == 5


def test_a_tensor_in_two_parts_is_refused(tmp_path):
    writer = store.Writer(tmp_path, SETTINGS)
    writer.write("model.layers.0", layer(0))
    writer.write("model.layers.1", layer(0))
    with pytest.raises(store.CalibrationError, match="expected each tensor once, found"):
        store.read(tmp_path)


def test_what_is_damaged_is_not_complete_and_what_is_empty_is_taken_over(tmp_path):
    for settings in ({**SETTINGS, "scheme": "fp8"}, SETTINGS):  # the first wrote nothing
        writer = store.Writer(tmp_path, settings)
    writer.write("model.layers.0", layer(0))
    writer.write("model.layers.1", layer(1))
    writer.finish()
    assert store.Writer(tmp_path, SETTINGS).manifest["complete"]
    (tmp_path / "layer-00001.safetensors").unlink()
    again = store.Writer(tmp_path, SETTINGS)
    assert again.finished == {"model.layers.0"} and not again.manifest["complete"]
    assert not store.read(tmp_path).complete


def test_exponents_are_scales(tmp_path):
    writer = store.Writer(tmp_path, {**SETTINGS, "scheme": "mxfp8"})
    codes = torch.zeros(4, 64).to(torch.float8_e4m3fn)
    writer.write(
        "model.layers.0", {"a.weight": codes, "a.weight_scale": torch.zeros(4, 2, dtype=torch.uint8)}
    )
    assert store.read(tmp_path).modules() == ["a"] and store.read(tmp_path).floats() == []
