"""A tiny model with an MTP head, trained for a moment on one text: wall time with and without it.

    python tests/peers/bench_mtp.py [--rounds 5]

The model is the tests' (a GLM-4.5 of two layers); where drafting pays on a larger one follows from
its acceptance, not from these times. All modes give the same answers and take turns.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from common import table

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.tiny_draft_heads import glm_with_mtp, text_tokens

from llmkit.checkpoint.open_checkpoint import open_checkpoint
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine

MODES: dict[str, int | str] = {"none": 0, "mtp:1": "mtp:1", "mtp:3": "mtp:3"}
REQUESTS = 4
OUTPUT_TOKENS = 96


def run(engine: Engine) -> tuple[float, list[list[int]]]:
    """The seconds that the requests take, and their answers."""
    prompts = [text_tokens(20, start=5 * number) for number in range(REQUESTS)]
    sampling = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    start = time.perf_counter()
    answers = engine.generate(prompts, sampling)
    return time.perf_counter() - start, answers


def main() -> None:
    """Measure, and print a table of medians over the rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150, help="of training")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = glm_with_mtp(Path(folder) / "glm", steps=arguments.steps)
        engines = {
            name: load_engine(
                open_checkpoint(path),
                EngineOptions(
                    device="cpu", max_model_len=128, prefix_cache=False, speculate=speculate
                ),
            )
            for name, speculate in MODES.items()
        }
        seconds: dict[str, list[float]] = {name: [] for name in MODES}
        for number in range(-1, arguments.rounds):  # the first round warms up
            answers = {}
            for name in list(MODES)[:: -1 if number % 2 else 1]:
                spent, answers[name] = run(engines[name])
                if number >= 0:
                    seconds[name].append(spent)
            assert len({str(answer) for answer in answers.values()}) == 1, "other answers"
        rows = []
        for name, engine in engines.items():
            stats = engine.stats()
            acceptance = stats.accepted_total / stats.drafted_total if stats.drafted_total else 0.0
            steps = stats.steps_total / (arguments.rounds + 1)
            rows.append(
                [
                    name,
                    f"{100 * acceptance:.0f} %",
                    f"{steps:.0f}",
                    f"{1e3 * median(seconds[name]):.0f}",
                ]
            )
        print(table(["drafts", "accepted", "steps", "wall time, ms"], rows))


if __name__ == "__main__":
    main()
