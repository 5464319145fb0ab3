"""lowbit: low-precision quantization of large models.

`lowbit.convert`, `plan`, `inspect` and `verify` rewrite checkpoints; they load no torch.
`lowbit.calibrate`, `search` and `measure` choose how on data, and tell what it costs.
`lowbit.quantize_model` swaps a model's Linears and experts in place, `lowbit.load` runs a
converted checkpoint, and after `lowbit.register()` transformers' own `from_pretrained` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lowbit import nn
    from lowbit.api import Conversion, convert, inspect, plan, verify
    from lowbit.errors import InputError
    from lowbit.nn import load, quantize_model
    from lowbit.nn.integration import register
    from lowbit.quality import calibrate, measure, search

_LAZY = {
    "Conversion": "lowbit.api",
    "InputError": "lowbit.errors",
    "calibrate": "lowbit.quality",
    "convert": "lowbit.api",
    "measure": "lowbit.quality",
    "inspect": "lowbit.api",
    "load": "lowbit.nn",
    "plan": "lowbit.api",
    "quantize_model": "lowbit.nn",
    # Explicit, and not a side effect of the import: it changes what transformers loads with.
    "register": "lowbit.nn.integration",
    "search": "lowbit.quality",
    "verify": "lowbit.api",
}

__all__ = [
    "Conversion", "InputError", "__version__", "calibrate", "convert", "inspect", "load", "measure", "nn", "plan",
    "quantize_model", "register", "search", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import lowbit` and `lowbit --help` cost nothing."""
    from importlib import import_module

    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name == "nn":
        return import_module("lowbit.nn")
    raise AttributeError(f"module 'lowbit' has no attribute {name!r}")
