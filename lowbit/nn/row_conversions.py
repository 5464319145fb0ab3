"""How tensors of a quantized module on disk become those of the modules in memory that are its rows, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
)

from lowbit.granularity import PerTensor
from lowbit.nn.linear import QuantLinear
from lowbit.nn.names import Finder

What = Literal["rows", "value", "shape"]
"""What a tensor is: something of each row (or block of rows), one value for all rows, or the shape [2] of a weight."""


class _OfRows(ConversionOps):
    """Between one tensor and one for each module, of `sizes` rows (of the tensor; of the weight, for a shape)."""

    def __init__(self, what: What, sizes: Sequence[int]) -> None:
        self.what, self.sizes = what, list(sizes)


class SplitRows(_OfRows):
    """One tensor → one for each module."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        (tensor,) = (_one(t) for t in input_dict.values())
        match self.what:
            case "rows":
                parts = list(tensor.split(self.sizes))
            case "value":
                parts = [tensor] * len(self.sizes)
            case "shape":
                parts = [torch.stack([torch.full_like(tensor[0], n), tensor[1]]) for n in self.sizes]
        # Memory of their own: who saves takes tensors that share some for one.
        return {name: part.clone() for name, part in zip(target_patterns, parts, strict=True)}

    @property
    def reverse_op(self) -> ConversionOps:
        return JoinRows(self.what, self.sizes)


class JoinRows(_OfRows):
    """The reverse of `SplitRows`. ValueError where what is one value on disk has become several."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        parts = [_one(input_dict[p]) for p in source_patterns if p in input_dict]
        return {target_patterns[0]: self._joined(target_patterns[0], parts)}

    def _joined(self, name: str, parts: list[Tensor]) -> Tensor:
        match self.what:
            case "rows" if parts[0].element_size() == 1:
                # As bytes: not every dtype of one byte can be joined on every device.
                return torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)
            case "rows":
                return torch.cat(parts)
            case "shape":
                return torch.stack([torch.stack(parts)[:, 0].sum(), parts[0][1]])
        if not all(torch.equal(part, parts[0]) for part in parts[1:]):
            raise ValueError(
                f"{name}: expected one value for the modules that are one matrix on disk, found "
                f"{[part.tolist() for part in parts]}"
            )
        return parts[0]

    @property
    def reverse_op(self) -> ConversionOps:
        return SplitRows(self.what, self.sizes)


def _one(tensors: Any) -> Tensor:
    return tensors[0] if isinstance(tensors, list) else tensors


def rows_converters(source: str, model: Any, paths: Sequence[str]) -> list[WeightConverter]:
    """For the tensors of a module on disk, by its name after transformers' renamings, whose rows are the QuantLinears
    at `paths`. Either may have the base model's prefix."""
    parts = [model.get_submodule(path) for path in paths]
    found = {leaf: _splitting(parts, content, leaf) for content, leaf in parts[0].names.items()}
    if parts[0].stored_bias() is not None:
        found["bias"] = _splitting(parts, "bias", "bias")
    prefix, made = model.base_model_prefix, []
    for leaf, operation in found.items():
        source_of = _exact(f"{source}.{leaf}", prefix)
        made.append(WeightConverter(source_of, [_exact(f"{p}.{leaf}", prefix) for p in paths], [operation]))
        made[-1].base_model_prefix, made[-1].scope_prefix = prefix, ""
    return made


def _splitting(parts: Sequence[QuantLinear], content: str, leaf: str) -> SplitRows:
    assert parts[0].scheme.weights is not None
    per_tensor = isinstance(parts[0].scheme.weights.granularity, PerTensor)
    if content == "shape":
        return SplitRows("shape", [part.out_features for part in parts])
    if content in ("input_scale", "input_zero_point") or (per_tensor and content in ("scale", "offset")):
        return SplitRows("value", [part.out_features for part in parts])
    return SplitRows("rows", [getattr(part, leaf).shape[0] for part in parts])


class Renamed(WeightRenaming):
    """Modules by other names, looked up: with a pattern for each, every tensor of a checkpoint would be tried on all.

    `names`: after transformers' renamings → in memory; `prefix`: the base model's, which either may have.
    """

    __slots__ = ("names", "prefix")

    def __init__(self, names: Mapping[str, str], prefix: str) -> None:
        super().__init__("^$", "^$")
        start = f"{prefix}."
        self.names = {a.removeprefix(start): b.removeprefix(start) for a, b in names.items()}
        self.prefix = prefix

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        module, _, leaf = source_key.rpartition(".")
        bare = module.removeprefix(f"{self.prefix}.")
        if bare not in self.names:
            return source_key, None
        self._was_used = True
        return f"{module.removesuffix(bare)}{self.names[bare]}.{leaf}", bare

    def reverse_transform(self) -> Renamed:
        return Renamed({b: a for a, b in self.names.items()}, self.prefix)


def save_joined(model: Any, joined: Mapping[str, Sequence[str]], apart: Mapping[str, str]) -> None:
    """Let transformers save QuantLinears as the modules that they are on disk.

    joined: name there → names in memory of those that are its rows; apart: → of one that transformers would join.
    """
    find = Finder(model)
    own: list[Any] = [
        c for name, paths in joined.items() for c in rows_converters(find.renamed(name), model, paths)
    ]
    if apart:
        own.append(
            Renamed({find.renamed(name): path for name, path in apart.items()}, model.base_model_prefix)
        )
    before = getattr(model, "_weight_conversions", None)
    if before is None:  # as transformers does for a model that it has not loaded
        mapping = get_model_conversion_mapping(model, add_legacy=False)
        before = [c for c in mapping if not isinstance(c, PrefixChange)]
    model._weight_conversions = before + own  # saving asks the last one first


def _exact(name: str, prefix: str) -> str:
    return "^" + re.escape(name.removeprefix(f"{prefix}."))
