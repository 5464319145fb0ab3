"""A transformers causal language model of which one decoder layer at a time is in memory.

The model is built on the meta device, so it costs nothing. Embeddings, the final norm, the
rotary tables and lm_head are filled for good; a decoder layer is filled from the checkpoint when it is
asked for, and forgotten afterwards; vision and audio towers stay on meta. Whatever else the
model's own forward prepares for its layers is recorded by running it with stubs (see `calls`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.calibration.calls import INSTEAD, Hold, LayerCall, Recorder, Stub, moved, shared_states
from lowbit.calibration.devices import choose_device
from lowbit.calibration.experts import fused_modules, unfuse
from lowbit.calibration.kv_cache import KEYS
from lowbit.calibration.names import CheckpointNames, part_name
from lowbit.calibration.positions import longest_text
from lowbit.calibration.source import Source
from lowbit.errors import InputError
from lowbit.nn.integration import open_config, require_transformers
from lowbit.nn.joined import SplitLinear
from lowbit.nn.linear import is_plain

Override = Callable[[str], Tensor | None]
"""Checkpoint name → a tensor that takes its place, or None."""


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
        require_transformers()
        self.source, self.device, self.dtype = source, choose_device(device), dtype
        self._override = override
        # No code of the checkpoint's is run: models that transformers does not have are refused anyway.
        config = open_config(source.path, source.config.get("model_type"), instead=INSTEAD)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        for key, value in (config_overrides or {}).items():
            if hasattr(config, key):
                setattr(config, key, value)
        try:
            with torch.device("meta"):
                self.model = _model_class(config, source)._from_config(
                    config, dtype=dtype, experts_implementation="eager"
                )
        except ImportError as error:  # Gemma 3n's vision tower is timm's
            raise InputError(
                f"{source.path}: expected all that transformers needs to build {config.model_type}, found that it is "
                f"not installed: {' '.join(str(error).split())}"
            ) from error
        self.model.eval().requires_grad_(False)
        self.config = config
        self.text_config = config.get_text_config()
        self._names = CheckpointNames(self.model, source.tensors)
        decoder = self.model.get_decoder()
        self.layers_name, layers = find_layers(self.model, decoder)
        self._meta_layers = list(layers)
        self._stubs = nn.ModuleList(Stub(layer) for layer in layers)
        self._longest = longest_text(self.base, self.text_config)
        self.base.layers = self._stubs
        self._fill_outside()
        self._record = Recorder(self.base, list(self._stubs))  # type: ignore[arg-type]

    @property
    def base(self) -> nn.Module:
        """The module that holds the decoder layers."""
        return self.model.get_submodule(self.layers_name.rpartition(".")[0])

    @property
    def model_type(self) -> str:
        """What config.json calls the architecture: what engines join depends on it (see `rules.fused_key`)."""
        return str(self.source.config.get("model_type"))

    def __len__(self) -> int:
        return len(self._meta_layers)

    def layer_name(self, index: int) -> str:
        return f"{self.layers_name}.{index}"

    def kind(self, index: int) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        """What a decoder layer is made of, equal for layers that differ in nothing but their weights."""
        layer = self._meta_layers[index]
        found: list[tuple[str, str, tuple[int, ...]]] = [
            (n, type(m).__name__, ()) for n, m in layer.named_modules()
        ]
        return tuple(found + [(n, "", tuple(p.shape)) for n, p in layer.named_parameters()])

    def shares(self, kwargs: dict[str, Any]) -> bool:
        """Whether layers that ran with `kwargs` left states in it that others take.

        From transformers 5.24 on Gemma 4's leave their keys and values also where no other does.
        """
        return getattr(self.text_config, "num_kv_shared_layers", 1) != 0 and bool(shared_states(kwargs))

    def embed(self, ids: Tensor, hold: Hold = lambda x: x) -> LayerCall:
        """Token ids [B, T] → hidden states [B, T, H] before the first layer, with every layer's keywords.

        What depends on the tokens beside the hidden states (Gemma's per-layer inputs) goes through `hold`.
        Raises InputError for tokens or lengths that the model does not take, and embeddings that are not finite.
        """
        known = self.model.get_input_embeddings().weight.shape[0]
        low, high = (int(i) for i in ids.aminmax())
        if low < 0 or high >= known:
            raise InputError(
                f"expected token ids from 0 to {known - 1}, which {self.source.path} has embeddings of, found "
                f"{low if low < 0 else high}; is the data tokenized for this model?"
            )
        if self._longest is not None and ids.shape[1] > self._longest:
            raise InputError(
                f"expected windows of at most {self._longest} tokens, the longest text that {self.source.path} was "
                f"made for, found one of {ids.shape[1]}; give a smaller length (if it was made for more, let its "
                "config.json say so: max_position_embeddings, or rope_parameters)"
            )
        try:
            call = self._record(ids.to(self.device), hold)
        except IndexError as error:  # of learned positions
            raise InputError(
                f"expected windows that {type(self.model).__name__} has positions for, found one of {ids.shape[1]} "
                "tokens; give a smaller length"
            ) from error
        if not bool(torch.isfinite(call.hidden).all()):
            raise InputError(
                f"expected finite embeddings, found NaN or Inf in {self.source.path} for tokens of the data; "
                "repair the source"
            )
        return call

    def linear_shapes(self, index: int) -> dict[str, tuple[int, ...]]:
        """Full name (ours) and weight shape of every Linear of a decoder layer, fused experts taken apart."""
        return {n: tuple(m.weight.shape) for n, m in self._linears(index)}

    def other_shapes(self, index: int) -> dict[str, tuple[int, ...]]:
        """The same of what has a matrix and is no plain Linear: most routers."""
        prefix = self.layer_name(index)
        others = ((n, m) for n, m in self._empty(index).named_modules() if not is_plain(m))
        return {f"{prefix}.{n}": s for n, m in others if len(s := matrix_shape(m)) == 2}

    def biased(self, index: int) -> list[str]:
        """Those that have a bias."""
        return [n for n, m in self._linears(index) if m.bias is not None]

    def _linears(self, index: int) -> Iterator[tuple[str, nn.Linear]]:
        prefix = self.layer_name(index)
        for name, module in self._empty(index).named_modules():
            if isinstance(module, nn.Linear) and is_plain(module):
                yield f"{prefix}.{name}", module

    def load(self, index: int, override: Override | None = None) -> nn.Module:
        """Decoder layer `index`, filled from the checkpoint, fused experts taken apart. A fresh module."""
        layer = self._empty(index)
        mine, self._override = self._override, override or self._override
        try:
            self._fill(layer, self.layer_name(index))
        finally:
            self._override = mine
        return layer.eval().requires_grad_(False)

    def _empty(self, index: int) -> nn.Module:
        """Decoder layer `index` on meta. Experts that the checkpoint's reader leaves in 3-D tensors stay so."""
        layer = copy.deepcopy(self._meta_layers[index])
        prefix = self.layer_name(index)
        for name, module in fused_modules(layer):
            if not any(self.source.has(self.disk_name(f"{prefix}.{name}.{p}")) for p in module._parameters):
                unfuse(layer, name)
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear) and (of := self._names.apart.get(f"{prefix}.{name}.weight")):
                rows = {part_name(t): self.source.rows(t) for t in of}
                layer.set_submodule(name, SplitLinear.like(module, rows))
        return layer

    @torch.no_grad()
    def run(self, layer: nn.Module, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Hidden states [B, T, H] → the same after `layer`."""
        return self.run_with_grad(layer, hidden, kwargs)

    def run_with_grad(self, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """`run`, differentiable."""
        out = layer(self._record.theirs(hidden.to(self.device)), **moved(kwargs, self.device))
        return self._record.ours(out[0] if isinstance(out, tuple) else out)

    @torch.no_grad()
    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states after the last layer → logits [B, T, vocabulary], as the model's own forward does."""
        return self.head_with_grad(hidden)

    def head_with_grad(self, hidden: Tensor) -> Tensor:
        """`head`, differentiable."""
        # The model's own forward does all that comes after the layers (norm, softcapping, logit scales).
        last = self._stubs[-1]
        last.output = self._record.theirs(hidden.to(self.device))  # type: ignore[assignment]
        try:
            ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)
            return self.model(input_ids=ids, use_cache=False).logits
        finally:
            last.output = None  # type: ignore[assignment]
            for stub in self._stubs:
                stub.calls = []  # type: ignore[assignment]

    def disk_name(self, name: str) -> str:
        """The checkpoint's name of one of our tensors or modules."""
        return self._names(name)

    def disk_attention(self, name: str) -> str:
        """The checkpoint's name of an attention module, which has no weight of its own to be known by."""
        disk = [self.disk_name(f"{name}.{keys}") for keys in KEYS]
        return next(d.rpartition(".")[0] for d in disk if self.source.has_weight(d))

    def tensor(self, name: str) -> Tensor | None:
        """A parameter by our name: from the override, or the checkpoint; None when neither has it."""
        disk = self.disk_name(name)
        if self._override is not None and (found := self._override(disk)) is not None:
            return found.to(self.device, self.dtype)
        if self.source.has(disk) or (
            disk.endswith(".weight") and self.source.has_weight(disk.removesuffix(".weight"))
        ):
            return self.source.tensor(disk, self.dtype).to(self.device)
        if name in self._names.joined:
            parts, dim = self._names.joined[name]
            return torch.cat([self.source.tensor(p, self.dtype) for p in parts], dim).to(self.device)
        return None

    def _fill_outside(self) -> None:
        """Fill what text passes before and after the layers: the body and the head, not towers beside the body."""
        tied = bool(getattr(self.config, "tie_word_embeddings", False))
        body, head = self.layers_name.rpartition(".")[0], self.model.get_output_embeddings()
        name = next((n for n, m in self.model.named_modules() if m is head), "")
        # The head lies beside the body, or beside the wrapper that holds the body and the towers.
        beside = name.rpartition(".")[0]
        inside = f"{beside}." if beside else ""
        children = [f"{inside}{n}" for n, _ in self.model.get_submodule(beside).named_children()]
        for part in (body, *(c for c in children if c != body and not body.startswith(c + "."))):
            self._fill(
                self.model.get_submodule(part), part, optional=("weight",) if tied and part == name else ()
            )
        # As transformers does: a head that the checkpoint has is its own, whatever config.json says.
        if tied and head is not None and head.weight.is_meta:  # type: ignore[union-attr]
            head.weight = self.model.get_input_embeddings().weight
        self._place_wrappers(body)

    def _place_wrappers(self, body: str) -> None:
        """What wraps the body is on `device` to transformers, which asks the first parameter: a tower's, left on meta.

        (Idefics 3's code moves embeddings there.) NaN in its place, of one element's memory, since no text passes it.
        """
        parts = body.split(".")
        for path in (".".join(parts[:n]) for n in range(len(parts) + 1)):
            wrapper = self.model.get_submodule(path)
            name, first = next(wrapper.named_parameters(), ("", None))
            if first is not None and first.is_meta:
                filled = torch.full((), torch.nan, dtype=first.dtype, device=self.device).expand(first.shape)
                parent, leaf = wrapper.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
                parent._parameters[leaf] = nn.Parameter(filled, requires_grad=False)

    def _fill(self, module: nn.Module, prefix: str, optional: tuple[str, ...] = ()) -> None:
        missing = []
        own = {n for n, _ in module.named_parameters(remove_duplicate=False)}
        for name, value in list(module.state_dict(keep_vars=True).items()):
            full = f"{prefix}.{name}"
            tensor = self.tensor(full)
            if tensor is None:
                missing += [full] if name not in optional else []
                continue
            if tensor.shape != value.shape:
                raise InputError(
                    f"expected {full} of shape {list(value.shape)} for {type(self.model).__name__}, "
                    f"found {list(tensor.shape)} in {self.source.path}"
                )
            parent = module.get_submodule(name.rpartition(".")[0])
            leaf = name.rpartition(".")[2]
            # Rows of embeddings and of the head may never be used.
            whole = not isinstance(parent, nn.Embedding) and parent is not self.model.get_output_embeddings()
            if whole and name in own and not bool(torch.isfinite(tensor).all()):
                raise InputError(
                    f"expected finite values in {self.disk_name(full)} of {self.source.path}, found NaN or Inf; "
                    "repair the source"
                )
            setattr(parent, leaf, nn.Parameter(tensor, requires_grad=False) if name in own else tensor)
        if of := self._names.made_of(missing):
            raise InputError(
                f"expected {missing[:4]} in {self.source.path}, found {of}, of which transformers makes such while "
                f"loading: it splits or reorders it, which cannot be done layer by layer yet; {INSTEAD}"
            )
        if missing:
            raise InputError(
                f"expected {missing[:4]} in {self.source.path}, found no such tensors ({len(missing)} missing); "
                f"is config.json that of this checkpoint? If it is, {INSTEAD}"
            )
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
            getattr(self.base, "_init_weights", self.model._init_weights)(part)
            part._parameters.update(parameters)
            bad = _not_computed(part, buffers)
            if bad:
                self._compute_as_a_layer(module)
                bad = _not_computed(part, buffers)
            if bad:
                raise InputError(
                    f"expected {type(self.model).__name__} to compute {bad} of {name}, found it does not; "
                    f"this architecture cannot run layer by layer: {INSTEAD}"
                )

    def _compute_as_a_layer(self, layer: nn.Module) -> None:
        """Buffers that the decoder computes for its layers (Falcon-H1's multipliers), which it takes `layer` for."""
        stubs, self.base.layers = self.base.layers, nn.ModuleList([layer])
        try:
            getattr(self.base, "_init_weights", self.model._init_weights)(self.base)
        except AttributeError:  # `layer` is not one, and has not what a layer has
            pass
        finally:
            self.base.layers = stubs


