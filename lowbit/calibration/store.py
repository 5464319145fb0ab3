"""The directory that `calibrate` writes and `convert` reads: final tensors in place of rounded ones.

    CALIB/
      calibration.json           what was done, to which source, and how well it went, layer by layer
      layer-00000.safetensors    one file per decoder layer, written when the layer is finished
      layer-model.safetensors    what belongs to no layer (embeddings, final norm, lm_head)

A tensor in there takes the place of the one that `convert` would compute from the source. For
a quantized Linear `X`: `X.weight` (codes in storage dtype, [N, K], unpacked) with
`X.weight_scale` (float32, or uint8 for E8M0; the spec's scale shape), and optionally
`X.input_scale` [1] float32, `X.input_zero_point` [1] int8, `X.bias` (float). A method that only
chooses scales stores `input_scale` or `weight_scale` alone. Float tensors that a folded
transform changed stand under their own names. KV scales: `….self_attn.k_scale` and `v_scale`.
Names are the checkpoint's own. A module that is absent is converted by plain rounding.

Every file is complete when it has its final name, and the manifest names a file only after that
(see `resume`). So a killed run leaves something to resume, never something that looks finished.

Reading needs neither torch nor any tensor data, only headers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.calibration import resume
from lowbit.calibration.resume import CalibrationError
from lowbit.checkpoint.rules import Selection

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "calibration.json"
KIND = resume.Kind(
    what="calibration", command="calibrate", manifest=MANIFEST, version=1, keys=(("scheme", str), ("layers", dict)),
    parts="layer-*.safetensors", entry=("file", str),
    mappings=("module_schemes", "selection", "method", "data", "source", "kv_cache", "config_overrides", "seconds"),
)  # fmt: skip
MODEL_PART = "model"
"""Name of the part that holds what belongs to no decoder layer."""

_CODES = ("I8", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2")
_FLOATS = ("F64", "F32", "F16", "BF16")
_MAX_HEADER = 100 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where one tensor of a calibration lies."""

    name: str
    dtype: str
    """As safetensors names it: F32, I8, F8_E4M3, U8, …"""
    shape: tuple[int, ...]
    file: Path
    start: int
    """Offset of the first byte in `file`."""
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A calibration directory as read: the manifest and where every tensor lies."""

    path: Path
    scheme: str
    """Name of the scheme that the codes were made for."""
    module_schemes: Mapping[str, str | None] = field(repr=False)
    """Modules of decoder layers whose scheme differs from `scheme`; None: kept in float."""
    asked: Selection = field(repr=False)
    """The patterns that it was made with: what they say of modules beside the layers holds for them too."""
    method: Mapping[str, Any]
    data: Mapping[str, Any]
    source: Mapping[str, Any]
    """`fingerprint` (see `fingerprint`) and the path that it had."""
    kv_cache: Mapping[str, Any]
    """`dtype` (e4m3fn, int8), `each`, `method` of calibrated KV scales; empty when there are none."""
    config_overrides: Mapping[str, Any]
    """Merged into the output's config.json, e.g. {"tie_word_embeddings": false}."""
    layers: Mapping[str, Any] = field(repr=False)
    """Report per part: file, errors, tokens per expert, fallbacks."""
    seconds: Mapping[str, float]
    """Time spent per phase, of the run that finished it."""
    complete: bool
    tensors: Mapping[str, StoredTensor] = field(repr=False)

    @property
    def selection(self) -> Selection:
        """What it was made for: its own modules as they are, others by the patterns."""
        return replace(self.asked, calibrated={m: s or "float" for m, s in self.module_schemes.items()})

    def has(self, name: str) -> bool:
        return name in self.tensors

    def modules(self) -> list[str]:
        """Quantized modules: those with codes or an activation or weight scale, sorted."""
        found = set()
        for name, tensor in self.tensors.items():
            if name.endswith((".weight_scale", ".input_scale")) or (
                name.endswith(".weight") and tensor.dtype in _CODES
            ):
                found.add(name.rpartition(".")[0])
        return sorted(found)

    def codes(self, module: str) -> StoredTensor | None:
        """The final codes of a module, or None when it is to be rounded from the source."""
        tensor = self.tensors.get(f"{module}.weight")
        return tensor if tensor is not None and tensor.dtype in _CODES else None

    def floats(self) -> list[str]:
        """Float tensors to be copied as they are (norms, embeddings, biases, weights kept in float)."""
        side = (".weight_scale", ".input_scale", ".k_scale", ".v_scale")
        return sorted(n for n, t in self.tensors.items() if t.dtype in _FLOATS and not n.endswith(side))

    def require(self, *, fingerprint: str | None = None, scheme: str | None = None) -> None:
        """Raise CalibrationError unless complete and made for this source and scheme."""
        if not self.complete:
            raise CalibrationError(
                f"expected a finished calibration in {self.path}, found one with {len(self.layers)} parts "
                "and complete=false; run the same `lowbit calibrate` again, it resumes where it stopped"
            )
        if fingerprint is not None and fingerprint != self.source.get("fingerprint"):
            raise CalibrationError(
                f"expected a calibration of this source, found one of {self.source.get('path', 'another')} "
                f"(fingerprint {self.source.get('fingerprint')}, this source has {fingerprint}); "
                "calibrate this source, or name the one that was calibrated"
            )
        if scheme is not None and scheme != self.scheme:
            raise CalibrationError(
                f"expected scheme {self.scheme}, which {self.path} was calibrated for, found {scheme}; "
                "use the calibration's scheme, or calibrate again for this one"
            )


