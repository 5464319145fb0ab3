"""Token logprobs of a checkpoint by the real vLLM. Runs inside vLLM's own venv, which has no lowbit.

    python scripts/engine_vllm.py [--plain] CHECKPOINT IDS.json OUT.json [CHECKPOINT IDS.json OUT.json …]

IDS.json is {"prompts": [[token id, …], …], "new_tokens": n}, and perhaps "dtype" (float32 without). OUT.json gets
for every prompt the logprob of each token after the first and the greedy tokens that follow, and for every kind of
layer the class that vLLM chose for it and the kernel; or {"refused": why}. Each checkpoint runs in a process of its
own, all from one import of vLLM.

vLLM's CPU backend has no kernel for some schemes. There its config parsing, layers, fusions, `load_weights` and shape
checks run all the same, and only the product is ours: what vLLM loaded is dequantized where vLLM put it, and vLLM's own
unquantized methods multiply it. Such a layer is marked "stand-in". `--plain` does so for every layer: then nothing but
float32 arithmetic is between the logprobs and those of the dequantized model.

OUT.json also says which layers multiplied activations otherwise than their scheme says: "stand_ins" and
"float_activations" as they were, "token_activations" quantized by the token where their scheme is static.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHDYNAMO_DISABLE": "1",
}  # fmt: skip

# torchvision comes built for CUDA only; without its operators, which text needs none of, it imports.
sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")

import torch  # noqa: E402
import vllm  # noqa: E402
import vllm.model_executor.kernels.linear as linear_kernels  # noqa: E402
import vllm.v1.worker.cpu_worker  # noqa: E402
from engine_stubs import dequantize, scaled_mm, serve  # noqa: E402 (beside this file)
from torch import Tensor, nn  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.model_executor.kernels.linear import (  # noqa: E402
    Fp8BlockScaledMMLinearKernel,
    FP8ScaledMMLinearKernel,
    MPLinearKernel,
    Mxfp8LinearKernel,
)
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel  # noqa: E402
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, UnquantizedFusedMoEMethod  # noqa: E402
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter  # noqa: E402
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod  # noqa: E402
from vllm.model_executor.layers.quantization.fp8 import Fp8Config  # noqa: E402
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding  # noqa: E402
from vllm.model_executor.model_loader import base_loader  # noqa: E402
from vllm.model_executor.models import registry  # noqa: E402
from vllm.platforms import PlatformEnum  # noqa: E402

STAND_IN = "stand-in"
# vLLM's kernels for CPUs with AMX that multiply FP8 weights by activations as they are (W8A16).
FLOAT_ACTIVATIONS = ("CPUFp8BlockScaledMMKernel", "CPUFp8PerTensorScaledMMLinearKernel", "CPUExpertsFp8")


# What vLLM chooses where the CPU has no kernel: only so that the layer is built. The product is `_dequantize`'s.
class StandIn:
    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    def _never(self, *arguments: Any, **named: Any) -> Tensor:
        raise AssertionError("a stand-in's layer is multiplied in float")

    apply_weights = apply_scaled_mm = apply_block_scaled_mm = _never

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self._never()


class StandInFp8(StandIn, FP8ScaledMMLinearKernel):
    pass


class StandInFp8Block(StandIn, Fp8BlockScaledMMLinearKernel):
    def __init__(self, config: Any) -> None:
        self.config = config


class StandInMxfp8(StandIn, Mxfp8LinearKernel):
    pass


class StandInPacked(StandIn, MPLinearKernel):
    pass


def _last_choices() -> None:
    """Put the stand-ins at the end of vLLM's lists, so that its own selection prefers each of its kernels."""
    for table, kernel in (
        (linear_kernels._POSSIBLE_FP8_KERNELS, StandInFp8),
        (linear_kernels._POSSIBLE_FP8_BLOCK_KERNELS, StandInFp8Block),
        (linear_kernels._POSSIBLE_MXFP8_KERNELS, StandInMxfp8),
        (linear_kernels._POSSIBLE_KERNELS, StandInPacked),
    ):
        table.setdefault(PlatformEnum.CPU, []).append(kernel)
    from vllm.model_executor.layers.fused_moe.oracle import fp8, int8, int_wna16
    from vllm.model_executor.layers.quantization import fp8 as fp8_method
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors_moe as ct

    ct_fp8, ct_int8, ct_mxfp8, ct_packed = (
        importlib.import_module(f"{ct.__name__}.compressed_tensors_moe_{kind}")
        for kind in ("w8a8_fp8", "w8a8_int8", "w8a8_mxfp8", "wna16")
    )
    fallback = fp8.Fp8MoeBackend.TRITON
    for modules, name, backend in (
        ((ct_fp8, fp8_method), "select_fp8_moe_backend", fallback),
        ((ct_int8,), "select_int8_moe_backend", int8.Int8MoeBackend.TRITON),
        ((ct_mxfp8,), "select_mxfp8_moe_backend", fallback),
        ((ct_packed,), "select_wna16_moe_backend", int_wna16.WNA16MoEBackend.MARLIN),
    ):
        for module in modules:
            setattr(module, name, _or_stand_in(getattr(module, name), backend))
    # vLLM 0.32's C++ rotary embedding for CPUs misreads the keys of latent attention, which are not contiguous: from
    # the second token on its DeepSeek is not that of transformers. Its own implementation in torch is right.
    RotaryEmbedding.forward_cpu = RotaryEmbedding.forward_native
    CPURouter._compute_routing = _in_one_group(CPURouter._compute_routing)
    torch._scaled_mm = scaled_mm
    # Of vLLM's methods only this one takes no float32, in which all else is compared; its kernels for CPUs need AMX.
    Fp8Config.get_supported_act_dtypes = classmethod(lambda cls: [torch.float32, torch.bfloat16])
    # Marlin's own demands on a GPU; what it demands of shapes stays with vLLM's create_weights.
    ct_packed.check_moe_marlin_supports_config = lambda *a, **k: True


