"""The engine on a tiny model: what a request gets does not depend on what else happens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from support.tiny_models import EOS_ID

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.checkpoint.tokenizer import load_tokenizer
from llmkit.common.errors import InputError, ShortageError
from llmkit.model.decoder import Decoder
from llmkit.model.weight_loader import load_model
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.engine_errors import RequestError
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.engine_outputs import EngineOutput
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine
from llmkit.runtime.part_loader import eos_token_ids

MODEL = {"dtype": "float32"}

GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def decoder(model: Path) -> Decoder:
    return load_model(open_checkpoint(model), torch.float32)


def engine(decoder: Decoder, eos: tuple[int, ...] = (), **sizes: int) -> Engine:
    chosen = {"max_model_len": 256, "num_blocks": 400} | sizes
    return Engine(
        decoder, EngineConfig(device=torch.device("cpu"), dtype=torch.float32, **chosen), eos
    )


def prompts(count: int = 16) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 512, (5 + 6 * i,), generator=generator).tolist() for i in range(count)]


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    """transformers' greedy answers."""
    oracle = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    oracle.generation_config.eos_token_id = None
    answers = []
    for prompt in prompts():
        with torch.inference_mode():
            out = oracle.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def drive(running: Engine) -> list[EngineOutput]:
    outputs = []
    while running.has_work:
        outputs += running.step()
        for pool in running.scheduler.pools:
            pool.check_invariants()
    assert running.stats().kv_used_blocks == 0
    return outputs


def test_concurrent_requests_equal_transformers_and_each_alone(
    decoder: Decoder, expected: list[list[int]]
) -> None:
    assert engine(decoder).generate(prompts(), GREEDY) == expected
    assert [engine(decoder).generate([prompt], GREEDY)[0] for prompt in prompts()] == expected


def test_chunked_prefill_changes_nothing(decoder: Decoder, expected: list[list[int]]) -> None:
    running = engine(decoder, max_num_batched_tokens=24)
    assert running.generate(prompts(), GREEDY) == expected
    assert running.num_steps > 40


def test_preemption_changes_nothing(decoder: Decoder, expected: list[list[int]]) -> None:
    running = engine(decoder, num_blocks=16)
    assert running.generate(prompts(), GREEDY) == expected
    assert running.stats().preemptions_total > 0


def test_preemption_does_not_change_a_seeded_sample(decoder: Decoder) -> None:
    sampling = SamplingParams(temperature=1.0, top_p=0.9, seed=11, max_tokens=20, ignore_eos=True)
    roomy = engine(decoder)
    tight = engine(decoder, num_blocks=16)
    assert roomy.generate(prompts(), sampling) == tight.generate(prompts(), sampling)
    assert tight.stats().preemptions_total > 0


def test_max_num_seqs_limits_running_requests(decoder: Decoder, expected: list[list[int]]) -> None:
    running = engine(decoder, max_num_seqs=3)
    for index, prompt in enumerate(prompts()):
        running.add(EngineRequest(str(index), prompt, GREEDY))
    most = 0
    while running.has_work:
        running.step()
        most = max(most, running.stats().running)
    assert most == 3


def test_requests_that_arrive_later_join_the_batch(
    decoder: Decoder, expected: list[list[int]]
) -> None:
    running = engine(decoder)
    answers: dict[str, list[int]] = {str(i): [] for i in range(4)}
    arrivals = list(enumerate(prompts(4)))
    step = 0
    while arrivals or running.has_work:
        if arrivals and step % 3 == 0:
            index, prompt = arrivals.pop(0)
            running.add(EngineRequest(str(index), prompt, GREEDY))
        for output in running.step():
            answers[output.request_id] += output.token_ids
        step += 1
    assert list(answers.values()) == expected[:4]


def test_seeded_sampling_does_not_depend_on_the_batch(decoder: Decoder) -> None:
    params = [
        SamplingParams(temperature=0.9, top_k=50, seed=seed, max_tokens=15, ignore_eos=True)
        for seed in range(6)
    ]
    together = engine(decoder).generate(prompts(6), params)
    alone = [engine(decoder).generate([p], s)[0] for p, s in zip(prompts(6), params, strict=True)]
    assert together == alone
    same_prompt = engine(decoder).generate([prompts()[5]] * 6, params)
    assert len({tuple(answer) for answer in same_prompt}) == 6


def test_finish_reason_is_stop_or_length(decoder: Decoder, expected: list[list[int]]) -> None:
    prompt = prompts()[2]
    answer = expected[2]
    cut = answer.index(answer[7]) + 1  # the first place of that token

    def run(eos: tuple[int, ...], **more: object) -> tuple[list[int], str | None]:
        running = engine(decoder, eos)
        running.add(
            EngineRequest("a", prompt, SamplingParams(temperature=0.0, max_tokens=20, **more))
        )
        outputs = drive(running)
        return [token for output in outputs for token in output.token_ids], outputs[
            -1
        ].finish_reason

    assert run((answer[7],)) == (answer[:cut], "stop")
    assert run((answer[7],), ignore_eos=True) == (answer, "length")
    assert run((), stop_token_ids=(answer[7],), ignore_eos=True) == (answer[:cut], "stop")


