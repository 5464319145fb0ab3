"""`lowbit.ops` by its Triton implementation, as on each target, against the reference."""

from __future__ import annotations

import logging
import os

import pytest
import torch
import transformers
from lowbit.kernels import matmul, matmul_block, matmul_grouped, matmul_mxfp8, matmul_weight_only
from lowbit.kernels.launch import choose_launch
from lowbit.kernels.targets import TARGETS, get_target, pretending
from sample_operands import NAMES, linear_arguments

import lowbit
from lowbit import ops
from lowbit.ops import dispatch, reference, settings, triton
from lowbit.ops.problem import Weights
from lowbit.scheme import SCHEMES

# A scale for all of K: the sum is an integer, and what follows is the same everywhere.
EXACT = ("int8", "int8-static", "int8-static-asym")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
OFFSETS = [0, 3, 3, 20, 21]


# What the machine of tests/machines is; else, in the interpreter, all: sm86 runs as sm80 and sm120 as sm89, as far as
# operations go.
MACHINE = [name for name in TARGETS if name == os.environ.get("LOWBIT_MACHINE")]


@pytest.fixture(params=MACHINE or [name for name in TARGETS if name not in ("sm86", "sm120")])
def target(request):
    with pretending(get_target(request.param)), ops.use_implementation("triton"):
        ops.allow_fallback(False)
        yield request.param
        ops.allow_fallback(True)


def keeps_floats(name: str, target: str) -> bool:
    """Whether the target decodes the weight and leaves activations as they are."""
    return SCHEMES[name].weights.dtype.name.startswith("e4m3") and get_target(target).fp8 != "e4m3fn"


def agrees(out: torch.Tensor, expected: torch.Tensor, exact: bool) -> bool:
    if exact:
        return torch.equal(out, expected)
    error = (out.double() - expected.double()).abs().max() / expected.double().abs().max()
    return out.dtype == expected.dtype and float(error) < TOLERANCE[out.dtype]


@pytest.mark.parametrize("name", NAMES)
def test_linear(target, name):
    shapes = ((1, 100, 160, torch.float16), (19, 48, 256, torch.float32), (5, 37, 96, torch.bfloat16))
    for m, n, k, dtype in shapes:
        call = linear_arguments(name, m, n, k, dtype)
        out = ops.linear(**call)
        if keeps_floats(name, target):
            call |= {"activations": "none", "input_scale": None, "input_zero_point": None}
        with ops.use_implementation("reference"):
            expected = ops.linear(**call)
        assert agrees(out, expected, name in EXACT)