def _in_one_group(route: Any) -> Any:
    """vLLM 0.32's routing on CPUs leaves the correction bias out beside a softmax (ERNIE 4.5), and has a sigmoid only
    with groups (MiniMax-M2 has none); all experts as one group are the same, and there it does both."""

    def routed(router: Any, *arguments: Any, **named: Any) -> Any:
        biased = router.scoring_func == "softmax" and router.e_score_correction_bias is not None
        if not router.use_grouped_topk and (biased or router.scoring_func == "sigmoid"):
            router.use_grouped_topk, router.num_expert_group, router.topk_group = True, 1, 1
        return route(router, *arguments, **named)

    return routed


def _or_stand_in(select: Any, backend: Any) -> Any:
    def chosen(*arguments: Any, **named: Any) -> Any:
        try:
            return select(*arguments, **named)
        except (NotImplementedError, ValueError):
            return backend, None

    return chosen


def _codes(layer: nn.Module, stem: str) -> Tensor:
    """float32 codes [..., N, K] of a loaded parameter; packed ones are unpacked, little end first, q + 128."""
    packed = getattr(layer, stem + "_packed", None)
    if packed is None:
        return getattr(layer, stem).data.float()
    return packed.data.contiguous().view(torch.uint8).float() - 128


def _dequantize(layer: nn.Module, stem: str, rows: list[int]) -> Tensor:
    """A loaded weight [..., N, K] → code · scale; `rows` are the heights of the matrices that were fused into it."""
    scale = getattr(layer, stem + "_scale", None)
    if scale is None:
        scale = getattr(layer, stem + "_scale_inv")
    return dequantize(_codes(layer, stem), scale.data, rows)


def _in_float(layer: nn.Module, dtype: torch.dtype) -> None:
    """Multiply a loaded layer by vLLM's own unquantized method."""
    if isinstance(layer, LinearBase):
        weight = _dequantize(layer, "weight", list(getattr(layer, "logical_widths", [layer.output_size])))
        layer.quant_method = UnquantizedLinearMethod()
        # Otherwise the activation function before it would quantize its output.
        layer._input_quant_key = None
        _replace(layer, {"weight": weight.to(dtype)})
        return
    inner = layer.moe_config.intermediate_size_per_partition
    both = _dequantize(layer, "w13_weight", [inner, inner])
    down = _dequantize(layer, "w2_weight", [layer.moe_config.hidden_dim])
    method = UnquantizedFusedMoEMethod(layer.moe_config)
    _replace(layer, {"w13_weight": both.to(dtype), "w2_weight": down.to(dtype)})
    layer.quant_method = method


def _replace(layer: nn.Module, weights: dict[str, Tensor]) -> None:
    for name in [n for n, _ in layer.named_parameters(recurse=False) if "weight" in n or "input_" in n]:
        delattr(layer, name)
    for name, weight in weights.items():
        layer.register_parameter(name, nn.Parameter(weight, requires_grad=False))


def _linear_kernel(layer: nn.Module) -> tuple[Any, Any]:
    """(scheme or method, its kernel or None) of a linear."""
    owner = scheme if (scheme := getattr(layer, "scheme", None)) is not None else layer.quant_method
    return owner, next(
        (k for n in ("kernel", "fp8_linear") if (k := getattr(owner, n, None)) is not None), None
    )


