"""What vLLM-Ascend calls of a chip, as plain arithmetic in torch after the operators' documentation."""

from __future__ import annotations

from typing import Any

import torch
from engine_stubs import mixture  # beside this file
from torch import Tensor, nn


def npu_dynamic_quant(x: Tensor, dst_type: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """x [..., K] → codes, scales [...]: INT8 to ±127, E4M3 to ±448."""
    largest = 127 if dst_type is torch.int8 else 448
    scale = x.float().abs().amax(-1).clamp(min=1e-30) / largest
    codes = x.float() / scale[..., None]
    return (codes.round() if dst_type is torch.int8 else codes.clamp(-448, 448)).to(dst_type), scale


def npu_dynamic_mx_quant(x: Tensor, dst_type: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [..., K] → E4M3 codes, E8M0 bytes [..., K/32], whose powers of two keep the largest below 448."""
    groups = x.float().unflatten(-1, (-1, 32))
    power = torch.exp2(torch.ceil(torch.log2(groups.abs().amax(-1) / 448)).clamp(-127, 127))
    codes = (groups / power[..., None]).clamp(-448, 448).to(dst_type).flatten(-2)
    return codes, (torch.log2(power) + 127).to(torch.uint8)


def npu_quantize(x: Tensor, reciprocal: Tensor, offset: Tensor, *_: Any) -> Tensor:
    return (x.float() * reciprocal.float() + offset.float()).round().clamp(-128, 127).to(torch.int8)


def npu_quant_matmul(
    x: Tensor, weight: Tensor, scale: Tensor, *, pertoken_scale: Tensor | None = None, bias: Tensor | None = None,
    group_sizes: list[int] | None = None, **_: Any,
) -> Tensor:  # fmt: skip
    """x [T, K] codes, weight [K, N] codes → float32 [T, N]. An INT32 bias is added before scales, a float one after."""
    if group_sizes is not None:
        assert pertoken_scale is not None
        inputs = x.float() * _exponents(pertoken_scale).repeat_interleave(group_sizes[2], -1)
        out = inputs @ (weight.float() * _mx_scale(scale))
    else:
        if scale.dtype is torch.int64:
            scale = scale.to(torch.int32).view(torch.float32)
        sums = x.double() @ weight.double()
        if bias is not None and bias.dtype is torch.int32:
            sums, bias = sums + bias, None
        tokens = 1.0 if pertoken_scale is None else pertoken_scale.double()[:, None]
        out = (sums * scale.double() * tokens).float()
    return out if bias is None else out + bias.float()


def _exponents(scale: Tensor) -> Tensor:
    return torch.exp2(scale.float() - 127)


def _mx_scale(scale: Tensor) -> Tensor:
    """[K/64, N, 2] bytes → float32 [K, N]."""
    return _exponents(scale).permute(0, 2, 1).flatten(0, 1).repeat_interleave(32, 0)


def npu_weight_quant_batchmatmul(
    x: Tensor, weight: Tensor, antiquant_scale: Tensor, antiquant_offset: Tensor, bias: Tensor | None
) -> Tensor:
    out = x @ ((weight.float() + antiquant_offset.float()) * antiquant_scale.float())
    return out if bias is None else out + bias


def moe_gating_top_k(
    x: Tensor, *, k: int, k_group: int, group_count: int, group_select_mode: int, renorm: int, norm_type: int,
    routed_scaling_factor: float, eps: float, bias_opt: Tensor | None = None, **_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x [T, E] → weights and ids [T, k]; groups are ranked by the sum of their two best experts (mode 1)."""
    bias = bias_opt
    assert group_select_mode == 1
    scores = x.float().softmax(-1) if norm_type == 0 else x.float().sigmoid()
    ranked = scores if bias is None else scores + bias.float()
    if group_count > 1:
        groups = ranked.unflatten(-1, (group_count, -1))
        best = groups.topk(2, -1).values.sum(-1).topk(k_group, -1).indices
        taken = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, True)
        ranked = groups.masked_fill(~taken[..., None], float("-inf")).flatten(-2)
    ids = ranked.topk(k, -1).indices
    weights = scores.gather(-1, ids)
    if norm_type == 1 or renorm:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    return weights * routed_scaling_factor, ids.to(torch.int32), scores


class Experts:
    """Stands for the exchange between chips and the grouped products of `quant_apply_mlp`.

    As there, experts are SwiGLU whatever the model says.
    """

    def fused_experts(self, fused_experts_input: Any) -> Tensor:
        given = fused_experts_input
        assert not given.routing.apply_router_weight_on_input
        w1, s1, w2, s2 = (
            w[0] if isinstance(w, list) else w
            for w in (given.weights.w1, given.weights.w1_scale, given.weights.w2, given.weights.w2_scale)
        )

        def expert(x: Tensor, e: int) -> Tensor:
            gate, up = _multiply(x, w1[e], s1[e]).chunk(2, -1)
            return _multiply(nn.functional.silu(gate) * up, w2[e], s2[e])

        return mixture(given.hidden_states, given.topk_weights, given.topk_ids, expert)


def _multiply(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    if scale.dtype is torch.uint8:
        codes, tokens = npu_dynamic_mx_quant(x, weight.dtype)
        return npu_quant_matmul(codes, weight, scale, pertoken_scale=tokens, group_sizes=[1, 1, 32])
    codes, tokens = npu_dynamic_quant(x, weight.dtype)
    return npu_quant_matmul(codes, weight, scale, pertoken_scale=tokens)


OPERATORS = (
    npu_dynamic_quant, npu_dynamic_mx_quant, npu_quantize, npu_quant_matmul, npu_weight_quant_batchmatmul,
)  # fmt: skip


def install(torch_npu: Any) -> None:
    """Put them into the stub of `torch_npu`."""
    for operator in OPERATORS:
        setattr(torch_npu, operator.__name__, operator)
    torch_npu.npu.is_available = lambda: False
    torch_npu.npu_format_cast = lambda x, *_, **__: x
    # `Experts` stands for what is looked for by this name.
    torch_npu.npu_grouped_matmul_swiglu_quant_v2 = None
    torch_npu.float8_e8m0fnu = torch.float8_e8m0fnu
    torch.npu = torch_npu.npu  # type: ignore[attr-defined]
