"""Token logprobs of a checkpoint by vLLM-Ascend's own code, on a CPU. Runs in a venv of its own, which has no lowbit.

    python scripts/engine_ascend.py [--plain] CHECKPOINT IDS.json OUT.json [CHECKPOINT IDS.json OUT.json …]

IDS.json and OUT.json are those of engine_vllm.py; IDS.json may also have "quantization", what `--quantization` is
given. As on a chip run vLLM's arguments, configs, model classes and `load_weights`, in BF16, and vLLM-Ascend's
quantization: its configs, and for each layer the method with its parameters, `process_weights_after_loading` and
`apply`; its choice of experts, and what its latent attention absorbs of `kv_b_proj`. `torch_npu` is a stub with the
operators of engine_ascend_kernels.py. Then all that is BF16 becomes float32, so that nothing but quantization is seen.
`--plain`: what `load_weights` loaded is dequantized where it lies and multiplied in float32. Attention is ours, without
a cache: every greedy token runs the whole sequence, through what latent attention absorbs.
"""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
import types
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {
    "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_PLUGINS": "",
    "VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1",
}  # fmt: skip

import engine_ascend_kernels as kernels  # beside this file
import engine_stubs as stubs
import torch
from torch import Tensor, nn

# torchvision comes built for CUDA only; without its operators, which text needs none of, it imports.
sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
stubs.stub("torch_npu", "torchair", "acl", "xgrammar")
import torch_npu  # noqa: E402

kernels.install(torch_npu)

from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.distributed import init_distributed_environment, initialize_model_parallel  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.model_executor.layers.attention.attention import Attention  # noqa: E402
from vllm.model_executor.layers.attention.mla_attention import MLAAttention  # noqa: E402
from vllm.model_executor.layers.fused_moe.layer import FusedMoE, UnquantizedFusedMoEMethod  # noqa: E402
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod  # noqa: E402
from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import QwenGatedDeltaNetAttention  # noqa: E402
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod  # noqa: E402
from vllm.model_executor.model_loader import get_model_loader  # noqa: E402
from vllm.model_executor.model_loader.utils import initialize_model  # noqa: E402
from vllm.model_executor.models import registry  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.utils.torch_utils import set_default_torch_dtype  # noqa: E402

FLOAT = (UnquantizedLinearMethod, UnquantizedFusedMoEMethod)
STAND_IN = "stand-in"
ACTIVATIONS = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
}


def feign(chip: str) -> None:
    """The file that vLLM-Ascend's build writes: what it is built for."""
    build: Any = types.ModuleType("vllm_ascend._build_info")
    build.__device_type__ = chip
    sys.modules[build.__name__] = build


def adopt_ascend() -> None:
    """Register vLLM-Ascend's quantization, and give it the choice of experts and the exchange between chips."""
    import vllm_ascend.quantization.compressed_tensors_config
    import vllm_ascend.quantization.fp8_config
    import vllm_ascend.quantization.modelslim_config  # noqa: F401
    from vllm_ascend.device import device_op
    from vllm_ascend.ops import register_custom_ops
    from vllm_ascend.ops.fused_moe import experts_selector
    from vllm_ascend.quantization.methods import w8a8_dynamic, w8a8_mxfp8, w8a8_static

    # Of what a chip's worker patches, what loads scales of an INT8 KV cache.
    patch = Path(device_op.__file__).parents[1] / "patch" / "worker" / "patch_gqa_c8.py"
    runpy.run_path(str(patch))
    device_op.DeviceOperator.moe_gating_top_k = staticmethod(kernels.moe_gating_top_k)
    nothing_ahead = SimpleNamespace(
        maybe_prefetch_attn_weight_preprocess=lambda **_: None,
        maybe_prefetch_attn_weight_postprocess=lambda **_: None,
    )
    w8a8_static.get_weight_prefetch_method = lambda: nothing_ahead
    experts_selector.get_weight_prefetch_method = lambda: None
    for module in (w8a8_dynamic, w8a8_mxfp8):
        module._EXTRA_CTX = SimpleNamespace(moe_comm_method=kernels.Experts(), moe_comm_type=None)
    w8a8_dynamic.get_mc2_group = lambda: SimpleNamespace(device_group=None)
    global _LIBRARY
    _LIBRARY = torch.library.Library("vllm", "FRAGMENT")
    _LIBRARY.impl("quantize", register_custom_ops._quantize_impl, "CPU")


