"""The output directory: work under OUT/.lowbit-partial, then show everything at once.

At the end everything is written and synced there first; then it is renamed, the shards
before the index, the other files and the manifest, and config.json last. A directory without
config.json is no model to any loader, so a killed run never looks finished. A run that was
killed between two renames moves the files back and goes on; one that was removing a checkpoint that it
replaces removes the rest. Of several parts (see `parts`) the
one that finds the files of all others finished does that.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lowbit.checkpoint.files import (
    create,
    explain,
    lock,
    make_directories,
    may_pass,
    sync,
    write_json,
)
from lowbit.checkpoint.headers import INDEX, MANIFEST, PARTIAL
from lowbit.checkpoint.journal import Journal, Record, read_journals
from lowbit.checkpoint.layout import index_of
from lowbit.checkpoint.manifest import listed_files, make_manifest
from lowbit.checkpoint.parts import Part
from lowbit.checkpoint.place import CONFIG, FINISHING, another_unfinished, check_place
from lowbit.checkpoint.plan import Plan
from lowbit.checkpoint.reading import file_checksum
from lowbit.errors import InputError
from lowbit.formats import DESCRIPTION, MODELOPT

# Stands in PARTIAL from the beginning where --overwrite was given: whoever goes on need not be told again. It may name
# files that an earlier conversion, killed while it showed them, left in OUT.
REPLACING = "replacing"
# So long a part waits for another to remove what an earlier conversion left.
TIDY_SECONDS = 30
# Below PARTIAL, the source's other files, whose names are not ours to choose.
OTHERS = Path("others")


class OutputDirectory:
    """OUT, from the first check to the last rename."""

    def __init__(self, out: Path, plan: Plan, *, overwrite: bool = False, part: Part | None = None) -> None:
        """Check that OUT can be used, without touching it. InputError when it cannot."""
        # `a/../b` names b only after links are followed, and only if a is there.
        self.out = out.resolve() if ".." in out.parts else out
        self.plan, self.part = plan, part or Part()
        self.shards = self.part.shards(plan.shards)
        self.partial = self.out / PARTIAL
        self.digest = plan.digest()
        self._stamps = plan.source.stamps()
        self._overwrite = overwrite
        self._created: list[Path] = []
        self._descriptors: dict[int, int] = {}
        self._shown: list[Path] = []
        self._old_removed = False
        self._lock = -1
        self._stale = self._kept = False
        self.journal: Journal | None = None
        self.record = Record()
        """What earlier runs of this plan, and other parts of it, had done when this one began."""
        self.missing: tuple[str, ...] = ()
        """Once this part is finished: files that others have yet to."""
        self.not_finite: tuple[str, ...] = ()
        """Once this part is finished: tensors that it, or one before, copied with NaN or Inf in them."""
        self._check()

    def _check(self) -> None:
        if self.partial.exists():
            self._read_journals()
            if self._stale and not self._overwrite:
                raise another_unfinished(self.out)
        check_place(self.out, self.plan.source, overwrite=self._overwrite, stale=self._stale)

    def _read_journals(self) -> None:
        record = read_journals(self.partial)
        self._stale = record.begun and record.digest != self.digest
        self.record = Record() if self._stale else record

    def prepare(self) -> dict[int, int]:
        """Create this part's shards at their full size, headers written; shard number → file descriptor."""
        try:
            make_directories(self.out, self._created)
            tidy = self._lock_out()
        except OSError as error:
            self._remove_made()  # no more: what else is there may be another's
            raise self.explain(error) from error
        try:
            self._check_space()
            if self._stale:
                self._remove_stale()
            self.partial.mkdir(exist_ok=True)
            self._move_back()
            if self._overwrite:
                (self.partial / REPLACING).touch()
            self.journal = Journal(self.partial / self.part.journal, self.digest)
            if tidy and not self.part.whole:
                self._lock = lock(self.out, shared=True, held=self._lock)
            for number in sorted(self.shards):
                shard = self.plan.shards[number]
                self._descriptors[number] = create(self.partial / shard.file, shard)
        except (OSError, InputError) as error:
            # What an earlier run wrote is still good when there is space again.
            if self.record.begun:
                self.abandon()
            else:
                self.discard()
            if isinstance(error, InputError):
                raise
            raise self.explain(error) from error
        except BaseException:  # Ctrl-C in a notebook, which would keep the lock
            self.abandon()
            raise
        return self._descriptors

    def _lock_out(self) -> bool:
        """Keep others out; → whether it falls to this run to move or remove what an earlier one left.

        Parts of one conversion work side by side, but nobody may be at work on what is moved or removed: of parts
        that begin together the first does that, and the others wait for it.
        """
        deadline = time.monotonic() + TIDY_SECONDS
        while True:
            tidy = self._stale or (self.partial / FINISHING).exists()
            try:
                self._lock = lock(self.out, shared=not self.part.whole and not tidy)
                return tidy
            except InputError:
                if self.part.whole or time.monotonic() > deadline or not self.partial.exists():
                    raise
            time.sleep(0.1)
            self._stale = False
            self._check()

    def _check_space(self) -> None:
        others = sum((self.plan.source.root / f).stat().st_size for f in self.plan.source.others)
        have = (
            sum(f.stat().st_size for f in self.partial.glob("*.safetensors")) if self.partial.exists() else 0
        )
        need, free = self.plan.output_bytes + others - have, shutil.disk_usage(self.out).free
        if need > free:
            raise InputError(
                f"{self.out}: expected {-(-need // 10**6)} MB of free disk space, found {free // 10**6} MB; "
                "free some, or choose another disk"
            )

    def explain(self, error: OSError) -> InputError:
        """What to do about an error of the operating system."""
        return explain(error, self.out, self.plan.source.root, nbytes=self.plan.output_bytes, kept=self._kept)

    def finish(self) -> dict[str, Any]:
        """Show the result under its final names; returns the manifest, or {} while other parts are missing."""
        assert self.journal is not None
        self._require_same_source()
        for fd in self._descriptors.values():
            os.fsync(fd)
        self.journal.synced(self.shards)
        self._close()
        if not self.part.whole:
            self._release()
        record = read_journals(self.partial)
        self.not_finite = tuple(sorted(record.not_finite))
        if not self.part.whole and not self._last(record):
            return {}
        beside = self._write_beside()
        checksums = {n: sum_ for sums in record.done.values() for n, sum_ in sums.items()}
        manifest = make_manifest(self.plan, self.digest, checksums=checksums, files=beside)
        write_json(self.partial / MANIFEST, manifest)
        (self.partial / FINISHING).touch()
        sync(self.partial)
        if (self.partial / REPLACING).exists():
            self._remove_old()
        for shard in self.plan.shards:
            self._show(Path(shard.file), Path(shard.file))
        for file, hidden in self._beside().items():
            if file == Path(CONFIG):
                self._sync_shown()
            self._show(hidden, file)
        self._sync_shown()
        self._shown = []
        # First, since beside it a result without a journal would be taken for one that any run may go on with.
        (self.partial / FINISHING).unlink()
        shutil.rmtree(self.partial)
        sync(self.out)
        self._release()
        return manifest

    def _require_same_source(self) -> None:
        """InputError where a shard changed since: a download that reserves its files first looks whole at once."""
        now = self.plan.source.stamps()
        if changed := [file for file, stamp in self._stamps.items() if now[file] != stamp]:
            raise InputError(
                f"{changed[0]}: expected a source that stays as it is, but it changed while it was read; "
                "convert again when it is complete"
            )

    def _beside(self) -> dict[Path, Path]:
        """All files but the shards → their names in PARTIAL, in the order in which they are shown."""
        written = [*self.plan.files, *([INDEX] if self.plan.indexed else [])]
        names = {Path(name): Path(name) for name in written}
        names |= {file: OTHERS / file for file in self.plan.source.others}
        return names | {
            Path(name): Path(name) for name in (MANIFEST, *([CONFIG] if self.plan.config else []))
        }

    def _write_beside(self) -> dict[str, str]:
        """All files but the shards and the manifest, into PARTIAL; name → checksum."""
        contents = dict(self.plan.files)
        if self.plan.indexed:
            contents[INDEX] = index_of(self.plan.shards)
        if self.plan.config:
            contents[CONFIG] = self.plan.config
        for name, content in contents.items():
            write_json(self.partial / name, content)
        checksums = {name: file_checksum(self.partial / name) for name in contents}
        for file in self.plan.source.others:
            copy = self.partial / OTHERS / file
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.plan.source.root / file, copy)
            sync(copy)
            checksums[str(file)] = file_checksum(copy)
        return checksums

    def _last(self, record: Record) -> bool:
        """Whether every part is done by what the journals say, and it falls to this one to show the result.

        The lock that parts share is given back before they are read: of those that end together, the
        last to do so gets it for itself. Where the file system keeps locks to each machine, or has none, several do:
        the first to make FINISHING goes on.
        """
        if self.partial.exists():  # else shown by another meanwhile
            shards = enumerate(self.plan.shards)
            self.missing = tuple(s.file for number, s in shards if number not in record.synced)
        if self.missing:
            return False
        try:
            self._lock = lock(self.out)
            (self.partial / FINISHING).touch(exist_ok=False)
        except (InputError, FileExistsError, FileNotFoundError):  # another does, or has done so
            self._release()
            return False
        return True

    def _show(self, hidden: Path, file: Path) -> None:
        (self.out / file).parent.mkdir(parents=True, exist_ok=True)
        (self.partial / hidden).replace(self.out / file)
        self._shown.append(file)

    def _sync_shown(self) -> None:
        """The names of all that is shown by now, in OUT and in folders below it."""
        for folder in {parent for file in self._shown for parent in file.parents}:
            sync(self.out / folder)

    def _move_back(self) -> None:
        """Undo the renames of a run that was killed among them; config.json goes first.

        Shards come last: while there is one in OUT that PARTIAL has not, what else PARTIAL has not is in OUT ours too.
        """
        if not (self.partial / FINISHING).exists():
            return
        (self.out / CONFIG).unlink(missing_ok=True)
        shards = [shard.file for shard in self.plan.shards]
        shown = [f for f in shards if not (self.partial / f).exists() and (self.out / f).exists()]
        if shown:
            for file, hidden in self._beside().items():
                if not (self.partial / hidden).exists():
                    self._remove(file)
        elif (self.partial / REPLACING).exists():
            self._remove_old()
        for name in shown:
            (self.out / name).replace(self.partial / name)
        (self.partial / FINISHING).unlink()

    def _remove_stale(self) -> None:
        """Another conversion in PARTIAL, which this one replaces; what it has shown goes with the old checkpoint.

        Not what it was yet to show: a file of that name in OUT may be anybody's.
        """
        hidden = (self.partial, self.partial / OTHERS)
        named = listed_files(self.partial / MANIFEST)
        shown = [name for name in named if not any((place / name).exists() for place in hidden)]
        if shown:
            left = [*listed_files(self.partial / REPLACING), *shown]
            write_json(self.partial / REPLACING, {"files": left})
        for name in (FINISHING, MANIFEST):  # first: neither is true of what is left
            (self.partial / name).unlink(missing_ok=True)
        for path in self.partial.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != REPLACING:
                path.unlink()

    def _remove_old(self) -> None:
        """The checkpoint that is replaced: config first, so that no moment shows half of each.

        And all that its manifest names, since another model's chat template, say, would be used; the manifest last.
        """
        self._old_removed = True
        named = listed_files(self.out / MANIFEST) + listed_files(self.partial / REPLACING)
        ours = [Path(name) for name in named if ".." not in Path(name).parts and not Path(name).is_absolute()]
        indexes = (file.relative_to(self.out) for file in self.out.glob("*.safetensors.index.json"))
        for file in (Path(CONFIG), *ours, *indexes, Path(DESCRIPTION), Path(MODELOPT)):
            self._remove(file)
        for shard in self.out.glob("*.safetensors"):
            shard.unlink()
        self._remove(Path(MANIFEST))

    def _remove(self, file: Path) -> None:
        """A file of OUT, and the folders below OUT that are empty then."""
        (self.out / file).unlink(missing_ok=True)
        for parent in file.parents[:-1]:
            with suppress(OSError):  # not empty
                (self.out / parent).rmdir()

    def discard(self) -> None:
        """Remove what this run wrote, and the directories that it made."""
        self._close()
        if not self.part.whole:
            self._discard_part()
            return
        for file in reversed(self._shown):
            self._remove(file)
        shutil.rmtree(self.partial, ignore_errors=True)
        self._release()
        self._remove_made()

    def _discard_part(self) -> None:
        """The files of this part; those of others are theirs."""
        for number in self.shards:
            (self.partial / self.plan.shards[number].file).unlink(missing_ok=True)
        (self.partial / self.part.journal).unlink(missing_ok=True)
        self._release()
        with suppress(OSError):  # not there, or not empty
            self.partial.rmdir()
        self._remove_made()

    def _remove_made(self) -> None:
        """The directories that this run made."""
        for path in reversed(self._created):
            with suppress(OSError):  # not empty
                path.rmdir()

    def give_up(self, error: OSError) -> InputError:
        """Stop after an error of the operating system, and keep what a later run can use; → what to do about it."""
        # Once the old checkpoint is removed, neither it nor the new one would be left.
        if may_pass(error) or self._old_removed:
            self.abandon()
        else:
            self.discard()
        return self.explain(error)

    def abandon(self) -> None:
        """Stop, and leave what was written for a later run to resume."""
        self._kept = True
        self._close()
        self._release()

    def _release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _close(self) -> None:
        for fd in self._descriptors.values():
            with suppress(OSError):  # as of the journal
                os.close(fd)
        self._descriptors = {}
        if self.journal is not None:
            self.journal.close()
