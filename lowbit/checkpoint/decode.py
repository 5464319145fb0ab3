"""Stored bytes of a source → numbers: the scales beside its weights, and by numpy alone what the loops decode fast."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lowbit.checkpoint import rows as loops
from lowbit.checkpoint.headers import FLOATS, TensorRef
from lowbit.checkpoint.jobs import Source
from lowbit.checkpoint.reading import finite, read_bytes, read_rows
from lowbit.dtypes import E2M1, E2M1_VALUES, INT4
from lowbit.errors import InputError

NO_SCALE = np.empty((0, 0), np.float32)
# So many scales of one weight are in memory at a time.
_SPAN_SCALES = 1 << 18
ONE = np.float32(1.0)
# The smallest magnitudes that round to infinity.
LIMITS = {"F16": 65520.0, "BF16": float(np.uint32(0x7F7F8000).view(np.float32))}


def to_float(raw: np.ndarray, dtype: str) -> np.ndarray:
    """uint8 bytes of BF16, F16, F32, F8_E4M3, F8_E8M0 or U8 (biased exponents), I8, or I64 (float32 bits) → float32,
    flat."""
    if dtype == "F32":
        return raw.view(np.float32)
    if dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        return raw.view(np.float16).astype(np.float32)
    if dtype in ("F8_E8M0", "U8"):
        bits = raw.astype(np.uint32)  # and no second array: of a large weight these are hundreds of megabytes
        bits <<= 23
        bits[raw == 0] = 1 << 22  # 2⁻¹²⁷ is subnormal
        bits[raw == 255] = 0x7FC00000
        return bits.view(np.float32)
    if dtype == "F8_E4M3":
        return _E4M3_VALUES.take(raw)
    if dtype == "I8":
        return raw.view(np.int8).astype(np.float32)
    if dtype == "I64":
        return raw.view(np.int64).astype(np.int32).view(np.float32)
    raise InputError(f"expected scales in F32, BF16, F16, E4M3 or E8M0, found {dtype}")


def _e4m3_values() -> np.ndarray:
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    value = np.where((code & 127) == 127, np.nan, value)
    return np.where(code & 128, -value, value).astype(np.float32)


_E4M3_VALUES = _e4m3_values()
"""By code."""


def read_scale(source: Source) -> np.ndarray:
    """The source's scales as float32 [row blocks, column blocks]; empty when it has none."""
    if source.scale is None:
        return NO_SCALE
    _check_scale(source)
    return _scale_rows(source, 0, source.scale.elements // _scale_columns(source))


class Scales:
    """What a weight's decoded codes are multiplied by, as the loops take it: of a large weight a span of rows at a
    time, so that scales of small groups do not grow with it."""

    def __init__(self, source: Source) -> None:
        """InputError where they do not fit the weight, or a number for all of it is none."""
        self._source, self._rows, self._columns = source, 0, 1
        self._first, self._span = 0, NO_SCALE
        if source.scale is not None:
            _check_scale(source)
            self._columns = _scale_columns(source)
            self._rows = source.scale.elements // self._columns
        self.of_all = (_positive(source.global_scale), _positive(source.global_divisor))
        """(multiplier, divisor) of every value after its scale."""

    def at(self, row: int, count: int) -> tuple[np.ndarray, int]:
        """(float32 [*, column blocks] with those of `count` rows of the weight from `row` on, `row` as counted from
        where they begin); (empty, `row`) without scales. Valid until the next call."""
        if not self._rows:
            return NO_SCALE, row
        height = self._source.block[0]
        first, stop = row // height, (row + count - 1) // height + 1
        if first < self._first or stop > self._first + len(self._span):
            self._span = NO_SCALE  # and never two of them
            wanted = max(stop - first, _SPAN_SCALES // self._columns)
            self._span = _scale_rows(self._source, first, min(wanted, self._rows - first))
            self._first = first
        return self._span, row - self._first * height


def _positive(ref: TensorRef | None) -> np.float32:
    """A tensor's one number; 1 for none."""
    if ref is None:
        return ONE
    value = read_number(ref)
    if value <= 0:
        raise InputError(f"{ref.name}: expected a positive scale, found {value}; fetch the checkpoint again")
    return value


def _scale_columns(source: Source) -> int:
    """Scales per row of them: what is no matrix has one for each row of the weight, or one for all."""
    assert source.scale is not None
    return max(source.scale.shape[-1], 1) if len(source.scale.shape) == 2 else 1


def _check_scale(source: Source) -> None:
    """InputError where zero points are not 0, or scales are not as many as the weight needs."""
    assert source.scale is not None
    if source.offset is not None and to_float(read_bytes(source.offset), source.offset.dtype).any():
        raise InputError(
            f"{source.offset.name}: expected symmetric weights, found zero points other than 0; dequantize the "
            "checkpoint with its own tools first"
        )
    if len(source.ref.shape) == 2 and source.ref.elements:
        expected = tuple(-(-n // tile) for n, tile in zip(source.unpacked, source.block, strict=True))
        columns = _scale_columns(source)
        if (source.scale.elements // columns, columns) != expected:  # the loops would read past its end
            raise InputError(
                f"{source.scale.name}: expected {list(expected)} scales for {source.ref.name}, found "
                f"{list(source.scale.shape)}; config and tensors do not belong together: fetch the checkpoint again"
            )


def _scale_rows(source: Source, first: int, count: int) -> np.ndarray:
    """`count` rows of the scales from row `first` on, float32, divided by their divisor if there is one."""
    assert source.scale is not None
    columns = _scale_columns(source)
    scale = to_float(read_rows(source.scale, first, count), source.scale.dtype)
    if source.divisor is not None:
        with np.errstate(all="ignore"):  # what is not finite is refused below
            scale = scale / read_number(source.divisor)
    if not np.isfinite(scale).all():
        at = int(np.flatnonzero(~np.isfinite(scale))[0])
        raise InputError(
            f"{source.scale.name}: expected finite scales, found {scale[at]} at flat index {first * columns + at}"
        )
    return np.ascontiguousarray(scale.reshape(-1, columns))


def check_shape(source: Source, shape: tuple[int, ...]) -> None:
    """InputError where a packed weight has fewer columns than its int32s have room for."""
    if source.shape is None:
        return
    numbers = {"I32": np.int32, "I64": np.int64}
    if source.shape.dtype not in numbers:
        raise InputError(
            f"{source.shape.name}: expected {' or '.join(numbers)}, found {source.shape.dtype}; "
            "fetch the checkpoint again"
        )
    found = tuple(read_bytes(source.shape).view(numbers[source.shape.dtype]).tolist())
    if found != shape:
        raise InputError(
            f"{source.shape.name}: expected {list(shape)}, what the packed codes have room for, found {list(found)}; "
            "keep this weight in float with compressed-tensors' own tools first"
        )


def read_number(ref: TensorRef) -> np.float32:
    """The one value of a tensor, such as a scale of activations; InputError where it is not one, or not finite."""
    values = to_float(read_bytes(ref), ref.dtype)
    if values.size != 1 or not np.isfinite(values[0]):
        raise InputError(f"{ref.name}: expected one finite number, found {values[:4].tolist()}")
    return values[0]


def source_kind(source: Source) -> int:
    """Which decoder the source needs; InputError for a dtype that has none."""
    if source.packed:
        return loops.INT4_PACKED if source.codes is INT4 else loops.INT8_PACKED
    if source.codes is E2M1:
        return loops.E2M1 if source.paired else loops.E2M1_PACKED
    if source.ref.dtype not in loops.SOURCE_KINDS:
        raise InputError(
            f"{source.ref.name}: expected {', '.join(loops.SOURCE_KINDS)}, found {source.ref.dtype}; "
            "use --keep to carry it as it is"
        )
    return loops.SOURCE_KINDS[source.ref.dtype]


def whole_number(ref: TensorRef) -> int:
    """A zero point; InputError where int8 does not hold it."""
    value = read_number(ref)
    if value != np.rint(value) or not -128 <= value <= 127:
        raise InputError(f"{ref.name}: expected a zero point from -128 to 127, found {value}")
    return int(value)


def decode_slowly(part: np.ndarray, kind: int) -> np.ndarray:
    """Elements of any source kind → float32, NaN and Inf included, with numpy alone."""
    if kind == loops.E4M3:
        return _E4M3_VALUES[part]
    if kind == loops.INT8:
        return part.view(np.int8).astype(np.float32)
    if kind == loops.INT8_PACKED:
        return part.astype(np.float32) - 128
    if kind in (loops.INT4_PACKED, loops.E2M1_PACKED):
        halves = np.stack([part & 15, part >> 4], axis=-1).reshape(-1)
        if kind == loops.INT4_PACKED:
            return halves.astype(np.float32) - 8
        return np.array(E2M1_VALUES, np.float32)[halves]
    if kind == loops.E2M1:
        return np.array(E2M1_VALUES, np.float32)[part]
    names: Mapping[int, str] = {v: k for k, v in loops.SOURCE_KINDS.items()}
    return to_float(part, names[kind])


def unfit_value(
    source: Source,
    shape: tuple[int, ...],
    part: np.ndarray,
    kind: int,
    *,
    first: int,
    count: int,
    scales: Scales | None = None,
    out_dtype: str = "",
) -> InputError:
    """Find the value among `count`, from flat index `first` on, that is not finite or that `out_dtype` cannot hold,
    and name it with its position. Slow, and only for errors."""
    values = decode_slowly(part, kind)
    cols = shape[-1] if shape else 1
    index = np.arange(first, first + count)
    if scales is not None and source.scale is not None:
        block_rows, block_cols = source.block
        scale, row = scales.at(first // cols, -(-count // cols))
        rows = index // cols - first // cols + row
        multiplier, divisor = scales.of_all
        with np.errstate(over="ignore"):
            values = values * scale[rows // block_rows, (index % cols) // block_cols] * multiplier / divisor
    limit = LIMITS.get(out_dtype, np.inf)
    at = int(np.flatnonzero(~(np.abs(values) < limit))[0])
    position = [int(i) for i in np.unravel_index(first + at, shape)] if shape else []
    narrow = "float16" if out_dtype == "F16" else "bfloat16"
    expected = f"values that {narrow} can hold" if np.isfinite(values[at]) else "finite values"
    return InputError(
        f"{source.ref.name}: expected {expected}, found {values[at]} at {position}; "
        "repair the source, or keep this weight as it is with --keep"
    )


def overflowed(codes: np.ndarray, dtype: str) -> bool:
    """Whether finite values, by now uint8 bytes of `dtype`, were rounded out of its range, or of float32's by the
    source's scales."""
    return dtype in FLOATS and not finite(codes, dtype)
