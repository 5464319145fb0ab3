"""Whether a conversion can go to a place, which nothing here touches."""

from __future__ import annotations

import os
from pathlib import Path

from lowbit.checkpoint.headers import MANIFEST, PARTIAL, Checkpoint
from lowbit.errors import InputError

# Stands in PARTIAL while finished files are moved out of it; of several parts, from when one has set about it.
FINISHING = "finishing"
CONFIG = "config.json"


def check_place(out: Path, source: Checkpoint, *, overwrite: bool, stale: bool = False) -> None:
    """Raise InputError where no conversion of `source` can go to `out`. Nothing is touched.

    `stale`: what lies unfinished there is not what would go on.
    """
    here, there = out.resolve(), source.root.resolve()
    if here == there or there in here.parents:
        raise InputError(
            f"{out}: expected an output directory outside the source {source.root}; choose another place"
        )
    if here in there.parents and overwrite:
        raise InputError(f"{out}: holds the source; choose another place")
    # They are copied at the end, which may be hours away.
    for file in source.others:
        if not os.access(source.root / file, os.R_OK):
            raise InputError(
                f"{source.root / file}: cannot be read, and is to be carried along; check its permissions"
            )
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out}: expected a directory or nothing, found a file; choose another place")
    found = {p.name for p in out.iterdir()}
    finishing = not stale and (out / PARTIAL / FINISHING).exists()
    if found - {PARTIAL} and not overwrite and not finishing:
        raise InputError(
            f"{out}: expected an empty directory, found {len(found)} entries (such as {min(found)}); "
            "choose another, or give --overwrite"
        )
    if overwrite and not found & {PARTIAL, CONFIG, MANIFEST} and found:
        raise InputError(
            f"{out}: --overwrite replaces a checkpoint, found a directory that holds none "
            f"(but {min(found)}); choose another place"
        )


def another_unfinished(out: Path) -> InputError:
    """What is wrong where journals in `out` are of another plan."""
    return InputError(
        f"{out}: holds an unfinished conversion of another source or with other settings; "
        "run it again as it was to finish it, or give --overwrite to begin anew"
    )
