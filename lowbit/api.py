"""The converter as Python functions; the command line is a thin layer over these."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.calibration import store
from lowbit.calibration.store import Calibration
from lowbit.checkpoint.headers import TensorRef
from lowbit.checkpoint.hub import open_source, whole
from lowbit.checkpoint.inspect import Inspection, inspect_checkpoint
from lowbit.checkpoint.parts import Part
from lowbit.checkpoint.plan import Plan, make_plan
from lowbit.checkpoint.planner import Replacements
from lowbit.checkpoint.rules import Selection
from lowbit.errors import InputError
from lowbit.scheme import Scheme

if TYPE_CHECKING:  # it loads the compiled loops, which planning does not need
    from lowbit.checkpoint.verify import Verification

Progress = Callable[[int], None]
"""Called with the number of bytes just done, from any thread."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What `convert` did."""

    out: str
    plan: Plan
    part: Part
    """The share of it that this was; part 1 of 1 is all."""
    source_bytes: int
    """Read for that share."""
    seconds: float
    resumed_jobs: int
    """Jobs that an earlier, killed run had finished."""
    manifest: Mapping[str, Any] = field(repr=False)
    """Empty when another part was, or will be, the last."""
    missing: tuple[str, ...]
    """Output files that other parts have yet to finish. Nothing has its final name before."""
    not_finite: tuple[str, ...]
    """Tensors that were copied from the source with NaN or Inf in them: here, and by parts that ended before."""

    @property
    def bytes_per_second(self) -> float:
        """Source bytes over wall time."""
        return self.source_bytes / self.seconds if self.seconds else 0.0


def inspect(path: str | Path) -> Inspection:
    """What a checkpoint is, from its headers: architecture, tensors by dtype and role, anything odd.

    `path`: a directory, or `org/name` or `org/name@revision` on the Hub, of which headers alone are fetched.
    Raises InputError when it is not a checkpoint, or its files do not fit together.
    """
    return inspect_checkpoint(path)


def plan(
    src: str | Path,
    scheme: str | Scheme | None = None,
    *,
    format: str | None = None,
    ignore: Sequence[str] = (),
    keep: Sequence[str] = (),
    overrides: Mapping[str, str] | None = None,
    max_shard_size: str | int = "5GB",
    calibration: str | Path | Calibration | None = None,
) -> Plan:
    """What `convert` would do with the same arguments, without reading weight data.

    `src`: a directory, or `org/name` or `org/name@revision` on the Hub, of which headers alone are fetched.
    `scheme` is a preset's name (see `lowbit.scheme.SCHEMES`) or a Scheme; default: what `calibration` was made
    for, and int8 without one. `format` defaults to compressed-tensors; `fp8`, `ascend` and `sglang` are the
    others (see `lowbit.formats`). A pattern in `ignore`, `keep` and `overrides` is a module's or parent's name,
    a glob, or `re:` and a regular expression. `ignore`: not quantized. `keep`: byte for byte as the source has
    it. `overrides`: pattern → scheme name or `float`; the first match decides.
    `calibration`: what `lowbit.calibrate` returned, or the directory that it wrote; the patterns that it was made
    with hold where these say nothing. Raises InputError for what cannot be done.
    """
    if calibration is not None:  # it is checked against samples of the weights
        src = whole(src)
    source = open_source(src)
    selection = Selection.of(ignore=ignore, keep=keep, overrides=overrides)
    found = store.read(calibration) if isinstance(calibration, str | Path) else calibration
    if scheme is None:
        scheme = "int8" if found is None else found.scheme
    replacements = None if found is None else _replacements(found, src, scheme)
    return make_plan(
        source,
        scheme,
        format=format,
        selection=selection,
        max_shard_size=max_shard_size,
        replacements=replacements,
    )


def convert(
    src: str | Path,
    out: str | Path,
    scheme: str | Scheme | None = None,
    *,
    format: str | None = None,
    ignore: Sequence[str] = (),
    keep: Sequence[str] = (),
    overrides: Mapping[str, str] | None = None,
    max_shard_size: str | int = "5GB",
    calibration: str | Path | Calibration | None = None,
    workers: int | None = None,
    part: Part | None = None,
    overwrite: bool = False,
    progress: Progress = lambda count: None,
) -> Conversion:
    """Rewrite the checkpoint `src` as a quantized one in the directory `out`.

    Arguments as for `plan`. What is on the Hub is fetched shard by shard, below HF_HOME, and each is dropped when it is
    converted. One pass over the source in constant memory, on `workers` threads
    (default: one per processor). Nothing stands under its final name before everything is
    written and synced. A run that was killed, or that a disk or network failed, resumes when it is called
    again with the same arguments: what it had written is read back and checked. Bad input raises InputError
    and leaves nothing behind. NaN or Inf are bad input in what is quantized or cast; what is copied
    with them is listed in `not_finite`. `part`: this machine's share of the output's files, where several with
    a common file system work on one conversion, all with the same arguments.
    """
    decided = plan(
        src, scheme, format=format, ignore=ignore, keep=keep, overrides=overrides,
        max_shard_size=max_shard_size, calibration=calibration,
    )  # fmt: skip
    return run_plan(decided, out, workers=workers, part=part, overwrite=overwrite, progress=progress)


