"""What we write is what the compressed-tensors library writes, reads and validates."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import decompress_module
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)
from compressed_tensors.utils.match import match_named_modules
from hypothesis import given
from hypothesis import strategies as st
from sample_models import block_fp8, deepseek_v3, llama, load, qwen3_moe, same_bits, write
from torch import nn

import lowbit
from lowbit.errors import InputError
from lowbit.formats import FORMATS, get_format, quantization_of, read
from lowbit.formats.format import Layout
from lowbit.formats.joined import with_joined
from lowbit.formats.name_patterns import name_patterns, towers, wherever
from lowbit.granularity import PerBlock
from lowbit.quantize import quantize
from lowbit.scheme import SCHEMES, get_scheme

WRITTEN = ["int8", "int8-block", "int8-weight-only", "fp8", "fp8-block", "mxfp8"]
FORMAT = get_format("compressed-tensors")


def convert(tmp_path: Path, model=llama, scheme="int8", **kw) -> tuple[Path, dict]:
    src = write(tmp_path / "src", *model())
    lowbit.convert(src, tmp_path / "out", scheme, **kw)
    return tmp_path / "out", json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if SCHEMES[s].weights])
def test_the_library_accepts_the_config_and_reads_the_same(scheme):
    config = FORMAT.config(Layout(modules={"a.b": get_scheme(scheme)}, ignored=("lm_head",)))
    parsed = QuantizationConfig.model_validate(config)
    assert parsed.quantization_status == QuantizationStatus.COMPRESSED
    assert parsed.ignore == ["lm_head"] and parsed.format == config["format"]
    group = parsed.config_groups["group_0"]
    spec = get_scheme(scheme).weights
    assert spec is not None and group.weights is not None
    assert group.targets == ["Linear"] and group.weights.num_bits == 8
    assert group.weights.type == ("int" if spec.dtype.kind == "int" else "float")
    assert group.weights.symmetric is True and group.weights.dynamic is False
    activations = get_scheme(scheme).activations
    if activations is None:
        assert group.input_activations is None
    else:
        assert group.input_activations is not None
        assert group.input_activations.symmetric == activations.symmetric
        assert group.input_activations.dynamic == activations.dynamic
    if spec.scale == "e8m0":
        assert group.weights.scale_dtype == torch.uint8


def test_only_keys_that_old_versions_know():
    """`QuantizationArgs` forbids unknown keys: newer keys break older engines."""
    for scheme in SCHEMES.values():
        if scheme.weights is None:
            continue
        config = FORMAT.config(Layout(modules={"a.b": scheme}, ignored=()))
        assert set(config) == {
            "quant_method", "format", "quantization_status", "global_compression_ratio", "kv_cache_scheme",
            "ignore", "config_groups",
        }  # fmt: skip
        group = config["config_groups"]["group_0"]
        assert set(group) == {"targets", "format", "weights", "input_activations", "output_activations"}
        old = {"num_bits", "type", "symmetric", "strategy", "group_size", "dynamic"}
        extra = {
            "fp8-block": {"block_structure"},
            "int8-block": {"block_structure"},
            "mxfp8": {"scale_dtype"},
        }
        assert set(group["weights"]) == old | extra.get(scheme.name, set())


def test_the_kv_cache_scheme():
    kv = get_scheme("fp8-static").activations
    config = FORMAT.config(Layout(modules={"a.b": get_scheme("fp8")}, ignored=(), kv_cache=kv))
    assert config["kv_cache_scheme"] == {
        "num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "group_size": None, "dynamic": False,
    }  # fmt: skip
    assert QuantizationConfig.model_validate(config).kv_cache_scheme is not None


def by_library(module: str, tensors: dict, config: dict) -> torch.Tensor:
    """The weight as the library decompresses it, under the group that it picks."""
    parsed = QuantizationConfig.model_validate(config["quantization_config"])
    local = {n.removeprefix(module + "."): t for n, t in tensors.items() if n.startswith(module + ".")}
    shape = local["weight_shape"].tolist() if "weight_packed" in local else list(local["weight"].shape)
    model = nn.Module()
    parent = model
    *path, last = module.split(".")
    for part in path:
        parent.add_module(part, nn.Module())
        parent = getattr(parent, part)
    linear = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.float32)
    parent.add_module(last, linear)
    groups = []
    for scheme in parsed.config_groups.values():
        if any(True for _ in match_named_modules(model, scheme.targets, parsed.ignore)):
            groups.append(scheme)
    named = [g for g in groups if g.targets != ["Linear"]]
    scheme = (named or groups)[0]
    del linear.weight
    for name, t in local.items():
        linear.register_parameter(name, nn.Parameter(t.clone(), requires_grad=False))
    linear.quantization_scheme = scheme
    linear.quantization_status = QuantizationStatus.COMPRESSED
    decompress_module(linear)
    return linear.weight.data


@pytest.mark.parametrize("scheme", WRITTEN)
@pytest.mark.parametrize("model", [llama, qwen3_moe, deepseek_v3], ids=lambda m: m.__name__)
def test_the_library_decompresses_to_the_same_values(tmp_path, model, scheme):
    out, config = convert(tmp_path, model, scheme)
    tensors, (before, _) = load(out), model()
    stored = read(config, lowbit.plan(out, "bf16").source.tensors)
    assert len(stored) > 10
    for module, found in list(stored.items())[::3]:
        q = quantize(before[module + ".weight"].float(), found.spec)
        theirs = by_library(module, tensors, config)
        ours = q.dequantize()
        if theirs.dtype != torch.float32:
            ours = ours.to(theirs.dtype)
        assert theirs.dtype in (torch.float32, torch.bfloat16)
        assert same_bits(theirs, ours), module


def test_mixed_groups_reach_their_modules_in_the_library(tmp_path):
    src = write(tmp_path / "src", *block_fp8(*llama()))
    lowbit.convert(src, tmp_path / "out", "int8", keep=["*.down_proj"], overrides={"*.o_proj": "mxfp8"})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    parsed = QuantizationConfig.model_validate(config["quantization_config"])
    assert parsed.format == "mixed-precision" and len(parsed.config_groups) == 3
    tensors = load(tmp_path / "out")
    meant = lowbit.convert(src, tmp_path / "bf16", "bf16") and load(tmp_path / "bf16")
    for module in ("mlp.down_proj", "mlp.up_proj", "self_attn.o_proj", "self_attn.q_proj"):
        name = f"model.layers.1.{module}"
        theirs = by_library(name, tensors, config).float()
        x = meant[name + ".weight"].float()
        assert (theirs - x).norm() / x.norm() < 0.05, module


@given(st.integers(1, 5), st.integers(1, 8), st.integers(0, 999))
def test_packing_is_the_librarys(rows, words, seed):
    codes = torch.randint(
        -128, 128, (rows, 4 * words), generator=torch.Generator().manual_seed(seed), dtype=torch.int8
    )
    ours = (codes.to(torch.int16) + 128).to(torch.uint8).view(torch.int32)
    assert torch.equal(ours, pack_to_int32(codes, 8))
    assert torch.equal(unpack_from_int32(ours, 8, codes.shape), codes)


# --- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", WRITTEN)
def test_what_is_written_is_read_back(tmp_path, scheme):
    out, config = convert(tmp_path, deepseek_v3, scheme)
    plan = lowbit.plan(tmp_path / "src", scheme)
    stored = read(config, lowbit.plan(out, "bf16").source.tensors)
    expected = {m: d.scheme for m, d in plan.decisions.items() if d.scheme is not None}
    assert {m: s.scheme.weights for m, s in stored.items()} == {m: s.weights for m, s in expected.items()}


class Info:
    def __init__(self, dtype: str, *shape: int) -> None:
        self.dtype, self.shape = dtype, shape


def group(targets, **weights) -> dict:
    args = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "channel",
        "dynamic": False,
    } | weights
    return {"targets": targets, "weights": args}


def module(name: str, dtype="I8", scale=(64, 1)) -> dict:
    return {f"{name}.weight": Info(dtype, 64, 256), f"{name}.weight_scale": Info("F32", *scale)}


def test_names_win_over_patterns_and_patterns_over_classes():
    config = {
        "config_groups": {
            "class": group(["Linear"]),
            "name": group(["lm_head"], strategy="tensor"),
            "pattern": group([r"re:.*\.down_proj$"], strategy="block", block_structure=[64, 64]),
            "exact": group(["m.1.down_proj"], strategy="group", group_size=128),
        }
    }
    tensors = (
        module("m.0.up_proj") | module("lm_head", scale=(1,)) | module("m.0.down_proj", scale=(1, 4))
        | module("m.1.down_proj", scale=(64, 2))
    )  # fmt: skip
    found = FORMAT.read(config, tensors)
    assert {n: str(m.spec.granularity) for n, m in found.items()} == {
        "m.0.up_proj": "per channel",
        "lm_head": "per tensor",
        "m.0.down_proj": "per 64×64 block",
        "m.1.down_proj": "per group of 128",
    }


def test_a_group_for_one_name_does_not_take_the_others():
    """`lm_head` has no dot and is still not a class."""
    config = {"config_groups": {"a": group(["lm_head"], strategy="tensor"), "b": group(["Linear"])}}
    found = FORMAT.read(config, module("m.0.up_proj") | module("lm_head", scale=(1,)))
    assert str(found["m.0.up_proj"].spec.granularity) == "per channel"


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"config_groups": {}}, module("a.b"), "expected config_groups, found none"),
        (
            {"config_groups": {"g": group(["x.y"])}},
            module("a.b"),
            "a.b: expected a config group that targets it",
        ),
        (
            {"config_groups": {"g": group(["Linear"], num_bits=6)}},
            module("a.b"),
            "INT8, FP8 or INT4 codes, found type=int, num_bits=6",
        ),
        (
            {"config_groups": {"g": group(["Linear"], num_bits=4)}},
            module("a.b"),
            "INT4 codes as a.b.weight_packed, found I8",
        ),
        (
            {"config_groups": {"g": group(["Linear"], num_bits=4, type="float")}},
            module("a.b"),
            "found type=float, num_bits=4",
        ),
        (
            {
                "config_groups": {
                    "g": group(["Linear"], num_bits=4)
                    | {
                        "input_activations": {
                            "num_bits": 8,
                            "type": "int",
                            "dynamic": True,
                            "strategy": "token",
                        }
                    }
                }
            },
            module("a.b"),
            "INT4 weights with activations in float",
        ),
        (
            {"config_groups": {"g": group(["Linear"], strategy="odd")}},
            module("a.b"),
            "known strategy, found 'odd'",
        ),
        (
            {"config_groups": {"g": {"targets": ["Linear"]}}},
            module("a.b"),
            "expected weights in every config group",
        ),
        (
            {"config_groups": {"g": group(["Linear"], type="float")}},
            module("a.b"),
            "expected F8_E4M3 codes, as config.json says, found I8",
        ),
        (
            {"config_groups": {"g": group(["Linear"])}},
            {"a.b.weight": Info("I8", 4, 4)},
            "expected a scale named",
        ),
        (
            {"config_groups": {"g": group(["Linear"])}},
            module("a.b", scale=(64, 2)),
            r"scale of shape \[64, 1\]",
        ),
        (
            {"config_groups": {"g": group(["Linear"])}},
            module("a.b") | {"a.b.weight_g_idx": Info("I32", 256)},
            "a column order, which are not read",
        ),
        (
            {"config_groups": {"g": group(["Linear"])}, "sparsity_config": {"format": "sparse-24-bitmask"}},
            {"a.b.compressed": Info("I8", 64, 64)},
            "weights with all of their columns, found sparse-24-bitmask",
        ),
        (
            {"config_groups": {"g": group(["Linear"], num_bits=4)}, "format": "marlin-24"},
            {"a.b.weight_packed": Info("I32", 64, 64)},
            "weights with all of their columns, found marlin-24",
        ),
        (
            {"config_groups": {}, "kv_cache_scheme": {"num_bits": 8, "type": "float"}},
            module("a.b"),
            "a.b: expected a config group that targets it",
        ),
    ],
)
def test_what_cannot_be_read(config, tensors, message):
    with pytest.raises(InputError, match=message):
        FORMAT.read(config, tensors)


def test_only_the_kv_cache_is_quantized(tmp_path):
    tensors, config = llama()
    tensors["model.layers.0.self_attn.k_scale"] = torch.tensor([0.5])
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": cache,
    }  # fmt: skip
    lowbit.convert(write(tmp_path / "src", tensors, config), tmp_path / "out", "int8")
    out = quantization_of(json.loads((tmp_path / "out" / "config.json").read_text()))
    assert {key: out["kv_cache_scheme"][key] for key in cache} == cache
    assert "model.layers.0.self_attn.k_scale" in load(tmp_path / "out")


def test_a_block_as_older_versions_wrote_it():
    tensors = {"a.b.weight": Info("F8_E4M3", 256, 512), "a.b.weight_scale": Info("BF16", 4, 4)}
    groups = {"g": group(["Linear"], type="float", strategy="block", block_structure="64x128")}
    found = FORMAT.read({"config_groups": groups}, tensors)
    assert str(found["a.b"].spec.granularity) == str(PerBlock(64, 128))


def test_a_checkpoint_of_the_library_itself(tmp_path):
    """W8A8 as llm-compressor writes it: BF16 scales, absmax / 127.5, codes down to −128."""
    tensors, config = llama()
    args = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
    activations = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=activations)
    quantized = QuantizationConfig(
        config_groups={"group_0": scheme}, format="int-quantized", quantization_status="compressed", ignore=["lm_head"],
    )  # fmt: skip
    from compressed_tensors.compressors import IntQuantizationCompressor

    stored, meant = {}, {}
    for name, t in tensors.items():
        if not name.endswith("_proj.weight"):
            stored[name] = meant[name] = t
            continue
        scale = (t.float().abs().amax(1, keepdim=True) / 127.5).to(torch.bfloat16)
        part = IntQuantizationCompressor.compress({"weight": t, "weight_scale": scale}, scheme)
        assert part["weight"].dtype == torch.int8
        for key, value in part.items():
            stored[name.removesuffix("weight") + key] = value
        meant[name] = part["weight"].float() * scale.float()
    body = json.loads(quantized.model_dump_json()) | {"quant_method": "compressed-tensors"}
    src = write(tmp_path / "src", stored, config | {"quantization_config": body})
    lowbit.convert(src, tmp_path / "same", "int8")
    for name, t in load(tmp_path / "same").items():
        assert same_bits(t, stored[name].float() if name.endswith("weight_scale") else stored[name]), name
    lowbit.convert(src, tmp_path / "block", "int8-block")
    found = load(tmp_path / "block")
    name = "model.layers.0.mlp.down_proj"
    spec = get_scheme("int8-block").weights
    assert spec is not None
    q = quantize(meant[name + ".weight"], spec)
    assert same_bits(found[name + ".weight"], q.codes) and same_bits(found[name + ".weight_scale"], q.scale)


# --- name patterns ----------------------------------------------------------------------------


def test_patterns_are_short_and_exact():
    layers = [f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in range(3) for e in range(4)]
    others = [f"model.layers.{i}.mlp.experts.{e}.down_proj" for i in range(3) for e in range(4)]
    assert name_patterns(layers, others) == [r"re:.*\blayers\.\d+\.mlp\.experts\.\d+\.up_proj$"]
    assert name_patterns(layers[:1], others) == [r"re:.*\blayers\.0\.mlp\.experts\.\d+\.up_proj$"]
    assert name_patterns(["lm_head"], layers) == ["lm_head"]
    # A pattern that would take in a module outside is not used.
    in_two = [rf"re:.*\blayers\.{i}\.mlp\.experts\.\d+\.up_proj$" for i in range(2)]
    assert name_patterns(layers[:-1], layers[-1:]) == in_two + layers[8:-1]
    assert name_patterns(layers[:4], layers[4:] + others) == in_two[:1]
    # What comes before the layers is open unless that takes in more.
    tower = [n.replace("model.", "tower.", 1) for n in layers]
    assert name_patterns(layers, others + tower) == [r"re:model\.layers\.\d+\.mlp\.experts\.\d+\.up_proj$"]


@pytest.mark.parametrize("stem", ["layers", "decoder_layers", "mtp_layers"])
def test_patterns_of_layers_by_any_name_match_them(stem):
    """LightGlue has `match_assignment_layers`, MiMo `mtp_layers`: nothing that began at `layers` was in their names."""
    members = [f"model.{stem}.{i}.fc1" for i in range(3)]
    others = [f"model.{stem}.{i}.fc2" for i in range(3)]
    (target,) = name_patterns(members, others)
    assert target == rf"re:.*\b{stem}\.\d+\.fc1$"
    assert all(re.match(target[3:], n) for n in members) and not any(re.match(target[3:], n) for n in others)


# Prefixes of language models in checkpoints → in vLLM (its models' `hf_to_vllm_mapper`), which translates the names
# among the targets but no patterns.
WRAPPED = {
    "model.language_model.layers": "language_model.model.layers",
    "language_model.model.layers": "language_model.model.layers",
    "thinker.model.layers": "language_model.model.layers",
}


@pytest.mark.parametrize("prefix", WRAPPED)
def test_patterns_of_wrapped_models_match_in_engines_that_wrap_them_otherwise(prefix):
    members = [f"{prefix}.{i}.self_attn.{p}_proj" for i in range(3) for p in "qkvo"]
    others = [f"{prefix}.{i}.mlp.down_proj" for i in range(3)] + ["model.visual.blocks.0.attn.qkv"]
    targets = name_patterns(members, others)
    assert len(targets) == 4 and all(t.startswith("re:") for t in targets)
    for names, wanted in ((members, True), (others, False)):
        for name in (*names, *(n.replace(prefix, WRAPPED[prefix]) for n in names)):
            assert any(re.match(t[3:], name) for t in targets) == wanted


def test_patterns_of_wrapped_models_leave_a_tower_with_the_same_layers_alone():
    members = [f"model.language_model.layers.{i}.self_attn.q_proj" for i in range(3)]
    tower = [f"model.vision_tower.encoder.layers.{i}.self_attn.q_proj" for i in range(3)]
    (target,) = name_patterns(members, tower)
    for name in (*members, "language_model.model.layers.2.self_attn.q_proj"):
        assert re.match(target[3:], name)
    assert not any(re.match(target[3:], t) for t in tower)


def test_what_stays_in_a_wrapped_model_is_ignored_by_other_names_too():
    """SGLang has visual for model.visual, its layers below model alone, and out_proj of towers as proj."""
    text = [f"model.language_model.layers.{i}.mlp.{p}_proj" for i in range(2) for p in ("gate", "up", "down")]
    tower = [
        "model.visual.blocks.0.attn.qkv", "model.visual.merger.proj", "vision_tower.layers.0.mlp.down_proj",
    ]  # fmt: skip
    assert towers(["lm_head", text[-1], *tower], text[:-1]) == ["visual", "vision_tower"]
    assert towers(["model.encoder.layers.0.fc1"], ["model.decoder.layers.0.encoder.fc1"]) == []
    patterns = wherever(["lm_head", text[-1], *tower], text[:-1])
    assert len(patterns) == 3

    def ignored(name: str) -> bool:
        return any(re.match(p[3:], name) for p in patterns)

    assert all(
        map(ignored, ("visual.blocks.0.attn.qkv_proj", "model.vision_tower.layers.1.attn.proj", *tower))
    )
    assert ignored("language_model.model.layers.1.mlp.down_proj")
    assert not any(
        map(ignored, (*text[:-1], "language_model.model.layers.0.mlp.down_proj", "visually.x", "lm_head"))
    )
    # Groups have patterns for single modules too: SGLang loaded INT8 codes as another group's FP8.
    layout = Layout(
        modules={"model.layers.0.up_proj": get_scheme("int8"), "model.layers.0.o_proj": get_scheme("fp8")},
        ignored=("visual.merger.proj",),
    )
    groups = FORMAT.config(layout)["config_groups"]
    assert groups["group_1"]["targets"] == [r"re:.*\blayers\.0\.o_proj$"]
    # And layers.0 for Mixtral's.
    assert wherever(["lm_head", "model.layers.0.o_proj"], ["model.layers.1.o_proj"]) == [
        r"re:.*\blayers\.0\.o_proj$"
    ]


@pytest.mark.parametrize(
    ("model_type", "on_disk", "in_memory"),
    [("gemma2", "", "lm_head"), ("gpt_neox", "embed_out", "lm_head"), ("llava", "language_model.lm_head", "lm_head"),
     ("whisper", "", "proj_out"), ("modernbert", "", "decoder"), ("bert", "", "cls.predictions.decoder")],
)  # fmt: skip
def test_output_heads_are_ignored_by_the_name_that_transformers_has(tmp_path, model_type, on_disk, in_memory):
    """It made a quantized Linear of what is in float, or in no shard, and found no scale: all logits were NaN or 0."""
    names = ["model.layers.0.fc1", *([on_disk] if on_disk else [])]
    tensors = {f"{n}.weight": torch.randn(128, 128) for n in names}
    source = write(tmp_path / "src", tensors, {"architectures": ["X"], "model_type": model_type})
    ignored = lowbit.plan(source, "int8").config["quantization_config"]["ignore"]
    assert {in_memory, *names[1:]} <= set(ignored)
    if on_disk:
        quantized = lowbit.plan(source, "int8", overrides={on_disk: "int8"}).config["quantization_config"]
        assert not {on_disk, in_memory} & set(quantized["ignore"])


@pytest.mark.parametrize(
    ("part", "asked"), [("mamba", "mixer"), ("conv", "short_conv"), ("block_sparse_moe", "mlp")]
)
def test_modules_have_the_name_by_which_vllm_asks_for_their_scheme(tmp_path, part, asked):
    """Granite 4 and Bamba; LFM2; MiniMax-M2: in a group's targets, and in what is ignored."""
    parts = [f"model.layers.{i}.{part}.{p}_proj" for i in range(3) for p in ("in", "out")]
    names = parts + [f"model.layers.{i}.ffn.{p}_proj" for i in range(3) for p in ("up", "down")]
    tensors = {f"{n}.weight": torch.randn(128, 128) for n in names}
    source = write(tmp_path / "src", tensors, {"architectures": ["X"]})
    in_float = {"*.layers.2.*.out_proj": "float"}
    both = [f"model.layers.2.{called}.out_proj" for called in (part, asked)]
    config = lowbit.plan(source, "fp8-block", format="fp8", overrides=in_float).config
    assert config["quantization_config"]["modules_to_not_convert"] == [*both, "lm_head"]
    config = lowbit.plan(source, "int8", overrides={"*.in_proj": "fp8", **in_float}).config
    assert config["quantization_config"]["ignore"][:2] == both
    groups = config["quantization_config"]["config_groups"]
    assert groups["group_0"]["targets"] == ["Linear"]
    targets = groups["group_1"]["targets"]
    assert len(targets) == 2  # whatever the number of layers
    for name in names:
        for called in (name, name.replace(part, asked)):
            assert any(re.match(t[3:], called) for t in targets) == name.endswith("in_proj")


