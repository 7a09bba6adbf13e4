"""`quantize --format gguf`: files that the reader, and the gguf package, read back."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import save_file
from support.gguf_exports import FAMILIES, LLAMA3, TINY_VOCAB, export, family
from support.gguf_families import family_metadata
from support.tiny_families import FAMILIES as ALL_FAMILIES
from support.tiny_models import CHAT_TEMPLATE, tiny_checkpoint, write_tokenizer
from tokenizers import Regex, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from llmkit.checkpoint.gguf_architectures import ARCHITECTURES, VARIANTS
from llmkit.checkpoint.gguf_header import read_gguf_header
from llmkit.checkpoint.gguf_tokenizer import PRE_TOKENIZERS, pre_tokenizer
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.common.errors import InputError, UsageError
from llmkit.common.progress import SilentProgress
from llmkit.model.families import checkpoint_spec
from llmkit.quant.gguf_parameter_writer import GgufParameterWriter
from llmkit.quant.number_formats import NUMBER_FORMATS
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_options import QuantizeOptions


@pytest.mark.parametrize("name", FAMILIES)
def test_gguf_export_is_read_back_as_the_same_model(name: str, tmp_path: Path) -> None:
    source = family(name, tmp_path / "source")
    found = open_checkpoint(export(tmp_path / "source", tmp_path / "out"))
    assert checkpoint_spec(found).layers == checkpoint_spec(source).layers
    # Newer checkpoints of Nemotron-H have another name for all layers.
    prefix = "model." if name.startswith("nemotron") else "backbone."
    expected = {
        tensor.replace("backbone.", prefix): source.read(tensor) for tensor in source.tensors
    }
    assert found.tensors.keys() == expected.keys()
    for tensor, values in expected.items():
        # Matrices are in bfloat16, vectors and small matrices in float32.
        stored = found.read(tensor)
        is_rounded = stored.equal(values.bfloat16().float())
        error = 5e-7 if tensor.endswith("A_log") else 2e-7  # of the logarithm of an exponential
        is_exact = stored.equal(values) or torch.allclose(stored, values, rtol=0, atol=error)
        assert is_rounded or is_exact, tensor
        assert is_exact or values.ndim > 1, tensor
    text = "hello world, 123 quick foxes!\n  <|im_start|>"
    tokenizer = load_tokenizer(source)
    assert load_tokenizer(found).encode(text) == tokenizer.encode(text)


def test_gguf_export_covers_every_family_of_the_reader() -> None:
    written = {ALL_FAMILIES[name][0] for name in FAMILIES}
    rows = [*ARCHITECTURES.values()]
    rows += [row for variants in VARIANTS.values() for row in variants.values()]
    assert {row.model_type for row in rows} <= written


TWO_BASES = {
    name: {"rope_type": "default", "rope_theta": theta}
    for name, theta in (("full_attention", 5e5), ("sliding_attention", 1e4))
}


LINEAR = {"rope_type": "linear", "factor": 2.0}


def laguna_rope(kind: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Other parameters of RoPE in one kind of layers."""
    parameters = FAMILIES["laguna"]["rope_parameters"]
    return {"rope_parameters": parameters | {kind: parameters[kind] | changes}}


