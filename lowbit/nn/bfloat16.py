"""Weights that a checkpoint has in bfloat16 stay so, while the model computes in float32.

CPUs without bfloat16 instructions multiply float32 many times faster, and a bfloat16 is the upper half
of a float32: widened on its way into the product, the weight takes half of the memory and of
the time to read it, and nothing is rounded.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from lowbit import ops
from lowbit.checkpoint.roles import role_of
from lowbit.nn.linear import QuantLinear
from lowbit.nn.stored import StoredWeights, autocast_input, float_linear
from lowbit.nn.swap import replace_module

_ASKS_FOR_DTYPE = re.compile(r"(\w+)\.weight\.dtype")


class BFloat16Linear(StoredWeights):
    """y = x · Wᵀ + b with W in bfloat16; x […, in_features] in any float dtype, and y in the same.

    For float32 on a CPU the sums are in float32, by `ops.linear_bfloat16`; elsewhere `F.linear` on
    W cast to the dtype of x. `weight` is a buffer that stays bfloat16, `bias` follows `.to(dtype)`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Uninitialized buffers; `dtype` is that of the bias."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.frozen = ("weight",)
        self.register_buffer(
            "weight", torch.empty(out_features, in_features, dtype=torch.bfloat16, device=device)
        )
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._buffers["weight"], self.stored_bias()
        assert weight is not None
        x = autocast_input(x)
        if x.dtype == torch.float32 and x.is_cpu and self.quantize_activations:
            return ops.linear_bfloat16(x, weight, bias)
        return nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def to_linear(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """A trainable Linear of the widened weight."""
        weight, bias = self._buffers["weight"], self.stored_bias()
        assert weight is not None
        return float_linear(weight.to(dtype, copy=True), bias).train(self.training)

    def extra_repr(self) -> str:
        bias = self.stored_bias() is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}"


class BFloat16Embedding(StoredWeights):
    """Rows of a bfloat16 table in `dtype`, which follows `.to(dtype)` and `.half()`; the table does not.

    `scale` multiplies them, as the embeddings of Gemma do; None: they are what they are.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        padding_idx: int | None = None,
        scale: float | None = None,
        kind: type[nn.Embedding] = nn.Embedding,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """An uninitialized table [num_embeddings, embedding_dim]. `kind`: what `to_embedding` makes."""
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.scale, self.kind, self.dtype = scale, kind, dtype
        self.frozen = ("weight",)
        self.register_buffer(
            "weight", torch.empty(num_embeddings, embedding_dim, dtype=torch.bfloat16, device=device)
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredWeights:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def forward(self, ids: Tensor) -> Tensor:
        weight = self._buffers["weight"]
        assert weight is not None
        rows = nn.functional.embedding(ids, weight).to(self.dtype)
        # Rounded to the dtype first, as transformers does.
        return rows if self.scale is None else rows * torch.tensor(self.scale, dtype=self.dtype)

    def to_embedding(self, dtype: torch.dtype = torch.float32) -> nn.Embedding:
        """A trainable Embedding of the widened table."""
        weight = self._buffers["weight"]
        assert weight is not None
        more = {} if self.scale is None else {"embed_scale": self.scale}
        made = self.kind(1, self.embedding_dim, None, **more)  # type: ignore[arg-type]
        made.num_embeddings, made.padding_idx = self.num_embeddings, self.padding_idx
        made.weight = nn.Parameter(weight.to(dtype, copy=True))
        return made.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, dtype={self.dtype}"


def keepable(module: nn.Module) -> bool:
    """Whether one of these can stand for a module that computes in float32: a Linear or an Embedding, of no other class
    than torch's or transformers' scaled one."""
    if type(module) is nn.Embedding or _scale(module) is not None:
        assert isinstance(module, nn.Embedding)
        return module.weight.dtype == torch.float32 and module.max_norm is None
    return type(module) is nn.Linear and module.weight.dtype == torch.float32


def _scale(module: nn.Module) -> float | None:
    """What transformers' `…ScaledWordEmbedding` multiplies its rows by."""
    if isinstance(module, nn.Embedding) and type(module).__name__.endswith("ScaledWordEmbedding"):
        return getattr(module, "scalar_embed_scale", None)
    return None


