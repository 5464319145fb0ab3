"""Launch parameters: one pure function of the problem and the target. No device is asked.

First a tuned table is looked up (`tuned/<target>.json`, written by scripts/tune_kernels.py
from real runs, and only then); where it has no entry, the heuristics below decide.
"""

from __future__ import annotations

from dataclasses import replace

from .checks import MAX_K_INT8
from .targets import Target
from .tuned_tables import LaunchParameters, m_bucket, tuned_parameters

MATMUL_KERNELS = ("matmul", "matmul_block", "matmul_weight_only", "matmul_grouped", "matmul_mxfp8")


def refusal(kernel: str, *, k: int, a_dtype: str, w_dtype: str, target: Target) -> str | None:
    """Why `kernel` cannot multiply these dtypes on `target`, in one sentence; None where it can.

    dtypes by name: int8, e4m3fn, e4m3fnuz, float16, bfloat16, float32 (and uint8 for weights
    stored as q + 128).
    """
    if kernel not in MATMUL_KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}: expected one of {', '.join(MATMUL_KERNELS)}")
    floats = ("float16", "bfloat16", "float32")
    fp8 = ("e4m3fn", "e4m3fnuz")
    if "e4m3fnuz" in (a_dtype, w_dtype) and target.fp8 != "e4m3fnuz":
        return f"{target.name} has no e4m3fnuz; keep weights as e4m3fn there"
    if kernel == "matmul_mxfp8":
        if a_dtype != w_dtype or a_dtype != "e4m3fn":
            return f"mxfp8 multiplies e4m3fn by e4m3fn, found {a_dtype} × {w_dtype}"
        return None
    if kernel == "matmul_weight_only" or (kernel == "matmul_grouped" and a_dtype in floats):
        if a_dtype not in floats or w_dtype not in ("int8", "uint8", *fp8):
            return f"weight-only multiplies float16, bfloat16 or float32 by int8 or fp8, found {a_dtype} × {w_dtype}"
        return None
    if a_dtype != w_dtype or a_dtype not in ("int8", *fp8):
        return f"{kernel} multiplies int8 by int8 or fp8 by the same fp8, found {a_dtype} × {w_dtype}"
    if a_dtype in fp8 and target.fp8 != a_dtype:
        if target.fp8 is None:
            return f"{target.name} multiplies no fp8; use weight-only, which decodes it, or convert to int8"
        return (
            f"{target.name} multiplies {target.fp8} and not {a_dtype}: reinterpret the weight's bits "
            "(0x80 becomes 0x00, the scale doubles) and quantize activations to it"
        )
    if a_dtype == "int8" and kernel in ("matmul", "matmul_grouped") and k > MAX_K_INT8:
        return f"an int32 sum of int8 products may overflow for K = {k} > {MAX_K_INT8}"
    return None


def block_refusal(rows: int, cols: int) -> str | None:
    """Why no kernel takes weights with a scale per `rows` × `cols` inside the sum; None where they do."""
    if rows < 1 or cols < 32 or cols % 32 or (rows > 1 and rows % 16):
        return f"expected a block shape (1, g) or (r, c), g and c multiples of 32 and r of 16, found ({rows}, {cols})"
    return None


def group_refusal(size: int, target: Target | None = None) -> str | None:
    """Why no kernel (of `target`) quantizes activations in groups of `size` along K; None where they do."""
    # Rows of more than 256 elements in a block overflow Ascend's unified buffer: its compiler says so.
    ascend = target is not None and target.backend == "npu"
    most = 256 if ascend else 2048
    if not 16 <= size <= most or size & (size - 1):
        where = f" on {target.name}" if target is not None and ascend else ""
        return f"expected a group size that is a power of two from 16 to {most}{where}, found {size}"
    return None


