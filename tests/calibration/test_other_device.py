"""Calibration, evaluation and search on a device whose tensors refuse to mix with those of the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from other_device import OtherDevice

from lowbit.calibration import statistics as statistics_module
from lowbit.calibration.calibrate import calibrate
from lowbit.calibration.kv_cache import KVCache
from lowbit.calibration.methods import METHODS, best_method
from lowbit.calibration.run import RunOptions
from lowbit.calibration.search import sensitivities
from lowbit.evaluate.layerwise import calibrated, evaluate, plain
from lowbit.scheme import get_scheme

THERE = torch.device("cuda", 0)
CASES = [
    ("int8", METHODS["absmax"]),
    ("int8", METHODS["smoothquant"]),
    ("int8", METHODS["gptq"]),
    ("int8", METHODS["rotate-gptq-online"]),
    ("int8", best_method(get_scheme("int8"))),
    ("int8-static", best_method(get_scheme("int8-static"))),
    ("int8-static", replace(METHODS["percentile"], bias_correction=True)),
    ("int8-static", replace(METHODS["smoothquant"], activation_range="output", smooth_joints=("norm",))),
    ("fp8-static", METHODS["mse"]),
    ("fp8-block", replace(METHODS["descent"], compensate=True)),
]


@pytest.mark.parametrize("model", ["llama", "qwen3_moe"])
@pytest.mark.parametrize(("scheme", "method"), CASES, ids=[f"{s}-{m.name}" for s, m in CASES])
def test_calibration_stays_on_its_device(checkpoints, windows, tmp_path, model, scheme, method):
    source, kv = checkpoints[model], KVCache(dtype="int8", each="head")
    with OtherDevice() as device:
        for limit in (1 << 30, 1):  # all data as one batch where the method can; and in batches, spilled
            options = RunOptions(device=THERE, memory_limit=limit)
            found = calibrate(
                source, tmp_path / f"{limit}", get_scheme(scheme), method, windows[:6],
                kv_cache=kv if limit == 1 else None, options=options,
            )  # fmt: skip
            report = evaluate(
                calibrated(source, found, device=THERE), windows[6:8], plain(source, device=THERE)
            )
    assert device.count > 1000
    here = evaluate(calibrated(source, found), windows[6:8], plain(source))
    assert report.agreement.kl == pytest.approx(here.agreement.kl, rel=0.02)


def test_search_stays_on_its_device(checkpoints, windows):
    with OtherDevice():
        there = sensitivities(checkpoints["llama"], windows[:2], device=THERE)
    here = sensitivities(checkpoints["llama"], windows[:2])
    for a, b in zip(there, here, strict=True):
        assert a.cost == pytest.approx(b.cost, rel=1e-3)


def test_a_planted_mix_is_caught(checkpoints, windows, tmp_path, monkeypatch):
    update = statistics_module.InputStatistics.update

    def forgetful(self, x, output=None):
        update(self, x, output)
        self.total = self.total + torch.zeros(x.shape[-1])

    monkeypatch.setattr(statistics_module.InputStatistics, "update", forgetful)
    options = RunOptions(device=THERE, memory_limit=1)
    with (
        OtherDevice(),
        pytest.raises(RuntimeError, match=r"expected all tensors on one device, found .*cpu.*cuda"),
    ):
        calibrate(
            checkpoints["llama"],
            tmp_path / "c",
            get_scheme("int8"),
            METHODS["gptq"],
            windows,
            options=options,
        )


def test_the_other_device_follows_torch():
    with OtherDevice() as device:
        x = torch.ones(4, 4, device="cuda")
        y = torch.arange(4)
        assert x[:2].t().device == THERE and (x @ x).device == THERE and x.cpu().device.type == "cpu"
        assert (
            torch.nn.Parameter(x).device == THERE
            and y.to(x).device == THERE
            and y.to(x.device).dtype == y.dtype
        )
        assert x[y].device == THERE and (x * torch.tensor(2.0)).device == THERE
        z = torch.zeros(4, 4)
        assert z.copy_(x).device.type == "cpu" and z.sum() == 16
        for mixed in (lambda: x + z, lambda: z[x.long()], lambda: torch.cat([x, z]), lambda: x @ z):
            with pytest.raises(RuntimeError, match="one device"):
                mixed()
        with pytest.raises(RuntimeError, match="one device"):
            x + torch.ones(4, 4, device="cuda:1")
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
    assert device.count > 0 and x.device.type == "cpu"
