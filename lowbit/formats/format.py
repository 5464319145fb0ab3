"""What a format is: names, dtypes and config on disk, for one module at a time.

A format is stateless. It says which tensors hold a quantized module (`tensors`), what
config.json (`config`) or files of the format's own (`files`) say about them, and finds them
again (`read`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from lowbit.dtypes import INT8
from lowbit.errors import InputError
from lowbit.granularity import scale_shape
from lowbit.scheme import Scheme, TensorSpec

Content = Literal[
    "codes",
    "packed",
    "scale",
    "global_scale",
    "global_divisor",
    "shape",
    "input_scale",
    "input_zero_point",
    "offset",
    "deq_scale",
    "quant_bias",
]
"""What a tensor holds: `codes` as they are; `packed`: four int8 codes + 128 to an int32,
little end first; `scale` of the weight; `global_scale` and `global_divisor`: one number that all values are multiplied
or divided by after their `scale`, as NVFP4 has it; `shape` [2] of a packed weight; `offset`: zero points of
the weight in float, which are 0 here. `deq_scale` = `input_scale` · `scale`, and `quant_bias` in
int32: a static product is (Σ x codes · weight codes + quant_bias) · deq_scale."""

Joined = Literal["", "fused", "experts"]
"""How engines run a weight: alone, joined with others into one matrix, or as one of a mixture's experts."""


class Info(Protocol):
    """What a header says of a tensor."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor of a quantized module."""

    suffix: str
    """Appended to the module's name: `.weight`, `.weight_scale`, …"""
    dtype: str
    """As safetensors names it."""
    shape: tuple[int, ...]
    content: Content


