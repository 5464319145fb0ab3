"""Text for calibration and evaluation → windows of token ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import InputError
from lowbit.nn.integration import open_tokenizer, require_transformers

_TEXT = (".txt", ".md", ".rst", ".html")
_IDS = (".pt", ".npy")
PIECE = 1 << 20
"""Characters of running text that are tokenized at a time."""


def load_windows(
    path: str | Path,
    tokenizer: Any | None,
    *,
    samples: int | None = 128,
    length: int = 2048,
    seed: int = 0,
) -> list[Tensor]:
    """Windows of token ids [≤ length] from a text file, a .jsonl of prompts, or a directory of either.

    Running text is cut into consecutive windows of exactly `length` tokens. Where the tokenizer begins a text with
    tokens of its own (Llama 3's and Gemma's BOS), each window begins with them: such models read nothing well
    without. Token ids in a .npy or .pt ([T], or [N, T] of N texts), which alone need no tokenizer, are cut as they are,
    each text by itself; one of several may be shorter than `length`.
    Prompts (lines of a .jsonl with `messages`, `text` or `prompt`) stay apart: each is one window, cut at
    `length`, left out where it is not two tokens long; messages go through the tokenizer's chat template, which
    alone says what comes before and after them, with the line's `tools`. `samples` of all these are picked at random
    by `seed`, in the order of the text; None takes all. Only prompts that are picked are tokenized.
    Raises InputError when there is nothing to take, and for what is not text in UTF-8 or not such a line.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"expected a text file, a .jsonl or a directory of them, found nothing at {path}")
    windows: list[Callable[[], Tensor]] = []
    longest = 0
    for file in _files(path):
        suffix = file.suffix.lower()
        if suffix == ".jsonl":
            windows += [partial(_prompt, *line, tokenizer) for line in _lines(file)]
        elif suffix == ".json":
            raise InputError(f"expected text, or prompts a line each, found {file}; make it a .jsonl")
        elif suffix in _IDS:
            windows += [partial(Tensor.clone, ids) for ids in _stored_windows(file, length)]
        else:
            of_text, tokens = _running(_text(file), tokenizer, length)
            windows += [partial(Tensor.clone, ids) for ids in of_text]
            longest = max(longest, tokens)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed)).tolist()
    found: dict[int, Tensor] = {}
    for place in order:
        if samples is not None and len(found) == samples:
            break
        if (ids := windows[place]()[:length]).numel() > 1:
            found[place] = ids
    if not found:
        raise InputError(
            f"expected at least one window of {length} tokens, or a prompt of two, in {path}, found less text"
            f"{f', at most {longest} tokens in a file' if longest else ''}; give more text or a smaller --length"
        )
    return [found[place] for place in sorted(found)]


def holds_ids(tensor: Tensor) -> bool:
    """Whether its numbers can be token ids: neither floats nor a mask."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def is_tokenized(path: str | Path) -> bool:
    """Whether a file holds token ids, for `load_windows` to take as they are."""
    return Path(path).suffix.lower() in _IDS


def load_tokenizer(path: str | Path) -> Any:
    """The checkpoint's tokenizer. Raises InputError when there is no checkpoint, or none in it."""
    from lowbit.checkpoint.opening import open_checkpoint

    require_transformers()
    open_checkpoint(path)  # transformers would ask a hub for what is not here
    return open_tokenizer(path, instead=", or give the data as token ids in a .npy")


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in (*_TEXT, ".jsonl") and f.is_file())
    if not files:
        raise InputError(f"expected files ending in {', '.join((*_TEXT, '.jsonl'))} in {path}, found none")
    return files


def _encode(tokenizer: Any, text: str, **options: bool) -> Tensor:
    text = text.encode("utf-8", "replace").decode()  # JSON may hold half of a surrogate pair
    return torch.as_tensor(tokenizer(text, verbose=False, **options)["input_ids"], dtype=torch.long).reshape(
        -1
    )


def _running(text: str, tokenizer: Any, length: int) -> tuple[list[Tensor], int]:
    """Running text → windows [length], each with what the tokenizer begins a text with, and how many tokens it has."""
    begin = _beginning(tokenizer)
    if length <= begin.numel():
        raise InputError(
            f"expected a length of more than the {begin.numel()} tokens that a text begins with, found {length}"
        )
    ids = torch.cat([begin[:0], *(_encode(tokenizer, p, add_special_tokens=False) for p in _pieces(text))])
    parts = _split(ids, length - begin.numel())
    return [torch.cat([begin, part]) for part in parts], begin.numel() + ids.numel() if ids.numel() else 0


