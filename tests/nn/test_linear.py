"""QuantLinear against the float64 oracle, and through everything that a module goes through."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import nn
from torch.autograd import forward_ad

from lowbit import ops
from lowbit.errors import InputError
from lowbit.nn import QuantLinear, float_activations, quantize_model
from lowbit.nn.bfloat16 import BFloat16Linear
from lowbit.quantize import choose_scale, dequantize, quantize, quantize_with
from lowbit.scheme import SCHEMES

DYNAMIC = ["int8", "int8-block", "int8-weight-only", "fp8", "fp8-block", "mxfp8"]


def make(
    k: int, n: int, scheme: str, *, bias: bool = True, seed: int = 0, **kw
) -> tuple[nn.Linear, QuantLinear]:
    torch.manual_seed(seed)
    linear = nn.Linear(k, n, bias=bias)
    return linear, QuantLinear.from_linear(linear, scheme, **kw)


def oracle(x: torch.Tensor, linear: nn.Linear, scheme: str) -> torch.Tensor:
    """float64: quantize and dequantize both sides, multiply."""
    spec = SCHEMES[scheme]
    w = quantize(linear.weight.detach(), spec.weights).dequantize().double()
    x = x.float()
    if spec.activations is not None and x.numel():
        scale, _ = choose_scale(x, spec.activations)
        x = dequantize(quantize_with(x, scale, spec.activations), scale, spec.activations)
    out = x.double() @ w.T
    return out if linear.bias is None else out + linear.bias.detach().double()


@pytest.mark.parametrize("scheme", DYNAMIC)
@pytest.mark.parametrize(("k", "n"), [(64, 32), (130, 70), (257, 33)])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_oracle(scheme, k, n, bias):
    linear, quant = make(k, n, scheme, bias=bias)
    x = torch.randn(7, k)
    want = oracle(x, linear, scheme)
    torch.testing.assert_close(quant(x).double(), want, rtol=1e-5, atol=2e-6)
    # It does quantize the activations, and says what that costs.
    with float_activations(quant):
        unquantized = quant(x)
    assert torch.equal(unquantized, nn.functional.linear(x, quant.dequantize(), linear.bias))
    assert (
        torch.equal(unquantized, quant(x)) == (scheme == "int8-weight-only") or scheme == "int8-weight-only"
    )


@pytest.mark.parametrize("scheme", DYNAMIC)
def test_state_dict_is_the_format(scheme):
    _, quant = make(256, 128, scheme)
    stored = quant.format.tensors(quant.scheme, (128, 256))
    found = {name: tuple(t.shape) for name, t in quant.state_dict().items()}
    assert found == {**{s.suffix[1:]: s.shape for s in stored}, "bias": (128,)}
    if scheme == "fp8-block":
        _, quant = make(256, 128, scheme, format="fp8")
        assert set(quant.state_dict()) == {"weight", "weight_scale_inv", "bias"}


@pytest.mark.parametrize("scheme", ["int8", "int8-static", "fp8-static", "mxfp8"])
@pytest.mark.parametrize("format", ["fp8", "sglang"])
def test_a_format_that_does_not_hold_the_scheme(scheme, format):
    """It was a KeyError of static schemes, and of the others codes that the format's engines read as blocks."""
    with pytest.raises(
        InputError, match=rf"q_proj: expected a format that holds {scheme}, found {format}; use one of"
    ):
        QuantLinear.from_linear(nn.Linear(256, 128), scheme, format=format, input_scale=0.1, name="q_proj")


@pytest.mark.parametrize("scheme", DYNAMIC)
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "to dtype", "to device and dtype"])
def test_casts_touch_the_bias_only(scheme, cast):
    _, quant = make(130, 70, scheme)
    before = {n: t.clone() for n, t in quant.state_dict().items()}
    outer = nn.Sequential(quant)
    if cast == "to dtype":
        outer.to(torch.float16)
    elif cast == "to device and dtype":
        outer.to("cpu", torch.bfloat16)
    else:
        getattr(outer, cast)()
    assert list(quant.state_dict()) == list(before)
    for name, tensor in outer[0].state_dict().items():
        if name == "bias":
            assert tensor.dtype != torch.float32
        else:
            assert tensor.dtype == before[name].dtype, name
            assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name
    x = torch.randn(3, 130, dtype=torch.bfloat16)
    assert quant(x).dtype == torch.bfloat16


