"""Perplexity, KL and layer errors, against the definitions in float64 and against what a conversion writes."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from architectures import ARCHITECTURES
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lowbit
from lowbit.calibration.activations import ActivationCache
from lowbit.checkpoint.rules import Selection
from lowbit.errors import InputError
from lowbit.evaluate import layerwise as evaluation
from lowbit.evaluate.layerwise import evaluate, final_states, plain, rounded
from lowbit.evaluate.metrics import Agreement, compare, perplexity, windows_of
from lowbit.scheme import get_scheme


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Bigrams(nn.Module):
    """Logits of the next token from a table: a language model whose perplexity is known."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.table = nn.Parameter(3 * drawn(11, 11, seed=seed))

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


def by_hand(model: Bigrams, other: Bigrams, windows: list[Tensor]) -> dict[str, float]:
    nll, other_nll, kl, same, tokens = 0.0, 0.0, 0.0, 0, 0
    for window in windows:
        for now, then in zip(window.tolist()[:-1], window.tolist()[1:], strict=True):
            p = model.table[now].double().softmax(0)
            q = other.table[now].double().softmax(0)
            nll, other_nll, tokens = nll - math.log(p[then]), other_nll - math.log(q[then]), tokens + 1
            kl += float((q * (q / p).log()).sum())
            same += int(p.argmax() == q.argmax())
    return {
        "tokens": tokens, "perplexity": math.exp(nll / tokens), "reference_perplexity": math.exp(other_nll / tokens),
        "perplexity_change": math.exp((nll - other_nll) / tokens) - 1, "kl": kl / tokens,
        "top1_agreement": same / tokens,
    }  # fmt: skip


def test_agreement_is_that_of_the_definition():
    model, other = Bigrams(0), Bigrams(1)
    ids = torch.randint(0, 11, (5, 9), generator=torch.Generator().manual_seed(2))
    found = compare(model, other, list(ids), batch_size=2)
    wanted = by_hand(model, other, list(ids))
    assert found.to_dict() == pytest.approx(wanted, rel=1e-5)
    assert 0 < wanted["top1_agreement"] < 1 and wanted["kl"] > 0.1
    parts = compare(model, other, list(ids[:2])), compare(model, other, list(ids[2:]))
    parts[0].merge(parts[1])
    assert parts[0].to_dict() == pytest.approx(wanted, rel=1e-5)
    assert found.to_dict(compared=False).keys() == {"tokens", "perplexity"}
    assert perplexity(model, ids, length=9, batch_size=2) == pytest.approx(wanted["perplexity"], rel=1e-5)
    one = by_hand(model, other, [ids[0]])["perplexity"]
    assert perplexity(model, ids, length=9, max_windows=1) == pytest.approx(one, rel=1e-5)


