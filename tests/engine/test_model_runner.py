"""The model runner and the engine around it, one step at a time, on a tiny model."""

from __future__ import annotations

import secrets
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.errors import InputError, ShortageError
from llmkit.kernels.cpu import cpu_kernels
from llmkit.model.decoder import SINGLE_RANK, Decoder
from llmkit.model.parallel_group import ParallelGroup
from llmkit.model.weight_loader import load_model
from llmkit.runtime.engine import cpu_graphs, model_runner
from llmkit.runtime.engine import engine as engine_module
from llmkit.runtime.engine.cpu_graphs import CpuGraphRunner
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.engine_errors import RequestError
from llmkit.runtime.engine.engine_outputs import EngineOutput, EngineStats, Logprobs
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.graph_runner import NoGraphRunner
from llmkit.runtime.engine.model_runner import InFlightStep, StepInputs, StepResult
from llmkit.runtime.engine.paged_model import ForwardInputs
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine.scheduler_output import (
    ModelRunnerOutput,
    ScheduledRequest,
    SchedulerOutput,
)
from llmkit.runtime.engine.sequence import Sequence
from llmkit.runtime.engine.step_logprobs import LogprobsTensors

MODEL = {"dtype": "float32"}
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
needs_library = pytest.mark.skipif(
    cpu_kernels.library is None, reason=f"compiled kernels: {cpu_kernels.status()}"
)


@pytest.fixture(scope="module")
def decoder(model: Path) -> Decoder:
    return load_model(open_checkpoint(model), torch.float32, packed=True)


def engine(decoder: Decoder, draft: Decoder | None = None, **sizes: Any) -> Engine:
    chosen: dict[str, Any] = {"max_model_len": 64, "num_blocks": 40, "block_size": 16}
    config = EngineConfig(device=torch.device("cpu"), dtype=torch.float32, **(chosen | sizes))
    return Engine(decoder, config, (), draft)


class Group(ParallelGroup):
    """Ranks that only note what they are sent."""

    def __init__(self, pp_size: int) -> None:
        self.pp_size = pp_size
        self.sent: list[list[torch.Tensor]] = []
        self.received: list[list[torch.Tensor]] = []

    def broadcast_results(self, results: list[torch.Tensor]) -> None:
        self.sent.append(results)

    def receive_results(self, results: list[torch.Tensor]) -> Any:
        self.received.append(results)
        return self

    def synchronize(self) -> None:
        """The results arrive: each tensor has its number as values."""
        with torch.inference_mode():
            for index, tensor in enumerate(self.received[-1]):
                tensor.fill_(index + 3)


def inputs_of(running: Engine, *requests: EngineRequest) -> StepInputs:
    """The inputs of the next step with these requests."""
    for request in requests:
        running.add(request)
    return running.runner.prepare_inputs(running.scheduler.schedule())


def drive(running: Engine) -> list[EngineOutput]:
    outputs = []
    while running.has_work:
        outputs += running.step()
    return outputs


@pytest.mark.parametrize(
    ("max_model_len", "block_size", "max_blocks"), [(64, 16, 4), (65, 16, 5), (63, 4, 16)]
)
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_model_runner_records_requests_of_the_whole_length(
    decoder: Decoder,
    monkeypatch: pytest.MonkeyPatch,
    max_model_len: int,
    block_size: int,
    max_blocks: int,
    enforce_eager: bool,
) -> None:
    made = []

    def note(model: Decoder, caches: list[Any], *sizes: int, enabled: bool) -> object:
        made.append((len(caches), caches[0].kv.shape[1], *sizes, enabled))
        return NoGraphRunner()

    monkeypatch.setattr(model_runner, "CpuGraphRunner", note)
    sizes = {"max_model_len": max_model_len, "block_size": block_size, "num_blocks": 20}
    engine(decoder, **sizes, enforce_eager=enforce_eager)
    assert made == [(2, 21, max_blocks, block_size, 256, not enforce_eager)]


