"""Where the time of a decode step and of a prefill chunk goes: `python -m llmkit.bench.profile MODEL`.

The engine itself runs, scheduler and sampling included, under torch's profiler. What no operator accounts for is
Python.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from llmkit.kernels import native
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.types import Request, SamplingParams
from llmkit.runtime.load import EngineOptions, load_engine

LENGTH = 2048  # tokens of a request
SPARE = 256  # of them, for the steps in which others' prompts are computed
PROMPT = 512  # tokens of a prompt whose computing is profiled
# The first group whose word is in an operator's name takes its time.
GROUPS = {
    "attention": ("attention", "bmm", "softmax", "baddbmm"),
    "linear layers and head": ("linear", "addmm", "::mm", "product"),
    "KV cache reads and writes": ("index_select", "index_copy", "index_put", "gather", "store"),
    "norms": ("norm",),
    "sampling": ("argmax", "topk", "sort", "isfinite", "multinomial", "cumsum"),
}


def group_of(operator: str) -> str:
    """The group of an operator of the profiler ("aten::addmm")."""
    name = operator.lower()
    return next((group for group, words in GROUPS.items() if any(word in name for word in words)), "other operators")


class Timed:
    """The compiled kernels, which torch's profiler does not see, with the seconds that each of them took."""

    def __init__(self, library: Any) -> None:
        self.library = library
        self.seconds: dict[str, float] = defaultdict(float)

    def __getattr__(self, name: str) -> Callable[..., None]:
        kernel = getattr(self.library, name)

        def timed(*arguments: float) -> None:
            began = time.perf_counter()
            kernel(*arguments)
            self.seconds[name] += time.perf_counter() - began

        return timed


def profiled(engine: Engine, steps: int) -> dict[str, float]:
    """Milliseconds of a step by group, the mean of some steps of an engine that has work."""
    cuda = engine.config.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    wall = _timed(engine, steps)
    compiled, recordings = Timed(native.library), engine.runner.recordings
    possible, recordings.possible = recordings.possible, recordings.possible and cuda  # kernels are timed one by one
    native.library = compiled if native.library else None  # type: ignore[assignment]
    try:
        with profile(activities=activities) as record:
            _timed(engine, steps)
    finally:
        native.library, recordings.possible = compiled.library, possible
    spent: dict[str, float] = defaultdict(float)
    for name, seconds in compiled.seconds.items():
        spent[group_of(name)] += seconds * 1e3 / steps
    for event in record.key_averages():
        spent[group_of(event.key)] += (
            (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3 / steps
        )
    found = dict(sorted(spent.items(), key=lambda item: -item[1]))
    found["Python and waiting"] = max(0.0, wall - sum(found.values()))
    return found | {"whole step": wall}


def _timed(engine: Engine, steps: int) -> float:
    """Milliseconds of a step, without the profiler's own."""
    began = time.perf_counter()
    for _ in range(steps):
        engine.step()
    if engine.config.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / steps * 1e3


def busy_engine(model: str, options: EngineOptions, prompt_tokens: int, context: int, output: int) -> Engine:
    """An engine with `prompt_tokens` of prompts, `context` each, and as many requests for `output` tokens."""
    engine = load_engine(model, options)
    generator = torch.Generator().manual_seed(0)
    sampling = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
    for index in range(prompt_tokens // context):
        prompt = torch.randint(0, engine.model.spec.vocab, (context,), generator=generator).tolist()
        engine.add(Request(str(index), prompt, sampling))
    return engine


def main() -> int:
    """Profile a decode step of several batch sizes and a prefill chunk; a table on stderr, JSON on stdout."""
    parser = argparse.ArgumentParser(prog="python -m llmkit.bench.profile", description=main.__doc__)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="auto", help="default: auto")
    parser.add_argument("--device", default="auto", help="default: auto")
    parser.add_argument("--steps", type=int, default=20, help="decode steps that are averaged (default: 20)")
    parser.add_argument("--context", type=int, default=256, help="tokens of each prompt (default: 256)")
    arguments = parser.parse_args()
    context, output = arguments.context, LENGTH - arguments.context
    if min(arguments.steps, context) < 1 or output < 2 * arguments.steps + SPARE:
        parser.error(f"--context and twice --steps are more than {LENGTH - SPARE} tokens, or less than 1")
    options = EngineOptions(dtype=arguments.dtype, device=arguments.device, prefix_cache=False, max_model_len=LENGTH)
    results: dict[str, Any] = {"model": arguments.model, "torch": torch.__version__, "steps": {}}
    for batch in (1, 16, 32):
        engine = busy_engine(arguments.model, options, batch * context, context, output)
        while any(s.left > 1 for s in engine.scheduler.running) or engine.scheduler.waiting:
            engine.step()
        _timed(engine, 3)
        results["steps"][f"decode, batch {batch}"] = profiled(engine, arguments.steps)
    tokens = engine.config.max_num_batched_tokens
    engine = busy_engine(arguments.model, options, 8 * tokens, PROMPT, 1)  # five steps are run
    _timed(engine, 1)
    results["steps"][f"prefill, {tokens} tokens"] = profiled(engine, 2)
    for name, groups in results["steps"].items():
        whole = groups["whole step"]
        sys.stderr.write(f"{name}: {whole:.1f} ms\n")
        for group, spent in groups.items():
            if group != "whole step":
                sys.stderr.write(f"  {group:28} {spent:8.2f} ms  {spent / whole:5.0%}\n")
    sys.stdout.write(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
