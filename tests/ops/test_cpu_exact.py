"""int8 products against an int64 oracle, on every instruction set that this machine has."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import weakref

import pytest
import torch

from lowbit import ops
from lowbit.errors import InputError
from lowbit.ops import cpu, cpu_call, cpu_isa
from lowbit.ops.cpu_isa import Instructions

ISAS = cpu_isa.available()
# kernels.md, section 7, thinned: every M and every (N, K) occurs.
MS = (0, 1, 2, 15, 16, 17, 31, 33, 64, 127, 128, 257)
NKS = ((1, 16), (16, 32), (100, 100), (576, 496), (971, 3884))
SHAPES = [(m, *nk) for m in (1, 17) for nk in NKS] + [(m, 100, 100) for m in MS] + [(64, 971, 496)]


def product(a: torch.Tensor, w: torch.Tensor, zero: int = 0) -> torch.Tensor:
    """int64 [M, N], then rounded to float32 once, as int32 → float32 does."""
    return ((a.long() - zero) @ w.long().T).to(torch.float32)


def codes(*shape: int, low: int = -127, high: int = 127) -> torch.Tensor:
    return torch.randint(low, high + 1, shape, dtype=torch.int8)


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_product_of_codes_is_exact(isa, m, n, k):
    a, w = codes(m, k, low=-128), codes(n, k, low=-128)
    out = ops.matmul(a, torch.ones(1), w, torch.ones(n, 1), block=(1, 0), out_dtype=torch.float32)
    assert torch.equal(out, product(a, w))


@pytest.mark.parametrize("m", [1, 5, 20])
@pytest.mark.parametrize("k", [31, 2048, 10_000])
def test_extreme_codes_do_not_saturate(isa, m, k):
    """u8 255 × 127 in every pair is where 16-bit intermediates overflow."""
    for a_code, w_code in itertools.product((-128, -127, 127), repeat=2):
        a = torch.full((m, k), a_code, dtype=torch.int8)
        w = torch.full((13, k), w_code, dtype=torch.int8)
        out = ops.matmul(a, torch.ones(1), w, torch.ones(13, 1), block=(1, 0), out_dtype=torch.float32)
        assert torch.equal(out, product(a, w)), (a_code, w_code)


@pytest.mark.parametrize("zero", [-128, -17, 0, 127])
@pytest.mark.parametrize("m", [1, 33])
def test_zero_point_is_exact(isa, m, zero):
    a, w = codes(m, 300, low=-128), codes(50, 300, low=-128)
    out = ops.matmul(
        a, torch.ones(1), w, torch.ones(50, 1), block=(1, 0), out_dtype=torch.float32,
        a_zero_point=torch.tensor([zero], dtype=torch.int8),
    )  # fmt: skip
    assert torch.equal(out, product(a, w, zero))
    alone = ops.matmul(
        a[0], torch.ones(1), w, torch.ones(50, 1), block=(1, 0), out_dtype=torch.float32,
        a_zero_point=torch.tensor([zero], dtype=torch.int8),
    )  # fmt: skip
    assert torch.equal(alone, out[0])


def test_distance_to_the_zero_point_reaches_255(isa):
    a, w = torch.full((3, 4096), -128, dtype=torch.int8), torch.full((7, 4096), 127, dtype=torch.int8)
    zero = torch.tensor([127], dtype=torch.int8)
    out = ops.matmul(
        a, torch.ones(1), w, torch.ones(7, 1), block=(1, 0), out_dtype=torch.float32, a_zero_point=zero
    )
    assert torch.equal(out, product(a, w, 127))


@pytest.mark.parametrize(("k", "zero"), [(140_000, None), (70_000, -128)])
def test_sums_that_int32_cannot_hold_fall_back(k, zero):
    x, w = torch.ones(2, k), torch.full((3, k), -127, dtype=torch.int8)
    how = {"activations": "token"}
    if zero is not None:
        point = torch.tensor([zero], dtype=torch.int8)
        how = {"activations": "tensor", "input_scale": torch.tensor([1 / 255]), "input_zero_point": point}
    out = ops.linear(x, w, torch.ones(3, 1), block=(1, 0), **how)
    torch.testing.assert_close(out, torch.full((2, 3), -127.0 * k), rtol=1e-4, atol=0)


def test_sums_on_the_way_may_pass_int32(isa):
    """Winograd's Σ (a₀ + b₁)(a₁ + b₀) is twice what is left of it when Σ a₀a₁ and Σ b₀b₁ have come off."""
    k = 120_000
    assert 127 * 127 * k < 2**31 < 2 * 127 * 127 * k
    a, w = torch.full((20, k), 127, dtype=torch.int8), torch.full((5, k), 127, dtype=torch.int8)
    out = ops.matmul(a, torch.ones(1), w, torch.ones(5, 1), block=(1, 0), out_dtype=torch.float32)
    assert torch.equal(out, product(a, w))


