"""What runs where, why not, and that nothing falls back unseen."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from lowbit import ops
from lowbit.errors import InputError
from lowbit.ops import cpu_call, dispatch, settings
from lowbit.ops.cpu_isa import Instructions
from lowbit.ops.dispatch import Decision, Problem, Refusal, choose
from lowbit.ops.explain import as_text, explain, problem_of
from lowbit.scheme import SCHEMES, get_scheme
from lowbit.targets import ACCELERATORS

QUANTIZED = [name for name, scheme in SCHEMES.items() if scheme.weights is not None]


def problem(scheme: str, **changes) -> Problem:
    return replace(problem_of(get_scheme(scheme), m=16, n=7168, k=2048), **changes)


@pytest.mark.parametrize(
    ("scheme", "target", "kernel", "multiplies"),
    [
        ("int8", "sm80", "matmul", "int8 × int8"),
        ("int8", "ascend910b", "matmul", "int8 × int8"),
        ("int8-block", "sm80", "matmul_block", "int8 × int8"),
        ("int8-weight-only", "sm90", "matmul_weight_only", "bfloat16 × int8"),
        ("fp8", "sm90", "matmul", "e4m3fn × e4m3fn"),
        ("fp8-block", "sm90", "matmul_block", "e4m3fn × e4m3fn"),
        ("mxfp8", "sm100", "matmul_mxfp8", "e4m3fn × e4m3fn"),
    ],
)
def test_kernel_of_each_scheme(scheme, target, kernel, multiplies):
    chosen = choose(problem(scheme), target)
    assert isinstance(chosen, Decision)
    assert (chosen.implementation, chosen.kernel, chosen.multiplies) == ("triton", kernel, multiplies)
    assert chosen.note == "" and chosen.launch is not None


@pytest.mark.parametrize("scheme", ["fp8", "fp8-block"])
@pytest.mark.parametrize("target", ["sm80", "gfx942", "ascend910b"])
def test_fp8_is_decoded_where_it_is_not_native_and_says_so(scheme, target):
    """A block-FP8 checkpoint runs unconverted on an A100."""
    chosen = choose(problem(scheme), target)
    assert isinstance(chosen, Decision)
    assert chosen.kernel == "matmul_weight_only" and chosen.multiplies == "bfloat16 × e4m3fn"
    assert "decoded in the kernel" in chosen.note
    assert chosen.keeps_floats(problem(scheme))
    experts = choose(problem(scheme, experts=8), target)
    assert isinstance(experts, Decision) and experts.kernel == "matmul_grouped"
    assert experts.keeps_floats(problem(scheme, experts=8))
    native = choose(problem(scheme, experts=8), "sm90")
    assert isinstance(native, Decision) and not native.keeps_floats(problem(scheme, experts=8))


def test_every_scheme_has_an_answer_on_every_accelerator():
    for name in QUANTIZED:
        for target in ACCELERATORS:
            found = explain(m=16, n=7168, k=2048, scheme=name, target=target)
            assert ("refusal" in found) != ("kernel" in found)
            assert as_text(found)
            if "kernel" in found and target != "cpu":
                assert found["bound"] == "memory" and found["floor_us"] > 0


def test_no_more_experts_are_read_than_there_are_rows():
    """Of 64 experts a single row reads one; `no faster than` counted all 64."""
    dense, one, many = (
        explain(m=1, n=256, k=512, scheme="int8", target="a100", experts=experts)["floor_us"]
        for experts in (0, 1, 64)
    )
    assert dense == one == many
    eight, all_of_them = (
        explain(m=m, n=4096, k=4096, scheme="int8", target="a100", experts=64)["floor_us"] for m in (8, 64)
    )
    assert all_of_them == pytest.approx(8 * eight, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"k": 200_000}, "int32 sum"),
        ({"weight_dtype": "uint8"}, "packed int8 weights"),
        ({"zero_point": True}, "a zero point belongs to static int8"),
        ({"zero_point": True, "activations": "tensor", "experts": 4}, "grouped products have no zero points"),
        ({"block": (128, 128)}, "a scale per 128 along K need activations per group"),
        ({"activations": "group"}, "how long a group is"),
        ({"activations": "none", "block": (1, 48)}, "g and c multiples of 32"),
        ({"activations": "group", "block": (1, 96)}, "power of two from 16 to 2048, found 96"),
    ],
)
def test_refusals_say_why(changes, reason):
    chosen = choose(problem("int8", **changes), "sm90")
    assert isinstance(chosen, Refusal) and reason in chosen.reason


def test_ascend_quantizes_no_long_groups():
    of_group = {"activations": "group", "block": (1, 512), "k": 2048}
    assert not isinstance(choose(problem("int8", **of_group), "sm90"), Refusal)
    chosen = choose(problem("int8", **of_group), "ascend910b")
    assert isinstance(chosen, Refusal) and "from 16 to 256 on ascend910b, found 512" in chosen.reason


def test_cpu_names_its_tile(path):
    chosen = choose(problem("int8"), "cpu")
    assert isinstance(chosen, Decision) and chosen.implementation == "cpu"
    expected = {
        "amx": "tdpbssd512",
        "avx512_vnni": "dpbusd512",
        "avx512bw": "pmaddwd512",
        "avx_vnni": "dpbusd256",
        "avx2": "pmaddwd256",
        "neon_dotprod": "sdot128",
        "neon": "smull128",
    }
    assert chosen.kernel.startswith(expected.get(path, "portable"))
    assert chosen.multiplies == "int8 × int8"


@pytest.fixture
def having(monkeypatch):
    """Decide as for a CPU with other instructions."""

    def have(name: str, byte_lookup: bool = False) -> None:
        found = Instructions(name=name, bfloat16=True, byte_lookup=byte_lookup)
        monkeypatch.setattr(cpu_call, "instructions", lambda: found)
        dispatch.choose_cpu.cache_clear()

    yield have
    dispatch.choose_cpu.cache_clear()


@pytest.mark.parametrize("byte_lookup", [False, True])
def test_a_few_rows_are_decoded_while_loading(having, byte_lookup):
    having("avx512_vnni", byte_lookup=byte_lookup)
    kind, most = (
        ("dpbf16512", {"fp8": 16, "fp8-block": 8}) if byte_lookup else ("fma512", {"fp8": 4, "fp8-block": 4})
    )
    for scheme, m in most.items():
        for few in (1, m):
            chosen = choose(problem(scheme, m=few), "cpu")
            assert chosen.kernel == f"{kind}, dot products with rows as stored"
            assert "while they are loaded" in chosen.note
        assert choose(problem(scheme, m=m + 1), "cpu").kernel == "dpbf16512, 6×64 tile"
    assert (
        choose(problem("int8-weight-only", m=4), "cpu").kernel == "fma512, dot products with rows as stored"
    )
    assert choose(problem("int8-weight-only", m=5), "cpu").kernel == "dpbf16512, 6×64 tile"
    for scheme, m in (("int8", 48), ("int8-block", 12)):
        assert "dot products" in choose(problem(scheme, m=m), "cpu").kernel
        assert choose(problem(scheme, m=m + 1), "cpu").kernel == "dpbusd512, 6×64 tile"
    # Of a mixture the rows of one expert count.
    m = most["fp8"]
    assert "dot products" in choose(problem("fp8", m=8 * m, experts=8), "cpu").kernel
    assert choose(problem("fp8", m=8 * m + 1, experts=8), "cpu").kernel == "dpbf16512, 6×64 tile"
    assert choose(problem("int8-weight-only", activation_dtype="float16"), "cpu").kernel.startswith("fma512")


def test_many_rows_are_multiplied_in_pairs_where_there_is_no_vnni(having):
    having("avx2")
    for scheme, m in (("int8", 16), ("int8-static-asym", 16), ("int8-block", 12)):
        few, many = choose(problem(scheme, m=m), "cpu"), choose(problem(scheme, m=m + 1), "cpu")
        assert few.kernel == "pmaddwd256, dot products with rows as stored"
        assert many.kernel == "winograd256, 4×16 tile" and "Winograd" in many.note and not few.note
    assert choose(problem("int8", m=16 * 8 + 1, experts=8), "cpu").kernel.startswith("winograd256")


def test_amx_multiplies_what_is_worth_it(having):
    having("amx")
    assert choose(problem("int8", m=11), "cpu").kernel.startswith("dpbusd512")
    assert choose(problem("int8", m=12), "cpu").kernel == "tdpbssd512, 32×32 tile"
    for name, kind in (
        ("int8-block", "tdpbssd512"),
        ("fp8", "tdpbf16512"),
        ("int8-weight-only", "tdpbf16512"),
    ):
        assert choose(problem(name, m=4), "cpu").kernel.startswith(kind)
        assert not choose(problem(name, m=3), "cpu").kernel.startswith(kind)
    # Codes less a zero point have 9 bits.
    assert choose(problem("int8-static-asym", m=64), "cpu").kernel.startswith("pmaddwd512")
    assert choose(problem("fp8", m=64, experts=32), "cpu").kernel.startswith("fma512")
    # float16 and float32 are not exact in bfloat16, but sums of two and three bfloat16 are.
    chosen = choose(problem("int8-weight-only", m=64, activation_dtype="float32"), "cpu")
    assert chosen.kernel == "tdpbf16512, 32×32 tile, activations as 3 bfloat16" and "exactly" in chosen.note


def test_float64_sums_are_a_choice_of_their_own():
    before = choose(problem("fp8", m=64), "cpu")
    ops.use_float64_sums(True)
    try:
        found = choose(problem("fp8", m=64), "cpu")
        assert found.multiplies == "float64 × float64" and found != before
        assert choose(problem("int8", m=64), "cpu").multiplies == "int8 × int8"
    finally:
        ops.use_float64_sums(False)
    assert choose(problem("fp8", m=64), "cpu") == before


def test_fast_accumulation_is_for_fp8_on_hopper():
    def promoted(**how) -> int:
        return choose(problem("fp8", m=4096, **how), "sm90").launch.promote_k

    others = [problem("fp8-block", m=4096), problem("int8", m=4096), problem("mxfp8", m=4096)]
    before = [choose(other, "sm90") for other in others]
    assert promoted() == promoted(experts=2) == 128
    ops.use_fast_accumulation(True)
    try:
        assert promoted() == promoted(experts=2) == 0
        assert [choose(other, "sm90") for other in others] == before
    finally:
        ops.use_fast_accumulation(False)
    assert promoted() == 128


@pytest.mark.parametrize(("value", "wanted"), [("1", True), ("0", False)])
@pytest.mark.parametrize("name", ["float64_sums", "fast_accumulation"])
def test_settings_by_environment(monkeypatch, name, value, wanted):
    monkeypatch.setenv(f"LOWBIT_{name.upper()}", value)
    assert getattr(settings._from_environment(), name) is wanted


def test_decisions_are_made_per_bucket():
    assert dispatch.bucketed(problem("int8", m=17)).m == 32
    assert dispatch.bucketed(problem("int8", m=1)).m == 1
    assert dispatch.bucketed(problem("int8", m=0)).m == 1


@pytest.fixture
def refused(monkeypatch):
    """A product that no kernel takes: the dispatcher is made to refuse it."""
    monkeypatch.setattr(dispatch, "choose", lambda problem, target: Refusal(reason="made up for a test"))
    settings._log_once.cache_clear()
    w = torch.randint(-127, 128, (12, 64), dtype=torch.int8)
    x, scale = torch.randn(5, 64), torch.rand(12, 1)
    yield (
        lambda: ops.linear(x, w, scale, activations="token", block=(1, 0)),
        x.double() @ (w.double() * scale).T,
    )
    settings._log_once.cache_clear()
    ops.allow_fallback(True)


def test_a_fallback_is_logged_once_and_right(refused, caplog):
    run, exact = refused
    with caplog.at_level(logging.WARNING, logger="lowbit.ops"):
        out = run()
        run()
    assert [record.message.count("made up for a test") for record in caplog.records] == [1]
    assert float((out - exact).norm() / exact.norm()) < 0.02


def test_a_fallback_can_be_made_an_error(refused):
    run, _ = refused
    ops.allow_fallback(False)
    with pytest.raises(ops.NoKernelError, match=r"lowbit::linear: made up for a test.*LOWBIT_NO_FALLBACK"):
        run()


@pytest.mark.parametrize(("value", "allowed"), [("1", False), ("true", False), ("0", True), ("", True)])
def test_the_environment_forbids_fallbacks(monkeypatch, value, allowed):
    monkeypatch.setenv("LOWBIT_NO_FALLBACK", value)
    assert settings._from_environment().fallback is allowed


def test_unknown_names_are_input_errors():
    with pytest.raises(InputError, match="did you mean h100"):
        explain(m=1, n=1, k=1, scheme="int8", target="h10O")
    with pytest.raises(InputError, match="unknown scheme"):
        explain(m=1, n=1, k=1, scheme="int9", target="h100")
    with pytest.raises(InputError, match="quantizes nothing"):
        explain(m=1, n=1, k=1, scheme="bf16", target="h100")
    with pytest.raises(InputError, match="expected m of at least 1"):
        explain(m=0, n=1, k=1, scheme="int8", target="h100")


def test_every_accelerator_is_a_compilation_target_and_defaults_are_native():
    from lowbit.kernels.targets import TARGETS

    for accelerator in ACCELERATORS.values():
        assert accelerator.arch == "cpu" or accelerator.arch in TARGETS
        spec = get_scheme(accelerator.scheme).weights
        assert spec is not None and accelerator.native(spec.dtype.name)
        if accelerator.arch != "cpu":
            assert (TARGETS[accelerator.arch].fp8 is not None) == (accelerator.fp8 is not None)


def test_use_implementation_rejects_unknown_names():
    with (
        pytest.raises(ValueError, match="expected one of triton, cpu, reference, found 'cuda'"),
        ops.use_implementation("cuda"),
    ):
        pass
