"""Penalties, biases and log probabilities against transformers and a plain log softmax."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.device_cases import sample_in_torch, use_tables
from support.tiny_models import EOS_ID
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.kernels.sampling import FULL_VOCAB, gather_logprobs
from llmkit.model.decoder import Decoder
from llmkit.model.weight_loader import load_model
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.engine_outputs import Logprobs
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine
from llmkit.runtime.parallel.leader import LeadEngine

MODEL = {"dtype": "float32"}

PROMPTS = [[5, 6, 7, 5, 6, 7], [300, 4, 9, 11, 200, 31, 8], list(range(10, 60)), [77]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunked": {"max_num_batched_tokens": 9, "prefill_chunk_size": 5},
    "preempted": {"num_blocks": 24},
    "async_scheduling": {"async_scheduling": True},
    "speculative": {"num_speculative_tokens": 3},
}


@pytest.fixture(scope="module")
def decoder(model: Path) -> Decoder:
    return load_model(open_checkpoint(model), torch.float32)


@pytest.fixture(scope="module")
def oracle(model: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def engine(decoder: Decoder, **chosen: Any) -> Engine:
    sizes: dict[str, Any] = {"max_model_len": 80, "num_blocks": 120, "block_size": 16}
    return Engine(
        decoder,
        EngineConfig(device=torch.device("cpu"), dtype=torch.float32, **(sizes | chosen)),
        (EOS_ID,),
    )


def run(
    running: Engine, requests: list[EngineRequest]
) -> dict[str, tuple[list[int], list[Logprobs], list[Logprobs]]]:
    found: dict[str, tuple[list[int], list[Logprobs], list[Logprobs]]] = {
        r.request_id: ([], [], []) for r in requests
    }
    for request in requests:
        running.add(request)
    while running.has_work:
        for output in running.step():
            ids, new, old = found[output.request_id]
            ids += output.token_ids
            new += output.logprobs or []
            old += output.prompt_logprobs or []
    return found


def expected_with(oracle: Any, prompt: list[int], asked: SamplingParams) -> list[int]:
    """Greedy tokens after penalties, one forward pass each."""
    tokens = list(prompt)
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(asked.repetition_penalty)])
    for _ in range(asked.max_tokens):
        with torch.no_grad():
            logits = oracle(torch.tensor([tokens])).logits[:, -1].float()
        for token, value in asked.logit_bias.items():
            logits[0, token] += value
        if len(tokens) - len(prompt) < asked.min_tokens and not asked.ignore_eos:
            logits[0, EOS_ID] = -math.inf
        logits = processors(torch.tensor([tokens]), logits)
        for token in set(tokens[len(prompt) :]):
            times = tokens[len(prompt) :].count(token)
            logits[0, token] -= asked.presence_penalty + asked.frequency_penalty * times
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


SHAPES: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.7},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.7, "presence_penalty": -0.2},
    "bias": {"logit_bias": {5: 2.0, 9: -100.0, 300: 1.0}},
    "all": {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "logit_bias": {8: 1.5},
    },
}


@pytest.mark.parametrize("has_tables", [False, True], ids=["tokens", "tables"])
@pytest.mark.parametrize("mode", MODES)
def test_logits_processors_equal_plain_arithmetic(
    decoder: Decoder, oracle: Any, mode: str, has_tables: bool
) -> None:
    """has_tables: as on a GPU. Requests join and end, so that slots are used again."""
    asked = [replace(GREEDY, **SHAPES[name]) for name in SHAPES] + [GREEDY]
    requests = [
        EngineRequest(f"{i} {j}", prompt, one)
        for i, prompt in enumerate(PROMPTS)
        for j, one in enumerate(asked)
    ]
    running = engine(decoder, **MODES[mode])
    if has_tables:
        use_tables(running)
        running.runner.graph_runner.sampler = sample_in_torch  # type: ignore[misc]
    found = run(running, requests)
    for request in requests:
        assert found[request.request_id][0] == expected_with(
            oracle, request.prompt_token_ids, request.sampling_params
        ), request.request_id


def test_min_tokens_delays_the_end(decoder: Decoder) -> None:
    wanted = SamplingParams(
        temperature=0.0, max_tokens=9, logit_bias={EOS_ID: 1000.0}, min_tokens=4
    )
    for mode in MODES.values():
        for ids, _, _ in run(
            engine(decoder, **mode),
            [EngineRequest(str(i), p, wanted) for i, p in enumerate(PROMPTS)],
        ).values():
            assert len(ids) == 5
            assert ids.index(EOS_ID) == 4
    own = replace(
        wanted, logit_bias={9: 1000.0}, stop_token_ids=(9,), ignore_eos=True, max_tokens=9
    )
    for ids in engine(decoder).generate(PROMPTS, own):
        assert (len(ids), ids.index(9)) == (5, 4)
    stops = replace(
        wanted, logit_bias={}, stop_token_ids=tuple(range(512)), ignore_eos=True, min_tokens=0
    )
    assert all(len(ids) == 1 for ids in engine(decoder).generate(PROMPTS, stops))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_are_those_of_the_unchanged_logits(
    decoder: Decoder, oracle: Any, mode: str, temperature: float
) -> None:
    asked = replace(
        GREEDY, temperature=temperature, seed=3, logprobs=4, prompt_logprobs=2, presence_penalty=0.5
    )
    requests = [
        EngineRequest(
            str(i), prompt, [asked, replace(asked, logprobs=0, prompt_logprobs=None), GREEDY][i % 3]
        )
        for i, prompt in enumerate([*PROMPTS, *PROMPTS])
    ]
    running = engine(decoder, **MODES[mode])
    run(
        running, [replace(request, request_id=f"warm {request.request_id}") for request in requests]
    )  # what is cached changes nothing
    found = run(running, requests)
    for request in requests:
        (ids, new, old), prompt, sampling = (
            found[request.request_id],
            request.prompt_token_ids,
            request.sampling_params,
        )
        with torch.inference_mode():
            logits = oracle(torch.tensor([prompt + ids])).logits[0].float()
        truth = logits.log_softmax(-1)
        assert len(old) == (len(prompt) - 1 if sampling.prompt_logprobs is not None else 0)
        assert len(new) == (len(ids) if sampling.logprobs is not None else 0)
        reported = [
            *((at, one, sampling.prompt_logprobs) for at, one in enumerate(old)),
            *((len(prompt) - 1 + at, one, sampling.logprobs) for at, one in enumerate(new)),
        ]
        for at, one, count in reported:
            assert one.logprob == pytest.approx(float(truth[at, (prompt + ids)[at + 1]]), abs=1e-3)
            values, tokens = truth[at].topk(count)
            assert [token for token, _ in one.top] == tokens.tolist()
            assert [value for _, value in one.top] == pytest.approx(values.tolist(), abs=1e-3)


def test_ranks_process_logits_and_return_logprobs_as_one(model: Path) -> None:
    asked = replace(
        GREEDY,
        logprobs=5,
        prompt_logprobs=3,
        repetition_penalty=1.3,
        logit_bias={400: 2.0, 3: -9.0},
    )
    requests = [EngineRequest(str(i), prompt, asked) for i, prompt in enumerate(PROMPTS)]
    found = []
    for layout in ({}, {"tp": 2, "pp": 2}):
        running = load_engine(model, EngineOptions(device="cpu", kv_cache_memory=1 << 20, **layout))
        found.append(run(running, requests))
        if isinstance(running, LeadEngine):
            running.close()
    for request in requests:
        (ids, *one), (same, *other) = (each[request.request_id] for each in found)
        assert ids == same
        for mine, theirs in zip(one[0] + one[1], other[0] + other[1], strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [token for token, _ in mine.top] == [token for token, _ in theirs.top]


def test_gather_logprobs_with_few_tokens() -> None:
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    own, values, tokens = gather_logprobs(logits, torch.tensor([0, 3, 2]), 10, FULL_VOCAB)
    truth = logits.log_softmax(-1)
    assert torch.allclose(own, truth[torch.arange(3), [0, 3, 2]])
    assert values.shape == tokens.shape == (3, 4)
    assert torch.allclose(values, truth.sort(descending=True).values)
    assert gather_logprobs(logits, torch.tensor([0, 3, 2]), 0, FULL_VOCAB)[1].shape == (3, 0)
