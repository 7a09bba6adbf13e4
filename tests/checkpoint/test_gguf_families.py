"""GGUF files of every family that is imported, against transformers on tiny random models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from support import gguf_families, tiny_families
from support.gguf_families import (
    SHARED_FAMILIES,
    TWO,
    WINDOWS,
    Qtype,
    convert_family,
    round_like,
)
from support.gguf_files import raw_gguf
from support.mxfp4_files import write_gpt_oss
from support.tiny_families import COMMON, family_oracle, oracle_logits

from llmkit.checkpoint.gguf import open_gguf
from llmkit.checkpoint.gguf_architectures import ARCHITECTURES
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.errors import InputError
from llmkit.common.progress import SilentProgress
from llmkit.model.checkpoint_tensors import carried_tensors
from llmkit.model.families import checkpoint_spec
from llmkit.model.full_forward import window_logits
from llmkit.model.weight_loader import load_model
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_options import QuantizeOptions

TOKENS = torch.randint(3, COMMON["vocab_size"], (40,), generator=torch.Generator().manual_seed(7))
# Rows of FAMILIES, and what a GGUF file cannot say otherwise.
WINDOWS_OF_FOUR = ["sliding_attention", "full_attention"] * 2
FAMILIES: dict[str, dict[str, Any]] = SHARED_FAMILIES | {
    "gemma4": {},
    "phi3": TWO | {"original_max_position_embeddings": 128},
    "phi3-partial": TWO | {"original_max_position_embeddings": 128},
    "cohere2": {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
    "exaone4": WINDOWS,
    "ernie4.5-bias": TWO,
    "hunyuan": TWO,
    "olmoe": TWO,
    "lfm2-bias": {},
    "qwen3.5": {"attention_bias": False},
    "qwen3.5-moe": {},
    "qwen3-next": {"mlp_only_layers": [], "norm_topk_prob": True},
    "nemotron": TWO,
    "dots1": TWO | {"sliding_window": None},
    "exaone-moe": {"layer_types": WINDOWS_OF_FOUR},
}


def logits(path: Path) -> torch.Tensor:
    model = load_model(open_checkpoint(path), torch.float32)
    return next(window_logits(model, TOKENS[None]))


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_family_agrees_with_transformers(tmp_path: Path, family: str) -> None:
    oracle = family_oracle(family, tmp_path, **FAMILIES[family])
    found = logits(convert_family(tmp_path, tmp_path / "model.gguf"))
    torch.testing.assert_close(found, oracle_logits(oracle, TOKENS), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "qtype"),
    [
        ("gemma3", Qtype.F16),
        ("phi3", Qtype.Q8_0),
        ("qwen3-moe-normalized", Qtype.Q8_0),
    ],
)
def test_gguf_family_in_a_stored_type_agrees_with_transformers(
    tmp_path: Path, family: str, qtype: Qtype
) -> None:
    sizes = {"intermediate_size": 64, "moe_intermediate_size": 32}
    oracle = family_oracle(family, tmp_path, **(FAMILIES[family] | sizes))
    found = logits(convert_family(tmp_path, tmp_path / "model.gguf", qtype))
    round_like(oracle, qtype)
    torch.testing.assert_close(found, oracle_logits(oracle, TOKENS), atol=1e-4, rtol=0)


# transformers 5.23 limits the time steps of a Nemotron-H that it loads by another field.
@pytest.mark.parametrize("family", [name for name in FAMILIES if not name.startswith("nemotron")])
def test_gguf_family_loads_in_transformers(tmp_path: Path, family: str) -> None:
    """The config and tensors of a file are a checkpoint that transformers reads."""
    oracle = family_oracle(family, tmp_path, **FAMILIES[family])
    opened = open_checkpoint(convert_family(tmp_path, tmp_path / "model.gguf"))
    imported = tmp_path / "imported"
    imported.mkdir()
    (imported / "config.json").write_text(json.dumps(opened.config), encoding="utf-8")
    tensors = {name: opened.read(name) for name in opened.tensors}
    save_file(tensors, imported / "model.safetensors", {"format": "pt"})
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        imported, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    found = oracle_logits(model.eval(), TOKENS)
    torch.testing.assert_close(found, oracle_logits(oracle, TOKENS), atol=5e-5, rtol=0)


def test_gguf_families_are_all_tested() -> None:
    tested = {tiny_families.FAMILIES[family][0] for family in FAMILIES}
    assert {row.model_type for row in ARCHITECTURES.values()} - tested == {"qwen2", "qwen3"}


def test_gguf_families_are_all_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    section = page.split("## GGUF\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in row.split("|")[1].strip(" `").split("`, `")}
    assert listed == set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"feed_forward_length": [48] * 5}, "feed_forward_length is .* or 6 of them"),
        ({"feed_forward_length": [48, 96] * 3}, "feed_forward_length is .*twice as much"),
        ({"attention__head_count_kv": [2, 2, 1, 2, 2, 2]}, "head_count_kv is .*sliding_attention"),
        ({"attention__shared_kv_layers": 6}, "shared_kv_layers is 6. A number below 6"),
        ({"attention__value_length_swa": 8}, "value_length_swa is 8. 16 was expected"),
        ({"expert_count": 4}, "lacks gemma4.expert_used_count"),
    ],
)
def test_gguf_gemma4_refuses_layers_that_contradict_each_other(
    keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    family_oracle("gemma4", tmp_path)
    with pytest.raises(InputError, match=message):
        open_checkpoint(convert_family(tmp_path, tmp_path / "model.gguf", **keys))


def test_gguf_gemma4_needs_the_rotated_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family_oracle("gemma4", tmp_path)
    path = convert_family(tmp_path, tmp_path / "model.gguf", without=("rope_freqs.weight",))
    with pytest.raises(InputError, match=r"has no rope_freqs\.weight"):
        open_checkpoint(path)
    wrong = np.array([1.0, 2.0] + [1e30] * 14, np.float32)
    monkeypatch.setattr(gguf_families, "_rope_tensors", lambda _: [("rope_freqs.weight", wrong)])
    with pytest.raises(InputError, match=r"rope_freqs\.weight is not Gemma 4's\. 16 values"):
        open_checkpoint(convert_family(tmp_path, tmp_path / "model.gguf"))


def test_gguf_gpt_oss_stays_in_mxfp4(tmp_path: Path) -> None:
    """The experts' values are exactly those of MXFP4 blocks, so that quantizing loses nothing."""
    oracle = write_gpt_oss(tmp_path / "dense", tmp_path / "packed", swiglu_limit=7.0)
    path = convert_family(tmp_path / "dense", tmp_path / "model.gguf", experts_qtype=Qtype.MXFP4)
    opened = open_checkpoint(path)
    original = open_checkpoint(tmp_path / "packed")
    assert opened.quantization == original.quantization
    assert opened.tensors.keys() == original.tensors.keys()
    for name, expected in original.tensors.items():
        if expected.dtype == "U8":
            whole = original.read(name)
            if name.endswith("_blocks"):
                whole = without_negative_zeros(whole)
            found = opened.with_dtype("BF16").read(name)
            assert found.dtype == torch.uint8
            assert torch.equal(found, whole)
            assert torch.equal(opened.read_slice(name, [(2, 3), (1, 2)], 0), whole[[2, 1]])
    torch.testing.assert_close(logits(path), oracle_logits(oracle, TOKENS), atol=1e-4, rtol=0)


