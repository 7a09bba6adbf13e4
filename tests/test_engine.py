"""The engine on a tiny model: what a request gets does not depend on what else happens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from tiny import EOS_ID, tiny_checkpoint

from llmkit.checkpoint.errors import InputError, ShortageError
from llmkit.checkpoint.source import open_checkpoint
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.model.decoder import Decoder
from llmkit.model.loader import load_model
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.types import EngineConfig, Request, RequestError, SamplingParams, TokenOutput
from llmkit.runtime.load import EngineOptions, eos_ids, load_engine

GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("engine"), dtype="float32")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Decoder:
    return load_model(open_checkpoint(checkpoint), torch.float32)


def engine(model: Decoder, eos: tuple[int, ...] = (), **sizes: int) -> Engine:
    chosen = {"max_model_len": 256, "num_blocks": 400} | sizes
    return Engine(model, EngineConfig(device=torch.device("cpu"), dtype=torch.float32, **chosen), eos)


def prompts(count: int = 16) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 512, (5 + 6 * i,), generator=generator).tolist() for i in range(count)]


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[list[int]]:
    """transformers' greedy answers."""
    oracle = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    oracle.generation_config.eos_token_id = None
    answers = []
    for prompt in prompts():
        with torch.inference_mode():
            out = oracle.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def drive(running: Engine) -> list[TokenOutput]:
    outputs = []
    while running.has_work:
        outputs += running.step()
        for pool in running.scheduler.pools:
            pool.check()
    assert running.stats().kv_used_blocks == 0
    return outputs


def test_concurrent_requests_equal_transformers_and_each_alone(model: Decoder, expected: list[list[int]]) -> None:
    assert engine(model).generate(prompts(), GREEDY) == expected
    assert [engine(model).generate([prompt], GREEDY)[0] for prompt in prompts()] == expected


def test_chunked_prefill_changes_nothing(model: Decoder, expected: list[list[int]]) -> None:
    running = engine(model, max_num_batched_tokens=24)
    assert running.generate(prompts(), GREEDY) == expected
    assert running.steps > 40


def test_preemption_changes_nothing(model: Decoder, expected: list[list[int]]) -> None:
    running = engine(model, num_blocks=16)
    assert running.generate(prompts(), GREEDY) == expected
    assert running.stats().preemptions_total > 0


def test_preemption_does_not_change_a_seeded_sample(model: Decoder) -> None:
    sampling = SamplingParams(temperature=1.0, top_p=0.9, seed=11, max_tokens=20, ignore_eos=True)
    roomy, tight = engine(model), engine(model, num_blocks=16)
    assert roomy.generate(prompts(), sampling) == tight.generate(prompts(), sampling)
    assert tight.stats().preemptions_total > 0


def test_a_limit_of_requests_in_flight(model: Decoder, expected: list[list[int]]) -> None:
    running = engine(model, max_num_seqs=3)
    for index, prompt in enumerate(prompts()):
        running.add(Request(str(index), prompt, GREEDY))
    most = 0
    while running.has_work:
        running.step()
        most = max(most, running.stats().running)
    assert most == 3


def test_requests_that_arrive_later_join_the_batch(model: Decoder, expected: list[list[int]]) -> None:
    running = engine(model)
    answers: dict[str, list[int]] = {str(i): [] for i in range(4)}
    arrivals = list(enumerate(prompts(4)))
    step = 0
    while arrivals or running.has_work:
        if arrivals and step % 3 == 0:
            index, prompt = arrivals.pop(0)
            running.add(Request(str(index), prompt, GREEDY))
        for output in running.step():
            answers[output.request_id] += output.token_ids
        step += 1
    assert list(answers.values()) == expected[:4]


def test_seeded_sampling_does_not_depend_on_the_batch(model: Decoder) -> None:
    params = [SamplingParams(temperature=0.9, top_k=50, seed=seed, max_tokens=15, ignore_eos=True) for seed in range(6)]
    together = engine(model).generate(prompts(6), params)
    alone = [engine(model).generate([p], s)[0] for p, s in zip(prompts(6), params, strict=True)]
    assert together == alone
    same_prompt = engine(model).generate([prompts()[5]] * 6, params)
    assert len({tuple(answer) for answer in same_prompt}) == 6


def test_ends(model: Decoder, expected: list[list[int]]) -> None:
    prompt, answer = prompts()[2], expected[2]
    cut = answer.index(answer[7]) + 1  # the first place of that token

    def run(eos: tuple[int, ...], **more: object) -> tuple[list[int], str | None]:
        running = engine(model, eos)
        running.add(Request("a", prompt, SamplingParams(temperature=0.0, max_tokens=20, **more)))
        outputs = drive(running)
        return [token for output in outputs for token in output.token_ids], outputs[-1].finish_reason

    assert run((answer[7],)) == (answer[:cut], "stop")
    assert run((answer[7],), ignore_eos=True) == (answer, "length")
    assert run((), stop_token_ids=(answer[7],), ignore_eos=True) == (answer[:cut], "stop")


