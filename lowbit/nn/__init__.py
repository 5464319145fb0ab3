"""Modules that run on quantized weights, and what puts them into a model.

Imported on first use, so that `lowbit.nn.integration` can be reached without loading torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowbit.nn.experts import QuantExperts
    from lowbit.nn.linear import QuantLinear
    from lowbit.nn.loading import load
    from lowbit.nn.stored import float_activations
    from lowbit.nn.swap import SwapReport, quantize_model

_LAZY = {
    "QuantExperts": "lowbit.nn.experts",
    "QuantLinear": "lowbit.nn.linear",
    "SwapReport": "lowbit.nn.swap",
    "float_activations": "lowbit.nn.stored",
    "load": "lowbit.nn.loading",
    "quantize_model": "lowbit.nn.swap",
}

__all__ = ["QuantExperts", "QuantLinear", "SwapReport", "float_activations", "load", "quantize_model"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        value = getattr(import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'lowbit.nn' has no attribute {name!r}")
