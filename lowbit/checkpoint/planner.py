"""How a plan's jobs are found: module by module, from headers, decisions and a format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lowbit.checkpoint.beside import BESIDE_CODES, is_of_attention, name_of_attention, zero_points_of
from lowbit.checkpoint.fused_experts import BESIDE_FUSED, fused_tensors, is_fused
from lowbit.checkpoint.fused_floats import fused_in_float, stacked_in_float
from lowbit.checkpoint.headers import FLOATS, Checkpoint, TensorRef
from lowbit.checkpoint.jobs import Job, Source, StaticInput, constant_job, job_of, jobs_as_they_are, zeros
from lowbit.checkpoint.layout import OutTensor, out_like
from lowbit.checkpoint.rules import Decision, Selection
from lowbit.dtypes import E2M1, E4M3FN
from lowbit.errors import InputError, NotCalibratedError
from lowbit.formats import Ascend, Format, StoredModule, ascend_kv_cache, other_kv_cache, quantization_of
from lowbit.formats.format import Content
from lowbit.formats.fp4 import BLOCKS, SCALES
from lowbit.granularity import PerChannel, PerTensor, block_shape, scale_shape
from lowbit.scheme import Scheme, TensorSpec

_INPUT_SCALE: Content = "input_scale"
_INPUT_ZERO_POINT: Content = "input_zero_point"

FLOAT_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""config.json's names → safetensors' names."""


@dataclass(frozen=True, kw_only=True)
class Replacements:
    """What a calibration puts in place of tensors computed from the source."""

    tensors: Mapping[str, TensorRef]
    """By name. A module's codes come with its `weight_scale`; float tensors stand alone."""
    selection: Selection = field(default_factory=Selection)
    """What it was made for, where the conversion is not told otherwise."""
    config_overrides: Mapping[str, Any] = field(default_factory=dict)
    kv_cache: TensorSpec | None = None
    notes: tuple[str, ...] = ()
    """Warnings for whoever converts with it."""
    label: str = ""
    """Where it comes from, for the manifest."""


def module_of(ref: TensorRef, stored: Mapping[str, StoredModule]) -> str | None:
    """The module whose weight this tensor is; None for biases, scales and parameters of other names."""
    for suffix in (BLOCKS, SCALES):
        if ref.name.endswith(suffix) and (module := ref.name.removesuffix(suffix)) in stored:
            return module if suffix == BLOCKS else None
    for suffix in (".weight_packed", ".weight"):
        if ref.name.endswith(suffix):
            module = ref.name.removesuffix(suffix)
            if suffix == ".weight_packed" and module not in stored:
                return None
            return module
    # Fused experts are parameters without the `.weight`.
    return ref.name if is_fused(ref) else None


