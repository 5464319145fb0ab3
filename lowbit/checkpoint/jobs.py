"""Jobs: the independent pieces of work that a plan is made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

from lowbit.checkpoint.headers import ITEM_BYTES, TensorRef
from lowbit.checkpoint.layout import OutTensor
from lowbit.dtypes import DType
from lowbit.formats import StoredModule
from lowbit.formats.format import Content
from lowbit.granularity import block_shape
from lowbit.scheme import TensorSpec


@dataclass(frozen=True, kw_only=True)
class Source:
    """A weight to be read: where, and what scales it."""

    ref: TensorRef
    packed: bool = False
    """int8 codes + 128, four to an int32, or int4 codes + 8, eight to one."""
    codes: DType | None = None
    """None: float numbers."""
    paired: bool = False
    """Codes of 4 bits of which two rows lie in one, in place of two columns; the first in the lower halves."""
    shape: TensorRef | None = None
    """[N, K] of a packed weight."""
    scale: TensorRef | None = None
    block: tuple[int, int] = (1, 1)
    """Rows and columns of the weight per source scale."""
    divisor: TensorRef | None = None
    """One number that `scale` is divided by: where activation and weight scale are stored multiplied."""
    global_scale: TensorRef | None = None
    """One number that every value is multiplied by once its scale is: ModelOpt's of NVFP4."""
    global_divisor: TensorRef | None = None
    """One that it is divided by: compressed-tensors'."""
    offset: TensorRef | None = None
    """Zero points of the weight, which must all be 0."""
    hidden_bias: tuple[TensorRef, TensorRef] | None = None
    """`quant_bias` and the activations' zero point of a module that has no other bias: together they must say none."""

    @classmethod
    def of(cls, module: StoredModule, tensors: Mapping[str, TensorRef]) -> Source:
        """The weight of a quantized module of a checkpoint."""
        names, ref, scale = module.names, tensors[module.weight], tensors[module.scale]
        if module.stacked:
            ref, scale = ref.below, scale.below
        hidden = None
        if "quant_bias" in names and module.weight.removesuffix(".weight") + ".bias" not in tensors:
            hidden = (tensors[names["quant_bias"]], tensors[names["input_zero_point"]])
        return cls(
            ref=ref,
            packed="packed" in names,
            codes=module.spec.dtype,
            shape=tensors.get(names["shape"]) if "shape" in names else None,
            scale=scale,
            block=block_shape(module.shape, module.spec.granularity),
            divisor=tensors[names["input_scale"]] if "scale" not in names else None,
            global_scale=tensors[names["global_scale"]] if "global_scale" in names else None,
            global_divisor=tensors[names["global_divisor"]] if "global_divisor" in names else None,
            offset=tensors[names["offset"]] if "offset" in names else None,
            hidden_bias=hidden,
        )

    @property
    def unpacked(self) -> tuple[int, ...]:
        """The weight's shape, as far as `ref` says: what is packed has room for so much."""
        if self.codes is None or not self.ref.shape:
            return self.ref.shape
        if self.paired:
            return 2 * self.ref.shape[0], self.ref.shape[1]
        *rows, items = self.ref.shape
        return *rows, items * (8 * ITEM_BYTES[self.ref.dtype] // self.codes.bits)

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        numbers = (self.divisor, self.global_scale, self.global_divisor)
        known = (self.ref, self.scale, self.shape, *numbers, self.offset, *(self.hidden_bias or ()))
        return tuple(r for r in known if r is not None)


@dataclass(frozen=True, kw_only=True)
class StaticInput:
    """What `deq_scale` and `quant_bias` depend on beside codes and scales of a weight."""

    scale: TensorRef
    """One number, float."""
    zero_point: TensorRef | None
    """One number, int8 or float; None: 0."""
    bias: TensorRef | None
    """[N] in float."""

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        return tuple(r for r in (self.scale, self.zero_point, self.bias) if r is not None)


@dataclass(frozen=True, kw_only=True)
class Job:
    """An independent piece of work: one module's weight, or one tensor carried along.

    `copy`: bytes as they are. `cast`: to another float dtype, dequantizing where there is a
    source scale. `turn`: that, of all experts of a layer [E, N, K], each of them transposed.
    `quantize`: codes and scales. `repack`: int8 codes into int32, or out of it. `scale`: a source's
    scales in float32, or one number in float32 or int8. `constant`: bytes known now.
    """

    kind: Literal["copy", "cast", "turn", "quantize", "repack", "scale", "constant"]
    shape: tuple[int, ...]
    """Of the weight, unpacked."""
    source: Source | None
    outputs: Mapping[Content, OutTensor]
    spec: TensorSpec | None = None
    given_scale: TensorRef | None = None
    """Weight scales that a calibration chose, or that codes come with."""
    joined: tuple[tuple[Source, tuple[int, ...]], ...] = ()
    """Weights [N, K] that share one scale per tensor with this one, and their shapes."""
    static: StaticInput | None = None
    """For `deq_scale` and `quant_bias` among the outputs."""
    data: bytes = b""

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """All that it reads of the source."""
        found = self.source.refs if self.source else ()
        joined = tuple(r for source, _ in self.joined for r in source.refs)
        return found + joined + (self.static.refs if self.static else ())

    @property
    def source_bytes(self) -> int:
        return sum(r.nbytes for r in self.source.refs) if self.source else 0

    @property
    def name(self) -> str:
        return next(iter(self.outputs.values())).name


def files_of(jobs: Iterable[Job]) -> set[Path]:
    """The source's files that jobs read."""
    return {ref.file for job in jobs for ref in job.refs}


def shard_of(job: Job) -> int:
    """The output file that a job writes to: what belongs to one module is in one."""
    return next(iter(job.outputs.values())).shard


_EXPONENTS = {"F8_E8M0", "U8"}
"""Two names for bytes of biased exponents."""


def jobs_as_they_are(
    source: Source, outputs: Mapping[Content, OutTensor], static: StaticInput | None
) -> list[Job]:
    """Codes and scales that exist already; what is derived from both is made while the codes pass."""
    scale = source.scale
    assert scale is not None
    codes: dict[Content, OutTensor] = {c: o for c, o in outputs.items() if c != "scale"}
    there = source if static else replace(source, scale=None, divisor=None, offset=None)
    weight = Job(
        kind="copy" if ("packed" in outputs) == source.packed else "repack",
        shape=source.unpacked, source=there, outputs=codes, static=static,
    )  # fmt: skip
    if "scale" not in outputs:
        return [weight]
    out: dict[Content, OutTensor] = {"scale": outputs["scale"]}
    same = scale.dtype == outputs["scale"].dtype or {scale.dtype, outputs["scale"].dtype} == _EXPONENTS
    if same and source.divisor is None and source.offset is None:
        return [weight, job_of("copy", scale, out)]
    known = Source(ref=scale, divisor=source.divisor, offset=source.offset)
    return [weight, Job(kind="scale", shape=scale.shape, source=known, outputs=out)]


def job_of(
    kind: Literal["copy", "cast", "scale"], ref: TensorRef, outputs: Mapping[Content, OutTensor]
) -> Job:
    """From one tensor alone, all of it."""
    return Job(kind=kind, shape=ref.shape, source=Source(ref=ref), outputs=outputs)


@cache
def zeros(count: int) -> bytes:
    """One object for all constants of a size: there are as many as modules."""
    return bytes(count)


def constant_job(content: Content, out: OutTensor, data: bytes) -> Job:
    """Bytes that are known while planning."""
    return Job(kind="constant", shape=out.shape, source=None, outputs={content: out}, data=data)
