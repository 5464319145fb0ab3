"""A checkpoint on the Hugging Face Hub: its headers at once, its weights one file at a time.

Locally it is a directory below HF_HOME in which JSON files are whole, shards end behind their headers, and
other files are empty until they are fetched. `open_checkpoint` reads it with the sizes that the Hub names, so that all
of planning is as for a download. Weights that nobody fetched cannot be read by mistake: their file ends before them.

All talking to the Hub is `huggingface_hub`'s: tokens, mirrors (HF_ENDPOINT), proxies, retries, Xet.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from lowbit.checkpoint.files import hold
from lowbit.checkpoint.headers import MAX_HEADER_BYTES, Checkpoint, header_bytes
from lowbit.checkpoint.opening import open_checkpoint, repository_named
from lowbit.checkpoint.others import WEIGHT_SUFFIXES
from lowbit.errors import InputError

Progress = Callable[[int], None]
"""Called with the number of bytes just fetched, from any thread."""

# Most headers are shorter: one request for each.
_HEAD_BYTES = 512 << 10
# Requests for headers at a time.
_REQUESTS = 16
# Where files arrive, and what says whose turn it is; hidden directories are none of a checkpoint's.
_ARRIVING, _LOCKS = ".arriving-", ".locks"
_HASH_BYTES = 8 << 20


@dataclass(frozen=True)
class RemoteFile:
    """What the Hub says of one file."""

    nbytes: int
    sha256: str | None
    """Of its contents; None for small files, which the Hub keeps in git."""
    digest: str
    """Hexadecimal, another for other contents."""


@dataclass(frozen=True)
class Repository:
    """A model repository at one commit, and the directory that stands for it here."""

    name: str
    commit: str
    root: Path
    files: Mapping[Path, RemoteFile]
    """All of them, by where they lie, or will lie, below `root`."""

    def __str__(self) -> str:
        return f"{self.name}@{self.commit}"

    def stamps(self, files: Iterable[Path]) -> dict[Path, tuple[int, int]]:
        """File → (bytes, a number that is another for other contents)."""
        return {f: (self.files[f].nbytes, int(self.files[f].digest[:15], 16)) for f in files}

    def nbytes(self, files: Iterable[Path]) -> int:
        """Of those among `files` that are its own, here or not."""
        return sum(self.files[f].nbytes for f in files if f in self.files)

    def here(self, file: Path) -> bool:
        """Whether all of a file has been fetched."""
        try:
            return file.stat().st_size == self.files[file].nbytes
        except OSError:
            return False

    def fetch(self, file: Path, fetched: Progress = lambda count: None) -> None:
        """Have a file here, whole: out of the Hub's own cache, or over the network, and then checked.

        Raises OSError (ENETUNREACH) for whatever kept it away: what a conversion has done by then is worth keeping.
        """
        name = file.relative_to(self.root).as_posix()
        try:
            with self._turn(name):  # of several runs one fetches it, and all read the same file
                if self.here(file):
                    fetched(self.files[file].nbytes)
                else:
                    self._fetch(file, name, fetched)
        except Exception as error:  # of huggingface_hub, of what it speaks HTTP with, of the disk
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            why = f"no space is left in {self.root}; free some, or set HF_HOME" if full else _short(error)
            raise OSError(errno.ENETUNREACH, f"cannot be fetched: {why}", f"{self.name}/{name}") from error

    def _fetch(self, file: Path, name: str, fetched: Progress) -> None:
        import huggingface_hub as hub

        remote = self.files[file]
        cached = hub.try_to_load_from_cache(self.name, name, revision=self.commit)
        if isinstance(cached, str) and Path(cached).stat().st_size == remote.nbytes:
            aside = file.with_name(f".{file.name}.link")
            aside.unlink(missing_ok=True)
            aside.symlink_to(cached)
            aside.replace(file)
            fetched(remote.nbytes)
            return
        with tempfile.TemporaryDirectory(prefix=_ARRIVING, dir=self.root) as folder:
            got = Path(
                hub.hf_hub_download(
                    self.name, name, revision=self.commit, local_dir=folder, tqdm_class=_counter(fetched)
                )
            )
            found = _sha256(got) if remote.sha256 else None
            if got.stat().st_size != remote.nbytes or found != remote.sha256:
                raise OSError("what arrived is not what the Hub names: its size or checksum differs")
            got.replace(file)

    @contextmanager
    def _turn(self, name: str) -> Iterator[None]:
        locks = self.root / _LOCKS
        locks.mkdir(exist_ok=True)
        fd = os.open(locks / hashlib.sha256(name.encode()).hexdigest()[:16], os.O_RDWR | os.O_CREAT, 0o666)
        try:
            hold(fd)
            yield
        finally:
            os.close(fd)

    def cut(self, fd: int, file: Path) -> None:
        """Give back the disk space of a shard that is open for writing as `fd`: its header stays."""
        if not file.is_symlink():  # into a cache that others use
            os.ftruncate(fd, header_bytes(file))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While files are fetched. What killed runs had begun to fetch is removed, where nobody else is here."""
        fd = os.open(self.root, os.O_RDONLY)
        try:
            if hold(fd, wait=False):
                for folder in self.root.glob(_ARRIVING + "*"):
                    shutil.rmtree(folder, ignore_errors=True)
            hold(fd, shared=True)
            yield
        finally:
            os.close(fd)


