"""Which modules of a decoder layer are joined so that a transform can move from one into the next.

Found by running the layer once and watching which module receives what a norm returned, so
no table of architectures is needed. What cannot be watched (v→o through attention, up→down
through the gate) goes by the names that checkpoints use. Whoever folds something checks the
layer's output before and after: a graph that is wrong shows up as a changed output, not as a
ruined checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lowbit.calibration.experts import UnfusedExperts


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A norm and the modules that read what it returns."""

    name: str
    readers: tuple[str, ...]
    """Modules with a `weight` [N, K] whose K is the norm's width (Linear layers, routers)."""
    offset: float
    """The gain is `offset + weight`: 0 for Llama, 1 for Gemma."""
    centered: bool
    """It subtracts the mean (LayerNorm): no rotation passes through it."""
    movable: bool = True
    """Its readers are all that read it (see `proof`): scales may move from it into them."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A Linear whose output channels scale with the input channels of the next."""

    first: str
    second: str
    repeat: int = 1
    """Grouped-query attention: one value head feeds this many heads of the second."""
    head_dim: int = 0
    """Width of a head for v→o; 0 for up→down."""
    gated: bool = False
    """A gate multiplies what passes from the first to the second (Qwen3.5): scales pass, rotations do not."""


@dataclass(frozen=True, kw_only=True)
class LayerGraph:
    """The joints of one decoder layer; names are relative to the layer."""

    linears: tuple[str, ...]
    """Those that are called: not a Linear whose weight the layer reads by itself (Mamba's)."""
    groups: tuple[tuple[str, ...], ...]
    """Linear layers that read the same tensor; together they cover `linears`."""
    norms: tuple[Norm, ...]
    pairs: tuple[Pair, ...]
    writers: tuple[str, ...]
    """Linear layers that write into the residual stream."""
    rotation_refusal: str = ""
    """Why the residual stream of this layer cannot be rotated; empty when it can."""

    def without(self, fixed: Collection[str], outputs: Collection[str] = ()) -> LayerGraph:
        """Only with joints that leave the modules `fixed` as they are, and what `outputs` put out."""
        fixed = set(fixed)
        return replace(
            self,
            norms=tuple(
                n if fixed.isdisjoint((n.name, *n.readers)) else replace(n, movable=False) for n in self.norms
            ),
            pairs=tuple(
                p for p in self.pairs if fixed.isdisjoint((p.first, p.second)) and p.first not in outputs
            ),
        )