def rope_of(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """A family's RoPE with other parameters."""
    return {"rope_parameters": ALL_FAMILIES[name][1]["rope_parameters"] | changes}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("helium", {}, r"is a HeliumForCausalLM \(helium\), which is not written as GGUF"),
        ("mistral", {"sliding_window": 12}, "llama.attention.sliding_window is 12"),
        ("gemma2", {"query_pre_attn_scalar": 24}, "gemma2 does not hold attention_scale"),
        ("gpt-oss", {"swiglu_limit": 0.7}, "gpt-oss does not hold swiglu_limit"),
        (
            "llama3-rope",
            {"rope_parameters": ALL_FAMILIES["llama3-rope"][1]["rope_parameters"]},
            "rope_freqs.weight is not Llama 3's scaling",
        ),
        ("cohere-qk-norm", {}, "tensors that a GGUF file of its family has no place for"),
        ("qwen3.5", {"linear_value_head_dim": 16}, "value heads of 16 beside key heads of 8"),
        ("qwen3.5", {"attention_bias": True}, "the tensor blk.2.attn_output.bias"),
        ("deepseek-v2", {}, "deepseek2 does not hold num_groups"),
        ("glm4-moe-lite", {"attention_bias": True}, "deepseek2 does not hold qkv_bias"),
        ("mamba2-tied", {}, "mamba2 does not hold .*recurrent|does not hold time_step_limit"),
        (
            "dots1",
            {"sliding_window": 12, "num_hidden_layers": 4},
            "dots1.attention.sliding_window is 12",
        ),
        ("glm", {"head_dim": 16}, "chatglm does not support 4 heads of 16 in 32"),
        ("lfm2-bias", {}, "llama.cpp's lfm2 does not support the tensor .*shortconv"),
        ("ernie4.5-bias", {}, "ernie4_5 does not support the tensor blk.0.ffn_"),
        ("hunyuan", {"attention_bias": True}, "does not support the tensor blk.0.attn_output.bias"),
        ("olmoe", {"num_key_value_heads": 2}, "olmoe does not support 2 KV heads of 4"),
        ("phi3-partial", {}, "phi3 does not support 4 heads of 16 in 32"),
        ("exaone4", {}, "exaone4 does not support windows of 12 tokens in 4 layers"),
        ("mellum", {"tie_word_embeddings": True}, "mellum does not support a tied LM head"),
        (
            "mellum",
            {"rope_parameters": TWO_BASES},
            "mellum does not support another RoPE base of layers with windows",
        ),
        ("jais2", {"mlp_bias": False}, "jais2 does not hold mlp_bias"),
        ("apertus", {"tie_word_embeddings": True}, "apertus does not support a tied LM head"),
        ("laguna", {"moe_router_logit_softcapping": 3.0}, "laguna does not hold router_logit_so"),
        ("laguna", {"attention_bias": True}, "does not support the tensor blk.0.attn_output.bias"),
        (
            "laguna",
            {"mlp_layer_types": ["dense", "sparse", "dense", "sparse"]},
            "laguna does not hold is_moe",
        ),
        (
            "laguna",
            {"layer_types": ["sliding_attention", "full_attention"] * 2},
            "laguna does not support a window in layer 0 and RoPE of other dimensions in layers wi",
        ),
        ("laguna", laguna_rope("sliding_attention", LINEAR), "laguna does not hold ropes"),
        ("laguna", laguna_rope("full_attention", LLAMA3), "GGUF has rope_freqs.weight. RoPE with"),
        (
            "deepseek-v3",
            rope_of("deepseek-v3", {"attention_factor": 0.7}),
            "deepseek2 does not support the attention_factor 0.7 of YaRN in latent attention",
        ),
        (
            "mistral4",
            rope_of("mistral4", {"mscale": 0.5, "mscale_all_dim": 0.5}),
            "mistral4 does not support YaRN with mscale_all_dim 0.5 in latent attention",
        ),
        (
            "bamba",
            {"mamba_expand": 4},
            "granitehybrid does not support Mamba 2 layers of 128 features in 32",
        ),
    ],
)
def test_gguf_export_refuses_models_that_a_file_cannot_hold(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    family(name, tmp_path / "source", **changes)
    with pytest.raises(InputError, match=message):
        export(tmp_path / "source", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama-yarn", rope_of("llama-yarn", {"attention_factor": 0.7})),
        ("laguna", laguna_rope("full_attention", {"attention_factor": 0.7})),
        ("ministral3", rope_of("ministral3", {"mscale": 0.5})),
    ],
)
def test_gguf_export_has_the_attention_factor_of_yarn(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """llama.cpp multiplies what follows from the factor by a key of its own."""
    source = family(name, tmp_path / "source", **changes)
    path = export(tmp_path / "source", tmp_path / "out")
    values, _ = read_gguf_header(path)
    prefix = f"{values['general.architecture']}.rope.scaling"
    factor = values[f"{prefix}.factor"]
    multiplier = values.get(f"{prefix}.yarn_log_multiplier", 0.0)
    computed = (1 + 0.1 * math.log(factor)) / (1 + 0.1 * multiplier * math.log(factor))
    specs = [checkpoint_spec(each) for each in (source, open_checkpoint(path))]
    ropes = [spec.ropes.get("full_attention") or next(iter(spec.ropes.values())) for spec in specs]
    expected, found = (rope.attention_scaling for rope in ropes)
    assert values[f"{prefix}.attn_factor"] * computed == pytest.approx(expected, rel=1e-6)
    assert found == pytest.approx(expected, rel=1e-6)


def test_gguf_export_of_granite_without_mamba_is_that_of_granite(tmp_path: Path) -> None:
    """Granite 4.0's models of attention alone are Granite with other names."""
    changes = {"layer_types": ["full_attention"] * 4, "position_embedding_type": "rope"}
    source = family("granite-hybrid", tmp_path / "source", **changes)
    found = open_checkpoint(export(tmp_path / "source", tmp_path / "out"))
    assert found.config["model_type"] == "granite"
    gate_up = source.read("model.layers.1.shared_mlp.input_linear.weight")
    for part, values in zip(("gate", "up"), gate_up.chunk(2), strict=True):
        stored = found.read(f"model.layers.1.mlp.{part}_proj.weight")
        assert torch.equal(stored, values.bfloat16().float())


def test_gguf_export_of_bamba_moves_the_rows_that_rotate(tmp_path: Path) -> None:
    """Half of each head: llama.cpp rotates neighbours among them."""
    source = family("bamba", tmp_path / "source")
    path = export(tmp_path / "source", tmp_path / "out", "fp16")
    fields = gguf.GGUFReader(path).fields
    assert fields["granitehybrid.rope.dimension_count"].contents() == 4
    assert fields["granitehybrid.rope.rotated_rows_interleaved"].contents() is True
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    heads = source.read("model.layers.1.self_attn.k_proj.weight").half().unflatten(0, (2, 8))
    stored = torch.from_numpy(tensors["blk.1.attn_k.weight"].copy()).unflatten(0, (2, 8))
    assert torch.equal(stored, heads[:, [0, 2, 1, 3, 4, 5, 6, 7]])


def test_gguf_export_of_apertus_has_the_numbers_of_xielu_in_the_metadata(tmp_path: Path) -> None:
    source = family("apertus", tmp_path / "source")
    reader = gguf.GGUFReader(export(tmp_path / "source", tmp_path / "out"))
    for key in ("alpha_p", "alpha_n", "beta", "eps"):
        names = [f"model.layers.{layer}.mlp.act_fn.{key}" for layer in range(2)]
        expected = [source.read(name).item() for name in names]
        assert reader.fields[f"xielu.{key}"].contents() == expected
    assert not [tensor.name for tensor in reader.tensors if "act_fn" in tensor.name]
    assert len(reader.tensors) == len(source.tensors) - 8 + 1  # with the factors of RoPE


def test_gguf_export_of_laguna_has_the_keys_of_the_converter(tmp_path: Path) -> None:
    family("laguna", tmp_path / "source")
    values, tensors = read_gguf_header(export(tmp_path / "source", tmp_path / "out"))
    config = json.loads((tmp_path / "source" / "config.json").read_text(encoding="utf-8"))
    expected = family_metadata(config)
    # The period of layers without a window, and the number of shared experts, are said too.
    expected |= {"attention.sliding_window_pattern": 4, "expert_shared_count": 1}
    expected |= {"vocab_size": TINY_VOCAB}
    found = {
        key.removeprefix("laguna."): value
        for key, value in values.items()
        if key.startswith("laguna.")
    }
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value), key
    assert tensors["blk.1.attn_gate.weight"].shape == (8, 32)
    assert "blk.1.exp_probs_b.bias" in tensors


