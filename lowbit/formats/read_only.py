"""What is read and not written: FP8 of ModelOpt, Quark and FBGEMM, INT8 and FP8 of SGLang's `w8a8_int8`, `w8a8_fp8`.

Source: vLLM's `quantization/{modelopt,quark/quark,fbgemm_fp8}.py`, SGLang's `w8a8_int8.py`. ModelOpt and Quark have a
scale per weight and one per input; ModelOpt's config may be a file of its own. The others have compressed-tensors'
tensors, a scale per row and dynamic activations, and a config that says less; FBGEMM's bound of activations is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lowbit.errors import InputError
from lowbit.formats.compressed_tensors import CompressedTensors
from lowbit.formats.format import Info, Layout, StoredModule
from lowbit.formats.hf_fp8 import per_tensor, read_fp8
from lowbit.scheme import get_scheme

MODELOPT = "hf_quant_config.json"

Reader = Callable[[Mapping[str, Any], Mapping[str, Info]], dict[str, StoredModule]]


def modelopt_config(file: Mapping[str, Any]) -> dict[str, Any]:
    """What ModelOpt's own file says, as the `quantization_config` that newer versions put into config.json."""
    said = file.get("quantization")
    found = dict(said) if isinstance(said, dict) else {}
    if found.get("kv_cache_quant_algo") == "FP8":
        found["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "dynamic": False}
    return {"quant_method": "modelopt", **found}


def _read_modelopt(config: Mapping[str, Any], tensors: Mapping[str, Info]) -> dict[str, StoredModule]:
    if (algorithm := config.get("quant_algo")) != "FP8":
        raise InputError(
            f"quantization_config: of ModelOpt expected quant_algo FP8, found {algorithm!r}, which cannot be read; "
            "start from the model in float"
        )
    return read_fp8(per_tensor(), tensors, static=True)


def _read_quark(config: Mapping[str, Any], tensors: Mapping[str, Info]) -> dict[str, StoredModule]:
    # Those of single layers may differ in their outputs: how keys and values are cached.
    groups = [config.get("global_quant_config"), *(config.get("layer_quant_config") or {}).values()]
    for weight in [(group or {}).get("weight") for group in groups]:
        said = weight if isinstance(weight, dict) else {}
        if (said.get("dtype"), said.get("qscheme")) != ("fp8_e4m3", "per_tensor"):
            raise InputError(
                f"quantization_config: of Quark expected all weights in fp8_e4m3, per_tensor, found {weight}, which "
                "cannot be read; start from the model in float"
            )
    return read_fp8(per_tensor(), tensors, static=True)


def _as(scheme: str) -> Reader:
    """The reader of compressed-tensors' tensors, all under one scheme."""

    def read(config: Mapping[str, Any], tensors: Mapping[str, Info]) -> dict[str, StoredModule]:
        theirs = CompressedTensors()
        return theirs.read(theirs.config(Layout(modules={"": get_scheme(scheme)}, ignored=())), tensors)

    return read


READERS: Mapping[str, Reader] = {
    "modelopt": _read_modelopt,
    "quark": _read_quark,
    "fbgemm_fp8": _as("fp8"),
    "w8a8_fp8": _as("fp8"),
    "w8a8_int8": _as("int8"),
}
"""By `quant_method`."""
