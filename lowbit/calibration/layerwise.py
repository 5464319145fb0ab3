"""A transformers causal language model of which one decoder layer at a time is in memory.

The model is built on the meta device, so it costs nothing. Embeddings, the final norm, the
rotary tables and lm_head are filled for good; a decoder layer is filled from the checkpoint when it is
asked for, and forgotten afterwards. Whatever else the model's own forward prepares for its
layers (rotary embeddings, masks, sliding windows) is recorded by running that forward with
every layer replaced by a stub, so nothing about the architecture is assumed but a list of
decoder layers that take hidden states first and return them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.calibration.devices import choose_device
from lowbit.calibration.experts import unfuse
from lowbit.calibration.source import Source
from lowbit.errors import InputError

# Checkpoints that name a mixture's parts as its paper did; ours are transformers' names.
_ALIASES: tuple[tuple[str, str], ...] = (
    (r"\.mlp\.experts\.(\d+)\.gate_proj", r".block_sparse_moe.experts.\1.w1"),
    (r"\.mlp\.experts\.(\d+)\.down_proj", r".block_sparse_moe.experts.\1.w2"),
    (r"\.mlp\.experts\.(\d+)\.up_proj", r".block_sparse_moe.experts.\1.w3"),
    (r"\.mlp\.gate(?=\.|$)", r".block_sparse_moe.gate"),
    # The text model of one that also sees (Qwen3.5).
    (r"^model\.", "model.language_model."),
)


Override = Callable[[str], Tensor | None]
"""Checkpoint name → a tensor that takes its place, or None."""


class _Stub(nn.Module):
    """Stands for a decoder layer: records what it is called with, returns the hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.kwargs: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args:
            raise InputError(
                f"expected decoder layers called with hidden states and keywords, found {len(args)} more positional "
                "arguments; this architecture cannot run layer by layer: convert it without --method and --calibration"
            )
        self.kwargs = kwargs
        return hidden_states


@dataclass(frozen=True, kw_only=True)
class LayerCall:
    """A batch at the entrance of the decoder: what every layer gets beside the hidden states."""

    hidden: Tensor
    kwargs: tuple[dict[str, Any], ...]
    """One per layer; layers of one kind share masks and rotary tables by reference."""


