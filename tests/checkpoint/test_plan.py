"""Plans: decided from headers alone, and refused there when something cannot be done."""

from __future__ import annotations

import builtins
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sample_models import block_fp8, deepseek_v3, llama, qwen3_moe, write

import lowbit
from lowbit.checkpoint.layout import OutTensor, assign, parse_size
from lowbit.errors import InputError
from lowbit.scheme import SCHEMES


def blank_data(root: Path) -> None:
    """Replace all weight data by 0xFF bytes (NaN in every float format) of the same length."""
    for file in root.glob("*.safetensors"):
        raw = bytearray(file.read_bytes())
        start = 8 + int.from_bytes(raw[:8], "little")
        raw[start:] = b"\xff" * (len(raw) - start)
        stat = file.stat()
        file.write_bytes(raw)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if not SCHEMES[s].needs_calibration])
def test_no_weight_data_is_read(tmp_path, monkeypatch, scheme):
    src = write(tmp_path / "src", *block_fp8(*deepseek_v3()), place=lambda n: len(n) % 3)
    digest = lowbit.plan(src, scheme).digest()
    blank_data(src)
    reads: list[str] = []
    original = Path.open

    def counting(self, *args, **kw):
        stream = original(self, *args, **kw)
        if self.suffix == ".safetensors":
            read, limit = stream.read, self.stat().st_size

            def checked(count=-1):
                header = 8 + int.from_bytes(self.read_bytes()[:8], "little")
                assert count >= 0 and stream.tell() + count <= header < limit, (
                    f"{self} read beyond its header"
                )
                reads.append(self.name)
                return read(count)

            class Stream:
                def __enter__(self):
                    return self

                def __exit__(self, *exc):
                    stream.close()

            wrapped = Stream()
            wrapped.read = checked  # type: ignore[attr-defined]
            return wrapped
        return stream

    real_open = builtins.open
    monkeypatch.setattr(Path, "open", counting)
    monkeypatch.setattr(Path, "read_bytes", lambda self: real_open(self, "rb").read())
    monkeypatch.setattr(os, "preadv", lambda *a: pytest.fail("weight data was read"))
    plan = lowbit.plan(src, scheme)
    monkeypatch.undo()
    assert plan.digest() == digest and len(reads) >= 3


def test_every_kept_tensor_has_its_reason(tmp_path):
    src = write(tmp_path / "src", *deepseek_v3())
    plan = lowbit.plan(src, "int8", ignore=["model.layers.0"], keep=["*.1.self_attn.o_proj"])
    reasons = {m: d.reason for m, d in plan.decisions.items() if d.scheme is None}
    assert all(reasons.values())
    assert reasons["model.layers.1.mlp.gate"].startswith("router")
    assert reasons["model.layers.2.eh_proj"].startswith("multi-token prediction")
    assert reasons["model.layers.2.shared_head.head"] == "output head"
    assert reasons["model.layers.0.mlp.up_proj"] == "--ignore model.layers.0"
    assert reasons["model.layers.1.self_attn.o_proj"] == "--keep *.1.self_attn.o_proj"
    assert reasons["model.norm"] == "norm" and reasons["model.embed_tokens"] == "embedding"
    quantized = {m for m, d in plan.decisions.items() if d.scheme}
    assert {f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in (1, 2) for e in range(4)} <= quantized
    assert {"model.layers.1.mlp.shared_experts.up_proj", "model.layers.2.self_attn.kv_b_proj"} <= quantized


def test_engines_are_told_of_what_stays_by_its_name_alone(tmp_path):
    """Where an embedding by its name is a Linear, they would look for its scale."""
    tensors, config = llama()
    tensors["model.x_embedder.weight"] = tensors["lm_head.weight"].clone()
    done = lowbit.plan(write(tmp_path, tensors, config))
    assert done.config["quantization_config"]["ignore"] == ["lm_head", "model.x_embedder"]


def test_every_source_tensor_is_accounted_for_once(tmp_path):
    for name, (tensors, config) in {"bf16": deepseek_v3(), "fp8": block_fp8(*deepseek_v3())}.items():
        src = write(tmp_path / name, tensors, config)
        for scheme in ("int8", "fp8-block", "bf16"):
            plan = lowbit.plan(src, scheme)
            refs = [r.name for j in plan.jobs if j.source for r in j.source.refs]
            assert sorted(refs) == sorted(tensors), (name, scheme)
            outputs = [o.name for j in plan.jobs for o in j.outputs.values()]
            assert len(outputs) == len(set(outputs))
            assert plan.source_bytes == sum(t.numel() * t.element_size() for t in tensors.values())


