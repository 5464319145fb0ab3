"""Launches that are kept: run again, they are the call. On memory of the CPU, by kernels that are Python's.

What Triton's own launcher makes of them is what `scripts/bench_launch.py` checks, on a CUDA driver that does nothing.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lowbit.kernels import kept, start

from lowbit.ops import again
from lowbit.ops.settings import use_implementation

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_launch.py"
N = 8


def _floats(address: int) -> ctypes.Array:
    return (ctypes.c_float * N).from_address(address)


class Compiled:
    """out = FACTOR · x + w, from addresses alone, as a compiled kernel gets them."""

    def __getitem__(self, grid):
        assert grid == (1, 1, 1)

        def run(*values, stream=None):
            x, w, out, factor = (v.data_ptr() if hasattr(v, "data_ptr") else v for v in values)
            x = x.base.data_ptr() if hasattr(x, "base") else x
            for i in range(N):
                _floats(out)[i] = factor * _floats(x)[i] + _floats(w)[i]

        return run


class Kernel:
    arg_names = ("x", "w", "out", "FACTOR")

    def __init__(self, compiled=None):
        self.compiled = compiled or Compiled()

    def __getitem__(self, grid):
        def run(x, w, out, FACTOR):
            self.compiled[(*grid, 1, 1)](x, w, out, FACTOR)
            return self.compiled

        return run


@pytest.fixture(autouse=True)
def driver(monkeypatch):
    """Streams are numbers nobody looks at."""
    active = SimpleNamespace(get_current_stream=lambda index: 0)
    monkeypatch.setattr(kept.triton.runtime.driver, "_active", active)
    again._local.calls = {}


def affine(x, w, kernel=None, turn=lambda t: t):
    """2 · (3 · x + w) + w by two launches, the first into memory of its own."""
    kernel = kernel or Kernel()
    middle, out = torch.empty(N + 4)[4:], torch.empty(N)
    start.launch(kernel, (1,), x.device, turn(x), w, middle, FACTOR=3)
    start.launch(kernel, (1,), x.device, turn(middle), w, out, FACTOR=2)
    return out


def test_kept_launches_are_the_call_on_other_inputs():
    w = torch.randn(N)
    x = torch.randn(N)
    result, launches = kept.keep(lambda: affine(x, w), [x], [w])
    assert torch.equal(result, affine(x, w))
    seen = []
    for _ in range(3):
        other = torch.randn(2 * N)[N:]
        seen.append((launches.run(other), affine(other, w)))
    w.add_(1)  # in place: what lies there now is what counts
    seen.append((launches.run(x), affine(x, w)))
    for found, want in seen:
        assert torch.equal(found, want)


def test_views_of_an_input_keep_their_places():
    pair, w = torch.randn(2 * N), torch.zeros(N)
    run = lambda both: affine(both.view(2, N)[1], w)  # noqa: E731
    _, launches = kept.keep(lambda: run(pair), [pair], [w])
    other = torch.randn(2 * N)
    assert torch.equal(launches.run(other), run(other))


def test_tensor_descriptors_are_given_new_addresses():
    from triton.tools.tensor_descriptor import TensorDescriptor

    turn = lambda t: TensorDescriptor(t, [2, 4], [4, 1], [2, 4])  # noqa: E731
    x, w = torch.randn(N), torch.randn(N)
    _, launches = kept.keep(lambda: affine(x, w, turn=turn), [x], [w])
    other = torch.randn(N)
    assert torch.equal(launches.run(other), affine(other, w))
    assert torch.equal(launches.run(x), affine(x, w))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda x, w: affine(x + 1, w), id="torch computes"),
        pytest.param(lambda x, w: affine(x, torch.zeros(N)), id="torch fills"),
        pytest.param(lambda x, w: affine(x, w) * 2, id="torch computes afterwards"),
        pytest.param(lambda x, w: affine(x.view(2, 4).t().contiguous(), w), id="torch copies"),
        pytest.param(lambda x, w: affine(x, w).view(2, 4).t().contiguous(), id="torch copies afterwards"),
        pytest.param(lambda x, w: affine(x, w).to(torch.float64), id="torch converts afterwards"),
        pytest.param(lambda x, w: affine(x, w)[:4], id="a part is returned"),
        pytest.param(lambda x, w: affine(x, OTHER), id="a tensor from elsewhere"),
        pytest.param(lambda x, w: x.view(N), id="nothing is launched"),
        pytest.param(lambda x, w: (affine(x, w), x)[1], id="the input is returned"),
    ],
)
def test_what_launches_do_not_make_is_not_kept(call, mode):
    with mode():
        x, w = torch.randn(N), torch.randn(N)
        result, launches = kept.keep(lambda: call(x, w), [x], [w])
        assert launches is None
        assert torch.equal(result, call(x, w))


OTHER = torch.randn(N)


def test_inputs_that_share_memory_are_not_kept():
    both = torch.randn(2 * N)
    a, b = both[:N], both[N:]
    assert kept.keep(lambda: affine(a, OTHER), [a, b], [OTHER])[1] is None
    assert kept.keep(lambda: affine(a, b), [a], [b])[1] is None


def test_interpreted_kernels_are_not_kept():
    x, w = torch.randn(N), torch.randn(N)
    kernel = Kernel()
    interpreted = type("Interpreted", (), {
        "arg_names": Kernel.arg_names,
        "__getitem__": lambda self, grid: lambda *a, **c: (kernel[grid](*a, **c), None)[1],
    })()  # fmt: skip
    result, launches = kept.keep(lambda: affine(x, w, interpreted), [x], [w])
    assert launches is None
    assert torch.equal(result, affine(x, w))


def test_a_failing_call_leaves_nothing_behind():
    def fail():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        kept.keep(fail, [], [])
    assert start._thread.noted is None


# --------------------------------------------------------------------- when they are used


@pytest.fixture
def operation():
    ran = []

    def run(x, w, how):
        ran.append(how)
        return affine(x, w)

    call = again.keeping(run, [0])
    call.ran = ran
    return call


def test_the_third_call_of_a_shape_runs_launches_alone(operation):
    w = torch.randn(N)
    with use_implementation("triton"):
        for i in range(5):
            x = torch.randn(N)
            assert torch.equal(operation(x, w, "a"), affine(x, w))
            assert len(operation.ran) == min(i + 1, 2)
        operation(torch.randn(N + 1)[:N], w, "b")
        assert operation.ran == ["a", "a", "b"]


def test_what_launches_depend_on_makes_another_call(operation):
    w, x = torch.randn(N), torch.randn(2 * N)
    with use_implementation("triton"):
        for _ in range(3):
            operation(x[:N], w, "a")
        for other in (
            (x[1 : N + 1], w, "a"),  # another alignment
            (x[::2], w, "a"),  # other strides
            (x[:4], w, "a"),  # another shape
            (x[:N].view(2, 4), w, "a"),
            (x[:N], w.clone(), "a"),  # another weight
            (x[:N], w.view(2, 4), "a"),  # a weight of another shape, at the same place
            (x[:N], w.view(torch.int32), "a"),  # of another dtype
            (x[:N], w, "b"),
        ):
            before = len(operation.ran)
            operation(*other)
            assert len(operation.ran) == before + 1
        assert x.data_ptr() % 16 == 0


def test_a_weight_on_another_device_is_another_call():
    """Addresses of one device may come again on another, where no kernel of the first can read."""
    devices = []

    def run(x, w):
        devices.append(w.device.type)
        return affine(x, x)

    call, x = again.keeping(run, [0]), torch.randn(N)
    with use_implementation("triton"):
        for device in ("cpu", "cpu", "cpu", "meta"):
            call(x, torch.empty(0, device=device))
    assert devices == ["cpu", "cpu", "meta"]


def test_nothing_is_kept_where_launches_are_not_the_call():
    ran = []

    def run(x, w):
        ran.append(1)
        return affine(x + 1, w)

    call, w = again.keeping(run, [0]), torch.randn(N)
    with use_implementation("triton"):
        for _ in range(4):
            x = torch.randn(N)
            assert torch.equal(call(x, w), affine(x + 1, w))
    assert len(ran) == 4


def test_a_cpu_keeps_none(operation):
    x, w = torch.randn(N), torch.randn(N)
    for name in (None, "cpu", "reference"):
        for _ in range(3):
            if name is None:
                operation(x, w, "a")
            else:
                with use_implementation(name):
                    operation(x, w, "a")
    assert len(operation.ran) == 9
    assert not again._local.calls


def test_a_device_that_is_no_gpu_keeps_none():
    """As Ascend, whose launcher nobody has given addresses alone: also where kernels are asked for by name."""
    ran = []
    call = again.keeping(lambda x: ran.append(x), [0])
    with use_implementation("triton"):
        for _ in range(3):
            call(torch.empty(N, device="meta"))
    assert len(ran) == 3
    assert not again._local.calls


@pytest.mark.parametrize("already", [0, 3], ids=["inner new", "inner kept"])
def test_an_operation_within_another_is_part_of_it(already):
    inner, w = again.keeping(affine, [0]), torch.randn(N)
    outer = again.keeping(lambda x, w: affine(inner(affine(x, w), w), w), [0])
    with use_implementation("triton"):
        for _ in range(already):
            inner(torch.randn(N), w)
        for _ in range(4):
            x = torch.randn(N)
            assert torch.equal(outer(x, w), affine(affine(affine(x, w), w), w))
    assert any(again._local.calls.values())


def test_without_triton_every_call_is_the_call(monkeypatch):
    """On a GPU where Triton is not installed (Windows), the second call ended in an ImportError."""
    monkeypatch.setitem(sys.modules, "lowbit.kernels.kept", None)
    call = again.keeping(lambda x: x + 1, [0])
    with use_implementation("triton"):
        for _ in range(3):
            assert torch.equal(call(torch.ones(N)), torch.full((N,), 2.0))


def test_many_shapes_do_not_pile_up(operation, monkeypatch):
    monkeypatch.setattr(again, "_KEPT_CALLS", 3)
    w = torch.randn(N)
    with use_implementation("triton"):
        for i in range(10):
            operation(torch.randn(N + i)[:N], w, i)
            assert len(again._local.calls) <= 3


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler for the CUDA stub")
def test_tritons_launcher_is_given_what_the_call_gives_it(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, SCRIPT, "--check", "--target", "sm90"],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checked 35 calls, 0 differ" in done.stdout
