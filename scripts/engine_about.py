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
    leaves_cache_scales: tuple[str, ...] = ()
    """Architectures for which it does not load the scales of keys and values."""
    leaves_out: tuple[str, ...] = ()
    """Architectures that it is not tried with: it has no support for them, or what stands in for kernels has none."""
    keeps_scales_in_bf16: bool = False
    """Whether its parameters for the scales of INT8 codes, and of static activations, are BF16."""
    shares_input_scales: bool = False
    """Whether its kernels run here with one input scale for all experts of a layer, where activations are static."""
    cuts_blocks: bool = False
    """Whether it cuts INT8 activations in groups toward zero where lowbit rounds."""
    wrong: dict[str, tuple[tuple[str, ...], str]] = field(default_factory=dict)
    """Architecture → conversions that differ for a reason that is not lowbit's, and the reason."""
    reasons: dict[str, str] = field(default_factory=dict)
    """A part of an error's text → the sentence that says it."""


_NO_KEYS = (
    "lowbit calibrates no KV cache of latent attention, which holds something else than keys and values"
)
VLLM = Engine(
    name="vLLM",
    script="engine_vllm.py",
    where="on a CPU",
    meaning="""Its build for CPUs, as published. **loaded**: it read config.json, built and fused its layers and
loaded every weight; then what it had loaded was dequantized where it lay and multiplied in float32 by its own
unquantized methods. **kernel**: also, its own kernels ran with quantized activations. **kernel, loaded**: kernels for
some layers, where the CPU has none for the others (mostly experts). Greedy tokens came through its KV cache. Its
kernels for CPUs with AMX take no float32, and so ran in bfloat16 only: those for FP8 leave activations as they are, and
the INT8 one quantizes them by the token where the scheme is static; for the comparison so did `lowbit.load`. torch's
product of FP8 codes, on CPUs a slow loop, was done by a float32 GEMM.

0.33.0 has no build for CPUs. Its Python was laid over 0.32.0's, whose compiled kernels ran: all columns of Llama,
Qwen3, Qwen3-MoE, GLM-4.5, DeepSeek-V3, Qwen3.5-MoE, Llama 4, Gemma 4, both Granites, LFM2 and SmolLM2 are the same,
and 1,267 conversions of small models of 159 architectures were loaded as by 0.32.0, each parameter compared.""",
    # Its linear attention on CPUs takes bfloat16 only.
    dtypes={"Qwen3.5-MoE": "bfloat16"},
    rounds_cache=True,
    wrong={
        "SmolLM2": (
            ("int8-static",),
            "Static activations by their largest value cost SmolLM2 1.7 here, and codes that float rounding tips over "
            "move a whole prompt: lowbit's own five by 0.3 to 1.2 when every layer's output is moved by 2e-7 (three "
            "seeds), and vLLM's are 0.4 to 1.5 from them; for the small models the two agree to 1e-4",
        )
    },
    reasons={
        "No compressed-tensors compatible scheme": (
            "vLLM has no scheme for INT8 blocks, in compressed-tensors or any other format"
        ),
        "latent attention caches something else": _NO_KEYS,
        "attn.k_scale' in Lfm2": (
            "vLLM's LFM2 gives its attention no quantization config, and so no place for scales of keys and values"
        ),
        "shape '[2, 0, 2, 2]' is invalid": (
            "vLLM's Llama 4 reorders the rows of q_proj and k_proj for its rotary embedding, and their scales as if "
            "each row had one: those of blocks do not fit; as HF fp8 it loads"
        ),
    },
)
SGLANG = Engine(
    name="SGLang",
    script="engine_sglang.py",
    where="its Python on a CPU as if on an H100",
    meaning="""It has no build for CPUs. All of its Python ran that reads a checkpoint: arguments, model config,
quantization configs and methods, model classes, `load_weights`, and what it makes of weights after loading. What that
calls of CUDA ran as plain arithmetic by us, written after SGLang's sources (`scripts/engine_sglang_kernels.py`), and
attention without a cache. Before loading, parameters were filled with what no checkpoint holds, and none may keep it.
**loaded**: what `load_weights` loaded was dequantized where it lay and multiplied in float32. **kernel**: also, its
methods' own `apply` on the processed weights, activations rounded as its kernels do: it cuts INT8 groups toward zero
where lowbit rounds; `lowbit.load` was made to do the same for the comparison. **loaded** alone for W8A16, where Marlin
multiplies BF16. Greedy tokens came from whole sequences, in latent attention through what SGLang absorbs of
`kv_b_proj`.""",
    leaves_out=(
        "Granite MoE",
        "Granite 4 hybrid",
        "Aria",
        "OLMoE",
        "ERNIE 4.5 MoE",
        "LFM2-MoE",
        "MiniMax-M2",
    ),
    leaves_cache_scales=("Qwen2", "Qwen3"),
    wrong={
        "Llama 4": (
            ("int8-weight-only", "fp8", "int8 + fp8 + W8A16 mixed", "int8 read as w8a8_int8"),
            "SGLang's Llama 4 reorders the rows of q_proj and k_proj for its rotary embedding, but not their packed "
            "codes, nor scales of a row each; with scales of blocks it is right, and with these two in float",
        )
    },
    shares_input_scales=True,
    cuts_blocks=True,
    reasons={
        "index 1 is out of bounds for dimension 0 with size 1": (
            "SGLang keeps one input_scale for q, k and v together and fails to load three; its scheme would quantize "
            "activations by the token anyway, so int8 serves instead"
        ),
        "latent attention caches something else": _NO_KEYS,
        "implemented only for NPU": (
            "SGLang runs INT8 experts of compressed-tensors on Ascend only; `--quantization w8a8_int8` runs them on "
            "GPUs, in another column"
        ),
        "No compressed-tensors compatible scheme was found": "SGLang has no such scheme in compressed-tensors",
        "loaded_weight.shape=torch.Size([": (
            "SGLang lays the tensors of q_a_proj and kv_a_proj_with_mqa one below the other, which neither "
            "weight_shape nor a scale for each of them fits"
        ),
        "mlp.down_proj.weight_scale_inv": (
            "SGLang's Llama class, which reads Phi-3 too, renames `weight_scale_inv` to `weight_scale`, which these "
            "methods do not have, and drops the scales; fp8-block as compressed-tensors loads"
        ),
        "KeyError: 'model.layers.1.mlp.down_proj.weight_packed'": (
            "SGLang's Gemma 2 gives its layers no names, so that nothing but the main scheme reaches them"
        ),
        "load_weights left 1 parameters as they were: model.layers.0.self_attn.o_proj.weight_scale": (
            "SGLang names Mixtral's modules without `model.`, and so quantizes o_proj, which the config names as float"
        ),
    },
)
ASCEND = Engine(
    name="vLLM-Ascend",
    script="engine_ascend.py",
    where="its Python on a CPU as if on Ascend",
    meaning="""On vLLM 0.23.0's build for CPUs. vLLM's arguments, model classes and `load_weights` ran in BF16, and all
of vLLM-Ascend that reads a checkpoint: its configs of quantization, for each layer the method that it chose with its
parameters, `process_weights_after_loading` and `apply`, its choice of experts, and what its latent attention absorbs
of `kv_b_proj`. The chip's operators ran as plain arithmetic by us, written after their documentation
(`scripts/engine_ascend_kernels.py`), what else was BF16 was then made float32, and attention had no cache, but rounded
keys and values by vLLM-Ascend's own code where a checkpoint has scales for one of INT8. Before loading, parameters were
filled with what no checkpoint holds, and none that is used may keep it. **loaded**: what `load_weights` loaded was
dequantized where it lay and multiplied in float32. **kernel**: also, its methods' own `apply` on the processed weights.
It keeps scales of INT8 weights in BF16, and those of static activations as a reciprocal in BF16; for the comparison so
did the references. Columns "as ascend" are `--format ascend`, read with
`--quantization ascend`: static ones with dynamic experts; "mixed" has static attention, a dynamic rest and a layer each
in W8A16 and in float. The others are compressed-tensors. Its list of models has no Llama 4 and no Gemma 4. Granite 4
and LFM2 are left out: vLLM 0.23 does not know a layer type that transformers now writes for the first, even in BF16,
and quantizes no linears of the second's convolutions, for which nothing stands in here.""",
    rounds_cache=True,
    leaves_out=("Llama 4", "Gemma 4 MoE", "Granite 4 hybrid", "LFM2-MoE"),
    wrong={
        "SmolLM2": (
            ("int8-static as ascend",),
            "Static activations by their largest value cost SmolLM2 1.7 here, and codes that float rounding tips over "
            "move a whole prompt: lowbit's own five by up to 1.3 when its embeddings are moved by 1e-6 (five seeds), "
            "and vLLM-Ascend's are up to 1.0 from them; for the small models the two agree to 1e-6",
        )
    },
    keeps_scales_in_bf16=True,
    reasons={
        "No compressed-tensors compatible quantization type": (
            "vLLM-Ascend reads `int8` and `fp8` from compressed-tensors, no blocks, groups, static FP8 or weight-only "
            "INT8; `--format ascend` has W8A16 and MXFP8"
        ),
        "No compressed-tensors compatible scheme": (
            "vLLM-Ascend has no such scheme for experts in compressed-tensors"
        ),
        "input_offset": (
            "vLLM-Ascend loads no zero point of compressed-tensors' static scheme, and leaves input_offset as memory "
            "had it; `--format ascend` has one"
        ),
        "kv_b_proj.quant_method": (
            "vLLM-Ascend multiplies by kv_b_proj in float only: `--format ascend` leaves it so, and so does "
            "`--ignore '*.kv_b_proj'`"
        ),
        "block_sparse_moe.experts": (
            "vLLM 0.23's Granite MoE asks for experts called w1, w2 and w3; lowbit writes gate_proj, down_proj and "
            "up_proj, which vLLM 0.32 reads"
        ),
        "kv_cache_offset": (
            "vLLM-Ascend loads scales of an INT8 KV cache of Qwen3, GLM-4.5 and MiniMax-M2 alone"
        ),
        "attn.k_cache_scale": (
            "vLLM-Ascend loads no scales of an INT8 KV cache for this model, and without a word keeps one whose scales "
            "are all 1"
        ),
        "object has no attribute 'o_groups'": "vLLM-Ascend reads HF's fp8 for DeepSeek-V4 only",
    },
)
ENGINES = {"vllm": VLLM, "sglang": SGLANG, "ascend": ASCEND}
