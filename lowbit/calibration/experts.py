"""Fused 3-D experts taken apart into one Linear per projection, so that each can be observed and quantized.

transformers 5 holds the experts of a layer as `gate_up_proj` [E, 2·I, H] and `down_proj`
[E, H, I] and calls them as `experts(hidden, top_k_index, top_k_weights)`. `UnfusedExperts`
takes their place, computes the same, and names its parts as checkpoints do:
`experts.{i}.{gate,up,down}_proj.weight`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit.checkpoint.fused_experts import orientation_of
from lowbit.errors import InputError

_INSTEAD = "convert it without --method and --calibration"


class Expert(nn.Module):
    """down(act(gate(x)) · up(x))."""

    def __init__(self, hidden: int, intermediate: int, act_fn: nn.Module) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class UnfusedExperts(nn.ModuleList):
    """Drop-in for transformers' fused experts.

    `see_all`: every expert also runs over tokens that the router sent elsewhere, for the
    observers' sake; the output keeps the routing. `token_counts` [E] counts routed tokens.
    """

    see_all: bool = False

    def __init__(self, experts: list[Expert]) -> None:
        super().__init__(experts)
        self.token_counts = torch.zeros(len(experts), dtype=torch.int64, device="cpu")

    @classmethod
    def like(cls, fused: nn.Module) -> UnfusedExperts:
        """Empty experts of the shapes of a fused module. Raises InputError for layouts that differ."""
        gate_up, down = getattr(fused, "gate_up_proj", None), getattr(fused, "down_proj", None)
        act_fn = getattr(fused, "act_fn", None)
        extra = [n for n, _ in fused.named_parameters() if n not in ("gate_up_proj", "down_proj")]
        if gate_up is None or down is None or gate_up.dim() != 3 or act_fn is None or extra:
            raise InputError(
                "expected experts with gate_up_proj [E, 2I, H], down_proj [E, H, I] and act_fn, found "
                f"{type(fused).__name__} with {[n for n, _ in fused.named_parameters()]}; {_INSTEAD}"
            )
        count, twice, hidden = gate_up.shape
        if orientation_of(tuple(gate_up.shape), tuple(down.shape)) != "rows":
            raise InputError(
                f"expected experts [E, out, in] that are called with their tokens' routing, found gate_up_proj "
                f"{list(gate_up.shape)} and down_proj {list(down.shape)} in {type(fused).__name__}; {_INSTEAD}"
            )
        return cls([Expert(hidden, twice // 2, act_fn) for _ in range(count)])

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H], [T, k], [T, k] → [T, H]."""
        out = torch.zeros_like(hidden_states)
        for i, expert in enumerate(self):
            token, position = torch.where(top_k_index == i)
            self.token_counts[i] += token.numel()
            if self.see_all:
                routed = expert(hidden_states)[token]
            elif token.numel():
                routed = expert(hidden_states[token])
            else:
                continue
            out.index_add_(0, token, (routed * top_k_weights[token, position, None]).to(out.dtype))
        return out


def unfuse(layer: nn.Module) -> list[str]:
    """Replace every fused experts module of `layer`; returns the names of the new ones."""
    names = []
    for name, module in list(layer.named_modules()):
        gate_up = getattr(module, "gate_up_proj", None)
        if isinstance(gate_up, nn.Parameter) and gate_up.dim() == 3:
            parent = layer.get_submodule(name.rpartition(".")[0])
            with torch.device(gate_up.device):
                setattr(parent, name.rpartition(".")[2], UnfusedExperts.like(module))
            names.append(name)
    return names
