"""Sources that are quantized already: each is read as the dense model that it stands for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny_models as tiny
from support.gguf_files import convert
from support.tiny_quantized import dense_checkpoint, stored_tensors

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.errors import InputError
from llmkit.common.progress import SilentProgress
from llmkit.model.families import checkpoint_spec
from llmkit.model.parameter_table import parameters
from llmkit.model.weight_loader import read_parameter
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_options import QuantizeOptions
from llmkit.quant.quantized_source import quantized_source_of

pytestmark = pytest.mark.usefixtures("short_builtin_text")
BASE = QuantizeOptions("rtn", samples=4, seq_len=32, evaluate=False, device="cpu")
LOST_TWICE = "quality is lost twice"
# The options that write a source, and what users are told of it.
SOURCES: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": ({"method": "gptq"}, "INT4 in groups of 64 (gptq)"),
    "gptq of 8 bits": ({"method": "gptq", "bits": 8}, "INT8 in groups of 64 (gptq)"),
    "awq": ({"method": "awq"}, "INT4 in groups of 64 with zero points (awq)"),
    "packed with zero points": (
        {"format": "compressed-tensors", "symmetric": False, "group_size": 32},
        "INT4 in groups of 32 with zero points (compressed-tensors)",
    ),
    "int8 with its inputs": ({"method": "int8", "activations": True}, "INT8 (compressed-tensors)"),
    "fp8 by fixed scales, with a KV cache": (
        {"method": "fp8", "static_activations": True, "kv": "fp8"},
        "FP8 (compressed-tensors)",
    ),
    "a quantized head of other bits": (
        {"format": "compressed-tensors", "lm_head": 8, "group_size": 32},
        "INT4 in groups of 32 and INT8 in groups of 32 (compressed-tensors)",
    ),
    "nvfp4 with its inputs": ({"scheme": "nvfp4"}, "NVFP4 (compressed-tensors)"),
    "nvfp4 of Model-Optimizer": (
        {"scheme": "nvfp4a16", "format": "modelopt"},
        "NVFP4 (modelopt)",
    ),
    "mxfp4": ({"scheme": "mxfp4"}, "MXFP4 (compressed-tensors)"),
    "mxfp8": ({"scheme": "mxfp8"}, "MXFP8 (compressed-tensors)"),
    "fp8 blocks": ({"scheme": "fp8-block", "format": "fp8"}, "FP8 in blocks of 128x128 (fp8)"),
    "schemes by layer": (
        {"target_bits": 8.0, "evaluate": True, "eval_windows": 1},
        "",
    ),
    "some layers": ({"method": "gptq", "layers": "1"}, "INT4 in groups of 64 (gptq)"),
}


class Messages(SilentProgress):
    """Keeps the messages."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


def run(source: Path, out: Path, **changes: Any) -> tuple[dict[str, Any], list[str]]:
    progress = Messages()
    report = quantize(str(source), str(out), replace(BASE, **changes), progress)
    return report, progress.texts


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("source") / "llama")


def as_dense(quantized: Path, path: Path) -> Path:
    """The float32 model that a quantized one stands for."""
    dense_checkpoint(open_checkpoint(quantized), path)
    tiny.write_tokenizer(path)
    return path


def check_same(found: Path, expected: Path) -> None:
    wanted = stored_tensors(expected)
    tensors = stored_tensors(found)
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(tensors[name].float(), tensor.float()), name


@pytest.mark.parametrize("kind", SOURCES)
def test_requantize_gives_the_bytes_of_the_dense_source(
    llama: Path, tmp_path: Path, kind: str
) -> None:
    options, label = SOURCES[kind]
    source = tmp_path / "source"
    run(llama, source, **options)
    dense = as_dense(source, tmp_path / "dense")
    if kind == "schemes by layer":  # whatever they are
        label = quantized_source_of(open_checkpoint(source)).label
        assert label.count("INT") > 1
    report, texts = run(source, tmp_path / "out", group_size=16)
    expected, quiet = run(dense, tmp_path / "expected", group_size=16)
    check_same(tmp_path / "out", tmp_path / "expected")
    assert report["source_weights"] == label
    assert expected["source_weights"] is None
    wanted = f"the source is {label}: its weights are dequantized layer by layer, and the output"
    assert sum(text.startswith(wanted) for text in texts) == 1
    has_few_bits = any(word in label for word in ("INT4", "FP4"))
    assert any(LOST_TWICE in text for text in texts) is has_few_bits
    assert any("KV cache are left out: --kv fp8" in text for text in texts) is ("KV" in kind)
    assert not any("the source" in text for text in quiet)
    assert label in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("kind", ["awq", "fp8 by fixed scales, with a KV cache"])