def test_model_runner_replays_plain_decode_steps_only(decoder: Decoder) -> None:
    """The graph runner is asked once a step, with its number of requests, unless it is too much."""
    asked: list[list[int]] = []
    running = engine(decoder, prefill_chunk_size=1, max_num_batched_tokens=3)
    graph_runner = running.runner.graph_runner
    graph_runner.can_replay = lambda lens, *_: asked.append(lens) or True  # type: ignore
    plain = EngineRequest("plain", [5], GREEDY)
    assert inputs_of(running, plain).use_graph
    assert asked == [[1]]
    with running.runner.without_graphs():
        assert not running.runner.prepare_inputs(running.scheduler.schedule()).use_graph
    assert asked == [[1]]
    for other in (
        EngineRequest("adapter", [5], GREEDY, adapter="it"),
        EngineRequest("pooled", [5], replace(GREEDY, max_tokens=1), pooling="last"),
        EngineRequest("two tokens", [5, 6], GREEDY),
    ):
        running = engine(decoder)
        running.runner.adapters.adapter_ids["it"] = 1
        running.runner.graph_runner.can_replay = (  # type: ignore
            lambda _, ids, is_mixed: not any(ids) and not is_mixed
        )
        inputs = inputs_of(running, plain, other)
        assert not inputs.use_graph, other.request_id
        assert not inputs.wants_prompt_logprobs
    running = engine(decoder, prefill_chunk_size=1, max_num_batched_tokens=1)
    running.runner.graph_runner.can_replay = lambda *_: True  # type: ignore[method-assign]
    inputs = inputs_of(running, EngineRequest("a", [5, 6], replace(GREEDY, prompt_logprobs=0)))
    assert inputs.wants_prompt_logprobs
    assert not inputs.use_graph


def test_model_runner_makes_a_row_for_each_draft(decoder: Decoder) -> None:
    running = engine(decoder)
    first, second = (
        Sequence(EngineRequest(name, [5, 6, 7], replace(GREEDY, seed=seed)), seed)
        for seed, name in enumerate("ab")
    )
    for index, sequence in enumerate((first, second)):
        sequence.block_tables = [[index]]
        sequence.slot = index
    step = SchedulerOutput(
        [
            ScheduledRequest(first, 2, 3, True, 4, [7, 8, 9], 2),
            ScheduledRequest(second, 1, 2, True, 0, [6, 7]),
        ]
    )
    inputs = running.runner.prepare_inputs(step)
    assert inputs.token_ids.tolist() == [7, 8, 9, 6, 7]
    assert inputs.sampling_metadata.sequences == [first, first, first, second]
    assert inputs.num_sampled == [4, 5, 6, 0]
    assert inputs.sampling_metadata.tensors.seeds.tolist() == [0, 0, 0, 1]
    assert inputs.forward.positions == [2, 3, 4, 1, 2]
    rows = torch.arange(5.0)[:, None].expand(-1, decoder.spec.hidden_size)
    running.runner.paged_model.forward = lambda *_: rows  # type: ignore[method-assign]
    computed = running.runner.execute(inputs).logits
    assert torch.equal(computed, decoder.logits(rows[[0, 1, 2, 4]]))
    draft_model: Any = SimpleNamespace(run=lambda step: torch.tensor([100, 101]))
    running.runner.draft_model = draft_model
    inputs = running.runner.prepare_inputs(step)
    assert inputs.token_ids.tolist() == [7, 100, 101, 6, 7]


def in_flight(step: SchedulerOutput, token_ids: list[int], **more: Any) -> InFlightStep:
    values: dict[str, Any] = {
        "draft_token_ids": None, "logprobs": None, "embeddings": (), "done": None
    }  # fmt: skip
    return InFlightStep(step, torch.tensor(token_ids), **(values | more))


def test_in_flight_step_verifies_the_drafts_of_each_request() -> None:
    sequences = [Sequence(EngineRequest(name, [5], GREEDY), 0) for name in "abc"]
    step = SchedulerOutput(
        [
            ScheduledRequest(sequences[0], 1, 3, True, 1, [9, 20, 21], 2),
            ScheduledRequest(sequences[1], 0, 2, True, 0, [5, 6]),
            ScheduledRequest(sequences[2], 1, 2, True, 1, [9, 30], 1),
        ]
    )
    sampled = [20, 22, 23, 7, 30, 31]
    assert in_flight(step, sampled).wait().token_ids == [[20, 22], [7], [30, 31]]
    drafts = torch.tensor([20, 22, 29])  # the draft model's
    found = in_flight(step, sampled, draft_token_ids=drafts).wait()
    assert found.token_ids == [[20, 22, 23], [7], [30]]
    assert (found.logprobs, found.prompt_logprobs, found.embeddings) == (None, None, {})