def test_windows_are_whole_and_numbers_end_at_infinity():
    assert [w.tolist() for w in windows_of(range(11), 4)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for ids, length in ((range(3), 4), (range(9), 1)):
        with pytest.raises(ValueError, match="at least one window"):
            windows_of(ids, length)
    with pytest.raises(ValueError, match="a tokenizer for a text"):
        perplexity(Bigrams(0), "text")
    assert Agreement(tokens=1, nll=708.0).perplexity == pytest.approx(math.exp(708))
    assert Agreement(tokens=2, nll=2000.0).perplexity == math.inf and Agreement().perplexity == 1.0
    assert math.isnan(Agreement(tokens=1, nll=math.nan).perplexity)


def model_of(table: Tensor) -> SimpleNamespace:
    embedding = nn.Embedding.from_pretrained(table)
    return SimpleNamespace(model=SimpleNamespace(get_input_embeddings=lambda: embedding))


def test_layer_errors_are_measured_in_the_basis_of_the_reference():
    rotation = torch.linalg.qr(drawn(8, 8, seed=0))[0]
    table = drawn(40, 8, seed=1)
    unused = table.clone()
    unused[3] = torch.nan
    basis = evaluation._basis(model_of(unused @ rotation), model_of(table))
    assert basis is not None and torch.allclose(basis.float(), rotation.t(), atol=1e-5)
    assert evaluation._basis(model_of(table), model_of(table.clone())) is None
    h, lost = drawn(2, 3, 8, seed=2), 0.1 * drawn(2, 3, 8, seed=3)
    h[0, 0] *= 500  # a token that would decide alone
    lost[0, 0] *= 500
    caches = ActivationCache(1 << 20), ActivationCache(1 << 20)
    for cache, states in zip(caches, ((h + lost) @ rotation, h), strict=True):
        for batch in states:
            cache.append(batch)
    relative = lost.square().sum(-1) / h.square().sum(-1)
    wanted = math.sqrt(relative.mean())
    assert evaluation._distance(*caches, basis) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(("limit", "length"), [(1, 12), (5 * 128 * 3, 12), (5 * 128 * 3, 13), (1 << 30, 12)])
def test_every_token_is_predicted_once(checkpoints, monkeypatch, limit, length):
    monkeypatch.setattr(evaluation, "LOGITS", limit)
    ids = torch.arange(3 * length).reshape(3, length)
    parts = [ids[:, part] for part in evaluation._parts(ids, plain(checkpoints["qwen3"]).model)]
    assert torch.equal(torch.cat([p[:, 1:] for p in parts], 1), ids[:, 1:])
    assert torch.equal(torch.cat([p[:, :-1] for p in parts], 1), ids[:, :-1])
    assert all(p.numel() * 128 <= limit or p.shape[1] == 2 for p in parts)


@pytest.mark.parametrize(
    "change", [{"hidden_size": 64}, {"vocab_size": 96}, {"num_hidden_layers": 4}], ids=str
)
def test_a_reference_of_other_sizes_is_refused(checkpoints, windows, tmp_path, change):
    config = LlamaConfig.from_pretrained(checkpoints["llama"], **change)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="give the checkpoint that it was converted from"):
        evaluate(plain(checkpoints["llama"]), windows, plain(tmp_path))


@pytest.mark.parametrize("scheme", ["int8", "fp8", "int8-static"])
def test_a_model_rounded_in_memory_is_what_a_conversion_writes(checkpoints, windows, tmp_path, scheme):
    """Outside its layers too: here an override names the output head."""
    source, head = checkpoints["qwen3"], {"lm_head": "int8"}
    if scheme == "int8-static":
        found = lowbit.calibrate(source, tmp_path / "c", scheme, method="absmax", data=windows, device="cpu")
        side = evaluation.calibrated(source, found)
        lowbit.convert(source, tmp_path / "out", scheme, calibration=tmp_path / "c")
    else:
        side = rounded(source, get_scheme(scheme), Selection(overrides=head))
        lowbit.convert(source, tmp_path / "out", scheme, overrides=head)
    written = evaluate(plain(tmp_path / "out"), windows[:4], plain(source))
    in_memory = evaluate(side, windows[:4], plain(source))
    assert in_memory.agreement.to_dict() == pytest.approx(written.agreement.to_dict(), rel=1e-5)
    assert in_memory.layer_errors == pytest.approx(written.layer_errors, rel=1e-5)


@pytest.mark.parametrize(
    ("scheme", "head", "becomes"),
    [("int8", "int8", "int8"), ("int8-static", "int8-static", "int8"), ("fp8-static", "int8-block", "int8")],
)
def test_a_head_that_a_calibration_names_is_converted_and_evaluated(
    checkpoints, windows, tmp_path, scheme, head, becomes
):
    """Its input has no range in a calibration, so that it is dynamic, and its 48 columns hold no block."""
    source, asked = checkpoints["qwen3"], {"lm_head": head}
    method = "gptq" if scheme == "int8" else "absmax"
    found = lowbit.calibrate(source, tmp_path / "c", scheme, method=method, data=windows, overrides=asked)
    done = lowbit.convert(source, tmp_path / "out", scheme, calibration=tmp_path / "c")
    assert done.plan.decisions["lm_head"].scheme.name == becomes
    told = lowbit.plan(source, scheme, calibration=tmp_path / "c", overrides={"lm_head": "float"})
    assert told.decisions["lm_head"].scheme is None
    written = evaluate(plain(tmp_path / "out"), windows[:4], plain(source)).agreement
    overlaid = evaluate(evaluation.calibrated(source, found), windows[:4], plain(source)).agreement
    assert overlaid.to_dict() == pytest.approx(written.to_dict(), rel=1e-5)
    lowbit.convert(source, tmp_path / "float", scheme, calibration=tmp_path / "c", ignore=["lm_head"])
    other = evaluate(plain(tmp_path / "float"), windows[:4], plain(source)).agreement
    assert abs(other.kl - written.kl) > 1e-3 * written.kl


