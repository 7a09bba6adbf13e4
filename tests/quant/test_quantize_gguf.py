"""`quantize --format gguf`: files that the reader, and the gguf package, read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from support.tiny_families import FAMILIES as ALL_FAMILIES
from support.tiny_families import family_oracle
from support.tiny_models import CHAT_TEMPLATE, tiny_checkpoint, write_tokenizer

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.gguf_architectures import ARCHITECTURES
from llmkit.checkpoint.gguf_header import read_gguf_header
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.common.errors import InputError, UsageError
from llmkit.common.progress import SilentProgress
from llmkit.model.families import checkpoint_spec
from llmkit.quant.gguf_parameter_writer import GgufParameterWriter
from llmkit.quant.number_formats import NUMBER_FORMATS
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_options import QuantizeOptions

TWO = {"num_hidden_layers": 2}
WINDOWS = TWO | {"layer_types": ["sliding_attention", "full_attention"]}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Rows of FAMILIES, and what a GGUF file can say of them.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama-yarn": TWO,
    "llama3-rope": TWO | {"rope_parameters": LLAMA3, "max_position_embeddings": 16384},
    "llama-mha-bias-tied": TWO,
    "mistral": TWO | {"sliding_window": None},
    "qwen2": TWO,
    "qwen3": TWO,
    "mixtral": TWO | {"sliding_window": None},
    "gemma": TWO,
    "gemma2": WINDOWS | {"query_pre_attn_scalar": 16},
    "gemma3": WINDOWS | {"query_pre_attn_scalar": 16},
    "gemma4": {},
    "gemma4-dense": {},
    "glm4": TWO,
    "gpt-oss": TWO | {"swiglu_limit": 7.0},
    "granite": TWO,
    "olmo2": TWO,
    "olmo3": {},
    "phi3": TWO,
    "phi3-longrope": TWO,
    "starcoder2": TWO | {"sliding_window": None},
    "cohere": TWO,
    "cohere2": {},
    "exaone4-global": TWO | {"layer_types": ["full_attention"] * 2},
    "ernie4.5": TWO,
    "hunyuan": TWO | {"attention_bias": False},
    "seed-oss": TWO,
    "smollm3": {},
    "arcee": TWO,
    "qwen3-moe-normalized": TWO,
    "qwen2-moe": TWO | {"mlp_only_layers": []},
    "olmoe": TWO | {"num_key_value_heads": 4},
    "glm4-moe": TWO | {"num_nextn_predict_layers": 0},
    "minimax-m2": TWO,
    "ernie4.5-moe": TWO,
    "hunyuan-moe": TWO,
    "lfm2": {},
    "lfm2-moe": {"routed_scaling_factor": 1.0},
}
TINY_VOCAB = 320


def export(source: Path, out: Path, method: str = "bf16", **options: Any) -> Path:
    """The GGUF file of a checkpoint."""
    chosen = QuantizeOptions(method, format="gguf", evaluate=False, device="cpu", **options)
    quantize(str(source), str(out), chosen, SilentProgress())
    (path,) = out.glob("*.gguf")
    return path


def family(name: str, path: Path, **changes: Any) -> Checkpoint:
    """A tiny model of a family, with a tokenizer."""
    family_oracle(name, path, **(FAMILIES.get(name, {}) | {"vocab_size": TINY_VOCAB} | changes))
    write_tokenizer(path, vocab=TINY_VOCAB)
    return open_checkpoint(path)


@pytest.mark.parametrize("name", FAMILIES)
def test_gguf_export_is_read_back_as_the_same_model(name: str, tmp_path: Path) -> None:
    extra = {"vocab_size_per_layer_input": TINY_VOCAB} if name == "gemma4" else {}
    source = family(name, tmp_path / "source", **extra)
    found = open_checkpoint(export(tmp_path / "source", tmp_path / "out"))
    assert checkpoint_spec(found).layers == checkpoint_spec(source).layers
    expected = {tensor: source.read(tensor) for tensor in source.tensors}
    assert found.tensors.keys() == expected.keys()
    for tensor, values in expected.items():
        # Matrices are in bfloat16, vectors and small matrices in float32.
        stored = found.read(tensor)
        is_rounded = stored.equal(values.bfloat16().float())
        is_exact = stored.equal(values) or torch.allclose(stored, values, rtol=0, atol=2e-7)
        assert is_rounded or is_exact, tensor
        assert is_exact or values.ndim > 1, tensor
    text = "hello world, 123 quick foxes!\n  <|im_start|>"
    tokenizer = load_tokenizer(source)
    assert load_tokenizer(found).encode(text) == tokenizer.encode(text)


def test_gguf_export_covers_every_family_of_the_reader() -> None:
    written = {ALL_FAMILIES[name][0] for name in FAMILIES}
    rows = ARCHITECTURES.values()
    assert {row.model_type for row in rows if row.is_written} <= written
    assert not {row.model_type for row in rows if not row.is_written} & written


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen3.5", {}, r"is a Qwen3_5ForCausalLM \(qwen3_5_text\), which is not written as GGUF"),
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
        ("qwen3.5", {}, "which is not written as GGUF"),
        ("gemma4-moe", {}, "no place for .*experts"),
        ("lfm2-bias", {}, "llama.cpp's lfm2 does not support the tensor .*shortconv"),
        ("ernie4.5-bias", {}, "ernie4_5 does not support the tensor blk.0.ffn_"),
        ("hunyuan", {"attention_bias": True}, "does not support the tensor blk.0.attn_output.bias"),
        ("olmoe", {"num_key_value_heads": 2}, "olmoe does not support 2 KV heads of 4"),
        ("phi3-partial", {}, "phi3 does not support 4 heads of 16 in 32"),
        ("exaone4", {}, "exaone4 does not support windows of 12 tokens in 4 layers"),
    ],
)
def test_gguf_export_refuses_models_that_a_file_cannot_hold(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    family(name, tmp_path / "source", **changes)
    with pytest.raises(InputError, match=message):
        export(tmp_path / "source", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


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
