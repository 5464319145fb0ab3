"""Which weights are quantized and which stay, decided from names and shapes alone.

No model class is needed, so an architecture that no library knows yet converts too. What the user asks for comes first,
then what a module is (`roles`), then what its fused group and the format can hold.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import gcd
from types import MappingProxyType
from typing import Any

from lowbit.checkpoint.patterns import Patterns
from lowbit.checkpoint.roles import role_of
from lowbit.errors import InputError
from lowbit.formats.format import Joined, StoredModule, configs_in
from lowbit.formats.joined import EXPERT
from lowbit.scheme import Scheme, TensorSpec, get_scheme

# Engines run the members of one of these as a single matmul, so they must agree.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("c_fc_0", "c_fc_1"),
    ("fc11", "fc12"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("wq_a", "wkv"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
_FUSED_WITH = {member: group for group in FUSED for member in group}
# model_type → what its engines join to another module beside it, with its parent where others have its name, and that
# module.
_FUSED_OF = {
    "beam": {"self_attn.gate_proj": "q_proj"},  # its experts and MLPs have a gate_proj too
    "olmo_hybrid": {"g_proj": "q_proj"},
    "bailing_hybrid": {"b_proj": "q_proj"},  # Ling 3
    "bailing_moe_v3_vl": {"b_proj": "q_proj"},
    "kimi_linear": {"b_proj": "q_proj", "f_a_proj": "q_proj"},
    "alice_ai": {"b_proj": "q_proj", "f_a_proj": "q_proj"},
    "minimax_m3_vl": {"index_q_proj": "q_proj", "index_k_proj": "q_proj"},
    # All that reads a layer's input, in linear attention and in latent attention, which has no q_proj.
    "kimi_k3": dict.fromkeys(("b_proj", "f_a_proj", "g_proj", "q_a_proj", "kv_a_proj_with_mqa"), "q_proj"),
}
# The last members of what engines join and do not divide among devices: their last row of blocks may be ragged.
_LAST_UNDIVIDED = {"kv_a_proj_with_mqa", "wkv"}
# One matrix on disk of which engines divide the parts, that of time steps or gates as narrow as there are heads.
_JOINED_ON_DISK = re.compile(r"^(.*\.)?((mamba|mixer)\.in_proj|in_proj_(qkvz|ba))$")

# Others, of parts that engines divide: a layer's q, k and v, its keys and values, its gate and up.
_QKV_ON_DISK = re.compile(r"^(.*\.)?(qkv_proj|query_key_value|key_value|c_attn|[Ww]qkv|W_pack)$")
_GATE_UP_ON_DISK = re.compile(r"^(.*\.)?gate_up_proj$")
# In these, heads of q, k and v alternate, and engines take them apart.
_BY_HEAD = ("bloom", "falcon", "persimmon", "telechat")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What the user asked for, in patterns (see `Patterns`)."""

    ignore: tuple[str, ...] = ()
    """Not quantized: these modules are in float in the output."""
    keep: tuple[str, ...] = ()
    """Carried byte for byte as the source has them, quantized or not."""
    overrides: Mapping[str, str] = field(default_factory=dict)
    """Pattern → scheme name, or `float`: for mixed precision. The first that matches decides."""
    calibrated: Mapping[str, str] = field(default_factory=dict)
    """Module → the same: what a calibration made of it, before overrides; but it wants nothing of a format."""

    @classmethod
    def of(
        cls,
        *,
        ignore: Iterable[str] = (),
        keep: Iterable[str] = (),
        overrides: Mapping[str, str] | None = None,
    ) -> Selection:
        """Of what a function was given. InputError for a single text, taken for its letters, and its like."""
        if overrides is not None and not isinstance(overrides, Mapping):
            raise InputError(
                f"expected patterns with a scheme's name for each ({{pattern: name}}), found {overrides!r}"
            )
        return cls(
            ignore=_listed("ignore", ignore), keep=_listed("keep", keep), overrides=dict(overrides or {})
        )

    def schemes(self, main: Scheme) -> list[Scheme]:
        """`main`, and those that overrides name."""
        named = (get_scheme(name) for name in self.overrides.values() if name != "float")
        return list(dict.fromkeys((main, *named)))

    def with_first(self, overrides: Mapping[str, str]) -> Selection:
        """With these overrides before all others, so that they decide."""
        others = {p: s for p, s in self.overrides.items() if p not in overrides}
        return replace(self, overrides={**overrides, **others})

    @property
    def patterns(self) -> Patterns:
        """All of them."""
        return Patterns((*self.ignore, *self.keep, *self.overrides))

    def unmatched(self, modules: Iterable[str]) -> list[str]:
        """The patterns that match no module: most likely typing errors."""
        return self.patterns.unmatched(modules)

    def warnings(self, modules: Iterable[str]) -> list[str]:
        """What to say of those, where `modules` are all of a checkpoint."""
        return [
            f"{said}; `lowbit plan` lists their names" if said.startswith("pattern") else said
            for said in self.patterns.warnings(sorted(modules))
        ]