# vLLM's operators, which are not loaded: GELU looks for its own, and then runs in torch.
torch.ops._C.gelu_and_mul = torch.ops._C.gelu_tanh_and_mul = None


def build(checkpoint: str, quantization: str | None) -> tuple[nn.Module, Any]:
    """The model that vLLM builds for a checkpoint, its parameters poisoned, and vLLM's config."""
    from vllm_ascend.ascend_config import init_ascend_config
    from vllm_ascend.ops.linear import AscendUnquantizedLinearMethod

    # vLLM looks at a model's class in another process, which would import all of it again.
    registry._run_in_subprocess = lambda ask: ask()
    # The CPU's list; none means any.
    type(current_platform).supported_quantization = []
    arguments = EngineArgs(
        checkpoint, quantization=quantization, max_model_len=128, enforce_eager=True, skip_tokenizer_init=True,
        dtype="bfloat16", compilation_config={"custom_ops": ["none"]}, language_model_only=True,
    )  # fmt: skip
    config = arguments.create_engine_config()
    for method in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod, AscendUnquantizedLinearMethod):
        method.apply = lambda self, layer, x, bias=None: nn.functional.linear(x, layer.weight, bias)
    Attention.forward = _attention
    MLAAttention.__init__ = _latent_without_backend
    MLAAttention.forward = _latent
    QwenGatedDeltaNetAttention.forward = _linear_attention
    FusedMoE.forward = _mixture
    with set_current_vllm_config(config):
        with tempfile.NamedTemporaryFile() as file:
            init_distributed_environment(1, 0, f"file://{file.name}", 0, "gloo")
            initialize_model_parallel(1, 1)
        init_ascend_config(config)
        with set_default_torch_dtype(config.model_config.dtype):
            model = initialize_model(vllm_config=config, model_config=config.model_config)
    stubs.poison(model)
    return model, config


def _attention(self: Any, query: Tensor, key: Tensor, value: Tensor, output_shape: Any = None) -> Tensor:
    q, k = (x.reshape(x.shape[0], -1, self.head_size) for x in (query, key))
    v = value.reshape(value.shape[0], -1, self.head_size_v)
    # Its own attention's code rounds; codes are multiplied by scales as that does.
    if getattr(self, "rounds_cache", False):
        self.impl._prepare_c8_scales(self, k.device)
        codes = self.impl._quantize_kv_to_int8(k, v, self, len(k))
        k, v = (x.to(k.dtype) * s for x, s in zip(codes, (self._c8_k_scale, self._c8_v_scale), strict=True))
    cap = getattr(self.impl, "logits_soft_cap", None)
    return stubs.causal(q, k, v, self.impl.scale, window=self.sliding_window, cap=cap).flatten(1)