def test_model_runner_takes_a_graphs_tokens_when_it_may(decoder: Decoder) -> None:
    """A graph on a CPU samples nothing; a CUDA graph samples, and greedy tokens are the same."""

    def sampled(samples_tokens: bool, **params: Any) -> list[int]:
        running = engine(decoder)
        running.runner.graph_runner.samples_tokens = samples_tokens  # type: ignore[misc]
        inputs = inputs_of(
            running, EngineRequest("a", [5], replace(GREEDY, seed=1, **params)),
            EngineRequest("b", [5], GREEDY),
        )  # fmt: skip
        logits = torch.zeros(2, 512)
        logits[:, 9] = 100.0
        token_ids, logprobs = running.runner.sample(
            inputs, StepResult(logits, torch.tensor([7, 8]))
        )
        assert (logprobs is not None) == ("logprobs" in params)
        found: list[int] = token_ids.tolist()
        return found

    assert sampled(False) == [7, 8]
    assert sampled(True) == [7, 8]
    assert sampled(False, logprobs=0) == [7, 8]
    assert sampled(True, temperature=0.5) == [7, 8]
    assert sampled(False, temperature=0.5) == [9, 9]
    assert sampled(True, logit_bias={5: 200.0}) == [5, 9]
    assert sampled(True, min_tokens=1) == [9, 9]


def test_model_runner_marks_rows_that_are_not_finite(decoder: Decoder) -> None:
    running = engine(decoder, async_scheduling=True)
    asked = [EngineRequest(name, [5], replace(GREEDY, logprobs=1)) for name in "abc"]
    inputs = inputs_of(running, *asked)
    logits = torch.zeros(3, 512)
    logits[0, 9] = 1.0
    logits[1, 3] = float("nan")
    logits[2, 0] = 1.0
    token_ids, logprobs = running.runner.sample(inputs, StepResult(logits))
    assert token_ids.tolist() == [9, -1, 0]
    assert logprobs is not None
    assert logprobs.top_token_ids[[0, 2]].tolist() == [[9], [0]]
    # The next step's tokens are these, by slot; -1 counts as token 0 until its sequence ends.
    step = running.scheduler.schedule()
    assert [request.token_ids for request in step.requests] == [[], [], []]
    assert running.runner.prepare_inputs(step).token_ids.tolist() == [9, 0, 0]
    reversed_step = SchedulerOutput(step.requests[::-1])
    assert running.runner.prepare_inputs(reversed_step).token_ids.tolist() == [0, 0, 9]


def test_model_runner_pools_prompts_over_several_steps(decoder: Decoder) -> None:
    """The hidden states are the token ids here."""
    running = engine(decoder, prefill_chunk_size=4, max_num_batched_tokens=9)

    def forward(token_ids: torch.Tensor, _: ForwardInputs) -> torch.Tensor:
        return token_ids[:, None].float().expand(-1, decoder.spec.hidden_size).clone()

    running.runner.paged_model.forward = forward  # type: ignore[method-assign]
    pooled = replace(GREEDY, max_tokens=1)
    running.add(EngineRequest("mean", list(range(10, 20)), pooled, pooling="mean"))
    running.add(EngineRequest("last", list(range(30, 36)), pooled, pooling="last"))
    running.add(EngineRequest("other", [50, 51, 52], GREEDY))
    outputs = drive(running)
    found = {
        output.request_id: np.frombuffer(output.embedding, np.float32)
        for output in outputs
        if output.embedding is not None
    }
    assert {name: set(values.tolist()) for name, values in found.items()} == {
        "mean": {14.5}, "last": {35.0}
    }  # fmt: skip
    assert running.runner._partial_means == {}
    assert sum(len(output.token_ids) for output in outputs) == 8


@pytest.mark.parametrize("pp_size", [1, 2])
def test_model_runner_sends_results_to_other_stages(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, pp_size: int
) -> None:
    group = Group(pp_size)
    monkeypatch.setattr(decoder, "parallel_group", group)
    running = engine(decoder)
    running.add(EngineRequest("a", [5, 6], replace(GREEDY, logprobs=1)))
    step = running.scheduler.schedule()
    flight = running.runner.launch(step)
    assert len(group.sent) == pp_size - 1
    if group.sent:
        assert [tensor.shape for tensor in group.sent[0]] == [(1,), (1,), (1, 1), (1, 1)]
        assert group.sent[0][0] is flight.token_ids