def without_negative_zeros(blocks: torch.Tensor) -> torch.Tensor:
    """The gguf package writes zeros without a sign."""
    low, high = blocks & 15, blocks >> 4
    return low.masked_fill(low == 8, 0) | high.masked_fill(high == 8, 0) << 4


def test_gguf_gpt_oss_in_mxfp4_can_be_dequantized(tmp_path: Path) -> None:
    write_gpt_oss(tmp_path / "dense", tmp_path / "packed", swiglu_limit=7.0)
    path = convert_family(tmp_path / "dense", tmp_path / "model.gguf", experts_qtype=Qtype.MXFP4)
    opened = open_checkpoint(path, dequantize_gguf=True)
    original = open_checkpoint(tmp_path / "dense")
    assert opened.quantization is None
    assert "quantization_config" not in opened.config
    assert opened.tensors.keys() == original.tensors.keys()
    for name in opened.tensors:
        assert torch.equal(opened.read(name), original.read(name)), name


def test_gguf_gpt_oss_in_mxfp4_is_cast_by_quantize(tmp_path: Path) -> None:
    write_gpt_oss(tmp_path / "dense", tmp_path / "packed", swiglu_limit=7.0, vocab_size=512)
    path = convert_family(tmp_path / "dense", tmp_path / "model.gguf", experts_qtype=Qtype.MXFP4)
    options = QuantizeOptions("bf16", evaluate=False, device="cpu")
    quantize(str(path), str(tmp_path / "out"), options, SilentProgress())
    written = open_checkpoint(tmp_path / "out")
    original = open_checkpoint(tmp_path / "dense")
    assert written.tensors.keys() == original.tensors.keys()
    for name in written.tensors:  # sinks stay float32
        found = written.read(name)
        assert found.dtype == (torch.float32 if name.endswith("sinks") else torch.bfloat16)
        assert torch.equal(found, original.read(name).to(found.dtype)), name


