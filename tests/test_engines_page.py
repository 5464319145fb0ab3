"""docs/engines.md: a section for each engine that has results, and a reason beside what is not as it should be."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from engine_about import ENGINES
from engine_table import markdown

SAME = {
    "version": "1.0", "result": "same", "multiplied": ["K"], "kv_cache": True, "plain": 1e-6, "kernel": 1e-6,
    "cost": 0.1, "layers": {"Linear up_proj": [["Scheme", "K"]]},
}  # fmt: skip


def page(tmp_path: Path, **results: dict) -> str:
    for engine, rows in results.items():
        (tmp_path / f"results-{engine}.json").write_text(json.dumps(rows))
    return markdown(tmp_path)


def cells(text: str, kind: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {kind} |"))
    return [c.strip() for c in line.split("|")[2:-1]]


def test_every_engine_with_results_has_a_section(tmp_path):
    for engine in ENGINES:
        text = page(tmp_path, **{engine: {"Llama: int8": SAME}})
    assert [f"## {about.name} 1.0, {about.where}" in text for about in ENGINES.values()] == [True] * len(
        ENGINES
    )
    assert text.count("| Llama | kernel |") == len(ENGINES)


def test_columns_are_in_the_order_of_the_cases(tmp_path):
    rows = {"Qwen2: fp8": SAME, "Llama: fp8": {**SAME, "multiplied": ["stand-in"]}, "Llama: int8": SAME}
    text = page(tmp_path, vllm=rows)
    assert cells(text, "Llama") == ["kernel", "loaded"] and cells(text, "Qwen2") == ["–", "kernel"]


def test_a_kernel_that_quantizes_no_activations_has_no_share_of_a_cost(tmp_path):
    text = page(tmp_path, vllm={"Llama: fp8": SAME, "Llama: fp8-block": {**SAME, "cost": 1e-7}})
    assert "| Llama | 1.0e-06 | 1.0e-06 … 1.0e-06 | 1.0e-05 … 1e-05 |" in text


def test_reasons_are_sentences(tmp_path):
    refused = {
        "version": "1.0",
        "result": "refused",
        "why": "NotImplementedError: only implemented only for NPU",
    }
    rows = {
        "Llama: int8": {**SAME, "kv_cache": False},
        "Qwen3-MoE: int8": refused,
        "Llama 4: fp8": {**SAME, "result": "different"},
        "Llama: fp8": {**SAME, "result": "different"},
    }
    text = page(tmp_path, sglang=rows)
    assert cells(text, "Llama") == ["kernel (1)", "**different**"]
    assert cells(text, "Qwen3-MoE") == ["refused (2)", "–"] and cells(text, "Llama 4") == [
        "–",
        "**different** (3)",
    ]
    for start in (
        "1. SGLang does not load the scales",
        "2. SGLang runs INT8 experts",
        "3. SGLang's Llama 4 reorders",
    ):
        assert f"\n{start}" in text
