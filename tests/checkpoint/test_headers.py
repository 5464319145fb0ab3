"""Headers as hostile input: whatever is wrong is an InputError that says what was expected."""

from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from sample_models import llama, write

import lowbit
from lowbit.checkpoint.headers import INDEX, ITEM_BYTES, MAX_HEADER_BYTES, read_header
from lowbit.checkpoint.opening import open_checkpoint
from lowbit.errors import InputError


def raw_file(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


GOOD = {"a": entry(), "b": entry("U8", (3,), (8, 11)), "__metadata__": {"format": "pt"}}


def test_a_header_is_read_as_safetensors_reads_it(tmp_path):
    tensors = {
        "x": torch.randn(3, 4).to(torch.bfloat16),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 7),
        "名前.weight": torch.ones(2, dtype=torch.int64),
        "codes": torch.zeros(5, 2).to(torch.float8_e4m3fn),
    }
    file = tmp_path / "m.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    found, metadata = read_header(file)
    assert metadata == {"format": "pt"}
    assert set(found) == set(tensors)
    content = file.read_bytes()
    for name, ref in found.items():
        t = tensors[name]
        assert ref.shape == tuple(t.shape) and ref.elements == t.numel()
        data = t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert content[ref.offset : ref.offset + ref.nbytes] == data, name


def test_every_dtype_that_safetensors_knows_has_its_size(tmp_path):
    for name, size in ITEM_BYTES.items():
        file = raw_file(tmp_path / "m.safetensors", {"a": entry(name, (4,), (0, 4 * size))}, b"\0" * 4 * size)
        assert read_header(file)[0]["a"].nbytes == 4 * size
        if "U" in name[1:] or name in ("C64",) or "FNUZ" in name:
            continue  # this version of the library may not know them
        with safe_open(file, "pt"):
            pass


def test_a_narrow_dtype_is_no_damage(tmp_path):
    file = raw_file(tmp_path / "m.safetensors", {"a": entry("F4", (4, 4), (0, 8))}, b"\0" * 8)
    with safe_open(file, "pt") as stream:
        assert stream.get_slice("a").get_dtype() == "F4"
    with pytest.raises(InputError, match="found F4 in the tensor 'a', which cannot be read; start from"):
        read_header(file)


BAD_HEADERS = {
    "empty file": (b"", None, "at least 8 bytes, found 0"),
    "cut in the length": (b"\x10\0\0", None, "at least 8 bytes, found 3"),
}

DAMAGED = {
    "longer than the file": (GOOD, b"\0" * 11, 10_000, "a header of 10000 bytes, but the file ends after"),
    "longer than allowed": (GOOD, b"\0" * 11, MAX_HEADER_BYTES + 1, "at most 100000000 bytes"),
    "absurd length": (GOOD, b"\0" * 11, 2**64 - 1, "at most 100000000 bytes"),
    "not JSON": (b"{not json}", b"", None, "expected a JSON header"),
    "not UTF-8": (b'{"\xff": 1}', b"", None, "expected a JSON header"),
    "deep nesting": (b'{"a":' + b"[" * 100_000, b"", None, "expected a JSON header"),
    "a list": ([], b"", None, "JSON object as header, found a list"),
    "a name twice": (b'{"a":1,"a":2}', b"", None, "the name 'a' stands twice"),
    "entry not an object": ({"a": 3}, b"", None, "expected an object for tensor 'a', found a int"),
    "unknown dtype": ({"a": entry("F7")}, b"\0" * 8, None, "known dtype for tensor 'a', found 'F7'"),
    "dtype not a string": ({"a": entry([1])}, b"\0" * 8, None, "known dtype for tensor 'a', found"),
    "dtype missing": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8, None, "known dtype"),
    "negative size": ({"a": entry(shape=(-2,))}, b"\0" * 8, None, "list of sizes as shape of 'a'"),
    "fractional size": ({"a": entry(shape=(2.0,))}, b"\0" * 8, None, "list of sizes as shape of 'a'"),
    "boolean size": ({"a": entry("U8", (True,), (0, 1))}, b"\0", None, "list of sizes as shape of 'a'"),
    "shape a string": ({"a": {**entry(), "shape": "22"}}, b"\0" * 8, None, "list of sizes"),
    "one offset": ({"a": entry(offsets=(0,))}, b"\0" * 8, None, "[begin, end] as data_offsets of 'a'"),
    "negative offset": ({"a": entry(offsets=(-8, 0))}, b"", None, "[begin, end] as data_offsets"),
    "backwards": ({"a": entry(offsets=(8, 0))}, b"\0" * 8, None, "expected 8 bytes for 'a'"),
    "wrong size": ({"a": entry(offsets=(0, 7))}, b"\0" * 7, None, "expected 8 bytes for 'a' (F32 [2]), found 7"),
    "huge shape": ({"a": entry(shape=(2**40, 2**40))}, b"\0" * 8, None, "for 'a' (F32"),
    "huge shape of nothing": ({"a": entry(shape=(0, 2**62), offsets=(0, 0))}, b"", None, "expected sizes of a weight"),
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12, None, "overlap: 'b' begins at 4, expected 8"),
    "the same twice": ({"a": entry(), "b": entry()}, b"\0" * 8, None, "data offsets overlap"),
    "a hole": ({"a": entry(), "b": entry(offsets=(9, 17))}, b"\0" * 17, None, "leave a hole: 'b' begins at 9"),
    "a hole in front": ({"a": entry(offsets=(8, 16))}, b"\0" * 16, None, "leave a hole"),
    "beyond the file": (GOOD, b"\0" * 10, None, "expected 11 bytes of data, found 10"),
    "padded": (GOOD, b"\0" * 12, None, "expected 11 bytes of data, found 12"),
    "metadata not strings": ({**GOOD, "__metadata__": {"a": 1}}, b"\0" * 11, None, "__metadata__"),
    "half a surrogate": (b'{"\\ud800": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"\0", None, "name"),
}  # fmt: skip


