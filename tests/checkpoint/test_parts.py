"""Several machines convert together: parts of a plan, in any order, at once, killed, and given again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conversions import FILES, RUN, everything, start
from sample_models import deepseek_v3, write

import lowbit
from lowbit.checkpoint import writer
from lowbit.checkpoint.headers import PARTIAL
from lowbit.checkpoint.journal import Journal
from lowbit.checkpoint.layout import Shard
from lowbit.checkpoint.parts import Part
from lowbit.errors import InputError

SIZE = "200KB"


def part(text: str) -> Part:
    return Part.parse(text)


@pytest.fixture
def src(tmp_path) -> Path:
    return write(tmp_path / "src", *deepseek_v3(), files=FILES, place=lambda n: len(n) % 2)


@pytest.fixture
def alone(src, tmp_path) -> dict[str, bytes]:
    """What one machine makes."""
    lowbit.convert(src, tmp_path / "alone", "int8", max_shard_size=SIZE)
    return everything(tmp_path / "alone")


def convert(src: Path, out: Path, which: str, **more):
    return lowbit.convert(src, out, "int8", max_shard_size=SIZE, part=part(which), **more)


@pytest.mark.parametrize("sizes", [[1] * 7, [100, 1, 1], [1, 1, 100], [1, 1, 100, 1, 1, 1], [5, 5, 5, 5]])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_parts_share_the_files(sizes, count):
    shards = [Shard(file=str(i), header=b"", nbytes=s, names=()) for i, s in enumerate(sizes)]
    found = [sorted(Part(number=i + 1, count=count).shards(shards)) for i in range(count)]
    assert [n for numbers in found for n in numbers] == list(range(len(sizes)))
    assert all(found)


def test_parts_are_about_as_large():
    shards = [Shard(file=str(i), header=b"", nbytes=10 + i % 3, names=()) for i in range(60)]
    sizes = [sum(shards[n].nbytes for n in Part(number=i + 1, count=4).shards(shards)) for i in range(4)]
    assert max(sizes) - min(sizes) < 24


@pytest.mark.parametrize("order", ["1 2 3", "3 1 2"])
def test_parts_in_any_order_give_what_one_machine_gives(src, tmp_path, alone, order):
    out = tmp_path / "out"
    *first, last = order.split()
    for number in first:
        done = convert(src, out, f"{number}/3")
        assert done.missing and done.manifest == {}
        assert [p.name for p in out.iterdir()] == [PARTIAL]
        with pytest.raises(InputError, match="unfinished conversion"):
            lowbit.verify(out)
    done = convert(src, out, f"{last}/3")
    assert done.missing == () and everything(out) == alone
    assert done.manifest == json.loads((out / "lowbit_manifest.json").read_text())
    assert lowbit.verify(out).ok


def test_parts_at_once(src, tmp_path, alone):
    out = tmp_path / "out"
    command = f"{sys.executable} -m lowbit convert {src} {out} --max-shard-size {SIZE} --json --part".split()
    running = [
        subprocess.Popen([*command, f"{i}/4"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(1, 5)
    ]
    texts = [p.communicate(timeout=120) for p in running]
    assert [p.returncode for p in running] == [0] * 4, texts
    assert everything(out) == alone
    assert sorted(json.loads(t[0])["part"] for t in texts) == ["1/4", "2/4", "3/4", "4/4"]


@pytest.mark.parametrize("locks", ["of each machine", "none"])
def test_parts_that_end_together_without_common_locks(src, tmp_path, alone, monkeypatch, locks):
    """NFS keeps the locks of directories to each machine: here each part is one, and has them all for itself."""
    monkeypatch.setattr(
        writer, "lock", lambda *a, **kw: -1 if locks == "none" else os.open(a[0], os.O_RDONLY)
    )
    out, together = tmp_path / "out", threading.Barrier(3)
    synced, last = Journal.synced, writer.OutputDirectory._last

    def synced_together(self, shards):
        synced(self, shards)
        together.wait(60)

    def last_together(self, record):
        together.wait(60)
        return last(self, record)

    monkeypatch.setattr(Journal, "synced", synced_together)
    monkeypatch.setattr(writer.OutputDirectory, "_last", last_together)
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda which: convert(src, out, which), ["1/3", "2/3", "3/3"]))
    assert sorted(bool(d.manifest) for d in done) == [False, False, True]
    assert all(d.missing == () for d in done) and everything(out) == alone


def test_a_part_that_is_given_again_goes_on(src, tmp_path, alone):
    out = tmp_path / "out"
    convert(src, out, "2/2")
    first = convert(src, out, "2/2")
    assert first.resumed_jobs > 0 and first.missing
    done = convert(src, out, "1/2")
    assert done.resumed_jobs == 0 and everything(out) == alone


def test_a_killed_part(src, tmp_path, alone):
    out = tmp_path / "out"
    mine = RUN.replace("max_shard_size=", "part=Part(number=1, count=2), max_shard_size=")
    assert mine != RUN
    process = start(src, out, "from lowbit.checkpoint.parts import Part" + mine)
    while not (out / PARTIAL / "journal-1-of-2.jsonl").exists():
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert convert(src, out, "2/2").missing
    assert convert(src, out, "1/2").missing == ()
    assert everything(out) == alone


@pytest.mark.parametrize("torn", ["", '{"plan": "12'])
def test_a_part_that_was_killed_before_its_first_line(src, tmp_path, alone, torn):
    out = tmp_path / "out"
    (out / PARTIAL).mkdir(parents=True)
    (out / PARTIAL / "journal-1-of-2.jsonl").write_text(torn)
    assert convert(src, out, "2/2").missing
    assert convert(src, out, "1/2").missing == () and everything(out) == alone


def test_one_machine_finishes_what_parts_began(src, tmp_path, alone):
    out = tmp_path / "out"
    begun = convert(src, out, "1/3")
    jobs = len(begun.plan.jobs)
    done = lowbit.convert(src, out, "int8", max_shard_size=SIZE)
    assert 0 < done.resumed_jobs < jobs and everything(out) == alone


def test_another_number_of_parts_goes_on(src, tmp_path, alone):
    out = tmp_path / "out"
    convert(src, out, "1/3")
    assert convert(src, out, "1/2").resumed_jobs > 0
    assert convert(src, out, "2/2").missing == ()
    assert everything(out) == alone


def test_other_settings_do_not_mix(src, tmp_path):
    out = tmp_path / "out"
    convert(src, out, "1/2")
    with pytest.raises(InputError, match="another source or with other settings"):
        lowbit.convert(src, out, "fp8", max_shard_size=SIZE, part=part("2/2"))
    done = lowbit.convert(src, out, "fp8", max_shard_size=SIZE, part=part("2/2"), overwrite=True)
    assert done.missing
    lowbit.convert(src, out, "fp8", max_shard_size=SIZE, part=part("1/2"), overwrite=True)
    assert lowbit.verify(out).ok


def test_journals_of_two_conversions_are_nobodys(src, tmp_path):
    """As where the file system has no locks, and both begin at once."""
    out = tmp_path / "out"
    convert(src, out, "1/2")
    for other in "abcdefghij":
        (out / PARTIAL / "journal-2-of-2.jsonl").write_text(json.dumps({"plan": other}) + "\n")
        before = everything(out)
        with pytest.raises(
            InputError, match="unfinished conversion of another source or with other settings"
        ):
            convert(src, out, "2/2")
        assert everything(out) == before


def test_a_failing_part_takes_only_its_own_files(src, tmp_path, monkeypatch, alone):
    from lowbit.checkpoint import execute

    out = tmp_path / "out"
    convert(src, out, "1/2")
    before = everything(out)

    def fails(*args, **kwargs):
        raise InputError("expected finite weights")

    with monkeypatch.context() as patch:
        patch.setattr(execute.Worker, "_write", fails)
        with pytest.raises(InputError, match="expected finite"):
            convert(src, out, "2/2")
    assert everything(out) == before
    assert convert(src, out, "2/2").missing == () and everything(out) == alone


def test_a_first_part_that_fails_leaves_nothing(src, tmp_path, monkeypatch):
    from lowbit.checkpoint import execute

    def fails(*args, **kwargs):
        raise InputError("expected finite weights")

    monkeypatch.setattr(execute.Worker, "_write", fails)
    with pytest.raises(InputError, match="expected finite"):
        convert(src, tmp_path / "deep" / "out", "2/2")
    assert not (tmp_path / "deep").exists()


def test_a_part_that_finds_too_little_space_leaves_nothing(src, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(InputError, match="free disk space"):
        convert(src, tmp_path / "deep" / "out", "1/2")
    assert not (tmp_path / "deep").exists()


def test_parts_share_the_lock_and_a_whole_conversion_does_not(src, tmp_path):
    out = tmp_path / "out"
    plan = lowbit.plan(src, "int8", max_shard_size=SIZE)
    one = writer.OutputDirectory(out, plan, part=part("1/2"))
    one.prepare()
    writer.OutputDirectory(out, plan, part=part("2/2")).prepare()
    with pytest.raises(InputError, match="another conversion is writing here"):
        writer.OutputDirectory(out, plan).prepare()


def test_parts_that_begin_together_tidy_up_once(src, tmp_path, alone):
    out = tmp_path / "out"
    lowbit.convert(src, out, "fp8", max_shard_size=SIZE, part=part("1/2"))
    plan = lowbit.plan(src, "int8", max_shard_size=SIZE)
    both = [writer.OutputDirectory(out, plan, part=part(which), overwrite=True) for which in ("1/2", "2/2")]
    for directory in both:
        directory.prepare()
    for directory in both:
        directory.abandon()
    for which in ("1/2", "2/2"):
        convert(src, out, which)
    assert everything(out) == alone


def test_a_directory_that_another_part_makes_in_the_same_moment(src, tmp_path, monkeypatch, alone):
    """Parts that were begun together: one of them ended with "File exists"."""
    mkdir = Path.mkdir

    def late(path, *args, **options):
        if not (args or options or path.exists()):
            mkdir(path)
        mkdir(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", late)
    for which in ("1/2", "2/2"):
        convert(src, tmp_path / "new" / "out", which)
    assert everything(tmp_path / "new" / "out") == alone


def test_a_part_does_not_wait_for_another_conversion_for_ever(src, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "TIDY_SECONDS", 0.3)
    plan, out = lowbit.plan(src, "int8", max_shard_size=SIZE), tmp_path / "out"
    writer.OutputDirectory(out, plan).prepare()
    with pytest.raises(InputError, match="another conversion is writing here"):
        writer.OutputDirectory(out, plan, part=part("1/2")).prepare()


def test_a_part_removes_nothing_of_another_conversion_at_work(src, tmp_path, monkeypatch):
    """Which parts share among themselves."""
    monkeypatch.setattr(writer, "TIDY_SECONDS", 0.3)
    plan, out = lowbit.plan(src, "int8", max_shard_size=SIZE), tmp_path / "out"
    at_work = writer.OutputDirectory(out, plan, part=part("1/2"))
    at_work.prepare()
    before = everything(out)
    other = lowbit.plan(src, "fp8", max_shard_size=SIZE)
    with pytest.raises(InputError, match="another conversion is writing here"):
        writer.OutputDirectory(out, other, part=part("1/2"), overwrite=True).prepare()
    assert everything(out) == before


@pytest.mark.parametrize("text", ["2", "a/b", "-1/2", "0/2", "3/2", "1/0"])
def test_bad_parts(src, tmp_path, text):
    with pytest.raises(InputError, match=r"expected (--part I/N|part I of N) such as"):
        convert(src, tmp_path / "out", text)


@pytest.mark.parametrize(("number", "count"), [(0, 1), (3, 2), (-1, 4)])
def test_parts_that_are_none(number, count):
    with pytest.raises(InputError, match=f"expected part I of N .* found {number} of {count}"):
        Part(number=number, count=count)


def test_more_parts_than_files(src, tmp_path):
    with pytest.raises(InputError, match=r"found 500 parts and \d+ files.*--max-shard-size"):
        convert(src, tmp_path / "out", "1/500")
    assert not (tmp_path / "out").exists()