def open_source(path: str | Path) -> Checkpoint:
    """The checkpoint in a directory, or in a repository of the Hub: `org/name`, `org/name@revision`, `hf://org/name`.

    A name means the directory where there is one. Of a repository, JSON files and shards' headers are fetched: a few
    MB, and of large models some tens. Raises InputError for what is neither, or cannot be reached.
    """
    named = repository_named(path)
    if named is None:
        return open_checkpoint(path)
    name, revision = named
    try:
        import huggingface_hub as hub
    except ImportError:
        raise InputError(
            f"{path}: expected a checkpoint directory, found nothing there; to read it from the Hub: "
            "pip install huggingface_hub"
        ) from None
    try:
        info = hub.HfApi().model_info(name, revision=revision, files_metadata=True)
    except Exception as error:
        if snapshot := _snapshot(name, revision):  # downloaded before, as for transformers
            return open_checkpoint(snapshot)
        raise _unreachable(path, name, error) from error
    repository = _repository(name, info)
    try:
        repository.root.mkdir(parents=True, exist_ok=True)
        with repository.in_use():
            _stand_in(repository)
    except InputError:
        raise
    except Exception as error:
        raise _unreachable(path, name, error) from error
    sizes = {file: remote.nbytes for file, remote in repository.files.items()}
    return replace(open_checkpoint(repository.root, sizes), repository=repository)


def whole(path: str | Path) -> Path:
    """The directory of a checkpoint all of which is needed: what is on the Hub is downloaded, as transformers does it.

    Into `huggingface_hub`'s cache, where the next call finds it; other copies of the weights are left out. Raises
    InputError as `open_source` does.
    """
    if repository_named(path) is None:
        return Path(path)
    source = open_source(path)
    if (repository := source.repository) is None:
        return source.root
    import huggingface_hub as hub

    others = [f"*{suffix}" for suffix in sorted(WEIGHT_SUFFIXES - {".safetensors"})]
    try:
        return Path(
            hub.snapshot_download(repository.name, revision=repository.commit, ignore_patterns=others)
        )
    except Exception as error:
        raise _unreachable(path, repository.name, error) from error


def _repository(name: str, info: Any) -> Repository:
    from huggingface_hub import constants

    root = Path(constants.HF_HOME, "lowbit", "models--" + name.replace("/", "--"), info.sha)
    files = {}
    for sibling in info.siblings or ():
        parts = PurePosixPath(sibling.rfilename).parts
        if not parts or ".." in parts or parts[0] == "/":
            raise InputError(
                f"{name}: expected file names inside the repository, found {sibling.rfilename!r}; do not trust it"
            )
        sha256 = sibling.lfs.sha256 if sibling.lfs else None
        files[root.joinpath(*parts)] = RemoteFile(sibling.size or 0, sha256, sha256 or sibling.blob_id or "0")
    return Repository(name, info.sha, root, files)


