"""Models that run by transformers' modeling code, in the engine: greedy answers, and what it
refuses for them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.tiny_fallback import make_oracle
from support.tiny_models import tiny_checkpoint

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.errors import InputError
from llmkit.model.families import FALLBACK, checkpoint_spec
from llmkit.model.transformers_model import TransformersModel
from llmkit.model.transformers_spec import transformers_spec
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine
from llmkit.runtime.parallel.leader import LeadEngine
from llmkit.runtime.part_loader import StartupReport, load_part
from llmkit.shard.shard_checkpoint import shard

MODEL = {"dtype": "float32"}  # of the fixture `model`, a Llama
OPTIONS = EngineOptions(device="cpu", dtype="float32", max_num_batched_tokens=32)
PROMPTS = [[5, 6, 7], [300, 4, 9, 11, 200, 31, 8], [77], list(range(10, 60))]
GREEDY = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)


@pytest.fixture(scope="module")
def persimmon(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model that is no native family."""
    path = tmp_path_factory.mktemp("fallback") / "model"
    return open_checkpoint(tiny_checkpoint(path, "persimmon", dtype="float32"))


def fallback_engine(checkpoint: Checkpoint, **options: Any) -> Engine:
    spec = transformers_spec(checkpoint.config, checkpoint.tensor_names)
    report = StartupReport()
    part = load_part(checkpoint, spec, dataclasses.replace(OPTIONS, **options), report)
    assert isinstance(part.model, TransformersModel)
    engine = part.make_engine(report, Engine)
    assert FALLBACK in report.fast_paths
    return engine


def transformers_answers(path: Path) -> list[list[int]]:
    oracle = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    oracle.generation_config.eos_token_id = None
    answers = []
    for prompt in PROMPTS:
        with torch.inference_mode():
            out = oracle.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def test_engine_fallback_answers_as_native_and_transformers(model: Path) -> None:
    checkpoint = open_checkpoint(model)
    expected = transformers_answers(model)
    assert load_engine(checkpoint, OPTIONS).generate(PROMPTS, GREEDY) == expected
    engine = fallback_engine(checkpoint)
    assert engine.generate(PROMPTS, GREEDY) == expected
    assert engine.generate(PROMPTS, GREEDY) == expected  # from the prefix cache


@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_batched_tokens": 9}, {"speculate": 3}, {"kv_cache_memory": 30 << 14}],
    ids=["whole", "chunked", "speculative", "small cache"],
)
def test_engine_fallback_answers_as_transformers(
    persimmon: Checkpoint, options: dict[str, Any]
) -> None:
    engine = load_engine(persimmon, dataclasses.replace(OPTIONS, **options))
    assert isinstance(engine.model, TransformersModel)
    assert engine.generate(PROMPTS, GREEDY) == transformers_answers(persimmon.path)


def test_engine_fallback_on_two_ranks_answers_as_transformers(tmp_path: Path) -> None:
    make_oracle("phi", tmp_path / "model", vocab_size=400)
    expected = transformers_answers(tmp_path / "model")
    shard(tmp_path / "model", tmp_path / "ranks", 2)
    options = dataclasses.replace(OPTIONS, kv_cache_memory=1 << 20)
    engine = load_engine(tmp_path / "ranks", options)
    assert isinstance(engine, LeadEngine)
    try:
        assert engine.generate(PROMPTS, GREEDY) == expected
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("options", "feature"),
    [
        ({"require_native": True}, "--require-native"),
        ({"adapters": {"tuned": "/nowhere"}}, "--lora"),
        ({"cpu_offload": 1 << 30}, "--cpu-offload"),
        ({"tp": 2}, "sharding"),
        ({"pp": 2}, "sharding"),
    ],
)
def test_engine_fallback_refuses(
    persimmon: Checkpoint, options: dict[str, Any], feature: str
) -> None:
    with pytest.raises(InputError) as caught:
        load_engine(persimmon, dataclasses.replace(OPTIONS, **options))
    message = str(caught.value)
    assert message.startswith(f"{feature} is not possible with PersimmonForCausalLM: ")
    assert "runs by transformers' modeling code" in message


def test_engine_native_model_passes_require_native(model: Path) -> None:
    checkpoint = open_checkpoint(model)
    assert checkpoint_spec(checkpoint).transformers is None
    options = dataclasses.replace(OPTIONS, require_native=True)
    assert not isinstance(load_engine(checkpoint, options).model, TransformersModel)
