"""FP4 weights of sources: E2M1 codes, two to a byte, the first in the lower half, with scales of small groups along K.

Source: the OCP MX specification, compressed-tensors' `nvfp4` and `mxfp4` compressors, ModelOpt's `NVFP4QTensor`,
Quark's `Pack_fp4`, transformers' `Mxfp4Config` for gpt-oss. MXFP4 has a power of two for each 32 codes. NVFP4 has E4M3
for each 16 and one float32 for the whole tensor: code · scale is exact in float32, and the product or quotient with
that number is rounded once. What these formats hold of activations is left: no chip that this is for multiplies FP4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lowbit.dtypes import E2M1
from lowbit.errors import InputError
from lowbit.formats.format import Content, Info, StoredModule, check_scale, missing_scale
from lowbit.granularity import PerGroup
from lowbit.scheme import Scheme, TensorSpec

MXFP4 = Scheme(name="mxfp4", weights=TensorSpec(dtype=E2M1, granularity=PerGroup(32), scale="e8m0"))
NVFP4 = Scheme(name="nvfp4", weights=TensorSpec(dtype=E2M1, granularity=PerGroup(16), scale="e4m3"))
FP4 = replace(MXFP4, name="fp4")
"""What DeepSeek-V4's config calls it."""

_SCALE_DTYPES = {"e8m0": ("U8", "F8_E8M0"), "e4m3": ("F8_E4M3",)}


def read_fp4(
    codes: str, scheme: Scheme, tensors: Mapping[str, Info], *, format: str, whole: Mapping[Content, str]
) -> StoredModule:
    """The module whose U8 [N, K / 2] are in the tensor `codes`, with scales [N, K / group] in its `weight_scale`.

    `whole`: under which name the number is that holds for all of an NVFP4 weight. InputError where something is missing
    or of another dtype or shape.
    """
    module, info, spec = codes.rpartition(".")[0], tensors[codes], scheme.weights
    assert spec is not None and isinstance(spec.granularity, PerGroup)
    if info.dtype != "U8" or len(info.shape) != 2:
        raise InputError(
            f"{codes}: expected packed FP4 as U8 [N, K / 2], found {info.dtype} {list(info.shape)}, which cannot be "
            "read; start from the model in float"
        )
    scale = f"{module}.weight_scale"
    names: dict[Content, str] = {"codes": codes, "scale": scale}
    if spec.scale == "e4m3":
        names |= whole
    for name in list(names.values())[1:]:
        if name not in tensors:
            raise missing_scale(codes, name, scheme.name.upper())
    if tensors[scale].dtype not in _SCALE_DTYPES[spec.scale]:
        raise InputError(
            f"{scale}: expected scales of {scheme.name.upper()} in {' or '.join(_SCALE_DTYPES[spec.scale])}, found "
            f"{tensors[scale].dtype}; config and tensors do not belong together: fetch the checkpoint again"
        )
    shape = (info.shape[0], 2 * info.shape[1])
    if shape[1] % spec.granularity.size:
        raise InputError(
            f"{codes}: expected whole groups of {spec.granularity.size} columns, found {shape[1]} columns; fetch the "
            "checkpoint again"
        )
    check_scale(module, scale, tuple(tensors[scale].shape), shape, spec)
    return StoredModule(shape=shape, scheme=scheme, names=names, format=format)


BLOCKS, SCALES = "_blocks", "_scales"
"""Appended to a parameter of gpt-oss's experts: its codes, and the exponents that scale them."""


def read_experts(config: Mapping[str, Any], tensors: Mapping[str, Info]) -> dict[str, StoredModule]:
    """The experts of gpt-oss as published (`quant_method` mxfp4), each layer's in one tensor.

    `….experts.gate_up_proj_blocks` U8 [E, N, K / 32, 16] and `…_scales` U8 [E, N, K / 32] of exponents are what in
    float is `….experts.gate_up_proj` [E, K, N], transposed; so is `down_proj`. All else is in float. InputError where
    one is missing or of another dtype or shape.
    """
    found = {}
    for name, info in tensors.items():
        if not name.endswith(BLOCKS):
            continue
        module = name.removesuffix(BLOCKS)
        scale = tensors.get(module + SCALES)
        if scale is None:
            raise missing_scale(name, module + SCALES, "MXFP4")
        if info.dtype != "U8" or len(info.shape) != 4 or info.shape[3] != 16 or 0 in info.shape:
            raise InputError(
                f"{name}: expected packed FP4 of experts as U8 [E, N, K / 32, 16], found {info.dtype} "
                f"{list(info.shape)}, which cannot be read; start from the model in float"
            )
        if scale.dtype not in _SCALE_DTYPES["e8m0"] or tuple(scale.shape) != tuple(info.shape[:3]):
            raise InputError(
                f"{module}{SCALES}: expected an exponent in U8 for each of {list(info.shape[:3])} groups, found "
                f"{scale.dtype} {list(scale.shape)}; the checkpoint is damaged: fetch it again"
            )
        experts, rows, groups, _ = info.shape
        found[module] = StoredModule(
            shape=(experts, rows, 32 * groups), scheme=MXFP4, names={"codes": name, "scale": module + SCALES},
            format="mxfp4",
        )  # fmt: skip
    return found
