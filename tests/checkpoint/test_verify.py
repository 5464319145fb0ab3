"""verify finds what it should find, and its numbers are those of plain float64 arithmetic."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sample_models import (
    block_fp8,
    decode_block_fp8,
    deepseek_v3,
    fused_block_fp8,
    fused_mixture,
    llama,
    load,
    write,
)

import lowbit
from lowbit.checkpoint import verify
from lowbit.checkpoint.opening import open_checkpoint
from lowbit.errors import InputError

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture
def src(tmp_path) -> Path:
    return write(tmp_path / "src", *llama())


@pytest.fixture
def out(src, tmp_path) -> Path:
    lowbit.convert(src, tmp_path / "out", "int8")
    return tmp_path / "out"


def change(out: Path, edit) -> None:
    """Rewrite the single shard after `edit` has changed its tensors; the manifest stays."""
    tensors = load(out)
    edit(tensors)
    save_file(
        {n: t.contiguous() for n, t in tensors.items()}, out / "model.safetensors", metadata={"format": "pt"}
    )


def problems(out: Path, source: Path | None = None) -> str:
    found = lowbit.verify(out, source)
    assert not found.ok
    return "\n".join(found.problems)


def test_a_good_one_is_good(out, src):
    found = lowbit.verify(out, src)
    assert found.ok and found.problems == ()
    assert found.tensors == len(load(out)) and found.nbytes == open_checkpoint(out).nbytes
    assert len(found.errors) == 14
    assert "finite, positive scales" in found.checked


@pytest.mark.parametrize(
    "name", [DOWN + ".weight", DOWN + ".weight_scale", "model.norm.weight", "lm_head.weight"]
)
@pytest.mark.parametrize("bit", [0, 6])
def test_any_flipped_bit(out, name, bit):
    ref = open_checkpoint(out).tensors[name]
    with ref.file.open("r+b") as stream:
        stream.seek(ref.offset + ref.nbytes - 2)
        byte = stream.read(1)[0]
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ (1 << bit)]))
    text = problems(out)
    assert f"{name}: the data changed since it was written" in text
    assert len([p for p in text.splitlines() if "checksum" in p]) == 1


@pytest.mark.parametrize("scheme, format", [("int8", "compressed-tensors"), ("int8", "ascend")])
def test_damage_to_any_file_but_the_manifest(tmp_path, scheme, format):
    """A byte changed, in headers wherever, an end cut off, a file gone or one too many."""
    src = write(
        tmp_path / "src", *llama(layers=1), files={"tokenizer.json": "{}", "code/modeling.py": "pass"}
    )
    out = tmp_path / "out"
    lowbit.convert(src, out, scheme, format=format, max_shard_size="150KB")
    assert lowbit.verify(out, src).ok
    files = [f for f in sorted(out.rglob("*")) if f.is_file() and f.name != "lowbit_manifest.json"]
    assert len(files) == {"compressed-tensors": 6, "ascend": 7}[format]
    for file in files:
        whole, name = file.read_bytes(), str(file.relative_to(out))
        for at in {1, 27, 36, len(whole) // 2, len(whole) - 2} & {*range(len(whole))}:
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            assert not lowbit.verify(out).ok, (name, at)
        file.write_bytes(whole[:-1])
        assert not lowbit.verify(out).ok, name
        file.unlink()
        assert not lowbit.verify(out).ok, name
        file.write_bytes(whole)
    shutil.copy(out / "model-00001-of-00002.safetensors", out / "old.safetensors")
    assert "old.safetensors: not written by this conversion" in problems(out)


def test_what_cannot_be_read_is_a_problem(src, tmp_path, monkeypatch):
    out = tmp_path / "out"
    (src / "tokenizer.json").write_text("{}")
    lowbit.convert(src, out, "int8")
    (out / "tokenizer.json").unlink()
    (out / "tokenizer.json").mkdir()
    read = verify.read_exactly

    def bad_sector(fd, buffer, offset, file):
        if offset == open_checkpoint(out).tensors[DOWN + ".weight"].offset and file.parent == out:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
        read(fd, buffer, offset, file)

    monkeypatch.setattr(verify, "read_exactly", bad_sector)
    text = problems(out, src)
    assert "tokenizer.json: missing, or changed" in text
    assert f"{DOWN}.weight: cannot be checked" in text and f"{DOWN}.weight: cannot be compared" in text


def test_scales_of_another_dtype_are_a_problem(out):
    change(out, lambda t: t.update({DOWN + ".weight_scale": t[DOWN + ".weight_scale"].double()}))
    assert f"{DOWN}.weight_scale: cannot be checked" in problems(out)


@pytest.mark.parametrize("keep", [10, 2000, -1])
def test_a_truncated_file(out, keep):
    file = out / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    found = lowbit.verify(out)
    assert not found.ok and "model.safetensors" in found.problems[0]


def test_a_missing_and_an_additional_tensor(out):
    def edit(tensors):
        del tensors["model.norm.weight"]
        tensors["extra"] = torch.ones(2)

    change(out, edit)
    text = problems(out)
    assert "model.norm.weight: in the manifest, but in no shard" in text
    assert "extra: in a shard, but not in the manifest" in text


def test_a_missing_scale(out):
    change(out, lambda t: t.pop(DOWN + ".weight_scale"))
    assert "expected a scale named" in problems(out)


def test_a_scale_of_the_wrong_shape(out):
    def edit(tensors):
        tensors[DOWN + ".weight_scale"] = tensors[DOWN + ".weight_scale"].reshape(1, -1)

    change(out, edit)
    assert "expected a scale of shape [128, 1]" in problems(out)


def test_another_shape_or_dtype_with_the_same_bytes(out):
    """A checksum of the data alone would not see this."""

    def edit(tensors):
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].reshape(128, 64)
        tensors["model.norm.weight"] = tensors["model.norm.weight"].view(torch.float16)

    change(out, edit)
    text = problems(out)
    assert "model.embed_tokens.weight: expected BF16 [64, 128] as written, found BF16 [128, 64]" in text
    assert "model.norm.weight: expected BF16 [128] as written, found F16 [128]" in text


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("with_source", [False, True])
def test_scales_that_make_no_sense(out, src, value, with_source):
    (out / "lowbit_manifest.json").unlink()  # nothing but the values can tell

    def edit(tensors):
        tensors[DOWN + ".weight_scale"][7] = value

    change(out, edit)
    text = problems(out, src if with_source else None)
    assert f"{DOWN}.weight_scale: expected finite, positive scales, found others" in text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_floats_that_are_not_finite(tmp_path, dtype, value):
    tensors, config = llama(dtype=dtype)
    tensors["model.norm.weight"][3] = value
    root = write(tmp_path / "x", tensors, config)
    assert "model.norm.weight: expected finite values, found others" in problems(root)


def test_fp8_nan_codes(tmp_path):
    tensors, config = block_fp8(*llama())
    tensors[DOWN + ".weight"].view(torch.uint8)[0, 0] = 0x7F
    root = write(tmp_path / "x", tensors, config)
    assert f"{DOWN}.weight: expected finite values" in problems(root)


@pytest.mark.parametrize("scheme", ["mxfp8"])
def test_e8m0_nan_scales(src, tmp_path, scheme):
    lowbit.convert(src, tmp_path / "mx", scheme)
    change(tmp_path / "mx", lambda t: t[DOWN + ".weight_scale"].fill_(255))
    assert f"{DOWN}.weight_scale: expected finite, positive scales" in problems(tmp_path / "mx")


def test_without_a_manifest_it_says_so(tmp_path):
    root = write(tmp_path / "x", *llama())
    found = lowbit.verify(root)
    assert found.ok and any("no manifest" in c for c in found.checked)


@pytest.mark.parametrize("body", ["{", "[]", "{}", '{"tensors": {"a": 1}}'])
def test_a_broken_manifest(out, body):
    (out / "lowbit_manifest.json").write_text(body)
    assert "lowbit_manifest.json" in problems(out)


def test_a_manifest_of_tensors_alone(out):
    """As the first ones were."""
    file = out / "lowbit_manifest.json"
    body = json.loads(file.read_text())
    del body["headers"], body["files"]
    file.write_text(json.dumps(body))
    assert lowbit.verify(out).ok


def test_without_config_the_codes_cannot_be_read(out):
    (out / "config.json").unlink()
    assert "config.json has no quantization_config" in problems(out)


def test_what_is_no_checkpoint_is_bad_input(tmp_path, out):
    with pytest.raises(InputError, match="found nothing there"):
        lowbit.verify(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"expected \*\.safetensors files"):
        lowbit.verify(tmp_path)
    with pytest.raises(InputError, match="found nothing there"):
        lowbit.verify(out, tmp_path / "nowhere")


# --- with a source ----------------------------------------------------------------------------


def by_hand(x: torch.Tensor, y: torch.Tensor) -> tuple[float, float, float]:
    difference = x.double() - y.double()
    relative = (difference.square().sum() / x.double().square().sum()).sqrt().item()
    return -20 * math.log10(relative), relative, difference.abs().max().item()


def decoded(tensors, module: str) -> torch.Tensor:
    scale = tensors[f"{module}.weight_scale"]
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu).float().repeat_interleave(32, 1)
    if f"{module}.weight_packed" in tensors:
        raw = tensors[f"{module}.weight_packed"].view(torch.uint8).float() - 128
        return raw * scale.repeat_interleave(128, 1)
    codes = tensors[f"{module}.weight"].float()
    if scale.shape[0] != codes.shape[0]:
        scale = scale.repeat_interleave(128, 0)[: codes.shape[0]].repeat_interleave(128, 1)
    return codes * scale


@pytest.mark.parametrize("scheme", ["int8", "int8-block", "int8-weight-only", "fp8", "mxfp8"])
@pytest.mark.parametrize("source", ["bf16", "fp8"])
def test_errors_equal_a_float64_computation(tmp_path, scheme, source):
    tensors, config = llama() if source == "bf16" else block_fp8(*llama())
    src = write(tmp_path / "src", tensors, config)
    lowbit.convert(src, tmp_path / "out", scheme)
    found = lowbit.verify(tmp_path / "out", src)
    assert [e.sqnr_db for e in found.errors] == sorted(e.sqnr_db for e in found.errors)
    written = load(tmp_path / "out")
    assert len(found.errors) == 14
    for error in found.errors:
        module = error.name.removesuffix(".weight")
        x = tensors[error.name].float()
        if source == "fp8":
            x = decode_block_fp8(tensors[error.name], tensors[f"{module}.weight_scale_inv"])
        sqnr, relative, largest = by_hand(x, decoded(written, module))
        assert error.sqnr_db == pytest.approx(sqnr, abs=1e-9)
        assert error.relative == pytest.approx(relative, rel=1e-9)
        assert error.largest == pytest.approx(largest, rel=1e-9)
        assert error.scheme == scheme


@pytest.mark.parametrize("source", ["bf16", "fp8"])
def test_a_source_with_nan_is_nothing_like_the_result(tmp_path, source):
    tensors, config = llama() if source == "bf16" else block_fp8(*llama())
    lowbit.convert(write(tmp_path / "src", tensors, config), tmp_path / "out", "int8")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name].view(torch.uint8)[-1, -2:] = 0xFF  # NaN in either dtype
    found = lowbit.verify(tmp_path / "out", write(tmp_path / "damaged", tensors, config))
    worst, second = found.errors[:2]
    assert worst.name == name and worst.sqnr_db == -math.inf and math.isnan(worst.relative)
    assert second.sqnr_db > 20
    assert found.to_dict()["errors"][0]["relative"] is None


@pytest.mark.parametrize("source", ["bf16", "fp8", "int8-weight-only", "transposed"])
def test_errors_do_not_depend_on_row_blocks(tmp_path, monkeypatch, source):
    """Weights of several: no other test has any so large."""
    if source == "transposed":
        src = write(tmp_path / "src", *fused_mixture("llama4")[::2])
    else:
        src = write(tmp_path / "src", *(block_fp8(*llama()) if source == "fp8" else llama()))
    if source == "int8-weight-only":
        lowbit.convert(src, tmp_path / "packed", source)
        src = tmp_path / "packed"
    lowbit.convert(src, tmp_path / "out", "mxfp8")
    whole = {e.name: e for e in lowbit.verify(tmp_path / "out", src).errors}
    monkeypatch.setattr(verify, "BLOCK_BYTES", 5000)
    parts = lowbit.verify(tmp_path / "out", src)
    assert parts.ok and len(parts.errors) == len(whole) > 10
    for error in parts.errors:
        assert error.sqnr_db == pytest.approx(whole[error.name].sqnr_db, abs=1e-9) and error.sqnr_db > 20
        assert error.largest == whole[error.name].largest


@pytest.mark.parametrize("experts", ["apart", "fused"])
def test_what_was_dequantized_or_cast_is_compared_too(tmp_path, experts):
    """Weights that have the source's own dtype are copies, and are not."""
    if experts == "fused":
        fused, _, config = fused_mixture("qwen3.5")
        tensors, config = fused_block_fp8(fused, config)
    else:
        tensors, config = block_fp8(*deepseek_v3())
    src = write(tmp_path / "src", tensors, config)
    lowbit.convert(src, tmp_path / "out", "bf16")
    found = lowbit.verify(tmp_path / "out", src)
    codes = [t for t in tensors.values() if t.dtype == torch.float8_e4m3fn]
    # A mixture's layer is one tensor of three experts' gate and up projections, and one of their down projections.
    assert len(found.errors) == (len(codes) if experts == "apart" else 9 * len(codes) // 2)
    assert found.ok and all(e.sqnr_db > 50 and e.scheme == "BF16" for e in found.errors)
    name = next(
        n for n, t in load(tmp_path / "out").items() if "experts" in n and t.dim() == len(codes[0].shape)
    )
    change(tmp_path / "out", lambda t: t[name].mul_(2))
    changed = lowbit.verify(tmp_path / "out", src).errors
    assert changed[0].relative == pytest.approx(1.0, abs=0.01)


def test_a_wrong_scale_shows_at_the_top(out, src):
    (out / "lowbit_manifest.json").unlink()
    change(out, lambda t: t[DOWN + ".weight_scale"].mul_(2))
    found = lowbit.verify(out, src)
    assert found.errors[0].name == DOWN + ".weight"
    assert found.errors[0].relative == pytest.approx(1.0, abs=0.01)
    assert found.errors[1].sqnr_db > 30


def test_what_is_the_same_has_no_error(tmp_path):
    src = write(tmp_path / "src", *block_fp8(*llama()))
    lowbit.convert(src, tmp_path / "out", "fp8-block")
    found = lowbit.verify(tmp_path / "out", src)
    assert all(e.sqnr_db == math.inf and e.relative == 0 for e in found.errors) and len(found.errors) == 14
    body = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert body["errors"][0]["sqnr_db"] is None and body["ok"] is True


def test_another_source_is_noticed(out, tmp_path):
    other = write(tmp_path / "other", *llama(layers=1))
    assert f"{DOWN}: quantized here, but the source has no such weight" in problems(out, other)
    wider = write(tmp_path / "wider", *llama(intermediate=512))
    assert f"{DOWN}: [128, 256] here, but [128, 512] in the source" in problems(out, wider)


def test_many_shards(tmp_path):
    src = write(tmp_path / "src", *block_fp8(*deepseek_v3()), place=lambda n: len(n) % 3)
    lowbit.convert(src, tmp_path / "out", "int8", max_shard_size="60KB")
    found = lowbit.verify(tmp_path / "out", src, workers=2)
    assert found.ok and len(found.errors) > 40
    next((tmp_path / "out").glob("model-00003*")).unlink()
    assert "which is missing" in problems(tmp_path / "out")
