"""What an engine's logprobs are compared with: lowbit's own models and transformers', run here."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowbit.calibration.kv_cache import KVCache, KVHook, KVQuantizer, attentions, watched
from lowbit.dtypes import INT8
from lowbit.granularity import PerGroup
from lowbit.nn import QuantExperts, QuantLinear, float_activations
from lowbit.quantize import quantize
from lowbit.scheme import get_scheme

# What the engine fuses, by the last part of its layer's name.
MEMBERS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj", "qkv_proj"),
    "gate_up_proj": ("gate_proj", "up_proj", "gate_up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z", "in_proj_qkvz"),
    "in_proj_ba": ("in_proj_b", "in_proj_a", "in_proj_ba"),
}


def _modules(model: nn.Module, layers: list[str]) -> Iterator[QuantExperts | QuantLinear]:
    """The modules that are in the engine's layers of these names."""
    places = set()
    for layer in layers:
        parent, _, last = layer.partition("layers.")[2].rpartition(".")
        places |= {f"{parent}.{m}" for m in MEMBERS.get(last, (last,))}
        if "experts" in layer and "shared_expert" not in layer:
            # What stands around experts has names of its own in every library.
            places.add(f"{parent.partition('.')[0]}: experts")
    for name, module in model.named_modules():
        if isinstance(module, QuantExperts | QuantLinear):
            after = name.partition("layers.")[2]
            if isinstance(module, QuantExperts):
                after = f"{after.partition('.')[0]}: experts"
            if after in places:
                yield module


@contextmanager
def float_where(model: nn.Module, layers: list[str]) -> Iterator[None]:
    """Leave activations unquantized in the modules that the engine multiplied in float."""
    with ExitStack() as stack:
        for module in _modules(model, layers):
            stack.enter_context(float_activations(module))
        yield


