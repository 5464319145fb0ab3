"""Rewritings of a layer, one by one on small modules in float64: what they change, they give back."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lowbit.calibration import fold
from lowbit.calibration.experts import Expert, UnfusedExperts, UnfusedRows
from lowbit.calibration.graph import LayerGraph, Norm, Pair, norm_gain
from lowbit.calibration.joints import Joint, joints, smooth
from lowbit.calibration.layer import round_members
from lowbit.calibration.methods import METHODS
from lowbit.calibration.rotation import make_rotation
from lowbit.calibration.sequential import _sketch, fits, round_in_passing
from lowbit.calibration.statistics import InputStatistics, Wanted
from lowbit.scheme import get_scheme

WIDTH, HEADS, REPEAT = 16, 2, 3


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found: Tensor, wanted: Tensor) -> None:
    """transformers' norms compute in float32, whatever they are given."""
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


class Layer(nn.Module):
    """A norm and its readers; values of two heads that feed three heads each; all with biases."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        kinds = {"llama": LlamaRMSNorm, "gemma": Gemma2RMSNorm, "layer": nn.LayerNorm}
        self.norm, self.inner = kinds[norm](WIDTH), LlamaRMSNorm(8)
        self.a, self.v = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, HEADS * 4)
        self.reads_inner = nn.Linear(8, 8)
        self.o = nn.Linear(HEADS * REPEAT * 4, WIDTH)
        self.double().requires_grad_(False)
        for i, p in enumerate(self.parameters()):
            p.copy_(drawn(*p.shape, seed=i))
        self.norm.weight.abs_().add_(0.1)

    def forward(self, h: Tensor) -> Tensor:
        x = self.norm(h)
        values = self.v(x).unflatten(-1, (HEADS, 4)).repeat_interleave(REPEAT, dim=-2).flatten(-2)
        return h + self.o(values) * self.reads_inner(self.inner(self.a(x))).sum(-1, keepdim=True)


PAIR = Pair(first="v", second="o", repeat=REPEAT, head_dim=4)


def norm_of(layer: Layer) -> Norm:
    offset, centered = norm_gain(layer.norm, WIDTH)
    return Norm(name="norm", readers=("a", "v"), offset=offset, centered=centered)


@pytest.mark.parametrize("stored", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gemma", "layer"])
def test_scales_move_through_a_norm(kind, stored):
    """Of a gain of 0 too; what is stored is what was divided by, to the last bit."""
    layer, h = Layer(kind), drawn(5, WIDTH, seed=90)
    layer.norm.weight[3] = -1.0 if kind == "gemma" else 0.0
    assert norm_of(layer).offset == (1.0 if kind == "gemma" else 0.0)
    before, read = layer(h), layer.norm(h)
    wanted = drawn(WIDTH, seed=91).exp()
    told = fold.scaled_norm(layer, norm_of(layer), wanted, stored)[1]
    applied = fold.scale_norm(layer, norm_of(layer), wanted, stored)
    assert torch.equal(told, applied) and (applied > 0).all()
    others = [i for i in range(WIDTH) if i != 3]
    assert torch.allclose(applied[others], wanted[others], rtol=1e-9 if stored is None else 0.03)
    close(layer(h), before)
    assert torch.allclose(layer.norm(h)[:, others] * applied[others], read[:, others], rtol=1e-6, atol=1e-6)
    if stored is not None:
        assert torch.equal(layer.norm.weight.to(stored).double(), layer.norm.weight)


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_a_norm_s_gain_moves_into_its_readers(kind):
    layer, h = Layer(kind), drawn(5, WIDTH, seed=90)
    before = layer(h)
    fold.fold_norm(layer, norm_of(layer))
    close(layer(h), before)
    length = layer.norm(h).square().mean(-1).sqrt()
    assert torch.allclose(length, torch.ones(5).double(), atol=1e-3)


def test_scales_and_rotations_pass_from_values_to_what_reads_them():
    h = drawn(5, WIDTH, seed=90)
    for change in (partial(fold.scale_pair, scale=drawn(8, seed=92).exp()), fold.rotate_heads):
        layer = Layer("llama")
        before, weight = layer(h), layer.o.weight.clone()
        change(layer, PAIR)
        assert torch.allclose(layer(h), before) and not torch.allclose(layer.o.weight, weight)


def test_a_residual_stream_is_rotated_with_what_writes_it():
    """A norm of another width, inside the layer, is left as it is."""
    layer, h, rotation = Layer("llama"), drawn(5, WIDTH, seed=90), make_rotation(WIDTH, "orthogonal", 0)
    inner = Norm(name="inner", readers=("reads_inner",), offset=0.0, centered=False)
    graph = LayerGraph(linears=(), groups=(), norms=(norm_of(layer), inner), pairs=(), writers=("o",))
    before, kept = layer(h), layer.reads_inner.weight.clone()
    fold.rotate_residual(layer, graph, rotation)
    close(layer(rotation.apply(h)), rotation.apply(before))
    assert torch.equal(layer.reads_inner.weight, kept)


def test_query_heads_of_one_value_head_share_a_scale():
    scale = drawn(HEADS * REPEAT * 4, seed=93).exp()
    tied = Joint(before=PAIR, first="o", members=("o",)).tie(scale)
    heads = scale.view(HEADS, REPEAT, 4)
    for head in range(HEADS):
        wanted = (heads[head, 0] * heads[head, 1] * heads[head, 2]) ** (1 / 3)
        for repeat in range(REPEAT):
            assert torch.allclose(tied.view(HEADS, REPEAT, 4)[head, repeat], wanted)
    alone = replace(PAIR, repeat=1)
    assert torch.equal(Joint(before=alone, first="o", members=("o",)).tie(scale), scale)


def graph_of(*norms: Norm, pairs: tuple[Pair, ...] = ()) -> LayerGraph:
    return LayerGraph(
        linears=("a", "v", "o"), groups=(("a", "v"), ("o",)), norms=norms, pairs=pairs, writers=("o",)
    )


def test_where_scales_may_move():
    layer, schemes = Layer("llama"), dict.fromkeys(("a", "v", "o"), get_scheme("int8"))
    norm, gate = norm_of(layer), Pair(first="v", second="o")
    method = METHODS["smoothquant"]

    def found(graph: LayerGraph, method=method, schemes=schemes) -> list[str]:
        return [j.name for j in joints(graph, schemes, method)]

    assert found(graph_of(norm, pairs=(PAIR,))) == ["norm", "o"]
    assert found(graph_of(replace(norm, movable=False))) == []
    assert found(graph_of(replace(norm, readers=("a", "o")))) == []  # which read different tokens
    assert found(graph_of(norm, pairs=(PAIR,)), schemes={"a": get_scheme("int8")}) == ["norm"]
    assert found(graph_of(norm, pairs=(gate,)), replace(method, smooth_joints=("v-o",))) == []
    assert found(graph_of(pairs=(gate,)), replace(method, online_hadamard=True)) == []
    assert found(graph_of(pairs=(PAIR,)), replace(method, online_hadamard=True)) == ["o"]


def test_statistics_follow_what_was_smoothed_and_only_static_modules_become_dynamic():
    layer, static = Layer("llama").float(), get_scheme("int8-static")
    method = replace(METHODS["smoothquant-search"], dynamic_below=200.0, smooth_joints=("norm",))
    schemes = {"a": static, "v": get_scheme("fp8"), "o": static}
    x = layer.norm(drawn(64, WIDTH, seed=94).float() * torch.linspace(0.1, 30, WIDTH))
    s = {n: InputStatistics(wanted=Wanted(sample_rows=64), spec=None, rows_per_batch=64) for n in "ao"}
    s["a"].update(x)
    before = layer.norm.weight.clone()
    report, changed = smooth(layer, graph_of(norm_of(layer)), method, schemes, s)
    assert changed == {"norm", "a", "v"} and report["norm"]["error"] < report["norm"]["plain_error"]
    assert schemes == {"a": get_scheme("int8"), "v": get_scheme("fp8"), "o": static}
    divisor = before / layer.norm.weight
    torch.testing.assert_close(s["a"].absmax, x.abs().amax(0) / divisor, rtol=1e-5, atol=0)


def test_one_batch_takes_windows_of_one_length_for_which_there_is_room():
    windows = [torch.zeros(8)] * 3
    need = 24 * (4 * 10 + 3 * 50) * 4
    assert fits(windows, 10, 50, need) and not fits(windows, 10, 50, need - 1)
    assert not fits([*windows, torch.zeros(9)], 10, 50, 10 * need)


def test_what_writes_the_residual_stream_is_rounded_in_passing_as_its_outputs_are_long():
    """One token is a thousand times longer than the others."""
    layer, x = nn.Module(), drawn(200, 32, seed=95).float()
    x[0] *= 1000
    layer.o = nn.Linear(32, 64, bias=False).requires_grad_(False)
    layer.o.weight.copy_(drawn(64, 32, seed=96))
    length = _sketch(x, layer.o.weight).square().sum(-1) / (x @ layer.o.weight.t()).square().sum(-1)
    assert 0.8 < float(length.mean()) < 1.25
    schemes, wanted = {"o": get_scheme("int8")}, Wanted(hessian=True)
    for writers in ((), ("o",)):
        graph = LayerGraph(linears=("o",), groups=(("o",),), norms=(), pairs=(), writers=writers)
        passed = round_in_passing(
            layer, graph, METHODS["gptq"], schemes, wanted, lambda: layer.o(x), min_tokens=1, prepare={}
        )
        s = InputStatistics(wanted=wanted, spec=None)
        s.update(x, _sketch(x, layer.o.weight) if writers else None)
        codes, _ = round_members({"o": layer.o.weight}, s, METHODS["gptq"], schemes, min_tokens=1)
        assert torch.equal(passed.quantized["o"].codes, codes["o"].codes), writers


def test_rows_of_all_experts():
    """Llama 4's: `see_all` shows an expert what others got as the one that it was sent to most does."""
    experts = UnfusedRows([Expert(8, 4, nn.functional.silu) for _ in range(3)]).double().requires_grad_(False)
    for i, p in enumerate(experts.parameters()):
        p.copy_(drawn(*p.shape, seed=i))
    tokens, scores = (
        drawn(5, 8, seed=97),
        torch.rand(3, 5, generator=torch.Generator().manual_seed(0)).double(),
    )
    scores[0, 1:] = scores[1, 0] = scores[2, 2:4] = 0
    rows = (scores[..., None] * tokens).reshape(-1, 8)
    assert experts.reads(tokens, rows) and experts.reads(tokens[None], rows)
    assert not experts.reads(tokens, rows.flip(0)) and not experts.reads(tokens, rows[:10])
    plainly = experts(rows)
    assert experts.token_counts.tolist() == [1, 4, 3]
    seen = []
    handle = experts[0].up_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    experts.see_all = True
    assert torch.allclose(experts(rows), plainly)
    handle.remove()
    most = scores.argmax(0)
    wanted = torch.stack([scores[0 if scores[0, t] else most[t], t] * tokens[t] for t in range(5)])
    assert torch.allclose(seen[0], wanted)
    for e in range(3):
        want = torch.where(scores[e, :, None] != 0, experts[e](scores[e, :, None] * tokens), 0.0)
        assert torch.allclose(plainly.view(3, 5, 8)[e], want)


def test_experts_that_see_all_give_what_was_routed_to_them():
    experts = (
        UnfusedExperts([Expert(8, 4, nn.functional.silu) for _ in range(3)]).double().requires_grad_(False)
    )
    for i, p in enumerate(experts.parameters()):
        p.copy_(drawn(*p.shape, seed=i))
    x, index = drawn(4, 8, seed=98), torch.tensor([[0, 2], [2, 0], [2, 0], [0, 2]])
    weights = torch.rand(4, 2, generator=torch.Generator().manual_seed(0)).double()
    wanted = torch.stack(
        [sum(weights[t, k] * experts[index[t, k]](x[t]) for k in range(2)) for t in range(4)]
    )
    for see_all in (False, True):
        experts.see_all = see_all
        seen = []
        handle = experts[1].up_proj.register_forward_pre_hook(lambda _, args, s=seen: s.append(args[0]))
        assert torch.allclose(experts(x, index, weights), wanted)
        handle.remove()
        assert [t.shape[0] for t in seen] == ([4] if see_all else [])
    assert experts.token_counts.tolist() == [8, 0, 8]
