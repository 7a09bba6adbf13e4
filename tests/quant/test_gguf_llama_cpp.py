"""GGUF files of every family that is written, loaded and scored by llama.cpp itself.

Where llama.cpp is not built (`make bench-gguf` builds it), these tests are skipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.gguf_exports import FAMILIES, TINY_VOCAB, export
from support.llama_cpp import PROGRAM, llama_cpp_log_probs, windowed
from support.tiny_families import FAMILIES as ALL_FAMILIES
from support.tiny_families import family_oracle, oracle_logits
from support.tiny_models import write_tokenizer

pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="llama.cpp is not built")
WINDOWS = 4
TEXT = " ".join(f"word{i} the quick {7 * i % 13} fox, jumps!" for i in range(30))
# llama.cpp rounds the ramps of YaRN, and chooses LongRoPE's factors by the size of its context.
COMPUTED_OTHERWISE = ("gpt-oss", "phi3-longrope")


@pytest.mark.parametrize("name", FAMILIES)
def test_gguf_export_is_scored_alike_by_llama_cpp(name: str, tmp_path: Path) -> None:
    """Of transformers and llama.cpp, which computes with float16 weights and inputs."""
    check_scores(name, tmp_path)


@pytest.mark.parametrize("layers", ["FSFS", "FFSS", "SSSS"])
def test_gguf_export_of_laguna_is_scored_alike_with_any_windows(
    layers: str, tmp_path: Path
) -> None:
    """With a period, a list, and windows in all layers."""
    names = {"F": "full_attention", "S": "sliding_attention"}
    check_scores("laguna", tmp_path, layer_types=[names[layer] for layer in layers])


@pytest.mark.parametrize("name", ["llama-yarn", "ministral3"])
def test_gguf_export_is_scored_alike_with_another_attention_factor(
    name: str, tmp_path: Path
) -> None:
    parameters = ALL_FAMILIES[name][1]["rope_parameters"] | {"attention_factor": 0.7}
    check_scores(name, tmp_path, rope_parameters=parameters)


def check_scores(name: str, tmp_path: Path, **changes: Any) -> None:
    settings = FAMILIES[name] | {"vocab_size": TINY_VOCAB} | changes
    oracle = family_oracle(name, tmp_path / "source", **settings)
    write_tokenizer(tmp_path / "source", vocab=TINY_VOCAB)
    file = export(tmp_path / "source", tmp_path / "out", "fp16")
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    tokens, found = llama_cpp_log_probs(file, text)
    assert len(tokens) >= WINDOWS
    expected = torch.stack([windowed(oracle_logits(oracle, each)) for each in tokens[:WINDOWS]])
    found = found[:WINDOWS]
    divergence = (expected.exp() * (expected - found)).sum(dim=-1).mean()
    if name in COMPUTED_OTHERWISE:
        assert divergence < 5e-2
        return
    assert divergence < 5e-3
    # At few tokens, two experts with close scores change places.
    errors = (found - expected).abs().amax(dim=-1).flatten()
    assert errors.quantile(0.9) < 0.05, "of log probabilities with a deviation of 0.5"