@pytest.mark.parametrize(("header", "data", "length", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_headers(tmp_path, header, data, length, message):
    file = raw_file(tmp_path / "model.safetensors", header, data, length=length)
    with pytest.raises(InputError) as caught:
        read_header(file)
    text = str(caught.value)
    assert message in text
    assert str(file) in text and text.endswith("fetch it again")
    with pytest.raises(InputError):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x10\0\0"])
def test_files_shorter_than_a_length(tmp_path, content):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"expected at least 8 bytes, found {len(content)}"):
        read_header(file)


def test_a_missing_or_unreadable_file_is_named(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_header(tmp_path / "none.safetensors")
    (tmp_path / "dir.safetensors").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        read_header(tmp_path / "dir.safetensors")


# --- fuzzing ----------------------------------------------------------------------------------

REAL = save(
    {
        "w": torch.ones(3, 5),
        "n": torch.ones(4, dtype=torch.bfloat16),
        "c": torch.zeros(2, 2, dtype=torch.int8),
    },
    metadata={"format": "pt"},
)
HEADER_END = 8 + int.from_bytes(REAL[:8], "little")


def only_input_errors(path: Path, content: bytes) -> bool:
    """True when the header was accepted; anything but InputError escapes and fails the test."""
    path.write_bytes(content)
    try:
        tensors, _ = read_header(path)
    except InputError as error:
        assert str(path) in str(error)
        return False
    size = len(content)
    for ref in tensors.values():  # nothing accepted may reach outside the file
        assert ref.offset >= 0 and ref.offset + ref.nbytes <= size
    return True


FUZZ = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(st.binary(max_size=300))
@FUZZ
def test_random_bytes_raise_only_input_errors(tmp_path, content):
    only_input_errors(tmp_path / "x", content)


@given(st.lists(st.tuples(st.integers(0, HEADER_END + 4), st.integers(0, 255)), min_size=1, max_size=6),
       st.integers(0, len(REAL)))  # fmt: skip
@FUZZ
def test_mutated_real_headers_raise_only_input_errors(tmp_path, changes, keep):
    content = bytearray(REAL)
    for at, value in changes:
        content[at] = value
    only_input_errors(tmp_path / "x", bytes(content))
    only_input_errors(tmp_path / "x", bytes(content[:keep]))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(list(ITEM_BYTES)) | JSON,
        "shape": st.lists(st.integers(0, 4), max_size=3) | JSON,
        "data_offsets": st.tuples(st.integers(0, 40), st.integers(0, 40)) | JSON,
    },
)


