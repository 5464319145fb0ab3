"""What is said of a chip: native or not, and how many of it the weights need."""

from __future__ import annotations

import pytest

from lowbit.errors import InputError
from lowbit.formats import get_format
from lowbit.scheme import get_scheme
from lowbit.targets import ACCELERATORS, advice, get_accelerator


@pytest.mark.parametrize("name", ACCELERATORS)
def test_what_a_chip_takes_by_default_is_native_and_can_be_written(name):
    chip = ACCELERATORS[name]
    scheme = get_scheme(chip.scheme)
    assert scheme.weights is not None and not scheme.needs_calibration
    assert chip.native(scheme.weights.dtype.name) and get_format(chip.format).holds(scheme)
    assert advice(chip, scheme.weights.dtype.name, 10**9)[1] == []


def test_advice():
    said, warnings = advice(get_accelerator("A100"), "int8", 345 * 10**9)
    assert "multiplied natively (624 TOP/s, 2.0 × its bf16)" in said and not warnings
    assert "5 of 80 GB hold the 345 GB of weights" in said
    said, warnings = advice(get_accelerator("910b"), "e4m3fn", 64 * 10**9)
    assert "fp8 is not multiplied natively; 1 of 64 GB holds" in said
    assert "decode the weights to bf16" in warnings[0] and "int8 suits it better" in warnings[0]
    assert advice(get_accelerator("cpu"), None, 5) == ("x86-64 or other processor: any memory", [])


def test_unknown_chips():
    with pytest.raises(InputError, match="expected the name of a target, found None; one of a10, a100"):
        get_accelerator(None)
    with pytest.raises(InputError, match=r"did you mean .*a100"):
        get_accelerator("a1000")
