"""How fast a causal language model runs and what it holds, measured the same way for every model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowbit.errors import InputError

_CACHES = ("cache", "past_key_values", "cache_params", "state")
"""What models call what they keep of the tokens that they have read: since transformers 5.24, before, Mamba, RWKV."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens per second over all sequences of a batch; medians."""

    batch: int
    prompt_tokens: int
    prefill: float
    """Prompt tokens per second until the first new token is known."""
    decode: float
    """New tokens per second after that, one per sequence and step."""


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers; what is shared counts once."""
    sizes: dict[tuple[int, int], int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        sizes[tensor.data_ptr(), tensor.numel()] = tensor.numel() * tensor.element_size()
    return sum(sizes.values())


@torch.inference_mode()
def measure(
    models: dict[str, Any], *, batch: int, prompt_tokens: int, new_tokens: int, repeats: int = 3, seed: int = 0,
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, Speed]:  # fmt: skip
    """Prefill and greedy decoding of random tokens, models alternating, so that all meet the same weather.

    One untimed round warms up. Every model gets the same prompt; the new tokens are fixed too,
    so that the work does not depend on what a model says. InputError for models that hand on nothing of what
    they have read.
    """
    words = _words(models)
    generator = torch.Generator().manual_seed(seed)
    prompt = words[torch.randint(0, len(words), (batch, prompt_tokens), generator=generator)]
    following = words[torch.randint(0, len(words), (batch, new_tokens), generator=generator)]
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in models}
    for round_ in range(repeats + 1):
        for name, model in models.items():
            progress(name)
            first, rest = _run(model, prompt, following)
            if round_:
                times[name][0].append(first)
                times[name][1].append(rest)
    return {
        name: Speed(
            batch=batch, prompt_tokens=prompt_tokens,
            prefill=batch * prompt_tokens / statistics.median(first),
            decode=batch * new_tokens / statistics.median(rest),
        )
        for name, (first, rest) in times.items()
    }  # fmt: skip


def _words(models: dict[str, Any]) -> torch.Tensor:
    """Token ids that all models take as text: none that stands for a picture or a sound, which they would ask for."""
    configs = [m.config for m in models.values()]
    ids = torch.arange(min(int(c.get_text_config().vocab_size) for c in configs))
    marks = {
        value
        for config in configs
        for key, value in config.to_dict().items()
        if key.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    return ids[~torch.isin(ids, torch.tensor(sorted(marks), dtype=torch.long))]


def _run(model: Any, prompt: torch.Tensor, following: torch.Tensor) -> tuple[float, float]:
    device = next(model.parameters()).device
    prompt, following = prompt.to(device), following.to(device)
    start = _now(device)
    out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    first = _now(device)
    name = next((n for n in _CACHES if out.get(n) is not None), None)
    if name is None:
        raise InputError(
            "expected a model that hands on what it has read (as cache or state), found none in what "
            f"{type(model).__name__} returns; its decoding is not measured"
        )
    for step in range(following.shape[1]):
        read = {name: out[name]}
        out = model(input_ids=following[:, step : step + 1], use_cache=True, logits_to_keep=1, **read)
        out.logits.argmax(-1)
    return first - start, _now(device) - first


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def dequantized_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same model in float, as it runs unquantized on torch's own Linears and Embeddings.

    Raises ValueError for experts, whose fused float layout is transformers' own.
    """
    import copy

    from lowbit.nn.bfloat16 import in_float
    from lowbit.nn.experts import QuantExperts
    from lowbit.nn.swap import replace_module

    if any(isinstance(m, QuantExperts) for m in model.modules()):
        raise ValueError("expected a model without experts; give the unquantized checkpoint to compare with")
    # They are made first, so that the copy never holds the codes twice.
    made = in_float(model, dtype)
    modules = dict(model.named_modules())
    memo: dict[int, Any] = {id(modules[name]): new for name, new in made.items()}
    memo |= {id(new): new for new in made.values()}
    other = copy.deepcopy(model, memo)
    for name, new in made.items():
        replace_module(other, name, new)
    return other.to(dtype)