@pytest.mark.parametrize(
    ("config", "module", "asked"),
    [
        ({"model_type": "falcon_h1", "num_hidden_layers": 8}, "layers.3.mamba.in_proj", "model.11.mixer.in_proj"),
        ({"model_type": "falcon_h1"}, "layers.3.self_attn.q_proj", "model.layers.3.qkv_proj"),
        ({"model_type": "zamba2", "hybrid_layer_ids": [1, 3]}, "layers.2.mamba.in_proj", "4.mixer.in_proj"),
        ({"model_type": "zamba2", "hybrid_layer_ids": [1, 3]}, "layers.3.linear", "5.linear"),
        (
            {"model_type": "zamba2", "hybrid_layer_ids": [1, 3]},
            "layers.3.mamba_decoder.mamba.out_proj",
            "5.mixer.out_proj",
        ),
        ({"model_type": "zamba2"}, "layers.3.shared_transformer.self_attn.q_proj", "model.qkv_proj"),
        ({"model_type": "zamba2"}, "layers.3.shared_transformer.feed_forward.up_proj", "model.feed_forward.up_proj"),
        ({"model_type": "phimoe"}, "layers.0.block_sparse_moe.gate", "model.layers.0.mlp.router"),
        ({"model_type": "glm4v"}, "visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.qkv_proj"),
        ({"model_type": "bert"}, "layer.0.attention.self.key", "model.layer.0.attention.output.qkv_proj"),
        ({"model_type": "nomic_bert"}, "encoder.layers.3.attn.Wqkv", ".encoder.layer.3.attention.qkv_proj"),
        ({"model_type": "nomic_bert"}, "encoder.layers.3.mlp.fc12", ".encoder.layer.3.mlp.gate_up_proj"),
        ({"model_type": "new"}, "encoder.layer.3.attention.o_proj", ".encoder.layer.3.attention.dense"),
        ({"model_type": "ernie4_5_moe", "num_hidden_layers": 8}, "mtp_block.0.mlp.x", "model.layers.8.mlp.x"),
        ({"model_type": "mimo", "num_hidden_layers": 8}, "mtp_layers.1.mlp.x", "model.layers.9.mlp.x"),
        ({"model_type": "qwen2_5_omni"}, "visual.blocks.0.attn.k", "model.visual.blocks.0.attn.qkv"),
    ],
)  # fmt: skip
def test_modules_that_vllm_names_otherwise(config, module, asked):
    """Falcon-H1's in_proj in blocks has a scale per channel, which vLLM 0.32 took for one of blocks; it took GLM-4.1V's
    tower and PhiMoE's routers in BF16 for codes."""
    assert with_joined([f"model.{module}"], config)[0] == f"model.{module}"
    assert asked in with_joined([f"model.{module}"], config)