def _not_computed(part: nn.Module, buffers: list[str]) -> list[str]:
    return [b for b in buffers if not bool(torch.isfinite(getattr(part, b).float()).all())]


def _model_class(config: Any, source: Source) -> Any:
    """The class that config.json names where it writes text, else transformers' causal model for the config."""
    import transformers

    mappings = (
        transformers.AutoModelForCausalLM._model_mapping,
        transformers.AutoModelForImageTextToText._model_mapping,
    )
    known: list[Any] = [m[type(config)] for m in mappings if type(config) in m]
    if not known:
        raise InputError(
            f"{source.path}: expected a language model, to run it layer by layer, found {config.model_type!r}, for "
            f"which transformers has none; {INSTEAD}"
        )
    if config.is_encoder_decoder:
        # transformers would build the decoder alone, which says nothing of what it makes of an encoder's states.
        raise InputError(
            f"{source.path}: expected a decoder of text, to run it layer by layer, found {config.model_type!r}, whose "
            f"decoder goes by what an encoder has read; {INSTEAD}"
        )
    return next((c for c in known if c.__name__ in (config.architectures or ())), known[0])


def matrix_shape(module: nn.Module) -> tuple[int, ...]:
    """[N, K] of a module's own weight; () for one that has none."""
    weight = module._parameters.get("weight")
    return tuple(weight.shape) if weight is not None and weight.dim() == 2 else ()


def find_layers(model: nn.Module, decoder: nn.Module) -> tuple[str, nn.ModuleList]:
    """(name, list) of `decoder`'s layers: its own, or the longest `layers` list in it. InputError for none."""
    found = [
        (n, m) for n, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and n.rpartition(".")[2] == "layers" and any(m is d for d in decoder.modules())
    ]  # fmt: skip
    if not found:
        raise InputError(
            f"expected a module list named `layers` in {type(model).__name__}, found none; "
            f"this architecture cannot run layer by layer: {INSTEAD}"
        )
    own = getattr(decoder, "layers", None)  # towers inside the decoder may have more
    return max(found, key=lambda item: (item[1] is own, len(item[1])))
