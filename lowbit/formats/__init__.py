"""On-disk formats, one file each; each both writes and reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lowbit.errors import InputError
from lowbit.formats.ascend import DESCRIPTION, Ascend, ascend_kv_cache
from lowbit.formats.ascend import QUANT_METHOD as METHOD_OF_DESCRIPTION
from lowbit.formats.compressed_tensors import CompressedTensors, kv_cache_scheme, other_kv_cache
from lowbit.formats.format import (
    QUANTIZATION_KEYS,
    Format,
    Info,
    Layout,
    Stored,
    StoredModule,
    configs_in,
    quantization_of,
    rotated_inputs,
)
from lowbit.formats.hf_fp8 import HfFp8
from lowbit.formats.read_only import MODELOPT, READERS, modelopt_config
from lowbit.formats.sglang import SglangInt8
from lowbit.scheme import nearest

_FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")

# What other quantizations store beside, or in place of, `….weight`.
_OF_OTHERS = (
    ".qweight", ".qzeros", ".weight_packed", ".compressed", ".bitmask", ".W_q", ".SCB", ".absmax", ".quant_map",
)  # fmt: skip

FORMATS: dict[str, Format] = {f.name: f for f in (CompressedTensors(), HfFp8(), Ascend(), SglangInt8())}
METHODS: dict[str, Format] = {f.quant_method: f for f in FORMATS.values()}
"""By the `quant_method` of their config."""

__all__ = [
    "DESCRIPTION",
    "FORMATS",
    "METHODS",
    "METHOD_OF_DESCRIPTION",
    "MODELOPT",
    "QUANTIZATION_KEYS",
    "Ascend",
    "Format",
    "Info",
    "Layout",
    "Stored",
    "StoredModule",
    "ascend_kv_cache",
    "configs_in",
    "get_format",
    "kv_cache_scheme",
    "modelopt_config",
    "other_kv_cache",
    "quantization_of",
    "read",
    "rotated_inputs",
]


def get_format(name: str | None = None) -> Format:
    """The format of that name, or the one that is written unless another is asked for; InputError naming the
    nearest ones."""
    if name is None:
        return FORMATS["compressed-tensors"]
    if not isinstance(name, str):
        raise InputError(f"expected the name of a format, found {name!r}; one of {', '.join(FORMATS)}")
    key = name.strip().lower().replace("_", "-")
    if key not in FORMATS:
        raise InputError(
            f"unknown format {name!r}: expected one of {', '.join(FORMATS)}; "
            f"did you mean {nearest(key, list(FORMATS))}?"
        )
    return FORMATS[key]


def read(config: Mapping[str, Any], tensors: Mapping[str, Info]) -> dict[str, StoredModule]:
    """The quantized modules of a checkpoint, given its config.json and headers; {} for one in float.

    InputError for a quantization that cannot be read in full: what is left out would be carried
    along under a config that no longer describes it.
    """
    quantization = quantization_of(config)
    found = _read_declared(quantization, tensors) if quantization else _read_undeclared(tensors)
    taken = {name for module in found.values() for name in module.names.values()}
    for name, info in tensors.items():
        if name not in taken and _quantized_otherwise(name, info, tensors):
            raise InputError(
                f"{name}: found what belongs to weights of a quantization that cannot be read; start from the model in "
                "float, or dequantize the checkpoint with its own tools first"
            )
        if info.dtype in _FLOAT8 and name not in taken:
            raise InputError(
                f"{name}: found {info.dtype} codes {list(info.shape)} that cannot be read; expected FP8 in E4M3 "
                "matrices named '….weight' with a scale: dequantize the checkpoint with its own tools first"
            )
    return found


def _quantized_otherwise(name: str, info: Info, tensors: Mapping[str, Info]) -> bool:
    """Whether a tensor is part of a weight that GPTQ, AWQ, HQQ, MLX or bitsandbytes quantized, or of one in FP4.

    Their config may be a file of its own, so that config.json says nothing.
    """
    if name.endswith(_OF_OTHERS):
        return True
    if info.dtype not in ("U8", "I8", "U32", "I32"):
        return False
    module = name.removesuffix("weight")
    scales = [name + "_weight_scale"]  # of experts in 3-D, which are no `.weight`
    if name.endswith(("_blocks", ".blocks")):  # gpt-oss without its config, and as its makers store it
        scales.append(name.removesuffix("blocks") + "scales")
    if name.endswith(".weight"):
        scales += [name + "_scale", name + "_scale_inv", module + "scale", module + "scales"]
    return not tensors.keys().isdisjoint(scales)


def _read_declared(quantization: Mapping[str, Any], tensors: Mapping[str, Info]) -> dict[str, StoredModule]:
    # Its first versions did not name themselves.
    method = quantization.get(
        "quant_method", "compressed-tensors" if "config_groups" in quantization else None
    )
    readers = {**{name: f.read for name, f in METHODS.items()}, **READERS}
    if not isinstance(method, str) or method not in readers:
        raise InputError(
            f"quantization_config: expected quant_method {' or '.join(readers)}, found {method!r}; "
            "start from the model in float, or dequantize it with its own tools first"
        )
    try:
        return readers[method](quantization, tensors)
    except InputError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, re.error) as error:
        raise InputError(
            f"quantization_config: expected the keys and types of {method}, found something else ({error}); "
            "fetch config.json again"
        ) from error


def _read_undeclared(tensors: Mapping[str, Info]) -> dict[str, StoredModule]:
    """Codes without a config: block FP8 that lost it can be recognised by its scales' name."""
    if any(name.endswith(".weight_scale_inv") for name in tensors):
        return FORMATS["fp8"].read({"weight_block_size": [128, 128]}, tensors)
    codes = next(
        (n for n, t in tensors.items() if n.endswith(".weight") and t.dtype in ("I8", "F8_E4M3")), None
    )
    if codes is not None:
        raise InputError(
            f"{codes}: found {tensors[codes].dtype} codes, but config.json has no quantization_config that says "
            "how to read them; add it"
        )
    return {}