class Planner:
    """Collects jobs while walking over the modules."""

    def __init__(
        self,
        source: Checkpoint,
        stored: Mapping[str, StoredModule],
        scheme: Scheme,
        target: Format | None,
        main_dtype: str,
        replacements: Replacements | None,
        joined: Mapping[str, Sequence[str]],
    ) -> None:
        """`joined`: module with one scale per tensor → all that engines multiply by as one matrix with it."""
        self.source, self.stored, self.scheme, self.target = source, stored, scheme, target
        self.main_dtype, self.joined = main_dtype, joined
        self.calibrated = replacements.tensors if replacements else {}
        self.replaced: dict[str, TensorRef] = dict(self.calibrated)
        self.schemes: dict[str, Scheme] = {}
        self._jobs: list[tuple[str, list[Job]]] = []
        """(name of the source tensor whose place they take, jobs)"""
        self._taken: set[str] = set()
        self._uncalibrated: list[str] = []
        self.left_out: list[str] = []
        """Scales of attention, which what is written has no use for: plain float, or the source's cache is in FP4."""
        self.dequantized: list[str] = []
        """Modules in float whose weights are a calibration's codes."""

    def shape_of(self, module: str) -> tuple[int, ...]:
        if module in self.stored:
            return tuple(self.stored[module].shape)
        return self.source.tensors[self._anchor(module)].shape

    def add_module(self, module: str, decision: Decision) -> None:
        """Add the jobs that write what a module becomes; its tensors are not carried with the rest any more."""
        stored = self.stored.get(module)
        if stored is not None:
            self._taken.update(stored.names.values())
            self._taken.update(f"{module}.{n}" for n in BESIDE_CODES)
            anchor = stored.weight
        else:
            anchor = self._anchor(module)
            fused = len(self.shape_of(module)) == 3
            self._taken |= {anchor, *(anchor + s for s in BESIDE_FUSED)} if fused else {anchor}
        self._jobs.append((anchor, self._jobs_for(module, decision, stored, anchor)))

    def _jobs_for(
        self, module: str, decision: Decision, stored: StoredModule | None, anchor: str
    ) -> list[Job]:
        scheme = decision.scheme
        if decision.as_found and stored is not None:
            if (why := self._cannot_keep(stored)) is not None:
                name = self.target.name if self.target else "plain float tensors"
                raise InputError(
                    f"--keep {module}: expected weights that {name} can hold, found {stored.scheme.name} in the "
                    f"source{why}; use --ignore to have it in float"
                )
            scheme = stored.scheme
        if scheme is not None and scheme.weights is not None:
            return self._quantized(module, scheme, stored)
        replacement = self.replaced.pop(anchor, None)
        if replacement is not None and replacement.dtype not in FLOATS:
            return [self._calibrated_float(module, replacement)]
        if replacement is not None:
            return [self._copy(replacement, anchor)]
        if decision.as_found:
            return [self._copy(self.source.tensors[anchor])]
        return [self._float(module, stored, anchor)]

    def _cannot_keep(self, stored: StoredModule) -> str | None:
        """Why the output cannot hold a weight as the source has it, in brackets if not plain; None: it can."""
        if self.target is None or not self.target.holds(stored.scheme):
            return ""
        if stored.format == self.target.name:
            return None
        why = self.target.refuse(stored.scheme, stored.shape, "")
        return f" ({why})" if why else None

    def _quantized(self, module: str, scheme: Scheme, stored: StoredModule | None) -> list[Job]:
        assert self.target is not None and scheme.weights is not None
        self.schemes[module] = scheme
        shape = self.shape_of(module)
        rows, cols = shape[-2], shape[-1]
        outputs = {
            t.content: OutTensor(module + t.suffix, t.dtype, t.shape)
            for t in self.target.tensors(scheme, (rows, cols), self.main_dtype)
        }
        calibrated = stored.names if stored and stored.scheme.activations == scheme.activations else {}
        given = {c: self._given(module, c, calibrated.get(c)) for c in (_INPUT_SCALE, _INPUT_ZERO_POINT)}
        jobs = [self._input_constant(module, c, outputs.pop(c), given[c]) for c in given if c in outputs]
        if "shape" in outputs:
            data = rows.to_bytes(8, "little") + cols.to_bytes(8, "little")
            jobs.append(constant_job("shape", outputs.pop("shape"), data))
        static = self._static_input(module, given) if "quant_bias" in outputs else None
        codes = self.replaced.pop(f"{module}.weight", None)
        scale = self.replaced.pop(f"{module}.weight_scale", None)
        if stored is not None and codes is None and scale is None:
            found = self._as_stored(module, scheme, stored, outputs, static)
            if found:
                return [*found, *jobs]
        if "offset" in outputs:
            out = outputs.pop("offset")
            jobs.append(constant_job("offset", out, zeros(out.nbytes)))
        if codes is not None and codes.dtype not in FLOATS:
            assert scale is not None  # the store checks that codes have a scale
            self._check_replacement(module, codes, scale, scheme, shape)
            block = block_shape((rows, cols), scheme.weights.granularity)
            source = Source(ref=codes, scale=scale, block=block)
            return [*jobs_as_they_are(source, outputs, static), *jobs]
        source = self._weight(module)
        there = stored is not None and codes is None and scale is None and stored.spec == scheme.weights
        if there:
            # Already what is asked for: code for code, only names and packing change.
            return [*jobs_as_they_are(source, outputs, static), *jobs]
        spec = scheme.weights
        mxfp4 = stored is not None and stored.spec.dtype is E2M1 and stored.spec.scale == "e8m0"
        if mxfp4 and source.codes is E2M1 and spec.dtype is E4M3FN and spec.scale == "float32":
            # Its scales are powers of two: between such scales FP8 holds its codes exactly. NVFP4's are not.
            spec = replace(spec, scale="float32-power-of-2")
        others: tuple[tuple[Source, tuple[int, ...]], ...] = ()
        if scale is None and isinstance(spec.granularity, PerTensor):
            # A calibration gives the members that it has one scale; what it left as it was gets that too.
            members = [m for m in self.joined.get(module, ()) if m != module]
            known = (self.calibrated.get(f"{m}.weight_scale") for m in members)
            scale = next((ref for ref in known if ref is not None), None)
            others = () if scale else tuple((self._weight(m), self.shape_of(m)) for m in members)
        return [
            Job(
                kind="quantize",
                shape=shape,
                source=source,
                outputs=outputs,
                spec=spec,
                given_scale=scale,
                joined=others,
                static=static,
            ),
            *jobs,
        ]

    def _anchor(self, module: str) -> str:
        return module + ".weight" if module + ".weight" in self.source.tensors else module

    def _weight(self, module: str) -> Source:
        """A module's weight before it is quantized."""
        changed = self.calibrated.get(f"{module}.weight")
        return Source(ref=changed) if changed else self._source(self.stored.get(module), self._anchor(module))

    def _as_stored(
        self,
        module: str,
        scheme: Scheme,
        stored: StoredModule,
        outputs: Mapping[Content, OutTensor],
        static: StaticInput | None,
    ) -> list[Job]:
        """Copies of the tensors of a module that is in this format and scheme already; [] where it is not."""
        assert self.target is not None
        if stored.format != self.target.name or stored.scheme != scheme or f"{module}.bias" in self.replaced:
            return []
        refs = {c: self.source.tensors[stored.names[c]] for c in outputs}
        if any((refs[c].dtype, refs[c].nbytes) != (o.dtype, o.nbytes) for c, o in outputs.items()):
            return []
        if static is not None and (static.scale, static.zero_point) != tuple(
            self.source.tensors[stored.names[c]] for c in (_INPUT_SCALE, _INPUT_ZERO_POINT)
        ):  # a calibration's, of the same names
            return []
        return [job_of("copy", refs[c], {c: outputs[c]}) for c in outputs]

    def _given(self, module: str, content: Content, found: str | None) -> TensorRef | None:
        """A scale or zero point of activations from the calibration, else what the source has under `found`."""
        ref = self.replaced.pop(f"{module}.{content}", None)
        return ref or (self.source.tensors[found] if found else None)

    def _static_input(self, module: str, given: Mapping[Content, TensorRef | None]) -> StaticInput | None:
        scale, name = given[_INPUT_SCALE], module + ".bias"
        if scale is None:  # refused later, with all others that lack one
            return None
        return StaticInput(
            scale=scale,
            zero_point=given[_INPUT_ZERO_POINT],
            bias=self.replaced.get(name) or self.source.tensors.get(name),
        )

    def _check_replacement(
        self, module: str, codes: TensorRef, scale: TensorRef, scheme: Scheme, shape: tuple[int, ...]
    ) -> None:
        assert self.target is not None
        rows, cols = shape
        stored = {t.content: t for t in self.target.tensors(scheme, (rows, cols))}
        for content, ref in (("codes", codes), ("scale", scale)):
            want = stored.get(content)  # type: ignore[call-overload]
            if want is not None and (ref.dtype, ref.shape) != (want.dtype, want.shape):
                raise InputError(
                    f"calibration of {module}: expected {want.dtype} {list(want.shape)} for {content} under "
                    f"{scheme.name}, found {ref.dtype} {list(ref.shape)}; calibrate again with this scheme"
                )

    def _input_constant(self, module: str, content: Content, out: OutTensor, ref: TensorRef | None) -> Job:
        if ref is not None and ref.elements != 1:
            raise InputError(
                f"{ref.name}: expected one number for all activations, found {list(ref.shape)}; "
                "use a dynamic scheme such as int8 or fp8"
            )
        if ref is not None:
            return job_of("copy" if ref.dtype == out.dtype else "scale", ref, {content: out})
        if content == _INPUT_SCALE:
            self._uncalibrated.append(module)
        return constant_job(content, out, zeros(out.nbytes))

    def require_input_scales(self) -> None:
        """NotCalibratedError where static activations have no scale in the source or the calibration."""
        if self._uncalibrated:
            first = self._uncalibrated[0]
            there = self.stored[first].scheme if first in self.stored else None
            way = "run `lowbit calibrate` and give --calibration, or use a dynamic scheme such as int8"
            if there is not None and there.needs_calibration:
                way += f"; the source's own are for {there.name}"
            raise NotCalibratedError(
                f"expected a calibrated input scale for every quantized module, found none for "
                f"{len(self._uncalibrated)} (first: {first}); {way}"
            )

    def _source(self, stored: StoredModule | None, anchor: str) -> Source:
        if stored is None:
            ref = self.source.tensors[anchor]
            if ref.dtype not in FLOATS:
                raise InputError(
                    f"{ref.name}: expected a weight in {', '.join(FLOATS)}, found {ref.dtype}; cast it in the source, "
                    "or carry it as it is with --keep"
                )
            return Source(ref=ref)
        return Source.of(stored, self.source.tensors)

    def _float(self, module: str, stored: StoredModule | None, anchor: str) -> Job:
        """A weight in float: dequantized, cast to the float scheme's dtype, or copied."""
        if stored is None:
            ref = self.source.tensors[anchor]
            fused = fused_in_float(ref, self.source, self._float_dtype()) if len(ref.shape) == 3 else None
            return fused or self._carry(ref)
        dtype = self._float_dtype()
        source = self._source(stored, anchor)
        if stored.stacked:
            return stacked_in_float(module, stored, source, dtype)
        out = OutTensor(module + ".weight", dtype, tuple(stored.shape))
        return Job(kind="cast", shape=tuple(stored.shape), source=source, outputs={"codes": out})

    def _calibrated_float(self, module: str, codes: TensorRef) -> Job:
        """A weight that stays in float, of which a calibration has codes: those, since its float may be changed."""
        scale, spec = self.replaced.pop(f"{module}.weight_scale"), self.scheme.weights
        assert spec is not None  # the store checks that codes have a scale, and that the scheme is the same
        shape = (codes.shape[0], codes.shape[1])
        # Blocks that a format does not take have a scale per channel in a calibration.
        known = (spec.granularity, PerChannel())
        granularity = next((g for g in known if tuple(scale.shape) == scale_shape(shape, g)), None)
        if granularity is None:
            raise InputError(
                f"calibration of {module}: expected scales of {self.scheme.name} to dequantize it with, found "
                f"{list(scale.shape)}; calibrate again with this module left in float"
            )
        self.dequantized.append(module)
        source = Source(ref=codes, scale=scale, block=block_shape(shape, granularity))
        out = OutTensor(module + ".weight", self._float_dtype(), shape)
        return Job(kind="cast", shape=shape, source=source, outputs={"codes": out})

    def _float_dtype(self) -> str:
        return FLOAT_NAMES[self.scheme.float_dtype] if self.scheme.float_dtype else self.main_dtype

    def _carry(self, ref: TensorRef) -> Job:
        """A float tensor as it is, or cast by the schemes bf16 and fp16.

        Those cast what has the model's main dtype. What its makers kept wider on purpose (a
        router's float32 bias in a BF16 model) stays.
        """
        dtype = self._float_dtype()
        if self.scheme.float_dtype is None or ref.dtype == dtype or ref.dtype != self.main_dtype:
            return self._copy(ref)
        return Job(
            kind="cast", shape=ref.shape, source=Source(ref=ref), outputs={"codes": out_like(ref, dtype)}
        )

    def _copy(self, ref: TensorRef, name: str | None = None) -> Job:
        return job_of("copy", ref, {"codes": OutTensor(name or ref.name, ref.dtype, ref.shape)})

    def add_rest(self) -> None:
        """Everything that is no module's weight, and what only the calibration has."""
        quantized = bool(self.stored or quantization_of(self.source.config))
        int8_cache = ascend_kv_cache(self.source.config)
        useless = self.target is None or other_kv_cache(self.source.config)
        # Scales for a cache of FP8 mean nothing in one of INT8, nor the other way round.
        useless |= int8_cache != isinstance(self.target, Ascend)
        for ref in self.source.tensors.values():
            if ref.name in self._taken:
                continue
            replacement = self.replaced.pop(ref.name, None)
            if replacement is not None:
                jobs = self._with_zero_points(ref.name, replacement)
            elif quantized and is_of_attention(ref.name):
                name = name_of_attention(ref.name)
                if found := self.replaced.pop(name, None):
                    jobs = self._with_zero_points(name, found)
                elif zero_points_of(ref.name) in self.calibrated:
                    continue
                elif useless or ref.name.endswith(".prob_output_scale"):
                    self.left_out.append(ref.name)
                    continue
                else:
                    jobs = [self._copy(ref, ref.name if int8_cache else name)]
            else:
                jobs = [self._carry(ref)]
            self._jobs.append((ref.name, jobs))
        for name, ref in list(self.replaced.items()):
            if name.endswith((".weight_scale", ".input_scale", ".input_zero_point")):
                continue  # the module is kept after all, or has dynamic activations
            fused = next(
                (t for t in fused_tensors(name.rpartition(".")[0]) if t in self.source.tensors), None
            )
            if fused is not None:
                raise InputError(
                    f"{name}: the calibration changed it, but it stays in float within {fused}, which is copied whole; "
                    "quantize these experts, or calibrate with a method that leaves weights in float as they are (gptq)"
                )
            self._jobs.append((name, self._with_zero_points(name, ref)))

    def _with_zero_points(self, name: str, ref: TensorRef) -> list[Job]:
        """A tensor of the calibration; scales of keys and values as the format calls them, with what is beside them."""
        if self.target is None or not name.endswith((".k_scale", ".v_scale")):
            return [self._copy(ref, name)]
        own, offset = self.target.kv_cache_names(name)
        if offset is None:
            return [self._copy(ref, own)]
        out = OutTensor(offset, ref.dtype, ref.shape)
        return [self._copy(ref, own), constant_job("offset", out, zeros(out.nbytes))]

    def groups(self) -> list[list[OutTensor]]:
        return [[o for job in jobs for o in job.outputs.values()] for _, jobs in self._ordered()]

    def jobs_in_order(self) -> list[Job]:
        return [job for _, jobs in self._ordered() for job in jobs]

    def _ordered(self) -> list[tuple[str, list[Job]]]:
        place = {name: i for i, name in enumerate(self.source.tensors)}
        return sorted(self._jobs, key=lambda item: place.get(item[0], len(place)))
