"""What a checkpoint's stored modules round while they run, as its quantization_config says."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from lowbit.calibration.layer import install
from lowbit.calibration.layerwise import LayerwiseModel
from lowbit.calibration.products import multiplies_integers
from lowbit.calibration.simulate import ActivationQuantizer
from lowbit.dtypes import INT8
from lowbit.errors import InputError
from lowbit.granularity import scale_shape
from lowbit.quantize import Quantized
from lowbit.scheme import Scheme


def install_stored(
    model: LayerwiseModel, layer: nn.Module, index: int, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, ActivationQuantizer]:
    """Prepare the stored Linears of decoder layer `index`, as it was loaded; → the quantizers of their inputs.

    `wanted`: which of them, by our full names. Those that multiply integers get their codes.
    """
    prefix, stored = model.layer_name(index), model.source.stored
    schemes: dict[str, Scheme] = {}
    scales: dict[str, tuple[Tensor | None, Tensor | None]] = {}
    online: set[str] = set()
    quantized: dict[str, Quantized] = {}
    for name, module in layer.named_modules():
        ours = f"{prefix}.{name}"
        if not isinstance(module, nn.Linear) or not wanted(ours):
            continue
        disk = model.disk_name(ours)
        if disk in model.source.rotated:
            online.add(name)
        if disk not in stored:
            continue
        scheme = stored[disk].scheme
        if scheme.activations is not None:
            schemes[name], scales[name] = scheme, stored_input(model, disk)
            if multiplies_integers(scheme, module.weight) and (q := _codes(model, disk)) is not None:
                quantized[name] = q
    return install(layer, schemes, quantized, scales, frozenset(online))


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
