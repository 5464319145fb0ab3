"""Fused 3-D experts taken apart into one Linear per projection, so that each can be observed and quantized.

transformers 5 holds the experts of a layer as `gate_up_proj` [E, 2·I, H] (or `up_proj` [E, I, H], without
a gate) and `down_proj` [E, H, I] and calls them as `experts(hidden, top_k_index, top_k_weights)`; Llama 4
transposed, and called with the rows of all experts. `UnfusedExperts` and `UnfusedRows` take
their places, compute the same, and name their parts as checkpoints do:
`experts.{i}.{gate,up,down}_proj.weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from lowbit.calibration.calls import INSTEAD
from lowbit.errors import InputError
from lowbit.nn.fused_experts import activation, own_gate, refusal, sizes, takes_sorted_rows


class Expert(nn.Module):
    """down(act(gate(x)) · up(x)), or down(act(up(x))) without a gate."""

    def __init__(
        self, hidden: int, intermediate: int, act_fn: Callable[[Tensor], Tensor], gated: bool = True,
        apply_gate: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False) if gated else None
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)
        self.act_fn = act_fn
        self.apply_gate = apply_gate
        """[…, 2I], gate and up side by side → […, I]; None: act(gate) · up."""

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(x)))
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.apply_gate is not None:
            return self.down_proj(self.apply_gate(torch.cat([gate, up], dim=-1)))
        return self.down_proj(self.act_fn(gate) * up)


class UnfusedExperts(nn.ModuleList):
    """Drop-in for transformers' fused experts.

    `see_all`: every expert also runs over tokens that the router sent elsewhere, for the
    observers' sake; the output keeps the routing. `token_counts` [E] counts routed tokens.
    """

    see_all: bool = False

    def __init__(self, experts: list[Expert]) -> None:
        super().__init__(experts)
        self.token_counts = torch.zeros(len(experts), dtype=torch.int64, device="cpu")

    @staticmethod
    def like(fused: nn.Module) -> UnfusedExperts:
        """Empty experts of the shapes of a fused module. Raises InputError for layouts that differ."""
        if problem := refusal(fused):
            raise InputError(
                f"expected experts that can be taken apart, found {type(fused).__name__}: {problem}; {INSTEAD}"
            )
        count, hidden, intermediate = sizes(fused)
        # A gate of the model's own (a clamp, say) reads the fused module's settings, none of its weights.
        gated, gate = getattr(fused, "has_gate", True), own_gate(fused)
        apply_gate = partial(gate, fused) if gated and gate is not None else None
        act_fn = activation(fused)
        experts = [Expert(hidden, intermediate, act_fn, gated, apply_gate) for _ in range(count)]
        return UnfusedRows(experts) if takes_sorted_rows(fused) else UnfusedExperts(experts)

    @property
    def first_parts(self) -> tuple[str, ...]:
        """Names of the projections that read an expert's input, relative to the experts."""
        leaves = ("gate_proj", "up_proj") if self[0].gate_proj is not None else ("up_proj",)
        return tuple(f"{i}.{leaf}" for i in range(len(self)) for leaf in leaves)

    def reads(self, tokens: Tensor, given: Tensor) -> bool:
        """Whether `given`, which the experts were called with, is `tokens` […, H] as the router sent them."""
        return given.data_ptr() == tokens.data_ptr() and given.numel() == tokens.numel()

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


class UnfusedRows(UnfusedExperts):
    """The same for Llama 4, which multiplies each expert's rows by the router's scores before: zero where not sent."""

    def reads(self, tokens: Tensor, given: Tensor) -> bool:
        """Whether the rows are `tokens`, each times a number."""
        x, y = tokens.reshape(-1, tokens.shape[-1]).double(), given.double()
        if y.dim() != 2 or y.shape[0] != len(self) * x.shape[0]:
            return False
        y = y.view(len(self), *x.shape)
        along = (y * x).sum(-1, keepdim=True) / x.square().sum(-1, keepdim=True).clamp(min=1e-30)
        return float((y - along * x).norm()) <= 1e-5 * float(y.norm())

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """Rows of all experts, in their order, [E·T, H] → [E·T, H]."""
        rows = hidden_states.view(len(self), -1, hidden_states.shape[-1])
        out = torch.zeros_like(rows)
        # With `see_all`, an expert also sees tokens as the expert that they were sent to most does.
        most = rows.abs().sum(-1).argmax(0)
        for i, expert in enumerate(self):
            sent = rows[i].ne(0).any(-1)
            token = torch.where(sent)[0]
            self.token_counts[i] += token.numel()
            if self.see_all:
                others = rows[most, torch.arange(rows.shape[1], device=rows.device)]
                out[i, token] = expert(torch.where(sent[:, None], rows[i], others))[token]
            elif token.numel():
                out[i, token] = expert(rows[i, token])
        return out.view_as(hidden_states)


def fused_modules(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of a layer's fused experts."""
    for name, module in list(layer.named_modules()):
        down = module._parameters.get("down_proj")
        if down is not None and down.dim() == 3:
            yield name, module


def unfuse(layer: nn.Module, name: str) -> None:
    """Replace one fused experts module of `layer`. Raises InputError for layouts that differ."""
    fused = layer.get_submodule(name)
    with torch.device(next(fused.parameters()).device):
        setattr(
            layer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], UnfusedExperts.like(fused)
        )
