"""Whole engines on a CPU that passes for a CUDA device: nothing of the host meets what is on the device.

Every kernel is bound to its arguments by Triton itself, as for a Hopper; none is compiled while a graph is captured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import write_adapter
from card import GPU, Device, MixedError
from card_cuda import stand_in_cuda, stand_in_triton
from tiny import tiny_checkpoint
from triton_checks import interpreted

from llmkit.bench.steps import SHAPES, WEIGHTS, random_model
from llmkit.model import device as transfer
from llmkit.model.families import model_spec
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.graphs import CudaGraph, Graphs
from llmkit.runtime.engine.types import EngineConfig, EngineOptions, Request, SamplingParams
from llmkit.runtime.load import load_engine

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
DRAWN = replace(GREEDY, temperature=0.7, seed=1)
ASKED = [
    GREEDY, DRAWN, replace(GREEDY, logprobs=3), replace(GREEDY, prompt_logprobs=2, logprobs=0),
    replace(GREEDY, repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1),
    replace(DRAWN, logit_bias={3: 1.0}, min_tokens=3, ignore_eos=False),
]  # fmt: skip
FILTERED = replace(DRAWN, top_k=20, top_p=0.9, min_p=0.01)
PROMPTS = [[5, 6, 7], list(range(3, 60)), [9] * 17, [40, 41]]
OPTIONS = EngineOptions(device="cuda", kv_cache_memory=1 << 20, max_num_seqs=6, max_num_batched_tokens=48)
LOOK = ("looks by nonzero", "kernels/sampling.py")  # how wide a nucleus is, where it is not found in a graph
COMMON = {"_place", "_attend", "_add_norm"}
# name: (architecture, options, kernels besides COMMON, what a step waits for)
LOADED: dict[str, tuple[str, dict[str, Any], set[str], set[tuple[str, str]]]] = {
    "plain": ("llama", {}, {"_gate", "_sample"}, set()),
    "filtered": ("llama", {}, {"_gate", "_sample"}, {LOOK}),
    "experts": ("mixtral", {}, {"_sort", "_product", "_sample"}, set()),
    "windows": ("gemma2", {"kv_cache_dtype": "int8"}, {"_gate", "_sample"}, set()),
    "fp8 cache": ("qwen3", {"kv_cache_dtype": "fp8"}, {"_gate", "_sample"}, set()),
    "guesses": ("llama", {"speculate": 3}, {"_gate", "_sample"}, set()),
    "draft": ("llama", {"speculate": 3, "draft_model": ""}, {"_gate", "_sample"}, set()),
    "adapter": ("llama", {}, {"_gate", "_sample"}, set()),
    "host weights": ("llama", {"cpu_offload": 1 << 30}, {"_gate"}, set()),
}
MADE = {"fp8": "_quantize_rows", "int8": "_finish", "int4": "_grouped_product"}  # kernels of weights


class Guide:
    """Lets the first hundred tokens come."""

    def allowed(self) -> torch.Tensor:
        return torch.arange(512) < 100

    def advance(self, token: int) -> bool:
        return False


def run(name: str, path: str) -> tuple[list[str], set[str], set[tuple[str, str]]]:
    """What went wrong, the kernels that were launched, and what the host waited for, by file, in an engine's steps."""
    with pytest.MonkeyPatch.context() as patch:
        device = Device()
        stand_in_cuda(patch, device)
        launches = stand_in_triton(patch, device)
        transfer._upload.cache_clear()
        CudaGraph._shared = None
        try:
            with device:
                wrong = _steps(name, _made(name) if name in MADE else _loaded(name, Path(path)), path, device)
        except MixedError as error:
            wrong = [str(error)]
        finally:
            transfer._upload.cache_clear()
    waits = {place for place in device.places if not place[0].startswith(("to device", "to host", "event"))}
    return wrong, set(launches), waits


