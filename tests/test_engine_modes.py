"""Speculation, steps launched ahead and shared prefixes: a request's answer stays what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_checkpoint

from llmkit.checkpoint.source import open_checkpoint
from llmkit.model.decoder import Decoder
from llmkit.model.loader import load_model
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.types import EngineConfig, Request, SamplingParams, TokenOutput

SAMPLED = [
    SamplingParams(temperature=t, top_k=k, top_p=p, seed=seed, max_tokens=24, ignore_eos=True)
    for seed, (t, k, p) in enumerate([(0.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 40, 1.0), (1.3, 0, 0.8), (0.2, 0, 1.0)])
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("modes"), dtype="float32")


@pytest.fixture(scope="module")
def model(path: Path) -> Decoder:
    return load_model(open_checkpoint(path), torch.float32)


@pytest.fixture(scope="module")
def similar(path: Path) -> Decoder:
    """A draft model that often agrees: the same weights, disturbed."""
    other = load_model(open_checkpoint(path), torch.float32)
    generator = torch.Generator().manual_seed(1)
    other.final_norm.add_(torch.randn(other.final_norm.shape, generator=generator) * 0.2)
    return other


def engine(model: Decoder, *, draft: Decoder | None = None, eos: tuple[int, ...] = (), **chosen: object) -> Engine:
    sizes = {"max_model_len": 256, "num_blocks": 400, "block_size": 4} | chosen
    config = EngineConfig(device=torch.device("cpu"), dtype=torch.float32, **sizes)  # type: ignore[arg-type]
    return Engine(model, config, eos, draft)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 512, (n,), generator=generator).tolist() * 2 for n in (3, 11, 18, 30, 7)]


@pytest.fixture(scope="module")
def plain(model: Decoder) -> list[list[int]]:
    return engine(model, prefix_cache=False).generate(prompts(), SAMPLED)


def drive(running: Engine) -> list[TokenOutput]:
    outputs: list[TokenOutput] = []
    while running.has_work:
        outputs += running.step()
    assert all(pool.used == 0 for pool in running.scheduler.pools)
    return outputs


def of(outputs: list[TokenOutput], name: str) -> list[int]:
    return [token for output in outputs if output.request_id == name for token in output.token_ids]


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("drafted", [False, True])
def test_guesses_change_no_sampled_token(
    model: Decoder, similar: Decoder, plain: list[list[int]], count: int, drafted: bool
) -> None:
    running = engine(model, speculate=count, draft=similar if drafted else None)
    assert running.generate(prompts(), SAMPLED) == plain
    stats = running.stats()
    assert 0 < stats.accepted_total < stats.drafted_total


def test_guesses_end_where_the_answer_ends(model: Decoder, plain: list[list[int]]) -> None:
    answer = plain[0]
    stop = answer[5]
    cut = answer.index(stop) + 1
    running = engine(model, speculate=4, draft=model, eos=(stop,))
    running.add(Request("stops", prompts()[0], SamplingParams(temperature=0.0, max_tokens=24)))
    running.add(Request("is cut", prompts()[0], SamplingParams(temperature=0.0, max_tokens=7, ignore_eos=True)))
    outputs = drive(running)
    assert of(outputs, "stops") == answer[:cut]
    assert of(outputs, "is cut") == answer[:7]
    reasons = {output.request_id: output.finish_reason for output in outputs if output.finish_reason}
    assert reasons == {"stops": "stop", "is cut": "length"}


@pytest.mark.parametrize("sizes", [{}, {"num_blocks": 26}, {"max_num_batched_tokens": 7}, {"max_num_seqs": 2}])
def test_steps_launched_ahead_change_no_sampled_token(
    model: Decoder, plain: list[list[int]], sizes: dict[str, object]
) -> None:
    running = engine(model, ahead=True, **sizes)
    assert running.generate(prompts(), SAMPLED) == plain
    assert not running.has_work
    assert all(pool.used == 0 for pool in running.scheduler.pools)


def test_an_answer_that_ends_while_the_next_step_runs_gets_no_token_more(
    model: Decoder, plain: list[list[int]]
) -> None:
    answer = plain[0]
    cut = answer.index(answer[5]) + 1
    running = engine(model, ahead=True, eos=(answer[5],))
    for index, prompt in enumerate(prompts()):
        running.add(Request(str(index), prompt, SAMPLED[index]))
    running.add(Request("stops", prompts()[0], SamplingParams(temperature=0.0, max_tokens=24)))
    running.add(Request("is cancelled", prompts()[1], SAMPLED[1]))
    outputs = running.step() + running.step() + running.step()
    running.cancel("is cancelled")
    late = drive(running)
    assert of(outputs + late, "stops") == answer[:cut]
    assert of(late, "is cancelled") == []
    assert [of(outputs + late, str(index)) for index in range(5)] == plain


def test_requests_that_arrive_together_share_what_one_of_them_computes(model: Decoder) -> None:
    common = prompts()[3]
    running = engine(model)
    asked = [[*common, 5 + n] for n in range(4)]
    for index, prompt in enumerate(asked):
        running.add(Request(str(index), prompt, SAMPLED[0]))
    outputs = drive(running)
    cached = {output.request_id: output.cached_tokens for output in outputs}
    assert cached == {"0": 0} | dict.fromkeys(("1", "2", "3"), len(common) // 4 * 4)
    alone = engine(model, prefix_cache=False).generate(asked, SAMPLED[0])
    assert [of(outputs, str(index)) for index in range(4)] == alone


def test_a_salt_keeps_prefixes_apart(model: Decoder) -> None:
    running = engine(model)
    prompt = prompts()[3]
    hits = []
    for salt in ("", "key", "", "key"):
        running.add(Request("a", prompt, SAMPLED[0], salt=salt))
        hits.append(drive(running)[-1].cached_tokens)
    assert hits == [0, 0, 56, 56]


def test_what_is_not_finite_is_cached_for_nobody(path: Path, model: Decoder) -> None:
    broken = load_model(open_checkpoint(path), torch.float32)
    prompt, other = prompts()[3], prompts()[2]
    answers = engine(model).generate([prompt, other], SAMPLED[0])
    unused = next(token for token in range(3, 512) if token not in prompt + other + answers[0] + answers[1])
    broken.embedding[unused] = float("nan")
    running = engine(broken)
    poisoned = [*prompt[:20], unused, *prompt[20:]]
    for name, tokens in (("bad", poisoned), ("bad too", poisoned), ("good", other)):
        running.add(Request(name, tokens, SAMPLED[0]))
    outputs = drive(running)
    assert {o.request_id for o in outputs if o.finish_reason == "error"} == {"bad", "bad too"}
    assert of(outputs, "good") == answers[1]
    assert all(torch.isfinite(cache.kv).all() for cache in running.runner.caches)
    running.add(Request("starts alike", prompt, SAMPLED[0]))
    outputs = drive(running)
    assert (of(outputs, "starts alike"), outputs[0].cached_tokens) == (answers[0], 0), "what it wrote has no name"


def test_a_step_without_memory_fails_one_request(
    model: Decoder, plain: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = engine(model)
    for index, prompt in enumerate(prompts()):
        running.add(Request(str(index), prompt, SAMPLED[index]))
    computed = Decoder.__call__

    def short_of_memory(self: Decoder, tokens: torch.Tensor, *rest: object) -> torch.Tensor:
        if len(tokens) > 100:
            torch.empty(1 << 60)  # the allocator's own error
        return computed(self, tokens, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Decoder, "__call__", short_of_memory)
    outputs = drive(running)
    failed = [output for output in outputs if output.finish_reason == "error"]
    assert [output.request_id for output in failed] == ["3"], "the one with the longest prompt"
    assert "memory" in (failed[0].error or "")
    for index in (0, 1, 2, 4):
        assert of(outputs, str(index)) == plain[index]


def test_an_error_that_is_not_about_memory_is_not_hidden(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    running = engine(model)
    running.add(Request("a", [5, 6], SAMPLED[0]))
    monkeypatch.setattr(Decoder, "__call__", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        running.step()