@dataclass(frozen=True, kw_only=True)
class StoredModule:
    """A quantized module found in a checkpoint."""

    shape: tuple[int, ...]
    """[N, K] of the weight, unpacked; [E, N, K] of all experts of a layer in one tensor (`stacked`)."""
    scheme: Scheme
    names: Mapping[Content, str]
    """Content → full tensor name. `codes` or `packed`, and `scale` or `deq_scale`, are always there."""
    format: str
    """Name of the format that it is in."""

    @property
    def spec(self) -> TensorSpec:
        assert self.scheme.weights is not None  # a stored module is quantized by definition
        return self.scheme.weights

    @property
    def stacked(self) -> bool:
        """Whether it is all experts of a layer: in float it is one parameter [E, K, N] of the module's own name."""
        return len(self.shape) == 3

    @property
    def weight(self) -> str:
        return self.names["packed"] if "packed" in self.names else self.names["codes"]

    @property
    def scale(self) -> str:
        """The tensor that the weight's scale is read from."""
        return self.names["scale"] if "scale" in self.names else self.names["deq_scale"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """All that a format needs to write its config."""

    modules: Mapping[str, Scheme]
    """Quantized modules."""
    ignored: tuple[str, ...]
    """Modules with a matrix weight that stay in float."""
    tensors: tuple[str, ...] = ()
    """Every tensor of the checkpoint."""
    kv_cache: TensorSpec | None = None
    """How the KV cache is quantized, where scales of keys and values are stored; per channel: one scale per head, in
    groups of 1: one per channel of a head."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The model's own config.json."""


QUANTIZATION_KEYS = ("quantization_config", "compression_config")


def configs_in(config: Any) -> Iterator[dict[str, Any]]:
    """A model's config.json and the configs inside it (`text_config`, `llm_config`, …), the outer ones first."""
    if isinstance(config, dict):
        yield config
        for key, value in config.items():
            if key not in QUANTIZATION_KEYS:
                yield from configs_in(value)


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `quantization_config` of a model's config.json, also where it lies in `text_config` or another config inside
    it; {} if none."""
    for holder in configs_in(config):
        for key in QUANTIZATION_KEYS:
            if isinstance(holder.get(key), dict):
                return holder[key]
    return {}


def rotated_inputs(config: Mapping[str, Any]) -> dict[str, int]:
    """Modules of a checkpoint whose weights are rotated for inputs that lowbit's modules rotate while running (online
    Hadamard), by its config.json → columns per block; {} if none."""
    own = config.get("lowbit")
    found = own.get("online_hadamard") if isinstance(own, dict) else None
    return found if isinstance(found, dict) else {}


class Format(Protocol):
    """See the module's docstring."""

    name: str
    """What users call it."""
    quant_method: str
    """What its `quantization_config` calls it."""

    def refuse(self, scheme: Scheme, shape: tuple[int, ...], joined: Joined) -> str:
        """Why a weight [N, K] under `scheme` cannot be held, or ""."""
        ...

    def holds(self, scheme: Scheme) -> bool:
        """Whether any weight can be held under `scheme`, if need be with a scale per channel instead."""
        ...

    def instead(self, scheme: Scheme) -> str:
        """What to do about a scheme that is not held, where this format's engines know another way; else ""."""
        ...

    def left_in_float(self, modules: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
        """Modules that its engines want in float → why. `config` is the model's config.json."""
        ...

    def tensors(
        self, scheme: Scheme, shape: tuple[int, int], float_dtype: str = "BF16"
    ) -> tuple[Stored, ...]:
        """The tensors of a module, the codes first. `float_dtype`: what the model is in where it is in float."""
        ...

    def kv_cache_names(self, scale: str) -> tuple[str, str | None]:
        """`….k_scale` or `….v_scale` → (what it is called, what its zero points are, where it has them)."""
        ...

    def config(self, layout: Layout) -> dict[str, Any] | None:
        """`quantization_config` for config.json; None: it has none. InputError for what engines would not load."""
        ...

    def files(self, layout: Layout) -> dict[str, dict[str, Any]]:
        """JSON files of its own, by name."""
        ...

    def read(self, config: Mapping[str, Any], tensors: Mapping[str, Info]) -> dict[str, StoredModule]:
        """Module name → what is stored, given a `quantization_config` and the headers.

        InputError for a quantized weight without a scale, or with one of the wrong shape.
        """
        ...


class ConfigOnly:
    """Base of the formats that need no file beside config.json, and no module in float, nor names of their own for
    scales of a KV cache."""

    def kv_cache_names(self, scale: str) -> tuple[str, str | None]:
        return scale, None

    def instead(self, scheme: Scheme) -> str:
        return ""

    def left_in_float(self, modules: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
        return {}

    def files(self, layout: Layout) -> dict[str, dict[str, Any]]:
        return {}


def require_fp8_cache(layout: Layout, name: str) -> None:
    """InputError where a calibration has scales for a KV cache of INT8, which a format's engines would take for FP8."""
    if layout.kv_cache is not None and layout.kv_cache.dtype is INT8:
        raise InputError(
            f"the {name} format: expected a KV cache of FP8, found scales of INT8 in the calibration; calibrate with "
            "--kv-cache fp8"
        )


def check_scale(
    module: str, name: str, found: tuple[int, ...], shape: tuple[int, int], spec: TensorSpec
) -> None:
    """InputError unless a scale has the shape that the spec asks for."""
    expected = scale_shape(shape, spec.granularity)
    # A per-tensor scale is written as [] by some and [1] by others.
    if found != expected and not (expected == (1,) and found in ((), (1, 1))):
        raise InputError(
            f"{name}: expected a scale of shape {list(expected)} for {module}.weight {list(shape)} ({spec}), "
            f"found {list(found)}; config and tensors do not belong together: fetch the checkpoint again"
        )


def missing_scale(weight: str, scale: str, dtype: str) -> InputError:
    """The error for quantized codes that nothing scales; reading such a scale as 1 ruins a model silently."""
    return InputError(
        f"{weight}: expected a scale named {scale} beside {dtype} codes, found none in any shard; "
        "the checkpoint is incomplete: fetch it again"
    )
