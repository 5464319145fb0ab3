"""A mixture's experts that a checkpoint holds in 3-D tensors, seen as one matrix per expert and projection.

`….experts.gate_up_proj` and `….experts.down_proj` hold all experts of a layer:

    [E, 2I, H] and [E, H, I]   as transformers 5 writes every mixture (Qwen3.5-MoE, Gemma 4)
    [E, H, 2I] and [E, I, H]   transposed: Llama 4 and Qwen3-VL-MoE as published
    [E, H/2, 2I], [E, I/2, H]  the same in U8: Llama 4 in ModelOpt's NVFP4, two rows in one

with the gate before the up projection (in gpt-oss they alternate); Granite calls
them otherwise, and Step 3.5 has gate and up in tensors of their own (`NAMES`). Engines load
quantized experts as matrices named `….experts.{e}.gate_proj.weight` (`up_proj`, `down_proj`),
which llm-compressor and ModelOpt write too. `split` gives a view of a checkpoint with those: each
is a range of bytes in the same file (or a transposed one), so the rest of a conversion needs no word
about them. This is the only place that knows the layouts, and what it is not certain of stays whole,
with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from lowbit.checkpoint.headers import FLOATS, ITEM_BYTES, Checkpoint, TensorRef
from lowbit.formats import METHOD_OF_DESCRIPTION, configs_in, quantization_of
from lowbit.formats.fp4 import BLOCKS, SCALES

GATE_UP, GATE, UP, DOWN = "gate_up_proj", "gate_proj", "up_proj", "down_proj"
PARTS: Mapping[str, tuple[str, ...]] = {GATE_UP: (GATE, UP), GATE: (GATE,), UP: (UP,), DOWN: (DOWN,)}
"""Fused parameter → its projections of one expert, in their order on disk."""
SCALE = "_scale_inv"
"""Appended to a fused parameter's name: the scales of its block FP8 codes."""
OF_CODES, OF_ALL = "_weight_scale", "_weight_scale_2"
"""The same of ModelOpt's: one scale of FP8 codes; of FP4 codes E4M3 for each 16 [E, H/16, 2I], and a number for all."""
_OF_MODELOPT = {OF_CODES: "weight_scale", OF_ALL: "weight_scale_2", "_input_scale": "input_scale"}
_LEAVES = {"": "weight", SCALE: "weight" + SCALE, **_OF_MODELOPT}
BESIDE_FUSED = (SCALE, *_OF_MODELOPT)
"""All that belongs to a fused parameter's codes."""

# gate and up alternate in these, whatever their shape is.
_INTERLEAVED = {"gpt_oss", "openai_privacy_filter"}
_ALTERNATE = "experts fused into one 3-D tensor, in which gate and up projections alternate"
# Known to be stored transposed with gate before up; the shapes alone would not tell that from gpt-oss.
_TRANSPOSED = {"llama4", "llama4_text", "qwen3_vl_moe", "qwen3_vl_moe_text"}

# transformers reads their experts from 3-D tensors only: of matrices, once they are in float, it makes nothing.
_STACKED = _TRANSPOSED | {
    "gemma4", "gemma4_text", "granitemoe", "granitemoehybrid", "granitemoeshared", "step3p5",
}  # fmt: skip


@dataclass(frozen=True)
class Names:
    """What a family of models calls its fused tensors, and where engines look for their matrices."""

    at: re.Pattern[str]
    """The module that holds them."""
    leaves: Mapping[str, str]
    """Tensor below it → what it is: one of `PARTS`, or the scales of one."""
    experts: str = ""
    """Appended to `at`: the module whose children `{e}.gate_proj` are the matrices."""


NAMES = (
    Names(re.compile(r"(?:.*\.)?experts"), {p + s: p + s for p in (GATE_UP, DOWN) for s in _LEAVES}),
    Names(
        re.compile(r"(?:.*\.)?block_sparse_moe"),  # Granite; vLLM has its matrices below `experts`
        {"input_linear.weight": GATE_UP, "output_linear.weight": DOWN},
        ".experts",
    ),
    Names(
        re.compile(r"(?:.*\.)?moe"),  # Step 3.5
        {f"{p}.weight{s}": p + s for p in (GATE, UP, DOWN) for s in ("", SCALE)},
        ".experts",
    ),
)
# Experts that no engine reads once they are quantized: module (`at`: that of all of the layer), dimensions, why.
_FLOAT_ONLY = (
    (
        re.compile(r"(?P<at>(?:.*\.)?mlp\.experts)\.fc[12]"),
        3,
        "Aria's experts: vLLM takes the gate of a quantized one for gate and up",
    ),
    (
        re.compile(r"(?P<at>(?:.*\.)?ffn\.experts)\.mlp\.(?:w1|v1|w2)"),
        2,
        "DBRX's experts, all of a layer below each other in one matrix: no engine reads them quantized",
    ),
    (
        re.compile(r"(?P<at>(?:.*\.)?(?:mlp|self_attention\.experts))\.(?:in|out)put_linear"),
        3,
        "JetMoE's experts: no engine runs them quantized",
    ),
)
_PER_EXPERT = re.compile(r"^(?P<parent>(?:.*\.)?experts)\.\d+\.(?P<part>\w+)$")

