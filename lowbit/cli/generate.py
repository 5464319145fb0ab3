"""`lowbit generate`: text from a converted checkpoint, on lowbit's modules."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lowbit.cli.models import Device, DTypeName, Json, Model, Threads
from lowbit.cli.output import torch_seed


def generate(
    out: Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 64,
    chat: Annotated[
        bool, typer.Option("--chat", help="Give the prompt as a user's message in the chat template.")
    ] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token every time.")] = 0.0,
    seed: Annotated[
        int, typer.Option(callback=torch_seed, help="Of the sampling, where temperature is above 0.")
    ] = 0,
    dtype: DTypeName = "auto",
    device: Device = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Continue a prompt with a converted checkpoint. Text appears as it is made."""
    import math

    from lowbit.cli.models import open_model, require_writer, too_long
    from lowbit.cli.output import print_json, warn
    from lowbit.errors import InputError

    if not math.isfinite(temperature):
        raise InputError(
            f"expected a finite --temperature, found {temperature}; 0 is the likeliest token every time"
        )
    # Bytes of the command line that are not text in its encoding: tokenizers take no halves of characters.
    prompt = prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    model, tokenizer, seconds = open_model(out, dtype=dtype, device=device, threads=threads)
    require_writer(model, out)
    import time

    import torch

    from lowbit.calibration.positions import longest_text
    from lowbit.nn.speed import weight_bytes

    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(f"{out}: expected a chat template for --chat, found none; leave --chat out")
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    else:
        ids = tokenizer(prompt, return_tensors="pt")
    ids = ids.to(model.device)
    count = ids["input_ids"].shape[1]
    if not count:
        raise InputError("expected a prompt of at least one token, found none; give --prompt some text")
    torch.manual_seed(seed)
    # Logits over less than this are infinite, or their softmax is 1 for the likeliest anyway.
    warm = temperature > 1e-6
    sampling = {"do_sample": True, "temperature": temperature} if warm else {"do_sample": False}
    # A prompt is shown as what the text goes on from; a chat template's own words are not for reading.
    streamer = None if json else _streamer(tokenizer, skip_prompt=chat)
    start = time.perf_counter()
    try:
        with torch.inference_mode():
            # One beam whatever the checkpoint's generation_config.json says: text appears as it is made.
            made = model.generate(
                **ids, max_new_tokens=max_new_tokens, num_beams=1, streamer=streamer, **sampling
            )
    except IndexError as error:  # of learned positions
        if streamer is not None:
            print()  # the text stands there up to where they end
        raise too_long(out, count + max_new_tokens) from error
    spent = time.perf_counter() - start
    # A decoder with an encoder begins a text of its own, with a token that is not its choice.
    new = made[0, 1 if model.config.is_encoder_decoder else count :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    if not text and not chat and getattr(tokenizer, "chat_template", None):
        warn("the model ended at once; --chat gives it the prompt as a user's message, which it was made for")
    longest = longest_text(model, model.config.get_text_config())
    if longest is not None and made.shape[1] > longest:
        warn(f"the model was made for texts of at most {longest} tokens; what comes after those means little")
    if json:
        print_json({
            "prompt": prompt, "text": text, "prompt_tokens": count,
            "new_tokens": int(new.numel()), "seconds": round(spent, 3),
            "tokens_per_second": round(new.numel() / spent, 2), "load_seconds": round(seconds, 3),
            "weight_bytes": weight_bytes(model),
        })  # fmt: skip


def _streamer(tokenizer: Any, *, skip_prompt: bool) -> Any:
    """Shows text as it is made, and the prompt with the first of it.

    Not before, since it ends no line: that loops are being compiled is said in the first forward.
    """
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        waiting: list[Any] | None = None

        def put(self, value: Any) -> None:
            if self.waiting is None:  # the prompt
                self.waiting = [value]
                return
            for earlier in (*self.waiting, value):
                super().put(earlier)
            self.waiting.clear()

    return Streamer(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
