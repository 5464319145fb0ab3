"""lowbit's int8 beside llama.cpp's Q8_0: `make bench-llama-cpp`.

    python scripts/bench_llama_cpp.py --peer .venv-llama-cpp/bin/python --work .bench --write benchmarks/llama_cpp.md

Each in a process of its own, of one thread, one after the other for so many rounds; medians. Both have weights and
activations of 8 bits, with integer sums (over a row here, over 32 elements there), and take the same random tokens.
SmolLM2-135M comes from its package's Q4_1 file on both sides, and a Llama of 1.1B parameters (TinyLlama's shape, random
weights) from one checkpoint in BF16.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROMPT, NEW, ROUNDS = 64, 32, 5


def tokens(seed: int) -> list[int]:
    chosen = random.Random(seed)
    return [chosen.randrange(1000, 32000) for _ in range(PROMPT + NEW)]


def ours(checkpoint: Path) -> None:
    import torch
    from transformers import DynamicCache

    import lowbit

    torch.set_num_threads(1)
    model = lowbit.load(checkpoint, dtype=torch.float32)

    def run(ids: list[int]) -> tuple[float, float]:
        cache = DynamicCache(config=model.config)
        options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        start = time.perf_counter()
        with torch.inference_mode():
            model(torch.tensor([ids[:PROMPT]]), **options)
            first = time.perf_counter()
            for token in ids[PROMPT:]:
                model(torch.tensor([[token]]), **options)
        return first - start, time.perf_counter() - first

    report(run, products=_products(run))


def _products(run) -> float:  # type: ignore[no-untyped-def]
    """Part of the time of decoding that products take, quantization of activations included."""
    from lowbit.ops.cpu_call import Call

    plain, spent = Call.run, 0.0

    def timed(self, x, out):  # type: ignore[no-untyped-def]
        nonlocal spent
        start = time.perf_counter()
        result = plain(self, x, out)
        if x.shape[-2] == 1:  # a token, and not the prompt
            spent += time.perf_counter() - start
        return result

    Call.run = timed  # type: ignore[method-assign]
    _, decode = run(tokens(4))
    Call.run = plain  # type: ignore[method-assign]
    return spent / decode


def theirs(file: Path) -> None:
    from llama_cpp import Llama, llama_print_system_info

    model = Llama(model_path=str(file), n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)

    def run(ids: list[int]) -> tuple[float, float]:
        model.reset()
        start = time.perf_counter()
        model.eval(ids[:PROMPT])
        first = time.perf_counter()
        for token in ids[PROMPT:]:
            model.eval([token])
        return first - start, time.perf_counter() - first

    report(run, system=llama_print_system_info().decode())


def report(run, **more: object) -> None:  # type: ignore[no-untyped-def]
    run(tokens(0))
    seconds = [run(tokens(seed)) for seed in range(1, 4)]
    prefill, decode = (statistics.median(each) for each in zip(*seconds, strict=True))
    print(json.dumps({"prefill": PROMPT / prefill, "decode": NEW / decode, **more}))


def quantize(source: Path, file: Path) -> None:
    """In the peer's process: to Q8_0."""
    import ctypes

    import llama_cpp

    wanted = llama_cpp.llama_model_quantize_default_params()
    wanted.ftype, wanted.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(file).encode(), ctypes.byref(wanted)):
        raise SystemExit("llama.cpp did not quantize its file")


def compare(arguments: argparse.Namespace) -> None:
    # Beside this file.
    from llama_gguf import write_gguf
    from machine import cpu_name
    from model_peers import convert, llama, smollm2
    from smollm2 import gguf_file

    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def call(python: str, *what: str) -> str:
        command = [python, __file__, *what]
        return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout

    small, large = work / "smollm2-q8_0.gguf", work / "llama-1b-q8_0.gguf"
    if not small.exists():
        call(arguments.peer, "quantize", str(gguf_file()), str(small))
    source = llama(work)
    if not large.exists():
        write_gguf(source, large)
    both = {
        "SmolLM2-135M": (convert(smollm2(work), work / "smollm2-int8", "int8"), small),
        "Llama, 1.1B": (convert(source, work / "llama-1b-int8", "int8"), large),
    }
    rows, system = [], ""
    for name, (checkpoint, file) in both.items():
        found: dict[str, list[dict]] = {"ours": [], "theirs": []}
        for _ in range(ROUNDS):
            for who, python, path in (("ours", sys.executable, checkpoint), ("theirs", arguments.peer, file)):
                found[who].append(json.loads(call(python, who, str(path)).splitlines()[-1]))
        system = found["theirs"][0]["system"].strip()
        rows += table(name, found)
    lines = [
        "# Beside llama.cpp", "",
        f"`make bench-llama-cpp`, on an {cpu_name()}, one thread, medians of {ROUNDS} processes each, alternating; "
        f"{PROMPT} tokens of prompt, {NEW} new ones; tokens per second. llama-cpp-python "
        f"{call_version(arguments.peer)}, built for this processor ({system}). The Llama has random weights in the "
        "shape of TinyLlama. lowbit runs in transformers, and leaves the output head in BF16.", "",
        "| | prefill | decode | of lowbit's decoding, products |", "|---|---|---|---|", *rows, "",
        "What is no product is transformers' Python and torch's small operations between products, which llama.cpp "
        "does not have.",
    ]  # fmt: skip
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.write:
        arguments.write.write_text(text)


def table(name: str, found: dict[str, list[dict]]) -> list[str]:
    """Three lines for a model: theirs, ours, the ratio."""
    theirs, ours = (
        [statistics.median(r[k] for r in found[who]) for k in ("prefill", "decode")]
        for who in ("theirs", "ours")
    )
    products = statistics.median(r["products"] for r in found["ours"])
    return [
        f"| {name}: llama.cpp Q8_0 | {theirs[0]:.1f} | {theirs[1]:.1f} | |",
        f"| lowbit int8 | {ours[0]:.1f} | {ours[1]:.1f} | {products:.0%} |",
        f"| ratio | {ours[0] / theirs[0]:.2f} | {ours[1] / theirs[1]:.2f} | |",
    ]


def call_version(python: str) -> str:
    command = [python, "-c", "import llama_cpp; print(llama_cpp.__version__)"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def main() -> None:
    if len(sys.argv) > 2 and sys.argv[1] in ("ours", "theirs", "quantize"):
        {"ours": ours, "theirs": theirs, "quantize": quantize}[sys.argv[1]](*map(Path, sys.argv[2:]))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", required=True, help="a Python that has llama-cpp-python")
    parser.add_argument("--work", type=Path, default=Path(".bench"))
    parser.add_argument("--write", type=Path, help="write the table to this file")
    compare(parser.parse_args())


if __name__ == "__main__":
    main()