def _kernel_of(layer: nn.Module) -> tuple[str, str]:
    """(class of the scheme or method, class of the kernel) that vLLM chose for a layer."""
    method = layer.quant_method
    if isinstance(method, FusedMoEMethodBase):
        experts = getattr(method, "experts_cls", None)
        return type(method).__name__, experts.__name__ if experts else STAND_IN
    owner, kernel = _linear_kernel(layer)
    if kernel is None:
        return type(owner).__name__, "torch"
    return type(owner).__name__, STAND_IN if isinstance(kernel, StandIn) else type(kernel).__name__


def _static_by_token(layer: nn.Module) -> bool:
    """Whether a processed linear quantizes by the token what has a static scale: so does vLLM's INT8 kernel for AMX."""
    if not isinstance(layer, LinearBase) or isinstance(layer.quant_method, FLOAT):
        return False
    kernel = _linear_kernel(layer)[1]
    if not isinstance(kernel, CPUInt8ScaledMMLinearKernel):
        return False
    return kernel.config.is_static_input_scheme and kernel.linear_method == kernel._apply_weights_sgl


FLOAT = (UnquantizedLinearMethod, UnquantizedFusedMoEMethod)


def _watch(plain: bool, found: dict[str, Any]) -> None:
    """Between `load_weights` and vLLM's own processing: note what was chosen, and give stand-ins their product."""
    process = base_loader.process_weights_after_loading

    def watched(model: nn.Module, model_config: Any, target: torch.device) -> None:
        for name, layer in model.named_modules():
            method = getattr(layer, "quant_method", None)
            if not isinstance(layer, LinearBase) and not isinstance(method, FusedMoEMethodBase):
                if hasattr(layer, "k_scale"):
                    found["kv_scales"][name] = [
                        layer.k_scale.data.max().item(),
                        layer.v_scale.data.max().item(),
                    ]
                continue
            chosen = ("float", "torch") if isinstance(method, FLOAT) else _kernel_of(layer)
            kind = f"{type(layer).__name__} {name.rpartition('.')[2]}"
            found["layers"].setdefault(kind, [])
            if list(chosen) not in found["layers"][kind]:
                found["layers"][kind].append(list(chosen))
            # Latent attention reads this weight while loading, after the CPU's INT8 kernel has packed it away.
            absorbed = name.endswith("kv_b_proj")
            if chosen[0] != "float" and (plain or absorbed or chosen[1] == STAND_IN):
                found["stand_ins"].append(name)
                _in_float(layer, model_config.dtype)
            elif chosen[1] in FLOAT_ACTIVATIONS:
                found["float_activations"].append(name)
        process(model, model_config, target)
        found["token_activations"] = [n for n, m in model.named_modules() if _static_by_token(m)]

    base_loader.process_weights_after_loading = watched


def _float_cache(config: Any) -> Any:
    """The scales of keys and values are loaded, but the cache holds floats."""
    if quantization := getattr(config, "quantization_config", None):
        quantization["kv_cache_scheme"] = None
    return config


def run(checkpoint: str, ids: dict[str, Any], plain: bool) -> dict[str, Any]:
    # vLLM looks at a model's class in another process, which would import all of it again.
    registry._run_in_subprocess = lambda ask: ask()
    found: dict[str, Any] = {"layers": {}, "kv_scales": {}, "stand_ins": [], "float_activations": []}
    prompts, new, dtype = ids["prompts"], ids["new_tokens"], ids.get("dtype", "float32")
    if dtype == "float32":
        # Where a CPU has AMX, vLLM (0.32) prefers kernels that take no float32, and fails when it calls them.
        torch.cpu._is_amx_tile_supported = lambda: False
    _last_choices()
    _watch(plain, found)
    longest = max(map(len, prompts)) + new
    engine = LLM(
        checkpoint, dtype=dtype, max_model_len=longest, max_num_seqs=8, enforce_eager=True,
        disable_log_stats=True, skip_tokenizer_init=True, enable_prefix_caching=False, language_model_only=True,
        distributed_executor_backend="uni", hf_overrides=_float_cache if plain else None,
    )  # fmt: skip
    parameters = SamplingParams(
        temperature=0, max_tokens=new, ignore_eos=True, prompt_logprobs=0, detokenize=False
    )
    found["prompts"] = []
    outputs = engine.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)
    for prompt, out in zip(prompts, outputs, strict=True):
        assert out.prompt_logprobs is not None
        logprobs = [
            found_[token].logprob
            for token, found_ in zip(prompt[1:], out.prompt_logprobs[1:], strict=True)
            if found_ is not None
        ]
        found["prompts"].append({"logprobs": logprobs, "greedy": list(out.outputs[0].token_ids)})
    return found


if __name__ == "__main__":
    about = {"engine": "vLLM", "version": vllm.__version__}
    sys.exit(serve(sys.argv[1:], __doc__, about, run))
