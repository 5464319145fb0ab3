"""Calibration methods: named combinations of transforms, ranges and roundings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any, Literal

from lowbit.calibration.gptq import RoundingOptions
from lowbit.calibration.observers import RANGE_METHODS
from lowbit.errors import InputError
from lowbit.scheme import Scheme, nearest

JOINTS = ("norm", "v-o", "up-down")
_SWITCHES = (
    "else_smooth", "rotate_heads", "online_hadamard", "compensate", "bias_correction", "propagate",
)  # fmt: skip


def _is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


@dataclass(frozen=True, kw_only=True)
class Method:
    """What calibration does to a layer, in this order."""

    name: str
    summary: str = ""
    rotate: Literal["none", "hadamard", "orthogonal"] = "none"
    """Rotate the residual stream, folded into the weights."""
    else_smooth: bool = False
    """Where the residual stream cannot be rotated, smooth its norms instead (see `without_rotation`)."""
    not_rotated: str = ""
    """Why it was smoothed instead."""
    rotate_heads: bool = False
    """Rotate every value head, folded into v_proj and o_proj."""
    online_hadamard: bool = False
    """Rotate the input of down_proj while running. lowbit's modules do (config.json names them); engines do not."""
    smooth: float | Literal["none", "search"] = "none"
    """SmoothQuant's α, or searched per joint."""
    smooth_joints: tuple[str, ...] = JOINTS
    """Where scales may move: norm → readers, v → o, up → down."""
    rounding: RoundingOptions = field(default_factory=lambda: RoundingOptions(rounding="nearest"))
    compensate: bool = False
    """Aim the rounding at weights that make up for the rounding of activations."""
    activation_range: Literal["absmax", "moving-average", "percentile", "mse", "entropy", "output"] = "absmax"
    """How static activation scales are chosen. `output`: the least output error on sampled tokens."""
    percentile: float = 99.99
    dynamic_below: float | None = None
    """Modules whose outputs keep fewer dB than this under static activations are left dynamic; None: never.
    Needs a searched smoothing or `activation_range="output"`, and a scheme with a dynamic twin."""
    bias_correction: bool = False
    """Put the mean output error into biases that exist."""
    propagate: bool = True
    """The next layer sees this one quantized."""
    seed: int = 0
    """Of the random rotation."""

    def __post_init__(self) -> None:
        for key, allowed in (
            ("rotate", ("none", "hadamard", "orthogonal")),
            ("activation_range", (*RANGE_METHODS, "output")),
        ):
            self._expect(getattr(self, key) in allowed, key, f"one of {', '.join(allowed)}")
        for key in _SWITCHES:
            self._expect(isinstance(getattr(self, key), bool), key, "true or false")
        joints, smooth, below = self.smooth_joints, self.smooth, self.dynamic_below
        self._expect(
            isinstance(joints, tuple) and all(j in JOINTS for j in joints),
            "smooth_joints", f"a list of {', '.join(JOINTS)}",
        )  # fmt: skip
        self._expect(
            smooth in ("none", "search") or (_is_number(smooth) and 0.0 <= smooth <= 1.0),  # type: ignore[operator]
            "smooth", "none, search or 0 ≤ α ≤ 1",
        )  # fmt: skip
        self._expect(
            _is_number(self.percentile) and 50.0 < self.percentile <= 100.0,
            "percentile",
            "a number in (50, 100]",
        )
        self._expect(below is None or _is_number(below), "dynamic_below", "a number of dB or null")

    def _expect(self, right: bool, key: str, what: str) -> None:
        if not right:
            raise InputError(f"method {self.name}: expected {what} as {key}, found {getattr(self, key)!r}")

    @property
    def smooths(self) -> bool:
        return self.smooth != "none"

    def needs_data(self, scheme: Scheme) -> bool:
        """False for transforms and roundings that look at weights alone."""
        rounds = self.rounding.rounding != "nearest"
        return self.smooths or rounds or self.compensate or self.bias_correction or scheme.needs_calibration

    def has_effect(self, scheme: Scheme, *, biased: bool = True) -> bool:
        """False where a calibration would hold nothing: a conversion by itself rounds the same.

        `biased`: there is a bias to correct.
        """
        of_bias = self.bias_correction and biased
        transforms = self.rotate != "none" or self.rotate_heads or self.online_hadamard
        others = transforms or self.rounding.scale != "absmax"
        return others or of_bias or replace(self, bias_correction=False).needs_data(scheme)

    def without_effect(self, scheme: Scheme) -> InputError:
        """What is wrong where it has none."""
        corrects = " and corrects biases" if self.bias_correction else ""
        return InputError(
            f"expected something to calibrate, found none: {self.name} chooses ranges of static activations{corrects}, "
            "of which there are none, and rounds weights as a conversion does by itself; convert to "
            f"{scheme.name} without a calibration (`lowbit convert SRC OUT --scheme {scheme.name}`), or give another "
            "method: best"
        )

    def describe(self) -> str:
        """One line that says what it does."""
        parts = []
        if self.rotate != "none":
            parts.append(f"{self.rotate} rotation of the residual stream")
        if self.rotate_heads:
            parts.append("value heads rotated")
        if self.online_hadamard:
            parts.append("online Hadamard before down_proj")
        if self.smooths:
            alpha = "searched" if self.smooth == "search" else f"{self.smooth}"
            parts.append(f"SmoothQuant (α {alpha}) at {', '.join(self.smooth_joints)}")
        if self.rounding.rounding != "nearest":
            parts.append(f"{self.rounding.rounding} rounding")
        if self.rounding.scale != "absmax":
            parts.append(f"{self.rounding.scale} weight scales")
        if self.activation_range != "absmax":
            parts.append(f"{self.activation_range} activation ranges")
        if self.dynamic_below is not None:
            parts.append(f"modules that keep less than {self.dynamic_below:g} dB left dynamic")
        if self.bias_correction:
            parts.append("bias correction")
        if self.not_rotated:
            parts.append(f"not rotated: {self.not_rotated}")
        return "; ".join(parts) or "plain rounding"

    def without_rotation(self, reason: str) -> Method:
        """What comes nearest for a model whose residual stream cannot be rotated, for `reason`."""
        return replace(
            self, name=self.name.replace("rotate", "smoothquant"), rotate="none", rotate_heads=False,
            smooth_joints=JOINTS, else_smooth=False, not_rotated=reason,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """As recipes and manifests store it; `from_dict` reads it back."""
        out = asdict(self)
        out.pop("summary")
        out["smooth_joints"] = list(self.smooth_joints)
        return out

    @classmethod
    def from_dict(cls, data: dict[str, Any] | str, *, best: Method | None = None) -> Method:
        """A preset's name, or a mapping whose `name` is a preset to start from and whose other keys override it.

        `best`: what that name means. Without a name, with one that is nothing like a preset's, or with all keys, a
        mapping is a method of its own. Raises InputError naming unknown keys and misspelt names.
        """
        if isinstance(data, str):
            return best if best is not None and data == "best" else get_method(data)
        known = {f.name for f in fields(cls)} - {"summary"}
        if unknown := sorted(set(data) - known):
            raise InputError(f"method: unknown keys {unknown}; expected some of {sorted(known)}")
        changes = dict(data)
        name = changes.pop("name", "custom")
        if not isinstance(name, str):
            raise InputError(f"method: expected a name, found {name!r}")
        close = get_close_matches(_key(name), [*METHODS, "best"], cutoff=0.75)
        own = not close or changes.keys() | {"name"} == known
        base = cls(name=name) if own else cls.from_dict(name, best=best)
        if "rounding" in changes:
            rounding = changes["rounding"]
            if not isinstance(rounding, str | Mapping):
                raise InputError(f"method.rounding: expected a name or a mapping, found {rounding!r}")
            rounding = {"rounding": rounding} if isinstance(rounding, str) else dict(rounding)
            allowed = {f.name for f in fields(RoundingOptions)}
            if unknown := sorted(set(rounding) - allowed):
                raise InputError(
                    f"method.rounding: unknown keys {unknown}; expected some of {sorted(allowed)}"
                )
            changes["rounding"] = replace(base.rounding, **rounding)
        if isinstance(joints := changes.get("smooth_joints"), list):
            changes["smooth_joints"] = tuple(joints)
        return replace(base, **changes)


_GPTQ = RoundingOptions(rounding="gptq")

_PRESETS = (
    Method(name="absmax", summary="plain rounding; static ranges cover everything seen"),
    Method(name="moving-average", activation_range="moving-average", summary="static ranges: mean of batch ranges"),
    Method(name="percentile", activation_range="percentile", summary="static ranges leave the rarest values out"),
    Method(
        name="mse", activation_range="mse", rounding=RoundingOptions(rounding="nearest", scale="mse"),
        summary="ranges of least squared error, weights and static activations",
    ),
    Method(name="entropy", activation_range="entropy", summary="static ranges of least KL divergence"),
    Method(name="smoothquant", smooth=0.5, summary="SmoothQuant, α 0.5"),
    Method(name="smoothquant-search", smooth="search", summary="SmoothQuant, α searched per joint"),
    Method(name="gptq", rounding=_GPTQ, summary="GPTQ"),
    Method(
        name="descent", rounding=RoundingOptions(rounding="coordinate-descent"),
        summary="coordinate descent on the layer's output error",
    ),
    Method(name="smoothquant-gptq", smooth="search", rounding=_GPTQ, summary="searched SmoothQuant, then GPTQ"),
    Method(
        name="rotate", rotate="hadamard", rotate_heads=True, propagate=False,
        summary="rotations folded into the weights; needs no data",
    ),
    Method(
        name="rotate-gptq", rotate="hadamard", rotate_heads=True, smooth="search", smooth_joints=("up-down",),
        rounding=_GPTQ, summary="rotations, up→down smoothed, GPTQ: all folded into the weights",
    ),
    Method(
        name="rotate-gptq-static", rotate="hadamard", rotate_heads=True, smooth="search", smooth_joints=("up-down",),
        rounding=_GPTQ, activation_range="absmax", dynamic_below=30.0,
        summary="as rotate-gptq, static ranges; what keeps less than 30 dB (mostly down_proj) stays dynamic",
    ),
    Method(
        name="rotate-gptq-online", rotate="hadamard", rotate_heads=True, online_hadamard=True, rounding=_GPTQ,
        summary="rotations, an online Hadamard before down_proj, GPTQ",
    ),
)  # fmt: skip

METHODS: dict[str, Method] = {m.name: m for m in _PRESETS}


def _key(name: str) -> str:
    return name.strip().lower().replace("_", "-")


def get_method(name: str) -> Method:
    """The preset of that name. Raises InputError naming the nearest."""
    key = _key(name)
    if key not in METHODS:
        raise InputError(
            f"unknown method {name!r}: expected best or one of {', '.join(METHODS)}; "
            f"did you mean {nearest(key, list(METHODS))}?"
        )
    return METHODS[key]


def best_method(scheme: Scheme) -> Method:
    """The recommended combination for a scheme. Its `name` and `describe()` say what it is.

    Where it rotates, a model that cannot be rotated is smoothed instead.

    Rotation makes activations Gaussian, which integers like; a float format's codes are denser near
    zero and lose by it, so float schemes keep their outliers.
    """
    if scheme.weights is None:
        raise InputError(f"expected a scheme that quantizes weights, found {scheme.name}")
    if scheme.activations is None:
        return METHODS["gptq"]
    if scheme.weights.dtype.kind != "int":
        return replace(METHODS["gptq"], activation_range="absmax")
    if scheme.needs_calibration:
        return replace(METHODS["rotate-gptq-static"], else_smooth=True)
    return replace(METHODS["rotate-gptq"], else_smooth=True)