def test_cancelling_frees_blocks_at_once(model: Decoder) -> None:
    running = engine(model, num_blocks=20)
    for index, prompt in enumerate(prompts(8)):
        running.add(Request(str(index), prompt, GREEDY))
    running.step()
    used = running.stats().kv_used_blocks
    running.cancel("0")
    assert running.stats().kv_used_blocks < used
    running.cancel("7")  # still waiting
    running.cancel("nobody")
    answered = {output.request_id for output in drive(running)}
    assert answered == {"1", "2", "3", "4", "5", "6"}


def test_requests_that_can_never_fit_are_refused(model: Decoder) -> None:
    running = engine(model, max_model_len=64)
    with pytest.raises(RequestError) as caught:
        running.add(Request("a", [5] * 50, GREEDY))
    assert caught.value.code == "context_length_exceeded"
    assert "50 tokens and 20 were asked for, 70 together; at most 64 fit" in str(caught.value)
    with pytest.raises(RequestError, match="empty"):
        running.add(Request("b", [], GREEDY))
    assert not running.has_work


def test_logits_that_are_not_finite_fail_one_request_alone(checkpoint: Path, expected: list[list[int]]) -> None:
    broken = load_model(open_checkpoint(checkpoint), torch.float32)
    unused = next(token for token in range(3, 512) if token not in {t for p in prompts(3) + expected[:3] for t in p})
    broken.embedding[unused] = float("nan")
    running = engine(broken)
    for index, prompt in enumerate([*prompts(3), [unused, 7, 8]]):
        running.add(Request(str(index), prompt, GREEDY))
    outputs = drive(running)
    answers = [[t for o in outputs if o.request_id == str(i) for t in o.token_ids] for i in range(4)]
    assert answers[:3] == expected[:3]
    (failed,) = [output for output in outputs if output.request_id == "3"]
    assert (failed.finish_reason, failed.token_ids) == ("error", [])
    assert "not finite" in (failed.error or "")
    for cache in running.runner.caches:
        assert torch.isfinite(cache.kv).all()


def test_a_failing_prompt_leaves_nothing_behind_when_it_is_cancelled_half_way(checkpoint: Path) -> None:
    broken = load_model(open_checkpoint(checkpoint), torch.float32)
    broken.embedding[500] = float("nan")
    running = engine(broken, max_num_batched_tokens=16, num_blocks=16)
    running.add(Request("bad", [500] * 100, GREEDY))
    (failed,) = running.step()
    assert (failed.finish_reason, failed.token_ids) == ("error", [])
    running.cancel("bad")
    prompt = [7] * 50
    assert running.generate([prompt], GREEDY) == engine(broken).generate([prompt], GREEDY)
    with pytest.raises(InputError, match="prompt 1: the model's logits were not finite"):
        running.generate([prompt, [500]], GREEDY)
    assert not running.has_work


def test_a_refused_prompt_leaves_an_idle_engine(model: Decoder, expected: list[list[int]]) -> None:
    running = engine(model)
    with pytest.raises(RequestError, match="empty"):
        running.generate([prompts()[0], []], GREEDY)
    assert not running.has_work
    assert running.stats().kv_used_blocks == 0
    assert running.generate(prompts(2), GREEDY) == expected[:2]


def test_requests_without_a_seed_differ(model: Decoder) -> None:
    sampling = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)
    assert len({tuple(answer) for answer in engine(model).generate([prompts()[1]] * 8, sampling)}) == 8


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        ({"eos_token_id": [7, 2]}, {"eos_token_id": 5}, (7, 2, 5)),
        ({}, {"eos_token_id": 5}, (5,)),
        ({}, {}, (EOS_ID,)),  # the tokenizer's
    ],
)
def test_ids_that_end_an_answer_are_the_tokenizers(
    checkpoint: Path, generation: dict[str, object], config: dict[str, object], ends: tuple[int, ...]
) -> None:
    source = replace(open_checkpoint(checkpoint), generation_config=generation, config=config)
    assert eos_ids(source) == ends == load_tokenizer(source).eos_ids


def test_no_cuda(checkpoint: Path) -> None:
    if torch.cuda.is_available():
        assert load_engine(checkpoint, EngineOptions()).config.device.type == "cuda"
    else:
        with pytest.raises(ShortageError, match="--device cpu"):
            load_engine(checkpoint, EngineOptions(device="cuda"))
