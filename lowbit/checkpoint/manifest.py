"""The manifest beside the weights: what a conversion wrote, with checksums; `verify` compares it with what is there."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from lowbit.checkpoint.headers import MANIFEST, Checkpoint, header_bytes, read_json
from lowbit.checkpoint.plan import Plan
from lowbit.checkpoint.reading import file_checksum
from lowbit.errors import InputError


def make_manifest(
    plan: Plan, digest: str, *, checksums: Mapping[str, str], files: Mapping[str, str]
) -> dict[str, Any]:
    """JSON-ready. `digest`: of the plan when it began; `checksums`: of its tensors, by name; `files`: of others than
    shards, by name."""
    from lowbit import __version__

    return {
        "lowbit_version": __version__,
        "plan": digest,
        "source": {"path": plan.source.name, "fingerprint": plan.source.fingerprint()},
        "scheme": plan.scheme.name,
        "format": plan.format.name if plan.format else None,
        "calibration": plan.calibration or None,
        "checksum": "xxh3-128",
        "tensors": {
            t.name: {"dtype": t.dtype, "shape": list(t.shape), "checksum": checksums[t.name]}
            for job in plan.jobs
            for t in job.outputs.values()
        },
        "headers": {s.file: xxhash.xxh3_128_hexdigest(s.header) for s in plan.shards},
        "files": dict(files),
    }


def read_manifest(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The manifest, where there is one: `tensors` by name, checksums of shards' `headers` and of other `files`."""
    file = checkpoint.root / MANIFEST
    if not file.is_file():
        return None
    manifest = {"headers": {}, "files": {}, **read_json(file)}
    parts = [manifest.get("tensors"), manifest["headers"], manifest["files"]]
    if not all(isinstance(part, dict) for part in parts) or not all(
        isinstance(t, dict) and t.keys() >= {"dtype", "shape", "checksum"}
        for t in manifest["tensors"].values()
    ):
        raise InputError(
            f"{file}: expected dtype, shape and checksum of each tensor, found others; convert again"
        )
    return manifest


def listed_files(file: Path) -> list[str]:
    """The names of other files than shards that a manifest has; [] where there is none, or none that can be read."""
    with suppress(InputError, TypeError):
        return [str(name) for name in read_json(file).get("files", ())]
    return []


def differences(manifest: Mapping[str, Any], checkpoint: Checkpoint) -> list[str]:
    """Names, dtypes and shapes of tensors, headers and files that differ from what was written."""
    written, root = manifest["tensors"], checkpoint.root
    listed, present = set(written), set(checkpoint.tensors)
    problems = [f"{n}: in the manifest, but in no shard" for n in sorted(listed - present)]
    problems += [f"{n}: in a shard, but not in the manifest" for n in sorted(present - listed)]
    for name in sorted(listed & present):
        ref, entry = checkpoint.tensors[name], written[name]
        if (ref.dtype, list(ref.shape)) != (entry["dtype"], entry["shape"]):
            problems.append(
                f"{name}: expected {entry['dtype']} {entry['shape']} as written, found {ref.dtype} {list(ref.shape)}"
            )

    def same(name: str, checksum: str, *, header: bool = False) -> bool:
        try:
            return file_checksum(root / name, 0, header_bytes(root / name) if header else None) == checksum
        except OSError:  # such as a directory of that name, or a bad sector
            return False

    changed = [n for n, checksum in manifest["files"].items() if not same(n, checksum)]
    changed += [
        n for n, checksum in manifest["headers"].items()
        if (root / n).is_file() and not same(n, checksum, header=True)
    ]  # fmt: skip
    problems += [f"{n}: missing, or changed since it was written; convert again" for n in changed]
    if manifest["headers"]:
        ours = {*manifest["headers"], *manifest["files"]}
        extra = sorted({f.name for f in root.glob("[!.]*.safetensors")} - ours)
        problems += [
            f"{n}: not written by this conversion, and engines may load it; remove it" for n in extra
        ]
    return problems