def choose_launch(
    kernel: str,
    *,
    m: int,
    n: int,
    k: int,
    a_dtype: str,
    w_dtype: str,
    target: Target,
    group_n: int = 0,
    group_k: int = 0,
    aligned: bool = True,
    fast_accum: bool = False,
) -> LaunchParameters:
    """Launch parameters for one problem: the tuned entry, or else the heuristic. Pure.

    m: tokens; for `matmul_grouped` the mean per expert. group_n, group_k: the weight's block,
    where scales lie inside the sum: no tile and no step of K is larger; 0: no such limit.
    aligned: rows start at multiples of 16 bytes (`checks.rows_aligned`, with the target); where they do not,
    elements are loaded one by one: no descriptors, and smaller steps, to spare registers.
    fast_accum: fp8 sums on sm90 may stay in the matrix unit, which keeps about 14 bits of them.
    Raises ValueError with the `refusal` where there is one.
    """
    reason = refusal(kernel, k=k, a_dtype=a_dtype, w_dtype=w_dtype, target=target)
    if reason is not None:
        raise ValueError(reason)
    promote = a_dtype == "e4m3fn" and target.name == "sm90" and group_k == 0 and not fast_accum
    tuned = tuned_parameters(
        kernel, m=m, n=n, k=k, a_dtype=a_dtype, w_dtype=w_dtype, target=target, promote=promote
    )
    chosen = tuned or _heuristic(kernel, m_bucket(m), n, k, a_dtype, group_k, promote, target)
    chosen = _spare(chosen, kernel, n, a_dtype, target, group_n, group_k, aligned)
    return _fit(chosen, n, k, a_dtype, w_dtype, target, group_n, group_k)


def _eight_bit(dtype: str) -> bool:
    return dtype in ("int8", "e4m3fn", "e4m3fnuz")


def _power_of_2(x: int) -> int:
    """The largest power of two that divides x."""
    return x & -x


def _next_power_of_2(x: int) -> int:
    return 1 << max(x - 1, 0).bit_length()


def _heuristic(
    kernel: str, m: int, n: int, k: int, a_dtype: str, group_k: int, promote: bool, target: Target
) -> LaunchParameters:
    eight_bit = _eight_bit(a_dtype)
    fp8 = eight_bit and a_dtype != "int8"
    if target.backend == "npu":
        block_m, block_n, block_k = _on_ascend(m, eight_bit, group_k)
        chosen = LaunchParameters(block_m=block_m, block_n=block_n, block_k=block_k, persistent=True)
    elif target.backend == "hip":
        chosen = LaunchParameters(
            block_m=min(m, 128),
            block_n=128 if m > 32 else 64,
            block_k=64 if target.arch == "gfx942" else 128,
            num_warps=8 if m > 64 else 4,
            num_stages=2,
        )
    else:
        # Below 64 rows Triton has no fp8 instruction on sm90 and sm100 and converts to fp16.
        rows = max(m, 64) if fp8 and target.name in ("sm90", "sm100") else m
        # Promotion keeps two accumulators: with 256 columns they would not fit the registers.
        wide = target.name == "sm90" and kernel == "matmul" and m >= 256 and not promote
        large = rows > 64
        tma = target.tma and large and kernel != "matmul_mxfp8"
        chosen = LaunchParameters(
            block_m=min(rows, 128),
            block_n=256 if wide else 128 if large else 64,
            block_k=128 if eight_bit else 64,
            num_warps=8 if large else 4,
            num_stages=3 if large else 4,
            promote_k=128 if promote else 0,
            tma=tma,
            persistent=tma and kernel == "matmul",
        )
    if a_dtype == "float32":
        # Three bf16 summands of each activation are held at once, in registers unless whole warpgroups multiply.
        roomy = target.backend == "hip" or (target.name in ("sm90", "sm100") and m >= 64)
        block_k = min(chosen.block_k, 64 if roomy else 32)
        chosen = replace(chosen, block_m=min(m, 64), block_n=64, block_k=block_k, num_warps=4)
    if kernel == "matmul_mxfp8" and target.name == "sm100":
        chosen = replace(chosen, block_m=128, block_n=128, num_warps=8)
    return replace(chosen, split_k=_split_k(kernel, m, n, k, chosen, target))


def _on_ascend(m: int, eight_bit: bool, group_k: int) -> tuple[int, int, int]:
    """BLOCK_M, BLOCK_N and BLOCK_K on Ascend 910B; that they fit was found by compiling.

    128 × 256 sums fill the cube core's 128 KiB; with steps of 512 they are what Huawei's CATLASS takes for W8A8. Few
    rows leave too few such tiles for the cores. What is scaled inside the sum, or converted, goes by the vector cores,
    which have 192 KiB.
    """
    if not eight_bit:
        return min(m, 128), 128, 128
    if group_k:
        return min(m, 128), 64, 128
    return min(m, 128), 256 if m >= 256 else 128, 512


