"""Convert small models and SmolLM2, let a real engine load and run them, and compare token by token.

    python scripts/check_engines.py --engine vllm --python .venv-vllm/bin/python --work .engines [--only TEXT …]

Every case runs twice. *Plain*: the engine reads config and tensors, builds and fuses its layers, loads every weight;
then what it loaded is dequantized where it lies and multiplied in float32. Its logprobs must be those of the
dequantized checkpoint in transformers, within PLAIN for every token. *Kernels*: the engine's own kernels where the
CPU has one, activations quantized. Its logprobs must be those of `lowbit.load`, which quantizes them at the same
places: a prompt's root mean square within KERNEL of what quantizing activations costs, or twice of what lowbit's own
logprobs move by when its embeddings are moved by 1e-6, plus PLAIN. Greedy tokens come through the engine's KV cache:
each must be the reference's best, or as good within eight bounds. Medians of five prompts count.

Both bounds were chosen before the first run; the medians and lowbit's own unrest came after it, when one prompt of a
mixture had a code that float rounding tipped over, and with it a router's choice, and SmolLM2's thirty layers had
amplified such codes. Where an engine computes in bfloat16, all of these are medians of the tokens (see `typical`).

`--damage` shows that the bounds would notice: checkpoints with one wrong scale, one missed scale, one matrix in the
other order and two experts exchanged must fail the plain comparison.

Another engine is a script with the call `[--plain] CHECKPOINT IDS.json OUT.json …` (see engine_vllm.py), and an
entry in engine_about.py. Results are kept in the working directory, a file for each engine; `--write docs/engines.md`
makes a section of each of them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from engine_about import ENGINES  # beside this file
from engine_cases import HOWS, NEW_TOKENS, Case, cases, convert, prompts, source
from engine_damage import DAMAGED, check
from engine_models import FUSED, TURNED, architecture, turn_experts
from engine_references import (
    as_bf16_keeps,
    blocks_cut,
    by_token_where,
    cache_quantized,
    compare,
    disturbed,
    float_where,
    logprobs,
    of_tokens,
    share_input_scales,
    typical,
)
from engine_table import markdown
from safetensors.torch import load_file
from torch import Tensor, nn

import lowbit
from lowbit.checkpoint.beside import name_of_attention

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "nn"))
from nn_reference import dequantized  # noqa: E402 (code · scale written out, for transformers)

PLAIN = 1e-3
KERNEL = 0.5
# Where an engine computes in bfloat16, bounds are relative to what that costs the unquantized model, at most this much.
BF16 = 0.1


def run_engine(engine: str, python: Path, jobs: list[tuple[Path, Path, Path]], plain: bool) -> None:
    if not jobs:
        return
    call = [str(python), str(HERE / ENGINES[engine].script), *(["--plain"] if plain else [])]
    subprocess.run([*call, *(str(p) for job in jobs for p in job)], check=True)


def checkpoint(case: Case, engine: str) -> Path:
    """The checkpoint for references: scales as the engine rounds them, and experts in one tensor as transformers reads
    them."""
    to = case.at / "reference"
    if ENGINES[engine].keeps_scales_in_bf16:
        as_bf16_keeps(case.out, to)
    elif case.kind == TURNED:
        shutil.rmtree(to, ignore_errors=True)
        shutil.copytree(case.out, to)
    else:
        return case.out
    if case.kind == TURNED:
        turn_experts(to / "model.safetensors")
    return to


def float_model(case: Case, out: Path) -> nn.Module:
    """A checkpoint of the case, dequantized, in transformers, float32."""
    at = out
    if HOWS[case.how].scheme != "bf16":
        at = case.at / "float"
        shutil.rmtree(at, ignore_errors=True)
        dequantized(out, at, FUSED.get(case.kind))
    import transformers

    cls = transformers.LlamaForCausalLM if case.kind == "SmolLM2" else architecture(case.kind)[0]
    model = cls.from_pretrained(at, dtype=torch.float32).eval()
    if at != out:
        shutil.rmtree(at)
    return model


def answer(case: Case, engine: str, mode: str) -> dict[str, Any]:
    return json.loads((case.at / f"{engine}-{mode}.json").read_text())


def asked_of(case: Case, engine: str) -> list[list[int]]:
    return json.loads(case.ids(engine).read_text())["prompts"]


def ask(case: Case, engine: str, work: Path) -> None:
    """Write what the engine is given beside the checkpoint."""
    case.at.mkdir(parents=True, exist_ok=True)
    ids = {
        "prompts": prompts(case.kind, source(case, work)), "new_tokens": NEW_TOKENS,
        "dtype": ENGINES[engine].dtypes.get(case.kind, "float32"), "quantization": HOWS[case.how].quantization,
    }  # fmt: skip
    case.ids(engine).write_text(json.dumps(ids))


def chosen_kernels(found: dict[str, Any]) -> set[str]:
    """The classes that multiply quantized layers."""
    return {
        kernel for kinds in found.get("layers", {}).values() for scheme, kernel in kinds if scheme != "float"
    }


def has_kernel(case: Case, engine: str) -> bool:
    """Whether the engine has a kernel of its own for any quantized layer; otherwise both runs are one."""
    plain = answer(case, engine, "plain")
    return "refused" not in plain and bool(chosen_kernels(plain) - {"stand-in"})


def judge(case: Case, engine: str, before: dict[str, Any]) -> dict[str, Any]:
    """What the table says of a case, from the engine's two answers; `before` holds the unquantized one's row."""
    plain = answer(case, engine, "plain")
    kernels = answer(case, engine, "kernels") if has_kernel(case, engine) else plain
    row: dict[str, Any] = {"version": plain["version"], "layers": plain.get("layers", {})}
    if why := plain.get("refused"):
        return {**row, "result": "refused", "why": why.strip()}
    asked, about = asked_of(case, engine), ENGINES[engine]
    out = checkpoint(case, engine)
    exact = float_model(case, out)
    differences, behind = compare(exact, asked, plain["prompts"])
    bound, row["plain"] = PLAIN, float(torch.cat(differences).abs().max())
    rounded = case.kind in about.dtypes
    if rounded:
        row["plain"] = typical(differences, rounded)
        bound = BF16 if case.how == "bf16" else 3 * before[f"{case.kind}: bf16"]["plain"]
    ok = row["plain"] <= bound and statistics.median(behind) <= 8 * bound
    row |= {"bound": bound, "multiplied": sorted(chosen_kernels(plain)), "kv_cache": True}
    if why := kernels.get("refused"):
        # It loaded, and chose a kernel that cannot run on this machine.
        row["kernel_failed"] = why.strip()
    scales = kv_scales(case)
    if scales:
        given = sorted(x for of_layer in plain["kv_scales"].values() for x in of_layer)
        row["kv_cache"] = given == sorted(x for t in scales.values() for x in t.flatten().tolist())
        ok = ok and row["kv_cache"] != (case.kind in about.leaves_cache_scales)
    if has_kernel(case, engine) and "refused" not in kernels:
        model = lowbit.load(out, dtype=torch.float32)
        if about.shares_input_scales:
            share_input_scales(model)
        with (
            float_where(model, kernels["stand_ins"] + kernels.get("float_activations", [])),
            by_token_where(model, kernels.get("token_activations", [])),
            cache_quantized(model, scales if about.rounds_cache else {}),
            blocks_cut(model) if about.cuts_blocks else nullcontext(),
        ):
            differences, behind = compare(model, asked, kernels["prompts"])
            own = [of_tokens(logprobs(model, ids), ids) for ids in asked]
            costs = [x - of_tokens(logprobs(exact, ids), ids) for x, ids in zip(own, asked, strict=True)]
            with disturbed(model):
                moved = [of_tokens(logprobs(model, ids), ids) - x for ids, x in zip(asked, own, strict=True)]
        measured = {"cost": costs, "kernel": differences, "unrest": moved}
        row |= {name: typical(x, rounded) for name, x in measured.items()}
        row["kernel_bound"] = max(KERNEL * row["cost"], 2 * row["unrest"]) + bound
        ok = ok and row["kernel"] <= row["kernel_bound"]
        ok = ok and statistics.median(behind) <= 8 * row["kernel_bound"]
    return {**row, "result": "same" if ok else "different"}


def known_wrong(case: Case, engine: str) -> str:
    """How the engine itself gets a case wrong, or ""."""
    hows, how = ENGINES[engine].wrong.get(case.kind, ((), ""))
    return how if case.how in hows else ""


def kv_scales(case: Case) -> dict[str, Tensor]:
    """Every attention's scales of keys and of values in the checkpoint; none unless the case has them."""
    if not HOWS[case.how].kv_cache:
        return {}
    tensors = {name_of_attention(n): t for n, t in load_file(case.out / "model.safetensors").items()}
    return {n: t for n, t in tensors.items() if n.endswith((".k_scale", ".v_scale"))}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=sorted(ENGINES), default="vllm")
    parser.add_argument("--python", type=Path, help="the Python of the engine's venv")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[], help="cases whose title has one of these in it")
    parser.add_argument(
        "--damage", action="store_true", help="also show that damaged checkpoints are noticed"
    )
    parser.add_argument("--write", type=Path, help="the table, of all results in the working directory")
    arguments = parser.parse_args()
    work, engine = arguments.work, arguments.engine
    results_file = work / f"results-{engine}.json"
    results = json.loads(results_file.read_text()) if results_file.is_file() else {}
    failed = []
    if arguments.python is not None:
        todo = []
        for case in cases(work, engine, arguments.only):
            ask(case, engine, work)
            if why := convert(case, work):
                results[case.title] = {"result": "not converted", "why": why}
            else:
                todo.append(case)
        for mode in ("plain", "kernels"):
            jobs = [(c.out, c.ids(engine), c.at / f"{engine}-{mode}.json") for c in todo]
            if mode == "kernels":
                jobs = [job for job, c in zip(jobs, todo, strict=True) if has_kernel(c, engine)]
            run_engine(engine, arguments.python, jobs, mode == "plain")
        for case in todo:
            row = results[case.title] = judge(case, engine, results)
            print(case.title, {k: v for k, v in row.items() if k != "layers"}, flush=True)
            if row["result"] == "different" and not known_wrong(case, engine):
                failed.append(case.title)
            results_file.write_text(json.dumps(results, indent=1))
    if arguments.damage:
        chosen = [
            case
            for case in cases(work, engine, [])
            if case.title in DAMAGED and results.get(case.title, {}).get("result") == "same"
        ]

        def distance(case: Case, answers: list[dict[str, Any]]) -> float:
            exact = float_model(case, checkpoint(case, engine))
            return float(torch.cat(compare(exact, asked_of(case, engine), answers)[0]).abs().max())

        noticed = check(
            chosen,
            engine,
            lambda jobs: run_engine(engine, arguments.python, jobs, plain=True),
            distance,
            PLAIN,
        )
        results["damage"] = noticed
        results_file.write_text(json.dumps(results, indent=1))
        failed += [f"{t}, {d}" for t, found in noticed.items() for d, x in found.items() if x <= PLAIN]
    if arguments.write:
        arguments.write.write_text(markdown(work), encoding="utf-8")
    if failed:
        print("different:", *failed, sep="\n  ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
