"""Eager mode: past torch's dispatcher where nobody looks, and `linear` on CPUs with parameters filled in once.

Passing through the dispatcher into Python and filling in the parameters cost more than the
product of one row with a small layer. What stands for the latter on accelerators is in `again`.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lowbit.ops import dispatch
from lowbit.ops.checks import check_bfloat16, check_linear
from lowbit.ops.cpu_call import Call, instructions, product
from lowbit.ops.problem import Weights, quantized_as
from lowbit.ops.settings import settings

_KEPT_CALLS = 4096
_PLAIN = (Tensor, torch.nn.Parameter)
"""Types whose memory is their value. Others (DTensor, fake tensors) have their own arithmetic, and often no memory."""

_local = threading.local()


def applies(x: Tensor, *others: Tensor | None) -> bool:
    """Whether nothing looks at operators as they pass: no mode, no tracing, no profiler, no gradient, plain tensors."""
    if (
        torch._C._len_torch_function_stack()  # first: each attribute of a tensor goes through such a mode
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or torch.autograd._profiler_enabled()
    ):
        return False
    gradients = torch.is_grad_enabled()
    for t in (x, *others):
        if t is not None and (type(t) not in _PLAIN or t.is_neg() or (gradients and t.requires_grad)):
            return False
    return not x.is_meta


def linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, input_scale: Tensor | None,
    activations: str, block: tuple[int, ...], offsets: list[int] | None = None, plain: bool = False,
) -> Tensor | None:  # fmt: skip
    """`ops.linear` for plain CPU tensors, through a call kept from the last time; None where none can be kept.

    With offsets, which are E + 1 and rise to the rows of x: `ops.linear_grouped`. plain: `ops.linear_bfloat16`.

    The key holds all that a call depends on: addresses, dtypes and shapes, no values. So a call
    keeps no tensor alive, and is right for whatever stands at those addresses next.
    """
    if not (weight.is_contiguous() and weight_scale.is_contiguous()):
        return None
    key = (
        x.shape, x.stride(), x.dtype, weight.data_ptr(), weight.shape, weight.dtype, weight_scale.data_ptr(),
        weight_scale.shape, weight_scale.dtype, None if bias is None else (bias.data_ptr(), bias.dtype, bias.stride()),
        None if input_scale is None else (input_scale.data_ptr(), input_scale.dtype), activations, block,
        torch.get_num_threads(), instructions().name, settings.float64_sums, offsets is None, plain,
    )  # fmt: skip
    try:
        calls: dict[tuple, tuple[Call, list[int]] | None] = _local.calls
    except AttributeError:
        calls = _local.calls = {}
    found = calls.get(key)
    if found is None:
        if key in calls:
            return None
        if len(calls) >= _KEPT_CALLS:
            calls.clear()
        found = calls[key] = _keep(
            x, weight, weight_scale, bias, input_scale, activations, block, offsets, plain
        )
        if found is None:
            return None
    call, shape = found
    if offsets is not None:
        call.route(offsets)
    return call.run(x, torch.empty(shape, dtype=x.dtype))


def _keep(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, input_scale: Tensor | None,
    activations: str, block: tuple[int, ...], offsets: list[int] | None, plain: bool,
) -> tuple[Call, list[int]] | None:  # fmt: skip
    """(call, shape of the output), where the call depends on no value of its tensors and makes none of its own."""
    grouped = offsets is not None
    if plain:
        check_bfloat16(x, weight, bias)
    else:
        check_linear(
            x, weight, weight_scale, bias, input_scale, None, activations, list(block), experts=grouped
        )
    k, n = x.shape[-1], weight.shape[-2]
    given = [weight_scale, *(t for t in (bias, input_scale) if t is not None)]
    kept = (
        instructions().name != "portable"
        and x.numel() > 0
        and n > 0
        and x.stride(-1) == 1
        and (x.dim() <= 2 or x.is_contiguous())
        and all(t.dtype == torch.float32 and t.is_contiguous() and t.is_cpu for t in given)
        and weight.is_cpu
    )
    if not kept:
        return None
    weights = Weights(tensor=weight, scale=weight_scale, block=(block[0], block[1]), k=k)
    how = quantized_as(activations, block, weights.k, input_scale)
    flat = x if x.dim() == 2 else x.view(-1, k)
    problem = dispatch.problem_of(flat, weights, activations, bias=bias is not None)
    if not isinstance(dispatch.choose(problem, "cpu"), dispatch.Decision):
        return None
    call = product(flat, weights, how, bias, x.dtype, offsets=offsets)
    if grouped and call.pack is not None:  # memory for panels differs with what each expert gets
        return None
    call.alive = ()
    return call, [*x.shape[:-1], n]
