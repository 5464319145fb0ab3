"""SGLang's kernels in plain arithmetic: what its scripts for GPUs document, in integers and float32 on a CPU.

Each replaces one function of SGLang's by its name, arguments and results. Integer products are exact; sums of FP8
products are float32's. Sources: `kernels/ops/quantization`, `kernels/ops/gemm`, `kernels/jit/csrc` and
`layers/moe/moe_runner` of SGLang 0.5.23.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from engine_stubs import dequantize, gated_delta_rule, mixture  # beside this file
from sglang.kernels.ops.attention.triton_gdn_fused_proj import qwen3_5_gdn_prefill_projection_views
from torch import Tensor, nn

ACTIVATIONS = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": functools.partial(nn.functional.gelu, approximate="tanh"),
}
FP8 = torch.float8_e4m3fn


def per_token_quant_int8(x: Tensor, scale_dtype: torch.dtype = torch.float32, cal_sum: bool = False) -> Any:
    """Rounds halves away from zero, as CUDA's `round`."""
    assert not cal_sum
    absmax = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-10)
    scaled = x.float() * (127 / absmax)
    return (scaled + 0.5 * scaled.sign()).trunc().to(torch.int8), (absmax / 127).to(scale_dtype)


def int8_scaled_mm(
    x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, out_dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """x [M, K], w [K, N] codes; the sums of integers below 2^53 are exact in float64."""
    out = (x.double() @ w.double()).float() * x_scale.view(-1, 1) * w_scale.view(1, -1)
    return (out if bias is None else out + bias).to(out_dtype)


def _groups(x: Tensor, size: int) -> Tensor:
    return x.float().unflatten(-1, (-1, size))


def per_token_group_quant_int8(
    x: Tensor, group_size: int, eps: float = 1e-10, **_: Any
) -> tuple[Tensor, Tensor]:
    """Cuts toward zero: SGLang casts to int8 without rounding."""
    groups = _groups(x, group_size)
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=eps) / 127
    codes = (groups / scale).clamp(-128, 127).trunc().to(torch.int8)
    return codes.flatten(-2), scale.squeeze(-1)


def per_token_group_quant_fp8(
    x: Tensor, group_size: int, eps: float = 1e-10, **_: Any
) -> tuple[Tensor, Tensor]:
    groups = _groups(x, group_size)
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=eps) / 448
    return (groups / scale).clamp(-448, 448).to(FP8).flatten(-2), scale.squeeze(-1)


def block_matmul(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    block_size: list[int],
    output_dtype: torch.dtype,
    **_: Any,
) -> Tensor:
    """x [M, K] in groups of K, w [N, K] in blocks: codes times scales, float32."""
    wide = x_scale.repeat_interleave(block_size[1], -1)[:, : x.shape[1]]
    return ((x.float() * wide) @ dequantize(w, w_scale, [w.shape[0]]).T).to(output_dtype)


