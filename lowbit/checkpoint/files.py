"""What a conversion asks of a file system: a directory for itself, files of a known size, others whole or absent."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from lowbit.checkpoint.layout import Shard
from lowbit.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# What a network's file system says while its server is away, or a disk of one bad read.
_MAY_PASS = ("EIO", "ESTALE", "ETIMEDOUT", "ENOTCONN", "ECONNRESET", "ECONNABORTED", "EHOSTDOWN", "EHOSTUNREACH",
             "ENETDOWN", "ENETUNREACH", "EREMOTEIO", "ESHUTDOWN")  # fmt: skip


def may_pass(error: OSError) -> bool:
    """Whether the same run may succeed later: what it has written, hours of work maybe, is worth keeping."""
    return error.errno in {getattr(errno, name, None) for name in _MAY_PASS}


def explain(error: OSError, out: Path, source: Path, *, nbytes: int, kept: bool) -> InputError:
    """An operating system's error while `nbytes` were being written to `out` → what to do about it.

    `kept`: what was written by then stays.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        left = "stays" if kept else "has been removed"
        return InputError(
            f"{out}: the disk is full; {nbytes / 1e9:.2f} GB are needed. "
            f"What was written {left}: free some space, or choose another disk"
        )
    ours = not isinstance(error.filename, str) or source not in Path(error.filename).parents
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and ours:
        return InputError(f"{out}: no permission to write here ({error.strerror}); choose another place")
    stays = ". What was written stays" if kept else ""
    suspect = "the network" if error.errno == errno.ENETUNREACH else "the file and the disk"
    return InputError(
        f"{error.filename or out}: {error.strerror or error}{stays}; check {suspect}, and run again"
    )


def lock(directory: Path, *, shared: bool = False, held: int = -1, what: str = "conversion") -> int:
    """Keep others of what we do out of a directory until the returned descriptor is closed.

    `shared`: but not those that share it too. `held`: a descriptor whose lock is changed. Raises
    InputError when one is at work there. −1 where the file system knows no locks.
    """
    if fcntl is None:
        return -1
    fd = held if held >= 0 else os.open(directory, os.O_RDONLY)
    got = hold(fd, shared=shared, wait=False)
    if got:
        return fd
    os.close(fd)
    if got is None:
        return -1
    raise InputError(f"{directory}: another {what} is writing here; wait for it, or choose another place")


def hold(fd: int, *, shared: bool = False, wait: bool = True) -> bool | None:
    """Lock an open file or directory, until it is closed; False where others have it, None where locks are unknown."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def cannot_make(path: Path) -> str:
    """Why nothing can be made at `path`, whose parents may be missing too; "" where it can. Nothing is touched."""
    try:
        there = next(p for p in path.absolute().parents if p.exists())
    except OSError as error:  # such as a parent that may not be looked into
        return f"{error.filename}: {error.strerror}"
    if not there.is_dir():
        return f"{there} is no directory"
    return "" if os.access(there, os.W_OK | os.X_OK) else f"{there} cannot be written to"


def make_directories(directory: Path, made: list[Path]) -> None:
    """A directory and those above it that are missing, each put into `made` when it is there."""
    missing = [p for p in (directory, *directory.parents) if not p.exists()]
    for path in reversed(missing):
        try:
            path.mkdir()
        except FileExistsError:
            if not path.is_dir():
                raise
            continue  # another part was faster
        made.append(path)


def create(file: Path, shard: Shard) -> int:
    """Open a shard, reserve its bytes on the disk, and write its header. What it holds stays."""
    fd = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(fd, 0, shard.nbytes)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
        os.ftruncate(fd, shard.nbytes)
        written = 0
        while written < len(shard.header):
            written += os.pwrite(fd, shard.header[written:], written)
    except OSError:
        os.close(fd)
        raise
    return fd


def write_json(file: Path, value: Any) -> None:
    """Write aside, sync, rename: the file is whole or absent.

    Half a surrogate pair, as in a file's name that is not UTF-8, becomes JSON's escape of it.
    """
    aside = file.with_name(f".{file.name}.part")
    with aside.open("w", encoding="utf-8", errors="backslashreplace") as stream:
        json.dump(value, stream, indent=2, ensure_ascii=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(file)


def sync(path: Path) -> None:
    """Bring a file, or the names in a directory, to the disk. Some file systems sync no directories, and say so."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF) or not path.is_dir():
            raise
    finally:
        os.close(fd)