def _listed(name: str, patterns: Iterable[str]) -> tuple[str, ...]:
    listed = isinstance(patterns, Iterable) and not isinstance(patterns, str)
    found = tuple(patterns) if listed else ()
    if not listed or not all(isinstance(p, str) for p in found):
        raise InputError(f"expected a list of patterns for {name}, found {patterns!r}")
    return found


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What happens to one module's weight."""

    scheme: Scheme | None
    """None: it stays in float (or, with `as_found`, exactly as in the source)."""
    role: str
    """linear, expert, embedding, head, router, vision, …"""
    reason: str = ""
    """Why it is kept, or why it has another scheme than the one asked for."""
    as_found: bool = False


def fused_key(module: str, model_type: str = "") -> tuple[str, ...] | None:
    """The same for all modules that an engine fuses with this one; None when it stands alone."""
    expert = EXPERT.match(module)
    return (expert.group(1),) if expert else matmul_key(module, model_type)


def matmul_key(module: str, model_type: str = "") -> tuple[str, ...] | None:
    """The same for all modules that an engine multiplies by as one matrix: of an expert, its own gate and up.

    One scale per tensor is one for all of them: engines that find several round the codes again, to the largest.
    """
    parent, _, name = module.rpartition(".")
    if own := _FUSED_OF.get(model_type):
        name = own.get(f"{parent.rpartition('.')[2]}.{name}", own.get(name, name))
    return (parent, *_FUSED_WITH[name]) if name in _FUSED_WITH else None


Fits = Callable[[Scheme, tuple[int, ...], Joined], str]
"""(scheme, weight shape, how engines join it) → why a format cannot hold it, or ""."""


def left_by_source(
    weights: Mapping[str, tuple[int, ...]], stored: Mapping[str, StoredModule]
) -> dict[str, str]:
    """Matrices in float beside those that the source has quantized → why they stay; {} for one that has none.

    Experts in one tensor are none: a format that quantizes nothing else (gpt-oss's) says nothing of the rest.
    """
    quantized = {m for m, s in stored.items() if not s.stacked}
    floats = (m for m, shape in weights.items() if len(shape) == 2 and m not in quantized)
    return dict.fromkeys(floats, "the source left it unquantized") if quantized else {}


def decide(
    weights: Mapping[str, tuple[int, ...]],
    scheme: Scheme,
    selection: Selection = Selection(),
    *,
    otherwise: Selection = Selection(),
    config: Mapping[str, Any] | None = None,
    fits: Fits = lambda scheme, shape, joined: "",
    left_in_float: Mapping[str, str] = MappingProxyType({}),
    wanted_in_float: Mapping[str, str] = MappingProxyType({}),
    already: Mapping[str, TensorSpec] = MappingProxyType({}),
    fused: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Decision]:
    """Decide for every module with a weight: module name → shape in, module name → Decision out.

    `otherwise` decides where `selection` says nothing: what a calibration was made for.
    An override whose pattern takes in modules that are usually quantized (all of a layer) leaves a
    router or norm among them as it is; one that names nothing else means it.

    `left_in_float`: modules that stay unless an override says otherwise → why (an already quantized
    source left them), `wanted_in_float`: those that stay unless an override names one of them exactly
    (the format's engines want them so), `already` how the source has the others; `fused` maps experts
    to the 3-D tensor that holds them, whose name patterns may mean as well. Members of a fused group
    end with one scheme. Where `fits` refuses the scheme for a shape, the nearest scheme with a scale
    per channel is used, else it is kept.
    """
    roles = {module: role_of(module, shape, config or {}) for module, shape in weights.items()}
    for module, (role, _) in roles.items():
        if role == "grouped" and already.get(module) == scheme.weights:
            # Engines that run it as its makers have it are the ones that this is for.
            roles[module] = (role, "")
    usual = [m for m, (_, reason) in roles.items() if not reason]
    asked = (_Asked(selection, fused, usual), _Asked(otherwise, fused, usual, before="as calibrated: "))
    decisions: dict[str, Decision] = {}
    for module, shape in weights.items():
        role, reason = roles[module]
        exactly = module in wanted_in_float
        decision = next(
            (d for a in asked if (d := a.decide(module, shape, role, kept=reason, exactly=exactly))), None
        )
        stays = reason or wanted_in_float.get(module) or left_in_float.get(module) or ""
        by_rule = Decision(scheme=None if stays else scheme, role=role, reason=stays)
        decisions[module] = decision or by_rule
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    model_type = str((config or {}).get("model_type"))
    for module in decisions:
        groups[fused_key(module, model_type) or (module,)].append(module)
    for members in groups.values():
        _make_fit(members, weights, decisions, fits, already, config or {})
        _make_agree(members, decisions)
    return decisions