def test_gguf_gpt_oss_with_experts_of_two_types_is_dequantized(tmp_path: Path) -> None:
    write_gpt_oss(tmp_path / "dense", tmp_path / "packed", swiglu_limit=7.0)
    path = convert_family(tmp_path / "dense", tmp_path / "model.gguf", experts_qtype=Qtype.F16)
    assert open_checkpoint(path).quantization is None


def test_gguf_expert_tensors_are_read_by_rows(tmp_path: Path) -> None:
    family_oracle("gpt-oss", tmp_path, **FAMILIES["gpt-oss"])
    opened = open_checkpoint(convert_family(tmp_path, tmp_path / "model.gguf"))
    for part in ("gate_up_proj", "down_proj", "gate_up_proj_bias"):
        name = f"model.layers.1.mlp.experts.{part}"
        whole = opened.read(name)
        assert torch.equal(opened.read_slice(name, [(3, 4), (1, 2)], 0), whole[[3, 1]])
        assert torch.equal(opened.read_slice(name, [(2, 5)], 1), whole[:, 2:5])


def test_gguf_experts_in_one_tensor_have_no_blocks_of_their_own(tmp_path: Path) -> None:
    """Of a weight alone there are none: gate and up are stored together."""
    family_oracle("granite-moe-swa", tmp_path, **FAMILIES["granite-moe-swa"])
    model = open_gguf(convert_family(tmp_path, tmp_path / "model.gguf"))
    experts = "model.layers.1.block_sparse_moe.experts.0"
    assert len(model.blocks(f"{experts}.down_proj.weight"))
    with pytest.raises(InputError, match="gate and up of experts in one tensor"):
        model.blocks(f"{experts}.gate_proj.weight")


def test_gguf_apertus_has_the_numbers_of_xielu_in_its_metadata(tmp_path: Path) -> None:
    family_oracle("apertus", tmp_path, **FAMILIES["apertus"])
    path = convert_family(tmp_path, tmp_path / "model.gguf", xielu__beta=0.25)
    opened = open_checkpoint(path)
    original = open_checkpoint(tmp_path)
    names = [name for name in original.tensors if ".act_fn." in name]
    assert len(names) == 8
    for name in names:
        is_changed = name.endswith("beta")  # one number stands for all layers
        expected = torch.tensor(0.25) if is_changed else original.read(name)
        assert torch.equal(opened.read(name), expected), name
        assert opened.read(name).dtype == torch.float32
        info = opened.tensors[name]
        stored = np.frombuffer(opened.read_bytes(info, 0, info.nbytes), np.float32)
        assert stored.tolist() == [expected.item()]
        assert opened.read_slice(name, [(0, 1)], 0).tolist() == [expected.item()]


def test_gguf_apertus_without_rope_factors_has_none(tmp_path: Path) -> None:
    """The family's default is Llama 3's scaling."""
    rope = {"rope_type": "default", "rope_theta": 12e6}
    oracle = family_oracle("apertus", tmp_path, **(FAMILIES["apertus"] | {"rope_parameters": rope}))
    path = convert_family(tmp_path, tmp_path / "model.gguf")
    assert open_gguf(path).config["rope_parameters"] == rope
    torch.testing.assert_close(logits(path), oracle_logits(oracle, TOKENS), atol=1e-4, rtol=0)


