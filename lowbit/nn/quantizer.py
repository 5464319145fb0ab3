"""The transformers quantizer behind `lowbit.load` and `from_pretrained`: swaps modules before weights are read.

Which modules are quantized, and how, is read from the headers of the checkpoint's files, not
guessed from patterns in the config. What follows is transformers' own loading: the swapped
modules' buffers have the checkpoint's names, so each tensor finds its place as it is.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit.checkpoint.headers import TensorRef, read_header
from lowbit.checkpoint.roles import BY_TORCH, CASTS, read_by_code
from lowbit.dtypes import INT4
from lowbit.errors import InputError
from lowbit.formats import METHODS, StoredModule, read
from lowbit.granularity import PerGroup, PerTensor, PerToken
from lowbit.nn.bfloat16 import in_float, keep_bfloat16, settle
from lowbit.nn.experts import QuantExperts
from lowbit.nn.fused_experts import FUSED_PARAMETERS, refusal
from lowbit.nn.linear import QuantLinear, is_conv1d
from lowbit.nn.names import ROLES, Finder
from lowbit.nn.rotated import rotate_inputs
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


def _filled(*shape: int) -> Tensor:
    """Under names that weights have in float alone, while transformers looks for what is not filled: its code asks for
    their shapes to initialize a Linear's, packed here, and in some mixtures (Qwen3-Omni) their experts'."""
    weight: Any = torch.empty(shape, device="meta")
    weight._is_hf_initialized = True
    return weight


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
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = ignored | {r"\.(k|v)_scale$"}
        if original.get("kv_cache_scheme"):
            original["kv_cache_scheme"] = None

    def _swap(
        self,
        model: nn.Module,
        stored: Mapping[str, StoredModule],
        tensors: Mapping[str, TensorRef],
        find: Finder,
    ) -> None:
        in_float: dict[str, str] = {}
        experts: dict[str, dict[str, StoredModule]] = {}
        for name, module in stored.items():
            check_runnable(name, module)
            path = find.module(module.weight)
            if path is not None and (reason := _why_in_float(model, path, name, module, tensors, find)):
                in_float[name] = reason
                continue
            if path is not None:
                _swap_linear(model, path, name, module, tensors, find)
                continue
            parent = find.experts(name)
            if parent is not None:
                experts.setdefault(parent, {})[name] = module
            elif find.becomes_float(f"{name}.weight"):
                in_float[name] = _RESHAPED
        _refuse(in_float)
        for path, members in experts.items():
            _swap_experts(model, path, members, tensors, find)
            self._experts |= {t: path for m in members.values() for t in m.names.values()}
        rotate_inputs(model, find)
        self._float_experts = [
            n for n, m in model.named_modules() if not isinstance(m, QuantModule) and not refusal(m)
        ]

    def update_weight_conversions(self, weight_conversions: list, model: Any) -> list:
        """Without the converters that would fuse quantized experts; those stay for experts in float. And with
        renamings of experts whose single names transformers does not know (Step 3.5)."""
        if not self._experts:
            return weight_conversions
        from transformers.core_model_loading import WeightConverter, WeightRenaming, apply_renamings

        renamings = [c for c in weight_conversions if isinstance(c, WeightRenaming)]
        renamed = {apply_renamings(name, renamings): path for name, path in self._experts.items()}
        moved = {parent: path for name, path in renamed.items() if _elsewhere(parent := _parent(name), path)}
        kept = []
        for conversion in weight_conversions:
            if not isinstance(conversion, WeightConverter):
                kept.append(conversion)
                continue
            matched = any(conversion.compiled_sources.search(name) for name in renamed)
            if not matched:
                kept.append(conversion)
                continue
            for path in self._float_experts:
                scoped = copy.deepcopy(conversion)
                # Down to the decoder layer: the patterns begin at the mixture's own name.
                scope = path.rpartition(".")[0].rpartition(".")[0]
                scoped.base_model_prefix = model.base_model_prefix
                scoped.scope_prefix = scope.removeprefix(model.base_model_prefix).removeprefix(".")
                kept.append(scoped)
        # Last, since these speak of names that the others made.
        return kept + [WeightRenaming(re.escape(f"{parent}."), f"{path}.") for parent, path in moved.items()]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
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
        if hasattr(model.config, "lowbit"):  # of rotations, which the float weights have not
            del model.config.lowbit
        return model


def _on_cpu(device_map: Any) -> bool:
    places = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    return all(place is None or str(place) == "cpu" for place in places)


def _why_in_float(
    model: Any,
    path: str,
    name: str,
    stored: StoredModule,
    tensors: Mapping[str, TensorRef],
    find: Finder,
) -> str:
    """What transformers' code, or torch's, does with the weight that codes do not survive; "" for nothing."""
    module = find.modules[path]
    if find.reshapes(stored.weight):
        return _RESHAPED
    tied = f"{path}.weight"
    for pair in getattr(model, "all_tied_weights_keys", {}).items():
        if tied in pair:
            other = pair[1 - pair.index(tied)].removesuffix(".weight")
            return f"transformers makes it one weight with that of {other}, which is in float"
    if type(module).__name__ == "NonDynamicallyQuantizableLinear":
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


def _swap_linear(
    model: nn.Module,
    path: str,
    name: str,
    stored: StoredModule,
    tensors: Mapping[str, TensorRef],
    find: Finder,
) -> None:
    module = find.modules[path]
    if not isinstance(module, nn.Linear) and not is_conv1d(module):
        raise InputError(
            f"{name}: expected a Linear for quantized codes, found {type(module).__name__}; "
            "convert the checkpoint again with --ignore for this module"
        )
    n, k = stored.shape
    weight = module.weight
    assert isinstance(weight, Tensor)
    expected = tuple(weight.shape[::-1] if is_conv1d(module) else weight.shape)
    # Of a packed weight the header tells the columns with those that fill an int32 up.
    filled = "packed" in stored.names and n == expected[0] and 0 <= k - expected[1] < 4
    if stored.shape != expected and not filled:
        raise InputError(
            f"{name}: expected a weight {list(expected)} for this config, found {list(stored.shape)}; "
            "config.json and weights do not belong together"
        )
    bias = getattr(module, "bias", None)
    suffixes: dict[str, str] = {c: t.rpartition(".")[2] for c, t in stored.names.items()}
    new = QuantLinear(
        expected[1], n, scheme=runnable(stored.scheme), bias=bias is not None, format=stored.format,
        names=suffixes, dtype=weight.dtype, device="meta",
        float_dtype=float_dtype_of(stored, tensors),
    )  # fmt: skip
    new.expect_shapes({c: tensors[t].shape for c, t in stored.names.items()})
    if "weight" not in new._buffers:
        new.weight = _filled(*weight.shape)
    replace_module(model, path, new)
    find.modules[path] = new


def float_dtype_of(stored: StoredModule, tensors: Mapping[str, TensorRef]) -> str:
    """Of the checkpoint's float tensors, after which msModelSlim stores `deq_scale`."""
    return "F16" if any(tensors[t].dtype == "I64" for t in stored.names.values()) else "BF16"


