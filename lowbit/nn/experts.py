"""The experts of a mixture, quantized: stacked in memory for one grouped product, named per expert on disk."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowbit import ops
from lowbit.formats import Format
from lowbit.nn.fused_experts import (
    activation,
    fused_weight,
    identity_experts,
    own_gate,
    parameter,
    refusal,
    sizes,
)
from lowbit.nn.offload import follow_offloading
from lowbit.nn.stacked import StackedModule
from lowbit.nn.static import Operands, StaticOperands, check_zeros
from lowbit.nn.stored import (
    TORCH_DTYPES,
    as_format,
    as_scheme,
    autocast_input,
    check_held,
    codes_of,
    pack,
    unpack,
)
from lowbit.nn.weights import dequantize_rows, quantize_rows
from lowbit.quantize import scale_as_float
from lowbit.scheme import Scheme

PROJECTIONS = ("gate", "up", "down")
"""What each does: out = down(act(gate(x)) · up(x)). Without a gate: down(act(up(x)))."""


class QuantExperts(StackedModule):
    """Drop-in for transformers' fused experts, called as `experts(hidden, top_k_index, top_k_weights)`.

    hidden [T, H] in a float dtype, indices [T, k], weights [T, k] → [T, H]. An index of
    `num_experts` (expert parallelism's mark for another rank's expert) contributes nothing; where there are
    `identity_experts` (LongCat-Flash), those that follow the others return hidden itself, and have no weights.
    Llama 4 calls `experts(hidden)` with the rows of all experts, in their order: [E·T, H] → [E·T, H].

    Each projection is one stacked buffer [E, N, K] with its scales. The state_dict is that of
    the checkpoint, one entry per expert: `{i}.{projection}.weight`, `.weight_scale`, … with
    the projections' names there (`gate_proj, up_proj, down_proj`, or `w1, w3, w2`); loading
    copies into the stacks. Weights are frozen, as in `QuantLinear`, and so is the treatment
    of dtypes, gradients and `quantize_activations`.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        scheme: Scheme | str,
        act_fn: Callable[[Tensor], Tensor],
        projections: Mapping[str, str] | None = None,
        format: Format | str = "compressed-tensors",
        names: Mapping[str, str] | None = None,
        device: torch.device | str | None = None,
        float_dtype: str = "BF16",
    ) -> None:
        """Uninitialized. `projections` maps gate, up and down to their names on disk; `float_dtype` as in
        `QuantLinear`.
        """
        super().__init__()
        self.num_experts, self.hidden_size, self.intermediate_size = (
            num_experts,
            hidden_size,
            intermediate_size,
        )
        self.scheme, self.format = as_scheme(scheme), as_format(format)
        self.quantize_activations = True
        self.hadamard = 0
        assert self.scheme.weights is not None
        self._block = ops.block_of(self.scheme.weights.granularity)
        self._activations = ops.activations_of(self.scheme)
        self.identity_experts = 0
        self.act_fn = act_fn
        self.apply_gate: Callable[..., Tensor] | None = None
        self.projections = dict(projections or {p: f"{p}_proj" for p in PROJECTIONS})
        self.suffixes = {}
        frozen = []
        for projection, name in self.projections.items():
            for stored in self.format.tensors(self.scheme, self.shape_of(projection), float_dtype):
                suffix = (names or {}).get(stored.content, stored.suffix[1:])
                self.suffixes[stored.content] = suffix
                if stored.content == "shape":
                    continue  # known: written out, never read
                shape = (num_experts, *stored.shape)
                buffer = torch.empty(shape, dtype=TORCH_DTYPES[stored.dtype], device=device)
                self.register_buffer(f"{name}_{suffix}", buffer)
                frozen.append(f"{name}_{suffix}")
        self.frozen = tuple(frozen)
        self._static = {p: StaticOperands() for p in self.projections if "quant_bias" in self.suffixes}

    @classmethod
    def from_experts(
        cls,
        experts: nn.Module,
        scheme: Scheme | str,
        *,
        projections: Mapping[str, str] | None = None,
        format: Format | str = "compressed-tensors",
        name: str = "experts",
    ) -> QuantExperts:
        """Quantize fused experts: `gate_up_proj` [E, 2I, H] (or `up_proj` [E, I, H]) and `down_proj` [E, H, I],
        or `gate_up_proj` [E, H, 2I] and `down_proj` [E, I, H].

        Raises ValueError for a layout that differs (see `refusal`), for static activations, whose scales are
        measured on data, for a format that does not hold the scheme, and for NaN or Inf.
        """
        if as_scheme(scheme).needs_calibration:
            raise ValueError(
                f"{name}: expected a scheme with dynamic activations, found {as_scheme(scheme).name}; use int8 or fp8 "
                "here, or `lowbit convert --calibration` and lowbit.load"
            )
        check_held(format, as_scheme(scheme), name)
        module = cls.like(experts, scheme, projections=projections, format=format)
        assert module.scheme.weights is not None
        for projection in module.projections:
            for i in range(module.num_experts):
                weight = fused_weight(experts, projection, i)
                where = f"{name}.{i}.{module.projections[projection]}"
                codes, scale = quantize_rows(weight, module.scheme.weights, name=where)
                if "packed" in module.suffixes:
                    module.stack(projection, "packed")[i] = pack(codes)
                else:
                    module.stack(projection, "codes")[i] = codes
                module.stack(projection, "scale")[i] = scale
            if "offset" in module.suffixes:
                module.stack(projection, "offset").zero_()
        return module.train(experts.training)

    @classmethod
    def like(
        cls,
        experts: nn.Module,
        scheme: Scheme | str,
        *,
        projections: Mapping[str, str] | None = None,
        format: Format | str = "compressed-tensors",
        names: Mapping[str, str] | None = None,
        float_dtype: str = "BF16",
    ) -> QuantExperts:
        """Uninitialized, for the shapes, device and gate of a fused module. ValueError where the layout differs."""
        if problem := refusal(experts):
            raise ValueError(f"{type(experts).__name__}: {problem}")
        down, gate = parameter(experts, "down_proj"), own_gate(experts)
        count, hidden, intermediate = sizes(experts)
        found = dict(projections or {p: f"{p}_proj" for p in PROJECTIONS})
        if not getattr(experts, "has_gate", True):
            found.pop("gate", None)
        module = cls(
            count, hidden, intermediate, scheme=scheme, act_fn=activation(experts), projections=found,
            format=format, names=names, device=down.device, float_dtype=float_dtype,
        )  # fmt: skip
        module.identity_experts = identity_experts(experts)
        if gate is not None:
            # A gate of the model's own (a clamp, say), with the plain attributes that it reads.
            module.apply_gate = gate
            for key, value in vars(experts).items():
                if (
                    not key.startswith("_")
                    and not hasattr(module, key)
                    and isinstance(value, int | float | str)
                ):
                    setattr(module, key, value)
        return module

    def put(self, buffer: str, expert: int, value: Tensor) -> None:
        super().put(buffer, expert, value)
        for operands in self._static.values():
            operands.forget()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_hf_hook":  # accelerate's, whoever asked for it
            follow_offloading(self, value)

    def check_symmetric(self) -> None:
        """InputError for zero points of the weights other than 0, which no product here applies."""
        for projection in self.projections if "offset" in self.suffixes else ():
            check_zeros(self.stack(projection, "offset"), f"{self.projections[projection]}.weight_offset")

    def stored_codes(self, projection: str) -> Tensor:
        """Codes as stored: int8 or float8_e4m3fn [E, N, K], or packed int32 [E, N, ⌈K/4⌉]."""
        return self.stack(projection, codes_of(self.suffixes))

    def dequantize(self, projection: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """code · scale of `gate`, `up` or `down`, rounded once to `dtype`: [E, N, K]."""
        assert self.scheme.weights is not None
        n, k = self.shape_of(projection)
        out = torch.empty(self.num_experts, n, k, dtype=dtype, device=self.stored_codes(projection).device)
        for i in range(self.num_experts):
            out[i] = self._dequantize_one(projection, i, dtype)
        return out

    def _dequantize_one(self, projection: str, expert: int, dtype: torch.dtype) -> Tensor:
        assert self.scheme.weights is not None
        codes = self.stored_codes(projection)[expert]
        if codes.dtype == torch.int32:
            codes = unpack(codes, self.shape_of(projection)[1])
        return dequantize_rows(codes, self._scale(projection, expert), self.scheme.weights, dtype)

    def _scale(self, projection: str, expert: int) -> Tensor:
        if self._static:
            return self._operands(projection).scale[expert]
        return scale_as_float(self.stack(projection, "scale")[expert])

    def _operands(self, projection: str) -> Operands:
        """What products with zero points take, of all experts."""
        if self._static:
            return self._static[projection].of(lambda content: self.stack(projection, content))
        zero_point = self.stack(projection, "input_zero_point")
        return Operands(scale=self.stack(projection, "scale"), bias=None, zero_point=zero_point)

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        if hidden_states.dim() != 2 or hidden_states.shape[1] != self.hidden_size:
            raise ValueError(
                f"expected hidden states [T, {self.hidden_size}], found {list(hidden_states.shape)}"
            )
        if torch.is_grad_enabled():
            self.check_frozen()
        self._check_routing(hidden_states, top_k_index, top_k_weights)
        out_dtype = hidden_states.dtype
        x = autocast_input(hidden_states)
        x = x.to(torch.float32) if x.dtype == torch.float64 else x
        if top_k_index is None or top_k_weights is None:
            offsets = torch.arange(self.num_experts + 1, dtype=torch.int32, device=x.device)
            offsets = offsets * (x.shape[0] // self.num_experts)
            return self._product("down", self._gated(x, offsets), offsets).to(out_dtype)
        tokens, choices = top_k_index.shape
        chosen = top_k_index.reshape(-1)
        weights = torch.where(chosen < self.num_experts, top_k_weights.reshape(-1).to(torch.float32), 0.0)
        chosen = chosen.clamp(max=self.num_experts - 1)
        order = torch.argsort(chosen, stable=True)
        counts = torch.zeros(self.num_experts, dtype=torch.int64, device=x.device)
        counts = counts.scatter_add(0, chosen.to(torch.int64), torch.ones_like(order))
        offsets = nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        middle = self._gated(x[order // choices], offsets)
        out = self._product("down", middle, offsets).to(torch.float32) * weights[order, None]
        # Back to the tokens' order, and a sum in a fixed order: index_add is not deterministic on GPUs.
        out = torch.zeros_like(out).index_copy(0, order, out)
        out = out.view(tokens, choices, self.hidden_size).sum(1)
        if self.identity_experts:
            passes = (top_k_index >= self.num_experts) & (
                top_k_index < self.num_experts + self.identity_experts
            )
            share = torch.where(passes, top_k_weights.view_as(top_k_index).to(torch.float32), 0.0).sum(
                1, keepdim=True
            )
            out = out + hidden_states.to(torch.float32) * share
        return out.to(out_dtype)

    def _check_routing(self, x: Tensor, index: Tensor | None, weights: Tensor | None) -> None:
        """ValueError unless every token has k experts and their weights, or all experts have as many rows."""
        if index is None and weights is None:
            if x.shape[0] % self.num_experts:
                raise ValueError(
                    f"expected top_k_index and top_k_weights, or as many rows for each of {self.num_experts} "
                    f"experts, found {x.shape[0]} rows"
                )
            return
        if (
            index is None
            or weights is None
            or index.dim() != 2
            or index.is_floating_point()
            or weights.numel() != index.numel()
            or any(t.dim() < 1 or t.shape[0] != x.shape[0] or t.device != x.device for t in (index, weights))
        ):
            found = [
                None if t is None else f"{t.dtype} {list(t.shape)} on {t.device}" for t in (index, weights)
            ]
            raise ValueError(
                f"expected top_k_index and top_k_weights [{x.shape[0]}, k] on {x.device}, "
                f"found {found[0]} and {found[1]}"
            )

    def _gated(self, rows: Tensor, offsets: Tensor) -> Tensor:
        up = self._product("up", rows, offsets)
        if "gate" not in self.projections:
            return self.act_fn(up)
        gate = self._product("gate", rows, offsets)
        if self.apply_gate is not None:
            return self.apply_gate(self, torch.cat([gate, up], dim=-1))
        return self.act_fn(gate) * up

    def _product(self, projection: str, rows: Tensor, offsets: Tensor) -> Tensor:
        """Rows of expert e, offsets[e] … offsets[e + 1], times its projection: [T·k, K] → [T·k, N]."""
        if projection == "down" and self.hadamard:
            rows = ops.hadamard(rows, self.hadamard)
        if not self.quantize_activations:
            return self._each(projection, rows, offsets, self._float_product)
        if "input_zero_point" in self.suffixes:
            return self._each(projection, rows, offsets, self._shifted_product)
        return ops.linear_grouped(
            rows, self.stored_codes(projection), self.stack(projection, "scale"), offsets,
            activations=self._activations, block=self._block,
            input_scale=self.stack(projection, "input_scale") if "input_scale" in self.suffixes else None,
        )  # fmt: skip

    def _each(
        self, projection: str, rows: Tensor, offsets: Tensor, product: Callable[[str, int, Tensor], Tensor]
    ) -> Tensor:
        """One product per expert that has rows."""
        out = rows.new_zeros(rows.shape[0], self.shape_of(projection)[0])
        for i, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
            if end > start:
                out[start:end] = product(projection, i, rows[start:end])
        return out

    def _float_product(self, projection: str, expert: int, x: Tensor) -> Tensor:
        weight = self._dequantize_one(projection, expert, x.dtype)
        bias = self._operands(projection).of_expert(expert).bias if self._static else None
        return nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))

    def _shifted_product(self, projection: str, expert: int, x: Tensor) -> Tensor:
        """With a zero point; no engine runs experts so, and there is no grouped product of them."""
        operands = self._operands(projection).of_expert(expert)
        return ops.linear(
            x, self.stored_codes(projection)[expert], operands.scale, operands.bias,
            activations=self._activations, block=self._block,
            input_scale=self.stack(projection, "input_scale")[expert], input_zero_point=operands.zero_point,
            weight_sum=operands.weight_sum,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, scheme={self.scheme.name}"
        )
