"""What dispatch decides for a problem on an accelerator, as data and as text."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from lowbit.errors import InputError
from lowbit.ops.dispatch import FLOAT_NAMES, Problem, Refusal, choose
from lowbit.scheme import Scheme, get_scheme
from lowbit.targets import Accelerator, get_accelerator


def problem_of(
    scheme: Scheme, *, m: int, n: int, k: int, activation_dtype: str = "bfloat16", experts: int = 0, bias: bool = False
) -> Problem:  # fmt: skip
    """The product of one layer under a scheme."""
    from lowbit.ops import activations_of, block_of

    if scheme.weights is None:
        raise InputError(f"scheme {scheme.name} quantizes nothing; its products are torch's own")
    activations = activations_of(scheme)
    return Problem(
        m=m, n=n, k=k, activation_dtype=activation_dtype, weight_dtype=scheme.weights.dtype.name,
        activations=activations,  # type: ignore[arg-type]
        block=block_of(scheme.weights.granularity), bias=bias, out_dtype=activation_dtype, experts=experts,
        weight_scale="e8m0" if scheme.weights.scale == "e8m0" else "float32",
        zero_point=scheme.activations is not None and not scheme.activations.symmetric,
    )  # fmt: skip


def explain(
    *, m: int, n: int, k: int, scheme: str, target: str, activation_dtype: str = "bfloat16", experts: int = 0
) -> dict[str, Any]:
    """The decision, or the refusal, and the roofline's bound, as plain data.

    Keys: `target`, `scheme`, `problem`, then `implementation`, `kernel`, `multiplies`, `launch`,
    `note`, or `refusal`; `bound` is "memory" or "arithmetic" with `floor_us`, the time that
    neither lets it beat (None where the accelerator's figures are not known). m counts a token
    once for each of its experts.
    """
    for name, size in (("m", m), ("n", n), ("k", k)):
        if size < 1:
            raise InputError(f"expected {name} of at least 1, found {size}")
    if activation_dtype not in FLOAT_NAMES:
        raise InputError(f"expected a dtype of {', '.join(FLOAT_NAMES)}, found {activation_dtype!r}")
    accelerator = get_accelerator(target)
    try:
        known = get_scheme(scheme)
    except ValueError as error:
        raise InputError(str(error)) from None
    problem = problem_of(known, m=m, n=n, k=k, activation_dtype=activation_dtype, experts=experts)
    decision = choose(problem, accelerator.arch)
    found: dict[str, Any] = {"target": accelerator.name, "scheme": known.name, "problem": asdict(problem)}
    if isinstance(decision, Refusal):
        found["refusal"] = decision.reason
    else:
        found.update(asdict(decision))
    found.update(_roofline(problem, accelerator, bf16="bfloat16 ×" in found.get("multiplies", "")))
    return found


def _roofline(problem: Problem, accelerator: Accelerator, bf16: bool) -> dict[str, Any]:
    peak = accelerator.bf16 if bf16 else accelerator.peak(problem.weight_dtype)
    if not peak or not accelerator.bandwidth:
        return {"bound": None, "floor_us": None}
    # A row reads one expert's matrix, others none.
    matrices = min(problem.experts, problem.m) if problem.experts else 1
    bytes_moved = matrices * problem.n * problem.k + problem.m * problem.k + 2 * problem.m * problem.n
    memory_us = bytes_moved / accelerator.bandwidth / 1e3
    compute_us = 2 * problem.m * problem.n * problem.k / peak / 1e6
    bound = "memory" if memory_us >= compute_us else "arithmetic"
    return {"bound": bound, "floor_us": round(max(memory_us, compute_us), 2)}


def as_text(found: dict[str, Any]) -> str:
    """A few lines for a terminal."""
    problem = found["problem"]
    experts = f", {problem['experts']} experts" if problem["experts"] else ""
    block = "×".join(str(size or "all") for size in problem["block"])
    lines = [
        f"{found['scheme']} on {found['target']}: [{problem['m']}, {problem['k']}] × [{problem['n']}, {problem['k']}]ᵀ"
        f"{experts}, {problem['activation_dtype']} in and out",
        f"  weights      {problem['weight_dtype']}, a scale per {block} (rows × columns)",
        f"  activations  {problem['activations']}",
    ]
    if "refusal" in found:
        lines.append(f"  refused      {found['refusal']}")
    else:
        lines += [
            f"  runs as      {found['implementation']}: {found['kernel']}",
            f"  multiplies   {found['multiplies']}",
        ]
        if found["launch"]:
            launch = ", ".join(f"{name} {value}" for name, value in found["launch"].items())
            lines.append(f"  launch       {launch}")
        if found["note"]:
            lines.append(f"  note         {found['note']}")
    if found["bound"]:
        lines.append(f"  bound by     {found['bound']}: no faster than {found['floor_us']} µs")
    return "\n".join(lines)
