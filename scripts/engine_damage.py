"""Whether check_engines.py would notice: the engine gets damaged checkpoints, the reference does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
DAMAGED = (
    "Llama: int8", "Qwen3-MoE: int8", "Qwen3-MoE: int8 read as w8a8_int8", "Qwen3-MoE: int8-weight-only",
    "Qwen3-MoE: fp8-block", "DeepSeek-V3: int8-weight-only", "Llama: int8 as ascend", "Qwen3-MoE: int8 as ascend",
    "DeepSeek-V3: int8-static as ascend",
)  # fmt: skip


def _scaled(factor: float) -> Callable[[Tensors, list[str]], None]:
    def damage(tensors: Tensors, modules: list[str]) -> None:
        tensors[modules[0] + ".weight_scale"] = tensors[modules[0] + ".weight_scale"] * factor

    return damage


def _missed(tensors: Tensors, modules: list[str]) -> None:
    tensors[modules[0] + ".weight_scale"] = torch.ones_like(tensors[modules[0] + ".weight_scale"])


def _turned(tensors: Tensors, modules: list[str]) -> None:
    name = next(modules[0] + s for s in (".weight", ".weight_packed") if modules[0] + s in tensors)
    tensors[name] = tensors[name].T.contiguous().reshape(tensors[name].shape)


def _exchanged(tensors: Tensors, modules: list[str]) -> None:
    first, second = modules[:2]
    for name in [n for n in tensors if n.startswith(first + ".")]:
        other = second + name.removeprefix(first)
        tensors[name], tensors[other] = tensors[other], tensors[name]


DAMAGES: dict[str, Callable[[Tensors, list[str]], None]] = {
    "the scales of one matrix 10 % too large": _scaled(1.1),
    "its scales missed": _missed,
    "its codes in the other order": _turned,
    "two matrices exchanged": _exchanged,
}


def damaged(out: Path, to: Path, damage: Callable[[Tensors, list[str]], None]) -> Path:
    """A copy of a checkpoint with one expert's (a mixture's), or one layer's, up_proj damaged."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(out, to)
    tensors = load_file(to / "model.safetensors")
    scales = sorted(n.removesuffix(".weight_scale") for n in tensors if n.endswith("up_proj.weight_scale"))
    experts = [n for n in scales if ".experts." in n]
    damage(tensors, experts or scales)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


def check(
    cases: list[Any],
    engine: str,
    run: Callable[[list[tuple[Path, Path, Path]]], None],
    distance: Callable[[Any, list[dict[str, Any]]], float],
    bound: float,
) -> dict[str, dict[str, float]]:
    """Case → damage → largest difference of a token's logprob. `run` is the engine, plain."""
    jobs, wanted = [], []
    for case in cases:
        for i, (name, damage) in enumerate(DAMAGES.items()):
            at = case.at / f"damaged-{i}"
            answer = case.at / f"{engine}-damaged-{i}.json"
            jobs.append((damaged(case.out, at, damage), case.ids(engine), answer))
            wanted.append((case, name))
    run(jobs)
    found: dict[str, dict[str, float]] = {}
    for (case, name), (at, _, answer) in zip(wanted, jobs, strict=True):
        shutil.rmtree(at)
        given = json.loads(answer.read_text())
        largest = float("inf") if "refused" in given else distance(case, given["prompts"])
        found.setdefault(case.title, {})[name] = largest
        print(case.title, name, f"{largest:.4g}", "noticed" if largest > bound else "MISSED", flush=True)
    return found
