"""On a CUDA device: what the sampler masks and changes, latent attention, gated delta nets, graphs.

The bodies are in `support.device_cases`: tests/engine/test_device_cases.py runs them on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import device_cases
from support.device_cases import GRAPH_CASES, GraphCase, Rerun, decode_steps
from support.gated_delta_cases import Steps
from support.latent_cases import CASES, REPLAYED, Case
from support.paged_cases import assert_close
from support.recurrent_cases import ragged_steps
from support.tiny_models import tiny_checkpoint

from llmkit.kernels import gated_delta_net_triton, latent_attention
from llmkit.kernels.attention_metadata import AttentionBatch
from llmkit.kernels.latent_attention import expanded_attention, latent_projection, mla_attention
from llmkit.kernels.latent_cache import LatentCache
from llmkit.kernels.recurrent_state import RecurrentBatch, RecurrentState
from llmkit.runtime.engine.cuda_graphs import CudaGraph
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine_loader import load_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = "cuda"
OPTIONS = EngineOptions(
    device=DEVICE,
    dtype="bfloat16",
    kv_cache_memory=64 << 20,
    max_num_seqs=8,
    max_num_batched_tokens=64,
)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    """Which the kernels do not give."""
    pytest.importorskip("triton")
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [130, 5000, 151_936])
def test_sample_reads_bitmasks_on_gpu(size: int, dtype: torch.dtype) -> None:
    found, expected = device_cases.masked_ids(size, 1, DEVICE, dtype)
    # But for draws that are as good as equal.
    assert (found != expected).sum() <= 1 + len(found) // 100
    assert torch.equal(found == -1, expected == -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [130, 5000, 151_936])
def test_sample_changes_logits_on_gpu(size: int, dtype: torch.dtype) -> None:
    found, expected = device_cases.changed_ids(size, 1, DEVICE, dtype)
    # But for draws that are as good as equal.
    assert (found != expected).sum() <= 1 + len(found) // 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_latent_attention_on_gpu(case: Case, dtype: torch.dtype) -> None:
    case = replace(case, dtype=dtype)
    assert_close(case.inputs.run_kernel(DEVICE).cpu(), case.inputs.expected(), dtype)


@pytest.mark.parametrize("heads", [16, 128])
def test_latent_attention_of_deepseek_sizes_on_gpu(heads: int) -> None:
    case = Case("DeepSeek", [1] * 4, [700, 33, 2000, 5], heads, 512, 64, dtype=torch.bfloat16)
    assert_close(case.inputs.run_kernel(DEVICE).cpu(), case.inputs.expected(), case.dtype)


@pytest.mark.parametrize("case", REPLAYED, ids=lambda case: case.label)
def test_latent_attention_replays_with_other_lengths_on_gpu(case: Case) -> None:
    found = case.inputs.run_kernel(DEVICE, replayed=True)
    assert_close(found.cpu(), case.inputs.expected(), case.dtype)


def test_expanded_latent_attention_on_gpu() -> None:
    """A long prompt with cached tokens, and a decode beside it, in the absorbed form."""
    heads, nope, rope, rank, value = 8, 64, 32, 128, 64
    query_lens, seq_lens = [1, 300], [90, 500]
    assert query_lens[1] >= latent_attention.MIN_EXPANDED_QUERIES
    draw = torch.Generator().manual_seed(0)
    tables = [list(range(6)), list(range(6, 38))]
    whole = AttentionBatch.build(seq_lens, seq_lens, {None: tables}, 16).metadata(None)
    latents = torch.randn(sum(seq_lens), rank + rope, generator=draw).bfloat16()
    cache = LatentCache(torch.zeros(1, 38, 16, rank + rope))
    cache.store(latents.float(), whole.slot_mapping)
    q = torch.randn(sum(query_lens), heads, nope + rope, generator=draw).bfloat16()
    weight = (torch.randn(heads * (nope + value), rank, generator=draw) / rank**0.5).bfloat16()
    batch = AttentionBatch.build(query_lens, seq_lens, {None: tables}, 16)
    ends = torch.tensor(seq_lens).cumsum(0)
    new = torch.cat(
        [latents[end - count : end] for end, count in zip(ends, query_lens, strict=True)]
    )
    expected = expanded_attention(
        q.float(),
        lambda rows: torch.nn.functional.linear(rows, weight.float()),
        new.float(),
        cache,
        batch.metadata(None),
        0.1,
        rank,
        value,
    )
    there = AttentionBatch.build(query_lens, seq_lens, {None: tables}, 16, DEVICE)
    found = mla_attention(
        q.to(DEVICE),
        latent_projection(weight.to(DEVICE), heads, value, torch.bfloat16),
        LatentCache(cache.kv.to(DEVICE, torch.bfloat16)),
        there,
        0.1,
        rank,
    )
    torch.testing.assert_close(found.float().cpu(), expected, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "steps",
    [decode_steps(5), decode_steps(3, 4), ragged_steps(700)],
    ids=["decodes", "drafts", "ragged prompts"],
)
def test_gated_delta_net_on_gpu(steps: Steps, dtype: torch.dtype) -> None:
    error = {torch.bfloat16: 0.03, torch.float16: 0.006, torch.float32: 5e-4}[dtype]
    for found, expected in device_cases.delta_outputs(dtype, steps, DEVICE):
        scale = expected.square().mean().sqrt().item()
        torch.testing.assert_close(found.float(), expected, rtol=error, atol=4 * error * scale)


def test_gated_delta_net_graph_replays_with_other_inputs() -> None:
    steps = decode_steps(4)
    (qkv, ba, *parameters, k_heads), states = device_cases.delta_case(torch.bfloat16, steps)
    inputs = [part.to(DEVICE) for part in (qkv, ba, *parameters)]
    state = RecurrentState(torch.empty(0), states.to(DEVICE))
    batch = RecurrentBatch.build(*steps, device=DEVICE)
    batch.max_query_len = 1

    def run() -> torch.Tensor:
        return gated_delta_net_triton.gated_delta_rule_triton(*inputs, k_heads, state, batch)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    inputs[0].copy_(qkv.flip(0))
    state.state.copy_(states)
    graph.replay()
    replayed = found.clone()
    after = state.state.clone()
    state.state.copy_(states)
    assert torch.equal(run(), replayed)
    assert torch.equal(state.state, after)


@pytest.mark.parametrize("case", GRAPH_CASES, ids=lambda case: case.label)
def test_graphs_of_all_kinds_answer_as_their_kernels(case: GraphCase, tmp_path: Path) -> None:
    """The same sizes of steps, so that every product is the same one."""
    model = tiny_checkpoint(tmp_path / "model", case.architecture)
    adapters = device_cases.adapter_folders(case, model)
    found = []
    for capture in (CudaGraph, Rerun):
        engine = load_engine(model, replace(OPTIONS, adapters=adapters, **case.options))
        graphs = device_cases.use_graphs(engine, capture)
        answers, kinds = device_cases.graph_answers(engine, graphs, adapters)
        assert kinds >= set(case.kinds)
        found.append(answers)
    assert found[0] == found[1]
