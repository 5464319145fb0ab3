"""transformers loads and saves quantized checkpoints on lowbit's modules.

A config class and a quantizer named `lowbit` go into transformers' own registry. `register`
also lets them answer for `compressed-tensors` and `fp8` where lowbit runs the scheme; what it
does not run (4-bit weights, say) stays with transformers' own quantizers. transformers does
the renaming, mapping of files, dispatch to devices and saving; nothing of it is repeated here.

Importing this module loads nothing; `lowbit.register()` is asked for explicitly, since it changes
what transformers loads with.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from lowbit.errors import InputError

OLDEST = (5, 21)
"""The first transformers whose way of loading lowbit takes part in."""
OLDEST_PYTHON = (3, 11)
"""The first Python that it installs on."""

_METHODS = ("compressed-tensors", "fp8")
_replaced: dict[str, Any] = {}


def require_transformers() -> None:
    """InputError unless transformers is installed, and new enough."""
    oldest = ".".join(map(str, OLDEST))
    advice = f"pip install -U 'transformers>={oldest}' accelerate"
    if sys.version_info < OLDEST_PYTHON:
        # pip finds no such version there, and says nothing of Python.
        needs, has = (".".join(map(str, v[:2])) for v in (OLDEST_PYTHON, sys.version_info))
        advice = f"it needs Python {needs} or newer, and this is {has}, on which lowbit converts only"
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise InputError(f"expected transformers {oldest} or newer, found none; {advice}") from error
    found = transformers.__version__
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < OLDEST:
        raise InputError(f"expected transformers {oldest} or newer, found {found}; {advice}")


def open_tokenizer(path: str | Path, instead: str = "") -> Any:
    """The tokenizer in a checkpoint's directory; none of the checkpoint's own code is run.

    InputError where none loads; `instead`: what else helps, after a comma.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"expected a tokenizer in {path}, found none that loads ({reason}); copy its files there{instead}"
        ) from error


def open_config(path: Path, model_type: object, *, trust_remote_code: bool = False, instead: str = "") -> Any:
    """transformers' config of the checkpoint in a directory, whose config.json has this `model_type`.

    InputError where it does not take it; `instead`: what else helps.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    try:
        return transformers.AutoConfig.from_pretrained(
            str(path), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (ValueError, OSError, StrictDataclassError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        raise InputError(
            f"{path}: expected a config.json that transformers takes, found {model_type!r}; transformers "
            f"{transformers.__version__} cannot use this config.json ({reason}): correct it, or update transformers"
            f"{', or ' if instead else ''}{instead}"
        ) from error


def register_names() -> None:
    """Put the config and quantizer named `lowbit` into transformers' registry, and nothing else."""
    require_transformers()
    from transformers.quantizers import auto

    from lowbit.nn.quantizer import LowbitConfig, LowbitQuantizer

    if "lowbit" not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer("lowbit")(LowbitQuantizer)
        auto.register_quantization_config("lowbit")(LowbitConfig)


def register() -> None:
    """Let `from_pretrained` run compressed-tensors and fp8 checkpoints of 8 bits on lowbit's modules.

    InputError where transformers is missing or too old.
    """
    require_transformers()
    from transformers.quantizers import auto

    for method in _METHODS:
        if method not in _replaced:
            _replaced[method] = auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method]
            mapping: dict[str, Any] = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
            mapping[method] = _Answering(method, _replaced[method])


class _Answering:
    """Stands in for transformers' config class of one method: lowbit's own where lowbit runs the scheme."""

    def __init__(self, method: str, own: Any) -> None:
        self.method, self.own = method, own
        self.__name__ = own.__name__

    def from_dict(self, config: dict[str, Any], **kwargs: Any) -> Any:
        from lowbit.nn.quantizer import LowbitConfig, runs

        register_names()
        if not runs({"quant_method": self.method, **config}):
            return self.own.from_dict(config, **kwargs)
        found = LowbitConfig(original=config)
        return (found, kwargs) if kwargs.pop("return_unused_kwargs", False) else found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)


def unregister() -> None:
    """Give `compressed-tensors` and `fp8` back to transformers' own quantizers."""
    if _replaced:
        from transformers.quantizers import auto

        for method, own in _replaced.items():
            auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = own
        _replaced.clear()
