"""Float activations × 8-bit weights, decoded inside the kernel: no second copy of the weight.

Codes become the activations' dtype exactly (int8 and e4m3fn fit fp16 and bf16), the product
runs on the 16-bit matrix units, and scales are applied to float32 sums. So a block-FP8
checkpoint runs unconverted where there is no fp8 at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import (
    FLOATS,
    FP8,
    check_device,
    check_dtype,
    check_matrices,
    check_shape,
    contiguous_rows,
    dtype_name,
    require,
    rows_aligned,
)
from .inner import conversion, launch_inner, weight_scale_modes
from .launch import choose_launch
from .targets import device_target
from .tuned_tables import LaunchParameters


def matmul_weight_only(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor,
    *,
    bias: Tensor | None = None,
    block_shape: tuple[int, int] | None = None,
    out_dtype: torch.dtype | None = None,
    launch: LaunchParameters | None = None,
) -> Tensor:
    """[M, N] = x · (w · w_scale)ᵀ + bias, rounded to `out_dtype` (default: the dtype of x).

    x: float16, bfloat16 or float32 [M, K]. w: int8 or fp8 [N, K] as stored, or uint8 [N, K] that
    holds q + 128 (compressed-tensors pack-quantized: `weight_packed.view(torch.uint8)`).
    w_scale float32; its shape follows block_shape: None: per channel [N, 1] or per tensor [1];
    (1, g): per group [N, ⌈K/g⌉]; (r, c): per block [⌈N/r⌉, ⌈K/c⌉]; g and c multiples of 32; these also
    E8M0 as uint8.

    Sums are float32. float32 activations are split into three bfloat16 summands, which keeps
    24 bits. fp8 NaN codes give NaN. On targets without fp8 its bytes are decoded with integer
    operations. Deterministic; M = 0 and K = 0 launch nothing. Raises ValueError as `matmul` does.
    """
    m, n, k = check_matrices(x, w)
    check_dtype("activations", x, FLOATS)
    check_dtype("the weight", w, (torch.int8, torch.uint8, *FP8))
    out_dtype = x.dtype if out_dtype is None else out_dtype
    require(out_dtype in FLOATS, f"expected out_dtype float16, bfloat16 or float32, found {out_dtype}")
    check_device(x, w_scale=w_scale, bias=bias)
    modes = weight_scale_modes(w_scale, n, k, block_shape)
    if bias is not None:
        check_dtype("bias", bias, FLOATS)
        check_shape("bias", bias, (n,))
        bias = bias.contiguous()
    out = torch.empty((m, n), dtype=out_dtype, device=x.device)
    if m == 0 or n == 0:
        return out
    if k == 0:
        return out.zero_() if bias is None else out.copy_(bias)
    x, target = contiguous_rows(x), device_target(x.device)
    if launch is None:
        launch = choose_launch(
            "matmul_weight_only", m=m, n=n, k=k, a_dtype=dtype_name(x.dtype), w_dtype=dtype_name(w.dtype),
            target=target, group_n=modes.group_n, group_k=modes.group_k,
            aligned=rows_aligned(x, w, target=target),
        )  # fmt: skip
    codes, decode, convert = conversion(w, x.dtype, target)
    return launch_inner(
        x, codes, None, w_scale if modes.groups else w_scale.contiguous(), bias, out, modes,
        a_decode=0, w_decode=decode, convert=convert, launch=launch, target=target,
    )  # fmt: skip
