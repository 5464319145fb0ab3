"""Converted models over several devices: `python spread.py FOLDER KIND…` prints what was found of each, a line of JSON.

FOLDER/KIND/out holds each. What raises is the line of its kind, too.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import second_device
import torch
from nn_reference import inputs, logits

import lowbit
from lowbit.nn.stored import QuantModule

HERE, THERE = "other:0", "other:1"


def places(first: str, second: str, kind: str) -> dict[str, str]:
    """The first layer and the embeddings on one device, the second and the rest on another."""
    # A tied head is where the embeddings are.
    return {
        "model.embed_tokens": first, "model.rotary_emb": first, "model.layers.0": first, "model.layers.1": second,
        "model.norm": second if second in (HERE, THERE) else first, "lm_head": first if kind == "llama" else THERE,
    }  # fmt: skip


def spread(kind: str, folder: Path) -> dict[str, Any]:
    out = folder / "out"
    batch = inputs(kind)
    how: Any = {"dtype": torch.float32, "attn_implementation": "eager"}
    whole = lowbit.load(out, **how)
    want = logits(whole, batch)
    tokens = whole.generate(**batch, max_new_tokens=6, do_sample=False)
    found = {}
    for second in (THERE, "cpu", "disk"):
        second_device.ran.clear()
        model = lowbit.load(
            out, device_map=places(HERE, second, kind), offload_folder=folder / f"offload-{second}", **how
        )
        quantized = [m for m in model.model.layers[1].modules() if isinstance(m, QuantModule)]
        got = logits(model, batch)
        again = model.generate(**batch, max_new_tokens=6, do_sample=False)
        saved = folder / f"saved-{second}"
        model.save_pretrained(saved)
        found[second] = {
            "lie on": sorted({str(m.get_buffer(n).device) for m in quantized for n in m.frozen}),
            "ran on": sorted(second_device.ran), "same": torch.equal(got.cpu(), want),
            "same tokens": torch.equal(again.cpu(), tokens), "verified": lowbit.verify(saved).ok,
            "saved the same": torch.equal(logits(lowbit.load(saved, **how), batch), want),
        }  # fmt: skip
    return found


def main() -> None:
    second_device.register()
    for kind in sys.argv[2:]:
        try:
            found = spread(kind, Path(sys.argv[1]) / kind)
        except Exception:
            found = {"raised": traceback.format_exc()[-3000:]}
        print(json.dumps({kind: found}))


if __name__ == "__main__":
    main()