Shape = tuple[int, ...]
Orientation = Literal["rows", "columns"]
"""What a projection's outputs are in the stored matrices: `rows` [out, in], or `columns` [in, out]."""


@dataclass(frozen=True, kw_only=True)
class SplitExperts:
    """A checkpoint whose fused experts are taken apart."""

    checkpoint: Checkpoint
    """With a reference per expert and projection in place of each 3-D tensor that was split."""
    whole: Mapping[str, str]
    """Modules of 3-D expert tensors left as they are → why."""


def split(source: Checkpoint, leave: Collection[str] = ()) -> SplitExperts:
    """The view of `source` with its fused experts split, but for the modules (`….experts`) in `leave`."""
    whole = {
        module: _ALTERNATE for name, ref in source.tensors.items() if name.endswith(BLOCKS) and ref.dtype == "U8"
        if (module := name.removesuffix(BLOCKS)) + SCALES in source.tensors
    }  # fmt: skip
    found: dict[str, dict[str, TensorRef]] = {}
    ends = tuple(_OF_MODELOPT)
    for name, ref in source.tensors.items():
        # The names of a trillion parameters are many: most are told from these at once.
        if (len(ref.shape) == 3 or name.endswith(ends)) and (place := _place(name)) is not None:
            found.setdefault(place[0], {})[place[1]] = ref
    if not found:
        return SplitExperts(checkpoint=source, whole=whole)
    beside = _beside(source, found)
    parts: dict[str, list[TensorRef]] = {}
    for parent, members in found.items():
        reason = _problem(members, source.config) or beside.get(parent, "")
        if reason or parent in leave:
            whole |= {
                ref.name.removesuffix(".weight"): reason for ref in members.values() if len(ref.shape) == 3
            }  # fmt: skip
            continue
        orientation = _orientation(members)
        assert orientation is not None  # else `_problem` had found it
        for leaf, ref in members.items():
            parts[ref.name] = list(_parts(parent, leaf, ref, orientation, members[DOWN].shape[0]))
    tensors: dict[str, TensorRef] = {}
    for name, ref in source.tensors.items():
        tensors |= {part.name: part for part in parts.get(name, (ref,))}
    view = replace(source, tensors=tensors, config=_described(source.config, parts))
    return SplitExperts(checkpoint=view, whole=whole)


def _described(config: dict[str, Any], parts: Mapping[str, Iterable[TensorRef]]) -> dict[str, Any]:
    """A config of which msModelSlim's description, which names all tensors, has `parts` as what they are parts of."""
    said = quantization_of(config)
    if said.get("quant_method") != METHOD_OF_DESCRIPTION:
        return config
    theirs = {part.name: said[name] for name, each in parts.items() if name in said for part in each}
    return {**config, "quantization_config": {**said, **theirs}}


def _place(tensor: str) -> tuple[str, str] | None:
    """(the module of all experts, one of `PARTS` or its scales) of a fused tensor's name; None for others."""
    for names in NAMES:
        for leaf, kind in names.leaves.items():
            at = tensor.removesuffix("." + leaf)
            if at != tensor and names.at.fullmatch(at):
                return at + names.experts, kind
    return None


def _float_only(module: str, shape: Shape) -> tuple[str, str] | None:
    """(the module of all experts, why they are not quantized) of those that no engine reads; None for others."""
    for pattern, dimensions, reason in _FLOAT_ONLY:
        if len(shape) == dimensions and (match := pattern.fullmatch(module)):
            return match["at"], reason
    return None


