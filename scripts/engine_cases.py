"""The conversions that check_engines.py lets engines load: architectures × schemes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from engine_about import ENGINES  # beside this file
from engine_models import VOCABULARY, write

import lowbit

NEW_TOKENS = 4

DENSE = ("Llama", "Qwen2", "Qwen3", "Gemma 2", "Phi-3")
MIXTURES = (
    "Qwen3-MoE", "Qwen2-MoE", "Mixtral", "GLM-4.5", "DeepSeek-V3", "Qwen3.5-MoE", "Qwen3-VL-MoE", "Llama 4",
    "Gemma 4 MoE", "Granite MoE", "Granite 4 hybrid", "OLMoE", "ERNIE 4.5 MoE", "LFM2-MoE", "MiniMax-M2",
)  # fmt: skip
KINDS = (*DENSE, *MIXTURES, "SmolLM2")


@dataclass(frozen=True, kw_only=True)
class How:
    """One conversion: arguments of `lowbit.convert`, and of `lowbit.calibrate` before it.

    `quantization` is what the engine is told to read it as; None: what config.json says. `engines`: who reads it.
    """

    scheme: str
    format: str | None = None
    overrides: dict[str, str] = field(default_factory=dict)
    calibrate: bool = False
    kv_cache: str | None = None
    quantization: str | None = None
    engines: tuple[str, ...] | None = None


MIXED = {
    "re:.*layers\\.0\\.self_attn\\.o_proj": "float",
    "re:.*self_attn\\..*": "fp8",
    "re:.*layers\\.1\\..*experts.*": "fp8",
    "re:.*layers\\.1\\.(mlp|feed_forward)\\.(gate|up|gate_up|down)_proj": "int8-weight-only",
}
# msModelSlim's usual recipe, static attention and a dynamic rest, and a layer each in other ways.
ASCEND_MIXED = {
    "re:.*layers\\.0\\.self_attn\\.o_proj": "float",
    "re:.*layers\\.1\\.self_attn\\.o_proj": "int8-weight-only",
    "re:.*self_attn\\..*": "int8-static",
    "re:.*\\.(mlp|block_sparse_moe)\\..*(_proj|w[123])": "int8",
}
HOWS = {
    "bf16": How(scheme="bf16"),
    "int8": How(scheme="int8"),
    "int8-static": How(scheme="int8-static", calibrate=True),
    "int8-weight-only": How(scheme="int8-weight-only"),
    "int8-block": How(scheme="int8-block"),
    "fp8": How(scheme="fp8"),
    "fp8-static": How(scheme="fp8-static", calibrate=True),
    "fp8-block": How(scheme="fp8-block"),
    "fp8-block as HF fp8": How(scheme="fp8-block", format="fp8"),
    "mxfp8": How(scheme="mxfp8"),
    "int8, KV cache fp8": How(scheme="int8", calibrate=True, kv_cache="fp8", engines=("vllm", "sglang")),
    "int8 + fp8 + W8A16 mixed": How(scheme="int8", overrides=MIXED),
    # SGLang runs INT8 experts by this method alone, which is told by the call: it reads compressed-tensors' files.
    "int8 read as w8a8_int8": How(scheme="int8", quantization="w8a8_int8", engines=("sglang",)),
    "int8-block as blockwise_int8": How(scheme="int8-block", format="sglang", engines=("sglang",)),
    "int8 as ascend": How(scheme="int8", format="ascend", engines=("ascend",)),
    "int8-static as ascend": How(scheme="int8-static", format="ascend", calibrate=True, engines=("ascend",)),
    "int8-static-asym as ascend": How(
        scheme="int8-static-asym", format="ascend", calibrate=True, engines=("ascend",)
    ),
    "int8-weight-only as ascend": How(scheme="int8-weight-only", format="ascend", engines=("ascend",)),
    "int8, KV cache int8 as ascend": How(
        scheme="int8", format="ascend", calibrate=True, kv_cache="int8-channel", engines=("ascend",)
    ),
    "mxfp8 as ascend": How(scheme="mxfp8", format="ascend", engines=("ascend",)),
    "mixed as ascend": How(
        scheme="int8-static", format="ascend", overrides=ASCEND_MIXED, calibrate=True, engines=("ascend",)
    ),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """An architecture and a conversion; `at` is its folder."""

    kind: str
    how: str
    at: Path

    @property
    def title(self) -> str:
        return f"{self.kind}: {self.how}"

    @property
    def out(self) -> Path:
        return self.at / "out"

    def ids(self, engine: str) -> Path:
        """What the engine is asked."""
        return self.at / f"{engine}-ids.json"


def cases(work: Path, engine: str, only: list[str]) -> Iterator[Case]:
    """What an engine is tried with; `only`: titles that have one of these in them."""
    for kind in (k for k in KINDS if k not in ENGINES[engine].leaves_out):
        for how in (n for n, h in HOWS.items() if h.engines is None or engine in h.engines):
            at = work / _file(kind) / _file(how)
            case = Case(kind=kind, how=how, at=at)
            if not only or any(part in case.title for part in only):
                yield case


def _file(name: str) -> str:
    return name.replace(" ", "-").replace(",", "").replace("+", "and")


def source(case: Case, work: Path) -> Path:
    if case.kind == "SmolLM2":
        from smollm2 import write_smollm2

        return write_smollm2(work / "SmolLM2" / "source")
    return write(case.kind, work / _file(case.kind) / "source")


def prompts(kind: str, source: Path) -> list[list[int]]:
    """Five windows of token ids; for SmolLM2 those of a text."""
    if kind == "SmolLM2":
        from demo import documentation
        from transformers import AutoTokenizer

        text = documentation(AutoTokenizer.from_pretrained(source), 5 * 64)
        return [text[at : at + 64] for at in range(0, 5 * 64, 64)]
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        for length in (48, 31, 17, 40, 24)
    ]


def convert(case: Case, work: Path) -> str:
    """Write the checkpoint; → why lowbit did not, or ""."""
    how, src = HOWS[case.how], source(case, work)
    if (case.out / "config.json").is_file():
        return ""
    calibration = None
    try:
        if how.calibrate:
            calibration = case.at / "calibration"
            windows = [torch.tensor(p) for p in prompts(case.kind, src) * 4]
            lowbit.calibrate(
                src,
                calibration,
                how.scheme,
                method="absmax",
                data=windows,
                kv_cache=how.kv_cache,
                overwrite=True,
            )
        lowbit.convert(
            src, case.out, how.scheme, format=how.format, overrides=how.overrides, calibration=calibration
        )
    except lowbit.InputError as error:
        return str(error)
    return ""
