"""Speed of a converted checkpoint in vLLM and in lowbit, on the same CPU, one thread each.

    python scripts/bench_engines.py CHECKPOINT --vllm .venv-vllm/bin/python [--prompt 256] [--new 64] [--rounds 3]

Each engine runs in a process of its own, taking turns; a process warms up with one round and gives the median of three.
Prefill is the prompt's tokens over the time to the first new token; decoding the tokens after that over the rest of the
time, batch 1. Activations are bfloat16 in both, and float32 in both. vLLM runs eagerly, with its own kernels
(oneDNN's INT8 product) and its KV cache; `--compile` lets it compile the model instead.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ONE_THREAD = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error",
}  # fmt: skip
REPEATS = 3


def run_lowbit(checkpoint: str, dtype: str, prompt: int, new: int, compiled: bool) -> tuple[float, float]:
    """(prefill, decoding) in tokens per second."""
    import torch

    import lowbit
    from lowbit.nn.speed import measure

    torch.set_num_threads(1)
    model = lowbit.load(checkpoint, dtype=getattr(torch, dtype))
    found = measure({"it": model}, batch=1, prompt_tokens=prompt, new_tokens=new, repeats=REPEATS)["it"]
    return found.prefill, found.decode


def run_vllm(checkpoint: str, dtype: str, prompt: int, new: int, compiled: bool) -> tuple[float, float]:
    """(prefill, decoding) in tokens per second."""
    import torch
    from vllm import LLM, SamplingParams

    torch.set_num_threads(1)
    engine = LLM(
        checkpoint, dtype=dtype, max_model_len=prompt + new + 1, enforce_eager=not compiled, max_num_seqs=1,
        skip_tokenizer_init=True, enable_prefix_caching=False, disable_log_stats=True,
        distributed_executor_backend="uni",
    )  # fmt: skip
    vocabulary = engine.llm_engine.model_config.get_vocab_size()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (prompt,), generator=generator).tolist()

    def seconds(tokens: int) -> float:
        wanted = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        engine.generate({"prompt_token_ids": ids}, wanted, use_tqdm=False)
        return time.perf_counter() - begin

    times = [(seconds(1), seconds(1 + new)) for _ in range(REPEATS + 1)][1:]
    first = statistics.median(t for t, _ in times)
    return prompt / first, new / statistics.median(both - one for one, both in times)


RUNS = {"vLLM": run_vllm, "lowbit": run_lowbit}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--vllm", type=Path, help="the Python of vLLM's venv")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--run", choices=sorted(RUNS), help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="bfloat16", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.run:
        print(json.dumps(RUNS[a.run](a.checkpoint, a.dtype, a.prompt, a.new, a.compile)))
        return 0
    if a.vllm is None:
        parser.error("--vllm: expected the Python of vLLM's venv (make engines-env)")
    found: dict[tuple[str, str], list[Any]] = {}
    for _ in range(a.rounds):
        for dtype in ("bfloat16", "float32"):
            for name in RUNS:
                python = str(a.vllm) if name == "vLLM" else sys.executable
                call = [python, __file__, *sys.argv[1:], "--run", name, "--dtype", dtype]
                done = subprocess.run(
                    call, env=os.environ | ONE_THREAD, stdout=subprocess.PIPE, text=True, check=True
                )
                found.setdefault((name, dtype), []).append(json.loads(done.stdout.splitlines()[-1]))
    print("| | prefill, tokens/s | decoding, tokens/s |\n| --- | --- | --- |")
    for (name, dtype), rounds in found.items():
        prefill, decode = (statistics.median(r[i] for r in rounds) for i in (0, 1))
        print(f"| {name}, {dtype} | {prefill:.0f} | {decode:.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
