"""What a model's modules are called on disk.

transformers 5 renames while loading (`block_sparse_moe` → `mlp`, `language_model.model` →
`model.language_model`) and fuses experts; the rules and the user's patterns speak the
checkpoint's names. The library's own tables are asked, one tensor at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lowbit.checkpoint.fused_experts import fused_tensors
from lowbit.nn.integration import require_transformers
from lowbit.nn.joined import Converted, converted_by, joined_along, split_along

_EXPERT = re.compile(r"^(?P<experts>.*)\.(?P<index>\d+)\.(?P<projection>\w+)\.weight$")
_EXPERT_MODULE = re.compile(r"^(.*)\.(\d+)\.(\w+)$")

# The names of an expert's projections → what each does.
ROLES = {
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
    "w1": "gate", "w3": "up", "w2": "down",
}  # fmt: skip


def is_transformers_model(model: nn.Module) -> bool:
    """Whether it is a PreTrainedModel, without importing transformers for others."""
    return any(
        c.__module__ == "transformers.modeling_utils" and c.__name__ == "PreTrainedModel"
        for c in type(model).__mro__
    )


def tensors_on_disk(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """Name of a parameter in memory → its names in a saved checkpoint (several for fused experts)."""
    wanted = list(names)
    if not is_transformers_model(model):
        return {name: [name] for name in wanted}
    require_transformers()
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, list[str]] = {}
    for name in wanted:
        tensor = _get(model, name)
        one: dict[str, Any] = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")}
        try:
            found[name] = list(revert_weight_conversion(model, one))  # type: ignore[arg-type]
        except Exception:
            # A conversion that needs more tensors than this one: such names stay as they are.
            found[name] = [name]
    return found


def stored_modules_on_disk(model: nn.Module, names: Iterable[str]) -> list[str]:
    """What modules of a transformers model whose weights are in it as on disk are called there."""
    from transformers.core_model_loading import revert_weight_conversion

    tensors = {f"{name}.weight": torch.empty(0, device="meta") for name in names}
    return [module_of(tensor) for tensor in revert_weight_conversion(model, tensors)]  # type: ignore[arg-type]


def _get(model: nn.Module, name: str) -> torch.Tensor:
    module, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(module), leaf)


def expert_names(disk: Iterable[str]) -> dict[str, str]:
    """Disk names of fused experts → role (gate, up, down) → projection name; {} when they are fused on disk too."""
    found: dict[str, str] = {}
    for name in disk:
        match = _EXPERT.match(name)
        if match is None or match["projection"] not in ROLES:
            return {}
        found[ROLES[match["projection"]]] = match["projection"]
    return found


def module_of(tensor: str) -> str:
    """`a.b.weight` → `a.b`; a parameter of another name stands for itself, as in the converter."""
    return tensor.removesuffix(".weight")


class Finder:
    """Where a checkpoint's modules are in a transformers model."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        conversions = get_model_conversion_mapping(model)
        self._renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self._converters = [c for c in conversions if isinstance(c, WeightConverter)]
        self._prefix = model.base_model_prefix
        self.modules: dict[str, nn.Module] = dict(model.named_modules())

    def _renamed(self, tensor: str) -> str:
        from transformers.core_model_loading import apply_renamings

        return apply_renamings(tensor, self._renamings)

    def _placed(self, path: str) -> str | None:
        """With or without the base model's prefix, whichever the model has."""
        prefix = f"{self._prefix}." if self._prefix else ""
        for candidate in (path, path.removeprefix(prefix), prefix + path):
            if candidate in self.modules:
                return candidate
        return None

    def module(self, tensor: str) -> str | None:
        """The module whose weight is the checkpoint's `tensor`; None where the model has none."""
        return self._placed(self._renamed(tensor).rpartition(".")[0])

    def experts(self, module: str) -> str | None:
        """The fused experts that hold the checkpoint's expert projection `module`."""
        match = _EXPERT_MODULE.match(module_of(self._renamed(module + ".weight")))
        if match is None or match[3] not in ROLES:
            return None
        path = self._placed(match[1]) or self._placed_fused(module)
        down = None if path is None else getattr(self.modules[path], "down_proj", None)
        return path if isinstance(down, torch.Tensor) else None

    def projection(self, module: str) -> str:
        """What the checkpoint's expert projection `module` is called in memory: one of `ROLES`."""
        return module_of(self._renamed(module + ".weight")).rpartition(".")[2]

    def _placed_fused(self, module: str) -> str | None:
        """Where the fused tensor is that would hold the down projection of the same expert as `module`."""
        for tensor in fused_tensors(module.rpartition(".")[0] + ".down_proj"):
            if (path := self._placed(self._renamed(tensor).rpartition(".")[0])) is not None:
                return path
        return None

    def renamed(self, module: str) -> str:
        """What transformers calls the checkpoint's `module`, before it splits or joins anything."""
        return module_of(self._renamed(f"{module}.weight"))

    def _converted(self, module: str) -> Converted | None:
        return converted_by(f"{self.renamed(module)}.weight", self._converters)

    def split_into(self, module: str) -> list[str]:
        """The modules whose weights are the rows of the checkpoint's `module`, in their order; [] where it is no such
        matrix."""
        found = self._converted(module)
        if found is None or split_along(found.converter) != 0:
            return []
        paths = [self._placed(target.rpartition(".")[0]) for target in found.targets]
        return [p for p in paths if p is not None] if len(paths) > 1 and all(paths) else []

    def joined_into(self, module: str) -> tuple[str, int, int] | None:
        """(the module whose weight's rows are those of the checkpoint's `module` and of others, its place among them,
        how many they are); None where it is no such part."""
        found = self._converted(module)
        if found is None or joined_along(found.converter) != 0:
            return None
        path, count = self._placed(found.target.rpartition(".")[0]), len(found.converter.source_patterns)
        return None if path is None or count == 1 else (path, found.place, count)

    def joined_with(self, module: str) -> list[str]:
        """The checkpoint's `module` and those whose rows `joined_into` puts beside its; [] where their names are not
        certain."""
        found = self._converted(module)
        return [] if found is None else [module_of(t) for t in found.joined(f"{module}.weight")]

    def becomes_float(self, module: str) -> bool:
        """Whether transformers makes weights of this model from codes whose module is not in it under their name."""
        found = self._converted(module)
        return found is not None and self._placed(found.target.rpartition(".")[0]) is not None

    def reshapes(self, tensor: str) -> bool:
        """Whether transformers splits, joins or transposes this tensor while loading."""
        return any(c.compiled_sources.search(self._renamed(tensor)) for c in self._converters)
