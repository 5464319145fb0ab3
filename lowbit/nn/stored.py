"""A module whose buffers are a weight as it lies on disk: they move, and are never cast or trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import InputError
from lowbit.formats import FORMATS, Format, get_format
from lowbit.scheme import Scheme, scheme_of

TORCH_DTYPES = {
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""safetensors' names of dtypes → torch's."""

# `Module.to(dtype)`, `half()` and their like cast what is floating; seen as integers of the
# same width, codes and scales are only moved.
_AS_INTEGER = {
    torch.float8_e4m3fn: torch.int8,
    torch.float8_e8m0fnu: torch.uint8,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
}
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e8m0fnu)


class StoredWeights(nn.Module):
    """Base of the modules that hold a weight as it is stored. Buffers named in `frozen` keep their dtype whatever is
    asked for."""

    frozen: tuple[str, ...] = ()
    quantize_activations = True
    """False: `F.linear` of x as it is with the weight in x's dtype (see `float_activations`)."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredWeights:
        def move(tensor: Tensor) -> Tensor:
            as_integer = _AS_INTEGER.get(tensor.dtype, tensor.dtype)
            moved = fn(tensor.view(as_integer))
            if moved.dtype != as_integer:
                raise TypeError(
                    f"expected stored weights to keep {tensor.dtype}, found a conversion to {moved.dtype}; "
                    "use .to(dtype) or .half(), which leave them alone, or to_linear() for a float weight"
                )
            return moved.view(tensor.dtype)

        everything = dict(self._buffers)
        kept = {name: buffer for name in self.frozen if (buffer := everything[name]) is not None}
        moved = {name: move(buffer) for name, buffer in kept.items()}
        for name in self.frozen:
            del self._buffers[name]
        try:
            super()._apply(fn, recurse)
        finally:
            others = dict(self._buffers)
            self._buffers.clear()
            for name in everything:  # in their old order
                self._buffers[name] = moved.get(name, others.get(name))
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter) and name in self.frozen:
            raise TypeError(
                f"{type(self).__name__}.{name} cannot be a Parameter: quantized weights are frozen, as are all that "
                "stay as stored; train an adapter beside the layer, or what to_linear() makes"
            )
        super().__setattr__(name, value)

    def requires_grad_(self, requires_grad: bool = True) -> StoredWeights:
        """Stored weights cannot be trained: True raises TypeError."""
        if requires_grad:
            raise TypeError(
                f"the weights of {type(self).__name__} are as stored and stay frozen; gradients flow through it to its "
                "input: train an adapter beside it, or what to_linear() makes"
            )
        return self

    def stored_bias(self) -> Tensor | None:
        """The buffer `bias`, or the Parameter that somebody has put in its place to train it."""
        return self._buffers["bias"] if "bias" in self._buffers else self._parameters["bias"]

    def __getstate__(self) -> dict[str, Any]:
        # Plain pickle cannot hold float8 tensors (torch.save can).
        buffers = dict(self._buffers)
        float8 = {n: t.dtype for n, t in buffers.items() if t is not None and t.dtype in _FLOAT8}
        for name in float8:
            tensor = buffers[name]
            assert tensor is not None
            buffers[name] = tensor.view(torch.uint8)
        return self.__dict__ | {"_buffers": buffers, "_float8": float8}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        float8 = state.pop("_float8")
        super().__setstate__(state)
        for name, dtype in float8.items():
            tensor = self._buffers[name]
            assert tensor is not None
            self._buffers[name] = tensor.view(dtype)

    def check_frozen(self) -> None:
        """TypeError when someone asked for a gradient of what is stored, or cast codes or scales behind the module."""
        for name in self.frozen:
            buffer = self._buffers[name]
            if buffer is not None and buffer.requires_grad:
                raise TypeError(
                    f"{type(self).__name__}.{name} requires a gradient, but quantized weights are frozen; "
                    f"call .{name}.requires_grad_(False)"
                )


class QuantModule(StoredWeights):
    """Base of the quantized modules: codes and scales in an on-disk format."""

    format: Format

    def check_frozen(self) -> None:
        super().check_frozen()
        for name in self.frozen:
            buffer = self._buffers[name]
            if buffer is not None and buffer.dtype in (torch.bfloat16, torch.float16):
                raise TypeError(
                    f"expected {type(self).__name__}.{name} as stored, found it cast to {buffer.dtype}; FSDP's "
                    "MixedPrecision(buffer_dtype=…) does that: leave it out, and load the weights again"
                )

    def __getstate__(self) -> dict[str, Any]:
        # A format is stateless: its name will do.
        return super().__getstate__() | {"format": self.format.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.format = get_format(state["format"])


@contextmanager
def float_activations(model: nn.Module) -> Iterator[None]:
    """Within the block the modules of `model` that hold stored weights leave activations unquantized.

    Each then computes `F.linear` with its dequantized weight, so that the model equals, bit for
    bit, one of dequantized weights: what is missing otherwise is what quantizing activations costs.
    """
    modules = [m for m in model.modules() if isinstance(m, StoredWeights)]
    before = [m.quantize_activations for m in modules]
    try:
        for module in modules:
            module.quantize_activations = False
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.quantize_activations = value


def codes_of(names: Mapping[str, str]) -> str:
    """Which content of a module (names: content → name) is its codes: `packed` where the format packs them."""
    return "packed" if "packed" in names else "codes"


def as_scheme(scheme: Scheme | str) -> Scheme:
    """A scheme that quantizes weights; InputError for one that does not (`bf16`)."""
    scheme = scheme_of(scheme)
    if scheme.weights is None:
        raise InputError(
            f"expected a scheme that quantizes weights, found {scheme.name}; use .to(dtype) for that"
        )
    return scheme


def as_format(fmt: Format | str) -> Format:
    return get_format(fmt) if isinstance(fmt, str) else fmt


def check_held(fmt: Format | str, scheme: Scheme, name: str) -> None:
    """InputError for a scheme whose codes under the names of that format nobody could read."""
    if not as_format(fmt).holds(scheme):
        able = ", ".join(f.name for f in FORMATS.values() if f.holds(scheme))
        raise InputError(
            f"{name}: expected a format that holds {scheme.name}, found {as_format(fmt).name}; use one of {able}"
        )


def pack(codes: Tensor) -> Tensor:
    """int8 [N, K] → int32 [N, ⌈K/4⌉]: bytes of code + 128, the first in the lowest byte; padding is 0."""
    n, k = codes.shape
    raw = torch.zeros(n, -(-k // 4) * 4, dtype=torch.uint8, device=codes.device)
    raw[:, :k] = (codes.to(torch.int16) + 128).to(torch.uint8)
    return raw.view(torch.int32)


def unpack(packed: Tensor, k: int) -> Tensor:
    """int32 […, ⌈K/4⌉] → int8 […, K], the inverse of `pack`."""
    raw = packed.contiguous().view(torch.uint8)[..., :k]
    return (raw.to(torch.int16) - 128).to(torch.int8)


def float_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A trainable Linear that takes `weight` [N, K] over, and a copy of `bias` in its dtype."""
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(weight.dtype, copy=True))
    return linear


def autocast_input(x: Tensor) -> Tensor:
    """What `F.linear` would compute in under autocast, which leaves float64 and what is no float alone."""
    kind = x.device.type
    # torch has no autocast for meta, and says so with an error.
    if x.is_meta or x.dtype == torch.float64 or not x.is_floating_point():
        return x
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
