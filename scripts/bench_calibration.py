"""Calibration methods side by side on SmolLM2: perplexity, KL to BF16, seconds, peak memory.

    python scripts/bench_calibration.py --work DIR [--peer-python PATH] [--seeds 0 1 2] [--out FILE.md]

Text: Debian's handbook (package debian-handbook) where it is installed, else Python's own
`pydoc_data.topics`; the first half calibrates, the second half evaluates. `--peer-python` is the Python
of an environment with llm-compressor (and `scripts/calibrate_peer.py`'s other imports), which
then runs the same methods on the same token ids. Every calibration is a process of its own, so
that its peak memory is its own; all results are evaluated by the same code, layer by layer, with
activations rounded as engines round them. Finished rows are kept in DIR and not run again.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HANDBOOK = Path("/usr/share/doc/debian-handbook/html/en-US")
HERE = Path(__file__).resolve().parent

# (label, scheme, method) of ours; the last column of a peer's row is its method's name.
OURS = {
    "rounding": ("int8", "absmax"),
    "smoothquant": ("int8", "smoothquant"),
    "gptq": ("int8", "gptq"),
    "smoothquant-gptq": ("int8", "smoothquant-gptq"),
    "rotate": ("int8", "rotate"),
    "rotate-gptq (best)": ("int8", "rotate-gptq"),
    "rotate-gptq-online": ("int8", "rotate-gptq-online"),
    "static: absmax": ("int8-static", "absmax"),
    "static: best": ("int8-static", "best"),
    "fp8: rounding": ("fp8", "absmax"),
    "fp8: best": ("fp8", "best"),
}
PEER = ("rounding", "smoothquant", "gptq", "smoothquant-gptq")


def corpus() -> tuple[str, str]:
    """(name, text)."""
    if HANDBOOK.is_dir():
        parts = []
        for file in sorted(HANDBOOK.glob("*.html")):
            text = re.sub(r"(?s)<(script|style|head).*?</\1>", "", file.read_text(encoding="utf-8"))
            text = html.unescape(re.sub(r"<[^>]+>", " ", text))
            parts.append(re.sub(r"\n\s*\n+", "\n", re.sub(r"[ \t\xa0]+", " ", text)).strip())
        return "Debian handbook", "\n".join(parts)
    from pydoc_data.topics import topics

    return "pydoc_data.topics", "\n".join(topics[k] for k in sorted(topics))


def prepare(work: Path, samples: int, length: int, windows: int, seeds: list[int]) -> tuple[Path, str]:
    """Write the model, the evaluation windows and each seed's calibration windows as token ids."""
    import torch

    sys.path.insert(0, str(HERE))
    from smollm2 import write_smollm2

    from lowbit.calibration.data import load_tokenizer

    source = write_smollm2(work / "smollm2")
    name, text = corpus()
    ids = torch.tensor(load_tokenizer(source)(text, verbose=False).input_ids)
    half = ids.numel() // 2
    first, second = (
        part[: part.numel() // length * length].view(-1, length) for part in (ids[:half], ids[half:])
    )
    pick = torch.linspace(0, second.shape[0] - 1, min(windows, second.shape[0])).long()
    torch.save(second[pick], work / "evaluate.pt")
    for seed in seeds:
        order = torch.randperm(first.shape[0], generator=torch.Generator().manual_seed(seed))
        torch.save(first[order[:samples]].clone(), work / f"calibrate-{seed}.pt")
    return source, name


def one(source: str, out: str, scheme: str, method: str, ids: str, seed: int) -> None:
    """The child process: calibrate and print seconds and peak memory."""
    from dataclasses import replace

    import torch

    from lowbit.calibration.calibrate import calibrate
    from lowbit.calibration.methods import best_method, get_method
    from lowbit.scheme import get_scheme

    target = get_scheme(scheme)
    chosen = replace(best_method(target) if method == "best" else get_method(method), seed=seed)
    windows = list(torch.load(ids, weights_only=True)) if chosen.needs_data(target) else []
    start = time.perf_counter()
    calibrate(source, out, target, chosen, windows, overwrite=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        json.dumps({"seconds": time.perf_counter() - start, "peak_bytes": peak, "method": chosen.describe()})
    )


def run(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def measure(work: Path, source: Path, key: str, seed: int, peer_python: str | None) -> dict[str, Any]:
    """One row for one seed: {seconds, peak_bytes, perplexity_change, kl, top1_agreement}."""
    import torch

    from lowbit.calibration import store
    from lowbit.evaluate.layerwise import calibrated, evaluate, final_states, plain

    cached = work / "rows" / f"{re.sub('[^a-z0-9]+', '-', key)}-{seed}.json"
    if cached.is_file():
        return json.loads(cached.read_text())
    out, ids = work / "out", work / f"calibrate-{seed}.pt"
    shutil.rmtree(out, ignore_errors=True)
    if key.startswith("llm-compressor "):
        assert peer_python is not None
        method = key.removeprefix("llm-compressor ")
        peer = [peer_python, str(HERE / "calibrate_peer.py"), str(source), str(out)]
        row = run([*peer, "--method", method, "--ids", str(ids)])
        candidate = plain(out)
    else:
        scheme, method = OURS[key]
        settings = ["--one", str(source), str(out), scheme, method, str(ids), str(seed)]
        row = run([sys.executable, str(HERE / "bench_calibration.py"), *settings])
        candidate = calibrated(source, store.read(out))
    windows = list(torch.load(work / "evaluate.pt", weights_only=True))
    states, reference = work / "reference.pt", plain(source)
    if not states.is_file():
        torch.save(final_states(reference, windows), states)
    report = evaluate(candidate, windows, reference, reference_states=torch.load(states, weights_only=True))
    row |= report.to_dict()
    cached.parent.mkdir(exist_ok=True)
    cached.write_text(json.dumps(row, indent=1))
    shutil.rmtree(out, ignore_errors=True)
    return row


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| method | perplexity | KL to BF16 | top-1 | seconds | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for key, found in rows.items():
        middle = {
            k: statistics.median(r[k] for r in found)
            for k in found[0]
            if isinstance(found[0][k], int | float)
        }
        lines.append(
            f"| {key} | {middle['perplexity_change']:+.2%} | {middle['kl']:.5f} | {middle['top1_agreement']:.2%} | "
            f"{middle['seconds']:.0f} | {middle['peak_bytes'] / 1e9:.2f} GB |"
        )
    return "\n".join(lines)


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "--one":
        one(*sys.argv[2:7], seed=int(sys.argv[7]))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--peer-python", help="a Python with llm-compressor")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=24, help="evaluation windows")
    parser.add_argument("--only", nargs="*", help="rows to run, by name")
    parser.add_argument("--out", type=Path, help="write the table here")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    source, text = prepare(
        arguments.work, arguments.samples, arguments.length, arguments.windows, arguments.seeds
    )  # fmt: skip
    keys = [k for pair in ((k, f"llm-compressor {k}") for k in OURS) for k in pair]
    keys = [k for k in keys if not k.startswith("llm-c") or (arguments.peer_python and k.split()[-1] in PEER)]
    rows: dict[str, list[dict[str, Any]]] = {}
    for key in keys:
        if arguments.only and key not in arguments.only:
            continue
        rows[key] = [measure(arguments.work, source, key, s, arguments.peer_python) for s in arguments.seeds]
        last = rows[key][-1]
        print(
            f"{key:32} {last['perplexity_change']:+.2%}  KL {last['kl']:.5f}  {last['seconds']:.0f} s",
            flush=True,
        )
    first = next(iter(rows.values()))[0]
    note = (
        f"SmolLM2-135M, {text}; calibrated on {arguments.samples} × {arguments.length} tokens, evaluated on "
        f"{first['tokens']} others (BF16 perplexity {first['reference_perplexity']:.2f}); "
        f"medians of {len(arguments.seeds)} seed(s), float32, {cpu()}."
    )
    print(f"\n{note}\n\n{table(rows)}")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(f"# Calibration\n\n{note}\n\n{table(rows)}\n")


def cpu() -> str:
    import torch

    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0].split(':')[1].strip() if names else 'CPU'}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
