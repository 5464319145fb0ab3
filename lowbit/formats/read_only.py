"""What is read and not written: FP8 and FP4 of ModelOpt and Quark, FP4 of gpt-oss, FP8 of FBGEMM, INT8 and FP8 of
SGLang.

Source: vLLM's `quantization/{modelopt,quark/quark,fbgemm_fp8}.py`, SGLang's `w8a8_int8.py`, ModelOpt 0.47, Quark 0.13.
ModelOpt and Quark have FP8 with a scale per weight and one per input, and FP4 beside it; ModelOpt's config may be a
file of its own. The others (SGLang's are `w8a8_int8` and `w8a8_fp8`) have compressed-tensors' tensors, a scale per row
and dynamic activations, and a config that says less; FBGEMM's bound of activations is left.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lowbit.errors import InputError
from lowbit.formats.compressed_tensors import CompressedTensors
from lowbit.formats.format import Info, Layout, StoredModule
from lowbit.formats.fp4 import MXFP4, NVFP4, read_experts, read_fp4
from lowbit.formats.hf_fp8 import per_tensor, read_fp8
from lowbit.scheme import get_scheme

MODELOPT = "hf_quant_config.json"

Reader = Callable[[Mapping[str, Any], Mapping[str, Info]], dict[str, StoredModule]]

# ModelOpt's whose weights are FP4, whatever their activations are; codes in a group.
_MODELOPT_FP4 = {
    "NVFP4": 16, "W4A16_NVFP4": 16, "W4A8_NVFP4_FP8": 16, "NVFP4_AWQ": 16, "MXFP4": 32, "W4A8_MXFP4_FP8": 32,
}  # fmt: skip
_MODELOPT_FP8 = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")


def modelopt_config(file: Mapping[str, Any]) -> dict[str, Any]:
    """What ModelOpt's own file says, as the `quantization_config` that newer versions put into config.json."""
    said = file.get("quantization")
    return {"quant_method": "modelopt", **(said if isinstance(said, dict) else {})}


def _read_modelopt(config: Mapping[str, Any], tensors: Mapping[str, Info]) -> dict[str, StoredModule]:
    said, layers = [config], config.get("quantized_layers")
    if config.get("quant_algo") == "MIXED_PRECISION" and layers:
        said = list(layers.values())
    algorithms = {str(each.get("quant_algo")).upper(): each for each in said}
    for algorithm, each in algorithms.items():
        if algorithm not in (*_MODELOPT_FP8, *_MODELOPT_FP4):
            raise InputError(
                "quantization_config: of ModelOpt expected quant_algo FP8, NVFP4, MXFP4, or MIXED_PRECISION of these, "
                f"found {each.get('quant_algo')!r}, which cannot be read; start from the model in float"
            )
        group = _MODELOPT_FP4.get(algorithm)
        if group and (each.get("group_size") or group) != group:
            raise InputError(
                f"quantization_config: of ModelOpt expected {algorithm} in groups of {group}, found "
                f"{each['group_size']}, which cannot be read; start from the model in float"
            )
    _require_plain_inputs(tensors)
    fp8, fp4 = read_fp8(per_tensor(), tensors, static=True), _fp4(tensors)
    for found, dtype, expected in ((fp8, "FP8", _MODELOPT_FP8), (fp4, "FP4", _MODELOPT_FP4)):
        if found and algorithms.keys().isdisjoint(expected):
            raise InputError(
                f"{next(iter(found.values())).weight}: expected what quant_algo of ModelOpt says "
                f"({', '.join(sorted(algorithms))}), found {dtype} codes; config and tensors do not belong together: "
                "fetch the checkpoint again"
            )
    return {**fp8, **fp4}


