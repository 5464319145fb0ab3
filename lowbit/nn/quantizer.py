"""The transformers quantizer behind `lowbit.load` and `from_pretrained`: swaps modules before weights are read.

Which modules are quantized, and how, is read from the headers of the checkpoint's files, not
guessed from patterns in the config. What follows is transformers' own loading: the swapped
modules' buffers have the checkpoint's names, so each tensor finds its place as it is.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter, WeightRenaming, apply_renamings
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit.checkpoint.beside import BESIDE_CODES, OF_ATTENTION
from lowbit.checkpoint.headers import TensorRef, read_header
from lowbit.checkpoint.roles import BY_TORCH, CASTS, read_by_code
from lowbit.dtypes import INT4
from lowbit.errors import InputError
from lowbit.formats import METHODS, StoredModule, read
from lowbit.granularity import PerGroup, PerTensor, PerToken
from lowbit.nn.bfloat16 import in_float, keep_bfloat16, settle
from lowbit.nn.experts import QuantExperts
from lowbit.nn.fused_experts import FUSED_PARAMETERS, refusal
from lowbit.nn.joined import SplitLinear
from lowbit.nn.linear import QuantLinear
from lowbit.nn.names import Finder
from lowbit.nn.placing import (
    pass_over,
    place_experts,
    place_linear,
    place_parts,
    place_rows,
    why_not_parts,
    why_not_rows,
)
from lowbit.nn.rotated import rotate_inputs
from lowbit.nn.row_conversions import Renamed, rows_converters
from lowbit.nn.stored import QuantModule
from lowbit.nn.swap import replace_module
from lowbit.scheme import Scheme

_RESHAPED = "transformers splits or joins this weight while loading, which codes do not survive"


class LowbitConfig(QuantizationConfigMixin):
    """A checkpoint's own `quantization_config`, run by lowbit. It is written back as it was found."""

    def __init__(self, original: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self.quant_method: Any = "lowbit"
        self.original = dict(original or {})

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.original)

    def get_loading_attributes(self) -> dict[str, Any]:
        return {}


def runs(config: Mapping[str, Any]) -> bool:
    """Whether lowbit can run a checkpoint with this quantization_config."""
    if config.get("dequantize") or config.get("run_compressed") is False:
        return False
    try:
        METHODS[str(config["quant_method"])].read(config, {})
    except (InputError, KeyError):
        return False
    groups = (config.get("config_groups") or {}).values()
    if any((group.get("weights") or {}).get("num_bits") == INT4.bits for group in groups):
        return False
    # Rotations that transformers' own quantizer would apply while running.
    return not config.get("transform_config")


