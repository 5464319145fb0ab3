"""Calibrate, convert and compare in one go, as a script to start from:

    python scripts/calibrate.py SRC OUT --data train.txt --test other.txt [--scheme int8-static] [--method best]

Everything is three calls of lowbit's Python functions; the command line has the same with more options.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lowbit


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("src", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="text to calibrate on")
    parser.add_argument("--test", type=Path, required=True, help="another text, to measure on")
    parser.add_argument("--scheme", default="int8")
    parser.add_argument("--method", default="best")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    of = parser.parse_args()

    calibration = of.out.with_name(f"{of.out.name}.calibration")
    lowbit.calibrate(
        of.src, calibration, of.scheme, method=of.method, data=of.data, samples=of.samples, length=of.length,
        progress=lambda layer, done, total: print(f"{done}/{total} {layer}", flush=True),
    )  # fmt: skip
    lowbit.convert(of.src, of.out, of.scheme, calibration=calibration)
    found = lowbit.measure(of.out, of.test, reference=of.src, samples=16).to_dict()
    print(
        f"perplexity {found['reference_perplexity']:.3f} -> {found['perplexity']:.3f} "
        f"({found['perplexity_change']:+.2%}), KL {found['kl']:.4f}, top-1 agreement {found['top1_agreement']:.2%}"
    )


if __name__ == "__main__":
    main()
