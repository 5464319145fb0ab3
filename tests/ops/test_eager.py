"""The way past the dispatcher: the same results, and only where nothing watches operators."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from lowbit import ops
from lowbit.ops import cpu, eager


@pytest.fixture(autouse=True)
def compiled():
    if cpu.instructions().name == "portable":
        pytest.skip("nothing is kept without compiled loops")


def layer(n: int = 40, k: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n * k)
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
    return weight, torch.rand(n, 1, generator=generator) + 0.01


def through_the_dispatcher(x, weight, scale, bias=None, **how):
    how = {"activations": "token", "block": (1, 0), "input_scale": None} | how
    return torch.ops.lowbit.linear.default(
        x, weight, scale, bias, how["input_scale"], None, None, how["activations"], how["block"]
    )


def kept(monkeypatch) -> list:
    """Records what the direct way returned."""
    found: list = []
    real = eager.linear
    monkeypatch.setattr(eager, "linear", lambda *a, **k: found.append(real(*a, **k)) or found[-1])
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(96,), (1, 96), (3, 5, 96), (2, 2, 16, 96), (200, 96)])
def test_it_equals_the_operator(shape, dtype, monkeypatch):
    direct = kept(monkeypatch)
    weight, scale = layer()
    for bias in (None, torch.randn(40)):
        for _ in range(2):  # the second call is the kept one
            x = torch.randn(shape).to(dtype)
            found = ops.linear(x, weight, scale, bias, activations="token", block=(1, 0))
            assert direct.pop() is found
            with ops.use_implementation("cpu"):
                assert torch.equal(found, through_the_dispatcher(x, weight, scale, bias))


def test_rows_with_a_stride_are_kept_apart(monkeypatch):
    direct = kept(monkeypatch)
    weight, scale = layer()
    wide = torch.randn(6, 200)
    for x in (wide[:, :96], wide[::2, 3:99], wide[:, 3:99].contiguous()):
        found = ops.linear(x, weight, scale, activations="token", block=(1, 0))
        assert direct.pop() is found
        with ops.use_implementation("reference"):
            assert torch.equal(found, through_the_dispatcher(x, weight, scale))


def test_a_transposed_weight_at_the_same_address(monkeypatch):
    weight, scale = layer(64, 64)
    x = torch.randn(3, 64)
    for view in (weight, weight.T):
        found = ops.linear(x, view, scale, activations="token", block=(1, 0))
        with ops.use_implementation("reference"):
            assert torch.equal(found, through_the_dispatcher(x, view, scale))


def test_static_scales_are_read_at_every_call():
    weight, scale = layer()
    x, input_scale = torch.randn(3, 96), torch.tensor([0.02])
    for value in (0.02, 0.05):
        input_scale.fill_(value)
        found = ops.linear(x, weight, scale, activations="tensor", block=(1, 0), input_scale=input_scale)
        with ops.use_implementation("reference"):
            want = through_the_dispatcher(x, weight, scale, activations="tensor", input_scale=input_scale)
        assert torch.equal(found, want)


def test_a_bias_that_must_be_converted_is_read_at_every_call():
    weight, scale = layer()
    x, bias = torch.randn(3, 96), torch.zeros(40, dtype=torch.bfloat16)
    without = ops.linear(x, weight, scale, bias, activations="token", block=(1, 0))
    bias.fill_(2.0)
    found = ops.linear(x, weight, scale, bias, activations="token", block=(1, 0))
    torch.testing.assert_close(found, without + 2)


def test_wrong_arguments_are_refused_as_ever():
    weight, scale = layer()
    with pytest.raises(ValueError, match=r"expected weight_scale of shape \[40, 1\]"):
        ops.linear(torch.randn(3, 96), weight, scale[:7], activations="token", block=(1, 0))
    with pytest.raises(ValueError, match="inputs of 95 features"):
        ops.linear(torch.randn(3, 95), weight, scale, activations="token", block=(1, 0))
    with pytest.raises(ValueError, match=r"expected block=\[rows, columns\].*found \[1\]"):
        ops.linear(torch.randn(3, 96), weight, scale, activations="token", block=(1,))


def test_who_watches_operators_sees_them(monkeypatch):
    direct = kept(monkeypatch)
    weight, scale = layer()

    def run(x):
        return ops.linear(x, weight, scale, activations="token", block=(1, 0))

    x = torch.randn(3, 96)
    run(x)
    assert direct.pop() is not None
    with torch.profiler.profile() as profile:
        run(x)
    assert any(event.name == "lowbit::linear" for event in profile.events())
    for before_autograd in (False, True):  # traced by a mode of operators, or by one of functions
        graph = make_fx(run, pre_dispatch=before_autograd)(x).graph
        assert any(node.target is torch.ops.lowbit.linear.default for node in graph.nodes)
    leaf = x.clone().requires_grad_()
    run(leaf).sum().backward()
    assert leaf.grad is not None
    assert not eager.applies(leaf, None)
    with torch.no_grad():
        assert eager.applies(leaf, None)


class Watching(torch.Tensor):
    """Plain memory; what is called with it is written down."""

    seen: ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function)
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.parametrize("position", range(5))
def test_tensors_with_an_arithmetic_of_their_own_are_asked(position):
    """DTensors and fake tensors have no address: products with one as a weight ended in a segmentation fault."""
    weight, scale = layer()
    given = [torch.randn(3, 96), weight, scale, torch.randn(40), torch.ones(1)]
    given[position] = given[position].as_subclass(Watching)
    Watching.seen.clear()
    x, weight, scale, bias, input_scale = given
    ops.linear(x, weight, scale, bias, activations="tensor", block=(1, 0), input_scale=input_scale)
    assert Watching.seen[0] is torch.ops.lowbit.linear.default


@pytest.mark.parametrize("position", [0, 2, 3])
def test_views_that_are_negated_when_read(position):
    """As `torch.conj(z).imag` is."""
    weight, scale = layer()
    given = [torch.randn(3, 96), weight, scale, torch.randn(40)]
    plain = ops.linear(*given, activations="token", block=(1, 0))
    given[position] = torch._neg_view(-given[position])
    assert torch.equal(ops.linear(*given, activations="token", block=(1, 0)), plain)


@pytest.mark.parametrize("direct", [True, False])
def test_a_workspace_too_large_to_keep_lives_through_the_product(direct):
    """Over 64 MB of operand: memory that is unmapped as soon as nothing holds it."""
    weight, scale = layer(16, 16384)
    x = torch.randn(4200, 16384)
    how = {"activations": "token", "block": (1, 0)}
    for _ in range(2):
        found = ops.linear(x, weight, scale, **how) if direct else through_the_dispatcher(x, weight, scale)
        assert torch.equal(found[:8], ops.linear(x[:8].clone(), weight, scale, **how))


def test_threads_do_not_share_calls():
    layers = [layer(n, 128) for n in (16, 48, 80, 144)]
    inputs = [torch.randn(m, 128) for m in (1, 2, 7, 33)]

    def run(_: int) -> list[torch.Tensor]:
        return [ops.linear(x, *pair, activations="token", block=(1, 0)) for pair in layers for x in inputs]

    want = run(0)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(run, range(40)):
            assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_experts_are_given_their_rows_anew(kind, dtype, monkeypatch):
    """The call is kept for a number of rows, whichever experts they go to."""
    direct = kept(monkeypatch)
    experts, n, k, rows = 5, 40, 96, 6
    weight = torch.randint(-127, 128, (experts, n, k), dtype=torch.int8)
    weight = weight if kind == "int8" else (weight / 40).to(torch.float8_e4m3fn)
    scale, bias = torch.rand(experts, n, 1) + 0.01, torch.randn(experts, n)
    for offsets in (
        [0, 6, 6, 6, 6, 6],
        [0, 0, 0, 0, 0, 6],
        [0, 1, 2, 4, 5, 6],
        [0, 0, 3, 3, 6, 6],
        [0, 6, 6, 6, 6, 6],
    ):
        for of in (torch.int32, torch.int64):
            x, each = torch.randn(rows, k).to(dtype), torch.tensor(offsets, dtype=of)
            how = {"activations": "token", "block": (1, 0), "bias": bias}
            found = ops.linear_grouped(x, weight, scale, each, **how)
            assert direct.pop() is found
            with ops.use_implementation("cpu"):
                assert torch.equal(found, ops.linear_grouped(x, weight, scale, each, **how))
    with pytest.raises(ValueError, match="expected offsets to rise from 0 to the 6 rows"):
        ops.linear_grouped(x, weight, scale, torch.tensor([0, 6, 3, 6, 6, 6]), **how)
    with pytest.raises(ValueError, match=r"expected a weight \[N, K\]"):
        ops.linear(x, weight, scale, **how)
    with pytest.raises(ValueError, match="expected integer offsets"):
        ops.linear_grouped(x, weight, scale, torch.tensor([0, 6]), **how)


def test_rows_weighted_or_under_scales_of_their_own_are_not_kept(monkeypatch):
    direct = kept(monkeypatch)
    weight, scale = torch.randint(-127, 128, (2, 40, 96), dtype=torch.int8), torch.rand(2, 40, 1) + 0.01
    x, offsets, block = torch.randn(4, 96), torch.tensor([0, 1, 4]), (1, 0)
    routed, static = torch.rand(4), torch.rand(2, 1) + 0.01
    for how in (
        {"row_weight": routed, "activations": "token"},
        {"input_scale": static, "activations": "tensor"},
    ):
        for _ in range(2):
            found = ops.linear_grouped(x, weight, scale, offsets, block=block, **how)
            with ops.use_implementation("reference"):
                assert torch.equal(found, ops.linear_grouped(x, weight, scale, offsets, block=block, **how))
    assert not direct


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_stay_in_bfloat16(dtype, monkeypatch):
    direct = kept(monkeypatch)
    weight, bias = torch.randn(40, 96).bfloat16(), torch.randn(40)
    for shape in ((96,), (3, 5, 96), (3, 5, 96), (70, 96)):
        x = torch.randn(shape).to(dtype)
        found = ops.linear_bfloat16(x, weight, bias)
        assert direct.pop() is found
        with ops.use_implementation("cpu"):
            assert torch.equal(found, torch.ops.lowbit.linear_bfloat16.default(x, weight, bias))
    with pytest.raises(ValueError, match="expected a weight of int8"):
        ops.linear(x, weight, torch.ones(1), activations="none", block=(0, 0))
    with pytest.raises(ValueError, match="expected a bfloat16 weight"):
        ops.linear_bfloat16(x, weight.float())