def _pieces(text: str) -> Iterator[str]:
    """Text in pieces that end with a line, or a word: of a character, tokenizers take 150 bytes while at work."""
    start = 0
    while start < len(text):
        end = start + PIECE
        if end < len(text):
            line = text.rfind("\n", start, end) + 1
            end = line or max(text.rfind(" ", start + 1, end), 0) or end
        yield text[start:end]
        start = end


def _beginning(tokenizer: Any) -> Tensor:
    """What the tokenizer puts before a text: BOS, several (GLM), or nothing, though it may know a BOS (SmolLM2)."""
    whole, plain = _encode(tokenizer, "a"), _encode(tokenizer, "a", add_special_tokens=False)
    places = range(whole.numel() - plain.numel() + 1)
    return whole[: next((i for i in places if torch.equal(whole[i : i + plain.numel()], plain)), 0)]


def _split(ids: Tensor, length: int) -> list[Tensor]:
    return list(ids[: ids.numel() // length * length].view(-1, length))


def _text(file: Path) -> str:
    """What is in a file of text. A few bytes that are not UTF-8 are let pass, another encoding is not."""
    text = file.read_bytes().decode("utf-8-sig", errors="replace")
    strange = text.count("\ufffd") + text.count("\0")
    if strange > len(text) / 100:
        raise InputError(
            f"expected text in UTF-8 in {file}, found {strange} of {len(text)} characters that are not; "
            "convert it, or unpack it where it is packed"
        )
    return text


def _stored_windows(file: Path, length: int) -> list[Tensor]:
    import numpy

    try:
        if file.suffix.lower() == ".pt":
            found = torch.load(file, weights_only=True, map_location="cpu")
        else:
            found = torch.as_tensor(numpy.load(file))
    except Exception as error:  # what torch and numpy raise for other files is not theirs alone
        raise InputError(f"expected one tensor of token ids in {file}, found none: {error}") from error
    if not isinstance(found, Tensor) or found.dim() not in (1, 2):
        shape = f" {list(found.shape)}" if isinstance(found, Tensor) else ""
        raise InputError(
            f"expected one tensor of token ids in {file}, [T] or [N, T] of N texts, found {type(found).__name__}{shape}"
        )
    if not holds_ids(found):
        raise InputError(f"expected token ids in {file}, found numbers of {found.dtype}; tokenize them first")
    ids = found.to(torch.long)
    if ids.dim() == 2:
        return [window for text in ids for window in (_split(text, length) or [text])]
    return _split(ids, length)


def _lines(file: Path) -> Iterator[tuple[str, str | dict[str, Any]]]:
    """(where, a text or an entry with messages) of each line that is neither empty nor holds an empty text."""
    for number, line in enumerate(_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise InputError(f"expected JSON in {file} line {number}, found: {error}") from error
        where, text = f"{file} line {number}", entry
        if isinstance(entry, dict):
            if _messages(entry):
                yield where, entry
                continue
            key = next((k for k in ("text", "prompt", "content") if entry.get(k) is not None), None)
            text = entry[key] if key else None
            if key and not isinstance(text, str):
                raise InputError(f"expected a text as `{key}` in {where}, found {type(text).__name__}")
        if not isinstance(text, str):
            found = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
            raise InputError(f"expected `messages`, `text` or `prompt` in {where}, found {found}")
        if text:
            yield where, text


def _messages(entry: dict[str, Any]) -> Any:
    return entry.get("messages") or entry.get("conversations")


def _prompt(where: str, entry: str | dict[str, Any], tokenizer: Any) -> Tensor:
    if isinstance(entry, str):
        return _encode(tokenizer, entry)
    # The template writes the tokens that begin a text itself.
    return _encode(tokenizer, _chat(entry, tokenizer, where), add_special_tokens=False)


def _chat(entry: dict[str, Any], tokenizer: Any, where: str) -> str:
    """Messages as one prompt, by the tokenizer's template."""
    messages = _messages(entry)
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"expected a tokenizer with a chat template for the messages of {where}, found none; "
            "give lines with `text` instead"
        )
    if not (isinstance(messages, list) and all(isinstance(m, dict) and "role" in m for m in messages)):
        raise InputError(
            f"expected messages with `role` and `content` in {where}, found {str(messages)[:80]}"
        )
    try:
        text: str = tokenizer.apply_chat_template(messages, tools=entry.get("tools") or None, tokenize=False)
    except Exception as error:  # whatever the template is, or does with these messages
        raise InputError(
            f"expected messages that the chat template takes in {where}, found: {error}"
        ) from error
    return text
