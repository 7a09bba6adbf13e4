"""Greedy answers of every family equal transformers', however the engine comes to them.

Every family answers with 64 tokens; the representative ones answer in every mode of the engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from support.parity import check_greedy_tokens
from support.tiny_families import (
    COMMON,
    FAMILIES,
    LATENT_FAMILIES,
    REPRESENTATIVES,
    STATE_FAMILIES,
    family_oracle,
    oracle_logits,
)

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.kernels.cpu import cpu_kernels
from llmkit.model.decoder import Decoder
from llmkit.model.weight_loader import load_model
from llmkit.runtime.engine.cpu_graphs import CpuGraphRunner
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import SamplingParams

OUTPUT = 14
GREEDY = SamplingParams(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True)


@dataclass
class Family:
    model: Decoder
    prompts: list[list[int]]
    expected: list[list[int]]


@pytest.fixture(scope="module", params=REPRESENTATIVES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    path = tmp_path_factory.mktemp("family")
    oracle = family_oracle(request.param, path)
    generator = torch.Generator().manual_seed(5)
    common = torch.randint(3, COMMON["vocab_size"], (17,), generator=generator).tolist()
    prompts = [
        torch.randint(3, COMMON["vocab_size"], (n,), generator=generator).tolist()
        for n in (1, 9, 30, 44)
    ]
    prompts += [[*common, 3 + n] for n in range(2)] + [[9, 8, 7, 6] * 5]
    expected = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(OUTPUT):
            tokens.append(int(oracle_logits(oracle, torch.tensor(tokens))[-1].argmax()))
        expected.append(tokens[len(prompt) :])
    return Family(load_model(open_checkpoint(path), torch.float32), prompts, expected)


def engine(model: Decoder, *, draft: Decoder | None = None, **chosen: object) -> Engine:
    sizes = {
        "max_model_len": 64,
        "num_blocks": 120,
        "block_size": 16,
        "num_state_snapshots": 100,  # of recurrent layers, for the prefix cache
    }
    config = EngineConfig(device=torch.device("cpu"), dtype=torch.float32, **(sizes | chosen))
    return Engine(model, config, draft=draft)


MODES: dict[str, dict[str, object]] = {
    "eager": {"enable_prefix_caching": False},
    "chunked": {"max_num_batched_tokens": 9, "prefill_chunk_size": 5},
    "preempted": {"num_blocks": 7},
    "async_scheduling": {"async_scheduling": True},
    "ahead, chunked and preempted": {
        "async_scheduling": True,
        "num_blocks": 6,
        "max_num_batched_tokens": 9,
    },
    "speculative": {"num_speculative_tokens": 3},
    "speculative and preempted": {"num_speculative_tokens": 3, "num_blocks": 6},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_of_every_family_equal_those_of_transformers(
    name: str, tmp_path: Path
) -> None:
    """Where the compiled kernels run, every family's decode steps are recorded calls of them."""
    oracle = family_oracle(name, tmp_path)
    model = load_model(open_checkpoint(tmp_path), torch.float32, packed=True)
    answered = check_greedy_tokens(model, partial(oracle_logits, oracle))
    if cpu_kernels.library is not None:
        recorded = answered.runner.graph_runner
        assert isinstance(recorded, CpuGraphRunner)
        assert recorded.enabled, "an operator of torch computes in its decode steps"
        assert recorded.num_graphs > 0


@pytest.mark.parametrize("mode", MODES)
def test_outputs_do_not_depend_on_the_engine_mode(family: Family, mode: str) -> None:
    running = engine(family.model, **MODES[mode])
    assert running.generate(family.prompts, GREEDY) == family.expected
    assert all(pool.num_used_blocks == 0 for pool in running.scheduler.pools)
    if "preempted" in mode and None in family.model.spec.sliding_windows:
        assert running.stats().preemptions_total > 0


