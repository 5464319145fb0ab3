"""Experts that a checkpoint holds in 3-D tensors: converted as one matrix per expert and projection."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversions import memory_grown
from sample_models import (
    MIXTURES,
    Tensors,
    block_fp8,
    decode_block_fp8,
    fused_block_fp8,
    fused_mixture,
    fused_names,
    load,
    same_bits,
    write,
)

import lowbit
from lowbit.checkpoint import reading
from lowbit.checkpoint.fused_experts import orientation_of, split
from lowbit.checkpoint.headers import PARTIAL, TensorRef
from lowbit.checkpoint.journal import read_journal
from lowbit.checkpoint.opening import open_checkpoint
from lowbit.checkpoint.plan import Plan
from lowbit.errors import InputError
from lowbit.quantize import choose_scale, dequantize, quantize_with
from lowbit.scheme import get_scheme

SCHEMES = ["int8", "int8-block", "int8-weight-only", "fp8", "fp8-block", "mxfp8"]


def check_experts(out: Path, meant: Tensors, scheme: str) -> None:
    """Every expert's projection in `out` is what the oracle makes of the matrix in `meant`; nothing else is there."""
    written, spec = load(out), get_scheme(scheme).weights
    assert spec is not None
    for name, matrix in meant.items():
        module = name.removesuffix(".weight")
        if ".experts." not in name:
            assert same_bits(written.pop(name), matrix), name
            continue
        scale, _ = choose_scale(matrix.float(), spec)
        codes = quantize_with(matrix.float(), scale, spec)
        assert same_bits(written.pop(f"{module}.weight_scale"), scale), module
        if scheme == "int8-weight-only":
            packed = written.pop(f"{module}.weight_packed").view(torch.uint8)
            assert torch.equal(packed.to(torch.int16) - 128, codes.to(torch.int16)), module
            assert written.pop(f"{module}.weight_shape").tolist() == list(matrix.shape)
        else:
            assert same_bits(written.pop(f"{module}.weight"), codes), module
    assert not written


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("model", MIXTURES)
def test_each_expert_equals_the_oracle_on_its_slice(tmp_path, model, scheme):
    fused, apart, config = fused_mixture(model)
    src = write(tmp_path / "src", fused, config, place=lambda n: len(n) % 2)
    done = lowbit.convert(src, tmp_path / "out", scheme)
    check_experts(tmp_path / "out", apart, scheme)
    found = lowbit.verify(tmp_path / "out", src)
    assert found.problems == () and len(found.errors) == 2 * 3 * 3
    at = MIXTURES[model][0].format(1)
    assert len(done.plan.split_experts) == 18
    names = fused_names(model, 1)
    whole = names[-2].removesuffix(".weight")
    assert done.plan.split_experts[f"{at}.2.up_proj"] == whole
    decision = done.plan.decisions[f"{at}.2.up_proj"]
    assert (decision.role, decision.reason) == ("expert", "split from " + ".".join(whole.split(".")[-2:]))
    assert f"{2 * len(names)} tensors hold all experts of a layer, fused" in "\n".join(
        lowbit.inspect(src).odd
    )
    assert done.plan.source_bytes == sum(t.nbytes for t in fused.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("model", ["qwen3.5", "llama4"])
def test_other_float_dtypes(tmp_path, model, dtype):
    fused, apart, config = fused_mixture(model, dtype=dtype)
    lowbit.convert(write(tmp_path / "src", fused, config), tmp_path / "out", "fp8-block")
    check_experts(tmp_path / "out", apart, "fp8-block")


@pytest.mark.parametrize(("hidden", "inner"), [(128, 128), (128, 64), (64, 128), (48, 80), (130, 37)])
@pytest.mark.parametrize("model", ["qwen3.5", "llama4"])
def test_sizes_that_look_square(tmp_path, model, hidden, inner):
    """Each matrix of a pair may be square, or both; the pair says how it is stored all the same."""
    fused, apart, config = fused_mixture(model, hidden=hidden, inner=inner, layers=1)
    lowbit.convert(write(tmp_path / "src", fused, config), tmp_path / "out", "int8")
    check_experts(tmp_path / "out", apart, "int8")


def test_no_pair_fits_both_ways():
    for h, i in itertools.product(range(1, 40), repeat=2):
        assert orientation_of((2, 2 * i, h), (2, h, i)) == "rows"
        assert orientation_of((2, h, 2 * i), (2, i, h)) == "columns"
    assert orientation_of((2, 8, 4), (3, 4, 4)) is None
    assert orientation_of((2, 8, 4), (2, 5, 4)) is None


# --- block FP8 --------------------------------------------------------------------------------


def decoded(fused: Tensors, apart: Tensors, model: str) -> Tensors:
    """What fused block FP8 means, a float32 matrix per expert."""
    found: Tensors = {}
    for name, tensor in apart.items():
        if ".experts." not in name:
            found[name] = tensor
            continue
        parent, _, rest = name.rpartition(".experts.")
        e, part, _ = rest.split(".")
        names = fused_names(model, int(parent.split(".layers.")[1].split(".")[0]))
        at = names[
            ["gate_proj", "up_proj", "down_proj"].index(part) if len(names) == 3 else part == "down_proj"
        ]
        whole = decode_block_fp8(fused[at][int(e)], fused[at + "_scale_inv"][int(e)])
        whole = whole.T if MIXTURES[model][1] else whole
        if len(names) == 2 and part != "down_proj":
            whole = whole.chunk(2)[part == "up_proj"]
        found[name] = whole.contiguous()
    return found


@pytest.mark.parametrize("scheme", ["int8", "fp8", "int8-weight-only", "mxfp8"])
@pytest.mark.parametrize("model", ["qwen3.5", "qwen3-vl", "step"])
def test_fused_block_fp8_converts_in_one_step(tmp_path, model, scheme):
    fused, apart, config = fused_mixture(model)
    tensors, config = fused_block_fp8(fused, config)
    src = write(tmp_path / "src", tensors, config)
    lowbit.convert(src, tmp_path / "out", scheme)
    check_experts(tmp_path / "out", decoded(tensors, apart, model), scheme)
    assert lowbit.verify(tmp_path / "out", src).ok
    found = lowbit.inspect(src)
    assert found.quantized_modules == 18 and found.quantization.startswith("fp8: 18 × fp8-block")
    assert found.parameters == sum(t.numel() for t in fused.values())


@pytest.mark.parametrize("format", ["fp8", "compressed-tensors"])
@pytest.mark.parametrize("model", ["qwen3.5", "qwen3-vl", "step"])
def test_fused_block_fp8_is_carried_bit_for_bit(tmp_path, monkeypatch, model, format):
    monkeypatch.setattr("lowbit.checkpoint.execute.COPY_BYTES", 1000)
    fused, apart, config = fused_mixture(model)
    tensors, config = fused_block_fp8(fused, config)
    lowbit.convert(write(tmp_path / "src", tensors, config), tmp_path / "out", "fp8-block", format=format)
    written = load(tmp_path / "out")
    # As if the same experts had been quantized one by one.
    for name, matrix in apart.items():
        if ".experts." in name:
            codes = block_fp8({name: matrix}, {})[0]
            scale = name + ("_scale_inv" if format == "fp8" else "_scale")
            assert same_bits(written[name], codes[name]), name
            assert same_bits(written[scale], codes[name + "_scale_inv"]), name


@pytest.mark.parametrize(
    "options", [{"scheme": "bf16"}, {"scheme": "int8", "ignore": ["*.layers.1.*"]}], ids=str
)
@pytest.mark.parametrize("model", ["qwen3.5", "qwen3-vl", "step"])
def test_fused_block_fp8_in_float_is_dequantized_in_its_3d_tensor(tmp_path, model, options):
    fused, _, config = fused_mixture(model)
    tensors, config = fused_block_fp8(fused, config)
    lowbit.convert(write(tmp_path / "src", tensors, config), tmp_path / "out", **options)
    written = load(tmp_path / "out")
    for name in (n for n in fused if ".layers.1." in n and fused[n].dim() == 3):
        pairs = zip(tensors[name], tensors[name + "_scale_inv"], strict=True)
        want = torch.stack([decode_block_fp8(c, s) for c, s in pairs]).to(torch.bfloat16)
        assert same_bits(written[name], want), name
        assert name + "_scale_inv" not in written
    assert lowbit.verify(tmp_path / "out").ok


def test_halves_that_end_within_a_block_are_refused(tmp_path):
    fused, _, config = fused_mixture("qwen3.5", inner=192)
    src = write(tmp_path / "src", *fused_block_fp8(fused, config))
    with pytest.raises(InputError, match=r"experts\.\w+: found F8_E4M3 codes .* that cannot be read"):
        lowbit.plan(src, "int8")
    odd = "\n".join(lowbit.inspect(src).odd)
    assert "halves of 192 do not end on the border of a block of 128" in odd


# --- what stays in float stays as it is -------------------------------------------------------

FLOAT = {
    "the fused tensor": {"ignore": ["*.layers.1.*gate_up_proj"]},
    "one expert": {"ignore": ["re:.*layers\\.1\\..*experts\\.2\\."]},
    "kept": {"keep": ["*.layers.1.*.down_proj"]},
    "an override": {"overrides": {"*.layers.1.*.experts.0.up_proj": "float"}},
}


@pytest.mark.parametrize("options", FLOAT.values(), ids=FLOAT)
@pytest.mark.parametrize("model", ["qwen3.5", "llama4", "granite", "step"])
def test_a_layer_in_float_keeps_its_3d_tensors(tmp_path, model, options):
    fused, apart, config = fused_mixture(model)
    src = write(tmp_path / "src", fused, config)
    names = fused_names(model, 1)
    if "*.layers.1.*gate_up_proj" in options.get("ignore", ()):
        options = {"ignore": ["*.layers.1.*" + names[-2].removesuffix(".weight").rpartition(".")[2]]}
    done = lowbit.convert(src, tmp_path / "out", "int8", **options)
    assert not any("matches no module" in w for w in done.plan.warnings)
    at = MIXTURES[model][0].format(1)
    written = load(tmp_path / "out")
    for name in names:
        assert same_bits(written[name], fused[name])
        assert done.plan.decisions[name.removesuffix(".weight")].role == "experts-3d"
    assert not any(n.startswith(f"{at}.0") for n in written)
    assert at in done.plan.config["quantization_config"]["ignore"]
    other = MIXTURES[model][0].format(0) + ".1.up_proj"
    scale, _ = choose_scale(apart[other + ".weight"].float(), get_scheme("int8").weights)
    assert same_bits(written[other + ".weight_scale"], scale)
    assert lowbit.verify(tmp_path / "out", src).ok


@pytest.mark.parametrize("scheme", ["bf16", "fp16"])
@pytest.mark.parametrize("model", MIXTURES)
def test_float_schemes_keep_3d_tensors(tmp_path, model, scheme):
    fused, _, config = fused_mixture(model)
    lowbit.convert(write(tmp_path / "src", fused, config), tmp_path / "out", scheme)
    written = load(tmp_path / "out")
    assert set(written) == set(fused)
    dtype = torch.float16 if scheme == "fp16" else torch.bfloat16
    assert all(same_bits(written[n], fused[n].to(dtype)) for n in fused)


@pytest.mark.parametrize(
    ("inner", "scheme", "why"),
    [
        (37, "int8-weight-only", "K = 37 is not a multiple of"),
        (8, "int8", "smaller than 16: nothing to gain"),
    ],
)
@pytest.mark.parametrize("model", ["qwen3.5", "llama4"])
def test_shapes_that_are_refused_stay_fused(tmp_path, model, inner, scheme, why):
    fused, _, config = fused_mixture(model, inner=inner, layers=1)
    fused["x.weight"] = torch.randn(32, 128).to(torch.bfloat16)
    done = lowbit.convert(write(tmp_path / "src", fused, config), tmp_path / "out", scheme)
    written, at = load(tmp_path / "out"), MIXTURES[model][0].format(0)
    for leaf in ("gate_up_proj", "down_proj"):
        assert same_bits(written[f"{at}.{leaf}"], fused[f"{at}.{leaf}"])
        assert why in done.plan.decisions[f"{at}.{leaf}"].reason
    assert not done.plan.split_experts


def test_an_override_by_the_fused_name_must_mean_both(tmp_path):
    fused, apart, config = fused_mixture("qwen3.5")
    src = write(tmp_path / "src", fused, config)
    with pytest.raises(InputError, match="engines fuse these into one matmul, so they need one scheme"):
        lowbit.plan(src, "int8", overrides={"*.gate_up_proj": "fp8"})
    lowbit.convert(src, tmp_path / "out", "int8", overrides={"*.experts.*_proj": "fp8"})
    check_experts(tmp_path / "out", apart, "fp8")


def test_a_pattern_that_means_nothing_is_said(tmp_path):
    fused, _, config = fused_mixture("qwen3.5")
    decided = lowbit.plan(write(tmp_path / "src", fused, config), "int8", ignore=["*.gate_and_up"])
    assert any("'*.gate_and_up' matches no module" in w for w in decided.warnings)


def spoil(fused: Tensors, config: dict[str, Any], how: str) -> None:
    at = "model.language_model.layers.0.mlp.experts"
    match how:
        case "alternate":
            config["text_config"]["model_type"] = "gpt_oss"
        case "with others beside them that are not known here (gate_up_proj_bias)":
            fused[f"{at}.gate_up_proj_bias"] = torch.zeros(3, 256)
        case "without down_proj beside it":
            del fused[f"{at}.down_proj"]
        case "of shapes that do not fit together: [3, 256, 256] and [3, 256, 64]":
            fused[f"{at}.down_proj"] = fused[f"{at}.down_proj"][:, :, :64].contiguous()
        case "of hidden size 256, which config.json does not have":
            config["text_config"]["hidden_size"] = 512
        case "stored [experts, in, out] by a model that is not known to keep gate before up":
            config["model_type"] = "something_new"
            for name in [n for n in fused if fused[n].dim() == 3]:
                fused[name] = fused[name].transpose(1, 2).contiguous()
        case "stored as I8 without scales":
            fused[f"{at}.down_proj"] = fused[f"{at}.down_proj"].to(torch.int8)


@pytest.mark.parametrize(
    "why",
    [
        "alternate",
        "with others beside them that are not known here (gate_up_proj_bias)",
        "without down_proj beside it",
        "of shapes that do not fit together: [3, 256, 256] and [3, 256, 64]",
        "of hidden size 256, which config.json does not have",
        "stored [experts, in, out] by a model that is not known to keep gate before up",
        "stored as I8 without scales",
    ],
)
def test_a_layout_that_is_not_certain_stays_as_it_is(tmp_path, why):
    fused, _, config = fused_mixture("qwen3.5", layers=1)
    fused["x.weight"] = torch.randn(32, 32).to(torch.bfloat16)
    spoil(fused, config, why)
    src = write(tmp_path / "src", fused, config)
    done = lowbit.convert(src, tmp_path / "out", "int8")
    written = load(tmp_path / "out")
    assert {n for n in fused if n != "x.weight"} <= set(written)
    assert all(same_bits(written[n], fused[n]) for n in fused if n != "x.weight")
    decision = done.plan.decisions["model.language_model.layers.0.mlp.experts.gate_up_proj"]
    assert decision.scheme is None and why in decision.reason
    assert any(why in o for o in lowbit.inspect(src).odd)


@pytest.mark.parametrize(
    ("at", "leaves", "shape", "experts", "why"),
    [
        ("model.layers.0.mlp.experts", ("fc1.weight", "fc2.weight"), (4, 32, 64), "", "Aria"),
        ("transformer.blocks.0.ffn.experts", ("mlp.w1", "mlp.v1", "mlp.w2"), (128, 64), "", "DBRX"),
        ("model.layers.0.mlp", ("input_linear.weight", "output_linear.weight"), (4, 64, 32), "", "JetMoE"),
        (
            "model.layers.0.mlp.experts",
            ("w.weight",),
            (4, 64, 32),
            "",
            "under names whose layout is not known",
        ),
        (
            "model.layers.0.moe",
            ("gate_proj.weight", "down_proj.weight"),
            (4, 64, 32),
            ".experts",
            "without up_proj",
        ),
    ],
)
def test_what_engines_do_not_read_quantized_stays_in_float(tmp_path, at, leaves, shape, experts, why):
    """And is ignored by the name of the module that they build."""
    tensors = {f"{at}.{leaf}": torch.randn(shape).to(torch.bfloat16) for leaf in leaves}
    src = write(tmp_path / "src", {**tensors, "x.weight": torch.randn(32, 32)}, {"architectures": ["X"]})
    done = lowbit.convert(src, tmp_path / "out", "int8")
    written = load(tmp_path / "out")
    for name, tensor in tensors.items():
        assert same_bits(written[name], tensor)
        assert why in done.plan.decisions[name.removesuffix(".weight")].reason
    assert done.plan.config["quantization_config"]["ignore"][0] == at + experts
    odd = "\n".join(lowbit.inspect(src).odd)
    assert f"{len(leaves)} of them cannot be quantized" in odd and why in odd


# --- reading, damage, resuming, memory --------------------------------------------------------


@pytest.mark.parametrize("tile", [1, 700, 1 << 20])
@pytest.mark.parametrize("dtype", ["F8_E4M3", "BF16", "F32"])
def test_rows_of_a_transposed_matrix(tmp_path, monkeypatch, tile, dtype):
    monkeypatch.setattr(reading, "TILE_BYTES", tile)
    monkeypatch.setattr(reading, "_STRIP_BYTES", 600)
    unsigned = {"F8_E4M3": np.uint8, "BF16": np.uint16, "F32": np.uint32}[dtype]
    stored = np.random.default_rng(0).integers(0, 200, (45, 61)).astype(unsigned)
    (tmp_path / "f").write_bytes(b"head" + stored.tobytes())
    item = stored.itemsize
    # Columns 20 … 52 of what is stored, as rows.
    ref = TensorRef("w", dtype, (33, 45), tmp_path / "f", 4 + 20 * item, pitch=61)
    want = np.ascontiguousarray(stored[:, 20:53].T)
    assert np.array_equal(reading.read_bytes(ref), want.view(np.uint8).reshape(-1))
    rows = reading.TransposedRows()
    with (tmp_path / "f").open("rb") as stream:
        for start, stop in [(0, 5), (5, 6), (6, 33), (3, 4), (32, 33), (0, 33)]:
            part = rows.read(stream.fileno(), ref, start * 45 * item, (stop - start) * 45 * item)
            assert np.array_equal(part, want[start:stop].view(np.uint8).reshape(-1)), (start, stop)


@pytest.mark.parametrize("model", ["qwen3.5", "llama4"])
def test_the_bytes_do_not_depend_on_tiles(tmp_path, monkeypatch, model):
    fused, apart, config = fused_mixture(model)
    src = write(tmp_path / "src", fused, config)
    monkeypatch.setattr(reading, "TILE_BYTES", 5000)
    monkeypatch.setattr("lowbit.checkpoint.execute.BLOCK_BYTES", 3000)
    for scheme in ("int8", "int8-block"):
        lowbit.convert(src, tmp_path / scheme, scheme)
        check_experts(tmp_path / scheme, apart, scheme)


@pytest.mark.parametrize("model", MIXTURES)
def test_a_value_that_is_not_finite_is_named_by_expert(tmp_path, model):
    fused, _, config = fused_mixture(model)
    names = fused_names(model, 1)
    row = 5 if len(names) == 3 else 128 + 5
    fused[names[-2]][(2, 7, row) if MIXTURES[model][1] else (2, row, 7)] = torch.nan
    src = write(tmp_path / "src", fused, config)
    with pytest.raises(
        InputError, match=r"layers\.1\..*experts\.2\.up_proj\.weight: .*found nan at \[5, 7\]"
    ):
        lowbit.convert(src, tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()


def test_verify_finds_the_slice_that_differs(tmp_path):
    fused, _, config = fused_mixture("llama4")
    src = write(tmp_path / "src", fused, config)
    lowbit.convert(src, tmp_path / "out", "int8")
    at = MIXTURES["llama4"][0].format(0)
    # The source's expert 1: its gate is no longer what was converted.
    fused[at + ".gate_up_proj"][1, :, :128] *= -1
    errors = lowbit.verify(tmp_path / "out", write(tmp_path / "other", fused, config)).errors
    assert errors[0].name == f"{at}.1.gate_proj.weight" and errors[0].sqnr_db < 0
    assert all(e.sqnr_db > 30 for e in errors[1:])
    # One byte of what was written.
    file = tmp_path / "out" / "model.safetensors"
    ref = open_checkpoint(tmp_path / "out").tensors[f"{at}.2.down_proj.weight"]
    raw = bytearray(file.read_bytes())
    raw[ref.offset + 1000] ^= 1
    file.write_bytes(raw)
    assert lowbit.verify(tmp_path / "out").problems == (
        f"{ref.name}: the data changed since it was written (checksum differs); convert it again",
    )
    # An expert that the source does not have.
    for leaf in ("gate_up_proj", "down_proj"):
        fused[f"{at}.{leaf}"] = fused[f"{at}.{leaf}"][:2].contiguous()
    problems = lowbit.verify(tmp_path / "out", write(tmp_path / "fewer", fused, config)).problems
    assert sum("the source has no such weight" in p for p in problems) == 3


STOP = """
import os, sys
from lowbit.checkpoint import execute
import lowbit
run, done = execute.Worker.run, []
def stop(self, job):
    done.append(job)
    if len(done) > 11:
        os._exit(9)
    return run(self, job)
execute.Worker.run = stop
lowbit.convert(sys.argv[1], sys.argv[2], "int8", workers=1)
"""


@pytest.mark.parametrize("model", ["qwen3.5", "llama4"])
def test_a_killed_run_goes_on_within_a_fused_tensor(tmp_path, model):
    fused, apart, config = fused_mixture(model)
    src, out = write(tmp_path / "src", fused, config), tmp_path / "out"
    assert subprocess.run([sys.executable, "-c", STOP, str(src), str(out)], check=False).returncode == 9
    assert len(read_journal(out / PARTIAL / "journal.jsonl").done) == 11
    with pytest.raises(InputError, match="unfinished conversion of another source or with other settings"):
        lowbit.convert(src, out, "int8", ignore=["*.layers.1.*"])
    assert lowbit.convert(src, out, "int8").resumed_jobs == 11
    check_experts(out, apart, "int8")


def test_the_plan_names_what_it_reads(tmp_path):
    """Two layouts of one source, with the same names and shapes everywhere, are two plans."""
    fused, _, config = fused_mixture("llama4", hidden=128, inner=128, layers=1)
    decided = lowbit.plan(write(tmp_path / "src", fused, config), "int8")
    view = split(decided.source).checkpoint.tensors
    assert all(r.pitch for n, r in view.items() if ".experts." in n)
    jobs = tuple(turned(j) for j in decided.jobs)
    other = Plan(**{**vars(decided), "jobs": jobs})
    assert other.digest() != decided.digest()


def turned(job):
    from dataclasses import replace

    if job.source is None or not job.source.ref.pitch:
        return job
    return replace(job, source=replace(job.source, ref=replace(job.source.ref, pitch=0)))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("model", ["qwen3.5", "llama4"])
def test_memory_does_not_depend_on_the_size_of_the_tensor(tmp_path, model):
    """Eight times the experts in the same two tensors (201 MB) take no more memory."""
    for name, experts in {"small": 8, "large": 64}.items():
        fused, _, config = fused_mixture(model, hidden=1024, inner=512, experts=experts, layers=1)
        write(tmp_path / name, fused, config)
        del fused
    assert memory_grown(tmp_path, "int8", workers=2) < 24 << 20
    lowest = min(e.sqnr_db for e in lowbit.verify(tmp_path / "b", tmp_path / "large").errors)
    assert lowest > 30


def test_dequantized_by_hand(tmp_path):
    """The names and the halves, once more without the tables of this file: what an engine reads of Llama 4."""
    fused, _, config = fused_mixture("llama4", layers=1)
    lowbit.convert(write(tmp_path / "src", fused, config), tmp_path / "out", "int8")
    written, at = load(tmp_path / "out"), "language_model.model.layers.0.feed_forward.experts"
    x = torch.randn(5, 256)
    for e in range(3):
        gate, up = (x @ fused[f"{at}.gate_up_proj"][e].float()).chunk(2, dim=-1)
        want = (torch.nn.functional.silu(gate) * up) @ fused[f"{at}.down_proj"][e].float()
        names = [f"{at}.{e}.{p}_proj.weight" for p in ("gate", "up", "down")]
        g, u, d = (dequantize(written[n], written[n + "_scale"], get_scheme("int8").weights) for n in names)
        got = (torch.nn.functional.silu(x @ g.T) * (x @ u.T)) @ d.T
        assert (got - want).norm() < 0.03 * want.norm()


@pytest.mark.parametrize("model", ["qwen3.5", "llama4"])
def test_experts_in_float_beside_ascends_int8_are_a_source(tmp_path, model):
    """Their matrices are in no description; nothing could be made of such a checkpoint, nor `eval` read it."""
    fused, _, config = fused_mixture(model)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        fused[f"model.layers.0.self_attn.{name}.weight"] = torch.randn(128, 128).bfloat16()
    src = write(tmp_path / "src", fused, config)
    lowbit.convert(src, tmp_path / "out", "int8", format="ascend", ignore=["*.experts.*"])
    assert lowbit.verify(tmp_path / "out", src).ok
    lowbit.convert(tmp_path / "out", tmp_path / "again", "int8", overrides={"*.experts.*": "int8"})
    lowbit.convert(src, tmp_path / "at once", "int8")
    again, at_once = load(tmp_path / "again"), load(tmp_path / "at once")
    assert again.keys() == at_once.keys() and all(same_bits(again[n], at_once[n]) for n in again)


@pytest.mark.parametrize("model", ["qwen3.5", "llama4"])
def test_quantized_in_one_tensor_they_are_verified_and_not_loaded(tmp_path, model):
    """As published: `verify` said of every such download that its codes cannot be read."""
    src = write(tmp_path / "src", *fused_block_fp8(*fused_mixture(model)[::2]))
    report = lowbit.verify(src, src)
    assert report.ok and len(report.errors) == 18 and all(e.largest == 0 for e in report.errors)
    tensors = load(src)
    scale = next(n for n in tensors if n.endswith("down_proj_scale_inv"))
    tensors[scale][1, -1, 0] = torch.nan
    bad = write(tmp_path / "bad", tensors, json.loads((src / "config.json").read_text()))
    assert any(scale in p and "expected finite" in p for p in lowbit.verify(bad).problems)
    config = json.loads((src / "config.json").read_text())
    known = {"model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"], "hidden_size": 256}
    write(tmp_path / "known", load(src), {**config, **known})
    with pytest.raises(
        InputError, match="found them quantized in one tensor of each layer; convert the checkpoint"
    ):
        lowbit.load(tmp_path / "known")