def test_the_plan_says_the_size_of_the_result(tmp_path):
    src = write(tmp_path / "src", *deepseek_v3())
    for limit in ("5GB", "100KB"):
        done = lowbit.convert(src, tmp_path / limit, "mxfp8", max_shard_size=limit)
        size = sum(f.stat().st_size for f in (tmp_path / limit).glob("*.safetensors"))
        assert done.plan.output_bytes == size


def test_the_digest_names_the_conversion(tmp_path):
    src = write(tmp_path / "src", *llama())
    first = lowbit.plan(src, "int8").digest()
    assert lowbit.plan(src, "int8").digest() == first
    others = [
        lowbit.plan(src, "int8-block"),
        lowbit.plan(src, "int8", ignore=["*.o_proj"]),
        lowbit.plan(src, "int8", max_shard_size="100KB"),
        lowbit.plan(src, "int8", overrides={"*.o_proj": "fp8"}),
    ]
    assert len({first, *(p.digest() for p in others)}) == 5


def test_an_unmatched_pattern_warns(tmp_path):
    src = write(tmp_path / "src", *llama())
    plan = lowbit.plan(src, "int8", ignore=["lm_haed"], keep=["*.o_proj"])
    assert plan.warnings == ("pattern 'lm_haed' matches no module; `lowbit plan` lists their names",)


REFUSED = {
    "unknown scheme": ({"scheme": "int7"}, r"unknown scheme 'int7': expected one of .*did you mean 'int8'"),
    "unknown format": (
        {"format": "compresed"},
        r"unknown format 'compresed'.*did you mean 'compressed-tensors'",
    ),
    "held by another format": (
        {"scheme": "int8", "format": "fp8"},
        r"the format fp8 cannot hold the scheme int8; expected one of: compressed-tensors",
    ),
    "format of floats": ({"scheme": "bf16", "format": "fp8"}, r"no --format with --scheme bf16"),
    "size": ({"max_shard_size": "big"}, r"expected a size such as 5GB, 800MB or 2GiB, found 'big'"),
    "no size": ({"max_shard_size": "0GB"}, r"expected a size such as"),
    "no unit": ({"max_shard_size": "5"}, r"expected a size such as 5GB, 800MB or 2GiB, found '5'"),
    "static without data": ({"scheme": "fp8-static"}, r"calibrated input scale for every .*lowbit calibrate"),
    "everything ignored": (
        {"ignore": ["model"]},
        r"at least one weight to quantize to int8 as compressed-tensors, found none: 20 × --ignore model, 1 × output",
    ),
    "regular expression": ({"ignore": ["re:*"]}, r"expected a regular expression after 're:'"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_refused_before_any_work(tmp_path, settings, message):
    src = write(tmp_path / "src", *llama())
    with pytest.raises(InputError, match=message):
        lowbit.convert(src, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("800MB", 8 * 10**8),
        ("2GiB", 2**31),
        ("1.5 kb", 1500),
        (123, 123),
        ("1TB", 10**12),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5 parsecs", "0", 0, -1, "1e9", "nan", "0.1B"])
def test_what_is_no_size(text):
    with pytest.raises(InputError, match="expected a size"):
        parse_size(text)


@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from(["F32", "I8", "BF16", "I64"]), st.integers(0, 50)), min_size=1, max_size=3),
        min_size=1, max_size=12,
    ),
    st.integers(1, 2000),
)  # fmt: skip
def test_any_layout_is_contiguous_aligned_and_within_the_limit(groups, limit):
    from lowbit.checkpoint.headers import ITEM_BYTES

    tensors = [
        [OutTensor(f"é{g}.{i}", d, (n,)) for i, (d, n) in enumerate(group)] for g, group in enumerate(groups)
    ]
    shards, placed = assign(tensors, limit)
    for number, shard in enumerate(shards):
        inside = sorted((t for t in placed.values() if t.shard == number), key=lambda t: (t.offset, t.nbytes))
        position = len(shard.header)
        assert position % 8 == 0 and int.from_bytes(shard.header[:8], "little") == position - 8
        header = json.loads(shard.header[8:])
        assert header.pop("__metadata__") == {"format": "pt"} and set(header) == {t.name for t in inside}
        for t in inside:
            assert t.offset == position and t.offset % ITEM_BYTES[t.dtype] == 0
            begin, end = header[t.name]["data_offsets"]
            assert begin + len(shard.header) == t.offset and end - begin == t.nbytes
            position += t.nbytes
        assert position == shard.nbytes
        held = [g for g in tensors if g[0].name in header]
        assert all(t.name in header for g in held for t in g)
        assert shard.nbytes <= limit or len(held) == 1


