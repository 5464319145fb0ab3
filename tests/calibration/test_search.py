"""Mixed precision: predictions agree with measurement, the choice is the best there is, the recipe is valid."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.calibration.choice import FLOAT, Unit, bits_of, curve, pick, recipe_of
from lowbit.calibration.search import sensitivities
from lowbit.checkpoint.rules import Selection
from lowbit.errors import InputError
from lowbit.evaluate.layerwise import evaluate, plain, rounded
from lowbit.quantize import quantize
from lowbit.recipe import Recipe, load_recipe, recipe_from
from lowbit.scheme import get_scheme


def test_predicted_kl_is_the_measured_one(checkpoints, windows):
    """Within a factor, for one module alone and for the whole model."""
    source = checkpoints["llama"]
    units = sensitivities(source, windows, ["int8", "fp8"])
    assert len(units) == 3 * 4 and {len(u.modules) for u in units} == {1, 2, 3}
    for name in ("int8", "fp8"):
        predicted = sum(u.cost[name] for u in units)
        report = evaluate(rounded(source, get_scheme(name)), windows, plain(source))
        assert predicted == pytest.approx(report.agreement.mean_kl, rel=0.5)
    worst = max(units, key=lambda u: u.cost["fp8"])
    others = [f"re:(?!({'|'.join(worst.modules)})$).*"]
    alone = rounded(source, get_scheme("fp8"), Selection(ignore=tuple(others)))
    report = evaluate(alone, windows, plain(source))
    assert worst.cost["fp8"] == pytest.approx(report.agreement.mean_kl, rel=0.6)


def test_sensitivities_of_experts(checkpoints, windows):
    units = sensitivities(checkpoints["qwen3_moe"], windows[:4], ["int8"])
    assert {len(u.modules) for u in units} == {1, 3, 12}
    assert all(u.cost["int8"] > 0 for u in units)


def test_a_candidate_given_twice_counts_once(checkpoints, windows):
    once, twice = (
        sensitivities(checkpoints["llama"], windows[:2], of)
        for of in (["int8", "fp8"], ["int8", "W8A8", "fp8"])
    )
    assert once == twice


def test_a_candidate_costs_what_a_conversion_makes_of_it(checkpoints, windows):
    """Where blocks and groups do not fit, that is a scale per channel."""
    per_channel = {"int8-block": "int8", "int8-weight-only": None, "mxfp8": None}
    units = sensitivities(checkpoints["llama"], windows, [*per_channel, "int8"])
    predicted = {name: sum(u.cost[name] for u in units) for name in per_channel}
    assert predicted["int8-block"] == sum(u.cost["int8"] for u in units)
    for name in per_channel:
        report = evaluate(
            rounded(checkpoints["llama"], get_scheme(name)), windows, plain(checkpoints["llama"])
        )
        assert predicted[name] == pytest.approx(report.agreement.mean_kl, rel=0.5)


def test_what_is_ignored_stays_in_float_in_the_recipe(checkpoints, windows, tmp_path):
    ignored = ("*.o_proj", "*.layers.1.mlp.down_proj")
    recipe = lowbit.search(checkpoints["llama"], windows[:2], budget=8, ignore=ignored)
    assert recipe.ignore == ignored
    recipe.save(tmp_path / "recipe.yaml")
    read = load_recipe(tmp_path / "recipe.yaml")
    plan = lowbit.plan(checkpoints["llama"], read.scheme, ignore=read.ignore, overrides=dict(read.overrides))
    kept = {n for n, d in plan.decisions.items() if d.scheme is None and "layers" in n and "norm" not in n}
    attention = [f"model.layers.{i}.self_attn.o_proj" for i in range(3)]
    assert kept == {*attention, "model.layers.1.mlp.down_proj"}


def test_the_curve_is_optimal_at_its_points():
    g = torch.Generator().manual_seed(0)
    units = []
    for i in range(5):
        a, b = torch.rand(2, generator=g).tolist()
        units.append(Unit(modules=(f"m{i}",), elements=100 + 50 * i, cost={"int8": a, "fp8": b, FLOAT: 0.0}))
    total = sum(u.elements for u in units)
    points = curve(units)
    everything = []
    for names in itertools.product(("int8", "fp8", FLOAT), repeat=5):
        bits = sum(bits_of(n) * u.elements for n, u in zip(names, units, strict=True)) / total
        everything.append((bits, sum(u.cost[n] for n, u in zip(names, units, strict=True))))
    for point in points:
        assert point.kl == pytest.approx(min(k for b, k in everything if b <= point.bits + 1e-9))
    assert pick(points, budget=8.0).kl == pytest.approx(
        sum(min(u.cost["int8"], u.cost["fp8"]) for u in units)
    )
    assert pick(points, budget=16.0).kl == 0.0
    assert pick(points, max_kl=points[2].kl).bits == points[2].bits
    with pytest.raises(InputError, match="at least 8"):
        pick(points, budget=4.0)
    with pytest.raises(InputError, match="both or neither"):
        pick(points)
    recipe = recipe_of(units, points[2], points)
    assert sum(name == FLOAT for name in recipe.overrides.values()) == 2


def test_recipes_round_trip_and_name_what_is_wrong(tmp_path):
    recipe = Recipe(
        scheme="int8", ignore=("lm_head",), overrides={"*.down_proj": "float", "re:.*0.*": "fp8"},
        method={"name": "gptq", "rounding": {"act_order": False}}, data={"path": "x.txt", "samples": 4},
    )  # fmt: skip
    for suffix in ("yaml", "json"):
        recipe.save(tmp_path / f"r.{suffix}")
        assert load_recipe(tmp_path / f"r.{suffix}") == recipe
    curve = replace(recipe, notes={"curve": [[8.0, 0.5], [9.0, 0.25]], "uniform": {"int8": 0.5}})
    curve.save(tmp_path / "c.yaml")  # a point on a line, a pattern on a line
    assert {"  - [8.0, 0.5]", "  '*.down_proj': float"} <= {*(tmp_path / "c.yaml").read_text().splitlines()}
    assert load_recipe(tmp_path / "c.yaml") == curve
    assert recipe_from({"scheme": "W8A8"}).scheme == "int8"
    assert recipe_from({"scheme": "int8", "data": {"samples": 1}}).data == {"samples": 1}
    wrong = [
        ({"schem": "int8"}, "scheme"),
        ({"scheme": "int9"}, "int8"),
        ({}, "expected `scheme`"),
        ({"scheme": "int8", "overrides": {"a": "fp9"}}, "fp8"),
        ({"scheme": "int8", "ignore": "lm_head"}, "list of patterns"),
        ({"scheme": "int8", "ignore": 3}, "list of patterns for ignore, found 3"),
        ({"scheme": "int8", "ignore": {"lm_head": None}}, "list of patterns"),
        ({"scheme": "int8", "overrides": {1: "fp8"}}, "expected a pattern"),
        ({"scheme": "int8", "data": {"pth": 1}}, "pth"),
        ({"scheme": "int8", "data": {"samples": "many"}}, "expected int as samples, found 'many'"),
        ({"scheme": "int8", "data": {"length": 0}}, "at least 1 as length, found 0"),
        ({"scheme": "int8", "data": {"seed": None}}, "expected int as seed, found None"),
        ({"scheme": "int8", "data": {"seed": 2**63}}, "a seed of 64 bits"),
        ({"scheme": "int8", "version": 2}, "version 1"),
        ({"scheme": "int8", "method": ""}, "a method's name or a mapping, found ''"),
        ({"scheme": "int8", "method": {}}, "a method's name or a mapping, found {}"),
        ([1], "mapping"),
    ]
    for data, message in wrong:
        with pytest.raises(InputError, match=message):
            recipe_from(data)
    (tmp_path / "bad.yaml").write_text("scheme: [")
    with pytest.raises(InputError, match=r"bad\.yaml"):
        load_recipe(tmp_path / "bad.yaml")
    (tmp_path / "bad.json").write_text(json.dumps({"scheme": "int8", "methd": "gptq"}))
    with pytest.raises(InputError, match="method"):
        load_recipe(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", b'scheme: int8\nnotes: {by: "Ren\xe9"}', "UTF-8"),
        ("a.json", b"[" * 100_000, "YAML or JSON"),
        ("a.yaml", b"scheme: int8\nignore: [a]\nignore: [b]", "the key 'ignore' stands twice"),
        ("a.yaml", b'scheme: int8\noverrides: {"*.o_proj": fp8, "*.o_proj": float}', "'\\*.o_proj' stands twice"),
        ("a.json", b'{"scheme": "int8", "scheme": "fp8"}', "the key 'scheme' stands twice"),
        ("a.yaml", b'scheme: int8\noverrides: {"*.o_proj": fp9}', r"a\.yaml: override '\*\.o_proj': unknown scheme"),
    ],
)  # fmt: skip
def test_a_recipe_file_that_cannot_be_read_as_it_is_meant(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_recipe(tmp_path / name)


def test_a_recipe_of_windows_with_yaml_merges(tmp_path):
    (tmp_path / "a.yaml").write_text("\ufeffscheme: int8\nnotes: {a: &a {x: 1}, b: {<<: *a, y: 2}}", "utf-8")
    assert load_recipe(tmp_path / "a.yaml").notes == {"a": {"x": 1}, "b": {"x": 1, "y": 2}}
    (tmp_path / "a.json").write_text('\ufeff{"scheme": "fp8"}', "utf-8")
    assert load_recipe(tmp_path / "a.json").scheme == "fp8"


def test_costs_are_those_of_the_definition(checkpoints, windows):
    """½ E[(g·Δ)²] per token, by the whole model of transformers; Qwen2's projections have biases."""
    source, data = checkpoints["qwen2"], [w[:12] for w in windows[:2]]
    units = sensitivities(source, data, ["int8", "int8-weight-only"], batch_size=1, seed=5)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    seen: dict[str, list] = {}

    def keep(module, args, out, name):
        out.register_hook(lambda g: seen.setdefault(name, []).append((args[0].detach(), g)))

    for unit in units:
        for name in unit.modules:
            model.get_submodule(name).register_forward_hook(partial(keep, name=name))
    generator = torch.Generator().manual_seed(5)
    for window in data:
        log_p = torch.log_softmax(model(input_ids=window[None]).logits[0], -1)
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        log_p.gather(1, drawn).sum().backward()
    for unit in units:
        weights = [model.get_submodule(name).weight.detach() for name in unit.modules]
        assert unit.elements == sum(w.numel() for w in weights)
        for candidate, cost in unit.cost.items():
            if candidate == FLOAT:
                assert cost == 0
                continue
            wanted, scheme = 0.0, get_scheme(candidate)
            for name, weight in zip(unit.modules, weights, strict=True):
                made = get_scheme("int8").weights if weight.shape[1] % 128 else scheme.weights
                for x, g in seen[name]:
                    q = x if scheme.activations is None else quantize(x, scheme.activations).dequantize()
                    lost = q @ quantize(weight, made).dequantize().t() - x @ weight.t()
                    wanted += float((lost * g).sum(-1).double().square().sum()) / 2 / 24
            assert cost == pytest.approx(wanted, rel=2e-2), (unit.modules, candidate)