def test_type_that_would_cast_codes_is_refused():
    _, quant = make(64, 32, "fp8")
    with pytest.raises(TypeError, match="keep"):
        quant.type(torch.float16)


@pytest.mark.parametrize("scheme", DYNAMIC)
def test_round_trips(scheme):
    _, quant = make(128, 48, scheme)
    x = torch.randn(5, 128)
    want = quant(x)
    buffer = io.BytesIO()
    torch.save(quant, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(quant), pickle.loads(pickle.dumps(quant)), torch.load(buffer, weights_only=False)]
    fresh = QuantLinear(128, 48, scheme=scheme, bias=True, device="meta")
    tensors = load_safetensors(save_safetensors(quant.state_dict()))
    fresh.load_state_dict(tensors, assign=True)
    assert not any(t.is_meta for t in fresh.state_dict().values())
    empty = QuantLinear(128, 48, scheme=scheme, bias=True)
    empty.load_state_dict(quant.state_dict())
    moved = QuantLinear(128, 48, scheme=scheme, bias=True, device="meta").to_empty(device="cpu")
    moved.load_state_dict(quant.state_dict())
    for other in (*copies, fresh, empty, moved):
        assert torch.equal(other(x), want)
    saved = io.BytesIO()
    torch.save(quant.state_dict(), saved)
    saved.seek(0)
    assert torch.load(saved, weights_only=True).keys() == quant.state_dict().keys()


def test_wrong_shapes_are_refused():
    _, quant = make(64, 32, "int8")
    other = QuantLinear(64, 33, scheme="int8", bias=True)
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(quant.state_dict())
    with pytest.raises(ValueError, match="expected an input"):
        quant(torch.randn(2, 63))
    with pytest.raises(TypeError, match="float32, bfloat16 or float16"):
        quant(torch.ones(2, 64, dtype=torch.int8))