def test_gguf_laguna_has_full_attention_first(tmp_path: Path) -> None:
    """Of each four layers, or of as many as a key says; a list says it of each layer."""
    family_oracle("laguna", tmp_path, **FAMILIES["laguna"])
    key = "attention__sliding_window_pattern"
    for pattern, expected in (
        (None, "FSSS"),
        (2, "FSFS"),
        (3, "FSSF"),
        ([True, False, True, True], "SFSS"),
    ):
        keys = {} if pattern is None else {key: pattern}
        config = open_gguf(convert_family(tmp_path, tmp_path / "a.gguf", **keys)).config
        assert "".join(name[0].upper() for name in config["layer_types"]) == expected
    without = ("attention.sliding_window",)
    config = open_gguf(convert_family(tmp_path, tmp_path / "b.gguf", without=without)).config
    assert config["layer_types"] == ["full_attention"] * 4
    assert "sliding_window" not in config


def test_gguf_laguna_without_keys_of_layers_with_windows_has_those_of_the_others(
    tmp_path: Path,
) -> None:
    family_oracle("laguna", tmp_path, **FAMILIES["laguna"])
    without = ("rope.freq_base_swa", "rope.dimension_count_swa")
    config = open_gguf(convert_family(tmp_path, tmp_path / "a.gguf", without=without)).config
    rope = {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}
    assert config["rope_parameters"]["sliding_attention"] == rope
    assert config["gating"] == "per-head"


def test_gguf_layer_that_predicts_tokens_is_carried(tmp_path: Path) -> None:
    """GLM-4.5's last layer has the tensors of a layer and those of the prediction."""
    oracle = family_oracle("glm4-moe", tmp_path, **FAMILIES["glm4-moe"])
    vector = np.arange(32, dtype=np.float32)
    extra = {
        f"model.layers.2.{module}.weight": vector
        for module in ("enorm", "hnorm", "shared_head.norm", "input_layernorm")
    }
    extra["model.layers.2.eh_proj.weight"] = np.ones((32, 64), np.float32)
    keys = {"block_count": 3, "nextn_predict_layers": 1}
    path = convert_family(tmp_path, tmp_path / "model.gguf", extra=extra, **keys)
    opened = open_checkpoint(path)
    assert opened.config["num_hidden_layers"] == 2
    assert carried_tensors(opened, checkpoint_spec(opened)).keys() == extra.keys()
    assert opened.read("model.layers.2.hnorm.weight").tolist() == vector.tolist()
    torch.testing.assert_close(logits(path), oracle_logits(oracle, TOKENS), atol=1e-4, rtol=0)
    for number in (3, 4, 1.5):
        keys = {"block_count": 3, "nextn_predict_layers": number}
        with pytest.raises(InputError, match="A number below 3 was expected, the block_count"):
            open_gguf(convert_family(tmp_path, tmp_path / "a.gguf", **keys))


# Models in several files


def test_gguf_in_several_files_is_the_same_model(tmp_path: Path) -> None:
    oracle = family_oracle("gpt-oss", tmp_path, **FAMILIES["gpt-oss"])
    convert_family(tmp_path, tmp_path / "model.gguf", tensors_per_file=15)
    files = sorted(path.name for path in tmp_path.glob("model-*.gguf"))
    assert files == [f"model-0000{index}-of-00003.gguf" for index in (1, 2, 3)]
    opened = open_checkpoint(tmp_path / files[0])
    assert sorted(opened.weight_files) == files
    assert opened.weight_bytes == sum((tmp_path / name).stat().st_size for name in files)
    found = logits(tmp_path / files[0])
    torch.testing.assert_close(found, oracle_logits(oracle, TOKENS), atol=1e-4, rtol=0)
    later = tmp_path / files[1]
    with pytest.raises(InputError, match=f"is part 2 of a model in 3 files.*Give .*{files[0]}"):
        open_checkpoint(later)
    content = later.read_bytes()
    later.unlink()
    with pytest.raises(InputError, match=f"needs {files[1]}, which is not beside it"):
        open_checkpoint(tmp_path / files[0])
    later.write_bytes((tmp_path / files[2]).read_bytes())
    with pytest.raises(InputError, match=r"has the tensor .*, which is in another file"):
        open_checkpoint(tmp_path / files[0])
    later.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=f"{files[1]}: "):
        open_checkpoint(tmp_path / files[0])
    later.write_bytes(raw_gguf({"general.architecture": "gpt-oss"}))
    with pytest.raises(InputError, match=r"have \d+ tensors. \d+ were expected, as its metadata"):
        open_checkpoint(tmp_path / files[0])
    renamed = (tmp_path / files[0]).rename(tmp_path / "other.gguf")
    with pytest.raises(
        InputError, match=r"A name that ends with -00001-of-00003.gguf was expected"
    ):
        open_checkpoint(renamed)


