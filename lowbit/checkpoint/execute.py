"""Carry out one job: read row blocks, convert them, write them at their offsets, hash on the way.

Nothing here holds more than one row block, whatever the size of the tensor.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash

from lowbit.checkpoint import rows as loops
from lowbit.checkpoint.decode import (
    NO_SCALE,
    ONE,
    Scales,
    check_shape,
    overflowed,
    read_number,
    read_scale,
    source_kind,
    to_float,
    unfit_value,
    whole_number,
)
from lowbit.checkpoint.headers import TensorRef
from lowbit.checkpoint.jobs import Job, Source
from lowbit.checkpoint.layout import OutTensor
from lowbit.checkpoint.reading import COPY_BYTES, TransposedRows, finite, read_bytes, read_exactly
from lowbit.checkpoint.static import RowSums, require_no_bias, static_tensors
from lowbit.checkpoint.turned import turned
from lowbit.errors import InputError
from lowbit.granularity import PerTensor, block_shape, scale_shape

# Large enough that system calls cost nothing, small enough to stay in the second-level cache
# together with the codes.
BLOCK_BYTES = 1 << 20
# Of what is copied, so much is hashed and then looked at: from the second-level cache, not from memory again.
_LOOK_BYTES = 256 << 10
# Ask for write-back this often, so that the final fsync finds little left to do.
FLUSH_BYTES = 32 << 20

_PLAIN_OUT = {"BF16": loops.TO_BF16, "F16": loops.TO_F16, "F32": loops.TO_F32}

Progress = Callable[[int], None]
"""Called with the number of source bytes just done, from any thread."""


class Cancelled(Exception):
    """Another job failed; this one stopped early."""


class Worker:
    """Runs jobs, one at a time, with buffers of its own. One per thread."""

    def __init__(
        self,
        outputs: Mapping[int, int],
        *,
        progress: Progress = lambda count: None,
        not_finite: Callable[[str], None] = lambda name: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """`outputs`: number of an output shard → its file descriptor. `not_finite` is told of tensors that were
        copied with NaN or Inf in them."""
        self._outputs = outputs
        self._progress, self._not_finite_in, self._cancelled = progress, not_finite, cancelled
        self._inputs: dict[Path, int] = {}
        self._buffers: dict[str, np.ndarray] = {}
        self._transposed = TransposedRows()
        self._unflushed = 0

    def close(self) -> None:
        for fd in self._inputs.values():
            os.close(fd)
        self._inputs.clear()

    def run(self, job: Job) -> dict[str, str]:
        """Do the job; output tensor name → xxh3-128 of its bytes, as hex."""
        if job.kind == "constant":
            (out,) = job.outputs.values()
            self._write(out, 0, np.frombuffer(job.data, np.uint8))
            return {out.name: xxhash.xxh3_128_hexdigest(job.data)}
        if job.kind in ("copy", "repack"):
            return self._copy(job)
        if job.kind == "scale":
            return self._scale(job)
        if job.kind == "turn":
            return self._turn(job)
        if job.kind == "cast" and job.source is not None and job.source.scale is None:
            return self._cast(job)
        return self._convert(job)

    def _copy(self, job: Job) -> dict[str, str]:
        assert job.source is not None
        ref, (content, out) = job.source.ref, next(iter(job.outputs.items()))
        assert ref.nbytes == out.nbytes, out
        check_shape(job.source, job.shape)
        dtype = "F8_E8M0" if content == "scale" and ref.dtype == "U8" else ref.dtype
        summed = job.static is not None or job.source.hidden_bias is not None
        digest, sums, looks_finite = xxhash.xxh3_128(), RowSums(job.shape, wanted=summed), True
        step = COPY_BYTES
        if ref.pitch:  # whole rows only
            row_bytes = ref.nbytes // ref.shape[0]
            step = max(COPY_BYTES // row_bytes, 1) * row_bytes
        for start in range(0, ref.nbytes, step):
            part = self._read(ref, start, min(step, ref.nbytes - start))
            if job.kind == "repack":
                part ^= 0x80  # packed codes are those + 128, in the same order
            for at in range(0, part.size, _LOOK_BYTES):
                look = part[at : at + _LOOK_BYTES]
                digest.update(look.data)
                looks_finite = looks_finite and finite(look, dtype)
            sums.add(part)
            self._write(out, start, part)
            self._progress(part.size)
        if not looks_finite:
            self._not_finite_in(out.name)
        _require_no_hidden_bias(job.source, sums)
        done = {out.name: digest.hexdigest()}
        if job.static is not None:
            done |= self._write_static(job, sums, read_scale(job.source))
        self._progress(sum(r.nbytes for r in job.source.refs[1:]))
        return done

    def _scale(self, job: Job) -> dict[str, str]:
        """Scales in float32 or as exponents; zero points between float32 and int8."""
        assert job.source is not None
        source, (out,) = job.source, job.outputs.values()
        if out.dtype == "I8":
            done = self._write_whole(out, np.array([whole_number(source.ref)], np.int8))
        elif out.dtype == "U8":
            scales = read_scale(replace(source, scale=source.ref))
            bits = scales.view(np.uint32)
            if not (((bits & 0x807FFFFF == 0) & (bits != 0)) | (bits == 1 << 22)).all():  # 2⁻¹²⁷ is subnormal
                raise InputError(
                    f"{source.ref.name}: expected scales that are powers of two, as config.json says, found others; "
                    "the two do not belong together: fetch the checkpoint again"
                )
            done = self._write_whole(out, _as_stored(out, scales))
        else:
            done = self._write_whole(out, read_scale(replace(source, scale=source.ref)).reshape(-1))
        self._progress(sum(r.nbytes for r in source.refs))
        return done

    def _cast(self, job: Job) -> dict[str, str]:
        """One float dtype to another; the shape does not matter."""
        assert job.source is not None
        ref, (out,) = job.source.ref, job.outputs.values()
        kind, out_kind = loops.SOURCE_KINDS[ref.dtype], _PLAIN_OUT[out.dtype]
        item, out_item = loops.source_bytes(kind, 1), loops.OUTPUT_BYTES[out_kind]
        step = BLOCK_BYTES // item
        digest = xxhash.xxh3_128()
        for start in range(0, ref.elements, step):
            count = min(step, ref.elements - start)
            part = self._read(ref, start * item, count * item)
            codes = self._buffer("codes", count * out_item)
            bad = loops.convert_rows(
                part, kind, 1, count, NO_SCALE, 1, 1, 0, codes, out_kind, count,
                self._floats("scales", 1).reshape(1, 1), 1, count, False, False, self._floats("values", count),
                ONE, ONE,
            )  # fmt: skip
            if bad >= 0 or overflowed(codes, out.dtype):
                raise unfit_value(
                    job.source, job.shape, part, kind, first=start, count=count, out_dtype=out.dtype
                )
            digest.update(codes.data)
            self._write(out, start * out_item, codes)
            self._progress(part.size)
        return {out.name: digest.hexdigest()}

    def _turn(self, job: Job) -> dict[str, str]:
        """All experts of a layer, one after the other."""
        (out,), source = job.outputs.values(), job.source
        assert source is not None and len(job.shape) == 3
        digest, at = xxhash.xxh3_128(), 0
        for part, count in turned(source, job.shape, out.dtype, _PLAIN_OUT[out.dtype], self._read):
            digest.update(part.data)
            self._write(out, at, part)
            at += part.size
            self._progress(count)
        assert at == out.nbytes, out
        self._progress(sum(r.nbytes for r in source.refs[1:]))
        return {out.name: digest.hexdigest()}

    def _convert(self, job: Job) -> dict[str, str]:
        """A matrix, row block after row block."""
        source = job.source
        assert source is not None and len(job.shape) == 2
        rows, cols = job.shape
        kind = source_kind(source)
        out = next(o for c, o in job.outputs.items() if c in ("codes", "packed"))
        out_kind = _out_kind(job, out)
        out_cols = -(-cols // 4) * 4 if out_kind == loops.TO_INT8_PACKED else cols
        check_shape(source, job.shape)
        source_scales = Scales(source)
        one_scale = job.spec is None or isinstance(job.spec.granularity, PerTensor)
        # One scale for all is a scale per row that is known by now.
        tile_rows, tile_cols = (1, max(cols, 1))
        if job.spec is not None and not one_scale:
            tile_rows, tile_cols = block_shape(job.shape, job.spec.granularity)
        scales, given = self._scales_for(job)
        power_of_2 = job.spec is not None and job.spec.scale != "float32"

        digest, sums = xxhash.xxh3_128(), RowSums(job.shape, wanted=job.static is not None)
        scale_out, scale_digest, scale_at = job.outputs.get("scale"), xxhash.xxh3_128(), 0
        kept: list[np.ndarray] = []
        theirs = RowSums(job.shape, wanted=source.hidden_bias is not None)
        row_bytes, out_row = loops.source_bytes(kind, cols), out_cols * loops.OUTPUT_BYTES[out_kind]
        step = self._rows_per_block(row_bytes, 2 if source.paired else tile_rows)
        values = self._floats("values", max(cols, 1) if tile_rows == 1 else tile_rows * tile_cols)
        for row in range(0, rows, step):
            count = min(step, rows - row)
            if source.paired:
                part = self._buffer("unpaired", count * cols)
                loops.unpair(self._read(source.ref, row // 2 * cols, count // 2 * cols), cols, part)
            else:
                part = self._read(source.ref, row * row_bytes, count * row_bytes)
            codes = self._buffer("codes", count * out_row)
            if out_cols != cols:
                codes[:] = 0
            if one_scale:
                part_scales = np.repeat(scales, count, axis=0)
            elif given:
                part_scales = scales[row // tile_rows :]
            else:
                part_scales = np.ones((-(-count // tile_rows), scales.shape[1]), np.float32)
            source_scale, row0 = source_scales.at(row, count)
            bad = loops.convert_rows(
                part, kind, count, cols, source_scale, *source.block, row0, codes, out_kind, out_cols,
                part_scales, tile_rows, tile_cols, given, power_of_2, values, *source_scales.of_all,
            )  # fmt: skip
            if bad >= 0 or overflowed(codes, out.dtype):
                raise unfit_value(
                    source, job.shape, part, kind, first=row * cols, count=count * cols, scales=source_scales,
                    out_dtype=out.dtype,
                )  # fmt: skip
            digest.update(codes.data)
            sums.add(codes)
            theirs.add(part)
            self._write(out, row * out_row, codes)
            if scale_out is not None and not given:
                stored = _as_stored(scale_out, part_scales)
                scale_digest.update(stored.data)
                self._write(scale_out, scale_at, stored)
                scale_at += stored.size
            if job.static is not None and not given:  # a scale per channel
                kept.append(part_scales)
            self._progress(part.size // 2 if source.paired else part.size)
        _require_no_hidden_bias(source, theirs)
        done = {out.name: digest.hexdigest()}
        if scale_out is not None and given:
            done |= self._write_whole(scale_out, _as_stored(scale_out, scales))
        elif scale_out is not None:
            assert scale_at == scale_out.nbytes, scale_out
            done[scale_out.name] = scale_digest.hexdigest()
        if job.static is not None:
            done |= self._write_static(job, sums, np.concatenate(kept) if kept else scales)
        self._progress(sum(r.nbytes for r in source.refs[1:]))
        return done

    def _write_static(self, job: Job, sums: RowSums, scales: np.ndarray) -> dict[str, str]:
        """`deq_scale` and `quant_bias` of codes that have passed, from what was written for them."""
        assert job.static is not None
        deq, out, bias = job.outputs["deq_scale"], job.outputs["quant_bias"], job.static.bias
        deq_scale, quant_bias = static_tensors(
            read_number(job.static.scale),
            0 if job.static.zero_point is None else whole_number(job.static.zero_point),
            None if bias is None else to_float(read_bytes(bias), bias.dtype),
            scales.reshape(-1), sums.values, out.name,
        )  # fmt: skip
        as_stored = deq_scale.view(np.int32).astype(np.int64) if deq.dtype == "I64" else deq_scale
        return self._write_whole(deq, as_stored) | self._write_whole(out, quant_bias)

    def _scales_for(self, job: Job) -> tuple[np.ndarray, bool]:
        """(float32 [row tiles, column tiles], whether they are decided already: if not, one row for their number)."""
        if job.spec is None:
            return np.ones((1, 1), np.float32), True
        stored = scale_shape(job.shape, job.spec.granularity)
        shape = (stored[0], stored[1] if len(stored) > 1 else 1)
        if job.given_scale is not None:
            given = to_float(read_bytes(job.given_scale), job.given_scale.dtype)
            if given.size != shape[0] * shape[1]:
                raise InputError(
                    f"{job.given_scale.name}: expected {shape[0]}×{shape[1]} scales, found {given.size}"
                )
            return given.reshape(shape).copy(), True
        if isinstance(job.spec.granularity, PerTensor):
            return self._per_tensor_scale(job), True
        return np.ones((1, shape[1]), np.float32), False

    def _per_tensor_scale(self, job: Job) -> np.ndarray:
        """A first pass over the weight, and those that share its scale, for the largest magnitude."""
        assert job.source is not None and job.spec is not None
        weights = ((job.source, job.shape), *job.joined)
        peak = max(self._absmax(replace(job, source=source, shape=shape)) for source, shape in weights)
        scale = np.float32(peak / np.float32(job.spec.dtype.max))
        return np.full((1, 1), scale if scale >= np.float32(2.0**-126) else 1.0, np.float32)

    def _absmax(self, job: Job) -> np.float32:
        assert job.source is not None
        kind, scales = source_kind(job.source), Scales(job.source)
        check_shape(job.source, job.shape)
        rows, cols = job.shape
        row_bytes = loops.source_bytes(kind, cols)
        step = self._rows_per_block(row_bytes, 1)
        peak = np.float32(0.0)
        for row in range(0, rows, step):
            count = min(step, rows - row)
            part = self._read(job.source.ref, row * row_bytes, count * row_bytes)
            source_scale, row0 = scales.at(row, count)
            largest, bad = loops.absmax_rows(
                part, kind, count, cols, source_scale, *job.source.block, row0, self._floats("values", cols),
                *scales.of_all,
            )  # fmt: skip
            # Scales of the source can push a value out of float32.
            if bad >= 0 or not np.isfinite(largest):
                raise unfit_value(
                    job.source, job.shape, part, kind, first=row * cols, count=count * cols, scales=scales
                )
            peak = max(peak, np.float32(largest))
        return peak

    def _rows_per_block(self, row_bytes: int, tile_rows: int) -> int:
        rows = max(1, BLOCK_BYTES // max(row_bytes, 1))
        return max(tile_rows, rows // tile_rows * tile_rows)

    def _write_whole(self, out: OutTensor, values: np.ndarray) -> dict[str, str]:
        data = np.ascontiguousarray(values).view(np.uint8)
        assert data.size == out.nbytes, out  # more would be written over what lies behind
        self._write(out, 0, data)
        return {out.name: xxhash.xxh3_128_hexdigest(data.data)}

    def _read(self, ref: TensorRef, start: int, count: int) -> np.ndarray:
        if self._cancelled():
            raise Cancelled
        fd = self._inputs.get(ref.file)
        if fd is None:
            fd = self._inputs[ref.file] = os.open(ref.file, os.O_RDONLY)
        if ref.pitch:
            return self._transposed.read(fd, ref, start, count)
        buffer = self._buffer("source", count)
        read_exactly(fd, buffer, ref.offset + start, ref.file)
        return buffer

    def _write(self, out: OutTensor, start: int, data: np.ndarray) -> None:
        view, fd, at = data.data, self._outputs[out.shard], out.offset + start
        while len(view):
            count = os.pwrite(fd, view, at)
            view, at = view[count:], at + count
        self._unflushed += data.size
        if self._unflushed >= FLUSH_BYTES and hasattr(os, "posix_fadvise"):
            # On Linux this starts writing dirty pages back, without waiting for them.
            os.posix_fadvise(fd, out.offset, out.nbytes, os.POSIX_FADV_DONTNEED)
            self._unflushed = 0

    def _buffer(self, name: str, count: int) -> np.ndarray:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < count:
            buffer = self._buffers[name] = np.empty(max(count, BLOCK_BYTES), np.uint8)
        return buffer[:count]

    def _floats(self, name: str, count: int) -> np.ndarray:
        return self._buffer(name, count * 4).view(np.float32)


def _as_stored(out: OutTensor, scales: np.ndarray) -> np.ndarray:
    """float32 scales → uint8 bytes of what `out` holds them in: themselves, or their exponents."""
    raw = np.ascontiguousarray(scales).reshape(-1)
    if out.dtype != "U8":
        return raw.view(np.uint8)
    exponents = np.empty(raw.size, np.uint8)
    np.right_shift(raw.view(np.uint32), 23, out=exponents, casting="unsafe")
    return exponents


def _require_no_hidden_bias(source: Source, sums: RowSums) -> None:
    """InputError where the source's `quant_bias` holds a bias that nothing else holds."""
    if source.hidden_bias is not None:
        held, zero_point = source.hidden_bias
        values = read_bytes(held).view(np.int32).astype(np.int64)
        require_no_bias(values, whole_number(zero_point), sums.values, held.name)


def _out_kind(job: Job, out: OutTensor) -> int:
    if "packed" in job.outputs:
        return loops.TO_INT8_PACKED
    return {"I8": loops.TO_INT8, "F8_E4M3": loops.TO_E4M3, **_PLAIN_OUT}[out.dtype]
