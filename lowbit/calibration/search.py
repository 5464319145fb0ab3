"""What every module costs under every scheme: what mixed precision is chosen by (see `choice`).

Changing a module's output y by Δ changes the model's distribution by KL ≈ ½·E[(g·Δ)²], g the
gradient of the log-likelihood of tokens drawn from the model's own distribution (the Fisher
information: Choi et al., arXiv:1612.01543, here with the whole Δ instead of a diagonal). One
backward sweep, a decoder layer at a time, so gives the cost of every module under every
scheme. (g·Δ)² is taken of each token, without the products of two tokens: on SmolLM2 the squares
of whole texts' sums give the same, to 2 % for int8 and 6 % for fp8 over all modules, but a sample per
text is noisier than one per token.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.calibration.activations import ActivationCache
from lowbit.calibration.calibrate import Warn, make_batches, module_schemes
from lowbit.calibration.choice import FLOAT, Unit
from lowbit.calibration.distributed import gathered, my_share, rank
from lowbit.calibration.layerwise import LayerwiseModel
from lowbit.calibration.simulate import fake_quantize
from lowbit.calibration.source import Source
from lowbit.checkpoint.rules import Selection, fused_key
from lowbit.errors import InputError
from lowbit.quantize import quantize
from lowbit.scheme import Scheme, get_scheme


def sensitivities(
    source: str | Path,
    windows: Sequence[Tensor],
    candidates: Sequence[str] = ("int8", "fp8"),
    *,
    selection: Selection | None = None,
    device: str | torch.device = "cpu",
    batch_size: int = 4,
    memory_limit: int = 4 << 30,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    warn: Warn = warnings.warn,
) -> list[Unit]:
    """Predicted KL of every unit under every candidate scheme (dynamic activations), on windows of ids [T].

    Workers share the windows (see `distributed`), and all return the same. `warn` is told of patterns that
    mean nothing.
    """
    schemes = list(dict.fromkeys(get_scheme(c) for c in candidates))
    for scheme in schemes:
        if scheme.weights is None or scheme.needs_calibration:
            raise InputError(f"expected candidates with dynamic or no activations, found {scheme.name}")
    reader = Source(source)
    reader.require_unrotated()
    model = LayerwiseModel(reader, device=device)
    selection = selection or Selection()
    for warning in selection.warnings(reader.modules):
        warn(warning)
    # A conversion has a scale per channel where blocks or groups do not fit.
    made = {s.name: module_schemes(model, s, selection) for s in schemes}
    quantizable = list(dict.fromkeys(n for of in made.values() for n in of))
    if not quantizable:
        raise InputError(
            f"expected at least one weight to quantize in the layers of {source}, found none that the rules allow; "
            "`lowbit plan` says which rule kept each"
        )
    total = 2 * len(model)
    batches = make_batches(my_share(windows), batch_size)
    if not batches:
        raise InputError("expected data to search on, found none; pass --data")
    states = [ActivationCache(memory_limit // (len(model) + 1)) for _ in range(len(model) + 1)]
    calls = []
    for ids in batches:
        call = model.embed(ids, states[0].hold)
        states[0].append(call.hidden)
        calls.append(call.kwargs)
    for index in range(len(model)):
        if progress:
            progress(model.layer_name(index), index, total)
        layer = model.load(index)
        for batch, hidden in enumerate(states[index]):
            states[index + 1].append(model.run(layer, index, hidden, calls[batch][index]))
    if any(model.shares(call[-1]) for call in calls):
        raise InputError(
            f"expected decoder layers on their own, found some in {source} that use the keys and values of others, "
            "whose cost would be counted in part; use one scheme, or a recipe of your own"
        )
    generator = torch.Generator().manual_seed(seed + rank())
    gradients = [_head_gradient(model, hidden, generator) for hidden in states[-1]]
    costs: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for index in reversed(range(len(model))):
        if progress:
            progress(model.layer_name(index), total - 1 - index, total)
        layer, prefix = model.load(index), model.layer_name(index) + "."
        names = [n.removeprefix(prefix) for n in quantizable if n.startswith(prefix)]
        candidates_of = {n: {c: of[prefix + n] for c, of in made.items() if prefix + n in of} for n in names}
        rounded = {n: _rounded(layer, n, of) for n, of in candidates_of.items()}
        for batch, hidden in enumerate(states[index]):
            gradients[batch], seen = _layer_gradient(
                model, layer, hidden, calls[batch][index], gradients[batch], names
            )
            for name, calls_of in seen.items():
                for x, y, g in calls_of:
                    for candidate, scheme in candidates_of[name].items():
                        q = x if scheme.activations is None else fake_quantize(x, scheme.activations)
                        lost = nn.functional.linear(q, rounded[name][candidate]) - y
                        change = (lost * g).sum(-1).double().square().sum()
                        costs[prefix + name][candidate] += 0.5 * float(change)
        states[index].close()
    tokens = sum(gathered(sum(int(b.numel()) for b in batches)))
    return _units(model, made, _summed(costs), tokens)


def _summed(costs: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Module → scheme → cost, summed over workers in rank order."""
    out: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for part in gathered({module: dict(of) for module, of in costs.items()}):
        for module, of in part.items():
            for name, cost in of.items():
                out[module][name] += cost
    return out


