"""Plain rounding to int8: a scale of absmax / 127 (lowbit's) against absmax / 127.5 with codes down to −128.

    python scripts/bench_rounding.py --work .bench/rounding [--samples 96]

The second is what llm-compressor's QuantizationModifier does. Both checkpoints are SmolLM2's, run by the same
arithmetic on the same windows of Python's documentation, and differ in their weights' codes and scales alone.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path


def at_127_5(source: Path, ours: Path, out: Path) -> Path:
    """The checkpoint `ours` with every weight rounded as llm-compressor rounds it."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(ours, out)
    (out / "lowbit_manifest.json").unlink()
    weights = {name: t for file in source.glob("*.safetensors") for name, t in load_file(file).items()}
    for file in ours.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [n for n, t in tensors.items() if t.dtype == torch.int8]:
            weight = weights[name].float()
            scale = weight.abs().amax(1, keepdim=True) / 127.5
            tensors[name] = torch.clamp(torch.round(weight / scale), -128, 127).to(torch.int8)
            tensors[f"{name}_scale"] = scale
        save_file(tensors, out / file.name, {"format": "pt"})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path(".bench/rounding"))
    parser.add_argument("--samples", type=int, default=96, help="windows of 512 tokens")
    arguments = parser.parse_args()
    from pydoc_data import topics

    from smollm2 import write_smollm2  # beside this file

    import lowbit

    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    source, ours, text = write_smollm2(work / "smollm2"), work / "int8", work / "text.txt"
    lowbit.convert(source, ours, "int8", overwrite=ours.exists())
    text.write_text("\n\n".join(topics.topics[name] for name in sorted(topics.topics)[1::2]))
    print("| scale | tokens | KL to BF16 | perplexity |\n|---|---|---|---|")
    for name, path in (
        ("absmax / 127", ours),
        ("absmax / 127.5", at_127_5(source, ours, work / "int8-127.5")),
    ):
        found = lowbit.measure(path, text, reference=source, samples=arguments.samples, length=512).to_dict()
        print(
            f"| {name} | {found['tokens']} | {found['kl']:.5f} | {found['perplexity_change']:+.2%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
