"""Convert small models and SmolLM2, let a real engine load and run them, and compare token by token.

    python scripts/check_engines.py --engine vllm --python .venv-vllm/bin/python --work .engines [--only TEXT …]

Every case runs twice. *Plain*: the engine reads config and tensors, builds and fuses its layers, loads every weight;
then what it loaded is dequantized where it lies and multiplied in float32. Its logprobs must be those of the
dequantized checkpoint in transformers, within PLAIN for every token. *Kernels*: the engine's own kernels where the
CPU has one, activations quantized. Its logprobs must be those of `lowbit.load`, which quantizes them at the same
places: a prompt's root mean square within KERNEL of what quantizing activations costs, or twice of what lowbit's own
logprobs move by when its embeddings are moved by 1e-6, plus PLAIN. Greedy tokens come through the engine's KV cache:
each must be the reference's best, or as good within eight bounds. Medians of five prompts count.

Both bounds were chosen before the first run; the medians and lowbit's own unrest came after it, when one prompt of a
mixture had a code that float rounding tipped over, and with it a router's choice, and SmolLM2's thirty layers had
amplified such codes.

`--damage` shows that the bounds would notice: checkpoints with one wrong scale, one missed scale, one matrix in the other
order and two experts exchanged must fail the plain comparison.

Another engine is a script with the call `[--plain] CHECKPOINT IDS.json OUT.json …` (see engine_vllm.py), and a line in
ENGINES. Results are kept in the working directory; `--write docs/engines.md` makes the table of all of them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from engine_damage import DAMAGED, check  # beside this file
from engine_models import FUSED, VOCABULARY, architecture, write  # beside this file
from engine_table import markdown
from safetensors.torch import load_file
from torch import Tensor, nn

import lowbit
from lowbit.calibration.kv_cache import KVHook, watched
from lowbit.nn import QuantExperts, QuantLinear, float_activations

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "nn"))
from nn_reference import dequantized  # noqa: E402 (code · scale written out, for transformers)

ENGINES = {"vllm": "engine_vllm.py"}
PLAIN = 1e-3
KERNEL = 0.5
# vLLM's linear attention on CPUs takes bfloat16 only. There the bounds are relative to what bfloat16 costs the
# unquantized model, which may cost this much.
DTYPES = {"Qwen3.5-MoE": "bfloat16"}
BF16 = 0.1
NEW_TOKENS = 4

DENSE = ("Llama", "Qwen2", "Qwen3", "Gemma 2", "Phi-3")
MIXTURES = (
    "Qwen3-MoE", "Qwen2-MoE", "Mixtral", "GLM-4.5", "DeepSeek-V3", "Qwen3.5-MoE", "Qwen3-VL-MoE", "Llama 4",
    "Gemma 4 MoE",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class How:
    """One conversion: arguments of `lowbit.convert`, and of `lowbit.calibrate` before it."""

    scheme: str
    format: str | None = None
    overrides: dict[str, str] = field(default_factory=dict)
    calibrate: bool = False
    kv_cache: str | None = None


MIXED = {
    "re:.*layers\\.0\\.self_attn\\.o_proj": "float",
    "re:.*self_attn\\..*": "fp8",
    "re:.*layers\\.1\\..*experts.*": "fp8",
    "re:.*layers\\.1\\.(mlp|feed_forward)\\.(gate|up|gate_up|down)_proj": "int8-weight-only",
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
    "int8, KV cache fp8": How(scheme="int8", calibrate=True, kv_cache="fp8"),
    "int8 + fp8 + W8A16 mixed": How(scheme="int8", overrides=MIXED),
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


def cases(work: Path, only: list[str]) -> Iterator[Case]:
    for kind in (*DENSE, *MIXTURES, "SmolLM2"):
        for how in HOWS:
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


def run_engine(engine: str, python: Path, jobs: list[tuple[Path, Path, Path]], plain: bool) -> None:
    if not jobs:
        return
    call = [str(python), str(HERE / ENGINES[engine]), *(["--plain"] if plain else [])]
    subprocess.run([*call, *(str(p) for job in jobs for p in job)], check=True)


# What the engine fuses, by the last part of its layer's name.
MEMBERS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj", "qkv_proj"),
    "gate_up_proj": ("gate_proj", "up_proj", "gate_up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z", "in_proj_qkvz"),
    "in_proj_ba": ("in_proj_b", "in_proj_a", "in_proj_ba"),
}


@contextmanager
def float_where(model: nn.Module, layers: list[str]) -> Iterator[None]:
    """Leave activations unquantized in the modules that the engine multiplied in float."""
    with ExitStack() as stack:
        places = set()
        for layer in layers:
            parent, _, last = layer.partition("layers.")[2].rpartition(".")
            places |= {f"{parent}.{m}" for m in MEMBERS.get(last, (last,))}
            if "experts" in layer and "shared_expert" not in layer:
                places.add(f"{parent.removesuffix('.experts')}.experts")
        for name, module in model.named_modules():
            if isinstance(module, QuantExperts | QuantLinear):
                after = name.partition("layers.")[2]
                if after in places:
                    stack.enter_context(float_activations(module))
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


def float_model(case: Case) -> nn.Module:
    """The dequantized checkpoint in transformers, float32."""
    if HOWS[case.how].scheme == "bf16":
        at = case.out
    else:
        at = case.at / "float"
        shutil.rmtree(at, ignore_errors=True)
        dequantized(case.out, at, FUSED.get(case.kind))
    import transformers

    cls = transformers.LlamaForCausalLM if case.kind == "SmolLM2" else architecture(case.kind)[0]
    model = cls.from_pretrained(at, dtype=torch.float32).eval()
    if at != case.out:
        shutil.rmtree(at)
    return model


def answer(case: Case, engine: str, mode: str) -> dict[str, Any]:
    return json.loads((case.at / f"{engine}-{mode}.json").read_text())


def asked_of(case: Case) -> list[list[int]]:
    return json.loads((case.at / "ids.json").read_text())["prompts"]


def chosen_kernels(found: dict[str, Any]) -> set[str]:
    """The classes that multiply quantized layers."""
    return {
        kernel for kinds in found.get("layers", {}).values() for scheme, kernel in kinds if scheme != "float"
    }


def has_kernel(case: Case, engine: str) -> bool:
    """Whether the engine has a kernel of its own for any quantized layer; otherwise both runs are one."""
    plain = answer(case, engine, "plain")
    return "refused" not in plain and bool(chosen_kernels(plain) - {"stand-in"})


def judge(case: Case, engine: str, before: dict[str, Any]) -> dict[str, Any]:
    """What the table says of a case, from the engine's two answers; `before` holds the unquantized one's row."""
    plain = answer(case, engine, "plain")
    kernels = answer(case, engine, "kernels") if has_kernel(case, engine) else plain
    row: dict[str, Any] = {"version": plain["version"], "layers": plain.get("layers", {})}
    if why := plain.get("refused"):
        return {**row, "result": "refused", "why": why.strip()}
    asked = asked_of(case)
    exact = float_model(case)
    differences, behind = compare(exact, asked, plain["prompts"])
    bound, row["plain"] = PLAIN, float(torch.cat(differences).abs().max())
    if case.kind in DTYPES:
        row["plain"] = _typical(differences)
        bound = BF16 if case.how == "bf16" else 3 * before[f"{case.kind}: bf16"]["plain"]
    ok = row["plain"] <= bound and statistics.median(behind) <= 8 * bound
    row |= {"bound": bound, "multiplied": sorted(chosen_kernels(plain)), "kv_cache": True}
    if why := kernels.get("refused"):
        # It loaded, and chose a kernel that cannot run on this machine.
        row["kernel_failed"] = why.strip()
    if HOWS[case.how].kv_cache:
        row["kv_cache"] = kv_scales(case) == sorted(map(tuple, plain["kv_scales"].values()))
        ok = ok and row["kv_cache"]
    if has_kernel(case, engine) and "refused" not in kernels:
        model = lowbit.load(case.out, dtype=torch.float32)
        with float_where(model, kernels["stand_ins"]), cache_quantized(case, model):
            differences, behind = compare(model, asked, kernels["prompts"])
            own = [of_tokens(logprobs(model, ids), ids) for ids in asked]
            costs = [x - of_tokens(logprobs(exact, ids), ids) for x, ids in zip(own, asked, strict=True)]
            with disturbed(model):
                moved = [of_tokens(logprobs(model, ids), ids) - x for ids, x in zip(asked, own, strict=True)]
        row |= {"cost": _typical(costs), "kernel": _typical(differences), "unrest": _typical(moved)}
        row["kernel_bound"] = max(KERNEL * row["cost"], 2 * row["unrest"]) + bound
        ok = ok and row["kernel"] <= row["kernel_bound"]
        ok = ok and statistics.median(behind) <= 8 * row["kernel_bound"]
    return {**row, "result": "same" if ok else "different"}


@contextmanager
def disturbed(model: nn.Module) -> Iterator[None]:
    """Embeddings moved by about what float32 sums in another order differ: codes tip over, and deep models amplify it."""
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
def cache_quantized(case: Case, model: nn.Module) -> Iterator[None]:
    """Round keys and values as the engine's cache does, where the case has scales for them."""
    tensors = load_file(case.out / "model.safetensors") if HOWS[case.how].kv_cache else {}
    hooks: dict[str, Any] = {}
    for name, module in model.named_modules():
        after = "layers." + name.partition("layers.")[2]
        for stored, scale in tensors.items():
            if stored.endswith(f"{after}.k_scale") and hasattr(module, "k_proj"):
                values = tensors[stored.removesuffix("k_scale") + "v_scale"]
                hooks[name] = toward_zero(scale, values)
    assert bool(hooks) == bool(HOWS[case.how].kv_cache)
    with watched(model, hooks):
        yield


