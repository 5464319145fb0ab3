"""Put quantized modules, on meta, where a checkpoint has codes for modules of a transformers model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.checkpoint.headers import TensorRef
from lowbit.errors import InputError
from lowbit.formats import StoredModule
from lowbit.nn.experts import QuantExperts
from lowbit.nn.fused_experts import FUSED_PARAMETERS, has_weights, refusal
from lowbit.nn.joined import SplitLinear, absent_part, within_blocks
from lowbit.nn.linear import QuantLinear, is_conv1d
from lowbit.nn.names import ROLES, Finder
from lowbit.nn.swap import replace_module


def _filled(*shape: int) -> Tensor:
    """Under names that weights have in float alone, while transformers looks for what is not filled: its code asks for
    their shapes to initialize a Linear's, packed here, and in some mixtures (Qwen3-Omni) their experts'."""
    weight: Any = torch.empty(shape, device="meta")
    weight._is_hf_initialized = True
    return weight


def place_linear(
    model: nn.Module,
    path: str,
    name: str,
    stored: StoredModule,
    tensors: Mapping[str, TensorRef],
    find: Finder,
) -> None:
    """A QuantLinear in place of the Linear (or Conv1D) at `path`, which is `name` on disk. InputError where it cannot
    hold the weight."""
    module = find.modules[path]
    if not isinstance(module, nn.Linear) and not is_conv1d(module):
        raise InputError(
            f"{name}: expected a Linear for quantized codes, found {type(module).__name__}; "
            "convert the checkpoint again with --ignore for this module"
        )
    weight = module.weight
    assert isinstance(weight, Tensor)
    expected = tuple(weight.shape[::-1] if is_conv1d(module) else weight.shape)
    _require(name, stored, expected)
    bias = getattr(module, "bias", None) is not None
    new = _linear(stored, (stored.shape[0], expected[1]), tensors, dtype=weight.dtype, bias=bias)
    new.expect_shapes({c: tensors[t].shape for c, t in stored.names.items()})
    _put(model, path, new, find, tuple(weight.shape))


def _put(model: nn.Module, path: str, new: QuantLinear, find: Finder, shape: tuple[int, ...]) -> None:
    """`shape`: of the weight in float, which a packed one does not have."""
    if "weight" not in new._buffers:
        new.weight = _filled(*shape)
    replace_module(model, path, new)
    find.modules[path] = new


def _fits(stored: StoredModule, expected: tuple[int, ...]) -> bool:
    n, k = stored.shape
    # Of a packed weight the header tells the columns with those that fill an int32 up.
    filled = "packed" in stored.names and n == expected[0] and 0 <= k - expected[1] < 4
    return stored.shape == expected or filled


def _require(name: str, stored: StoredModule, expected: tuple[int, ...]) -> None:
    if not _fits(stored, expected):
        raise InputError(
            f"{name}: expected a weight {list(expected)} for this config, found {list(stored.shape)}; "
            "config.json and weights do not belong together"
        )


def _linear(
    stored: StoredModule,
    shape: tuple[int, int],
    tensors: Mapping[str, TensorRef],
    *,
    dtype: torch.dtype,
    bias: bool,
) -> QuantLinear:
    suffixes: dict[str, str] = {c: t.rpartition(".")[2] for c, t in stored.names.items()}
    return QuantLinear(
        shape[1], shape[0], scheme=stored.scheme, bias=bias, format=stored.format, names=suffixes, dtype=dtype,
        device="meta", float_dtype=float_dtype_of(stored, tensors),
    )  # fmt: skip


def pass_over(model: Any, pattern: str) -> None:
    """Tensors on disk of these names are neither used nor reported."""
    ignored = set(model._keys_to_ignore_on_load_unexpected or ())
    model._keys_to_ignore_on_load_unexpected = ignored | {pattern}


def why_not_rows(paths: Sequence[str], stored: StoredModule, find: Finder) -> str:
    """Why the modules at `paths` cannot hold the rows of a weight that is one on disk, or ""."""
    modules: list[Any] = [find.modules[path] for path in paths]
    if not all(isinstance(m, nn.Linear) for m in modules):
        return "transformers makes it into something else than Linears"
    return within_blocks([m.out_features for m in modules], stored.spec.granularity)


def place_rows(
    model: nn.Module, paths: Sequence[str], name: str, stored: StoredModule, tensors: Mapping[str, TensorRef],
    find: Finder,
) -> None:  # fmt: skip
    """QuantLinears at `paths` for the rows of a weight that is one on disk."""
    linears: list[Any] = [find.modules[path] for path in paths]
    heights = [linear.out_features for linear in linears]
    whole = (sum(heights), linears[0].in_features)
    _require(name, stored, whole)
    shapes = {c: tensors[t].shape for c, t in stored.names.items()}
    for path, linear, rows in zip(paths, linears, heights, strict=True):
        bias = linear.bias is not None
        part = _linear(stored, (rows, whole[1]), tensors, dtype=linear.weight.dtype, bias=bias)
        for content, shape in shapes.items():
            own = part.content(content)
            assert own is not None
            one = all(size == 1 for size in shape)
            part.expect_shapes({content: shape if one else (own.shape[0], *shape[1:])})
        _put(model, path, part, find, (rows, whole[1]))


def why_not_parts(
    path: str, names: Sequence[str], tensors: Mapping[str, TensorRef], find: Finder
) -> str:  # fmt: skip
    """Why the Linear at `path` cannot be made of these modules on disk, all of it that is quantized, or "".

    InputError where another part of it is not among the `tensors`.
    """
    if absent := [n for n in find.joined_with(names[0]) if n not in names and f"{n}.weight" not in tensors]:
        raise absent_part(names[0], absent)
    joined, into = find.modules[path], find.joined_into(names[0])
    if not isinstance(joined, nn.Linear) or joined.bias is not None:
        return "transformers joins it with others into something else than a Linear without bias"
    if into is None or into[2] != len(names):
        return "transformers joins it with others, which are in float, into one matrix"
    return ""


def place_parts(
    model: nn.Module, path: str, parts: Sequence[tuple[str, StoredModule]], tensors: Mapping[str, TensorRef],
    find: Finder,
) -> None:  # fmt: skip
    """A SplitLinear of QuantLinears in place of the Linear at `path`: on disk its rows are `parts`, in their order.

    They are called 0, 1, … there: transformers would take their names on disk for tensors to be joined.
    """
    joined: Any = find.modules[path]
    whole = (sum(stored.shape[0] for _, stored in parts), joined.in_features)
    for name, stored in parts:
        if whole[0] != joined.out_features or not _fits(stored, (stored.shape[0], whole[1])):
            raise InputError(
                f"{name}: expected weights of {joined.out_features} rows and {whole[1]} columns with those that "
                f"are joined to it, found {whole[0]} rows, and {list(stored.shape)} here; "
                "config.json and weights do not belong together"
            )
    find.modules[path] = split = SplitLinear({})
    replace_module(model, path, split)
    for i, (_, stored) in enumerate(parts):
        shape = (stored.shape[0], whole[1])
        new = _linear(stored, shape, tensors, dtype=joined.weight.dtype, bias=False)
        new.expect_shapes({c: tensors[t].shape for c, t in stored.names.items()})
        split[str(i)] = new
        _put(model, f"{path}.{i}", new, find, shape)


def float_dtype_of(stored: StoredModule, tensors: Mapping[str, TensorRef]) -> str:
    """Of the checkpoint's float tensors, after which msModelSlim stores `deq_scale`."""
    return "F16" if any(tensors[t].dtype == "I64" for t in stored.names.values()) else "BF16"


