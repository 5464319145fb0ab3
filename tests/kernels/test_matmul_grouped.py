"""Mixture-of-experts products against a loop over experts in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lowbit.kernels.matmul_grouped import matmul_grouped
from lowbit.kernels.targets import get_target, pretending
from lowbit.kernels.tuned_tables import LaunchParameters
from sample_operands import FP8

COUNTS = {
    "uneven": [3, 0, 40, 1, 17],
    "first and last empty": [0, 16, 33, 0],
    "one expert": [21],
    "all in the last": [0, 0, 0, 50],
    "all in the first": [50, 0, 0, 0, 0, 0, 0],
    "one each": [1] * 9,
    "multiples of a tile": [16, 32, 0, 16],
}
SMALL = LaunchParameters(block_m=16, block_n=32, block_k=32, group_m=2)
TMA = replace(SMALL, tma=True, persistent=True)


def codes(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randint(-4, 5, shape).to(dtype)


def powers_of_2(*shape: int) -> torch.Tensor:
    return 2.0 ** torch.randint(-2, 3, shape).float()


def expand(scale: torch.Tensor, rows: int, cols: int, block: tuple[int, int]) -> torch.Tensor:
    scale = scale.double().repeat_interleave(block[0], -2)[..., :rows, :]
    return scale.repeat_interleave(block[1], -1)[..., :cols]


def problem(counts: list[int], dtype: torch.dtype, n: int, k: int, block: bool, x: torch.dtype | None = None):
    """Arguments of `matmul_grouped` and the float64 result of a loop over experts."""
    tokens, experts = sum(counts), len(counts)
    offsets = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    a, w = codes(x or dtype, tokens, k), codes(dtype, experts, n, k)
    groups = -(-k // 128)
    a_scale = None if x else powers_of_2(tokens, groups if block else 1)
    w_scale = powers_of_2(experts, -(-n // 128) if block else n, groups if block else 1)
    bias, routed = torch.randint(-8, 9, (experts, n)).float(), powers_of_2(tokens)
    a_block, w_block = ((1, 128), (128, 128)) if block else ((1, k), (1, k))
    left = a.double() if a_scale is None else a.double() * expand(a_scale, tokens, k, a_block)
    expected = torch.empty(tokens, n, dtype=torch.float64)
    for e in range(experts):
        rows = slice(int(offsets[e]), int(offsets[e + 1]))
        right = w[e].double() * expand(w_scale[e], n, k, w_block)
        expected[rows] = (left[rows] @ right.T + bias[e].double()) * routed[rows, None].double()
    arguments = {
        "a": a, "w": w, "offsets": offsets, "a_scale": a_scale, "w_scale": w_scale, "bias": bias,
        "routed_weight": routed, "block_shape": (128, 128) if block else None, "out_dtype": torch.float32,
    }  # fmt: skip
    return arguments, expected


@pytest.mark.parametrize("block", [False, True], ids=["channel", "block"])
@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=["int8", "fp8"])
@pytest.mark.parametrize("counts", COUNTS)
def test_bitwise_exact(counts, dtype, block):
    arguments, expected = problem(COUNTS[counts], dtype, 36, 160, block)
    for launch in (SMALL, TMA):
        assert torch.equal(matmul_grouped(**arguments, launch=launch).double(), expected)


def test_rows_of_other_experts_do_not_reach_a_tile():
    """Descriptors load a tile's rows and columns past the expert's end: its neighbour's, which are infinite here."""
    arguments, expected = problem([5, 7], FP8, 36, 160, False, torch.float16)
    arguments["a"][5:], arguments["w_scale"][1] = float("inf"), float("nan")
    for launch in (SMALL, TMA):
        found = matmul_grouped(**arguments, launch=launch)
        assert torch.equal(found[:5].double(), expected[:5]) and found[5:].isnan().all()


@pytest.mark.parametrize("name", ["sm80", "sm90", "sm120", "gfx950", "ascend910b"])
@pytest.mark.parametrize("block", [False, True], ids=["channel", "block"])
def test_parameters_of_the_targets(name, block):
    arguments, expected = problem([70, 0, 200, 1], torch.int8, 200, 260, block)
    with pretending(get_target(name)):
        assert torch.equal(matmul_grouped(**arguments).double(), expected)


