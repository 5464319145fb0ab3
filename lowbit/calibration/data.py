"""Text for calibration and evaluation → windows of token ids."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.nn.integration import require_transformers

_TEXT = (".txt", ".md", ".rst", ".html")


def load_windows(
    path: str | Path,
    tokenizer: Any,
    *,
    samples: int | None = 128,
    length: int = 2048,
    seed: int = 0,
) -> list[Tensor]:
    """Windows of token ids [≤ length] from a text file, a .jsonl of prompts, or a directory of either.

    Running text is cut into consecutive windows of exactly `length` tokens. Prompts (lines of a .jsonl with
    `messages`, `text` or `prompt`) stay apart: each is one window, cut at `length`; messages go
    through the tokenizer's chat template. `samples` of them are picked at random by `seed`, in
    the order of the text; None takes all. Raises InputError when there is nothing to take.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"expected a text file, a .jsonl or a directory of them, found nothing at {path}")
    windows: list[Tensor] = []
    for file in _files(path):
        if file.suffix == ".jsonl":
            windows += [ids[:length] for ids in _prompts(file, tokenizer) if ids.numel() > 1]
        elif file.suffix in (".pt", ".npy"):
            windows += _split(_stored_ids(file), length)
        else:
            text = file.read_text(encoding="utf-8", errors="replace")
            windows += _split(_encode(tokenizer, text), length)
    if not windows:
        raise InputError(
            f"expected at least one window of {length} tokens in {path}, found less text; "
            "give more text or a smaller --length"
        )
    if samples is None or samples >= len(windows):
        return windows
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return [windows[i] for i in sorted(order[:samples].tolist())]


def load_tokenizer(path: str | Path) -> Any:
    """The checkpoint's tokenizer. Raises InputError when there is none."""
    require_transformers()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(f"expected a tokenizer in {path}, found none that loads: {error}") from error


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(f for f in path.rglob("*") if f.suffix in (*_TEXT, ".jsonl") and f.is_file())
    if not files:
        raise InputError(f"expected files ending in {', '.join((*_TEXT, '.jsonl'))} in {path}, found none")
    return files


def _encode(tokenizer: Any, text: str) -> Tensor:
    return torch.as_tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long).reshape(-1)


def _split(ids: Tensor, length: int) -> list[Tensor]:
    return list(ids[: ids.numel() // length * length].view(-1, length))


def _stored_ids(file: Path) -> Tensor:
    if file.suffix == ".pt":
        return torch.as_tensor(torch.load(file, weights_only=True), dtype=torch.long).reshape(-1)
    import numpy

    return torch.as_tensor(numpy.load(file), dtype=torch.long).reshape(-1)


def _prompts(file: Path, tokenizer: Any) -> Iterator[Tensor]:
    with file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise InputError(f"expected JSON in {file} line {number}, found: {error}") from error
            if isinstance(entry, str):
                yield _encode(tokenizer, entry)
                continue
            messages = entry.get("messages") or entry.get("conversations")
            if messages:
                if not getattr(tokenizer, "chat_template", None):
                    raise InputError(
                        f"expected a tokenizer with a chat template for the messages of {file}, found none; "
                        "give lines with `text` instead"
                    )
                text = tokenizer.apply_chat_template(messages, tokenize=False)
            else:
                text = entry.get("text") or entry.get("prompt") or entry.get("content")
            if not isinstance(text, str):
                raise InputError(
                    f"expected `messages`, `text` or `prompt` in {file} line {number}, found {sorted(entry)}"
                )
            yield _encode(tokenizer, text)