@pytest.mark.parametrize("counts", [(40, 0, 21, 3, 17), (18, 18, 18), (0, 33)])
@pytest.mark.parametrize("group", [0, 32, 100])
def test_experts_of_few_and_of_many_rows_are_exact(isa, counts, group):
    """Rows as they stand and rows in panels in one call; each group of K has its own sums."""
    k, n, experts = 200, 37, len(counts)
    offsets = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    w = codes(experts, n, k, low=-128)
    x = torch.randint(-127, 128, (int(offsets[-1]), k)).float()
    parts = [slice(g, min(g + (group or k), k)) for g in range(0, k, group or k)]
    for part in parts:
        x[:, part.start] = 127  # so that the scale of every group is 1
    scale = torch.ones(experts, n, len(parts))
    how = {"activations": "group" if group else "token", "block": (1, group)}
    out = ops.linear_grouped(x, w, scale, offsets, **how)
    for e, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        assert torch.equal(out[start:end], product(x[start:end].to(torch.int8), w[e])), e


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 100, 100), (17, 971, 496), (130, 16, 3884)])
def test_dynamic_linear_equals_its_definition(isa, m, n, k, dtype):
    """Written out here once more, apart from the reference: quantize, multiply, scale, add, cast."""
    x, w = torch.randn(m, k).to(dtype), codes(n, k)
    scale, bias = torch.rand(n, 1) + 0.01, torch.randn(n).to(dtype)
    a_scale = x.float().abs().amax(1, keepdim=True) / 127
    a = (x.float() / a_scale).round().to(torch.int8)
    expected = (product(a, w) * a_scale * scale.T + bias.float()).to(dtype)
    assert torch.equal(ops.linear(x, w, scale, bias, activations="token", block=(1, 0)), expected)


