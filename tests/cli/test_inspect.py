"""`llmkit inspect`: what it says about experts, attention, the KV cache and unknown models."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.mxfp4_files import write_gpt_oss
from support.tiny_families import family_oracle
from support.tiny_models import tiny_checkpoint
from support.tiny_wrappers import save_wrapper, tiny_wrapper

from llmkit.cli import main


def document(capsys: pytest.CaptureFixture[str], path: Path) -> dict[str, Any]:
    assert main.run(["inspect", str(path), "--json"]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


def shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, path: Path
) -> list[str]:
    """The lines of the text, each without repeated spaces."""
    monkeypatch.setenv("COLUMNS", "160")
    assert main.run(["inspect", str(path)]) == 0
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_inspect_shows_experts_and_router(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle = family_oracle("glm4-moe", tmp_path)
    facts = document(capsys, tmp_path)
    assert facts["moe"] == {
        "layers": 3,
        "experts": 8,
        "experts_per_token": 3,
        "intermediate": 24,
        "shared_intermediate": 24,
        "router": "sigmoid",
        "correction_bias": True,
        "groups": 4,
        "groups_per_token": 2,
        "stacked": False,
    }
    biases = 3 * 8  # transformers counts them as buffers
    assert facts["parameters"] == sum(p.numel() for p in oracle.parameters()) + biases
    unused = 3 * 5 * 3 * 24 * 32  # layers, experts, matrices of an expert, their sizes
    assert facts["parameters"] - facts["active_parameters"] == unused
    assert facts["kv_bytes_per_token"] == {"fp32": 1024, "bf16": 512}
    lines = shown(capsys, monkeypatch, tmp_path)
    assert "attention 4 query heads, 2 KV, of 16" in lines
    assert (
        "experts 3 of 8, MLP 24, a shared one of 24, in 3 of 4 layers;"
        " sigmoid router, 2 of 4 groups, correction bias"
    ) in lines


def test_inspect_shows_each_kind_of_attention(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 4: heads of two sizes, layers without keys and values, per-layer embeddings."""
    family_oracle("gemma4", tmp_path)
    facts = document(capsys, tmp_path)
    heads = {"layers": 3, "heads": 4, "kv_heads": 2, "latent_dim": None}
    assert facts["attention"] == [
        heads | {"head_dim": 16, "sliding_window": 12, "kv_elements_per_token": 128},
        heads | {"head_dim": 32, "sliding_window": None, "kv_elements_per_token": 256},
    ]
    assert facts["shared_kv_layers"] == 2
    assert facts["per_layer_input_size"] == 8
    assert facts["moe"] is None
    assert facts["active_parameters"] == facts["parameters"]
    elements = 2 * (2 * 2 * 16) + 2 * (2 * 2 * 32)  # two layers of each kind have K and V
    assert facts["kv_bytes_per_token"] == {"fp32": 4 * elements, "bf16": 2 * elements}
    lines = shown(capsys, monkeypatch, tmp_path)
    first = lines.index("attention 3 layers: 4 query heads, 2 KV, of 16, window of 12")
    assert lines[first + 1 : first + 3] == [
        "3 layers: 4 query heads, 2 KV, of 32",
        "2 layers without keys and values: those of earlier layers are read",
    ]
    assert "KV cache 768 B a token in bf16, 512 B beyond the sliding windows" in lines
    # 12 tokens of two layers, and 128 tokens of two others
    cache = 2 * (128 * 12 + 256 * 128) / 1024
    (row,) = [line for line in lines if line.startswith("│ bf16")]
    assert f"│ {cache:.1f} KiB │" in row
    assert "vocabulary 128, embeddings tied, 8 more embedding dimensions for each layer" in lines


