"""Modules apart from models: what they copy, what they refuse, and numbers against float64."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from nn_reference import build
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3TextScaledWordEmbedding,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

import lowbit
from lowbit.dtypes import E4M3FN
from lowbit.errors import InputError
from lowbit.formats import StoredModule
from lowbit.granularity import PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from lowbit.nn import QuantExperts, QuantLinear, float_activations, integration, quantize_model, speed
from lowbit.nn.bfloat16 import BFloat16Embedding, BFloat16Linear, keepable
from lowbit.nn.loading import _check_devices
from lowbit.nn.names import Finder, expert_names
from lowbit.nn.offload import StackedWeights, follow_offloading
from lowbit.nn.quantizer import LowbitConfig, check_runnable, runnable, runs
from lowbit.nn.stacked import fill, on_its_own, stack_of
from lowbit.nn.static import operands
from lowbit.nn.stored import pack, unpack
from lowbit.nn.weights import quantize_rows
from lowbit.quantize import quantize
from lowbit.scheme import get_scheme


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(training: bool = True) -> nn.Linear:
    made = nn.Linear(32, 16)
    made.weight.data, made.bias.data = drawn(16, 32, seed=1), drawn(16, seed=2)
    return made.train(training)


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_made_of_another_shares_nothing_with_it(training):
    source = linear(training)
    module = QuantLinear.from_linear(source, "int8")
    again = module.to_linear()
    assert module.training == again.training == training
    before = module(drawn(3, 32)), again(drawn(3, 32))
    with torch.no_grad():
        source.bias.add_(1)
        again.bias.add_(1)
    assert torch.equal(module(drawn(3, 32)), before[0])
    torch.testing.assert_close(again(drawn(3, 32)), before[1] + 1)


def test_a_conv1d_is_a_linear_of_its_transposed_weight():
    source, conv = linear(), Conv1D(16, 32)
    conv.weight.data, conv.bias.data = source.weight.detach().T.contiguous(), source.bias.detach()
    one, other = (QuantLinear.from_linear(m, "int8") for m in (source, conv))
    assert torch.equal(one.codes, other.codes) and torch.equal(one(drawn(3, 32)), other(drawn(3, 32)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scales_of_any_float_are_loaded_as_float32(dtype):
    module = QuantLinear.from_linear(linear(), "int8")
    state = module.state_dict()
    scale = state["weight_scale"].to(dtype)
    module.load_state_dict(state | {"weight_scale": scale}, assign=True)
    assert module.weight_scale.dtype == torch.float32 and torch.equal(module.weight_scale, scale.float())


def test_packed_codes_need_not_lie_one_after_the_other():
    codes = torch.arange(-126, 126, dtype=torch.int8).reshape(12, 21)
    packed = pack(codes).t().contiguous().t()
    assert not packed.is_contiguous() and torch.equal(unpack(packed, 21), codes)


def test_a_weight_of_zeros_has_a_scale_of_one():
    for scheme in ("fp8-static", "int8", "fp8-block", "mxfp8"):
        spec = get_scheme(scheme).weights
        wanted = quantize(torch.zeros(8, 128), spec)
        codes, scale = quantize_rows(torch.zeros(8, 128, dtype=torch.bfloat16), spec)
        assert torch.equal(scale, wanted.scale) and torch.equal(codes.float(), wanted.codes.float())


def test_biases_of_static_layers_are_exact_to_the_last_rounding():
    codes = torch.randint(-127, 128, (64, 4096), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    codes[:32] = codes[:32].abs()
    deq = (1 + torch.rand(64, generator=torch.Generator().manual_seed(1))) * 1e-4
    quant_bias = torch.randint(
        -(2**30), 2**30, (64,), generator=torch.Generator().manual_seed(2), dtype=torch.int32
    )
    found = operands(codes, deq, quant_bias, torch.tensor([0.02]), torch.tensor([-100.0]))
    steps = [int(b) - 100 * int(s) for b, s in zip(quant_bias, codes.sum(1), strict=True)]
    assert found.bias.tolist() == [
        float(torch.tensor(n * float(d))) for n, d in zip(steps, deq.double(), strict=True)
    ]


def test_a_static_layer_keeps_its_bias_where_activations_are_not_rounded():
    """In format `ascend` the bias is in quant_bias."""
    module = QuantLinear(64, 16, scheme="int8-static-asym", format="ascend")
    codes = torch.randint(-127, 128, (16, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    deq, quant_bias, offset = torch.linspace(1e-4, 3e-4, 16), torch.arange(16, dtype=torch.int32) * 999, -7
    of_input = {"input_scale": torch.tensor([0.05]), "input_offset": torch.tensor([float(offset)])}
    for name, value in {"weight": codes, "deq_scale": deq, "quant_bias": quant_bias, **of_input}.items():
        module._buffers[name].copy_(value)
    bias = (quant_bias.double() + offset * codes.sum(1).double()) * deq.double()
    weight = codes.double() * (deq / 0.05).double()[:, None]
    x = drawn(5, 64)
    with float_activations(module):
        torch.testing.assert_close(module(x).double(), x.double() @ weight.t() + bias, rtol=1e-5, atol=1e-4)
    x = (x / 0.05).round() * 0.05  # what is a code already is not rounded
    torch.testing.assert_close(module(x).double(), x.double() @ weight.t() + bias, rtol=1e-4, atol=1e-3)


class Ungated(nn.Module):
    """transformers' experts without a gate (Nemotron-H)."""

    has_gate = False

    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Parameter(drawn(3, 48, 32)), nn.Parameter(drawn(3, 32, 48, seed=1))
        self.act_fn = nn.functional.silu

    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise NotImplementedError


