"""What is remembered of a Linear's input, and what is chosen from it, against sums written out in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lowbit.calibration.gptq import RoundingOptions
from lowbit.calibration.graph import LayerGraph
from lowbit.calibration.layer import (
    correct_biases,
    input_scales,
    install,
    left_dynamic,
    round_members,
    wanted_statistics,
)
from lowbit.calibration.methods import METHODS, Method
from lowbit.calibration.rotation import apply_online_hadamard
from lowbit.calibration.simulate import attach, fake_quantize
from lowbit.calibration.smoothquant import output_error, search_smoothing, smooth_scale
from lowbit.calibration.statistics import InputStatistics, Wanted, token_errors
from lowbit.errors import InputError
from lowbit.quantize import Quantized, quantize, scale_from_range
from lowbit.scheme import get_scheme

ALL = Wanted(hessian=True, cross=True, sample_rows=8, observer="absmax")
INT8 = get_scheme("int8")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def skewed(n: int = 60, k: int = 300, seed: int = 0) -> Tensor:
    """Tokens whose channels differ in size and in mean, the largest of the first negative."""
    x = drawn(n, k, seed=seed) * torch.linspace(0.2, 5, k) + torch.linspace(-1, 2, k)
    x[3, 0] = -40.0
    return x


def close(found: Tensor | None, wanted: Tensor) -> bool:
    return found is not None and torch.allclose(found.double(), wanted.double(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_sums_are_those_of_the_definition(dtype, weighted, cross):
    """Of bfloat16 too: products of long inputs are summed in float32."""
    batches = [skewed(60).to(dtype), skewed(40, seed=1).to(dtype)]
    outputs = [b.float() @ drawn(300, 5, seed=2) for b in batches]
    outputs[0][7] *= 100
    spec = INT8.activations
    s = InputStatistics(wanted=replace(ALL, cross=cross), spec=spec, rows_per_batch=4)
    for x, y in zip(batches, outputs, strict=True):
        s.update(x.reshape(2, -1, 300), y if weighted else None)
    x, y = torch.cat(batches).double(), torch.cat(outputs).double()
    typical = outputs[0].double().square().sum(1).median()
    weight = 1 / (1 + y.square().sum(1) / typical) if weighted else torch.ones(100).double()
    rounded = fake_quantize(torch.cat(batches), spec).double() if cross else x
    tolerance = 0.02 if weighted and dtype == torch.bfloat16 else 1e-5  # weights are in the dtype of x
    wanted = (rounded * weight[:, None]).t() @ rounded
    assert (s.hessian.double() - wanted).norm() < tolerance * wanted.norm()
    if cross:
        wanted = (x * weight[:, None]).t() @ rounded
        assert (s.cross.double() - wanted).norm() < tolerance * wanted.norm()
        assert (s.cross.double() - wanted.t()).norm() > (s.cross.double() - wanted).norm()
    assert torch.equal(s.absmax.double(), x.abs().amax(0)) and s.tokens == 100
    assert (s.mean - x.mean(0)).norm() < (1e-5 if dtype == torch.float32 else 0.02) * x.mean(0).norm()
    assert torch.equal(s.rows(), torch.cat([b[[0, *rest]] for b, rest in zip(batches, ((20, 39, 59), (13, 26, 39)),
                                                                            strict=True)]))  # fmt: skip
    low, high = s.observer.range()
    assert (float(low), float(high)) == (float(x.min()), float(x.max()))


def test_statistics_follow_an_input_that_is_divided():
    x, divisor = skewed(), torch.linspace(0.5, 3, 300)
    wanted = replace(ALL, cross=False, observer=None)
    before, after = (InputStatistics(wanted=wanted, spec=None, rows_per_batch=8) for _ in range(2))
    before.update(x)
    before.rescale(divisor)
    after.update(x / divisor)
    for name in ("absmax", "total", "hessian", "mean"):
        assert close(getattr(before, name), getattr(after, name)), name
    assert close(before.rows(), after.rows())


def test_workers_statistics_add_up():
    x = skewed()
    whole, *parts = (InputStatistics(wanted=ALL, spec=INT8.activations, rows_per_batch=60) for _ in range(4))
    whole.update(x)
    parts[0].update(x[:20])
    parts[1].update(x[20:])
    parts[1].merge(parts[2])  # has seen nothing
    parts[2].merge(parts[1])
    parts[0].merge(parts[2])
    for name in ("absmax", "total", "hessian", "cross"):
        assert close(getattr(parts[0], name), getattr(whole, name)), name
    assert parts[0].tokens == 60 and torch.equal(parts[0].observer.range()[0], whole.observer.range()[0])


def test_errors_count_relative_to_the_token_or_a_typical_one():
    target = torch.tensor([[1.0, 0.0], [0.0, 2.0], [30.0, 40.0], [0.1, 0.0], [2.0, 0.0]])
    lost = torch.full((5, 2), 0.5)
    # Squared lengths 1, 4, 2500, 0.01 and 4: shorter than the median, 4, counts as that.
    assert token_errors(lost, target).tolist() == pytest.approx([0.125, 0.125, 0.0002, 0.125, 0.125])


def test_the_scale_of_smoothquant_is_that_of_the_paper():
    a, w = torch.tensor([4.0, 9.0, 0.0, 100.0]), torch.tensor([1.0, 0.25, 3.0, 0.5])
    raw = torch.tensor([4**0.3, 9**0.3 / 0.25**0.7, 1.0, 100**0.3 / 0.5**0.7])
    mean = (raw[0] * raw[1] * raw[3]) ** (1 / 3)
    wanted = torch.where(a > 0, raw / mean, torch.ones(4))
    torch.testing.assert_close(smooth_scale(a, w, 0.3), wanted)
    extreme = smooth_scale(torch.tensor([1e30, 1e-30]), torch.tensor([1e-30, 1e30]), 0.5)
    assert extreme.tolist() == pytest.approx([1e4, 1e-4])


def test_a_searched_scale_is_one_that_the_joint_allows_and_the_error_is_its_own():
    x, weights = skewed(64, 32), [drawn(24, 32, seed=3), 20 * drawn(8, 32, seed=4)]
    x[:, 5] *= 50

    def tie(scale: Tensor) -> Tensor:
        return scale.view(-1, 2).log().mean(1).exp().repeat_interleave(2)

    found = search_smoothing(
        x, x.abs().amax(0), weights, INT8.weights, get_scheme("int8-static").activations, tie=tie
    )
    assert found.alpha is not None and torch.allclose(found.scale[::2], found.scale[1::2])
    reference = [x @ w.t() for w in weights]
    absmax = torch.cat(weights).abs().amax(0)
    assert torch.allclose(found.scale, tie(smooth_scale(x.abs().amax(0), absmax, found.alpha)))
    # A static activation scale is that of the whole sample.
    scale = (x / found.scale).abs().max() / 127
    rounded = ((x / found.scale) / scale).round() * scale
    lost = [rounded @ quantize(w * found.scale, INT8.weights).dequantize().t() for w in weights]
    wanted = token_errors(torch.cat(lost, 1) - torch.cat(reference, 1), torch.cat(reference, 1)).mean()
    assert found.error == pytest.approx(float(wanted), rel=1e-4)
    plain = output_error(x, weights, INT8.weights, get_scheme("int8-static").activations, reference)
    assert found.plain_error == plain > found.error


# A layer of two Linears that read one input, and one that reads another.
GRAPH = LayerGraph(linears=("a", "b", "c"), groups=(("a", "b"), ("c",)), norms=(), pairs=(), writers=())


def layer() -> nn.Module:
    out = nn.Module()
    for i, name in enumerate(("a", "b", "c")):
        linear = nn.Linear(32, 16, bias=name != "b")
        with torch.no_grad():
            linear.weight.copy_(drawn(16, 32, seed=10 + i))
            if linear.bias is not None:
                linear.bias.copy_(drawn(16, seed=20 + i))
        setattr(out, name, linear.requires_grad_(False))
    return out


def watched(wanted: Wanted, scheme: str = "int8") -> dict[str, InputStatistics]:
    found = {
        n: InputStatistics(wanted=wanted, spec=get_scheme(scheme).activations, rows_per_batch=64)
        for n in "ac"
    }
    for i, s in enumerate(found.values()):
        s.update(skewed(64, 32, seed=i))
    return found


def rounded(module: nn.Module, scheme: str = "int8") -> dict[str, Quantized]:
    return {n: quantize(m.weight, get_scheme(scheme).weights) for n, m in module.named_children()}


def test_biases_take_the_mean_of_what_rounding_loses():
    module, quantized = layer(), rounded(layer())
    before = {n: m.bias.clone() for n, m in module.named_children() if m.bias is not None}
    assert correct_biases(module, watched(Wanted()), GRAPH, dict.fromkeys("abc", INT8), quantized) == {
        "a",
        "c",
    }
    for i, name in enumerate("ac"):
        linear, x = module.get_submodule(name), skewed(64, 32, seed=i).double()
        lost = x @ (linear.weight.double() - quantized[name].dequantize().double()).t()
        torch.testing.assert_close(linear.bias.double() - before[name], lost.mean(0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("tokens", [127, 128])
def test_too_few_tokens_round_without_data(tokens):
    """With the scales that were asked for."""
    method = replace(METHODS["gptq"], rounding=RoundingOptions(rounding="gptq", scale="mse"))
    weights = {"a": drawn(16, 256, seed=1), "b": drawn(8, 256, seed=2)}
    fp8 = get_scheme("fp8")
    s = InputStatistics(wanted=Wanted(hessian=True), spec=None)
    s.update(skewed(tokens, 32) @ drawn(32, 256, seed=5))
    found, report = round_members(weights, s, method, dict.fromkeys("ab", fp8), min_tokens=128)
    for name, weight in weights.items():
        nearest = quantize(weight, fp8.weights, "mse")
        assert not torch.equal(nearest.scale, quantize(weight, fp8.weights).scale)
        assert torch.equal(found[name].scale, nearest.scale)
        assert torch.equal(found[name].codes.float(), nearest.codes.float()) == (tokens < 128)
        assert ("fallback" in report[name]) == (tokens < 128)


def test_weights_make_up_for_what_their_inputs_lose():
    method = replace(METHODS["gptq"], compensate=True)
    fp8, weight, x = get_scheme("fp8"), drawn(16, 32, seed=1), skewed(400, 32) @ drawn(32, 32, seed=5)
    wanted = wanted_statistics(method, [fp8])
    assert wanted.cross and not wanted_statistics(method, [get_scheme("int8-weight-only")]).cross
    s = InputStatistics(wanted=wanted, spec=fp8.activations)
    s.update(x)
    found, _ = round_members({"a": weight}, s, method, {"a": fp8}, min_tokens=128)
    s.cross = None
    other, _ = round_members({"a": weight}, s, method, {"a": fp8}, min_tokens=128)
    y, seen = x.double() @ weight.double().t(), fake_quantize(x, fp8.activations).double()
    lost = [(seen @ q["a"].dequantize().double().t() - y).norm() for q in (found, other)]
    assert lost[0] < 0.97 * lost[1]


@pytest.mark.parametrize("scheme", ["int8-static", "int8-static-asym", "fp8-static"])
def test_static_ranges_are_those_of_the_least_output_error(scheme):
    """Of what the sample has and of what came beside it: a peak that it missed may be the best range."""
    module, quantized, spec = layer(), rounded(layer(), scheme), get_scheme(scheme).activations
    method = replace(METHODS["absmax"], activation_range="output")
    s = watched(wanted_statistics(method, [get_scheme(scheme)]), scheme)
    for one in s.values():
        one.absmax *= 1.5
    found, schemes = input_scales(
        module, GRAPH, method, dict.fromkeys("abc", get_scheme(scheme)), s, quantized
    )
    assert found["a"] == found["b"] and set(schemes.values()) == {get_scheme(scheme)}
    for first, members in (("a", "ab"), ("c", "c")):
        x = s[first].rows()
        y = x @ torch.cat([module.get_submodule(m).weight for m in members]).t()
        weight = torch.cat([quantized[m].dequantize() for m in members])
        low, high = -s[first].absmax.max().reshape(1), s[first].absmax.max().reshape(1)
        if not spec.symmetric:
            low, high = x.min().reshape(1), x.max().reshape(1)
        tried = []
        for step in range(83):
            scale, zero = scale_from_range(low * 0.92**step, high * 0.92**step, spec)
            errors = token_errors(fake_quantize(x, spec, scale, zero) @ weight.t() - y, y)
            tried.append((float(errors.mean() + errors.max() / 10), float(scale), zero))
        _, scale, zero = min(tried, key=lambda t: t[0])
        assert float(found[first][0]) == pytest.approx(scale, rel=1e-5)
        assert (found[first][1] is None) == spec.symmetric and (
            zero is None or int(found[first][1]) == int(zero)
        )


@pytest.mark.parametrize("error", [9.9e-4, 1.01e-3])
def test_modules_that_keep_less_than_30_db_are_left_dynamic(error):
    method = replace(METHODS["absmax"], dynamic_below=30.0)
    found = left_dynamic(get_scheme("int8-static"), error, method)
    assert (found is None) == (error < 1e-3) and found in (None, INT8)
    for scheme, other in ((INT8, method), (get_scheme("int8-static"), METHODS["absmax"]),
                          (get_scheme("fp8-static"), method)):  # of which there is no dynamic twin  # fmt: skip
        assert left_dynamic(scheme, 1.0, other) is None


def test_groups_of_which_none_is_static_any_more_have_no_scales():
    method = Method(name="mine", activation_range="output", dynamic_below=200.0)
    scheme = get_scheme("int8-static")
    s = watched(wanted_statistics(method, [scheme]), "int8-static")
    given = dict.fromkeys("abc", scheme)
    found, schemes = input_scales(layer(), GRAPH, method, given, s, rounded(layer()))
    assert not found and schemes == dict.fromkeys("abc", INT8) and given == dict.fromkeys("abc", scheme)
    s["c"] = InputStatistics(wanted=Wanted(), spec=scheme.activations)
    with pytest.raises(InputError, match="expected data for c, found none that reached it"):
        input_scales(layer(), GRAPH, method, given, s, rounded(layer()))


def test_installed_modules_round_each_by_its_own_scale():
    """They share the work where they read one input, and the scale, zero point and rotation are the same."""
    x = skewed(16, 32)
    for scheme, scales, online in (
        ("fp8-static", {"a": (0.1, None), "b": (0.02, None)}, ()),
        ("int8-static-asym", {"a": (0.1, 5), "b": (0.1, -40)}, ()),
        ("fp8", {}, ("a",)),
        ("int8", {}, ("a",)),
    ):
        module, spec = layer(), get_scheme(scheme).activations
        quantized = rounded(module, scheme)
        own = {
            n: (torch.tensor([s]), None if z is None else torch.tensor([z], dtype=torch.int8))
            for n, (s, z) in scales.items()
        }
        quantizers = install(
            module,
            dict.fromkeys("ab", get_scheme(scheme)),
            {n: quantized[n] for n in "ab"},
            own,
            frozenset(online),
        )
        detach = attach(module, quantizers)
        found = {n: module.get_submodule(n)(x) for n in "abc"}
        detach()
        untouched = layer()
        for name in "ab":
            seen = apply_online_hadamard(x) if name in online else x
            seen = fake_quantize(seen, spec, *own.get(name, (None, None)))
            bias = untouched.get_submodule(name).bias
            wanted = nn.functional.linear(seen, quantized[name].dequantize(), bias)
            torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-4)
        assert torch.equal(found["c"], untouched.c(x))