def place_experts(
    model: nn.Module,
    path: str,
    members: Mapping[str, StoredModule],
    tensors: Mapping[str, TensorRef],
    find: Finder,
) -> None:
    """QuantExperts in place of the fused experts at `path`, whose projections are `members` on disk."""
    experts = model.get_submodule(path)
    if problem := refusal(experts):
        raise InputError(f"{path}: {type(experts).__name__} cannot hold quantized experts: {problem}")
    if without := {n.split(".")[-2] for n in members if not has_weights(experts, n)}:
        # transformers itself saves weights of them, uninitialized.
        pass_over(model, rf"\bexperts\.({'|'.join(sorted(without))})\.")
        members = {n: m for n, m in members.items() if n.split(".")[-2] not in without}
    first = next(iter(members.values()))
    schemes = {m.scheme for m in members.values()}
    down: Any = experts.down_proj
    count = down.shape[0] * (3 if getattr(experts, "has_gate", True) else 2)
    if len(schemes) > 1 or len(members) != count:
        raise InputError(
            f"{path}: expected all {count} expert projections quantized alike, found {len(members)} in "
            f"{len(schemes)} schemes; convert the checkpoint again with one scheme for its experts"
        )
    projections = {ROLES[p]: p for p in dict.fromkeys(find.projection(m) for m in members)}
    suffixes: dict[str, str] = {c: t.rpartition(".")[2] for c, t in first.names.items()}
    try:
        new = QuantExperts.like(
            experts, next(iter(schemes)), projections=projections, format=first.format, names=suffixes,
            float_dtype=float_dtype_of(first, tensors),
        )  # fmt: skip
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    shapes = {n: p.shape for n, p in experts.named_parameters(recurse=False) if n in FUSED_PARAMETERS}
    vars(new).update({n: _filled(*shape) for n, shape in shapes.items()})
    replace_module(model, path, new)