def test_experts_without_a_gate():
    source = Ungated().eval()
    experts = QuantExperts.from_experts(source, "int8")
    assert list(experts.projections) == ["up", "down"] and not experts.training
    x, index, weights = drawn(4, 32, seed=3), torch.tensor([[0], [2], [1], [2]]), torch.rand(4, 1)
    with float_activations(experts):
        found = experts(x, index, weights)
    for t, e in enumerate(index.flatten().tolist()):
        up, down = (
            quantize(p[e].detach(), get_scheme("int8").weights).dequantize() for p in source.parameters()
        )
        torch.testing.assert_close(found[t], weights[t] * (nn.functional.silu(x[t] @ up.t()) @ down.t()))


def test_stacks_load_what_fits_them_alone():
    experts = QuantExperts.from_experts(Ungated(), "int8")
    state = experts.state_dict()
    for change, message in (
        (
            {"1.up_proj.weight_scale": torch.ones(47, 1)},
            r"size mismatch for 1.up_proj.weight_scale: expected \[48, 1\]",
        ),
        (
            {"3.up_proj.weight": state["0.up_proj.weight"]},
            r'Unexpected key\(s\) in state_dict: "3.up_proj.weight"',
        ),
        ({"1.up_proj.weight": torch.ones(48, 32)}, "expected codes in torch.int8"),
    ):
        with pytest.raises(RuntimeError, match=message):
            experts.load_state_dict(state | change)
    del state["2.down_proj.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "2.down_proj.weight"'):
        experts.load_state_dict(state)


@pytest.mark.parametrize("scheme", ["int8", "int8-weight-only"])
def test_torchs_distributed_state_dicts_load_experts(scheme):
    """set_model_state_dict adds all buffers to what it loads, by their own names, which were unexpected then."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )

    model = nn.Sequential(quantize_model(build("qwen3-moe"), scheme))
    saved = {name: t.clone() for name, t in get_model_state_dict(model).items()}
    assert saved.keys() == model.state_dict().keys()
    for tensor in model.state_dict().values():
        tensor.data.zero_()
    set_model_state_dict(model, dict(saved), options=StateDictOptions(full_state_dict=True))
    assert all(torch.equal(t, saved[name]) for name, t in model.state_dict().items())
    experts = model[0].model.layers[1].mlp.experts
    with pytest.raises(RuntimeError, match=r"Unexpected key.*gate_proj_weight_scale"):
        model.load_state_dict(
            saved
            | {"0.model.layers.1.mlp.experts.gate_proj_weight_scale": experts.gate_proj_weight_scale + 1}
        )


def test_a_stack_is_found_again_by_all_of_its_experts_in_order():
    stack = torch.arange(24, dtype=torch.int8).reshape(3, 2, 4)
    parts = [on_its_own(stack[i], stack, i) for i in range(3)]
    assert stack_of(parts) is stack and all(torch.equal(p, stack[i]) for i, p in enumerate(parts))
    assert parts[0].untyped_storage().nbytes() == 8
    assert stack_of(parts[::-1]) is None and stack_of(parts[:2]) is None
    assert stack_of([*parts[:2], stack[2]]) is None
    exponents = torch.zeros(2, 3, dtype=torch.uint8)
    fill(exponents, 1, torch.tensor([1.0, 2.0, 0.25]).to(torch.float8_e8m0fnu))
    assert exponents.tolist() == [[0, 0, 0], [127, 128, 125]]
    numbers = torch.zeros(2, 3)
    fill(numbers, 0, torch.tensor([1.0, 2.0, 0.25]).to(torch.bfloat16))
    assert numbers.tolist() == [[1.0, 2.0, 0.25], [0.0, 0.0, 0.0]]


def test_what_is_left_to_transformers():
    said = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {
        "targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}}}  # fmt: skip
    assert runs(said)
    for change in ({"run_compressed": False}, {"dequantize": True}, {"transform_config": {"u": {}}},
                   {"quant_method": "gptq"}, {"config_groups": {}}):  # fmt: skip
        assert not runs(said | change), change
    del said["quant_method"]
    assert not runs(said)


def test_activations_are_rounded_as_fine_as_was_asked_at_least():
    int8, block, weight_only = (get_scheme(n) for n in ("int8", "int8-block", "int8-weight-only"))

    def asked(scheme, granularity, **kw):
        return replace(scheme, activations=replace(int8.activations, granularity=granularity, **kw))

    for scheme in (int8, block, weight_only, get_scheme("int8-static"), get_scheme("mxfp8")):
        assert runnable(scheme) == scheme
    assert runnable(asked(int8, PerTensor())) == int8
    assert runnable(asked(int8, PerGroup(64))) == int8
    assert runnable(asked(block, PerTensor())).activations.granularity == PerToken()
    assert runnable(asked(block, PerGroup(128))) == block
    static = asked(int8, PerTensor(), dynamic=False)
    assert runnable(static) == static


def test_weights_that_no_product_takes():
    def stored(**spec) -> StoredModule:
        scheme = replace(get_scheme("int8"), weights=replace(get_scheme("int8").weights, **spec))
        return StoredModule(
            shape=(8, 8), scheme=scheme, names={"codes": "a.weight", "scale": "a.weight_scale"}, format=""
        )

    for spec in ({}, {"dtype": E4M3FN}, {"granularity": PerBlock(64, 64)}, {"granularity": PerChannel()}):
        check_runnable("a", stored(**spec))
    with pytest.raises(InputError, match="found a weight zero point"):
        check_runnable("a", stored(symmetric=False))


@pytest.mark.parametrize("kind", ["one in float", "one in another scheme"])
def test_experts_that_do_not_agree_are_refused(tmp_path, kind):
    build("qwen3-moe").save_pretrained(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", "int8")
    file, expert = tmp_path / "out" / "model.safetensors", "model.layers.1.mlp.experts.2.up_proj"
    if kind == "one in float":
        tensors = load_file(file)
        tensors[f"{expert}.weight"] = tensors[f"{expert}.weight"].float() * tensors.pop(
            f"{expert}.weight_scale"
        )
        save_file(tensors, file, {"format": "pt"})
        found = "found 17 in 1 schemes"
    else:
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        groups = config["quantization_config"]["config_groups"]
        groups["group_1"] = groups["group_0"] | {"targets": [expert], "input_activations": None}
        (tmp_path / "out" / "config.json").write_text(json.dumps(config))
        found = "found 18 in 2 schemes"
    with pytest.raises(InputError, match=f"expected all 18 expert projections quantized alike, {found}"):
        lowbit.load(tmp_path / "out")


def test_a_loaded_model_saves_no_scheme_of_a_cache_whose_scales_it_passed_over(tmp_path):
    build("llama").save_pretrained(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", "fp8")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    lowbit.load(tmp_path / "out").save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert (
        saved["kv_cache_scheme"] is None
        and saved["config_groups"] == config["quantization_config"]["config_groups"]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_bfloat16_weights_multiply_what_comes_in_its_own_dtype(dtype):
    layer = BFloat16Linear(32, 16, bias=True, dtype=torch.float32)
    layer.weight.copy_(drawn(16, 32, seed=1))
    layer.bias.copy_(drawn(16, seed=2))
    x = drawn(5, 32).to(dtype)
    wanted = nn.functional.linear(x, layer.weight.to(dtype), layer.bias.to(dtype))
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5 if dtype == torch.float32 else 0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == nn.functional.linear(x, wanted.new_zeros(16, 32)).dtype


def test_bfloat16_embeddings_are_scaled_as_transformers_does():
    scale, ids, table = 3072**0.5, torch.arange(7), drawn(7, 16, seed=3).to(torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        theirs = Gemma3TextScaledWordEmbedding(7, 16, 0, embed_scale=scale)
        theirs.weight.data.copy_(table)
        assert keepable(theirs)
        ours = BFloat16Embedding(7, 16, padding_idx=0, scale=scale, kind=type(theirs), dtype=dtype)
        ours.weight.copy_(table)
        assert torch.equal(ours(ids), theirs.to(dtype)(ids)) and ours(ids).dtype == dtype
        float32 = ours.to_embedding()
        assert torch.equal(float32(ids), table.float() * torch.tensor(scale))
        assert type(float32) is type(theirs)
        ours.to_embedding(torch.bfloat16).weight.data.zero_()
        assert torch.equal(ours.weight, table)
    assert keepable(nn.Embedding(7, 16)) and not keepable(nn.Embedding(7, 16, max_norm=1.0))
    assert not keepable(nn.Embedding(7, 16, dtype=torch.float16))


def test_groups_of_a_conv1d_lie_along_its_inputs():
    model = lowbit.quantize_model(nn.Sequential(Conv1D(130, 256)), "int8-weight-only")
    assert model[0].scale.shape == (130, 2) and model[0].out_features == 130


def test_projections_of_experts_are_known_by_their_names_or_not_at_all():
    names = [f"mlp.experts.{i}.{p}.weight" for i in range(2) for p in ("w1", "w2", "w3")]
    assert expert_names(names) == {"gate": "w1", "up": "w3", "down": "w2"}
    assert (
        expert_names([*names, "mlp.experts.2.w4.weight"]) == expert_names(["mlp.experts.gate_up_proj"]) == {}
    )


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_body_s_checkpoint_and_a_whole_model_s_find_each_other(prefix):
    model = build("llama")
    for of, path in ((model, "model."), (model.model, "")):
        find = Finder(of)
        assert find.module(f"{prefix}layers.1.mlp.up_proj.weight") == f"{path}layers.1.mlp.up_proj"
        assert find.module("layers.9.mlp.up_proj.weight") is None


def test_memory_is_given_to_accelerators_that_are_there(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    _check_devices({0: "1GiB", "cpu": "1GiB"})
    for absent in (1, 5):
        with pytest.raises(
            InputError, match=rf"the 1 accelerators that torch finds, found it for \[{absent}\]"
        ):
            _check_devices({0: "1GiB", absent: "1GiB"})


def test_shards_of_other_names_need_an_index(tmp_path):
    build("llama").save_pretrained(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", "int8")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    (tmp_path / "out" / "model.safetensors").unlink()
    for i in range(2):
        part = dict(list(tensors.items())[i::2])
        save_file(part, tmp_path / "out" / f"part-{i}.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="index"):
        lowbit.load(tmp_path / "out")


def test_a_model_is_loaded_where_it_is_wanted(tmp_path):
    build("llama").save_pretrained(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", "int8")
    for device in ("meta", "cpu"):
        model = lowbit.load(tmp_path / "out", device=device)
        assert {t.device.type for t in (*model.parameters(), *model.model.layers.buffers())} == {device}


def test_stacks_in_memory_are_taken_as_they_lie_and_others_made():
    experts = QuantExperts.from_experts(Ungated(), "int8")
    stack = experts.stack("up", "codes")
    held = StackedWeights(experts, experts.state_dict())["up_proj_weight"]
    read = StackedWeights(experts, {n: t.clone() for n, t in experts.state_dict().items()})["up_proj_weight"]
    assert held.data_ptr() == stack.data_ptr() != read.data_ptr() and torch.equal(read, stack)
    hooks = [SimpleNamespace(weights_map=experts.state_dict()) for _ in range(2)]
    follow_offloading(experts, SimpleNamespace(hooks=hooks[:1]))
    follow_offloading(experts, hooks[1])
    assert all(isinstance(hook.weights_map, StackedWeights) for hook in hooks)


@pytest.mark.parametrize(
    ("found", "enough"), [("5.9.1", False), ("5.21.0.dev0", True), ("4.99", False), ("6.0", True)]
)
def test_versions_are_numbers(monkeypatch, found, enough):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", found)
    if enough:
        return integration.require_transformers()
    with pytest.raises(InputError, match=f"expected transformers 5.21 or newer, found {found}"):
        integration.require_transformers()


def test_transformers_own_classes_come_back():
    mapping = AUTO_QUANTIZATION_CONFIG_MAPPING
    before = dict(mapping)
    integration.register()
    integration.register()
    said = {"activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    try:
        found, rest = mapping["fp8"].from_dict(said, return_unused_kwargs=True, more=1)
        assert isinstance(found, LowbitConfig) and rest == {"more": 1} and found.to_dict() == said
        assert isinstance(mapping["fp8"].from_dict(said), LowbitConfig)
        assert isinstance(mapping["fp8"].from_dict(said | {"dequantize": True}), before["fp8"])
    finally:
        integration.unregister()
    assert {m: mapping[m] for m in ("compressed-tensors", "fp8")} == {
        m: before[m] for m in ("compressed-tensors", "fp8")
    }


def test_speed_is_of_all_sequences_without_the_first_round(monkeypatch):
    times = iter([(9.0, 9.0), (2.0, 4.0), (1.0, 5.0), (4.0, 1.0)])
    monkeypatch.setattr(speed, "_run", lambda model, prompt, following: next(times))
    monkeypatch.setattr(speed, "_words", lambda models: torch.arange(5))
    found = speed.measure({"a": None}, batch=3, prompt_tokens=8, new_tokens=4, repeats=3)["a"]
    assert (found.prefill, found.decode) == (3 * 8 / 2.0, 3 * 4 / 4.0)
    shared = nn.Module()
    shared.register_buffer("a", torch.zeros(10))
    shared.register_buffer("b", shared.a.view(10))
    shared.register_buffer("c", torch.zeros(3, dtype=torch.int8))
    assert speed.weight_bytes(shared) == 43


def test_activations_are_rounded_again_where_they_were():
    model = nn.Sequential(*(QuantLinear.from_linear(linear(), "int8") for _ in range(2)))
    model[0].quantize_activations = False
    with pytest.raises(ZeroDivisionError), float_activations(model):
        with float_activations(model[1]):
            pass
        assert not model[0].quantize_activations and not model[1].quantize_activations
        raise ZeroDivisionError
    assert not model[0].quantize_activations and model[1].quantize_activations
