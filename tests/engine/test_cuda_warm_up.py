"""No request waits for a compiler: an engine on a GPU compiles all of its kernels at its start.

The engines run on a CPU that acts as a CUDA device. Triton binds each launch to its arguments as
for a Hopper, and says which kernel it would compile.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.test_cuda_devices import LOADED, MADE, AnyGrammar, loaded_checkpoint
from support.fake_cuda import GPU
from support.fake_cuda_api import fake_gpu
from support.tiny_adapters import write_adapter
from support.triton_checks import interpreted

from llmkit.bench.gpu.model_shapes import MODEL_CONFIGS, WEIGHT_SCHEMES, random_model
from llmkit.model.families import model_spec
from llmkit.runtime import part_loader
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_config import EngineConfig
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.kernel_warm_up import WarmUpStep, token_counts, warm_up, warm_up_steps
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine
from llmkit.runtime.part_loader import StartupReport

NUM_BATCHED_TOKENS = 560  # more than a graph has
NUM_SEQS = 10
OPTIONS = EngineOptions(
    device="cuda",
    dtype="bfloat16",
    kv_cache_memory=8 << 20,
    max_num_seqs=NUM_SEQS,
    max_num_batched_tokens=NUM_BATCHED_TOKENS,
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
DRAWN = replace(GREEDY, temperature=0.7, top_k=20, top_p=0.9, min_p=0.01, seed=1)
PENALIZED = replace(DRAWN, repetition_penalty=1.1, logit_bias={3: 1.0}, min_tokens=2)
WITH_PROMPT = replace(GREEDY, prompt_logprobs=2, logprobs=1)
# What `make test` serves; the others are slow tests.
QUICK = ("plain", "speculation", "delta net", "latents", "int4", "eager")
# Serves requests to an engine, with a warm-up or without: see `compiled_after_start`.
Serve = Callable[[str, bool], tuple[int, list[str], str]]


def compiled_after_start(name: str, is_warm: bool, path: str) -> tuple[int, list[str], str]:
    """Kernels that the warm-up compiles, those that requests compile, and the start's report."""
    with fake_gpu() as gpu:
        compiled = gpu.device.compiled
        counts = []

        def counted(*arguments: Any) -> int:
            before = len(compiled)
            num_steps = warm_up(*arguments) if is_warm else 0
            counts.append(len(compiled) - before)
            return num_steps

        gpu.patch.setattr(part_loader, "warm_up", counted)
        if name in MADE:
            engine = _made(name)
            counted(engine.runner)
            report = ""
        else:
            engine, report = _loaded(name, path)
        num_compiled = len(compiled)
        _serve(engine, "one" if name == "adapter" else None)
    return counts[0], [f"{kernel} {key}" for kernel, key in compiled[num_compiled:]], report


def _loaded(name: str, path: str) -> tuple[Engine, str]:
    options = {} if name == "eager" else dict(LOADED[name][1])
    if "draft_model" in options:
        options["draft_model"] = path
    if name == "adapter":
        options["adapters"] = {"one": f"{path}-adapter"}
    if name == "eager":
        options["max_cudagraph_capture_size"] = 0
    report = StartupReport()
    engine = load_engine(Path(path), replace(OPTIONS, **options), report)
    assert "kernels" in report.seconds
    return engine, next(line for line in report.fast_paths if line.startswith("kernels"))


def _made(weights: str) -> Engine:
    spec = model_spec(MODEL_CONFIGS["SmolLM2-135M"] | {"num_hidden_layers": 1, "vocab_size": 512})
    model = random_model(spec, torch.bfloat16, GPU, WEIGHT_SCHEMES[weights])
    config = EngineConfig(
        1024,
        700,
        GPU,
        torch.bfloat16,
        max_num_seqs=NUM_SEQS,
        max_num_batched_tokens=NUM_BATCHED_TOKENS,
        async_scheduling=True,
    )
    engine = Engine(model, config)
    engine.runner.capture_graphs()
    return engine


def _serve(engine: Engine, adapter: str | None) -> None:
    """Requests of many shapes, alone and together."""
    engine.compile_grammar = lambda _: AnyGrammar()
    longest = min(engine.config.max_model_len - 8, 600)
    count = 0

    def add(length: int, params: SamplingParams, **more: Any) -> None:
        nonlocal count
        count += 1  # so that no prompt is in the prefix cache
        prompt = [3 + (count * 7 + index) % 50 for index in range(min(length, longest))]
        engine.add(EngineRequest(f"{count}", prompt, params, **more))

    def run() -> None:
        while engine.has_work:
            assert not any(output.error for output in engine.step())

    for length in (1, 2, 5, 12, 20, 40, 100, 300, 600):
        add(length, WITH_PROMPT)  # without a graph
        run()
        add(length, DRAWN)
        run()
    for number in (1, 3, NUM_SEQS):
        for params in (GREEDY, PENALIZED, replace(GREEDY, logprobs=2)):
            for grammar in (None, "any"):
                for index in range(number):
                    add(4 + index, params, grammar=grammar, adapter=adapter if index % 2 else None)
                run()
    for length in (600, 33, 550):  # decodes beside prompts, with graphs and without
        add(3, replace(DRAWN, max_tokens=5))
        add(400, replace(WITH_PROMPT, max_tokens=5))
        engine.step()
        engine.step()
        add(length, GREEDY, adapter=adapter)
        run()
    for length in (2, 30, 560):
        add(length, replace(GREEDY, max_tokens=1), pooling="mean")
        run()


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """Runs a case in a process with Triton."""

    def run(name: str, is_warm: bool) -> tuple[int, list[str], str]:
        model = tmp_path / "model"
        loaded_checkpoint(model, name if name in LOADED else "plain")
        if name == "adapter":
            write_adapter(model, tmp_path / "model-adapter")
        (result,) = interpreted(
            "engine.test_cuda_warm_up",
            "compiled_after_start",
            [(name, is_warm, str(model))],
            tmp_path,
            interpret=False,
        )
        num_compiled, late, report = result
        return num_compiled, late, report

    return run


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name in (*LOADED, *MADE, "eager")
    ],
)
def test_warm_up_leaves_no_kernel_to_compile(name: str, serve: Serve) -> None:
    num_compiled, late, report = serve(name, True)
    assert late == []
    assert num_compiled > 0
    if report:
        assert report.startswith("kernels: compiled before the first request, by ")


