"""The order in which the host launches work on a GPU, and what it waits for.

A CPU acts as the device. Tensors that would be on the GPU are marked, and what is made of them.
Looking into one would make the host wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fake_cuda import GPU, Device
from support.fake_cuda_api import fake_gpu
from support.tiny_models import tiny_checkpoint
from torch.overrides import TorchFunctionMode

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.kernels import triton_support as jit
from llmkit.model.weight_loader import load_model
from llmkit.runtime.engine import model_runner
from llmkit.runtime.engine.cuda_graphs import CudaGraphRunner
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import Pooling, SamplingParams

KINDS: tuple[Pooling, ...] = ("last", "mean")


class Replayed:
    """A graph that says when it is launched."""

    def __init__(self, log: list[str], run: Callable[[], None]) -> None:
        self.log = log
        self.run = run
        run()

    def replay(self) -> None:
        self.log.append("graph")
        self.run()


@pytest.fixture
def device() -> Iterator[Device]:
    draw = lambda logits, *parameters: logits.argmax(-1)  # noqa: E731
    with fake_gpu(has_triton=False) as gpu:
        gpu.patch.setattr(jit, "triton", None)  # torch's operators are in the same order
        gpu.patch.setattr(
            model_runner,
            "CudaGraphRunner",
            partial(CudaGraphRunner, capture=partial(Replayed, gpu.device.log), sampler=draw),
        )
        yield gpu.device


def engine(path: Path, device: Device, sampling: SamplingParams) -> Engine:
    """One with four requests, after some steps."""
    config = EngineConfig(64, 32, GPU, torch.float32, max_num_seqs=8, async_scheduling=True)
    one = Engine(load_model(open_checkpoint(path), torch.float32, GPU), config)
    for index in range(4):
        one.add(EngineRequest(f"{index}", [5, 6, 7 + index], replace(sampling, seed=index)))
    for _ in range(5):
        one.step()
    device.log.clear()
    return one


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True),
        SamplingParams(temperature=0.7, max_tokens=40, ignore_eos=True),
        SamplingParams(
            temperature=0.7, top_k=20, top_p=0.9, min_p=0.01, max_tokens=40, ignore_eos=True
        ),
    ],
    ids=["greedy", "sampled", "filtered"],
)
def test_step_is_launched_before_the_host_waits_for_the_last_one(
    tmp_path: Path, device: Device, sampling: SamplingParams
) -> None:
    one = engine(tiny_checkpoint(tmp_path), device, sampling)
    for _ in range(3):
        one.step()
    log = [what for what in device.log if what != "to device"]
    assert log == [
        what for n in (6, 7, 8) for what in ("graph", "to host", f"event {n}", f"wait for {n - 1}")
    ]


def test_decode_step_sends_its_inputs_in_one_copy(tmp_path: Path, device: Device) -> None:
    """Lengths, positions and slots; token ids, block tables and sampling stay on the device."""
    greedy = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    one = engine(tiny_checkpoint(tmp_path), device, greedy)
    for _ in range(8):  # no sequence needs another block
        one.step()
        assert device.log.count("to device") == 1
        device.log.clear()


@pytest.mark.parametrize(
    "changes",
    [
        {"presence_penalty": 0.1, "repetition_penalty": 1.1},
        {"logit_bias": {3: 1.0, 5: -2.0}},
        {"min_tokens": 30},
    ],
    ids=str,
)
def test_step_with_logits_processors_sends_nothing_and_waits_for_no_token(
    tmp_path: Path, device: Device, changes: dict[str, Any]
) -> None:
    """But for its inputs, as any other. A second graph samples again."""
    asked = SamplingParams(temperature=0.7, max_tokens=40, **changes)
    one = engine(tiny_checkpoint(tmp_path), device, asked)
    for _ in range(3):
        one.step()
    assert device.log == [
        what
        for n in (6, 7, 8)
        for what in (
            *("to device", "graph", "graph", "to host"),
            *(f"event {n}", f"wait for {n - 1}"),
        )
    ]


def test_top_p_without_triton_is_the_only_wait_of_a_step(
    tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch draws outside the graph: how wide the nucleus is decides how it is found."""
    monkeypatch.setattr(
        model_runner,
        "CudaGraphRunner",
        partial(CudaGraphRunner, capture=partial(Replayed, device.log), sampler=None),
    )
    one = engine(
        tiny_checkpoint(tmp_path), device, SamplingParams(temperature=0.7, top_p=0.9, max_tokens=40)
    )
    one.step()
    log = [what for what in device.log if what != "to device"]
    assert log == ["graph", "looks by nonzero", "to host", "event 6", "wait for 5"]


def test_embeddings_are_copied_without_an_extra_wait(tmp_path: Path, device: Device) -> None:
    one = engine(
        tiny_checkpoint(tmp_path),
        device,
        SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True),
    )
    for kind in KINDS:
        one.add(
            EngineRequest(
                kind, [5, 6, 7], SamplingParams(temperature=0.0, max_tokens=1), pooling=kind
            )
        )
    reported = [output for _ in range(3) for output in one.step()]
    log = [what for what in device.log if what != "to device"]
    steps = [["to host"] * 3, ["graph", "to host"], ["graph", "to host"]]
    assert log == [
        what
        for n, step in enumerate(steps, 6)
        for what in (*step, f"event {n}", f"wait for {n - 1}")
    ]
    assert {output.request_id for output in reported if output.embedding is not None} == set(KINDS)


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_caches_on_a_gpu_have_a_block_for_unused_rows_of_graphs(
    tmp_path: Path, device: Device, enforce_eager: bool
) -> None:
    config = EngineConfig(64, 32, GPU, torch.float32, enforce_eager=enforce_eager)
    model = load_model(open_checkpoint(tiny_checkpoint(tmp_path)), torch.float32, GPU)
    runner = Engine(model, config).runner
    assert [cache.kv.shape[1] for cache in runner.paged_model.kv_caches] == [34, 34]
    assert isinstance(runner.graph_runner, CudaGraphRunner)
    assert runner.graph_runner.enabled == (not enforce_eager)


class Operations(TorchFunctionMode):
    """The operations whose result, or what they write to, has a shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and tuple(result.shape) == self.shape:
            self.names.append(func.__name__)
        return result


def test_graph_writes_logits_where_all_graphs_have_them(tmp_path: Path, device: Device) -> None:
    """The LM head's product writes them, and nothing copies them."""
    greedy = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    one = engine(tiny_checkpoint(tmp_path), device, greedy)
    graphs = one.runner.graph_runner
    assert isinstance(graphs, CudaGraphRunner)
    assert {graph.logits.data_ptr() for graph in graphs.graphs.values()} == {
        graphs._logits_buffer.data_ptr()  # type: ignore[union-attr]
    }
    operations = Operations((4, one.model.spec.vocab_size))
    with operations:
        one.step()
    assert operations.names == ["__getitem__", "mm", "__getitem__"]


def test_fake_device_notices_a_look(device: Device) -> None:
    there = torch.ones(3, device=GPU) * 2
    assert there.tolist() == [2, 2, 2]
    there.to("cpu").pin_memory().to(GPU)
    assert bool((there > 1).all())
    assert device.log == ["looks by tolist", "looks by cpu", "slow copy", "looks by __bool__"]
