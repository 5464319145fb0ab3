"""Experts with static activation scales, as a calibration writes them: against the same products in float64."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch
from nn_reference import FUSED, activations_quantized, build, dequantized, inputs, logits, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor

import lowbit
from lowbit.dtypes import decode
from lowbit.formats import get_format
from lowbit.nn import QuantExperts, QuantLinear, float_activations
from lowbit.quantize import quantize
from lowbit.scheme import SCHEMES

KINDS = ["qwen3-moe", "mixtral", "deepseek-v3", "qwen3-vl-moe", "llama4"]


@pytest.fixture(scope="module", params=KINDS)
def converted(request, tmp_path_factory):
    """(kind, checkpoint in fp8-static with the scales of a real calibration)."""
    where = tmp_path_factory.mktemp(request.param)
    build(request.param).save_pretrained(where / "src")
    generator = torch.Generator().manual_seed(5)
    windows = list(torch.randint(3, 90, (8, 24), generator=generator))
    lowbit.calibrate(where / "src", where / "calib", "fp8-static", data=windows)
    lowbit.convert(where / "src", where / "out", "fp8-static", calibration=where / "calib")
    return request.param, where / "out"


def codes_of(x: Tensor, scale: Tensor, zero: int, dtype: torch.dtype) -> Tensor:
    """float64: the codes of x under a static scale, divided in float32 as every implementation does."""
    ratio = x.float() / scale
    if dtype == torch.float8_e4m3fn:
        return decode(ratio.clamp(-448, 448).to(dtype)).double()
    return (ratio + zero).clamp(-128 if zero else -127, 127).round().double() - zero


def expected(experts: QuantExperts, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """float64 [T, H]: token by token, every product from codes as they lie in the checkpoint."""
    stored = experts.state_dict()
    out = torch.zeros(x.shape, dtype=torch.float64)

    def product(e: int, projection: str, row: Tensor) -> Tensor:
        at = f"{e}.{experts.projections[projection]}"
        codes, scale = stored[f"{at}.weight"], stored[f"{at}.input_scale"]
        zero = stored.get(f"{at}.input_zero_point", torch.zeros(1))
        a = codes_of(row, scale, int(zero), codes.dtype)
        return decode(codes).double() @ a * scale.double() * stored[f"{at}.weight_scale"].double().reshape(-1)

    for t in range(x.shape[0]):
        for choice, e in enumerate(index[t].tolist()):
            gate, up = (product(e, p, x[t]).float() for p in ("gate", "up"))
            out[t] += float(weights[t, choice]) * product(e, "down", experts.act_fn(gate) * up)
    return out


def test_outputs_of_the_experts(converted):
    _, out = converted
    model = lowbit.load(out, dtype=torch.float32)
    modules = [m for m in model.modules() if isinstance(m, QuantExperts)]
    assert modules
    generator = torch.Generator().manual_seed(3)
    for experts in modules:
        assert experts.scheme.name == "fp8-static"
        scales = experts.stack("down", "input_scale")
        assert scales.shape == (experts.num_experts, 1) and len(scales.unique()) > 1
        x = torch.randn(9, experts.hidden_size, generator=generator)
        x[0] *= 50  # saturates
        index = torch.rand(9, experts.num_experts, generator=generator).argsort(1)[:, :2]
        weights = torch.rand(9, 2, generator=generator)
        want = expected(experts, x, index, weights)
        error = (experts(x, index, weights).double() - want).norm(dim=1) / want.norm(dim=1)
        # A code of the second product that float rounding tips over is one of 2⁻⁴; others cost 2⁻²⁴.
        assert error.median() < 1e-6 and error.max() < 5e-3


def test_the_whole_model(converted, tmp_path):
    kind, out = converted
    model = lowbit.load(out, dtype=torch.float32)
    cls, _ = tiny(kind)
    float_dir = dequantized(out, tmp_path / "float", FUSED.get(kind))
    reference = cls.from_pretrained(float_dir, dtype=torch.float32, experts_implementation="eager").eval()
    batch = inputs(kind)
    want = logits(reference, batch)
    with float_activations(model):
        torch.testing.assert_close(logits(model, batch), want, rtol=1e-5, atol=1e-6)
    static = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantExperts):
            for e in range(module.num_experts):
                for p in ("up", "down"):
                    # Gate and up see the same input and so have the same scale.
                    assert torch.equal(module.stack("gate", "input_scale"), module.stack("up", "input_scale"))
                    static[f"{name}.{e}.{p}"] = (module.scheme, module.stack(p, "input_scale")[e])
        elif isinstance(module, lowbit.nn.QuantLinear):
            static[name] = (module.scheme, module.content("input_scale"))
    schemes, scales = ({n: pair[i] for n, pair in static.items()} for i in (0, 1))
    with activations_quantized(reference, schemes, scales):
        simulated = logits(reference, batch)
    cost = (simulated - want).norm()
    assert cost > 0 and (logits(model, batch) - simulated).norm() < 0.05 * cost


def test_saved_again(converted, tmp_path):
    kind, out = converted
    model = lowbit.load(out, dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    assert lowbit.verify(tmp_path / "again").ok
    batch = inputs(kind)
    assert torch.equal(
        logits(lowbit.load(tmp_path / "again", dtype=torch.float32), batch), logits(model, batch)
    )
    ours, theirs = (
        {k: v for f in d.glob("*.safetensors") for k, v in load_file(f).items()}
        for d in (out, tmp_path / "again")
    )
    assert ours.keys() == theirs.keys()


def given(experts: QuantExperts, zero: int) -> None:
    """Random codes and scales of every expert."""
    generator = torch.Generator().manual_seed(7)
    spec = experts.scheme.weights
    assert spec is not None
    for name, buffer, e, view in experts.disk_tensors():
        leaf = name.rpartition(".")[2]
        if leaf == "weight":
            q = quantize(torch.randn(view.shape, generator=generator), spec)
            experts.put(buffer, e, q.codes)
            experts.put(buffer + "_scale", e, q.scale)
        elif leaf == "input_scale":
            experts.put(buffer, e, 0.02 + 0.01 * torch.rand(1, generator=generator))
        elif leaf == "input_zero_point":
            experts.put(buffer, e, torch.tensor([zero - e], dtype=torch.int8))


@pytest.mark.parametrize(("scheme", "zero"), [("int8-static", 0), ("int8-static-asym", -40)])
def test_integers(scheme, zero):
    experts = QuantExperts(5, 64, 48, scheme=scheme, act_fn=torch.nn.functional.silu)
    given(experts, zero)
    x = torch.randn(11, 64)
    index, weights = torch.randint(0, 5, (11, 2)), torch.rand(11, 2)
    want = expected(experts, x, index, weights)
    error = (experts(x, index, weights).double() - want).norm(dim=1) / want.norm(dim=1)
    assert error.median() < 1e-6 and error.max() < 1e-2
    compiled = torch.compile(experts, fullgraph=not zero, dynamic=True, backend="eager")
    assert torch.equal(compiled(x, index, weights), experts(x, index, weights))


@pytest.mark.parametrize("float_dtype", ["BF16", "F16"])
def test_msmodelslims_static_experts(float_dtype):
    """deq_scale and quant_bias by the engine's formula, expert by expert."""
    experts = QuantExperts(
        3, 64, 48, scheme="int8-static-asym", act_fn=torch.nn.functional.silu, format="ascend", float_dtype=float_dtype
    )  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    for name, buffer, e, view in experts.disk_tensors():
        match name.rpartition(".")[2]:
            case "weight":
                value = torch.randint(-127, 128, view.shape, generator=generator, dtype=torch.int8)
            case "quant_bias":
                value = torch.randint(-9000, 9000, view.shape, generator=generator, dtype=torch.int32)
            case "input_scale":
                value = torch.tensor([0.02 + 0.003 * e])
            case "input_offset":
                value = torch.tensor([-11.0 - e])
            case _:
                value = 1e-5 * (1 + torch.rand(view.shape, generator=generator))
                value = value.view(torch.int32).to(torch.int64) if float_dtype == "F16" else value
        experts.put(buffer, e, value)
    stored = experts.state_dict()

    def product(at: str, row: Tensor) -> Tensor:
        codes = (row / stored[f"{at}.input_scale"] + stored[f"{at}.input_offset"]).round().clamp(-128, 127)
        sums = stored[f"{at}.weight"].double() @ codes.double() + stored[f"{at}.quant_bias"].double()
        deq = stored[f"{at}.deq_scale"]
        deq = deq.to(torch.int32).view(torch.float32) if float_dtype == "F16" else deq
        return (sums * deq.double()).float()

    x = torch.randn(6, 64, generator=generator)
    index, weights = torch.arange(6).reshape(6, 1) % 3, torch.ones(6, 1)
    got = experts(x, index, weights)
    for t in range(6):
        gate, up = (product(f"{t % 3}.{p}_proj", x[t]) for p in ("gate", "up"))
        want = product(f"{t % 3}.down_proj", torch.nn.functional.silu(gate) * up)
        assert (got[t] - want).norm() < 1e-3 * want.norm()
    with float_activations(experts):  # the bias stays
        assert (experts(x, index, weights) - got).norm() < 0.1 * got.norm()


