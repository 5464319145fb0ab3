"""What a model's tensors are called in the checkpoint it is read from, by transformers' own tables of renamings."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from lowbit.nn.names import ROLES

_EXPERT = re.compile(r"^(?P<experts>.*\.experts)\.(?P<index>\d+)\.(?P<projection>\w+)(?P<rest>\..+)?$")


class CheckpointNames:
    """Names in memory, fused experts taken apart → names of a checkpoint's tensors and modules."""

    def __init__(self, model: nn.Module, tensors: Iterable[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, apply_renamings

        renamings = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]  # type: ignore[arg-type]
        parts = {n for n, _ in model.named_modules()} | {n for n, _ in model.named_parameters()}
        parts |= {n for n, _ in model.named_buffers()}
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        self._tensors: dict[str, str] = {}
        self._modules: dict[str, str] = {}
        for disk in tensors:
            name = _plain_expert(apply_renamings(disk, renamings))
            # A checkpoint of the body alone, or of the whole where the body is wanted.
            for candidate in (name, prefix + name, name.removeprefix(prefix)):
                if _is_in(candidate, parts):
                    name = candidate
                    break
            self._tensors[name] = disk
            (ours, _, leaf), (theirs, _, same) = name.rpartition("."), disk.rpartition(".")
            if leaf == same:
                self._modules[ours] = theirs

    def __call__(self, name: str) -> str:
        """The checkpoint's name of a tensor or module of ours; the same name where it has none."""
        if name in self._tensors:
            return self._tensors[name]
        if name in self._modules:
            return self._modules[name]
        parent, _, leaf = name.rpartition(".")
        return f"{self._modules[parent]}.{leaf}" if parent in self._modules else name


def _plain_expert(name: str) -> str:
    """`….experts.3.w1.weight` → `….experts.3.gate_proj.weight`."""
    match = _EXPERT.match(name)
    if match is None or match["projection"] not in ROLES:
        return name
    role = ROLES[match["projection"]]
    return f"{match['experts']}.{match['index']}.{role}_proj{match['rest'] or ''}"


def _is_in(name: str, parts: set[str]) -> bool:
    """Whether the model has the module of a tensor, or the experts that it is one of."""
    match = _EXPERT.match(name)
    return name in parts or (match["experts"] if match else name.rpartition(".")[0]) in parts
