"""transformers' fused experts modules: which of them lowbit understands, and where a projection lies in them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lowbit.checkpoint.fused_experts import orientation_of

FUSED_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")
"""What transformers calls the weights of all experts; without a gate there is `up_proj`."""


def refusal(experts: nn.Module) -> str:
    """Why a fused experts module cannot be a QuantExperts, or ""."""
    down = getattr(experts, "down_proj", None)
    gated = getattr(experts, "has_gate", True)
    first = getattr(experts, "gate_up_proj" if gated else "up_proj", None)
    if not isinstance(down, Tensor) or down.dim() != 3 or not isinstance(first, Tensor) or first.dim() != 3:
        return "expected fused 3-D experts gate_up_proj [E, 2I, H] (or up_proj) and down_proj [E, H, I]"
    if not getattr(experts, "is_concatenated", True):
        return "its gate and up projections are interleaved"
    if getattr(experts, "has_bias", False) or getattr(experts, "has_post_expert_norm", False):
        return "its experts have biases or norms of their own"
    if not callable(getattr(experts, "act_fn", None)) and not (gated and own_gate(experts)):
        return "it has no act_fn"
    extra = [n for n, _ in experts.named_parameters() if n not in FUSED_PARAMETERS]
    if extra:
        return f"it has parameters beside its projections: {', '.join(extra)}"
    count, hidden, intermediate = down.shape
    shape = (count, *first.shape[1:]) if first.shape[0] == count + identity_experts(experts) else first.shape
    fits = orientation_of(tuple(shape), tuple(down.shape)) if gated else shape == down.mT.shape
    if not fits:
        twice = 2 if gated else 1
        return f"expected [{count}, {twice * intermediate}, {hidden}] before down_proj, found {list(first.shape)}"
    if transposed(experts) and not takes_sorted_rows(experts):
        return "its experts are stored [E, in, out]"
    return ""


def identity_experts(experts: nn.Module) -> int:
    """How many experts after those with weights return what they get (LongCat-Flash's zero experts)."""
    same = isinstance(getattr(experts, "identity_expert", None), nn.Identity)
    return int(getattr(experts, "zero_expert_num", 0)) if same else 0


def has_weights(experts: nn.Module, name: str) -> bool:
    """Whether one of `experts`, by a name on disk of one of its projections (`….experts.3.up_proj`), is no identity."""
    return (
        not identity_experts(experts) or int(name.split(".")[-2]) < parameter(experts, "down_proj").shape[0]
    )


def own_gate(experts: nn.Module) -> Callable[..., Tensor] | None:
    """What a class of experts computes between its products in place of act(gate) · up (a clamp, say), which it may do
    without an act_fn: (module, [T, 2I], gate and up side by side) → [T, I]."""
    gate = getattr(type(experts), "_apply_gate", None)
    return None if getattr(gate, "__name__", "") == "_default_apply_gate" else gate


def activation(experts: nn.Module) -> Any:
    """What act(gate) · up applies; nothing in experts without an act_fn, whose gate is their own."""
    return getattr(experts, "act_fn", nn.Identity())


def transposed(experts: nn.Module) -> bool:
    """Whether fused experts lie [E, in, out]."""
    first, down = getattr(experts, "gate_up_proj", None), parameter(experts, "down_proj")
    # transformers has a gate_up_proj, which it never reads, for LongCat-Flash's zero experts too.
    return (
        isinstance(first, Tensor)
        and orientation_of((down.shape[0], *first.shape[1:]), tuple(down.shape)) == "columns"
    )


def sizes(experts: nn.Module) -> tuple[int, int, int]:
    """(experts, hidden size, intermediate size) of a fused module, whichever way it lies."""
    count, hidden, intermediate = parameter(experts, "down_proj").shape
    return (count, intermediate, hidden) if transposed(experts) else (count, hidden, intermediate)


def takes_sorted_rows(experts: nn.Module) -> bool:
    """Whether a module is called as Llama 4's experts are: with the rows of all experts, and no routing."""
    return len(inspect.signature(experts.forward).parameters) == 1


def fused_weight(experts: nn.Module, projection: str, expert: int) -> Tensor:
    """[N, K] of one expert's projection, a view of the fused parameter."""
    gated = getattr(experts, "has_gate", True)
    name = "down_proj" if projection == "down" else ("gate_up_proj" if gated else "up_proj")
    both = parameter(experts, name)[expert].detach()
    both = both.mT if transposed(experts) else both
    if name != "gate_up_proj":
        return both
    half = both.shape[0] // 2
    return both[:half] if projection == "gate" else both[half:]


def parameter(module: nn.Module, name: str) -> Tensor:
    """A tensor of a module by its name."""
    value = getattr(module, name)
    assert isinstance(value, Tensor)
    return value