def test_model_runner_of_an_earlier_stage_receives_the_results(decoder: Decoder) -> None:
    running = engine(decoder)
    group = Group(2)
    runner: Any = running.runner
    runner.model = SimpleNamespace(
        spec=SimpleNamespace(is_last_stage=False, hidden_size=24), parallel_group=group
    )
    runner.paged_model.forward = lambda *_: torch.zeros(6, 24)
    requests = (
        EngineRequest("plain", [5, 6], GREEDY),
        EngineRequest("pooled", [7], replace(GREEDY, max_tokens=1), pooling="last"),
        EngineRequest("logprobs", [7, 8, 9], replace(GREEDY, logprobs=1, prompt_logprobs=0)),
    )
    for request in requests:
        running.add(request)
    step = running.scheduler.schedule()
    flight = runner.launch(step)
    assert [tensor.shape for tensor in group.received[0]] == [(3,), (3,), (3, 1), (3, 1), (24,)]
    assert group.received[0][0].dtype == torch.int64
    assert group.sent == []
    result = flight.wait()
    assert result.token_ids == [[3], [3], [3]]
    assert np.frombuffer(result.embeddings["pooled"], np.float32).tolist() == [7.0] * 24
    assert result.logprobs == [[], [], [Logprobs(4.0, [(6, 5.0)])]]
    assert result.prompt_logprobs == [[], [], [Logprobs(4.0, [])] * 2]


def test_model_runner_zeroes_blocks_of_the_draft_model_too(decoder: Decoder) -> None:
    running = engine(decoder, decoder, num_speculative_tokens=2)
    draft_model = running.runner.draft_model
    assert draft_model is not None
    assert running.scheduler._draft_proposer is draft_model
    caches = [*running.runner.paged_model.kv_caches, *draft_model.paged_model.kv_caches]
    for cache in caches:
        cache.kv.fill_(1.0)
    running.runner.zero_blocks([[3]])
    assert len(caches) == 4
    for cache in caches:
        assert cache.kv[:, 3].eq(0).all()
        assert cache.kv[:, :3].eq(1).all() and cache.kv[:, 4:].eq(1).all()


def test_engine_drafts_only_when_it_is_asked_to(decoder: Decoder) -> None:
    assert engine(decoder).scheduler._draft_proposer is None
    assert engine(decoder, num_speculative_tokens=1).scheduler._draft_proposer is not None
    assert engine(decoder).runner.draft_model is None


@pytest.mark.parametrize(
    ("pp_size", "sizes", "most"),
    [(1, {}, 0), (1, {"async_scheduling": True}, 1), (2, {}, 1), (3, {}, 2)],
)
def test_engine_keeps_as_many_steps_in_flight_as_it_may(
    decoder: Decoder,
    monkeypatch: pytest.MonkeyPatch,
    pp_size: int,
    sizes: dict[str, Any],
    most: int,
) -> None:
    monkeypatch.setattr(decoder, "parallel_group", Group(pp_size))
    running = engine(decoder, **sizes)
    assert not running.has_work
    for index in range(pp_size):
        running.add(EngineRequest(f"{index}", [5, 6, 7 + index], GREEDY))
    assert running.has_work
    counts = []
    while running.has_work:
        running.step()
        counts.append(len(running.in_flight_steps))
    assert max(counts) == most
    assert counts[-1] == 0
    assert running.stats().generation_tokens_total == 8 * pp_size