def kv_scales(case: Case) -> list[tuple[float, float]]:
    """(scale of keys, scale of values) of every attention in the checkpoint, sorted."""
    tensors = load_file(case.out / "model.safetensors")
    return sorted(
        (float(t.max()), float(tensors[n.removesuffix("k_scale") + "v_scale"].max()))
        for n, t in tensors.items()
        if n.endswith(".k_scale")
    )


def _typical(differences: list[Tensor]) -> float:
    """The median of the prompts' root mean squares."""
    return statistics.median(float(x.square().mean().sqrt()) for x in differences)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=sorted(ENGINES), default="vllm")
    parser.add_argument("--python", type=Path, help="the Python of the engine's venv")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[], help="cases whose title has one of these in it")
    parser.add_argument(
        "--damage", action="store_true", help="also show that damaged checkpoints are noticed"
    )
    parser.add_argument("--write", type=Path, help="the table, of all results in the working directory")
    arguments = parser.parse_args()
    work, engine = arguments.work, arguments.engine
    results_file = work / f"results-{engine}.json"
    results = json.loads(results_file.read_text()) if results_file.is_file() else {}
    failed = []
    if arguments.python is not None:
        todo = []
        for case in cases(work, arguments.only):
            case.at.mkdir(parents=True, exist_ok=True)
            ids = {"prompts": prompts(case.kind, source(case, work)), "new_tokens": NEW_TOKENS}
            ids["dtype"] = DTYPES.get(case.kind, "float32")
            (case.at / "ids.json").write_text(json.dumps(ids))
            if why := convert(case, work):
                results[case.title] = {"result": "not converted", "why": why}
            else:
                todo.append(case)
        for mode in ("plain", "kernels"):
            jobs = [(c.out, c.at / "ids.json", c.at / f"{engine}-{mode}.json") for c in todo]
            if mode == "kernels":
                jobs = [job for job, c in zip(jobs, todo, strict=True) if has_kernel(c, engine)]
            run_engine(engine, arguments.python, jobs, mode == "plain")
        for case in todo:
            row = results[case.title] = judge(case, engine, results)
            print(case.title, {k: v for k, v in row.items() if k != "layers"}, flush=True)
            if row["result"] == "different":
                failed.append(case.title)
            results_file.write_text(json.dumps(results, indent=1))
    if arguments.damage:
        chosen = [c for c in cases(work, []) if c.title in DAMAGED]
        noticed = check(
            chosen,
            lambda jobs: run_engine(engine, arguments.python, jobs, plain=True),
            lambda case, answers: float(
                torch.cat(compare(float_model(case), asked_of(case), answers)[0]).abs().max()
            ),
            PLAIN,
        )
        results["damage"] = noticed
        results_file.write_text(json.dumps(results, indent=1))
        failed += [f"{t}, {d}" for t, found in noticed.items() for d, x in found.items() if x <= PLAIN]
    if arguments.write:
        arguments.write.write_text(markdown(work), encoding="utf-8")
    if failed:
        print("different:", *failed, sep="\n  ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
