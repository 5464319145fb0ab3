"""Launch parameters: a pure function, legal on every target, and the tables' schema."""

from __future__ import annotations

import itertools
import json

import pytest
from lowbit.kernels import tuned_tables
from lowbit.kernels.launch import MATMUL_KERNELS, choose_launch, refusal
from lowbit.kernels.targets import TARGETS, get_target
from lowbit.kernels.tuned_tables import M_BUCKETS, LaunchParameters, m_bucket, parse_table

PAIRS = [("int8", "int8"), ("e4m3fn", "e4m3fn"), ("e4m3fnuz", "e4m3fnuz"), ("bfloat16", "int8"),
         ("bfloat16", "e4m3fn"), ("float32", "int8"), ("float16", "uint8")]  # fmt: skip
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def test_buckets():
    assert [m_bucket(m) for m in (1, 16, 17, 64, 65, 8192, 100_000)] == [16, 16, 32, 64, 128, 8192, 8192]


@pytest.mark.parametrize("name", TARGETS)
def test_parameters_are_legal_for_every_problem(name):
    target = get_target(name)
    seen = 0
    for kernel, (a, w), m, (n, k), groups, aligned in itertools.product(
        MATMUL_KERNELS, PAIRS, (1, 64, 257, 8192), ((1, 16), (576, 7168), (7168, 2048), (129_280, 496)),
        ((0, 0), (128, 128), (0, 32)), (True, False),
    ):  # fmt: skip
        if refusal(kernel, k=k, a_dtype=a, w_dtype=w, target=target) is not None:
            continue
        seen += 1
        chosen = choose_launch(
            kernel, m=m, n=n, k=k, a_dtype=a, w_dtype=w, target=target,
            group_n=groups[0], group_k=groups[1], aligned=aligned,
        )  # fmt: skip
        assert chosen.block_m >= 16 and chosen.block_n >= 16 and chosen.block_k >= 32
        assert (groups[0] % chosen.block_n == 0 and groups[1] % chosen.block_k == 0) or groups == (0, 0)
        assert chosen.promote_k <= chosen.block_k
        staged = chosen.block_k * (chosen.block_m * BYTES.get(a, 1) + chosen.block_n * BYTES.get(w, 1))
        assert staged * chosen.num_stages <= target.shared_memory
        assert not chosen.tma or (aligned and target.tma and kernel != "matmul_mxfp8")
        assert not chosen.persistent or target.backend == "npu" or (aligned and m > 64)
        if target.fp8 != "e4m3fn" or a != "e4m3fn" or name != "sm90" or groups[1]:
            assert chosen.promote_k == 0
    assert seen > 100


def choose(**change) -> LaunchParameters:
    problem = {
        "m": 16,
        "n": 7168,
        "k": 2048,
        "a_dtype": "int8",
        "w_dtype": "int8",
        "target": get_target("sm90"),
    }
    return choose_launch("matmul", **(problem | change))


def test_decode_splits_k_until_the_cores_are_busy_and_prefill_does_not():
    assert choose(n=2112, k=7168).split_k > 1
    assert choose(m=4096).split_k == 1
    assert choose(n=129_280).split_k == 1
    assert choose(k=128).split_k == 1
    assert choose(m=17) == choose(m=32)


def test_fp8_on_hopper_promotes_and_has_64_rows():
    launch = choose(a_dtype="e4m3fn", w_dtype="e4m3fn")
    assert launch.promote_k == 128 and launch.block_m == 64
    assert choose(target=get_target("sm80")).block_m == 16


def test_sums_that_may_stay_in_the_matrix_unit_have_wider_tiles():
    fp8 = {"m": 8192, "a_dtype": "e4m3fn", "w_dtype": "e4m3fn"}
    exact, fast = choose(**fp8), choose(**fp8, fast_accum=True)
    assert (exact.promote_k, exact.block_n) == (128, 128) and (fast.promote_k, fast.block_n) == (0, 256)
    assert choose(m=8192) == choose(m=8192, fast_accum=True)
    assert choose(**fp8, target=get_target("sm100")) == choose(
        **fp8, target=get_target("sm100"), fast_accum=True
    )


