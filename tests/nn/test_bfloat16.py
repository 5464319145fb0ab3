"""Weights that stay in bfloat16 while a model computes in float32."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
import transformers
from nn_reference import dequantized, inputs, logits, tiny
from safetensors.torch import load_file
from torch import nn

import lowbit
from lowbit.nn import QuantLinear, float_activations, load
from lowbit.nn.bfloat16 import BFloat16Embedding, BFloat16Linear
from lowbit.nn.speed import dequantized_copy, weight_bytes


def converted(kind: str, path, *, tie: bool = False, **options):
    cls, config = tiny(kind)
    config.tie_word_embeddings = tie
    torch.manual_seed(0)
    cls(config).bfloat16().save_pretrained(path / "src")
    lowbit.convert(path / "src", path / "out", scheme="int8", **options)
    return path / "out"


@pytest.mark.parametrize("tie", [False, True])
def test_embedding_and_head_stay_bfloat16(tie, tmp_path):
    out = converted("llama", tmp_path, tie=tie)
    model = load(out, dtype=torch.float32)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, BFloat16Embedding) and isinstance(head, BFloat16Linear)
    assert embedding.weight.dtype == head.weight.dtype == torch.bfloat16
    assert (head.weight.data_ptr() == embedding.weight.data_ptr()) == tie
    assert model.dtype == torch.float32
    assert not any(isinstance(p, nn.Parameter) for p in (embedding.weight, head.weight))
    plain = load(out)  # computes in bfloat16: torch's own modules
    assert type(plain.get_input_embeddings()) is nn.Embedding
    names = {n for f in out.glob("*.safetensors") for n in load_file(f)}
    assert set(model.state_dict()) - {"lm_head.weight"} == names - {"lm_head.weight"}


@pytest.mark.parametrize("tie", [False, True])
def test_logits_are_those_of_the_widened_model(tie, tmp_path):
    out = converted("llama", tmp_path, tie=tie)
    model, batch = load(out, dtype=torch.float32), inputs("llama")
    plain = dequantized_copy(model, torch.float32)
    assert not any(isinstance(m, QuantLinear | BFloat16Linear | BFloat16Embedding) for m in plain.modules())
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tie
    with float_activations(model):
        assert torch.equal(logits(model, batch), logits(plain, batch))
    # Sums of the head in another order; activations are quantized alike in both.
    head = model.lm_head
    model.lm_head = head.to_linear()
    widened = logits(model, batch)
    model.lm_head = head
    torch.testing.assert_close(logits(model, batch), widened, rtol=1e-5, atol=1e-5)


def test_linears_left_in_float_stay_bfloat16(tmp_path):
    out = converted("qwen3-moe", tmp_path, ignore=["*.o_proj"])
    model = load(out, dtype=torch.float32)
    assert isinstance(model.model.layers[0].self_attn.o_proj, BFloat16Linear)
    routers = [m for n, m in model.named_modules() if n.endswith("mlp.gate")]
    assert routers and all(m.weight.dtype == torch.float32 for m in routers)


@pytest.mark.parametrize(
    "kind", ["qwen3-moe", "mixtral", "deepseek-v3", "gemma", "phi", "bert", "vision-language"]
)
def test_architectures(kind, tmp_path):
    """Scaled embeddings, heads with a bias, untied and tied, vision towers: logits of the widened checkpoint."""
    out = converted(kind, tmp_path, tie=kind == "gemma")
    model, batch = load(out, dtype=torch.float32), inputs(kind)
    want = tiny(kind)[0].from_pretrained(dequantized(out, tmp_path / "float"), dtype=torch.float32).eval()
    with float_activations(model):
        torch.testing.assert_close(logits(model, batch), logits(want, batch), rtol=1e-5, atol=1e-5)
    kept = {n for n, m in model.named_modules() if isinstance(m, BFloat16Linear | BFloat16Embedding)}
    assert not any("vision" in name for name in kept)
    assert kept
    if kind == "gemma":  # its rows are scaled
        assert torch.equal(logits(dequantized_copy(model, torch.float32), batch), logits(want, batch))


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_a_head_whose_dtype_is_asked_for_is_widened(kind, tie, tmp_path):
    """`self.lm_head(hidden_states.to(self.lm_head.weight.dtype))`: logits came out in bfloat16's eight bits."""
    sizes = {
        "vocab_size": 96,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "state_size": 8,
        "tie_word_embeddings": tie,
    }
    torch.manual_seed(0)
    if kind == "mamba":
        model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))
    else:
        model = transformers.Mamba2ForCausalLM(
            transformers.Mamba2Config(**sizes, num_heads=8, head_dim=16, n_groups=1)
        )
    model.bfloat16().save_pretrained(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", scheme="int8")
    loaded, batch = load(tmp_path / "out", dtype=torch.float32), {"input_ids": torch.arange(2, 11)[None]}
    want = type(model).from_pretrained(dequantized(tmp_path / "out", tmp_path / "float"), dtype=torch.float32)
    with float_activations(loaded):
        torch.testing.assert_close(logits(loaded, batch), logits(want.eval(), batch), rtol=1e-5, atol=1e-5)


def test_moves_and_casts_leave_the_table_alone(tmp_path):
    model = load(converted("llama", tmp_path), dtype=torch.float32)
    ids = torch.tensor([[1, 2]])
    embedding = model.get_input_embeddings()
    want = embedding(ids)
    assert want.dtype == torch.float32
    casts = ((model.half, torch.float16), (model.bfloat16, torch.bfloat16), (model.float, torch.float32))
    for cast, dtype in casts:
        cast()
        assert embedding.weight.dtype == model.lm_head.weight.dtype == torch.bfloat16
        assert embedding(ids).dtype == dtype and torch.equal(embedding(ids), want.to(dtype))
        assert model(ids).logits.dtype == dtype
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids).logits, model(ids).logits)
    with pytest.raises(TypeError, match="stay frozen"):
        embedding.requires_grad_(True)