def test_what_stays_of_an_encoder_is_named_as_vllm_asks_for_it():
    """With `--ignore`, vLLM 0.32 took BF16 weights of RoBERTa's classifiers for codes."""
    module = "roberta.encoder.layer.0.attention.self.query"
    named = with_joined([module], {"model_type": "xlm-roberta"})
    for start in ("roberta", "bert"):
        assert f"{start}.encoder.layer.0.attention.output.qkv_proj" in named


@pytest.mark.parametrize(
    ("model_type", "module", "asked"),
    [
        ("qwen2", "layers.0.mlp.up_proj", "model.layers.0.mlp.gate_up_proj"),  # an embedder's
        ("bailing_hybrid", "model.layers.0.attention.f_proj", "model.layers.0.self_attn.f_proj"),
        ("llama", "fc", "model.fc"),
        ("beam", "model.layers.0.self_attn.gate_proj", "model.layers.0.self_attn.output_gate_proj"),
        ("gpt_oss", "model.layers.0.self_attn.q_proj", "model.layers.0.attn.qkv_proj"),
        ("modernbert", "model.layers.0.attn.Wo", "modernbert.encoder_layer.layers.0.attn.Wo"),
        ("hrm_text", "model.L_module.layers.0.attn.o_proj", "model.L_module.layers.0.self_attn.o_proj"),
        ("exaone", "transformer.h.0.mlp.c_fc_1", "model.h.0.mlp.gate_up_proj"),
        ("exaone", "transformer.h.0.attn.attention.v_proj", "transformer.h.0.self_attn.qkv_proj"),
        ("lfm2_moe", "model.layers.0.feed_forward.w3", "model.layers.0.feed_forward.gate_up_proj"),
        ("lfm2_moe", "model.layers.0.feed_forward.w2", "model.layers.0.feed_forward.down_proj"),
        ("whisper", "model.decoder.layers.0.self_attn.q_proj", ".decoder.layers.0.layers.self_attn.qkv_proj"),
        (
            "whisper",
            "model.decoder.layers.0.encoder_attn.v_proj",
            ".decoder.layers.0.layers.encoder_attn.kv_proj",
        ),
        ("whisper", "model.encoder.layers.0.fc2", ".encoder.layers.0.layers.mlp.fc2"),
        ("gemma3_text", "layers.0.mlp.up_proj", ".layers.0.mlp.gate_up_proj"),
        ("modernbert", "layers.0.attn.Wo", ".encoder_layer.layers.0.attn.Wo"),
    ],
)
def test_modules_of_a_model_that_vllm_builds_within_another(model_type, module, asked):
    """In HF fp8, vLLM 0.32 took BF16 of what stays in float in such models for codes; SGLang did of EXAONE and LFM2."""
    assert with_joined([module], {"model_type": model_type})[0] == module
    assert asked in with_joined([module], {"model_type": model_type})


