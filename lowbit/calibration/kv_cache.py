"""Scales of a quantized KV cache: what attention receives, keys after the rotary embedding, is observed.

Works through transformers' table of attention functions, so for every architecture that uses it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lowbit.calibration.observers import HistogramObserver, RangeObserver, make_observer, observed_range
from lowbit.dtypes import DTYPES
from lowbit.errors import InputError
from lowbit.formats import ascend_kv_cache, kv_cache_scheme
from lowbit.granularity import Granularity, PerChannel, PerGroup, PerTensor
from lowbit.quantize import dequantize, quantize_with, scale_from_range
from lowbit.scheme import TensorSpec

_NAME = "lowbit_kv_cache"

Each = Literal["layer", "head", "channel"]
_KINDS: dict[str, tuple[str, Each]] = {
    "fp8": ("e4m3fn", "layer"), "int8": ("int8", "layer"), "fp8-head": ("e4m3fn", "head"),
    "int8-head": ("int8", "head"), "int8-channel": ("int8", "channel"),
}  # fmt: skip
# Of keys and values [B, heads, T, D]: how many dimensions have scales of their own, and the order with these first.
_ORDERS: dict[Each, tuple[int, tuple[int, ...]]] = {
    "layer": (0, (0, 1, 2, 3)), "head": (1, (1, 0, 2, 3)), "channel": (2, (1, 3, 0, 2)),
}  # fmt: skip

KEYS = ("k_proj", "qkv_proj")
"""Linears that make the keys of an attention whose cache holds them as they are; Phi-3 has one for all three."""


@dataclass(frozen=True, kw_only=True)
class KVCache:
    """How keys and values are stored: symmetric, static scales."""

    dtype: str
    """`e4m3fn` or `int8`."""
    each: Each = "layer"
    """What has a scale of its own: all keys of a layer, those of a KV head, or a channel of a head."""
    method: str = "absmax"
    """A range method of `observers`."""

    def __post_init__(self) -> None:
        if self.dtype not in ("e4m3fn", "int8"):
            raise InputError(f"expected a KV cache of e4m3fn or int8, found {self.dtype!r}")
        if self.each not in get_args(Each) or (self.each == "channel" and self.dtype != "int8"):
            raise InputError(
                f"expected scales for each layer, head, or of int8 channel, found {self.each!r} of {self.dtype}"
            )

    @property
    def spec(self) -> TensorSpec:
        """Of values of which each row shares a scale."""
        return TensorSpec(dtype=DTYPES[self.dtype], granularity=PerChannel())

    @property
    def stored(self) -> TensorSpec:
        """As formats are told of it (see `Layout.kv_cache`)."""
        each: dict[str, Granularity] = {"layer": PerTensor(), "head": PerChannel(), "channel": PerGroup(1)}
        return TensorSpec(dtype=DTYPES[self.dtype], granularity=each[self.each])

    @classmethod
    def parse(cls, text: str) -> KVCache:
        """`fp8`, `int8`, `fp8-head`, `int8-head` or `int8-channel`."""
        if text not in _KINDS:
            raise InputError(
                f"expected a KV cache of fp8, int8, fp8-head, int8-head or int8-channel, found {text!r}"
            )
        dtype, each = _KINDS[text]
        return cls(dtype=dtype, each=each)

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> KVCache | None:
        """As a config.json's `kv_cache_scheme` has it, or msModelSlim's description.

        None where it asks for none, or for another kind.
        """
        if ascend_kv_cache(config):
            return cls(dtype="int8", each="channel")
        scheme = kv_cache_scheme(config) or {}
        dtype = {"float": "e4m3fn", "int": "int8"}.get(str(scheme.get("type")))
        strategy = scheme.get("strategy")
        if dtype is None or scheme.get("num_bits") != 8 or strategy not in ("tensor", "attn_head"):
            return None
        return cls(dtype=dtype, each="head" if strategy == "attn_head" else "layer")

    def as_rows(self, x: Tensor) -> Tensor:
        """Keys or values [B, heads, T, D] → [1, ·], [heads, ·] or [heads · D, ·]: each row has one scale."""
        count, order = _ORDERS[self.each]
        ordered = x.permute(order)
        return ordered.reshape(math.prod(ordered.shape[:count]), -1)

    def from_rows(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """What `as_rows` made of keys or values of a shape → as they were."""
        order = _ORDERS[self.each][1]
        back = [order.index(dim) for dim in range(4)]
        return rows.view([shape[dim] for dim in order]).permute(back)


class KVObserver:
    """Statistics of one attention's keys and values [B, heads, T, D]."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.keys: RangeObserver | HistogramObserver = make_observer(cache.method, 0)
        self.values: RangeObserver | HistogramObserver = make_observer(cache.method, 0)

    def __call__(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.keys.update(self.cache.as_rows(key))
        self.values.update(self.cache.as_rows(value))
        return key, value

    @property
    def seen(self) -> bool:
        """Whether any came: attention to an encoder (BART's) is not called where there is none."""
        observer = self.keys.extremes if isinstance(self.keys, HistogramObserver) else self.keys
        return observer.low is not None

    def scales(self) -> tuple[Tensor, Tensor]:
        """(k_scale, v_scale), float32 [1], [heads] or [heads · D]; those of channels are numbers of bfloat16."""
        found = []
        for observer in (self.keys, self.values):
            low, high = observed_range(observer, self.cache.method, self.cache.spec)
            scale = scale_from_range(low, high, self.cache.spec)[0].reshape(-1)
            if self.cache.each == "channel":
                # The engine keeps them in the model's dtype: up to the next of bfloat16, so that nothing saturates.
                scale = ((scale.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)
            found.append(scale)
        return found[0], found[1]


class KVQuantizer:
    """Rounds keys and values as a quantized cache would."""

    def __init__(self, cache: KVCache, k_scale: Tensor, v_scale: Tensor) -> None:
        self.cache, self.k_scale, self.v_scale = cache, k_scale, v_scale

    def __call__(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self._round(key, self.k_scale), self._round(value, self.v_scale)

    def _round(self, x: Tensor, scale: Tensor) -> Tensor:
        cache, column = self.cache, scale[:, None]
        codes = quantize_with(cache.as_rows(x), column, cache.spec)
        return cache.from_rows(dequantize(codes, column, cache.spec).to(x.dtype), x.shape)


KVHook = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def attentions(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Attention modules whose cache holds the keys and values that their `KEYS` make."""
    for name, module in layer.named_modules():
        # Linear attention (MiniMax's) keeps a state, and has no config to choose an attention function by.
        if hasattr(module, "config") and any(isinstance(getattr(module, k, None), nn.Module) for k in KEYS):
            yield name, module


def quantizers(
    layer: nn.Module, cache: KVCache, disk: Callable[[str], str], scale_of: Callable[[str], Tensor | None]
) -> dict[str, KVHook]:
    """What rounds the layer's keys and values by stored scales (see `watched`).

    `disk`: an attention module of the layer → its name on disk; `scale_of`: `….k_scale` → that tensor, or None.
    """
    hooks: dict[str, KVHook] = {}
    for name, _ in attentions(layer):
        k, v = (scale_of(f"{disk(name)}.{leaf}") for leaf in ("k_scale", "v_scale"))
        if k is not None and v is not None:
            hooks[name] = KVQuantizer(cache, k.float().reshape(-1), v.float().reshape(-1))
    return hooks


@contextmanager
def watched(layer: nn.Module, hooks: dict[str, KVHook]) -> Iterator[None]:
    """While inside, keys and values of the named attention modules go through their hooks."""
    if not hooks:
        yield
        return
    changed: list[tuple[Any, str]] = []
    for name, hook in hooks.items():
        module: Any = layer.get_submodule(name)
        module._lowbit_kv = (hook, module.config._attn_implementation)
        changed.append((module, module.config._attn_implementation))
    for module, implementation in changed:
        module.config._attn_implementation = _registered(implementation)
    try:
        yield
    finally:
        for module, implementation in changed:
            module.config._attn_implementation = implementation
            del module._lowbit_kv


def _registered(implementation: str) -> str:
    """The name of `_attend` around `implementation`, under which models make the masks that it expects."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = f"{_NAME}_{implementation}"
    if name not in ALL_ATTENTION_FUNCTIONS:
        if implementation in ALL_MASK_ATTENTION_FUNCTIONS:
            # Without one transformers makes no mask at all.
            ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
        ALL_ATTENTION_FUNCTIONS.register(name, _attend)
    return name


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    import sys

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    hook, implementation = module._lowbit_kv
    key, value = hook(key, value)
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    return attend(module, query, key, value, *args, **kwargs)
