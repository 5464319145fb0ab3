"""The directory in which `search` keeps what it has measured, so that a killed run goes on.

    RECIPE.search/
      search.json                    what was searched and, layer by layer, what each module costs under each scheme
      gradient-00005-0.safetensors   worker 0's gradient at the input of layer 5, a tensor per batch; gone at the end

Layers are done from the last to the first. The one before a finished one needs its gradient, and the hidden states,
which are computed again. No budget is among the settings: another one is chosen for from the same costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.calibration.distributed import decided, gathered, rank, wait_for_all
from lowbit.calibration.resume import CalibrationError, Kind, Resumable, alone, made, save_tensors
from lowbit.calibration.store import read_header

Costs = Mapping[str, Mapping[str, float]]
"""Module → scheme → cost."""
KIND = Kind(
    what="search", command="search", manifest="search.json", version=1, parts="gradient-*.safetensors",
    entry=("costs", dict),
)  # fmt: skip


class _Writer(Resumable):
    KIND = KIND


class Measured:
    """What is known of the layers that are done; every worker has the same."""

    def __init__(
        self, path: Path | None, device: torch.device, writer: _Writer | None, layers: Mapping[str, Any]
    ) -> None:
        self.path, self.device, self._writer = path, device, writer
        self.layers: dict[str, Costs] = {name: entry["costs"] for name, entry in layers.items()}

    @classmethod
    @contextmanager
    def kept(
        cls, path: str | Path | None, settings: Mapping[str, Any], device: torch.device, *, overwrite: bool
    ) -> Iterator[Measured]:
        """What lies in the directory `path`, and comes into it while this is open; None: it is kept nowhere."""
        if path is None:
            yield cls(None, device, None, {})
            return
        writer: _Writer | None = None
        with ExitStack() as held:

            def start() -> dict[str, Any]:
                nonlocal writer
                held.enter_context(alone(path, KIND))
                writer = _Writer(path, settings, overwrite=overwrite)
                return writer.manifest["layers"]

            layers = decided(start, device)
            try:
                yield cls(Path(path), device, writer, layers)
            finally:
                if writer is not None and not writer.manifest["layers"]:
                    writer.remove()  # there is nothing to go on with

    def begin(self, names: Sequence[str], batches: int) -> tuple[int, list[Tensor] | None]:
        """(how many of the layers `names` are to do, the first ones; every batch's gradient at the input of the next).

        None for gradients: all layers are to do, or none is.
        """
        left = next((i for i, name in enumerate(names) if name in self.layers), len(names))
        gradients = self._gradients(left, batches) if 0 < left < len(names) else None
        known = set(names[left:]) == self.layers.keys() and (left in (0, len(names)) or gradients is not None)
        if all(gathered(known)):
            return left, gradients
        # Somebody has removed files, or a worker has another disk than it had.
        self.layers.clear()
        if self._writer is not None:
            self._writer.manifest["layers"].clear()
        return len(names), None

    def add(self, index: int, name: str, mine: Costs, gradients: Sequence[Tensor]) -> None:
        """Layer `index` is done: this worker's costs, and the gradients at its input [B, T, H] of every batch."""
        if self.path is not None and index > 0:
            parts = {str(batch): gradient.cpu() for batch, gradient in enumerate(gradients)}
            save_tensors(made(self.path, KIND) / self._file(index), parts)
        self.layers[name] = _summed(mine)
        if self._writer is not None:
            self._writer.record(name, {"costs": self.layers[name]})
        if self.path is not None:
            # By now the first worker has recorded the layer after this one, but maybe not yet this one.
            (self.path / self._file(index + 2)).unlink(missing_ok=True)

    def finish(self) -> None:
        """All layers are done."""
        if self._writer is not None and not self._writer.manifest["complete"]:
            self._writer.finish()
        wait_for_all()
        if self.path is not None:
            for file in self.path.glob(f"gradient-*-{rank()}.safetensors"):
                file.unlink()

    def _file(self, index: int) -> str:
        return f"gradient-{index:05d}-{rank()}.safetensors"

    def _gradients(self, index: int, batches: int) -> list[Tensor] | None:
        """Those at the input of layer `index`, as `add` was given them; None where they are gone or damaged."""
        from safetensors.torch import load_file

        assert self.path is not None  # where a layer is done when it begins, it lay there
        file, parts = self.path / self._file(index), [str(batch) for batch in range(batches)]
        try:
            if read_header(file).keys() != set(parts):
                return None
        except (OSError, CalibrationError):
            return None
        found = load_file(file)
        return [found[part].to(self.device) for part in parts]


def _summed(mine: Costs) -> dict[str, dict[str, float]]:
    """Module → scheme → cost, summed over workers in rank order."""
    out: dict[str, dict[str, float]] = {}
    for part in gathered({module: dict(of) for module, of in mine.items()}):
        for module, of in part.items():
            sums = out.setdefault(module, {})
            for name, cost in of.items():
                sums[name] = sums.get(name, 0.0) + cost
    return out