# Defaults for keys that files lack


def test_gguf_gemma_without_a_pattern_has_the_windows_of_its_family(tmp_path: Path) -> None:
    changes = {"num_hidden_layers": 7, "layer_types": ["full_attention"] * 7}
    expected = {"gemma2": "SFSFSFS", "gemma3": "SSSSSFS"}
    for family, pattern in expected.items():
        family_oracle(family, tmp_path, **changes)
        without = ("attention.sliding_window_pattern", "rope.freq_base_swa")
        config = open_gguf(convert_family(tmp_path, tmp_path / "a.gguf", without=without)).config
        assert "".join(name[0].upper() for name in config["layer_types"]) == pattern
    assert config["rope_parameters"]["sliding_attention"]["rope_theta"] == 10000.0
    without = ("attention.sliding_window", "attention.sliding_window_pattern")
    config = open_gguf(convert_family(tmp_path, tmp_path / "b.gguf", without=without)).config
    assert set(config["layer_types"]) == {"full_attention"}


@pytest.mark.parametrize(("family", "num_layers"), [("gemma2", 46), ("gemma3", 62)])
def test_gguf_gemma_27b_scales_queries_by_hidden_size_and_heads(
    tmp_path: Path, family: str, num_layers: int
) -> None:
    family_oracle(family, tmp_path, **FAMILIES[family])
    path = convert_family(
        tmp_path,
        tmp_path / "a.gguf",
        without=("attention.sliding_window_pattern",),
        block_count=num_layers,
    )
    assert open_gguf(path).config["query_pre_attn_scalar"] == 8
    path = convert_family(tmp_path, tmp_path / "b.gguf")
    assert open_gguf(path).config["query_pre_attn_scalar"] == 16


