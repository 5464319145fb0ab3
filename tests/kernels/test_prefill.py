"""`lowbit.ops` by the launches of prefill: large tiles, more of them than programs, TMA where the target has it."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from lowbit.kernels.targets import get_target, pretending
from sample_operands import linear_arguments

from lowbit import ops

NAMES = ("int8", "int8-static-asym", "int8-block", "int8-weight-only", "fp8", "fp8-block", "mxfp8")


@pytest.fixture(params=[os.environ.get("LOWBIT_MACHINE", "sm90")])
def target(request):
    """With two cores: each program of a persistent kernel has several tiles."""
    with pretending(replace(get_target(request.param), cores=2)), ops.use_implementation("triton"):
        ops.allow_fallback(False)
        yield request.param
        ops.allow_fallback(True)


def agree(call, function, target: str) -> None:
    out = function(**call)
    if call["weight"].dtype == torch.float8_e4m3fn and get_target(target).fp8 != "e4m3fn":
        call |= {"activations": "none", "input_scale": None}
    with ops.use_implementation("reference"):
        expected = function(**call)
    exact = call["weight"].dtype == torch.int8 and call["activations"] in ("token", "static")
    error = (out.double() - expected.double()).norm() / expected.double().norm()
    assert torch.equal(out, expected) if exact else float(error) < 4e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [272, 201])
def test_linear(target, name, n):
    agree(linear_arguments(name, 130, n, 384, torch.bfloat16), ops.linear, target)


@pytest.mark.parametrize("name", ["int8", "int8-weight-only", "fp8-block"])
def test_rows_that_begin_anywhere(target, name):
    agree(linear_arguments(name, 130, 80, 403, torch.float16), ops.linear, target)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_float32_activations_of_weight_only(target, dtype):
    call = linear_arguments("int8-weight-only", 130, 144, 256, torch.float32)
    if dtype != torch.int8:
        call["weight"] = call["weight"].to(dtype)
    agree(call, ops.linear, target)


def test_fast_accumulation(target):
    call = linear_arguments("fp8", 130, 272, 384, torch.bfloat16)
    ops.use_fast_accumulation(True)
    try:
        agree(call, ops.linear, target)
    finally:
        ops.use_fast_accumulation(False)


@pytest.mark.parametrize("name", ["int8", "int8-block", "int8-weight-only", "fp8", "fp8-block", "mxfp8"])
def test_experts(target, name):
    offsets = [0, 129, 129, 200]
    experts = [linear_arguments(name, offsets[-1], 144, 256, torch.bfloat16) for _ in offsets[1:]]
    call = {
        "x": experts[0]["x"], "activations": experts[0]["activations"], "block": experts[0]["block"],
        "weight": torch.stack([e["weight"].view(torch.int8) for e in experts]).view(experts[0]["weight"].dtype),
        "weight_scale": torch.stack([e["weight_scale"] for e in experts]),
        "offsets": torch.tensor(offsets, dtype=torch.int32), "row_weight": torch.rand(offsets[-1]),
    }  # fmt: skip
    agree(call, ops.linear_grouped, target)
