"""lowbit: low-precision quantization of large models.

`lowbit.convert`, `plan`, `inspect` and `verify` rewrite checkpoints; they load no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lowbit.api import Conversion, convert, inspect, plan, verify
    from lowbit.errors import InputError

_LAZY = {
    "Conversion": "lowbit.api",
    "convert": "lowbit.api",
    "inspect": "lowbit.api",
    "plan": "lowbit.api",
    "verify": "lowbit.api",
    "InputError": "lowbit.errors",
}

__all__ = ["Conversion", "InputError", "__version__", "convert", "inspect", "plan", "verify"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import lowbit` and `lowbit --help` cost nothing."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'lowbit' has no attribute {name!r}")
