"""Hidden states that are asked for instead of an answer: transformers', whatever else is in the engine's steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny import tiny_checkpoint

from llmkit.checkpoint.source import open_checkpoint
from llmkit.model.decoder import Decoder
from llmkit.model.loader import load_model
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.types import EngineConfig, Pooling, Request, SamplingParams, TokenOutput
from llmkit.runtime.load import EngineOptions, load_engine
from llmkit.runtime.parallel.lead import LeadEngine

POOLED = SamplingParams(temperature=0.0, max_tokens=1)
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
KINDS: tuple[Pooling, ...] = ("last", "mean")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("pooling"), "gemma2", dtype="float32")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Decoder:
    return load_model(open_checkpoint(checkpoint), torch.float32)


def engine(model: Decoder, **sizes: Any) -> Engine:
    chosen = {"max_model_len": 256, "num_blocks": 400} | sizes
    return Engine(model, EngineConfig(device=torch.device("cpu"), dtype=torch.float32, **chosen))


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 512, (length,), generator=generator).tolist() for length in (1, 7, 32, 45, 100)]


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> dict[str, np.ndarray]:
    """transformers' hidden states, pooled, by the names that `run` gives requests."""
    oracle = transformers.AutoModel.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    found = {}
    for index, prompt in enumerate(prompts()):
        with torch.inference_mode():
            hidden = oracle(torch.tensor([prompt])).last_hidden_state[0]
        found[f"last {index}"], found[f"mean {index}"] = hidden[-1].numpy(), hidden.mean(0).numpy()
    return found


def run(running: Engine, others: Sequence[list[int]] = ()) -> tuple[dict[str, np.ndarray], list[list[int]]]:
    """What is pooled of all prompts in both ways, and the greedy answers to `others` beside."""
    for index, prompt in enumerate(others):
        running.add(Request(f"{index}", prompt, GREEDY))
    for kind, (index, prompt) in product(KINDS, enumerate(prompts())):
        running.add(Request(f"{kind} {index}", prompt, POOLED, pooling=kind))
    found, answers = {}, [list[int]() for _ in others]
    while running.has_work:
        for output in running.step():
            if output.embedding is not None:
                assert (output.finish_reason, output.token_ids) == ("stop", [])
                found[output.request_id] = np.frombuffer(output.embedding, np.float32)
            else:
                answers[int(output.request_id)] += output.token_ids
    assert running.stats().kv_used_blocks == 0
    return found, answers


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return found.keys() == expected.keys() and all(np.abs(found[name] - expected[name]).max() < 1e-4 for name in found)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"max_num_batched_tokens": 24, "chunk_tokens": 16},  # in chunks
        {"num_blocks": 16, "max_num_batched_tokens": 40},  # some give their blocks up, and begin again
        {"ahead": True, "max_num_seqs": 3},
        {"speculate": 3},
    ],
)
def test_they_are_those_of_transformers_beside_answers(
    model: Decoder, expected: dict[str, np.ndarray], sizes: dict[str, Any]
) -> None:
    others = [prompt[::-1] for prompt in prompts()]
    running = engine(model, **sizes)
    found, answers = run(running, others)
    assert same(found, expected)
    assert answers == engine(model).generate(others, GREEDY)
    assert running.stats().prompt_tokens_total == 3 * sum(map(len, prompts()))
    assert bool(running.stats().preemptions_total) == ("num_blocks" in sizes)


def test_a_mean_skips_no_cached_token_and_the_last_state_may(model: Decoder, expected: dict[str, np.ndarray]) -> None:
    running = engine(model)
    run(running)
    hits = running.stats().prefix_hits_total
    found, _ = run(running)
    assert same(found, expected)
    # All blocks of a prompt but that of its last token, for one of the two kinds.
    assert running.stats().prefix_hits_total - hits == sum((len(prompt) - 1) // 16 * 16 for prompt in prompts())


def test_a_prompt_may_fill_the_context(model: Decoder) -> None:
    running = engine(model, max_model_len=100, num_blocks=7)
    found, _ = run(running)
    assert len(found) == 2 * len(prompts())


def test_states_that_are_not_finite_fail_alone(checkpoint: Path, expected: dict[str, np.ndarray]) -> None:
    broken = load_model(open_checkpoint(checkpoint), torch.float32)
    unused = next(token for token in range(3, 512) if not any(token in prompt for prompt in prompts()))
    broken.embedding[unused] = float("nan")
    running, outputs = engine(broken), list[TokenOutput]()
    for kind in KINDS:
        running.add(Request(f"broken {kind}", [5, unused, 6], POOLED, pooling=kind))
        running.add(Request(f"{kind} 2", prompts()[2], POOLED, pooling=kind))
    while running.has_work:
        outputs += running.step()
    errors = {output.request_id for output in outputs if output.error and output.embedding is None}
    assert errors == {"broken last", "broken mean"}
    found = {o.request_id: np.frombuffer(o.embedding, np.float32) for o in outputs if o.embedding is not None}
    assert same(found, {name: expected[name] for name in ("last 2", "mean 2")})


def test_on_several_ranks(checkpoint: Path, expected: dict[str, np.ndarray]) -> None:
    running = load_engine(checkpoint, EngineOptions(device="cpu", kv_cache_memory=1 << 20, tp=2, pp=2))
    assert isinstance(running, LeadEngine)
    try:
        found, _ = run(running)
    finally:
        running.close()
    assert same(found, expected)