def _latent_without_backend(self: Any, **named: Any) -> None:
    """vLLM's build for CPUs has no backend for it, and the layer has no weights of its own."""
    nn.Module.__init__(self)
    for name in ("num_heads", "kv_b_proj", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank", "scale"):
        setattr(self, name, named[name])
    self.absorbed = False


def _absorb(layer: Any) -> None:
    """vLLM-Ascend's own preparation of `kv_b_proj`, kept as W_UK_T [heads, ·, rank] and W_UV [heads, rank, ·]."""
    from vllm_ascend.attention import mla_v1

    settings = ("num_heads", "kv_b_proj", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank")
    made = SimpleNamespace(**{n: getattr(layer, n) for n in settings})
    made.enable_mlapo, made.fa_quant_layer, made.layer_sharding_kwargs = False, False, []
    mla_v1.AscendMLAImpl.process_weights_after_loading(made, torch.float32)
    layer.W_UK_T, layer.W_UV = made.W_UK_T, made.W_UV


def _latent(self: Any, q: Tensor, kv_c_normed: Tensor, k_pe: Tensor, output_shape: Any = None) -> Tensor:
    heads = q.shape[1]
    if self.absorbed:
        nope, pe = q.split([self.qk_nope_head_dim, q.shape[-1] - self.qk_nope_head_dim], -1)
        nope = torch.einsum("thn,hnl->thl", nope, self.W_UK_T)
        kept = kv_c_normed.unsqueeze(1)
        k = torch.cat([kept, k_pe.reshape(q.shape[0], 1, -1)], -1)
        out = stubs.causal(torch.cat([nope, pe], -1), k, kept, self.scale)
        return torch.einsum("thl,hlv->thv", out, self.W_UV).flatten(1)
    kv = self.kv_b_proj(kv_c_normed)[0].unflatten(-1, (heads, -1))
    k, v = kv.split([self.qk_nope_head_dim, self.v_head_dim], -1)
    k = torch.cat([k, k_pe.reshape(q.shape[0], 1, -1).expand(-1, heads, -1)], -1)
    return stubs.causal(q, k, v, self.scale).flatten(1)


def _linear_attention(self: Any, hidden_states: Tensor, output: Tensor) -> None:
    """What vLLM's `forward_cpu` does for Qwen3.5, in float32."""
    qkv, z = self.in_proj_qkvz(hidden_states)[0].split(
        [2 * self.key_dim + self.value_dim, self.value_dim], -1
    )
    b, a = self.in_proj_ba(hidden_states)[0].chunk(2, -1)
    conv = self.conv1d.weight.squeeze(1)
    out = stubs.gated_delta_rule(
        qkv, a, b, conv, self.conv1d.bias, self.A_log, self.dt_bias, (self.num_k_heads, self.head_k_dim)
    )
    out = self.norm(out.flatten(0, 1), z.reshape(-1, self.head_v_dim)).view(z.shape)
    output[: out.shape[0]] = self.out_proj(out)[0]


def _mixture(self: Any, hidden_states: Tensor, router_logits: Tensor, input_ids: Any = None) -> Tensor:
    """`FusedMoE` on one chip: its method with vLLM-Ascend's arguments, and shared experts."""
    runner = self.runner
    if self.is_internal_router:
        router_logits = runner.gate(hidden_states)[0]
    # Set when the model was built in BF16.
    self.swiglu_limit, method = 0.0, self.quant_method
    inner = getattr(method, "quant_method", method)
    inner.in_dtype = hidden_states.dtype
    out = method.apply(
        layer=self, x=hidden_states, router_logits=router_logits, top_k=self.top_k, renormalize=self.renormalize,
        use_grouped_topk=self.use_grouped_topk, num_experts=self.global_num_experts, topk_group=self.topk_group,
        num_expert_group=self.num_expert_group, custom_routing_function=self.custom_routing_function,
        scoring_func=self.scoring_func, routed_scaling_factor=self.routed_scaling_factor,
        e_score_correction_bias=self.e_score_correction_bias, activation=self.activation,
        apply_router_weight_on_input=self.apply_router_weight_on_input,
    )  # fmt: skip
    out = out * runner.routed_scaling_factor
    shared = runner.shared_experts
    return out if shared is None else out + shared._layer(hidden_states)


class Dense(nn.Module):
    """Multiplies a layer by what was loaded, dequantized. A module because some of vLLM's methods are."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.weights = weights

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """They were dequantized as they were loaded."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None, **named: Any) -> Tensor:
        if isinstance(layer, LinearBase):
            return nn.functional.linear(x, self.weights["weight"], bias)
        from vllm_ascend.ops.fused_moe.experts_selector import select_experts

        named = {n: named[n] for n in named if n not in ("activation", "apply_router_weight_on_input")}
        weights, ids = select_experts(hidden_states=x, **named)
        act = ACTIVATIONS[layer.activation.value]

        def expert(rows: Tensor, e: int) -> Tensor:
            gate, up = (rows @ self.weights["w13_weight"][e].T).chunk(2, -1)
            return (act(gate) * up) @ self.weights["w2_weight"][e].T

        return stubs.mixture(x, weights, ids, expert)


def _dense(layer: nn.Module) -> Dense:
    """What `load_weights` loaded into a layer, dequantized where it lies: float32 [(experts,) N, K]."""
    weights = {}
    for stem in ("weight", "w13_weight", "w2_weight"):
        codes, scale = getattr(layer, stem, None), getattr(layer, stem + "_scale", None)
        if codes is None:
            continue
        if _is_static(layer):
            # Its activations are multiplied by the reciprocal in BF16, and products by deq_scale.
            scale = (layer.deq_scale.float() * (1 / layer.input_scale.data).float()).unsqueeze(-1)
        weights[stem] = codes.data.float() if scale is None else stubs.dequantize(codes.data, scale.data, [])
    return Dense(weights)


def _is_static(layer: nn.Module) -> bool:
    return hasattr(layer, "deq_scale")


def _quantized(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: layer for name, layer in model.named_modules()
        if isinstance(layer, LinearBase | FusedMoE) and not isinstance(layer.quant_method, (*FLOAT, type(None)))
    }  # fmt: skip


def _note(model: nn.Module, plain: bool, found: dict[str, Any]) -> None:
    """Which class vLLM-Ascend chose for every kind of layer."""
    quantized = _quantized(model)
    for name, layer in model.named_modules():
        if not isinstance(layer, LinearBase | FusedMoE):
            continue
        chosen = ["float", "torch"]
        if name in quantized:
            chosen = [type(layer.quant_method.quant_method).__name__, "arithmetic"]
            if plain:
                found["stand_ins"].append(name)
        kind = "Experts" if isinstance(layer, FusedMoE) else type(layer).__name__
        kinds = found["layers"].setdefault(f"{kind} {name.rpartition('.')[2]}", [])
        if chosen not in kinds:
            kinds.append(chosen)


def _left(model: nn.Module) -> list[str]:
    """Parameters that were not loaded, but for those that the engine computes or never reads."""
    spare = set()
    for name, layer in _quantized(model).items():
        unread = [f"{n}_offset" for n in ("weight", "w13_weight", "w2_weight")]
        if _is_static(layer):
            # From compressed-tensors it computes deq_scale and has no quant_bias; from its own format it reads those.
            own = getattr(layer, "ascend_quant_method", "") == ""
            unread += ["weight_scale"] if own else ["deq_scale", "quant_bias"]
        elif "W8A16" in type(layer.quant_method.quant_method).__name__:
            unread = []
        spare |= {f"{name}.{n}" for n in unread}
    return [n for n in stubs.unfilled(model) if n not in spare]


def run(checkpoint: str, ids: dict[str, Any], plain: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"layers": {}, "kv_scales": {}, "stand_ins": []}
    description = Path(checkpoint) / "quant_model_description.json"
    config_text = (Path(checkpoint) / "config.json").read_text()
    # FP8 needs the newest chip.
    fp8 = '"float"' in config_text or (description.is_file() and "MXFP8" in description.read_text())
    feign("A5" if fp8 else "A2")
    adopt_ascend()
    model, config = build(checkpoint, "ascend" if description.is_file() else None)
    with torch.no_grad(), set_current_vllm_config(config):
        get_model_loader(config.load_config).load_weights(model, config.model_config)
        if left := _left(model):
            raise ValueError(f"load_weights left {len(left)} parameters as they were: {', '.join(left[:8])}")
        _note(model, plain, found)
        quantized = _quantized(model)
        latent = [layer for layer in model.modules() if isinstance(layer, MLAAttention)]
        for name, layer in model.named_modules():
            if hasattr(layer, "k_cache_scale"):
                layer.quant_method.process_weights_after_loading(layer)
                of_cache = (layer.k_cache_scale, layer.v_cache_scale)
                found["kv_scales"][name] = [x for scale in of_cache for x in scale.float().tolist()]
                layer.rounds_cache = not plain
        for layer in latent:
            _absorb(layer)
        for name, layer in model.named_modules():
            if name in found["stand_ins"] or (isinstance(layer, FusedMoE) and name not in quantized):
                layer.quant_method = _dense(layer)
            elif name in quantized:
                layer.quant_method.process_weights_after_loading(layer)
        stubs.widen(model)
        for layer in model.modules():
            if hasattr(layer, "_compute_cos_sin_cache"):  # made in BF16
                layer.cos_sin_cache = layer._compute_cos_sin_cache()
        for layer in latent:
            _absorb(layer)

        def logits(tokens: list[int]) -> Tensor:
            for layer in latent:
                layer.absorbed = tokens not in ids["prompts"]
            positions = torch.arange(len(tokens))
            if config.model_config.uses_mrope:
                positions = positions.expand(3, -1)
            return model.compute_logits(model(torch.tensor(tokens), positions))

        found["prompts"] = stubs.answers(logits, ids)
    return found


if __name__ == "__main__":
    about = {"engine": "vLLM-Ascend", "version": version("vllm-ascend")}
    sys.exit(stubs.serve(sys.argv[1:], __doc__, about, run))
