"""Draft tokens accepted by a draw: rates, means, repeated runs, and nothing when it is off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.draft_models import similar_decoder
from support.tiny_draft_heads import glm_with_mtp

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.errors import UsageError
from llmkit.model.decoder import Decoder
from llmkit.model.weight_loader import load_model
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine.synthetic_acceptance import (
    _uniform,
    acceptance_rates,
    synthetic_tokens,
)
from llmkit.runtime.engine_loader import load_engine

MODEL = {"dtype": "float32"}
GREEDY = SamplingParams(temperature=0.0, max_tokens=120, ignore_eos=True)
PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [20, 21, 22, 23, 24]]


@pytest.mark.parametrize(
    ("rates", "length", "expected"),
    [
        ((), None, ()),
        ((0.5,), None, (1, 1, 0, 0)),
        ((0.7,), None, (1, 1, 0.8, 0)),
        ((0.9, 0.5, 0.5, 0.1), None, (0.9, 0.5, 0.5, 0.1)),
        ((), 1.0, (0, 0, 0, 0)),
        ((), 2.6, (1, 0.6, 0, 0)),
        ((), 5.0, (1, 1, 1, 1)),
    ],
)
def test_acceptance_rates_have_the_asked_mean(
    rates: tuple[float, ...], length: float | None, expected: tuple[float, ...]
) -> None:
    assert acceptance_rates(rates, length, 4) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("rates", "length", "drafts", "text"),
    [
        ((0.5,), 2.0, 4, "exclude each other"),
        ((0.5,), None, 0, "without draft tokens. Give --speculate or --draft-model"),
        ((), 0.5, 4, "length: 0.5 is out of range. From 1 to 5, as a step has 4 draft tokens"),
        ((), 5.5, 4, "5.5 is out of range"),
        ((1.5,), None, 4, "rates: 1.5 is out of range. Shares from 0 to 1"),
        ((0.5, 0.4), None, 3, "0.5,0.4 do not fit 3 draft tokens"),
        ((0.5, 0.6), None, 2, "that do not rise"),
    ],
)
def test_acceptance_rates_that_no_draft_can_have_are_refused(
    rates: tuple[float, ...], length: float | None, drafts: int, text: str
) -> None:
    with pytest.raises(UsageError, match=text) as caught:
        acceptance_rates(rates, length, drafts)
    assert caught.value.exit_code == 2


def test_draws_are_uniform_in_arrivals_and_positions() -> None:
    draws = torch.tensor([[_uniform(a, p) for p in range(200)] for a in range(200)])
    assert 0 <= draws.min() < draws.max() < 1
    counts = torch.histc(draws, bins=20, min=0, max=1)
    assert (counts - 2000).abs().max() < 5 * 2000**0.5
    for pair in ((draws[1:], draws[:-1]), (draws[:, 1:], draws[:, :-1])):
        stacked = torch.stack([part.flatten() for part in pair])
        assert torch.corrcoef(stacked)[0, 1].abs() < 0.03


def test_synthetic_tokens_end_with_a_sampled_one() -> None:
    assert synthetic_tokens((1, 1, 0), [7, 8, 9], [1, 2, 3, 4], 0, 5) == [7, 8, 3]
    assert synthetic_tokens((1, 1, 1), [7, 8, 9], [1, 2, 3, 4], 0, 5) == [7, 8, 9, 4]
    assert synthetic_tokens((0,), [7], [7, 2], 0, 5) == [7]
    not_finite = synthetic_tokens((1, 1, 1), [7, 8, 9], [1, -1, 3, 4], 0, 5)
    assert not_finite == [7, -1]


@pytest.fixture(scope="module")
def decoder(model: Path) -> Decoder:
    return load_model(open_checkpoint(model), torch.float32)


def engine(decoder: Decoder, draft: Decoder | None, rates: tuple[float, ...]) -> Engine:
    config = EngineConfig(
        max_model_len=256,
        num_blocks=400,
        device=torch.device("cpu"),
        dtype=torch.float32,
        num_speculative_tokens=4 if draft else 0,
        synthetic_acceptance_rates=rates,
    )
    return Engine(decoder, config, (), draft)


def test_acceptance_is_the_asked_one_and_runs_repeat_it(model: Path, decoder: Decoder) -> None:
    rates = (0.9, 0.6, 0.3, 0.0)
    draft = similar_decoder(model)
    running = engine(decoder, draft, rates)
    answers = running.generate(PROMPTS * 4, [GREEDY] * 12)
    assert engine(decoder, draft, rates).generate(PROMPTS * 4, [GREEDY] * 12) == answers
    assert all(len(answer) == 120 for answer in answers)
    stats = running.stats()
    length = 1 + stats.accepted_total / stats.drafts_total
    # About 500 drafts, each with a variance of the accepted tokens of 1.08.
    assert length == pytest.approx(1 + sum(rates), abs=4 * (1.08 / stats.drafts_total) ** 0.5)
    shares = [count / stats.drafts_total for count in stats.accepted_per_pos_total]
    assert shares == pytest.approx(rates, abs=0.1)


def test_all_or_no_drafts_are_accepted(model: Path, decoder: Decoder) -> None:
    plain = engine(decoder, None, ()).generate(PROMPTS, [GREEDY] * 3)
    draft = similar_decoder(model)
    none = engine(decoder, draft, (0.0,) * 4)
    # Each token is then the model's own: what it would generate without drafts.
    assert none.generate(PROMPTS, [GREEDY] * 3) == plain
    assert none.stats().accepted_total == 0
    every = engine(decoder, draft, (1.0,) * 4)
    assert every.generate(PROMPTS, [GREEDY] * 3) != plain
    assert every.stats().accepted_total == every.stats().drafted_total > 0
    assert engine(decoder, draft, ()).generate(PROMPTS, [GREEDY] * 3) == plain


def test_options_reach_an_engine_with_an_mtp_head(tmp_path: Path) -> None:
    glm_with_mtp(tmp_path / "mtp", steps=1)
    options = EngineOptions(
        device="cpu", max_model_len=160, speculate="mtp:2", synthetic_acceptance_length=2.5
    )
    running = load_engine(open_checkpoint(tmp_path / "mtp"), options)
    assert running.config.synthetic_acceptance_rates == (1, 0.5)
    answers = running.generate(PROMPTS, [GREEDY] * 3)
    assert [len(answer) for answer in answers] == [120] * 3
    stats = running.stats()
    assert 1 + stats.accepted_total / stats.drafts_total == pytest.approx(2.5, abs=0.2)
