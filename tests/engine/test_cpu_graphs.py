"""Recorded decode steps: bit for bit what the model computes, and off where they could differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.float_format_cases import SCHEMES
from support.tiny_models import tiny_checkpoint

from llmkit.bench.gpu.model_shapes import MODEL_CONFIGS, random_model, tiny_config
from llmkit.checkpoint.hf_config import RopeSpec
from llmkit.kernels.cpu import cpu_experts, cpu_kernels
from llmkit.kernels.kv_cache import KV_CACHE_DTYPES
from llmkit.model.decoder import DecoderLayer
from llmkit.model.families import model_spec
from llmkit.model.rope import CosSin, CosSinTable, RotaryEmbedding
from llmkit.runtime.engine import cpu_graphs
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine.slot_block_tables import SlotBlockTables
from llmkit.runtime.engine_loader import load_engine

needs_library = pytest.mark.skipif(
    cpu_kernels.library is None, reason=f"compiled kernels: {cpu_kernels.status()}"
)
PROMPTS = [[5, 6, 7], [9] * 40, [11, 12], list(range(20, 60)), [3], [4, 4], [8] * 17]


def engine(model: Path, **options: Any) -> Engine:
    return load_engine(model, EngineOptions(device="cpu", max_model_len=128, **options))


def answers(one: Engine) -> list[list[int]]:
    """Outputs of requests that end one after the other.

    So steps of every size come, and small ones repeatedly.
    """
    sampling = [
        SamplingParams(temperature=0.7, seed=index, max_tokens=6 + 5 * index, ignore_eos=True)
        for index in range(len(PROMPTS))
    ]
    return one.generate(PROMPTS, sampling)


@pytest.fixture
def layers_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each pass through a layer."""
    seen: list[int] = []
    call = DecoderLayer.forward_with_residual

    def counted(
        self: DecoderLayer, hidden: torch.Tensor, *arguments: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(len(hidden))
        return call(self, hidden, *arguments)

    monkeypatch.setattr(DecoderLayer, "forward_with_residual", counted)
    return seen


@needs_library
@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 24}),
        ("gemma2", {"sliding_window": 24}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("mixtral", {}),
    ],
)
def test_cpu_graphs_give_the_same_tokens_with_fewer_forward_passes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layers_run: list[int],
    architecture: str,
    config: dict[str, Any],
) -> None:
    model = tiny_checkpoint(tmp_path, architecture, **config)
    recorded = engine(model)
    first = answers(recorded)
    few = len(layers_run)
    layers_run.clear()
    monkeypatch.setattr(cpu_graphs, "MAX_HIDDEN_ELEMENTS", 0)
    assert answers(engine(model)) == first
    assert few < len(layers_run) / 2
    assert recorded.runner.graph_runner.enabled
    assert recorded.runner.graph_runner.num_graphs == cpu_graphs.MAX_RECORDINGS


@needs_library
def test_cpu_graphs_give_the_same_logits_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, through the logits."""

    def logits(one: Engine) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        compute = one.model.logits

        def record(*arguments: torch.Tensor) -> torch.Tensor:
            seen.append(compute(*arguments))
            return seen[-1].clone()

        monkeypatch.setattr(one.model, "logits", record)
        answers(one)
        return seen

    model = tiny_checkpoint(tmp_path)
    first = logits(engine(model))
    monkeypatch.setattr(cpu_graphs, "MAX_HIDDEN_ELEMENTS", 0)
    second = logits(engine(model))
    assert len(first) == len(second) > 30
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_library
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_cpu_graphs_verify_drafts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers_run: list[int], architecture: str
) -> None:
    config = {"sliding_window": 24} if architecture == "gemma2" else {}
    model = tiny_checkpoint(tmp_path, architecture, **config)
    greedy = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    prompts = [[9, 8, 7, 6] * 5, [5, 6, 7] * 4]
    recorded = engine(model, speculate=3)
    first = recorded.generate(prompts, greedy)
    few = len(layers_run)
    layers_run.clear()
    graphs = recorded.runner.graph_runner._graphs
    assert any(num_tokens > num_rows for num_rows, num_tokens in graphs), "with drafts"
    monkeypatch.setattr(cpu_graphs, "MAX_HIDDEN_ELEMENTS", 0)
    assert engine(model, speculate=3).generate(prompts, greedy) == first
    assert few < len(layers_run)
    assert engine(model).generate(prompts, greedy) == first


@needs_library
@pytest.mark.parametrize("kv_cache_dtype", KV_CACHE_DTYPES)
def test_cpu_graphs_replay_steps_with_a_cache_of_another_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv_cache_dtype: str
) -> None:
    model = tiny_checkpoint(tmp_path)
    recorded = engine(model, kv_cache_dtype=kv_cache_dtype)
    assert recorded.config.kv_cache_dtype == kv_cache_dtype
    first = answers(recorded)
    assert recorded.runner.graph_runner.num_graphs
    monkeypatch.setattr(cpu_graphs, "MAX_HIDDEN_ELEMENTS", 0)
    assert answers(engine(model, kv_cache_dtype=kv_cache_dtype)) == first


@needs_library
def test_cpu_graphs_do_not_replay_steps_in_which_torch_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel of the experts takes at most MAX_EXPERTS of them; more are chosen by torch."""
    monkeypatch.setattr(cpu_experts, "MAX_EXPERTS", 2)
    model = tiny_checkpoint(tmp_path, "mixtral")
    one = engine(model)
    first = answers(one)
    assert not one.runner.graph_runner.enabled
    assert not one.runner.graph_runner.num_graphs
    monkeypatch.setattr(cpu_graphs, "MAX_HIDDEN_ELEMENTS", 0)
    assert answers(engine(model)) == first


