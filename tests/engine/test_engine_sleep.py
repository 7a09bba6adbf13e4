"""Sleep of an engine: caches are freed and made again, and the weights' memory moves in place."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.tiny_models import tiny_checkpoint

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.model.linear import PackedLinear
from llmkit.model.weight_loader import load_model
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine.weight_storages import HostWeights
from llmkit.runtime.engine_loader import load_engine

CPU = torch.device("cpu")
OPTIONS = EngineOptions(
    device="cpu",
    kv_cache_memory=1 << 22,
    state_cache_memory=1 << 20,
    max_num_seqs=2,
    max_model_len=128,
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
PROMPT = [3 + 7 * i % 120 for i in range(64)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("sleep") / "model", "qwen2")


def run(engine: Engine) -> tuple[list[int], int]:
    """The answer, and how many tokens of the prompt were cached."""
    engine.add(EngineRequest("a", PROMPT, GREEDY))
    answer: list[int] = []
    cached = 0
    while engine.has_work:
        for output in engine.step():
            answer += output.token_ids
            cached = output.cached_tokens
    return answer, cached


@pytest.mark.parametrize("changes", [{}, {"speculate": 3}, {"kv_cache_dtype": "int8"}])
def test_sleep_frees_the_caches_and_the_answers_are_the_same(
    model: Path, changes: dict[str, Any]
) -> None:
    engine = load_engine(model, EngineOptions(**(vars(OPTIONS) | changes)))
    expected, _ = run(engine)
    assert run(engine) == (expected, 48), "the prefix is cached"
    before = engine.stats()
    cache = weakref.ref(engine.runner.block_tensors(0)[0])
    for _ in range(2):  # the second time, it sleeps already
        engine.sleep()
        gc.collect()
        assert engine.is_sleeping and not engine.has_work
        assert cache() is None, "nothing refers to the KV cache"
    engine.cancel("a late one")
    assert engine.stats() == before.counters()
    for _ in range(2):
        engine.wake_up()
        assert not engine.is_sleeping
    assert run(engine) == (expected, 0), "no prefix is cached"
    assert run(engine) == (expected, 48)
    after = engine.stats()
    assert after.prefix_hits_total == before.prefix_hits_total + 48
    assert after.generation_tokens_total == 2 * before.generation_tokens_total
    assert after.steps_total == 2 * before.steps_total
    assert after.kv_total_blocks == before.kv_total_blocks


def test_sleep_keeps_the_files_of_prefixes(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "model", "qwen2", max_position_embeddings=1024)
    folder = tmp_path / "pages"
    folder.mkdir(mode=0o700)
    options = EngineOptions(**(vars(OPTIONS) | {"max_model_len": 600}))
    engine = load_engine(path, options, prefix_store=(str(folder), 1 << 28))
    prompt = [3 + 7 * i % 120 for i in range(530)]
    expected = engine.generate([prompt], GREEDY)
    for _ in range(2):
        assert engine.generate([prompt], GREEDY) == expected
    while engine.has_work:
        engine.step()
    engine._write_thread.shutdown()  # the files are complete
    engine.sleep()
    engine.wake_up()
    assert engine.generate([prompt], GREEDY) == expected
    assert engine.stats().store_hits_total > 0


@dataclass
class Packed:
    """A layer in the form of a kernel: views of one storage, and objects within objects."""

    parts: tuple[torch.Tensor, ...]
    kernel: Any


def test_host_weights_come_back_at_the_same_tensors() -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    halves = whole.chunk(2)
    transposed = whole.t()
    int8 = torch.arange(7, dtype=torch.int8)
    loop = SimpleNamespace(tensors={"a": int8}, me=None)
    loop.me = loop
    module = torch.nn.Linear(3, 2)
    with torch.inference_mode():
        inference = torch.ones(5)
    models = [Packed((*halves, transposed), loop), None, [module, inference, torch.empty(0)]]
    tensors = [whole, *halves, transposed, int8, module.weight, module.bias, inference]
    expected = [tensor.detach().clone() for tensor in tensors]
    host = HostWeights(models, CPU)
    storages = [whole, int8, module.weight, module.bias, inference]
    assert [tensor.untyped_storage().nbytes() for tensor in storages] == [0] * 5
    assert host.num_bytes == sum(tensor.nbytes for tensor in storages)
    host.restore()
    assert all(map(torch.equal, tensors, expected))
    assert halves[0].untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    host.restore()
    assert all(map(torch.equal, tensors, expected))


def test_host_weights_of_a_model_are_all_of_them(model: Path) -> None:
    """On a GPU; the host's tensors are in the place of the GPU's."""
    checkpoint = open_checkpoint(model)
    decoder = load_model(checkpoint, torch.float32, CPU)  # cast, so that no weight is in a file
    linears, others = decoder.weights()
    dense = [linear.weight for linear in linears if not isinstance(linear, PackedLinear)]
    tensors = [*others, *dense]
    assert len(tensors) > 10
    expected = [tensor.clone() for tensor in tensors]
    host = HostWeights([decoder], CPU)
    assert {tensor.untyped_storage().nbytes() for tensor in tensors} == {0}
    host.restore()
    assert all(map(torch.equal, tensors, expected))
