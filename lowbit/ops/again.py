"""Operations on accelerators through launches kept from an earlier call (see `lowbit.kernels.kept`).

There a call's Python takes longer than a product of a few rows, and in eager mode nothing hides it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lowbit.ops.settings import settings

_KEPT_CALLS = 4096

_local = threading.local()


def keeping(implementation: Callable[..., Any], moving: Sequence[int]) -> Callable[..., Any]:
    """`implementation` of an operation, whose first argument says the device; on a GPU its launches are kept.

    moving: positions of the tensors that differ from call to call. The others, weights, stay where they are and are
    known by their addresses.
    """

    def call(*arguments: Any) -> Any:
        x, forced = arguments[0], settings.implementation
        on_gpu = x.is_cuda or (forced == "triton" and x.is_cpu)  # a CPU stands for one in tests
        if not on_gpu or forced not in (None, "triton"):
            return implementation(*arguments)
        # All that launches depend on, which are no values. So nothing is kept alive, and what is kept is right for
        # whatever stands at those addresses next.
        key: list[Any] = [implementation, settings.fast_accumulation]
        for position, argument in enumerate(arguments):
            if isinstance(argument, Tensor):
                where = argument.data_ptr()
                key.append(where % 16 if position in moving else where)
                key += argument.device, argument.shape, argument.stride(), argument.dtype
            else:
                key.append(tuple(argument) if isinstance(argument, list) else argument)
        return _call(tuple(key), implementation, arguments, moving)

    return call


def _call(key: tuple, implementation: Callable[..., Any], arguments: tuple, moving: Sequence[int]) -> Any:
    """The second call is kept, later ones run its launches alone. Not the first: each prompt has its own length."""
    try:
        calls: dict[tuple, Any] | None = _local.calls
    except AttributeError:
        calls = _local.calls = {}
    if calls is None:  # within a call that is being kept: these launches are its own
        return implementation(*arguments)
    inputs = [arguments[i] for i in moving if arguments[i] is not None]
    kept = calls.get(key, 0)
    if kept:
        return kept.run(*inputs)
    if kept is None:
        return implementation(*arguments)
    if key not in calls:
        if len(calls) >= _KEPT_CALLS:
            calls.clear()
        calls[key] = 0
        return implementation(*arguments)
    try:
        from lowbit.kernels.kept import keep  # type: ignore[import-not-found]
    except ImportError:  # no Triton, and no launches
        calls[key] = None
        return implementation(*arguments)
    weights = [a for i, a in enumerate(arguments) if isinstance(a, Tensor) and i not in moving]
    _local.calls = None
    try:
        result, calls[key] = keep(lambda: implementation(*arguments), inputs, weights)
    finally:
        _local.calls = calls
    return result