@pytest.mark.parametrize("method", ["gptq", "rotate-gptq"])
def test_a_head_that_is_the_embedding_is_not_rounded(checkpoints, windows, tmp_path, method):
    """A conversion has no tensor for it to quantize, whatever an override says."""
    source, asked = checkpoints["llama"], {"lm_head": "int8"}
    with pytest.warns(UserWarning, match="matches no module"):
        found = lowbit.calibrate(source, tmp_path / "c", "int8", method=method, data=windows, overrides=asked)
    lowbit.convert(source, tmp_path / "out", "int8", calibration=found)
    written = evaluate(plain(tmp_path / "out"), windows[:4], plain(source)).agreement
    overlaid = evaluate(evaluation.calibrated(source, found), windows[:4], plain(source)).agreement
    assert overlaid.to_dict() == pytest.approx(written.to_dict(), rel=1e-5)


@pytest.mark.parametrize("kept", ["fp8-static", "int8"])
def test_what_a_calibration_kept_rounds_its_inputs_as_it_did(checkpoints, windows, tmp_path, kept):
    """Of a source that is quantized itself, carried as found beside what is calibrated."""
    src, float_ = tmp_path / "src", checkpoints["qwen3"]
    asked = {"*.mlp.*": kept, "lm_head": kept, "*.self_attn.*": "float"}
    lowbit.calibrate(float_, tmp_path / "a", "fp8-static", method="absmax", data=windows, overrides=asked)
    lowbit.convert(float_, src, "fp8-static", calibration=tmp_path / "a")
    keep, static = ["*.mlp.*", "lm_head"], {"*.self_attn.*": "int8-static"}
    found = lowbit.calibrate(
        src, tmp_path / "b", "int8-static", method="absmax", data=windows, keep=keep, overrides=static
    )
    done = lowbit.convert(src, tmp_path / "out", "int8-static", calibration=found)
    assert sum(d.as_found for d in done.plan.decisions.values()) == 10
    reference = plain(float_)
    written = evaluate(plain(tmp_path / "out"), windows[:4], reference).agreement
    overlaid = evaluate(evaluation.calibrated(src, found), windows[:4], reference).agreement
    assert overlaid.to_dict() == pytest.approx(written.to_dict(), rel=1e-5)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_what_becomes_float_has_the_dtype_that_it_is_written_in(checkpoints, windows, tmp_path, name):
    """An overlay had it dequantized in float32."""
    lowbit.convert(checkpoints[name], tmp_path / "bf16", "bf16")
    lowbit.convert(tmp_path / "bf16", tmp_path / "src", "fp8")
    found = lowbit.calibrate(
        tmp_path / "src", tmp_path / "c", "int8", method="gptq", data=windows, ignore=["*.layers.1.*"]
    )
    lowbit.convert(tmp_path / "src", tmp_path / "out", "int8", calibration=found)
    reference = plain(tmp_path / "src")
    written = evaluate(plain(tmp_path / "out"), windows[:4], reference).agreement
    overlaid = evaluate(evaluation.calibrated(tmp_path / "src", found), windows[:4], reference).agreement
    assert overlaid.to_dict(compared=True) == pytest.approx(written.to_dict(compared=True), rel=1e-6)


def test_what_a_source_left_in_float_beside_the_layers_stays(tmp_path):
    """As in a conversion: Gemma 4's projection to per-layer inputs."""
    torch.manual_seed(0)
    ARCHITECTURES["gemma4"]().eval().save_pretrained(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "fp8", "fp8", ignore=["*.per_layer_model_projection"])
    ids = list(torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(1)))
    lowbit.convert(tmp_path / "fp8", tmp_path / "out", "int8")
    written = evaluate(plain(tmp_path / "out"), ids).agreement.nll
    assert evaluate(rounded(tmp_path / "fp8", get_scheme("int8")), ids).agreement.nll == pytest.approx(
        written, rel=1e-6
    )
    whole = evaluate(rounded(tmp_path / "src", get_scheme("int8")), ids).agreement.nll
    assert abs(whole - written) > 1e-4 * written