@pytest.mark.parametrize(("k", "group"), [(37, 0), (165, 0), (165, 64), (128, 32), (200, 100)])
def test_rows_at_the_end_of_memory_are_not_read_past(isa, k, group):
    """The last row of a ragged weight ends at a page that must not be touched, and so do the scales of activations."""
    mmap = pytest.importorskip("mmap")
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 16 * page)
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    n, end, other_end = 29, 4 * page, 12 * page
    for guarded in (end, other_end):
        if libc.mprotect(ctypes.c_void_p(address + guarded), page, 0):
            pytest.skip("memory cannot be protected here")
    whole = torch.frombuffer(memory, dtype=torch.int8)
    w = whole[end - n * k : end].view(n, k)
    groups, block = (-(-k // group), (1, group)) if group else (1, (1, 0))
    for dtype in (torch.int8, torch.float8_e4m3fn):
        w.copy_((codes(n, k).clamp(-4, 4).to(dtype)).view(torch.int8))
        values = w.view(dtype).float()
        for m in (1, 5, 20):
            a = codes(m, k).clamp(-4, 4)
            scale = whole[other_end - 4 * m * groups : other_end].view(torch.float32).view(m, groups)
            scale.copy_(2.0 ** torch.randint(-2, 3, (m, groups)))
            spread = scale.repeat_interleave(group or k, 1)[:, :k]
            for x in (a.float(), a.bfloat16()):
                out = ops.linear(x, w.view(dtype), torch.ones(n, groups), activations="none", block=block)
                assert torch.equal(out, (a.float() @ values.T).to(x.dtype))
            out = ops.matmul(
                a.to(dtype), scale, w.view(dtype), torch.ones(n, groups), block=block, out_dtype=torch.float32
            )
            assert torch.equal(out, (a.float() * spread) @ values.T)
    for guarded in (end, other_end):
        libc.mprotect(ctypes.c_void_p(address + guarded), page, 3)


def test_threads_may_enter_at_once():
    w, scale = codes(200, 512), torch.rand(200, 1)
    inputs = [torch.randn(20 + i, 512) for i in range(6)]
    expected = [ops.linear(x, w, scale, activations="token", block=(1, 0)) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            if not torch.equal(
                ops.linear(inputs[i], w, scale, activations="token", block=(1, 0)), expected[i]
            ):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_number_of_threads_does_not_change_the_result():
    x, w, scale = torch.randn(70, 640), torch.randn(300, 640).to(torch.float8_e4m3fn), torch.rand(300, 1)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.linear(x, w, scale, activations="token", block=(1, 0)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_forked_child_works():
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    code = (
        "import os, torch\n"
        "from lowbit import ops\n"
        "torch.set_num_threads(2)\n"
        "w = torch.randint(-127, 128, (600, 600), dtype=torch.int8); s = torch.rand(600, 1)\n"
        "x = torch.randn(9, 600)\n"
        "run = lambda: ops.linear(x, w, s, activations='token', block=(1, 0))\n"
        "before = run()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    torch.set_num_threads(1)\n"  # what DataLoader's workers do; torch's own OpenMP needs it
        "    os._exit(0 if torch.equal(run(), before) else 3)\n"
        "_, status = os.waitpid(pid, 0)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(status))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=100, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_code_compiled_for_an_avx2_processor_is_exact():
    """The same tests where LLVM may use no AVX-512 at all, as on an AVX2-only machine."""
    if "avx2" not in cpu_isa.available():
        pytest.skip("no AVX2 here")
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": "haswell",
        "LOWBIT_CPU_ISA": "avx2",
        "OMP_NUM_THREADS": "2",
    }
    chosen = f"{__file__}::test_extreme_codes_do_not_saturate"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "avx2", chosen]
    done = subprocess.run(command, env=environment, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(ISAS[0] == "portable", reason="no x86-64 with AVX2")
@pytest.mark.parametrize(
    ("kind", "storage"), [("tdpbssd512", "i8"), ("tdpbf16512", "e4m3"), ("tdpbf16512", "u8")]
)
def test_amx_compiles_where_it_cannot_run(kind, storage, tmp_path):
    """LLVM ends the process where it has no instruction for what was emitted."""
    features = "amx-tile amx-int8 amx-bf16 avx2 fma f16c " + " ".join(
        f"avx512{name}" for name in ("f", "bw", "vl", "dq", "vbmi", "vnni", "bf16")
    )
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": "sapphirerapids",
        "NUMBA_CPU_FEATURES": ",".join(f"+{feature}" for feature in features.split()),
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    code = (
        "from lowbit.ops import cpu_matmul_amx\n"
        f"assembly = cpu_matmul_amx.matmul({kind!r}, {storage!r})._library.get_asm_str()\n"
        f"assert assembly.count({kind[:7]!r}) >= 12 and 'tilerelease' in assembly\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, timeout=200, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_pinning_an_instruction_set(monkeypatch):
    monkeypatch.setenv("LOWBIT_CPU_ISA", "sse9")
    with pytest.raises(
        InputError, match="amx, avx512_vnni, avx_vnni, avx512bw, avx2, portable, found 'sse9'"
    ):
        cpu_isa.detect()
    monkeypatch.setattr(cpu_isa, "available", lambda: ("avx2", "portable"))
    monkeypatch.setenv("LOWBIT_CPU_ISA", "avx512_vnni")
    with pytest.raises(InputError, match="has only avx2, portable"):
        cpu_isa.detect()
    monkeypatch.delenv("LOWBIT_CPU_ISA")
    assert cpu_isa.detect() == Instructions(name="avx2")


def test_without_numba_the_portable_path_runs(monkeypatch):
    monkeypatch.setattr(cpu_call, "have_numba", lambda: False)
    cpu.instructions.cache_clear()
    try:
        assert cpu.instructions().name == "portable"
    finally:
        cpu.instructions.cache_clear()


def test_importing_lowbit_ops_loads_neither_numba_nor_triton():
    code = "import sys, lowbit.ops; raise SystemExit(bool({'numba', 'triton'} & set(sys.modules)))"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    assert subprocess.run([sys.executable, "-c", code], timeout=60, env=environment).returncode == 0


def test_the_second_process_compiles_nothing():
    """The cache on disk is found again; numba counts a hit for every compiled loop."""
    code = (
        "import torch\n"
        "from lowbit import ops\n"
        "from lowbit.ops import cpu_matmul, cpu_prepare, cpu, cpu_isa\n"
        "x, w = torch.randn(2, 64), torch.ones(8, 64, dtype=torch.int8)\n"
        "ops.linear(x, w, torch.ones(8, 1), activations='token', block=(1, 0))\n"
        "tile = cpu_isa.integer_tile(cpu.instructions(), 2)\n"
        "loops = [cpu_prepare.prepare(), cpu_matmul.matmul(tile.kind, 'i8', tile.rows, tile.vectors)]\n"
        "raise SystemExit(0 if all(loop.cache_hits == 1 for loop in loops) else 3)\n"
    )
    if cpu.instructions().name == "portable":
        pytest.skip("nothing is compiled here")
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], timeout=200, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_small_products_are_not_mixed_up():
    """Parameters of small products are kept by address: other weights at the same address must not get them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 64, generator=generator)
    weight = torch.empty(32, 64, dtype=torch.int8)
    scale = torch.empty(32, 1)
    for _ in range(3):
        # No byte of these is a NaN of e4m3fn.
        weight.copy_(torch.randint(0, 127, (32, 64), generator=generator))
        scale.copy_(torch.rand(32, 1, generator=generator))
        for view in (weight, weight.view(torch.float8_e4m3fn), weight[:16], weight.view(64, 32)[:16]):
            rows, k = view.shape
            arguments = (x[:, :k], view, scale[:rows], None)
            found = ops.linear(*arguments, activations="token", block=(1, 0))
            with ops.use_implementation("reference"):
                want = ops.linear(*arguments, activations="token", block=(1, 0))
            # Sums of float32 may cancel: small beside the largest, not beside themselves.
            assert torch.allclose(found, want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_kept_parameters_keep_no_weight_alive():
    weight = torch.ones(32, 64, dtype=torch.int8)
    alive = weakref.ref(weight)
    ops.linear(torch.ones(1, 64), weight, torch.ones(32, 1), None, activations="token", block=(1, 0))
    del weight
    assert alive() is None