@pytest.mark.parametrize("name", STATE_FAMILIES + LATENT_FAMILIES)
def test_states_and_latents_stay_those_of_their_request_beside_cancelled_and_preempted_ones(
    name: str, tmp_path: Path
) -> None:
    oracle = family_oracle(name, tmp_path)
    model = load_model(open_checkpoint(tmp_path), torch.float32, packed=True)
    sizes = {"num_blocks": 8, "max_num_batched_tokens": 24, "prefill_chunk_size": 20}
    running = engine(model, **sizes)
    generator = torch.Generator().manual_seed(8)
    prompts = [
        torch.randint(3, COMMON["vocab_size"], (n,), generator=generator).tolist()
        for n in (30, 5, 41, 17, 33, 9, 26, 48)
    ]
    answers: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts * 2):  # the second time from the prefix cache
        answers[str(index)] = []
        running.add(EngineRequest(str(index), prompt, GREEDY))
    cancelled = ("2", "5", "11")
    num_steps = 0
    while running.has_work:
        for output in running.step():
            answers[output.request_id] += output.token_ids
        num_steps += 1
        if num_steps % 5 == 0 and num_steps // 5 <= len(cancelled):
            running.cancel(cancelled[num_steps // 5 - 1])
    assert running.stats().preemptions_total > 0
    assert running.stats().prefix_hits_total > 0
    for index, prompt in enumerate(prompts):
        whole = max(answers[str(index)], answers[str(index + 8)], key=len)
        assert len(whole) == OUTPUT
        logits = oracle_logits(oracle, torch.tensor(prompt + whole))[len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == whole
        for answer in (answers[str(index)], answers[str(index + 8)]):
            assert answer == whole[: len(answer)]
    assert all(len(answers[n]) == OUTPUT for n in answers.keys() - set(cancelled))
    assert all(pool.num_used_blocks == 0 for pool in running.scheduler.pools)
    if running.scheduler.states is not None:
        running.scheduler.states.begin_step()
        assert running.scheduler.states.cache.num_held_rows == 0


def test_outputs_do_not_depend_on_the_prefix_cache(family: Family) -> None:
    running = engine(family.model)
    for _ in range(2):
        assert running.generate(family.prompts, GREEDY) == family.expected
    stats = running.stats()
    assert stats.prefix_hits_total >= sum((len(p) - 1) // 16 * 16 for p in family.prompts), (
        "the second time all of it"
    )
    assert [running.generate([p], GREEDY)[0] for p in reversed(family.prompts)] == family.expected[
        ::-1
    ]


def test_longrope_requests_share_no_prefix_with_those_of_other_frequencies(
    tmp_path: Path,
) -> None:
    oracle = family_oracle("phi3-longrope", tmp_path)
    model = load_model(open_checkpoint(tmp_path), torch.float32)
    original_length = next(iter(model.spec.ropes.values())).original_max_position_embeddings
    prompt = torch.randint(3, 90, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    running = engine(model, max_model_len=128)
    running.generate([prompt], GREEDY)
    assert len(prompt) + OUTPUT <= original_length, "the first one is short"
    num_tokens = original_length - len(prompt) + 10
    long = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    (answer,) = running.generate([prompt], long)
    assert running.stats().prefix_hits_total == 0
    # Of a text beyond the original length, transformers computes all positions anew, as here.
    logits = oracle_logits(oracle, torch.tensor(prompt + answer))[len(prompt) - 1 : -1]
    beyond = original_length - len(prompt)
    assert logits.argmax(-1).tolist()[beyond:] == answer[beyond:]
    assert running.generate([prompt], long) == [answer]
    assert running.stats().prefix_hits_total > 0, "requests of the same kind share it"


def test_draft_model_changes_only_the_number_of_steps(family: Family) -> None:
    if None not in family.model.spec.sliding_windows:
        pytest.skip(
            "a draft model needs the blocks of all tokens, which a model of windows gives back"
        )
    if family.model.spec.recurrent is not None:
        pytest.skip("a draft model cannot take back its recurrent states")
    running = engine(family.model, draft=family.model, num_speculative_tokens=3)
    assert running.generate(family.prompts, GREEDY) == family.expected
    stats = running.stats()
    assert stats.accepted_total == stats.drafted_total > 0, "a model agrees with itself"
    assert running.num_steps <= 2 + -(-OUTPUT // 4)
