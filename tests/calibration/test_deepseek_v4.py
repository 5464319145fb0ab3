"""DeepSeek-V4 as it is published, experts in FP4 and the rest in block FP8, calibrated layer by layer."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sample_models import fp4
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

import lowbit

CONFIG = {
    "vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 128, "moe_intermediate_size": 128, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "q_lora_rank": 128, "o_lora_rank": 64, "o_groups": 2, "qk_rope_head_dim": 16,
    "index_head_dim": 32, "index_n_heads": 4, "index_topk": 4, "sliding_window": 16,
    "layer_types": ["sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention"],
    "mlp_layer_types": ["hash_moe", "moe", "moe"],
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
}  # fmt: skip
EXPERT = re.compile(r"experts\.\d+\.w[123]\.weight$")


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("v4")
    torch.manual_seed(0)
    DeepseekV4ForCausalLM(DeepseekV4Config(**CONFIG)).to(torch.bfloat16).save_pretrained(root / "bf16")
    lowbit.convert(root / "bf16", root / "fp4", "fp8-block", format="fp8")
    before, after = (load_file(root / name / "model.safetensors") for name in ("bf16", "fp4"))
    for name in filter(EXPERT.search, before):
        after.pop(f"{name}_scale_inv")
        after[name], after[name.replace("weight", "scale")], _ = fp4(before[name].float())
    save_file(after, root / "fp4" / "model.safetensors", metadata={"format": "pt"})
    (root / "fp4" / "lowbit_manifest.json").unlink()
    config = json.loads((root / "fp4" / "config.json").read_text())
    config["expert_dtype"] = "fp4"
    (root / "fp4" / "config.json").write_text(json.dumps(config))
    return root / "fp4"


@pytest.fixture(scope="module")
def windows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 250, (96,), generator=generator) for _ in range(12)]


def test_layer_by_layer_is_what_transformers_makes_of_the_dequantized_model(published, windows, tmp_path):
    lowbit.convert(published, tmp_path / "bf16", "bf16")
    model = DeepseekV4ForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.stack(windows)).logits
    wanted = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), torch.stack(windows)[:, 1:].flatten(), reduction="sum"
    )
    assert lowbit.measure(tmp_path / "bf16", data=windows).agreement.nll == pytest.approx(
        float(wanted), rel=1e-5
    )
    # Block FP8 with its scales is not bfloat16.
    assert lowbit.measure(published, data=windows).agreement.nll == pytest.approx(float(wanted), rel=1e-3)


@pytest.mark.parametrize("method", ["absmax", "gptq"])
def test_what_engines_join_has_one_scale_under_other_names_than_transformers(
    published, windows, tmp_path, method
):
    """wq_a and wkv are q_a_proj and kv_proj there. What is written is what the calibration is."""
    lowbit.convert(published, tmp_path / "bf16", "bf16")
    given = {"calibration": tmp_path / "calibration"}
    lowbit.calibrate(tmp_path / "bf16", given["calibration"], "fp8-static", method=method, data=windows[:8])
    lowbit.convert(tmp_path / "bf16", tmp_path / "out", "fp8-static", **given)
    written = load_file(tmp_path / "out" / "model.safetensors")
    for index in range(3):
        a, b = (written[f"model.layers.{index}.attn.{n}.weight_scale"] for n in ("wq_a", "wkv"))
        assert torch.equal(a, b)
    out = lowbit.measure(tmp_path / "out", reference=tmp_path / "bf16", data=windows[8:]).to_dict()
    overlaid = lowbit.measure(tmp_path / "bf16", data=windows[8:], **given).to_dict()
    assert overlaid["layer_errors"] == pytest.approx(out["layer_errors"], rel=1e-4)


@pytest.mark.parametrize(
    ("scheme", "method"), [("int8", "best"), ("fp8-block", "gptq"), ("int8-static", "gptq")]
)
def test_calibrated_and_converted_without_a_copy_in_between(published, windows, tmp_path, scheme, method):
    lowbit.calibrate(published, tmp_path / "calibration", scheme, method=method, data=windows[:8])
    lowbit.convert(published, tmp_path / "out", scheme, calibration=tmp_path / "calibration")
    assert lowbit.verify(tmp_path / "out", source=published).ok
    report = lowbit.measure(tmp_path / "out", reference=published, data=windows[8:])
    assert set(report.layer_errors) == {f"model.layers.{i}" for i in range(3)}
    assert max(report.layer_errors.values()) < 0.2
