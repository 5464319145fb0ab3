"""SGLang's block INT8 (`quant_method: blockwise_int8`): `weight` I8 and `weight_scale_inv` F32.

Source: sglang's `layers/quantization/blockwise_int8.py`. As in block FP8 the stored scale multiplies.
Its INT8 with a scale per channel (`w8a8_int8`) is loaded from compressed-tensors checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lowbit.errors import InputError
from lowbit.formats.format import (
    ConfigOnly,
    Info,
    Joined,
    Layout,
    Stored,
    StoredModule,
    check_scale,
    missing_scale,
    require_fp8_cache,
)
from lowbit.formats.hf_fp8 import SCALE_SUFFIXES, block_problem, block_tensors, with_blocks
from lowbit.formats.joined import with_joined, with_members
from lowbit.scheme import Scheme, get_scheme

_SCALE = SCALE_SUFFIXES[0]
_EXPERTS = re.compile(r".*\.experts(\.|$)")


class SglangInt8(ConfigOnly):
    """INT8 in blocks of 128×128, activations in groups of 128."""

    name = "sglang"
    quant_method = "blockwise_int8"

    def holds(self, scheme: Scheme) -> bool:
        return scheme.weights == get_scheme("int8-block").weights

    def instead(self, scheme: Scheme) -> str:
        if scheme == get_scheme("int8"):
            return (
                "SGLang loads int8 with a scale per channel from a compressed-tensors checkpoint: "
                "leave --format out, and serve the result with --quantization w8a8_int8"
            )
        return ""

    def refuse(self, scheme: Scheme, shape: tuple[int, ...], joined: Joined) -> str:
        if not self.holds(scheme):
            return f"the sglang format holds int8-block only, not {scheme.name}"
        # An expert's gate and up projections are joined, its down projection with those of other experts.
        return block_problem(scheme, shape, "fused" if joined else "")

    def tensors(
        self, scheme: Scheme, shape: tuple[int, int], float_dtype: str = "BF16"
    ) -> tuple[Stored, ...]:
        return block_tensors(scheme, shape)

    def config(self, layout: Layout) -> dict[str, Any]:
        require_fp8_cache(layout, self.name)
        if experts := [m for m in layout.ignored if _EXPERTS.match(m)]:
            raise InputError(
                f"{experts[0]}: expected every expert in int8-block, found {len(experts)} that stay in float, and "
                "SGLang runs every mixture quantized under blockwise_int8; quantize them too, or use compressed-tensors"
            )
        return {
            "quant_method": self.quant_method,
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            # The engine asks for the names of the modules that it builds, and compares them as a whole.
            "ignored_layers": with_joined(with_members(layout.ignored), layout.config),
        }

    def read(self, config: Mapping[str, Any], tensors: Mapping[str, Info]) -> dict[str, StoredModule]:
        block = config.get("weight_block_size")
        if not isinstance(block, list | tuple) or len(block) != 2:
            raise InputError(f"quantization_config: expected weight_block_size [rows, cols], found {block!r}")
        scheme = with_blocks(get_scheme("int8-block"), block)
        assert scheme.weights is not None
        found: dict[str, StoredModule] = {}
        for name, info in tensors.items():
            if info.dtype != "I8" or not name.endswith(".weight") or len(info.shape) != 2:
                continue
            module = name.removesuffix(".weight")
            scale = module + _SCALE
            if scale not in tensors:
                raise missing_scale(name, scale, info.dtype)
            shape = (info.shape[0], info.shape[1])
            check_scale(module, scale, tuple(tensors[scale].shape), shape, scheme.weights)
            found[module] = StoredModule(
                shape=shape, scheme=scheme, names={"codes": name, "scale": scale}, format=self.name
            )
        return found