@pytest.mark.parametrize(("name", "room"), [("sm90", (32, 4)), ("sm100", (64, 8))])
def test_float32_activations_have_room_where_more_stands_in_registers(name, room):
    def chosen(m: int, **change) -> tuple[int, int]:
        problem = {"m": m, "n": 2112, "k": 7168, "a_dtype": "float32", "w_dtype": "uint8"} | change
        launch = choose_launch("matmul_weight_only", target=get_target(name), **problem)
        return launch.block_k, launch.num_warps

    block = {"group_n": 128, "group_k": 128}
    assert chosen(64) == chosen(64, **block) == (64, 4)
    assert chosen(17, group_k=128) == (32, 4)  # 256 bytes would spill on sm90
    assert chosen(64, group_k=128) == chosen(4096, group_k=128) == room  # 40 on sm90, 8 on sm100
    assert chosen(64, aligned=False) == chosen(64, **block, aligned=False) == room  # 48 and 64 on sm90


def test_what_is_cut_down_to_fit_the_registers_still_multiplies_natively():
    def chosen(kernel: str, target: str, **change) -> LaunchParameters:
        problem = {"m": 1, "n": 1000, "k": 4096, "a_dtype": "e4m3fn", "w_dtype": "e4m3fn"} | change
        return choose_launch(kernel, target=get_target(target), **problem)

    # tcgen05 takes scaled operands of 128 rows or none; with 64, sm100 would multiply bfloat16.
    assert chosen("matmul_mxfp8", "sm100", group_n=1, group_k=32).block_m == 128
    groups = {"group_k": 128, "aligned": False}
    assert chosen("matmul_block", "sm100", **groups).block_n == 32  # 64 columns spill 160 bytes
    assert chosen("matmul_block", "sm120", **groups).block_n == 32  # 148 bytes
    assert chosen("matmul_block", "sm90", **groups).block_n == 64
    assert chosen("matmul_block", "sm100", group_n=128, **groups).block_n == 64


def test_registers_are_asked_for_where_ptxas_would_spill_to_fit_one_program_more():
    def options(m: int, target: str = "sm90", x: str = "bfloat16", **change) -> dict:
        problem = {"m": m, "n": 7168, "k": 16384, "a_dtype": x, "w_dtype": "int8"} | change
        of = get_target(target)
        return choose_launch("matmul_weight_only", target=of, **problem).options(of)

    assert options(17)["maxnreg"] == options(1, "sm100")["maxnreg"] == 128
    assert options(17, "sm120", group_k=128)["maxnreg"] == 255  # 32 bytes
    assert options(17, x="float32", aligned=False)["maxnreg"] == 255
    for left_alone in (options(64), options(17, "sm80"), options(17, "gfx942")):
        assert "maxnreg" not in left_alone and left_alone["num_warps"] > 1


def test_on_gfx950_tiles_are_copied_both_or_neither():
    """A lane copies 4 bytes or more of each; where rows may begin anywhere nothing is copied."""
    target = get_target("gfx950")
    for (a, w), m, group, (n, k) in itertools.product(
        PAIRS, (1, 64, 8192), (0, 16, 32, 128), ((1, 16), (576, 7168))
    ):
        if refusal("matmul_weight_only", k=k, a_dtype=a, w_dtype=w, target=target) is not None:
            continue
        problem = {"m": m, "n": n, "k": k, "a_dtype": a, "w_dtype": w, "target": target, "group_k": group}
        chosen = choose_launch("matmul_weight_only", **problem)
        lanes = target.warp_size * chosen.num_warps
        for rows, dtype in ((chosen.block_m, a), (chosen.block_n, w)):
            assert rows * chosen.block_k * BYTES.get(dtype, 1) >= 4 * lanes
        assert choose_launch("matmul_weight_only", aligned=False, **problem).num_stages == 1


