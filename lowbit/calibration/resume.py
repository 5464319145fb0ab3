"""A directory that a long run fills part by part, so that the same run, killed, goes on where it was.

Its manifest, a JSON file, has what the run is (its settings, and `identity`, a hash of them), an entry for every
part that is done, and `complete`, true only at the end. It is written aside, synced and renamed, after the files
that it names.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lowbit.checkpoint.files import cannot_make, lock, make_directories, sync, write_json
from lowbit.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


class CalibrationError(InputError):
    """A directory of `calibrate` or `search` that cannot be used, with what to do about it."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What such a directory is of."""

    what: str
    """As errors call it."""
    command: str
    """That of the command line which writes it."""
    manifest: str
    """Name of the file."""
    version: int
    keys: tuple[tuple[str, type], ...] = (("layers", dict),)
    """That a manifest must have; `layers` maps parts to entries."""
    entry: tuple[str, type]
    """That an entry must have."""
    mappings: tuple[str, ...] = ()
    """Keys that it may have."""
    parts: str
    """Glob of their files."""


def made(path: str | Path, kind: Kind, new: list[Path] | None = None) -> Path:
    """The directory, which is there then; `new` gets those that were not there before."""
    path = Path(path)
    try:
        make_directories(path, [] if new is None else new)
    except OSError as error:
        raise _no_directory(path, kind, error) from error
    return path


def _no_directory(path: Path, kind: Kind, error: OSError | str) -> CalibrationError:
    return CalibrationError(
        f"expected a directory for the {kind.what} at {path}, found that none can be made: {error}; choose another "
        "place, or check its permissions"
    )


@contextmanager
def alone(path: str | Path, kind: Kind) -> Iterator[None]:
    """Keep other runs out of a directory, which is made: parts of two would stand under one manifest.

    Directories that were made for it and have nothing in them at the end are gone then.
    """
    new: list[Path] = []
    held = lock(made(path, kind, new), what=kind.what)
    try:
        yield
    finally:
        for directory in reversed(new):
            with suppress(OSError):  # not empty, or gone
                directory.rmdir()
        if held >= 0:
            os.close(held)


def load_manifest(path: Path, kind: Kind) -> dict[str, Any]:
    """The manifest of a directory, its required keys checked. Raises CalibrationError saying what is wrong."""
    file = path / kind.manifest
    if not file.is_file():
        raise CalibrationError(
            f"expected {kind.manifest} in {path}, found none; write one with `lowbit {kind.command}`"
        )
    again = f"it is damaged, or changed by hand: {kind.command} again, with overwrite"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CalibrationError(f"expected JSON in {file}, found: {error}; {again}") from error
    if not isinstance(manifest, dict):
        raise CalibrationError(f"expected a mapping in {file}, found {type(manifest).__name__}; {again}")
    if (version := manifest.get("version")) != kind.version:
        raise CalibrationError(
            f"expected version {kind.version} in {file}, found {version!r}; {kind.command} again with this lowbit"
        )
    for key, of in kind.keys:
        if not isinstance(manifest.get(key), of):
            raise CalibrationError(
                f"expected {key!r} ({of.__name__}) in {file}, found {manifest.get(key)!r}; {again}"
            )
    key, of = kind.entry
    for part, entry in manifest["layers"].items():
        if not isinstance(entry, dict) or not isinstance(entry.get(key), of):
            raise CalibrationError(
                f"expected {key!r} ({of.__name__}) for {part} in {file}, found {entry!r}; {again}"
            )
    for key in kind.mappings:
        if not isinstance(manifest.get(key, {}), dict):
            raise CalibrationError(
                f"expected a mapping as {key!r} in {file}, found {manifest[key]!r}; {again}"
            )
    return manifest


