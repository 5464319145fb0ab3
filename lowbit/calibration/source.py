"""A checkpoint as calibration sees it: float tensors by name, decoded on demand, whatever is on disk.

Reads BF16, FP16 and FP32 weights, and quantized ones (block FP8 of DeepSeek and HF, and
compressed-tensors' int8, fp8, MXFP8 and packed int8), one tensor at a time. What a stored scale
covers is read from its shape beside the weight's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.fused_experts import fused_names, split
from lowbit.checkpoint.headers import TensorRef, open_checkpoint
from lowbit.checkpoint.plan import main_float
from lowbit.checkpoint.planner import module_of
from lowbit.checkpoint.reading import read_bytes
from lowbit.dtypes import E2M1, E2M1_VALUES, INT4
from lowbit.errors import InputError
from lowbit.formats import read, rotated_inputs
from lowbit.granularity import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, expand_scale
from lowbit.quantize import scale_as_float

_SCALES = (".weight_scale_inv", ".weight_scale", ".scale")
_CODE_DTYPES = (torch.int8, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2)
_TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


class Source:
    """The tensors of a checkpoint directory, loaded one by one and decoded to float."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        checkpoint = open_checkpoint(path)
        if not checkpoint.config:
            raise InputError(
                f"{path}: expected a config.json that says what model this is, found none; add it"
            )
        self.config: dict[str, Any] = checkpoint.config
        self._checkpoint = split(checkpoint).checkpoint
        self._refs = self._checkpoint.tensors
        self._stored = read(self.config, self._refs)
        self.fused = fused_names(checkpoint, self._refs)
        """Modules of experts that lie in a 3-D tensor → that tensor; here each is a tensor of its own."""

    @property
    def tensors(self) -> Mapping[str, TensorRef]:
        """Where each lies."""
        return self._refs

    @property
    def quantized(self) -> Collection[str]:
        """Modules that are stored quantized."""
        return self._stored.keys()

    @property
    def modules(self) -> set[str]:
        """All with a weight, and the 3-D tensors of experts: what patterns may mean."""
        named = (module_of(ref, self._stored) for ref in self._refs.values())
        return {*(m for m in named if m is not None), *self.fused.values()}

    @property
    def rotated(self) -> Collection[str]:
        """Modules whose weights are for inputs that lowbit's modules rotate while running."""
        return rotated_inputs(self.config).keys()

    def require_unrotated(self) -> None:
        """InputError where a model computes something else with the weights than the checkpoint means."""
        if self.rotated:
            raise InputError(
                f"{self.path}: expected weights for inputs as they are, found {len(self.rotated)} modules whose inputs "
                f"are rotated while running (online Hadamard, first: {next(iter(self.rotated))}); give the checkpoint "
                "from before the rotation"
            )

    def has(self, name: str) -> bool:
        return name in self._refs

    def raw(self, name: str) -> Tensor:
        """The tensor as stored: read, not mapped, since mapped pages of a large file count as this process's."""
        ref = self._refs.get(name)
        if ref is None:
            raise KeyError(f"expected tensor {name} in {self.path}, found no such name")
        return torch.from_numpy(read_bytes(ref)).view(_TORCH_DTYPES[ref.dtype]).reshape(ref.shape)

    def has_weight(self, module: str) -> bool:
        return self.has(f"{module}.weight") or self.has(f"{module}.weight_packed")

    def rows(self, weight: str) -> int:
        """How many a matrix `….weight` has, which may be stored as `….weight_packed`."""
        return (self._refs.get(weight) or self._refs[f"{weight}_packed"]).shape[0]

    def weight(self, module: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """`module`'s weight as floats of `dtype`, dequantized where it is stored quantized.

        Raises ValueError when codes have no scale: reading them as if the scale were 1 is the
        classic silent corruption.
        """
        if self.has(f"{module}.weight_packed"):
            return self._packed(module).to(dtype)
        weight = self.raw(f"{module}.weight")
        if module in self._stored and self._stored[module].spec.dtype is E2M1:
            values = torch.tensor(E2M1_VALUES)[_halves(weight.view(torch.uint8)).to(torch.int64)]
            scale = scale_as_float(self.raw(self._stored[module].scale))
            return self._decode(values, scale, module).to(dtype)
        if weight.dtype not in _CODE_DTYPES:
            return weight.to(dtype)
        name = next((module + s for s in _SCALES if self.has(module + s)), None)
        if name is None and self.has(f"{module}.deq_scale"):
            # msModelSlim's static layers: the scales of weight and input multiplied.
            scale = scale_as_float(self.raw(f"{module}.deq_scale"))
            scale = scale / self.raw(f"{module}.input_scale").to(torch.float32)
            return self._decode(weight.to(torch.float32), scale, module).to(dtype)
        if name is None:
            raise ValueError(
                f"expected a scale beside {module}.weight ({weight.dtype}), found none of "
                f"{', '.join(_SCALES)}; the checkpoint is incomplete"
            )
        scale = scale_as_float(self.raw(name))
        return self._decode(weight.to(torch.float32), scale, module).to(dtype)

    def tensor(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Any tensor by its name; a `.weight` is decoded as `weight` does."""
        if name.endswith(".weight") and not (
            self.has(name) and _TORCH_DTYPES[self._refs[name].dtype] not in _CODE_DTYPES
        ):
            return self.weight(name.removesuffix(".weight"), dtype)
        return self.raw(name).to(dtype)

    @cached_property
    def float_dtype(self) -> torch.dtype:
        """What the checkpoint's unquantized tensors are stored in, or most of them, and a conversion's will be."""
        return _TORCH_DTYPES[main_float(self._checkpoint, self._stored)]

    @cached_property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a scale's tile, where the configuration says; 128×128 otherwise."""
        quantization = self.config.get("quantization_config") or {}
        size = quantization.get("weight_block_size")
        for group in (quantization.get("config_groups") or {}).values():
            size = size or (group.get("weights") or {}).get("block_structure")
        rows, cols = size or (128, 128)
        return int(rows), int(cols)

    def _decode(self, values: Tensor, scale: Tensor, module: str) -> Tensor:
        rows, cols = values.shape
        granularity: Granularity
        if scale.numel() == 1:
            granularity, scale = PerTensor(), scale.reshape(1)
        elif scale.dim() == 1 and scale.shape[0] == rows:
            granularity, scale = PerChannel(), scale[:, None]
        elif scale.shape == (rows, 1):
            granularity = PerChannel()
        elif scale.dim() == 2 and scale.shape[0] == rows and cols % scale.shape[1] == 0:
            granularity = PerGroup(cols // scale.shape[1])
        elif scale.dim() == 2 and scale.shape == (-(-rows // self.block[0]), -(-cols // self.block[1])):
            granularity = PerBlock(*self.block)
        else:
            raise ValueError(
                f"expected a scale of {module} per tensor, channel, group or {self.block} block of "
                f"{[rows, cols]}, found {list(scale.shape)}"
            )
        return values * expand_scale(scale, (rows, cols), granularity)

    def _packed(self, module: str) -> Tensor:
        """compressed-tensors' pack-quantized int8 and int4: q + 128 or q + 8, little end first, in int32."""
        packed = self.raw(f"{module}.weight_packed").contiguous()
        rows, cols = (int(n) for n in self.raw(f"{module}.weight_shape"))
        raw, middle = packed.view(torch.uint8).reshape(rows, -1), 128.0
        if self._stored[module].spec.dtype is INT4:
            raw, middle = _halves(raw), 8.0
        codes = raw[:, :cols].to(torch.float32) - middle
        return self._decode(codes, self.raw(f"{module}.weight_scale").to(torch.float32), module)


def _halves(raw: Tensor) -> Tensor:
    """Bytes [N, n] → codes of 4 bits, uint8 [N, 2n]: the first of two is in the lower half."""
    return torch.stack([raw & 15, raw >> 4], -1).flatten(1)
