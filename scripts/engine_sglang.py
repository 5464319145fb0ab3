"""Token logprobs of a checkpoint by SGLang's own code, on a CPU. Runs in a venv of its own, which has no lowbit.

    python scripts/engine_sglang.py [--plain] CHECKPOINT IDS.json OUT.json [CHECKPOINT IDS.json OUT.json …]

IDS.json and OUT.json are those of engine_vllm.py; "quantization" is what SGLang's `--quantization` is given. SGLang has
no build for CPUs on the package index, so its compiled packages are stubs and a GPU of compute capability 9.0 is
feigned. As on one run its arguments, ModelConfig, quantization configs and methods, model classes, `load_weights` and
`process_weights_after_loading`. Parameters hold what no checkpoint does before they are loaded, and none may keep it.

`--plain`: what `load_weights` loaded is dequantized where it lies and multiplied in float32. Without: SGLang's `apply`
of every layer runs on the processed weights, the kernels that it calls being those of engine_sglang_kernels.py; W8A16
stays as in `--plain`, since Marlin multiplies BF16. Attention is ours, without a cache: every greedy token runs the
whole sequence. Latent attention multiplies by `kv_b_proj` for the prompts, as SGLang's prefill does, and by what SGLang
absorbs of it for the greedy tokens, as its decoding does.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1", "SGLANG_LOGGING_LEVEL": "ERROR"}

import engine_stubs as stubs
import torch
import transformers.image_utils
import transformers.models.auto.processing_auto  # noqa: F401
from torch import Tensor, nn

# SGLang looks for a GPU while it is imported, and chooses by what it finds.
_NONE = {
    "memory_allocated": 0,
    "max_memory_allocated": 0,
    "memory_reserved": 0,
    "current_device": 0,
    "device_count": 1,
}
for _name, _value in {
    **_NONE, "is_available": True, "get_device_capability": (9, 0), "get_device_name": "H100",
    "mem_get_info": (80 << 30, 80 << 30), "empty_cache": None, "synchronize": None, "set_device": None,
}.items():  # fmt: skip
    setattr(torch.cuda, _name, lambda *_, _value=_value, **__: _value)
torch.version.cuda = "12.8"
stubs.stub(
    "torchvision", "torchaudio", "sgl_kernel", "decord", "deep_gemm", "vllm", "flashinfer", "cutlass", "cuda"
)

import engine_sglang_kernels as kernels  # noqa: E402
import sglang  # noqa: E402
import sglang.srt.utils  # noqa: E402
from sglang.kernels.fused_op import BaseFusedOp  # noqa: E402
from sglang.srt import runtime_context  # noqa: E402
from sglang.srt.configs.load_config import LoadConfig  # noqa: E402
from sglang.srt.configs.model_config import ModelConfig  # noqa: E402
from sglang.srt.distributed import parallel_state  # noqa: E402
from sglang.srt.layers import dp_attention  # noqa: E402
from sglang.srt.layers.dual_gemm import DualGemm  # noqa: E402
from sglang.srt.layers.layernorm import Gemma4RMSNorm  # noqa: E402
from sglang.srt.layers.linear import LinearBase  # noqa: E402
from sglang.srt.layers.moe import initialize_moe_config  # noqa: E402
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE  # noqa: E402
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput  # noqa: E402
from sglang.srt.layers.quantization.fp8_utils import initialize_fp8_gemm_config  # noqa: E402
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod, UnquantizedLinearMethod  # noqa: E402
from sglang.srt.layers.radix_attention import RadixAttention  # noqa: E402
from sglang.srt.layers.radix_linear_attention import RadixLinearAttention  # noqa: E402
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode  # noqa: E402
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context  # noqa: E402
from sglang.srt.model_loader import loader  # noqa: E402
from sglang.srt.models import llama4  # noqa: E402
from sglang.srt.models.deepseek_v2 import DeepseekV2AttentionMLA  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402

FLOAT = (UnquantizedLinearMethod, UnquantizedFusedMoEMethod)
STAND_IN = "stand-in"
# This class of SGLang's loads no experts; the other one takes a text model as well.
READ_AS = {"Llama4ForCausalLM": "Llama4ForConditionalGeneration"}
# Scales of an FP8 cache, and an order of input channels: SGLang has values of its own where a checkpoint has none.
OPTIONAL = ("k_scale", "v_scale", "g_idx", "g_idx_sort_indices")


class OnCPU(torch.overrides.TorchFunctionMode):
    """Tensors that are asked for on a GPU are made on the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs = {**kwargs, "device": "cpu"}
        return function(*args, **kwargs)