@pytest.mark.parametrize(
    ("layers", "pattern"),
    [
        ("FSFS", 2),
        ("FSSF", 3),
        ("SFSF", [True, False, True, False]),
        ("SSSS", [True] * 4),
    ],
)
def test_gguf_export_of_laguna_has_the_period_of_its_layers(
    layers: str, pattern: int | list[bool], tmp_path: Path
) -> None:
    """Or a list, where the layers without a window have no period that begins with one."""
    names = {"F": "full_attention", "S": "sliding_attention"}
    layer_types = [names[layer] for layer in layers]
    rope = laguna_rope("sliding_attention", {"partial_rotary_factor": 0.5})
    source = family("laguna", tmp_path / "source", layer_types=layer_types, **rope)
    path = export(tmp_path / "source", tmp_path / "out")
    values, _ = read_gguf_header(path)
    assert values["laguna.attention.sliding_window_pattern"] == pattern
    assert checkpoint_spec(open_checkpoint(path)).layers == checkpoint_spec(source).layers


def test_gguf_export_of_laguna_has_the_ropes_that_config_json_does_not_say(tmp_path: Path) -> None:
    source = family("laguna", tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text(encoding="utf-8"))
    del config["rope_parameters"]
    config["num_attention_heads"] = 16  # each layer has a number of its own
    (tmp_path / "source" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    source = open_checkpoint(tmp_path / "source")
    path = export(tmp_path / "source", tmp_path / "out")
    values, _ = read_gguf_header(path)
    assert values["laguna.rope.freq_base"] == 5e5
    assert values["laguna.rope.freq_base_swa"] == 1e4
    assert values["laguna.rope.dimension_count"] == 8
    assert values["laguna.rope.dimension_count_swa"] == 16
    assert checkpoint_spec(open_checkpoint(path)).ropes == checkpoint_spec(source).ropes


def test_gguf_export_finds_the_pre_tokenizer_of_laguna(tmp_path: Path) -> None:
    """Its checkpoints have line breaks merged with the text after them."""
    family("laguna", tmp_path / "source")
    path = tmp_path / "source" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.pre_tokenizer = Sequence(
        [
            Split(Regex(r"(?:\r?\n)+(?!\r?\n)"), "merged_with_next"),
            Split(
                Regex(
                    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
                "isolated",
            ),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.save(str(path))
    file = export(tmp_path / "source", tmp_path / "out")
    values, _ = read_gguf_header(file)
    assert values["tokenizer.ggml.pre"] == "laguna"
    words = pre_tokenizer(PRE_TOKENIZERS["laguna"])
    breaks = ("", " ", "\n", "\r", "\r\n", "a", "1", ";", "\t")
    for text in map("".join, itertools.product(breaks, repeat=4)):
        expected = tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert words.pre_tokenize_str(text) == expected, repr(text)


def copied_layer(
    tensors: dict[str, torch.Tensor], prefix: str, new_prefix: str
) -> dict[str, torch.Tensor]:
    """Copies of a layer's tensors under other names."""
    return {
        name.replace(prefix, new_prefix): values.clone()
        for name, values in tensors.items()
        if name.startswith(prefix)
    }


def test_gguf_export_of_an_mtp_head_is_a_layer_after_the_last_one(tmp_path: Path) -> None:
    """Qwen3.5's head is beside the layers in a checkpoint."""
    source = family("qwen3.5", tmp_path / "source")
    tensors = {name: source.read(name) for name in source.tensors}
    head = copied_layer(tensors, "model.layers.2.", "mtp.layers.0.")
    norms = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
    head |= {f"mtp.{name}.weight": torch.randn(32) for name in norms}
    head["mtp.fc.weight"] = torch.randn(32, 64)
    save_file(tensors | head, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    path = export(tmp_path / "source", tmp_path / "out")
    values, stored = read_gguf_header(path)
    assert values["qwen35.block_count"] == 5
    assert values["qwen35.nextn_predict_layers"] == 1
    assert "blk.4.nextn.shared_head_norm.weight" in stored
    found = open_checkpoint(path)
    assert found.config["num_hidden_layers"] == 4
    for name, other in (
        ("mtp.fc.weight", "eh_proj.weight"),
        ("mtp.norm.weight", "shared_head.norm.weight"),
        ("mtp.layers.0.self_attn.q_proj.weight", "self_attn.q_proj.weight"),
    ):
        values = found.read(f"model.layers.4.{other}")
        torch.testing.assert_close(values, head[name], atol=1e-2, rtol=4e-3)


def test_gguf_export_of_hy3_has_the_layer_that_predicts(tmp_path: Path) -> None:
    """Its last norm has another name than DeepSeek's, and is the same tensor of a file."""
    source = family("hy3", tmp_path / "source", num_nextn_predict_layers=1)
    tensors = {name: source.read(name) for name in source.tensors}
    head = copied_layer(tensors, "model.layers.1.", "model.layers.2.")
    for norm in ("enorm", "hnorm", "final_layernorm"):
        head[f"model.layers.2.{norm}.weight"] = torch.randn(32)
    head["model.layers.2.eh_proj.weight"] = torch.randn(32, 64)
    save_file(tensors | head, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    path = export(tmp_path / "source", tmp_path / "out")
    values, stored = read_gguf_header(path)
    assert values["hy_v3.block_count"] == 3
    assert "blk.2.nextn.shared_head_norm.weight" in stored
    assert "blk.2.exp_probs_b" in stored
    found = open_checkpoint(path)
    assert found.config["num_hidden_layers"] == 2
    assert found.config["num_nextn_predict_layers"] == 1
    for name, expected in head.items():
        torch.testing.assert_close(found.read(name), expected, atol=1e-2, rtol=4e-3)


def test_gguf_export_needs_a_tokenizer_that_fits(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "llama", vocab_size=600)
    (source / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"has no tokenizer.json, and a GGUF file holds"):
        export(source, tmp_path / "out")
    write_tokenizer(source, vocab=640)
    with pytest.raises(InputError, match=r"(?s)id 639.*600 rows"):
        export(source, tmp_path / "out")
    write_tokenizer(source, vocab=600)
    text = (source / "tokenizer.json").read_text(encoding="utf-8")
    splits = text.replace('"use_regex":true', '"use_regex":false', 1)
    assert splits != text
    (source / "tokenizer.json").write_text(splits, encoding="utf-8")
    with pytest.raises(InputError, match="splits text into words in a way that has no name"):
        export(source, tmp_path / "out")


def test_gguf_export_has_the_special_tokens_and_the_chat_template(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "llama", vocab_size=600)
    write_tokenizer(source, vocab=590)
    path = export(source, tmp_path / "out", "fp16")
    values, tensors = read_gguf_header(path)
    assert path.name == "model-F16.gguf"
    assert values["general.file_type"] == 1
    assert values["tokenizer.ggml.pre"] == "gpt-2"
    assert values["tokenizer.ggml.eos_token_id"] == 2
    assert values["tokenizer.ggml.add_bos_token"] is False
    assert values["tokenizer.chat_template"] == CHAT_TEMPLATE
    assert values["tokenizer.ggml.tokens"][588:592][2:] == ["[PAD590]", "[PAD591]"]
    types = values["tokenizer.ggml.token_type"]
    assert (types[0], types[3], types[595]) == (3, 1, 5)
    assert tensors["token_embd.weight"].ggml_type == "F16"
    assert tensors["output_norm.weight"].ggml_type == "F32"


def test_gguf_export_finds_the_chat_template_of_chat_template_json(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "llama")
    write_tokenizer(source, chat_template=None)
    (source / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    values, _ = read_gguf_header(export(source, tmp_path / "out"))
    assert values["tokenizer.chat_template"] == CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("granite", {"embedding_multiplier": 12, "logits_scaling": 8, "residual_multiplier": 1}),
        ("gemma2", {"attn_logit_softcapping": 50, "final_logit_softcapping": 30}),
        ("glm4-moe", {"routed_scaling_factor": 2}),
    ],
)
def test_gguf_export_stores_floats_that_config_json_has_as_integers(
    name: str, numbers: dict[str, int], tmp_path: Path
) -> None:
    """llama.cpp refuses a file whose floats have another type."""
    family(name, tmp_path / "source")
    config = json.loads((tmp_path / "source/config.json").read_text())
    (tmp_path / "source/config.json").write_text(json.dumps(config | numbers))
    fields = gguf.GGUFReader(export(tmp_path / "source", tmp_path / "out")).fields
    floats = {
        key: field
        for key, field in fields.items()
        if key.endswith(("scale", "_softcapping", "epsilon"))
    }
    assert {field.types[0] for field in floats.values()} == {gguf.GGUFValueType.FLOAT32}
    assert set(numbers.values()) <= {field.contents() for field in floats.values()}


# Quantized

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
MOE_SIZES = {
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
}
CALIBRATED = {"scheme": "q4_k_m", "samples": 8, "seq_len": 64}


def test_gguf_q4_k_m_has_the_types_of_llama_cpp(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "llama", num_hidden_layers=4, **WIDE)
    path = export(source, tmp_path / "out", "rtn", scheme="q4_k_m")
    _, tensors = read_gguf_header(path)
    types = {name.removesuffix(".weight"): info.ggml_type for name, info in tensors.items()}
    assert types["token_embd"] == "Q4_K"
    assert types["output"] == "Q6_K"
    # Of four layers, one of three between the first and the last eighths, and the last.
    assert [types[f"blk.{layer}.attn_v"] for layer in range(4)] == ["Q4_K"] * 2 + ["Q6_K"] * 2
    assert [types[f"blk.{layer}.ffn_down"] for layer in range(4)] == ["Q4_K"] * 2 + ["Q6_K"] * 2
    assert {types[f"blk.3.{part}"] for part in ("attn_q", "attn_k", "ffn_up")} == {"Q4_K"}
    dense = open_checkpoint(source)
    found = open_checkpoint(path)
    for name in dense.tensors:
        values = dense.read(name).float()
        error = (found.read(name) - values).square().sum() / values.square().sum()
        assert error < 0.008, name


# The file_type of each preset, and the largest relative squared error of a tensor of it.
PRESETS = {
    "q4_0": (gguf.LlamaFileType.MOSTLY_Q4_0, 0.012),
    "q4_1": (gguf.LlamaFileType.MOSTLY_Q4_1, 0.012),
    "q5_0": (gguf.LlamaFileType.MOSTLY_Q5_0, 0.003),
    "q5_1": (gguf.LlamaFileType.MOSTLY_Q5_1, 0.003),
    "q8_0": (gguf.LlamaFileType.MOSTLY_Q8_0, 1e-4),
    "q4_k_m": (gguf.LlamaFileType.MOSTLY_Q4_K_M, 0.008),
    "q5_k_m": (gguf.LlamaFileType.MOSTLY_Q5_K_M, 0.002),
    "q6_k": (gguf.LlamaFileType.MOSTLY_Q6_K, 6e-4),
}


def test_gguf_presets_are_all_tested() -> None:
    schemes = {name for name, row in NUMBER_FORMATS.items() if row.formats == ("gguf",)}
    assert set(PRESETS) == schemes


@pytest.mark.parametrize("scheme", PRESETS)
def test_gguf_file_of_each_preset_has_the_same_values_for_the_package_of_llama_cpp(
    scheme: str, tmp_path: Path
) -> None:
    file_type, largest_error = PRESETS[scheme]
    source = tiny_checkpoint(tmp_path / "source", "qwen3", num_hidden_layers=2, **WIDE)
    path = export(source, tmp_path / "out", "rtn", scheme=scheme)
    dense = open_checkpoint(source)
    found = open_checkpoint(path)
    assert found.tensors.keys() == dense.tensors.keys()
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.file_type"].contents() == file_type
    stored = {tensor.name: tensor for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 2)
    for name in dense.tensors:
        place = names.get_name(name.removesuffix(".weight"))
        tensor = stored.pop(f"{place}.weight")
        expected = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        values = found.read(name).float()
        assert torch.equal(values, expected.view(values.shape)), name
        original = dense.read(name).float()
        error = (values - original).square().sum() / original.square().sum()
        assert error < largest_error, name
    assert not stored


def test_gguf_gptq_lowers_the_error_of_outputs(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "llama", tie_word_embeddings=True, **WIDE)
    reports = {}
    for method in ("rtn", "gptq"):
        more = {"samples": 8, "seq_len": 64} if method == "gptq" else {}
        options = QuantizeOptions(
            method, scheme="q4_k_m", format="gguf", device="cpu", eval_windows=1, **more
        )
        out = tmp_path / method
        reports[method] = quantize(str(source), str(out), options, SilentProgress())
    assert reports["gptq"]["quality"]["mean_kl"] < reports["rtn"]["quality"]["mean_kl"]
    report = reports["gptq"]
    assert report["schemes"][0]["label"] == "Q4_K_M"
    assert report["gguf"]["file"] == "model-Q4_K_M.gguf"
    assert report["gguf"]["types"]["Q4_K"] > 0
    assert report["gguf"]["replaced"] == {}
    files = {path.name for path in (tmp_path / "gptq").iterdir()}
    assert files == {"model-Q4_K_M.gguf", "llmkit.json", "llmkit_report.json", "report.html"}


def test_gguf_rows_that_are_no_whole_blocks_have_other_types(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "llama", hidden_size=96, num_attention_heads=6)
    progress = SilentProgress()
    messages: list[str] = []
    progress.message = messages.append  # type: ignore[method-assign]
    options = QuantizeOptions(
        "rtn", scheme="q4_k_m", format="gguf", evaluate=False, device="cpu", keep="up_proj"
    )
    report = quantize(str(source), str(tmp_path / "out"), options, progress)
    assert any("stored in another, as llama.cpp does" in message for message in messages)
    _, tensors = read_gguf_header(tmp_path / "out" / "model-Q4_K_M.gguf")
    types = {name.removesuffix(".weight"): info.ggml_type for name, info in tensors.items()}
    assert types["blk.0.attn_q"] == "Q5_0"
    assert types["blk.1.attn_v"] == "Q8_0"
    assert types["output"] == "Q8_0"
    assert types["blk.0.ffn_up"] == "BF16"  # --keep
    assert types["blk.0.ffn_gate"] == "BF16"  # they are one linear layer
    assert report["gguf"]["replaced"]["blk.0.attn_q.weight"] == ["Q4_K", "Q5_0"]


@pytest.mark.parametrize("name", ["qwen3.5", "qwen3-next", "deepseek-v3", "granite-hybrid-moe"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_gguf_values_that_files_have_elsewhere_are_quantized(
    name: str, method: str, tmp_path: Path
) -> None:
    """Value heads in turn, transposed keys, and a tensor in two: blocks stay with their values."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "mamba_n_heads": 16}
    delta = {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
    latent = {"qk_nope_head_dim": 32, "kv_lora_rank": 32, "q_lora_rank": 32, "v_head_dim": 32}
    source = family(name, tmp_path / "source", **sizes, **delta, **latent, **MOE_SIZES)
    calibrated = {"samples": 8, "seq_len": 64} if method == "gptq" else {}
    path = export(tmp_path / "source", tmp_path / "out", method, scheme="q8_0", **calibrated)
    found = open_checkpoint(path)
    assert found.tensors.keys() == source.tensors.keys()
    for tensor in source.tensors:
        values = source.read(tensor)
        error = (found.read(tensor) - values).square().sum() / values.square().sum()
        assert error < 1e-3, tensor
    _, stored = read_gguf_header(path)
    types = {tensor.removesuffix(".weight"): info.ggml_type for tensor, info in stored.items()}
    parts = {
        "qwen3.5": ("attn_qkv", "attn_gate", "ssm_out"),
        "qwen3-next": ("attn_qkv", "attn_gate", "ssm_out"),
        "deepseek-v3": ("attn_k_b", "attn_v_b"),
        "granite-hybrid-moe": ("ffn_gate_shexp", "ffn_up_shexp", "ffn_gate_exps", "ssm_in"),
    }[name]
    assert {types[f"blk.0.{part}"] for part in parts} == {"Q8_0"}


def test_gguf_gptq_calibrates_columns_in_the_order_of_the_file(tmp_path: Path) -> None:
    """The columns of a delta net's output are value heads, which files have in another order."""
    sizes = WIDE | {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
    family("qwen3.5", tmp_path / "source", **sizes)
    errors = {}
    for method in ("rtn", "gptq"):
        more = {"samples": 8, "seq_len": 64} if method == "gptq" else {}
        options = QuantizeOptions(
            method, scheme="q4_k_m", format="gguf", evaluate=False, device="cpu", **more
        )
        report = quantize(
            str(tmp_path / "source"), str(tmp_path / method), options, SilentProgress()
        )
        errors[method] = {row["name"]: row["error"] for row in report["linears"]}
    name = next(name for name in errors["gptq"] if name.endswith("gdn.out"))
    assert errors["gptq"][name] < 0.7 * errors["rtn"][name]


def test_gguf_experts_are_quantized_one_by_one(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", "mixtral", sliding_window=None)
    found = open_checkpoint(
        export(source, tmp_path / "out", "gptq", scheme="q8_0", samples=8, seq_len=64)
    )
    dense = open_checkpoint(source)
    for name in dense.tensors:
        values = dense.read(name).float()
        error = (found.read(name) - values).square().sum() / values.square().sum()
        assert error < 1e-3, name


def test_gguf_export_of_an_interrupted_run_has_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_checkpoint(tmp_path / "source", "llama", **WIDE)
    expected = export(source, tmp_path / "whole", "gptq", **CALIBRATED).read_bytes()
    write = GgufParameterWriter.write_quantized
    num_written = 0

    def interrupt(writer: GgufParameterWriter, *arguments: Any) -> None:
        nonlocal num_written
        num_written += 1
        if num_written == 6:
            raise KeyboardInterrupt
        write(writer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(GgufParameterWriter, "write_quantized", interrupt)
        with pytest.raises(KeyboardInterrupt):
            export(source, tmp_path / "out", "gptq", **CALIBRATED)
    assert not (tmp_path / "out").exists()
    assert export(source, tmp_path / "out", "gptq", **CALIBRATED).read_bytes() == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (QuantizeOptions("gptq", scheme="q4_k_x"), "--scheme q4_k_x is not known.*q4_k_m"),
        (QuantizeOptions("gptq", scheme="q4_k_m", format="awq"), "awq do not go together.*gguf"),
        (QuantizeOptions("gptq", scheme="w4a16", format="gguf"), "gguf do not go together"),
        (QuantizeOptions("awq", scheme="q4_k_m"), "--method awq and --scheme q4_k_m do not"),
        (QuantizeOptions("gptq", format="gguf", kv="fp8"), "--format gguf has no place for"),
        (QuantizeOptions("gptq", format="gguf", lm_head=8), "gguf format has no place for a"),
        (QuantizeOptions("gptq", scheme="q4_k_m", group_size=64), "--group-size is 64"),
    ],
)
def test_gguf_options_that_conflict_are_refused(
    options: QuantizeOptions, message: str, tmp_path: Path
) -> None:
    source = tiny_checkpoint(tmp_path / "source", "llama")
    with pytest.raises(UsageError, match=message):
        quantize(str(source), str(tmp_path / "out"), options, SilentProgress())
    assert not list(tmp_path.glob("out*"))
