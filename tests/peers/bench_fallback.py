"""The fallback through transformers' modeling code beside the native decoder, on one checkpoint.

    python tests/peers/bench_fallback.py [--model DIR | --work DIR] [--rounds 5] [--threads N]

The model is SmolLM2-135M-Instruct, which is native; the fallback is forced. Both engines are in
this process and take turns, in reverse order on odd rounds, because the speed of shared machines
changes within minutes. Their greedy answers must be equal.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import torch

from common import real_model, table
from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.model.families import checkpoint_spec
from llmkit.model.transformers_spec import transformers_spec
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.part_loader import StartupReport, load_part

# By name: the number of requests, the tokens of a prompt and of an answer.
SCENARIOS = {
    "decode, 1 request": (1, 16, 64),
    "decode, 8 requests": (8, 16, 64),
    "decode, 32 requests": (32, 16, 32),
    "prefill, 512 tokens": (1, 512, 1),
    "prefill, 8 x 256 tokens": (8, 256, 1),
}


def load_engines(path: Path) -> dict[str, Engine]:
    """The same checkpoint as a native model and by the fallback."""
    checkpoint = open_checkpoint(path)
    specs = {
        "native": checkpoint_spec(checkpoint),
        "fallback": transformers_spec(checkpoint.config, checkpoint.tensor_names),
    }
    options = EngineOptions(device="cpu", max_model_len=1024, prefix_cache=False, max_num_seqs=32)
    engines = {}
    for name, spec in specs.items():
        report = StartupReport()
        engines[name] = load_part(checkpoint, spec, options, report).make_engine(report, Engine)
        print(f"{name}: loaded in {sum(report.seconds.values()):.2f} s")
    return engines


def run(engine: Engine, scenario: str, seed: int) -> tuple[float, list[list[int]]]:
    """The seconds that a scenario takes, and its answers."""
    requests, prompt_tokens, output_tokens = SCENARIOS[scenario]
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(100, 20_000, (requests, prompt_tokens), generator=generator).tolist()
    sampling = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
    start = time.perf_counter()
    answers = engine.generate(prompts, sampling)
    return time.perf_counter() - start, answers


def main() -> None:
    """Measure, and print a table of tokens per second: medians over the rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--work", type=Path, default=Path(".bench-fallback"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    engines = load_engines(arguments.model or real_model(arguments.work))
    rows = []
    for scenario, (requests, prompt_tokens, output_tokens) in SCENARIOS.items():
        for engine in engines.values():
            run(engine, scenario, seed=0)  # warm up
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        for number in range(arguments.rounds):
            answers = {}
            for name in list(engines)[:: -1 if number % 2 else 1]:
                spent, answers[name] = run(engines[name], scenario, seed=number)
                seconds[name].append(spent)
            assert answers["native"] == answers["fallback"], f"{scenario}: other answers"
        tokens = requests * (output_tokens if output_tokens > 1 else prompt_tokens)
        speeds = {name: tokens / median(spent) for name, spent in seconds.items()}
        pairs = zip(seconds["native"], seconds["fallback"], strict=True)
        ratio = median(native / fallback for native, fallback in pairs)
        rows.append(
            [scenario, f"{speeds['native']:.1f}", f"{speeds['fallback']:.1f}", f"{ratio:.2f}"]
        )
    print(table(["scenario", "native, tokens/s", "fallback, tokens/s", "fallback / native"], rows))


if __name__ == "__main__":
    main()
