"""Conversion speed and memory against `cp` and llm-compressor, in one run: `make bench-convert`.

    python scripts/bench_convert.py [--gb 2] [--rounds 5] [--peer PYTHON] [--work DIR] [--write FILE]

Generates a Llama-shaped BF16 checkpoint in several shards and the same weights as block FP8.
Then, alternating, `--rounds` times each: `cp` of the source directory with fsync of every
file; `lowbit convert` to INT8, the whole process; and the peer's one-shot
`model_free_ptq` when `--peer` names a Python that has llm-compressor. Every speed is a ratio
against that `cp`. Memory is the peak resident set of the process, also for a checkpoint four
times as large and for one that is a single tensor of 2 GB.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from machine import cpu_name  # beside this file

HIDDEN, INTERMEDIATE, VOCAB, KV = 2048, 5632, 32000, 512


def _write_shard(file: Path, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
    """Normal values as BF16. A pool of them is repeated at random offsets, since random numbers
    cost more than the disk, and written piece by piece: this process must stay small, because a
    child's peak memory starts from its parent's."""
    rng = np.random.default_rng(seed)
    pool = ((rng.standard_normal(1 << 22, np.float32) * 0.02).view(np.uint32) >> 16).astype(np.uint16)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        count = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + count]}
        at += count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            left = math.prod(shape)
            while left:
                start = int(rng.integers(0, pool.size // 2))
                part = pool[start : start + min(left, pool.size // 2)]
                stream.write(part.data)
                left -= part.size


def generate(out: Path, gigabytes: float, shards: int = 4) -> Path:
    """A Llama-shaped BF16 checkpoint of about `gigabytes` in `shards` files."""
    if (out / "config.json").exists():
        return out
    out.mkdir(parents=True)
    per_layer = 2 * (2 * HIDDEN * HIDDEN + 2 * KV * HIDDEN + 3 * INTERMEDIATE * HIDDEN)
    layers = max(1, round((gigabytes * 1e9 - 4 * VOCAB * HIDDEN) / per_layer))
    parts: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shards)]
    parts[0]["model.embed_tokens.weight"] = (VOCAB, HIDDEN)
    for i in range(layers):
        part, prefix = parts[i * shards // layers], f"model.layers.{i}"
        for name, shape in (
            ("input_layernorm", (HIDDEN,)), ("post_attention_layernorm", (HIDDEN,)),
            ("self_attn.q_proj", (HIDDEN, HIDDEN)), ("self_attn.k_proj", (KV, HIDDEN)),
            ("self_attn.v_proj", (KV, HIDDEN)), ("self_attn.o_proj", (HIDDEN, HIDDEN)),
            ("mlp.gate_proj", (INTERMEDIATE, HIDDEN)), ("mlp.up_proj", (INTERMEDIATE, HIDDEN)),
            ("mlp.down_proj", (HIDDEN, INTERMEDIATE)),
        ):  # fmt: skip
            part[f"{prefix}.{name}.weight"] = shape
    parts[-1]["model.norm.weight"] = (HIDDEN,)
    parts[-1]["lm_head.weight"] = (VOCAB, HIDDEN)
    weight_map = {}
    for i, part in enumerate(parts):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        _write_shard(out / name, part, i)
        weight_map |= dict.fromkeys(part, name)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers, "vocab_size": VOCAB,
        "num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": False,
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config))
    return out


def generate_single(out: Path, gigabytes: float = 2.0) -> Path:
    """A checkpoint whose only tensor is that large."""
    if (out / "config.json").exists():
        return out
    out.mkdir(parents=True)
    rows = int(gigabytes * 1e9 / 2 / 8192)
    _write_shard(out / "model.safetensors", {"model.layers.0.mlp.up_proj.weight": (rows, 8192)}, 1)
    (out / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "bfloat16"}))
    return out


def run(command: list[str], out: Path) -> tuple[float, float]:
    """(seconds of the whole process, peak resident MB); `out` is removed before."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{errors.decode()[-2000:]}")
    return seconds, usage.ru_maxrss / 1024


PEER = """
import sys
from llmcompressor import model_free_ptq
src, out, scheme = sys.argv[1:4]
model_free_ptq(model_stub=src, save_directory=out, scheme=scheme, ignore=["lm_head", "re:.*embed_tokens", "re:.*norm"],
               max_workers=2, device="cpu")
"""


