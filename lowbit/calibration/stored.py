"""What a checkpoint's stored modules round while they run, as its quantization_config says."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from lowbit.calibration.kv_cache import KVCache, KVHook, quantizers
from lowbit.calibration.layer import install
from lowbit.calibration.layerwise import LayerwiseModel, matrix_shape
from lowbit.calibration.products import multiplies_integers
from lowbit.calibration.simulate import ActivationQuantizer
from lowbit.dtypes import INT8
from lowbit.errors import InputError
from lowbit.granularity import scale_shape
from lowbit.nn.linear import is_plain
from lowbit.quantize import Quantized
from lowbit.scheme import Scheme

Wanted = Callable[[str], bool]
"""Which modules, by the checkpoint's names."""


def install_stored(
    model: LayerwiseModel, layer: nn.Module, index: int, wanted: Wanted = lambda name: True
) -> dict[str, ActivationQuantizer]:
    """Prepare the stored modules of decoder layer `index`, as it was loaded; → the quantizers of their inputs.

    Those that multiply integers get their codes.
    """
    schemes, scales, online = _inputs(model, layer, index, wanted)
    quantized: dict[str, Quantized] = {}
    for name, scheme in schemes.items():
        weight = layer.get_submodule(name).get_parameter("weight")
        disk = model.disk_name(f"{model.layer_name(index)}.{name}")
        # Others get their weights in float, and here what rounds their inputs.
        plain = is_plain(layer.get_submodule(name)) and multiplies_integers(scheme, weight)
        if plain and (q := _codes(model, disk)) is not None:
            quantized[name] = q
    return install(layer, schemes, quantized, scales, online)


def stored_quantizers(
    model: LayerwiseModel, layer: nn.Module, index: int, wanted: Wanted
) -> dict[str, ActivationQuantizer]:
    """The quantizers of those inputs alone: the layer stays as it is."""
    schemes, scales, online = _inputs(model, layer, index, wanted)
    return install(layer, schemes, {}, scales, online)


def _inputs(
    model: LayerwiseModel, layer: nn.Module, index: int, wanted: Wanted
) -> tuple[dict[str, Scheme], dict[str, tuple[Tensor | None, Tensor | None]], frozenset[str]]:
    """(scheme, scales of its input) of the stored modules of the layer that round it, and those that rotate it."""
    prefix, stored = model.layer_name(index), model.source.stored
    schemes: dict[str, Scheme] = {}
    scales: dict[str, tuple[Tensor | None, Tensor | None]] = {}
    online: set[str] = set()
    for name, module in layer.named_modules():
        disk = model.disk_name(f"{prefix}.{name}")
        if not matrix_shape(module) or isinstance(module, nn.Embedding) or not wanted(disk):
            continue
        if disk in model.source.rotated:
            online.add(name)
        if disk not in stored:
            continue
        scheme = stored[disk].scheme
        if scheme.activations is not None:
            schemes[name], scales[name] = scheme, stored_input(model, disk)
    return schemes, scales, frozenset(online)


def stored_kv_hooks(model: LayerwiseModel, layer: nn.Module, index: int) -> dict[str, KVHook]:
    """What rounds the layer's keys and values (see `kv_cache.watched`) by scales that the checkpoint has, where its
    config asks for such a cache."""

    def scale_of(name: str) -> Tensor | None:
        """`….k_scale`, which ModelOpt, AutoFP8 and msModelSlim have below k_proj."""
        attention, _, leaf = name.rpartition(".")
        below = f"{attention}.{leaf[0]}_proj"
        known = (name, f"{below}.{leaf}", f"{below}.output_scale", f"{below}.kv_cache_scale")
        found = next((n for n in known if model.source.has(n)), None)
        if model.source.has(zeros := f"{below}.kv_cache_offset") and model.source.raw(zeros).count_nonzero():
            raise InputError(
                f"{zeros}: expected zero points of 0 in a KV cache that is to be rounded, found others, which are not "
                "read; calibrate one with --kv-cache int8-channel"
            )
        return None if found is None else model.source.raw(found).to(model.device)

    if (kv_cache := KVCache.of_config(model.source.config)) is None:
        return {}
    prefix = model.layer_name(index)
    return quantizers(layer, kv_cache, lambda name: model.disk_attention(f"{prefix}.{name}"), scale_of)


def stored_input(model: LayerwiseModel, disk: str) -> tuple[Tensor | None, Tensor | None]:
    """(scale [1], zero point [1]) of a stored module's static activations; (None, None) where they are dynamic."""
    stored = model.source.stored[disk]
    if stored.scheme.activations is None or stored.scheme.activations.dynamic:
        return None, None
    if "input_scale" not in stored.names:
        raise InputError(
            f"{disk}: expected a scale of its input, which {stored.scheme.name} has, found none in "
            f"{model.source.path}; the checkpoint is incomplete: fetch it again"
        )

    def number(name: str) -> Tensor:
        return model.source.raw(name).float().reshape(1).to(model.device)

    zero = stored.names.get("input_zero_point")
    return number(stored.names["input_scale"]), None if zero is None else number(zero)


def _codes(model: LayerwiseModel, disk: str) -> Quantized | None:
    """Codes and scale as they are stored, where that is a tensor each."""
    module = model.source.stored[disk]
    if module.spec.dtype is not INT8 or not {"codes", "scale"} <= module.names.keys():
        return None
    codes, scale = (model.source.raw(n) for n in (module.weight, module.scale))
    shape = scale_shape(tuple(codes.shape), module.spec.granularity)
    return Quantized(codes=codes, scale=scale.float().reshape(shape), zero_point=None, spec=module.spec)