def _stand_in(repository: Repository) -> None:
    """Fill the directory: JSON files, shards' headers, and empty files for all others."""
    wanted: list[tuple[Callable[[Repository, Path], None], Path]] = []
    for file in repository.files:
        top = file.parent == repository.root
        if file.suffix == ".safetensors" and top:
            if not file.exists():
                wanted.append((_fetch_head, file))
        elif file.suffix == ".json" and top:
            wanted.append((Repository.fetch, file))
        elif not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    with ThreadPoolExecutor(_REQUESTS) as pool:
        for done in [pool.submit(get, repository, file) for get, file in wanted]:
            done.result()


def _fetch_head(repository: Repository, file: Path) -> None:
    """A shard up to its data; of what is no safetensors file, the beginning, which says so when it is read."""
    nbytes = repository.files[file].nbytes
    head = _range(repository, file, 0, min(_HEAD_BYTES, nbytes))
    wanted = min(8 + int.from_bytes(head[:8], "little"), nbytes)
    if len(head) < wanted <= 8 + MAX_HEADER_BYTES:
        head += _range(repository, file, len(head), wanted)
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    aside.write_bytes(head[:wanted])
    try:
        os.link(aside, file)
    except FileExistsError:
        pass  # of another run, which may have fetched all of it by now
    except OSError:  # a file system without hard links
        aside.replace(file)
    aside.unlink(missing_ok=True)


def _range(repository: Repository, file: Path, first: int, stop: int) -> bytes:
    """Bytes `first` … `stop` of a file, also from a server that sends all of it."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    if first >= stop:
        return b""
    name = file.relative_to(repository.root).as_posix()
    url = hf_hub_url(repository.name, name, revision=repository.commit)
    headers = {**build_hf_headers(), "Range": f"bytes={first}-{stop - 1}", "Accept-Encoding": "identity"}
    with http_stream_backoff("GET", url, headers=headers, timeout=30) as response:
        hf_raise_for_status(response)
        skipped = 0 if response.status_code == 206 else first
        data = bytearray()
        for part in response.iter_bytes():
            data += part
            if len(data) >= skipped + stop - first:
                break
    return bytes(data[skipped : skipped + stop - first])


def _snapshot(name: str, revision: str | None) -> str | None:
    """Where the Hub's own cache has this model."""
    import huggingface_hub as hub

    try:
        return hub.snapshot_download(name, revision=revision, local_files_only=True)
    except Exception:
        return None


def _unreachable(path: str | Path, name: str, error: Exception) -> InputError:
    """What to say of a repository that cannot be read."""
    from huggingface_hub import errors

    said = f"{path}: expected a checkpoint directory here or a model on the Hub"
    if isinstance(error, errors.GatedRepoError):
        return InputError(
            f"{said}, found one with terms to accept: https://huggingface.co/{name}, then `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{said}, found {name} without this revision; check it")
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(f"{said}, found neither; check the name, or `hf auth login` for a private one")
    return InputError(
        f"{said}, found nothing here, and the Hub cannot be reached ({_short(error)}); check the path, the network and "
        f"HF_ENDPOINT, or give a download: hf download {name} --local-dir DIRECTORY"
    )


def _short(error: Exception) -> str:
    """The first line of an error, which may have many."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(_HASH_BYTES):
            digest.update(part)
    return digest.hexdigest()


def _counter(fetched: Progress) -> type:
    """A progress bar, as `hf_hub_download` wants one, that shows nothing and counts."""
    from huggingface_hub.utils import tqdm

    class Counter(tqdm):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **{**more, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            fetched(int(n or 0))
            return super().update(n)

    return Counter
