"""Devices `other:0` and `other:1` on a machine without accelerators: tensors in host memory that refuse to mix.

torch's PrivateUse1 backend with a wrapper tensor: whatever has a tensor there is run on what it wraps, and
what gets tensors of several devices raises, but for what torch allows (copies, scalars, and indices on
the CPU). Unlike a TorchFunctionMode this is a device to every part of torch, so that accelerate and
transformers move tensors to and from it as they do with CUDA. It belongs to a process of its own: `register`
cannot be undone.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import offload
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "other"
COUNT = 2
ran: dict[str, int] = {}
"""Device → how many operations ran there."""
aten = torch.ops.aten
_COPIES = {aten.copy_.default, aten._to_copy.default}
_INDEXES = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}


class OtherTensor(Tensor):
    """A tensor on `other:…`, held in `raw`."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor, requires_grad: bool = False, device: Any = None) -> Tensor:
        if device is None:  # as a Parameter's class is called for another value
            return nn.Parameter(raw, requires_grad=requires_grad)
        made = Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype,
            device=torch.device(device), requires_grad=requires_grad,
        )  # fmt: skip
        made.raw = raw
        return made

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def storage(self) -> Any:
        return self.raw.storage()

    def untyped_storage(self) -> Any:
        return self.raw.untyped_storage()

    def tolist(self) -> Any:
        return self.raw.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"OtherTensor({self.raw}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = pytree.tree_leaves((args, kwargs))
        tensors = [a for a in given if isinstance(a, Tensor)]
        homes = [t.device for t in tensors if isinstance(t, OtherTensor)]
        home = homes[0]
        if func not in _COPIES:
            mixed = {str(t.device) for t in tensors if t.dim() or isinstance(t, OtherTensor)}
            if func in _INDEXES and isinstance(args[0], OtherTensor):
                mixed -= {"cpu"}
            if len(mixed) > 1:
                raise RuntimeError(f"expected all tensors on one device, found {sorted(mixed)} in {func}")
            ran[str(home)] = ran.get(str(home), 0) + 1
        target = home
        if kwargs.get("device") is not None:
            target = torch.device(kwargs["device"])
            kwargs["device"] = torch.device("cpu" if target.type == NAME else target)
        plain_args, plain_kwargs = pytree.tree_map_only(OtherTensor, lambda t: t.raw, (args, kwargs))
        if func == aten.copy_.default:
            args[0].copy_(plain_args[1]) if type(args[0]) is Tensor else plain_args[0].copy_(plain_args[1])
            return args[0]
        out = func(*plain_args, **plain_kwargs)
        if target.type != NAME:
            return out
        if func == aten._to_copy.default and target != home:
            out = out.clone()
        own = {id(a.raw): a for a in given if isinstance(a, OtherTensor)}
        return pytree.tree_map_only(
            Tensor, lambda t: own[id(t)] if id(t) in own else OtherTensor(t, device=target), out
        )


class _Module(_DummyBackendModule):
    def device_count(self) -> int:
        return COUNT


def register() -> None:
    """From now on the devices exist."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    library = torch.library.Library("aten", "IMPL")
    globals()["_library"] = library  # as long as it lives, so do its implementations

    def empty(
        size: Any, *, dtype: Any = None, device: Any = None, memory_format: Any = None, **_: Any
    ) -> Tensor:
        return OtherTensor(torch.empty(size, dtype=dtype), device=device)

    def empty_strided(size: Any, stride: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
        return OtherTensor(torch.empty_strided(size, stride, dtype=dtype), device=device)

    def copy_from(source: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
        """As torch.tensor(…, device=…) asks for, past `__torch_dispatch__`."""
        raw = [t.raw if isinstance(t, OtherTensor) else t for t in (source, to)]
        raw[1].copy_(raw[0])
        return to

    def open_on_host(file: Any, framework: str, device: Any = "cpu") -> Any:
        return safe_open(file, framework, "cpu" if str(device).startswith(NAME) else device)

    # safetensors reads onto devices that it knows; accelerate moves what it finds elsewhere.
    offload.safe_open = open_on_host
    library.impl("_copy_from", copy_from, "PrivateUse1")
    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
