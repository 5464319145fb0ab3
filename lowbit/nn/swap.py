"""Quantize a model in memory: the converter's own rules decide, and each module is swapped in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowbit.checkpoint.patterns import Patterns
from lowbit.checkpoint.roles import with_heads
from lowbit.checkpoint.rules import Decision, Selection, decide
from lowbit.errors import InputError
from lowbit.formats import METHOD_OF_DESCRIPTION, Format, Layout
from lowbit.nn.candidates import Candidate, candidates_of, is_fused_experts
from lowbit.nn.experts import QuantExperts
from lowbit.nn.fused_experts import parameter, sizes
from lowbit.nn.joined import SplitLinear, within_blocks
from lowbit.nn.linear import QuantLinear, is_conv1d
from lowbit.nn.names import is_transformers_model, stored_modules_on_disk
from lowbit.nn.stored import QuantModule, as_format, as_scheme, float_linear
from lowbit.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class SwapReport:
    """What `quantize_model` did. Names are those in memory."""

    quantized: Mapping[str, str]
    """Module → scheme."""
    kept: Mapping[str, str]
    """Module with a matrix weight → why it stayed in float."""
    warnings: tuple[str, ...]
    bytes_before: int
    """Of all parameters and buffers."""
    bytes_after: int

    def __str__(self) -> str:
        schemes = Counter(self.quantized.values())
        lines = [
            f"{sum(schemes.values())} modules quantized "
            f"({', '.join(f'{count} {name}' for name, count in schemes.most_common())}), {len(self.kept)} kept; "
            f"{self.bytes_before / 1e6:.1f} → {self.bytes_after / 1e6:.1f} MB"
        ]
        reasons = Counter(self.kept.values())
        lines += [f"  kept {count}: {reason}" for reason, count in reasons.most_common()]
        return "\n".join([*lines, *(f"  warning: {w}" for w in self.warnings)])


def quantize_model(
    model: nn.Module,
    scheme: Scheme | str,
    *,
    ignore: Sequence[str] = (),
    overrides: Mapping[str, str] | None = None,
    format: Format | str = "compressed-tensors",
) -> nn.Module:
    """Swap Linears, Conv1Ds and experts for quantized ones, in place; returns the model.

    The same rules choose as in `lowbit.convert`, so embeddings, output heads, routers, norms and
    vision towers stay, and members of a fused group agree. `ignore` and the keys of `overrides`
    (→ a scheme's name, or `float`) are patterns as there: a module's name or its parent's, a
    glob, or `re:` and a regex, on names as on disk or in memory. `model.quantization_report`
    (a `SwapReport`) says what was swapped, what was not, and why.

    One module at a time is quantized, on its device, and its float weight is dropped, so the
    peak is one module above the model. Of a transformers model (or those that a wrapper holds) the config is updated
    too: `save_pretrained` writes a checkpoint in `format`. What an earlier call quantized stays as it
    is. (GPT-2's Conv1D is transposed on the way; saved so, only lowbit loads it.)

    Raises InputError for schemes that need calibration, patterns that are not regular
    expressions, and weights that are on meta or not finite; what came before such a weight stays
    quantized, and a call that leaves the weight out goes on from there.
    """
    scheme, target = as_scheme(scheme), as_format(format)
    _check(model, scheme, target)
    asked = Selection.of(ignore=ignore, overrides=overrides)
    before = _nbytes(model)
    parts = [_decide(path, inner, scheme, target, asked) for path, inner in _parts(model)]
    quantized: dict[str, str] = {}
    kept: dict[str, str] = {}
    warnings = asked.patterns.warnings([n for part in parts for n in part.names()])
    swapped: dict[int, nn.Module] = {}
    for part in parts:
        ignored: list[str] = []
        joined: dict[str, tuple[str, ...]] = {}
        apart: dict[str, str] = {}
        try:
            while part.candidates:
                matrix = part.next_matrix()
                candidate = matrix[0]
                names = [_full_name(part.path, c.name) for c in matrix]
                decision = part.decisions[candidate.disk[0]]
                unfit = part.unfit.get(candidate.name, "") or part.within_blocks(candidate)
                reason = _why_kept(decision, unfit, part.given)
                if decision.scheme is None or reason:
                    if len(candidate.shape) == 2 or is_fused_experts(candidate.module):
                        kept |= dict.fromkeys(names, reason)
                        if decision.role not in ("embedding", "norm", "conv"):
                            ignored += candidate.in_engines
                    continue
                for c, name in zip(matrix, names, strict=True):
                    if id(c.module) not in swapped:
                        swapped[id(c.module)] = _quantized(c, name, decision.scheme, target)
                for c, name in zip(matrix, names, strict=True):
                    new = swapped[id(c.module)]
                    _carry_hooks(c.module, new)
                    model = replace_module(model, name, new)
                    _drop_weights(c.module)
                    if isinstance(new, SplitLinear):
                        apart |= {disk: f"{c.name}.{i}" for i, disk in enumerate(c.disk)}
                quantized |= dict.fromkeys(names, decision.scheme.name)
                part.layout |= dict.fromkeys(candidate.disk, decision.scheme)
                if candidate.rows:
                    joined[candidate.disk[0]] = candidate.rows
        finally:
            # What came before an error stays quantized, and may be saved.
            if joined or apart:
                from lowbit.nn.row_conversions import save_joined

                save_joined(part.model, joined, apart)
        if is_transformers_model(part.model) and part.layout:
            _describe(part.model, target, part.layout, ignored)
    if not quantized:
        warnings.append("no module was quantized")
    _leave_fused_paths(model)
    model.quantization_report = SwapReport(  # type: ignore[assignment]
        quantized=quantized, kept=kept, warnings=tuple(warnings), bytes_before=before, bytes_after=_nbytes(model)
    )  # fmt: skip
    return model


@dataclass(kw_only=True)
class _Part:
    """A transformers model, which its own config and its names on disk decide about, or all beside those."""

    path: str
    """Where it is in the model that is quantized."""
    model: nn.Module
    layout: dict[str, Scheme]
    """Modules on disk that are quantized, by an earlier call at first."""
    candidates: list[Candidate]
    unfit: Mapping[str, str]
    decisions: Mapping[str, Decision]
    given: Mapping[str, str]
    """Disk name → the user's pattern that means it."""

    def names(self) -> list[str]:
        """All that a pattern may match."""
        found = [*self.decisions, *(n for c in self.candidates for n in c.fused.values())]
        return found + [n for c in self.candidates for n in (c.name, _full_name(self.path, c.name))]

    def next_matrix(self) -> list[Candidate]:
        """Takes the next candidate out, with those that are one matrix on disk with it: of one that cannot be
        quantized, none is."""
        first = self.candidates.pop(0)
        if not first.rows:
            return [first]
        others = [c for c in self.candidates if c.rows == first.rows]
        self.candidates = [c for c in self.candidates if c.rows != first.rows]
        return [first, *others]

    def within_blocks(self, candidate: Candidate) -> str:
        """Why modules that are one matrix on disk cannot be its rows under the scheme that was chosen, or ""."""
        scheme = self.decisions[candidate.disk[0]].scheme
        if not candidate.rows or scheme is None or scheme.weights is None:
            return ""
        rows = [self.model.get_submodule(row).out_features for row in candidate.rows]  # type: ignore[misc]
        return within_blocks(rows, scheme.weights.granularity)  # type: ignore[arg-type]


def _full_name(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def _parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, model): the model, and the transformers models that it holds where it is none itself (a LightningModule,
    sentence-transformers)."""
    found: list[tuple[str, nn.Module]] = [("", model)]
    if is_transformers_model(model):
        return found
    for path, inner in model.named_modules(remove_duplicate=False):
        if is_transformers_model(inner) and not any(path.startswith(f"{p}.") for p, _ in found if p):
            found.append((path, inner))
    return found


def _check(model: object, scheme: Scheme, target: Format) -> None:
    """InputError for what is no model, and what a model in memory cannot be quantized to."""
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            f"expected a torch.nn.Module as it was before any script or trace, found {type(model).__name__}; "
            "`lowbit convert` quantizes checkpoints"
        )
    _check_dynamic(scheme)
    if target.quant_method == METHOD_OF_DESCRIPTION:
        raise InputError(
            f"expected a format that config.json describes, found {target.name}, which has a file of its own; use "
            f"`lowbit convert --format {target.name}` on the saved model"
        )


def _check_dynamic(scheme: Scheme) -> None:
    if scheme.needs_calibration:
        raise InputError(
            f"expected a scheme with dynamic activations, found {scheme.name}, whose scales are measured on data; "
            "use `lowbit calibrate` and `lowbit convert --calibration`, then lowbit.load"
        )


def _why_kept(decision: Decision, unfit: str, given: Mapping[str, str]) -> str:
    """Why a module stays in float, in the user's own patterns (`given`: disk name → pattern); "" where it does not."""
    reason = decision.reason if decision.scheme is None else unfit
    if decision.role == "experts-3d" and not decision.reason.startswith("--"):
        reason = f"experts fused into one 3-D tensor: {unfit}"
    pattern = given.get(reason.removeprefix("--ignore "))
    return reason if pattern is None else f"--ignore {pattern}"


def _quantized_before(model: nn.Module, target: Format) -> dict[str, Scheme]:
    """Modules on disk of what an earlier call or a checkpoint quantized: the config of all is written anew.

    InputError where they are in another format than `target`, since a checkpoint has one.
    """
    if not is_transformers_model(model):
        return {}
    found: dict[str, Scheme] = {}
    for name, module in model.named_modules():
        if not isinstance(module, QuantExperts | QuantLinear):
            continue
        if module.format.name != target.name:
            raise InputError(
                f"{name}: expected a model in float, or quantized in {target.name}, found {module.format.name}; give "
                f"format={module.format.name!r}, or start from the model in float"
            )
        found |= dict.fromkeys(stored_modules_on_disk(model, module.stored_modules(name)), module.scheme)
    return found


def _on_disk(
    path: str, asked: Selection, candidates: Sequence[Candidate]
) -> tuple[Selection, dict[str, str]]:
    """(the user's patterns, with the disk names of what they match in memory only; those names → pattern)."""
    given: dict[str, str] = {}

    def with_disk_names(patterns: Iterable[str]) -> dict[str, str]:
        """Each pattern, then the disk names that it means as well → that pattern."""
        known = Patterns(patterns)
        more: dict[str, list[str]] = {pattern: [] for pattern in known.all}
        for c in candidates:
            for disk in c.disk:
                in_memory = {c.name, _full_name(path, c.name)} - {disk}
                meant = {pattern for name in in_memory for pattern in known.matching(name)}
                for pattern in meant.difference(known.matching(disk)):
                    more[pattern].append(disk)
        given.update({disk: pattern for pattern, names in more.items() for disk in names})
        return {name: pattern for pattern, names in more.items() for name in (pattern, *names)}

    ignored = tuple(with_disk_names(asked.ignore))
    overrides = {name: asked.overrides[pattern] for name, pattern in with_disk_names(asked.overrides).items()}
    return Selection(ignore=ignored, overrides=overrides), given


def _decide(path: str, model: nn.Module, scheme: Scheme, target: Format, asked: Selection) -> _Part:
    layout = _quantized_before(model, target)
    candidates, unfit = candidates_of(model)
    inner = [f"{p}." for p, _ in _parts(model) if p]
    candidates = [c for c in candidates if not c.name.startswith(tuple(inner))]
    selection, given = _on_disk(path, asked, candidates)
    decisions = _decisions(model, candidates, scheme, target, selection)
    for decision in decisions.values():
        if decision.scheme is not None:
            _check_dynamic(decision.scheme)
    return _Part(
        path=path, model=model, layout=layout, candidates=candidates, unfit=unfit, decisions=decisions, given=given
    )  # fmt: skip


def _decisions(
    model: nn.Module, candidates: Sequence[Candidate], scheme: Scheme, target: Format, selection: Selection
) -> dict[str, Decision]:
    shapes: dict[str, tuple[int, ...]] = {}
    by_name = {c.name: c for c in candidates}
    for c in candidates:
        if c.projections is None:
            # A Conv1D is [in, out] here, and a Linear once it is quantized.
            shape = c.shape[::-1] if is_conv1d(c.module) else c.shape
            if len(c.disk) > 1:
                shape = (shape[0] // len(c.disk), *shape[1:])
            if c.rows:
                shape = (sum(by_name[row].shape[0] for row in c.rows), *shape[1:])
            shapes |= dict.fromkeys(c.disk, shape)
            continue
        _, hidden, intermediate = sizes(c.module)
        downs = {c.projections["down"]}
        for disk in c.disk:
            shapes[disk] = (
                (hidden, intermediate) if disk.rpartition(".")[2] in downs else (intermediate, hidden)
            )
    config = _config_dict(model)
    if any(is_conv1d(c.module) for c in candidates):
        # What the converter keeps for being stored [in, out] is transposed here.
        config.pop("model_type", None)
    fused = {part: name for c in candidates for part, name in c.fused.items()}
    return decide(shapes, scheme, selection, config=config, fits=target.refuse, fused=fused)


def _config_dict(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    return config.to_dict() if config is not None and hasattr(config, "to_dict") else {}


def _quantized(candidate: Candidate, name: str, scheme: Scheme, target: Format) -> nn.Module:
    module = candidate.module
    first = next(iter(module.parameters()))
    if first.is_meta:
        raise InputError(f"{name}: expected a weight to quantize, found it on meta; load the model first")
    try:
        if candidate.projections is not None:
            return QuantExperts.from_experts(
                module, scheme, projections=candidate.projections, format=target, name=name
            )
        if len(candidate.disk) == 1:
            return QuantLinear.from_linear(module, scheme, format=target, name=name)
        made = {}
        for i, weight in enumerate(parameter(module, "weight").chunk(len(candidate.disk))):
            part = float_linear(weight, None).train(module.training)
            made[str(i)] = QuantLinear.from_linear(part, scheme, format=target, name=f"{name}.{i}")
        return SplitLinear(made).train(module.training)
    except ValueError as error:
        raise InputError(str(error)) from error


def replace_module(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put `new` where `name` is; returns the model (which is `new` itself for the root)."""
    if not name:
        return new
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)
    return model


def _carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Whoever watches the module's calls watches the new one's, and may stop with the handle that they have."""
    for name, hooks in vars(old).items():
        if name.startswith(
            ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        ):
            vars(new)[name] = hooks
    new._is_full_backward_hook = old._is_full_backward_hook


def _leave_fused_paths(model: nn.Module) -> None:
    """In inference torch's encoder layers give their weights to one function, past the modules that hold them."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _holds_codes(module):
            module.activation_relu_or_gelu = 0  # the function computes no activation that is neither
        elif isinstance(module, nn.TransformerEncoder) and _holds_codes(module):
            module.use_nested_tensor = False


def _holds_codes(module: nn.Module) -> bool:
    return any(isinstance(m, QuantModule) for m in module.modules())


def _drop_weights(module: nn.Module) -> None:
    """Free the float weights now, whoever still holds the module."""
    for key in list(module._parameters):
        module._parameters[key] = None


def _describe(model: nn.Module, target: Format, layout: Mapping[str, Scheme], ignored: Sequence[str]) -> None:
    """Let `save_pretrained` write what the model has become."""
    config: Any = getattr(model, "config", None)
    if config is not None:
        own = _config_dict(model)
        config.quantization_config = target.config(
            Layout(modules=layout, ignored=with_heads(ignored, layout, own), config=own)
        )


def _nbytes(model: nn.Module) -> int:
    seen: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        seen[tensor.data_ptr() or id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(seen.values())