@given(
    st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), ENTRY | JSON, max_size=3),
    st.integers(0, 60),
)
@FUZZ
@example({"a": {"dtype": {}, "shape": [1], "data_offsets": [0, 1]}}, 1)
@example({"a": {"dtype": "U8", "shape": [10**30], "data_offsets": [0, 10**30]}}, 1)
def test_well_formed_nonsense_raises_only_input_errors(tmp_path, header, size):
    text = json.dumps(header).encode()
    only_input_errors(tmp_path / "x", struct.pack("<Q", len(text)) + text + b"\0" * size)


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_we_accept_safetensors_accepts_too(tmp_path, data):
    """Ours is at least as strict as the library that will load the checkpoint."""
    known = [d for d in ITEM_BYTES if d in ("F32", "BF16", "U8", "I8", "I64", "F8_E4M3")]
    shapes = data.draw(
        st.lists(st.tuples(st.sampled_from(known), st.lists(st.integers(0, 3), max_size=3)), max_size=4)
    )
    header, position = {}, 0
    for i, (dtype, shape) in enumerate(shapes):
        size = ITEM_BYTES[dtype]
        for d in shape:
            size *= d
        shift = data.draw(st.sampled_from([0, 0, 0, 0, 1, -1]))
        header[f"t{i}"] = entry(dtype, shape, (max(0, position + shift), max(0, position + shift) + size))
        position += size
    tail = data.draw(st.sampled_from([0, 0, 0, 1]))
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    accepted = only_input_errors(path, struct.pack("<Q", len(text)) + text + b"\0" * (position + tail))
    try:
        with safe_open(path, "pt"):
            theirs = True
    except SafetensorError:
        theirs = False
    assert accepted <= theirs


# --- directories ------------------------------------------------------------------------------


def refuse(path, message: str) -> None:
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    assert message in str(caught.value), caught.value


def test_not_a_directory(tmp_path, monkeypatch):
    refuse(tmp_path / "nowhere", "expected a checkpoint directory, found nothing there; check the path")
    # Nothing is fetched; of a hub's name, what fetches it is said.
    refuse("Qwen/Qwen3-0.6B", "check the path, or download it first: hf download Qwen/Qwen3-0.6B --local-dir")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(InputError, match=r"check the path$"):
        open_checkpoint("models/absent")
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes(REAL)
        refuse(tmp_path / name, "found a file; give its directory")


def test_no_safetensors(tmp_path):
    refuse(tmp_path, "expected *.safetensors files, found none")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_are_refused_and_never_opened(tmp_path, name):
    marker = tmp_path / "executed"

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(marker),))

    import pickle

    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    refuse(tmp_path, f"found {name}; pickle files can run code and are never opened")
    assert not marker.exists()


def sharded(root: Path) -> Path:
    tensors, config = llama()
    return write(root, tensors, config, place=lambda name: int("layers.1" in name))


def edit_index(root: Path, change) -> None:
    file = root / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))


def test_an_index_naming_a_missing_file(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refuse(tmp_path, "names the file 'model-00002-of-00002.safetensors', which is missing; fetch the whole")


def test_an_index_naming_a_missing_tensor(tmp_path):
    sharded(tmp_path)
    edit_index(
        tmp_path, lambda i: i["weight_map"].update({"ghost.weight": "model-00001-of-00002.safetensors"})
    )
    refuse(tmp_path, "holds 'ghost.weight', but no shard holds it")


def test_an_index_placing_a_tensor_in_the_wrong_shard(tmp_path):
    sharded(tmp_path)
    edit_index(
        tmp_path, lambda i: i["weight_map"].update({"model.norm.weight": "model-00002-of-00002.safetensors"})
    )
    refuse(tmp_path, "but it lies in model-00001-of-00002.safetensors")


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/../../b.safetensors", "", 7, None, "x" * 5000, "a\0b"]
)
def test_an_index_leaving_the_directory_or_naming_no_file(tmp_path, name):
    root = sharded(tmp_path / "model")
    write(tmp_path, {"a.weight": torch.ones(2, 2)}, None)
    (tmp_path / "model.safetensors").rename(tmp_path / "secret.safetensors")
    edit_index(root, lambda i: i["weight_map"].update({"model.norm.weight": name}))
    with pytest.raises(InputError, match=r"index\.json: (expected file names inside|names the file)"):
        open_checkpoint(root)


@pytest.mark.parametrize(
    "body", ["[]", "{", '{"weight_map": []}', '{"weight_map": {}}', "", '{"weight_map": {"a": ["b"]}}']
)
def test_a_broken_index(tmp_path, body):
    sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(body)
    with pytest.raises(InputError, match=r"index\.json"):
        open_checkpoint(tmp_path)


def test_an_index_that_cannot_be_read_is_not_to_be_fetched_again(tmp_path):
    root = write(tmp_path, *llama())
    (root / INDEX).mkdir()
    with pytest.raises(InputError, match=r"index\.json: cannot be read \(Is a directory\); check the path"):
        open_checkpoint(root)