def _head_gradient(model: LayerwiseModel, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """∂/∂h of Σ log p(token drawn from p), one sequence at a time to bound the logits."""
    grads = []
    for row in hidden:
        h = row[None].to(model.device, copy=True).requires_grad_(True)
        with torch.enable_grad():
            log_p = torch.log_softmax(model.head_with_grad(h).float(), dim=-1)[0]
            drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(log_p.device)
            log_p.gather(1, drawn).sum().backward()
        assert h.grad is not None
        grads.append(h.grad)
    return torch.cat(grads)


def _layer_gradient(
    model: LayerwiseModel,
    layer: nn.Module,
    hidden: Tensor,
    kwargs: dict[str, Any],
    gradient: Tensor,
    names: Sequence[str],
) -> tuple[Tensor, dict[str, list[tuple[Tensor, Tensor, Tensor]]]]:
    """(gradient at the layer's input, name → [(input, output without bias, gradient at the output)])."""
    seen: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, out: Tensor) -> None:
            if not out.requires_grad:
                return  # what only selects tokens (DeepSeek-V3.2's indexer) costs nothing that a gradient tells
            # As they are now: a layer may add to an output in place (Llama 4 to its shared expert's).
            plain = out.detach() - module.bias if isinstance(module.bias, Tensor) else out.detach().clone()
            out.register_hook(lambda gradient: seen[name].append((args[0].detach(), plain, gradient)))

        return hook

    handles = [layer.get_submodule(n).register_forward_hook(keep(n)) for n in names]
    try:
        with torch.enable_grad():
            h = hidden.to(model.device, copy=True).requires_grad_(True)
            model.run_with_grad(layer, h, kwargs).backward(gradient)
    finally:
        for handle in handles:
            handle.remove()
    assert h.grad is not None
    return h.grad, seen


def _rounded(layer: nn.Module, name: str, schemes: Mapping[str, Scheme]) -> dict[str, Tensor]:
    weight = layer.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return {
        candidate: quantize(weight, s.weights, name=name).dequantize().to(weight)
        for candidate, s in schemes.items()
        if s.weights
    }


def _units(
    model: LayerwiseModel,
    made: Mapping[str, Mapping[str, Scheme]],
    costs: Mapping[str, Mapping[str, float]],
    tokens: int,
) -> list[Unit]:
    """`made`: candidate → module → the scheme that a conversion gives it; without those that it leaves in float."""
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(len(model)):
        shapes |= model.linear_shapes(index)
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for ours in dict.fromkeys(ours for of in made.values() for ours in of):
        disk = model.disk_name(ours)
        groups[fused_key(disk, model.model_type) or (disk,)].append(ours)
    units = []
    for members in groups.values():
        possible = [n for n, of in made.items() if all(m in of for m in members)]
        cost = {n: sum(costs[m].get(n, 0.0) for m in members) / tokens for n in possible}
        units.append(
            Unit(
                modules=tuple(model.disk_name(m) for m in members),
                elements=sum(shapes[m][0] * shapes[m][1] for m in members),
                cost={**cost, FLOAT: 0.0},
            )
        )
    return units
