"""`load` over several devices, and saving what is offloaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nn_reference import build, inputs, logits, tiny
from safetensors.torch import load_file
from torch.utils import backend_registration

import lowbit
from lowbit.errors import InputError
from lowbit.nn import QuantExperts, QuantLinear, load
from lowbit.nn.quantizer import LowbitQuantizer

SPREAD = {
    "llama": "int8", "qwen3-moe": "int8", "mixtral": "mxfp8", "deepseek-v3": "fp8", "llama4": "int8-weight-only",
}  # fmt: skip


@pytest.fixture(scope="module")
def spread(tmp_path_factory) -> dict[str, dict]:
    """What spread.py found of each. One process for all: importing transformers takes seconds."""
    folder = tmp_path_factory.mktemp("spread")
    for kind, scheme in SPREAD.items():
        build(kind).save_pretrained(folder / kind / "src")
        lowbit.convert(folder / kind / "src", folder / kind / "out", scheme)
    script = Path(__file__).with_name("spread.py")
    done = subprocess.run(
        [sys.executable, script, folder, *SPREAD], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict] = {}
    for line in done.stdout.splitlines():
        if line.startswith('{"'):
            found |= json.loads(line)
    return found


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices in Python",
)
@pytest.mark.parametrize("kind", SPREAD, ids=[f"{kind}-{scheme}" for kind, scheme in SPREAD.items()])
def test_spread_over_devices(kind, spread):
    """Hooks carry hidden states from one to the other, weights are fetched to where they are used, and it all saves."""
    found = spread[kind]
    assert "raised" not in found, found["raised"]
    lie_on = {"other:1": ["other:1"], "cpu": ["meta"], "disk": ["meta"]}  # offloaded: on meta between uses
    for second, of_second in found.items():
        what = dict(of_second)
        assert what.pop("lie on") == lie_on[second]
        both = ["other:0", "other:1"] if second == "other:1" or kind != "llama" else ["other:0"]
        assert what.pop("ran on") == both
        assert what == dict.fromkeys(what, True), (second, what)


SHARDED = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}


@pytest.mark.parametrize("kind", ["llama", "qwen3-moe", "llama4"])
@pytest.mark.parametrize("scheme", ["int8", "int8-weight-only", "fp8-block", "mxfp8"])
def test_what_is_offloaded_is_saved(tmp_path, kind, scheme):
    build(kind).save_pretrained(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", scheme, max_shard_size="100KB")
    where = {**SHARDED, "model.layers.0": "cpu", "model.layers.1": "disk"}
    model = load(tmp_path / "out", device_map=where, offload_folder=tmp_path / "offload")
    model.save_pretrained(tmp_path / "again", max_shard_size="100KB")
    assert lowbit.verify(tmp_path / "again").ok
    old, new = (
        {k: v for f in (tmp_path / d).glob("*.safetensors") for k, v in load_file(f).items()}
        for d in ("out", "again")
    )
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        assert tensor.dtype == new[name].dtype and torch.equal(
            tensor.contiguous().view(torch.uint8), new[name].contiguous().view(torch.uint8)
        )


def test_static_experts_are_offloaded(tmp_path):
    build("qwen3-moe").save_pretrained(tmp_path / "src")
    windows = list(torch.randint(3, 90, (4, 24), generator=torch.Generator().manual_seed(5)))
    lowbit.calibrate(tmp_path / "src", tmp_path / "calib", "fp8-static", data=windows)
    lowbit.convert(tmp_path / "src", tmp_path / "out", "fp8-static", calibration=tmp_path / "calib")
    batch = inputs("qwen3-moe")
    where = {**SHARDED, "model.layers.0": "cpu", "model.layers.1": "disk"}
    model = load(tmp_path / "out", device_map=where, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(model, batch), logits(load(tmp_path / "out"), batch))


def test_max_memory(tmp_path):
    """Codes count as bytes before a byte of them is read, so that a map fills a device and not half of it."""
    cls, config = tiny("llama")
    config.num_hidden_layers, config.tie_word_embeddings = 6, False
    torch.manual_seed(0)
    cls(config).to(torch.bfloat16).save_pretrained(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", "int8")
    whole = load(tmp_path / "out")
    size = sum(t.numel() * t.element_size() for t in (*whole.parameters(), *whole.buffers()))
    layer = sum(t.numel() * t.element_size() for t in whole.model.layers[0].state_dict().values())
    embedding = whole.model.embed_tokens.weight.numel() * 2
    # accelerate keeps room for the largest layer that it fetches.
    room = {"cpu": embedding + 4 * layer + 100}
    model = load(tmp_path / "out", device_map="auto", max_memory=room, offload_folder=tmp_path / "offload")
    on_disk = {n for n, place in model.hf_device_map.items() if place == "disk"}
    assert {f"model.layers.{i}" for i in (3, 4, 5)} <= on_disk
    assert not on_disk & {f"model.layers.{i}" for i in (0, 1, 2)}
    batch = inputs("llama")
    assert torch.equal(logits(model, batch), logits(whole, batch))
    room = {"cpu": size + layer}
    assert set(load(tmp_path / "out", device_map="auto", max_memory=room).state_dict()) == set(
        whole.state_dict()
    )
    with pytest.raises(InputError, match="device_map='auto' with max_memory"):
        load(tmp_path / "out", max_memory=room)
    with pytest.raises(InputError, match=r"found it for \[64\]; leave"):
        load(tmp_path / "out", device_map="auto", max_memory={64: "1GiB", "cpu": "1GiB"})


@pytest.mark.parametrize("kind", ["llama", "qwen3-moe", "llama4"])
@pytest.mark.parametrize("scheme", ["int8", "int8-weight-only"])
def test_sizes_on_meta_are_those_of_the_loaded_model(tmp_path, monkeypatch, kind, scheme):
    from accelerate import infer_auto_device_map
    from accelerate.utils import compute_module_sizes
    from transformers.integrations.accelerate import compute_module_sizes as sizes_of_transformers

    build(kind).to(torch.bfloat16).save_pretrained(tmp_path / "src")
    lowbit.convert(tmp_path / "src", tmp_path / "out", scheme)
    before = LowbitQuantizer._process_model_before_weight_loading
    seen = {}

    def watched(self, model, **kwargs):
        before(self, model, **kwargs)
        assert all(t.is_meta for m in model.modules() if isinstance(m, QuantLinear) for t in m.buffers())
        model.tie_weights()
        seen["accelerate"] = compute_module_sizes(model)
        seen["transformers"] = sizes_of_transformers(model, self)[0]
        layer = type(model.model.layers[0]).__name__
        limit = {"cpu": seen["accelerate"][""] + 2 * seen["accelerate"]["model.layers.1"], "disk": 10**9}
        seen["map"] = infer_auto_device_map(model, max_memory=limit, no_split_module_classes=[layer])

    monkeypatch.setattr(LowbitQuantizer, "_process_model_before_weight_loading", watched)
    model = load(tmp_path / "out")
    assert dict(seen["map"]) == {"": "cpu"}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear | QuantExperts):
            stored = sum(t.numel() * t.element_size() for t in module.buffers())
            assert seen["accelerate"][name] == seen["transformers"][name] == stored > 0
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    assert seen["transformers"][""] == sum(t.numel() * t.element_size() for t in tensors)