def test_what_vllm_asks_for_without_a_name_is_ignored(tmp_path):
    """Qwen2.5-Math-RM: vLLM 0.32 took its head for codes, without a scale."""
    tensors = {f"{n}.weight": torch.randn(64, 64) for n in ("layers.0.mlp.up_proj", "score.0", "score.2")}
    source = write(tmp_path / "src", tensors, {"model_type": "qwen2"})
    ignored = lowbit.plan(source, "int8").config["quantization_config"]["ignore"]
    assert {"score.0", "score.2", "re:^$"} <= set(ignored)
    del tensors["score.0.weight"], tensors["score.2.weight"]
    source = write(tmp_path / "other", tensors, {"model_type": "qwen2"})
    assert "re:^$" not in lowbit.plan(source, "int8").config["quantization_config"]["ignore"]


def test_a_group_with_blocks_is_the_default(tmp_path):
    """SGLang 0.5.23 looks for the size of blocks there alone, and failed to load GLM-4.5 with one layer in blocks."""
    tensors = {f"layers.{i}.o_proj.weight": torch.randn(128, 128) for i in range(4)}
    source = write(tmp_path / "src", tensors, {"model_type": "glm4_moe"})
    config = lowbit.plan(source, "fp8", overrides={"layers.0.*": "fp8-block"}).config["quantization_config"]
    first, second = config["config_groups"].values()
    assert (first["targets"], first["weights"]["strategy"]) == (["Linear"], "block")
    assert second["weights"]["strategy"] == "channel"
    assert [any(re.match(t[3:], f"layers.{i}.o_proj") for t in second["targets"]) for i in range(4)] == [
        False, True, True, True,
    ]  # fmt: skip