def build(checkpoint: str, quantization: str | None) -> tuple[nn.Module, Any, Any]:
    """The model that SGLang builds for a checkpoint, its parameters poisoned; its model and load configs."""
    # Small products fused for small batches, and streams to run two at once: not part of loading.
    DualGemm._select_mode = lambda *_: None
    type(runtime_context._CONTEXT).get_stream = torch.cuda.Stream = lambda *_: None
    read_as = READ_AS.get(json.loads((Path(checkpoint) / "config.json").read_text())["architectures"][0])
    arguments = ServerArgs(
        model_path=checkpoint, quantization=quantization, device="cuda", skip_tokenizer_init=True, dtype="float32",
        json_model_override_args=json.dumps({"architectures": [read_as]} if read_as else {}),
    )  # fmt: skip
    ranks = runtime_context.SpawnRanks(world_rank=0, gpu_id=0, dp_rank=None)
    runtime_context.publish(arguments, role="scheduler", ranks=ranks)
    with tempfile.NamedTemporaryFile() as file:
        parallel_state.init_distributed_environment(1, 0, f"file://{file.name}", 0, "gloo")
        parallel_state.initialize_model_parallel(backend="gloo")
    dp_attention.initialize_dp_attention(arguments)
    initialize_moe_config()
    initialize_fp8_gemm_config()
    model_config = ModelConfig.from_server_args(arguments)
    load_config = LoadConfig()
    quant_config = _quantization(model_config, load_config)
    with loader.set_default_torch_dtype(model_config.dtype):
        model = loader._initialize_model(model_config, load_config, quant_config)
    stubs.poison(model, but=OPTIONAL)
    return model, model_config, load_config


def _quantization(model_config: Any, load_config: Any) -> Any:
    """SGLang's config of the checkpoint's quantization; its methods take no float32, in which all else is compared."""
    dtype, model_config.dtype = model_config.dtype, torch.bfloat16
    config = loader._get_quantization_config(model_config, load_config)
    model_config.dtype = dtype
    return config


def _has_arithmetic(layer: nn.Module) -> bool:
    """Whether its products are those of engine_sglang_kernels.py: not Marlin's, which multiplies weights in BF16."""
    return "WNA16" not in type(_owner(layer)).__name__


def _owner(layer: nn.Module) -> Any:
    """What SGLang chose for a layer: its scheme, or its method."""
    return getattr(layer, "scheme", None) or layer.quant_method


def _quantized(model: nn.Module) -> dict[str, nn.Module]:
    found = {}
    for name, layer in model.named_modules():
        method = getattr(layer, "quant_method", None)
        if isinstance(layer, LinearBase | FusedMoE) and method is not None and not isinstance(method, FLOAT):
            found[name] = layer
    return found


def _note(model: nn.Module, plain: bool, found: dict[str, Any]) -> None:
    """Which class SGLang chose for every kind of layer."""
    quantized = _quantized(model)
    for name, layer in model.named_modules():
        if not isinstance(layer, LinearBase | FusedMoE) or getattr(layer, "quant_method", None) is None:
            if isinstance(layer, RadixAttention) and layer.quant_method is not None:
                found["kv_scales"][name] = [float(layer.k_scale), float(layer.v_scale)]
            continue
        chosen = ["float", "torch"]
        if name in quantized:
            chosen = [type(_owner(layer)).__name__, "arithmetic" if _has_arithmetic(layer) else STAND_IN]
        kind = "Experts" if isinstance(layer, FusedMoE) else type(layer).__name__
        kinds = found["layers"].setdefault(f"{kind} {name.rpartition('.')[2]}", [])
        if chosen not in kinds:
            kinds.append(chosen)
        if name in quantized and (plain or not _has_arithmetic(layer)):
            found["stand_ins"].append(name)


