"""One decoder layer's calibration: transform, watch, smooth, round, and hand on what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowbit.calibration import fold
from lowbit.calibration.calls import shared_states
from lowbit.calibration.distributed import decided, gathered, merge_observers, merge_statistics
from lowbit.calibration.experts import UnfusedExperts
from lowbit.calibration.graph import LayerGraph, trace
from lowbit.calibration.joints import smooth
from lowbit.calibration.kv_cache import KVObserver, KVQuantizer, attentions, watched
from lowbit.calibration.layer import (
    correct_biases,
    groups_of,
    input_scales,
    install,
    online_modules,
    quantize_weights,
    transform,
    wanted_statistics,
)
from lowbit.calibration.methods import Method
from lowbit.calibration.proof import proven
from lowbit.calibration.rotation import Rotation, apply_online_hadamard
from lowbit.calibration.run import Run
from lowbit.calibration.sequential import round_in_passing
from lowbit.calibration.shared_scale import MatrixOf, in_checkpoint
from lowbit.calibration.simulate import ActivationQuantizer, attach
from lowbit.calibration.statistics import InputStatistics, Wanted, collect
from lowbit.calibration.stored import stored_quantizers
from lowbit.errors import InputError
from lowbit.quantize import Quantized
from lowbit.scheme import Scheme


def calibrate_layer(run: Run, index: int, *, need_output: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Calibrate layer `index` on the hidden states in `run.cache`; returns (tensors to write, report).

    With `need_output`, the layer's output (as the next layer is to see it) then stands in the cache.
    """
    with run.timed("load and transform"):
        step = LayerStep.load(run, index)
        passes = plan_passes(
            step.wanted, run.method, need_output=need_output and run.has_data, one_batch=run.one_batch,
            experts=bool(step.experts), online=bool(step.online), kv_cache=run.kv_cache is not None,
            static=any(s.needs_calibration for s in step.schemes.values()),
        )  # fmt: skip
        step.transform()
    with run.timed("statistics"):
        step.watch(passes)
    if passes.rounds:
        with run.timed("smoothing and rounding in passing"):
            step.round_in_passing(hand_on=passes.hands_on == "round")
    else:
        with run.timed("smoothing"):
            step.smooth()
        with run.timed("rounding"):
            step.round()
    with run.timed("output"):
        if passes.hands_on == "own":
            step.hand_on()
    return step.tensors(), step.report


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Which runs over the data a layer takes, and which of them hands its output on."""

    watch: bool
    """Inputs are watched before anything is chosen."""
    rounds: bool
    """Everything is chosen while all data passes (see `sequential`), not from statistics."""
    hands_on: Literal["nothing", "watch", "round", "own"]


def plan_passes(
    wanted: Wanted,
    method: Method,
    *,
    need_output: bool,
    one_batch: bool,
    experts: bool,
    online: bool,
    kv_cache: bool,
    static: bool,
) -> Passes:
    """The fewest runs over the data that the method allows.

    `one_batch`: all data may pass at once. `static`: some activations get static scales.
    """
    if one_batch and not (experts or kv_cache or method.bias_correction or wanted.observer):
        return Passes(watch=False, rounds=True, hands_on="round" if need_output else "nothing")
    if not (kv_cache or wanted.anything or method.smooths or method.bias_correction or static):
        return Passes(watch=False, rounds=False, hands_on="own" if need_output else "nothing")
    # Transforms are exact, so where the next layer is to see unquantized inputs, what this pass puts
    # out is what they are; unless experts see more than is routed to them, or it must run again.
    again = method.propagate or experts or online or wanted.observer is not None
    hands_on: Literal["own", "watch"] = "own" if again else "watch"
    return Passes(watch=True, rounds=False, hands_on=hands_on if need_output else "nothing")


@dataclass(kw_only=True)
class LayerStep:
    """A decoder layer in memory and what is known of it so far; names are relative to the layer."""

    run: Run
    index: int
    prefix: str
    layer: nn.Module
    graph: LayerGraph
    schemes: dict[str, Scheme]
    """Of its quantized modules. Those that no static scale fits get a dynamic one on the way."""
    experts: dict[str, UnfusedExperts]
    online: frozenset[str]
    """Modules whose input is rotated while running."""
    wanted: Wanted
    sample: Tensor
    """A few tokens of its input, to check on that transforms change nothing."""
    plain_sample: Tensor
    """The same before the rotation of the residual stream."""
    changed: set[str] = field(default_factory=set)
    """Modules with float tensors that transforms changed."""
    statistics: dict[str, InputStatistics] = field(default_factory=dict)
    kv_scales: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    quantized: dict[str, Quantized] = field(default_factory=dict)
    input_scales: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, run: Run, index: int) -> LayerStep:
        """The layer as the checkpoint has it, on this worker's device, with its graph proven where one is needed."""
        model, prefix = run.model, run.model.layer_name(index)
        layer = model.load(index)
        inside = prefix + "."
        schemes = {n.removeprefix(inside): s for n, s in run.schemes.items() if n.startswith(inside)}
        experts = {n: m for n, m in layer.named_modules() if isinstance(m, UnfusedExperts)}
        for module in experts.values():
            module.see_all = run.options.all_experts
        # The first worker's, so that all of them see one graph and agree on what is exact.
        sample = decided(lambda: run.cache[0][:1, : run.small_shape[1]].clone(), model.device).to(
            model.device
        )
        plain = sample if run.rotation is None else _unrotate(sample, run.rotation)

        def run_plain(target: nn.Module) -> Tensor:
            return model.run(target, index, plain, run.small[index])

        def run_whole() -> list[Tensor]:
            return [run_plain(layer), *shared_states(run.small[index])]

        kept = (
            {n for n, _ in layer.named_modules() if model.disk_name(inside + n) in run.kept}
            if run.kept
            else set()
        )
        # Scales of values that the source has are for values as they are there.
        values = {f"{n}.v_proj" for n in run.carried_kv(layer, index)}
        graph = trace(layer, run_plain, sample.shape[-1], model.text_config).without(kept, values)
        if run.method.smooths or run.method.rotate_heads:
            graph = decided(partial(proven, layer, graph, run_whole), model.device)
        return cls(
            run=run, index=index, prefix=prefix, layer=layer, graph=graph, schemes=schemes, experts=experts,
            online=frozenset({*online_modules(layer, graph)} - kept if run.method.online_hadamard else ()),
            wanted=wanted_statistics(run.method, schemes.values()), sample=sample, plain_sample=plain,
        )  # fmt: skip

    def transform(self) -> None:
        """Apply what needs no data, and check that it is exact."""
        run = self.run
        expected = self._on_sample(self.plain_sample)
        self.changed |= transform(self.layer, self.graph, run.method, run.rotation)
        if run.rotation is not None:
            expected = run.rotation.apply(expected)
        if self.changed:
            self._check(expected, f"the rotation of {self.prefix}")
        if self.online:
            self.report["online_hadamard"] = [self._disk(n) for n in sorted(self.online)]

    def watch(self, passes: Passes) -> None:
        """Run the data through the layer and keep statistics of what its modules receive."""
        run = self.run
        for module in self.experts.values():
            module.token_counts.zero_()  # tracing and checking ran a few tokens too
        if passes.watch:
            cache = run.kv_cache
            kv = {} if cache is None else {n: KVObserver(cache) for n, _ in attentions(self.layer)}
            with watched(self.layer, dict(kv)):
                self.statistics = self._collect(self.wanted, self._all_data(passes.hands_on == "watch"))
            merge_observers([o for k in kv.values() for o in (k.keys, k.values)], run.model.device)
            self.kv_scales = {n: observer.scales() for n, observer in kv.items() if observer.seen}
        tokens = {n: torch.stack(gathered(m.token_counts)).sum(0) for n, m in self.experts.items()}
        if any(int(counts.sum()) for counts in tokens.values()):
            self.report["experts"] = {n: {"tokens": counts.tolist()} for n, counts in tokens.items()}

    def smooth(self) -> None:
        """Fold SmoothQuant scales in, and check that it is exact."""
        run, observer = self.run, self.wanted.observer
        if not run.method.smooths:
            return
        with self._same_output(f"smoothing of {self.prefix}"):
            self.report["smoothing"], moved = smooth(
                self.layer, self.graph, run.method, self.schemes, self.statistics, run.norms_stored
            )
        self.changed |= moved
        if observer is not None:
            # A histogram of the whole tensor cannot follow a change per channel: look again.
            again = self._collect(Wanted(observer=observer), self._all_data(False))
            for name, s in again.items():
                self.statistics[name].observer = s.observer

    def round(self) -> None:
        """Choose codes of weights, and scales of static activations, from the statistics."""
        run, method = self.run, self.run.method
        self.quantized, self.report["modules"] = quantize_weights(
            self.layer, self.graph, method, self.schemes, self.statistics, min_tokens=run.options.min_tokens,
            matrix_of=self._matrix_of,
        )  # fmt: skip
        self.input_scales, self.schemes = decided(
            lambda: input_scales(
                self.layer, self.graph, method, self.schemes, self.statistics, self.quantized
            ),
            run.model.device,
        )
        if method.bias_correction:
            self.changed |= correct_biases(
                self.layer, self.statistics, self.graph, self.schemes, self.quantized
            )
        dynamic = {n: s for n, s in self.schemes.items() if s != run.schemes[f"{self.prefix}.{n}"]}
        if dynamic:
            self.report["left_dynamic"] = {self._disk(n): s.name for n, s in dynamic.items()}
            run.schemes.update({f"{self.prefix}.{n}": s for n, s in dynamic.items()})

    def round_in_passing(self, *, hand_on: bool) -> None:
        """Smooth and round while all data passes."""
        run = self.run
        with self._same_output(f"smoothing of {self.prefix}"):
            passed = round_in_passing(
                self.layer, self.graph, run.method, self.schemes, self.wanted, self._kept_rounding(hand_on),
                min_tokens=run.options.min_tokens, prepare=self._prepare(), stored=run.norms_stored,
                matrix_of=self._matrix_of,
            )  # fmt: skip
        self.quantized, self.report["modules"] = passed.quantized, passed.errors
        self.changed |= passed.changed
        if passed.smoothing:
            self.report["smoothing"] = passed.smoothing

    def hand_on(self) -> None:
        """Run the data through the layer as the next one is to see it: rounded where the method propagates."""
        run = self.run
        for module in self.experts.values():
            module.see_all = False
        if not run.method.propagate:
            run.hand_on(self.layer, self.index, install(self.layer, {}, {}, {}, self.online))
            return
        quantizers = install(self.layer, self.schemes, self.quantized, self.input_scales, self.online)
        quantizers |= self._kept_inputs()
        hooks = run.carried_kv(self.layer, self.index)
        if run.kv_cache is not None:
            hooks = {n: KVQuantizer(run.kv_cache, *pair) for n, pair in self.kv_scales.items()}
        with watched(self.layer, dict(hooks)):
            run.hand_on(self.layer, self.index, quantizers)

    def tensors(self) -> dict[str, Tensor]:
        """What is written for the layer, in the checkpoint's names."""
        rounding, stored = self.run.method.rounding, self.run.model.source.float_dtype
        chosen = rounding.rounding != "nearest" or rounding.scale != "absmax"
        out: dict[str, Tensor] = {}
        for name, q in self.quantized.items():
            if chosen or name in self.changed:
                out[f"{self._disk(name)}.weight"] = q.codes.cpu()
                out[f"{self._disk(name)}.weight_scale"] = q.scale.cpu()
        for name, (scale, zero) in self.input_scales.items():
            out[f"{self._disk(name)}.input_scale"] = scale.reshape(1).float().cpu()
            if zero is not None:
                out[f"{self._disk(name)}.input_zero_point"] = zero.reshape(1).cpu()
        for name in sorted(self.changed):
            module = self.layer.get_submodule(name)
            for leaf in ("weight", "bias"):
                value = getattr(module, leaf, None)
                if isinstance(value, Tensor) and not (leaf == "weight" and name in self.quantized):
                    disk = f"{self._disk(name)}.{leaf}"
                    out[disk] = fold.as_stored(value.detach(), stored, disk).cpu()
        for name, pair in self.kv_scales.items():
            attention = self.run.model.disk_attention(f"{self.prefix}.{name}")
            for leaf, scale in zip(("k_scale", "v_scale"), pair, strict=True):
                out[f"{attention}.{leaf}"] = scale.float().cpu()
        return out

    @property
    def _matrix_of(self) -> MatrixOf:
        return in_checkpoint(self._disk, self.run.model.model_type)

    def _disk(self, name: str) -> str:
        return self.run.model.disk_name(f"{self.prefix}.{name}")

    def _on_sample(self, hidden: Tensor | None = None, *, online: bool = False) -> Tensor:
        """The layer's output on a few tokens; `online`: inputs of the modules named so are rotated."""
        hidden = self.sample if hidden is None else hidden
        rotated = self.online if online else ()
        detach = attach(self.layer, {n: ActivationQuantizer(None, hadamard=True) for n in rotated})
        try:
            return self.run.model.run(self.layer, self.index, hidden, self.run.small[self.index])
        finally:
            detach()

    def _all_data(self, hand_on: bool) -> Callable[[], None]:
        return lambda: self.run.all_data(self.layer, self.index, hand_on=hand_on)

    def _kept_inputs(self) -> dict[str, ActivationQuantizer]:
        """What rounds the inputs of quantized modules that are kept."""
        return stored_quantizers(self.run.model, self.layer, self.index, self.run.kept.__contains__)

    def _kept_rounding(self, hand_on: bool) -> Callable[[], None]:
        """`_all_data`, with those, and with keys and values rounded by scales that the source has."""

        def run_data() -> None:
            detach = attach(self.layer, self._kept_inputs())
            try:
                with watched(self.layer, self.run.carried_kv(self.layer, self.index)):
                    self.run.all_data(self.layer, self.index, hand_on=hand_on)
            finally:
                detach()

        return run_data

    def _prepare(self) -> dict[str, Callable[[Tensor], Tensor]]:
        return dict.fromkeys(self.online, apply_online_hadamard)

    def _collect(self, wanted: Wanted, run_data: Callable[[], None]) -> dict[str, InputStatistics]:
        """The statistics of every group's input while `run_data` runs the layer, merged over workers."""
        rows = -(-wanted.sample_rows // max(self.run.batches, 1))
        statistics = {
            first: InputStatistics(wanted=wanted, spec=self.schemes[first].activations, rows_per_batch=rows)
            for first, _ in groups_of(self.graph, self.schemes)
        }
        collect(self.layer, statistics, run_data, prepare=self._prepare(), by_output=self.graph.writers)
        merge_statistics(statistics, self.run.model.device)
        return statistics

    @contextmanager
    def _same_output(self, what: str) -> Iterator[None]:
        """Raise InputError where what is done inside changes the layer's output on the sample."""
        if not (self.run.method.smooths and self.run.options.verify):
            yield
            return
        expected = self._on_sample(online=True)
        yield
        self._check(expected, what)

    def _check(self, expected: Tensor, what: str) -> None:
        """Raise InputError unless the layer's output on the sample is still `expected`."""
        if not self.run.options.verify:
            return

        def change() -> float:
            found = self._on_sample(online=True)
            return fold.relative_change(expected - self.sample, found - self.sample, self.sample)

        lost = decided(change, self.run.model.device)
        limit = 1e-9 if expected.dtype == torch.float64 else 5e-3
        if not lost < limit:
            raise InputError(
                f"expected {what} to leave the layer's output as it was, found it changed by {lost:.1e}; this "
                "architecture is not understood: use a method without rotation and smoothing (gptq, mse), and report it"
            )


def _unrotate(x: Tensor, rotation: Rotation) -> Tensor:
    return (x.double() @ rotation.dense().to(x.device).t()).to(x.dtype)