def test_two_indexes(tmp_path):
    sharded(tmp_path)
    (tmp_path / "old.safetensors.index.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / "new.safetensors.index.json")
    refuse(tmp_path, "expected one index, found new.safetensors.index.json, old.safetensors.index.json")


def test_weights_in_a_makers_own_format_beside_those_that_loaders_take(tmp_path):
    """Mistral ships both, each with its index."""
    root = sharded(tmp_path / "model")
    own = {"weight_map": {"tok_embeddings.weight": "consolidated-00001-of-00001.safetensors"}}
    (root / "consolidated.safetensors.index.json").write_text(json.dumps(own))
    save_file({"tok_embeddings.weight": torch.ones(2)}, root / "consolidated-00001-of-00001.safetensors")
    found = open_checkpoint(root)
    assert "model.norm.weight" in found.tensors and "tok_embeddings.weight" not in found.tensors
    assert any("left out: consolidated.safetensors.index.json" in n for n in found.notes)
    lowbit.convert(root, tmp_path / "out", "int8")
    assert not list((tmp_path / "out").glob("consolidated*")) and lowbit.verify(tmp_path / "out").ok


def test_two_shards_holding_one_name(tmp_path):
    save_file({"a.weight": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"a.weight": torch.ones(2)}, tmp_path / "two.safetensors")
    refuse(
        tmp_path,
        "two shards hold the tensor 'a.weight': one.safetensors and two.safetensors; expected each once",
    )


def test_a_truncated_shard(tmp_path):
    sharded(tmp_path)
    file = tmp_path / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    refuse(tmp_path, "(truncated or padded)")


def test_an_incomplete_download_without_an_index(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert len(open_checkpoint(tmp_path).shards) == 2
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    refuse(tmp_path, "expected 2 shards, found 1")


def test_only_empty_files(tmp_path):
    raw_file(tmp_path / "model.safetensors", {})
    refuse(tmp_path, "expected tensors, found 1 empty files")


@pytest.mark.parametrize("body", ["[1]", "{", "\xff", "[" * 100_000])
def test_a_config_that_is_no_object(tmp_path, body):
    write(tmp_path, {"a.weight": torch.ones(2, 2)}, None, files={"config.json": body.encode("latin-1")})
    refuse(tmp_path, "config.json: expected a JSON object")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("text_config", [], "an object as text_config, found a list"),
        ("model_type", ["llama"], "a text as model_type, found a list"),
        ("architectures", "LlamaForCausalLM", "a list as architectures, found a str"),
    ],
)
def test_a_config_with_values_of_other_types(tmp_path, key, value, message):
    tensors, config = llama()
    write(tmp_path, tensors, config | {key: value})
    refuse(tmp_path, f"config.json: expected {message}")


def test_files_beside_the_weights(tmp_path):
    files = {
        "tokenizer.json": "{}", "generation_config.json": "{}", "inference/kernel.py": "x", ".gitattributes": "y",
        ".git/objects/aa": "never", ".cache/huggingface/x": "never", "lowbit_manifest.json": "{}",
        "pytorch_model.bin": "old", "onnx/model.onnx": "old", "model.gguf": "old", "onnx/model.onnx_data": "old",
        "pytorch_model.bin.index.json": "{}",
    }  # fmt: skip
    tensors, config = llama()
    found = open_checkpoint(write(tmp_path, tensors, config, files=files))
    names = [str(p) for p in found.others]
    assert names == sorted(names)
    assert set(names) == {".gitattributes", "generation_config.json", "inference/kernel.py", "tokenizer.json"}
    left = [n for n in found.notes if n.startswith("other weights are left out")]
    assert len(left) == 5


@pytest.mark.parametrize("name", ["model.onnx_data", "model.onnx_data_1", "decoder_model_q4.onnx.data"])
def test_data_of_onnx_weights_is_left_out(tmp_path, name):
    found = open_checkpoint(
        write(tmp_path, *llama(), files={f"onnx/{name}": "old", "onnx/config.json": "{}"})
    )
    assert found.others == (Path("onnx/config.json"),)
    assert f"other weights are left out: onnx/{name}" in found.notes


@pytest.mark.parametrize("index", [True, False])
def test_low_rank_adapters_belong_to_the_model(tmp_path, index):
    """They were left out, and what said that they are there was carried."""
    files = {"adapter_config.json": "{}", "adapter_model.safetensors": "x", "vision-lora/adapter_config.json": "{}",
             "vision-lora/adapter_model.safetensors": "y", "old/adapter_model.safetensors": "z"}  # fmt: skip
    tensors, config = llama()
    found = open_checkpoint(write(tmp_path, tensors, config, files=files, place=len if index else None))
    assert set(map(str, found.others)) == set(files) - {"old/adapter_model.safetensors"}
    assert found.notes == ("other weights are left out: old/adapter_model.safetensors",)
    assert found.tensors.keys() == tensors.keys()


