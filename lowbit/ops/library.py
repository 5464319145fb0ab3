"""The library of operations in torch: how one is defined, and what their implementations and gradients share.

Defined through `torch.library.Library` and not through `custom_op`, whose wrapper costs more per call than a
small product on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit.ops import again

_library = torch.library.Library("lowbit", "DEF")


def define(schema: str, implementation: Any, fake: Any, moving: Sequence[str] = ()) -> Any:
    """Register an operation and return its implementation.

    moving: the tensors, of an operation that launches kernels, that differ from call to call (see `again`).
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    if moving:
        arguments = [a.name for a in torch._C.parse_schema(schema).arguments]
        implementation = again.keeping(implementation, [arguments.index(m) for m in moving])
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lowbit::{name}", fake, lib=_library)
    return implementation


def differentiate(operation: str, setup: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Give an operation its gradient: `setup` and `backward` as `torch.library.register_autograd` has them."""
    torch.library.register_autograd(f"lowbit::{operation}", backward, setup_context=setup, lib=_library)


def rows_of(x: Tensor) -> Tensor:
    """[..., K] → [M, K], where K is 0 too: torch infers no -1 of nothing."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def shaped(out: Tensor, *shape: int) -> Tensor:
    """`out` in another shape, and no view of it: nobody may change a view made within an operation in place."""
    return torch.ops.aten._unsafe_view.default(out, shape)


def bias_gradient(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """[…, N] of the output → [N], summed in float32 as the bias is added."""
    return grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(dtype)