class LayerwiseModel:
    """Runs a checkpoint's model one decoder layer at a time.

    `override(name)` may return a tensor that takes a checkpoint tensor's place (float, in the
    name and shape of the checkpoint): a calibration laid over its source.
    """

    def __init__(
        self,
        source: Source,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        override: Override | None = None,
        config_overrides: dict[str, Any] | None = None,
    ) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self.source, self.device, self.dtype = source, choose_device(device), dtype
        self._override = override
        config = AutoConfig.from_pretrained(source.path)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        for key, value in (config_overrides or {}).items():
            if hasattr(config, key):
                setattr(config, key, value)
        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise InputError(
                f"{source.path}: expected a causal language model, to run it layer by layer, found "
                f"{config.model_type!r}, for which transformers has none; convert it without --method and --calibration"
            )
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        self.model.eval().requires_grad_(False)
        self.config = config
        self.layers_name, layers = find_layers(self.model)
        self._meta_layers = list(layers)
        self._stubs = nn.ModuleList(_Stub() for _ in layers)
        for stub, layer in zip(self._stubs, layers, strict=True):
            # A model's forward may read such facts from its layers.
            for name in ("attention_type", "layer_type", "is_sliding"):
                if hasattr(layer, name):
                    setattr(stub, name, getattr(layer, name))
        self.base.layers = self._stubs
        self._fill_outside()
        self._calls: dict[tuple[int, int], tuple[dict[str, Any], ...]] = {}

    @property
    def base(self) -> nn.Module:
        """The module that holds the decoder layers."""
        return self.model.get_submodule(self.layers_name.rpartition(".")[0])

    def __len__(self) -> int:
        return len(self._meta_layers)

    def layer_name(self, index: int) -> str:
        return f"{self.layers_name}.{index}"

    @torch.no_grad()
    def embed(self, ids: Tensor) -> LayerCall:
        """Token ids [B, T] → hidden states [B, T, H] before the first layer, with every layer's keywords."""
        ids = ids.to(self.device)
        shape = (ids.shape[0], ids.shape[1])
        if shape not in self._calls:
            hidden = self._run_base(ids)
            self._calls[shape] = tuple(stub.kwargs for stub in self._stubs)  # type: ignore[misc]
        else:
            hidden = self._run_base(ids)
        return LayerCall(hidden=hidden, kwargs=self._calls[shape])

    def _run_base(self, ids: Tensor) -> Tensor:
        # The final norm runs in the stubbed forward and is undone by taking its input instead.
        seen: list[Tensor] = []
        norm = final_norm(self.base)
        handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            self.base(input_ids=ids, use_cache=False)
        finally:
            handle.remove()
        return seen[0]

    def linear_shapes(self, index: int) -> dict[str, tuple[int, ...]]:
        """Full name (ours) and weight shape of every Linear of a decoder layer, fused experts taken apart."""
        layer = copy.deepcopy(self._meta_layers[index])
        unfuse(layer)
        prefix = self.layer_name(index)
        return {
            f"{prefix}.{n}": tuple(m.weight.shape)
            for n, m in layer.named_modules()
            if isinstance(m, nn.Linear)
        }

    def load(self, index: int, override: Override | None = None) -> nn.Module:
        """Decoder layer `index`, filled from the checkpoint, fused experts taken apart. A fresh module."""
        layer = copy.deepcopy(self._meta_layers[index])
        unfuse(layer)
        mine, self._override = self._override, override or self._override
        try:
            self._fill(layer, self.layer_name(index))
        finally:
            self._override = mine
        return layer.eval().requires_grad_(False)

    @torch.no_grad()
    def run(self, layer: nn.Module, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Hidden states [B, T, H] → the same after `layer`."""
        out = layer(hidden.to(self.device), **kwargs)
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states after the last layer → logits [B, T, vocabulary], as the model's own forward does."""
        return self.head_with_grad(hidden)

    def head_with_grad(self, hidden: Tensor) -> Tensor:
        """`head`, differentiable."""
        base = self.base
        forward = base.forward
        # The model's own forward does what comes after its body (softcapping, logit scales).
        normed = final_norm(base)(hidden.to(self.device))
        from transformers.modeling_outputs import MoeModelOutputWithPast

        base.forward = lambda *a, **k: MoeModelOutputWithPast(last_hidden_state=normed)  # type: ignore[method-assign,assignment]
        try:
            ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)
            return self.model(input_ids=ids, use_cache=False).logits
        finally:
            base.forward = forward  # type: ignore[method-assign]

    def disk_name(self, name: str) -> str:
        """The checkpoint's name of one of our tensors or modules."""
        for pattern, alias in (("", ""), *_ALIASES):
            candidate = re.sub(pattern, alias, name) if pattern else name
            if self.source.has(candidate) or self.source.has_weight(candidate):
                return candidate
        return name

    def disk_attention(self, name: str) -> str:
        """The checkpoint's name of an attention module, which has no weight of its own to be known by."""
        return self.disk_name(f"{name}.k_proj").removesuffix(".k_proj")

    def tensor(self, name: str) -> Tensor | None:
        """A parameter by our name: from the override, or the checkpoint; None when neither has it."""
        disk = self.disk_name(name)
        if self._override is not None and (found := self._override(disk)) is not None:
            return found.to(self.device, self.dtype)
        if self.source.has(disk) or (
            disk.endswith(".weight") and self.source.has_weight(disk.removesuffix(".weight"))
        ):
            return self.source.tensor(disk, self.dtype).to(self.device)
        return None

    def _fill_outside(self) -> None:
        self._fill(self.model, "", tied=bool(getattr(self.config, "tie_word_embeddings", False)))

    def _fill(self, module: nn.Module, prefix: str, tied: bool = False) -> None:
        missing = []
        own = {n for n, _ in module.named_parameters(remove_duplicate=False)}
        for name, value in list(module.state_dict(keep_vars=True).items()):
            full = f"{prefix}.{name}" if prefix else name
            tensor = self.tensor(full)
            if tensor is None and tied and full == "lm_head.weight":
                continue
            if tensor is None:
                missing.append(full)
                continue
            if tensor.shape != value.shape:
                raise ValueError(
                    f"expected {full} of shape {list(value.shape)} for {type(self.model).__name__}, "
                    f"found {list(tensor.shape)} in {self.source.path}"
                )
            parent = module.get_submodule(name.rpartition(".")[0])
            leaf = name.rpartition(".")[2]
            setattr(parent, leaf, nn.Parameter(tensor, requires_grad=False) if name in own else tensor)
        if missing:
            raise KeyError(
                f"expected {missing[:4]} in {self.source.path}, found no such tensors "
                f"({len(missing)} missing); is config.json that of this checkpoint?"
            )
        if tied:
            self.model.lm_head.weight = self.model.get_input_embeddings().weight
        self._compute_buffers(module)

    def _compute_buffers(self, module: nn.Module) -> None:
        """Non-persistent buffers (rotary tables) are not in a checkpoint: the model computes them."""
        for name, part in module.named_modules():
            buffers = [n for n, b in part.named_buffers(recurse=False) if b.is_meta]
            if not buffers:
                continue
            for buffer in buffers:
                empty = torch.empty_like(getattr(part, buffer), device=self.device)
                part._buffers[buffer] = empty.fill_(torch.nan if empty.is_floating_point() else -1)
            # The same function would draw the part's parameters at random: let it have others.
            parameters = dict(part._parameters)
            for key, parameter in parameters.items():
                if parameter is not None:
                    part._parameters[key] = nn.Parameter(torch.empty_like(parameter), requires_grad=False)
            self.model._init_weights(part)
            part._parameters.update(parameters)
            bad = [b for b in buffers if not bool(torch.isfinite(getattr(part, b).float()).all())]
            if bad:
                raise ValueError(
                    f"expected {type(self.model).__name__} to compute {bad} of {name}, found it does not; "
                    "this architecture is not supported layer by layer"
                )


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(name, list) of the decoder layers: the longest `layers` list. Raises ValueError when there is none."""
    found = [
        (n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and n.endswith("layers")
    ]
    if not found:
        raise ValueError(
            f"expected a module list named `layers` in {type(model).__name__}, found none; "
            "this architecture is not supported layer by layer"
        )
    return max(found, key=lambda item: len(item[1]))


def final_norm(base: nn.Module) -> nn.Module:
    """The norm after the last decoder layer."""
    for name in ("norm", "final_layernorm", "ln_f", "final_norm"):
        if isinstance(norm := getattr(base, name, None), nn.Module):
            return norm
    raise ValueError(f"expected a final norm in {type(base).__name__}, found none")
