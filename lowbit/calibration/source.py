"""A checkpoint as calibration sees it: float tensors by name, decoded on demand, whatever is on disk.

Reads BF16, FP16 and FP32 weights, and quantized ones of every format that `formats` reads, one tensor at
a time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoint.fused_experts import fused_names, split
from lowbit.checkpoint.headers import TensorRef
from lowbit.checkpoint.opening import open_checkpoint
from lowbit.checkpoint.plan import main_float
from lowbit.checkpoint.planner import module_of
from lowbit.checkpoint.reading import read_bytes
from lowbit.dtypes import E2M1, E2M1_VALUES, INT4
from lowbit.errors import InputError
from lowbit.formats import StoredModule, read, rotated_inputs
from lowbit.granularity import expand_scale, scale_shape
from lowbit.quantize import scale_as_float

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
        self.stored: Mapping[str, StoredModule] = read(self.config, self._refs)
        """Modules that are stored quantized, and how."""
        self.fused = fused_names(checkpoint, self._refs)
        """Modules of experts that lie in a 3-D tensor → that tensor; here each is a tensor of its own."""

    @property
    def tensors(self) -> Mapping[str, TensorRef]:
        """Where each lies."""
        return self._refs

    @property
    def modules(self) -> set[str]:
        """All with a weight, and the 3-D tensors of experts: what patterns may mean."""
        named = (module_of(ref, self.stored) for ref in self._refs.values())
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
        return name in self._refs or ((stored := self.stored.get(name)) is not None and stored.stacked)

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
        if (stored := self.stored.get(module)) is None:
            weight = self.raw(f"{module}.weight")
            if weight.dtype in _CODE_DTYPES:
                raise ValueError(
                    f"expected a scale beside {module}.weight ({weight.dtype}), found none; "
                    "the checkpoint is incomplete"
                )
            return weight.to(dtype)
        values, scale = self._codes(stored), scale_as_float(self.raw(stored.scale))
        if "scale" not in stored.names:
            # msModelSlim's static layers: the scales of weight and input multiplied.
            scale = scale / self.raw(stored.names["input_scale"]).to(torch.float32)
        shape, granularity = tuple(values.shape), stored.spec.granularity
        scale = scale.reshape(scale_shape(shape, granularity))
        values = values * expand_scale(scale, shape, granularity)
        # NVFP4's number for the whole tensor: after the scales, as the loops of a conversion have it.
        if (name := stored.names.get("global_scale")) is not None:
            values *= self.raw(name).to(torch.float32)
        if (name := stored.names.get("global_divisor")) is not None:
            values /= self.raw(name).to(torch.float32)
        return values.to(dtype)

    def tensor(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Any tensor by its name; a `.weight` is decoded as `weight` does, and all experts of a layer in one quantized
        tensor into the parameter [E, K, N] that they are in float."""
        if name not in self._refs and self.has(name):
            return self._experts(self.stored[name], dtype)
        if name.endswith(".weight"):
            return self.weight(name.removesuffix(".weight"), dtype)
        return self.raw(name).to(dtype)

    def _experts(self, stored: StoredModule, dtype: torch.dtype) -> Tensor:
        """[E, N, K] in MXFP4 → [E, K, N] in float, an expert at a time."""
        (experts, rows, cols), granularity = stored.shape, stored.spec.granularity
        codes, scale = self.raw(stored.weight), scale_as_float(self.raw(stored.scale))
        out = torch.empty(experts, cols, rows, dtype=dtype)
        for e in range(experts):
            values = _from_e2m1(codes[e].reshape(rows, -1))
            out[e] = (values * expand_scale(scale[e], (rows, cols), granularity)).T
        return out

    @cached_property
    def float_dtype(self) -> torch.dtype:
        """What the checkpoint's unquantized tensors are stored in, or most of them, and a conversion's will be."""
        return _TORCH_DTYPES[main_float(self._checkpoint, self.stored)]

    def _codes(self, stored: StoredModule) -> Tensor:
        """Codes of a weight as numbers, float32 [N, K]."""
        raw = self.raw(stored.weight)
        if stored.spec.dtype is E2M1:
            return _from_e2m1(raw)
        if "packed" not in stored.names:
            return raw.to(torch.float32)
        # compressed-tensors' int8 and int4: q + 128 or q + 8, little end first, in int32.
        rows, cols = (int(n) for n in self.raw(stored.names["shape"]))
        unsigned, middle = raw.contiguous().view(torch.uint8).reshape(rows, -1), 128.0
        if stored.spec.dtype is INT4:
            unsigned, middle = _halves(unsigned), 8.0
        return unsigned[:, :cols].to(torch.float32) - middle


def _from_e2m1(raw: Tensor) -> Tensor:
    """Packed codes [N, K / 2] → numbers, float32 [N, K]."""
    return torch.tensor(E2M1_VALUES)[_halves(raw.view(torch.uint8)).to(torch.int64)]


def _halves(raw: Tensor) -> Tensor:
    """Bytes [N, n] → codes of 4 bits, uint8 [N, 2n]: the first of two is in the lower half."""
    return torch.stack([raw & 15, raw >> 4], -1).flatten(1)
