"""Which modules of a model in memory could be quantized, what they are called on disk, and what is in the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from lowbit.checkpoint.fused_experts import experts_of, part_names
from lowbit.nn.fused_experts import has_weights, parameter, refusal
from lowbit.nn.linear import is_conv1d, is_plain
from lowbit.nn.names import Finder, expert_names, is_transformers_model, module_of, tensors_on_disk
from lowbit.nn.stored import QuantModule
from lowbit.ops.checks import ANY_FLOAT


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A module that could be swapped."""

    name: str
    module: nn.Module
    disk: tuple[str, ...]
    """The modules that it is on disk: itself, each expert's projections, or several that are its rows in this order."""
    shape: tuple[int, ...]
    projections: Mapping[str, str] | None = None
    """Fused experts: gate, up, down → their names on disk."""
    rows: tuple[str, ...] = ()
    """The modules, this one among them, whose weights are the rows of one matrix on disk, in their order."""
    fused: Mapping[str, str] = field(default_factory=dict)
    """Of fused experts that are so on disk too: module of one expert → that of the 3-D tensor that holds it there."""

    @property
    def in_engines(self) -> tuple[str, ...]:
        """Its modules as engines build them: one for experts that are fused on disk."""
        if not is_fused_experts(self.module) or (self.projections and not self.fused):
            return self.disk
        together = self.fused.values() or self.disk
        return tuple(dict.fromkeys(experts_of(m, self.shape) for m in together))


def candidates_of(model: nn.Module) -> tuple[list[Candidate], dict[str, str]]:
    """(modules with a weight, those that cannot be swapped whatever the rules say → why)."""
    tied = _tied(model)
    modules = list(model.named_modules(remove_duplicate=False))
    fused = {n: m for n, m in modules if is_fused_experts(m)}
    weights = {
        n: m for n, m in modules
        if isinstance(getattr(m, "weight", None), Tensor) and not isinstance(m, QuantModule) and n not in fused
    }  # fmt: skip

    def full_name(name: str, leaf: str) -> str:
        return f"{name}.{leaf}" if name else leaf

    wanted = [full_name(n, "weight") for n in weights]
    wanted += [full_name(n, p) for n, m in fused.items() for p, _ in m.named_parameters(recurse=False)]
    disk = tensors_on_disk(model, wanted)
    find = Finder(model) if is_transformers_model(model) else None
    found: list[Candidate] = []
    unfit: dict[str, str] = {}
    for name, module in weights.items():
        weight = module.weight
        assert isinstance(weight, Tensor)
        on_disk = tuple(module_of(t) for t in disk[full_name(name, "weight")])
        parts = find is not None and _has_parts(name, module, tied, on_disk, find)
        on_disk = on_disk if parts else on_disk[:1]
        rows = find.split_into(on_disk[0]) if find is not None else []
        rows = rows if name in rows and all(_divided(weights.get(row), tied, row) for row in rows) else []
        found.append(
            Candidate(name=name, module=module, disk=on_disk, shape=tuple(weight.shape), rows=tuple(rows))
        )
        if weight.dim() == 2 and not isinstance(module, nn.Linear) and not is_conv1d(module):
            unfit[name] = f"a {type(module).__name__}, not a Linear"
        elif weight.dim() == 2 and "weight" not in module._parameters:
            unfit[name] = "its weight is computed from others (weight_norm, prune): make that permanent first"
        elif weight.dim() == 2 and weight.dtype not in ANY_FLOAT:
            unfit[name] = f"its weight is {weight.dtype}, no float: codes of another library, perhaps"
        elif isinstance(module, nn.Linear) and not is_plain(module):
            unfit[name] = f"a {type(module).__name__}, whose weight others may read"
        elif (
            weight.dim() == 2
            and find is not None
            and not (rows or parts)
            and find.reshapes(f"{on_disk[0]}.weight")
        ):
            unfit[name] = "transformers saves it joined, split or transposed, which codes do not survive"
        elif name in tied and weight.dim() == 2:
            unfit[name] = f"its weight is tied to {tied[name]}"
    for name, module in fused.items():
        tensors = [d for p, _ in module.named_parameters(recurse=False) for d in disk[full_name(name, p)]]
        problem = refusal(module)
        shape = tuple(parameter(module, "down_proj").shape)
        whole = {} if problem else {p: module_of(t) for t in tensors for p in part_names(t, shape[0])}
        tensors = [f"{p}.weight" for p in whole] or tensors
        projections = expert_names(tensors)
        if projections:
            tensors = [t for t in tensors if has_weights(module, module_of(t))]
        if problem:
            unfit[name] = problem
        elif not projections:
            unfit[name] = "on disk under names whose layout is not known here"
        found.append(
            Candidate(
                name=name,
                module=module,
                disk=tuple(module_of(t) for t in tensors),
                shape=shape,
                projections=projections or None,
                fused=whole,
            )
        )
    return found, unfit


def _has_parts(
    name: str, module: nn.Module, tied: Mapping[str, str], disk: tuple[str, ...], find: Finder
) -> bool:
    """Whether a Linear is several modules on disk that can be quantized each by itself."""
    places = [(name, i, len(disk)) for i in range(len(disk))]
    joined = len(disk) > 1 and [find.joined_into(d) for d in disk] == places
    return joined and _divided(module, tied, name) and module.bias is None


def _divided(module: nn.Module | None, tied: Mapping[str, str], name: str) -> bool:
    """Whether it can be quantized with others that are one matrix with it on disk, or in parts."""
    return (
        isinstance(module, nn.Linear) and is_plain(module) and name not in tied
        and "weight" in module._parameters and module.weight.dtype in ANY_FLOAT
    )  # fmt: skip


def is_fused_experts(module: nn.Module) -> bool:
    down = module._parameters.get("down_proj")
    return down is not None and down.dim() == 3


def _tied(model: nn.Module) -> dict[str, str]:
    """Module → another module that shares its weight."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append((name, module))
    found = {}
    for shared in owners.values():
        for name, _ in shared:
            others = [other for other, _ in shared if other != name]
            if others:
                found[name] = others[0]
    return found
