"""Which device a process gets, with faked machines, and what is refused."""

from __future__ import annotations

import pytest
import torch

from lowbit.calibration import devices
from lowbit.calibration.devices import choose_device
from lowbit.errors import InputError


@pytest.fixture
def machine(monkeypatch):
    """A function that fakes a machine and a launcher's environment; returns the list of indices made current."""

    def fake(kind: str | None, count: int = 0, *, refusal: str = "", **environment: str) -> list[int]:
        current: list[int] = []
        found = None if kind is None else torch.device(kind)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        monkeypatch.setattr(torch.accelerator, "set_device_index", current.append)
        monkeypatch.setattr(devices, "_refusal", lambda device: refusal)
        for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "ACCELERATE_USE_CPU"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return current

    return fake


def workers(local_rank: int, local: int, world: int | None = None) -> dict[str, str]:
    return {"LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(local), "WORLD_SIZE": str(world or local)}


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_alone(machine, kind):
    current = machine(kind, 2)
    assert choose_device("auto") == torch.device(kind, 0)
    assert choose_device(kind.upper()) == torch.device(kind, 0)
    assert choose_device(f"{kind}:1") == torch.device(kind, 1)
    assert current == [0, 0, 1]
    assert choose_device("cpu") == torch.device("cpu") and choose_device(torch.device("meta")).type == "meta"
    assert current == [0, 0, 1]


def test_without_an_accelerator(machine):
    machine(None)
    assert choose_device("auto") == torch.device("cpu")
    for wanted in ("cuda", "cuda:0", "npu", "nonsense", "meta", ""):
        with pytest.raises(InputError, match=r"expected device auto, cpu, found .*choose one"):
            choose_device(wanted)


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_every_worker_has_its_own(machine, wanted):
    for local_rank in range(4):
        current = machine("cuda", 4, **workers(local_rank, 4, world=8))
        assert choose_device(wanted) == torch.device("cuda", local_rank) and current == [local_rank]
        assert choose_device("cpu") == torch.device("cpu")


def test_one_worker_on_each_machine_may_name_its_device(machine):
    machine("cuda", 4, **workers(0, 1, world=2))
    assert choose_device("cuda:2") == torch.device("cuda", 2)


@pytest.mark.parametrize(
    ("wanted", "count", "environment", "message"),
    [
        ("cuda:0", 4, workers(1, 2), "without an index for 2 workers.*say --device cuda"),
        ("cuda", 2, workers(0, 4), "4 workers on this machine and 2 of cuda; start 2 workers"),
        ("auto", 2, workers(0, 4), "4 workers on this machine and 2 of cuda"),
        ("auto", 2, workers(0, 3), "3 workers on this machine and 2 of cuda"),
        ("cuda:2", 2, {}, "expected cuda:0 to cuda:1, found cuda:2"),
        ("cuda:", 2, {}, "expected cuda:0 to cuda:1, found cuda:"),
        ("cuda:x", 2, {}, "expected cuda:0 to cuda:1, found cuda:x"),
        ("xpu", 2, {}, "expected device auto, cpu or cuda, found xpu"),
        ("cuda", 2, {"WORLD_SIZE": "2"}, "expected LOCAL_RANK"),
        ("cuda:1", 2, {"WORLD_SIZE": "2"}, "without an index for 2 workers"),
    ],
)
def test_refusals(machine, wanted, count, environment, message):
    current = machine("cuda", count, **environment)
    with pytest.raises(InputError, match=message):
        choose_device(wanted)
    assert current == []


def test_a_device_without_float64(machine):
    machine("mps", 1, refusal="no float64")
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(InputError, match=r"float64.*mps.*no float64.*--device cpu"):
        choose_device("mps")


def test_accelerate_launch_cpu_means_cpu(machine):
    machine("cuda", 1, ACCELERATE_USE_CPU="True")
    assert choose_device("auto") == torch.device("cpu")


def test_the_check_itself():
    assert devices._refusal(torch.device("cpu")) == ""
    if not torch.cuda.is_available():
        assert devices._refusal(torch.device("cuda", 0))