class Resumable:
    """Such a directory while it is written; subclasses say what a part is.

    `settings` are keys of the manifest. A directory with the same ones is resumed, without parts that are damaged;
    one with others is refused, or replaced with `overwrite`; one that holds something else is refused.
    """

    KIND: ClassVar[Kind]

    def __init__(self, path: str | Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.path = made(path, self.KIND)
        old = self.require_usable(path, settings, overwrite=overwrite)
        self.manifest = self._new_manifest(settings)
        if old.get("identity") == self.manifest["identity"]:
            intact = {part: e for part, e in old["layers"].items() if self._intact(e)}
            whole = bool(old.get("complete")) and intact.keys() == old["layers"].keys()
            self.manifest = old | {"layers": intact, "complete": whole}
        else:
            for file in self.path.glob(self.KIND.parts):
                file.unlink()
        self._save()

    @classmethod
    def _new_manifest(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        wanted = json.loads(json.dumps({"version": cls.KIND.version, **settings}))
        identity = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:32]
        return {**wanted, "identity": identity, "layers": {}, "complete": False}

    @classmethod
    def require_usable(
        cls, path: str | Path, settings: Mapping[str, Any], *, overwrite: bool = False
    ) -> dict[str, Any]:
        """The manifest in `path`, if any; CalibrationError where this run cannot go there. Nothing is touched."""
        path, kind = Path(path), cls.KIND
        if not (path / kind.manifest).is_file():
            try:
                found = sorted(f.name for f in path.iterdir() if not f.name.startswith("."))
            except FileNotFoundError:
                if why := cannot_make(path):
                    raise _no_directory(path, kind, why) from None
                return {}
            except OSError as error:
                raise _no_directory(path, kind, error) from error
            if found:
                raise CalibrationError(
                    f"expected an empty directory or a {kind.what} in {path}, found {', '.join(found[:3])} and "
                    f"no {kind.manifest}; choose another directory"
                )
            return {}
        try:
            old = load_manifest(path, kind)
        except CalibrationError:
            if not overwrite:
                raise
            return {}
        new = cls._new_manifest(settings)
        if old.get("layers") and old.get("identity") != new["identity"] and not overwrite:
            changed = sorted(
                k for k in new.keys() - {"identity", "layers", "complete"} if old.get(k) != new[k]
            )
            raise CalibrationError(
                f"expected an empty directory or the same {kind.what} in {path}, found one with "
                f"other {', '.join(changed) or 'settings'}; run it as it was to go on there, choose another place, or "
                "give overwrite to replace it"
            )
        return old

    def _intact(self, entry: Mapping[str, Any]) -> bool:
        """Whether a part is still what its entry says."""
        return True

    @property
    def finished(self) -> set[str]:
        """Parts that are written and intact."""
        return set(self.manifest["layers"])

    def record(self, part: str, entry: Mapping[str, Any]) -> None:
        """A part is done."""
        self.manifest["layers"][part] = dict(entry)
        self._save()

    def finish(self, **more: Any) -> None:
        """Add what is known only at the end, and mark it complete."""
        self.manifest.update(json.loads(json.dumps(more)))
        self.manifest["complete"] = True
        self._save()

    def remove(self) -> None:
        """Leave no trace: there is nothing to go on with."""
        for file in (self.path / self.KIND.manifest, *self.path.glob(self.KIND.parts)):
            file.unlink(missing_ok=True)
        with suppress(OSError):  # of somebody else's files beside them
            self.path.rmdir()

    def _save(self) -> None:
        write_json(self.path / self.KIND.manifest, self.manifest)


def save_tensors(file: Path, tensors: Mapping[str, Tensor], *, mode_of: Path | None = None) -> None:
    """Write a safetensors file aside, sync and rename it. `mode_of`: a file that the same people may read."""
    from safetensors.torch import save_file

    aside = file.with_name(f".{file.name}.part")
    save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, aside)
    if mode_of is not None:  # safetensors lets nobody else read its files
        shutil.copymode(mode_of, aside)
    sync(aside)
    aside.replace(file)
