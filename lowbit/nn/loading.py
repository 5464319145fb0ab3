"""Load a converted checkpoint into a transformers model that runs on lowbit's modules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.checkpoint.fused_experts import split
from lowbit.checkpoint.headers import INDEX, Checkpoint
from lowbit.checkpoint.hub import whole
from lowbit.checkpoint.opening import open_checkpoint
from lowbit.errors import InputError
from lowbit.formats import StoredModule, quantization_of, read
from lowbit.formats.joined import EXPERT

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


_USUAL_FILES = ("model.safetensors", INDEX)


def load(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: str | dict[str, Any] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | Path | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model of a checkpoint directory, or of one on the Hub (`org/name@revision`), in eval mode.

    Reads what `lowbit.convert` writes, and published checkpoints: compressed-tensors INT8 and FP8,
    DeepSeek-style block FP8, msModelSlim's W8A8, W8A8_DYNAMIC, W8A16 and W8A8_MXFP8. The model is
    built on meta and filled with tensors mapped from the files: quantized weights are never held in
    full precision, and on a CPU they are read when they are first used (leave the files in place
    while the model lives). Only the stacks of a mixture's experts are copied, and what is one matrix on
    disk and several in the model.

    `device` puts all of it on one device; `device_map` (`"auto"`, or module → device) spreads it
    through accelerate, with `"auto"` within `max_memory` (device → bytes, or `"10GiB"`). What it
    puts on `"disk"`, or in memory beside an accelerator, is fetched for every use, codes and scales
    too. `offload_folder` takes what a file of the checkpoint does not hold as it is needed (experts in
    float, and rows of a matrix that the model has several of). `dtype` is that of what is not
    quantized, and of the activations: as stored when None. Raises InputError for a checkpoint that
    cannot be read or run.
    """
    if device is not None and device_map is not None:
        raise InputError("expected device or device_map, found both; give one of them")
    if device is not None:
        _check_device(device)
    if dtype is not None:
        _check_dtype(dtype)
    if max_memory is not None and not isinstance(device_map, str):
        raise InputError(
            "expected device_map='auto' with max_memory, found a place for every module, or none"
        )
    if max_memory is not None:
        _check_devices(max_memory)
    checkpoint = open_checkpoint(whole(path))
    model_class, config = _architecture(checkpoint, trust_remote_code)
    # An error in the headers is best found before a model is built.
    if _stored(checkpoint):
        config.quantization_config = {
            "quant_method": "lowbit",
            "original": quantization_of(checkpoint.config),
        }
        _without_inner_config(config)
    if not any((checkpoint.root / name).is_file() for name in _USUAL_FILES):
        _name_files(config, checkpoint)
    if device is not None and str(device) != "cpu":
        device_map = {"": device}  # type: ignore[dict-item]
    more: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    if max_memory is not None:
        more["max_memory"] = dict(max_memory)
    try:
        model, info = model_class.from_pretrained(
            str(checkpoint.root), config=config, dtype=dtype or "auto", device_map=device_map,
            trust_remote_code=trust_remote_code, local_files_only=True, output_loading_info=True,
            # Codes and scales are buffers: left out, all of them would stay on the device that computes.
            offload_buffers=True, offload_folder=offload_folder,
            # Told of below, together with what is missing.
            ignore_mismatched_sizes=True, **more,
        )  # fmt: skip
    except InputError:
        raise
    except (ValueError, ImportError) as error:  # a device_map, or an attention that is not installed
        raise InputError(
            f"{checkpoint.root}: expected what transformers can load it with, found: {error}"
        ) from error
    # transformers would go on with random values in their place.
    if absent := sorted([*info["missing_keys"], *(m[0] for m in info["mismatched_keys"])]):
        if apart := [n for n in info["unexpected_keys"] if EXPERT.match(n)]:
            raise InputError(
                f"{checkpoint.root}: expected the experts of {model_class.__name__} quantized, or in 3-D tensors such "
                f"as {absent[0]}, found a float matrix for each (first: {min(apart)}), which transformers does not "
                "stack for it; convert the original checkpoint instead, or quantize them"
            )
        raise InputError(
            f"{checkpoint.root}: expected every tensor of {model_class.__name__}, found {len(absent)} missing or of "
            f"another shape (first: {absent[0]}); the checkpoint is incomplete: fetch or convert it again"
        )
    return model


def _stored(checkpoint: Checkpoint) -> dict[str, StoredModule]:
    """What is quantized in it. InputError where it cannot be read, or only converted."""
    try:
        return read(checkpoint.config, checkpoint.tensors)
    except InputError:
        view = split(checkpoint).checkpoint
        if view.tensors.keys() == checkpoint.tensors.keys():
            raise
        read(view.config, view.tensors)
        raise InputError(
            f"{checkpoint.root}: expected a matrix for each expert, found them quantized in one tensor of each layer; "
            "convert the checkpoint with `lowbit convert` first"
        ) from None


def _check_device(device: str | int | torch.device) -> None:
    """InputError for a device that torch does not know, or cannot use here."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"expected a device that torch can use, found {device} ({str(error).splitlines()[0]})"
        ) from error


def _check_dtype(dtype: torch.dtype | str) -> None:
    """InputError unless a model can compute in it."""
    floats = ("float32", "bfloat16", "float16", "float64")
    if str(dtype).removeprefix("torch.") not in (*floats, "auto"):
        raise InputError(f"expected a dtype of {', '.join(floats)} or auto, found {dtype}")


def _check_devices(max_memory: Mapping[int | str, int | str]) -> None:
    """InputError for accelerators that are not there; transformers' own error says nothing of max_memory."""
    import torch

    count = torch.accelerator.device_count()
    if absent := [place for place in max_memory if isinstance(place, int) and place >= count]:
        raise InputError(
            f"expected max_memory of cpu and of the {count} accelerators that torch finds, found it for {absent}; "
            "leave those out"
        )


def _architecture(checkpoint: Checkpoint, trust_remote_code: bool) -> tuple[Any, Any]:
    """(model class, config) that config.json names."""
    from lowbit.nn.integration import open_config, register_names

    register_names()
    import transformers

    if not checkpoint.config:
        raise InputError(f"{checkpoint.root}: expected a config.json that names an architecture, found none")
    names = checkpoint.config.get("architectures") or []
    config = open_config(
        checkpoint.root, checkpoint.config.get("model_type"), trust_remote_code=trust_remote_code
    )
    if trust_remote_code and "auto_map" in checkpoint.config:
        return transformers.AutoModelForCausalLM, config
    for name in names:
        if hasattr(transformers, name):
            return getattr(transformers, name), config
    raise InputError(
        f"{checkpoint.root}: expected an architecture that transformers {transformers.__version__} knows, found "
        f"{names or 'none'} in config.json; update transformers"
    )


def _name_files(config: Any, checkpoint: Checkpoint) -> None:
    """Tell transformers of files with names of their own, such as msModelSlim's quant_model_weights-….safetensors."""
    indexes = sorted(checkpoint.root.glob("*.safetensors.index.json"))
    if len(indexes) != 1 and len(checkpoint.shards) != 1:
        raise InputError(
            f"{checkpoint.root}: expected an index of its {len(checkpoint.shards)} files, found none; fetch it"
        )
    config.transformers_weights = (indexes or list(checkpoint.shards))[0].name


def _without_inner_config(config: Any) -> None:
    """Where a vision-language model's quantization_config lies in its text_config, it has been read."""
    text = getattr(config, "text_config", None)
    if text is not None and hasattr(text, "quantization_config"):
        del text.quantization_config
