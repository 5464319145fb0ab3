"""Which runs over the data a layer takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from lowbit.calibration.calibrate import _passes
from lowbit.calibration.graph import _groups, trace
from lowbit.calibration.layer import wanted_statistics
from lowbit.calibration.layerwise import LayerwiseModel
from lowbit.calibration.methods import METHODS, Method
from lowbit.calibration.run import RunOptions
from lowbit.calibration.source import Source
from lowbit.calibration.step import Passes, plan_passes
from lowbit.scheme import get_scheme

USUAL = {"need_output": True, "one_batch": False, "experts": False, "online": False, "kv_cache": False}


def planned(name: str, scheme: str = "int8", **given: bool) -> Passes:
    method, target = METHODS[name], get_scheme(scheme)
    if given.pop("floats_go_on", False):
        method = replace(method, propagate=False)
    wanted = wanted_statistics(method, [target])
    return plan_passes(wanted, method, static=target.needs_calibration, **{**USUAL, **given})


@pytest.mark.parametrize(
    ("given", "watch", "rounds", "hands_on"),
    [
        (("gptq", {"one_batch": True}), False, True, "round"),
        (("smoothquant", {"one_batch": True}), False, True, "round"),
        (("gptq", {"one_batch": True, "need_output": False}), False, True, "nothing"),
        (("gptq", {"one_batch": True, "experts": True}), True, False, "own"),
        (("gptq", {"one_batch": True, "kv_cache": True}), True, False, "own"),
        (("gptq", {}), True, False, "own"),
        (("gptq", {"floats_go_on": True}), True, False, "watch"),
        (("gptq", {"floats_go_on": True, "experts": True}), True, False, "own"),
        (("rotate-gptq-online", {"floats_go_on": True, "online": True}), True, False, "own"),
        (("gptq", {"floats_go_on": True, "need_output": False}), True, False, "nothing"),
        (("absmax", {}), False, False, "own"),
        (("absmax", {"scheme": "int8-static"}), True, False, "own"),
        (("entropy", {"scheme": "int8-static", "floats_go_on": True}), True, False, "own"),
        (("absmax", {"kv_cache": True, "need_output": False}), True, False, "nothing"),
    ],
)
def test_the_fewest_runs_that_the_method_allows(given, watch, rounds, hands_on):
    name, options = given
    assert planned(name, **options) == Passes(watch=watch, rounds=rounds, hands_on=hands_on)


def test_what_one_batch_may_be(checkpoints, windows):
    """Scales that move out of a module already rounded divide its own, which only one per channel allows."""
    model, options = LayerwiseModel(Source(checkpoints["qwen3"])), RunOptions()

    def one_batch(method: Method, scheme: str = "int8", given=windows, options=options) -> bool:
        return _passes(model, method, {"a": get_scheme("int8"), "b": get_scheme(scheme)}, options, given)

    smooth, gptq = METHODS["smoothquant-gptq"], METHODS["gptq"]
    for scheme, moves in (
        ("int8", True),
        ("fp8", True),
        ("int8-block", False),
        ("int8-weight-only", False),
        ("mxfp8", False),
    ):
        assert one_batch(gptq, scheme) and one_batch(smooth, scheme) == moves, scheme
        assert one_batch(replace(smooth, smooth_joints=("norm",)), scheme)
    assert not one_batch(gptq, "int8-static")
    assert not one_batch(METHODS["absmax"]) and one_batch(METHODS["smoothquant"])
    assert not one_batch(replace(gptq, propagate=False)) and not one_batch(gptq, given=[])
    assert not one_batch(gptq, given=[*windows, windows[0][:5]])
    assert not one_batch(gptq, options=RunOptions(memory_limit=1 << 16))


def test_which_methods_look_at_data():
    int8 = get_scheme("int8")
    for name in ("gptq", "descent", "smoothquant", "rotate-gptq"):
        assert METHODS[name].needs_data(int8)
    for name in ("absmax", "mse", "rotate"):
        assert not METHODS[name].needs_data(int8) and METHODS[name].needs_data(get_scheme("int8-static"))
    for change in ({"bias_correction": True}, {"compensate": True}):
        assert replace(METHODS["absmax"], **change).needs_data(int8)


def test_modules_that_read_one_tensor_are_one_group():
    """Also an expert's gate and up to which no token came; a weight that the layer reads by itself is in none."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in "abcd":
                setattr(self, name, nn.Linear(8, 8, bias=False))

        def forward(self, x):
            return self.c(self.a(x) * self.b(x)) @ self.d.weight

    layer = Layer()
    graph = trace(layer, lambda m: m(torch.randn(3, 8)), 8, object())
    assert graph.linears == ("a", "b", "c") and graph.groups == (("a", "b"), ("c",))
    names = tuple(f"mlp.experts.{i}.{p}_proj" for i in range(2) for p in ("gate", "up", "down"))
    assert _groups(names, {}, {}) == (names[:2], names[2:3], names[3:5], names[5:])