def test_requests_compile_kernels_without_a_warm_up(serve: Serve) -> None:
    """Prompts without a graph, penalties and grammars: so the test above can fail."""
    num_compiled, late, _ = serve("plain", False)
    kernels = Counter(kernel.split()[0] for kernel in late)
    assert num_compiled == 0
    assert kernels.keys() >= {"_paged_attention_kernel", "_count_tokens_kernel", "_draw_kernel"}


def config_of(**sizes: Any) -> EngineConfig:
    return EngineConfig(
        **({"max_model_len": 4096, "num_blocks": 9, "device": GPU, "dtype": torch.bfloat16} | sizes)
    )


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"max_model_len": 3},
        {"max_num_batched_tokens": 1, "max_num_seqs": 1},
        {"max_num_batched_tokens": 48, "max_num_seqs": 6},
        {"max_model_len": 1 << 17},
    ],
    ids=str,
)
def test_warm_up_steps_are_within_the_sizes_of_the_engine(sizes: dict[str, Any]) -> None:
    config = config_of(**sizes)
    steps = warm_up_steps(config, num_drafts=1)
    assert len(steps) == len(set(steps))
    for step in steps:
        assert sum(step.query_lens) <= config.max_num_batched_tokens
        assert 0 < len(step.query_lens) == len(step.context_lens) <= config.max_num_seqs
        for query_len, context_len in zip(step.query_lens, step.context_lens, strict=True):
            assert 0 < query_len <= config.max_model_len - context_len
            assert step.num_drafts < query_len
    largest = min(config.max_num_batched_tokens, config.max_model_len * config.max_num_seqs)
    assert max(sum(step.query_lens) for step in steps) == largest


def test_warm_up_has_the_edges_of_classes_of_tokens() -> None:
    assert token_counts(1) == [1]
    assert token_counts(20) == [1, 2, 3, 8, 9, 16, 17, 20]
    counts = token_counts(8192)
    assert counts[-6:] == [512, 513, 1024, 2048, 4096, 8192]


def products(limit: int) -> list[Callable[[int], object]]:
    """What the kernels of products depend on, for numbers of tokens up to `limit`."""
    from llmkit.kernels import fp8_block_linear, fused_experts, quantized_linear

    def packed(tokens: int, outputs: int, programs: int) -> object:
        if tokens > quantized_linear.MAX_FUSED_ROWS:
            return "dense"
        _, rows, columns, *_ = quantized_linear.default_tile(tokens, torch.bfloat16, 9)
        tiles = -(-tokens // rows) * -(-outputs // columns)
        return rows, programs * 132 // tiles > 1

    def blocks(tokens: int, outputs: int) -> object:
        _, rows, columns, *_ = next(t for t in fp8_block_linear.TILES if t[0] >= tokens)
        return rows, 2 * 132 // max(1, -(-tokens // rows) * -(-outputs // columns)) > 1

    return [
        *(
            lambda tokens, n=n, programs=programs: packed(tokens, n, programs)
            for n in (64, 576, 4096, 6144, 28672)
            for programs in (1, 2, 3, 4)
        ),
        *(lambda tokens, n=n: blocks(tokens, n) for n in (64, 4096, 28672)),
        *(
            lambda tokens, share=share: fused_experts._tile(tokens * share, (9, 0))
            for share in (1 / 32, 1 / 16, 1 / 4)
        ),
    ]


def test_warm_up_has_every_class_of_products() -> None:
    limit = 8192
    for index, kernel in enumerate(products(limit)):
        expected = {kernel(tokens) for tokens in range(1, limit + 1)}
        assert {kernel(tokens) for tokens in token_counts(limit)} == expected, index


def test_warm_up_has_long_and_short_contexts() -> None:
    steps = warm_up_steps(config_of())
    assert WarmUpStep((1,), (4095,)) in steps
    assert WarmUpStep((1, 65), (4095, 0)) in steps
    assert WarmUpStep((8192,), (0,)) not in steps, "longer than the model"