def test_cpu_graphs_are_off_without_compiled_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_checkpoint(tmp_path)
    monkeypatch.setattr(cpu_kernels, "library", None)
    one = engine(model)
    assert len(answers(one)) == len(PROMPTS)
    assert not one.runner.graph_runner.enabled


@needs_library
def test_recording_that_fails_restores_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = engine(tiny_checkpoint(tmp_path))
    library = cpu_kernels.library

    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(one.model, "run_layers", fail)
    tables = SlotBlockTables(1, 8, dict.fromkeys(one.model.spec.sliding_windows, 0))
    caches = one.runner.paged_model.kv_caches
    recording = cpu_graphs.CpuGraph(one.model, caches, 1, 1, tables, 16, {})
    with pytest.raises(MemoryError):
        recording.record()
    assert cpu_kernels.library is library


@pytest.mark.parametrize("scales_queries", [False, True])
def test_cos_sin_tables_have_the_values_of_the_embedding_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, scales_queries: bool
) -> None:
    inv_freq = tuple((1e4 ** (-torch.arange(0, 36, 2) / 36)).tolist())
    spec = RopeSpec(inv_freq, 1.2, (), 64, query_scale_beta=0.1 * scales_queries)
    rope = RotaryEmbedding(spec, 512, torch.device("cpu"))
    monkeypatch.setattr(CosSinTable, "MAX_BYTES", 100 * (2 * 36 * 4 + 4 * scales_queries))
    table = CosSinTable(rope, 512)
    assert table.num_positions == 100
    assert CosSinTable(rope, 7).num_positions == 7
    for positions in ([5], [99, 3, 0], [100, 2], [511] * 9):
        expected = rope(torch.tensor(positions))
        written = CosSin(*(None if part is None else part * torch.nan for part in expected))
        table.write(torch.tensor(positions), max(positions), written)
        for mine, value in zip(written, expected, strict=True):
            assert (mine is None) == (value is None)
            assert mine is None or value is None or torch.equal(mine, value)


@needs_library
@pytest.mark.parametrize("name", ["fp8 token", "fp8 blocks", "mxfp8", "mxfp4", "nvfp4a16"])
def test_cpu_graphs_replay_steps_with_inputs_in_float_formats(
    monkeypatch: pytest.MonkeyPatch, layers_run: list[int], name: str
) -> None:
    """The compiled kernels quantize inputs: torch would have to compute again in each step."""
    config = tiny_config(MODEL_CONFIGS["SmolLM2-135M"])

    def made() -> Engine:
        torch.manual_seed(3)  # of quantized weights
        cpu = torch.device("cpu")
        model = random_model(model_spec(config), torch.float32, cpu, SCHEMES[name])
        return Engine(model, EngineConfig(64, 40, torch.device("cpu"), torch.float32))

    recorded = made()
    first = answers(recorded)
    few = len(layers_run)
    layers_run.clear()
    monkeypatch.setattr(cpu_graphs, "MAX_HIDDEN_ELEMENTS", 0)
    assert answers(made()) == first
    assert few < len(layers_run) / 2
    assert recorded.runner.graph_runner.num_graphs > 0