def test_engine_stats_count_blocks_requests_and_tokens(decoder: Decoder) -> None:
    running = engine(decoder, max_num_seqs=1, num_blocks=20, block_size=4)
    running.add(EngineRequest("a", [5] * 9, GREEDY))
    running.add(EngineRequest("b", [5] * 6, GREEDY))
    assert running.stats() == EngineStats(waiting=2, kv_total_blocks=20)
    running.step()
    assert running.stats() == EngineStats(
        running=1,
        waiting=1,
        kv_used_blocks=3,
        kv_total_blocks=20,
        prompt_tokens_total=9,
        generation_tokens_total=1,
        steps_total=1,
        prefix_queries_total=9,
    )
    drive(running)
    stats = running.stats()
    assert (stats.steps_total, stats.generation_tokens_total, stats.prompt_tokens_total) == (
        16, 16, 15
    )  # fmt: skip
    assert (stats.prefix_queries_total, stats.prefix_hits_total) == (15, 4)
    # "a" has filled four blocks; "b" three, the first of which it shares.
    assert (stats.kv_used_blocks, stats.kv_cached_blocks) == (0, 6)
    assert stats.counters() == replace(stats, kv_cached_blocks=0, kv_total_blocks=0)
    assert (stats + stats).generation_tokens_total == 32
    assert (stats + EngineStats()) == stats
    assert running.step() == []
    assert running.num_steps == 16


def test_engine_counts_the_blocks_of_all_windows(decoder: Decoder) -> None:
    running = engine(decoder, num_speculative_tokens=2)
    (answer,) = running.generate([[5, 6, 7, 5, 6, 7, 5, 6]], replace(GREEDY, max_tokens=12))
    stats = running.stats()
    assert len(answer) == 12
    assert stats.drafted_total == running.scheduler.num_draft_tokens
    assert stats.accepted_total == running.scheduler.num_accepted_tokens
    assert stats.preemptions_total == 0


