"""A second device on a machine without one: tensors of `cuda` that lie in host memory and refuse to mix.

A TorchFunctionMode sees every torch function called from Python. Storages made for `cuda` are remembered; their
tensors say that they are there; a function that gets tensors of two devices raises as CUDA would, but for
what torch allows: copying, moving, indices on the CPU, and scalars of the CPU. So code runs as it
would there, and shows where it makes tensors without saying on which device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
_MOVES = {Tensor.to, Tensor.cpu, Tensor.copy_, Tensor.type_as, Tensor.__setitem__}
_READS_HOST = {Tensor.numpy, Tensor.__array__}


class OtherDevice(TorchFunctionMode):
    """While inside, devices `cuda:0`, `cuda:1`, … exist. `count` says how many functions ran there."""

    def __init__(self) -> None:
        super().__init__()
        self._there: dict[int, tuple[torch.device, StorageWeakRef]] = {}
        self.count = 0

    def device_of(self, x: Tensor) -> torch.device:
        if x.is_meta:
            return torch.device("meta")
        found = self._there.get(x.untyped_storage()._cdata)
        return CPU if found is None else found[0]

    def place(self, x: Tensor, device: torch.device) -> None:
        # A weak reference keeps the storage's address from being used again, so what is known stays true.
        if device.type == "cuda":
            storage = x.untyped_storage()
            self._there[storage._cdata] = (device, StorageWeakRef(storage))

    def _placing(self, hook: Callable[[Tensor], Any], device: torch.device) -> Callable[[Tensor], Any]:
        def placed(gradient: Tensor) -> Any:
            self.place(gradient, device)
            return hook(gradient)

        return placed

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return self.device_of(args[0])
        inputs = list(_tensors((args, kwargs)))
        target = self._target(func, args, kwargs)
        homes = {self.device_of(x) for x in inputs}
        if any(d.type == "cuda" for d in homes):
            self.count += 1
            self._check(func, inputs, args)
        if target is not None and target.type == "cuda":
            args = tuple(CPU if _names(a, target) else a for a in args)
            kwargs = {k: CPU if _names(v, target) else v for k, v in kwargs.items()}
        if func == Tensor.register_hook:  # autograd makes gradients where no mode sees it
            args = (args[0], self._placing(args[1], self.device_of(args[0])))
        out = func(*args, **kwargs)
        if func in (Tensor.copy_, Tensor.__setitem__):
            return out
        home = target or next((d for d in homes if d.type == "cuda"), None)
        if home is None or home.type == "meta":
            return out
        known = {x.untyped_storage()._cdata for x in inputs if not x.is_meta}
        moved = target is not None and inputs and self.device_of(inputs[0]) != target
        if moved and isinstance(out, Tensor) and out.untyped_storage()._cdata in known:
            out = out.clone()
        for x in _tensors(out):
            if x.is_meta or (x.untyped_storage()._cdata in known and not moved):
                continue  # a view, or its own argument
            self.place(x, home)
        return out

    def _target(self, func: Any, args: tuple, kwargs: dict) -> torch.device | None:
        """The device that a call names."""
        if func == Tensor.cpu:
            return CPU
        named: Any = kwargs.get("device")
        if func in (Tensor.to, Tensor.type_as) and named is None:
            named = next((a for a in args[1:] if isinstance(a, str | torch.device | Tensor)), None)
        if isinstance(named, Tensor):
            return self.device_of(named)
        if named is None:
            return None
        device = torch.device(named)
        return torch.device("cuda", 0) if device == torch.device("cuda") else device

    def _check(self, func: Any, inputs: list[Tensor], args: tuple) -> None:
        if func in _READS_HOST:
            raise TypeError(f"can't convert a cuda tensor to numpy in {func}")
        if func in _MOVES:
            return
        homes = {self.device_of(x) for x in inputs if x.dim() > 0 or self.device_of(x) != CPU}
        if func == Tensor.__getitem__ and self.device_of(args[0]).type == "cuda":
            homes.discard(CPU)
        if len(homes) > 1:
            name = getattr(func, "__qualname__", func)
            raise RuntimeError(
                f"expected all tensors on one device, found {sorted(map(str, homes))} in {name}"
            )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _names(value: Any, target: torch.device) -> bool:
    return isinstance(value, str | torch.device) and str(value).partition(":")[0] == target.type