def test_adapters_without_their_model(tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match="found low-rank adapters alone; merge them into their model first"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("listed", [True, False])
def test_weights_of_a_sentence_transformers_own_modules_belong_to_it(tmp_path, listed):
    modules = [{"path": "", "type": "Transformer"}, *[{"path": "2_Dense", "type": "Dense"}] * listed]
    files = {"modules.json": json.dumps(modules), "2_Dense/model.safetensors": "x", "onnx/model.onnx": "old"}
    found = open_checkpoint(write(tmp_path, *llama(), files=files))
    assert ("2_Dense/model.safetensors" in map(str, found.others)) == listed
    assert len(found.notes) == 2 - listed


@pytest.mark.parametrize(
    "body", ["[", "[1]", "[{}]", '[{"path": []}]', '[{"path": "."}]', '{"path": ""}', "1"]
)
def test_modules_that_are_none(tmp_path, body):
    files = {"modules.json": body, "onnx/model.onnx": "old"}
    assert len(open_checkpoint(write(tmp_path, *llama(), files=files)).notes) == 1


def test_a_symlinked_hub_cache(tmp_path):
    """The hub stores blobs by hash and links them; a linked directory is not entered."""
    blobs = tmp_path / "blobs"
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    tensors, config = llama()
    write(blobs, tensors, config, files={"tokenizer.json": "{}"})
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    (snapshot / "everything").symlink_to(tmp_path)
    found = open_checkpoint(snapshot)
    assert set(found.tensors) == set(tensors) and found.config == config
    with pytest.raises(
        InputError, match=r"found a hub's cache; give the directory of a snapshot, such as .*/main$"
    ):
        open_checkpoint(tmp_path)
    assert [str(o) for o in found.others] == ["tokenizer.json"]


def test_links_that_are_not_followed_are_said(tmp_path):
    root = write(tmp_path / "model", *llama())
    (tmp_path / "elsewhere").mkdir()
    (root / "original").symlink_to(tmp_path / "elsewhere")
    (root / "tokenizer.json").symlink_to(tmp_path / "blob that was not fetched")
    found = open_checkpoint(root)
    assert found.others == ()
    assert found.notes == (
        f"a link to a directory is left out: {root / 'original'}",
        f"a link to what is not there is left out: {root / 'tokenizer.json'}",
    )


def test_a_directory_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    root = write(tmp_path / "model", *llama(), files={"original/params.json": "{}"})
    iterdir = Path.iterdir

    def refuse(self):
        if self.name == "original":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return iterdir(self)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(InputError, match=r"original: cannot be read \(Permission denied\)"):
        open_checkpoint(root)


def test_the_index_decides_which_files_belong(tmp_path):
    sharded(tmp_path)
    save_file({"other": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    found = open_checkpoint(tmp_path)
    assert "other" not in found.tensors
    assert any("left out: consolidated.safetensors" in n for n in found.notes)


def test_shards_in_a_folder_that_the_index_names_are_not_said_to_be_left_out(tmp_path):
    sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    said["weight_map"] = {name: f"weights/{file}" for name, file in said["weight_map"].items()}
    index.write_text(json.dumps(said))
    (tmp_path / "weights").mkdir()
    for file in tmp_path.glob("*.safetensors"):
        file.rename(tmp_path / "weights" / file.name)
    found = open_checkpoint(tmp_path)
    assert len(found.shards) == 2 and not any("left out" in note for note in found.notes)


def test_tensors_that_the_index_forgot_are_taken_along(tmp_path):
    sharded(tmp_path)
    edit_index(tmp_path, lambda i: i["weight_map"].pop("model.norm.weight"))
    found = open_checkpoint(tmp_path)
    assert "model.norm.weight" in found.tensors
    assert any("1 tensors lie in shards but not in the index" in n for n in found.notes)


def test_files_of_other_systems_are_not_taken_for_shards(tmp_path):
    """macOS leaves `._name` beside each file that it copies."""
    tensors, config = llama()
    write(tmp_path, tensors, config, files={"._model.safetensors": b"\0\5\x16\7"})
    assert set(open_checkpoint(tmp_path).tensors) == set(tensors)


def test_the_fingerprint_follows_what_is_there(tmp_path):
    sharded(tmp_path)
    first = open_checkpoint(tmp_path).fingerprint()
    assert first == open_checkpoint(tmp_path).fingerprint() and len(first) == 32
    os.utime(tmp_path / "model-00001-of-00002.safetensors", ns=(1, 1))
    second = open_checkpoint(tmp_path).fingerprint()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    assert len({first, second, open_checkpoint(tmp_path).fingerprint()}) == 3
