"""What `llmkit plan` predicts for two CPU replicas, beside what is measured.

python tests/peers/check_plan.py MODEL
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

LENGTHS = ("64-256", "32-96")
RATES = (0.5, 1.0, 1.5)
FIGURES = ("ttft_p50_ms", "ttft_p99_ms", "tpot_mean_ms", "e2e_p99_ms", "output_tps")
TOKENS = "512"  # of a step


def llmkit(*words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "llmkit.cli.main", *words, "--json", "--quiet"]
    made = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    return json.loads(made.stdout)


def main(model: str) -> None:
    folder = Path(mkdtemp())
    load = ["--input-tokens", LENGTHS[0], "--output-tokens", LENGTHS[1], "--no-quality"]
    one = str(folder / "one.json")
    llmkit(
        "bench",
        model,
        "--mode",
        "serve",
        "--concurrency",
        "1,2,4,8,16",
        "--requests",
        "24",
        *load,
        "-o",
        one,
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [
        "serve",
        model,
        "--dp",
        "2",
        "--port",
        str(port),
        "--max-num-batched-tokens",
        TOKENS,
        "--quiet",
    ]
    server = subprocess.Popen([sys.executable, "-m", "llmkit.cli.main", *words])
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{url}/ready", timeout=5)
                break
            except OSError:
                time.sleep(0.2)
        print(
            "| requests a second | figure | predicted | measured | ratio |\n|---|---|---|---|---|"
        )
        for rate in RATES:
            asked = [
                "--rate",
                f"{rate}/s",
                "--in",
                LENGTHS[0],
                "--out",
                LENGTHS[1],
                "--replicas",
                "2",
            ]
            (said,) = llmkit("plan", "--bench", one, *asked, "--max-num-batched-tokens", TOKENS)[
                "plans"
            ]
            tokenizer = ["--tokenizer", model]
            done = llmkit(
                "bench",
                "--url",
                url,
                "--mode",
                "serve",
                "--rate",
                str(rate),
                "--requests",
                "90",
                *load,
                *tokenizer,
            )
            (found,) = done["targets"][0]["scenarios"].values()
            for name in FIGURES:
                ratio = said[name] / found[name]
                print(
                    f"| {rate} | `{name}` | {said[name]:,.0f} | {found[name]:,.0f} | {ratio:.2f} |",
                    flush=True,
                )
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main(sys.argv[1])