class LowbitQuantizer(HfQuantizer):
    """Puts QuantLinear and QuantExperts where the checkpoint has codes."""

    requires_calibration = True
    quantization_config: LowbitConfig

    def __init__(self, quantization_config: LowbitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._experts: dict[str, str] = {}
        """Tensor names on disk of experts that are quantized → the module of all of them in memory."""
        self._float_experts: list[str] = []
        """Modules in memory of fused experts that are not."""
        self._rows: dict[str, list[str]] = {}
        """Modules on disk that transformers splits → those in memory that are their rows."""
        self._of_rows: list[Any] = []
        """The conversions of those."""
        self._parts: dict[str, str] = {}
        """Modules on disk that transformers would join → what they are in memory."""
        self._shapes: dict[str, torch.Size] = {}
        """Parameters in float → their shapes for this config."""

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        # E8M0 scales kept as bytes must not be cast to numbers.
        found = param.get_dtype() if hasattr(param, "get_dtype") else ""
        if found == "F8_E8M0" and dtype == torch.uint8:
            return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        tensors: dict[str, TensorRef] = {}
        for file in kwargs.get("checkpoint_files") or []:
            tensors |= read_header(Path(file))[0]
        if not tensors:
            raise InputError(
                "expected the files of a safetensors checkpoint, found none; quantized weights are read from disk"
            )
        original = self.quantization_config.original
        stored = read({"quantization_config": original} if original else {}, tensors)
        find = Finder(model)
        self._swap(model, stored, tensors, find)
        if _on_cpu(kwargs.get("device_map")):
            in_bfloat16 = [n for n, ref in tensors.items() if ref.dtype == "BF16" and n.endswith(".weight")]
            found = {path: n for n in in_bfloat16 if (path := find.module(n)) is not None}
            keep_bfloat16(model, found)
        # Scales of a quantized KV cache: transformers' cache is in float, so they are neither used nor kept.
        pass_over(model, OF_ATTENTION)
        if unread := _unread(stored, tensors):
            pass_over(model, rf"\.({'|'.join(unread)})$")
        if original.get("kv_cache_scheme"):
            original["kv_cache_scheme"] = None
        self._shapes = _shapes(model)

    def _swap(
        self,
        model: nn.Module,
        stored: Mapping[str, StoredModule],
        tensors: Mapping[str, TensorRef],
        find: Finder,
    ) -> None:
        in_float: dict[str, str] = {}
        experts: dict[str, dict[str, StoredModule]] = {}
        parts: dict[str, dict[int, str]] = {}
        for name, module in stored.items():
            check_runnable(name, module)
        stored = {n: replace(m, scheme=runnable(m.scheme)) for n, m in stored.items()}
        for name, module in stored.items():
            path = find.module(module.weight)
            parent = None if path is not None else find.experts(name)
            paths = [path] if path is not None else find.split_into(name) if parent is None else []
            if reason := _why_in_float(model, paths, name, module, tensors, find):
                in_float[name] = reason
            elif path is not None:
                place_linear(model, path, name, module, tensors, find)
            elif parent is not None:
                experts.setdefault(parent, {})[name] = module
            elif paths:
                place_rows(model, paths, name, module, tensors, find)
                self._rows[name] = paths
            elif (into := find.joined_into(name)) is not None:
                joined, place, _ = into
                parts.setdefault(joined, {})[place] = name
            elif find.becomes_float(name):
                in_float[name] = _RESHAPED
        for path, names in parts.items():
            in_order = [names[place] for place in sorted(names)]
            if reason := why_not_parts(path, in_order, tensors, find):
                in_float |= dict.fromkeys(in_order, reason)
                continue
            place_parts(model, path, [(n, stored[n]) for n in in_order], tensors, find)
            self._parts |= {name: f"{path}.{i}" for i, name in enumerate(in_order)}
        _refuse(in_float)
        for path, members in experts.items():
            place_experts(model, path, members, tensors, find)
            self._experts |= {t: path for m in members.values() for t in m.names.values()}
        rotate_inputs(model, find)
        self._float_experts = [
            n for n, m in model.named_modules() if not isinstance(m, QuantModule) and not refusal(m)
        ]

    def update_weight_conversions(self, weight_conversions: list, model: Any) -> list:
        """Without the converters that would fuse quantized experts; those stay for experts in float. And with
        renamings of experts whose single names transformers does not know (Step 3.5)."""
        renamings = [c for c in weight_conversions if isinstance(c, WeightRenaming)]
        kept = self._without_quantized_experts(weight_conversions, renamings, model)

        def renamed(name: str) -> str:
            return apply_renamings(f"{name}.weight", renamings).removesuffix(".weight")

        self._of_rows = [
            c for name, paths in self._rows.items() for c in rows_converters(renamed(name), model, paths)
        ]
        # Last, since these speak of names that the others made.
        names = {renamed(name): path for name, path in self._parts.items()}
        parts = [Renamed(names, model.base_model_prefix)] if names else []
        return self._of_rows + kept + parts + self._moved_experts(renamings)

    def _without_quantized_experts(self, conversions: list, renamings: list, model: Any) -> list:
        renamed = [apply_renamings(name, renamings) for name in self._experts]
        kept = []
        for conversion in conversions:
            quantized = isinstance(conversion, WeightConverter) and any(
                conversion.compiled_sources.search(name) for name in renamed
            )
            if not quantized:
                kept.append(conversion)
                continue
            for path in self._float_experts:
                scoped = copy.deepcopy(conversion)
                # Down to the decoder layer: the patterns begin at the mixture's own name.
                scope = path.rpartition(".")[0].rpartition(".")[0]
                scoped.base_model_prefix = model.base_model_prefix
                scoped.scope_prefix = scope.removeprefix(model.base_model_prefix).removeprefix(".")
                kept.append(scoped)
        return kept

    def _moved_experts(self, renamings: list) -> list:
        renamed = {apply_renamings(name, renamings): path for name, path in self._experts.items()}
        moved = {parent: path for name, path in renamed.items() if _elsewhere(parent := _parent(name), path)}
        return [WeightRenaming(re.escape(f"{parent}."), f"{path}.") for parent, path in moved.items()]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        _check_shapes(model, self._shapes)
        for module in model.modules():
            if isinstance(module, QuantLinear):
                module.restore_shapes()
                vars(module).pop("weight", None)
            if isinstance(module, QuantExperts):
                for name in FUSED_PARAMETERS:
                    vars(module).pop(name, None)
            if isinstance(module, QuantLinear | QuantExperts):
                module.check_symmetric()
        settle(model)
        # Saving asks the last one first, and transformers' own may fit as well, where some layers are in float.
        if self._of_rows:
            model._weight_conversions.sort(key=lambda conversion: conversion in self._of_rows)
        # transformers refuses .half() and .float() on quantized models, which lowbit's modules allow.
        model.is_quantized = False
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        for name, module in model.named_modules():
            if isinstance(module, QuantExperts):
                raise InputError(f"{name}: experts cannot be dequantized in place; convert with scheme bf16")
        if isinstance(dtype, str):  # what save_pretrained leaves in the config
            dtype = getattr(torch, dtype.removeprefix("torch."))
        for name, new in in_float(model, dtype or torch.float32).items():
            replace_module(model, name, new)
        for name, module in list(model.named_modules()):
            if isinstance(module, SplitLinear):
                replace_module(model, name, module.to_linear())
        if hasattr(model.config, "lowbit"):  # of rotations, which the float weights have not
            del model.config.lowbit
        return model


def _unread(stored: Mapping[str, StoredModule], tensors: Mapping[str, TensorRef]) -> list[str]:
    """What quantized modules have beside what they compute with: scales of inputs that are quantized dynamically."""
    read_here = {name for module in stored.values() for name in module.names.values()}
    rest = (name.rpartition(".") for name in tensors.keys() - read_here)
    return sorted({leaf for module, _, leaf in rest if leaf in BESIDE_CODES and module in stored})


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in model.named_parameters()}


