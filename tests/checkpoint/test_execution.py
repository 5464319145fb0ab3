"""Running a plan: the same bytes however it is run, nothing left after a failure, resuming after a kill."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conversions import FILES, everything, start, wait_for_jobs
from sample_models import block_fp8, deepseek_v3, llama, load, same_bits, write

import lowbit
from lowbit.checkpoint import execute, writer
from lowbit.checkpoint.headers import PARTIAL
from lowbit.checkpoint.journal import Journal, read_journal
from lowbit.checkpoint.parts import Part
from lowbit.checkpoint.reading import finite
from lowbit.errors import InputError
from lowbit.formats import DESCRIPTION, MODELOPT


@pytest.fixture
def src(tmp_path) -> Path:
    return write(tmp_path / "src", *deepseek_v3(), files=FILES, place=lambda n: len(n) % 2)


@pytest.mark.parametrize("scheme", ["int8", "mxfp8", "bf16"])
def test_the_bytes_do_not_depend_on_workers(src, tmp_path, scheme):
    results = []
    for workers in (1, 2, 7):
        lowbit.convert(src, tmp_path / f"out{workers}", scheme, workers=workers, max_shard_size="200KB")
        results.append(everything(tmp_path / f"out{workers}"))
    assert results[0] == results[1] == results[2]


def test_the_tensors_do_not_depend_on_the_size_of_shards(src, tmp_path):
    lowbit.convert(src, tmp_path / "a", "int8-block")
    lowbit.convert(src, tmp_path / "b", "int8-block", max_shard_size="100KB")
    a, b = load(tmp_path / "a"), load(tmp_path / "b")
    assert set(a) == set(b) and all(same_bits(a[n], b[n]) for n in a)
    sums = [json.loads((tmp_path / x / "lowbit_manifest.json").read_text())["tensors"] for x in "ab"]
    assert sums[0] == sums[1]


@pytest.mark.parametrize("block_bytes", [8, 1000, 1 << 16])
@pytest.mark.parametrize("scheme", ["int8", "int8-block", "int8-weight-only", "fp8-block", "mxfp8", "fp16"])
def test_the_bytes_do_not_depend_on_row_blocks(tmp_path, monkeypatch, scheme, block_bytes):
    """A tensor of many row blocks equals one that is read at once, from BF16 and from block FP8."""
    for name, (tensors, config) in {"bf16": llama(), "fp8": block_fp8(*llama())}.items():
        src = write(tmp_path / name, tensors, config)
        lowbit.convert(src, tmp_path / f"{name}-whole", scheme)
        monkeypatch.setattr(execute, "BLOCK_BYTES", block_bytes)
        monkeypatch.setattr(execute, "COPY_BYTES", max(block_bytes, 64))
        lowbit.convert(src, tmp_path / f"{name}-parts", scheme)
        monkeypatch.undo()
        assert everything(tmp_path / f"{name}-whole") == everything(tmp_path / f"{name}-parts")


def test_the_manifest_says_where_it_comes_from(src, tmp_path):
    import xxhash

    done = lowbit.convert(src, tmp_path / "out", "int8")
    manifest = json.loads((tmp_path / "out" / "lowbit_manifest.json").read_text())
    assert manifest == done.manifest
    assert manifest["lowbit_version"] == lowbit.__version__
    assert manifest["plan"] == done.plan.digest() and len(manifest["plan"]) == 32
    assert manifest["source"]["fingerprint"] == done.plan.source.fingerprint()
    assert (manifest["scheme"], manifest["format"]) == ("int8", "compressed-tensors")
    written = load(tmp_path / "out")
    assert set(manifest["tensors"]) == set(written)
    for name, t in written.items():
        data = t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        entry = manifest["tensors"][name]
        assert entry["checksum"] == xxhash.xxh3_128_hexdigest(data) and entry["shape"] == list(t.shape)


def test_where_no_more_threads_are_allowed_those_that_there_are_do_it(src, tmp_path, monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", after(2, refuse, threading.Thread.start))
        lowbit.convert(src, tmp_path / "out", "int8", workers=100_000)
    assert lowbit.verify(tmp_path / "out", src).ok


def test_progress_adds_up_to_the_source(src, tmp_path):
    for scheme in ("int8", "bf16", "int8-block"):
        seen: list[int] = []
        done = lowbit.convert(src, tmp_path / scheme, scheme, progress=seen.append, workers=2)
        constants = sum(len(j.data) for j in done.plan.jobs)
        assert sum(seen) == done.plan.source_bytes - constants


# --- killed and resumed -----------------------------------------------------------------------


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "SIGINT"])
def test_a_stopped_run_never_looks_finished_and_resumes(src, tmp_path, sig):
    out = tmp_path / "out"
    process = start(src, out)
    wait_for_jobs(out, 10)
    process.send_signal(sig)
    process.wait(60)
    assert [p.name for p in out.iterdir()] == [PARTIAL]
    with pytest.raises(InputError, match="unfinished conversion; run `lowbit convert` again"):
        lowbit.verify(out)
    before = len(read_journal(out / PARTIAL / "journal.jsonl").done)
    done = lowbit.convert(src, out, "int8", max_shard_size="200KB")
    assert 10 <= done.resumed_jobs <= before
    lowbit.convert(src, tmp_path / "fresh", "int8", max_shard_size="200KB")
    assert everything(out) == everything(tmp_path / "fresh")
    assert not (out / PARTIAL).exists()


@pytest.fixture
def stopped(src, tmp_path) -> Path:
    """OUT of a run that was killed after most of its jobs."""
    out = tmp_path / "out"
    process = start(src, out)
    wait_for_jobs(out, 40)
    process.kill()
    process.wait(60)
    return out


def test_a_damaged_partial_is_made_again(src, tmp_path, stopped):
    shards = sorted((stopped / PARTIAL).glob("*.safetensors"))
    raw = bytearray(shards[0].read_bytes())
    raw[len(raw) // 2] ^= 1
    shards[0].write_bytes(raw)
    shards[1].unlink()
    journal = stopped / PARTIAL / "journal.jsonl"
    journal.write_text(journal.read_text() + '{"job": 1, "check')  # torn
    recorded = len(read_journal(journal).done)
    done = lowbit.convert(src, stopped, "int8", max_shard_size="200KB")
    assert 0 < done.resumed_jobs < recorded
    lowbit.convert(src, tmp_path / "fresh", "int8", max_shard_size="200KB")
    assert everything(stopped) == everything(tmp_path / "fresh")


def test_a_journal_is_read_once_at_the_start_and_once_at_the_end(src, stopped, monkeypatch):
    reads, read = [], Path.read_text

    def counted(self, *args, **kwargs):
        if self.name.startswith("journal"):
            reads.append(self.name)
        return read(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", counted)
    at_start = []
    lowbit.convert(
        src, stopped, "int8", max_shard_size="200KB", progress=lambda count: at_start.append(len(reads))
    )
    assert (at_start[0], len(reads)) == (1, 2)


def test_no_space_to_go_on_keeps_what_was_written(src, tmp_path, stopped, monkeypatch):
    files = everything(stopped)
    for shard in (stopped / PARTIAL).glob("*.safetensors"):
        shard.unlink()
        break
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
        with pytest.raises(InputError, match="MB of free disk space"):
            lowbit.convert(src, stopped, "int8", max_shard_size="200KB")
    assert len(everything(stopped)) == len(files) - 1
    assert lowbit.convert(src, stopped, "int8", max_shard_size="200KB").resumed_jobs > 0


def test_what_was_written_is_space_that_is_not_needed_again(src, stopped, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    assert lowbit.convert(src, stopped, "int8", max_shard_size="200KB").resumed_jobs > 0


@pytest.mark.parametrize("failing", ["open", "posix_fallocate"])
def test_what_cannot_be_gone_on_with_stays(src, stopped, monkeypatch, failing):
    """Such as the files of a colleague, whose umask keeps others from writing to them, or a quota."""
    files = everything(stopped)

    def refuse(path, *args, **kw):
        if failing == "open" and not str(path).endswith(".safetensors"):
            return opened(path, *args, **kw)
        raise OSError(
            *(
                (errno.EACCES, "Permission denied", str(path))
                if failing == "open"
                else (errno.EDQUOT, "Quota")
            )
        )

    opened = os.open
    with monkeypatch.context() as patch:
        patch.setattr(os, failing, refuse)
        with pytest.raises(InputError, match=r"no permission to write here|What was written stays"):
            lowbit.convert(src, stopped, "int8", max_shard_size="200KB")
    assert everything(stopped).keys() == files.keys()
    assert lowbit.convert(src, stopped, "int8", max_shard_size="200KB").resumed_jobs > 0


def test_other_settings_do_not_mix_with_a_partial(src, stopped, tmp_path):
    with pytest.raises(
        InputError, match=r"unfinished conversion of another source or with other settings.*--overwrite"
    ):
        lowbit.convert(src, stopped, "fp8")
    assert (stopped / PARTIAL).is_dir()
    done = lowbit.convert(src, stopped, "fp8", overwrite=True)
    assert done.resumed_jobs == 0
    lowbit.convert(src, tmp_path / "fresh", "fp8")
    assert everything(stopped) == everything(tmp_path / "fresh")


def test_a_changed_source_does_not_resume(src, stopped):
    os.utime(src / "model-00001-of-00002.safetensors", ns=(5, 5))
    with pytest.raises(InputError, match="another source or with other settings"):
        lowbit.convert(src, stopped, "int8", max_shard_size="200KB")


@pytest.mark.parametrize("renames", range(1, 10, 2))
def test_killed_between_two_renames(src, tmp_path, monkeypatch, renames):
    """Whatever stands under final names then, config.json does not; and the run can be finished."""
    out = tmp_path / "out"
    show, count = writer.OutputDirectory._show, 0

    class Killed(BaseException):
        pass

    def dying(self, hidden, file):
        nonlocal count
        count += 1
        if count > renames:
            raise Killed
        show(self, hidden, file)

    monkeypatch.setattr(writer.OutputDirectory, "_show", dying)
    monkeypatch.setattr(writer.OutputDirectory, "discard", lambda self: self.abandon())
    with pytest.raises(Killed):
        lowbit.convert(src, out, "int8", max_shard_size="200KB")
    monkeypatch.undo()
    assert not (out / "config.json").exists()
    assert len([p for p in out.rglob("*") if p.is_file() and PARTIAL not in p.parts]) == renames
    done = lowbit.convert(src, out, "int8", max_shard_size="200KB")
    assert done.resumed_jobs == len(done.plan.jobs)
    lowbit.convert(src, tmp_path / "fresh", "int8", max_shard_size="200KB")
    assert everything(out) == everything(tmp_path / "fresh")


class Killed(BaseException):
    """Not even an error."""


def die(*args, **kw):
    raise Killed


@contextmanager
def killed_at(step: int):
    """Before the `step`th change of names while results are shown or moved back; yields a list of those that came."""
    came: list[str] = []

    def dying(name):
        change = getattr(os, name)

        def instead(path, *args, **kw):
            if len(came) == step:
                raise Killed
            came.append(f"{name} {path}")
            return change(path, *args, **kw)

        return instead

    with pytest.MonkeyPatch.context() as patched:
        for name in ("unlink", "replace", "rmdir"):
            patched.setattr(os, name, dying(name))
        yield came


@pytest.fixture(scope="module")
def replaced(tmp_path_factory):
    """(a conversion into OUT, a function that makes a full OUT for it to replace, what OUT holds in the end)"""
    root = tmp_path_factory.mktemp("replaced")
    weights = deepseek_v3()
    before = write(
        root / "before", *weights, files={**FILES, "chat_template.jinja": "x", "2_Dense/config.json": "{}"}
    )
    src = write(root / "src", *weights, files=FILES)
    lowbit.convert(before, root / "old", "int8", max_shard_size="400KB", format="ascend")
    lowbit.convert(src, root / "fresh", "fp8", max_shard_size="800KB")

    def convert(out: Path, overwrite: bool = False) -> int:
        return lowbit.convert(src, out, "fp8", max_shard_size="800KB", overwrite=overwrite).resumed_jobs

    return convert, lambda out: shutil.copytree(root / "old", out), everything(root / "fresh")


def shown(out: Path) -> dict[str, bytes] | None:
    """What loaders find; None: no model."""
    files = {name: data for name, data in everything(out).items() if not name.startswith(PARTIAL)}
    return files if "config.json" in files else None


def test_overwriting_leaves_nothing_of_what_was_there(replaced, tmp_path):
    """Another model's chat template would be used."""
    convert, full, result = replaced
    full(tmp_path / "out")
    (tmp_path / "out" / "mine.md").write_text("x")
    convert(tmp_path / "out", overwrite=True)
    assert everything(tmp_path / "out") == {**result, "mine.md": b"x"}
    assert not (tmp_path / "out" / "2_Dense").exists()