def _loaded(name: str, path: Path) -> Engine:
    _, options, *_ = LOADED[name]
    if "draft_model" in options:
        options = options | {"draft_model": str(path)}
    return load_engine(path, replace(OPTIONS, dtype="bfloat16", **options))


def _made(weights: str) -> Engine:
    spec = model_spec(SHAPES["SmolLM2-135M"] | {"num_hidden_layers": 2, "vocab_size": 512})
    model = random_model(spec, torch.bfloat16, GPU, WEIGHTS[weights])
    config = EngineConfig(128, 40, GPU, torch.bfloat16, max_num_seqs=6, max_num_batched_tokens=48, ahead=True)
    engine = Engine(model, config)
    assert isinstance(engine.runner.recordings, Graphs)
    engine.runner.recordings.prepare()
    return engine


def _steps(name: str, engine: Engine, path: str, device: Device) -> list[str]:
    adapter = None
    if name == "adapter":
        engine.add_adapter(adapter := "one", f"{path}-adapter")
    device.places.clear()
    engine.grammars = lambda _: Guide()
    for index, asked in enumerate([FILTERED] if name == "filtered" else ASKED):
        engine.add(Request(f"{index}", PROMPTS[index % len(PROMPTS)], asked, adapter=adapter))
        engine.step()
    if name == "plain":
        engine.add(Request("guided", [5, 6], GREEDY, grammar="any"))
        engine.add(Request("pooled", [5, 6, 7], replace(GREEDY, max_tokens=1), pooling="mean"))
    wrong = []
    while engine.has_work:
        wrong += [output.error for output in engine.step() if output.error]
    return wrong


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("models")
    for architecture in {architecture for architecture, *_ in LOADED.values()}:
        tiny_checkpoint(folder / architecture, architecture)
    write_adapter(folder / "llama", folder / "llama-adapter")
    calls = [(name, str(folder / row[0])) for name, row in LOADED.items()] + [(name, "") for name in MADE]
    answers = interpreted("test_cuda_devices", "run", calls, folder, interpret=False)
    return dict(zip((name for name, _ in calls), answers, strict=True))


@pytest.mark.parametrize("name", [*LOADED, *MADE])
def test_an_engines_steps_keep_host_and_device_apart(name: str, found: dict[str, Any]) -> None:
    wrong, kernels, waits = found[name]
    more, allowed = LOADED[name][2:] if name in LOADED else ({MADE[name], "_gate", "_sample"}, set())
    assert wrong == []
    assert kernels >= COMMON | more
    assert waits == allowed


def ones(where: torch.device | str) -> torch.Tensor:
    return torch.ones(4, device=where)


MISTAKES: dict[str, Callable[[], object]] = {
    "add of tensors of the host": lambda: ones(GPU).add(ones("cpu")),
    "cat of tensors of the host": lambda: torch.cat([ones(GPU), ones("cpu")]),
    "_int_mm of": lambda: torch._int_mm(ones(GPU).char().view(1, 4), ones(GPU).char().view(4, 1)),
    "looks by __bool__ while": lambda: bool((ones(GPU) > 0).all()),
    "slow copy while": lambda: ones("cpu").to(GPU),
    "pinned memory while": lambda: ones("cpu").pin_memory(),
}


@pytest.mark.parametrize("told", MISTAKES)
def test_the_stand_in_notices(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    stand_in_cuda(monkeypatch, device)
    with device, torch.cuda.graph(None, None, None, "thread_local"), pytest.raises(MixedError, match=told):
        MISTAKES[told]()


def test_the_stand_in_notices_what_a_graph_would_not_find_again(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    stand_in_cuda(monkeypatch, device)
    monkeypatch.setattr(CudaGraph, "_shared", None)
    with device:
        held = [ones(GPU)]
        graph = CudaGraph(lambda: _add(held[0]))
        graph.replay()
        held.insert(0, ones(GPU))
        with pytest.raises(MixedError, match="other memory"):
            graph.replay()


def _add(values: torch.Tensor) -> None:
    values.add_(1)
