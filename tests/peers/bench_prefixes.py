"""Time to first token of a long prompt: computed, found on disk after a restart, found in memory.

    python tests/peers/bench_prefixes.py MODEL [--tokens 4096] [--device auto]

It prints seconds of wall time, and of the processor time of all threads, which other work on the
machine disturbs less.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine
from llmkit.runtime.prefix_folder import PAGE_SUFFIX, files_in

LIMIT = 1 << 40


def first_token(engine: Engine, prompt: list[int]) -> str:
    """Run a request to its end; a cell for each figure of its first token."""
    clock = time.perf_counter()
    processor = time.process_time()
    reported = ""
    engine.add(
        EngineRequest("one", prompt, SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True))
    )
    while engine.has_work:
        for output in engine.step():
            spent = time.perf_counter() - clock, time.process_time() - processor
            reported = reported or f"{output.cached_tokens:,} | {spent[0]:.2f} | {spent[1]:.2f}"
    return reported


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    prompt = [10 + (i * 7 + i * i // 5) % 1000 for i in range(given.tokens + 32)]
    options = EngineOptions(device=given.device, max_model_len=given.tokens + 64, max_num_seqs=4)
    print("| prefix | tokens cached | seconds | processor seconds |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for start in range(4):
            engine = load_engine(given.model, options, prefixes=(folder, LIMIT))
            first_token(engine, prompt[:40])  # what only the first request does
            print(
                "| on disk |" if start else "| computed |",
                first_token(engine, prompt),
                "|",
                flush=True,
            )
            if not start:
                print("| in memory |", first_token(engine, prompt), "|", flush=True)
                wait_until_written(Path(folder), given.tokens // 256)
            del engine


def wait_until_written(folder: Path, pages: int) -> None:
    """Until so many pages are in files; tell how large they are."""
    while len(files := files_in(folder, PAGE_SUFFIX)) < pages:
        time.sleep(0.1)
    print(
        f"| ({len(files)} files, {sum(size for _, size, _ in files) / 2**20:.0f} MiB) | | | |",
        flush=True,
    )


if __name__ == "__main__":
    main()
