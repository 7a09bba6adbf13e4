"""Models with an MTP head, trained for a moment on one text: time with and without drafts.

    python tests/peers/bench_mtp.py [--rounds 5] [--models tiny small] [--quantized]

The models are the tests' (GLM-4.5's shape). All modes give the same answers and take turns. CPU
seconds are of the process with one thread: on a machine with other work, compare these.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from common import table

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.tiny_draft_heads import glm_with_mtp, text_tokens

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.common.progress import SilentProgress
from llmkit.quant.quantize_checkpoint import quantize
from llmkit.quant.quantize_options import QuantizeOptions
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine

MODES: dict[str, int | str] = {"none": 0, "mtp:1": "mtp:1", "mtp:3": "mtp:3"}
# By name: what differs from the tests' model, and steps of training.
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "tiny": ({}, 150),
    "small": (
        {
            "hidden_size": 384,
            "intermediate_size": 1024,
            "moe_intermediate_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 64,
        },
        60,
    ),
}
REQUESTS = (1, 4)
OUTPUT_TOKENS = 96


def run(engine: Engine, num_requests: int) -> tuple[float, float, list[list[int]]]:
    """The seconds and CPU seconds that the requests take, and their answers."""
    prompts = [text_tokens(20, start=5 * number) for number in range(num_requests)]
    sampling = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    start, cpu_start = time.perf_counter(), time.process_time()
    answers = engine.generate(prompts, sampling)
    return time.perf_counter() - start, time.process_time() - cpu_start, answers


def measure(path: Path, rounds: int, label: str) -> list[list[str]]:
    """A row for each number of requests and mode."""
    engines = {
        name: load_engine(
            open_checkpoint(path),
            EngineOptions(
                device="cpu",
                max_model_len=128,
                prefix_cache=False,
                speculate=speculate,
                threads=1,
            ),
        )
        for name, speculate in MODES.items()
    }
    rows = []
    for num_requests in REQUESTS:
        before = {name: engine.stats() for name, engine in engines.items()}
        seconds: dict[str, list[float]] = {name: [] for name in MODES}
        cpu_seconds: dict[str, list[float]] = {name: [] for name in MODES}
        for number in range(-1, rounds):  # the first round warms up
            answers = {}
            for name in list(MODES)[:: -1 if number % 2 else 1]:
                spent, on_cpu, answers[name] = run(engines[name], num_requests)
                if number >= 0:
                    seconds[name].append(spent)
                    cpu_seconds[name].append(on_cpu)
            assert len({str(answer) for answer in answers.values()}) == 1, "other answers"
        for name, engine in engines.items():
            stats = engine.stats()
            drafted = stats.drafted_total - before[name].drafted_total
            accepted = stats.accepted_total - before[name].accepted_total
            num_steps = (stats.steps_total - before[name].steps_total) / (rounds + 1)
            share = median(cpu_seconds[name]) / median(cpu_seconds["none"])
            rows.append(
                [
                    label,
                    str(num_requests),
                    name,
                    f"{100 * accepted / drafted:.0f} %" if drafted else "",
                    f"{num_steps:.0f}",
                    f"{1e3 * median(seconds[name]):.0f}",
                    f"{1e3 * median(cpu_seconds[name]):.0f}",
                    f"{share:.2f}",
                ]
            )
    return rows


def main() -> None:
    """Measure, and print a table of medians over the rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--quantized", action="store_true", help="also carried through INT4 (rtn)")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            changes, steps = MODELS[name]
            path = glm_with_mtp(Path(folder) / name, steps=steps, **changes)
            rows += measure(path, arguments.rounds, name)
            if arguments.quantized:
                options = QuantizeOptions("rtn", device="cpu", evaluate=False, group_size=32)
                output = Path(folder) / f"{name}-int4"
                quantize(str(path), str(output), options, SilentProgress())
                rows += measure(output, arguments.rounds, f"{name}, INT4")
    print(
        table(
            [
                "model",
                "requests",
                "drafts",
                "accepted",
                "steps",
                "wall time, ms",
                "CPU, ms",
                "of none",
            ],
            rows,
        )
    )


if __name__ == "__main__":
    main()
