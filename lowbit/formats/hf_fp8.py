"""HF / DeepSeek block FP8 (`quant_method: fp8`): `weight` F8_E4M3 and `weight_scale_inv` F32.

Source: the configs of DeepSeek-V3 and transformers' `FineGrainedFP8Config`. Despite its
name, the stored scale multiplies, as everywhere. DeepSeek-V4 keeps routed experts in FP4 beside
it (`expert_dtype: fp4`), which is read, and not written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lowbit.errors import InputError
from lowbit.formats.format import (
    ConfigOnly,
    Content,
    Info,
    Joined,
    Layout,
    Stored,
    StoredModule,
    check_scale,
    missing_scale,
    require_fp8_cache,
)
from lowbit.formats.fp4 import FP4
from lowbit.formats.joined import with_joined, with_members
from lowbit.formats.name_patterns import towers
from lowbit.granularity import PerBlock, PerTensor, scale_shape
from lowbit.scheme import Scheme, get_scheme

# What a scale is called; newer models shorten it.
SCALE_SUFFIXES = (".weight_scale_inv", ".scale", ".weight_scale")
_INPUT_SCALES = (".input_scale", ".activation_scale")  # the latter is Mistral's


class HfFp8(ConfigOnly):
    """Block FP8 as DeepSeek ships it."""

    name = quant_method = "fp8"

    def holds(self, scheme: Scheme) -> bool:
        return scheme.weights == get_scheme("fp8-block").weights

    def refuse(self, scheme: Scheme, shape: tuple[int, ...], joined: Joined) -> str:
        if not self.holds(scheme):
            return f"the fp8 format holds fp8-block only, not {scheme.name}"
        return block_problem(scheme, shape, joined)

    def tensors(
        self, scheme: Scheme, shape: tuple[int, int], float_dtype: str = "BF16"
    ) -> tuple[Stored, ...]:
        return block_tensors(scheme, shape)

    def config(self, layout: Layout) -> dict[str, Any]:
        require_fp8_cache(layout, self.name)
        ignored = with_joined(with_members(layout.ignored), layout.config)
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": [*ignored, *towers(ignored, layout.modules)],
        }

    def read(self, config: Mapping[str, Any], tensors: Mapping[str, Info]) -> dict[str, StoredModule]:
        block = config.get("weight_block_size")
        if block is not None and (not isinstance(block, list | tuple) or len(block) != 2):
            raise InputError(f"quantization_config: expected weight_block_size [rows, cols], found {block!r}")
        static = block is None and config.get("activation_scheme") == "static"
        return read_fp8(_scheme_of(block), tensors, static=static)


def read_fp8(scheme: Scheme, tensors: Mapping[str, Info], *, static: bool = False) -> dict[str, StoredModule]:
    """Matrices of E4M3 codes under `scheme`, and DeepSeek-V4's FP4 beside them.

    Where that is a scale per tensor, one with a scale per row, [N] or [N, 1], is `fp8`.

    `static`: those with a scale of their input are `fp8-static`, with compressed-tensors' tensors but for their names.
    """
    found: dict[str, StoredModule] = {}
    for name, info in tensors.items():
        if not name.endswith(".weight") or info.dtype not in ("F8_E4M3", "I8") or len(info.shape) != 2:
            continue
        module = name.removesuffix(".weight")
        scale = next((s for suffix in SCALE_SUFFIXES if (s := module + suffix) in tensors), None)
        if scale is None:
            raise missing_scale(name, module + SCALE_SUFFIXES[0], info.dtype)
        packed = info.dtype == "I8"
        rows, found_shape = info.shape[0], tuple(tensors[scale].shape)
        by_row = scheme == per_tensor() and rows > 1 and found_shape in ((rows,), (rows, 1))
        here = FP4 if packed else get_scheme("fp8") if by_row else scheme
        names: dict[Content, str] = {"codes": name, "scale": scale}
        shape = (info.shape[0], info.shape[1] * (2 if packed else 1))
        assert here.weights is not None
        check_scale(module, scale, (rows, 1) if by_row else found_shape, shape, here.weights)
        of_input = next((s for suffix in _INPUT_SCALES if (s := module + suffix) in tensors), None)
        if static and not packed and not by_row and of_input is not None:
            here, names["input_scale"] = get_scheme("fp8-static"), of_input
        found[module] = StoredModule(
            shape=shape,
            scheme=here,
            names=names,
            format="compressed-tensors" if "input_scale" in names else "fp8",
        )
    return found


def _scheme_of(block: Sequence[int] | None) -> Scheme:
    """The preset for 128×128 blocks; without blocks there is one scale per weight."""
    preset = get_scheme("fp8-block")
    return per_tensor() if block is None else with_blocks(preset, block)


def per_tensor() -> Scheme:
    """FP8 with one scale per weight, activations dynamic."""
    preset = get_scheme("fp8-block")
    assert preset.weights is not None
    weights = replace(preset.weights, granularity=PerTensor())
    return replace(get_scheme("fp8"), name="fp8-tensor", weights=weights, alias=None)


def with_blocks(preset: Scheme, block: Sequence[int]) -> Scheme:
    """A block-scaled preset with blocks of rows × columns of another size; itself where they are its own."""
    assert preset.weights is not None
    weights = replace(preset.weights, granularity=PerBlock(*block))
    if weights == preset.weights:
        return preset
    return replace(preset, name=f"{preset.name}-{block[0]}x{block[1]}", weights=weights, alias=None)


def block_tensors(scheme: Scheme, shape: tuple[int, int]) -> tuple[Stored, ...]:
    """`weight`, and `weight_scale_inv` in float32."""
    spec = scheme.weights
    assert spec is not None
    scales = scale_shape(shape, spec.granularity)
    return (
        Stored(suffix=".weight", dtype=spec.dtype.safetensors, shape=shape, content="codes"),
        Stored(suffix=SCALE_SUFFIXES[0], dtype="F32", shape=scales, content="scale"),
    )


def block_problem(scheme: Scheme, shape: tuple[int, ...], joined: Joined) -> str:
    """Why engines refuse a block-scaled weight of this shape, or "".

    K must be a multiple of the block. A ragged last row block is fine in a module that stands
    alone, but ragged blocks do not concatenate, so members of a fused matmul must not have one.
    """
    if scheme.weights is None or not isinstance(block := scheme.weights.granularity, PerBlock):
        return ""
    if shape[-1] % block.cols:
        return f"K = {shape[-1]} is not a multiple of {block.cols}"
    if joined == "fused" and shape[-2] % block.rows:
        return f"N = {shape[-2]} is not a multiple of {block.rows}, and its blocks are joined with others'"
    return ""
