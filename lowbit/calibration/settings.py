"""What a run of `calibrate` or `search` is, as its manifest has it: other settings are another run (see `resume`)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.calibration.store import fingerprint
from lowbit.checkpoint.rules import Selection


def settings_of(
    source: str | Path, selection: Selection, windows: Sequence[Tensor], data: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Source, patterns, windows of token ids [T] (`data` says where they come from) and lowbit's version."""
    from lowbit import __version__

    tokens = sum(int(w.numel()) for w in windows)
    return {
        "selection": {
            "ignore": list(selection.ignore), "keep": list(selection.keep), "overrides": dict(selection.overrides),
        },
        "data": {**(data or {}), "windows": len(windows), "tokens": tokens, "digest": _digest(windows)},
        "source": {"path": str(Path(source).name), "fingerprint": fingerprint(source)},
        "tool": f"lowbit {__version__}",
    }  # fmt: skip


def _digest(windows: Sequence[Tensor]) -> str:
    """Tells other token ids apart: the text at a path may have changed since a run was killed."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(window.numel().to_bytes(8, "little"))
        digest.update(window.cpu().to(torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]