def _swap_experts(
    model: nn.Module,
    path: str,
    members: Mapping[str, StoredModule],
    tensors: Mapping[str, TensorRef],
    find: Finder,
) -> None:
    experts = model.get_submodule(path)
    if problem := refusal(experts):
        raise InputError(f"{path}: {type(experts).__name__} cannot hold quantized experts: {problem}")
    first = next(iter(members.values()))
    schemes = {runnable(m.scheme) for m in members.values()}
    down: Any = experts.down_proj
    count = down.shape[0] * (3 if getattr(experts, "has_gate", True) else 2)
    if len(schemes) > 1 or len(members) != count:
        raise InputError(
            f"{path}: expected all {count} expert projections quantized alike, found {len(members)} in "
            f"{len(schemes)} schemes; convert the checkpoint again with one scheme for its experts"
        )
    projections = {ROLES[p]: p for p in dict.fromkeys(find.projection(m) for m in members)}
    suffixes: dict[str, str] = {c: t.rpartition(".")[2] for c, t in first.names.items()}
    try:
        new = QuantExperts.like(
            experts, next(iter(schemes)), projections=projections, format=first.format, names=suffixes,
            float_dtype=float_dtype_of(first, tensors),
        )  # fmt: skip
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    shapes = {n: p.shape for n, p in experts.named_parameters(recurse=False) if n in FUSED_PARAMETERS}
    vars(new).update({n: _filled(*shape) for n, shape in shapes.items()})
    replace_module(model, path, new)
