"""Answers in this process: the engine's own, whatever else is asked at the same time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from support.tiny_models import EOS_ID

from llmkit.checkpoint.checkpoint import Checkpoint
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.errors import InputError, ShortageError
from llmkit.runtime import generate as module
from llmkit.runtime.engine.engine_errors import RequestError
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine
from llmkit.runtime.generate import generate

MODEL = {"dtype": "float32"}

PROMPTS = [[5, 6, 7], [300, 4, 9, 11, 200, 31, 8], [77], list(range(10, 60))]


@pytest.fixture(scope="module")
def opened_checkpoint(model: Path) -> Checkpoint:
    return open_checkpoint(model)


def test_generate_greedy_equals_transformers(model: Path, opened_checkpoint: Checkpoint) -> None:
    oracle = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    oracle.generation_config.eos_token_id = None
    expected = []
    for prompt in PROMPTS:
        with torch.inference_mode():
            out = oracle.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        expected.append(out[0, len(prompt) :].tolist())
    assert (
        generate(opened_checkpoint, PROMPTS, 12, 0.0, 0, device="cpu", stop_at_eos=False)
        == expected
    )


def test_generate_samples_each_prompt_with_its_own_seed(opened_checkpoint: Checkpoint) -> None:
    together = generate(opened_checkpoint, PROMPTS, 20, 1.0, 40, device="cpu")
    for index, prompt in enumerate(PROMPTS):
        sampling = SamplingParams(temperature=1.0, seed=40 + index, max_tokens=20)
        alone = load_engine(opened_checkpoint, EngineOptions(device="cpu")).generate(
            [prompt], sampling
        )
        assert [together[index]] == alone
    assert generate(opened_checkpoint, PROMPTS, 20, 1.0, 40, device="cpu") == together
    assert generate(opened_checkpoint, PROMPTS, 20, 1.0, 41, device="cpu") != together
    assert (
        len(
            {
                tuple(answer)
                for answer in generate(
                    opened_checkpoint, [[9]] * 6, 20, 1.0, 2**63 - 3, device="cpu"
                )
            }
        )
        == 6
    )


def test_generate_stops_at_eos_only_when_asked(opened_checkpoint: Checkpoint) -> None:
    prompts = [[token] for token in range(3, 67)]
    ended = generate(opened_checkpoint, prompts, 60, 1.0, 0, device="cpu")
    full = generate(opened_checkpoint, prompts, 60, 1.0, 0, device="cpu", stop_at_eos=False)
    assert {len(answer) for answer in full} == {60}
    cut = [answer[: answer.index(EOS_ID) + 1] if EOS_ID in answer else answer for answer in full]
    assert ended == cut
    assert any(len(answer) < 60 for answer in ended)


def test_generate_with_a_small_cache_gives_the_same_outputs(
    opened_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(opened_checkpoint, PROMPTS, 20, 1.0, 3, device="cpu")
    engines = []

    def keep(*args: object) -> object:
        engines.append(load_engine(*args))  # type: ignore[arg-type]
        return engines[-1]

    monkeypatch.setattr(module, "load_engine", keep)
    monkeypatch.setattr(
        module, "MAX_KV_CACHE_BYTES", 2 * 70 * 2 * 2 * 2 * 16 * 4
    )  # two requests of 70 tokens
    assert generate(opened_checkpoint, PROMPTS, 20, 1.0, 3, device="cpu") == expected
    (engine,) = engines
    assert (engine.config.max_num_seqs, engine.config.max_model_len, engine.config.num_blocks) == (
        2,
        70,
        10,
    )
    assert engine.stats().preemptions_total == 0


def test_generate_without_prompts_and_with_impossible_ones(
    opened_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert generate(opened_checkpoint, [], 5, 0.0, 0) == []
    with pytest.raises(RequestError, match="empty"):
        generate(opened_checkpoint, [[4], []], 5, 0.0, 0, device="cpu")
    with pytest.raises(InputError, match="At most 256 tokens"):
        generate(opened_checkpoint, [[4] * 250], 7, 0.0, 0, device="cpu")
    monkeypatch.setattr("llmkit.runtime.engine_plan.weight_bytes", lambda *_, **__: 1 << 50)
    with pytest.raises(ShortageError, match="the weights need"):
        generate(opened_checkpoint, [[4]], 5, 0.0, 0, device="cpu")