# Wrong input


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("granite", {"without": ("logit_scale",)}, "lacks granite.logit_scale in its metadata"),
        ("granite", {"residual_scale": 0.0}, "granite.residual_scale is 0.0. A positive number"),
        ("phi3", {"without": ("attention.sliding_window",)}, "lacks phi3.attention.sliding_window"),
        ("glm4", {"without": ("rope.dimension_count",)}, "lacks glm4.rope.dimension_count"),
        ("glm4", {"rope__dimension_count": 18}, "dimension_count is 18. An even number up to 16"),
        ("gemma2", {"without": ("attn_logit_softcapping",)}, "lacks gemma2.attn_logit_softcapping"),
        ("cohere2", {"attention__sliding_window_pattern": [True]}, "for each of 4 layers was exp"),
        ("cohere2", {"attention__sliding_window_pattern": 0}, "pattern is 0. A positive number"),
        (
            "starcoder2",
            {"without": ("attention.layer_norm_epsilon",)},
            "lacks starcoder2.attention",
        ),
        ("gpt-oss", {"without": ("rope.scaling.type",)}, "lacks gpt-oss.rope.scaling.type"),
        ("gpt-oss", {"rope__scaling__type": "linear"}, "type is linear. yarn was expected"),
        ("gpt-oss", {"expert_count": 5}, "expert_count is 5. 4 was expected, as blk.0.ffn_"),
        ("olmoe", {"without": ("expert_used_count",)}, "lacks olmoe.expert_used_count"),
        ("olmoe", {"expert_weights_norm": True}, "weights_norm is True. False was expected"),
        ("olmo2", {"rope__dimension_count": 4}, "rope.dimension_count is 4. 8 was expected"),
        ("llama-yarn", {"rope__scaling__yarn_ext_factor": 0.5}, "ext_factor is 0.5. 1.0 was exp"),
        ("phi3-longrope", {"rope__dimension_count": 4}, "short.weight has 4 values. 2 were exp"),
        ("lfm2", {"without": ("shortconv.l_cache",)}, "lacks lfm2.shortconv.l_cache"),
        ("lfm2", {"attention__head_count_kv": [0, 2, 1, 0]}, "4 numbers, 0 or the same one"),
        ("lfm2-moe", {"expert_gating_func": 1}, "expert_gating_func is 1. 2 was expected"),
        ("bamba", {"residual_scale": 0.5}, "residual_scale is 0.5. With it, embedding_scale was"),
        ("apertus", {"without": ("xielu.beta",)}, "model.gguf lacks xielu.beta in its metadata"),
        ("apertus", {"xielu__eps": [0.5] * 3}, r"xielu.eps is \[.*\]. 2 finite numbers were"),
        ("apertus", {"xielu__eps": [0.5, math.nan]}, r"xielu.eps is \[.*\]. 2 finite numbers"),
        ("laguna", {"without": ("attention.head_count",)}, "lacks laguna.attention.head_count"),
        ("laguna", {"attention__head_count": [4, 8]}, r"head_count is \[4, 8\]. .* or 4 of them"),
        ("laguna", {"attention__head_count": 8}, "blk.0.attn_gate.weight has 4 rows. 8 were expec"),
        ("laguna", {"attention__head_count_kv": [2] * 4}, r"head_count_kv is \[.*\]. A positive"),
        ("laguna", {"without": ("blk.1.attn_gate.weight",)}, "has no blk.1.attn_gate.weight"),
        (
            "laguna",
            {"extra": {"model.layers.1.self_attn.g_proj.weight": np.ones((128, 32))}},
            "has gates of heads in some layers and of features in others",
        ),
        ("laguna", {"expert_gating_func": 1}, "expert_gating_func is 1. 2 was expected"),
        ("laguna", {"expert_group_count": 2}, "expert_group_count is 2. 1 or 0 was expected"),
        ("laguna", {"expert_weights_norm": False}, "weights_norm is False. True was expected"),
        ("laguna", {"without": ("expert_weights_scale",)}, "lacks laguna.expert_weights_scale"),
        (
            "laguna",
            {"without": ("expert_shared_feed_forward_length",)},
            "lacks laguna.expert_shared_feed_forward_length",
        ),
        ("laguna", {"leading_dense_block_count": 5}, "block_count is 5. A number up to 4 was exp"),
        ("laguna", {"without": ("leading_dense_block_count",)}, "lacks laguna.leading_dense_block"),
        ("laguna", {"rope__dimension_count": 18}, "dimension_count is 18. An even number up to 16"),
        ("laguna", {"rope__dimension_count_swa": 7}, "count_swa is 7. An even number up to 16"),
        ("laguna", {"attention__key_length_swa": 8}, "key_length_swa is 8. 16 was expected"),
        ("laguna", {"attention__sliding_window_pattern": [True]}, "for each of 4 layers was exp"),
        ("laguna", {"attention__sliding_window_pattern": 0}, "pattern is 0. A positive number"),
        ("laguna", {"attention__layer_types": [0, 1, 1, 1]}, "layer_types is .* own converter"),
        ("laguna", {"rope__scaling__type": "longrope"}, "scales RoPE by longrope"),
        ("laguna", {"extra": {"rope_freqs.weight": np.ones(4)}}, "has rope_freqs.weight. RoPE"),
    ],
)
def test_gguf_family_refuses_metadata(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    family_oracle(family, tmp_path, **FAMILIES[family])
    path = convert_family(tmp_path, tmp_path / "model.gguf", **changes)
    with pytest.raises(InputError, match=message):
        open_gguf(path)


@pytest.mark.parametrize(
    ("dropped", "message"),
    [
        ("blk.1.ffn_up_exps.weight", "and blk.1.ffn_up_exps.weight has none. Equal shapes"),
        ("blk.1.ffn_gate_exps.bias", "has blk.1.ffn_up_exps.bias, but no blk.1.ffn_gate_exps.bias"),
    ],
)
def test_gguf_gpt_oss_needs_gate_and_up(tmp_path: Path, dropped: str, message: str) -> None:
    family_oracle("gpt-oss", tmp_path, **FAMILIES["gpt-oss"])
    path = convert_family(tmp_path, tmp_path / "model.gguf", without=(dropped,))
    with pytest.raises(InputError, match=message):
        open_gguf(path)


def test_gguf_phi3_needs_both_lists_of_rope_factors(tmp_path: Path) -> None:
    family_oracle("phi3-longrope", tmp_path, **FAMILIES["phi3-longrope"])
    for dropped in ("rope_factors_long.weight", "rope_factors_short.weight"):
        path = convert_family(tmp_path, tmp_path / "model.gguf", without=(dropped,))
        with pytest.raises(InputError, match=f"has no {dropped}"):
            open_gguf(path)
