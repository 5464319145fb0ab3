"""The Python functions are typed, documented, and the same as the command line."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import typing

import pytest
import torch
from sample_models import block_fp8, llama, qwen3_moe, write

import lowbit
from lowbit.checkpoint.verify import Verification
from lowbit.errors import InputError
from lowbit.quantize import quantize
from lowbit.scheme import Scheme, get_scheme

PUBLIC = ["convert", "plan", "inspect", "verify"]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_are_typed_and_documented(name):
    function = getattr(lowbit, name)
    assert function.__doc__ and len(function.__doc__) > 60
    hints = typing.get_type_hints(function, localns={"Verification": Verification})
    parameters = inspect.signature(function).parameters
    assert set(parameters) <= set(hints) and "return" in hints
    assert sum(p.kind is not p.KEYWORD_ONLY for p in parameters.values()) <= 3


def test_names_are_found_and_others_are_not():
    assert set(PUBLIC) <= set(lowbit.__all__)
    for name in lowbit.__all__:
        assert getattr(lowbit, name)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = lowbit.nonsense


@pytest.mark.parametrize("package", ["lowbit", "lowbit.nn", "lowbit.ops", "lowbit.formats"])
def test_no_module_takes_the_name_of_a_function(package):
    """Once imported it is what the package has under that name: `lowbit.load` could not be called any more."""
    found = importlib.import_module(package)
    modules = {m.name for m in pkgutil.iter_modules(found.__path__)}
    public = {n for n in found.__all__ if not inspect.ismodule(getattr(found, n))}
    assert modules and not modules & public


def test_input_errors_are_value_errors(tmp_path):
    with pytest.raises(ValueError, match="found nothing there"):
        lowbit.inspect(tmp_path / "nowhere")
    assert issubclass(lowbit.InputError, ValueError)


def test_one_pattern_is_not_taken_for_its_letters(tmp_path):
    src = write(tmp_path / "src", *llama())
    for given in ({"ignore": "lm_head"}, {"keep": "re:.*"}, {"ignore": ["lm_head", 3]}):
        with pytest.raises(InputError, match=r"expected a list of patterns for (ignore|keep), found"):
            lowbit.plan(src, **given)
    with pytest.raises(InputError, match="expected a list of patterns for ignore, found 'lm_head'"):
        lowbit.quantize_model(torch.nn.Linear(32, 32), "int8", ignore="lm_head")


def test_strings_and_paths_schemes_and_names(tmp_path):
    src = write(tmp_path / "src", *llama())
    scheme = get_scheme("int8")
    assert isinstance(scheme, Scheme)
    one = lowbit.convert(str(src), str(tmp_path / "a"), "W8A8")
    two = lowbit.convert(src, tmp_path / "b", scheme)
    assert one.plan.digest() == two.plan.digest()
    assert one.out == str(tmp_path / "a") and one.seconds > 0 and one.resumed_jobs == 0
    assert one.bytes_per_second == pytest.approx(one.plan.source_bytes / one.seconds)


def test_results_show_in_a_few_lines_whatever_the_size_of_the_model(tmp_path):
    """A notebook shows what the last line gives: of a trillion parameters that would be tens of megabytes."""
    src = write(tmp_path / "src", *qwen3_moe())
    done = lowbit.convert(src, tmp_path / "out", "int8")
    windows = [torch.randint(3, 60, (16,), generator=torch.Generator().manual_seed(0))]
    calibration = lowbit.calibrate(src, tmp_path / "c", "int8", method="gptq", data=windows, device="cpu")
    for shown in (done, done.plan, done.plan.source, lowbit.verify(tmp_path / "out", src), calibration):
        text = repr(shown).replace(str(tmp_path), "")
        assert len(text) < 2000 and "model.layers" not in text, text


def test_a_scheme_of_ones_own(tmp_path):
    src = write(tmp_path / "src", *llama(hidden=128))
    done = lowbit.convert(src, tmp_path / "out", get_scheme("int8-weight-only").with_group_size(64))
    shapes = {o.shape for j in done.plan.jobs for c, o in j.outputs.items() if c == "scale"}
    assert shapes == {(128, 2), (256, 2), (128, 4)}
    assert lowbit.verify(tmp_path / "out", src).ok


# --- what transformers makes of the result ----------------------------------------------------

TOKENS = torch.arange(24).reshape(2, 12)


def opened(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def to_float32(module, inputs) -> None:
    module.weight.data = module.weight.data.float()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("scheme", ["int8-weight-only", "int8", "fp8", "fp8-block", "mxfp8"])
@pytest.mark.parametrize("source", ["bf16", "fp8"])
def test_transformers_loads_it_and_agrees_with_the_dequantized_weights(tmp_path, scheme, source):
    """With activations in float the logits are those of our own decoding; and fp8 ones are quantized as ours."""
    tensors, config = llama(tied=scheme == "int8")
    if source == "fp8":
        tensors, config = block_fp8(tensors, config)
    src = write(tmp_path / "src", tensors, config)
    lowbit.convert(src, tmp_path / "out", scheme)
    reference = opened(dequantized(tmp_path / "out", tmp_path / "reference"))
    theirs = opened(tmp_path / "out")
    quantized = [m for m in theirs.modules() if hasattr(m, "quantization_scheme")]
    assert len(quantized) == 14
    for (
        module
    ) in quantized:  # the library decodes mxfp8 to bfloat16, which is exact, in the first forward pass
        module.register_forward_pre_hook(to_float32)
    with_activations = logits(theirs)
    for module in quantized:
        module.quantization_enabled = False
    assert distance(logits(theirs), logits(reference)) < 1e-5
    activations = get_scheme(scheme).activations
    if activations is None:
        assert torch.equal(with_activations, logits(theirs))
        return
    assert distance(with_activations, logits(theirs)) > 1e-3
    if scheme in ("fp8", "fp8-block"):  # the same definition in both; int8's range differs on purpose
        for name, module in reference.named_modules():
            if name.endswith("_proj"):
                module.register_forward_pre_hook(lambda m, x: (quantize(x[0], activations).dequantize(),))
        assert distance(with_activations, logits(reference)) < 1e-3


def dequantized(out, target):
    """The checkpoint's own weights in float32, without its quantization config."""
    from sample_models import load

    from lowbit.formats import read
    from lowbit.quantize import dequantize

    source = lowbit.plan(out, "bf16").source
    stored = read(source.config, source.tensors)
    written = load(out)
    for module, found in stored.items():
        codes = written.pop(found.weight)
        if "packed" in found.names:
            codes = (codes.view(torch.uint8).to(torch.int16) - 128).to(torch.int8)
            written.pop(found.names["shape"])
        written[module + ".weight"] = dequantize(codes, written.pop(found.names["scale"]), found.spec)
    config = {k: v for k, v in source.config.items() if k != "quantization_config"}
    floats = {n: t.float() for n, t in written.items()}
    return write(target, floats, config | {"torch_dtype": "float32"})


def test_transformers_runs_a_mixture_of_experts(tmp_path):
    src = write(tmp_path / "src", *qwen3_moe())
    lowbit.convert(src, tmp_path / "bf16", "bf16")
    assert torch.equal(logits(opened(src)), logits(opened(tmp_path / "bf16")))


def test_other_types_than_names_and_whole_numbers_are_bad_input(tmp_path):
    """They were an AttributeError, a TypeError and, of torch's generator, a RuntimeError."""
    src = write(tmp_path / "src", *qwen3_moe())
    ids = [torch.arange(32)]
    for scheme in (8, ["int8"], object()):
        with pytest.raises(InputError, match="expected the name of a scheme, found"):
            lowbit.plan(src, scheme)
        with pytest.raises(InputError, match="expected the name of a scheme, found"):
            lowbit.calibrate(src, tmp_path / "c", scheme, data=ids)
    with pytest.raises(InputError, match="expected the name of a format, found 3"):
        lowbit.plan(src, "int8", format=3)
    for wrong in ({"samples": "3"}, {"samples": 2.5}, {"length": None}, {"seed": 1.5}):
        with pytest.raises(InputError, match=f"expected whole numbers.* {next(iter(wrong.values()))!r}"):
            lowbit.measure(src, ids, **wrong)
