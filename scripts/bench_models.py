"""Run what was converted, beside its peers: `python scripts/bench_models.py all --write benchmarks/models.md`.

    quality  SmolLM2: perplexity and greedy tokens against BF16 and a simulated compressed-tensors model
    speed    SmolLM2 and a random Llama of 1.1B parameters: prefill and decoding, models alternating
    minilm   sentence embeddings: cosine to float32
    load     seconds until a 2 GB checkpoint is loaded, and until it has answered, against reading its bytes

torchao is used when it can be imported; `--path DIR` adds a directory to look in (install it
there with `pip install --no-deps --target DIR torchao`, which leaves torch alone). Every peer
runs beside float32 in one process, in alternation; ratios are to that. To time as a machine
without VNNI, AVX-512 and BF16 would run: `--avx2`. torch.ao's kernels (FBGEMM) look at the
processor themselves and cannot be held back, so they are left out there.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# Beside this file.
from avx2 import environment, rerun
from demo import documentation
from machine import cpu_name, peak_bytes
from model_peers import (
    PEERS,
    build,
    compressed_tensors,
    convert,
    fake_quantized,
    held,
    llama,
    minilm_directory,
    smollm2,
)  # fmt: skip


def speed(arguments: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    from lowbit.nn.speed import measure

    src = smollm2(work) if arguments.model == "smollm2" else llama(work)
    rows = []
    reference = build("fp32", src, work)
    for name in arguments.peers:
        if name == "torch.ao int8 dynamic" and arguments.avx2:
            continue
        if name == "torchao int8 dynamic" and importlib.util.find_spec("torchao") is None:
            print("torchao is not installed: left out (see --path)", file=sys.stderr)
            continue
        model = reference if name == "fp32" else build(name, src, work)
        for batch in (1, 8):
            models = {"fp32": reference} | ({name: model} if name != "fp32" else {})
            found = measure(
                models,
                batch=batch,
                prompt_tokens=arguments.prompt,
                new_tokens=arguments.new,
                repeats=arguments.repeats,
            )
            mine, theirs = found[name], found["fp32"]
            rows.append({
                "model": src.name, "peer": name, "batch": batch, "prefill": mine.prefill, "decode": mine.decode,
                "prefill_ratio": mine.prefill / theirs.prefill, "decode_ratio": mine.decode / theirs.decode,
                "bytes": held(model), "bytes_ratio": held(model) / held(reference),
            })  # fmt: skip
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        del model
        gc.collect()
    return rows


def quality(arguments: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    import torch
    from transformers import AutoTokenizer

    from lowbit import ops
    from lowbit.evaluate.metrics import perplexity

    src = smollm2(work)
    tokenizer = AutoTokenizer.from_pretrained(src)
    ids = documentation(tokenizer, arguments.tokens)
    prompts = [
        "The capital of France is",
        "def fibonacci(n):",
        "Water boils at",
        "Once upon a time, there was",
    ]
    rows: list[dict[str, Any]] = []

    def greedy(model: Any) -> list[list[int]]:
        found = []
        for prompt in prompts:
            batch = tokenizer(prompt, return_tensors="pt")
            with torch.inference_mode():
                out = model.generate(**batch, max_new_tokens=24, min_new_tokens=24, do_sample=False)
            found.append(out[0, batch["input_ids"].shape[1] :].tolist())
        return found

    def look(name: str, model: Any) -> dict[str, Any]:
        begin = time.perf_counter()
        rows.append({"model": name, "perplexity": perplexity(model, ids, length=512)})
        print(json.dumps(rows[-1]), f"{time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
        return rows[-1]

    base = look("BF16 weights, float32 arithmetic", build("fp32", src, work))
    for scheme in ("int8", "fp8"):
        out = convert(src, work / f"{src.name}-{scheme}", scheme)
        model = build(f"lowbit {scheme}", src, work)
        mine = look(f"lowbit {scheme}", model)
        # The reference sums exactly, in float64. A simulation in float32 is no twin token by token:
        # its rounding tips codes, and the layers amplify that to the size of the quantization error.
        fast = greedy(model)
        with ops.use_implementation("reference"):
            exact = greedy(model)
        mine["greedy tokens as the float64 reference"] = _agreement(fast, exact)
        if scheme == "fp8":
            ops.use_float64_sums(True)
            float64 = look(f"lowbit {scheme}, sums in float64", model)
            float64["greedy tokens as the float64 reference"] = _agreement(greedy(model), exact)
            ops.use_float64_sums(False)
        simulated = fake_quantized(out)
        theirs = look(f"the same, simulated in float32 ({scheme})", simulated)
        theirs["greedy tokens as the float64 reference"] = _agreement(greedy(simulated), exact)
        look(f"compressed-tensors {scheme}", compressed_tensors(out))
    for row in rows:
        row["change"] = f"{row['perplexity'] / base['perplexity'] - 1:+.2%}"
    return rows


def _agreement(a: list[list[int]], b: list[list[int]]) -> float:
    pairs = [(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True)]
    return sum(x == y for x, y in pairs) / len(pairs)


def minilm(arguments: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    import re
    from pydoc_data import topics

    import torch
    from transformers import AutoModel, AutoTokenizer

    from lowbit.nn import load, quantize_model

    src = minilm_directory()
    tokenizer = AutoTokenizer.from_pretrained(src)
    text = " ".join(" ".join(topics.topics.values()).split())
    found = [s.strip() for s in re.split(r"(?<=[.!?]) ", text)]
    sentences = [s for s in dict.fromkeys(found) if 20 < len(s) < 300][:1000]

    @torch.inference_mode()
    def embed(model: Any) -> torch.Tensor:
        out = []
        for start in range(0, len(sentences), 50):
            batch = tokenizer(
                sentences[start : start + 50], padding=True, truncation=True, return_tensors="pt"
            )
            hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            out.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)))
        return torch.cat(out)

    want = embed(AutoModel.from_pretrained(src, dtype=torch.float32).eval())
    rows = []
    for scheme in ("int8", "fp8"):
        for how in ("in memory", "converted"):
            if how == "converted":
                model = load(convert(src, work / f"minilm-{scheme}", scheme), dtype=torch.float32)
            else:
                model = quantize_model(AutoModel.from_pretrained(src, dtype=torch.float32).eval(), scheme)
            cosine = (embed(model) * want).sum(1)
            rows.append({
                "scheme": scheme, "how": how, "sentences": len(sentences), "mean_cosine": float(cosine.mean()),
                "least_cosine": float(cosine.min()),
            })  # fmt: skip
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def load_time(arguments: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Each row in a process of its own that has transformers imported; pages of the files dropped before."""
    out = work / "llama-40-layers-int8"
    if not (out / "config.json").is_file():
        source = llama(work, layers=40)
        convert(source, out, "int8")
        shutil.rmtree(source)
    rows = []
    for _ in range(arguments.repeats):
        for what in ("read", "load", "load and answer"):
            command = [
                sys.executable,
                __file__,
                "load-once",
                "--work",
                str(work),
                "--what",
                what,
                "--peer",
                str(out),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    best: list[dict[str, Any]] = []
    for what in ("read", "load", "load and answer"):
        mine = sorted((r for r in rows if r["what"] == what), key=lambda r: r["seconds"])
        best.append(mine[len(mine) // 2])
    for row in best:
        row["ratio"] = row["seconds"] / best[0]["seconds"]
    return best


def load_once(out: Path, what: str) -> None:
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401  (imports are not what is measured)

    import lowbit.nn.quantizer  # noqa: F401
    from lowbit.nn import load
    from lowbit.ops import linear  # noqa: F401

    files = sorted(out.glob("*.safetensors"))
    total = sum(f.stat().st_size for f in files)
    for file in files:
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    begin = time.perf_counter()
    if what == "read":
        buffer = memoryview(bytearray(8 << 20))
        for file in files:
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass
    else:
        model = load(out)
        if what == "load and answer":
            with torch.inference_mode():
                model(input_ids=torch.tensor([[1, 2, 3]]), logits_to_keep=1)
    spent = time.perf_counter() - begin
    print(
        json.dumps(
            {
                "what": what,
                "seconds": spent,
                "bytes": total,
                "GB/s": total / spent / 1e9,
                "peak_rss": peak_bytes(),
            }
        )
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    keys = list(dict.fromkeys(k for r in rows for k in r))

    def say(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    return "\n".join([*lines, *("| " + " | ".join(say(r.get(k)) for k in keys) + " |" for r in rows)])


def machine() -> str:
    import torch

    isa = torch.backends.cpu.get_cpu_capability()
    python = platform.python_version()
    return (
        f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__} ({isa}), Python {python}"
    )


BENCHMARKS: dict[str, Callable[[argparse.Namespace, Path], list[dict[str, Any]]]] = {
    "quality": quality, "speed": speed, "minilm": minilm, "load": load_time,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=[*BENCHMARKS, "all", "load-once"])
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="where checkpoints are made")
    parser.add_argument("--path", type=Path, action="append", default=[], help="a directory with torchao")
    parser.add_argument("--model", choices=["smollm2", "llama-1b"], default="smollm2")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=4096, help="of text for perplexity")
    parser.add_argument("--avx2", action="store_true", help="run as a machine with AVX2 only")
    parser.add_argument("--write", type=Path, help="append the tables to this file")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--what", dest="part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    # Outputs of many rows otherwise come from fresh pages or from used ones as malloc's history
    # has it: the same model then prefills at 830 or at 1150 tokens/s.
    wanted = {"MALLOC_MMAP_THRESHOLD_": str(256 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
    rerun(wanted | environment() if arguments.avx2 else wanted)
    sys.path += [str(p) for p in arguments.path]
    if arguments.what == "load-once":
        load_once(Path(arguments.peer), arguments.part)
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    from transformers.utils import logging

    logging.disable_progress_bar()
    parts = []
    for name in BENCHMARKS if arguments.what == "all" else [arguments.what]:
        models = ["smollm2", "llama-1b"] if arguments.what == "all" and name == "speed" else [arguments.model]
        for model in models:
            chosen = copy.copy(arguments)
            chosen.model = model
            rows = BENCHMARKS[name](chosen, arguments.work)
            title = f"## {name}" + (f", {model}, prompt of {arguments.prompt}" if name == "speed" else "")
            parts.append(f"{title}\n\n{machine()}\n\n{table(rows)}\n")
            print(parts[-1])
    if arguments.write:
        arguments.write.parent.mkdir(parents=True, exist_ok=True)
        with arguments.write.open("a") as stream:
            stream.write("\n" + "\n".join(parts))


if __name__ == "__main__":
    main()
