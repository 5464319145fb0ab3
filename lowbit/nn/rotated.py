"""Modules of a checkpoint whose weights were rotated for inputs that are rotated while running."""

from __future__ import annotations

from typing import Any

from lowbit.errors import InputError
from lowbit.nn.experts import QuantExperts
from lowbit.nn.linear import QuantLinear
from lowbit.nn.names import Finder


def rotate_inputs(model: Any, find: Finder) -> None:
    """Where config.json says `"lowbit": {"online_hadamard": {module: block}}`, x is rotated as the weight was."""
    of_experts: dict[str, dict[str, int]] = {}
    for name, block in (getattr(model.config, "lowbit", None) or {}).get("online_hadamard", {}).items():
        path = find.module(name + ".weight")
        if path is None and (experts := find.experts(name)) is not None:
            of_experts.setdefault(experts, {})[name] = block
            continue
        module = None if path is None else find.modules[path]
        if not isinstance(module, QuantLinear):
            raise InputError(
                f"{name}: its weight is rotated (online_hadamard), but it is not a quantized Linear here"
            )
        module.hadamard = _checked_block(name, block, module.in_features)
    for path, blocks in of_experts.items():
        name, experts = next(iter(blocks)), model.get_submodule(path)
        if not isinstance(experts, QuantExperts):
            raise InputError(
                f"{name}: its weight is rotated (online_hadamard), but its experts are not quantized here"
            )
        down = experts.projections["down"]
        if {n.rpartition(".")[2] for n in blocks} != {down} or len(blocks) != experts.num_experts:
            raise InputError(
                f"{path}: expected an online Hadamard for {down} of all {experts.num_experts} experts, or of none, "
                f"found {len(blocks)} rotated ({name}, …); calibrate again"
            )
        found = {_checked_block(n, block, experts.intermediate_size) for n, block in blocks.items()}
        if len(found) > 1:
            raise InputError(
                f"{path}: expected one block size of an online Hadamard for all experts, found {sorted(found)}; "
                "calibrate again"
            )
        experts.hadamard = found.pop()


def _checked_block(name: str, block: int, inputs: int) -> int:
    """The block of an online Hadamard over `inputs`; InputError where it does not divide them."""
    if block < 1 or block & (block - 1) or inputs % block:
        raise InputError(
            f"{name}: expected blocks of a power of two that divides {inputs} for an online "
            f"Hadamard, found {block}; calibrate again"
        )
    return block
