"""Schemes: names, aliases, and what compressed-tensors calls the same."""

from __future__ import annotations

import pytest
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

from lowbit.dtypes import E4M3FN, INT8
from lowbit.formats.compressed_tensors import _STRATEGIES
from lowbit.granularity import PerBlock, PerChannel, PerGroup, PerTensor
from lowbit.scheme import SCHEMES, TensorSpec, get_scheme


@pytest.mark.parametrize("alias", [s.alias for s in SCHEMES.values() if s.alias])
def test_aliases_mean_what_the_compressed_tensors_preset_means(alias):
    ours, theirs = get_scheme(alias), preset_name_to_scheme(alias, ["Linear"])
    for spec, args in ((ours.weights, theirs.weights), (ours.activations, theirs.input_activations)):
        if spec is None or args is None:
            assert spec is None and args is None
            continue
        assert args.num_bits == spec.dtype.bits
        assert args.type == spec.dtype.kind
        assert args.symmetric == spec.symmetric
        assert bool(args.dynamic) == spec.dynamic
        if alias == "W8A16":  # ours is grouped by 128, as the engines' fast kernels are
            assert spec.granularity == PerGroup(128)
            continue
        assert args.strategy == _STRATEGIES[type(spec.granularity)]
        if isinstance(spec.granularity, PerGroup):
            assert args.group_size == spec.granularity.size
        if isinstance(spec.granularity, PerBlock):
            assert list(args.block_structure) == [spec.granularity.rows, spec.granularity.cols]


@pytest.mark.parametrize("name", ["int8", "INT8", " int8 ", "W8A8", "w8a8"])
def test_names_are_forgiving(name):
    assert get_scheme(name) is SCHEMES["int8"]


@pytest.mark.parametrize("name", ["FP8_BLOCK", "fp8_block", "fp8-block"])
def test_underscores_and_dashes(name):
    assert get_scheme(name) is SCHEMES["fp8-block"]


def test_fp8_in_capitals_is_the_librarys_static_preset():
    assert get_scheme("FP8") is SCHEMES["fp8-static"]
    assert get_scheme("fp8") is SCHEMES["fp8"]


def test_an_unknown_scheme_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown scheme 'in8': expected one of .*did you mean 'int8'"):
        get_scheme("in8")


def test_which_schemes_need_calibration():
    assert {s.name for s in SCHEMES.values() if s.needs_calibration} == {
        "int8-static", "int8-static-asym", "fp8-static",
    }  # fmt: skip


def test_group_size_is_for_weight_only_schemes():
    changed = get_scheme("int8-weight-only").with_group_size(64)
    assert changed.weights is not None and changed.weights.granularity == PerGroup(64)
    assert changed.activations is None
    with pytest.raises(ValueError, match="weight-only"):
        get_scheme("int8").with_group_size(64)


def test_a_float_format_has_no_zero_point():
    with pytest.raises(ValueError, match="no zero point"):
        TensorSpec(dtype=E4M3FN, granularity=PerTensor(), symmetric=False)
    assert not TensorSpec(dtype=INT8, granularity=PerChannel(), symmetric=False).symmetric


def test_specs_say_what_they_are():
    assert str(SCHEMES["mxfp8"].weights) == "e4m3fn, per group of 32, e8m0 scales"
    assert str(SCHEMES["int8"].activations) == "int8, per token, dynamic"
