"""What the scripts that run an engine's code share: packages of an accelerator's machine as stubs, parameters that show
whether they were loaded, products in float, and the call `[--plain] CHECKPOINT IDS.json OUT.json …`.

They run in the engine's venv, which has no lowbit: this file needs torch alone.
"""

from __future__ import annotations

import gc
import importlib.machinery
import json
import os
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class _Names(type):
    """A class with any attribute, such as the members of an enumeration."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class Stub(types.ModuleType):
    """Has any name that is asked for: a class where it begins with a capital, else a function that refuses."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _Names(name, (), {}) if name[:1].isupper() else Stub(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        raise NotImplementedError(f"{self.__name__} is a stub")


class _Finder:
    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def stub(*names: str) -> None:
    """Let `import name` and `import name.anything` succeed for packages that are not installed."""
    sys.meta_path.append(_Finder(names))  # type: ignore[arg-type]


# What lowbit never writes: NaN, the code that symmetric INT8 leaves out, and the largest negative integers.
_POISON = {torch.int8: -128, torch.int32: -(2**31), torch.int64: -(2**63)}


def _bytes(data: Tensor) -> bool:
    """FP8 and E8M0 scales: 0xFF is NaN in all of them."""
    return data.element_size() == 1 and data.dtype is not torch.int8


def poison(model: nn.Module, but: tuple[str, ...] = ()) -> None:
    """Fill every parameter with what no checkpoint of lowbit's holds, before it is loaded.

    `but`: ends of the names of those that a checkpoint need not have.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(but):
            continue
        data = parameter.data
        if _bytes(data):
            data.view(torch.uint8).fill_(0xFF)
        else:
            data.fill_(_POISON.get(data.dtype, torch.nan))


def unfilled(model: nn.Module, but: tuple[str, ...] = ()) -> list[str]:
    """Names of the parameters in which poison is left; `but` as for `poison`: memory may hold anything in those."""
    found = []
    for name, parameter in model.named_parameters():
        if name.endswith(but):
            continue
        data = parameter.data
        if _bytes(data):
            left = data.view(torch.uint8) == 0xFF
        else:
            left = data == _POISON[data.dtype] if data.dtype in _POISON else data.isnan()
        if bool(left.any()):
            found.append(name)
    return found


def widen(model: nn.Module) -> None:
    """BF16 and FP16 parameters and buffers → float32, in place."""
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.dtype in (torch.bfloat16, torch.float16):
                tensor.data = tensor.data.float()


def dequantize(codes: Tensor, scale: Tensor, rows: list[int]) -> Tensor:
    """float32 [..., N, K]: code · scale, as the shape of `scale` says.

    `scale`: [..., N, K/g], [..., ⌈N/128⌉, ⌈K/128⌉], or one each for the matrices of heights `rows` that were fused;
    bytes are E8M0.
    """
    codes = codes.float()
    scale = torch.exp2(scale.float() - 127) if scale.dtype is torch.uint8 else scale.float()
    n, k = codes.shape[-2:]
    if scale.dim() < codes.dim():
        scale = scale.reshape(*codes.shape[:-2], -1)
        scale = torch.repeat_interleave(scale, torch.tensor(rows), dim=-1) if scale.shape[-1] > 1 else scale
        return codes * scale.unsqueeze(-1).expand(*codes.shape[:-2], n, 1)
    # A row for every row of the weight: channels or groups; otherwise blocks.
    high, wide = (1, k // scale.shape[-1]) if scale.shape[-2] == n else (128, 128)
    scale = scale.repeat_interleave(high, -2).repeat_interleave(wide, -1)
    return codes * scale[..., :n, :k]


def scaled_mm(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """torch's product of FP8 codes by a float32 GEMM, in which products are exact too; on CPUs its own is a loop, by
    which SmolLM2 takes an hour."""
    out = (a.float() @ b.float()) * scale_a * scale_b
    return (out if bias is None else out + bias.float()).to(out_dtype)


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float, **named: Any) -> Tensor:
    """Attention of one sequence: [T, heads, ·] each; heads of k and v are shared where they are fewer.

    named: `window` (tokens that are seen, with the token itself) and `cap` (c · tanh(x / c) of the logits).
    """
    window, cap = named.get("window"), named.get("cap")
    q, k, v = (x.transpose(0, 1).float() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    logits = q @ k.mT * scale
    if cap:
        logits = cap * torch.tanh(logits / cap)
    at = torch.arange(q.shape[1])
    behind = at[:, None] - at
    unseen = (behind < 0) if not window else (behind < 0) | (behind >= window)
    return (logits.masked_fill(unseen, float("-inf")).softmax(-1) @ v).transpose(0, 1)


def mixture(x: Tensor, weights: Tensor, ids: Tensor, expert: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Σ over the experts chosen for each row of x [T, K]; weights and ids [T, top k]; `expert(rows, e)` → [·, K]."""
    out = torch.zeros_like(x)
    for e in ids.unique().tolist():
        token, choice = (ids == e).nonzero(as_tuple=True)
        out.index_add_(0, token, (expert(x[token], e) * weights[token, choice, None]).to(out.dtype))
    return out