def test_states_of_a_reference_are_as_good_as_the_reference(checkpoints, windows):
    source = checkpoints["qwen3"]
    side, states = rounded(source, get_scheme("int8")), final_states(plain(source), windows[:5], batch_size=2)
    whole = evaluate(side, windows[:5], plain(source), batch_size=2)
    again = evaluate(side, windows[:5], plain(source), batch_size=2, reference_states=states)
    assert again.agreement == whole.agreement and whole.layer_errors and not again.layer_errors
    assert evaluate(side, windows[:5], batch_size=2).agreement.nll == whole.agreement.nll


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "llama4", "phimoe", "deepseek_v4"])
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_a_router_that_an_override_names_is_rounded_as_it_is_converted(tmp_path, windows, name, scheme):
    """Most routers are no Linears, and some that are return more than a product: of those eval said nothing, or broke
    off. What they multiply is rounded too."""
    ARCHITECTURES[name]().save_pretrained(tmp_path / "src")
    source, ids = tmp_path / "src", [w[:32] % 100 for w in windows[:6]]
    asked = {r"re:.*\.(gate|router)$": scheme}
    found = lowbit.calibrate(source, tmp_path / "c", "int8", method="gptq", data=ids, overrides=asked)
    plan = lowbit.convert(source, tmp_path / "out", "int8", calibration=tmp_path / "c").plan
    routers = [m for m, d in plan.decisions.items() if d.role == "router" and d.scheme is not None]
    assert routers and all(plan.decisions[m].scheme.name == scheme for m in routers)
    written, overlaid = plain(tmp_path / "out"), evaluation.calibrated(source, found)
    alone = rounded(source, get_scheme("int8"), Selection(overrides=asked))
    for module in routers:
        index = int(module.split(".layers.")[1].split(".")[0])
        for side in (written, overlaid, alone):
            layer, quantizers = side.load(index)
            inside = next(
                n for n, _ in layer.named_modules()
                if side.model.disk_name(f"{side.model.layer_name(index)}.{n}") == module
            )  # fmt: skip
            weight = written.model.source.weight(module)
            assert torch.equal(layer.get_submodule(inside).weight, weight)
            assert quantizers[inside].spec == get_scheme(scheme).activations
    results = [evaluate(side, ids, plain(source)).agreement.to_dict() for side in (written, overlaid)]
    assert results[1] == pytest.approx(results[0], rel=1e-5)


@pytest.mark.parametrize("pattern", ["re:.*", "*"])
def test_a_pattern_for_all_modules_leaves_the_head_where_a_conversion_does(checkpoints, windows, pattern):
    """The head was decided on alone, so that a pattern for all seemed to mean nothing else."""
    source = checkpoints["qwen3"]
    side = rounded(source, get_scheme("int8"), Selection(overrides={pattern: "fp8"}))
    plan = lowbit.plan(source, "int8", overrides={pattern: "fp8"})
    assert plan.decisions["lm_head"].scheme is None
    assert torch.equal(side.model.model.lm_head.weight, plain(source).model.model.lm_head.weight)


def test_an_embedding_that_an_override_names_is_rounded_as_it_is_converted(checkpoints, windows, tmp_path):
    source, asked = checkpoints["qwen3"], {"model.embed_tokens": "int8"}
    lowbit.convert(source, tmp_path / "out", "int8", overrides=asked)
    written = evaluate(plain(tmp_path / "out"), windows[:4], plain(source))
    side = rounded(source, get_scheme("int8"), Selection(overrides=asked))
    assert not torch.equal(
        side.model.model.get_input_embeddings().weight,
        plain(source).model.model.get_input_embeddings().weight,
    )
    in_memory = evaluate(side, windows[:4], plain(source))
    assert in_memory.agreement.to_dict() == pytest.approx(written.agreement.to_dict(), rel=1e-5)
