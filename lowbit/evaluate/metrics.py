"""How far a quantized language model is from its reference: perplexity, KL divergence, agreement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(kw_only=True)
class Agreement:
    """Sums over predicted tokens, mergeable; nothing of the logits is kept."""

    tokens: int = 0
    nll: float = 0.0
    """Negative log-likelihood of the true next tokens, nats, summed."""
    reference_nll: float = 0.0
    kl: float = 0.0
    """KL(reference ‖ model), nats, summed over positions."""
    top1: int = 0
    """Positions where both rank the same token first."""

    @torch.no_grad()
    def update(self, logits: Tensor, ids: Tensor, reference: Tensor | None = None) -> None:
        """Logits [B, T, V] of token ids [B, T], and the reference's for the same."""
        chunk = max(1, (1 << 26) // logits.shape[-1])
        predicted = logits[:, :-1].reshape(-1, logits.shape[-1])
        wanted = ids[:, 1:].reshape(-1).to(logits.device)
        before = reference[:, :-1].reshape(-1, reference.shape[-1]) if reference is not None else None
        for start in range(0, predicted.shape[0], chunk):
            rows = slice(start, start + chunk)
            log_p = torch.log_softmax(predicted[rows].float(), dim=-1)
            self.nll -= float(log_p.gather(1, wanted[rows, None]).double().sum())
            self.tokens += log_p.shape[0]
            if before is not None:
                log_q = torch.log_softmax(before[rows].to(log_p), dim=-1)
                self.reference_nll -= float(log_q.gather(1, wanted[rows, None]).double().sum())
                self.top1 += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
                self.kl += float((log_q.exp() * (log_q - log_p)).sum(-1).double().sum())

    def merge(self, other: Agreement) -> None:
        self.tokens += other.tokens
        self.nll += other.nll
        self.reference_nll += other.reference_nll
        self.kl += other.kl
        self.top1 += other.top1

    @property
    def perplexity(self) -> float:
        return _exp(self.nll / max(self.tokens, 1))

    @property
    def reference_perplexity(self) -> float:
        return _exp(self.reference_nll / max(self.tokens, 1))

    @property
    def mean_kl(self) -> float:
        return self.kl / max(self.tokens, 1)

    @property
    def top1_agreement(self) -> float:
        return self.top1 / max(self.tokens, 1)

    def to_dict(self, *, compared: bool = True) -> dict[str, Any]:
        out: dict[str, Any] = {"tokens": self.tokens, "perplexity": self.perplexity}
        if compared:
            out |= {
                "reference_perplexity": self.reference_perplexity,
                "perplexity_change": self.perplexity / self.reference_perplexity - 1.0,
                "kl": self.mean_kl,
                "top1_agreement": self.top1_agreement,
            }
        return out


def _exp(x: float) -> float:
    """Infinity where a float64 ends, at 709 nats."""
    return math.exp(x) if x < 709 else x * math.inf


def windows_of(ids: Tensor | Sequence[int], length: int) -> list[Tensor]:
    """Token ids → consecutive windows [length]; what is left at the end is dropped.

    Raises ValueError when there is not one whole window.
    """
    flat = torch.as_tensor(ids, dtype=torch.long).reshape(-1)
    if length < 2 or flat.numel() < length:
        raise ValueError(f"expected at least one window of {length} ≥ 2 tokens, found {flat.numel()} tokens")
    return list(flat[: flat.numel() // length * length].view(-1, length))


@torch.no_grad()
def perplexity(
    model: nn.Module,
    text: str | Tensor | Sequence[int],
    tokenizer: Any = None,
    *,
    length: int = 512,
    max_windows: int | None = None,
    batch_size: int = 4,
) -> float:
    """Perplexity of a transformers causal language model on a text: exp of the mean NLL per token.

    `text` is a string (then `tokenizer` is needed) or token ids. It is cut into windows of `length`
    tokens, each predicted from its own beginning; the first token of a window is not predicted.
    """
    if isinstance(text, str):
        if tokenizer is None:
            raise ValueError("expected a tokenizer for a text, found none; pass one, or token ids")
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    else:
        ids = torch.as_tensor(text)
    windows = windows_of(ids, length)[:max_windows]
    device = next(model.parameters()).device
    agreement = Agreement()
    for start in range(0, len(windows), batch_size):
        ids = torch.stack(windows[start : start + batch_size]).to(device)
        agreement.update(model(input_ids=ids, use_cache=False).logits, ids)
    return agreement.perplexity


@torch.no_grad()
def compare(
    model: nn.Module,
    reference: nn.Module,
    windows: Sequence[Tensor],
    *,
    batch_size: int = 4,
) -> Agreement:
    """Both models over the same windows of token ids [T]."""
    agreement = Agreement()
    for start in range(0, len(windows), batch_size):
        ids = torch.stack(list(windows[start : start + batch_size]))
        logits = model(input_ids=ids, use_cache=False).logits
        agreement.update(logits, ids, reference(input_ids=ids, use_cache=False).logits)
    return agreement
