"""What `generate` and `bench` share: options, and opening a checkpoint to run it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli.output import some_path

if TYPE_CHECKING:
    import torch

    from lowbit.errors import InputError

Model = Annotated[
    Path, typer.Argument(parser=some_path, metavar="OUT", help="A converted checkpoint directory.")
]
DTypeName = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="Of activations and of what is not quantized: auto (as stored; float32 on a CPU), float32, bfloat16, "
        "float16.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1, …; default: an accelerator if there is one.", show_default=False),
]
Threads = Annotated[
    int | None, typer.Option(min=1, max=1024, help="CPU threads; default: torch's own.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]

DTYPES = ("auto", "float32", "bfloat16", "float16")


def torch_dtype(name: str) -> torch.dtype | None:
    """A dtype by name; None for `auto`. InputError for others."""
    import torch

    from lowbit.errors import InputError

    if name not in DTYPES:
        raise InputError(f"expected --dtype to be one of {', '.join(DTYPES)}, found {name!r}")
    return None if name == "auto" else getattr(torch, name)


def open_model(path: Path, *, dtype: str, device: str | None, threads: int | None) -> tuple[Any, Any, float]:
    """(model, tokenizer, seconds to load). Quiet but for errors."""
    import time

    from lowbit.checkpoint.hub import whole
    from lowbit.checkpoint.opening import open_checkpoint

    path = whole(path)
    open_checkpoint(path)  # an error in the path is said before torch is loaded
    quiet_transformers()
    import torch

    from lowbit.errors import InputError
    from lowbit.nn import load
    from lowbit.nn.integration import open_tokenizer

    if threads:
        torch.set_num_threads(threads)
    wanted = torch_dtype(dtype)
    if device is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        device = "cpu" if found is None else str(found)
    try:
        if torch.empty(0, device=device).is_meta:
            raise InputError(
                "--device meta: expected a device that computes, found one that holds shapes only"
            )
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device}: torch cannot use it ({str(error).splitlines()[0]})") from error
    if wanted is None and device == "cpu":
        # Weights that are bfloat16 on disk stay so in memory; torch's own bfloat16 operators are slower.
        wanted = torch.float32
    start = time.perf_counter()
    model = load(path, dtype=wanted, device=device)
    seconds = time.perf_counter() - start
    return model, open_tokenizer(path), seconds


def require_writer(model: Any, path: Path) -> None:
    """InputError unless the model writes text, and goes on from text alone."""
    from lowbit.errors import InputError

    name = type(model).__name__
    if not model.can_generate():
        raise InputError(
            f"{path}: expected a language model, which writes text, found {name}, which does not"
        )
    if model.main_input_name != "input_ids":
        raise InputError(
            f"{path}: expected a language model that goes on from text, found {name}, which takes "
            f"{model.main_input_name}; run it with transformers and lowbit.load"
        )


def require_decoder(model: Any, path: Path) -> None:
    """InputError unless prefill and decoding are all that a model does."""
    from lowbit.errors import InputError

    require_writer(model, path)
    if model.config.is_encoder_decoder:
        raise InputError(
            f"{path}: expected a decoder, whose prefill and decoding are measured, found {type(model).__name__}, "
            "which has an encoder too"
        )


def too_long(path: Path, tokens: int) -> InputError:
    """What to say where positions that are looked up in a table end before `tokens`."""
    from lowbit.errors import InputError

    return InputError(
        f"{path}: expected no more tokens, the prompt's and new ones, than the model has positions for, "
        f"found {tokens}; ask for fewer"
    )


def quiet_transformers() -> None:
    """No progress bars or advice from transformers on standard error; InputError where it is missing or too old."""
    from lowbit.nn.integration import require_transformers

    require_transformers()
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
