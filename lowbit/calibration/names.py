"""What a model's tensors are called in the checkpoint it is read from, by transformers' own tables of renamings."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from lowbit.nn.joined import absent_part, converted_by, joined_along
from lowbit.nn.names import ROLES

_EXPERT = re.compile(r"^(?P<experts>.*\.experts)\.(?P<index>\d+)\.(?P<projection>\w+)(?P<rest>\..+)?$")


class CheckpointNames:
    """Names in memory, fused experts taken apart → names of a checkpoint's tensors and modules."""

    def __init__(self, model: nn.Module, tensors: Iterable[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, apply_renamings

        mapping = get_model_conversion_mapping(model)  # type: ignore[arg-type]
        renamings = [r for r in mapping if isinstance(r, WeightRenaming)]
        converters = [c for c in mapping if isinstance(c, WeightConverter)]
        parts = {n for n, _ in model.named_modules()} | {n for n, _ in model.named_parameters()}
        parts |= {n for n, _ in model.named_buffers()}
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        self._tensors: dict[str, str] = {}
        self._modules: dict[str, str] = {}
        self.otherwise: dict[str, str] = {}
        """What holds a module of ours → a tensor of the checkpoint that transformers splits, say, into such."""
        places: dict[str, dict[int, str]] = {}
        dims: dict[str, int] = {}
        wanted: dict[str, list[str]] = {}
        for disk in tensors:
            name = _plain_expert(apply_renamings(disk, renamings))
            name = _as_in(name, parts, prefix)
            self._tensors[name] = disk
            whole = name.removesuffix("_packed")
            found = None if _is_in(whole, parts) else converted_by(whole, converters)
            if found is not None:
                target, dim = _as_in(found.target, parts, prefix), joined_along(found.converter)
                if dim is None:
                    self.otherwise[_beside(target)] = disk
                else:
                    places.setdefault(target, {})[found.place] = disk.removesuffix("_packed")
                    dims[target], wanted[target] = dim, found.joined(disk.removesuffix("_packed"))
            (ours, _, leaf), (theirs, _, same) = name.rpartition("."), disk.rpartition(".")
            if leaf == same:
                self._modules[ours] = theirs

        self.joined: dict[str, tuple[list[str], int]] = {}
        """A convolution's tensor → the checkpoint's tensors that transformers joins to it, in order, and the dim."""
        self.apart: dict[str, list[str]] = {}
        """A Linear's weight → the same, by rows: each of these is quantized under its own name."""
        for target in places.keys() & parts:
            in_order = [places[target][i] for i in sorted(places[target])]
            module = model.get_submodule(target.rpartition(".")[0])
            # Nothing else: what a transform may change is written, and has to have a name.
            if isinstance(module, nn.Conv1d):
                self.joined[target] = in_order, dims[target]
            elif isinstance(module, nn.Linear) and target.endswith(".weight"):
                if absent := [t for t in wanted[target] if t not in in_order]:
                    raise absent_part(in_order[0], absent)
                self.apart[target] = in_order
                for disk in in_order:
                    part = f"{target.rpartition('.')[0]}.{part_name(disk)}"
                    self._tensors[f"{part}.weight"] = disk
                    self._modules[part] = disk.rpartition(".")[0]

    def made_of(self, names: Iterable[str]) -> str | None:
        """A tensor of the checkpoint that transformers makes into one of ours in another way than joining."""
        return next((of for n in names if (of := self.otherwise.get(_beside(n)))), None)

    def __call__(self, name: str) -> str:
        """The checkpoint's name of a tensor or module of ours; the same name where it has none."""
        if name in self._tensors:
            return self._tensors[name]
        if name in self._modules:
            return self._modules[name]
        parent, _, leaf = name.rpartition(".")
        return f"{self._modules[parent]}.{leaf}" if parent in self._modules else name


def part_name(tensor: str) -> str:
    """What a part is called within its `SplitLinear`: of `….mlp.gate_proj.weight`, `gate_proj`."""
    return tensor.split(".")[-2]


def _plain_expert(name: str) -> str:
    """`….experts.3.w1.weight` → `….experts.3.gate_proj.weight`."""
    match = _EXPERT.match(name)
    if match is None or match["projection"] not in ROLES:
        return name
    role = ROLES[match["projection"]]
    return f"{match['experts']}.{match['index']}.{role}_proj{match['rest'] or ''}"


def _beside(tensor: str) -> str:
    """What holds the module that a tensor is of."""
    return tensor.rpartition(".")[0].rpartition(".")[0]


def _as_in(name: str, parts: set[str], prefix: str) -> str:
    """The name with which the model has it: a checkpoint may be of the body alone, or of the whole for the body."""
    candidates = (name, prefix + name, name.removeprefix(prefix))
    return next((c for c in candidates if _is_in(c, parts)), name)


def _is_in(name: str, parts: set[str]) -> bool:
    """Whether the model has the module of a tensor, or the experts that it is one of."""
    match = _EXPERT.match(name)
    return name in parts or (match["experts"] if match else name.rpartition(".")[0]) in parts
