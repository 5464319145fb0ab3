"""Re-read what was written: headers, shapes, scales and checksums; with the source, the error too."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.checkpoint import rows as loops
from lowbit.checkpoint.decode import Scales, decode_slowly, source_kind, to_float
from lowbit.checkpoint.execute import BLOCK_BYTES, Progress
from lowbit.checkpoint.fused_experts import split
from lowbit.checkpoint.headers import FLOATS, Checkpoint, TensorRef
from lowbit.checkpoint.hub import whole
from lowbit.checkpoint.jobs import Source
from lowbit.checkpoint.manifest import differences, read_manifest
from lowbit.checkpoint.opening import open_checkpoint
from lowbit.checkpoint.reading import COPY_BYTES, TransposedRows, finite, read_exactly
from lowbit.errors import InputError
from lowbit.formats import DESCRIPTION, METHOD_OF_DESCRIPTION, StoredModule, quantization_of, read
from lowbit.formats.ascend import undescribed

_LOOK_BYTES = 256 << 10
_SCALES = ("scale", "deq_scale", "input_scale")
Pair = tuple[str, tuple[int, int], Source, Source, str]
"""Module, shape [N, K], where it is in the source and here, what it is here."""


@dataclass(frozen=True, kw_only=True)
class TensorError:
    """How far one weight is from its source."""

    name: str
    sqnr_db: float
    """10 · log₁₀(Σ source² / Σ difference²); infinite when equal."""
    relative: float
    """√(Σ difference² / Σ source²)."""
    largest: float
    """Largest absolute difference."""
    scheme: str
    """Or the dtype of a weight that is in float."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The answer of `lowbit verify`."""

    path: str
    tensors: int
    nbytes: int
    problems: tuple[str, ...]
    """Empty when everything is as it should be."""
    checked: tuple[str, ...]
    """What was looked at, in words."""
    errors: tuple[TensorError, ...] = field(default=(), repr=False)
    """With a source: the weights that are quantized, or have another dtype than there; worst first."""

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: JSON has no infinity and no NaN, so these become null."""
        body = asdict(self) | {"ok": self.ok}
        for error in body["errors"]:
            error |= {k: None for k in ("sqnr_db", "relative", "largest") if not math.isfinite(error[k])}
        return body


def verify_checkpoint(
    path: str | Path,
    source: str | Path | None = None,
    *,
    workers: int = 1,
    progress: Progress = lambda count: None,
) -> Verification:
    """Check a converted checkpoint by reading all of it again.

    Whatever is wrong with it is listed as a problem; where headers or config cannot be read,
    that is the only one. InputError when there is no checkpoint at `path`, or `source` is not one.
    """
    origin = split(open_checkpoint(whole(source))).checkpoint if source is not None else None
    if not any(Path(path).glob("*.safetensors")):
        open_checkpoint(path)  # says what is there instead
    try:
        checkpoint = open_checkpoint(path)
        view = split(checkpoint).checkpoint
        stored = read(view.config, view.tensors)
        manifest = read_manifest(checkpoint)
    except InputError as error:
        return Verification(
            path=str(path), tensors=0, nbytes=0, problems=(str(error),), checked=("headers and config",)
        )
    problems: list[str] = []
    count = len(checkpoint.shards)
    checked = [f"headers of {count} shard{'s' * (count != 1)}", f"shapes of {len(stored)} quantized modules"]

    if quantization_of(checkpoint.config).get("quant_method") == METHOD_OF_DESCRIPTION:
        extra = undescribed(quantization_of(checkpoint.config), checkpoint.tensors)
        problems += [f"{DESCRIPTION}: describes {name}, which is in no shard" for name in extra]
        checked.append(f"{DESCRIPTION} against the names of all tensors")
    if manifest is None:
        checked.append("no checksums: there is no manifest, since lowbit did not write it")
    else:
        problems += differences(manifest, checkpoint)
        checked.append("names, dtypes, shapes and checksums of all tensors and files against the manifest")

    bound_to = {n for m in stored.values() for c, n in m.names.items() if c in _SCALES}
    sums = {name: entry["checksum"] for name, entry in manifest["tensors"].items()} if manifest else {}

    def look(ref: TensorRef) -> list[str]:
        try:
            return _check_tensor(ref, sums.get(ref.name), ref.name in bound_to, progress)
        except (InputError, OSError) as error:  # such as a bad sector, or scales in float64
            return [f"{ref.name}: cannot be checked ({error})"]

    with ThreadPoolExecutor(max(1, workers)) as pool:
        for found in pool.map(look, checkpoint.tensors.values()):
            problems += found
    if stored:
        checked.append("finite, positive scales")
    checked.append("finite floats")

    errors: tuple[TensorError, ...] = ()
    if origin is not None:
        errors, missing = _errors(view, stored, origin, workers, progress)
        problems += missing
        said = f"error of {len(errors)} weights against {origin.root}"
        if manifest and manifest.get("calibration"):
            said += ", which its calibration may have rotated or smoothed (see `lowbit eval`)"
        checked.append(said)
    return Verification(
        path=str(checkpoint.root), tensors=len(checkpoint.tensors), nbytes=checkpoint.nbytes,
        problems=tuple(problems), checked=tuple(checked), errors=errors,
    )  # fmt: skip


def _check_tensor(ref: TensorRef, checksum: str | None, is_scale: bool, progress: Progress) -> list[str]:
    """Read one tensor through: its checksum, and that its floats are finite (scales also positive)."""
    import xxhash

    digest, problems = xxhash.xxh3_128(), []
    buffer = np.empty(min(COPY_BYTES, max(ref.nbytes, 1)), np.uint8)
    looks_finite = True
    with ref.file.open("rb") as stream:
        for start in range(0, ref.nbytes, COPY_BYTES):
            part = buffer[: min(COPY_BYTES, ref.nbytes - start)]
            read_exactly(stream.fileno(), part, ref.offset + start, ref.file)
            if checksum is not None:
                digest.update(part.data)
            looks_finite = looks_finite and _finite(part, ref.dtype, is_scale)
            progress(part.size)
    if checksum is not None and digest.hexdigest() != checksum:
        problems.append(
            f"{ref.name}: the data changed since it was written (checksum differs); convert it again"
        )
    if not looks_finite:
        what = "finite, positive scales" if is_scale else "finite values"
        problems.append(f"{ref.name}: expected {what}, found others")
    return problems


def _finite(part: np.ndarray, dtype: str, is_scale: bool) -> bool:
    if not is_scale:
        return finite(part, dtype)
    for at in range(0, part.size, _LOOK_BYTES):  # exponents become four times as large
        values = to_float(part[at : at + _LOOK_BYTES], dtype)
        # E4M3 has no small numbers: NVFP4 says 0 where a group is one of zeros, or as good as that.
        positive = values >= 0 if dtype == "F8_E4M3" else values > 0
        if not (np.isfinite(values).all() and positive.all()):
            return False
    return True


def _errors(
    checkpoint: Checkpoint,
    stored: Mapping[str, StoredModule],
    origin: Checkpoint,
    workers: int,
    progress: Progress,
) -> tuple[tuple[TensorError, ...], list[str]]:
    before = read(origin.config, origin.tensors)
    pairs: list[Pair] = []
    missing: list[str] = []
    here = {
        m: (s.shape, Source.of(s, checkpoint.tensors), s.scheme.name) for m, s in stored.items() if not s.stacked
    }  # fmt: skip
    for module, (shape, now, scheme) in (here | _in_float(checkpoint, stored)).items():
        then = _source_of(module, before, origin)
        if then is None:
            if module in stored:
                missing.append(f"{module}: quantized here, but the source has no such weight")
        elif then[0] != shape:
            missing.append(f"{module}: {list(shape)} here, but {list(then[0])} in the source")
        elif module in stored or now.ref.dtype != then[1].ref.dtype:
            pairs.append((module, shape, then[1], now, scheme))
    for module, each in before.items():
        if each.stacked and (ref := checkpoint.tensors.get(module)) is not None:
            experts, rows, cols = each.shape
            if ref.shape == (experts, cols, rows) and ref.dtype in FLOATS:
                pairs += _stacked(module, each, origin, ref)
            else:
                expected = f"{[experts, cols, rows]} in float of what the source has in {each.scheme.name}"
                missing.append(f"{module}: expected {expected}, found {ref.dtype} {list(ref.shape)}")
    errors: list[TensorError] = []

    def compare(pair: Pair) -> TensorError | str:
        try:
            return _error(*pair, progress=progress)
        except InputError as error:  # such as a scale that is not finite
            return str(error)
        except OSError as error:
            return f"{pair[0]}.weight: cannot be compared ({error})"

    with ThreadPoolExecutor(max(1, workers)) as pool:
        for found in pool.map(compare, pairs):
            if isinstance(found, str):
                missing.append(found)
            else:
                errors.append(found)
    return tuple(sorted(errors, key=lambda e: e.sqnr_db)), missing


def _stacked(module: str, stored: StoredModule, origin: Checkpoint, ref: TensorRef) -> Iterator[Pair]:
    """Each expert [N, K] of those that the source has in one quantized tensor; here they are `ref` [E, K, N]."""
    experts, rows, cols = stored.shape
    there, (parent, _, leaf) = Source.of(stored, origin.tensors), module.rpartition(".")
    assert there.scale is not None
    for e in range(experts):
        then = replace(there, ref=there.ref.rows(e * rows, rows), scale=there.scale.rows(e * rows, rows))
        here = replace(ref.below.rows(e * cols, cols), shape=(rows, cols), pitch=rows)
        yield f"{parent}.{e}.{leaf}", (rows, cols), then, Source(ref=here), ref.dtype


def _in_float(
    checkpoint: Checkpoint, stored: Mapping[str, StoredModule]
) -> dict[str, tuple[tuple[int, int], Source, str]]:
    """Matrices that are not quantized here: module → shape, where it lies, its dtype."""
    return {
        name.removesuffix(".weight"): ((ref.shape[0], ref.shape[1]), Source(ref=ref), ref.dtype)
        for name, ref in checkpoint.tensors.items()
        if name.endswith(".weight") and len(ref.shape) == 2 and ref.dtype in FLOATS
        and name.removesuffix(".weight") not in stored
    }  # fmt: skip


def _source_of(
    module: str, before: Mapping[str, StoredModule], origin: Checkpoint
) -> tuple[tuple[int, int], Source] | None:
    if module in before:
        rows, cols = before[module].shape
        return (rows, cols), Source.of(before[module], origin.tensors)
    ref = origin.tensors.get(module + ".weight")
    if ref is None or len(ref.shape) != 2 or ref.dtype not in FLOATS:
        return None
    return (ref.shape[0], ref.shape[1]), Source(ref=ref)


def _error(
    module: str, shape: tuple[int, int], there: Source, here: Source, scheme: str, *, progress: Progress
) -> TensorError:
    """Decode both, a row block at a time, and add the squares up in float64."""
    rows, cols = shape
    squares, power, largest = 0.0, 0.0, 0.0
    step = max(1, BLOCK_BYTES // max(4 * cols, 1))
    readers = [_RowReader(there, shape, step), _RowReader(here, shape, step)]
    try:
        for row in range(0, rows, step):
            count = min(step, rows - row)
            x, y = (r.read(row, count) for r in readers)
            e, p, m = loops.error_rows(x, y)
            squares, power, largest = squares + e, power + p, max(largest, m)
            progress(count * cols)
    finally:
        for reader in readers:
            reader.close()
    relative = math.sqrt(squares / power) if power else (0.0 if squares == 0 else math.inf)
    sqnr = (
        -20 * math.log10(relative) if 0 < relative < math.inf else (math.inf if relative == 0 else -math.inf)
    )
    return TensorError(
        name=module + ".weight", sqnr_db=sqnr, relative=relative, largest=largest, scheme=scheme
    )


class _RowReader:
    """Rows of a stored weight as float32, through buffers that are used again."""

    def __init__(self, source: Source, shape: tuple[int, int], step: int) -> None:
        self._source, self._cols = source, shape[1]
        self._kind = source_kind(source)
        self._scales = Scales(source)
        self._row_bytes = source.ref.nbytes // max(shape[0], 1)
        self._raw = np.empty(step * self._row_bytes, np.uint8)
        self._transposed = TransposedRows()
        self._out = np.empty(step * shape[1] * 4, np.uint8)
        self._values = np.empty(max(shape[1], 1), np.float32)
        self._stream = source.ref.file.open("rb")

    def close(self) -> None:
        self._stream.close()

    def read(self, row: int, count: int) -> np.ndarray:
        ref, fd = self._source.ref, self._stream.fileno()
        if ref.pitch:
            part = self._transposed.read(fd, ref, row * self._row_bytes, count * self._row_bytes)
        else:
            part = self._raw[: count * self._row_bytes]
            read_exactly(fd, part, ref.offset + row * self._row_bytes, ref.file)
        out = self._out[: count * self._cols * 4]
        scale, row0 = self._scales.at(row, count)
        bad = loops.convert_rows(
            part, self._kind, count, self._cols, scale, *self._source.block, row0, out, loops.TO_F32,
            self._cols, self._values[:1].reshape(1, 1), 1, max(self._cols, 1), True, False, self._values,
            *self._scales.of_all,
        )  # fmt: skip
        if bad >= 0:  # NaN or Inf: reported elsewhere; the error becomes NaN rather than hidden
            return decode_slowly(part, self._kind)
        return out.view(np.float32)
