"""Kernels run here in Triton's interpreter; its casts and products are mended first.

Measured on Triton 3.9: the interpreter multiplies the raw bits of bfloat16, truncates
float32 → bfloat16, makes bits and not a value of int8 → bfloat16, rounds float32 → fp8 without
carry, and reads fp8 NaN as 480. Hardware does
none of that. Casts go through torch instead (its rounding is the standard's), and products
through float64, which is exact for 8-bit codes.

With LOWBIT_MACHINE=sm90, or gfx942 and so on, they are compiled instead, and run on a machine of tests/machines.
"""

from __future__ import annotations

import os
import sys

if (
    "triton" in sys.modules
    and os.environ.get("TRITON_INTERPRET") != "1"
    and "LOWBIT_MACHINE" not in os.environ
):
    raise RuntimeError(
        "expected TRITON_INTERPRET=1 before triton is imported (tests/conftest.py sets it), found triton "
        "imported without; run pytest from the repository root"
    )
os.environ["TRITON_INTERPRET"] = "0" if "LOWBIT_MACHINE" in os.environ else "1"

import numpy as np
import pytest
import torch
import triton.language as tl
from machines import session
from triton.runtime import interpreter

_TORCH = {
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.int8: torch.int8,
    tl.int16: torch.int16,
    tl.int32: torch.int32,
}


def _as_torch(handle: interpreter.TensorHandle) -> torch.Tensor:
    data, dtype = np.ascontiguousarray(handle.data), handle.dtype.scalar
    return torch.from_numpy(data.reshape(-1)).view(_TORCH[dtype]).reshape(data.shape)


def _cast(handle: interpreter.TensorHandle, dtype: tl.dtype) -> interpreter.TensorHandle:
    value = _as_torch(handle).to(_TORCH[dtype.scalar])
    stored = np.dtype(interpreter._get_np_dtype(dtype.scalar))
    same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[stored.itemsize]
    data = value.reshape(-1).view(same_size).numpy().view(stored).reshape(handle.data.shape)
    return interpreter.TensorHandle(data, dtype.scalar)


def _create_fp_to_fp(self, src, dst_type, rounding_mode):
    return _cast(src, dst_type)


def _cast_impl(self, src, dst_type, _original=interpreter.InterpreterBuilder.cast_impl):
    if src.dtype.scalar in _TORCH and dst_type.scalar in _TORCH and dst_type.scalar.is_floating():
        return _cast(src, dst_type)
    return _original(self, src, dst_type)


def _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    product = (_as_torch(a).double() @ _as_torch(b).double()).numpy()
    return interpreter.TensorHandle(d.data + product.astype(d.data.dtype), d.dtype.scalar)


def _patch_lang(fn, _original=interpreter._patch_lang):
    """For a launch, and not again for each function that its kernel calls: all members of the language were looked at,
    and none was left to patch, in two fifths of the time.
    """
    languages = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
    if languages and not any(tl.core.is_builtin(language.load) for language in languages):
        return interpreter._LangPatchScope()
    return _original(fn)


interpreter._patch_lang = _patch_lang
interpreter.InterpreterBuilder.create_fp_to_fp = _create_fp_to_fp
interpreter.InterpreterBuilder.cast_impl = _cast_impl
interpreter.InterpreterBuilder.create_dot = _create_dot


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


if "LOWBIT_MACHINE" in os.environ:
    MACHINE = session.begin(os.environ["LOWBIT_MACHINE"])


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    if "LOWBIT_MACHINE" not in os.environ:
        return (yield)
    with session.refusals_skip():
        return (yield)


def pytest_terminal_summary(terminalreporter):
    if "LOWBIT_MACHINE" in os.environ:
        terminalreporter.write_line(f"{len(MACHINE.launches)} launches, compiled and run on the CPU")