def why_fused(module: str, shape: Shape) -> str:
    """Why the tensor of a module that holds all experts of a layer is not quantized as it is; "" for others."""
    if (found := _float_only(module, shape)) is not None:
        return found[1]
    if len(shape) == 3 and ("experts" in module.split(".") or _place(module + ".weight") is not None):
        return "experts fused into one 3-D tensor, under names whose layout is not known here"
    return ""


def only_stacked(config: Mapping[str, Any]) -> bool:
    """Whether transformers loads a model's float experts from 3-D tensors alone."""
    return any(str(c.get("model_type")) in _STACKED for c in configs_in(config))


def is_fused(ref: TensorRef) -> bool:
    """Whether a tensor holds all experts of a layer, under names that are known here or not."""
    return why_fused(ref.name.removesuffix(".weight"), ref.shape) != ""


def is_beside_fused(tensor: str) -> bool:
    """Whether a tensor of that name belongs to the codes of a fused one, such as their scales."""
    place = _place(tensor)
    return place is not None and place[1] not in PARTS


def experts_of(module: str, shape: Shape = ()) -> str:
    """The module that engines build for all experts of a fused tensor, by its name or its module's: its parent but
    where these are known to lie elsewhere."""
    module = module.removesuffix(".weight")
    place = _place(module) or _place(module + ".weight") or _float_only(module, shape)
    return module.rpartition(".")[0] if place is None else place[0]


def fused_tensors(module: str) -> list[str]:
    """3-D tensors that could hold a module such as `….experts.3.up_proj`; [] for other modules."""
    match = _PER_EXPERT.match(module)
    if match is None:
        return []
    kinds = {k for k, parts in PARTS.items() if match["part"] in parts}
    found = []
    for names in NAMES:
        at = match["parent"].removesuffix(names.experts)
        if match["parent"].endswith(names.experts) and names.at.fullmatch(at):
            found += [f"{at}.{leaf}" for leaf, kind in names.leaves.items() if kind in kinds]
    return found


def fused_names(source: Checkpoint, names: Iterable[str]) -> dict[str, str]:
    """Of modules or tensors of a view, those that are part of a 3-D tensor of `source`: module → module of that."""
    found: dict[str, str] = {}
    for name in names:
        module = name.removesuffix(".weight")
        for tensor in fused_tensors(module):
            if tensor in source.tensors:
                found[module] = tensor.removesuffix(".weight")
    return found


def part_names(fused: str, experts: int) -> list[str]:
    """Modules per expert and projection of a 3-D tensor's name, or [] when it is not one that can be split."""
    place = _place(fused)
    if place is None or place[1] not in PARTS:
        return []
    return [f"{place[0]}.{e}.{part}" for e in range(experts) for part in PARTS[place[1]]]


def orientation_of(gate_up: Shape, down: Shape) -> Orientation | None:
    """How a pair of 3-D tensors is stored; None when the two do not fit together.

    No two sizes fit both ways: I would have to be H and ½H at once.
    """
    if len(gate_up) != 3 or len(down) != 3 or gate_up[0] != down[0] or 0 in (*gate_up, *down):
        return None
    if gate_up[1] == 2 * down[2] and gate_up[2] == down[1]:
        return "rows"
    if gate_up[1] == down[2] and gate_up[2] == 2 * down[1]:
        return "columns"
    return None


def _orientation(members: Mapping[str, TensorRef]) -> Orientation | None:
    """`orientation_of` the fused tensors of one module."""
    down = unpacked(members[DOWN])
    if GATE_UP in members:
        return orientation_of(unpacked(members[GATE_UP]), down)
    gate = members[GATE].shape
    both = (gate[0], 2 * gate[1], gate[2]) if gate == members[UP].shape else ()
    return orientation_of(both, down)


def unpacked(ref: TensorRef) -> Shape:
    """The shape of a fused tensor, of FP4 in U8 with two rows in each."""
    experts, n, k = ref.shape
    return (experts, 2 * n, k) if ref.dtype == "U8" else ref.shape


def _beside(source: Checkpoint, parents: Collection[str]) -> dict[str, str]:
    """Experts with tensors other than the fused ones: biases, norms, or some expert by itself."""
    others: dict[str, list[str]] = {}
    for name in source.tensors:
        if _place(name) is not None:
            continue
        for match in re.finditer(r"\bexperts(?=\.)", name):
            parent, rest = name[: match.end()], name[match.end() + 1 :]
            if parent in parents:
                others.setdefault(parent, []).append(rest)
    return {
        parent: f"experts fused into one 3-D tensor, with others beside them that are not known here ({rest[0]})"
        for parent, rest in others.items()
    }