def test_two_outputs_of_one_name():
    with pytest.raises(InputError, match="a: expected a name that is free"):
        assign([[OutTensor("a", "I8", (1,))], [OutTensor("a", "F32", (1,))]], 100)


def test_what_fills_cache_lines_begins_at_one():
    """Mapped weights that lie across lines are read slower, and torch's own products add in another order."""
    modules = [
        [
            OutTensor(f"{name}.weight", "I8", (64, 96)),
            OutTensor(f"{name}.weight_scale", "F32", (64, 1)),
            OutTensor(f"{name}.input_scale", "F32", (1,)),
            OutTensor(f"{name}.bias", "BF16", (33,)),
        ]
        for name in ("up", "a_name_of_another_length")
    ]
    _, placed = assign(modules, 1 << 20)
    for module in modules:
        assert [placed[t.name].offset % 64 for t in module[:2]] == [0, 0]


def test_the_main_dtype_of_a_source_that_is_all_codes(tmp_path):
    """`--ignore` needs a float dtype; config.json names it when no float tensor does."""
    tensors, config = block_fp8(*llama(dtype=torch.float16))
    codes = {n: t for n, t in tensors.items() if "proj" in n}
    src = write(tmp_path / "src", codes, config)
    lowbit.convert(src, tmp_path / "out", "int8", ignore=["*.o_proj"])
    from sample_models import load

    assert load(tmp_path / "out")["model.layers.0.self_attn.o_proj.weight"].dtype == torch.float16


@pytest.mark.parametrize(
    ("model_type", "scheme", "format", "warned"),
    [
        ("falcon_mamba", "int8", None, "vLLM builds Mamba's layers in float"),
        ("mistral3", "fp8-block", "fp8", "Mistral 3 look for other names of scales"),
        ("mistral3", "fp8-block", None, ""),
        ("bloom", "int8-weight-only", None, "vLLM rearranges the rows"),
        ("bloom", "int8", None, ""),
        ("llama", "fp8-block", "fp8", "SGLang's class for this model drops the scales"),
        ("whisper", "int8", None, "SGLang builds Whisper's MLPs in float"),
        (
            "minimax_m3_vl",
            "fp8-block",
            "fp8",
            "vLLM's MiniMax-M3 takes this format's scales for those of MXFP8",
        ),
        ("minimax_m3_vl", "fp8-block", None, ""),
        ("muse_spark", "int8", None, "vLLM's Muse Spark takes no codes but ModelOpt's NVFP4"),
        ("muse_spark", "bf16", None, ""),
        ("dory", "fp8-block", None, "vLLM's Dory wants as many rows of scales"),
        ("dory", "int8-weight-only", None, "vLLM's Dory wants as many rows of scales"),
        ("dory", "mxfp8", None, ""),
        ("falcon_mamba", "bf16", None, ""),
    ],
)
def test_what_an_engine_does_not_load_is_warned_of(tmp_path, model_type, scheme, format, warned):
    tensors = {"model.layers.0.mixer.in_proj.weight": torch.randn(128, 128)}
    source = write(tmp_path / "src", tensors, {"model_type": model_type})
    warnings = lowbit.plan(source, scheme, format=format).warnings
    assert [w for w in warnings if "vLLM" in w and warned in w] if warned else not warnings


@pytest.mark.parametrize(
    ("rows", "format", "warned"), [(960, "fp8", True), (960, None, False), (896, "fp8", False)]
)
def test_ragged_blocks_that_transformers_misreads_without_a_gpu_are_warned_of(tmp_path, rows, format, warned):
    """It dequantizes 960 rows with 8 scales in blocks of 120."""
    name = "model.layers.0.mlp.down_proj"
    source = write(tmp_path / "src", {f"{name}.weight": torch.randn(rows, 128)}, {"model_type": "qwen2"})
    warnings = lowbit.plan(source, "fp8-block", format=format).warnings
    assert len(warnings) == warned
    assert all(f"(first: {name}, 960 rows); call lowbit.register() before" in w for w in warnings)


def test_routers_that_an_override_quantizes_are_warned_of(tmp_path):
    """What is written is refused by transformers and lowbit.load, whose routers are no Linears."""
    source = write(tmp_path / "src", *qwen3_moe())
    warnings = lowbit.plan(source, "int8", overrides={"*.mlp.gate": "int8"}).warnings
    assert [w for w in warnings if "2 routers are to be quantized (first: model.layers.0.mlp.gate)" in w]
    assert not lowbit.plan(source, "int8", overrides={"model.layers.0": "fp8"}).warnings