def keep_bfloat16(model: Any, stored: Mapping[str, str]) -> None:
    """Swap embeddings, the output head and Linears that a checkpoint has in bfloat16, before they are filled.

    `stored`: module → its tensor on disk, of those that are bfloat16 there. Modules that share a
    weight are swapped together or not at all. `model` is a transformers model on meta.
    """
    ends = (_or_none(model.get_input_embeddings), _or_none(model.get_output_embeddings))
    config = model.config.to_dict()
    tied = getattr(model, "all_tied_weights_keys", {})
    # transformers ties biases (BERT's head has one in two modules) as it does weights: parameters only.
    shares_bias = {name.removesuffix(".bias") for pair in tied.items() for name in pair}

    asked = _asked_for_their_dtype(model)

    def can_be(path: str) -> bool:
        read = path.rpartition(".")[2] in asked
        return path not in shares_bias and not read and keepable(model.get_submodule(path))

    chosen: set[str] = set()
    for path, tensor in stored.items():
        module = model.get_submodule(path)
        if not can_be(path):
            continue
        # Towers and routers are few, and what their code does with their weights is their own.
        role, _ = role_of(tensor.removesuffix(".weight"), tuple(module.weight.shape), config)
        if module in ends or role == "linear":
            chosen.add(path)
    shares_weight = {name.removesuffix(".weight") for pair in tied.items() for name in pair}
    if not {n.rpartition(".")[0] for n, _ in model.named_parameters()} - chosen - shares_weight:
        # OLMo's norms have no weight, and `model.device` and `model.dtype` are those of the first parameter.
        chosen = {path for path in chosen if isinstance(model.get_submodule(path), nn.Linear)}
    for one, other in tied.items():
        if not one.endswith(".bias"):
            pair = {one.removesuffix(".weight"), other.removesuffix(".weight")}
            whole = len(pair & stored.keys()) == 1 and all(map(can_be, pair))
            chosen = (chosen | pair) if whole and pair & chosen else chosen - pair
    for path in chosen:
        new = like(model.get_submodule(path))
        # transformers ties and initializes parameters only: `settle` makes it a buffer when that is done.
        new.frozen = ()
        weight = new._buffers.pop("weight")
        assert weight is not None
        new.weight = nn.Parameter(weight, requires_grad=False)
        replace_module(model, path, new)


def _asked_for_their_dtype(model: nn.Module) -> set[str]:
    """Names of modules whose weight's dtype the model's code asks for, to cast what it gives them.

    Mamba's head is one: its logits would be of bfloat16, in a model that computes in float32.
    """
    files = {type(m).__module__ for m in model.modules()}
    found: set[str] = set()
    for name in files:
        with suppress(OSError, TypeError):  # no source there
            found |= set(_ASKS_FOR_DTYPE.findall(inspect.getsource(sys.modules[name])))
    return found - {"self"}


def _or_none(asked: Callable[[], Any]) -> Any:
    """transformers' models of sound and pictures have no embeddings, and some say so with an error."""
    try:
        return asked()
    except (NotImplementedError, AttributeError):
        return None


def settle(model: nn.Module) -> None:
    """After loading: weights that `keep_bfloat16` left to be filled become buffers, shared where they were tied.

    A parameter in another dtype than the rest would decide what transformers calls `model.dtype`.
    """
    buffers: dict[int, Tensor] = {}
    for module in model.modules():
        if isinstance(module, BFloat16Linear | BFloat16Embedding) and "weight" in module._parameters:
            weight = module._parameters.pop("weight")
            assert weight is not None
            module.register_buffer("weight", buffers.setdefault(id(weight), weight.data))
            module.frozen = ("weight",)


def in_float(model: nn.Module, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Name → a Linear or Embedding in `dtype` for every module that holds a stored weight; what was tied stays so."""
    made: dict[str, nn.Module] = {}
    shared: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            made[name] = module.to_linear(dtype)
        elif isinstance(module, BFloat16Linear | BFloat16Embedding):
            wide = (
                module.to_linear(dtype) if isinstance(module, BFloat16Linear) else module.to_embedding(dtype)
            )
            assert isinstance(module.weight, Tensor) and isinstance(wide.weight, nn.Parameter)
            wide.weight = shared.setdefault(module.weight.data_ptr(), wide.weight)
            made[name] = wide
    return {name: new.requires_grad_(False) for name, new in made.items()}


def like(module: nn.Module) -> BFloat16Linear | BFloat16Embedding:
    """What holds the weight of a `keepable` module, on meta: to be filled from the checkpoint."""
    if isinstance(module, nn.Embedding):
        return BFloat16Embedding(
            module.num_embeddings, module.embedding_dim, padding_idx=module.padding_idx, scale=_scale(module),
            kind=type(module), device="meta",
        )  # fmt: skip
    assert isinstance(module, nn.Linear)
    return BFloat16Linear(
        module.in_features,
        module.out_features,
        bias=module.bias is not None,
        dtype=torch.float32,
        device="meta",
    )