def trace(
    layer: nn.Module, run: Callable[[nn.Module], Tensor], hidden_size: int, config: object
) -> LayerGraph:
    """Read the graph of a filled decoder layer; `run(layer)` must call it once on a few tokens."""
    named = dict(layer.named_modules())
    linears = tuple(n for n, m in named.items() if isinstance(m, nn.Linear))
    norms = {n: m for n, m in named.items() if _is_norm(m)}
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}

    def watch_output(name: str) -> Callable[..., None]:
        return lambda module, args, out: outputs.__setitem__(name, out) if torch.is_tensor(out) else None

    def watch_input(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            found = args[0] if args else next(iter(kwargs.values()), None)
            if torch.is_tensor(found) and name not in inputs:
                inputs[name] = found

        return hook

    readers = {
        n: m
        for n, m in named.items()
        if isinstance(m, UnfusedExperts)
        or (
            isinstance(w := getattr(m, "weight", None), Tensor)
            and w.dim() == 2
            and not isinstance(m, nn.Embedding)
        )
    }
    handles = [m.register_forward_hook(watch_output(n)) for n, m in norms.items()]
    handles += [m.register_forward_pre_hook(watch_input(n), with_kwargs=True) for n, m in readers.items()]
    try:
        run(layer)
    finally:
        for handle in handles:
            handle.remove()

    found_norms, refusal = [], ""
    for name, norm in norms.items():
        if name not in outputs:
            continue
        width = norm.weight.shape[0] if isinstance(getattr(norm, "weight", None), Tensor) else 0
        mine = []
        for reader, seen in inputs.items():
            if _reads(named[reader], outputs[name], seen) and seen.shape[-1] == width:
                # With all experts seeing all tokens, an expert's Linear layers are seen on their own too.
                mine += [part for part in _parts(reader, named[reader]) if part not in mine]
        try:
            offset, centered = norm_gain(norm, width)
        except ValueError as error:
            if width == hidden_size:  # others do not read the residual stream
                refusal = refusal or f"{name}: {error}"
            continue
        if mine:
            found_norms.append(Norm(name=name, readers=tuple(mine), offset=offset, centered=centered))
        elif width == hidden_size and name.rpartition(".")[2] not in ("q_norm", "k_norm"):
            refusal = refusal or f"{name} normalizes what is added to the residual stream"
    linears = tuple(n for n in linears if n in inputs or ".experts." in n)
    writers = tuple(
        n for n in linears
        if n.rpartition(".")[2] in ("o_proj", "down_proj", "out_proj") and named[n].out_features == hidden_size
    )  # fmt: skip
    if any(n.centered for n in found_norms):
        refusal = refusal or "LayerNorm subtracts the mean, and a rotation moves it"
    groups = _groups(linears, inputs, named)
    return LayerGraph(
        linears=linears, groups=groups, norms=tuple(found_norms), pairs=tuple(_pairs(named, config)),
        writers=writers, rotation_refusal=refusal,
    )  # fmt: skip


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and isinstance(getattr(module, "weight", None), Tensor)


def _same(a: Tensor, b: Tensor) -> bool:
    """One tensor, or a view of all of it."""
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel()


def _reads(reader: nn.Module, out: Tensor, seen: Tensor) -> bool:
    return reader.reads(out, seen) if isinstance(reader, UnfusedExperts) else _same(out, seen)


def _parts(name: str, module: nn.Module) -> list[str]:
    return [f"{name}.{p}" for p in module.first_parts] if isinstance(module, UnfusedExperts) else [name]


@torch.no_grad()
def norm_gain(norm: nn.Module, width: int) -> tuple[float, bool]:
    """(offset, centered) of a norm, measured: RMSNorm's output over x/rms(x) is its gain. ValueError for others."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"{type(norm).__name__} has no weight (OLMo, nanochat)")
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0)).to(weight) + 0.5
    try:
        y = norm(x).double()
    except (TypeError, AttributeError) as error:  # of a gate that is None
        raise ValueError(f"{type(norm).__name__} takes more than what it normalizes (a gate)") from error
    x, w = x.double(), weight.double()
    plain = x * torch.rsqrt(x.square().mean(-1, keepdim=True))
    for offset in (0.0, 1.0):
        if torch.allclose(y, plain * (offset + w), rtol=1e-2, atol=1e-2 * float(y.abs().mean())):
            return offset, False
    bias = getattr(norm, "bias", None)
    centered = x - x.mean(-1, keepdim=True)
    centered = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True)) * w
    if bias is not None:
        centered = centered + bias.double()
    if torch.allclose(y, centered, rtol=1e-2, atol=1e-2 * float(y.abs().mean())):
        return 0.0, True
    raise ValueError(f"{type(norm).__name__} is neither an RMSNorm nor a LayerNorm")


def _groups(
    linears: tuple[str, ...], inputs: dict[str, Tensor], named: dict[str, nn.Module]
) -> tuple[tuple[str, ...], ...]:
    groups: list[list[str]] = []
    for name in linears:
        for group in groups:
            first = group[0]
            shared = name in inputs and first in inputs and _same(inputs[name], inputs[first])
            # The two projections of one expert see the same tokens even when none came by.
            expert = ".experts." in name and name.rpartition(".")[0] == first.rpartition(".")[0]
            if shared or (expert and not name.endswith("down_proj") and not first.endswith("down_proj")):
                group.append(name)
                break
        else:
            groups.append([name])
    return tuple(tuple(g) for g in groups)


def _pairs(named: dict[str, nn.Module], config: object) -> list[Pair]:
    pairs = []
    for name, module in named.items():
        if not isinstance(module, nn.Linear):
            continue
        parent, _, leaf = name.rpartition(".")
        if leaf == "v_proj" and isinstance(o := named.get(f"{parent}.o_proj"), nn.Linear):
            attention = named[parent]
            head_dim = getattr(attention, "head_dim", 0) or getattr(config, "head_dim", 0)
            q = named.get(f"{parent}.q_proj")
            if head_dim and module.out_features % head_dim == 0 and o.in_features % module.out_features == 0:
                pairs.append(
                    Pair(
                        first=name,
                        second=f"{parent}.o_proj",
                        repeat=o.in_features // module.out_features,
                        head_dim=head_dim,
                        # q_proj makes the gate as well.
                        gated=isinstance(q, nn.Linear) and q.out_features == 2 * o.in_features,
                    )
                )
        if (
            leaf == "up_proj"
            and isinstance(down := named.get(f"{parent}.down_proj"), nn.Linear)
            and f"{parent}.gate_proj" in named
            and down.in_features == module.out_features
        ):
            pairs.append(Pair(first=name, second=f"{parent}.down_proj"))
    return pairs
