"""Graphs of decode steps on a CPU: a fake capture runs the function again in each replay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import tiny_checkpoint

from llmkit.kernels.sampling import sample
from llmkit.model.decoder import Decoder
from llmkit.runtime.engine.cuda_graphs import CudaGraphRunner, Sampler
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine

PROMPTS = [[5, 6, 7], [9] * 40, [11, 12], list(range(20, 60)), [3], [4, 4], [8] * 17]


class Rerun:
    """Runs a function again, where CUDA would repeat its kernels."""

    made = 0

    def __init__(self, run: Callable[[], None]) -> None:
        Rerun.made += 1
        self.replay = run
        run()


def plain(model: Path, **options: Any) -> Engine:
    one = load_engine(model, EngineOptions(device="cpu", max_model_len=128, **options))
    one.runner.graph_runner.enabled = False
    return one


def drawn(logits: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
    """What the Triton kernel gives."""
    return torch.where(logits.sum(-1).isfinite(), sample(logits, *parameters), -1)


def graphed(model: Path, most: int = 7, sampler: Sampler | None = drawn, **options: Any) -> Engine:
    """An engine as it is on CUDA: a block more in every cache, and graphs."""
    one = plain(model, **options)
    runner = one.runner
    sizes = [cache.kv.shape[1] + 1 for cache in runner.paged_model.kv_caches]
    runner.paged_model.kv_caches = [
        one.model.new_kv_cache(blocks, one.config.block_size, one.config.kv_cache_dtype)
        for blocks in sizes
    ]
    longest = -(-one.config.max_model_len // one.config.block_size)
    runner.graph_runner = CudaGraphRunner(
        one.model,
        runner.paged_model.kv_caches,
        longest,
        one.config.block_size,
        most,
        Rerun,
        sampler,
    )
    return one


def answers(one: Engine, temperature: float = 0.7) -> list[list[int]]:
    """Requests that end one after the other, so that steps of every size come."""
    sampling = [
        SamplingParams(
            temperature=temperature * (index % 2),
            seed=index,
            max_tokens=6 + 5 * index,
            ignore_eos=True,
        )
        for index in range(len(PROMPTS))
    ]
    return one.generate(PROMPTS, sampling)


@pytest.mark.parametrize(
    ("architecture", "config", "options"),
    [
        ("llama", {}, {}),
        ("llama", {}, {"kv_cache_dtype": "int8"}),
        ("mistral", {"sliding_window": 24}, {}),
        ("gemma2", {"sliding_window": 24}, {}),
        ("qwen3", {}, {}),
        ("phi3", {}, {}),
    ],
    ids=["llama", "quantized", "window", "gemma2", "qwen3", "phi3"],
)
def test_cuda_graphs_give_the_same_tokens_as_eager_steps(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    config: dict[str, Any],
    options: dict[str, Any],
) -> None:
    model = tiny_checkpoint(tmp_path, architecture, **config)
    expected = answers(plain(model, **options))
    one = graphed(model, **options)
    seen = []
    call = Decoder.__call__

    def counted(self: Decoder, tokens: torch.Tensor, *arguments: Any) -> torch.Tensor:
        seen.append(len(tokens))
        return call(self, tokens, *arguments)

    monkeypatch.setattr(Decoder, "__call__", counted)
    assert answers(one) == expected
    decoding = seen[seen.index(7) :] if 7 in seen else seen
    assert {1, 2, 4, 7} >= set(decoding[-30:]), "every step has the size of a graph"
    assert answers(one, 0.0) == answers(plain(model, **options), 0.0), (
        "the most probable ids come from the graph"
    )


def test_cuda_graphs_capture_common_sizes_at_the_start(tmp_path: Path) -> None:
    one = graphed(tiny_checkpoint(tmp_path), most=40)
    graphs = one.runner.graph_runner
    assert isinstance(graphs, CudaGraphRunner)
    assert graphs.sizes == [1, 2, 4, 8, 16, 24, 32, 40]
    before = Rerun.made
    graphs.capture_common_sizes()
    assert Rerun.made == before + 7, "all but the largest"
    assert graphs.should_run(40) and not graphs.should_run(41)
    answers(one)
    assert Rerun.made == before + 7, "nothing new is made for steps of up to 32"


def test_cuda_graph_rows_without_a_sequence_write_to_the_padding_block_only(tmp_path: Path) -> None:
    one = graphed(tiny_checkpoint(tmp_path), most=8)
    one.generate(
        [[5, 6, 7]] * 3, SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    )  # 3 of 4 rows
    used = {
        int(block)
        for cache in one.runner.paged_model.kv_caches
        for block in cache.kv.flatten(2).any(-1).any(0).nonzero()
    }
    spare = one.runner.paged_model.kv_caches[0].kv.shape[1] - 1
    assert spare in used and 1 <= len(used - {spare}) <= 3, (
        "a block for each of three short requests"
    )
    assert all(bool(torch.isfinite(cache.kv).all()) for cache in one.runner.paged_model.kv_caches)


def test_cuda_graphs_are_off_for_experts_routed_on_the_host(tmp_path: Path) -> None:
    one = graphed(tiny_checkpoint(tmp_path, "mixtral"))
    before = Rerun.made
    one.runner.graph_runner.capture_common_sizes()  # type: ignore[union-attr]
    assert answers(one) == answers(plain(tmp_path))
    assert Rerun.made == before


def test_cuda_graphs_are_not_used_for_prompts(tmp_path: Path) -> None:
    """A step that is not one token for each sequence of the model itself takes no graph."""
    one = graphed(tiny_checkpoint(tmp_path))
    asked: list[int] = []
    should_run = one.runner.graph_runner.should_run
    one.runner.graph_runner.should_run = lambda rows: asked.append(rows) or should_run(rows)
    one.generate([[5] * 40], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
    assert asked == [1] * 4, "not for the prompt"
