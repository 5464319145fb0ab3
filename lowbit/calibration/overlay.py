"""A calibration laid over its source: the float weights and the activation scales that an engine would see."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from safetensors import safe_open
from torch import Tensor, nn

from lowbit.calibration.kv_cache import KVCache, KVHook, quantizers
from lowbit.calibration.layer import install
from lowbit.calibration.layerwise import LayerwiseModel
from lowbit.calibration.shared_scale import MatrixOf, in_checkpoint, share_scales
from lowbit.calibration.simulate import ActivationQuantizer
from lowbit.calibration.store import Calibration
from lowbit.quantize import Quantized, check_finite, choose_scale, quantize_with
from lowbit.scheme import Scheme, TensorSpec


class Overlay:
    """A model as calibrated, layer by layer. `schemes` maps our module names to schemes."""

    def __init__(
        self, calibration: Calibration, model: LayerwiseModel, schemes: Mapping[str, Scheme]
    ) -> None:
        self.calibration, self.model, self.schemes = calibration, model, schemes

    def load(self, index: int) -> tuple[nn.Module, dict[str, ActivationQuantizer]]:
        """Decoder layer `index` with dequantized weights, and the quantizers of its inputs, to be attached.

        A module without codes in the calibration is rounded from the source, as `convert` does.
        """
        prefix = self.model.layer_name(index)
        layer = self.model.load(index, lambda name: tensor_of(self.calibration, name))
        schemes = {
            n.removeprefix(prefix + "."): s for n, s in self.schemes.items() if n.startswith(prefix + ".")
        }
        quantized: dict[str, Quantized] = {}
        plain: dict[str, Tensor] = {}
        weight_scales: dict[str, Tensor] = {}
        scales: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        for name, scheme in schemes.items():
            disk = self.model.disk_name(f"{prefix}.{name}")
            if scheme.weights is None:
                raise ValueError(f"expected a scheme that quantizes weights for {disk}, found {scheme.name}")
            codes = self.calibration.codes(disk)
            weight = layer.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            if codes is None:
                check_finite(weight, disk)
                plain[name] = weight
                weight_scales[name] = choose_scale(weight, scheme.weights)[0]
            else:
                quantized[name] = Quantized(
                    codes=self._here(f"{disk}.weight"), scale=self._here(f"{disk}.weight_scale"),
                    zero_point=None, spec=scheme.weights,
                )  # fmt: skip
                weight_scales[name] = quantized[name].scale
            if scheme.needs_calibration:
                found = (f"{disk}.{leaf}" for leaf in ("input_scale", "input_zero_point"))
                scale, zero = (self._here(n) if self.calibration.has(n) else None for n in found)
                scales[name] = (scale, zero)
        matrix_of = in_checkpoint(lambda n: self.model.disk_name(f"{prefix}.{n}"), self.model.model_type)
        quantized |= _rounded(plain, weight_scales, schemes, matrix_of)
        report = self.calibration.layers.get(prefix, {})
        rotated = set(report.get("online_hadamard", []))
        online = frozenset(
            n for n, _ in layer.named_modules() if self.model.disk_name(f"{prefix}.{n}") in rotated
        )
        return layer, install(layer, schemes, quantized, scales, online)

    def kv_hooks(self, layer: nn.Module, index: int) -> dict[str, KVHook]:
        """What rounds the layer's keys and values (see `kv_cache.watched`); empty without KV scales."""
        if not self.calibration.kv_cache:
            return {}
        prefix = self.model.layer_name(index)
        return quantizers(
            layer,
            KVCache(**self.calibration.kv_cache),
            lambda name: self.model.disk_attention(f"{prefix}.{name}"),
            lambda name: self._here(name) if self.calibration.has(name) else None,
        )

    def _here(self, name: str) -> Tensor:
        return _read(self.calibration, name).to(self.model.device)


def _rounded(
    weights: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    schemes: Mapping[str, Scheme],
    matrix_of: MatrixOf,
) -> dict[str, Quantized]:
    """Plain rounding of `weights`, between `scales` that include those of the weights they are joined with."""
    by_spec: dict[TensorSpec, dict[str, Tensor]] = defaultdict(dict)
    for name, scale in scales.items():
        spec = schemes[name].weights
        assert spec is not None  # `load` has refused others
        by_spec[spec][name] = scale
    found = {}
    for spec, own in by_spec.items():
        for name, scale in share_scales(own, spec, matrix_of).items():
            if name in weights:
                codes = quantize_with(weights[name], scale, spec)
                found[name] = Quantized(codes=codes, scale=scale, zero_point=None, spec=spec)
    return found


def tensor_of(calibration: Calibration, name: str) -> Tensor | None:
    """A float tensor that a calibration changed; None for codes (see `Overlay.load`) and what it has not."""
    entry = calibration.tensors.get(name)
    if entry is None or entry.dtype not in ("F64", "F32", "F16", "BF16"):
        return None
    return _read(calibration, name)


def _read(calibration: Calibration, name: str) -> Tensor:
    with safe_open(calibration.tensors[name].file, framework="pt") as stream:  # type: ignore[no-untyped-call]
        return stream.get_tensor(name)
