"""Calibrate with llm-compressor, for comparison; runs in a virtual environment that has it.

    PEER_PYTHON scripts/calibrate_peer.py SRC OUT --method gptq --ids windows.pt

`--ids` holds token ids [samples, length] as bench_calibration.py writes them, so that both see the same data.
Prints one JSON line: seconds (without loading the model and saving), whole_seconds (with both), peak memory.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("src")
parser.add_argument("out")
parser.add_argument(
    "--method", choices=["rounding", "gptq", "smoothquant", "smoothquant-gptq"], required=True
)
parser.add_argument("--ids", required=True)
arguments = parser.parse_args()

import torch  # noqa: E402  (after argparse, so that --help is quick)
from datasets import Dataset  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: E402
from llmcompressor.modifiers.quantization import QuantizationModifier  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

try:
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
except ImportError:
    from llmcompressor.modifiers.smoothquant import SmoothQuantModifier

begin = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(arguments.src, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(arguments.src)
ids = torch.load(arguments.ids, weights_only=True)
common = {"targets": "Linear", "scheme": "W8A8", "ignore": ["lm_head"]}
recipe = {
    "rounding": [QuantizationModifier(**common)],
    "gptq": [GPTQModifier(**common)],
    "smoothquant": [SmoothQuantModifier(smoothing_strength=0.5), QuantizationModifier(**common)],
    "smoothquant-gptq": [SmoothQuantModifier(smoothing_strength=0.5), GPTQModifier(**common)],
}[arguments.method]
data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
start, processor = time.perf_counter(), time.process_time()
more = {} if arguments.method == "rounding" else {"dataset": data, "num_calibration_samples": len(data)}
oneshot(model=model, recipe=recipe, tokenizer=tokenizer, max_seq_length=ids.shape[1], **more)
seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - processor
model.save_pretrained(arguments.out, save_compressed=True)
tokenizer.save_pretrained(arguments.out)
whole_seconds = time.perf_counter() - begin
# Not ru_maxrss, which is the parent's where that was larger.
status = Path("/proc/self/status").read_text(encoding="ascii")
peak = int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024
found = {"seconds": seconds, "whole_seconds": whole_seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak}
print(json.dumps(found))