def test_static_scales_are_not_made_up():
    experts = build("qwen3-moe").model.layers[1].mlp.experts
    with pytest.raises(ValueError, match="dynamic activations, found fp8-static"):
        QuantExperts.from_experts(experts, "fp8-static")
    assert not hasattr(QuantExperts.like(experts, "fp8"), "gate_proj_input_scale")
    stored = get_format("compressed-tensors").tensors(SCHEMES["fp8-static"], (48, 64))
    like = QuantExperts.like(experts, "fp8-static")
    assert {s.suffix for s in stored} == {"." + n.rpartition(".")[2] for n in like.state_dict()}


def test_a_missing_scale_is_an_error(converted, tmp_path):
    _, out = converted
    broken = tmp_path / "broken"
    broken.mkdir()
    tensors = load_file(out / "model.safetensors")
    name = next(n for n in tensors if ".experts.1." in n and n.endswith(".input_scale"))
    del tensors[name]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    (broken / "config.json").write_text(json.dumps(json.loads((out / "config.json").read_text())))
    with pytest.raises(lowbit.errors.InputError, match="input_scale"):
        lowbit.load(broken)


def static_module(kind: str, seed: int) -> tuple[QuantLinear | QuantExperts, tuple[Tensor, ...]]:
    """Random buffers of format `ascend`, and what follows x in a call."""
    options = {"scheme": "int8-static-asym", "format": "ascend"}
    generator = torch.Generator().manual_seed(seed)
    module = (
        QuantLinear(64, 32, **options)
        if kind == "linear"
        else QuantExperts(2, 64, 32, act_fn=torch.nn.functional.silu, **options)
    )
    for name, like in module.state_dict().items():
        match name.rpartition(".")[2]:
            case "weight" | "quant_bias":
                like.copy_(torch.randint(-99, 99, like.shape, generator=generator))
            case "input_scale":
                like.fill_(0.02 + 0.01 * seed)
            case "input_offset":
                like.fill_(-11.0 - seed)
            case _:
                like.copy_(1e-3 * (1 + torch.rand(like.shape, generator=generator)))
    return module, () if kind == "linear" else (torch.tensor([[0], [1], [0], [1]]), torch.ones(4, 1))


