"""Pooled hidden states equal transformers', whatever else is in the engine's steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.model.decoder import Decoder
from llmkit.model.weight_loader import load_model
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.engine_outputs import EngineOutput
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import Pooling, SamplingParams
from llmkit.runtime.engine_loader import load_engine
from llmkit.runtime.parallel.leader import LeadEngine

MODEL = {"architecture": "gemma2", "dtype": "float32"}

POOLED = SamplingParams(temperature=0.0, max_tokens=1)
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
KINDS: tuple[Pooling, ...] = ("last", "mean")


@pytest.fixture(scope="module")
def decoder(model: Path) -> Decoder:
    return load_model(open_checkpoint(model), torch.float32)


def engine(decoder: Decoder, **sizes: Any) -> Engine:
    chosen = {"max_model_len": 256, "num_blocks": 400} | sizes
    return Engine(decoder, EngineConfig(device=torch.device("cpu"), dtype=torch.float32, **chosen))


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randint(3, 512, (length,), generator=generator).tolist()
        for length in (1, 7, 32, 45, 100)
    ]


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, np.ndarray]:
    """transformers' hidden states, pooled, by the names that `run` gives requests."""
    oracle = transformers.AutoModel.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    found = {}
    for index, prompt in enumerate(prompts()):
        with torch.inference_mode():
            hidden = oracle(torch.tensor([prompt])).last_hidden_state[0]
        found[f"last {index}"], found[f"mean {index}"] = hidden[-1].numpy(), hidden.mean(0).numpy()
    return found


def run(
    running: Engine, others: Sequence[list[int]] = ()
) -> tuple[dict[str, np.ndarray], list[list[int]]]:
    """What is pooled of all prompts in both ways, and the greedy answers to `others` beside."""
    for index, prompt in enumerate(others):
        running.add(EngineRequest(f"{index}", prompt, GREEDY))
    for kind, (index, prompt) in product(KINDS, enumerate(prompts())):
        running.add(EngineRequest(f"{kind} {index}", prompt, POOLED, pooling=kind))
    found = {}
    answers = [list[int]() for _ in others]
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
    return found.keys() == expected.keys() and all(
        np.abs(found[name] - expected[name]).max() < 1e-4 for name in found
    )


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"max_num_batched_tokens": 24, "prefill_chunk_size": 16},  # in chunks
        {
            "num_blocks": 16,
            "max_num_batched_tokens": 40,
        },  # some give their blocks up, and begin again
        {"async_scheduling": True, "max_num_seqs": 3},
        {"num_speculative_tokens": 3},
    ],
)
def test_embeddings_equal_transformers_beside_other_requests(
    decoder: Decoder, expected: dict[str, np.ndarray], sizes: dict[str, Any]
) -> None:
    others = [prompt[::-1] for prompt in prompts()]
    running = engine(decoder, **sizes)
    found, answers = run(running, others)
    assert same(found, expected)
    assert answers == engine(decoder).generate(others, GREEDY)
    assert running.stats().prompt_tokens_total == 3 * sum(map(len, prompts()))
    assert bool(running.stats().preemptions_total) == ("num_blocks" in sizes)


def test_pooling_last_uses_the_prefix_cache_and_mean_does_not(
    decoder: Decoder, expected: dict[str, np.ndarray]
) -> None:
    running = engine(decoder)
    run(running)
    hits = running.stats().prefix_hits_total
    found, _ = run(running)
    assert same(found, expected)
    # All blocks of a prompt but that of its last token, for one of the two kinds.
    assert running.stats().prefix_hits_total - hits == sum(
        (len(prompt) - 1) // 16 * 16 for prompt in prompts()
    )


def test_pooling_prompt_may_fill_the_context(decoder: Decoder) -> None:
    running = engine(decoder, max_model_len=100, num_blocks=7)
    found, _ = run(running)
    assert len(found) == 2 * len(prompts())


def test_pooling_states_not_finite_fail_alone(model: Path, expected: dict[str, np.ndarray]) -> None:
    broken = load_model(open_checkpoint(model), torch.float32)
    unused = next(
        token for token in range(3, 512) if not any(token in prompt for prompt in prompts())
    )
    broken.embedding[unused] = float("nan")
    running = engine(broken)
    outputs = list[EngineOutput]()
    for kind in KINDS:
        running.add(EngineRequest(f"broken {kind}", [5, unused, 6], POOLED, pooling=kind))
        running.add(EngineRequest(f"{kind} 2", prompts()[2], POOLED, pooling=kind))
    while running.has_work:
        outputs += running.step()
    errors = {output.request_id for output in outputs if output.error and output.embedding is None}
    assert errors == {"broken last", "broken mean"}
    found = {
        o.request_id: np.frombuffer(o.embedding, np.float32)
        for o in outputs
        if o.embedding is not None
    }
    assert same(found, {name: expected[name] for name in ("last 2", "mean 2")})


def test_pooling_on_several_ranks(model: Path, expected: dict[str, np.ndarray]) -> None:
    running = load_engine(model, EngineOptions(device="cpu", kv_cache_memory=1 << 20, tp=2, pp=2))
    assert isinstance(running, LeadEngine)
    try:
        found, _ = run(running)
    finally:
        running.close()
    assert same(found, expected)