def test_requantize_to_16_bits_is_a_cast(llama: Path, tmp_path: Path, kind: str) -> None:
    source = tmp_path / "source"
    run(llama, source, **SOURCES[kind][0])
    dense = as_dense(source, tmp_path / "dense")
    _, texts = run(source, tmp_path / "out", method="bf16")
    assert not any(LOST_TWICE in text for text in texts)
    run(dense, tmp_path / "expected", method="bf16")
    check_same(tmp_path / "out", tmp_path / "expected")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.quantization is None
    assert "quantization_config" not in checkpoint.config


def test_requantize_is_calibrated_and_compared_with_the_source(llama: Path, tmp_path: Path) -> None:
    run(llama, tmp_path / "int4", method="gptq", group_size=16)
    dense = as_dense(tmp_path / "int4", tmp_path / "dense")
    options = {"method": "gptq", "kv": "int8", "format": "compressed-tensors"}
    reports = [
        run(source, tmp_path / f"out-{index}", evaluate=True, eval_windows=1, **options)[0]
        for index, source in enumerate((tmp_path / "int4", dense))
    ]
    assert reports[0]["quality"] == reports[1]["quality"]
    assert reports[0]["quality"]["mean_kl"] > 0
    check_same(tmp_path / "out-0", tmp_path / "out-1")


def test_requantize_experts_of_a_quantized_mixture(tmp_path: Path) -> None:
    source = tiny.tiny_checkpoint(tmp_path / "model", "qwen3_moe")
    run(source, tmp_path / "awq", method="awq", group_size=32)
    dense = as_dense(tmp_path / "awq", tmp_path / "dense")
    run(tmp_path / "awq", tmp_path / "out", method="fp8")
    run(dense, tmp_path / "expected", method="fp8")
    check_same(tmp_path / "out", tmp_path / "expected")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_requantize_gguf_names_its_types(tmp_path: Path, kind: str) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    model = open_checkpoint(tiny.tiny_checkpoint(tmp_path / "model", **sizes))
    file = tmp_path / "model.gguf"
    convert(model, file, "llama", kind=getattr(gguf.GGMLQuantizationType, kind))
    report, texts = run(file, tmp_path / "out", method="gptq", evaluate=True, eval_windows=1)
    assert report["source_weights"] == f"{kind} (gguf)"
    assert any(text.startswith(f"the source is {kind} (gguf): its weights") for text in texts)
    assert any(LOST_TWICE in text for text in texts) is (kind == "Q4_K")
    assert report["quality"]["mean_kl"] > 0
    run(file, tmp_path / "cast", method="bf16")
    checkpoint = open_checkpoint(file)
    cast = open_checkpoint(tmp_path / "cast")
    for row in parameters(checkpoint_spec(checkpoint)):
        wanted = read_parameter(checkpoint, row, torch.float32).bfloat16().float()
        assert torch.equal(read_parameter(cast, row, torch.float32), wanted), row.name


def test_requantize_refuses_quantized_tensors_that_do_not_run(tmp_path: Path) -> None:
    """Copied with an MTP head, they would have no config."""
    config = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 1,
    }
    model = tiny.tiny_checkpoint(tmp_path / "model", "glm4_moe", **config)
    source = tmp_path / "source"
    run(model, source, method="gptq", group_size=32)
    tensors = load_file(source / "model.safetensors")
    found = {
        name.replace(".layers.1.", ".layers.2."): tensor.clone()
        for name, tensor in tensors.items()
        if ".layers.1.self_attn." in name
    }
    save_file(tensors | found, source / "model.safetensors", {"format": "pt"})
    (source / "llmkit.json").unlink()
    message = r"16 quantized tensors that do not run here, such as model\.layers\.2\.self_attn"
    with pytest.raises(InputError, match=message):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
