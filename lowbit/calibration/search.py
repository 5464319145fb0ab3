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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.calibration.activations import ActivationCache
from lowbit.calibration.calibrate import Resumed, Warn, make_batches, module_schemes
from lowbit.calibration.choice import FLOAT, Unit
from lowbit.calibration.costs import Measured
from lowbit.calibration.distributed import gathered, my_share, rank, workers
from lowbit.calibration.layerwise import LayerwiseModel
from lowbit.calibration.settings import settings_of
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
    state: str | Path | None = None,
    data: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    resumed: Resumed = lambda done, layers: None,
    progress: Callable[[str, int, int], None] | None = None,
    warn: Warn = warnings.warn,
) -> list[Unit]:
    """Predicted KL of every unit under every candidate scheme (dynamic activations), on windows of ids [T].

    Workers share the windows (see `distributed`), and all return the same. `state`: a directory that keeps what
    is measured (see `costs`), where an interrupted run goes on when it is called again with the same arguments,
    to the same result; with others (`data` says where the windows come from) it is refused, or replaced with
    `overwrite`. `resumed` is told what a killed run had done, `warn` of patterns that mean nothing.
    """
    schemes = list(dict.fromkeys(get_scheme(c) for c in candidates))
    for scheme in schemes:
        if scheme.weights is None or scheme.needs_calibration:
            raise InputError(
                f"expected candidates with dynamic or no activations, found {scheme.name}; choose such as int8 and fp8 "
                "(float is always one)"
            )
    reader = Source(source)
    reader.require_unrotated()
    model = LayerwiseModel(reader, device=device)
    selection = selection or Selection()
    for warning in selection.warnings(reader.modules):
        warn(warning)
    # A conversion has a scale per channel where blocks or groups do not fit.
    made = {s.name: module_schemes(model, s, selection) for s in schemes}
    if not any(made.values()):
        raise InputError(
            f"expected at least one weight to quantize in the layers of {source}, found none that the rules allow; "
            "`lowbit plan` says which rule kept each"
        )
    batches = make_batches(my_share(windows), batch_size)
    if not batches:
        raise InputError("expected data to search on, found none; pass --data")
    settings = {
        "candidates": [s.name for s in schemes], "seed": seed, "batch_size": batch_size, "workers": workers(),
        **settings_of(source, selection, windows, data),
    }  # fmt: skip
    sweep = _Sweep(
        model=model, made=made, batches=batches, limit=memory_limit // (len(model) + 1),
        generator=torch.Generator().manual_seed(seed + rank()), progress=progress or (lambda what, done, total: None),
    )  # fmt: skip
    with Measured.kept(state, settings, model.device, overwrite=overwrite) as measured:
        sweep.run(measured, resumed)
        measured.finish()
    tokens = sum(gathered(sum(int(b.numel()) for b in batches)))
    costs = {module: of for layer in measured.layers.values() for module, of in layer.items()}
    return _units(model, made, costs, tokens)


@dataclass(kw_only=True)
class _Sweep:
    """Forward through the layers, whose inputs are kept, and back, where they are measured."""

    model: LayerwiseModel
    made: Mapping[str, Mapping[str, Scheme]]
    """Candidate → our module names → the scheme that a conversion gives them."""
    batches: Sequence[Tensor]
    """This worker's, ids [B, T]."""
    limit: int
    """Bytes of each layer's inputs that are kept in memory."""
    generator: torch.Generator
    progress: Callable[[str, int, int], None]
    states: list[ActivationCache] = field(default_factory=list)
    """Hidden states before each layer, and after the last one that ran."""
    calls: list[Sequence[dict[str, Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Embed the data, which refuses what the model does not take."""
        self.states.append(ActivationCache(self.limit))
        for ids in self.batches:
            call = self.model.embed(ids, self.states[0].hold)
            self.states[0].append(call.hidden)
            self.calls.append(call.kwargs)

    def run(self, measured: Measured, resumed: Resumed) -> None:
        """Measure the layers that are not measured yet, from the last to the first."""
        model, total = self.model, 2 * len(self.model)
        names = [model.layer_name(i) for i in range(len(model))]
        left, gradients = measured.begin(names, len(self.batches))
        if left < len(model):
            resumed(len(model) - left, len(model))
        # What comes after the last layer is seen by the head alone.
        for index in range(left if gradients is None else left - 1):
            self.progress(names[index], index, total)
            self._forward(index)
        if gradients is None and left:
            if any(model.shares(call[-1]) for call in self.calls):
                raise InputError(
                    f"expected decoder layers on their own, found some in {model.source.path} that use the keys and "
                    "values of others, whose cost would be counted in part; use one scheme, or a recipe of your own"
                )
            gradients = [_head_gradient(model, hidden, self.generator) for hidden in self.states[-1]]
        for index in reversed(range(left)):
            assert gradients is not None
            self.progress(names[index], total - 1 - index, total)
            measured.add(index, names[index], self._costs(index, gradients), gradients)
            self.states[index].close()

    def _forward(self, index: int) -> None:
        layer = self.model.load(index)
        self.states.append(ActivationCache(self.limit))
        for batch, hidden in enumerate(self.states[index]):
            self.states[-1].append(self.model.run(layer, index, hidden, self.calls[batch][index]))

    def _costs(self, index: int, gradients: list[Tensor]) -> dict[str, dict[str, float]]:
        """½ Σ (g·Δ)² of every module of a layer under every candidate; `gradients` are those at its input then."""
        layer, prefix = self.model.load(index), self.model.layer_name(index) + "."
        candidates: dict[str, dict[str, Scheme]] = defaultdict(dict)
        for candidate, of in self.made.items():
            for name in (n for n in of if n.startswith(prefix)):
                candidates[name.removeprefix(prefix)][candidate] = of[name]
        rounded = {n: _rounded(layer, n, of) for n, of in candidates.items()}
        costs: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for batch, hidden in enumerate(self.states[index]):
            gradients[batch], seen = _layer_gradient(
                self.model, layer, hidden, self.calls[batch][index], gradients[batch], list(candidates)
            )
            for name, calls_of in seen.items():
                for x, y, g in calls_of:
                    for candidate, scheme in candidates[name].items():
                        q = x if scheme.activations is None else fake_quantize(x, scheme.activations)
                        lost = nn.functional.linear(q, rounded[name][candidate]) - y
                        change = (lost * g).sum(-1).double().square().sum()
                        costs[prefix + name][candidate] += 0.5 * float(change)
        return costs


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
        cost = {n: sum(costs.get(m, {}).get(n, 0.0) for m in members) / tokens for n in possible}
        units.append(
            Unit(
                modules=tuple(model.disk_name(m) for m in members),
                elements=sum(shapes[m][0] * shapes[m][1] for m in members),
                cost={**cost, FLOAT: 0.0},
            )
        )
    return units