@pytest.mark.parametrize("kind", ["linear", "experts"])
def test_what_was_computed_of_static_layers_follows_what_is_loaded(kind):
    """Scales and biases of format `ascend` are kept from call to call, and copied into by `load_state_dict`."""
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(9))
    (one, more), (other, _) = static_module(kind, 0), static_module(kind, 1)
    before, wanted = one(x, *more), other(x, *more)
    one.load_state_dict(other.state_dict())
    assert torch.equal(one(x, *more), wanted) and not torch.equal(before, wanted)


@pytest.mark.parametrize("kind", ["linear", "experts"])
def test_codes_that_are_offloaded_after_a_call_are_freed(kind):
    """accelerate puts buffers on meta again: all of a model would stay where it computes."""
    module, more = static_module(kind, 0)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(9))
    wanted, codes = module(x, *more), {n: b for n, b in module._buffers.items() if n.endswith("weight")}
    alive = [weakref.ref(b) for b in codes.values()]
    fetched = {n: b.clone() for n, b in codes.items()}
    for name in codes:
        module._buffers[name] = torch.empty_like(fetched[name], device="meta")
    del codes
    gc.collect()
    assert alive and all(r() is None for r in alive)
    module._buffers.update(fetched)
    assert torch.equal(module(x, *more), wanted)
