"""Which runs over the data a layer takes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lowbit.calibration.layer import wanted_statistics
from lowbit.calibration.methods import METHODS
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
