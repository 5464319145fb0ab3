"""The plan: every output tensor's name, dtype, shape, file and offset, and the job that makes it.

Pure: it is made from headers, a scheme, rules and a format, and reading it needs no weight
data. Everything that can be refused is refused here, before any work starts.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lowbit.checkpoint.engine_limits import engine_limits, experts_in_float
from lowbit.checkpoint.fused_experts import experts_of, fused_names, only_stacked, split
from lowbit.checkpoint.headers import FLOATS, Checkpoint
from lowbit.checkpoint.jobs import Job, shard_of
from lowbit.checkpoint.layout import Shard, assign, parse_size
from lowbit.checkpoint.planner import FLOAT_NAMES, Planner, Replacements, module_of
from lowbit.checkpoint.roles import BY_TORCH, with_heads
from lowbit.checkpoint.rules import Decision, Selection, decide, dynamic_instead, left_by_source, matmul_key
from lowbit.dtypes import E2M1, E4M3FN
from lowbit.errors import InputError
from lowbit.formats import (
    FORMATS,
    QUANTIZATION_KEYS,
    Format,
    Layout,
    StoredModule,
    configs_in,
    get_format,
    other_kv_cache,
    read,
    rotated_inputs,
)
from lowbit.formats.joined import EXPERT
from lowbit.granularity import PerTensor
from lowbit.scheme import Scheme, get_scheme, scheme_of

EVERYTHING = Selection()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A decided conversion."""

    source: Checkpoint
    """As it is on disk; what its jobs read may be parts of its tensors (see `fused_experts`)."""
    scheme: Scheme
    format: Format | None
    """None: plain float tensors."""
    decisions: Mapping[str, Decision] = field(repr=False)
    jobs: tuple[Job, ...] = field(repr=False)
    """In the order of the source's bytes."""
    shards: tuple[Shard, ...] = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)
    """The config.json to be written."""
    files: Mapping[str, Mapping[str, Any]] = field(repr=False)
    """JSON files that the format adds."""
    warnings: tuple[str, ...]
    calibration: str = ""

    @property
    def source_bytes(self) -> int:
        """Of what the jobs read: a calibration's tensors in place of the source's (`source.nbytes` is of all those)."""
        return sum(j.source_bytes for j in self.jobs)

    def jobs_in(self, shards: Collection[int]) -> list[tuple[int, Job]]:
        """The jobs, with their numbers, that write to these output files."""
        return [(n, job) for n, job in enumerate(self.jobs) if shard_of(job) in shards]

    @property
    def split_experts(self) -> Mapping[str, str]:
        """Modules of single experts → the 3-D tensor of the source that they are parts of."""
        return fused_names(self.source, self.decisions)

    @property
    def output_bytes(self) -> int:
        return sum(s.nbytes for s in self.shards)

    @property
    def indexed(self) -> bool:
        """Whether there is an index: engines without one take every *.safetensors for weights, adapters too."""
        beside = any(f.parent == Path() and f.suffix == ".safetensors" for f in self.source.others)
        return len(self.shards) > 1 or beside

    def digest(self) -> str:
        """Names this conversion: the same source, settings and version give the same 32 hex digits."""
        from lowbit import __version__

        jobs = [
            (j.kind, [(r.name, r.dtype, r.offset, r.pitch) for r in j.refs], str(j.spec),
             [(o.name, o.dtype, o.shape, o.shard, o.offset) for o in j.outputs.values()])
            for j in self.jobs
        ]  # fmt: skip
        identity = [
            __version__,
            self.source.fingerprint(),
            self.calibration,
            jobs,
            [s.file for s in self.shards],
        ]
        text = json.dumps([*identity, self.config, self.files], sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def make_plan(
    source: Checkpoint,
    scheme: Scheme | str,
    *,
    format: str | None = None,
    selection: Selection = EVERYTHING,
    max_shard_size: str | int = "5GB",
    replacements: Replacements | None = None,
) -> Plan:
    """Decide a conversion. Raises InputError for whatever cannot be done as asked."""
    scheme = scheme_of(scheme)
    target, shard_size = _format(scheme, format), parse_size(max_shard_size)
    on_disk, experts = source, split(source)
    source = experts.checkpoint
    stored = read(source.config, source.tensors)
    main_dtype = main_float(source, stored)
    fused = fused_names(on_disk, source.tensors)
    decisions = _decisions(source, stored, scheme, target, selection, replacements, fused)
    never_run = dynamic_instead(decisions, stored, replacements.tensors) if replacements else {}
    if never_run:
        first = selection.with_first(never_run)
        decisions = _decisions(source, stored, scheme, target, first, replacements, fused)
    decisions |= {
        n: replace(decisions[n], reason=r) for n, r in experts.whole.items() if _by_rule(decisions[n])
    }
    warnings = [*source.notes, *selection.warnings({*decisions, *fused.values()})]
    if replacements:
        warnings += replacements.notes
    if never_run:
        warnings.append(
            f"{len(never_run)} modules that the calibration did not run, outside of its layers, have dynamic "
            f"activations (first: {next(iter(never_run))})"
        )
    source, decisions = _fuse_floats(on_disk, decisions, stored, fused)
    planner = Planner(
        source,
        stored,
        scheme,
        target,
        main_dtype,
        replacements,
        _one_scale(decisions, str(source.config.get("model_type"))),
    )
    for module, decision in decisions.items():
        planner.add_module(module, decision)
    planner.add_rest()
    if scheme.weights is not None and not planner.schemes:
        raise InputError(
            f"{source.name}: expected at least one weight to quantize to {scheme.name} as "
            f"{target.name if target else 'plain'}, found none: {_why_kept(decisions)}"
        )
    planner.require_input_scales()
    if planner.left_out:
        fp4 = other_kv_cache(source.config)
        why = (
            "they are for a cache of less than 8 bits" if fp4 else "engines take none for a model so written"
        )
        warnings.append(
            f"{len(planner.left_out)} scales of a quantized KV cache or attention are left out (first: "
            f"{planner.left_out[0]}): {why}"
        )
    if planner.dequantized:
        warnings.append(
            f"{len(planner.dequantized)} modules stay in float that the calibration quantized (first: "
            f"{planner.dequantized[0]}): their weights are its codes, dequantized; calibrate with them in float"
        )
    apart = [m for m in decisions if m not in planner.schemes and EXPERT.match(m)]
    if apart and only_stacked(source.config):
        warnings.append(
            f"{len(apart)} matrices of experts are to be in float (first: {apart[0]}), but transformers loads this "
            "model's from 3-D tensors only; convert the original checkpoint instead, or quantize them"
        )
    shards, placed = assign(planner.groups(), shard_size)
    jobs = tuple(
        replace(job, outputs={c: placed[o.name] for c, o in job.outputs.items()})
        for job in planner.jobs_in_order()
    )
    names = tuple(name for shard in shards for name in shard.names)
    warnings += engine_limits(
        source.config, target.name if target else "", planner.schemes, planner.shape_of, names
    )
    warnings += experts_in_float(jobs) if scheme.weights is not None else ()
    # Engines build experts that are fused on disk as one module, the parent of their tensors.
    ignored = tuple(dict.fromkeys(
        experts_of(m, planner.shape_of(m)) if d.role == "experts-3d" else m for m, d in decisions.items()
        if m not in planner.schemes and (d.role == "experts-3d" or len(planner.shape_of(m)) == 2)
        and d.role not in ("embedding", "norm", "conv")
    ))  # fmt: skip
    layout = Layout(
        modules=planner.schemes,
        ignored=with_heads(ignored, planner.schemes, source.config),
        tensors=names,
        kv_cache=replacements.kv_cache if replacements else None,
        config=source.config,
    )
    config = _config(source, scheme, target, layout, replacements, stored, main_dtype)
    if config.keys() == {"quantization_config"}:
        warnings.append(
            "config.json will say how the weights are quantized and nothing else, since the source has none: engines "
            "need the model's own; put it beside weights that have its names for them, and convert again"
        )
    if rotated := rotated_inputs(config):
        warnings.append(_about_rotated(rotated, planner.schemes))
    return Plan(
        source=on_disk, scheme=scheme, format=target, decisions=decisions, jobs=jobs, shards=tuple(shards),
        config=config, files=target.files(layout) if target is not None else {}, warnings=tuple(warnings),
        calibration=replacements.label if replacements else "",
    )  # fmt: skip


def _format(scheme: Scheme, name: str | None) -> Format | None:
    if scheme.weights is None:
        if name is not None:
            raise InputError(
                f"expected no --format with --scheme {scheme.name}, which writes plain float tensors, found {name!r}"
            )
        return None
    target = get_format(name)
    if not target.holds(scheme):
        able = ", ".join(f.name for f in FORMATS.values() if f.holds(scheme))
        advice = target.instead(scheme) or f"expected one of: {able} (or another scheme)"
        raise InputError(f"the format {target.name} cannot hold the scheme {scheme.name}; {advice}")
    return target


def main_float(source: Checkpoint, stored: Mapping[str, StoredModule]) -> str:
    """The float dtype of the model: what most float elements are, BF16 for a source that is all codes."""
    taken = {n for m in stored.values() for n in m.names.values()}
    count = dict.fromkeys(FLOATS, 0)
    for t in source.tensors.values():
        if t.dtype in count and t.name not in taken:
            count[t.dtype] += t.elements
    if not stored or any(count[d] for d in ("BF16", "F16")):
        best = max(count, key=lambda d: count[d])
        return best if count[best] else "BF16"
    declared = source.config.get("torch_dtype") or source.config.get("dtype")
    return FLOAT_NAMES.get(str(declared).removeprefix("torch."), "BF16")


def _decisions(
    source: Checkpoint,
    stored: Mapping[str, StoredModule],
    scheme: Scheme,
    target: Format | None,
    selection: Selection,
    replacements: Replacements | None,
    fused: Mapping[str, str],
) -> dict[str, Decision]:
    shapes: dict[str, tuple[int, ...]] = {}
    for ref in source.tensors.values():
        if (module := module_of(ref, stored)) is not None:
            shapes[module] = tuple(stored[module].shape) if module in stored else ref.shape
    if target is None:
        for pattern, name in selection.overrides.items():
            if name != "float" and get_scheme(name).weights is not None:
                raise InputError(
                    f"override {pattern!r}: expected float beside the scheme {scheme.name}, which writes plain float "
                    f"tensors, found {name}; make {name} the scheme, and `float` the override of what is to stay"
                )
        return decide(shapes, scheme, selection, config=source.config, fused=fused)
    already = {name: module.spec for name, module in stored.items()}
    return decide(
        shapes,
        scheme,
        selection,
        otherwise=replacements.selection if replacements else EVERYTHING,
        config=source.config,
        fits=target.refuse,
        left_in_float=left_by_source(shapes, stored),
        wanted_in_float={**target.left_in_float(shapes, source.config), **_read_by_torch(shapes, source)},
        already=already,
        fused=fused,
    )


def _read_by_torch(modules: Iterable[str], source: Checkpoint) -> dict[str, str]:
    """Modules whose weight torch's own nn.MultiheadAttention gives to a function, past the module → why they stay."""
    return {
        m: BY_TORCH for m in modules
        if m.endswith(".out_proj") and m.removesuffix("out_proj") + "in_proj_weight" in source.tensors
    }  # fmt: skip


def _one_scale(decisions: Mapping[str, Decision], model_type: str) -> dict[str, list[str]]:
    """Module with one scale per tensor → all that engines multiply by as one matrix with it."""
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for module, decision in decisions.items():
        spec = decision.scheme.weights if decision.scheme else None
        if (
            spec is not None
            and isinstance(spec.granularity, PerTensor)
            and (key := matmul_key(module, model_type))
        ):
            groups[key].append(module)
    return {module: members for members in groups.values() for module in members}


def _by_rule(decision: Decision) -> bool:
    return decision.role == "experts-3d" and not decision.reason.startswith("--")


def _why_kept(decisions: Mapping[str, Decision]) -> str:
    """The reasons for which weights stay, the most frequent first."""
    counted = Counter(d.reason for d in decisions.values()).most_common()
    more = f", and {len(counted) - 5} other reasons" if len(counted) > 5 else ""
    return ", ".join(f"{count} × {reason}" for reason, count in counted[:5]) + more


def _fuse_floats(
    on_disk: Checkpoint,
    decisions: Mapping[str, Decision],
    stored: Mapping[str, StoredModule],
    fused: Mapping[str, str],
) -> tuple[Checkpoint, dict[str, Decision]]:
    """(the view that is converted, decisions for it): experts that stay in float stay in their 3-D tensors."""
    floats: dict[str, Decision] = {}
    for module, name in fused.items():
        decision = decisions[module]
        quantized = decision.scheme is not None and decision.scheme.weights is not None
        if not quantized and not (decision.as_found and module in stored):
            floats[name] = replace(decision, scheme=None, role="experts-3d")
    view = split(on_disk, leave={experts_of(name) for name in floats}).checkpoint
    out: dict[str, Decision] = {}
    for module, decision in decisions.items():
        name = fused.get(module, "")
        if name in floats:
            out[name] = floats[name]
        elif name:
            split_from = "split from " + ".".join(name.split(".")[-2:])
            out[module] = replace(decision, reason="; ".join(filter(None, (decision.reason, split_from))))
        else:
            out[module] = decision
    return view, out


def _about_rotated(rotated: Collection[str], quantized: Collection[str]) -> str:
    """A warning of weights for inputs that are rotated. InputError where some become float: nothing rotates those."""
    if lost := [m for m in rotated if m not in quantized]:
        raise InputError(
            f"{lost[0]}: expected a scheme for all {len(rotated)} modules whose inputs are rotated while running "
            f"(online Hadamard), found {len(lost)} that become float, of which nothing would rotate the input; "
            "quantize them too, or convert the checkpoint from before the rotation"
        )
    return (
        f"{len(rotated)} modules need their input rotated while running (online Hadamard): only lowbit does "
        "that, any other engine would compute nonsense; use rotate-gptq for those"
    )


def _expert_dtype(layout: Layout) -> str:
    """What DeepSeek-V4's config calls the type of routed experts; engines take it for FP4 where it says nothing."""
    scheme = next((s for m, s in layout.modules.items() if ".experts." in m), None)
    if scheme is None or scheme.weights is None:
        return "bf16"
    return "fp8" if scheme.weights.dtype is E4M3FN else str(scheme.weights.dtype)


def _config(
    source: Checkpoint,
    scheme: Scheme,
    target: Format | None,
    layout: Layout,
    replacements: Replacements | None,
    stored: Mapping[str, StoredModule],
    main_dtype: str,
) -> dict[str, Any]:
    """The source's config.json with its quantization replaced, wherever in it that stood."""
    config = json.loads(json.dumps(source.config))
    # Parts of the model may have another float dtype, in which they stay.
    before = [
        config.get("torch_dtype"),
        config.get("dtype"),
        *(n for n, d in FLOAT_NAMES.items() if d == main_dtype),
    ]
    for holder in list(configs_in(config)):
        for key in QUANTIZATION_KEYS:
            holder.pop(key, None)
        for key in ("torch_dtype", "dtype"):
            if (
                scheme.float_dtype is not None
                and key in holder
                and (holder is config or holder[key] in before)
            ):
                holder[key] = scheme.float_dtype
    if replacements:
        config.update(replacements.config_overrides)
    fp4 = any(m.spec.dtype is E2M1 for m in stored.values())
    if "expert_dtype" in config or (fp4 and config.get("model_type") == "deepseek_v4"):
        config["expert_dtype"] = _expert_dtype(layout)
    if target is not None and (quantization := target.config(layout)) is not None:
        config["quantization_config"] = quantization
    return config