def test_engine_gives_each_request_a_seed(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = iter(range(100, 200))
    monkeypatch.setattr(secrets, "randbits", lambda count: count * 1000 + next(drawn))
    running = engine(decoder)
    for name, seed in (("a", 0), ("b", 7), ("c", None), ("d", None)):
        running.add(EngineRequest(name, [5], replace(GREEDY, seed=seed)))
    seeds = [sequence.seed for sequence in running.scheduler.waiting]
    assert [seed for seed in seeds if seed < 1000] == [0, 7]
    assert [seed // 1000 for seed in seeds[2:]] == [63, 63], "positive int64 numbers"
    assert seeds[2] != seeds[3]
    assert [sequence.adapter_id for sequence in running.scheduler.waiting] == [0] * 4


def test_engine_refuses_grammars_without_a_compiler_and_unknown_adapters(decoder: Decoder) -> None:
    running = engine(decoder)
    with pytest.raises(RequestError, match="a grammar needs a model with a tokenizer") as caught:
        running.add(EngineRequest("a", [5], GREEDY, grammar="root ::= 'a'"))
    assert (caught.value.code, caught.value.param) == ("not_supported", "grammar")
    assert caught.value.exit_code == InputError.exit_code
    with pytest.raises(RequestError, match="no adapter 'it'; none is loaded"):
        running.add(EngineRequest("a", [5], GREEDY, adapter="it"))
    running.runner.adapters.adapter_ids.update({"one": 1, "two": 2})
    with pytest.raises(RequestError, match="no adapter 'it'; there are one, two"):
        running.add(EngineRequest("a", [5], GREEDY, adapter="it"))
    running.add(EngineRequest("a", [5], GREEDY, adapter="two"))
    running.add(EngineRequest("b", [5], GREEDY, adapter="two"))
    running.add(EngineRequest("c", [5], GREEDY))
    with pytest.raises(RequestError, match="2 running requests use the adapter 'two'"):
        running.remove_adapter("two")
    running.remove_adapter("one")
    assert running.adapters == ["two"]
    running.cancel("a")
    running.cancel("b")
    running.remove_adapter("two")


def test_engine_generates_on_an_idle_engine_only(decoder: Decoder) -> None:
    running = engine(decoder)
    with pytest.raises(ValueError, match="shorter"):
        running.generate([[5], [6]], [GREEDY])
    assert not running.has_work
    short = replace(GREEDY, max_tokens=2)
    assert [len(answer) for answer in running.generate([[5], [6]], [GREEDY, short])] == [8, 2]
    assert len(running.generate([[5], [6], [7]], short)) == 3
    running.add(EngineRequest("a", [5], GREEDY))
    with pytest.raises(AssertionError, match="under way"):
        running.generate([[6]], GREEDY)


def test_model_that_cannot_be_recorded_runs_every_step() -> None:
    runner = NoGraphRunner()
    assert [runner.can_replay([1] * rows) for rows in (1, 1)] == [False, False]
    assert not runner.samples_tokens
    assert not CpuGraphRunner.samples_tokens
    with pytest.raises(AssertionError):
        runner.replay()


def graph_runner(
    enabled: bool = True,
    dtype: torch.dtype = torch.float32,
    group: Any = SINGLE_RANK,
) -> CpuGraphRunner:
    spec = SimpleNamespace(hidden_size=1 << 12, sliding_windows=(None,))
    model: Any = SimpleNamespace(spec=spec, dtype=dtype, parallel_group=group)
    return CpuGraphRunner(model, [], 4, 16, 256, enabled)


@needs_library
def test_cpu_graphs_run_a_step_as_large_as_the_one_before() -> None:
    runner = graph_runner()
    assert runner.num_graphs == 0
    assert [runner.can_replay([1] * rows) for rows in (2, 2, 3, 2, 2)] == [
        False, True, False, False, True
    ]  # fmt: skip
    assert [runner.can_replay([drafts]) for drafts in (3, 3, 4)] == [False, True, False]
    assert runner.can_replay([1, 1]), "steps with several tokens of a sequence count apart"
    runner._graphs[5, 5] = None  # type: ignore[assignment]
    assert [runner.can_replay([1] * rows) for rows in (5, 5, 4, 4)] == [True, True, False, True]
    assert runner.num_graphs == 1
    assert cpu_graphs.MAX_HIDDEN_ELEMENTS == 32768
    assert [runner.can_replay([1] * rows) for rows in (8, 8, 9, 9)] == [False, True, False, False]
    assert runner.can_replay([1] * 5) and not runner.can_replay([1] * 5, {0, 3}), "an adapter"
    runner.enabled = False
    assert [runner.can_replay([1] * rows) for rows in (5, 2, 2)] == [False] * 3


@needs_library
def test_cpu_graphs_are_off_where_a_replay_would_miss_something(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert graph_runner().enabled
    assert not graph_runner(enabled=False).enabled
    assert not graph_runner(dtype=torch.bfloat16).enabled
    gloo = SimpleNamespace(reduces_in_kernels=False, pp_size=1)
    stages = SimpleNamespace(reduces_in_kernels=True, pp_size=2)
    assert not graph_runner(group=gloo).enabled
    assert not graph_runner(group=stages).enabled
    monkeypatch.setattr(cpu_kernels, "library", None)
    assert not graph_runner().enabled


@needs_library
def test_cpu_graphs_forget_the_recording_that_was_not_used_for_longest(decoder: Decoder) -> None:
    running = engine(decoder, enable_prefix_caching=False)
    runner = running.runner.graph_runner
    assert isinstance(runner, CpuGraphRunner)
    sizes = []
    replayed = []
    replay = cpu_graphs.CpuGraph.replay
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            cpu_graphs.CpuGraph,
            "replay",
            lambda graph: replayed.append(graph.num_reqs) or replay(graph),
        )
        for count in (1, 2, 3, 4, 1, 5):
            running.generate([[5 + n] for n in range(count)], replace(GREEDY, max_tokens=4))
            sizes.append([num_reqs for num_reqs, _ in runner._graphs])
    # Each prompt has one token, so that all four steps of a round have one size. The first step
    # of a size is computed, the second is recorded, and the others are replayed.
    assert sizes == [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 1], [3, 4, 1, 5]]
    assert replayed == [1, 1, 2, 2, 3, 3, 4, 4, 1, 1, 1, 1, 5, 5]
    assert runner.enabled


@needs_library
def test_cpu_graphs_are_given_up_when_torch_computes(model: Path, decoder: Decoder) -> None:
    """Weights that are not packed are multiplied by torch, which no recording repeats."""
    prompts = [[5, 6, 7], [8], [9] * 9]
    expected = engine(decoder, enforce_eager=True).generate(prompts, GREEDY)
    recorded = engine(decoder)
    assert recorded.generate(prompts, GREEDY) == expected
    assert recorded.runner.graph_runner.num_graphs == 1  # type: ignore[union-attr]
    unpacked = engine(load_model(open_checkpoint(model), torch.float32))
    assert unpacked.runner.graph_runner.enabled  # type: ignore[union-attr]
    assert unpacked.generate(prompts, GREEDY) == expected
    assert not unpacked.runner.graph_runner.enabled  # type: ignore[union-attr]
    assert unpacked.runner.graph_runner.num_graphs == 0  # type: ignore[union-attr]


@pytest.mark.parametrize("rank", [None, "rank"])
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("a bug")])
def test_engine_ends_one_request_for_want_of_memory_unless_ranks_wait(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, rank: str | None, error: Exception
) -> None:
    running = engine(decoder)

    def launch(step: SchedulerOutput) -> InFlightStep:
        raise error

    monkeypatch.setattr(running.runner, "launch", launch)
    running.add(EngineRequest("a", [5, 6], GREEDY))
    running.model = SimpleNamespace(spec=SimpleNamespace(rank=rank))  # type: ignore[assignment]
    if rank or isinstance(error, RuntimeError):
        with pytest.raises(type(error)) as caught:
            running.step()
        assert caught.value is error
        return
    (output,) = running.step()
    assert (output.finish_reason, output.error) == (
        "error", "there was not enough memory to compute it"
    )  # fmt: skip
    assert not running.has_work
    assert running.num_steps == 1


