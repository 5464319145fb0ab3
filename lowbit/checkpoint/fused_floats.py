"""Experts that a source has quantized in 3-D and that stay in float: how their parameter is written."""

from __future__ import annotations

from lowbit.checkpoint.fused_experts import OF_ALL, OF_CODES, SCALE, scale_block, unpacked
from lowbit.checkpoint.headers import Checkpoint, TensorRef
from lowbit.checkpoint.jobs import Job, Source
from lowbit.checkpoint.layout import OutTensor, out_like
from lowbit.dtypes import E2M1
from lowbit.errors import InputError
from lowbit.formats import StoredModule, quantization_of


def fused_in_float(ref: TensorRef, source: Checkpoint, dtype: str) -> Job | None:
    """All experts of the 3-D tensor `ref` in `dtype`, one tall matrix as it lies; None for one that is not quantized.

    InputError for blocks that lie over two experts.
    """
    if (scale := source.tensors.get(ref.name + SCALE)) is not None:
        block = scale_block(quantization_of(source.config).get("weight_block_size"))
        return _blocks(ref, scale, block, dtype)
    if (scale := source.tensors.get(ref.name + OF_CODES)) is not None:
        return _of_modelopt(ref, scale, source.tensors.get(ref.name + OF_ALL), dtype)
    return None


def _blocks(ref: TensorRef, scale: TensorRef, block: tuple[int, int], dtype: str) -> Job:
    if ref.shape[1] % block[0]:
        raise InputError(
            f"{ref.name}: expected experts of a multiple of {block[0]} rows to dequantize, found {list(ref.shape)}; "
            "quantize its experts instead of leaving them in float"
        )
    source = Source(ref=ref.below, scale=scale.below, block=block)
    return Job(kind="cast", shape=ref.below.shape, source=source, outputs={"codes": out_like(ref, dtype)})


def _of_modelopt(ref: TensorRef, scale: TensorRef, number: TensorRef | None, dtype: str) -> Job:
    """FP8 with one scale, or NVFP4 [E, K / 2, N] with scales [E, K / 16, N] and a number for all."""
    experts, rows, cols = shape = unpacked(ref)
    if ref.dtype == "U8":
        block = (rows // scale.shape[1], 1)
        source = Source(
            ref=ref.below, codes=E2M1, paired=True, scale=scale.below, block=block, global_scale=number
        )
    else:
        source = Source(ref=ref.below, scale=scale, block=(experts * rows, cols))
    out = OutTensor(ref.name, dtype, shape)
    return Job(kind="cast", shape=(experts * rows, cols), source=source, outputs={"codes": out})


def stacked_in_float(module: str, stored: StoredModule, source: Source, dtype: str) -> Job:
    """The experts [E, N, K] of gpt-oss, of which float has [E, K, N]."""
    experts, rows, cols = stored.shape
    out = OutTensor(module, dtype, (experts, cols, rows))
    return Job(kind="turn", shape=stored.shape, source=source, outputs={"codes": out})
