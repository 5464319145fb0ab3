"""A checkpoint as calibration sees it: float tensors by name, decoded on demand, whatever is on disk.

Reads BF16, FP16 and FP32 weights, and quantized ones (block FP8 of DeepSeek and HF, and
compressed-tensors' int8, fp8, MXFP8 and packed int8), one tensor at a time. What a stored scale
covers is read from its shape beside the weight's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lowbit.granularity import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, expand_scale
from lowbit.quantize import scale_as_float

_SCALES = (".weight_scale_inv", ".weight_scale", ".scale")
_CODE_DTYPES = (torch.int8, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2)


class Source:
    """The tensors of a checkpoint directory, loaded one by one and decoded to float."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        config = self.path / "config.json"
        if not config.is_file():
            raise FileNotFoundError(
                f"expected a checkpoint directory with a config.json, found none in {self.path}"
            )
        self.config: dict[str, Any] = json.loads(config.read_text())
        self._files = _index(self.path)
        self._open: dict[Path, Any] = {}

    @property
    def names(self) -> Iterable[str]:
        return self._files.keys()

    def has(self, name: str) -> bool:
        return name in self._files

    def raw(self, name: str) -> Tensor:
        """The tensor as stored."""
        try:
            file = self._files[name]
        except KeyError:
            raise KeyError(f"expected tensor {name} in {self.path}, found no such name") from None
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")  # type: ignore[no-untyped-call]
        return self._open[file].get_tensor(name)

    def has_weight(self, module: str) -> bool:
        return self.has(f"{module}.weight") or self.has(f"{module}.weight_packed")

    def weight(self, module: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """`module`'s weight as floats of `dtype`, dequantized where it is stored quantized.

        Raises ValueError when codes have no scale: reading them as if the scale were 1 is the
        classic silent corruption.
        """
        if self.has(f"{module}.weight_packed"):
            return self._packed(module).to(dtype)
        weight = self.raw(f"{module}.weight")
        if weight.dtype not in _CODE_DTYPES:
            return weight.to(dtype)
        name = next((module + s for s in _SCALES if self.has(module + s)), None)
        if name is None:
            raise ValueError(
                f"expected a scale beside {module}.weight ({weight.dtype}), found none of "
                f"{', '.join(_SCALES)}; the checkpoint is incomplete"
            )
        scale = scale_as_float(self.raw(name))
        return self._decode(weight.to(torch.float32), scale, module).to(dtype)

    def tensor(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Any tensor by its name; a `.weight` is decoded as `weight` does."""
        if name.endswith(".weight") and not (self.has(name) and self.raw(name).dtype not in _CODE_DTYPES):
            return self.weight(name.removesuffix(".weight"), dtype)
        return self.raw(name).to(dtype)

    @cached_property
    def float_dtype(self) -> torch.dtype:
        """What the checkpoint's unquantized tensors are stored in."""
        name = self.config.get("dtype") or self.config.get("torch_dtype") or "bfloat16"
        return getattr(torch, str(name).removeprefix("torch."), torch.bfloat16)

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
        """compressed-tensors' pack-quantized int8: bytes of q + 128, little end first, in int32."""
        packed = self.raw(f"{module}.weight_packed").contiguous()
        rows, cols = (int(n) for n in self.raw(f"{module}.weight_shape"))
        codes = packed.view(torch.uint8).reshape(rows, -1)[:, :cols].to(torch.float32) - 128.0
        return self._decode(codes, self.raw(f"{module}.weight_scale").to(torch.float32), module)


def _index(path: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text())["weight_map"]
        files = {name: path / file for name, file in weight_map.items()}
        missing = sorted({f.name for f in files.values() if not f.is_file()})
        if missing:
            raise FileNotFoundError(f"expected every shard of {index}, found these missing: {missing[:5]}")
    else:
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(file, framework="pt") as stream:  # type: ignore[no-untyped-call]
                files.update(dict.fromkeys(stream.keys(), file))
    if not files:
        raise FileNotFoundError(f"expected safetensors files in {path}, found none")
    return files