def _spare(
    chosen: LaunchParameters, kernel: str, n: int, a_dtype: str, target: Target, group_n: int, group_k: int,
    aligned: bool,
) -> LaunchParameters:  # fmt: skip
    """Smaller tiles and steps where addresses, masks and scales would not fit the registers beside the sums.

    Found by compiling (`lowbit kernels compile --models`), not by running.
    """
    groups = bool(group_k and not group_n)
    if not aligned and target.backend != "npu":
        chosen = replace(
            chosen, block_m=min(chosen.block_m, 64), block_n=min(chosen.block_n, 128),
            block_k=min(chosen.block_k, 64), promote_k=min(chosen.promote_k, 64), tma=False,
            persistent=False,
        )  # fmt: skip
        if target.copies_tiles:
            # One tile might be copied and the other not: without stages nothing is copied.
            chosen = replace(chosen, num_stages=1)
    elif n % 16 and target.backend == "cuda" and kernel != "matmul_mxfp8":
        # Results are stored one by one: addresses and masks of a larger tile would not fit the registers.
        chosen = replace(chosen, block_m=min(chosen.block_m, 64), block_n=min(chosen.block_n, 64))
    elif groups and kernel != "matmul_mxfp8":
        # A scale for each column of the tile, and for 8-bit activations for each row: room beside the sums.
        if _eight_bit(a_dtype) or group_k < 64 or target.name in ("sm90", "sm100"):
            chosen = replace(chosen, block_n=min(chosen.block_n, 64))
        if a_dtype in ("float16", "bfloat16") and target.name == "sm90" and chosen.block_m <= 32:
            long = group_k >= 128
            chosen = replace(chosen, block_k=128 if long else 64, block_n=chosen.block_n if long else 32)
    crowded = not aligned or groups
    if not aligned and groups and target.name in ("sm100", "sm120"):
        # With scales and addresses beside them, half as many sums for a thread.
        chosen = replace(chosen, block_n=min(chosen.block_n, 32))
    if a_dtype == "float32" and target.backend == "cuda":
        # Three summands of each activation stand beside the sums.
        chosen = replace(chosen, max_registers=255)
        if crowded and target.name in ("sm90", "sm100"):
            # Addresses and masks or scales of columns find no room. Twice the warps halve what a thread holds; on sm90
            # they make more products of it, and shorter steps fewer.
            more = {"num_warps": 8} if target.name == "sm100" and chosen.block_m == 64 else {"block_k": 32}
            chosen = replace(chosen, **more)
    elif not _eight_bit(a_dtype) and target.name in ("sm90", "sm100", "sm120") and chosen.block_m <= 32:
        # Four programs of four warps fit beside each other with 128; ptxas spills 12 to 36 bytes to fit six.
        chosen = replace(chosen, max_registers=255 if crowded else 128)
    return chosen


def _split_k(kernel: str, m: int, n: int, k: int, chosen: LaunchParameters, target: Target) -> int:
    """Enough programs to fill the cores when there are few tiles and K is long; a power of two."""
    if kernel == "matmul_grouped" or target.backend == "npu":
        return 1
    tiles = -(-m // chosen.block_m) * -(-n // chosen.block_n)
    split, steps = 1, -(-k // chosen.block_k)
    while split < 16 and tiles * split * 2 <= 2 * target.cores and steps // (split * 2) >= 4:
        split *= 2
    return split


def _fit(
    chosen: LaunchParameters,
    n: int,
    k: int,
    a_dtype: str,
    w_dtype: str,
    target: Target,
    group_n: int,
    group_k: int,
) -> LaunchParameters:
    """The same parameters, cut down to the problem's shape, its scale blocks and the memory."""
    block_n = min(chosen.block_n, max(16, _next_power_of_2(n)))
    block_k = min(chosen.block_k, max(32, _next_power_of_2(k)))
    if group_n:
        block_n = min(block_n, _power_of_2(group_n))
    if group_k:
        block_k = min(block_k, _power_of_2(group_k))
    size = {"float32": 4, "float16": 2, "bfloat16": 2}
    tiles = [block_k * chosen.block_m * size.get(a_dtype, 1), block_k * block_n * size.get(w_dtype, 1)]
    stages = max(1, min(chosen.num_stages, target.shared_memory // sum(tiles)))
    warps = chosen.num_warps
    if target.copies_tiles:
        # 4 bytes for each lane, of both tiles alike.
        warps = min(warps, max(1, min(tiles) // (4 * target.warp_size)))
    return replace(
        chosen, block_n=block_n, block_k=block_k, num_stages=stages, num_warps=warps,
        promote_k=min(chosen.promote_k, block_k),
    )  # fmt: skip
