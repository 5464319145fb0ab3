"""Rotating a whole model's residual stream: what lies outside the decoder layers, and whether it can be done."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from lowbit.calibration import fold
from lowbit.calibration.graph import norm_gain, trace
from lowbit.calibration.layerwise import LayerwiseModel
from lowbit.calibration.methods import Method
from lowbit.calibration.rotation import Rotation, make_rotation
from lowbit.checkpoint.roles import role_of
from lowbit.errors import InputError


def settled(method: Method, model: LayerwiseModel, kept: Collection[str] = ()) -> Method:
    """`method`, or what it allows in place of a rotation that the model does not (see `Method.else_smooth`).

    `kept`: modules, by the checkpoint's names, that are to be as the source has them. InputError for those where it
    rotates, and allows nothing.
    """
    if method.rotate == "none":
        return method
    try:
        if kept:
            more = f" and {len(kept) - 1} more" if len(kept) > 1 else ""
            raise InputError(
                f"expected weights that a rotation may change, found {min(kept)}{more} to be kept as the source has "
                "it; use a method without rotation (gptq, smoothquant-gptq), or ignore in place of keep"
            )
        if method.else_smooth:
            refuse_outside(model)
            _try_layers(model, method)
    except InputError as error:
        if not method.else_smooth:
            raise
        reason = str(error).partition(", found ")[2].rpartition("; ")[0] or str(error)
        return method.without_rotation(reason)
    return method


def refuse_outside(model: LayerwiseModel) -> None:
    """InputError where something besides the decoder layers keeps the residual stream from being rotated."""
    for name, ref in model.source.tensors.items():
        # What towers add to the residual stream would not be rotated.
        if role_of(name.rpartition(".")[0], ref.shape, model.source.config)[0] in ("vision", "audio"):
            raise InputError(
                f"expected a model of text alone to rotate, found {name} in {model.source.path}, whose outputs enter "
                "the residual stream as they are; use a method without rotation (gptq, smoothquant-gptq)"
            )
    embedding, norm = model.model.get_input_embeddings(), _final_norm(model.base)
    if model.model.get_output_embeddings() is None or not isinstance(embedding, nn.Embedding):
        raise InputError(
            "expected token embeddings and lm_head to rotate, found none; use a method without rotation"
        )
    found = [n for n, m in model.base.named_modules() if isinstance(m, nn.Embedding) and m is not embedding]
    try:
        centered = norm_gain(norm, embedding.weight.shape[1])[1]
    except ValueError as error:
        found, centered = [*found, str(error)], False
    if found or centered:
        raise InputError(
            f"expected one embedding and RMSNorm, found {', '.join(found) or type(norm).__name__}; "
            "use a method without rotation"
        )


def _try_layers(model: LayerwiseModel, method: Method) -> None:
    """Rotate one layer of each kind, on a few tokens. InputError where that changes what it puts out."""
    call = model.embed(torch.arange(16)[None] % model.model.get_input_embeddings().weight.shape[0])
    rotation = make_rotation(call.hidden.shape[-1], method.rotate, method.seed)
    kinds = set()
    for index in range(len(model)):
        kind = model.kind(index)
        if kind in kinds:
            continue
        kinds.add(kind)
        layer = model.load(index)

        def run(hidden: Tensor, index: int = index, layer: nn.Module = layer) -> Tensor:
            return model.run(layer, index, hidden, call.kwargs[index])

        graph = trace(layer, lambda _, run=run: run(call.hidden), rotation.size, model.text_config)  # type: ignore[misc]
        expected = rotation.apply(run(call.hidden) - call.hidden)
        if model.shares(call.kwargs[index]):
            raise InputError(
                "expected layers on their own, found layers that share states; use a method without rotation"
            )
        fold.rotate_residual(layer, graph, rotation)
        hidden = rotation.apply(call.hidden)
        if not fold.relative_change(expected, run(hidden) - hidden, hidden) < 5e-3:
            raise InputError(
                f"expected a layer that can be rotated, found {model.layer_name(index)} changed by it; "
                "use a method without rotation"
            )


def rotate_outside(model: LayerwiseModel, rotation: Rotation, stored: torch.dtype) -> dict[str, Tensor]:
    """Rotate embeddings and lm_head of a model in memory, in place, the final norm folded into lm_head.

    Returns the changed tensors by our names, as they will be stored; the model computes with those.
    InputError where that is not exact (see `refuse_outside`).
    """
    refuse_outside(model)
    embedding, head = model.model.get_input_embeddings(), model.model.get_output_embeddings()
    norm = _final_norm(model.base)
    offset, _ = norm_gain(norm, rotation.size)
    gain = norm.weight.detach() + offset  # type: ignore[operator]

    def keep(x: Tensor, name: str) -> nn.Parameter:
        found = fold.as_stored(x, stored, name)
        return nn.Parameter(x if model.dtype == torch.float64 else found.to(model.dtype), requires_grad=False)

    before = embedding.weight.detach()
    head.weight = keep(rotation.apply(head.weight.detach() * gain), "the output head")
    embedding.weight = keep(rotation.apply(before), "the embedding")
    norm.weight = nn.Parameter(torch.full_like(gain, 1.0 - offset), requires_grad=False)
    names = {id(m): n for n, m in model.model.named_modules()}
    return {
        f"{names[id(m)]}.weight": m.weight.detach().to(stored)  # type: ignore[operator]
        for m in (embedding, head, norm)
    }


def _final_norm(base: nn.Module) -> nn.Module:
    """The norm after the last decoder layer."""
    for name in (
        "norm",
        "final_layernorm",
        "final_layer_norm",
        "ln_f",
        "final_norm",
        "norm_f",
        "embedding_norm",
    ):
        if isinstance(norm := getattr(base, name, None), nn.Module):
            return norm
    raise InputError(f"expected a final norm in {type(base).__name__}, found none")