def fingerprint(source: str | Path) -> str:
    """A checkpoint's identity: 32 hex digits from config.json, the headers and samples of the data.

    Reads every safetensors header, the file sizes and 16 evenly spaced 4 KiB pieces of each
    file, so that it is quick on a terabyte and still tells two fine-tunes apart.
    """
    source = Path(source)
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise CalibrationError(f"expected safetensors files in {source}, found none")
    digest = hashlib.sha256()
    config = source / "config.json"
    if config.is_file():
        digest.update(config.read_bytes())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode(errors="surrogateescape"))
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
            if header > min(size, _MAX_HEADER):
                raise CalibrationError(f"expected a safetensors file, found a bad header length in {file}")
            digest.update(stream.read(header))
            span = max(size - 8 - header - 4096, 0)
            for i in range(16):
                stream.seek(8 + header + span * i // 15)
                digest.update(stream.read(4096))
    return digest.hexdigest()[:32]


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Tensors of one safetensors file by name. Raises CalibrationError when it is damaged."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise CalibrationError(
                f"expected a safetensors file, found {size} bytes of something else: {file}"
            )
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise CalibrationError(f"expected a JSON header in {file}, found: {error}") from error
    out = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        if not 0 <= begin <= end <= size - 8 - length:
            raise CalibrationError(
                f"expected {name} inside {file}, found bytes {begin}–{end} of {size}: truncated?"
            )
        out[name] = StoredTensor(
            name=name, dtype=entry["dtype"], shape=tuple(entry["shape"]), file=file,
            start=8 + length + begin, nbytes=end - begin,
        )  # fmt: skip
    return out


def read(path: str | Path) -> Calibration:
    """Read and validate a calibration directory. Raises CalibrationError saying what is wrong.

    An unfinished calibration is readable (see `Calibration.require`).
    """
    path = Path(path)
    manifest = load_manifest(path)
    tensors: dict[str, StoredTensor] = {}
    for part, entry in manifest["layers"].items():
        file = path / entry["file"]
        if not file.is_file():
            raise CalibrationError(f"expected {file} for {part}, found nothing; calibrate again into {path}")
        try:
            found = read_header(file)
        except CalibrationError as error:
            raise CalibrationError(
                f"{error}; run the same `lowbit calibrate` into {path} again, which makes anew what is damaged"
            ) from error
        for name, tensor in found.items():
            if name in tensors:
                raise CalibrationError(
                    f"expected each tensor once, found {name} in {file.name} and {tensors[name].file.name}"
                )
            tensors[name] = tensor
    _check_tensors(tensors, path)
    return Calibration(
        path=path, scheme=manifest["scheme"], module_schemes=manifest.get("module_schemes", {}),
        asked=_asked(manifest.get("selection", {}), path),
        method=manifest.get("method", {}), data=manifest.get("data", {}), source=manifest.get("source", {}),
        kv_cache=manifest.get("kv_cache", {}),
        config_overrides=manifest.get("config_overrides", {}), layers=manifest["layers"],
        seconds=manifest.get("seconds", {}),
        complete=bool(manifest.get("complete", False)), tensors=tensors,
    )  # fmt: skip


def _asked(patterns: Mapping[str, Any], path: Path) -> Selection:
    known = {"ignore", "keep", "overrides"}
    if unknown := patterns.keys() - known:
        raise CalibrationError(
            f"expected {', '.join(sorted(known))} under selection in {path / MANIFEST}, found "
            f"{', '.join(sorted(unknown))}: written by a newer lowbit, or changed by hand; calibrate again"
        )
    return Selection.of(**patterns)


def load_manifest(path: Path) -> dict[str, Any]:
    """calibration.json of a directory, its required keys checked."""
    return resume.load_manifest(path, KIND)


def _check_tensors(tensors: Mapping[str, StoredTensor], path: Path) -> None:
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        expected: str | None = None
        if kind == "weight" and tensor.dtype in _CODES:
            if len(tensor.shape) != 2:
                expected = "codes [N, K]"
            elif f"{module}.weight_scale" not in tensors:
                expected = f"a scale {module}.weight_scale beside the codes"
        elif kind == "weight_scale" and tensor.dtype not in ("F32", "U8"):
            expected = "a scale in F32 or U8"
        elif kind == "input_scale" and (tensor.dtype, tensor.shape) != ("F32", (1,)):
            expected = "one F32 scale [1]"
        elif kind == "input_zero_point" and (tensor.dtype, tensor.shape) != ("I8", (1,)):
            expected = "one I8 zero point [1]"
        elif kind in ("k_scale", "v_scale") and (tensor.dtype != "F32" or len(tensor.shape) != 1):
            expected = "F32 scales [1], [heads] or [channels]"
        if expected:
            raise CalibrationError(
                f"expected {expected} for {name} in {path}, found {tensor.dtype} {list(tensor.shape)}"
            )


def _intact(file: Path) -> bool:
    try:
        read_header(file)
    except (OSError, CalibrationError):
        return False
    return True


class Writer(resume.Resumable):
    """Writes a calibration part by part, and knows which parts a resumed run already has (see `resume`)."""

    KIND = KIND

    def _intact(self, entry: Mapping[str, Any]) -> bool:
        return _intact(self.path / entry["file"])

    def write(
        self, part: str, tensors: Mapping[str, Tensor], report: Mapping[str, Any] | None = None
    ) -> Path:
        """Write one part. `part` is a layer's name ("model.layers.3") or MODEL_PART."""
        number = part.rpartition(".")[2]
        name = f"layer-{int(number):05d}.safetensors" if number.isdigit() else f"layer-{part}.safetensors"
        resume.save_tensors(self.path / name, tensors, mode_of=self.path / MANIFEST)
        self.record(part, {"file": name, **(report or {})})
        return self.path / name

    def finish(self, **more: Any) -> None:
        super().finish(**more)
        read(self.path)  # what cannot be read back was not written