def _problem(members: Mapping[str, TensorRef], config: Mapping[str, Any]) -> str:
    """Why the fused experts of one module cannot be split with certainty, or ""."""
    fused = "experts fused into one 3-D tensor"
    wanted = (GATE, UP, DOWN) if GATE in members or UP in members else (GATE_UP, DOWN)
    if missing := [k for k in wanted if k not in members]:
        return f"{fused}, without {' and '.join(missing)} beside it"
    types = {str(c.get("model_type")) for c in configs_in(config)}
    if types & _INTERLEAVED:
        return _ALTERNATE
    down, orientation = members[DOWN], _orientation(members)
    if orientation is None:
        shapes = " and ".join(str(list(members[k].shape)) for k in wanted)
        return f"{fused}, of shapes that do not fit together: {shapes}"
    hidden = unpacked(down)[1] if orientation == "rows" else down.shape[2]
    declared = {c["hidden_size"] for c in configs_in(config) if isinstance(c.get("hidden_size"), int)}
    if declared and hidden not in declared:
        return f"{fused}, of hidden size {hidden}, which config.json does not have"
    if orientation == "columns" and not types & _TRANSPOSED:
        return f"{fused}, stored [experts, in, out] by a model that is not known to keep gate before up"
    for leaf in wanted:
        if problem := _scale_problem(leaf, members, orientation, config):
            return f"{fused}, {problem}"
    return ""


def _scale_problem(
    leaf: str, members: Mapping[str, TensorRef], orientation: Orientation, config: Mapping[str, Any]
) -> str:
    codes, scale = members[leaf], members.get(leaf + SCALE)
    if (own := members.get(leaf + OF_CODES)) is not None:
        experts, k, n = unpacked(codes)
        packed, number = codes.dtype == "U8", members.get(leaf + OF_ALL) if codes.dtype == "U8" else own
        if packed and (k % 16 or (own.dtype, own.shape) != ("F8_E4M3", (experts, k // 16, n))):
            return f"whose scales, {own.dtype} {list(own.shape)}, are not one in E4M3 for each 16 rows"
        if not packed and codes.dtype != "F8_E4M3":
            return f"stored as {codes.dtype} with scales"
        return "" if number is not None and number.elements == 1 else "without one scale for all of it"
    if scale is None:
        return "" if codes.dtype in FLOATS else f"stored as {codes.dtype} without scales"
    block = quantization_of(config).get("weight_block_size")
    rows, cols = scale_block(block)
    n, k = codes.shape[1:]
    if scale.shape != (codes.shape[0], -(-n // rows), -(-k // cols)):
        return f"whose scales {list(scale.shape)} are not one per {rows}×{cols} block"
    if orientation == "columns" and rows != cols:
        return "stored [experts, in, out] with blocks that are not square"
    half = codes.shape[1 if orientation == "rows" else 2] // 2
    if leaf == GATE_UP and half % rows:
        return f"whose gate and up halves of {half} do not end on the border of a block of {rows}"
    return ""


def scale_block(block: Any) -> tuple[int, int]:
    """`weight_block_size` of a config → rows and columns per scale; 128×128 where it says nothing."""
    if (
        isinstance(block, list | tuple)
        and len(block) == 2
        and all(isinstance(b, int) and b > 0 for b in block)
    ):
        return block[0], block[1]
    return 128, 128


def _parts(
    parent: str, leaf: str, ref: TensorRef, orientation: Orientation, experts: int
) -> Iterator[TensorRef]:
    """The matrices of a fused tensor, in the order of their bytes; of a number for all of them, that for each."""
    fused = next(p for p in PARTS if leaf.startswith(p))
    kind, names = _LEAVES[leaf.removeprefix(fused)], PARTS[fused]
    item = ITEM_BYTES[ref.dtype]
    n, k = ref.shape[1:] if len(ref.shape) == 3 else (0, 0)
    for e in range(experts):
        for i, part in enumerate(names):
            name, at = f"{parent}.{e}.{part}.{kind}", ref.offset + e * n * k * item
            if not n:  # one number for all
                yield replace(ref, name=name)
                continue
            if orientation == "rows":
                shape = (n // len(names), k)
                yield TensorRef(name, ref.dtype, shape, ref.file, at + i * shape[0] * k * item)
            else:
                shape = (k // len(names), n)
                yield TensorRef(name, ref.dtype, shape, ref.file, at + i * shape[0] * item, pitch=k)
