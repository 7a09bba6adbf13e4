"""Answers in this process: the engine's own, whatever else is asked at the same time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tiny import EOS_ID, tiny_checkpoint

from llmkit.checkpoint.errors import InputError, ShortageError
from llmkit.checkpoint.source import Checkpoint, open_checkpoint
from llmkit.runtime import generate as module
from llmkit.runtime.engine.types import RequestError, SamplingParams
from llmkit.runtime.generate import generate
from llmkit.runtime.load import EngineOptions, load_engine

PROMPTS = [[5, 6, 7], [300, 4, 9, 11, 200, 31, 8], [77], list(range(10, 60))]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("generate"), dtype="float32")


@pytest.fixture(scope="module")
def checkpoint(path: Path) -> Checkpoint:
    return open_checkpoint(path)


def test_greedy_answers_are_transformers(path: Path, checkpoint: Checkpoint) -> None:
    oracle = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    oracle.generation_config.eos_token_id = None
    expected = []
    for prompt in PROMPTS:
        with torch.inference_mode():
            out = oracle.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        expected.append(out[0, len(prompt) :].tolist())
    assert generate(checkpoint, PROMPTS, 12, 0.0, 0, device="cpu", stop_at_eos=False) == expected


def test_samples_are_the_engines_alone_with_a_seed_each(checkpoint: Checkpoint) -> None:
    together = generate(checkpoint, PROMPTS, 20, 1.0, 40, device="cpu")
    for index, prompt in enumerate(PROMPTS):
        sampling = SamplingParams(temperature=1.0, seed=40 + index, max_tokens=20)
        alone = load_engine(checkpoint, EngineOptions(device="cpu")).generate([prompt], sampling)
        assert [together[index]] == alone
    assert generate(checkpoint, PROMPTS, 20, 1.0, 40, device="cpu") == together
    assert generate(checkpoint, PROMPTS, 20, 1.0, 41, device="cpu") != together
    assert len({tuple(answer) for answer in generate(checkpoint, [[9]] * 6, 20, 1.0, 2**63 - 3, device="cpu")}) == 6


def test_answers_end_at_eos_only_when_asked_to(checkpoint: Checkpoint) -> None:
    prompts = [[token] for token in range(3, 67)]
    ended = generate(checkpoint, prompts, 60, 1.0, 0, device="cpu")
    full = generate(checkpoint, prompts, 60, 1.0, 0, device="cpu", stop_at_eos=False)
    assert {len(answer) for answer in full} == {60}
    cut = [answer[: answer.index(EOS_ID) + 1] if EOS_ID in answer else answer for answer in full]
    assert ended == cut
    assert any(len(answer) < 60 for answer in ended)


def test_a_small_cache_changes_nothing_and_is_never_overfull(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(checkpoint, PROMPTS, 20, 1.0, 3, device="cpu")
    engines = []

    def keep(*args: object) -> object:
        engines.append(load_engine(*args))  # type: ignore[arg-type]
        return engines[-1]

    monkeypatch.setattr(module, "load_engine", keep)
    monkeypatch.setattr(module, "KV_BYTES", 2 * 70 * 2 * 2 * 2 * 16 * 4)  # two requests of 70 tokens
    assert generate(checkpoint, PROMPTS, 20, 1.0, 3, device="cpu") == expected
    (engine,) = engines
    assert (engine.config.max_num_seqs, engine.config.max_model_len, engine.config.num_blocks) == (2, 70, 10)
    assert engine.stats().preemptions_total == 0


def test_nothing_asked_and_what_cannot_be_answered(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    assert generate(checkpoint, [], 5, 0.0, 0) == []
    with pytest.raises(RequestError, match="empty"):
        generate(checkpoint, [[4], []], 5, 0.0, 0, device="cpu")
    with pytest.raises(InputError, match="At most 256 tokens"):
        generate(checkpoint, [[4] * 250], 7, 0.0, 0, device="cpu")
    monkeypatch.setattr("llmkit.runtime.load.weight_bytes", lambda *_: 1 << 50)
    with pytest.raises(ShortageError, match="the weights need"):
        generate(checkpoint, [[4]], 5, 0.0, 0, device="cpu")