def run_plan(
    plan: Plan,
    out: str | Path,
    *,
    workers: int | None = None,
    part: Part | None = None,
    overwrite: bool = False,
    progress: Progress = lambda count: None,
    fetched: Progress = lambda count: None,
) -> Conversion:
    """Execute a plan into `out`; see `convert`. `fetched` is called with bytes that arrived from the Hub."""
    from lowbit.checkpoint.jobs import files_of
    from lowbit.checkpoint.journal import intact
    from lowbit.checkpoint.writer import OutputDirectory
    from lowbit.engines import supply
    from lowbit.engines.local import default_workers, run_jobs

    begin = time.perf_counter()
    directory = OutputDirectory(Path(out), plan, overwrite=overwrite, part=part)
    mine, repository = plan.jobs_in(directory.shards), plan.source.repository
    if repository is not None:
        try:
            supply.prepare(repository, [plan.source.root / file for file in plan.source.others], mine)
        except OSError as error:
            raise directory.explain(error) from error
    outputs = directory.prepare()
    try:
        assert directory.journal is not None
        done = intact(mine, plan.shards, directory.partial, directory.record.done)
        for number in done:
            progress(plan.jobs[number].source_bytes)
        left = [item for item in mine if item[0] not in done]
        if repository:  # what is not read again need not come again
            spared = files_of(job for _, job in mine) - files_of(job for _, job in left)
            fetched(repository.nbytes(spared))
        with supply.supplied(repository, left, fetched) as ready:
            run_jobs(
                left, outputs, workers=workers or default_workers(), progress=progress,
                not_finite=directory.journal.not_finite, finished=directory.journal.record, ready=ready,
            )  # fmt: skip
        manifest = directory.finish()
    except OSError as error:
        raise directory.give_up(error) from error
    except InputError:
        directory.discard()
        raise
    except BaseException:  # Ctrl-C, too little memory, a defect of ours: not for ever
        directory.abandon()
        raise
    return Conversion(
        out=str(out),
        plan=plan,
        part=directory.part,
        source_bytes=sum(job.source_bytes for _, job in mine),
        seconds=time.perf_counter() - begin,
        resumed_jobs=len(done),
        manifest=manifest,
        missing=directory.missing,
        not_finite=directory.not_finite,
    )


def verify(
    out: str | Path,
    source: str | Path | None = None,
    *,
    workers: int | None = None,
    progress: Progress = lambda count: None,
) -> Verification:
    """Re-read every tensor of a checkpoint; → Verification, whose `ok` says whether all is well.

    Checks headers, shapes, finite scales and the manifest's checksums. With `source`, weights
    that are quantized, or have another dtype than there, are compared: SQNR in dB and relative error per
    tensor, worst first.
    """
    from lowbit.checkpoint.verify import verify_checkpoint
    from lowbit.engines.local import default_workers

    return verify_checkpoint(out, source, workers=workers or default_workers(), progress=progress)


def _replacements(calibration: Calibration, src: str | Path, scheme: str | Scheme) -> Replacements:
    from lowbit.calibration.kv_cache import KVCache
    from lowbit.dtypes import INT8
    from lowbit.granularity import PerGroup
    from lowbit.scheme import scheme_of

    calibration.require(fingerprint=store.fingerprint(src), scheme=scheme_of(scheme).name)
    tensors = {
        name: TensorRef(name, t.dtype, t.shape, t.file, t.start) for name, t in calibration.tensors.items()
    }
    overrides = dict(calibration.config_overrides)
    notes = []
    if online := [m for report in calibration.layers.values() for m in report.get("online_hadamard", [])]:
        # lowbit's modules rotate the input in the largest blocks that a power of two divides it into.
        inputs = {m: tensors[f"{m}.weight"].shape[-1] for m in online}
        overrides["lowbit"] = {"online_hadamard": {m: n & -n for m, n in inputs.items()}}
    kv_cache = None
    if calibration.kv_cache and any(name.endswith(".k_scale") for name in tensors):
        kv_cache = KVCache(**calibration.kv_cache).stored
        if kv_cache.dtype is INT8 and not isinstance(kv_cache.granularity, PerGroup):
            notes.append("vLLM takes KV caches of FP8 only, and refuses a config that says INT8")
    return Replacements(
        tensors=tensors,
        selection=calibration.selection,
        kv_cache=kv_cache,
        config_overrides=overrides,
        notes=tuple(notes),
        label=f"{calibration.method} {store.fingerprint(calibration.path) if tensors else ''}",
    )