def _read_quark(config: Mapping[str, Any], tensors: Mapping[str, Info]) -> dict[str, StoredModule]:
    # Those of single layers may differ in their outputs: how keys and values are cached.
    groups = [config.get("global_quant_config"), *(config.get("layer_quant_config") or {}).values()]
    for weight in [(group or {}).get("weight") for group in groups]:
        if not _quark_is_read(weight):
            raise InputError(
                "quantization_config: of Quark expected all weights in fp8_e4m3, per_tensor or per_channel, or in fp4, "
                f"per_group of 32 with e8m0 scales or of 16 with fp8_e4m3 ones, found {weight}, which cannot be read; "
                "start from the model in float"
            )
    _require_plain_inputs(tensors)
    algorithms = config.get("algo_config") or []
    for algorithm in algorithms if isinstance(algorithms, list) else [algorithms]:
        if algorithm.get("online_r1_rotation") or algorithm.get("r4"):
            raise InputError(
                "quantization_config: of Quark expected weights for inputs as they are, found an algo_config with "
                "rotations while running (online_r1_rotation or r4), which are not read; start from the model in float"
            )
    return {**read_fp8(per_tensor(), tensors, static=True), **_fp4(tensors)}


# Tensors by which engines change the inputs of a weight: AWQ's of ModelOpt, online rotations of Quark.
_OF_INPUTS = re.compile(r"(.*\.)?(pre_quant_scale|input_rotation|shared_input_rotation_\d+)")


def _require_plain_inputs(tensors: Iterable[str]) -> None:
    """InputError where weights are for other inputs than the model's own: the result would be read without them."""
    if found := next((name for name in tensors if _OF_INPUTS.fullmatch(name)), None):
        raise InputError(
            f"{found}: expected weights for inputs as they are, found such as are for inputs that this tensor changes "
            "while the model runs, which are not read; start from the model in float"
        )


def _quark_is_read(weight: Any) -> bool:
    """Whether its `weight` says FP8, MXFP4, or NVFP4, which is two: of the codes, and of their scales."""
    said, scales = weight if isinstance(weight, list) and len(weight) == 2 else (weight, None)
    if not isinstance(said, dict):
        return False
    if scales is not None:
        nvfp4 = _of_quark(said) == ("fp4", "per_group") and said.get("group_size") == 16
        return nvfp4 and _of_quark(scales) == ("fp8_e4m3", "per_tensor")
    mxfp4 = _of_quark(said) == ("fp4", "per_group") and said.get("scale_format") == "e8m0"
    by_row = _of_quark(said) == ("fp8_e4m3", "per_channel") and said.get("ch_axis") == 0
    return (mxfp4 and said.get("group_size") == 32) or by_row or _of_quark(said) == ("fp8_e4m3", "per_tensor")


def _of_quark(said: Any) -> tuple[Any, Any]:
    return (said.get("dtype"), said.get("qscheme")) if isinstance(said, dict) else (None, None)


def _fp4(tensors: Mapping[str, Info]) -> dict[str, StoredModule]:
    """Matrices of FP4 in U8, as both write them: the dtype of their scales says which of the two it is."""
    found = {}
    for name, info in tensors.items():
        module = name.removesuffix(".weight")
        scale = tensors.get(f"{module}.weight_scale")
        if module != name and info.dtype == "U8" and scale is not None:
            scheme = NVFP4 if scale.dtype == "F8_E4M3" else MXFP4
            whole = f"{module}.weight_scale_2"
            found[module] = read_fp4(name, scheme, tensors, format="modelopt", whole={"global_scale": whole})
    return found


def _as(scheme: str) -> Reader:
    """The reader of compressed-tensors' tensors, all under one scheme."""

    def read(config: Mapping[str, Any], tensors: Mapping[str, Info]) -> dict[str, StoredModule]:
        theirs = CompressedTensors()
        return theirs.read(theirs.config(Layout(modules={"": get_scheme(scheme)}, ignored=())), tensors)

    return read


READERS: Mapping[str, Reader] = {
    "modelopt": _read_modelopt,
    "modelopt_fp4": _read_modelopt,
    "quark": _read_quark,
    "mxfp4": read_experts,
    "fbgemm_fp8": _as("fp8"),
    "w8a8_fp8": _as("fp8"),
    "w8a8_int8": _as("int8"),
}
"""By `quant_method`."""