def gated_delta_rule(
    mixed_qkv: Tensor, a: Tensor, b: Tensor, conv: Tensor, bias: Tensor | None, A_log: Tensor, dt_bias: Tensor,
    keys: tuple[int, int],
) -> Tensor:  # fmt: skip
    """Linear attention of one sequence: a causal convolution, then a gated delta rule, a token at a time.

    mixed_qkv [T, channels], a and b [T, heads of v], conv [channels, width], keys (heads, size of each)
    → [T, heads of v, ·].
    """
    tokens, heads, size = mixed_qkv.shape[0], a.shape[1], keys[0] * keys[1]
    mixed = nn.functional.conv1d(
        mixed_qkv.T, conv.unsqueeze(1), bias, padding=conv.shape[-1] - 1, groups=mixed_qkv.shape[1]
    )
    q, k, v = nn.functional.silu(mixed[:, :tokens]).T.tensor_split([size, 2 * size], -1)
    q, k = (x.unflatten(-1, keys) for x in (q, k))
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q, k = (x.repeat_interleave(heads // keys[0], 1) for x in (q, k))
    v = v.unflatten(-1, (heads, -1))
    decay = torch.exp(-A_log.exp() * nn.functional.softplus(a.float() + dt_bias))
    beta = torch.sigmoid(b.float())
    state = mixed.new_zeros(heads, keys[1], v.shape[-1])
    out = []
    for t in range(tokens):
        state = state * decay[t, :, None, None]
        known = torch.einsum("hk,hkv->hv", k[t], state)
        state = state + torch.einsum("hk,hv->hkv", k[t], (v[t] - known) * beta[t, :, None])
        out.append(torch.einsum("hk,hkv->hv", q[t], state) * keys[1] ** -0.5)
    return torch.stack(out)


@torch.no_grad()
def answers(logits: Callable[[list[int]], Tensor], ids: dict[str, Any]) -> list[dict[str, Any]]:
    """What OUT.json holds for each prompt of IDS.json: logprobs of its tokens after the first, and greedy tokens.

    `logits(token ids)` → [T, vocabulary] of one sequence. Greedy tokens come from running all of it again.
    """
    found = []
    for prompt in ids["prompts"]:
        table = torch.log_softmax(logits(prompt).double(), -1)
        sequence = [*prompt, int(table[-1].argmax())]
        while len(sequence) < len(prompt) + ids["new_tokens"]:
            sequence.append(int(logits(sequence)[-1].argmax()))
        logprobs = table[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])]
        found.append({"logprobs": logprobs.tolist(), "greedy": sequence[len(prompt) :]})
    return found


Run = Callable[[str, dict[str, Any], bool], dict[str, Any]]


def serve(arguments: list[str], usage: str | None, about: dict[str, Any], run: Run) -> int:
    """The script's main: each checkpoint in a process of its own, all from one import of the engine.

    `run(checkpoint, what IDS.json holds, plain)` → what OUT.json holds besides `about`; an exception of it is the
    reason of a refusal.
    """
    plain = "--plain" in arguments
    jobs = [a for a in arguments if a != "--plain"]
    if not jobs or len(jobs) % 3:
        print(usage, file=sys.stderr)
        return 2
    # Otherwise each child would look through everything that was imported, ten times over.
    gc.freeze()
    for at in range(0, len(jobs), 3):
        checkpoint, ids, out = jobs[at : at + 3]
        Path(out).unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            try:
                _answer(checkpoint, ids, out, about, lambda c, i: run(c, i, plain))
            finally:
                sys.stdout.flush()
                os._exit(0)
        os.waitpid(child, 0)
    return 0


def _answer(
    checkpoint: str, ids: str, out: str, about: dict[str, Any],
    run: Callable[[str, dict[str, Any]], dict[str, Any]],
) -> None:  # fmt: skip
    found = dict(about)
    try:
        found |= run(checkpoint, json.loads(Path(ids).read_text()))
    except BaseException as error:
        # An assertion mostly says nothing itself.
        said = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
        found["refused"] = f"{type(error).__name__}: {said}"
        found["trace"] = traceback.format_exc()
    Path(out).write_text(json.dumps(found, indent=1))