def _machine() -> str:
    return f"{len(os.sched_getaffinity(0))} cores of {cpu_name()}, Python {platform.python_version()}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", help="a Python with llm-compressor, for the comparison")
    parser.add_argument("--work", type=Path, default=Path(".bench"))
    parser.add_argument("--write", type=Path, help="also write the table to this Markdown file")
    parser.add_argument("--no-memory", action="store_true", help="leave out the 4 × and single-tensor runs")
    arguments = parser.parse_args()

    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    lowbit = str(Path(sys.executable).parent / "lowbit")
    bf16 = generate(work / f"bf16-{arguments.gb:g}", arguments.gb)
    fp8 = work / f"fp8-{arguments.gb:g}"
    if not (fp8 / "config.json").exists():
        run([lowbit, "convert", str(bf16), str(fp8), "--scheme", "fp8-block", "--format", "fp8"], fp8)
    out = work / "out"
    size = {p: sum(f.stat().st_size for f in p.iterdir()) for p in (bf16, fp8)}

    def cp(source: Path) -> list[str]:
        return ["sh", "-c", f"cp -r '{source}' '{out}' && sync '{out}'/*"]

    def convert(source: Path, scheme: str = "int8") -> list[str]:
        return [lowbit, "convert", str(source), str(out), "--scheme", scheme]

    commands: dict[str, tuple[list[str], Path]] = {
        "cp BF16": (cp(bf16), bf16),
        "lowbit BF16 → INT8": (convert(bf16), bf16),
        "lowbit BF16 → FP8": (convert(bf16, "fp8"), bf16),
        "cp block FP8": (cp(fp8), fp8),
        "lowbit block FP8 → INT8": (convert(fp8), fp8),
    }
    if arguments.peer:
        commands["llm-compressor BF16 → INT8"] = (
            [arguments.peer, "-c", PEER, str(bf16), str(out), "W8A8"],
            bf16,
        )
        commands["llm-compressor BF16 → FP8"] = (
            [arguments.peer, "-c", PEER, str(bf16), str(out), "FP8_DYNAMIC"],
            bf16,
        )
    run(convert(bf16), out)  # loops compiled and cached; also what a second run of any user finds

    seconds: dict[str, list[float]] = {name: [] for name in commands}
    memory: dict[str, float] = dict.fromkeys(commands, 0.0)
    for _ in range(arguments.rounds):
        for name, (command, _) in commands.items():
            took, peak = run(command, out)
            seconds[name].append(took)
            memory[name] = max(memory[name], peak)

    lines = [
        f"{_machine()}; {size[bf16] / 1e9:.2f} GB BF16, {size[fp8] / 1e9:.2f} GB block FP8; "
        f"medians of {arguments.rounds}, whole processes, alternating.",
        "",
        "| | seconds | GB/s of input | × `cp` of the same input | peak MB |",
        "|---|---|---|---|---|",
    ]
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, (_, source) in commands.items():
        base = medians["cp BF16" if source == bf16 else "cp block FP8"]
        peak = "" if name.startswith("cp") else f"{memory[name]:.0f}"
        took = medians[name]
        speed = size[source] / 1e9 / took
        lines.append(f"| {name} | {took:.2f} | {speed:.2f} | {took / base:.2f} | {peak} |")
    if not arguments.no_memory:
        four = generate(work / f"bf16-{4 * arguments.gb:g}", 4 * arguments.gb, shards=8)
        single = generate_single(work / "single")
        lines += [
            "",
            "| INT8 of | peak MB |",
            "|---|---|",
            f"| {arguments.gb:g} GB | {memory['lowbit BF16 → INT8']:.0f} |",
        ]
        for label, source in ((f"{4 * arguments.gb:g} GB", four), ("one tensor of 2 GB", single)):
            lines.append(f"| {label} | {run(convert(source), out)[1]:.0f} |")
    shutil.rmtree(out, ignore_errors=True)
    text = "\n".join(lines)
    print(text)
    if arguments.write:
        arguments.write.write_text("# Conversion\n\n`make bench-convert`, on " + text + "\n")


if __name__ == "__main__":
    main()
