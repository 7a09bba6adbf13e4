"""Speculation, steps launched ahead and shared prefixes: a request's answer stays what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.draft_models import similar_decoder

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.model.decoder import Decoder
from llmkit.model.weight_loader import load_model
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.engine_outputs import EngineOutput
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import SamplingParams

MODEL = {"dtype": "float32"}

SAMPLED = [
    SamplingParams(temperature=t, top_k=k, top_p=p, seed=seed, max_tokens=24, ignore_eos=True)
    for seed, (t, k, p) in enumerate(
        [(0.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 40, 1.0), (1.3, 0, 0.8), (0.2, 0, 1.0)]
    )
]


@pytest.fixture(scope="module")
def decoder(model: Path) -> Decoder:
    return load_model(open_checkpoint(model), torch.float32)


@pytest.fixture(scope="module")
def similar(model: Path) -> Decoder:
    return similar_decoder(model)


def engine(
    decoder: Decoder, *, draft: Decoder | None = None, eos: tuple[int, ...] = (), **chosen: object
) -> Engine:
    sizes = {"max_model_len": 256, "num_blocks": 400, "block_size": 16} | chosen
    config = EngineConfig(device=torch.device("cpu"), dtype=torch.float32, **sizes)
    return Engine(decoder, config, eos, draft)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randint(3, 512, (n,), generator=generator).tolist() * 2 for n in (3, 11, 18, 30, 7)
    ]


@pytest.fixture(scope="module")
def plain(decoder: Decoder) -> list[list[int]]:
    return engine(decoder, enable_prefix_caching=False).generate(prompts(), SAMPLED)


def drive(running: Engine) -> list[EngineOutput]:
    outputs: list[EngineOutput] = []
    while running.has_work:
        outputs += running.step()
    assert all(pool.num_used_blocks == 0 for pool in running.scheduler.pools)
    return outputs


def of(outputs: list[EngineOutput], name: str) -> list[int]:
    return [token for output in outputs if output.request_id == name for token in output.token_ids]


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("drafted", [False, True])
def test_speculation_changes_no_sampled_token(
    decoder: Decoder, similar: Decoder, plain: list[list[int]], count: int, drafted: bool
) -> None:
    running = engine(decoder, num_speculative_tokens=count, draft=similar if drafted else None)
    assert running.generate(prompts(), SAMPLED) == plain
    stats = running.stats()
    assert 0 < stats.accepted_total < stats.drafted_total


def test_speculation_ends_where_the_output_ends(decoder: Decoder, plain: list[list[int]]) -> None:
    answer = plain[0]
    stop = answer[5]
    cut = answer.index(stop) + 1
    running = engine(decoder, num_speculative_tokens=4, draft=decoder, eos=(stop,))
    running.add(
        EngineRequest("stops", prompts()[0], SamplingParams(temperature=0.0, max_tokens=24))
    )
    running.add(
        EngineRequest(
            "is cut", prompts()[0], SamplingParams(temperature=0.0, max_tokens=7, ignore_eos=True)
        )
    )
    outputs = drive(running)
    assert of(outputs, "stops") == answer[:cut]
    assert of(outputs, "is cut") == answer[:7]
    reasons = {
        output.request_id: output.finish_reason for output in outputs if output.finish_reason
    }
    assert reasons == {"stops": "stop", "is cut": "length"}


@pytest.mark.parametrize(
    "sizes", [{}, {"num_blocks": 26}, {"max_num_batched_tokens": 7}, {"max_num_seqs": 2}]
)
def test_async_scheduling_changes_no_sampled_token(
    decoder: Decoder, plain: list[list[int]], sizes: dict[str, object]
) -> None:
    running = engine(decoder, async_scheduling=True, **sizes)
    assert running.generate(prompts(), SAMPLED) == plain
    assert not running.has_work
    assert all(pool.num_used_blocks == 0 for pool in running.scheduler.pools)


def test_async_scheduling_adds_no_token_after_the_end(
    decoder: Decoder, plain: list[list[int]]
) -> None:
    answer = plain[0]
    cut = answer.index(answer[5]) + 1
    running = engine(decoder, async_scheduling=True, eos=(answer[5],))
    for index, prompt in enumerate(prompts()):
        running.add(EngineRequest(str(index), prompt, SAMPLED[index]))
    running.add(
        EngineRequest("stops", prompts()[0], SamplingParams(temperature=0.0, max_tokens=24))
    )
    running.add(EngineRequest("is cancelled", prompts()[1], SAMPLED[1]))
    outputs = running.step() + running.step() + running.step()
    running.cancel("is cancelled")
    late = drive(running)
    assert of(outputs + late, "stops") == answer[:cut]
    assert of(late, "is cancelled") == []
    assert [of(outputs + late, str(index)) for index in range(5)] == plain


def test_requests_that_arrive_together_share_a_prefix(decoder: Decoder) -> None:
    common = prompts()[3]
    running = engine(decoder)
    asked = [[*common, 5 + n] for n in range(4)]
    for index, prompt in enumerate(asked):
        running.add(EngineRequest(str(index), prompt, SAMPLED[0]))
    outputs = drive(running)
    cached = {output.request_id: output.cached_tokens for output in outputs}
    assert cached == {"0": 0} | dict.fromkeys(("1", "2", "3"), len(common) // 16 * 16)
    alone = engine(decoder, enable_prefix_caching=False).generate(asked, SAMPLED[0])
    assert [of(outputs, str(index)) for index in range(4)] == alone


def test_cache_salt_separates_prefixes(decoder: Decoder) -> None:
    running = engine(decoder)
    prompt = prompts()[3]
    hits = []
    for salt in ("", "key", "", "key"):
        running.add(EngineRequest("a", prompt, SAMPLED[0], cache_salt=salt))
        hits.append(drive(running)[-1].cached_tokens)
    assert hits == [0, 0, 48, 48]


def test_prefix_cache_never_holds_values_that_are_not_finite(model: Path, decoder: Decoder) -> None:
    broken = load_model(open_checkpoint(model), torch.float32)
    prompt = prompts()[3]
    other = prompts()[2]
    answers = engine(decoder).generate([prompt, other], SAMPLED[0])
    unused = next(
        token for token in range(3, 512) if token not in prompt + other + answers[0] + answers[1]
    )
    broken.embedding[unused] = float("nan")
    running = engine(broken)
    with_nan = [*prompt[:20], unused, *prompt[20:]]
    for name, tokens in (("bad", with_nan), ("bad too", with_nan), ("good", other)):
        running.add(EngineRequest(name, tokens, SAMPLED[0]))
    outputs = drive(running)
    assert {o.request_id for o in outputs if o.finish_reason == "error"} == {"bad", "bad too"}
    assert of(outputs, "good") == answers[1]
    assert all(torch.isfinite(cache.kv).all() for cache in running.runner.paged_model.kv_caches)
    running.add(EngineRequest("starts alike", prompt, SAMPLED[0]))
    outputs = drive(running)
    assert (of(outputs, "starts alike"), outputs[0].cached_tokens) == (answers[0], 0), (
        "what it wrote has no name"
    )


def test_step_without_memory_fails_one_request(
    decoder: Decoder, plain: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = engine(decoder)
    for index, prompt in enumerate(prompts()):
        running.add(EngineRequest(str(index), prompt, SAMPLED[index]))
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


def test_step_raises_errors_that_are_not_about_memory(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = engine(decoder)
    running.add(EngineRequest("a", [5, 6], SAMPLED[0]))
    monkeypatch.setattr(Decoder, "__call__", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        running.step()
