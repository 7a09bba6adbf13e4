"""Long prompts of models with latent attention: the engine computes them in the expanded form.

However it comes to them, greedy answers equal those of transformers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.tiny_families import COMMON, family_oracle, oracle_logits

from llmkit.kernels import latent_attention
from llmkit.kernels.kv_cache import KVCache
from llmkit.kernels.latent_attention import MIN_EXPANDED_QUERIES
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine
from llmkit.runtime.parallel.leader import LeadEngine

OUTPUT = 10
GREEDY = SamplingParams(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True)
OPTIONS = EngineOptions(
    device="cpu", max_model_len=640, kv_cache_dtype="float32", kv_cache_memory=1 << 21
)
# The first two share 320 tokens. The last two stay in the absorbed form.
LENGTHS = (330, 600, 290, 40, 3)
MODES: dict[str, dict[str, Any]] = {
    "whole prompts": {"max_num_batched_tokens": 2048},
    "expanded and absorbed chunks": {"max_num_batched_tokens": 280},
    "absorbed chunks": {"max_num_batched_tokens": 64},
    "preempted": {"max_num_batched_tokens": 2048, "kv_cache_memory": 40},
    "drafts": {"max_num_batched_tokens": 700, "speculate": 3},
    "TP 2": {"max_num_batched_tokens": 700, "tp": 2},
    "PP 2": {"max_num_batched_tokens": 300, "pp": 2},
}


class Asked(NamedTuple):
    path: Path
    prompts: list[list[int]]
    expected: list[list[int]]


@pytest.fixture(scope="module", params=["deepseek-v3", "mistral4"])
def asked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    path = tmp_path_factory.mktemp("latent")
    oracle = family_oracle(request.param, path, max_position_embeddings=1024)
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randint(3, COMMON["vocab_size"], (max(LENGTHS),), generator=generator).tolist()
    shared = tokens[:320]
    prompts = [(shared + tokens[n % 7 :])[:n] for n in LENGTHS]
    prompts[2] = tokens[50 : 50 + LENGTHS[2]]
    expected = []
    for prompt in prompts:
        answer = list(prompt)
        for _ in range(OUTPUT):
            answer.append(int(oracle_logits(oracle, torch.tensor(answer))[-1].argmax()))
        expected.append(answer[len(prompt) :])
    return Asked(path, prompts, expected)


def close(running: Engine) -> None:
    if isinstance(running, LeadEngine):
        running.close()


@pytest.mark.parametrize("mode", MODES)
def test_long_prompts_with_latent_attention_are_answered_as_by_transformers(
    asked: Asked, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(OPTIONS, **MODES[mode])
    if mode == "preempted":
        size = load_engine(asked.path, OPTIONS)
        per_block = (1 << 21) // size.config.num_blocks
        options = replace(options, kv_cache_memory=options.kv_cache_memory * per_block)
    num_expanded = 0
    expanded = latent_attention._expanded_prompt

    def counted(*arguments: Any) -> torch.Tensor:
        nonlocal num_expanded
        num_expanded += 1
        return expanded(*arguments)

    monkeypatch.setattr(latent_attention, "_expanded_prompt", counted)
    running = load_engine(asked.path, options)
    try:
        assert running.generate(asked.prompts, GREEDY) == asked.expected
        assert (num_expanded > 0) == (mode != "absorbed chunks")
        assert (running.stats().preemptions_total > 0) == (mode == "preempted")
    finally:
        close(running)


def test_a_long_prompt_after_a_cached_prefix_reads_its_latents_in_the_expanded_form(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = load_engine(asked.path, replace(OPTIONS, max_num_batched_tokens=2048))
    first, second = asked.prompts[:2]
    assert running.generate([first], GREEDY) == asked.expected[:1]
    found: list[tuple[int, int]] = []
    expanded = latent_attention._expanded_prompt

    def noted(q: torch.Tensor, projection: Any, cache: Any, prompt: Any, *rest: Any) -> Any:
        batch = prompt.batch
        found.append((int(batch.query_lens[0]), int(batch.seq_lens[0])))
        return expanded(q, projection, cache, prompt, *rest)

    monkeypatch.setattr(latent_attention, "_expanded_prompt", noted)
    assert running.generate([second], GREEDY) == asked.expected[1:2]
    assert running.stats().prefix_hits_total == 320
    assert set(found) == {(len(second) - 320, len(second))}
    assert len(second) - 320 >= MIN_EXPANDED_QUERIES


def test_keys_and_values_of_few_heads_at_a_time_give_the_same_answers(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_attention, "EXPANDED_BYTES", 1)
    sizes: set[int] = set()
    store = KVCache.store

    def noted(cache: KVCache, both: torch.Tensor, slots: torch.Tensor) -> None:
        if len(both) >= MIN_EXPANDED_QUERIES:
            sizes.add(both.shape[1])
        store(cache, both, slots)

    monkeypatch.setattr(KVCache, "store", noted)
    running = load_engine(asked.path, replace(OPTIONS, max_num_batched_tokens=2048))
    assert running.generate(asked.prompts, GREEDY) == asked.expected
    assert sizes == {2}, "the keys and the values of one head"
