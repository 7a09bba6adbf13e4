"""Recorded decode steps give what the model itself gives, bit for bit, and are not used where they could not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_checkpoint

from llmkit.kernels import native
from llmkit.model.decoder import DecoderLayer
from llmkit.runtime.engine import replay
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.types import SamplingParams
from llmkit.runtime.load import EngineOptions, load_engine

needs_library = pytest.mark.skipif(native.library is None, reason=f"compiled kernels: {native.status()}")
PROMPTS = [[5, 6, 7], [9] * 40, [11, 12], list(range(20, 60)), [3], [4, 4], [8] * 17]


def engine(model: Path, **options: Any) -> Engine:
    return load_engine(model, EngineOptions(device="cpu", max_model_len=128, **options))


def answers(one: Engine) -> list[list[int]]:
    """Requests that end one after the other, so that steps of every size come, small ones again and again."""
    sampling = [
        SamplingParams(temperature=0.7, seed=index, max_tokens=6 + 5 * index, ignore_eos=True)
        for index in range(len(PROMPTS))
    ]
    return one.generate(PROMPTS, sampling)


@pytest.fixture
def layers_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each pass through a layer."""
    seen: list[int] = []
    call = DecoderLayer.advance

    def counted(self: DecoderLayer, hidden: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(len(hidden))
        return call(self, hidden, *arguments)

    monkeypatch.setattr(DecoderLayer, "advance", counted)
    return seen


@needs_library
@pytest.mark.parametrize(
    ("architecture", "config"),
    [("llama", {}), ("mistral", {"sliding_window": 24}), ("gemma2", {"sliding_window": 24}), ("qwen2", {})],
)
def test_the_same_tokens_with_a_fraction_of_the_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers_run: list[int], architecture: str, config: dict[str, Any]
) -> None:
    model = tiny_checkpoint(tmp_path, architecture, **config)
    recorded = engine(model)
    first = answers(recorded)
    few = len(layers_run)
    layers_run.clear()
    monkeypatch.setattr(replay, "MOST_ELEMENTS", 0)
    assert answers(engine(model)) == first
    assert few < len(layers_run) / 2
    assert recorded.runner.recordings.possible
    assert len(recorded.runner.recordings._made) == replay.KEPT


@needs_library
def test_every_hidden_state_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, through the logits."""

    def logits(one: Engine) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        compute = one.model.logits
        monkeypatch.setattr(one.model, "logits", lambda hidden: seen.append(compute(hidden)) or seen[-1].clone())
        answers(one)
        return seen

    model = tiny_checkpoint(tmp_path)
    first = logits(engine(model))
    monkeypatch.setattr(replay, "MOST_ELEMENTS", 0)
    second = logits(engine(model))
    assert len(first) == len(second) > 30
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_library
@pytest.mark.parametrize(
    ("architecture", "options"), [("mixtral", {}), ("llama", {"kv_cache_dtype": "int8"})], ids=["experts", "codes"]
)
def test_steps_that_torch_has_a_part_in_are_not_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, options: dict[str, Any]
) -> None:
    model = tiny_checkpoint(tmp_path, architecture)
    one = engine(model, **options)
    first = answers(one)
    assert not one.runner.recordings.possible
    assert not one.runner.recordings._made
    monkeypatch.setattr(replay, "MOST_ELEMENTS", 0)
    assert answers(engine(model, **options)) == first


def test_nothing_is_recorded_without_compiled_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_checkpoint(tmp_path)
    monkeypatch.setattr(native, "library", None)
    one = engine(model)
    assert len(answers(one)) == len(PROMPTS)
    assert not one.runner.recordings.possible


@needs_library
def test_a_step_that_fails_while_it_is_recorded_leaves_the_library_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, library = engine(tiny_checkpoint(tmp_path)), native.library

    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(one.model, "run_layers", fail)
    recording = replay.Recording(one.model, 1, 8, 16)
    with pytest.raises(MemoryError):
        recording.record(one.model, one.runner.caches)
    assert native.library is library
