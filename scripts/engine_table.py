"""docs/engines.md from the results of check_engines.py."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

STAND_IN = "stand-in"
NAMES = {"vllm": "vLLM"}

HEAD = """# What engines make of lowbit's checkpoints

Written by `make check-engines` (`scripts/check_engines.py`), which converts small seeded models and SmolLM2 with
lowbit, lets the real engine load and run them, and compares the logprob of every token of five prompts.

**loaded**: the engine read config.json, built and fused its layers and loaded every weight; then what it had loaded
was dequantized where it lay and multiplied in float32 by its own unquantized methods. The logprobs are those of the
dequantized checkpoint in transformers. **kernel**: also, the engine's own kernels ran with quantized activations, and
the logprobs are those of `lowbit.load`. **kernel, loaded**: kernels for some layers, where the CPU has none for the
others (mostly experts). **refused**, **not converted**: see the reasons below.
"""

BOUNDS = """
Bounds, chosen before the first run: loaded, 0.001 for every token; kernel, half of what quantizing activations costs
plus 0.001, as a prompt's root mean square. After it the median of five prompts was taken, and twice of what lowbit's
own logprobs move by when its embeddings are moved by 1e-6 was allowed: a code that float rounding tips over changes
all that follows. {kinds} Greedy tokens, made through the engine's KV cache, are the reference's best or as good
within eight bounds.
"""

DAMAGE = """One expert's or layer's up_proj is damaged in what the engine loads, not in the reference; the largest
difference of a token's logprob, which must exceed 0.001."""

REFERENCE = {
    "vllm": "{bf16} ran in bfloat16, the only type of vLLM's linear attention on CPUs: its bounds are three times what "
    "bfloat16 costs the unquantized model (twice before one case was 2 % over).",
}


def markdown(work: Path) -> str:
    """The page, of every `results-ENGINE.json` in the working directory."""
    parts = [HEAD]
    for file in sorted(work.glob("results-*.json")):
        parts.append(_engine(file.stem.removeprefix("results-"), json.loads(file.read_text())))
    return "\n".join(parts)


def _engine(engine: str, results: dict[str, Any]) -> str:
    rows = {title: row for title, row in results.items() if title != "damage"}
    kinds = list(dict.fromkeys(t.partition(": ")[0] for t in rows))
    hows = list(dict.fromkeys(t.partition(": ")[2] for t in rows))
    version = next(row["version"] for row in rows.values() if "version" in row)
    reasons: dict[str, list[str]] = {}
    lines = [f"## {NAMES.get(engine, engine)} {version}, on a CPU", ""]
    lines += _table(["", *hows], [[k, *(_cell(rows.get(f"{k}: {h}"), reasons) for h in hows)] for k in kinds])
    if reasons:
        lines += ["", *(f"{i}. {text}" for i, text in enumerate(reasons, 1))]
    lines += [BOUNDS.format(kinds=REFERENCE.get(engine, "").format(bf16="Qwen3.5-MoE")).rstrip(), ""]
    lines += _differences(rows, kinds)
    lines += ["", "### Classes that it chose", "", *_classes(rows, hows)]
    if damage := results.get("damage"):
        names = list(next(iter(damage.values())))
        lines += [
            "",
            "### Damaged checkpoints",
            "",
            "One expert's or layer's up_proj is damaged in what the engine loads, ",
        ]
        lines[-1] += (
            "not in the reference; the largest difference of a token's logprob, which must exceed 0.001."
        )
        body = [[t, *(f"{found[n]:.2g}" for n in names)] for t, found in damage.items()]
        lines += ["", *_table(["", *names], body)]
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any] | None, reasons: dict[str, list[str]]) -> str:
    if row is None:
        return "–"
    if row["result"] in ("refused", "not converted"):
        return f"{row['result']} ({_number(_short(row['why']), reasons)})"
    if row["result"] == "different":
        return "**different**"
    if "kernel_failed" in row:
        kernels = ", ".join(k for k in row["multiplied"] if k != STAND_IN)
        text = f"The kernel that it chose, {kernels}, does not run here: {_short(row['kernel_failed'])}"
        return f"loaded ({_number(text, reasons)})"
    own = [k for k in row["multiplied"] if k != STAND_IN]
    if not row["multiplied"]:
        return "float"
    return ", ".join(["kernel"] * bool(own) + ["loaded"] * (STAND_IN in row["multiplied"]))


def _short(why: str) -> str:
    """The sentence that says it, without a repr of every setting."""
    if "No compressed-tensors compatible scheme" in why:
        return "vLLM has no scheme for INT8 blocks, in compressed-tensors or any other format"
    return " ".join(why.split()).partition(" Declaration:")[0][:240]


def _number(text: str, reasons: dict[str, list[str]]) -> int:
    reasons.setdefault(text, [])
    return list(reasons).index(text) + 1


def _differences(rows: dict[str, Any], kinds: list[str]) -> list[str]:
    body = []
    for kind in kinds:
        mine = [row for title, row in rows.items() if title.startswith(kind + ": ")]
        plain = [row["plain"] for row in mine if "plain" in row]
        shares = [row["kernel"] / row["cost"] for row in mine if row.get("cost")]
        both = [row["kernel"] for row in mine if "kernel" in row]
        if plain:
            body.append([
                kind, f"{max(plain):.1e}", *(f"{min(both):.1e} … {max(both):.1e}" if both else "",),
                f"{min(shares):.1e} … {max(shares):.2g}" if shares else "",
            ])  # fmt: skip
    head = [
        "",
        "loaded: largest difference of a logprob",
        "kernel: from lowbit's, root mean square",
        "as a share of the cost",
    ]
    return _table(head, body)


def _classes(rows: dict[str, Any], hows: list[str]) -> list[str]:
    body = []
    for how in hows:
        found: dict[str, set[str]] = {"experts": set(), "linear": set()}
        for title, row in rows.items():
            if title.endswith(": " + how):
                for kind, chosen in row.get("layers", {}).items():
                    where = "experts" if "Experts" in kind else "linear"
                    found[where] |= {f"{s}, {k}" for s, k in chosen if s != "float"}
        if any(found.values()):
            body.append([how, *("<br>".join(sorted(found[w])) for w in ("linear", "experts"))])
    return _table(["", "Linears: scheme, kernel", "experts: method, kernel"], body)


def _table(head: list[str], body: Iterable[list[str]]) -> list[str]:
    return ["| " + " | ".join(r) + " |" for r in (head, ["---"] * len(head), *body)]