def test_a_group_has_patterns_that_also_take_in_what_is_ignored(tmp_path):
    """Qwen2.5-Omni: its tower has layers too; patterns for the text's had no other start than the one on disk, which
    vLLM changes, and gave it the other scheme."""
    parts = ("thinker.model", "thinker.audio_tower")
    names = [f"{p}.layers.{i}.self_attn.{x}_proj" for p in parts for i in range(2) for x in "qkv"]
    source = write(
        tmp_path / "src", {f"{n}.weight": torch.randn(64, 64) for n in names}, {"model_type": "qwen2_5_omni"}
    )
    config = lowbit.plan(source, "int8", overrides={"*.layers.0.*": "fp8"}).config["quantization_config"]
    called = "language_model.model.layers.0.self_attn.qkv_proj"
    targets = config["config_groups"]["group_1"]["targets"]
    assert config["config_groups"]["group_1"]["weights"]["type"] == "int"  # of as many, the second
    assert not any(re.match(t[3:], called) for t in targets)
    assert any(re.match(t[3:], called.replace(".0.", ".1.")) for t in targets)


@pytest.mark.parametrize("layers", ["transformer.h", "roberta.encoder.layer", "model.blocks"])
def test_patterns_leave_open_what_is_before_layers_by_other_names(layers):
    """vLLM has `model.h` for GPTBigCode's `transformer.h`, and gave its c_attn the scheme of the others."""
    names = [f"{layers}.{i}.attn.c_attn" for i in range(3)]
    (pattern,) = name_patterns(names, [f"{layers}.{i}.mlp.c_fc" for i in range(3)])
    assert re.match(pattern[3:], "model.x." + names[2].rpartition("model.")[2])
    (pattern,) = name_patterns(names[:1], names[1:])
    assert [bool(re.match(pattern[3:], f"y.{n}")) for n in names] == [True, False, False]