def test_inspect_shows_recurrent_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle = family_oracle("qwen3.5", tmp_path)
    facts = document(capsys, tmp_path)
    assert facts["parameters"] == sum(p.numel() for p in oracle.parameters())
    channels = 2 * 4 * 8 + 8 * 16  # queries, keys, values
    state = 8 * 8 * 16 * 4  # heads, keys, values, float32
    assert facts["recurrent"] == {
        "layers": 3,
        "mixer": "gated_delta_net",
        "heads": 8,
        "key_dim": 8,
        "value_dim": 16,
        "conv_channels": channels,
        "conv_kernel_size": 4,
        "bytes_per_sequence": {
            "fp32": 3 * (state + 3 * channels * 4),
            "bf16": 3 * (state + 3 * channels * 2),
        },
    }
    assert [kind["layers"] for kind in facts["attention"]] == [1]
    lines = shown(capsys, monkeypatch, tmp_path)
    first = lines.index("attention 1 layer: 4 query heads, 2 KV, of 16")
    assert lines[first + 1] == (
        "recurrent 3 layers: gated delta net, 8 heads with states of 8 x 16,"
        " convolution of 4 tokens over 192 channels"
    )
    assert "KV cache 128 B a token in bf16, and 15.4 KiB of recurrent states a sequence" in lines
    (row,) = [line for line in lines if line.startswith("│ bf16")]
    assert f"│ {(3 * (state + 3 * channels * 2) + 128 * 128) / 1024:.1f} KiB │" in row


def test_inspect_shows_the_precisions_that_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """gpt-oss: experts in one tensor, which `quantize` unstacks, and stored as MXFP4."""
    write_gpt_oss(tmp_path / "dense", tmp_path / "packed")
    facts = document(capsys, tmp_path / "packed")
    assert facts["moe"]["stacked"]
    sizes = facts["weight_bytes"]
    assert list(sizes) == ["fp32", "bf16", "int8", "int4"]
    assert sizes["bf16"] > sizes["int8"] > sizes["int4"] > 0
    lines = shown(capsys, monkeypatch, tmp_path / "packed")
    rows = [line.split(" ")[1] for line in lines if line.startswith("│ ")]
    assert rows == ["fp32", "bf16", "int8", "int4", "as"]
    assert any(line.startswith(f"│ as stored │ {facts['disk_bytes'] / 1024:.1f}") for line in lines)


def test_inspect_shows_a_multimodal_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_wrapper(tiny_wrapper("gemma4"), tmp_path / "model", hub_names=False)
    capsys.readouterr()
    assert document(capsys, path)["support"] == "native"
    lines = shown(capsys, monkeypatch, path)
    assert "runs native: its text model is a family of llmkit's own" in lines
    assert "attention 1 layer: 4 query heads, 2 KV, of 16, window of 12" in lines
    assert any(re.fullmatch(r"does not run \d+ tensors, .*\(.*vision_tower.*\)", x) for x in lines)


@pytest.mark.parametrize(
    ("architecture", "model_type", "reason", "nearest"),
    [
        (
            "JambaForCausalLM",
            "jamba",
            "its layers keep a recurrent state besides keys and values",
            " The supported architecture with the most similar name is BambaForCausalLM.",
        ),
        (
            "Gemma9ForCausalLM",
            "gemma9",
            "has no causal language model Gemma9ForCausalLM of model_type gemma9",
            " The supported architecture with the most similar name is GemmaForCausalLM.",
        ),
    ],
)
def test_inspect_says_why_a_model_does_not_run(
    architecture: str,
    model_type: str,
    reason: str,
    nearest: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tiny_checkpoint(tmp_path / "model")
    capsys.readouterr()  # what saving printed
    config = path / "config.json"
    changed = {"architectures": [architecture], "model_type": model_type}
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))
    assert main.run(["inspect", str(path)]) == 3
    error = capsys.readouterr().err
    assert error.startswith(f"llmkit inspect: error: unsupported architecture ({architecture}): ")
    assert f"{reason}.{nearest} docs/models.md lists the " in error
    assert error.count("\n") == 1
    assert len(error) < 5 * 80
    assert main.run(["inspect", str(path), "--json"]) == 3
    assert reason in json.loads(capsys.readouterr().out)["error"]["what"]
