"""What a conversion rounds that no calibration runs: modules beside the decoder layers, and routers within.

Gemma 4's projection to per-layer inputs is such by rule; a head, an embedding or a router where an override names it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lowbit.calibration.calibrate import module_decisions
from lowbit.calibration.layerwise import LayerwiseModel, matrix_shape
from lowbit.calibration.simulate import ActivationQuantizer, attach
from lowbit.calibration.stored import stored_input
from lowbit.checkpoint.rules import Decision, Selection, dynamic_instead
from lowbit.formats import get_format
from lowbit.quantize import quantize
from lowbit.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Our name → what happens to it."""

    linears: Mapping[str, Decision]
    """Every Linear of the decoder layers."""
    others: Mapping[str, Decision]
    """All else that has a matrix on disk."""

    def round_outside(self, model: LayerwiseModel) -> None:
        """Round what lies beside the decoder layers, and what it multiplies, for good."""
        stored, found = model.source.stored, {}
        for name, _ in outside(model):
            if (decision := self.others.get(name)) is None:
                continue
            if decision.as_found and (disk := model.disk_name(name)) in stored:
                found[name] = stored[disk].scheme
            elif (scheme := _scheme_of(decision)) is not None:
                _round_weight(model.model.get_submodule(name), scheme, model.disk_name(name))
                found[name] = scheme
        round_inputs(model, found)

    def round_inside(
        self, model: LayerwiseModel, layer: nn.Module, index: int
    ) -> dict[str, ActivationQuantizer]:
        """Round what is no Linear of decoder layer `index`; → the quantizers of its inputs."""
        prefix = model.layer_name(index) + "."
        found: dict[str, Scheme] = {}
        for name, decision in self.others.items():
            if name.startswith(prefix) and (scheme := _scheme_of(decision)) is not None:
                inside = name.removeprefix(prefix)
                _round_weight(layer.get_submodule(inside), scheme, model.disk_name(name))
                found[inside] = scheme
        return _quantizers(model, layer, found, prefix)

    def kept(self, model: LayerwiseModel) -> set[str]:
        """The checkpoint's names of what is carried as it is found."""
        both = (self.linears, self.others)
        return {model.disk_name(n) for of in both for n, d in of.items() if d.as_found}

    def rounded(self, model: LayerwiseModel) -> set[str]:
        """The checkpoint's names of what is quantized anew."""
        both = (self.linears, self.others)
        return {model.disk_name(n) for of in both for n, d in of.items() if _scheme_of(d) is not None}


def decided_beside(
    model: LayerwiseModel, scheme: Scheme, selection: Selection, calibrated: Collection[str] = ()
) -> Beside:
    """What a conversion in the default format decides.

    `calibrated`: the tensors of a calibration. It runs no module of the second kind, and a conversion makes static ones
    dynamic, unless the source has the ranges of their inputs.
    """
    # A head that is the embedding has no tensor of its own, and so none that a conversion quantizes.
    on_disk, stored = model.source.modules, model.source.stored
    there = {n: matrix_shape(m) for n, m in outside(model) if not m.get_parameter("weight").is_meta}
    there |= {n: s for index in range(len(model)) for n, s in model.other_shapes(index).items()}
    others = {n: s for n, s in there.items() if model.disk_name(n) in on_disk}
    decide = partial(module_decisions, model, scheme, fits=get_format().refuse, others=others)
    decisions = decide(selection)
    linears = {n: d for n, d in decisions.items() if n not in others}
    by_disk = {model.disk_name(n): decisions[n] for n in others}
    if dynamic := dynamic_instead(by_disk, stored, calibrated):
        decisions = decide(selection.with_first(dynamic))
    return Beside(linears=linears, others={n: decisions[n] for n in others})


def outside(model: LayerwiseModel) -> Iterator[tuple[str, nn.Module]]:
    """(our name, module) of what has a matrix beside the decoder layers: of the body, the head, towers on meta."""
    for name, module in model.model.named_modules():
        if matrix_shape(module):
            yield name, module


def round_inputs(model: LayerwiseModel, schemes: Mapping[str, Scheme]) -> None:
    """Let the modules named round their inputs as an engine would, from now on; static ones as the source has it."""
    attach(model.model, _quantizers(model, model.model, schemes))


def _quantizers(
    model: LayerwiseModel, parent: nn.Module, schemes: Mapping[str, Scheme], prefix: str = ""
) -> dict[str, ActivationQuantizer]:
    """`prefix`: of the parent's name."""
    found = {}
    for name, scheme in schemes.items():
        spec = scheme.activations
        if spec is not None and not isinstance(parent.get_submodule(name), nn.Embedding):
            scales = (None, None) if spec.dynamic else stored_input(model, model.disk_name(prefix + name))
            found[name] = ActivationQuantizer(spec, *scales)
    return found


def _scheme_of(decision: Decision) -> Scheme | None:
    """That by which a weight is quantized anew."""
    scheme = decision.scheme
    return scheme if scheme is not None and scheme.weights is not None and not decision.as_found else None


@torch.no_grad()
def _round_weight(module: nn.Module, scheme: Scheme, disk: str) -> None:
    weight: Tensor = module.get_parameter("weight")
    assert scheme.weights is not None  # of `_scheme_of`
    weight.copy_(quantize(weight, scheme.weights, name=disk).dequantize())