def scaled_fp8_quant(
    input: Tensor, scale: Tensor | None = None, num_token_padding: int | None = None,
    use_per_token_if_dynamic: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x = input.float()
    if scale is None:
        absmax = x.abs().amax(-1, keepdim=True) if use_per_token_if_dynamic else x.abs().amax().view(1)
        scale = absmax.clamp(min=1e-10) / 448
    return (x / scale).clamp(-448, 448).to(FP8), scale


def fp8_scaled_mm(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """x [M, K], w [K, N]; scales one each, or one for every row of x and every column of w."""
    out = (x.float() @ w.float()) * x_scale.view(-1, 1) * w_scale.view(1, -1)
    return (out if bias is None else out + bias).to(out_dtype)


def fused_experts(
    hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_output: Any, moe_runner_config: Any, **info: Any
) -> Tensor:
    """The Triton mixture: activations quantized before each of the two products, as its quantization info says."""
    config = moe_runner_config
    assert config.is_gated and info.get("a1_q") is None
    assert info.get("b1") is None
    weights, ids, _ = topk_output
    if config.apply_router_weight_on_input:
        # SGLang's kernel multiplies the first sums instead; the codes of a row do not change with its size.
        assert weights.shape[1] == 1
        hidden_states, weights = hidden_states * weights, torch.ones_like(weights)

    def product(x: Tensor, w: Tensor, scale: Tensor, static: Tensor | None) -> Tensor:
        if not (info["use_int8_w8a8"] or info["use_fp8_w8a8"]):
            return x @ w.T
        if block := info["block_shape"]:
            quantize = per_token_group_quant_int8 if info["use_int8_w8a8"] else per_token_group_quant_fp8
            codes, x_scale = quantize(x, block[1])
            return block_matmul(codes, w, x_scale, scale, block, torch.float32)
        if info["use_int8_w8a8"]:
            return int8_scaled_mm(*_codes(per_token_quant_int8(x), w.T, scale), torch.float32)
        quantized = scaled_fp8_quant(x, static, use_per_token_if_dynamic=info["per_channel_quant"])
        return fp8_scaled_mm(*_codes(quantized, w.T, scale), torch.float32)

    def expert(x: Tensor, e: int) -> Tensor:
        gate, up = product(x, w1[e], _of(info["w1_scale"], e), info["a1_scale"]).chunk(2, -1)
        return product(
            ACTIVATIONS[config.activation](gate) * up, w2[e], _of(info["w2_scale"], e), info["a2_scale"]
        )

    # routed_scaling_factor: SGLang's models multiply by it themselves where they do not run on CUDA.
    return mixture(hidden_states, weights, ids, expert)


def fused_gate_sigmoid_mul_add(x: Tensor, gate: Tensor, shared: Tensor, routed: Tensor) -> None:
    routed += torch.sigmoid(x @ gate).unsqueeze(-1) * shared


def fused_sigmoid_mul(x: Tensor, gate: Tensor, inplace: bool = False) -> Tensor:
    return x * torch.sigmoid(gate.reshape(x.shape))


def gated_delta(self: Any, forward_batch: Any, mixed_qkv: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`RadixLinearAttention` of one sequence → [1, T, heads of v, ·]."""
    return gated_delta_rule(
        mixed_qkv,
        a,
        b,
        self.conv_weights,
        self.bias,
        self.A_log,
        self.dt_bias,
        (self.num_k_heads, self.head_k_dim),
    ).unsqueeze(0)


def gated_norm(x: Tensor, weight: Tensor, bias: None, z: Tensor, eps: float, **_: Any) -> Tensor:
    """RMSNorm, then a SiLU gate."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight * nn.functional.silu(z)


def _of(scale: Tensor | None, e: int) -> Any:
    return None if scale is None else scale[e]


def _codes(
    quantized: tuple[Tensor, Tensor], w: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return quantized[0], w, quantized[1], scale


OURS = {
    "per_token_quant_int8": per_token_quant_int8,
    "int8_scaled_mm": int8_scaled_mm,
    "per_token_group_quant_int8": per_token_group_quant_int8,
    "w8a8_block_int8_matmul": block_matmul,
    "scaled_fp8_quant": scaled_fp8_quant,
    "fp8_scaled_mm": fp8_scaled_mm,
    "per_token_group_quant_fp8": per_token_group_quant_fp8,
    "w8a8_block_fp8_matmul_triton": block_matmul,
    "fused_experts": fused_experts,
    "fused_gate_sigmoid_mul_add": fused_gate_sigmoid_mul_add,
    "fused_sigmoid_mul": fused_sigmoid_mul,
    "fused_qkvzba_split_reshape_cat_contiguous": qwen3_5_gdn_prefill_projection_views,
    "layernorm_fn": gated_norm,
}


def replace() -> None:
    """Wherever SGLang's modules hold one of these functions by its name, let them hold ours."""
    for name, module in list(sys.modules.items()):
        if name.startswith("sglang."):
            for function, ours in OURS.items():
                if function in vars(module):
                    setattr(module, function, ours)