def test_refusals_say_why():
    def reason(kernel: str, a: str, w: str, target: str, k: int = 2048) -> str:
        return refusal(kernel, k=k, a_dtype=a, w_dtype=w, target=get_target(target)) or ""

    assert "weight-only" in reason("matmul", "e4m3fn", "e4m3fn", "sm80")
    assert "e4m3fnuz and not e4m3fn" in reason("matmul_block", "e4m3fn", "e4m3fn", "gfx942")
    assert "has no e4m3fnuz" in reason("matmul", "e4m3fnuz", "e4m3fnuz", "sm90")
    assert "overflow" in reason("matmul", "int8", "int8", "sm90", k=131_072)
    assert reason("matmul_block", "int8", "int8", "sm90", k=131_072) == ""
    assert "mxfp8" in reason("matmul_mxfp8", "int8", "int8", "sm100")
    assert "by the same fp8" in reason("matmul", "int8", "e4m3fn", "sm90")
    assert reason("matmul_weight_only", "bfloat16", "e4m3fn", "sm80") == ""
    assert reason("matmul_mxfp8", "e4m3fn", "e4m3fn", "ascend910b") == ""
    with pytest.raises(ValueError, match="unknown kernel"):
        reason("matmul_int4", "int8", "int8", "sm90")
    with pytest.raises(ValueError, match="multiplies no fp8"):
        choose(a_dtype="e4m3fn", w_dtype="e4m3fn", target=get_target("sm80"))
    with pytest.raises(ValueError, match="unknown target 'h100'"):
        get_target("h100")


ENTRY = {
    "kernel": "matmul", "a_dtype": "int8", "w_dtype": "int8", "m": 16, "n": 7168, "k": 2048,
    "parameters": {"block_m": 16, "block_n": 128, "block_k": 256, "num_stages": 4, "tma": False},
}  # fmt: skip
TABLE = {"version": 1, "target": "sm90", "device": "a card", "triton": "3.9.0", "entries": [ENTRY]}


def test_a_tuned_entry_is_used_for_its_bucket_only(monkeypatch, tmp_path):
    (tmp_path / "sm90.json").write_text(json.dumps(TABLE))
    monkeypatch.setattr(tuned_tables, "FOLDER", tmp_path)
    tuned_tables.load_table.cache_clear()
    try:
        assert choose(m=9).block_k == 256
        assert choose(m=17).block_k != 256
        assert choose(n=7169).block_k != 256
        assert choose(target=get_target("sm100")).block_k != 256
    finally:
        tuned_tables.load_table.cache_clear()


def test_an_entry_without_promotion_is_for_fast_accumulation(monkeypatch, tmp_path):
    entry = {
        **ENTRY, "a_dtype": "e4m3fn", "w_dtype": "e4m3fn",
        "parameters": {"block_m": 64, "block_n": 32, "block_k": 128},
    }  # fmt: skip
    promoted = entry | {"parameters": {"block_m": 64, "block_n": 16, "block_k": 128, "promote_k": 128}}
    (tmp_path / "sm90.json").write_text(json.dumps(TABLE | {"entries": [entry, promoted]}))
    monkeypatch.setattr(tuned_tables, "FOLDER", tmp_path)
    tuned_tables.load_table.cache_clear()
    try:
        fp8 = {"a_dtype": "e4m3fn", "w_dtype": "e4m3fn"}
        assert choose(**fp8).block_n == 16 and choose(**fp8, fast_accum=True).block_n == 32
    finally:
        tuned_tables.load_table.cache_clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 1"),
        ({"target": "sm80"}, "expected target 'sm90'"),
        ({"device": None}, "'device'"),
        ({"entries": [ENTRY, ENTRY]}, "same problem twice"),
        ({"entries": [ENTRY | {"m": 17}]}, "entry 0: expected m to be one of"),
        ({"entries": [ENTRY | {"n": "7168"}]}, "positive integer n"),
        ({"entries": [ENTRY | {"speed": 3}]}, "expected the keys"),
        ({"entries": [ENTRY | {"parameters": {"block_q": 3}}]}, "unknown parameter 'block_q'"),
        ({"entries": [ENTRY | {"parameters": {"block_m": 16.0}}]}, "expected int for block_m"),
        ({"entries": [ENTRY | {"parameters": ENTRY["parameters"] | {"block_m": 48}}]}, "power of two"),
        ({"entries": [ENTRY | {"parameters": {"block_m": 16}}]}, "entry 0"),
    ],
)
def test_tables_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        parse_table(TABLE | change, "sm90")


def test_shipped_tables_are_valid():
    assert m_bucket(M_BUCKETS[0]) == M_BUCKETS[0]
    for name in TARGETS:
        tuned_tables.load_table(name)