def test_the_step_that_saves_most_per_bit_comes_first():
    small = Unit(modules=("small",), elements=100, cost={"int8": 1.0, "fp8": 1.2, FLOAT: 0.0})
    large = Unit(modules=("large",), elements=1000, cost={"int8": 1.7, "fp8": 1.5, FLOAT: 0.0})
    points = curve([large, small])
    assert [p.schemes for p in points] == [("fp8", "int8"), ("fp8", FLOAT), (FLOAT, FLOAT)]
    assert pick(points, max_kl=2.0) == points[1] and pick(points, max_kl=1e-9) == points[2]
    # The main scheme is what most weights have, not most units.
    more = [Unit(modules=(f"m{i}",), elements=10, cost=small.cost) for i in range(5)]
    points = curve([large, *more])
    recipe = recipe_of([large, *more], points[0], points)
    assert recipe.scheme == "fp8" and recipe.overrides == {f"m{i}": "int8" for i in range(5)}
    with pytest.raises(InputError, match="leaves every module in float"):
        recipe_of([large, *more], points[-1], points)


def test_candidates_that_need_data_are_refused(checkpoints, windows):
    for candidate in ("int8-static", "bf16"):
        with pytest.raises(InputError, match="candidates with dynamic or no activations, found"):
            sensitivities(checkpoints["llama"], windows[:1], ["int8", candidate])
