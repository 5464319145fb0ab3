"""FP8 that is read and not written: ModelOpt's (`quant_method: modelopt`) and FBGEMM's (`fbgemm_fp8`).

Source: vLLM's `quantization/modelopt.py` and `fbgemm_fp8.py`. ModelOpt has a scale per weight and one per input, and
its config may be a file of its own. FBGEMM has a scale per row of a weight, and a bound of the activations, which are
dynamic; the bound is not read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lowbit.errors import InputError
from lowbit.formats.format import Info, StoredModule
from lowbit.formats.hf_fp8 import per_tensor, read_fp8
from lowbit.scheme import get_scheme

MODELOPT = "hf_quant_config.json"


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


def _read_fbgemm(config: Mapping[str, Any], tensors: Mapping[str, Info]) -> dict[str, StoredModule]:
    return read_fp8(get_scheme("fp8"), tensors, format="compressed-tensors")


READERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Info]], dict[str, StoredModule]]] = {
    "modelopt": _read_modelopt,
    "fbgemm_fp8": _read_fbgemm,
}
"""By `quant_method`."""