def test_what_stays_in_blip2s_tower_is_named_without_the_tower():
    """vLLM 0.32 took all of its BF16 weights for codes."""
    linear = "vision_model.encoder.layers.3.self_attn.qkv"
    assert ".encoder.layers.3.self_attn.qkv" in with_joined([linear], {"model_type": "blip-2"})
    assert with_joined([linear], {"model_type": "gemma3"}) == [linear]


def test_experts_in_one_tensor_are_ignored_as_engines_ask_for_them(tmp_path):
    """gpt-oss: vLLM and SGLang ask for those of the first expert, and took BF16 weights for codes without a scale."""
    tensors = {
        "model.layers.1.self_attn.o_proj.weight": torch.randn(128, 128),
        "model.layers.1.mlp.experts.gate_up_proj": torch.randn(2, 128, 128),
        "model.layers.1.mlp.experts.down_proj": torch.randn(2, 128, 64),
    }
    source = write(tmp_path / "src", tensors, {"model_type": "gpt_oss"})
    plan = lowbit.plan(source, "int8")
    assert any("SGLang builds gpt-oss's attention in float" in w for w in plan.warnings)
    name, head, pattern, *_ = plan.config["quantization_config"]["ignore"]
    assert (name, head) == ("model.layers.1.mlp.experts", "lm_head")
    for before in ("model.", "language_model.model.", ""):
        for part in ("gate", "up", "down"):
            assert re.match(pattern[3:], f"{before}layers.1.mlp.experts.0.{part}_proj")
        assert not re.match(pattern[3:], f"{before}layers.11.mlp.experts.0.up_proj")


