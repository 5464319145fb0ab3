"""What differs between the engines that check_engines.py runs, and what docs/engines.md says of each."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Engine:
    """An engine: its name, its script, and how its run is to be compared and read."""

    name: str
    script: str
    where: str
    """What it ran on, for the title of its section."""
    meaning: str
    """What "loaded" and "kernel" say of it."""
    dtypes: dict[str, str] = field(default_factory=dict)
    """Architectures that it cannot run in float32 → the type that they run in."""
    rounds_cache: bool = False
    """Whether its run keeps keys and values in a cache that is quantized."""
    reasons: dict[str, str] = field(default_factory=dict)
    """A part of an error's text → the sentence that says it."""


VLLM = Engine(
    name="vLLM",
    script="engine_vllm.py",
    where="on a CPU",
    meaning="""Its build for CPUs, as published. **loaded**: it read config.json, built and fused its layers and
loaded every weight; then what it had loaded was dequantized where it lay and multiplied in float32 by its own
unquantized methods. **kernel**: also, its own kernels ran with quantized activations. **kernel, loaded**: kernels for
some layers, where the CPU has none for the others (mostly experts). Greedy tokens came through its KV cache.""",
    # Its linear attention on CPUs takes bfloat16 only.
    dtypes={"Qwen3.5-MoE": "bfloat16"},
    rounds_cache=True,
    reasons={
        "No compressed-tensors compatible scheme": (
            "vLLM has no scheme for INT8 blocks, in compressed-tensors or any other format"
        ),
    },
)
SGLANG = Engine(
    name="SGLang",
    script="engine_sglang.py",
    where="its own Python on a CPU, its kernels' arithmetic by us",
    meaning="",
)
ENGINES = {"vllm": VLLM, "sglang": SGLANG}
