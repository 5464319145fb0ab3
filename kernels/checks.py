"""What the kernels' Python functions ask of their arguments, and the errors where it is not so."""

from __future__ import annotations

import torch
from torch import Tensor

from .targets import Target

FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
CODES = (torch.int8, *FP8)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)

_NAMES = {
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.float8_e4m3fn: "e4m3fn",
    torch.float8_e4m3fnuz: "e4m3fnuz",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
}

# Σ of K products of two int8 codes must fit int32: 128 · 128 · K < 2³¹; with a zero point
# the activation's distance from it reaches 255.
MAX_K_INT8 = 131_071
MAX_K_INT8_ZERO_POINT = 65_793


# Offsets inside a tile of 256 rows are int32.
MAX_ROW_STRIDE = 2**23


def dtype_name(dtype: torch.dtype) -> str:
    """`int8`, `e4m3fn`, `bfloat16`: the names that launch tables use."""
    return _NAMES.get(dtype, str(dtype).removeprefix("torch."))


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition`."""
    if not condition:
        raise ValueError(message)


def check_refusal(reason: str | None) -> None:
    """Raise ValueError(reason) where a kernel's `refusal` gives one."""
    if reason is not None:
        raise ValueError(reason)


def check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        raise ValueError(
            f"expected {name} of dtype {' or '.join(dtype_name(d) for d in allowed)}, "
            f"found {dtype_name(tensor.dtype)}"
        )


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"expected {name} of shape {list(shape)}, found {list(tensor.shape)}")


def check_matrices(a: Tensor, w: Tensor) -> tuple[int, int, int]:
    """(M, N, K) of activations [M, K] and a weight [N, K] as stored, on one device."""
    require(
        a.dim() == 2, f"expected activations [M, K], found {list(a.shape)}; flatten the leading dimensions"
    )
    require(w.dim() == 2, f"expected a weight [N, K], found {list(w.shape)}")
    require(
        a.shape[1] == w.shape[1],
        f"expected the same K, found activations {list(a.shape)} and weight {list(w.shape)} "
        "(weights are [out_features, in_features], not transposed)",
    )
    check_weight_rows(w)
    check_device(a, w=w)
    return a.shape[0], w.shape[0], a.shape[1]


def check_weight_rows(w: Tensor) -> None:
    require(
        w.stride(-1) == 1 or w.shape[-1] <= 1,
        f"expected a weight with contiguous rows, found strides {list(w.stride())}; "
        "pass it as stored, [N, K], and not as a transposed view",
    )
    require(
        w.stride(-2) <= MAX_ROW_STRIDE,
        f"expected a weight whose rows are at most {MAX_ROW_STRIDE} elements apart, found {w.stride(-2)}",
    )


def check_device(a: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != a.device:
            raise ValueError(f"expected {name} on {a.device} like the activations, found {tensor.device}")


def contiguous_rows(a: Tensor) -> Tensor:
    """`a` itself where its last dimension is contiguous (rows may be strided), else a copy."""
    plain = (a.stride(-1) == 1 or a.shape[-1] <= 1) and a.stride(0) <= MAX_ROW_STRIDE
    return a if plain else a.contiguous()


def rows_aligned(*tensors: Tensor, target: Target | None = None) -> bool:
    """True where every row of every tensor starts at a multiple of 16 bytes.

    target: the one that Triton compiles for. Where it copies tiles, rows and the distances between them must be
    multiples of 16 elements too: of an integer Triton knows no more than whether 16 divides it.
    """
    known = target is not None and target.copies_tiles
    for t in tensors:
        steps = t.stride()[:-1]
        multiples = (t.shape[-1], *steps) if known else [s * t.element_size() for s in steps]
        if t.data_ptr() % 16 or any(i % 16 for i in multiples):
            return False
    return True


def row_scale(name: str, scale: Tensor, rows: int) -> tuple[Tensor, int]:
    """A float32 scale [rows, 1], [rows], [1] or [] → (contiguous, scale mode of tile.py)."""
    check_dtype(name, scale, (torch.float32,))
    # [1, 1] of one row is that row's: read as the others are, it needs no compilation of its own.
    if scale.numel() == 1 and tuple(scale.shape) != (rows, 1):
        return scale, 1
    if tuple(scale.shape) not in ((rows, 1), (rows,)):
        raise ValueError(f"expected {name} of shape [{rows}, 1] or [1], found {list(scale.shape)}")
    return scale.contiguous(), 2
