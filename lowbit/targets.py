"""Accelerators: what they multiply natively, their memory, bandwidth and peak, and what suits them.

Figures are the vendors' public ones for dense products; None where there is none, or none that
is certain. They serve estimates and defaults: what a kernel really reaches is in the benchmarks.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from lowbit.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One card (or `cpu`)."""

    name: str
    """As the command line takes it: `h100`."""
    title: str
    arch: str
    """Its name in lowbit.kernels.targets (`sm90`), or `cpu`."""
    memory_gb: int | None
    bandwidth: int | None
    """GB/s of its memory."""
    bf16: int | None
    """TFLOP/s."""
    int8: int | None
    """TOP/s; None where int8 is not multiplied natively."""
    fp8: int | None
    """TFLOP/s; None where fp8 is not multiplied natively."""
    scheme: str
    """The scheme to take when nothing is said: the best that the card multiplies natively."""
    format: str = "compressed-tensors"
    """The checkpoint format to take when nothing is said: one that its engines read."""

    def native(self, weight_dtype: str) -> bool:
        """Whether `int8` or `e4m3fn` is multiplied without being decoded first."""
        if self.arch == "cpu":
            return weight_dtype == "int8"
        return (self.int8 if weight_dtype == "int8" else self.fp8) is not None

    def peak(self, weight_dtype: str) -> int | None:
        """TFLOP/s (or TOP/s) of W8A8 products; of bf16 where the dtype is not native."""
        known = {"int8": self.int8, "e4m3fn": self.fp8}.get(weight_dtype)
        return known if known is not None else self.bf16


def _card(name: str, title: str, arch: str, memory: int, bandwidth: int, bf16: int, int8: int | None,
          fp8: int | None, scheme: str, format: str = "compressed-tensors") -> Accelerator:  # fmt: skip
    return Accelerator(
        name=name, title=title, arch=arch, memory_gb=memory, bandwidth=bandwidth, bf16=bf16, int8=int8, fp8=fp8,
        scheme=scheme, format=format,
    )  # fmt: skip


ACCELERATORS: dict[str, Accelerator] = {
    a.name: a
    for a in (
        _card("a10", "NVIDIA A10", "sm86", 24, 600, 125, 250, None, "int8"),
        _card("a100", "NVIDIA A100 80GB SXM", "sm80", 80, 2039, 312, 624, None, "int8"),
        _card("a800", "NVIDIA A800 80GB SXM", "sm80", 80, 2039, 312, 624, None, "int8"),
        _card("l4", "NVIDIA L4", "sm89", 24, 300, 121, 242, 242, "fp8"),
        _card("l40s", "NVIDIA L40S", "sm89", 48, 864, 362, 733, 733, "fp8"),
        _card("h20", "NVIDIA H20", "sm90", 96, 4000, 148, 296, 296, "fp8"),
        _card("h100", "NVIDIA H100 SXM", "sm90", 80, 3350, 989, 1979, 1979, "fp8"),
        _card("h800", "NVIDIA H800 SXM", "sm90", 80, 3350, 989, 1979, 1979, "fp8"),
        _card("h200", "NVIDIA H200", "sm90", 141, 4800, 989, 1979, 1979, "fp8"),
        _card("b200", "NVIDIA B200", "sm100", 180, 8000, 2250, 4500, 4500, "fp8"),
        _card("mi300x", "AMD Instinct MI300X", "gfx942", 192, 5300, 1307, 2615, 2614, "fp8"),
        _card("mi325x", "AMD Instinct MI325X", "gfx942", 256, 6000, 1307, 2615, 2614, "fp8"),
        _card("mi355x", "AMD Instinct MI355X", "gfx950", 288, 8000, 2500, 5000, 5000, "fp8"),
        # vLLM-Ascend refuses compressed-tensors of DeepSeek's latent attention.
        _card("ascend910b", "Ascend 910B2", "ascend910b", 64, 1600, 354, 708, None, "int8", "ascend"),
        Accelerator(
            name="cpu", title="x86-64 or other processor", arch="cpu", memory_gb=None, bandwidth=None,
            bf16=None, int8=None, fp8=None, scheme="int8",
        ),
    )
}  # fmt: skip

_ALIASES = {
    "910b": "ascend910b",
    "ascend-910b": "ascend910b",
    "910b2": "ascend910b",
    "ascend910b2": "ascend910b",
}


def advice(accelerator: Accelerator, weight_dtype: str | None, nbytes: int) -> tuple[str, list[str]]:
    """(how weights of `nbytes` bytes and this dtype (`int8`, `e4m3fn`, None: not quantized) run there, warnings)."""
    parts, warnings = [], []
    if weight_dtype is not None:
        words = {"int8": "int8", "e4m3fn": "fp8"}[weight_dtype]
        peak = accelerator.peak(weight_dtype)
        if accelerator.native(weight_dtype):
            ratio = f", {peak / accelerator.bf16:.1f} × its bf16" if peak and accelerator.bf16 else ""
            unit = "TOP/s" if weight_dtype == "int8" else "TFLOP/s"
            parts.append(f"{words} is multiplied natively" + (f" ({peak} {unit}{ratio})" if peak else ""))
        else:
            parts.append(f"{words} is not multiplied natively")
            warnings.append(
                f"{accelerator.title} does not multiply {words}: engines decode the weights to bf16, which saves "
                f"memory but not arithmetic; {accelerator.scheme} suits it better"
            )
    if accelerator.memory_gb:
        cards = max(1, -(-nbytes // (accelerator.memory_gb * 10**9)))
        parts.append(
            f"{cards} of {accelerator.memory_gb} GB hold{'s' * (cards == 1)} the {nbytes / 1e9:.3g} GB of weights, "
            "the KV cache not counted"
        )
    return f"{accelerator.title}: {'; '.join(parts) or 'any memory'}", warnings


def get_accelerator(name: str) -> Accelerator:
    """The accelerator of that name, in any case. Raises InputError naming the nearest."""
    if not isinstance(name, str):
        raise InputError(f"expected the name of a target, found {name!r}; one of {', '.join(ACCELERATORS)}")
    key = name.strip().lower().replace(" ", "").replace("_", "-")
    key = _ALIASES.get(key, key)
    if key in ACCELERATORS:
        return ACCELERATORS[key]
    near = difflib.get_close_matches(key, list(ACCELERATORS), n=3, cutoff=0.4)
    raise InputError(
        f"unknown target {name!r}: expected one of {', '.join(ACCELERATORS)}"
        + (f"; did you mean {' or '.join(near)}?" if near else "")
    )
