"""What a format is: names, dtypes and config on disk, for one module at a time.

A format is stateless. It says which tensors hold a quantized module (`tensors`), what
config.json says about them (`config`), and finds them again (`read`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from lowbit.errors import InputError
from lowbit.granularity import scale_shape
from lowbit.scheme import Scheme, TensorSpec

Content = Literal["codes", "packed", "scale", "shape", "input_scale", "input_zero_point"]
"""What a tensor holds: `codes` as they are; `packed`: four int8 codes + 128 to an int32,
little end first; `scale` of the weight; `shape` [2] of a packed weight."""


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

    shape: tuple[int, int]
    """[N, K] of the weight, unpacked."""
    scheme: Scheme
    names: Mapping[Content, str]
    """Content → full tensor name. `codes` or `packed`, and `scale`, are always there."""

    @property
    def spec(self) -> TensorSpec:
        assert self.scheme.weights is not None  # a stored module is quantized by definition
        return self.scheme.weights

    @property
    def weight(self) -> str:
        return self.names["packed"] if "packed" in self.names else self.names["codes"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """All that a format needs to write its config."""

    modules: Mapping[str, Scheme]
    """Quantized modules."""
    ignored: tuple[str, ...]
    """Modules with a matrix weight that stay in float."""
    kv_cache: TensorSpec | None = None
    """How the KV cache is quantized, where `k_scale` and `v_scale` are stored."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The model's own config.json."""


class Format(Protocol):
    """See the module's docstring."""

    name: str
    loaded_by: str
    """Engines that read it, for people."""

    def refuse(self, scheme: Scheme, shape: tuple[int, ...], fused: bool) -> str:
        """Why a weight [N, K] under `scheme` cannot be held, or "". `fused`: engines join it with others."""
        ...

    def holds(self, scheme: Scheme) -> bool:
        """Whether any weight can be held under `scheme`."""
        ...

    def tensors(self, scheme: Scheme, shape: tuple[int, int]) -> tuple[Stored, ...]:
        """The tensors of a module, the codes first."""
        ...

    def config(self, layout: Layout) -> dict[str, Any]:
        """`quantization_config` for config.json."""
        ...

    def read(self, config: Mapping[str, Any], tensors: Mapping[str, Info]) -> dict[str, StoredModule]:
        """Module name → what is stored, given a `quantization_config` and the headers.

        InputError for a quantized weight without a scale, or with one of the wrong shape.
        """
        ...


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
