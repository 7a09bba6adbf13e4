"""The bodies of GPU tests on a CPU: kernels in Triton's interpreter, engines with fake graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import device_cases
from support.device_cases import (
    GRAPH_CASES,
    GraphCase,
    Rerun,
    decode_steps,
    sample_in_torch,
    use_tables,
)
from support.recurrent_cases import ragged_steps
from support.tiny_models import tiny_checkpoint
from support.triton_checks import interpreted

from llmkit.model.lora import LoraManager
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine_loader import load_engine


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    calls = [
        ("masked_ids", 130, 4),
        ("changed_ids", 130, 3),
        ("delta_outputs", torch.float32, decode_steps(3)),
        ("delta_outputs", torch.float16, ragged_steps(90)),
    ]
    folder = tmp_path_factory.mktemp("interpreted")
    return interpreted("support.device_cases", "in_interpreter", calls, folder)


def test_sample_reads_bitmasks(found: list[Any]) -> None:
    ids, expected = found[0]
    assert (ids != expected).sum() <= 1
    assert torch.equal(ids == -1, expected == -1)
    assert (ids == -1).sum() == len(ids) // 5 + (len(ids) % 5 > 3)


def test_sample_changes_logits_in_the_interpreter(found: list[Any]) -> None:
    ids, expected = found[1]
    assert len(set(expected.tolist())) > 9
    assert torch.equal(ids, expected)


def test_gated_delta_net_in_the_interpreter(found: list[Any]) -> None:
    for outputs, limit in ((found[2], 2e-4), (found[3], 0.01)):
        for ours, expected in outputs:
            scale = expected.square().mean().sqrt().item()
            torch.testing.assert_close(ours.float(), expected, rtol=limit, atol=limit * scale)


@pytest.mark.parametrize("case", GRAPH_CASES, ids=lambda case: case.label)
def test_requests_replay_graphs_of_all_kinds(case: GraphCase, tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", case.architecture)
    adapters = device_cases.adapter_folders(case, model)
    options = EngineOptions(
        device="cpu",
        max_model_len=128,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        adapters={},
        **case.options,
    )
    engine = load_engine(model, options)
    paged_model = engine.runner.paged_model
    paged_model.kv_caches = [  # a block more, as on a GPU
        engine.model.new_kv_cache(
            cache.kv.shape[1] + 1, engine.config.block_size, engine.config.kv_cache_dtype
        )
        for cache in paged_model.kv_caches
    ]
    engine.runner.adapters = LoraManager(engine.model, uses_slots=True)
    use_tables(engine)
    for name, folder in adapters.items():
        engine.add_adapter(name, folder)
    graphs = device_cases.use_graphs(engine, Rerun, sampler=sample_in_torch)
    answers, kinds = device_cases.graph_answers(engine, graphs, adapters)
    assert len(answers) == len(device_cases.PROMPTS)
    assert kinds >= {*case.kinds, "logits processors"}
    # Without graphs the answers are the same.
    plain = load_engine(model, options)
    plain.runner.graph_runner.enabled = False  # type: ignore[union-attr]
    for name, folder in adapters.items():
        plain.add_adapter(name, folder)
    assert device_cases.graph_answers(plain, None, adapters)[0] == answers