class _Asked:
    """What the user asks of a module."""

    def __init__(
        self,
        selection: Selection,
        fused: Mapping[str, str],
        usual: Sequence[str],
        *,
        before: str = "",
    ) -> None:
        """`fused` as `decide` has it; `usual`: the modules that no rule keeps; `before`: what reasons begin with."""
        self.keep, self.ignore = Patterns(selection.keep), Patterns(selection.ignore)
        self.overrides, self.names = Patterns(selection.overrides), selection.overrides
        self.fused, self.usual = fused, usual
        self.calibrated, self.said = selection.calibrated, before

    def _matching(self, patterns: Patterns, module: str) -> list[str]:
        return patterns.matching(module, *([self.fused[module]] if module in self.fused else ()))

    @cached_property
    def broad(self) -> set[str]:
        """Overrides that mean a module which is usually quantized."""
        return {pattern for module in self.usual for pattern in self._matching(self.overrides, module)}

    def decide(
        self, module: str, shape: tuple[int, ...], role: str, *, kept: str, exactly: bool
    ) -> Decision | None:
        """None: nothing. `kept`: why a rule keeps it, or ""; `exactly`: only an override of its name means it."""
        if found := self._matching(self.keep, module):
            return Decision(scheme=None, role=role, reason=f"{self.said}--keep {found[0]}", as_found=True)
        if found := self._matching(self.ignore, module):
            return Decision(scheme=None, role=role, reason=f"{self.said}--ignore {found[0]}")
        if len(shape) != 2:
            return None
        if module in self.calibrated and not exactly:
            return self._decision(role, self.calibrated[module], f"as calibrated: {self.calibrated[module]}")
        for pattern in self._matching(self.overrides, module):
            if pattern != module and (exactly or (kept and pattern in self.broad)):
                continue
            name = self.names[pattern]
            decision = self._decision(role, name, f"{self.said}override {pattern}")
            if decision.scheme is None:
                return replace(decision, reason=f"{decision.reason}: {name}")
            return decision
        return None

    def _decision(self, role: str, name: str, reason: str) -> Decision:
        chosen = get_scheme(name) if name != "float" else None
        return Decision(scheme=chosen if chosen and chosen.weights else None, role=role, reason=reason)


def simpler(scheme: Scheme) -> Scheme | None:
    """The nearest scheme that more shapes and engines take: a scale per channel, or dynamic activations."""
    from lowbit.granularity import PerChannel, PerGroup

    if scheme.name in ("int8-static", "int8-static-asym"):
        return get_scheme("int8")
    if scheme.name in ("int8-block", "fp8-block", "mxfp8"):
        return get_scheme("int8" if scheme.name.startswith("int8") else "fp8")
    if scheme.weights is not None and isinstance(scheme.weights.granularity, PerGroup):
        return replace(scheme, weights=replace(scheme.weights, granularity=PerChannel()))
    return None


def dynamic_instead(
    decisions: Mapping[str, Decision], stored: Mapping[str, StoredModule], calibrated: Collection[str]
) -> dict[str, str]:
    """Modules that are to be static, of which neither source nor calibration has an input's scale → a dynamic scheme.

    Multi-token prediction and what lies beside the layers: a calibration does not run them. `calibrated`: its tensors.
    """
    found: dict[str, str] = {}
    for module, decision in decisions.items():
        scheme = decision.scheme
        if scheme is None or not scheme.needs_calibration or f"{module}.input_scale" in calibrated:
            continue
        if module not in stored or stored[module].scheme.activations != scheme.activations:
            assert scheme.weights is not None
            found[module] = "int8" if scheme.weights.dtype.kind == "int" else "fp8"
    return found


