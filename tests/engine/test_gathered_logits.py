"""Tensor parallel ranks that sample as a GPU does: from the logits of the whole vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.device_cases import Rerun, sample_in_torch, use_graphs, use_tables
from support.fake_cuda import GPU
from support.fake_cuda_api import fake_gpu
from support.thread_group import ThreadGroup, run_ranks
from support.tiny_models import tiny_checkpoint
from support.triton_checks import interpreted

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.model.parallel_group import ParallelGroup
from llmkit.model.weight_loader import load_model
from llmkit.runtime.engine.cuda_graphs import CudaGraphRunner
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.engine_outputs import Logprobs
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.kernel_warm_up import warm_up
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.shard.rank_part import rank_parts

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
DRAWN = replace(GREEDY, temperature=0.8, top_k=30, top_p=0.9, seed=3)
ASKED = [
    GREEDY,
    DRAWN,
    replace(GREEDY, logprobs=3, prompt_logprobs=1),
    replace(DRAWN, logit_bias={400: 3.0, 3: -9.0}, min_tokens=4, stop_token_ids=(400,)),
    replace(GREEDY, repetition_penalty=1.3, frequency_penalty=0.2, logprobs=0),
]
PROMPTS = [[5, 6, 7, 5], [300, 4, 9], list(range(10, 40)), [77], [8, 8, 300]]
Answer = tuple[list[int], list[Logprobs]]


def config(device: torch.device, **sizes: Any) -> EngineConfig:
    chosen: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 24} | sizes
    dtype = torch.float32 if device == CPU else torch.bfloat16
    return EngineConfig(96, 60, device, dtype, **chosen)


def answers(engine: Engine) -> dict[str, Answer]:
    """Requests that come one after the other, so that prompts are beside decodes."""
    found: dict[str, Answer] = {}
    for index, params in enumerate(ASKED):
        engine.add(EngineRequest(f"{index}", PROMPTS[index], params))
        outputs = engine.step()
        while index == len(ASKED) - 1 and engine.has_work:
            outputs += engine.step()
        for output in outputs:
            assert output.error is None
            tokens, logprobs = found.setdefault(output.request_id, ([], []))
            tokens += output.token_ids
            logprobs += [*(output.prompt_logprobs or []), *(output.logprobs or [])]
    return found


def engine_of(
    part_of: Callable[[], Any], uses_graphs: bool, sizes: dict[str, Any]
) -> tuple[Engine, set[str]]:
    """An engine on a CPU that samples as on a GPU, and the kinds of graphs that it replays."""
    engine = Engine(part_of(), config(CPU, **sizes))
    runner = engine.runner
    runner.paged_model.kv_caches = [  # a block more, as on a GPU
        engine.model.new_kv_cache(cache.kv.shape[1] + 1, engine.config.block_size)
        for cache in runner.paged_model.kv_caches
    ]
    use_tables(engine)
    replayed: set[str] = set()
    graphs = use_graphs(engine, Rerun, sampler=sample_in_torch)
    replay = graphs.replay

    def noted(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        replayed.add("mixed" if arguments[4] is not None else "uniform")
        return replay(*arguments)

    graphs.replay = noted  # type: ignore[method-assign]
    graphs.enabled = uses_graphs
    return engine, replayed


@pytest.mark.parametrize("sizes", [{}, {"num_speculative_tokens": 2}], ids=str)
@pytest.mark.parametrize("uses_graphs", [True, False])
def test_ranks_sample_from_gathered_logits_as_one(
    tmp_path: Path, uses_graphs: bool, sizes: dict[str, Any]
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(tmp_path))
    expected = answers(Engine(load_model(checkpoint, torch.float32), config(CPU)))
    parts = rank_parts(checkpoint, 2, 1, 1)

    def run(rank: int, group: ThreadGroup) -> tuple[dict[str, Answer], set[str]]:
        part = parts[rank]
        engine, replayed = engine_of(
            lambda: load_model(
                part.checkpoint, torch.float32, spec=part.spec, parallel_group=group
            ),
            uses_graphs,
            sizes,
        )
        return answers(engine), replayed

    for found, replayed in run_ranks([part.spec for part in parts], run):
        assert replayed == ({"mixed", "uniform"} if uses_graphs else set())
        assert found.keys() == expected.keys()
        for name, (tokens, logprobs) in found.items():
            assert tokens == expected[name][0], name
            assert len(logprobs) == len(expected[name][1])
            for mine, theirs in zip(logprobs, expected[name][1], strict=True):
                assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
                assert [token for token, _ in mine.top] == [token for token, _ in theirs.top]


class MirrorGroup(ParallelGroup):
    """A rank whose peer has the same values."""

    tp_size = 2
    is_split = True

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x + x

    def all_reduce_max(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((x, x), -1)


def rank_on_a_device(path: str) -> tuple[set[str], set[str], list[str], int]:
    """The kernels of a rank's steps, what they wait for, what they compile late, and its graphs."""
    with fake_gpu() as gpu:
        part = rank_parts(open_checkpoint(Path(path)), 2, 1, 1)[0]
        model = load_model(
            part.checkpoint, torch.bfloat16, GPU, spec=part.spec, parallel_group=MirrorGroup()
        )
        engine = Engine(model, config(GPU, async_scheduling=True))
        assert isinstance(engine.runner.graph_runner, CudaGraphRunner)
        engine.runner.capture_graphs()
        warm_up(engine.runner)
        compiled = len(gpu.device.compiled)
        gpu.device.places.clear()
        gpu.device.log.clear()
        answers(engine)
        waits = {
            what
            for what, _ in gpu.device.places
            if not what.startswith(("to device", "to host", "event"))
        }
        late = [kernel for kernel, _ in gpu.device.compiled[compiled:]]
        return set(gpu.launches), waits, late, gpu.device.log.count("graph")


def test_ranks_on_a_device_sample_in_kernels_and_wait_for_nothing(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    (result,) = interpreted(
        "engine.test_gathered_logits",
        "rank_on_a_device",
        [(str(model),)],
        tmp_path,
        interpret=False,
    )
    kernels, waits, late, num_graphs = result
    assert kernels >= {"_find_extremes_kernel", "_choose_kernel", "_count_tokens_kernel"}
    assert waits == set()
    assert late == []
    assert num_graphs > 9
