"""What is quantized to what: one TensorSpec for weights and one for activations, and the presets."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Literal

from lowbit.dtypes import E4M3FN, INT8, DType
from lowbit.errors import InputError
from lowbit.granularity import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, PerToken


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """How one tensor is quantized: x ≈ (codes − zero_point) · scale."""

    dtype: DType
    """Number format of the codes."""
    granularity: Granularity
    """Which elements share a scale."""
    symmetric: bool = True
    """False: there is a zero point (int8 only)."""
    dynamic: bool = False
    """True: scales are computed while running (activations only); False: stored."""
    scale: Literal["float32", "e8m0", "float32-power-of-2", "e4m3"] = "float32"
    """Number format of the scales. `float32-power-of-2` is HF's `scale_fmt: ue8m0`; `e4m3`, of sources only, NVFP4's
    beside one float32 for the whole tensor."""

    def __post_init__(self) -> None:
        if not self.symmetric and self.dtype.kind != "int":
            raise ValueError(f"expected symmetric=True for {self.dtype}: a float format has no zero point")

    def __str__(self) -> str:
        words = [str(self.dtype), str(self.granularity)]
        if not self.symmetric:
            words.append("asymmetric")
        if self.dynamic:
            words.append("dynamic")
        if self.scale != "float32":
            words.append(f"{self.scale} scales")
        return ", ".join(words)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A named pair of specs. `weights=None` means: stored in `float_dtype`, not quantized."""

    name: str
    weights: TensorSpec | None
    activations: TensorSpec | None = None
    """None: activations stay in the model's dtype (weight-only)."""
    float_dtype: Literal["bfloat16", "float16"] | None = None
    """For the dequantizing schemes `bf16` and `fp16`: what every floating tensor becomes."""
    alias: str | None = None
    """The compressed-tensors preset of the same meaning."""
    summary: str = ""

    @property
    def needs_calibration(self) -> bool:
        """True when activation scales are stored, so that they must be measured on data first."""
        return self.activations is not None and not self.activations.dynamic

    def with_group_size(self, size: int) -> Scheme:
        """The same scheme with weights grouped by `size` along K (weight-only schemes)."""
        if self.weights is None or self.activations is not None:
            raise ValueError(
                f"expected a weight-only scheme for a group size, found {self.name}; use int8-weight-only"
            )
        return replace(self, weights=replace(self.weights, granularity=PerGroup(size)))


def _int8(granularity: Granularity, **kw) -> TensorSpec:
    return TensorSpec(dtype=INT8, granularity=granularity, **kw)


def _fp8(granularity: Granularity, **kw) -> TensorSpec:
    return TensorSpec(dtype=E4M3FN, granularity=granularity, **kw)


_PRESETS = (
    Scheme(
        name="int8", alias="W8A8", summary="8-bit integers, a scale per output channel and per token",
        weights=_int8(PerChannel()), activations=_int8(PerToken(), dynamic=True),
    ),
    Scheme(
        name="int8-static", summary="as int8, with calibrated activation scales, one per tensor",
        weights=_int8(PerChannel()), activations=_int8(PerTensor()),
    ),
    Scheme(
        name="int8-static-asym", summary="as int8-static, activations with a zero point",
        weights=_int8(PerChannel()), activations=_int8(PerTensor(), symmetric=False),
    ),
    Scheme(
        name="int8-block", summary="8-bit integers, a scale per 128×128 block and per token's 128-group",
        weights=_int8(PerBlock(128, 128)), activations=_int8(PerGroup(128), dynamic=True),
    ),
    Scheme(
        name="int8-weight-only", alias="W8A16", summary="8-bit integer weights, activations left as they are",
        weights=_int8(PerGroup(128)),
    ),
    Scheme(
        name="fp8", alias="FP8_DYNAMIC", summary="E4M3, a scale per output channel and per token",
        weights=_fp8(PerChannel()), activations=_fp8(PerToken(), dynamic=True),
    ),
    Scheme(
        name="fp8-static", alias="FP8", summary="E4M3, one scale per weight, calibrated activation scales",
        weights=_fp8(PerTensor()), activations=_fp8(PerTensor()),
    ),
    Scheme(
        name="fp8-block", alias="FP8_BLOCK", summary="E4M3, a scale per 128×128 block (DeepSeek)",
        weights=_fp8(PerBlock(128, 128)), activations=_fp8(PerGroup(128), dynamic=True),
    ),
    Scheme(
        name="mxfp8", alias="MXFP8", summary="OCP microscaling: E4M3 in groups of 32, power-of-two scales",
        weights=_fp8(PerGroup(32), scale="e8m0"), activations=_fp8(PerGroup(32), dynamic=True, scale="e8m0"),
    ),
    Scheme(name="bf16", weights=None, float_dtype="bfloat16", summary="dequantize to bfloat16"),
    Scheme(name="fp16", weights=None, float_dtype="float16", summary="dequantize to float16"),
)  # fmt: skip

SCHEMES: dict[str, Scheme] = {s.name: s for s in _PRESETS}
_ALIASES = {s.alias.lower(): s for s in _PRESETS if s.alias}


def nearest(word: str, names: list[str]) -> str:
    """`'a', 'b'`: the names nearest to a misspelt word, or all of them."""
    close = difflib.get_close_matches(word.lower(), names, n=3, cutoff=0.4)
    return ", ".join(repr(n) for n in close or names)


def scheme_of(scheme: Scheme | str) -> Scheme:
    """A scheme, or the preset of that name (see `get_scheme`)."""
    return scheme if isinstance(scheme, Scheme) else get_scheme(scheme)


def get_scheme(name: str) -> Scheme:
    """The preset of that name, or of that compressed-tensors preset name, in any case.

    One pair differs in case alone: `fp8` is ours, dynamic, and `FP8` the library's name for
    `fp8-static`. Raises InputError (a ValueError) naming the nearest presets.
    """
    if not isinstance(name, str):
        raise InputError(f"expected the name of a scheme, found {name!r}; one of {', '.join(SCHEMES)}")
    for preset in _PRESETS:
        if name.strip() == preset.alias:
            return preset
    key = name.strip().lower().replace("_", "-")
    if key in SCHEMES:
        return SCHEMES[key]
    if key.replace("-", "_") in _ALIASES:
        return _ALIASES[key.replace("-", "_")]
    raise InputError(
        f"unknown scheme {name!r}: expected one of {', '.join(SCHEMES)}; "
        f"did you mean {nearest(key, list(SCHEMES))}?"
    )
