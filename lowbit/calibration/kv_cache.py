"""Scales of a quantized KV cache: what attention receives, keys after the rotary embedding, is observed.

Works through transformers' table of attention functions, so for every architecture that uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.calibration.observers import HistogramObserver, RangeObserver, make_observer, observed_range
from lowbit.dtypes import DTYPES
from lowbit.errors import InputError
from lowbit.formats import kv_cache_scheme
from lowbit.granularity import PerChannel, PerTensor
from lowbit.quantize import dequantize, quantize_with, scale_from_range
from lowbit.scheme import TensorSpec

_NAME = "lowbit_kv_cache"

KEYS = ("k_proj", "qkv_proj")
"""Linears that make the keys of an attention whose cache holds them as they are; Phi-3 has one for all three."""


@dataclass(frozen=True, kw_only=True)
class KVCache:
    """How keys and values are stored: symmetric, static scales."""

    dtype: str
    """`e4m3fn` or `int8`."""
    per_head: bool = False
    """One scale per KV head instead of one per layer."""
    method: str = "absmax"
    """A range method of `observers`."""

    def __post_init__(self) -> None:
        if self.dtype not in ("e4m3fn", "int8"):
            raise InputError(f"expected a KV cache of e4m3fn or int8, found {self.dtype!r}")

    @property
    def spec(self) -> TensorSpec:
        """Of the values that share one scale."""
        return TensorSpec(dtype=DTYPES[self.dtype], granularity=PerTensor())

    @property
    def stored(self) -> TensorSpec:
        """As a format's config describes it; a head is a channel."""
        return TensorSpec(
            dtype=DTYPES[self.dtype], granularity=PerChannel() if self.per_head else PerTensor()
        )

    @classmethod
    def parse(cls, text: str) -> KVCache:
        """`fp8`, `int8`, `fp8-head` or `int8-head`."""
        name, _, rest = text.partition("-")
        if name not in ("fp8", "int8") or rest not in ("", "head"):
            raise InputError(f"expected a KV cache of fp8, int8, fp8-head or int8-head, found {text!r}")
        return cls(dtype="e4m3fn" if name == "fp8" else "int8", per_head=rest == "head")

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> KVCache | None:
        """As a config.json's `kv_cache_scheme` has it; None where it asks for none, or for another kind."""
        scheme = kv_cache_scheme(config) or {}
        dtype = {"float": "e4m3fn", "int": "int8"}.get(str(scheme.get("type")))
        strategy = scheme.get("strategy")
        if dtype is None or scheme.get("num_bits") != 8 or strategy not in ("tensor", "attn_head"):
            return None
        return cls(dtype=dtype, per_head=strategy == "attn_head")


class KVObserver:
    """Statistics of one attention's keys and values [B, heads, T, D]."""

    def __init__(self, cache: KVCache) -> None:
        dim = 1 if cache.per_head else None
        self.cache = cache
        self.keys: RangeObserver | HistogramObserver = make_observer(cache.method, dim)
        self.values: RangeObserver | HistogramObserver = make_observer(cache.method, dim)

    def __call__(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.keys.update(key)
        self.values.update(value)
        return key, value

    @property
    def seen(self) -> bool:
        """Whether any came: attention to an encoder (BART's) is not called where there is none."""
        observer = self.keys.extremes if isinstance(self.keys, HistogramObserver) else self.keys
        return observer.low is not None

    def scales(self) -> tuple[Tensor, Tensor]:
        """(k_scale, v_scale), float32 [1] or [heads]."""
        found = []
        for observer in (self.keys, self.values):
            low, high = observed_range(observer, self.cache.method, self.cache.spec)
            found.append(scale_from_range(low, high, self.cache.spec)[0])
        return found[0], found[1]


class KVQuantizer:
    """Rounds keys and values as a quantized cache would."""

    def __init__(self, cache: KVCache, k_scale: Tensor, v_scale: Tensor) -> None:
        self.cache, self.k_scale, self.v_scale = cache, k_scale, v_scale

    def __call__(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self._round(key, self.k_scale), self._round(value, self.v_scale)

    def _round(self, x: Tensor, scale: Tensor) -> Tensor:
        if scale.numel() == 1:
            codes = quantize_with(x, scale, self.cache.spec)
            return dequantize(codes, scale, self.cache.spec).to(x.dtype)
        heads = [self._round(x[:, h], scale[h : h + 1]) for h in range(scale.numel())]
        return torch.stack(heads, dim=1)


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
