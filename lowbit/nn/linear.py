"""A linear layer on quantized weights. Its state_dict is the checkpoint: same names, dtypes and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowbit import ops
from lowbit.formats import Format
from lowbit.nn.static import StaticOperands, check_zeros
from lowbit.nn.stored import (
    TORCH_DTYPES,
    QuantModule,
    as_format,
    as_scheme,
    autocast_input,
    check_held,
    codes_of,
    float_linear,
    pack,
    unpack,
)
from lowbit.nn.weights import dequantize_rows, quantize_rows
from lowbit.quantize import scale_as_float
from lowbit.scheme import Scheme

# Scales are used in float32; a published checkpoint may store BF16.
SCALES = ("scale", "input_scale")
_COMPUTES = (torch.float32, torch.bfloat16, torch.float16)


class QuantLinear(QuantModule):
    """y = x · Wᵀ + b with W quantized, and x quantized as the scheme says.

    x […, in_features] in float32, bfloat16 or float16 (1-D to any number of dimensions, any
    strides) → […, out_features] in the dtype of x; under autocast, in autocast's. Other float
    dtypes compute in float32. The epilogue is in float32 and rounds once.

    Buffers are those of the on-disk format: for compressed-tensors `weight` and
    `weight_scale` (`weight_packed`, `weight_scale`, `weight_shape` when weight-only;
    `input_scale` and `input_zero_point` when activations are static), for `fp8` `weight` and
    `weight_scale_inv`; for `ascend` see that format, whose `quant_bias` stands for the bias of a static
    layer (see `static`); `bias` in float. `.to(device)` moves them; `.half()`, `.bfloat16()` and
    `.to(dtype)` cast `bias` only, which may be made a Parameter and trained. Weights are frozen; a
    gradient reaches x through the dequantized weight, as if x had not been quantized (a straight-through estimate).

    `quantize_activations = False` multiplies x as it is with the dequantized weight, by
    `F.linear`: a reference for what quantizing the activations costs. `hadamard` > 0: x is
    first rotated by a Hadamard matrix of that many columns, for weights that were rotated so.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        scheme: Scheme | str,
        bias: bool = False,
        format: Format | str = "compressed-tensors",
        names: Mapping[str, str] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        float_dtype: str = "BF16",
    ) -> None:
        """Uninitialized buffers. `dtype` is that of the bias; `names` renames buffers (content → name).

        `float_dtype`: of the checkpoint's float tensors, which some formats store scales after.
        """
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.scheme, self.format = as_scheme(scheme), as_format(format)
        self.quantize_activations = True
        self.hadamard = 0
        assert self.scheme.weights is not None
        self._block = ops.block_of(self.scheme.weights.granularity)
        self._activations = ops.activations_of(self.scheme)
        self.names: dict[str, str] = {}
        self._layout = self.format.tensors(self.scheme, (out_features, in_features), float_dtype)
        for stored in self._layout:
            name = (names or {}).get(stored.content, stored.suffix[1:])
            self.names[stored.content] = name
            # The shape of a packed weight is known already: never left uninitialized.
            value = (
                torch.tensor([out_features, in_features], dtype=torch.int64, device=device)
                if stored.content == "shape"
                else torch.empty(stored.shape, dtype=TORCH_DTYPES[stored.dtype], device=device)
            )
            self.register_buffer(name, value)
        self.frozen = tuple(self.names.values())
        self._static = StaticOperands() if "quant_bias" in self.names else None
        self.register_buffer(
            "bias", torch.empty(out_features, dtype=dtype or torch.get_default_dtype(), device=device)
        ) if bias else self.register_buffer("bias", None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        scheme: Scheme | str,
        *,
        format: Format | str = "compressed-tensors",
        input_scale: Tensor | float | None = None,
        input_zero_point: Tensor | int | None = None,
        name: str = "linear",
    ) -> QuantLinear:
        """Quantize a `Linear` (or transformers' Conv1D, whose weight is [in, out]) on its own device.

        Weights are quantized as `lowbit.quantize.quantize` does, row block by row block, so that
        no float32 copy of the whole weight exists. A static scheme needs `input_scale` (and
        `input_zero_point` when asymmetric) from a calibration; others take none. Raises ValueError for
        NaN or Inf in the weight, naming `name`, for a weight that is codes already, and for a scheme
        that does not fit, or that the format does not hold.
        """
        scheme = as_scheme(scheme)
        check_held(format, scheme, name)
        weight, bias = getattr(linear, "weight", None), getattr(linear, "bias", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            raise ValueError(f"expected a layer with a 2-D weight, found {type(linear).__name__} in {name}")
        weight = weight.detach()
        if is_conv1d(linear):
            weight = weight.T
        n, k = weight.shape
        module = cls(
            k, n, scheme=scheme, bias=bias is not None, format=format,
            dtype=bias.dtype if bias is not None else None, device=weight.device,
        )  # fmt: skip
        assert scheme.weights is not None
        codes, scale = quantize_rows(weight, scheme.weights, name=name)
        module.set_content(codes_of(module.names), codes)
        if "scale" not in module.names:
            raise ValueError(
                f"{name}: expected a format that stores the weight's scale, found {module.format.name} with "
                f"{scheme.name}; use compressed-tensors here, and `lowbit convert` for checkpoints in that format"
            )
        module.set_content("scale", scale)
        if "offset" in module.names:
            module.set_content("offset", torch.zeros_like(scale))
        if bias is not None:
            module.bias = bias.detach().clone()
        module._set_static(input_scale, input_zero_point, name)
        return module.train(linear.training)

    def _set_static(self, scale: Tensor | float | None, zero_point: Tensor | int | None, name: str) -> None:
        for argument, value in {"input_scale": scale, "input_zero_point": zero_point}.items():
            if value is not None and argument not in self.names:
                raise ValueError(
                    f"{name}: scheme {self.scheme.name} stores no {argument}: leave it out, or use int8-static"
                    + ("-asym" if argument == "input_zero_point" else " or fp8-static")
                )
        if not self.scheme.needs_calibration:
            return
        if scale is None:
            raise ValueError(
                f"{name}: scheme {self.scheme.name} needs calibrated activation scales, found none; give input_scale, "
                "or use a scheme with dynamic activations (int8, fp8)"
            )
        if "input_zero_point" in self.names and zero_point is None:
            raise ValueError(f"{name}: scheme {self.scheme.name} is asymmetric: give input_zero_point too")
        device = self.codes_buffer.device
        scale = torch.as_tensor(scale, dtype=torch.float32, device=device)
        if scale.numel() != 1 or not (scale.isfinite() & (scale > 0)).all():
            raise ValueError(f"{name}: expected one finite, positive input_scale, found {scale.tolist()}")
        self.set_content("input_scale", scale.reshape(1))
        if "input_zero_point" in self.names:
            zero = torch.as_tensor(zero_point, device=device)
            if zero.numel() != 1 or not ((zero >= -128) & (zero <= 127) & (zero == zero.round())).all():
                raise ValueError(
                    f"{name}: expected one input_zero_point, an integer from -128 to 127, found {zero.tolist()}; "
                    "take 128 off one of unsigned codes"
                )
            self.set_content("input_zero_point", zero.to(torch.int8).reshape(1))

    def stored_modules(self, name: str) -> list[str]:
        """The modules of a checkpoint that this one, called `name`, is: itself."""
        return [name]

    def content(self, content: str) -> Tensor | None:
        """The buffer that holds `codes`, `packed`, `scale`, `input_scale` or `input_zero_point`; None if absent."""
        name = self.names.get(content)
        return None if name is None else self._buffers[name]

    def set_content(self, content: str, value: Tensor) -> None:
        """Put codes (int8 codes are packed here where the layout says so), scales or zero points in place."""
        if content == "packed" and value.dtype != torch.int32:
            value = pack(value)
        self._buffers[self.names[content]] = value

    def expect_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Before loading: give scales the shapes that a checkpoint has (content → shape), [] for [1], say."""
        for content in SCALES:
            buffer, shape = self.content(content), shapes.get(content)
            if buffer is not None and shape is not None and tuple(buffer.shape) != shape:
                self.set_content(content, buffer.reshape(shape))

    def restore_shapes(self) -> None:
        """After loading: scales of the shapes that the scheme asks for."""
        for stored in self._layout:
            buffer = self.content(stored.content)
            if stored.content in SCALES and buffer is not None and tuple(buffer.shape) != stored.shape:
                self.set_content(stored.content, buffer.reshape(stored.shape))

    @property
    def codes_buffer(self) -> Tensor:
        """The codes as stored: int8 or float8_e4m3fn [N, K], or packed int32 [N, ⌈K/4⌉]."""
        buffer = self.content(codes_of(self.names))
        assert buffer is not None
        return buffer

    @property
    def qweight(self) -> Tensor:
        """Codes that are packed, by the name under which PEFT looks for the weight of a layer that has no `weight`."""
        if "packed" not in self.names:
            raise AttributeError(f"{type(self).__name__} has no qweight: its codes are its weight")
        return self.codes_buffer

    @property
    def codes(self) -> Tensor:
        """int8 or float8_e4m3fn [N, K]."""
        stored = self.codes_buffer
        return unpack(stored, self.in_features) if stored.dtype == torch.int32 else stored

    @property
    def stored_scale(self) -> Tensor:
        """The weight's scale as stored: float32, or E8M0 bytes. In a static layer of `ascend`, float32 computed."""
        if self._static is not None:
            return self._static.of(self.content).scale
        scale = self._buffers[self.names["scale"]]
        assert scale is not None
        return scale

    @property
    def scale(self) -> Tensor:
        """The weight's scale, float32, shaped as the scheme's granularity says."""
        return scale_as_float(self.stored_scale)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """code · scale, rounded once to `dtype`: [N, K]."""
        assert self.scheme.weights is not None
        return dequantize_rows(self.codes, self.scale, self.scheme.weights, dtype)

    def to_linear(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """A trainable Linear of the dequantized weight, for inputs as they are: a rotation is undone in the weight."""
        weight = self.dequantize(torch.float32 if self.hadamard else dtype)
        if self.hadamard:  # its matrix is its own inverse
            weight = ops.hadamard(weight, self.hadamard).to(dtype)
        return float_linear(weight, self.stored_bias()).train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"expected an input […, {self.in_features}], found {list(x.shape)}")
        if torch.is_grad_enabled():
            self.check_frozen()
        x = autocast_input(x)
        if x.dtype not in _COMPUTES:
            return self._compute(self._as_float(x)).to(x.dtype)
        return self._compute(x)

    def _compute(self, x: Tensor) -> Tensor:
        if self.hadamard:
            x = ops.hadamard(x, self.hadamard)
        bias = self.stored_bias()
        if not self.quantize_activations:
            weight = self.dequantize(x.dtype)
            bias = bias if self._static is None else self._static.of(self.content).bias
            return nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
        zero_point, weight_sum = self.content("input_zero_point"), None
        if self._static is not None:
            operands = self._static.of(self.content)
            bias, zero_point, weight_sum = operands.bias, operands.zero_point, operands.weight_sum
        return ops.linear(
            x, self.codes_buffer, self.stored_scale, bias,
            activations=self._activations, block=self._block,
            input_scale=self.content("input_scale"), input_zero_point=zero_point,
            weight_sum=weight_sum,
        )  # fmt: skip

    def check_symmetric(self) -> None:
        """InputError for zero points of the weight other than 0, which no product here applies."""
        check_zeros(self.content("offset"), self.names.get("offset", ""))

    def _as_float(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float64:
            raise TypeError(
                f"expected a float32, bfloat16 or float16 input, found {x.dtype}; "
                "inputs that are codes already go to lowbit.ops.matmul"
            )
        return x.to(torch.float32)

    def extra_repr(self) -> str:
        bias = self.stored_bias() is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, "
            f"scheme={self.scheme.name}"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = prefix + self.names[codes_of(self.names)]
        if key in state_dict and (problem := wrong_codes(key, state_dict[key], self.codes_buffer)):
            args[-1].append(problem)
            return
        # Published checkpoints store scales as BF16 or as a scalar; here they are float32 and have their shape.
        for content in SCALES:
            key = prefix + self.names.get(content, "\0")
            if key in state_dict:
                state_dict[key] = as_stored_scale(state_dict[key], self.content(content))
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self._static is not None:  # copied into the buffers that it was made from
            self._static.forget()


def wrong_codes(key: str, value: Tensor, like: Tensor) -> str:
    """Why a tensor cannot be the codes that `like` holds, or ""; copied there, floats would be cut to integers."""
    if value.dtype == like.dtype:
        return ""
    return (
        f"{key}: expected codes in {like.dtype}, found {value.dtype}: of another scheme, or a weight that is not "
        "quantized; load it into the model before quantize_model, or quantize it alike"
    )


def as_stored_scale(scale: Tensor, like: Tensor | None) -> Tensor:
    """A checkpoint's scale in the dtype of the buffer `like`, and in its shape where only ones differ."""
    if like is None:
        return scale
    if scale.dtype in (torch.bfloat16, torch.float16, torch.float64):
        scale = scale.to(torch.float32)
    if scale.shape != like.shape and scale.numel() == like.numel():
        scale = scale.reshape(like.shape)
    return scale


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, whose weight is [in, out]; recognized without importing transformers."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


def is_plain(linear: nn.Module) -> bool:
    """Whether it computes what a Linear does, and nobody else reads its weight: Falcon's rounds before the bias."""
    return type(linear) is nn.Linear or type(linear).__name__ == "FalconLinear"