def _check_shapes(model: nn.Module, expected: Mapping[str, torch.Size]) -> None:
    """InputError for parameters that were filled with tensors of another shape.

    Before 5.23 transformers checks none where a quantizer takes part.
    """
    found = _shapes(model)
    if apart := sorted(n for n, shape in expected.items() if found.get(n, shape) != shape):
        name = apart[0]
        raise InputError(
            f"expected every tensor in the shape that config.json says, found {len(apart)} of another shape "
            f"(first: {name}, {list(found[name])} for {list(expected[name])}); config.json and weights do not "
            "belong together"
        )


def _on_cpu(device_map: Any) -> bool:
    places = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    return all(place is None or str(place) == "cpu" for place in places)


def _why_in_float(
    model: Any,
    paths: Sequence[str],
    name: str,
    stored: StoredModule,
    tensors: Mapping[str, TensorRef],
    find: Finder,
) -> str:
    """What transformers' code, or torch's, does with the weight of the module, or the modules, that codes do not
    survive; "" for nothing."""
    if not paths:
        return ""
    if len(paths) == 1 and find.reshapes(stored.weight):
        return _RESHAPED
    if len(paths) > 1 and (reason := why_not_rows(paths, stored, find)):
        return reason
    tied = {f"{path}.weight" for path in paths}
    for pair in getattr(model, "all_tied_weights_keys", {}).items():
        if shared := tied.intersection(pair):
            other = pair[1 - pair.index(shared.pop())].removesuffix(".weight")
            return f"transformers makes it one weight with that of {other}, which is in float"
    if any(type(find.modules[p]).__name__ == "NonDynamicallyQuantizableLinear" for p in paths):
        return BY_TORCH
    reason = read_by_code(name, {"model_type": model.config.model_type})
    return "" if reason == CASTS and tensors[stored.weight].dtype == "I8" else reason


def _refuse(in_float: Mapping[str, str]) -> None:
    """InputError for modules whose weights must be in float → why, where there are any."""
    if not in_float:
        return
    name, reason = next(iter(in_float.items()))
    others = f" and {len(in_float) - 1} more" if len(in_float) > 1 else ""
    again = " ".join(dict.fromkeys(f"--ignore '{_pattern(n)}'" for n in in_float))
    raise InputError(
        f"{name}{others}: expected weights in float, found codes: {reason}; "
        f"convert the checkpoint again with {again}"
    )


def _pattern(name: str) -> str:
    """A pattern for the module and its like in other layers and experts."""
    parts = name.split(".")
    end = parts[-3:] if parts[-1].isdigit() else parts[-2:]
    return re.sub(r"(?<=_)\d+(?=\.)", "*", ".".join(end if end == parts else ["*", *end]))


def _parent(tensor: str) -> str:
    """`….experts` of `….experts.3.up_proj.weight`."""
    return tensor.rsplit(".", 3)[0]


def _elsewhere(parent: str, path: str) -> bool:
    """Whether two names of a module differ in more than the base model's prefix."""
    return not (path == parent or path.endswith("." + parent) or parent.endswith("." + path))


def check_runnable(name: str, stored: StoredModule) -> None:
    """InputError for what lowbit's operations do not compute."""
    if stored.spec.dtype.bits < 8:
        raise InputError(
            f"{name}: expected weights of 8 bits, found {stored.spec.dtype}; convert the checkpoint with "
            "`lowbit convert` first"
        )
    if not stored.spec.symmetric:
        raise InputError(
            f"{name}: expected symmetric weights, found a weight zero point; convert it with `lowbit convert` first"
        )


def runnable(scheme: Scheme) -> Scheme:
    """The scheme as the operations compute it: activations' groups follow the weight's, one scale per token else.

    A published config may ask for groups of activations beside weights with one scale, or for one
    dynamic scale for a whole batch; a scale per token is finer than either.
    """
    activations = scheme.activations
    if activations is None or scheme.weights is None or not activations.dynamic:
        return scheme
    grouped = isinstance(scheme.weights.granularity, PerTensor | PerToken) or not hasattr(
        scheme.weights.granularity, "cols"
    )
    if isinstance(activations.granularity, PerTensor) or (
        isinstance(activations.granularity, PerGroup)
        and grouped
        and not isinstance(scheme.weights.granularity, PerGroup)
    ):
        return replace(scheme, activations=replace(activations, granularity=PerToken()))
    return scheme
