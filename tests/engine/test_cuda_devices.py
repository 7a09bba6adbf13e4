"""Whole engines on a CPU that acts as a CUDA device: host and device tensors never meet.

Every kernel is bound to its arguments by Triton itself, as for a Hopper; none is compiled while a
graph is captured.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fake_cuda import GPU, Device, MixedError
from support.fake_cuda_api import fake_gpu
from support.tiny_adapters import write_adapter
from support.tiny_models import tiny_checkpoint
from support.tiny_quantized import PIECES, piece_checkpoint
from support.triton_checks import interpreted

from llmkit.bench.gpu.model_shapes import MODEL_CONFIGS, WEIGHT_SCHEMES, random_model
from llmkit.kernels import latent_attention
from llmkit.model.families import model_spec
from llmkit.runtime.engine import cuda_graphs
from llmkit.runtime.engine.cuda_graphs import CudaGraph, CudaGraphRunner
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.kernel_warm_up import warm_up
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine
from llmkit.runtime.part_loader import StartupReport, show_progress

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
DRAWN = replace(GREEDY, temperature=0.7, seed=1)
ASKED = [
    GREEDY,
    DRAWN,
    replace(GREEDY, logprobs=3),
    replace(GREEDY, prompt_logprobs=2, logprobs=0),
    replace(GREEDY, repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1),
    replace(DRAWN, logit_bias={3: 1.0}, min_tokens=3, ignore_eos=False),
]
FILTERED = replace(DRAWN, top_k=20, top_p=0.9, min_p=0.01)
PROMPTS = [[5, 6, 7], list(range(3, 60)), [9] * 17, [40, 41]]
OPTIONS = EngineOptions(
    device="cuda", kv_cache_memory=1 << 20, max_num_seqs=6, max_num_batched_tokens=48
)
COMMON = {"_add_norm_kernel"}
ATTENTION = {"_rope_and_cache_kernel", "_paged_attention_kernel"}  # but for latent attention
# name: (architecture, options, kernels besides those, what a step waits for)
LOADED: dict[str, tuple[str, dict[str, Any], set[str], set[tuple[str, str]]]] = {
    "plain": (
        "llama",
        {},
        {"_act_and_mul_kernel", "_choose_kernel", "_count_tokens_kernel"},
        set(),
    ),
    "filtered": ("llama", {}, {"_act_and_mul_kernel", "_choose_kernel"}, set()),
    "experts": (
        "mixtral",
        {},
        {"_sort_by_expert_kernel", "_fused_moe_kernel", "_choose_kernel"},
        set(),
    ),
    "windows": (
        "gemma2",
        {"kv_cache_dtype": "int8"},
        {"_act_and_mul_kernel", "_choose_kernel"},
        set(),
    ),
    "fp8 cache": (
        "qwen3",
        {"kv_cache_dtype": "fp8"},
        {"_act_and_mul_kernel", "_choose_kernel"},
        set(),
    ),
    "speculation": ("llama", {"speculate": 3}, {"_act_and_mul_kernel", "_choose_kernel"}, set()),
    "draft": (
        "llama",
        {"speculate": 3, "draft_model": ""},
        {"_act_and_mul_kernel", "_choose_kernel"},
        set(),
    ),
    "adapter": ("llama", {}, {"_act_and_mul_kernel", "_choose_kernel"}, set()),
    "host weights": ("llama", {"cpu_offload": 1 << 30}, {"_act_and_mul_kernel"}, set()),
    "delta net": (
        "gated delta net, gate beside each query",
        {"speculate": 3},
        {"_causal_conv_kernel", "_delta_tokens_kernel", "_delta_chunks_kernel"},
        set(),
    ),
    "latents": (
        "latent attention",
        {"speculate": 3},
        {"_latent_attention_kernel", "_paged_attention_kernel"},  # absorbed, and expanded prompts
        set(),
    ),
    "mamba": (
        "one block each layer, experts without gate",
        {},
        {"_causal_conv_kernel", "_scan_tokens_kernel", "_chunk_states_kernel"},
        set(),
    ),
}
MADE = {
    "fp8": "_act_and_mul_quantize_kernel",
    "int8": "_epilogue_kernel",
    "int4": "_weight_only_linear_kernel",
}  # kernels of weights


class AnyGrammar:
    """Lets the first hundred tokens come."""

    def fill_bitmask(self, bitmask: torch.Tensor) -> None:
        bitmask.copy_(torch.tensor([-1, -1, -1, 15] + [0] * (len(bitmask) - 4)))

    def accept_token(self, token_id: int) -> None: ...

    def is_terminated(self) -> bool:
        return False


def run(name: str, path: str) -> tuple[list[str], set[str], set[tuple[str, str]], list[str]]:
    """The errors, the launched kernels, what the host waited for (by file), and the log of steps.

    The log has each graph that is launched or captured, and each step that is no graph.
    """
    with fake_gpu() as gpu:
        device = gpu.device
        gpu.patch.setattr(latent_attention, "MIN_EXPANDED_QUERIES", 24)
        try:
            engine = _made(name) if name in MADE else _loaded(name, Path(path))
            wrong = _steps(name, engine, path, device)
        except MixedError as error:
            wrong = [str(error)]
    waits = {
        place
        for place in device.places
        if not place[0].startswith(("to device", "to host", "event"))
    }
    log = [what for what in device.log if what in ("graph", "capture", "eager")]
    return wrong, set(gpu.launches), waits, log


def _loaded(name: str, path: Path) -> Engine:
    _, options, *_ = LOADED[name]
    if "draft_model" in options:
        options = options | {"draft_model": str(path)}
    report = StartupReport()
    engine = load_engine(path, replace(OPTIONS, dtype="bfloat16", **options), report)
    (line,) = [line for line in report.fast_paths if line.startswith("CUDA graphs")]
    wanted = r"CUDA graphs: \d+, for up to 6 requests, in [\d.]+ s and 0 B \(planned: .*B\)"
    if name == "host weights":
        wanted = "CUDA graphs: off, the weights of . layers come from host memory"
    assert re.fullmatch(wanted, line), line
    assert report.plan is not None
    assert (report.plan.memory.cuda_graph_bytes > 0) == (name != "host weights")
    return engine


def _made(weights: str) -> Engine:
    spec = model_spec(MODEL_CONFIGS["SmolLM2-135M"] | {"num_hidden_layers": 2, "vocab_size": 512})
    model = random_model(spec, torch.bfloat16, GPU, WEIGHT_SCHEMES[weights])
    config = EngineConfig(
        128,
        40,
        GPU,
        torch.bfloat16,
        max_num_seqs=6,
        max_num_batched_tokens=48,
        async_scheduling=True,
    )
    engine = Engine(model, config)
    assert isinstance(engine.runner.graph_runner, CudaGraphRunner)
    engine.runner.capture_graphs()
    warm_up(engine.runner)
    return engine


def _steps(name: str, engine: Engine, path: str, device: Device) -> list[str]:
    adapter = None
    if name == "adapter":
        engine.add_adapter(adapter := "one", f"{path}-adapter")
    device.places.clear()
    device.log.clear()
    _log_eager_steps(engine, device)
    engine.compile_grammar = lambda _: AnyGrammar()
    for index, asked in enumerate([FILTERED] if name == "filtered" else ASKED):
        engine.add(EngineRequest(f"{index}", PROMPTS[index % len(PROMPTS)], asked, adapter=adapter))
        engine.step()
    if name == "plain":
        engine.add(EngineRequest("guided", [5, 6], GREEDY, grammar="any"))
        engine.add(
            EngineRequest("pooled", [5, 6, 7], replace(GREEDY, max_tokens=1), pooling="mean")
        )
    wrong = []
    while engine.has_work:
        wrong += [output.error for output in engine.step() if output.error]
    return wrong


def _log_eager_steps(engine: Engine, device: Device) -> None:
    models = [engine.runner.paged_model]
    if engine.runner.draft_model is not None:
        models.append(engine.runner.draft_model.paged_model)
    for paged_model in models:
        forward = paged_model.forward

        def logged(*args: Any, forward: Any = forward) -> torch.Tensor:
            device.log.append("eager")
            return forward(*args)

        paged_model.forward = logged  # type: ignore[method-assign]


def loaded_checkpoint(path: Path, name: str) -> None:
    """Write the model of a row of LOADED."""
    architecture = LOADED[name][0]
    if architecture in PIECES:
        piece_checkpoint(architecture, path)
    else:
        tiny_checkpoint(path, architecture)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("models")
    for architecture, name in {row[0]: name for name, row in LOADED.items()}.items():
        loaded_checkpoint(folder / architecture, name)
    write_adapter(folder / "llama", folder / "llama-adapter")
    calls = [(name, str(folder / row[0])) for name, row in LOADED.items()] + [
        (name, "") for name in MADE
    ]
    answers = interpreted("engine.test_cuda_devices", "run", calls, folder, interpret=False)
    return dict(zip((name for name, _ in calls), answers, strict=True))


@pytest.mark.parametrize("name", [*LOADED, *MADE])
def test_engine_steps_keep_host_and_device_apart(name: str, found: dict[str, Any]) -> None:
    wrong, kernels, waits, log = found[name]
    # The activation quantizes its outputs where the next linear layer has 8-bit inputs.
    quantizes = name in ("fp8", "int8")
    activation = "_act_and_mul_quantize_kernel" if quantizes else "_act_and_mul_kernel"
    more, allowed = (
        LOADED[name][2:] if name in LOADED else ({MADE[name], activation, "_choose_kernel"}, set())
    )
    assert wrong == []
    assert kernels >= COMMON | more | (ATTENTION if name != "latents" else set())
    assert waits == allowed
    assert "capture" not in log, "graphs are captured at the start"
    assert ("graph" in log) == (name != "host weights")
    # Every request comes after a step of the others, so that prompts are beside decodes.
    if name in ("speculation", "draft", "adapter"):
        assert log.count("graph") >= 9
        assert log.count("eager") == 1, "only the prompt with logprobs"


@pytest.mark.parametrize(
    ("kv_cache_dtype", "capability", "expected"),
    [("fp8", (8, 0), False), ("fp8", (8, 9), True), (None, (8, 0), True)],
)
def test_graphs_are_off_where_attention_reads_the_host(
    kv_cache_dtype: str | None,
    capability: tuple[int, int],
    expected: bool,
) -> None:
    spec = model_spec(MODEL_CONFIGS["SmolLM2-135M"] | {"num_hidden_layers": 1, "vocab_size": 64})
    with fake_gpu(has_triton=False) as gpu:
        gpu.patch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        gpu.patch.setattr(cuda_graphs, "tl", object())
        model = random_model(spec, torch.bfloat16, GPU)
        caches = [model.new_kv_cache(4, 16, kv_cache_dtype)]
        runner = CudaGraphRunner(model, caches, 2, 16, 2)
    assert runner.enabled is expected


def test_progress_of_cuda_graphs_is_a_bar_that_is_removed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for number in (1, 2, 3):
        show_progress("CUDA graphs", number, 3)
    lines = capsys.readouterr().err.split("\r")
    assert lines[1] == f"CUDA graphs [{'#' * 10}{'.' * 20}] 1/3"
    assert lines[2] == f"CUDA graphs [{'#' * 20}{'.' * 10}] 2/3"
    assert lines[3:] == [" " * len(lines[1]), ""]


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


@pytest.mark.parametrize("reported", MISTAKES)
def test_fake_device_notices(reported: str) -> None:
    with (
        fake_gpu(has_triton=False),
        torch.cuda.graph(None, None, None, "thread_local"),
        pytest.raises(MixedError, match=reported),
    ):
        MISTAKES[reported]()


def test_the_stand_in_notices_what_a_graph_would_not_find_again() -> None:
    with fake_gpu(has_triton=False):
        held = [ones(GPU)]
        graph = CudaGraph(lambda: _add(held[0]))
        graph.replay()
        held.insert(0, ones(GPU))
        with pytest.raises(MixedError, match="other memory"):
            graph.replay()


def _add(values: torch.Tensor) -> None:
    values.add_(1)