def _make_fit(
    members: list[str],
    weights: Mapping[str, tuple[int, ...]],
    decisions: dict[str, Decision],
    fits: Fits,
    already: Mapping[str, TensorSpec],
    config: Mapping[str, Any],
) -> None:
    """Replace a scheme that does not fit one member's shape, for all members at once.

    Ragged blocks of fused weights that the source has so already are carried: what its makers
    ship, engines load. Nor are they in the way where nothing follows, in this matrix or on another
    device (`_LAST_UNDIVIDED`).
    """
    shapes = {m: _narrowest(m, weights[m], config) for m in members}
    fused = (
        len(members) > 1
        or _JOINED_ON_DISK.match(members[0]) is not None
        or shapes[members[0]] != weights[members[0]]
    )
    joined: Joined = "experts" if EXPERT.match(members[0]) else "fused" if fused else ""
    for scheme in {d.scheme for m in members if (d := decisions[m]).scheme is not None}:
        having = [m for m in members if decisions[m].scheme == scheme]
        carried = {m for m in having if joined == "fused" and already.get(m) == scheme.weights}
        last = _LAST_UNDIVIDED.difference(_FUSED_OF.get(str(config.get("model_type")), ()))
        free = carried | {m for m in having if m.rpartition(".")[2] in last}
        ours: dict[str, Joined] = {m: "" if m in free else joined for m in having}
        problem = next((p for m in having if (p := fits(scheme, shapes[m], ours[m]))), "")
        if not problem:
            continue
        other = simpler(scheme)
        if other is not None and any(fits(other, shapes[m], joined) for m in having):
            other = None
        change = "dynamic activations" if scheme.needs_calibration else "a scale per channel"
        for m in having:
            reason = f"{problem}; {change} instead" if other else problem
            decisions[m] = replace(decisions[m], scheme=other, reason=reason)


def _narrowest(module: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of a part of a matrix that holds several on disk, at whose end others begin; `shape` for any other.

    Where parts differ in height, it is what divides all of them.
    """
    if _GATE_UP_ON_DISK.match(module) and len(shape) == 2:
        return (shape[0] // 2, shape[1])
    if not _QKV_ON_DISK.match(module) or len(shape) != 2:
        return shape
    for part in configs_in(config):
        heads = _number(part, "num_attention_heads", "n_head", "n_heads", "num_heads")
        width = _number(part, "hidden_size", "n_embd", "d_model")
        size = _number(part, "head_dim", "kv_channels") or (width // heads if heads else 0)
        keys = _number(part, "num_key_value_heads", "num_kv_heads", "multi_query_group_num") or heads
        for kv in (keys, heads, 1):
            if size and shape[0] in ((heads + 2 * kv) * size, 2 * kv * size):
                by_head = part.get("model_type") in _BY_HEAD
                return (size if by_head else gcd(heads, kv) * size, shape[1])
    return shape


def _number(config: Mapping[str, Any], *names: str) -> int:
    """What a config has under the first of these names that it has a number for; 0 for none."""
    return next((n for name in names if isinstance(n := config.get(name), int)), 0)


def _make_agree(members: list[str], decisions: dict[str, Decision]) -> None:
    """One scheme for a fused group: if one member stays in float, all do, and if one is kept as found, all are."""
    schemes = {(decisions[m].scheme, decisions[m].as_found) for m in members}
    if len(schemes) == 1:
        return
    kept = [m for m in members if decisions[m].scheme is None]
    if not kept:
        names = ", ".join(sorted({d.scheme.name for m in members if (d := decisions[m]).scheme}))
        raise InputError(
            f"{', '.join(members[:4])}: engines fuse these into one matmul, so they need one scheme, found {names}; "
            "give one override for all of them"
        )
    first = next((m for m in kept if decisions[m].as_found), kept[0])
    model = decisions[first]
    for m in members:
        if (decisions[m].scheme, decisions[m].as_found) != (None, model.as_found):
            reason = f"engines fuse it with {first.rpartition('.')[2]}, which stays ({model.reason})"
            decisions[m] = replace(decisions[m], scheme=None, reason=reason, as_found=model.as_found)