class Dense(nn.Module):
    """Multiplies a layer by what was loaded, dequantized. A module because some of SGLang's methods are."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.weights = weights

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """They were dequantized as they were loaded."""

    def apply(self, layer: nn.Module, x: Any = None, bias: Tensor | None = None, **named: Any) -> Any:
        if isinstance(layer, LinearBase):
            return nn.functional.linear(x, self.weights["weight"], bias)
        given = named["dispatch_output"]
        out = kernels.fused_experts(
            given.hidden_states, self.weights["w13_weight"], self.weights["w2_weight"], given.topk_output,
            layer.moe_runner_config, use_int8_w8a8=False, use_fp8_w8a8=False, w1_scale=None, w2_scale=None,
            a1_scale=None, a2_scale=None,
        )  # fmt: skip
        return StandardCombineInput(hidden_states=out)


def _dense(layer: nn.Module) -> Dense:
    """What `load_weights` loaded into a layer, dequantized where it lies: float32 [(experts,) N, K]."""
    weights = {}
    for stem in ("weight", "w13_weight", "w2_weight"):
        packed = getattr(layer, stem + "_packed", None)
        codes = packed if packed is not None else getattr(layer, stem, None)
        if codes is None:
            continue
        scale = getattr(layer, stem + "_scale", None)
        scale = getattr(layer, stem + "_scale_inv", None) if scale is None else scale
        codes, scale = codes.data, None if scale is None else scale.data
        if packed is not None:
            # Marlin's mixtures lie [E, K/4, N], and their scales [E, groups, N].
            if stem != "weight":
                codes, scale = codes.mT, scale.mT
            codes = codes.contiguous().view(torch.uint8).float() - 128
        n = codes.shape[-2]
        rows = list(getattr(layer, "logical_widths", [n])) if stem == "weight" else [n // 2, n // 2]
        weights[stem] = codes.float() if scale is None else stubs.dequantize(codes, scale, rows)
    return Dense(weights)


def _forward_natively(model: nn.Module) -> None:
    """Between the layers whose weights are compared: SGLang's own implementations in torch, and our attention."""
    for module in model.modules():
        if isinstance(module, BaseFusedOp):
            module._forward_method = module.forward_native
        if isinstance(module, Gemma4RMSNorm):
            # Its kernel for CUDA always multiplies by the weight, into which the router's scale was folded.
            module.with_scale = True
        if isinstance(module, RotaryEmbedding):
            module._forward_method = _in_place(module.forward_native)
    for name, module in list(sys.modules.items()):
        if name.startswith("sglang.srt.") and "quantization" not in name and vars(module).get("_is_cuda"):
            module._is_cuda = False
    # Where it does not run on CUDA, Llama 4 normalizes queries and keys in BF16.
    llama4._is_cuda = True
    llama4.Llama4MoE._forward_core = lambda self, x, mode: self._forward_core_normal(x)

    def attention(self: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        q, k = (x.reshape(x.shape[0], -1, self.qk_head_dim) for x in (q, k))
        window = self.sliding_window_size + 1 if self.sliding_window_size > 0 else None
        out = stubs.causal(
            q, k, v.reshape(v.shape[0], -1, self.v_head_dim), self.scaling, window=window, cap=self.logit_cap
        )
        return out.flatten(1)

    RadixAttention.forward = attention
    RadixLinearAttention.forward = kernels.gated_delta
    DeepseekV2AttentionMLA.forward = _latent


def _in_place(rotate: Any) -> Any:
    """As on CUDA: Llama 4 drops what is returned."""

    def rotated(positions: Tensor, q: Tensor, k: Tensor, *others: Any, **named: Any) -> tuple[Tensor, Tensor]:
        out = rotate(positions, q, k, *others, **named)
        for x, turned in zip((q, k), out, strict=True):
            x.copy_(turned.reshape(x.shape))
        return out

    return rotated


def _latent(
    self: Any, positions: Tensor, hidden_states: Tensor, forward_batch: Any, *_: Any, **__: Any
) -> Tensor:
    """Latent attention by SGLang's layers, or with what it absorbed of `kv_b_proj`."""
    both = self.fused_qkv_a_proj_with_mqa(hidden_states)[0]
    q, c, k_pe = both.split([self.q_lora_rank, self.kv_lora_rank, self.qk_rope_head_dim], -1)
    q = self.q_b_proj(self.q_a_layernorm(q.contiguous()))[0].unflatten(-1, (-1, self.qk_head_dim))
    c = self.kv_a_layernorm(c.contiguous())
    nope, pe = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], -1)
    pe, k_pe = self.rotary_emb(positions, pe.contiguous(), k_pe.unsqueeze(1).contiguous())
    heads = nope.shape[1]
    if forward_batch.absorbed:
        # The scale belongs to FP8 codes; what was dequantized keeps one beside it, unused on CUDA.
        scale = self.w_scale.float() if self.w_kc.element_size() == 1 else 1.0
        nope = torch.einsum("thn,hnl->thl", nope, self.w_kc.float() * scale)
        k = torch.cat([c.unsqueeze(1), k_pe], -1)
        out = stubs.causal(torch.cat([nope, pe], -1), k, c.unsqueeze(1), self.scaling)
        out = torch.einsum("thl,hlv->thv", out, self.w_vc.float() * scale)
    else:
        k, v = (
            self.kv_b_proj(c)[0]
            .unflatten(-1, (heads, -1))
            .split([self.qk_nope_head_dim, self.v_head_dim], -1)
        )
        k = torch.cat([k, k_pe.expand(-1, heads, -1)], -1)
        out = stubs.causal(torch.cat([nope, pe], -1), k, v, self.scaling)
    return self.o_proj(out.flatten(1))[0]


