"""What a config.json and headers say, read without a checkpoint: each key of which something depends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from lowbit.dtypes import E4M3FN, INT4
from lowbit.errors import InputError
from lowbit.formats import Layout, configs_in, get_format, quantization_of, read
from lowbit.formats.format import check_scale
from lowbit.granularity import PerBlock, PerChannel, PerGroup, PerTensor
from lowbit.scheme import Scheme, TensorSpec, get_scheme

CT, ASCEND = get_format(), get_format("ascend")
DESCRIBED = {"version": "1.0.0", "model_quant_type": "W8A8"}


@dataclass(frozen=True)
class Header:
    dtype: str
    shape: tuple[int, ...]


def tensors(codes: str = "I8", scale: tuple[int, ...] = (256, 1), **more: Header) -> dict[str, Header]:
    found = {"a.b.weight": Header(codes, (256, 128)), "a.b.weight_scale": Header("F32", scale)}
    return found | {f"a.b.{name}": header for name, header in more.items()}


def group(weights: dict[str, Any], activations: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    body = {"targets": ["Linear"], "weights": weights, "input_activations": activations, **more}
    return {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"group_0": body}}}


INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}


@pytest.mark.parametrize(
    ("weights", "scale", "expected"),
    [
        ({"group_size": 64}, (256, 2), PerGroup(64)),
        ({"group_size": None}, (1,), PerTensor()),
        ({"strategy": "group", "group_size": 64}, (256, 2), PerGroup(64)),
        ({"strategy": "group", "group_size": -1}, (256, 1), PerChannel()),
        ({"strategy": "group", "group_size": None}, (256, 1), PerChannel()),
        ({"strategy": "block"}, (2, 1), PerBlock(128, 128)),
    ],
)
def test_what_shares_a_scale(weights, scale, expected):
    found = read(group({"num_bits": 8, "type": "int", **weights}), tensors(scale=scale))
    assert found["a.b"].spec.granularity == expected


def test_keys_that_are_left_out_mean_what_they_mean_to_the_library():
    token = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    for activations, name in (
        (token, "int8"),
        ({"num_bits": 8, "type": "int", "strategy": "tensor"}, "int8-static"),
        ({"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": False}, "int8-static-asym"),
        ({"num_bits": 8, "type": "int"}, "int8-static"),
    ):
        assert read(group(INT8, activations), tensors())["a.b"].scheme == get_scheme(name)
    said = group(INT8, token)
    del said["quantization_config"]["quant_method"]  # as the first versions wrote it
    assert read(said, tensors())["a.b"].scheme == get_scheme("int8")


@pytest.mark.parametrize("dtype", ["torch.uint8", "torch.float8_e8m0fnu", None])
def test_exponents_are_said_to_be_some(dtype):
    weights = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": dtype}
    found = read(group(weights), tensors("F8_E4M3", (256, 4)))
    assert found["a.b"].spec.scale == ("float32" if dtype is None else "e8m0")


def test_patterns_match_from_the_start():
    other = {"targets": ["re:b"], "weights": INT8, "input_activations": INT8 | {"strategy": "tensor"}}
    said = group(INT8)
    said["quantization_config"]["config_groups"]["group_1"] = other
    assert read(said, tensors())["a.b"].scheme.activations is None
    other["targets"] = [r"re:a\.b"]
    assert read(said, tensors())["a.b"].scheme == get_scheme("int8-static")


def test_what_compressed_tensors_holds_and_where_its_scales_lie():
    packed = Scheme(
        name="w8", weights=TensorSpec(dtype=get_scheme("int8").weights.dtype, granularity=PerChannel())
    )
    assert CT.refuse(packed, (64, 130), "") == "K = 130 is not a multiple of 4, the codes in an int32"
    assert CT.refuse(packed, (64, 132), "") == ""
    int4 = Scheme(name="int4", weights=TensorSpec(dtype=INT4, granularity=PerGroup(32)))
    shapes = [CT.tensors(s, (64, 130))[0].shape for s in (packed, int4)]
    assert shapes == [(64, 33), (64, 17)]  # what a published one has that fills its last int32 up
    assert CT.refuse(get_scheme("fp8-static"), (64, 128), "experts") == ""
    assert "INT8 experts" in CT.refuse(get_scheme("int8-static"), (64, 128), "experts")


def test_the_cache_of_a_source_goes_with_its_scales_alone():
    config = {"quantization_config": {"quant_method": "fp8", "kv_cache_scheme": "static"}}
    layout = Layout(
        modules={"a.b": get_scheme("int8")}, ignored=(), tensors=("a.b.weight", "a.k_scale"), config=config
    )
    assert CT.config(layout)["kv_cache_scheme"]["num_bits"] == 8
    assert CT.config(replace(layout, tensors=("a.b.weight",)))["kv_cache_scheme"] is None


def test_scales_of_one_number_have_three_shapes():
    spec = TensorSpec(dtype=E4M3FN, granularity=PerTensor())
    for shape in ((), (1,), (1, 1)):
        check_scale("a", "a.weight_scale", shape, (8, 4), spec)
    for shape, of in (((2,), spec), ((8,), replace(spec, granularity=PerChannel()))):
        with pytest.raises(InputError, match="config and tensors do not belong together"):
            check_scale("a", "a.weight_scale", shape, (8, 4), of)


def test_configs_are_looked_for_beside_quantizations_not_in_them():
    inner = {"dtype": "bfloat16"}
    config = {"text_config": inner, "quantization_config": {"weight": {"dtype": "fp8"}}}
    assert list(configs_in(config)) == [config, inner]
    assert quantization_of({"llm_config": {"compression_config": {"a": 1}}}) == {"a": 1}


@pytest.mark.parametrize(
    ("quantization", "found", "message"),
    [
        # Of experts in one tensor a scale of all is not read.
        ({"quant_method": "fp8"}, {"e.down": Header("F8_E4M3", (2, 8, 8))}, "codes .* that cannot be read"),
        ({"quant_method": "fp8"}, {"e.weight": Header("F8_E5M2", (8, 8))}, "codes .* that cannot be read"),
        (
            group(INT8)["quantization_config"],
            {"e.weight": Header("I8", (2, 8, 8)), "e.weight_scale": Header("F32", (2, 8, 1))},
            "a quantization that cannot be read",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            {"e.weight": Header("F8_E4M3", (256, 128)), "e.weight_scale_inv": Header("F32", (1, 1))},
            r"expected a scale of shape \[2, 1\]",
        ),
        (
            {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_group"}}},
            {},
            "all weights in fp8_e4m3, per_tensor",
        ),
        (
            {**DESCRIBED, "quant_method": "ascend", "e.weight": "FLOAT"},
            {"e.weight": Header("I8", (8, 8))},
            "says FLOAT for e.weight, found I8",
        ),
        (
            {**DESCRIBED, "quant_method": "ascend", "e.weight": "FLOAT", "e.weight_scale": "W8A8_DYNAMIC"},
            {"e.weight": Header("BF16", (8, 8)), "e.weight_scale": Header("F32", (8, 1))},
            "says W8A8_DYNAMIC for e.weight_scale, found F32",
        ),
        (
            {**DESCRIBED, "quant_method": "ascend"} | dict.fromkeys(
                ("e.weight", "e.weight_scale", "e.weight_offset"), "W8A8_DYNAMIC"),
            {"e.weight": Header("I8", (8, 8)), "e.weight_scale": Header("F32", (4, 1)),
             "e.weight_offset": Header("F32", (8, 1))},
            r"expected a scale of shape \[8, 1\]",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_read_in_full_is_refused(quantization, found, message):
    with pytest.raises(InputError, match=message):
        read({"quantization_config": quantization}, found)


def test_blocks_without_a_config_are_known_by_the_name_of_their_scales():
    found = {"a.weight": Header("F8_E4M3", (256, 192)), "a.weight_scale_inv": Header("F32", (2, 2))}
    assert read({}, found)["a"].scheme == get_scheme("fp8-block")


def test_blocks_have_dynamic_activations_whatever_lies_beside_them():
    said = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"}
    found = {
        "a.weight": Header("F8_E4M3", (256, 128)), "a.weight_scale_inv": Header("F32", (2, 1)),
        "a.input_scale": Header("F32", (1,)),
    }  # fmt: skip
    assert read({"quantization_config": said}, found)["a"].scheme == get_scheme("fp8-block")


def test_what_ascend_refuses_and_keeps():
    per_channel = replace(get_scheme("int8-weight-only").weights, granularity=PerChannel())
    weight_only = replace(get_scheme("int8-weight-only"), weights=per_channel)
    assert ASCEND.refuse(weight_only, (64, 128), "") == ""
    assert ASCEND.refuse(weight_only, (64, 128), "experts") == "vLLM-Ascend does not run experts as W8A16"
    modules = [f"model.language_model.layers.{i}.mlp.up_proj" for i in range(4)]
    for config in (
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 9, "text_config": {"num_hidden_layers": 3}},
    ):
        assert ASCEND.left_in_float(modules, config).keys() == {modules[3]}


def test_a_description_has_a_tied_head_and_nothing_else_that_is_not_there():
    layout = Layout(
        modules={"model.a": get_scheme("int8")},
        ignored=("lm_head", "model.gate"),
        tensors=("model.a.weight",),
    )
    body = ASCEND.files(layout)["quant_model_description.json"]
    assert {n: kind for n, kind in body.items() if n.endswith("weight")} == {
        "model.a.weight": "W8A8_DYNAMIC", "lm_head.weight": "FLOAT",
    }  # fmt: skip
