"""What one calibration carries from layer to layer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lowbit.calibration.activations import ActivationCache
from lowbit.calibration.kv_cache import KVCache, KVHook
from lowbit.calibration.layerwise import LayerwiseModel
from lowbit.calibration.methods import Method
from lowbit.calibration.rotation import Rotation
from lowbit.calibration.simulate import ActivationQuantizer, attach
from lowbit.calibration.stored import stored_kv_hooks
from lowbit.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How to run. Beyond float rounding, only `all_experts` and `min_tokens` change what is computed."""

    device: str | torch.device = "cpu"
    """By name (see `devices.choose_device`), or exactly."""
    dtype: torch.dtype = torch.float32
    """Compute dtype. float32 is the fastest exact choice on CPUs."""
    batch_size: int = 8
    """Sequences that run through a layer together."""
    memory_limit: int = 4 << 30
    """Bytes of hidden states kept in host memory; the rest is spilled to disk. Of each worker."""
    spill_directory: str | None = None
    all_experts: bool = True
    """Every expert of a mixture sees every token (for its statistics only)."""
    min_tokens: int = 128
    """A Linear that fewer tokens reached is rounded without data."""
    verify: bool = True
    """Check on a few tokens of every layer that transforms leave its output as it was."""


@dataclass(kw_only=True)
class Run:
    """What one calibration carries from layer to layer."""

    model: LayerwiseModel
    method: Method
    schemes: dict[str, Scheme]
    options: RunOptions
    rotation: Rotation | None
    cache: ActivationCache
    calls: list[tuple[dict[str, Any], ...]]
    small: tuple[dict[str, Any], ...]
    small_shape: tuple[int, int]
    has_data: bool
    batches: int = 1
    """Of all workers together."""
    kept: frozenset[str] = frozenset()
    """Modules, by the checkpoint's names, that are carried as they are in the source, quantized or not."""
    kv_cache: KVCache | None = None
    one_batch: bool = False
    """All data is one batch, so that layers can be smoothed and rounded while it passes (see `sequential`)."""
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def norms_stored(self) -> torch.dtype | None:
        """The dtype that norms are written in; None in float64, where transforms are to be exact to 1e-9."""
        return None if self.options.dtype == torch.float64 else self.model.source.float_dtype

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the wall time spent inside to `seconds[what]`."""
        start = time.perf_counter()
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start

    def carried_kv(self, layer: nn.Module, index: int) -> dict[str, KVHook]:
        """What rounds keys and values by scales of the source, which stay where none are calibrated."""
        return {} if self.kv_cache is not None else stored_kv_hooks(self.model, layer, index)

    def all_data(self, layer: nn.Module, index: int, *, hand_on: bool) -> None:
        """The layer over all batches; with `hand_on`, its outputs take the place of the hidden states."""
        for batch in range(len(self.cache)):
            out = self.model.run(layer, index, self.cache[batch], self.calls[batch][index])
            if hand_on:
                self.cache.replace(batch, out)

    def hand_on(self, layer: nn.Module, index: int, quantizers: dict[str, ActivationQuantizer]) -> None:
        """Replace the cached hidden states by what comes out of the layer, its inputs rounded."""
        detach = attach(layer, quantizers)
        try:
            self.all_data(layer, index, hand_on=True)
        finally:
            detach()