@pytest.mark.parametrize("tie", [False, True])
def test_saved_again_as_it_was(tie, tmp_path):
    out = converted("llama", tmp_path, tie=tie)
    load(out, dtype=torch.float32).save_pretrained(tmp_path / "again")
    before, after = (load_file(p / "model.safetensors") for p in (out, tmp_path / "again"))
    assert before.keys() == after.keys()
    for name in ("model.embed_tokens.weight", *(() if tie else ("lm_head.weight",))):
        assert torch.equal(before[name], after[name])
    assert lowbit.verify(tmp_path / "again").ok
    assert json.loads((tmp_path / "again" / "config.json").read_text())["tie_word_embeddings"] == tie


def test_embedding_on_disk_with_its_tied_head_is_left_to_transformers(tmp_path):
    """Both on disk though the config ties them: transformers compares them, as parameters."""
    out = converted("llama", tmp_path)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    model = load(out, dtype=torch.float32)
    assert type(model.lm_head) is nn.Linear and type(model.get_input_embeddings()) is nn.Embedding


def test_compiles_whole(tmp_path):
    model = load(converted("llama", tmp_path), dtype=torch.float32)
    x = torch.randn(3, model.config.hidden_size)
    head = torch.compile(model.lm_head, fullgraph=True, backend="aot_eager")
    assert torch.equal(head(x), model.lm_head(x))


def test_takes_less_memory(tmp_path):
    model = load(converted("llama", tmp_path), dtype=torch.float32)
    table = model.get_input_embeddings().weight.numel()
    assert weight_bytes(dequantized_copy(model, torch.float32)) > weight_bytes(model) + 4 * table


def test_dequantized_by_transformers(tmp_path):
    out = converted("llama", tmp_path)
    reference = dequantized(out, tmp_path / "float")
    mine = load(out, dtype=torch.float32)
    want = type(mine).from_pretrained(reference, dtype=torch.float32)
    mine.hf_quantizer._dequantize(mine)
    assert torch.equal(logits(mine, inputs("llama")), logits(want, inputs("llama")))


def test_heads_whose_bias_two_modules_share(tmp_path):
    """BERT's: transformers ties parameters, and found none."""
    config = tiny("bert")[1]
    transformers.BertForMaskedLM(config).bfloat16().save_pretrained(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", scheme="int8")
    model = load(tmp_path / "out", dtype=torch.float32)
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias
    assert logits(model, inputs("bert")).isfinite().all()


@pytest.mark.parametrize("tie", [False, True])
def test_models_without_any_other_parameter(tie, tmp_path):
    """OLMo's norms have no weight, and transformers asks the first parameter for its device."""
    llama = tiny("llama")[1].to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = transformers.OlmoConfig(**{n: llama[n] for n in names}, tie_word_embeddings=tie, pad_token_id=0)
    transformers.OlmoForCausalLM(config).bfloat16().save_pretrained(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", scheme="int8")
    model = load(tmp_path / "out", dtype=torch.float32)
    assert model.device.type == "cpu" and model.dtype == torch.float32
    assert isinstance(model.lm_head, nn.Linear if tie else BFloat16Linear)
    assert model.generate(torch.tensor([[3, 4]]), max_new_tokens=2, do_sample=False).shape == (1, 4)