def run(checkpoint: str, ids: dict[str, Any], plain: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"layers": {}, "kv_scales": {}, "stand_ins": []}
    torch._scaled_mm = stubs.scaled_mm
    with OnCPU(), torch.no_grad():
        model, model_config, load_config = build(checkpoint, ids.get("quantization"))
        default = loader.DefaultModelLoader(load_config)
        device = torch.device("cpu")
        # Latent attention absorbs weights while it loads, and quantizes them again.
        kernels.replace()
        default.load_weights_only(model, default._get_all_weights(model_config, model), device)
        if left := stubs.unfilled(model, but=OPTIONAL):
            raise ValueError(f"load_weights left {len(left)} parameters as they were: {', '.join(left[:8])}")
        _note(model, plain, found)
        quantized = _quantized(model)
        for name, layer in model.named_modules():
            if name in found["stand_ins"] or (isinstance(layer, FusedMoE) and name not in quantized):
                layer.quant_method = _dense(layer)
        if not plain:
            default.postprocess_weights(model, device)
        _forward_natively(model)
        found["prompts"] = stubs.answers(
            lambda tokens: _logits(model, tokens, absorbed=tokens not in ids["prompts"]), ids
        )
    return found


def _logits(model: Any, tokens: list[int], absorbed: bool) -> Tensor:
    ids, positions = torch.tensor(tokens), torch.arange(len(tokens))
    length = torch.tensor([len(tokens)])
    batch = ForwardBatch(
        forward_mode=ForwardMode.EXTEND, batch_size=1, input_ids=ids, req_pool_indices=torch.tensor([0]),
        seq_lens=length, out_cache_loc=positions, seq_lens_sum=len(tokens), positions=positions,
    )  # fmt: skip
    batch.absorbed = absorbed
    model = getattr(model, "language_model", model)
    with forward_context(ForwardContext(types.SimpleNamespace(token_to_kv_pool=None))):
        hidden = model.model(ids, positions, batch)
    head = getattr(model, "lm_head", model.model.embed_tokens)
    logits = nn.functional.linear(hidden, head.weight)
    cap = model.logits_processor.final_logit_softcapping
    return cap * torch.tanh(logits / cap) if cap else logits


if __name__ == "__main__":
    about = {"engine": "SGLang", "version": sglang.__version__}
    sys.exit(stubs.serve(sys.argv[1:], __doc__, about, run))