@pytest.mark.parametrize("name", ["sm80", "sm90"])
@pytest.mark.parametrize("x", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=["int8", "fp8"])
def test_weight_only(name, x, dtype):
    arguments, expected = problem(COUNTS["uneven"], dtype, 36, 160, True, x)
    with pretending(get_target(name)):
        assert torch.equal(matmul_grouped(**arguments).double(), expected)


def test_persistent_and_long_bands():
    for group_m in (1, 3, 64):
        launch = LaunchParameters(block_m=16, block_n=32, block_k=32, group_m=group_m, persistent=True)
        arguments, expected = problem(COUNTS["uneven"], torch.int8, 100, 64, False)
        with pretending(get_target("ascend910b")):  # 20 programs for 32 tiles
            assert torch.equal(matmul_grouped(**arguments, launch=launch).double(), expected)


def test_without_bias_and_routed_weight():
    arguments, _ = problem(COUNTS["uneven"], torch.int8, 36, 160, False)
    bias, routed = arguments.pop("bias"), arguments.pop("routed_weight")
    plain = matmul_grouped(**arguments, launch=SMALL)
    full = matmul_grouped(**arguments, bias=bias, routed_weight=routed, launch=SMALL)
    experts = torch.repeat_interleave(torch.arange(5), torch.tensor(COUNTS["uneven"]))
    assert torch.equal((plain + bias[experts]) * routed[:, None], full)


def test_experts_beyond_2_to_the_31_elements():
    # Only the touched pages of this storage exist.
    apart = 3 * 2**29
    w = torch.empty(2 * apart + 4096, dtype=torch.int8).as_strided((3, 16, 32), (apart, 32, 1))
    w.copy_(codes(torch.int8, 3, 16, 32))
    arguments, _ = problem([4, 0, 5], torch.int8, 16, 32, False)
    arguments["w"] = w
    far = [matmul_grouped(**arguments, launch=launch) for launch in (SMALL, TMA)]
    arguments["w"] = w.contiguous()
    near = [matmul_grouped(**arguments, launch=launch) for launch in (SMALL, TMA)]
    assert all(torch.equal(found, near[0]) for found in (*far, *near))


def test_no_tokens():
    arguments, _ = problem([0, 0], torch.int8, 16, 32, False)
    assert matmul_grouped(**arguments).shape == (0, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": torch.zeros(6, dtype=torch.int64)}, "expected offsets of dtype int32"),
        ({"offsets": torch.zeros(5, dtype=torch.int32)}, r"expected offsets of shape \[6\]"),
        ({"a_scale": None}, "expected a_scale"),
        ({"a_scale": torch.ones(61, 2)}, r"expected a_scale of shape \[61, 1\]"),
        ({"w_scale": torch.ones(5, 35, 1)}, "expected w_scale of shape"),
        ({"routed_weight": torch.ones(60)}, r"expected routed_weight of shape \[61\]"),
        ({"bias": torch.ones(36)}, r"expected bias of shape \[5, 36\]"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments, _ = problem(COUNTS["uneven"], torch.int8, 36, 160, False)
    with pytest.raises(ValueError, match=message):
        matmul_grouped(**(arguments | change))


@pytest.mark.parametrize("scheme", ["fp8", "fp8-static", "int8-static"])
def test_the_operation_on_a_target_without_fp8(scheme):
    """Experts in fp8 are decoded there and get their activations as they are; int8 ones get codes."""
    from lowbit.kernels import targets

    from lowbit import ops
    from lowbit.quantize import quantize
    from lowbit.scheme import SCHEMES

    spec = SCHEMES[scheme].weights
    weights = [quantize(torch.randn(32, 64), spec) for _ in range(2)]
    static = not SCHEMES[scheme].activations.dynamic
    call = {
        "weight": torch.stack([w.codes.view(torch.uint8) for w in weights]).view(weights[0].codes.dtype),
        "weight_scale": torch.stack([w.scale for w in weights]), "offsets": torch.tensor([0, 3, 8]),
        "block": ops.block_of(spec.granularity), "input_scale": torch.tensor([[0.02], [0.05]]) if static else None,
    }  # fmt: skip
    x, kind = torch.randn(8, 64), "tensor" if static else "token"
    with targets.pretending(targets.get_target("sm80")), ops.use_implementation("triton"):
        out = ops.linear_grouped(x, activations=kind, **call)
    if scheme != "int8-static":
        call["input_scale"], kind = None, "none"
    with ops.use_implementation("reference"):
        want = ops.linear_grouped(x, activations=kind, **call)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