@contextmanager
def by_token_where(model: nn.Module, layers: list[str]) -> Iterator[None]:
    """Quantize activations to INT8 by the token in the modules whose static scale the engine does not use."""
    spec = get_scheme("int8").activations
    assert spec is not None

    def rounded(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (quantize(inputs[0], spec).dequantize().to(inputs[0].dtype), *inputs[1:])

    with float_where(model, layers), ExitStack() as stack:
        for module in _modules(model, layers):
            stack.callback(module.register_forward_pre_hook(rounded).remove)
        yield


@torch.no_grad()
def logprobs(model: nn.Module, ids: list[int]) -> Tensor:
    """float64 [T, vocabulary]: row t is the distribution of token t + 1."""
    out = model(input_ids=torch.tensor([ids]))
    return torch.log_softmax(out.logits[0].double(), -1)


def compare(
    model: nn.Module, asked: list[list[int]], answers: list[dict[str, Any]]
) -> tuple[list[Tensor], list[float]]:
    """For every prompt: differences of its token logprobs; how far behind the best its worst greedy token is."""
    differences, behind = [], []
    for ids, answer in zip(asked, answers, strict=True):
        table = logprobs(model, ids + answer["greedy"])
        differences.append(torch.tensor(answer["logprobs"], dtype=torch.float64) - of_tokens(table, ids))
        made = table[len(ids) - 1 : -1]
        chosen = made[torch.arange(len(made)), torch.tensor(answer["greedy"])]
        behind.append(float((made.max(-1).values - chosen).max()))
    return differences, behind


def of_tokens(table: Tensor, ids: list[int]) -> Tensor:
    """The logprob of each token after the first."""
    return table[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]


@contextmanager
def disturbed(model: nn.Module) -> Iterator[None]:
    """Embeddings moved by what float32 sums in another order differ: codes tip over, and deep models amplify it."""
    generator = torch.Generator().manual_seed(0)

    def move(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * (1 + 1e-6 * torch.randn(output.shape, generator=generator))

    hook = model.get_input_embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        hook.remove()


def toward_zero(keys: Tensor, values: Tensor) -> KVHook:
    """vLLM's kernels for CPUs (0.32) do not round what they write to an FP8 cache: they cut its mantissa off."""

    def cut(x: Tensor, scale: Tensor) -> Tensor:
        x = (x / scale).clamp(-448, 448)
        codes = x.to(torch.float8_e4m3fn)
        larger = codes.float().abs() > x.abs()
        return (codes.view(torch.uint8) - larger.to(torch.uint8)).view(torch.float8_e4m3fn).float() * scale

    return lambda key, value: (cut(key, keys), cut(value, values))


@contextmanager
def cache_quantized(model: nn.Module, scales: dict[str, Tensor]) -> Iterator[None]:
    """Round keys and values as the engine's cache does, wherever `scales` has a `k_scale` and a `v_scale`."""
    hooks: dict[str, Any] = {}
    for name, _ in attentions(model):
        after = "layers." + name.partition("layers.")[2]
        for stored, scale in scales.items():
            if stored.endswith(f"{after}.k_scale"):
                both = scale, scales[stored.removesuffix("k_scale") + "v_scale"]
                channels = KVQuantizer(KVCache.parse("int8-channel"), *both)
                hooks[name] = channels if scale.numel() > 1 else toward_zero(*both)
    assert 2 * len(hooks) == len(scales)
    with watched(model, hooks):
        yield


def typical(differences: list[Tensor], of_tokens: bool = False) -> float:
    """The median of the prompts' root mean squares; `of_tokens`: of what every token of them differs by.

    In bfloat16 rounding tips a router's choice in every other prompt, where its second and third expert are within
    0.01 of each other; the token moves by up to 0.7, and a root mean square says nothing of the others.
    """
    if of_tokens:
        return float(torch.cat(differences).abs().median())
    return statistics.median(float(x.square().mean().sqrt()) for x in differences)


@torch.no_grad()
def share_input_scales(model: nn.Module) -> None:
    """Give experts with static activations the largest input scale of all experts of their layer, in place.

    So vLLM and SGLang load them.
    """
    static = get_scheme("fp8-static")
    for module in model.modules():
        if isinstance(module, QuantExperts) and module.scheme == static:
            for projections in (("gate", "up"), ("down",)):
                inputs = [module.stack(p, "input_scale") for p in projections]
                largest = torch.stack(inputs).max()
                for scale in inputs:
                    scale.fill_(largest)


@contextmanager
def blocks_cut(model: nn.Module) -> Iterator[None]:
    """INT8 activations in groups as SGLang's kernel (0.5.23) makes them: cut toward zero, not rounded."""

    def cut(x: Tensor) -> Tensor:
        groups = x.float().unflatten(-1, (-1, 128))
        scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 127
        return ((groups / scale).trunc() * scale).flatten(-2).to(x.dtype)

    with ExitStack() as stack:
        for module in model.modules():
            if not isinstance(module, QuantExperts | QuantLinear) or not _int8_groups(module):
                continue
            stack.enter_context(float_activations(module))
            if isinstance(module, QuantLinear):
                hook = module.register_forward_pre_hook(lambda _, inputs: (cut(inputs[0]), *inputs[1:]))
                stack.callback(hook.remove)
            else:
                product = module._product
                module._product = lambda projection, rows, offsets, product=product: product(
                    projection, cut(rows), offsets
                )
                stack.callback(delattr, module, "_product")
        yield


def _int8_groups(module: QuantExperts | QuantLinear) -> bool:
    spec = module.scheme.activations
    return spec is not None and spec.dtype is INT8 and isinstance(spec.granularity, PerGroup)


def as_bf16_keeps(out: Path, to: Path) -> Path:
    """A copy of a checkpoint with scales as vLLM-Ascend keeps them: in BF16, those of activations as a reciprocal.

    Scales of FP8 codes, and `deq_scale`, are kept in float32.
    """
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(out, to)
    shards = {file: load_file(file) for file in to.glob("*.safetensors")}
    int8 = {n for tensors in shards.values() for n, t in tensors.items() if t.dtype is torch.int8}
    for file, tensors in shards.items():
        for name, tensor in tensors.items():
            if name.endswith(".weight_scale") and name.removesuffix("_scale") in int8:
                tensors[name] = tensor.bfloat16().float()
            elif name.endswith(".input_scale"):
                tensors[name] = 1 / (1 / tensor.bfloat16()).float()
        save_file(tensors, file, {"format": "pt"})
    return to
