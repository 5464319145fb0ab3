"""The operations under torch.library's own check, torch.compile and autograd."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.library import opcheck

from lowbit import ops

L = torch.ops.lowbit
INT8, FP8 = torch.int8, torch.float8_e4m3fn


def operands(k: int = 64, n: int = 24) -> dict:
    return {
        "x": torch.randn(5, k),
        "int8": torch.randint(-127, 128, (n, k), dtype=INT8),
        "fp8": torch.randn(n, k).to(FP8),
        "channel": torch.rand(n, 1),
        "bias": torch.randn(n),
    }


# test_schema multiplies its inputs in their own dtype, which torch cannot do for fp8: int8 here.
CALLS = {
    "linear": lambda o: (
        L.linear,
        (o["x"], o["int8"], o["channel"], o["bias"], None, None, None, "token", [1, 0]),
    ),
    "linear static": lambda o: (
        L.linear,
        (
            o["x"], o["int8"], o["channel"], None, torch.tensor([0.02]), torch.tensor([3], dtype=INT8), None,
            "tensor", [1, 0],
        ),
    ),
    "linear weight-only": lambda o: (
        L.linear,
        (o["x"], o["int8"], o["channel"], None, None, None, None, "none", [1, 0]),
    ),
    "linear_grouped": lambda o: (
        L.linear_grouped,
        (
            o["x"], torch.stack([o["int8"]] * 2), torch.stack([o["channel"]] * 2),
            torch.tensor([0, 2, 5], dtype=torch.int32), None, torch.rand(5), None, "token", [1, 0],
        ),
    ),
    "linear_grouped static": lambda o: (
        L.linear_grouped,
        (
            o["x"], torch.stack([o["int8"]] * 2), torch.stack([o["channel"]] * 2),
            torch.tensor([0, 2, 5], dtype=torch.int32), None, None, torch.rand(2, 1), "tensor", [1, 0],
        ),
    ),
    "matmul": lambda o: (
        L.matmul, (o["int8"][:3], torch.rand(3, 1), o["int8"], o["channel"], None, None, None, [1, 0], torch.bfloat16)
    ),
    "dequantize": lambda o: (L.dequantize, (o["int8"], o["channel"], [1, 0], 64, torch.bfloat16)),
    "quantize": lambda o: (L.quantize, (o["x"].view(1, 5, 64), INT8, 32, True)),
    "quantize_static": lambda o: (L.quantize_static, (o["x"], torch.tensor([0.1]), None, FP8)),
    "rms_norm_quantize": lambda o: (L.rms_norm_quantize, (o["x"], torch.rand(64), 1e-6, None, INT8, 0)),
    "silu_mul_quantize": lambda o: (L.silu_mul_quantize, (o["x"], INT8, 0)),
    "hadamard": lambda o: (L.hadamard, (o["x"], 32)),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    operation, arguments = CALLS[name](operands())
    # aot_dispatch_dynamic is what torch.compile(fullgraph=True) below does for all of them.
    opcheck(
        operation.default,
        arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("name", [*CALLS, "rms_norm_quantize residual"])
def test_results_are_contiguous_wherever_x_comes_from(name, implementation):
    """As the fake implementations say: compiled models look at the strides of what an operation returns."""
    o = operands()
    o["x"] = o["x"].t().contiguous().t()
    operation, arguments = CALLS[name.partition(" residual")[0]](o)
    if "residual" in name:
        arguments = (*arguments[:3], o["x"] + 1, *arguments[4:])
    with ops.use_implementation(implementation):
        found = operation(*arguments)
    assert all(t.is_contiguous() for t in (found if isinstance(found, tuple) else (found,)))


@pytest.mark.parametrize("name", ["linear", "hadamard", "matmul"])
def test_opcheck_with_gradients(name):
    o = operands()
    o["x"].requires_grad_()
    o["bias"].requires_grad_()
    operation, arguments = CALLS[name](o)
    opcheck(operation.default, arguments)


def test_one_graph_serves_any_number_of_rows():
    o = operands()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list):
        graphs.append(graph)
        return graph.forward

    def layer(x):
        h = ops.linear(x, o["int8"], o["channel"], o["bias"], activations="token", block=(1, 0)).relu()
        codes, scale = ops.quantize(h, INT8)
        return ops.hadamard(h[..., :16], 16), codes, scale

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for rows in (2, 3, 7, 30):
        x = torch.randn(rows, 64)
        for got, expected in zip(compiled(x), layer(x), strict=True):
            assert torch.equal(got, expected)
    assert len(graphs) == 1


def test_compiled_training_step_equals_the_eager_one():
    o = operands()
    x = o["x"].requires_grad_()

    def loss(x):
        return ops.linear(x, o["fp8"], o["channel"], activations="token", block=(1, 0)).square().sum()

    loss(x).backward()
    eager, x.grad = x.grad, None
    torch.compile(loss, fullgraph=True, backend="aot_eager")(x).backward()
    assert torch.equal(x.grad, eager)


@pytest.mark.parametrize(
    ("weight", "block", "shape"),
    [("int8", (1, 0), (24, 1)), ("fp8", (16, 32), (2, 2)), ("fp8", (0, 0), (1,))],
)
def test_gradient_is_that_of_the_dequantized_weight(weight, block, shape):
    o = operands()
    scale, grad = torch.rand(shape), torch.randn(2, 5, 24)
    x = torch.randn(2, 5, 64, requires_grad=True)
    bias = o["bias"].requires_grad_()
    activations = "group" if block[1] else "token"
    ops.linear(x, o[weight], scale, bias, activations=activations, block=block).backward(grad)
    w = ops.dequantize(o[weight], scale, block=block, k=64)
    torch.testing.assert_close(x.grad, grad @ w, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias.grad, grad.sum((0, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", ["int8", "fp8"])
def test_gradient_of_matmul_reaches_its_bias(weight, out_dtype):
    """As autograd has it of the dequantized product; what is before the codes and scales gets none."""
    o = operands()
    codes, scale = ops.quantize(o["x"].view(1, 5, 64), o[weight].dtype)
    arguments = (codes, scale, o[weight], o["channel"])
    grad = torch.randn(1, 5, 24).to(out_dtype)
    bias, expected = (o["bias"].clone().requires_grad_() for _ in range(2))
    out = ops.matmul(*arguments, bias, block=(1, 0), out_dtype=out_dtype)
    product = (codes.float() * scale) @ (o[weight].float() * o["channel"]).T
    want = (product + expected).to(out_dtype)
    torch.testing.assert_close(out, want, rtol=1e-5 if out_dtype == torch.float32 else 0.01, atol=1e-5)
    out.backward(grad)
    want.backward(grad)
    torch.testing.assert_close(bias.grad, expected.grad, rtol=1e-5, atol=1e-5)
    assert bias.grad.dtype == torch.float32
    compiled, bias.grad = bias.grad, None
    step = torch.compile(lambda b: ops.matmul(*arguments, b, block=(1, 0), out_dtype=out_dtype), fullgraph=True,
                         backend="aot_eager")  # fmt: skip
    step(bias).backward(grad)
    assert torch.equal(bias.grad, compiled)
    trained = scale.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="passes a gradient to its bias only; detach the scales"):
        ops.matmul(codes, trained, *arguments[2:], bias, block=(1, 0), out_dtype=out_dtype).sum().backward()


def test_codes_and_scales_are_constants():
    """What a gradient is asked of before them is no reason to fail: a compiled product traces its backward pass too."""
    o = operands()
    x, bias = o["x"].requires_grad_(), o["bias"].requires_grad_()
    outputs = [*ops.quantize(x, INT8), *ops.silu_mul_quantize(x, dtype=FP8)]
    outputs.append(ops.quantize_static(x, torch.tensor([0.1]), dtype=FP8))
    assert not any(t.requires_grad for t in outputs)

    def product(x, bias):
        return ops.matmul(
            *ops.quantize(x, INT8), o["int8"], o["channel"], bias, block=(1, 0), out_dtype=torch.float32
        )

    for run in (product, torch.compile(product, fullgraph=True, backend="aot_eager")):
        bias.grad = x.grad = None
        run(x, bias).sum().backward()
        assert torch.equal(bias.grad, torch.full_like(bias, len(x))) and x.grad is None
        run(x, bias.detach())


@pytest.mark.parametrize("added", [False, True])
def test_the_sum_of_rms_norm_quantize_may_be_changed_in_place(added):
    x, other = (torch.randn(2, 3, 64, requires_grad=True) for _ in range(2))
    *_, total = ops.rms_norm_quantize(x, torch.ones(64), 1e-6, other if added else None, dtype=INT8)
    total.mul_(2).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2.0))


def test_rms_norm_quantize_has_no_forward_mode_derivative():
    x = torch.randn(3, 64)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="expected no tangents"):
        ops.rms_norm_quantize(forward_ad.make_dual(x, x), torch.ones(64), 1e-6, dtype=INT8)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="expected no tangents"):
        ops.rms_norm_quantize(x, torch.ones(64), 1e-6, forward_ad.make_dual(x, x), dtype=INT8)


@pytest.mark.parametrize("added", [False, True])
def test_gradient_of_rms_norm_quantize_is_that_of_the_sum(added):
    x, other = (torch.randn(3, 64, requires_grad=True) for _ in range(2))
    grad = torch.randn(3, 64)

    def run(x, other):
        return ops.rms_norm_quantize(x, torch.ones(64), 1e-6, other if added else None, dtype=INT8)

    for norm in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        x.grad = other.grad = None
        codes, scale, total = norm(x, other)
        assert not codes.requires_grad and not scale.requires_grad
        total.backward(grad)
        assert torch.equal(x.grad, grad) and (torch.equal(other.grad, grad) if added else other.grad is None)


def test_a_float32_bias_gets_its_gradient_in_float32():
    o = operands()
    x, grad = torch.randn(100, 64, dtype=torch.bfloat16), torch.randn(100, 24, dtype=torch.bfloat16)
    bias = o["bias"].requires_grad_()
    ops.linear(x, o["int8"], o["channel"], bias, activations="token", block=(1, 0)).backward(grad)
    torch.testing.assert_close(bias.grad, grad.float().sum(0), rtol=1e-6, atol=1e-6)
    bias.grad = None
    ops.linear_bfloat16(x, torch.randn(24, 64, dtype=torch.bfloat16), bias).backward(grad)
    torch.testing.assert_close(bias.grad, grad.float().sum(0), rtol=1e-6, atol=1e-6)


def test_gradient_of_hadamard_is_hadamard():
    x, grad = torch.randn(3, 32, requires_grad=True), torch.randn(3, 32)
    ops.hadamard(x, 16).backward(grad)
    assert torch.equal(x.grad, ops.hadamard(grad, 16))


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 5, 64)])
def test_what_comes_out_may_be_changed_in_place(shape):
    """As Falcon adds to it, and ReLU(inplace=True): autograd forbids that on a view made within an operation."""
    o, zero = operands(), torch.tensor([3], dtype=INT8)
    x = torch.randn(shape, requires_grad=True)
    made = [
        ops.linear(x, o["int8"], o["channel"], activations="token", block=(1, 0)),
        ops.linear(
            x, o["int8"], o["channel"], activations="tensor", block=(1, 0), input_scale=torch.tensor([0.02]),
            input_zero_point=zero,
        ),
        ops.linear_bfloat16(x, o["int8"].to(torch.bfloat16)),
        ops.hadamard(x, 16),
    ]  # fmt: skip
    for out in made:
        out += 1
        out.sum().backward()
