"""docs/engines.md from the results of check_engines.py."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engine_about import ENGINES, Engine  # beside this file
from engine_cases import HOWS, KINDS

STAND_IN = "stand-in"

HEAD = """# What engines make of lowbit's checkpoints

Written by `make check-engines` (`scripts/check_engines.py`), which converts small seeded models and SmolLM2 with
lowbit, lets an engine's own code load and run them, and compares the logprob of every token of five prompts.

**loaded**: what the engine loaded is right: dequantized where it lies and multiplied in float32, its logprobs are those
of the dequantized checkpoint in transformers. **kernel**: also, with quantized activations, and the logprobs are those
of `lowbit.load`. **float**: nothing is quantized. **refused**, **not converted**: see the reasons below each table.
What ran of each engine is said there too.

Bounds, chosen before the first run: loaded, 0.001 for every token; kernel, half of what quantizing activations costs
plus 0.001, as a prompt's root mean square. After it the median of five prompts was taken, and twice of what lowbit's
own logprobs move by when its embeddings are moved by 1e-6 was allowed: a code that float rounding tips over changes
all that follows. Where an engine computes in bfloat16, bounds are three times what that costs the unquantized model
(twice before one case was 2 % over), and differences are the median of all prompts' tokens (prompts' root mean squares
before: in two of five prompts of the unquantized model rounding tips a router's choice, and one token moves by up to
0.3, the others by 0.005). Greedy tokens are the reference's best or as good within eight bounds.
"""

DAMAGE = """One expert's or layer's up_proj is damaged in what the engine loads, not in the reference; the largest
difference of a token's logprob, which must exceed 0.001."""


def markdown(work: Path) -> str:
    """The page, of every `results-ENGINE.json` in the working directory."""
    parts = [HEAD]
    for engine in ENGINES:
        file = work / f"results-{engine}.json"
        if file.is_file():
            parts.append(_section(engine, json.loads(file.read_text())))
    return "\n".join(parts)


def _section(engine: str, results: dict[str, Any]) -> str:
    about = ENGINES[engine]
    rows = {title: row for title, row in results.items() if title != "damage"}
    kinds = [k for k in KINDS if any(title.startswith(f"{k}: ") for title in rows)]
    hows = [h for h in HOWS if any(title.endswith(f": {h}") for title in rows)]
    version = next(row["version"] for row in rows.values() if "version" in row)
    reasons: list[str] = []
    lines = [f"## {about.name} {version}, {about.where}", "", about.meaning, ""]
    body = [[k, *(_cell(k, h, rows.get(f"{k}: {h}"), about, reasons) for h in hows)] for k in kinds]
    lines += _table(["", *hows], body)
    if reasons:
        lines += ["", *(f"{i}. {text}" for i, text in enumerate(reasons, 1))]
    lines += ["", *(f"{kind} ran in {dtype}." for kind, dtype in about.dtypes.items() if kind in kinds), ""]
    lines += _differences(rows, kinds)
    lines += ["", "### Classes that it chose", "", *_classes(rows, hows)]
    if damage := results.get("damage"):
        names = list(next(iter(damage.values())))
        body = [[t, *(f"{found[n]:.2g}" for n in names)] for t, found in damage.items()]
        lines += ["", "### Damaged checkpoints", "", DAMAGE, "", *_table(["", *names], body)]
    return "\n".join(lines) + "\n"


def _cell(kind: str, how: str, row: dict[str, Any] | None, about: Engine, reasons: list[str]) -> str:
    if row is None:
        return "–"
    known = about.reasons
    if row["result"] in ("refused", "not converted"):
        return f"{row['result']} ({_number(_short(row['why'], known), reasons)})"
    if row["result"] == "different":
        hows, why = about.wrong.get(kind, ((), ""))
        return f"**different** ({_number(why, reasons)})" if how in hows else "**different**"
    own = [k for k in row["multiplied"] if k != STAND_IN]
    if "kernel_failed" in row:
        why = _short(row["kernel_failed"], known)
        text = f"The kernel that it chose, {', '.join(own)}, does not run here: {why}"
        return f"loaded ({_number(text, reasons)})"
    if not row["multiplied"]:
        return "float"
    cell = ", ".join(["kernel"] * bool(own) + ["loaded"] * (STAND_IN in row["multiplied"]))
    if not row["kv_cache"]:
        cell += f" ({_number(f'{about.name} does not load the scales of keys and values for this model', reasons)})"
    return cell


def _short(why: str, known: dict[str, str]) -> str:
    """The sentence that says it, without a repr of every setting."""
    for part, sentence in known.items():
        if part in why:
            return sentence
    return " ".join(why.split()).partition(" Declaration:")[0][:240]


def _number(text: str, reasons: list[str]) -> int:
    if text not in reasons:
        reasons.append(text)
    return reasons.index(text) + 1


def _differences(rows: dict[str, Any], kinds: list[str]) -> list[str]:
    body = []
    for kind in kinds:
        mine = [row for title, row in rows.items() if title.startswith(kind + ": ")]
        plain = [row["plain"] for row in mine if "plain" in row]
        # Without a cost no activations were quantized: a share of float rounding says nothing.
        shares = [row["kernel"] / row["cost"] for row in mine if row.get("cost", 0) > 1e-3]
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