@pytest.mark.parametrize("scheme", ["int8", "fp8", "int8-weight-only"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_float_weight_is_not_loaded_as_codes(scheme, assign):
    linear, quant = make(64, 32, scheme)
    before = quant.codes.clone()
    name = "weight_packed" if scheme == "int8-weight-only" else "weight"
    with pytest.raises(RuntimeError, match=rf"{name}: expected codes in .* found torch.float32"):
        quant.load_state_dict({name: linear.weight.detach()}, strict=False, assign=assign)
    assert torch.equal(quant.codes.view(torch.uint8), before.view(torch.uint8))


def test_scales_of_published_checkpoints():
    """BF16 scales and per-tensor scales of shape [] become float32 of the right shape."""
    _, quant = make(64, 32, "int8")
    state = quant.state_dict()
    state["weight_scale"] = state["weight_scale"].bfloat16()
    fresh = QuantLinear(64, 32, scheme="int8", bias=True, device="meta")
    fresh.load_state_dict(state, assign=True)
    assert fresh.weight_scale.dtype == torch.float32
    _, static = make(64, 32, "fp8-static", input_scale=0.01)
    state = static.state_dict()
    state["weight_scale"], state["input_scale"] = (
        state["weight_scale"].reshape(()),
        state["input_scale"].reshape(()),
    )
    fresh = QuantLinear(64, 32, scheme="fp8-static", bias=True, device="meta")
    fresh.load_state_dict(state, assign=True)
    x = torch.randn(3, 64)
    assert torch.equal(fresh(x), static(x))


@pytest.mark.parametrize("scheme", ["int8", "fp8", "int8-weight-only"])
def test_shapes_of_inputs(scheme):
    _, quant = make(96, 40, scheme)
    rows = torch.randn(24, 96)
    want = quant(rows)
    for shape in ((24,), (4, 6), (2, 3, 4), (2, 3, 2, 2)):
        assert torch.equal(quant(rows.view(*shape, 96)), want.view(*shape, 40))
    # A row alone is summed in another order; integer sums have none.
    rounding = 0.0 if scheme == "int8" else 1e-6
    torch.testing.assert_close(quant(rows[0]), want[0], rtol=rounding, atol=rounding)
    assert quant(rows[:0]).shape == (0, 40)
    assert quant(rows.view(4, 6, 96)[:, :0]).shape == (4, 0, 40)
    assert torch.equal(quant(rows.T.contiguous().T), want)
    wide = torch.randn(24, 192)
    wide[:, ::2] = rows
    assert torch.equal(quant(wide[:, ::2]), want)
    assert torch.equal(quant(rows.view(4, 6, 96).transpose(0, 1)), want.view(4, 6, 40).transpose(0, 1))
    assert torch.equal(quant(rows.double()), want.double())
    assert torch.equal(quant(rows.expand(2, 24, 96))[1], want)


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_autocast(scheme):
    _, quant = make(96, 40, scheme)
    x = torch.randn(5, 96)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = quant(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, quant(x.bfloat16()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert quant(x.double()).dtype == torch.float64  # as torch's own
        with pytest.raises(TypeError, match=r"found torch\.int64"):
            quant(x.long())


@pytest.mark.parametrize("scheme", DYNAMIC)
def test_shapes_on_meta(scheme):
    _, quant = make(96, 40, scheme)
    out = quant.to("meta")(torch.empty(3, 5, 96, dtype=torch.bfloat16, device="meta"))
    assert (out.device.type, out.dtype, out.shape) == ("meta", torch.bfloat16, (3, 5, 40))


@pytest.mark.parametrize("scheme", DYNAMIC)
def test_gradient_reaches_the_input_only(scheme):
    _, quant = make(96, 40, scheme)
    x = torch.randn(3, 5, 96, requires_grad=True)
    grad = torch.randn(3, 5, 40)
    quant(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ quant.dequantize())
    assert list(quant.parameters()) == []


@pytest.mark.parametrize("scheme", ["int8", "fp8", "int8-weight-only"])
def test_peft_finds_a_weight(scheme):
    """It asks for `qweight`, then for `weight`, and without either for a parameter; an adapter goes to its device."""
    layer = QuantLinear.from_linear(nn.Linear(64, 32), scheme)
    found = layer.qweight if hasattr(layer, "qweight") else layer.weight
    assert found is layer.codes_buffer
    assert hasattr(layer, "qweight") == (scheme == "int8-weight-only")
    assert layer.to("meta").codes_buffer.is_meta and "qweight" not in layer.state_dict()


@pytest.mark.parametrize("scheme", ["int8", "fp8", "int8-weight-only"])
def test_scales_that_somebody_cast_are_an_error(scheme):
    """As FSDP does with a buffer_dtype, past the module: int8 went on with scales rounded to bfloat16."""
    layer = QuantLinear.from_linear(nn.Linear(64, 32), scheme)
    for buffer in layer.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.to(torch.bfloat16)
    with pytest.raises(
        TypeError, match=r"cast to torch\.bfloat16; FSDP's MixedPrecision\(buffer_dtype=…\) does"
    ):
        layer(torch.randn(2, 64, dtype=torch.bfloat16))


def test_weights_are_frozen():
    _, quant = make(96, 40, "fp8")
    with pytest.raises(TypeError, match="frozen"):
        quant.requires_grad_()
    with pytest.raises(TypeError, match="frozen"):
        quant.weight = nn.Parameter(torch.randn(40, 96))
    quant.weight_scale.requires_grad_()
    with pytest.raises(TypeError, match="frozen"):
        quant(torch.randn(2, 96))
    quant.requires_grad_(False)
    linear = quant.to_linear()
    assert linear.weight.requires_grad


@pytest.mark.parametrize("scheme", ["int8", "fp8", "int8-weight-only", None])
def test_a_bias_may_be_trained(scheme):
    """A Parameter takes the buffer's place: torch moves it from the one table to the other."""
    linear = nn.Linear(64, 32)
    module = BFloat16Linear(64, 32, bias=True, dtype=torch.float32)
    module.weight.copy_(linear.weight.detach())
    module.bias.copy_(linear.bias.detach())
    if scheme is not None:
        module = QuantLinear.from_linear(linear, scheme)
    x = torch.randn(5, 64)
    want, keys = module(x), set(module.state_dict())
    module.bias = nn.Parameter(module.bias.detach().clone())
    assert torch.equal(module(x), want) and set(module.state_dict()) == keys
    assert [n for n, _ in module.named_parameters()] == ["bias"]
    module(x).sum().backward()
    torch.testing.assert_close(module.bias.grad, torch.full((32,), 5.0))
    assert torch.equal(copy.deepcopy(module)(x), want) and "bias=True" in repr(module)
    assert torch.equal(module.to_linear().bias, linear.bias)
    assert module.half().bias.dtype == torch.float16


@pytest.mark.parametrize("scheme", ["int8", "fp8-block", "int8-weight-only"])
def test_compiles_whole_with_dynamic_rows(scheme):
    _, quant = make(128, 40, scheme)
    model = nn.Sequential(quant, nn.SiLU())
    traced = []

    def backend(graph, example):
        traced.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for rows in (2, 5, 9):
        x = torch.randn(rows, 128)
        assert torch.equal(compiled(x), model(x))
    assert len(traced) == 1, "compiled again for another number of rows"


@pytest.mark.slow
def test_inductor():
    _, quant = make(128, 40, "int8")
    model = nn.Sequential(quant, nn.SiLU())
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    x = torch.randn(5, 128)
    torch.testing.assert_close(compiled(x), model(x))


def test_static_activations():
    linear, quant = make(64, 32, "int8-static", input_scale=0.05)
    x = torch.randn(6, 64)
    codes = torch.round(x.double() / 0.05).clamp(-127, 127)
    want = codes * quant.input_scale.double() @ quant.dequantize().double().T + linear.bias.double()
    torch.testing.assert_close(quant(x).double(), want, rtol=1e-5, atol=1e-6)
    _, asymmetric = make(64, 32, "int8-static-asym", input_scale=0.03, input_zero_point=-20)
    codes = (torch.round(x.double() / asymmetric.input_scale.double()) - 20).clamp(-128, 127)
    values = (codes + 20) * asymmetric.input_scale.double()
    want = values @ asymmetric.dequantize().double().T + asymmetric.bias.double()
    torch.testing.assert_close(asymmetric(x).double(), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="input_scale"):
        make(64, 32, "int8-static")
    for scale in (0.0, float("nan"), torch.rand(2)):
        with pytest.raises(ValueError, match="one finite, positive input_scale"):
            make(64, 32, "fp8-static", input_scale=scale)
    for zero in (200, 2.5, torch.zeros(2)):
        with pytest.raises(ValueError, match="an integer from -128 to 127"):
            make(64, 32, "int8-static-asym", input_scale=0.03, input_zero_point=zero)


@pytest.mark.parametrize("scheme", ["int8", "int8-block", "fp8-static"])
def test_codes_are_no_weights(scheme):
    """Those of a layer that is quantized already were quantized again, without their scale."""
    given = {"input_scale": 0.1} if scheme == "fp8-static" else {}
    quantized, float8 = nn.Linear(64, 32), nn.Linear(64, 32)
    quantized = QuantLinear.from_linear(quantized, "int8")
    float8.weight = nn.Parameter(float8.weight.to(torch.float8_e4m3fn), requires_grad=False)
    for layer, dtype in ((quantized, "int8"), (float8, "float8_e4m3fn")):
        with pytest.raises(InputError, match=rf"q_proj: expected a weight in float, found torch\.{dtype}"):
            QuantLinear.from_linear(layer, scheme, name="q_proj", **given)
    QuantLinear.from_linear(quantized.to_linear(), scheme, **given)
    with pytest.raises(InputError, match="found it on meta; load the weights first"):
        QuantLinear.from_linear(nn.Linear(64, 32, device="meta"), scheme, **given)
    with pytest.raises(ValueError, match="expected a layer with a 2-D weight, found Identity"):
        QuantLinear.from_linear(nn.Identity(), scheme, **given)


def test_a_scheme_takes_no_static_scale_that_it_does_not_store():
    """They were dropped without a word."""
    with pytest.raises(ValueError, match="int8 stores no input_scale: leave it out, or use int8-static"):
        make(64, 32, "int8", input_scale=0.1)
    with pytest.raises(
        ValueError, match=r"int8-static stores no input_zero_point: .* or use int8-static-asym"
    ):
        make(64, 32, "int8-static", input_scale=0.1, input_zero_point=3)


def test_not_finite_weights_are_named():
    linear = nn.Linear(32, 16)
    linear.weight.data[3, 4] = float("nan")
    with pytest.raises(InputError, match=r"proj.*nan at \[3, 4\]"):
        quantize_model(nn.ModuleDict({"proj": linear}), "int8")
    with pytest.raises(ValueError, match="quantizes weights"):
        QuantLinear.from_linear(nn.Linear(32, 16), "bf16")


def test_row_blocks_change_nothing(monkeypatch):
    import lowbit.nn.weights as weights

    w = torch.randn(300, 200)
    for scheme in ("int8", "int8-block", "fp8-static", "mxfp8", "int8-weight-only"):
        spec = SCHEMES[scheme].weights
        want = quantize(w, spec)
        monkeypatch.setattr(weights, "_BLOCK_ELEMENTS", 1500)
        codes, scale = weights.quantize_rows(w, spec)
        assert torch.equal(codes.view(torch.uint8), want.codes.view(torch.uint8))
        assert torch.equal(scale, want.scale)
        got = weights.dequantize_rows(codes, scale, spec, torch.bfloat16)
        assert torch.equal(got, want.dequantize().bfloat16())


@pytest.mark.parametrize("transform", ["grad", "vjp", "jacrev", "vmap within grad"])
def test_transforms_that_differentiate_are_refused(transform):
    """torch asked for a setup_context method of a class of its own."""
    quant = QuantLinear.from_linear(nn.Linear(64, 64), "int8")
    x, one, scale = torch.randn(3, 64), torch.ones(64), torch.ones(1)
    of = {
        "linear": quant,
        "table": BFloat16Linear(64, 64),
        "quantize": lambda x: ops.quantize(x, torch.int8)[1] * x,
        "quantize_static": lambda x: ops.quantize_static(x, scale, dtype=torch.int8) * x,
        "silu_mul_quantize": lambda x: ops.silu_mul_quantize(x, dtype=torch.int8)[1] * x,
        "rms_norm_quantize": lambda x: ops.rms_norm_quantize(x, one, 1e-6, dtype=torch.int8)[2],
        "hadamard": lambda x: ops.hadamard(x, 64),
    }
    by = {
        "grad": lambda f: torch.func.grad(lambda x: f(x).sum())(x),
        "vjp": lambda f: torch.func.vjp(f, x)[1](f(x)),
        "jacrev": lambda f: torch.func.jacrev(f)(x),
        "vmap within grad": lambda f: torch.func.grad(lambda x: torch.func.vmap(f)(x).sum())(x),
    }[transform]
    for f in of.values():
        with pytest.raises(NotImplementedError, match=r"expected no torch\.func\.grad.* use backward\(\)"):
            by(f)
    # What is not differentiated, and what is by other means.
    torch.func.grad(lambda z: (quant(x) * z).sum())(torch.ones(64))
    y = x.clone().requires_grad_()
    torch.func.vmap(of["hadamard"])(y).sum().backward()
    torch.testing.assert_close(y.grad, ops.hadamard(torch.ones_like(x), 64))
    by(quant.to_linear())


@pytest.mark.parametrize("scheme", ["int8", "fp8-block", "int8-weight-only"])
def test_forward_mode_is_refused(scheme):
    """torch takes the derivative of an operator that has none for zero, and says nothing."""
    quant = QuantLinear.from_linear(nn.Linear(128, 128), scheme)
    table = BFloat16Linear(128, 128)
    x = torch.randn(3, 128)
    for module in (quant, table):
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.func.jvp(module, (x,), (x,))
        with forward_ad.dual_level():
            module(x)  # nothing to differentiate
            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                module(forward_ad.make_dual(x, x))
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: ops.hadamard(x, 64), (x,), (x,))
    linear = quant.to_linear()
    _, tangent = torch.func.jvp(linear, (x,), (x,))
    torch.testing.assert_close(tangent, x @ linear.weight.detach().T)