NAMES = st.lists(
    st.builds(
        "m.{}.{}{}".format,
        st.integers(0, 12), st.sampled_from(["a", "b.0", "x(", "c+"]), st.sampled_from(["", ".7"]),
    ),
    unique=True, max_size=12,
)  # fmt: skip


@given(NAMES, st.integers(0, 12))
def test_patterns_match_their_members_and_nothing_else(names, split):
    members, outside = names[:split], names[split:]
    targets = name_patterns(members, outside)

    def hit(name: str) -> bool:
        return any(re.match(t[3:], name) is not None if t.startswith("re:") else t == name for t in targets)

    assert all(hit(m) for m in members) and not any(hit(o) for o in outside)


def test_joined_modules_are_named_for_engines_that_ask_for_them():
    """SGLang asks for qkv_proj, and by its class where no target and nothing ignored has its name."""
    names = [f"model.layers.{i}.{m}_proj" for i in range(2) for m in JOINED_MEMBERS]
    int8, fp8 = get_scheme("int8"), get_scheme("fp8")
    ignored = [n for n in names if ".0.self_attn" in n]
    modules = {n: fp8 if "mlp" in n and ".0." in n else int8 for n in names if n not in ignored}
    config = get_format("compressed-tensors").config(Layout(modules=modules, ignored=tuple(ignored)))

    def found(module: str) -> str:
        if module in config["ignore"]:
            return "float"
        for group in config["config_groups"].values():
            for target in group["targets"]:
                if re.match(target[3:], module) if target.startswith("re:") else target == module:
                    return str(group["weights"]["type"])
        return str(config["config_groups"]["group_0"]["weights"]["type"])

    assert found("model.layers.0.self_attn.qkv_proj") == "float"
    assert found("model.layers.1.self_attn.qkv_proj") == "int"
    assert found("model.layers.0.mlp.gate_up_proj") == found("model.layers.0.mlp.gate_proj") == "float"
    assert found("model.layers.1.mlp.gate_up_proj") == "int"
    # vLLM and SGLang call latent attention's differently.
    assert with_joined(["a.q_a_proj", "a.kv_a_proj_with_mqa"], {})[2:] == [
        "a.fused_qkv_a_proj", "a.fused_qkv_a_proj_with_mqa",
    ]  # fmt: skip
    for pair in (["mlp.c_fc_0", "mlp.c_fc_1"], ["mlp.fc11", "mlp.fc12"]):
        assert with_joined(pair, {})[2:] == ["mlp.gate_up_proj"]
    # Experts are asked for by the names of their members.
    assert with_joined(["mlp.experts.0.up_proj"], {}) == ["mlp.experts.0.up_proj"]
    for module in ("experts.3.up_proj", "experts"):
        assert with_joined([f"layers.0.{module}"], {})[1:] == [f"layers.0.moe.{module}"]
    assert with_joined(["mlp.experts.3.w1"], {}) == ["mlp.experts.3.w1", "mlp.experts.3.gate_proj"]


JOINED_MEMBERS = (
    "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down",
)  # fmt: skip


def test_formats_are_found_by_name():
    assert get_format("Compressed_Tensors") is FORMAT and get_format("fp8") is FORMATS["fp8"]
    with pytest.raises(InputError, match="unknown format 'gguf'"):
        get_format("gguf")


def test_where_the_quantization_config_lies():
    q = {"quant_method": "fp8"}
    assert quantization_of({"quantization_config": q}) is q
    assert quantization_of({"text_config": {"quantization_config": q}}) is q
    assert quantization_of({"compression_config": q}) is q
    assert quantization_of({"quantization_config": None, "text_config": None}) == {}