def test_cancelling_frees_blocks_at_once(decoder: Decoder) -> None:
    running = engine(decoder, num_blocks=20)
    for index, prompt in enumerate(prompts(8)):
        running.add(EngineRequest(str(index), prompt, GREEDY))
    running.step()
    used = running.stats().kv_used_blocks
    running.cancel("0")
    assert running.stats().kv_used_blocks < used
    running.cancel("7")  # still waiting
    running.cancel("nobody")
    answered = {output.request_id for output in drive(running)}
    assert answered == {"1", "2", "3", "4", "5", "6"}


def test_requests_that_can_never_fit_are_refused(decoder: Decoder) -> None:
    running = engine(decoder, max_model_len=64)
    with pytest.raises(RequestError) as caught:
        running.add(EngineRequest("a", [5] * 50, GREEDY))
    assert caught.value.code == "context_length_exceeded"
    assert "50 tokens and 20 were asked for, 70 together; at most 64 fit" in str(caught.value)
    with pytest.raises(RequestError, match="empty"):
        running.add(EngineRequest("b", [], GREEDY))
    assert not running.has_work


def test_logits_not_finite_fail_one_request_alone(model: Path, expected: list[list[int]]) -> None:
    broken = load_model(open_checkpoint(model), torch.float32)
    unused = next(
        token
        for token in range(3, 512)
        if token not in {t for p in prompts(3) + expected[:3] for t in p}
    )
    broken.embedding[unused] = float("nan")
    running = engine(broken)
    for index, prompt in enumerate([*prompts(3), [unused, 7, 8]]):
        running.add(EngineRequest(str(index), prompt, GREEDY))
    outputs = drive(running)
    answers = [
        [t for o in outputs if o.request_id == str(i) for t in o.token_ids] for i in range(4)
    ]
    assert answers[:3] == expected[:3]
    (failed,) = [output for output in outputs if output.request_id == "3"]
    assert (failed.finish_reason, failed.token_ids) == ("error", [])
    assert "not finite" in (failed.error or "")
    for cache in running.runner.paged_model.kv_caches:
        assert torch.isfinite(cache.kv).all()


def test_cancelling_a_failing_prompt_leaves_finite_caches(
    model: Path,
) -> None:
    broken = load_model(open_checkpoint(model), torch.float32)
    broken.embedding[500] = float("nan")
    running = engine(broken, max_num_batched_tokens=16, num_blocks=16)
    running.add(EngineRequest("bad", [500] * 100, GREEDY))
    (failed,) = running.step()
    assert (failed.finish_reason, failed.token_ids) == ("error", [])
    running.cancel("bad")
    prompt = [7] * 50
    assert running.generate([prompt], GREEDY) == engine(broken).generate([prompt], GREEDY)
    with pytest.raises(InputError, match="prompt 1: the model's logits were not finite"):
        running.generate([prompt, [500]], GREEDY)
    assert not running.has_work


def test_generate_with_a_refused_prompt_leaves_an_idle_engine(
    decoder: Decoder, expected: list[list[int]]
) -> None:
    running = engine(decoder)
    with pytest.raises(RequestError, match="empty"):
        running.generate([prompts()[0], []], GREEDY)
    assert not running.has_work
    assert running.stats().kv_used_blocks == 0
    assert running.generate(prompts(2), GREEDY) == expected[:2]


def test_requests_without_a_seed_differ(decoder: Decoder) -> None:
    sampling = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)
    assert (
        len({tuple(answer) for answer in engine(decoder).generate([prompts()[1]] * 8, sampling)})
        == 8
    )


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        ({"eos_token_id": [7, 2]}, {"eos_token_id": 5}, (7, 2, 5)),
        ({}, {"eos_token_id": 5}, (5,)),
        ({}, {}, (EOS_ID,)),  # the tokenizer's
    ],
)
def test_eos_token_ids_are_those_of_the_tokenizer(
    model: Path,
    generation: dict[str, object],
    config: dict[str, object],
    ends: tuple[int, ...],
) -> None:
    source = replace(open_checkpoint(model), generation_config=generation, config=config)
    assert eos_token_ids(source) == ends == load_tokenizer(source).eos_token_ids


def test_device_cuda_without_a_gpu_is_refused(model: Path) -> None:
    if torch.cuda.is_available():
        assert load_engine(model, EngineOptions()).config.device.type == "cuda"
    else:
        with pytest.raises(ShortageError, match="--device cpu"):
            load_engine(model, EngineOptions(device="cuda"))