@pytest.mark.parametrize("scheme", [name for name in NAMES if not SCHEMES[name].needs_calibration])
@pytest.mark.parametrize("name", MACHINE or ["sm80", "sm90", "gfx942"])
def test_a_mixture_of_experts(name, scheme):
    """Attention and experts, packed ones too, with one block for all of K in places; nothing falls back."""
    config = transformers.Qwen3MoeConfig(
        hidden_size=128, intermediate_size=256, moe_intermediate_size=128, num_hidden_layers=1, head_dim=64,
        num_attention_heads=2, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2, vocab_size=64,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    lowbit.quantize_model(model, scheme)
    ids = torch.arange(9)[None]
    with torch.no_grad(), pretending(get_target(name)), ops.use_implementation("triton"):
        ops.allow_fallback(False)
        found, alone = model(ids).logits, model(ids[:, :1]).logits
        ops.allow_fallback(True)
    with torch.no_grad(), ops.use_implementation("reference"):
        expected = model(ids).logits
    limit = 0.05 if keeps_floats(scheme, name) else 1e-3
    for ours in (found, alone):
        theirs = expected[:, : ours.shape[1]]
        assert float((ours - theirs).norm() / theirs.norm()) < limit


@pytest.mark.parametrize("name", [name for name in NAMES if "asym" not in name])
def test_experts(target, name):
    experts = [linear_arguments(name, OFFSETS[-1], 40, 256, torch.float32) for _ in OFFSETS[1:]]
    call = {
        "x": experts[0]["x"], "activations": experts[0]["activations"], "block": experts[0]["block"],
        "weight": torch.stack([e["weight"].view(torch.int8) for e in experts]).view(experts[0]["weight"].dtype),
        "weight_scale": torch.stack([e["weight_scale"] for e in experts]),
        "bias": torch.stack([e["bias"] for e in experts]), "offsets": torch.tensor(OFFSETS, dtype=torch.int32),
        "row_weight": torch.rand(OFFSETS[-1]),
    }  # fmt: skip
    if "input_scale" in experts[0]:
        call["input_scale"] = torch.stack([e["input_scale"] for e in experts])
    out = ops.linear_grouped(**call)
    if keeps_floats(name, target):
        call |= {"activations": "none", "input_scale": None}
    with ops.use_implementation("reference"):
        expected = ops.linear_grouped(**call)
    assert agrees(out, expected, name in EXACT)


@pytest.mark.parametrize("name", ["int8", "int8-block", "fp8", "fp8-block", "mxfp8"])
def test_codes(target, name):
    if keeps_floats(name, target):
        return  # refused: such codes are neither multiplied nor made there
    call = linear_arguments(name, 19, 48, 256, torch.float32)
    with ops.use_implementation("reference"):
        group = call["block"][1] if call["activations"].startswith("group") else 0
        codes, scale = ops.quantize(
            call["x"], call["weight"].dtype, group=group, power_of_2=call["activations"] == "group_pow2"
        )
    given = (codes, scale, call["weight"], call["weight_scale"], call["bias"])
    out = ops.matmul(*given, block=call["block"], out_dtype=torch.float32)
    with ops.use_implementation("reference"):
        expected = ops.matmul(*given, block=call["block"], out_dtype=torch.float32)
    assert agrees(out, expected, name in EXACT)


@pytest.mark.parametrize(("k", "group"), [(100, 100), (16, 16), (48, 512), (1, 128)])
def test_a_group_that_spans_the_row(target, k, group):
    """Its scale is the row's, whose length may be any: no kernel's limits on groups apply."""
    call = {
        "x": torch.randn(5, k), "weight": torch.randint(-127, 128, (40, k), dtype=torch.int8),
        "weight_scale": torch.rand(40, 1), "activations": "group", "block": (1, group),
    }  # fmt: skip
    out = ops.linear(**call)
    codes, scale = ops.quantize(call["x"], torch.int8, group=group)
    with ops.use_implementation("reference"):
        assert agrees(out, ops.linear(**call), exact=True)
        expected = ops.quantize(call["x"], torch.int8)
    assert torch.equal(codes, expected[0]) and torch.equal(scale, expected[1])


def test_groups_of_32_whose_scales_are_no_powers_of_two(target):
    """They look like MX but for that; its kernel takes exponents alone."""
    call = linear_arguments("mxfp8", 19, 48, 256, torch.float32)
    call["weight_scale"] = torch.rand(48, 8)
    out = ops.linear(**call)
    if keeps_floats("mxfp8", target):
        call["activations"] = "none"
    with ops.use_implementation("reference"):
        assert agrees(out, ops.linear(**call), exact=False)


def test_groups_that_no_kernel_quantizes_are_computed_by_torch(target):
    x, weight, scale = torch.randn(3, 300), torch.ones(8, 300, dtype=torch.int8), torch.rand(8, 4)
    calls = {
        "linear": lambda: ops.linear(x, weight, scale, activations="group", block=(1, 96)),
        "quantize": lambda: ops.quantize(x, torch.int8, group=96)[0],
        "norm": lambda: ops.rms_norm_quantize(x, torch.ones(300), 1e-6, dtype=torch.int8, group=96)[0],
        "silu": lambda: ops.silu_mul_quantize(x, dtype=torch.int8, group=96)[0],
    }
    for call in calls.values():
        with pytest.raises(
            ops.NoKernelError, match=r"power of two from 16 to (2048|256 on ascend910b), found 96"
        ):
            call()
        ops.allow_fallback(True)
        found = call()
        with ops.use_implementation("reference"):
            assert agrees(found.float(), call().float(), exact=False)
        ops.allow_fallback(False)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantizing(target, dtype):
    own = dtype == torch.int8 or get_target(target).fp8 == "e4m3fn"
    x, weight, residual = torch.randn(9, 256), torch.rand(256), torch.randn(9, 256)
    calls = {
        "per token": lambda: ops.quantize(x, dtype),
        "per group": lambda: ops.quantize(x, dtype, group=64, power_of_2=True),
        "static": lambda: (ops.quantize_static(x, torch.tensor([0.02]), dtype=dtype),),
        "after a norm": lambda: ops.rms_norm_quantize(x, weight, 1e-6, residual, dtype=dtype, group=128),
        "after silu": lambda: ops.silu_mul_quantize(x, dtype=dtype),
    }
    for name, call in calls.items():
        if not own:
            with pytest.raises(ops.NoKernelError, match="converts to"):
                call()
            ops.allow_fallback(True)
        found = call()
        with ops.use_implementation("reference"):
            expected = call()
        for ours, theirs in zip(found, expected, strict=True):
            # What a norm or SiLU gives may differ in its last bit, and then by a whole code.
            plain = name in ("per token", "per group", "static") or not own
            near = torch.isclose(ours.float(), theirs.float(), rtol=1e-5, atol=0).float().mean()
            assert torch.equal(ours, theirs) if plain else float(near) > 0.99
        ops.allow_fallback(False)


def test_what_a_target_cannot_convert_to_is_computed_by_torch_and_said_once(caplog):
    caplog.set_level(logging.WARNING, "lowbit.ops")
    settings._log_once.cache_clear()
    with pretending(get_target("sm86")), ops.use_implementation("triton"):
        codes, _ = ops.quantize(torch.randn(3, 64), torch.float8_e4m3fn)
        ops.quantize(torch.randn(3, 64), torch.float8_e4m3fn)
    assert codes.dtype == torch.float8_e4m3fn
    (record,) = caplog.records
    assert "sm86 converts to (int8), found e4m3fn; computing with torch's own operations" in record.message


@pytest.mark.parametrize("block", [1, 64, 8192])
def test_hadamard(target, block):
    x = torch.randn(2, 8192)
    refused = "cannot place" if target == "ascend910b" else "at most 4096" if block > 4096 else None
    if refused:
        with pytest.raises(ops.NoKernelError, match=refused):
            ops.hadamard(x, block)
        ops.allow_fallback(True)
    found = ops.hadamard(x, block)
    with ops.use_implementation("reference"):
        assert agrees(found, ops.hadamard(x, block), exact=False)


def test_what_is_returned_as_it_came_is_contiguous(target):
    """As the fake implementations say: compiled models look at strides."""
    x = torch.randn(64, 5).t()
    assert ops.rms_norm_quantize(x, torch.rand(64), 1e-6, dtype=torch.int8)[2].is_contiguous()
    ops.allow_fallback(target == "ascend910b")
    assert ops.hadamard(x, 1).is_contiguous()


class Launched(Exception):
    """Raised in place of launching."""


@pytest.fixture
def launched(monkeypatch):
    """Launch parameters, noted in place of launching."""
    noted = []

    def note(*args, **kwargs):
        noted.append(choose_launch(*args, **kwargs))
        raise Launched

    for module in (matmul, matmul_block, matmul_grouped, matmul_mxfp8, matmul_weight_only):
        monkeypatch.setattr(module, "choose_launch", note)
    monkeypatch.setattr(triton, "quantize", quantize_at_once)
    return noted


def test_fast_accumulation_reaches_the_kernels(launched):
    call = linear_arguments("fp8", 512, 256, 512, torch.bfloat16)
    experts = call | {
        "weight": call["weight"][None], "weight_scale": call["weight_scale"][None], "bias": None,
        "offsets": torch.tensor([0, 512]),
    }  # fmt: skip
    for wanted in (False, True):
        ops.use_fast_accumulation(wanted)
        try:
            with pretending(get_target("sm90")), ops.use_implementation("triton"):
                for operation, given in ((ops.linear, call), (ops.linear_grouped, experts)):
                    with pytest.raises(Launched):
                        operation(**given)
                    assert launched.pop().promote_k == (0 if wanted else 128)
        finally:
            ops.use_fast_accumulation(False)


@pytest.mark.parametrize("name", [*NAMES, "int8 groups"])
def test_what_is_explained_is_what_is_launched(target, name, launched):
    """`kernels explain` and the kernels ask `choose_launch` each in their own words."""
    for m in (1, 48, 4000):
        call = linear_arguments("int8" if name == "int8 groups" else name, m, 256, 512, torch.bfloat16)
        if name == "int8 groups":
            call |= {"activations": "group", "block": (1, 128), "weight_scale": torch.rand(256, 4)}
        with pytest.raises(Launched):
            ops.linear(**call)
        weights = Weights(tensor=call["weight"], scale=call["weight_scale"], block=call["block"], k=512)
        problem = dispatch.problem_of(
            call["x"], weights, call["activations"], zero_point=call.get("input_zero_point") is not None
        )
        assert launched.pop() == dispatch.choose(problem, target).launch


def quantize_at_once(x, dtype, activations, power_of_2=""):
    codes, scale = reference.quantize(x, dtype, activations)
    return codes, torch.ones(scale.shape, dtype=torch.uint8) if power_of_2 else scale