def test_engine_zeroes_the_blocks_of_a_request_that_fails(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = engine(decoder, block_size=4)
    zeroed: list[list[list[int]]] = []
    monkeypatch.setattr(running.runner, "zero_blocks", zeroed.append)
    running.generate([[5]], GREEDY)
    assert zeroed == []
    monkeypatch.setattr(running.runner, "launch", lambda step: in_flight(step, [9, -1]))
    with pytest.raises(InputError, match="prompt 1: the model's logits were not finite"):
        running.generate([[5], [6] * 5], GREEDY)
    assert [[len(blocks) for blocks in pools] for pools in zeroed] == [[2]]
    assert not running.has_work
    assert running.stats().kv_used_blocks == 0


def test_engine_tells_why_an_adapter_is_not_loaded(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = engine(decoder)
    running.runner.adapters.adapter_ids["it"] = 1
    with pytest.raises(RequestError, match="there is an adapter 'it' already"):
        running.add_adapter("it", "nowhere")
    for error, raised in ((MemoryError(), ShortageError), (RuntimeError("a bug"), RuntimeError)):

        def load(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(engine_module, "load_adapter", load)
        with pytest.raises(raised, match=r"a bug|not enough memory for the adapter 'new'"):
            running.add_adapter("new", "nowhere")
    assert running.adapters == ["it"]


@pytest.mark.parametrize(
    "frozen",
    [
        EngineConfig, EngineOutput, EngineRequest, EngineStats, ForwardInputs, InFlightStep,
        ModelRunnerOutput, SamplingParams, ScheduledRequest, SchedulerOutput, StepInputs,
        StepResult,
    ],
)  # fmt: skip
def test_data_of_the_engine_cannot_be_changed(frozen: Any) -> None:
    if issubclass(frozen, tuple):  # a NamedTuple
        name = frozen._fields[0]
        instance = frozen(*frozen._fields)
    else:
        name = next(iter(frozen.__dataclass_fields__))
        instance = object.__new__(frozen)
    with pytest.raises(AttributeError):  # FrozenInstanceError is one
        setattr(instance, name, None)


def test_logprobs_tensors_are_what_the_last_stage_sends() -> None:
    step = SchedulerOutput([])
    table = LogprobsTensors(torch.zeros(1), torch.zeros(1, 0), torch.zeros(1, 0))
    embedding = torch.zeros(3)
    flight = in_flight(step, [], logprobs=table, embeddings=(embedding,))
    assert [id(tensor) for tensor in flight.tensors[1:]] == [*map(id, table), id(embedding)]


@needs_library
def test_step_of_compiled_kernels_uses_one_thread_of_torch(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = engine(decoder)
    seen: list[int] = []
    forward = running.runner.paged_model.forward

    def watched(*arguments: Any) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return forward(*arguments)

    monkeypatch.setattr(running.runner.paged_model, "forward", watched)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for params in (GREEDY, replace(GREEDY, prompt_logprobs=1)):
            running.generate([[5, 9, 11]], [params])
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert seen[0] == 1
    assert 3 in seen  # logprobs of a prompt are computed by torch