@pytest.mark.parametrize("again", [False, True], ids=["then without", "then with"])
def test_an_overwriting_run_killed_at_any_step(replaced, tmp_path, again):
    convert, full, result = replaced
    with killed_at(-1) as steps:
        full(tmp_path / "whole")
        old = everything(tmp_path / "whole")
        convert(tmp_path / "whole", overwrite=True)
    for step in range(0, len(steps), 1 + again):
        out = tmp_path / str(step)
        full(out)
        with killed_at(step), pytest.raises(Killed):
            convert(out, overwrite=True)
        assert shown(out) in (None, old, result), (step, steps[step])
        with killed_at(step % 4), suppress(Killed, InputError):  # once more
            convert(out, overwrite=again)
        assert shown(out) in (None, old, result), (step, steps[step])
        try:
            convert(out, overwrite=again)
        except InputError as error:
            assert "--overwrite" in str(error) and not again
            convert(out, overwrite=True)
        assert everything(out) == result, (step, steps[step])


def test_another_conversion_replaces_one_that_was_killed_at_any_step(replaced, tmp_path):
    """Its chat template stayed, which the killed run's manifest alone names."""
    convert, full, result = replaced
    src = write(
        tmp_path / "other", *deepseek_v3(), files={"chat_template.jinja": "y", "deep/er/mine.md": "y"}
    )
    with killed_at(-1) as steps:
        full(tmp_path / "whole")
        lowbit.convert(src, tmp_path / "whole", "int8", overwrite=True)
    for step in range(len(steps)):
        out = tmp_path / str(step)
        full(out)
        (out / "mine.md").write_text("x")
        with killed_at(step), pytest.raises(Killed):
            lowbit.convert(src, out, "int8", overwrite=True)
        for again in range(0, 3 * (step % 3), 3):  # while it removes that one, say
            with killed_at(step // 2 + again), pytest.raises(Killed):
                lowbit.convert(src, out, "mxfp8" if again else "fp8", overwrite=True)
        convert(out, overwrite=True)
        assert everything(out) == {**result, "mine.md": b"x"}, (step, steps[step])


def test_a_failure_while_replacing_keeps_the_new_one(replaced, tmp_path, monkeypatch):
    """The old one is gone then."""
    convert, full, result = replaced
    full(tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(writer.OutputDirectory, "_show", no_space)
        with pytest.raises(InputError, match="What was written stays"):
            convert(tmp_path / "out", overwrite=True)
    assert convert(tmp_path / "out") > 0 and everything(tmp_path / "out") == result


def test_a_failure_after_the_old_one_was_half_removed_keeps_the_new_one(replaced, tmp_path, monkeypatch):
    """By a run that was killed meanwhile."""
    convert, full, result = replaced
    out = tmp_path / "out"
    full(out)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(writer.OutputDirectory, "_remove", after(2, die, writer.OutputDirectory._remove))
        convert(out, overwrite=True)
    with monkeypatch.context() as patched, pytest.raises(InputError, match="What was written stays"):
        patched.setattr(shutil, "copyfile", no_space)
        convert(out)
    assert convert(out) > 0 and everything(out) == result


def test_killed_while_clearing_up_the_result_stays(src, tmp_path, monkeypatch):
    def killed(partial):
        for file in partial.glob("journal*"):
            file.unlink()
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(writer.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            lowbit.convert(src, out, "int8")
    with pytest.raises(InputError, match="expected an empty directory"):
        lowbit.convert(src, out, "fp8")
    assert lowbit.verify(out, src).ok


def test_config_is_shown_last(src, tmp_path, monkeypatch):
    order: list[str] = []
    show = writer.OutputDirectory._show
    monkeypatch.setattr(
        writer.OutputDirectory, "_show", lambda self, a, b: (order.append(str(b)), show(self, a, b))[1]
    )
    lowbit.convert(src, tmp_path / "out", "int8", max_shard_size="200KB")
    assert order[-1] == "config.json" and order[-2] == "lowbit_manifest.json"
    index = order.index("model.safetensors.index.json")
    assert all(name.endswith(".safetensors") for name in order[:index])


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="nothing says which file a descriptor is")
def test_all_is_on_the_disk_before_config_is_shown(src, tmp_path, monkeypatch):
    """Files and their names, those that are carried too: a machine that loses power may keep the last rename alone."""
    out, synced = tmp_path / "out", {}
    fsync, replace = os.fsync, os.replace

    def syncing(fd):
        file = Path(f"/proc/self/fd/{fd}").readlink()
        synced[file] = sorted(p.name for p in file.iterdir()) if file.is_dir() else file.read_bytes()
        fsync(fd)

    def renaming(before, after):
        for known in [k for k in synced if k == Path(before)]:
            synced[Path(after)] = synced.pop(known)
        if Path(after) == out / "config.json":
            shown = {p for p in out.rglob("*") if PARTIAL not in p.parts}
            assert all(synced[p] == p.read_bytes() for p in shown if p.is_file()) and len(shown) > 8
            assert all(sorted(q.name for q in p.iterdir()) == synced[p] for p in shown | {out} if p.is_dir())
        replace(before, after)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", renaming)
    lowbit.convert(src, out, "int8", max_shard_size="200KB")
    assert "config.json" in synced[out]


def test_a_file_system_that_syncs_no_directories(src, tmp_path, monkeypatch):
    fsync = os.fsync

    def files_only(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", files_only)
    lowbit.convert(src, tmp_path / "out", "int8")
    assert lowbit.verify(tmp_path / "out", src).ok


def test_the_umask_decides_who_may_read_and_write(src, tmp_path):
    before = os.umask(0o002)
    try:
        lowbit.convert(src, tmp_path / "out", "int8", max_shard_size="200KB")
    finally:
        os.umask(before)
    modes = {f.stat().st_mode & 0o777 for f in (tmp_path / "out").rglob("*") if f.is_file()}
    assert modes == {0o664}


def test_two_conversions_into_one_place(src, tmp_path):
    out = tmp_path / "out"
    process = start(src, out)
    try:
        wait_for_jobs(out, 3)
        for overwrite in (False, True):
            with pytest.raises(InputError, match="another conversion is writing here"):
                lowbit.convert(src, out, "int8", max_shard_size="200KB", overwrite=overwrite)
        assert process.wait(120) == 0
    finally:
        process.kill()
    assert lowbit.verify(out).ok


# --- failures leave nothing -------------------------------------------------------------------


def no_space(*args, **kw):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def after(count: int, then, otherwise):
    lock, calls = threading.Lock(), 0

    def call(*args, **kw):
        nonlocal calls
        with lock:
            calls += 1
            late = calls > count
        return (then if late else otherwise)(*args, **kw)

    return call


POINTS = {
    "reserving": (os, "posix_fallocate", 1),
    "writing": (os, "pwrite", 30),
    "syncing": (os, "fsync", 1),
    "carrying files": (shutil, "copyfile", 1),
    "writing json": (json, "dump", 1),
}


@pytest.mark.parametrize(("module", "name", "count"), POINTS.values(), ids=POINTS)
def test_a_full_disk_leaves_nothing(src, tmp_path, monkeypatch, module, name, count):
    monkeypatch.setattr(module, name, after(count, no_space, getattr(module, name)))
    with pytest.raises(
        InputError, match=r"the disk is full; .* GB are needed\. .*free some space, or choose"
    ):
        lowbit.convert(src, tmp_path / "a" / "b" / "out", "int8", max_shard_size="200KB")
    monkeypatch.undo()
    assert not (tmp_path / "a").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no file that is always full")
@pytest.mark.parametrize("lines", [0, 2])
def test_no_space_for_the_journal(src, tmp_path, monkeypatch, lines):
    """A line that could not be written was in the way of closing the file: no explanation, and OUT stayed locked."""
    line, count = Journal._line, iter(range(100))

    def full_after(self, entry):
        if next(count) == lines:
            (journal,) = (f for f in Path("/proc/self/fd").iterdir() if is_journal(f))
            with Path("/dev/full").open("wb") as full:
                os.dup2(full.fileno(), int(journal.name))
        line(self, entry)

    def is_journal(fd: Path) -> bool:
        with suppress(OSError):
            return fd.readlink().name == "journal.jsonl"
        return False

    monkeypatch.setattr(Journal, "_line", full_after)
    with pytest.raises(InputError, match="the disk is full"):
        lowbit.convert(src, tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="nothing says which file a descriptor is")
def test_a_file_system_that_fails_again_at_closing(src, tmp_path, monkeypatch):
    """As one of a network may, which writes only then: what failed first is explained, and nothing is left."""
    close = os.close

    def closing(fd):
        file = Path(f"/proc/self/fd/{fd}").readlink()
        close(fd)
        if file.parent.name == PARTIAL:
            no_space()

    monkeypatch.setattr(os, "pwrite", after(30, no_space, os.pwrite))
    monkeypatch.setattr(os, "close", closing)
    with pytest.raises(InputError, match="the disk is full"):
        lowbit.convert(src, tmp_path / "out", "int8", max_shard_size="200KB")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("renames", [0, 3, 7, 9])
def test_a_failure_among_the_renames_leaves_nothing(src, tmp_path, monkeypatch, renames):
    out = tmp_path / "out"
    out.mkdir()
    failing = after(renames, no_space, writer.OutputDirectory._show)
    monkeypatch.setattr(writer.OutputDirectory, "_show", lambda *a: failing(*a))
    with pytest.raises(InputError, match="the disk is full"):
        lowbit.convert(src, out, "int8", max_shard_size="200KB")
    assert list(out.iterdir()) == []


def test_a_small_file_system(tmp_path, src):
    """A real one, where mounting is allowed: refused before any work, and full in the midst of it."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(small)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(InputError, match=r"expected .* MB of free disk space, found .* MB; free some"):
            lowbit.convert(src, small / "out", "int8")
        assert list(small.iterdir()) == []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writer.OutputDirectory, "_check_space", lambda self: None)
            with pytest.raises(InputError, match="the disk is full"):
                lowbit.convert(src, small / "out", "int8")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=False)


def test_a_limit_on_file_size(tmp_path, src):
    """RLIMIT_FSIZE is the kernel's own way of saying EFBIG in the midst of a file."""
    code = (
        "import resource, signal, sys, lowbit\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: lowbit.convert(sys.argv[1], sys.argv[2], 'int8')\n"
        "except lowbit.InputError as error: print(error); sys.exit(2)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(src), str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "File too large" in done.stdout and not (tmp_path / "out").exists()


def test_too_little_space_is_refused_before_any_work(src, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(InputError, match="expected 2 MB of free disk space, found 0 MB; free some"):
        lowbit.convert(src, tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()


def test_files_to_carry_need_space_too(tmp_path, monkeypatch):
    src = write(tmp_path / "src", *llama(), files={"tokenizer.json": "x" * 5_000_000})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 4_000_000))
    with pytest.raises(InputError, match="expected 6 MB of free disk space, found 4 MB; free some"):
        lowbit.convert(src, tmp_path / "out", "int8")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_no_permission_to_write(src, tmp_path, monkeypatch, code):
    def refuse(self, *args, **kw):
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match=r"out: no permission to write here \(.*\); choose another place"):
        lowbit.convert(src, tmp_path / "out", "int8")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission_to_write_for_real(src, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(InputError, match="no permission to write here"):
        lowbit.convert(src, locked / "out", "int8")


def test_an_unreadable_file_of_the_source_is_named_as_such(src, tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError(errno.EACCES, "Permission denied", str(source))

    monkeypatch.setattr(shutil, "copyfile", refuse)
    with pytest.raises(InputError, match=r"src/.*: Permission denied; check the file"):
        lowbit.convert(src, tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()


def test_an_unreadable_file_to_carry_is_refused_before_any_work(src, tmp_path, monkeypatch):
    monkeypatch.setattr(writer.os, "access", lambda path, mode: Path(path).name != "tokenizer.json")
    monkeypatch.setattr(execute.Worker, "run", None)
    with pytest.raises(InputError, match=r"tokenizer\.json: cannot be read, and is to be carried along"):
        lowbit.convert(src, tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_network_that_fails_for_a_while_costs_nothing(src, tmp_path, monkeypatch, code):
    def away(*args):
        raise OSError(code, os.strerror(code))

    out = tmp_path / "out"
    monkeypatch.setattr(os, "preadv", after(12, away, os.preadv))
    with pytest.raises(
        InputError, match="What was written stays; check the file and the disk, and run again"
    ):
        lowbit.convert(src, out, "int8", workers=1)
    monkeypatch.undo()
    assert not (out / "config.json").exists()
    done = lowbit.convert(src, out, "int8")
    assert done.resumed_jobs > 5 and lowbit.verify(out, src).ok


def test_what_is_no_fault_of_the_input_costs_nothing(src, tmp_path, monkeypatch):
    write_json = writer.write_json

    def fails(file, value):
        if file.name == "lowbit_manifest.json":
            raise MemoryError
        write_json(file, value)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_json", fails)
        with pytest.raises(MemoryError):
            lowbit.convert(src, tmp_path / "out", "int8")
    done = lowbit.convert(src, tmp_path / "out", "int8")
    assert done.resumed_jobs == len(done.plan.jobs) and lowbit.verify(tmp_path / "out").ok


def test_a_source_that_shrinks_while_it_is_read(src, tmp_path, monkeypatch):
    def nothing(fd, buffers, offset):
        return 0

    monkeypatch.setattr(os, "preadv", nothing)
    with pytest.raises(InputError, match="the file ended; it changed while reading"):
        lowbit.convert(src, tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", [None, Part(number=2, count=3)])
def test_a_source_that_changes_while_it_is_read(src, tmp_path, monkeypatch, part):
    """A download that reserves its files first: their headers are there, and zeros for what is to come."""
    run, shard = execute.Worker.run, min(src.glob("*.safetensors"))

    def downloading(self, job):
        with shard.open("r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            stream.write(b"\1")
        os.utime(shard, ns=(0, 0))  # whatever the clock's ticks are
        return run(self, job)

    monkeypatch.setattr(execute.Worker, "run", downloading)
    with pytest.raises(InputError, match=f"{shard.name}: .*changed while it was read; convert again when"):
        lowbit.convert(src, tmp_path / "out", "int8", part=part, max_shard_size="200KB")
    assert not (tmp_path / "out").exists()


def test_short_reads_and_writes_are_continued(src, tmp_path, monkeypatch):
    """The kernel may transfer less than asked for."""
    lowbit.convert(src, tmp_path / "whole", "int8")
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, b, at: preadv(fd, [memoryview(b[0])[:1000]], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, b, at: pwrite(fd, memoryview(b)[:1000], at))
    lowbit.convert(src, tmp_path / "parts", "int8")
    monkeypatch.undo()
    assert everything(tmp_path / "whole") == everything(tmp_path / "parts")


def test_an_error_in_one_job_stops_the_others(tmp_path):
    tensors, config = llama(layers=6)
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = torch.nan
    src = write(tmp_path / "src", tensors, config)
    seen: list[int] = []
    with pytest.raises(InputError, match=r"found nan at \[0, 0\]"):
        lowbit.convert(src, tmp_path / "out", "int8", workers=2, progress=seen.append)
    assert not (tmp_path / "out").exists()


# --- NaN and Inf in what is copied ------------------------------------------------------------

EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_what_is_copied_with_nan_or_inf_is_named(tmp_path, dtype, bad):
    tensors, config = llama()
    large = torch.randn(1024, 600).to(dtype)
    tensors[EMBEDDING], tensors[NORM] = large.clone(), tensors[NORM].to(dtype)
    tensors[NORM][-1] = bad
    src = write(tmp_path / "src", tensors, config)
    assert lowbit.convert(src, tmp_path / "norm", "int8").not_finite == (NORM,)
    for row in (0, 500, 1023):  # in the first, a later and the last piece that is looked at
        tensors[EMBEDDING] = large.clone()
        tensors[EMBEDDING][row, row // 2] = bad
        src = write(tmp_path / f"src{row}", tensors, config)
        done = lowbit.convert(src, tmp_path / f"out{row}", "int8")
        assert done.not_finite == (EMBEDDING, NORM)
        found = lowbit.verify(tmp_path / f"out{row}")
        assert [p.partition(":")[0] for p in found.problems] == [EMBEDDING, NORM]


def test_what_is_kept_or_carried_as_codes_is_named_too(tmp_path):
    tensors, config = block_fp8(*llama())
    bad = "model.layers.0.mlp.up_proj.weight"
    tensors[bad].view(torch.uint8)[200, 7] = 0xFF
    src = write(tmp_path / "src", tensors, config)
    assert lowbit.convert(src, tmp_path / "same", "fp8-block").not_finite == (bad,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_finite_agrees_with_torch_on_every_pattern(dtype):
    name = {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    wanted = torch.isfinite(bits.view(dtype)).tolist()
    raw = bits.numpy().view(np.uint8).reshape(-1, 2)
    assert [finite(row, name) for row in raw] == wanted


def test_finite_agrees_with_torch_on_every_byte():
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    for name, dtype in (("F8_E4M3", torch.float8_e4m3fn), ("F8_E8M0", torch.float8_e8m0fnu)):
        wanted = torch.isfinite(codes.view(dtype).float()).tolist()
        assert [finite(row, name) for row in codes.numpy().reshape(-1, 1)] == wanted
    assert finite(np.full(8, 255, np.uint8), "I8") and finite(np.empty(0, np.uint8), "BF16")


def test_a_resumed_run_knows_what_was_copied_before_it(tmp_path):
    tensors, config = llama(layers=6)
    tensors[EMBEDDING][0, 0] = torch.nan
    src, out = write(tmp_path / "src", tensors, config), tmp_path / "out"
    process = start(src, out)
    wait_for_jobs(out, 10)
    process.kill()
    process.wait(60)
    job = next(n for n, j in enumerate(lowbit.plan(src).jobs) if j.name == EMBEDDING)
    assert job in read_journal(out / PARTIAL / "journal.jsonl").done
    assert lowbit.convert(src, out, "int8", max_shard_size="200KB").not_finite == (EMBEDDING,)


# --- where OUT may be -------------------------------------------------------------------------


def test_out_must_be_empty_or_new(src, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    lowbit.convert(src, out, "int8")
    first = everything(out)
    with pytest.raises(InputError, match=r"expected an empty directory, found 5 entries .*--overwrite"):
        lowbit.convert(src, out, "int8")
    assert everything(out) == first
    lowbit.convert(src, out, "fp8", overwrite=True, max_shard_size="200KB")
    lowbit.convert(src, tmp_path / "fresh", "fp8", max_shard_size="200KB")
    assert everything(out) == everything(tmp_path / "fresh")


def test_overwrite_leaves_no_index_of_a_checkpoint_that_has_no_manifest(src, tmp_path):
    """It would name shards that are gone, and a description tensors, or a quantization that is no more."""
    files = {DESCRIPTION: "{}", MODELOPT: "{}", "consolidated.safetensors.index.json": "{}"}
    out = write(tmp_path / "out", *deepseek_v3(), files=files, place=lambda n: len(n) % 2)
    lowbit.convert(src, out, "int8", overwrite=True)
    lowbit.convert(src, tmp_path / "fresh", "int8")
    assert everything(out) == everything(tmp_path / "fresh")


def test_overwrite_replaces_checkpoints_only(src, tmp_path):
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.tex").write_text("x")
    with pytest.raises(
        InputError, match="--overwrite replaces a checkpoint, found a directory that holds none"
    ):
        lowbit.convert(src, precious, "int8", overwrite=True)
    assert everything(precious) == {"thesis.tex": b"x"}


@pytest.mark.parametrize("where", ["", "sub/deep", "link", "../src", "sub/../.."])
def test_out_equal_to_inside_or_around_the_source(src, tmp_path, where):
    if where == "link":
        (tmp_path / "link").symlink_to(src)
        target = tmp_path / "link" / "out"
    else:
        target = src / where
    before = everything(src)
    for overwrite in (False, True):
        with pytest.raises(
            InputError, match=r"outside the source|holds the source|expected an empty directory"
        ):
            lowbit.convert(src, target, "int8", overwrite=overwrite)
    assert everything(src) == before


def test_out_a_file(src, tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(InputError, match="expected a directory or nothing, found a file"):
        lowbit.convert(src, tmp_path / "out", "int8")
    with pytest.raises(InputError):
        lowbit.convert(src, tmp_path / "out" / "below", "int8")


@pytest.mark.slow
def test_offsets_beyond_four_gigabytes(tmp_path):
    """A sparse source with a weight that begins beyond 2³² bytes: what is read there is what lies there."""
    import struct

    rows, cols = 32, 64
    tail = torch.randn(rows, cols).to(torch.bfloat16)
    big = (2**32 + 4096) // 2 // cols
    size = big * cols * 2
    header = {
        "a.embed_tokens.weight": {"dtype": "BF16", "shape": [big, cols], "data_offsets": [0, size]},
        "b.weight": {"dtype": "BF16", "shape": [rows, cols], "data_offsets": [size, size + tail.numel() * 2]},
    }
    text = json.dumps(header).encode()
    src = tmp_path / "src"
    src.mkdir()
    with (src / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.seek(size, 1)
        stream.write(tail.view(torch.uint8).numpy().tobytes())
    plan = lowbit.plan(src, "int8")
    job = next(j for j in plan.jobs if j.kind == "quantize")
    assert job.source is not None and job.source.ref.offset > 2**32
    read = execute.read_bytes(job.source.ref)
    assert bytes(read) == tail.view(torch.uint8).numpy().tobytes()
    assert max(o.offset for j in plan.jobs for o in j.outputs.values()) > 2**32
