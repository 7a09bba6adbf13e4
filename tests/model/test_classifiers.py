"""Classification heads on decoders: transformers' logits, and what happens to the head on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_models import tiny_checkpoint
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.errors import InputError
from llmkit.common.progress import SilentProgress
from llmkit.model.families import checkpoint_spec, model_spec
from llmkit.model.parameter_table import parameters
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_options import QuantizeOptions
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_errors import RequestError
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine
from llmkit.runtime.parallel.leader import LeadEngine
from llmkit.shard.shard_checkpoint import shard

MODEL = {"architecture": "qwen3", "dtype": "float32", "classifier": True, "num_labels": 3}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_labels": 1},
    "mistral": {"num_labels": 4},
    "qwen2": {"num_labels": 2, "tie_word_embeddings": True},
    "gemma2": {"num_labels": 1},
    "gemma3_text": {"num_labels": 3},
    "phi3": {"num_labels": 2},
    "mixtral": {"num_labels": 1},
    "olmo2": {"num_labels": 5},
}
POOLED = SamplingParams(temperature=0.0, max_tokens=1)
OPTIONS = EngineOptions(device="cpu", kv_cache_memory=1 << 20)
# No prompt ends with the padding token, which transformers would not count.
PROMPTS = [[5], list(range(3, 40)), [7, 8, 9] * 15, list(range(100, 120))]


def label_logits(engine: Engine, **fields: Any) -> list[np.ndarray]:
    """The logits of the labels of each of PROMPTS."""
    for index, prompt in enumerate(PROMPTS):
        request = EngineRequest(f"{index}", prompt, POOLED, pooling="classify", **fields)
        engine.add(request)
    found = {}
    while engine.has_work:
        for output in engine.step():
            assert (output.finish_reason, output.token_ids) == ("stop", [])
            assert output.embedding is not None
            found[int(output.request_id)] = np.frombuffer(output.embedding, np.float32)
    return [found[index] for index in range(len(PROMPTS))]


def oracle_logits(model: Path) -> list[np.ndarray]:
    """transformers' logits of the labels of each of PROMPTS."""
    oracle = AutoModelForSequenceClassification.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        return [oracle(torch.tensor([prompt])).logits[0].numpy() for prompt in PROMPTS]


def assert_close(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert float(np.abs(one - other).max()) < 1e-4


@pytest.mark.parametrize("architecture", FAMILIES)
def test_classifier_logits_equal_transformers(architecture: str, tmp_path: Path) -> None:
    sizes = FAMILIES[architecture]
    path = tmp_path / "model"
    tiny_checkpoint(path, architecture, dtype="float32", classifier=True, **sizes)
    found = label_logits(load_engine(path, OPTIONS))
    assert {len(logits) for logits in found} == {sizes["num_labels"]}
    assert_close(found, oracle_logits(path))


def test_classifier_on_several_ranks_and_in_chunks(model: Path) -> None:
    expected = oracle_logits(model)
    small = EngineOptions(device="cpu", kv_cache_memory=1 << 20, max_num_batched_tokens=16)
    assert_close(label_logits(load_engine(model, small)), expected)
    on_ranks = EngineOptions(device="cpu", kv_cache_memory=1 << 20, tp=2, pp=2)
    running = load_engine(model, on_ranks)
    assert isinstance(running, LeadEngine)
    try:
        assert_close(label_logits(running), expected)
    finally:
        running.close()


def test_classifier_head_is_carried_by_quantize_and_shard(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="classification head") as refused:
        quantize(str(model), str(tmp_path / "refused"), QuantizeOptions("int8"), SilentProgress())
    assert "--no-eval" in str(refused.value.todo)
    options = QuantizeOptions("int8", evaluate=False)
    quantize(str(model), str(tmp_path / "int8"), options, SilentProgress())
    source = open_checkpoint(model)
    output = open_checkpoint(tmp_path / "int8")
    assert output.config["architectures"] == ["Qwen3ForSequenceClassification"]
    # Other engines take every linear layer that is not named here as quantized.
    assert "score" in output.config["quantization_config"]["ignore"]
    assert torch.equal(output.read("score.weight"), source.read("score.weight"))
    found = label_logits(load_engine(tmp_path / "int8", OPTIONS))
    expected = oracle_logits(model)
    error = max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True))
    assert 0 < error < 0.2

    shard(model, tmp_path / "tp2", tp=2, pp=2)
    sharded = open_checkpoint(tmp_path / "tp2")
    running = load_engine(sharded, OPTIONS)
    try:
        assert_close(label_logits(running), expected)
    finally:
        running.close()


def test_classifier_table_has_the_head_in_place_of_the_output_projection(model: Path) -> None:
    spec = checkpoint_spec(open_checkpoint(model))
    names = [row.name for row in parameters(spec)]
    assert "score.weight" in names
    assert "lm_head.weight" not in names
    assert (spec.num_labels, spec.architecture) == (3, "Qwen3ForSequenceClassification")


def test_classifier_engine_refuses_what_it_cannot_answer(model: Path) -> None:
    engine = load_engine(model, OPTIONS)
    for fields in ({}, {"pooling": "mean"}, {"pooling": "classify", "label_token_ids": (1,)}):
        with pytest.raises(RequestError, match="only classifies"):
            engine.add(EngineRequest("a", [5], POOLED, **fields))


def test_label_token_logits_equal_those_of_the_output_projection(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "model", "qwen3", dtype="float32")
    engine = load_engine(path, OPTIONS)
    with pytest.raises(RequestError, match="no classification head"):
        engine.add(EngineRequest("a", [5], POOLED, pooling="classify"))
    found = label_logits(engine, label_token_ids=(9, 300))
    oracle = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = [
            oracle(torch.tensor([prompt])).logits[0, -1, [9, 300]].numpy() for prompt in PROMPTS
        ]
    assert_close(found, expected)
    running = load_engine(path, EngineOptions(device="cpu", kv_cache_memory=1 << 20, tp=2))
    assert isinstance(running, LeadEngine)
    try:
        assert_close(label_logits(running, label_token_ids=(9, 300)), expected)
    finally:
        running.close()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["BertForSequenceClassification"]}, "no decoder family"),
        ({"architectures": ["BloomForSequenceClassification"]}, "no decoder family"),
        ({"id2label": {}}, "0 labels"),
    ],
)
def test_classifier_of_another_kind_is_refused(
    model: Path, config: dict[str, Any], message: str
) -> None:
    original = json.loads((model / "config.json").read_text())
    with pytest.raises(InputError, match=message):
        model_spec(original | config)
